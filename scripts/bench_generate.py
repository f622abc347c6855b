"""Times decoding with random weights made on the device; prints one JSON line for each base.

    python scripts/bench_generate.py --shape 8b --batch 1 --quant none nf4

Greedy. The time of a token is that of the longer of two runs less that of the shorter, over the tokens between, so that
the prompt and the start are not in it; median of the repeats. Layers are scanned, as `jaxft generate` does; with
--unroll they are separate arrays.
"""

import argparse
import json
import statistics

import bench_train
import jax
import jax.numpy as jnp

from jaxft.core import tree
from jaxft.models.decoder import Execution
from jaxft.rollout import generate
from jaxft.rollout.sample import Sampling

SHORT = 32


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=bench_train.SHAPES, default="8b")
    parser.add_argument("--quant", nargs="+", default=["none", "nf4"], help="how the base is stored")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="rows decoded together")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=160, help="tokens of the longer run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--unroll", action="store_true", help="a Python loop over layers: slow to compile")
    return parser


def main() -> None:
    args = arguments().parse_args()
    for kind in args.quant:
        own = bench_train.arguments().parse_args(["--shape", args.shape, "--quant", kind])
        config, model = bench_train.base(own)
        params = tree.split_layers(model.params, donate=True) if args.unroll else model.params
        del model
        for batch in args.batch:
            print(json.dumps(measured(args, config, params, kind, batch)), flush=True)
        del params


def measured(args: argparse.Namespace, config, params: tree.Params, kind: str, batch: int) -> dict:
    prompts = jax.random.randint(jax.random.key(3), (batch, args.prompt), 0, config.vocab_size)
    laid = generate._Laid(prompts, jnp.ones_like(prompts))
    execution, sampling, ends = Execution(unroll=args.unroll), Sampling(greedy=True), jnp.asarray([-1], jnp.int32)

    def run(budget: int) -> float:
        def once() -> None:
            made = generate._run(
                config, execution, sampling, budget, params, laid, jnp.float32(0.0), ends, jax.random.key(0)
            )
            made.tokens_BN.block_until_ready()

        return statistics.median(bench_train.timed(once, 1, args.repeats))

    seconds = (run(args.tokens) - run(SHORT)) / (args.tokens - SHORT)
    return {
        "shape": args.shape, "quant": kind, "batch": batch, "unroll": args.unroll,
        "ms_per_token": round(seconds * 1e3, 3),
        "tokens_per_s": round(batch / seconds), "base_gib": bench_train.in_use("bytes_in_use"),
        "device": jax.local_devices()[0].device_kind, "jax": jax.__version__,
    }  # fmt: skip


if __name__ == "__main__":
    main()
