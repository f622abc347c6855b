"""Adam in eight bits against bitsandbytes: its formula code by code, and its own step."""

import math

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxft.quant.codebooks import dynamic
from jaxft.training import eight_bit, optim, state
from jaxft.training.config import OptimConfig

STEPS, LR, B1, B2, EPS = 6, 1e-2, 0.9, 0.999, 1e-8


def gradients(shape):
    """Gradients whose size differs by row, around a mean."""
    r = np.random.default_rng(0)
    scale = np.exp(r.standard_normal((shape[0], *(1,) * (len(shape) - 1))))
    mean = r.standard_normal(shape)
    return [((mean + 0.5 * r.standard_normal(shape)) * scale).astype(np.float32) for _ in range(STEPS)]


def packed(x: torch.Tensor, book: torch.Tensor):
    """bitsandbytes' blockwise quantisation, without the coarse table of its kernel for a CPU: (codes, scales)."""
    blocks = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % 256)).reshape(-1, 256)
    largest = blocks.abs().amax(1)
    inverse = torch.where(largest > 0, 1 / largest, 0.0)
    return torch.bucketize(blocks * inverse[:, None], (book[:-1] + book[1:]) / 2), largest


def formula(p: torch.Tensor, grads: list[torch.Tensor]):
    """The step of bitsandbytes' Adam8bit, blockwise: (parameters, codes of m, codes of v)."""
    maps = [torch.tensor(dynamic(signed).values) for signed in (True, False)]
    m, v = (packed(torch.zeros_like(p), book) for book in maps)
    for t, g in enumerate(grads, 1):
        one, two = (
            (book[c] * s[:, None]).flatten()[: p.numel()].reshape(p.shape)
            for book, (c, s) in zip(maps, (m, v), strict=True)
        )
        one = B1 * one + (1 - B1) * g
        two = B2 * two + (1 - B2) * g * g
        p = p - LR / (1 - B1**t) * one / (two.sqrt() / math.sqrt(1 - B2**t) + EPS)
        m, v = packed(one, maps[0]), packed(two, maps[1])
    return p, m, v


@pytest.mark.parametrize("shape", [(64, 100), (7, 1000)])
def test_codes_and_steps_are_those_of_the_formula(shape):
    start = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    grads = gradients(shape)
    optimizer = eight_bit.scale_by_adam(B1, B2, EPS)

    @jax.jit
    def run(p):
        held = optimizer.init(p)
        for g in grads:
            update, held = optimizer.update(jnp.asarray(g), held)
            p = p - LR * update
        return p, held

    p, held = run(jnp.asarray(start))
    want, m, v = formula(torch.tensor(start), [torch.tensor(g) for g in grads])
    np.testing.assert_allclose(p, want, atol=2e-5)
    for mine, (codes, scale) in ((held.mu, m), (held.nu, v)):
        assert mine.codes.dtype == jnp.uint8 and mine.codes.shape == shape
        np.testing.assert_allclose(mine.scale, scale, rtol=1e-5)
        off = np.abs(np.asarray(mine.codes, np.int32).reshape(-1) - codes.flatten()[: start.size].numpy())
        assert off.max() <= 1 and (off > 0).mean() < 1e-3, "a rounding of the last bit may cross a midpoint"


def test_it_walks_with_bitsandbytes():
    """Its kernel for a CPU looks codes up in a coarser table, so moments may differ by a code."""
    shape = (64, 128)
    start, grads = np.random.default_rng(1).standard_normal(shape).astype(np.float32), gradients(shape)
    p = torch.nn.Parameter(torch.tensor(start))
    theirs = bitsandbytes.optim.AdamW8bit([p], lr=LR, weight_decay=0.1, min_8bit_size=4096)
    for g in grads:
        p.grad = torch.tensor(g)
        theirs.step()
    config = OptimConfig("adamw_8bit", lr=LR, weight_decay=0.1, clip_norm=None, schedule="constant", warmup_steps=0)
    params = {"w": jnp.asarray(start)}
    ours = optim.make(config, params, STEPS)
    held = ours.init(params)
    for i, g in enumerate(grads):
        updates, held = ours.update({"w": jnp.asarray(g)}, held, params, jnp.int32(i))
        params = optax.apply_updates(params, updates)
    moved = np.abs(p.detach().numpy() - start).mean()
    assert np.abs(params["w"] - p.detach().numpy()).mean() < 0.01 * moved


def test_a_number_whose_second_moment_is_lost_waits():
    """Its v is stored as zero beside a large one; without a gradient it stays where it is."""
    optimizer = eight_bit.scale_by_adam(B1, B2, EPS)
    g = np.full(4096, 1e-5, np.float32)
    g[::256] = 1.0
    held = optimizer.init(jnp.zeros(4096))
    for now in (g, g * 0):
        update, held = optimizer.update(jnp.asarray(now), held)
        assert np.abs(update).max() < 2.0


def test_moments_take_a_quarter_of_the_memory_and_lie_where_the_weights_do():
    params = {"layers": {"w": jnp.zeros((3, 64, 128)), "bias": jnp.zeros((3, 64))}}
    optimizer = optim.make(OptimConfig("adamw_8bit"), params, 10)
    held = state.create(params, optimizer, jax.random.key(0))
    shapes = {a.shape: a.dtype for a in jax.tree.leaves(held.opt_state)}
    assert shapes[3, 64, 128] == jnp.uint8 and shapes[3, 32] == jnp.float32 and shapes[3, 64] == jnp.float32
    mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])
    split, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((None, "fsdp"), ()))
    places = state.shardings(held, {"layers": {"w": split, "bias": whole}}, whole)
    found = jax.tree.leaves(jax.tree.map(lambda a, s: (a.shape, s), held.opt_state, places.opt_state), is_leaf=is_pair)
    assert {s for shape, s in found if shape == (3, 64, 128)} == {split}


def is_pair(x):
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], jax.NamedSharding)
