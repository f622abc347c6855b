"""AdaLoRA's schedule, importance, pruning and penalty against peft's, and in the training step."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from jaxft import peft as jaxft_peft
from jaxft.checkpoint import state as disk
from jaxft.core import tree
from jaxft.core.names import Name
from jaxft.objectives import OBJECTIVES, SFT
from jaxft.peft import AdaLoRA, LoRA, adalora
from jaxft.sharding import rules
from jaxft.training import optim, state, step, sweep
from jaxft.training.config import OptimConfig
from tests.peft import pairs
from tests.training import tiny

STEPS = 10
OURS = AdaLoRA(
    rank=3, init_rank=6, alpha=9, targets=("q_proj", "down_proj"), layers=(0, 2),
    initial_steps=1, final_steps=3, every=2,
)  # fmt: skip
NAMES = {"layers/attn/q": "self_attn.q_proj", "layers/mlp/down": "mlp.down_proj"}
FIELDS = {"a": "lora_A", "e": "lora_E", "b": "lora_B"}


def theirs():
    config = peft.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=9, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2],
        tinit=1, tfinal=3, deltaT=2, total_step=STEPS, task_type="CAUSAL_LM",
    )  # fmt: skip
    return pairs.peft_model("llama", config)


def torch_name(path, field, layer):
    return f"base_model.model.model.layers.{layer}.{NAMES[path]}.{FIELDS[field]}.default"


def ours_of(by_name, like):
    """Our tree of trained fields from torch's tensors by name."""

    def weight(path, w):
        def stacked(field):
            shape = getattr(w, field).shape
            one = [by_name.get(torch_name(path, field, i)) for i in range(shape[0])]
            return jnp.stack([jnp.zeros(shape[1:]) if t is None else t.T.reshape(shape[1:]) for t in one])

        return dataclasses.replace(w, **{field: stacked(field) for field in FIELDS})

    return {path: weight(path, w) for path, w in like.items()}


def split(params):
    return tree.partition(params, tree.trainable_mask(params))


def torch_arrays(parameters, grad=False):
    return {n: (p.grad if grad else p).detach().numpy().copy() for n, p in parameters.items()}


@functools.cache
def pruned_by_peft():
    """peft's model after its run, and for each step what it had before the pruning, its gradients, what it kept."""
    model = theirs()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rng, seen = np.random.default_rng(0), []
    for number in range(1, STEPS + 1):
        for p in trained.values():
            p.grad = torch.tensor(rng.standard_normal(p.shape), dtype=torch.float32)
            p.data -= 0.05 * p.grad
        before, grads = torch_arrays(trained), torch_arrays(trained, grad=True)
        model.base_model.update_and_allocate(number)
        allocator = model.base_model.rankallocator
        averages = [
            {f"base_model.model.{n}": t.detach().numpy().copy() for n, t in kind.items()}
            for kind in (allocator.exp_avg_ipt, allocator.exp_avg_unc)
        ]
        seen.append((before, grads, averages, torch_arrays(trained)))
    return model, seen


def test_every_step_prunes_as_peft_does():
    """The same running averages, budget and choice, with importance shared out over all matrices and layers."""
    params = jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), OURS)
    hooks = adalora.hooks(OURS, params, STEPS)
    trainable, _ = split(params)
    mine, now = adalora._found(trainable), hooks.start(trainable)
    update, came_back = jax.jit(hooks.update), 0

    def whole(by_name):
        found = ours_of(by_name, mine)
        return adalora._replaced(trainable, lambda path, w: found[path])

    for number, (before, grads, averages, after) in enumerate(pruned_by_peft()[1], 1):
        previous = now.kept
        pruned, now = update(jnp.int32(number), whole(before), whole(grads), now)
        if number < 7:  # peft forgets its averages after the last pruning
            for got, want in zip((now.sensitivity, now.uncertainty), averages, strict=True):
                chex.assert_trees_all_close(got, ours_of(want, mine), rtol=1e-5, atol=1e-7)
        chex.assert_trees_all_equal(adalora._found(pruned), ours_of(after, mine))
        came_back += sum(int(np.sum(now.kept[path] & ~previous[path])) for path in mine)
        left = sum(int(np.count_nonzero(w.e)) for w in adalora._found(pruned).values())
        assert left == [24, 18, 24, 13, 24, 12, 12, 12, 12, 12][number - 1]  # odd steps do not prune
    assert came_back > 0


def test_the_penalty_is_pefts():
    """Its gradient is what peft's loss has with the weight 0.5 beyond what it has with 0."""
    model = theirs()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    tokens = torch.tensor(pairs.TOKENS.astype(np.int64))
    grads = []
    for weight in (0.5, 0.0):
        model.peft_config["default"].orth_reg_weight = weight
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        grads.append(torch_arrays(trained, grad=True))
    params = jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), OURS)
    like = adalora._found(split(params)[0])
    values = ours_of(torch_arrays(trained), like)
    hooks = adalora.hooks(OURS, params, STEPS)
    without = ours_of(grads[1], like)
    chex.assert_trees_all_close(hooks.gradients(values, without), ours_of(grads[0], like), rtol=1e-4, atol=1e-6)


def test_schedule():
    """Eq. 12 by hand: 4 matrices from 16 to 8 triplets in 4 steps after 2, pruning in even steps and the last."""
    config = AdaLoRA(rank=2, init_rank=4, initial_steps=2, final_steps=3, every=2)
    falling = [int(8 * (1 - k / 5) ** 3 + 8) for k in range(1, 6)]  # steps 3 to 7
    assert adalora.schedule(config, 4, 10).tolist() == [-1, -1, -1, -1, falling[1], -1, falling[3], 8]
    assert len(adalora.schedule(AdaLoRA(), 4, 100)) == 71 and adalora.schedule(AdaLoRA(), 4, 100)[10] == -1
    assert adalora.schedule(AdaLoRA(), 4, 1).tolist() == [-1, 32]
    same = AdaLoRA(rank=4, init_rank=4, initial_steps=0, final_steps=0)
    scores = {"w": jnp.arange(8.0).reshape(2, 4)}
    kept = adalora.allocate(scores, {"w": np.array([1.0, 1.0])}, adalora.schedule(same, 2, 4)[1])
    assert bool(jnp.all(kept["w"]))  # peft fails where nothing is pruned
    kept = adalora.allocate(scores, {"w": np.array([0.0, 1.0])}, 1)  # a layer left out has no share
    assert kept["w"][1].tolist() == [False, False, False, True]


SMALL = AdaLoRA(rank=2, init_rank=4, targets=("up",), layers=(0, 1), initial_steps=1, final_steps=2)
SFT_ROW = OBJECTIVES["sft"]


@functools.cache
def small(score=tiny.score, shardings=None):
    """(hooks, optimizer, first trained arrays, frozen, jitted step) of the tiny model with AdaLoRA."""
    base = tree.strip(tiny.params(jax.random.key(0)))
    names = (Name("layers/mlp/up", "layers.{}.up", "linear"),)
    params = jaxft_peft.method_of(SMALL).adapt(base, names, jax.random.key(1), SMALL)
    hooks = adalora.hooks(SMALL, params, STEPS)
    trainable, frozen = split(params)
    optimizer = optim.make(OptimConfig(lr=0.05), trainable, STEPS)
    run = step.make_step(SFT_ROW, SFT(), score, optimizer, hooks=hooks)
    return hooks, optimizer, trainable, frozen, run


def begin(hooks, optimizer, trainable, seed=2):
    return state.create(trainable, optimizer, jax.random.key(seed), method_state=hooks.start(trainable))


def values(now):
    return now.trainable["layers"]["mlp"]["up"].e


def test_a_run_ends_with_the_target_rank():
    """Accumulated gradients too; the loss falls, A and B become more orthogonal, other layers do not move."""
    hooks, optimizer, trainable, frozen, run = small()
    now, losses = begin(hooks, optimizer, trainable), []
    for number in range(STEPS):
        now, metrics = run(now, frozen, tiny.micro(tiny.batch(0), 2))
        losses.append(float(metrics["loss"]))
        if number == 0:
            assert np.all(values(now)[:2] != 0)
    assert losses[-1] < losses[0] - 0.01
    assert np.count_nonzero(values(now)) == 4 and not np.any(values(now)[2])
    w = now.trainable["layers"]["mlp"]["up"]
    assert not np.any(w.a[2]) and not np.any(w.b[2])

    def apart(w):
        return np.linalg.norm(np.swapaxes(w.a[:2], 1, 2) @ w.a[:2] - np.eye(4))

    assert apart(w) < 0.8 * apart(trainable["layers"]["mlp"]["up"])


def test_a_skipped_step_leaves_importance_alone_and_the_last_pruning_is_made_up_for():
    hooks, optimizer, trainable, frozen, run = small(tiny.poisoned_score)
    now = begin(hooks, optimizer, trainable)
    loader = tiny.Loader(rows=8, poison=(4, 7))  # step 8 would prune for the last time
    for number in range(STEPS):
        before = jax.tree.map(np.asarray, (now.trainable, now.method_state))
        now, metrics = run(now, frozen, tiny.micro(next(loader), 1))
        assert int(metrics["skipped"]) == (number in (4, 7))
        if number in (4, 7):
            chex.assert_trees_all_equal(before, jax.tree.map(np.asarray, (now.trainable, now.method_state)))
    assert np.count_nonzero(values(now)) == 4 and bool(now.method_state.settled)


def test_resumed_it_is_the_same_run_bitwise(tmp_path):
    hooks, optimizer, trainable, frozen, run = small()
    now, record = begin(hooks, optimizer, trainable), disk.Record(config={}, base={})
    with disk.open_folder(tmp_path) as manager:
        for number in range(STEPS):
            if number == 5:
                disk.save(manager, 5, now, record)
            now, _ = run(now, frozen, tiny.micro(tiny.batch(number), 2))
    with disk.open_folder(tmp_path) as manager:
        again, _ = disk.restore(manager, begin(hooks, optimizer, trainable), record)
    for number in range(5, STEPS):
        again, _ = run(again, frozen, tiny.micro(tiny.batch(number), 2))
    chex.assert_trees_all_equal((now.trainable, now.method_state), (again.trainable, again.method_state))


def test_on_a_mesh_it_is_the_same_run():
    hooks, optimizer, trainable, frozen, run = small()
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    params = tree.combine(trainable, frozen)
    ours, theirs = tree.partition(rules.shardings(params, mesh), tree.trainable_mask(params))
    shapes = state.abstract(
        trainable, optimizer, jax.random.key(2), method_state=jax.eval_shape(hooks.start, trainable)
    )
    whole = NamedSharding(mesh, PartitionSpec())
    places = state.shardings(shapes, ours, whole)
    rows = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
    assert places.method_state.sensitivity["layers/mlp/up"].a.spec == ours["layers"]["mlp"]["up"].a.spec
    sharded = step.make_step(SFT_ROW, SFT(), tiny.score, optimizer, step.Shardings(places, theirs, rows), hooks=hooks)
    one = begin(hooks, optimizer, trainable)
    several = state.create(
        trainable, optimizer, jax.random.key(2), method_state=hooks.start(trainable), shardings=places
    )
    for number in range(STEPS):
        batch = tiny.micro(tiny.batch(number), 2)
        one, _ = run(one, frozen, batch)
        several, _ = sharded(several, frozen, jax.device_put(batch, rows))
    chex.assert_trees_all_close(one.trainable, several.trainable, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(one.method_state.kept, several.method_state.kept)


def test_members_of_a_sweep_prune_as_they_would_alone():
    hooks, _, trainable, frozen, run = small()
    rates = (0.05, 0.02)
    together = sweep.make_optimizer(OptimConfig(), trainable, rates, STEPS)

    def of_all(view, params, batch, key=None):
        one = lambda t, b: tiny.score(view, tree.combine(t, frozen), b)  # noqa: E731
        return jax.vmap(one)(params, batch)

    body = sweep.make_step(SFT_ROW, SFT(), of_all, together, 2, hooks=hooks)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), trainable)
    both = state.create(
        stacked, together, jax.random.split(jax.random.key(2), 2), method_state=jax.vmap(hooks.start)(stacked)
    )
    nothing = jax.tree.map(lambda a: None, frozen)
    for number in range(STEPS):
        both, _ = body(both, nothing, tiny.micro(tiny.batch(number), 2))
    for i, rate in enumerate(rates):
        own = optim.make(OptimConfig(lr=rate), trainable, STEPS)
        alone = run if i == 0 else step.make_step(SFT_ROW, SFT(), tiny.score, own, hooks=hooks)
        now = begin(hooks, own, trainable)
        for number in range(STEPS):
            now, _ = alone(now, frozen, tiny.micro(tiny.batch(number), 2))
        member = jax.tree.map(lambda a, i=i: a[i], both)
        chex.assert_trees_all_equal(member.method_state.kept, now.method_state.kept)
        chex.assert_trees_all_close(member.trainable, now.trainable, rtol=1e-3, atol=1e-4)


def test_pruned_by_peft_and_loaded_here(tmp_path):
    model, _ = pruned_by_peft()
    params = pairs.load("llama", pairs.peft_save(model, tmp_path / "theirs"))
    chex.assert_trees_all_close(pairs.logits("llama", params), pairs.torch_logits(model), rtol=1e-5, atol=1e-5)
    found = adalora._found(params)
    assert sum(int(np.count_nonzero(w.e)) for w in found.values()) == 12
    again = pairs.load("llama", pairs.save("llama", params, tmp_path / "again"))
    chex.assert_trees_all_equal(again, params)


def test_pruned_here_and_loaded_by_peft(tmp_path):
    """Only what is left is stored, none of a matrix that lost all."""
    params = pairs.adapted("llama", OURS, jax.random.key(3))
    left = {"layers/attn/q": [[1, 0, 1, 1, 0, 0]] * 3, "layers/mlp/down": [[1] * 6, [0] * 6, [0] * 6]}

    def prune(path, w):
        return dataclasses.replace(w, e=w.e * jnp.asarray(left[path], jnp.float32))

    params = adalora._replaced(params, prune)
    directory = pairs.save("llama", params, tmp_path / "ours")
    tensors = load_file(directory / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.{}.{}.lora_{}"
    assert tensors[stem.format(2, "self_attn.q_proj", "A")].shape == (3, 32)
    assert tensors[stem.format(0, "mlp.down_proj", "B")].shape == (32, 6)
    assert tensors[stem.format(2, "mlp.down_proj", "E")].shape == (0, 1)
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["rank_pattern"]["model.layers.2.self_attn.q_proj.lora_E"] == [True, False, True, True, False, False]
    expected = pairs.logits("llama", params)
    theirs = pairs.torch_logits(pairs.peft_load("llama", directory))
    chex.assert_trees_all_close(theirs, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(pairs.logits("llama", pairs.load("llama", directory)), expected, rtol=1e-6, atol=1e-6)
    config["rank_pattern"]["model.layers.2.self_attn.q_proj.lora_E"] = [True]
    (directory / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"rank_pattern: got 1 values for model.layers.2.self_attn.q_proj; expected 6"):
        pairs.load("llama", directory)


def test_the_start_is_pefts_and_the_count_is_the_formula():
    """A and B with deviation 0.02, the singular values zero; r (in + out + 1) parameters for each module."""
    params = jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), AdaLoRA(init_rank=40, targets=("q_proj",)))
    w = adalora._found(params)["layers/attn/q"]
    assert abs(float(jnp.std(w.a)) / 0.02 - 1) < 0.05 and abs(float(jnp.std(w.b)) / 0.02 - 1) < 0.05
    assert not np.any(w.e)
    assert tree.count(split(params)[0]) == 3 * 40 * (32 + 32 + 1)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"peft.rank: got 13"):
        AdaLoRA(rank=13)
    with pytest.raises(ValueError, match=r"peft.every: got 0"):
        AdaLoRA(every=0)
    params = jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), OURS)
    with pytest.raises(ValueError, match=r"initial_steps: got 1, with final_steps 3 in a run of 4 steps"):
        adalora.hooks(OURS, params, 4)
    with pytest.raises(ValueError, match="AdaLoRA, AdaLoRA each change"):
        jaxft_peft.hooks([OURS, LoRA(), OURS], params, STEPS)
    assert jaxft_peft.hooks([LoRA(), OURS], params, STEPS).start is not jaxft_peft.hooks([LoRA()], params, STEPS).start
