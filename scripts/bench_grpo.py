"""Times whole GRPO steps with random weights made on the device; prints one JSON line.

    python scripts/bench_grpo.py --shape 1b --prompts 16 --samples 8 --prompt 128 --tokens 256

LoRA on all linear layers. A step is a rollout of the policy, a reward (the share of even tokens), the trainer's
log-probabilities of what was sampled (and with --beta above 0 the reference's), and one update on all of it. Medians of
the timed steps, in seconds; no completion ends early.
"""

import argparse
import functools
import json
import statistics
import time

import bench_train
import jax
import numpy as np

from jaxft import peft
from jaxft.core import tree
from jaxft.data.prompts import Prompt
from jaxft.data.questions import Questions
from jaxft.models.decoder import Execution
from jaxft.objectives import GRPO, OBJECTIVES
from jaxft.rollout import policy, score
from jaxft.rollout.config import RolloutConfig
from jaxft.rollout.source import Rewards, Rows, Said, Source
from jaxft.training import optim, prefetch, state, step


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=bench_train.SHAPES, default="1b")
    parser.add_argument("--quant", default="none", help="how the base is stored")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--rows", type=int, default=32, help="sequences of a micro-batch")
    parser.add_argument("--remat", default="save")
    parser.add_argument("--merge", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--steps", type=int, default=5)
    return parser


def even(prompts, completions) -> Said:
    """The share of even tokens."""
    del prompts
    values = np.array([[np.mean(np.array(c.tokens) % 2 == 0)] for c in completions], np.float32)
    return Said([""] * len(completions), values, [{}] * len(completions))


def main() -> None:
    args = arguments().parse_args()
    config, model = bench_train.base(bench_train.arguments().parse_args(["--shape", args.shape, "--quant", args.quant]))
    params = peft.adapt(model, jax.random.key(1), peft.LoRA(rank=args.rank, alpha=2 * args.rank))
    trainable, frozen = tree.partition(params, tree.trainable_mask(params))
    del params, model
    trainable = jax.tree.map(lambda a: a + 0.001, trainable)
    frozen = tree.split_layers(frozen, donate=True)
    execution = Execution(remat=args.remat, unroll=True)
    objective, settings = OBJECTIVES["grpo"], GRPO(beta=args.beta)
    asked = objective.asked(settings)
    scored = score.make_score(config, (*asked.needs, *asked.reports), dtype="bfloat16", execution=execution)
    optimizer = optim.make(optim.OptimConfig(lr=1e-6), trainable, total_steps=1000)
    train_state = state.create(trainable, optimizer, jax.random.key(2), "reference" in asked.views, {})
    run = step.make_step(objective, settings, scored, optimizer)
    rows, count = args.prompts * args.samples, args.prompts * args.samples // args.rows
    rollout = RolloutConfig(args.prompts, args.samples, max_new_tokens=args.tokens, batch=rows, merge=args.merge)
    drawn = np.random.default_rng(0).integers(0, config.vocab_size, (args.prompts * 4, args.prompt))
    questions = Questions([Prompt("", tuple(row.tolist()), "", str(i)) for i, row in enumerate(drawn)], None)
    sample = policy.sampler(rollout, config, frozen, dtype="bfloat16", end=[], execution=execution)
    annotate = policy.annotator(
        scored, asked.rollout_needs, functools.partial(objective.estimate, settings), frozen, others={},
        place=jax.device_put, rows=args.rows,
    )  # fmt: skip
    source = Source(
        rollout, questions, Rewards(("even",), (1.0,), even), sample, annotate, Rows(rows, 0),
        running={name: float(value) for name, value in objective.running(settings).items()},
    )  # fmt: skip
    seconds: dict[str, list[float]] = {}
    for turn in range(args.steps + 2):
        begin = time.perf_counter()
        batch, metrics = source.next(train_state)
        made = time.perf_counter()
        train_state, told = run(train_state, frozen, jax.device_put(prefetch.split(batch, count)))
        jax.block_until_ready(told)
        now = {name.removeprefix("time/"): value for name, value in metrics.items() if name.startswith("time/")}
        now |= {"update": time.perf_counter() - made, "step": time.perf_counter() - begin}
        for name, value in now.items() if turn >= 2 else ():
            seconds.setdefault(name, []).append(value)
    apart = {n.rpartition("/")[2]: round(v, 5) for n, v in metrics.items() if "sampling_logp_difference" in n}
    median = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
    print(json.dumps({
        **vars(args), **median, "sampler_apart": apart, "peak_gib": bench_train.in_use("peak_bytes_in_use"),
        "device": jax.local_devices()[0].device_kind, "jax": jax.__version__,
    }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
