"""The splash path: the kernel's own Python against the reference on CPU, and compiled for real TPU slices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.models import attention_splash, attention_xla
from jaxft.models.attention import attention

AUTO = (AxisType.Auto,) * 3
AXES = ("data", "fsdp", "tensor")


@pytest.fixture
def no_disk_cache():
    """A program compiled for a TPU that is not here cannot be read back from JAX's cache on disk."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()


def inputs(B, T, N, K, H):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(key, (B, T, n, H)) for key, n in zip(keys, (N, K, K, N), strict=True))
    index = np.arange(T)
    documents = 1 + (index >= 50).astype(int) + (index >= 170)
    rows = [np.where(index < end, documents, 0) for end in np.linspace(T * 0.9, T, B)]
    return q, k, v, g, jnp.asarray(np.stack(rows), jnp.int32)


def with_grads(f, g, *x):
    @jax.jit
    def run(g, *x):
        out, back = jax.vjp(f, *x)
        return out, *back(g)

    return run(g, *x)


@pytest.mark.parametrize(
    ("heads", "packed", "window", "softcap", "causal"),
    [
        ((4, 2), False, None, None, True),
        ((2, 1), True, 100, 3.0, True),
        ((2, 2), True, None, 5.0, False),
        ((2, 2), False, 60, None, False),
    ],
)
def test_the_kernel_equals_the_reference(heads, packed, window, softcap, causal):
    """Two blocks of 128, interpreted, float32: output and gradients within 1e-5; padding is exactly 0."""
    q, k, v, g, segments = inputs(1, 256, *heads, 16)
    segments = segments if packed else None
    options = {"scale": 0.3, "window": window, "softcap": softcap, "causal": causal}
    spec, ids = attention_xla.Spec(0.3, window, softcap, causal), attention_xla.Ids(None, None, segments, segments)
    blocks = 128
    ours = with_grads(
        lambda *x: attention_splash.attend(*x, segments, **options, block=blocks, interpret=True), g, q, k, v
    )
    theirs = with_grads(lambda *x: attention_xla.attend(spec, *x, ids), g, q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        assert float(jnp.abs(a - b).max()) < 1e-5
        if packed:
            assert not np.asarray(a)[np.asarray(segments) == 0].any()


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_under_a_mesh_each_device_runs_its_rows_and_heads(kv_heads):
    """2 x 2 x 2 devices, heads over `tensor` (a single key head is given to each): equal to one device."""
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(2, 2, 2), AXES, axis_types=AUTO)
    q, k, v, g, segments = inputs(4, 128, 4, kv_heads, 16)
    run = {"scale": 0.3, "interpret": True}

    def sharded(q, k, v):
        return attention_splash.attend_sharded(
            q, k, v, segments, mesh=mesh, batch_axes=("data", "fsdp"), head_axes=("tensor",), **run
        )

    rows = NamedSharding(mesh, P(("data", "fsdp")))
    ours = with_grads(sharded, *(jax.device_put(x, rows) for x in (g, q, k, v)))
    ids = attention_xla.Ids(None, None, segments, segments)
    theirs = with_grads(lambda *x: attention_xla.attend(attention_xla.Spec(0.3), *x, ids), g, q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        assert float(np.abs(np.asarray(a) - np.asarray(b)).max()) < 1e-5


SLICES = [
    # slice, data x fsdp x tensor, rows, tokens, heads, key heads, head dimension, packed, window, softcap
    ("v5e:2x4", (1, 4, 2), 8, 2048, 8, 4, 64, True, 1000, 50.0),
    ("v5e:2x4", (1, 4, 2), 8, 2048, 8, 1, 256, False, None, None),
    ("v6e:4x4", (2, 4, 2), 16, 4096, 16, 2, 128, True, 1000, 30.0),
    ("v6e:4x4", (2, 4, 2), 16, 640, 16, 4, 80, True, None, None),
]


@pytest.mark.usefixtures("no_disk_cache")
@pytest.mark.parametrize(("slice_", "dims", "B", "T", "N", "K", "H", "packed", "window", "softcap"), SLICES)
def test_forward_and_backward_compile_for_a_tpu_slice(slice_, dims, B, T, N, K, H, packed, window, softcap):
    """`auto` under the slice's mesh is the kernel, and memory has no room for a [B, N, T, T] array, even bfloat16."""
    devices = topologies.get_topology_desc(slice_, "tpu").devices
    mesh = Mesh(np.asarray(devices).reshape(dims), AXES, axis_types=AUTO)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    shapes = [jax.ShapeDtypeStruct((B, T, n, H), jnp.bfloat16, sharding=rows) for n in (N, K, K, N)]
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=rows)

    def step(q, k, v, g, positions, segments):
        segments = segments if packed else None
        f = lambda q, k, v: attention(  # noqa: E731
            q, k, v, q_positions_BT=positions, k_positions_BS=positions, q_segments_BT=segments,
            k_segments_BS=segments, scale=H**-0.5, window=window, softcap=softcap,
        )  # fmt: skip
        out, back = jax.vjp(f, q, k, v)
        return out, back(g)

    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        compiled = jax.jit(step).lower(*shapes, ids, ids).compile()
    program, scores = compiled.as_text(), 2 * B * N * T * T // len(devices)
    assert all(f"splash_mha_{phase}" in program for phase in ("fwd", "dq", "dkv"))
    if T > 1024:
        assert compiled.memory_analysis().temp_size_in_bytes < scores / 4


@pytest.mark.usefixtures("no_disk_cache")
@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_policy_can_keep_the_residuals(sharded):
    """Compiled for a v5e: with the name kept the step runs the forward kernel once, with nothing kept twice."""
    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    mesh = Mesh(np.asarray(devices if sharded else devices[:1]).reshape(1, -1, 1), AXES, axis_types=AUTO)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((4, 256, 2, 64), jnp.bfloat16, sharding=rows)
    s = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=rows)

    def forward_kernels(policy):
        def step(q, k, v, segments, g):
            f = lambda q, k, v: attention(  # noqa: E731
                q, k, v, q_positions_BT=None, k_positions_BS=None, q_segments_BT=segments, k_segments_BS=segments,
                scale=0.125, mesh=mesh,
            )  # fmt: skip
            out, back = jax.vjp(jax.checkpoint(f, policy=policy), q, k, v)
            return out, back(g)

        with jax.default_matmul_precision("default"):
            program = jax.jit(step).lower(x, x, x, s, x).compile().as_text()
        return sum(" custom-call(" in line and "splash_mha_fwd" in line for line in program.splitlines())

    policies = jax.checkpoint_policies
    assert forward_kernels(policies.save_only_these_names(attention_xla.RESIDUALS)) == 1
    assert forward_kernels(policies.nothing_saveable) == 2
