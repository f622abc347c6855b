"""Times one training step of any shape with random weights made on the device; prints one JSON line.

    python scripts/bench_train.py --shape 1b --batch 8 --length 2048 --method lora
    python scripts/bench_train.py --shape 8b --batch 4 --length 2048 --method lora --remat full

Random tokens, every position a target. Median of the timed steps, each synchronised, after warm-up. Model FLOPs count
4 N a token for an adapter (forward and input gradient) and 6 N for full training, N the parameters that take part in a
product, plus causal attention; rematerialised work is not counted. The share is of the matrix-product rate measured in
the same run (8192 cubed, bfloat16). Peak memory is the compiler's: arguments, temporaries and outputs less aliases.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from typing import get_args

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

import jax
import jax.numpy as jnp

from jaxft import peft, quant
from jaxft.core import tree
from jaxft.models import families, flops, init
from jaxft.models.decoder import KEPT, Execution
from jaxft.objectives import OBJECTIVES, SFT
from jaxft.rollout.score import make_score
from jaxft.training import optim, paged, state, step

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "tie_word_embeddings": True},
}  # fmt: skip


@dataclasses.dataclass
class Model:
    """The two fields that `peft.adapt` reads."""

    params: tree.Params
    names: tuple


def arguments(doc: str | None = __doc__) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve"
    )
    parser.add_argument("--shape", choices=SHAPES, default="1b", help="1b: Llama-3.2-1B; 8b, 70b: Llama-3.1")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quant", choices=get_args(quant.config.Method), default="none", help="how the base is stored")
    parser.add_argument("--compute", default="exact", help="what a four-bit base is multiplied in: exact, int8, fp8")
    parser.add_argument("--dtype", default="bfloat16", help="of the base and of the computation")
    parser.add_argument("--remat", choices=("none", "offload", *KEPT), default="save")
    parser.add_argument("--layers", choices=("unroll", "scan"), default="unroll")
    parser.add_argument("--backend", default="auto", help="attention: auto, xla, cudnn, splash")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--offload", action="store_true", help="moments in the host's memory")
    parser.add_argument("--packed", type=int, default=0, help="documents of a row (0: no segments)")
    parser.add_argument("--metrics", action="store_true", help="also accuracy and entropy, as `jaxft train` reports")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="print the longest kernels of three more steps")
    return parser


def matmul_ceiling(n: int = 8192) -> float:
    """FLOP/s of bfloat16 products n x n x n, median of 20 groups of 5."""
    if jax.default_backend() == "cpu":
        n = 512
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    five = jax.jit(lambda a, b: [a := jnp.matmul(a, b) * jnp.bfloat16(0.01) for _ in range(5)][-1])
    times = timed(lambda: five(a, b).block_until_ready(), 5, 20)
    return 5 * 2 * n**3 / statistics.median(times)


def timed(run, warm_up: int, count: int) -> list[float]:
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def base(args: argparse.Namespace):
    """A model with random weights: (config, Model)."""
    raw = {"model_type": "llama", "rope_theta": 500000.0, "rms_norm_eps": 1e-5, **SHAPES[args.shape]}
    config, names = families.read(raw)
    key = jax.random.key(0, impl="rbg" if jax.default_backend() == "gpu" else None)
    packed = quant.chosen(quant.QuantConfig(args.quant, compute=args.compute))
    return config, Model(init.random(config, names, key, args.dtype, pack=packed and packed.packer), names)


def execution(args: argparse.Namespace) -> Execution:
    return Execution(remat=args.remat, unroll=args.layers == "unroll", backend=args.backend)


def peak_gib(compiled) -> float:
    """The compiler's peak: arguments, temporaries and outputs less aliases."""
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return round((used - memory.alias_size_in_bytes) / 2**30, 3)


def in_use(which: str) -> float:
    """GiB of the device's memory, as its allocator counts."""
    return round((jax.local_devices()[0].memory_stats() or {}).get(which, 0) / 2**30, 2)


def build(args: argparse.Namespace):
    """The compiled step with its arguments: (compiled, state, frozen, batches, config, names, compile seconds)."""
    config, model = base(args)
    names = model.names
    method = peft.LoRA(rank=args.rank, alpha=2 * args.rank) if args.method == "lora" else peft.Full()
    params = peft.adapt(model, jax.random.key(1), method)
    trainable, frozen = tree.partition(params, tree.trainable_mask(params, peft.method_of(method).select(method)))
    del params, model
    if args.method == "lora":  # a step with B = 0 would have zero gradients in A
        trainable = jax.tree.map(lambda a: a + 0.01, trainable)
        if args.layers == "unroll":
            frozen = tree.split_layers(frozen, donate=True)
    objective = OBJECTIVES["sft"]
    asked = objective.asked(SFT())
    needs = asked.needs + (asked.reports if args.metrics else ())
    score = make_score(config, needs, dtype=args.dtype, execution=execution(args))
    settings = optim.OptimConfig(name=args.optimizer, lr=1e-4, offload=args.offload)
    optimizer = optim.make(settings, trainable, total_steps=1000)
    shapes = state.abstract(trainable, optimizer, jax.random.key(2))
    places = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
    if args.offload:
        places = places._replace(opt_state=paged.places(shapes.opt_state, places.opt_state))
    train_state = state.create(trainable, optimizer, jax.random.key(2), shardings=places)
    batches = [batch(i, args, config.vocab_size) for i in range(4)]
    run = step.make_step(objective, SFT(), score, optimizer, step.Shardings(places, None, None))
    start = time.perf_counter()
    compiled = run.lower(train_state, frozen, batches[0]).compile()
    return compiled, train_state, frozen, batches, config, names, time.perf_counter() - start


def batch(index: int, args: argparse.Namespace, vocabulary: int) -> dict[str, jax.Array]:
    shape = (1, args.batch, args.length)
    out = {"tokens": jax.random.randint(jax.random.key(index), shape, 0, vocabulary)}
    out["loss_mask"] = jnp.broadcast_to(jnp.arange(args.length) > 0, shape)
    if args.packed:
        size = args.length // args.packed
        out["segments"] = jnp.broadcast_to(jnp.arange(args.length) // size + 1, shape)
        out["positions"] = jnp.broadcast_to(jnp.arange(args.length) % size, shape)
        out["loss_mask"] = out["positions"] > 0
    return out


def kernels(run, count: int = 30) -> list[tuple[str, float, float]]:
    """The longest kernels: (name, ms a step, launches a step)."""
    import collections
    import glob
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(3):
                run()
        data = jax.profiler.ProfileData.from_file(glob.glob(folder + "/**/*.xplane.pb", recursive=True)[0])
    ms: collections.Counter = collections.Counter()
    launches: collections.Counter = collections.Counter()
    for plane in data.planes:
        for line in plane.lines:
            if "GPU" in plane.name and line.name.startswith("Stream"):
                for event in line.events:
                    ms[event.name] += event.duration_ns / 3e6
                    launches[event.name] += 1
    return [(name[:80], round(t, 3), round(launches[name] / 3, 1)) for name, t in ms.most_common(count)]


def main() -> None:
    args = arguments().parse_args()
    ceiling = matmul_ceiling()
    compiled, train_state, frozen, batches, config, names, seconds = build(args)
    losses: list[float] = []

    def run() -> None:
        nonlocal train_state
        train_state, metrics = compiled(train_state, frozen, batches[len(losses) % 4])
        losses.append(float(metrics["loss"]))

    times = timed(run, 3, args.steps)
    median = statistics.median(times)
    per_token = flops.per_token(config, names, args.length, base_trained=args.method == "full")
    work = per_token * args.batch * args.length
    device = jax.local_devices()[0]
    result = {
        **vars(args),
        "device": device.device_kind,
        "jax": jax.__version__,
        "step_ms": round(median * 1e3, 2),
        "min_ms": round(min(times) * 1e3, 2),
        "max_ms": round(max(times) * 1e3, 2),
        "tokens_per_s": round(args.batch * args.length / median),
        "model_tflops": round(work / median / 1e12, 1),
        "matmul_tflops": round(ceiling / 1e12, 1),
        "share_of_matmul": round(work / median / ceiling, 4),
        "peak_gib": peak_gib(compiled),
        "in_use_peak_gib": in_use("peak_bytes_in_use"),
        "compile_s": round(seconds, 1),
        "trainable": tree.count(train_state.trainable),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
    }
    if args.profile:
        for row in kernels(run):
            print(row)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
