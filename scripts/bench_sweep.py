"""Times members trained side by side in one step against the same runs alone; three JSON lines for each batch.

    python scripts/bench_sweep.py                               # 8 LoRA on the 1B shape, 1 x 2048 and 2 x 2048 a member
    python scripts/bench_sweep.py --shape tiny --members 3 --length 64 --steps 2        # a smoke test

`alone` is one step of one run, `in turn` one step of each of the members' runs, one after the other (with the memory
of one), `together` one step of all of them. Shapes, knobs, and what time and memory mean: see bench_train.py.
"""

import argparse
import json
import statistics

import bench_train  # sets the environment: before jax
import jax
import jax.numpy as jnp

from jaxft import peft
from jaxft.core import align, tree
from jaxft.objectives import OBJECTIVES, SFT
from jaxft.rollout import members
from jaxft.training import state, sweep
from jaxft.training.config import OptimConfig


def arguments() -> argparse.Namespace:
    parser = bench_train.arguments(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2], help="rows of a step, for each member")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--method", choices=("lora",), default="lora")
    return parser.parse_args()


def together(args: argparse.Namespace):
    """`bench_train.build` of all members: (compiled, state, frozen, batches)."""
    config, model = bench_train.base(args)
    method, seeds = peft.LoRA(rank=args.rank, alpha=2 * args.rank), range(args.members)
    adapted = [peft.adapt_for_training(model, jax.random.key(1 + seed), [method]) for seed in seeds]
    trainable, frozen, differs = align.together([params for params, _, _ in adapted], adapted[0][1])
    del adapted, model
    trainable = jax.tree.map(lambda a: a + 0.01, trainable)
    if args.layers == "unroll":
        constants, common = tree.partition(frozen, differs)
        frozen = tree.combine(constants, tree.split_layers(common, donate=True))
    objective = OBJECTIVES["sft"]
    asked = objective.asked(SFT())
    needs = asked.needs + (asked.reports if args.metrics else ())
    score = members.make_score(config, needs, differs, dtype=args.dtype, execution=bench_train.execution(args))
    one = jax.eval_shape(lambda: sweep.member(trainable, 0))
    rates = [1e-4 * (1 + seed) for seed in seeds]
    optimizer = sweep.make_optimizer(OptimConfig(name=args.optimizer), one, rates, 1000)
    train_state = state.create(trainable, optimizer, jnp.stack([jax.random.key(2 + seed) for seed in seeds]))
    batches = [bench_train.batch(i, args, config.vocab_size) for i in range(4)]
    step = sweep.make_step(objective, SFT(), score, optimizer, args.members)
    return step.lower(train_state, frozen, batches[0]).compile(), train_state, frozen, batches


def measure(compiled, states: list, frozen, batches, steps: int) -> tuple[float, float]:
    """(median seconds of a step of every state, their mean loss after the last)."""
    count, last = 0, 0.0

    def run() -> None:
        nonlocal count, last
        losses = []
        for i, now in enumerate(states):
            states[i], metrics = compiled(now, frozen, batches[count % 4])
            losses.append(jnp.mean(metrics["loss"]))
        count, last = count + 1, statistics.mean(map(float, losses))  # waits for the device

    return statistics.median(bench_train.timed(run, 3, steps)), last


def main() -> None:
    args = arguments()
    for batch in args.batch:
        each = argparse.Namespace(**{**vars(args), "batch": batch})
        compiled, first, frozen, batches, *_ = bench_train.build(each)
        peak = bench_train.peak_gib(compiled)
        copies = [jax.tree.map(jnp.copy, first) for _ in range(args.members)]
        lines = {"alone": (1, measure(compiled, [first], frozen, batches, args.steps), peak)}
        lines["in turn"] = (args.members, measure(compiled, copies, frozen, batches, args.steps), peak)
        del compiled, first, copies, frozen
        compiled, stacked, frozen, batches = together(each)
        taken = measure(compiled, [stacked], frozen, batches, args.steps)
        lines["together"] = (args.members, taken, bench_train.peak_gib(compiled))
        del compiled, stacked, frozen
        report(each, lines)


def report(args: argparse.Namespace, lines: dict) -> None:
    device = jax.local_devices()[0]
    for what, (count, (seconds, loss), peak) in lines.items():
        row = {
            "what": what, **vars(args), "members": count, "device": device.device_kind, "jax": jax.__version__,
            "step_ms": round(seconds * 1e3, 2), "tokens_per_s": round(count * args.batch * args.length / seconds),
            "peak_gib": peak, "of_in_turn": round(seconds / lines["in turn"][1][0], 3), "last_loss": round(loss, 4),
        }  # fmt: skip
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
