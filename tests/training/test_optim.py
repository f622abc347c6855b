"""Optimisers: a stacked layer moves as it would alone, and the pieces around them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.core.weight import Affine
from jaxft.peft.lora import LoRAWeight
from jaxft.training import leafwise, optim
from jaxft.training.optim import OptimConfig

STEPS = 4
LAYERS = 3


def stack(key, wide=160):
    """A stack of layers with a matrix that adafactor factors, a small one, a norm and a bias."""
    shapes = {"attn": {"q": (wide, 144), "k": (6, 4)}, "attn_norm": {"scale": (6,)}, "mlp": {"up": {"bias": (4,)}}}
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
    keys = jax.random.split(key, len(leaves))
    # layers of very different size, so that anything computed across layers shows
    size = jnp.array([1.0, 30.0, 0.01])
    values = [
        jax.random.normal(k, (LAYERS, *s)) * size.reshape(-1, *(1,) * len(s)) for k, s in zip(keys, leaves, strict=True)
    ]
    return {"layers": treedef.unflatten(values)}


def runner(config, like, rule=leafwise.stacked):
    """A compiled run of a few steps: (parameters, gradients of each step) -> (last parameters, averaged ones)."""
    optimizer = optim.make(config, like, STEPS, stacked=rule)

    @jax.jit
    def run(params, grads):
        state = optimizer.init(params)
        for i in range(STEPS):
            updates, state = optimizer.update(grads[i], state, params, jnp.int32(i))
            params = optax.apply_updates(params, updates)
        return params, optimizer.averaged(state, params)

    return run


@pytest.mark.parametrize(
    ("name", "momentum"),
    [
        *((name, "float32") for name in optim.OPTIMIZERS),
        *((name, "bfloat16") for name, kind in optim.OPTIMIZERS.items() if kind.momentum),
    ],
)
def test_a_stacked_layer_moves_as_it_would_alone(name, momentum, key):
    """Three layers updated as a stack, and each layer updated by itself, four steps: the same to rounding."""
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.1, clip_norm=None, momentum_dtype=momentum)
    params = stack(key)
    grads = [stack(jax.random.fold_in(key, i)) for i in range(STEPS)]
    got = runner(config, params)(params, grads)
    single = runner(config, jax.tree.map(lambda a: a[0], params), rule=lambda path: 0)
    for layer in range(LAYERS):
        alone = [jax.tree.map(lambda a: a[layer], tree) for tree in (params, *grads)]  # noqa: B023
        want = single(alone[0], alone[1:])
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(g[layer], w, rtol=1e-5, atol=1e-6)


def test_each_is_optax_own(key):
    """On single matrices, without the stack: optax's own composition gives the same parameters."""
    params = {"w": jax.random.normal(key, (160, 144)), "scale": jnp.ones((6,))}
    grads = [jax.tree.map(lambda p: jax.random.normal(jax.random.fold_in(key, i), p.shape), params) for i in range(4)]  # noqa: B023
    both = {"learning_rate": 0.1, "weight_decay": 0.1}
    mask = {"w": True, "scale": False}
    theirs = {
        "adamw": optax.adamw(**both, mask=mask),
        "lion": optax.lion(**both, mask=mask),
        "muon": optax.contrib.muon(**both, weight_decay_mask=mask, consistent_rms=0.2),
        "sgd": optax.chain(optax.add_decayed_weights(0.0), optax.sgd(0.1, momentum=0.9)),
        "adafactor": optax.adafactor(0.1, multiply_by_parameter_scale=False),
        "schedule_free": optax.contrib.schedule_free_adamw(0.1),
    }
    for name, transform in theirs.items():
        decay = 0.1 if name in ("adamw", "lion", "muon") else 0.0
        config = OptimConfig(
            name=name, lr=0.1, weight_decay=decay, clip_norm=None, schedule="constant", warmup_steps=0  # type: ignore[arg-type]
        )  # fmt: skip
        got, _ = runner(config, params)(params, grads)
        want, state = params, transform.init(params)
        for grad in grads:
            updates, state = jax.jit(transform.update)(grad, state, want)
            want = optax.apply_updates(want, updates)
        for leaf in ("w",) if name == "muon" else ("w", "scale"):  # optax's muon has Nesterov in its Adam part too
            np.testing.assert_allclose(got[leaf], want[leaf], rtol=1e-5, atol=1e-6, err_msg=name)


def test_muon_orthogonalises_matrices_only(key):
    """Stacked norms [L, D], embeddings and the head go to Adam, whose first step is the sign of the gradient."""
    params = {
        "embed": {"tokens": jnp.ones((8, 4))},
        "head": jnp.ones((4, 8)),
        "layers": {"attn": {"q": jnp.ones((3, 4, 4))}, "attn_norm": {"scale": jnp.ones((3, 4))}},
    }
    grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)
    optimizer = optim.make(OptimConfig(name="muon", lr=1.0, warmup_steps=0, clip_norm=None), params, 1)
    updates, _ = optimizer.update(grads, optimizer.init(params), params, jnp.int32(0))
    for path in (("embed", "tokens"), ("head",), ("layers", "attn_norm", "scale")):
        g, u = grads, updates
        for part in path:
            g, u = g[part], u[part]
        np.testing.assert_allclose(u, -jnp.sign(g), atol=1e-3)
    q = updates["layers"]["attn"]["q"] / (0.2 * 4**0.5)
    singular = jnp.linalg.svd(q, compute_uv=False)
    assert bool(jnp.all((singular > 0.5) & (singular < 1.5)))  # the band Newton-Schulz ends in


def lora_tree(key):
    """The trainable part of a LoRA inside an Affine, with a trained norm beside it."""
    a, b = jax.random.normal(key, (3, 6, 2)), jnp.zeros((3, 2, 4))
    q = Affine(base=LoRAWeight(base=None, a=a, b=b, scale=None, rank=None), bias=jnp.zeros((3, 4)))
    return {"layers": {"attn": {"q": q, "k": None}, "attn_norm": {"scale": jnp.ones((3, 6))}}, "head": None}


def test_decay_spares_norms_biases_and_vectors(key):
    mask = optim.decay_mask({**lora_tree(key), "embed": {"tokens": jnp.ones((4, 2))}, "prompt": jnp.ones(3)})
    flat = {path: value for path, value in leafwise.tree.paths(mask)}
    assert flat == {
        "embed/tokens": True,
        "prompt": False,
        "layers/attn/q/base/a": True,
        "layers/attn/q/base/b": True,
        "layers/attn/q/bias": False,
        "layers/attn_norm/scale": False,
    }


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_groups_multiply_the_learning_rate(name, key):
    """LoRA+: with a factor of 16 on B the first update of B is 16 times as large, that of A is unchanged."""
    params = lora_tree(key)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.fold_in(key, p.ndim), p.shape), params)

    def first(groups):
        optimizer = optim.make(OptimConfig(name=name, lr=0.01, groups=groups, clip_norm=None), params, 100)
        updates, _ = optimizer.update(grads, optimizer.init(params), params, jnp.int32(0))
        return updates["layers"]["attn"]["q"].base

    plain, plus = first({}), first({"/b$": 16.0})
    np.testing.assert_allclose(plus.a, plain.a, rtol=1e-6)
    np.testing.assert_allclose(plus.b, 16 * plain.b, rtol=1e-5)


def test_clipping_is_by_the_norm_of_the_whole_tree():
    """Gradients of norm sqrt(9 + 16) = 5 clipped to 1: sgd's first update is -lr / 5 of them."""
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    optimizer = optim.make(OptimConfig(name="sgd", lr=1.0, warmup_steps=0, clip_norm=1.0), params, 1)
    updates, _ = optimizer.update(grads, optimizer.init(params), params, jnp.int32(0))
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_state_keeps_its_dtypes_and_compiles_once(name, key):
    params = stack(key, wide=6)
    optimizer = optim.make(OptimConfig(name=name, lr=0.1, weight_decay=0.1), params, STEPS)
    state = jax.jit(optimizer.init)(params)
    update = jax.jit(optimizer.update)
    for i in range(3):
        _, after = update(params, state, params, jnp.int32(i))
        assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
        state = after
    assert update._cache_size() == 1


def test_momentum_dtype(key):
    params = stack(key, wide=6)
    state = optim.make(OptimConfig(momentum_dtype="bfloat16"), params, 10).init(params)
    dtypes = {path.split("/layers")[0]: leaf.dtype for path, leaf in leafwise.tree.paths(state) if "layers" in path}
    assert sorted(str(d) for d in dtypes.values()) == ["bfloat16", "float32"]


def test_schedule_free_evaluates_its_average(key):
    """After the first step the average is where the base optimiser went: x1 = z1 = x0 - lr * sign(g), y1 likewise."""
    params = {"w": jnp.zeros((2, 2))}
    grads = [{"w": jnp.full((2, 2), 3.0)}] * STEPS
    last, averaged = runner(OptimConfig(name="schedule_free", lr=0.1, warmup_steps=0), params)(params, grads)
    # z falls by 0.1 a step: 0.1, 0.2, 0.3, 0.4; x is their running mean, 0.25; y = 0.9 x + 0.1 z = 0.265
    np.testing.assert_allclose(averaged["w"], -0.25, rtol=1e-4)
    np.testing.assert_allclose(last["w"], -0.265, rtol=1e-4)


def test_default_rates():
    assert optim.peak(OptimConfig(), default_lr=2e-4) == 2e-4
    assert optim.peak(OptimConfig(name="lion"), default_lr=2e-4) == pytest.approx(4e-5)
    assert optim.peak(OptimConfig(lr=1.0), default_lr=2e-4) == 1.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimConfig(name="adam"), "optim.name: got 'adam'; expected one of adamw, adamw_8bit"),  # type: ignore[arg-type]
        (OptimConfig(name="sgd"), "optim.lr: sgd has no default learning rate"),
        (OptimConfig(name="adafactor", betas=(0.9, 0.9)), "optim.betas: adafactor has no such moments"),
        (OptimConfig(name="schedule_free", schedule="cosine"), "optim.schedule: got 'cosine'; schedule_free averages"),
        (OptimConfig(name="adafactor", momentum_dtype="bfloat16"), "optim.momentum_dtype: adafactor keeps no first"),
        (OptimConfig(groups={"/c$": 2.0}), "optim.groups: '/c\\$' matches no trainable parameter. They are: layers/"),
        (OptimConfig(schedule="step"), "optim.schedule: got 'step'; expected one of"),  # type: ignore[arg-type]
    ],
)
def test_refusals(config, message, key):
    with pytest.raises(ValueError, match=message):
        optim.make(config, lora_tree(key), 10)


def test_stack_rule():
    rule = leafwise.stacked
    assert [rule(p) for p in ("layers/attn/q", "layers/attn/q/base/a", "head", "layers/attn/q/a/0")] == [1, 1, 0, 0]
