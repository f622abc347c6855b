"""Times one step of direct preference optimisation, with prompts computed once for both completions and without, and
with a reference that is scored in the step or known beforehand; prints one JSON line for each.

    python scripts/bench_dpo.py --shape 8b --pairs 4 --prompt 1024 --completion 512

Random weights made on the device, random tokens, LoRA on all linear layers. The same pairs in every line; the loss of
the first step is ln 2 up to rounding. For what else is measured and how, see bench_train.
"""

import argparse
import itertools
import json
import statistics
import time

import bench_train
import jax
import jax.numpy as jnp
import numpy as np

from jaxft import peft
from jaxft.core import tree
from jaxft.objectives import DPO, OBJECTIVES
from jaxft.rollout.score import make_score
from jaxft.training import optim, state, step


def arguments() -> argparse.ArgumentParser:
    parser = bench_train.arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=4, help="pairs of a step, one a row")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=512, help="tokens of a completion")
    return parser


def main() -> None:
    args = arguments().parse_args()
    config, model = bench_train.base(args)
    params = peft.adapt(model, jax.random.key(1), peft.LoRA(rank=args.rank, alpha=2 * args.rank))
    trainable, frozen = tree.partition(params, tree.trainable_mask(params))
    frozen = tree.split_layers(frozen, donate=True) if args.layers == "unroll" else frozen
    del params, model
    for known, share in itertools.product((False, True), (False, True)):
        print(json.dumps(measured(args, config, trainable, frozen, share, known)), flush=True)


def measured(args: argparse.Namespace, config, trainable, frozen, share: bool, known: bool) -> dict:
    objective, settings = OBJECTIVES["dpo"], DPO()
    score = make_score(config, objective.asked(settings).needs, dtype=args.dtype, execution=bench_train.execution(args))
    optimizer = optim.make(optim.OptimConfig(name=args.optimizer, lr=1e-4), trainable, total_steps=1000)
    begun = state.create(trainable, optimizer, jax.random.key(2), reference=not known)
    batch = pairs(args, config.vocab_size, share)
    if known:
        logp = jax.jit(lambda p, b: score("reference", p, jax.tree.map(lambda a: a[0], b))["logp"])
        batch["ref_logp"] = logp(tree.combine(trainable, frozen), batch)[None]
    start = time.perf_counter()
    run = step.make_step(objective, settings, score, optimizer).lower(begun, frozen, batch).compile()
    seconds, losses = time.perf_counter() - start, []

    def once() -> None:
        nonlocal begun
        begun, metrics = run(begun, frozen, batch)
        losses.append(float(metrics["loss"]))

    times = bench_train.timed(once, 2, args.steps)
    return {
        "shape": args.shape, "pairs": args.pairs, "prompt": args.prompt, "completion": args.completion,
        "quant": args.quant, "remat": args.remat, "shared_prompt": share, "known_reference": known,
        "step_ms": round(statistics.median(times) * 1e3, 2), "min_ms": round(min(times) * 1e3, 2),
        "pairs_per_s": round(args.pairs / statistics.median(times), 2), "peak_gib": bench_train.peak_gib(run),
        "compile_s": round(seconds, 1), "first_loss": round(losses[0], 6), "last_loss": round(losses[-1], 4),
        "device": jax.local_devices()[0].device_kind, "jax": jax.__version__,
    }  # fmt: skip


def pairs(args: argparse.Namespace, vocabulary: int, share: bool) -> dict[str, jax.Array]:
    """One pair a row, [1, pairs, ...], as `jaxft.data.Loader` lays them."""
    p, c = args.prompt, args.completion
    prompt, chosen, rejected = (
        jax.random.randint(jax.random.key(i), (args.pairs, n), 0, vocabulary) for i, n in ((3, p), (4, c), (5, c))
    )
    again = prompt[:, -1:] if share else prompt
    tokens = jnp.concatenate([prompt, chosen, again, rejected], axis=1)
    size, second = tokens.shape[1], again.shape[1]
    at = np.concatenate([np.arange(p + c), np.arange(p - second, p + c)])
    row = {
        "positions": at, "segments": 1 + (np.arange(size) >= p + c), "loss_mask": at >= p,
        "sequence_mask": np.ones(2, bool),
    }  # fmt: skip
    if share:
        width = 2 * (p + c)
        unfold = np.concatenate([np.arange(p + c), np.arange(p - 1), np.arange(p + c, size)])
        row |= {"unfold": unfold, "unfold_segments": 1 + (np.arange(width) >= p + c)}
        row["fold"] = np.concatenate([np.arange(p + c), np.arange(width - c - 1, width)])
        row["fold_again"] = np.where(np.arange(size) < p - 1, p + c + np.arange(size), -1)
    row = {name: a if a.dtype == bool else a.astype(np.int32) for name, a in row.items()}
    batch = {name: jnp.broadcast_to(a, (1, args.pairs, *a.shape)) for name, a in row.items()}
    return {"tokens": tokens[None], **batch}


if __name__ == "__main__":
    main()
