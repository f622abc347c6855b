"""The real training step compiled for TPU slices that are not here: it fits, and what it must never hold is not in it.

Shapes only, nothing is allocated; the numbers are the TPU compiler's own plan. Machine code is written for a small
model only: the kernels' own, at real shapes, is in tests/models/test_attention_splash.py.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from jaxft import peft
from jaxft.core import tree
from jaxft.models.decoder import Execution
from jaxft.quant import chosen
from jaxft.sharding import rules
from jaxft.training import state
from jaxft.training.config import OptimConfig
from tests.models.published import PUBLISHED
from tests.sharding import planned, steps

GIB = 2**30
LLAMA_1B = {k: v for k, v in PUBLISHED["Llama-3.2-1B"].items() if k != "rope_scaling"}
LLAMA_8B = {**LLAMA_1B, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
            "tie_word_embeddings": False}  # fmt: skip
LLAMA_70B = {**LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
             "num_attention_heads": 64, "num_key_value_heads": 8}  # fmt: skip
LORA = peft.LoRA(rank=16)
ALL = peft.LoRA(rank=16, targets="all-linear")


class Case(NamedTuple):
    """A step: slice, mesh (data x fsdp x tensor), model, method, rows and tokens, what remat keeps; GiB a chip."""

    slice_: str
    dims: tuple[int, int, int]
    raw: dict[str, Any]
    method: Any
    rows: int
    length: int
    remat: str
    chip: float
    limit: float
    """Regression bound on memory, GiB; the chip has far more."""
    quant: str = "none"
    offload: bool = False


# rows of 1536 or 3072 tokens: no other axis is that long
CASES = {
    "8B LoRA on v5e:2x4": Case("v5e:2x4", (1, 4, 2), LLAMA_8B, LORA, 8, 1536, "full", 16, 3.7),
    "1B in full on v5e:2x4": Case("v5e:2x4", (1, 8, 1), LLAMA_1B, peft.Full(), 8, 1536, "full", 16, 4.0),
    "1B in full on v6e:4x4": Case("v6e:4x4", (2, 4, 2), LLAMA_1B, peft.Full(), 16, 1536, "attn", 32, 3.9),
}


# QLoRA on all linear layers; MiB on the host: two float32 moments of 41.9M numbers, 32 x 1536 x 4096 bfloat16 inputs
QLORA = {
    "8B NF4 on v5e:1x1": (Case("v5e:1x1", (1, 1, 1), LLAMA_8B, ALL, 1, 1536, "full", 16, 7.3, "nf4"), 0),
    "8B NF4 with host memory on v5e:1x1": (
        Case("v5e:1x1", (1, 1, 1), LLAMA_8B, ALL, 1, 1536, "offload", 16, 6.8, "nf4", True),
        320 + 384,
    ),
    "70B NF4 on v5e:2x4": (Case("v5e:2x4", (1, 8, 1), LLAMA_70B, ALL, 8, 2048, "full", 16, 12.0, "nf4"), 0),
}

# machine code takes its time by the shape of what it computes
TINY = {**LLAMA_8B, "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024}  # fmt: skip
SMALL = {
    "QLoRA on v5e:2x2": Case("v5e:2x2", (1, 2, 2), TINY, ALL, 2, 256, "full", 16, 1.0, "nf4"),
    "in full on v6e:2x2": Case("v6e:2x2", (1, 2, 2), TINY, peft.Full(), 2, 256, "attn", 32, 1.0),
}


def made_of(case: Case) -> steps.Parts:
    """What the step is made of."""
    quant = chosen(case.quant)
    settings = OptimConfig(offload=case.offload)
    return steps.parts(case.raw, case.method, jnp.bfloat16, settings, abstract=True, quant=quant)


def lowered(case: Case) -> Any:
    """The step, not compiled."""
    alone = {"chips_per_host_bounds": (1, 1, 1)} if case.slice_ == "v5e:1x1" else {}
    mesh = steps.mesh(case.dims, topologies.get_topology_desc(case.slice_, "tpu", **alone).devices)
    made = made_of(case)
    where = steps.shardings(made, mesh, case.offload)
    how = Execution(remat=case.remat, mesh=mesh, gather=rules.gather(mesh))
    begin = state.abstract(made.trainable, made.optimizer, jax.random.key(0))
    begin = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), begin, where.state)
    return steps.build(made, jnp.bfloat16, how, where).lower(
        begin, made.frozen, steps.shapes(1, case.rows, case.length, where.batch)
    )


def arrays(program: str) -> set[tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every array in a compiled program."""
    found = re.findall(r"\b(pred|bf16|[fsu]\d+)\[([\d,]+)\]", program)
    return {(dtype, tuple(int(n) for n in shape.split(","))) for dtype, shape in found}


def exchanged(program: str) -> set[tuple[str, tuple[int, ...]]]:
    """What the chips send each other."""
    collective = r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
    lines = [line for line in program.splitlines() if re.search(collective, line)]
    return arrays("\n".join(line.split("channel_id")[0] for line in lines))


def held(made: steps.Parts) -> int:
    """Bytes of frozen weights and of the state: float32 parameters and two moments."""
    frozen = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made.frozen))
    return frozen + 12 * tree.count(made.trainable)


PHASES = [f"splash_mha_{phase}" for phase in ("fwd", "dq", "dkv")]


@pytest.mark.parametrize("name", CASES)
def test_the_step_fits(name, tmp_path):
    case = CASES[name]
    made, plan = made_of(case), planned.plan(lowered, case, folder=tmp_path)
    print(f"{name}: arguments {plan.arguments / GIB:.2f}, all {plan.chip / GIB:.2f} of {case.chip} GiB")
    assert plan.chip / GIB < case.limit < case.chip
    # weights and state are divided among the chips, and the state's memory is reused for the result
    data, fsdp, tensor = case.dims
    assert plan.arguments < 1.1 * held(made) / (fsdp * tensor)
    assert plan.aliased > 0.99 * plan.results
    text = plan.program
    assert "tpu_custom_call" in text and all(phase in text for phase in PHASES)

    everything, vocabulary = arrays(text), case.raw["vocab_size"] // tensor
    tokens = case.rows // (data * fsdp) * case.length
    scores = [s for _, s in everything if s.count(case.length) > 1]
    assert not scores, "[B, N, T, T]"
    logits = [s for _, s in everything if vocabulary in s and math.prod(s) >= tokens * vocabulary // 4]
    weights = [s for s in logits if {made.config.hidden_size, made.config.hidden_size // fsdp} & set(s)]
    assert logits == weights, "[B, T, V]"
    wide = [s for dtype, s in exchanged(text) if dtype == "f32" and math.prod(s) > 8 * tokens]
    assert not wide, "weights, gradients and activations cross the wire in bfloat16"
    head = (made.config.hidden_size, vocabulary)
    assert any(dtype == "bf16" and sorted(s) == sorted(head) for dtype, s in exchanged(text)), "the gathered head"


@pytest.mark.usefixtures("for_a_chip_elsewhere")
@pytest.mark.parametrize("name", SMALL)
def test_machine_code_is_written(name, tmp_path):
    """Of whole steps, and the plan's sizes are the finished program's."""
    program = lowered(SMALL[name]).compile(compiler_options=planned.dumped(tmp_path))
    memory, plan = program.memory_analysis(), planned.read(tmp_path)
    assert memory.generated_code_size_in_bytes > 2**20
    assert plan.arguments == memory.argument_size_in_bytes
    assert plan.results == memory.output_size_in_bytes
    assert plan.aliased == memory.alias_size_in_bytes
    used = plan.arguments + plan.results - plan.aliased + memory.temp_size_in_bytes
    assert used < plan.chip < 1.05 * used, "and constants"
    assert all(phase in plan.program for phase in PHASES)


@pytest.mark.parametrize(("method", "by_kernel"), [(peft.PromptTuning(), True), (peft.PrefixTuning(), False)])
def test_slots_compile(method, by_kernel, tmp_path):
    """Two layers of the 1B shape: a prompt leaves attention to the kernel, a prefix goes through chunked XLA."""
    raw = {**LLAMA_1B, "num_hidden_layers": 2, "vocab_size": 16384}
    case = Case("v5e:2x4", (1, 4, 2), raw, method, 8, 1536, "full", 16, 0.25)
    plan = planned.plan(lowered, case, folder=tmp_path)
    print(f"{plan.chip / GIB:.2f} GiB")
    assert plan.chip / GIB < case.limit
    assert ("splash_mha_fwd" in plan.program) == by_kernel
    assert not [s for _, s in arrays(plan.program) if s.count(case.length) > 1], "[B, N, T, T]"


@pytest.mark.parametrize("name", QLORA)
def test_four_bits_fit(name, tmp_path):
    """8B trains on the smallest chip there is, and 70B on eight."""
    case, mebibytes = QLORA[name]
    plan = planned.plan(lowered, case, folder=tmp_path)
    print(f"{name}: {plan.chip / GIB:.2f} of {case.chip} GiB, {plan.host / GIB:.2f} GiB on the host")
    assert plan.chip / GIB < case.limit < case.chip
    assert plan.host == mebibytes * 2**20
    assert "tpu_custom_call" in plan.program


def test_chips_send_each_other_four_bits(tmp_path):
    """Two layers of the 8B width: codes and scales are gathered over fsdp and stay apart over tensor; no matrix
    that they stand for is sent."""
    raw = {**LLAMA_8B, "num_hidden_layers": 2, "vocab_size": 16384}
    case = Case("v5e:2x4", (1, 4, 2), raw, ALL, 8, 1536, "full", 16, 0.6, "nf4")
    plan = planned.plan(lowered, case, folder=tmp_path)
    assert plan.chip / GIB < case.limit
    sent = exchanged(plan.program)
    codes = {s[-2:] for dtype, s in sent if dtype == "u8"}
    assert {(2048, 2048), (2048, 512), (1024, 4096), (2048, 7168), (3584, 4096)} <= codes  # q, k and v, o, gate, down
    dense = {(4096, n // 2) for n in (4096, 1024, 14336)} | {(n // 2, 4096) for n in (4096, 14336)}
    shards = {(n // k, m) for n, m in dense for k in (1, 4)} | {(n, m // k) for n, m in dense for k in (1, 4)}
    assert not shards & {tuple(n for n in s if n > 1) for dtype, s in sent if dtype != "u8"}
