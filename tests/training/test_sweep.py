"""Members trained side by side are the runs they would be alone."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import peft
from jaxft.core import align, tree
from jaxft.models import families, init
from jaxft.models.decoder import Execution
from jaxft.objectives import OBJECTIVES, SFT
from jaxft.rollout import members, score
from jaxft.testing.jaxprs import equations
from jaxft.training import optim, state, step, sweep
from jaxft.training.config import OptimConfig
from tests.training import tiny

ROW = OBJECTIVES["sft"]
NEEDS = ("logp", "correct")
RAW = {
    "model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip


@dataclasses.dataclass
class Model:
    params: tree.Params
    names: tuple


@functools.cache
def base():
    config, names = families.read(RAW)
    return config, Model(init.random(config, names, jax.random.key(0), jnp.float32, deviation=0.3), names)


def run_alone(method, lr, seed, batches, optimizer=OptimConfig(), **score_settings):  # noqa: B008 (frozen)
    """(loss of each step, trained arrays)"""
    config, model = base()
    params, mask, _ = peft.adapt_for_training(model, jax.random.key(seed), [method])
    trainable, frozen = tree.partition(params, mask)
    made = optim.make(dataclasses.replace(optimizer, lr=lr), trainable, 10)
    hooks = peft.hooks([method], params, 10)
    scored = score.make_score(config, NEEDS, dtype=jnp.float32, **score_settings)
    run = step.make_step(ROW, SFT(), scored, made, hooks=hooks)
    now = state.create(trainable, made, jax.random.key(seed), method_state=hooks.start(trainable))
    losses = []
    for batch in batches:
        now, metrics = run(now, frozen, batch)
        losses.append(metrics)
    return losses, now.trainable


def build(methods, lrs, seeds, optimizer=OptimConfig(), own_order=False, **score_settings):  # noqa: B008
    """(step, state, frozen) of all members."""
    config, model = base()
    adapted = [peft.adapt_for_training(model, jax.random.key(s), [m]) for m, s in zip(methods, seeds, strict=True)]
    trainable, frozen, differs = align.together([params for params, _, _ in adapted], adapted[0][1])
    if score_settings.get("execution", Execution()).unroll:  # as the command line holds the layers then
        constants, common = tree.partition(frozen, differs)
        frozen = tree.combine(constants, tree.split_layers(common))
    made = sweep.make_optimizer(optimizer, sweep.member(trainable, 0), lrs, 10)
    scored = members.make_score(config, NEEDS, differs, dtype=jnp.float32, **score_settings)
    hooks = peft.hooks(methods[:1], adapted[0][0], 10)
    run = sweep.make_step(ROW, SFT(), scored, made, len(seeds), own_order, hooks=hooks)
    keys, own = jnp.stack([jax.random.key(s) for s in seeds]), jax.vmap(hooks.start)(trainable)
    return run, state.create(trainable, made, keys, method_state=own), frozen


def run_together(methods, lrs, seeds, batches, *more, **settings):
    """(metrics of each step, trained arrays), [members, ...] each."""
    run, now, frozen = build(methods, lrs, seeds, *more, **settings)
    rows = []
    for batch in batches:
        now, metrics = run(now, frozen, batch)
        rows.append(metrics)
    return rows, now.trainable


def agree(rows, trained, alone, rtol=1e-5, atol=1e-6):
    """A member's metrics and arrays are those of its own run; what is beyond its rank has stayed zero.

    ``alone``: of some members, by number."""
    for i, (losses, arrays) in alone.items():
        for got, want in zip(rows, losses, strict=True):
            for name in want.keys() - {"tokens"}:
                np.testing.assert_allclose(got[name][i], want[name], rtol=rtol, atol=atol, err_msg=f"{i} {name}")
        for (path, got), (_, want) in zip(tree.paths(sweep.member(trained, i)), tree.paths(arrays), strict=True):
            real = tuple(slice(0, n) for n in want.shape)
            np.testing.assert_allclose(got[real], want, rtol=10 * rtol, atol=atol, err_msg=f"{i} {path}")
            assert not np.any(np.asarray(got.at[real].set(0.0))), f"{i} {path}: padding has moved"


BATCHES = [tiny.micro(tiny.batch(seed, rows=4), 2) for seed in range(3)]


def test_ranks_rates_seeds_and_dropout():
    """LoRA of ranks 2 and 4 with their own alphas, rates, seeds, dropout masks and noise."""
    methods = [peft.LoRA(rank=r, alpha=a, dropout=0.3) for r, a in ((2, None), (4, 3.0), (2, 16.0))]
    lrs, seeds, how = (0.01, 0.003, 0.02), (0, 1, 2), {"neftune_alpha": 5.0}
    rows, trained = run_together(methods, lrs, seeds, BATCHES, **how)
    alone = {i: run_alone(methods[i], lrs[i], seeds[i], BATCHES, **how) for i in (0, 1)}
    assert len(set(rows[0]["loss"].tolist())) == 3  # noise and dropout are each member's own
    agree(rows, trained, alone)


def test_own_order_of_the_data_with_muon_unrolled():
    """Each member its own batches; unrolled layers; an optimiser that looks at whole matrices, padded ones too."""
    methods, lrs, seeds = [peft.LoRA(rank=2), peft.LoRA(rank=4)], (0.01, 0.003), (3, 3)
    optimizer = OptimConfig(name="muon", weight_decay=0.1, clip_norm=0.3)
    how = {"execution": Execution(remat="save", unroll=True)}
    orders = [[tiny.batch(10 * m + i, rows=2) for i in range(2)] for m in range(2)]
    loader = sweep.Orders([iter(order) for order in orders])
    mixed = [next(loader) for _ in range(2)]
    rows, trained = run_together(
        methods, lrs, seeds, [tiny.micro(b, 1) for b in mixed], optimizer, own_order=True, **how
    )
    mine = [tiny.micro(b, 1) for b in orders[1]]
    agree(rows, trained, {1: run_alone(methods[1], lrs[1], seeds[1], mine, optimizer, **how)})


@pytest.mark.parametrize("select", ["full", r"norm(/|$)|bias$"])
def test_parts_of_the_model_itself(select):
    """Embeddings, a tied head, norms, biases and matrices trained in place: each member its own."""
    method, lrs = peft.Full(select), (0.01, 0.001)
    rows, trained = run_together([method] * 2, lrs, (0, 0), BATCHES[:2])
    agree(rows, trained, {1: run_alone(method, lrs[1], 0, BATCHES[:2])}, rtol=2e-5)


@pytest.mark.parametrize(
    "method",
    [
        peft.AdaLoRA(rank=1, init_rank=3, initial_steps=1, final_steps=1, every=1, targets=("q_proj", "down_proj")),
        peft.VeRA(rank=3, targets=("v_proj", "up_proj")),
        peft.PromptTuning(tokens=2, init="random"),
    ],
    ids=["adalora", "vera", "prompt"],
)
def test_methods_with_a_state_or_arrays_of_their_own(method):
    """Pruned in each step, or on random matrices that all layers share: each member by itself, with its own seed."""
    lrs, seeds = (0.05, 0.01), (0, 1)
    rows, trained = run_together([method] * 2, lrs, seeds, BATCHES)
    agree(rows, trained, {1: run_alone(method, lrs[1], seeds[1], BATCHES)}, rtol=2e-5)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimiser_treats_each_layer_of_each_member_alone(name, key):
    config, peaks = OptimConfig(name=name, weight_decay=0.1, clip_norm=0.5), (0.1, 0.01, 0.05)
    parts = [tiny.parts(jax.random.fold_in(key, i), select="norms")[0] for i in range(3)]
    grads = [jax.tree.map(lambda a, i=i: jnp.cos(9 * a + i), p) for i, p in enumerate(parts)]
    stack = functools.partial(jax.tree.map, lambda *a: jnp.stack(a))
    many = sweep.make_optimizer(config, parts[0], peaks, 10)
    params, held = stack(*parts), jax.jit(many.init)(stack(*parts))
    for now in range(2):
        updates, held = jax.jit(many.update)(stack(*grads), held, params, jnp.full(3, now))
        params = jax.tree.map(jnp.add, params, updates)
    params = jax.jit(many.averaged)(held, params)
    for i, (mine, gradient) in enumerate(zip(parts, grads, strict=True)):
        one = optim.make(dataclasses.replace(config, lr=peaks[i]), mine, 10)
        update, own = jax.jit(one.update), one.init(mine)
        for now in range(2):
            updates, own = update(gradient, own, mine, jnp.int32(now))
            mine = jax.tree.map(jnp.add, mine, updates)
        for (path, got), (_, want) in zip(
            tree.paths(sweep.member(params, i)), tree.paths(one.averaged(own, mine)), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6, err_msg=f"{i} {path}")


def test_a_member_that_diverges_stops_nobody():
    """Its steps are skipped, and only its."""
    methods = [peft.LoRA(rank=4, alpha=alpha, init="a_zero") for alpha in (8.0, 3e38, 4.0)]
    rows, trained = run_together(methods, (0.01, 0.01, 0.02), (0, 0, 0), BATCHES[:2])
    assert [r["skipped"].tolist() for r in rows] == [[0, 1, 0]] * 2
    assert not np.isfinite(rows[0]["loss"][1]) or not np.isfinite(rows[0]["grad_norm"][1])
    moved = jax.tree.leaves(jax.tree.map(lambda a: jnp.abs(a).max(range(1, a.ndim)), trained["layers"]["attn"]["o"].a))
    assert moved[0][0] > 0 and moved[0][1] == 0 and moved[0][2] > 0


@pytest.mark.parametrize("unroll", [False, True])
def test_the_base_is_there_once_and_multiplied_once(unroll):
    """No array holds a matrix of the base for each member, and each base matrix is in as many products as alone."""
    count = 5
    how = {"execution": Execution(remat="full", unroll=unroll)}
    run, now, frozen = build([peft.LoRA(rank=2)] * count, [0.01] * count, range(count), **how)
    jaxpr = jax.make_jaxpr(run)(now, frozen, BATCHES[0])
    shapes = [v.aval.shape for eqn in equations(jaxpr) for v in eqn.outvars if hasattr(v.aval, "shape")]
    for matrix in ((32, 32), (32, 48), (48, 32), (64, 32)):
        assert not [s for s in shapes if s[-2:] == matrix and count in s[:-2]], matrix
    mlp = [e for e in equations(jaxpr) if e.primitive.name == "dot_general" and e.invars[1].aval.shape == (32, 48)]
    rows = [math.prod(e.invars[0].aval.shape[:-1]) for e in mlp]
    assert rows and set(rows) == {2 * count * 12}, rows


def test_refusals():
    _, model = base()
    adapted = [peft.adapt(model, jax.random.key(0), m) for m in (peft.MiSS(rank=8), peft.MiSS(rank=8, variant="bat"))]
    mask = tree.trainable_mask(adapted[0])
    with pytest.raises(ValueError, match=r"layers/attn/q.*variant balance and bat"):
        align.together(adapted, mask)
    copied = jax.tree.map(jnp.copy, adapted[0])
    with pytest.raises(ValueError, match="bases are different arrays"):
        align.together([adapted[0], copied], mask)


def test_on_a_mesh_members_are_what_they_are_on_one_device():
    """Also with an adapted head, which differs by row."""
    method = peft.LoRA(rank=2, targets=("q_proj", "down_proj", "lm_head"), dropout=0.2)
    lrs, seeds, auto = (0.01, 0.02, 0.03), (0, 1, 2), (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=auto)
    batches = [tiny.micro(tiny.batch(seed, rows=4), 1) for seed in range(2)]
    want, trained = run_together([method] * 3, lrs, seeds, batches)
    got, also = run_together([method] * 3, lrs, seeds, batches, execution=Execution(mesh=mesh))
    for a, b in zip(got, want, strict=True):
        for name in b:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-5, atol=1e-6, err_msg=name)
    for (path, a), (_, b) in zip(tree.paths(also), tree.paths(trained), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=path)
