"""Which backend runs which case: the rules as a table, said once, refused by name."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import pytest

from jaxft.models import attention as attention_module
from jaxft.models import attention_choice
from jaxft.models.attention import attention
from jaxft.models.attention_choice import Case

H200 = Case("gpu", "bfloat16", 8, 2048, 2048, 32, 8, 64, capability=(9, 0))
A100 = dataclasses.replace(H200, capability=(8, 0))
T4 = dataclasses.replace(H200, capability=(7, 5), dtype="float16")
TPU = dataclasses.replace(H200, platform="tpu", capability=None)
CPU = dataclasses.replace(H200, platform="cpu", capability=None)

TABLE = [
    # case, changes, backend, words of the reason, said in the log
    (CPU, {}, "xla", "no kernel", False),
    (H200, {}, "cudnn", "the kernel of", False),
    (H200, {"segments": True}, "cudnn", "the kernel of", False),
    (H200, {"window": 512}, "cudnn", "the kernel of", False),
    (H200, {"window": 512, "segments": True}, "cudnn", "the kernel of", False),
    (H200, {"causal": False}, "cudnn", "the kernel of", False),
    (H200, {"dtype": "float16"}, "cudnn", "the kernel of", False),
    (H200, {"head_dim": 256}, "cudnn", "the kernel of", False),
    (H200, {"queries": 2047, "keys": 2047}, "cudnn", "the kernel of", False),
    (H200, {"queries": 1, "aligned": False}, "xla", "not the queries' own", False),
    (H200, {"aligned": False}, "xla", "one positions array", True),
    (H200, {"dtype": "float32"}, "xla", "bfloat16 and float16", True),
    (H200, {"softcap": 50.0}, "xla", "soft-cap", True),
    (H200, {"prefix": True}, "xla", "log-sum-exp", True),
    (TPU, {"prefix": True}, "xla", "log-sum-exp", True),
    (H200, {"head_dim": 257}, "xla", "head dimension", True),
    (H200, {"head_dim": 100}, "xla", "head dimension", True),
    (H200, {"causal": False, "window": 8}, "xla", "only with causal", True),
    (H200, {"segments": True, "queries": 2047, "keys": 2047}, "xla", "even row length", True),
    (H200, {"segments": True, "queries": 16384, "keys": 16384}, "xla", "elements on one device", True),
    (H200, {"segments": True, "queries": 16384, "keys": 16384, "batch_shards": 4}, "cudnn", "the kernel of", False),
    (H200, {"queries": 16384, "keys": 16384}, "cudnn", "the kernel of", False),
    (H200, {"jax_version": "0.12.0"}, "xla", "untested on this JAX version", True),
    (H200, {"jax_version": "0.11.2"}, "cudnn", "the kernel of", False),
    (H200, {"capability": None}, "xla", "NVIDIA GPU of compute capability", True),
    (A100, {}, "cudnn", "the kernel of", False),
    (A100, {"head_dim": 256}, "xla", "head dimension", True),
    (T4, {}, "xla", "compute capability 8.0", True),
    (TPU, {}, "splash", "the kernel of", False),
    (TPU, {"segments": True, "window": 512, "softcap": 50.0}, "splash", "the kernel of", False),
    (TPU, {"dtype": "float32"}, "splash", "the kernel of", False),
    (TPU, {"causal": False}, "splash", "the kernel of", False),
    (TPU, {"queries": 640, "keys": 640}, "splash", "the kernel of", False),
    (TPU, {"queries": 1, "aligned": False}, "xla", "not the queries' own", False),
    (TPU, {"dtype": "float16"}, "xla", "bfloat16 and float32", True),
    (TPU, {"matmul_precision": "highest"}, "xla", "does not compile", True),
    (TPU, {"matmul_precision": "highest", "dtype": "float32"}, "splash", "the kernel of", False),
    (TPU, {"queries": 2000, "keys": 2000}, "xla", "multiple of 128", True),
    (TPU, {"queries": 64, "keys": 64}, "xla", "multiple of 128", True),
    (TPU, {"batch_shards": 16}, "xla", "rows to divide", True),
    (TPU, {"head_shards": 16}, "splash", "the kernel of", False),
    (TPU, {"head_shards": 3}, "xla", "heads to divide", True),
    (TPU, {"head_shards": 12, "heads": 24}, "xla", "heads to divide", True),
    (TPU, {"jax_version": "0.9.2"}, "xla", "untested on this JAX version", True),
]


@pytest.mark.parametrize(("base", "changes", "backend", "reason", "said"), TABLE)
def test_the_rules(base, changes, backend, reason, said):
    choice = attention_choice.choose(dataclasses.replace(base, **changes))
    assert (choice.backend, choice.fell_back) == (backend, said)
    assert reason in choice.reason


REFUSED = [
    (H200, {"softcap": 50.0}, "cudnn", r"'cudnn' cannot do this case: .*soft-cap; got Case\(.*softcap=50.0.*Remedy: "),
    (CPU, {}, "cudnn", "needs a GPU"),
    (TPU, {"queries": 100}, "splash", "multiple of 128"),
    (TPU, {"aligned": False}, "splash", "not the queries' own"),
    (H200, {}, "splash", "TPU kernel"),
    (H200, {}, "flash", "got 'flash', expected one of"),
]


@pytest.mark.parametrize(("base", "changes", "backend", "message"), REFUSED)
def test_a_backend_asked_for_by_name_is_used_or_refused(base, changes, backend, message):
    with pytest.raises(ValueError, match=message):
        attention_choice.choose(dataclasses.replace(base, **changes), backend)


def test_asking_by_name_overrides_the_choice_and_the_platform():
    """XLA anywhere; splash on a CPU machine, which compiles for a TPU that is not there."""
    assert attention_choice.choose(H200, "xla").backend == "xla"
    assert attention_choice.choose(CPU, "splash").backend == "splash"
    assert attention_choice.choose(dataclasses.replace(H200, jax_version="0.12.0"), "cudnn").backend == "cudnn"


def test_every_rule_can_refuse_and_names_a_way_out():
    """Each rule of each kernel is reached by some row of the tables above."""
    reached = set()
    for base, changes, *_ in TABLE + REFUSED:
        case = dataclasses.replace(base, **changes)
        reached |= {r for rules in attention_choice.RULES.values() for r in rules if r.refuses(case)}
    assert reached == {r for rules in attention_choice.RULES.values() for r in rules}
    assert all(r.reason and r.remedy for r in reached)


def test_falling_back_is_said_once_per_reason(caplog):
    """A TPU that is not here, known by its mesh: rows of 100 tokens fall back and say so, rows of 200 add nothing."""
    attention_module._say_once.cache_clear()
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), axis_types=auto, abstract_device=device)

    def trace(T, dtype=jnp.bfloat16):
        x = jax.ShapeDtypeStruct((2, T, 2, 8), dtype)
        ids = {"q_positions_BT": None, "k_positions_BS": None, "q_segments_BT": None, "k_segments_BS": None}
        return jax.make_jaxpr(lambda q, k, v: attention(q, k, v, **ids, scale=1.0, mesh=mesh))(x, x, x)

    with caplog.at_level(logging.WARNING, logger="jaxft.attention"):
        with jax.default_matmul_precision("default"):
            assert "pallas_call" not in str(trace(100))
            trace(200)
        assert [r.getMessage() for r in caplog.records] == [
            "attention falls back to chunked XLA: splash attention wants rows of a multiple of 128 tokens "
            "(remedy: pad the rows to a multiple of 128)"
        ]
        with jax.default_matmul_precision("default"):
            assert "pallas_call" in str(trace(128))
        trace(100, jnp.float16)
        assert len(caplog.records) == 2
