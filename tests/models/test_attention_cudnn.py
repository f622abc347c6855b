"""The cuDNN path: its arguments by JAX's own XLA twin of the same entry anywhere, the kernel itself on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models import attention_cudnn, attention_xla
from jaxft.models.attention import attention

CASES = [
    # segments, window, causal
    (False, None, True),
    (True, None, True),
    (False, 5, True),
    (True, 5, True),
    (False, None, False),
    (True, None, False),
]


def inputs(B, T, N, K, H, dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(key, (B, T, n, H), dtype) for key, n in zip(keys, (N, K, K, N), strict=True))
    ends = np.asarray([[0.2, 0.5, 0.9], [0.1, 0.6, 1.0]])[np.arange(B) % 2] * T
    index = np.arange(T)
    documents = 1 + (index[None, :, None] >= ends[:, None, :]).sum(-1)
    return q, k, v, g, jnp.asarray(np.where(index < ends[:, -1:], documents, 0), jnp.int32)


def with_grads(f, g, *x):
    @jax.jit
    def run(g, *x):
        out, back = jax.vjp(f, *x)
        return out, *back(g)

    return run(g, *x)


@pytest.mark.parametrize(("packed", "window", "causal"), CASES)
def test_its_arguments_mean_what_the_reference_means(packed, window, causal):
    """Mask, window and scale as handed to `jax.nn.dot_product_attention`, run by that function's XLA twin, float32."""
    q, k, v, g, segments = inputs(2, 32, 4, 2, 8, jnp.float32)
    segments = segments if packed else None
    spec, ids = attention_xla.Spec(0.3, window, None, causal), attention_xla.Ids(None, None, segments, segments)
    ours = with_grads(lambda *x: attention_xla.attend(spec, *x, ids), g, q, k, v)
    theirs = with_grads(
        lambda *x: attention_cudnn.attend(
            *x, segments, scale=0.3, window=window, causal=causal, implementation="xla"
        ),
        g, q, k, v,
    )  # fmt: skip
    for a, b in zip(ours, theirs, strict=True):
        assert float(jnp.abs(a - b).max()) < 1e-5


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU with cuDNN")
@pytest.mark.parametrize(("packed", "window", "causal"), CASES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernel_equals_the_reference(packed, window, causal, head_dim):
    """bfloat16 on the GPU, output and gradients, within 8 roundings of the float32 truth's scale; padding gets 0."""
    window = None if window is None else 100
    q, k, v, g, segments = inputs(2, 512, 8, 2, head_dim, jnp.bfloat16)
    segments = segments if packed else None

    def run(backend):
        return lambda *x: attention(
            *x, q_positions_BT=None, k_positions_BS=None, q_segments_BT=segments, k_segments_BS=segments,
            scale=head_dim**-0.5, window=window, causal=causal, backend=backend,
        )  # fmt: skip

    got = with_grads(run("cudnn"), g, q, k, v)
    with jax.default_matmul_precision("highest"):
        truth = with_grads(run("xla"), *(x.astype(jnp.float32) for x in (g, q, k, v)))
    for ours, exact in zip(got, truth, strict=True):
        worst = float(jnp.abs(ours.astype(jnp.float32) - exact).max())
        assert worst < 8 * 2**-8 * float(jnp.abs(exact).max())
        if packed:
            assert not np.asarray(ours.astype(jnp.float32))[np.asarray(segments) == 0].any()


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU with cuDNN")
@pytest.mark.parametrize("packed", [False, True])
def test_a_checkpoint_policy_recognises_the_kernel(packed):
    """Kept by its primitive's name, the forward kernel is not in the rematerialised backward pass."""
    q, k, v, g, segments = inputs(2, 256, 4, 2, 64, jnp.bfloat16)
    segments = segments if packed else None

    def count(policy):
        f = jax.checkpoint(lambda *x: attention_cudnn.attend(*x, segments, scale=0.125), policy=policy)
        return str(jax.make_jaxpr(jax.vjp(f, q, k, v)[1])(g)).count("dot_product_attention_fwd")

    assert count(lambda prim, *_, **__: "dot_product_attention_fwd" in prim.name) == 0
    assert count(jax.checkpoint_policies.nothing_saveable) > 0
