"""Times generation with random weights made on the device; prints one JSON line for each base and batch.

    python scripts/bench_generate.py --shape 1b --batch 64 --prompt 128 --tokens 256

Sampled at temperature 1 (--greedy: not), from prompts to the last completion, as `jaxft generate` does it, reading of
prompts included; median of the repeats. ``ms_per_token`` is that of one turn of all rows: the time of the whole less
that of a run of one chunk, over the tokens between. ``bandwidth`` is the bytes that such a turn cannot but read, all
weights and the keys and values of all rows at their mean length, over that time.
"""

import argparse
import json
import statistics

import bench_train
import jax

from jaxft.core import tree
from jaxft.models.decoder import Execution
from jaxft.rollout import engine, generate
from jaxft.rollout.generate import GenerateConfig


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=bench_train.SHAPES, default="1b")
    parser.add_argument("--quant", nargs="+", default=["none"], help="how the base is stored")
    parser.add_argument("--batch", type=int, nargs="+", default=[64], help="rows decoded together")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--scan", action="store_true", help="layers scanned rather than unrolled: quick to compile")
    return parser


def main() -> None:
    args = arguments().parse_args()
    for kind in args.quant:
        own = bench_train.arguments().parse_args(["--shape", args.shape, "--quant", kind])
        config, model = bench_train.base(own)
        params = model.params if args.scan else tree.split_layers(model.params, donate=True)
        del model
        for batch in args.batch:
            print(json.dumps(measured(args, config, params, kind, batch)), flush=True)
        del params


def measured(args: argparse.Namespace, config, params: tree.Params, kind: str, batch: int) -> dict:
    prompts = jax.random.randint(jax.random.key(3), (batch, args.prompt), 0, config.vocab_size).tolist()
    temperature, execution = 0.0 if args.greedy else 1.0, Execution(unroll=not args.scan)

    def run(tokens: int) -> float:
        settings = GenerateConfig(tokens, temperature, batch=batch)

        def once() -> None:
            generate.generate(config, params, prompts, settings, (), execution=execution)

        return statistics.median(bench_train.timed(once, 1, args.repeats))

    whole, seconds = run(args.tokens), 0.0
    if args.tokens > engine.CHUNK:
        seconds = (whole - run(engine.CHUNK)) / (args.tokens - engine.CHUNK)
    mean = args.prompt + args.tokens / 2
    cache = 4 * config.num_layers * config.num_kv_heads * config.head_dim * batch * mean
    weights = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params))
    return {
        "shape": args.shape, "quant": kind, "batch": batch, "prompt": args.prompt, "tokens": args.tokens,
        "greedy": args.greedy, "seconds": round(whole, 4), "tokens_per_s": round(batch * args.tokens / whole),
        "ms_per_token": round(seconds * 1e3, 3),
        "bandwidth_tb_s": round((weights + cache) / max(seconds, 1e-9) / 1e12, 2),
        "peak_gib": bench_train.in_use("peak_bytes_in_use"),
        "device": jax.local_devices()[0].device_kind, "jax": jax.__version__,
    }  # fmt: skip


if __name__ == "__main__":
    main()
