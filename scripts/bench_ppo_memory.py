"""Memory of PPO's four models: as four views of one base, or as four models; prints one JSON line for each way.

    JAX_PLATFORMS=cpu python scripts/bench_ppo_memory.py --shape 1b --batch 8 --length 512
    python scripts/bench_ppo_memory.py --shape 1b --batch 8 --length 512 --run

one base: policy, value and reward are LoRA on the same arrays, and the reference is the policy's adapter as it began.
four models: four such arrays, and LoRA on three of them. four models, whole: policy and value train all of their own.
Nothing is made: the step is compiled from shapes, and the compiler says what it needs (``step_gib``: temporaries,
outputs less aliases) besides what stays on the device from step to step (``resident_gib``: each array once; state,
frozen weights, reference and reward model). With ``--run`` all of it is made and a step taken; then ``peak_gib`` is
what the device's allocator saw at most (null where it does not count, as on a CPU). Run one way (--way) at a time then.
"""

import argparse
import json
from typing import Any

import bench_train
import jax
import jax.numpy as jnp
from bench_train import Model

from jaxft import peft, quant
from jaxft.core import tree
from jaxft.models import families, init
from jaxft.objectives import OBJECTIVES, PPO, terms
from jaxft.rollout.score import REWARD, make_score
from jaxft.training import optim, state, step

WAYS = {"one base": (True, "lora"), "four models": (False, "lora"), "four models, whole": (False, "full")}


def arguments() -> argparse.ArgumentParser:
    parser = bench_train.arguments(__doc__)
    parser.set_defaults(length=512, layers="scan")
    parser.add_argument("--way", choices=WAYS, help="default: each, one after the other")
    parser.add_argument("--run", action="store_true", help="make the arrays and take a step")
    return parser


def made(args: argparse.Namespace, config, names, scoring: tuple, way: str) -> tuple[Any, Any, Any]:
    """Trainable and frozen parameters of policy and value, and what else stays: the reward model, another reference."""
    shared, method = WAYS[way]
    packer = quant.chosen(quant.QuantConfig(args.quant, compute=args.compute))
    draw = lambda i: init.random(config, names, jax.random.key(i), args.dtype, pack=packer and packer.packer)  # noqa: E731

    def adapted(base: tree.Params, names: tuple, key: int, how: str) -> tuple[tree.Params, tree.Params]:
        choice = peft.LoRA(rank=args.rank, alpha=2 * args.rank) if how == "lora" else peft.Full()
        return peft.adapt_for_training(Model(base, names), jax.random.key(key), [choice])[:2]

    def headed(base: tree.Params) -> tree.Params:
        return {n: p for n, p in base.items() if n != "head"} | {
            "score": jnp.zeros((config.hidden_size, 1), args.dtype)
        }

    base = draw(0)
    others = [base] * 3 if shared else [draw(i) for i in (1, 2, 3)]
    policy, mask = adapted(base, names, 10, method)
    critic, critic_mask = adapted(headed(others[0]), scoring, 11, method)
    reward, _ = adapted(headed(others[1]), scoring, 12, "lora")
    if method == "full":
        reward = headed(others[1])
    trainable, frozen = tree.partition({**policy, terms.CRITIC: critic}, {**mask, terms.CRITIC: critic_mask})
    return trainable, frozen, {"reward": reward} | ({} if shared else {"reference": others[2]})


def measured(args: argparse.Namespace, way: str) -> dict[str, Any]:
    raw = {"model_type": "llama", "rope_theta": 500000.0, "rms_norm_eps": 1e-5, **bench_train.SHAPES[args.shape]}
    config, names = families.read(raw)
    config_1, names_1 = families.scoring(config, names, 1)
    make = lambda: made(args, config, names, names_1, way)  # noqa: E731
    trainable, frozen, beside = make() if args.run else jax.eval_shape(make)
    objective, settings = OBJECTIVES["ppo"], PPO()
    how: dict[str, Any] = {"dtype": args.dtype, "execution": bench_train.execution(args)}
    speaks, values = make_score(config, objective.asked(settings).needs, **how), make_score(config_1, (REWARD,), **how)

    def score(view: str, params: tree.Params, batch: Any, key: Any = None) -> dict[str, jax.Array]:
        if view == "value":
            return {"value": values(view, params, batch, key)[REWARD]}
        return speaks(view, params, batch, key)

    optimizer = optim.make(optim.OptimConfig(name=args.optimizer, lr=1e-4), trainable, total_steps=1000)
    reference = WAYS[way][0]  # the policy's own start
    if args.run:
        begun = state.create(trainable, optimizer, jax.random.key(2), reference)
        del trainable
    else:
        begun = state.abstract(trainable, optimizer, jax.random.key(2), reference)
    batch = rows(args, config.vocab_size)
    compiled = step.make_step(objective, settings, score, optimizer).lower(begun, frozen, batch).compile()
    memory = compiled.memory_analysis()
    used = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    base = terms.actor(frozen)
    resident = size(begun) + size(base)
    resident += sum(size(own, base if reference else None) for own in (frozen[terms.CRITIC], *beside.values()))
    if args.run:
        jax.block_until_ready(compiled(begun, frozen, batch)[1]["loss"])
    return {
        "way": way, "shape": args.shape, "batch": args.batch, "length": args.length, "quant": args.quant,
        "remat": args.remat, "resident_gib": round(resident / 2**30, 3), "step_gib": round(used / 2**30, 3),
        "total_gib": round((resident + used) / 2**30, 3),
        "peak_gib": (bench_train.in_use("peak_bytes_in_use") or None) if args.run else None,
        "device": jax.local_devices()[0].device_kind, "jax": jax.__version__,
    }  # fmt: skip


def size(params: Any, known: Any = None) -> int:
    """Bytes of the arrays of ``params`` but for those that ``known`` has at the same path."""
    held = dict(tree.arrays(known or {}))
    new = [a for path, a in tree.arrays(params) if path not in held]
    return sum(a.size * a.dtype.itemsize for a in new if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key))


def rows(args: argparse.Namespace, vocabulary: int) -> dict[str, jax.Array]:
    """A rollout's rows with what PPO estimated of them, [1, batch, length]: the second half is what was written."""
    shape = (1, args.batch, args.length)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, vocabulary)
    at = jnp.broadcast_to(jnp.arange(args.length, dtype=jnp.int32), shape)
    scores = ("advantage", "old_logp", "sampler_logp", "ref_logp", "old_value", "returns")
    return {
        "tokens": tokens, "positions": at, "segments": jnp.ones(shape, jnp.int32), "loss_mask": at >= args.length // 2,
        "sequence_mask": jnp.ones((1, args.batch, 1), bool), **{name: jnp.zeros(shape) for name in scores},
    }  # fmt: skip


def main() -> None:
    args = arguments().parse_args()
    for way in [args.way] if args.way else WAYS:
        print(json.dumps(measured(args, way)), flush=True)


if __name__ == "__main__":
    main()
