"""LoRA: initialisation, scale, gradients against torch, dropout, padding, and what a wrong config is told."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch

from jaxft import peft as jaxft_peft
from jaxft.core import tree
from jaxft.core.names import Name
from jaxft.core.weight import Affine, InPlace
from jaxft.peft import DoRA, LoRA, LoRAFA, lora, sites
from jaxft.training import optim
from tests.peft import gradients, pairs

L, D, F = 3, 64, 48
NAMES = (Name("layers/w", "model.layers.{}.w", "linear"), Name("head", "lm_head", "linear"))


def adapted(config: LoRA, seed: int = 0) -> lora.LoRAWeight:
    """LoRA on a stack [L, D, F] of random matrices."""
    w = jax.random.normal(jax.random.key(9), (L, D, F)) / 8
    params = {"layers": {"w": w}, "head": jnp.zeros((D, D))}
    return sites.adapt(params, NAMES, jax.random.key(seed), config)["layers"]["w"]


def test_tree_of_shapes():
    """The parameters of an adapted model, literally."""
    params = jaxft_peft.adapt(
        pairs.model("llama"), jax.random.key(0), LoRA(rank=4, targets=("q_proj",), modules_to_save=("lm_head",))
    )
    new = {path: (leaf.shape, leaf.dtype.name) for path, leaf in tree.paths(params)}
    old = {path: (leaf.shape, leaf.dtype.name) for path, leaf in tree.paths(pairs.ours("llama").params)}
    assert {path: new[path] for path in set(new) - set(old)} == {
        "layers/attn/q/base": ((3, 32, 32), "float32"),
        "layers/attn/q/a": ((3, 32, 4), "float32"),
        "layers/attn/q/b": ((3, 4, 32), "float32"),
        "layers/attn/q/scale": ((3,), "float32"),
        "layers/attn/q/rank": ((3,), "int32"),
        "head/base": ((32, 97), "float32"),
        "head/value": ((32, 97), "float32"),
    }
    assert set(old) - set(new) == {"layers/attn/q", "head"}


@pytest.mark.parametrize("config, expected", [
    (LoRA(rank=4), 2.0),
    (LoRA(rank=4, alpha=4), 1.0),
    (LoRA(rank=4, alpha=6), 1.5),
    (LoRA(rank=16, alpha=16, rslora=True), 4.0),
    (LoRA(rank=9, rslora=True), 6.0),
])  # fmt: skip
def test_scale(config, expected):
    """alpha / r; alpha / sqrt(r); alpha defaults to 2 r."""
    np.testing.assert_allclose(adapted(config).scale, [expected] * L, rtol=1e-6)


def test_initialisation_statistics():
    """Those of peft: A uniform within 1/sqrt(in) or normal of deviation 1/r, B zero; layers are independent."""
    n = D * 64 * L
    a = adapted(LoRA(rank=64)).a
    bound = 1 / np.sqrt(D)
    assert np.abs(a).max() <= bound and np.abs(a).max() > 0.99 * bound
    assert abs(a.mean()) < 4 * bound / np.sqrt(3 * n)
    np.testing.assert_allclose(a.std(), bound / np.sqrt(3), rtol=0.02)
    theirs = torch.nn.Linear(D, 64)
    torch.nn.init.kaiming_uniform_(theirs.weight, a=5**0.5)
    np.testing.assert_allclose(a.std(), theirs.weight.std().item(), rtol=0.05)
    assert not np.allclose(a[0], a[1]) and np.count_nonzero(adapted(LoRA(rank=64)).b) == 0
    np.testing.assert_allclose(adapted(LoRA(rank=64, init="gaussian")).a.std(), 1 / 64, rtol=0.02)
    other = adapted(LoRA(rank=64, init="a_zero"))
    assert np.count_nonzero(other.a) == 0 and 0 < np.abs(other.b).max() <= 1 / 8
    assert not np.allclose(adapted(LoRA(rank=64), seed=1).a, a)
    chex.assert_trees_all_equal(adapted(LoRA(rank=64)), adapted(LoRA(rank=64)))


def test_embedding_initialisation():
    """A zero and B standard normal, as in peft."""
    params = jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), LoRA(rank=32, targets=("embed_tokens",)))
    w = params["embed"]["tokens"]
    assert np.count_nonzero(w.a) == 0
    np.testing.assert_allclose(w.b.std(), 1.0, rtol=0.06)


def test_each_target_draws_its_own_factors():
    params = jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), LoRA(rank=4, targets=("q_proj", "o_proj")))
    assert not np.allclose(params["layers"]["attn"]["q"].a, params["layers"]["attn"]["o"].a)


GRADIENTS = {
    "default": ("llama", LoRA(rank=4)),
    "rslora, patterns": ("llama", LoRA(rank=4, rslora=True, rank_pattern={"q_proj": 2, "1.mlp.up_proj": 7})),
    "some layers": ("llama", LoRA(rank=4, targets=("q_proj", "down_proj"), layers=(1,))),
    "biases, saved": ("llama_bias", LoRA(targets=("q_proj",), bias="lora_only", modules_to_save=("up_proj", "norm"))),
    "tied embedding": ("llama_tied", LoRA(rank=4, targets=("embed_tokens", "k_proj"))),
    "tied head": ("llama_tied", LoRA(rank=4, targets=("lm_head",), modules_to_save=("embed_tokens",))),
    "gpt2": ("gpt2", LoRA(rank=4, targets=("c_attn", "wte"))),
    "bias of B": ("qwen2", LoRA(rank=4, targets=("q_proj", "up_proj"), lora_bias=True)),
}  # fmt: skip


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_of_one_step_equal_torch(case, tmp_path, key):
    """Of the mean cross-entropy, tensor by tensor: both sides written in peft's names."""
    name, config = GRADIENTS[case]
    params = pairs.adapted(name, config, key)
    gradients.equal_torch(name, params, tmp_path)


def test_gradients_of_an_embedding_that_the_head_follows(tmp_path, key):
    """peft has two parameters on one storage, the embedding's and the head's: ours is their sum."""
    config = LoRA(rank=4, targets=("embed_tokens",), ensure_weight_tying=True)
    params = pairs.adapted("llama_tied", config, key)
    adapter = str(pairs.save("llama_tied", params, tmp_path / "adapter"))
    made = pairs.quietly(peft.PeftModel.from_pretrained, pairs.torch_model("llama_tied"), adapter, is_trainable=True)
    batch = torch.as_tensor(pairs.TOKENS).long()
    made.eval()(batch, labels=batch).loss.backward()
    embedding, head = made.base_model.model.model.embed_tokens, made.base_model.model.lm_head
    look_up = (embedding.lora_embedding_A["default"].grad.T, embedding.lora_embedding_B["default"].grad.T)
    logits = (head.lora_B["default"].weight.grad, head.lora_A["default"].weight.grad)
    trainable, frozen = tree.partition(params, tree.trainable_mask(params))
    got = jax.jit(jax.grad(lambda t: gradients.loss("llama_tied", tree.combine(t, frozen))))(trainable)
    for mine, a, b in zip((got["embed"]["tokens"].a, got["embed"]["tokens"].b), look_up, logits, strict=True):
        assert a.abs().max() > 0 and b.abs().max() > 0
        np.testing.assert_allclose(mine, a + b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config, parameters", [
    (LoRA(rank=4, targets=("w",)), 4 * (D + F)),
    (LoRA(rank=4, targets=("w",), lora_bias=True), 4 * (D + F) + F),
    (LoRA(rank=4, targets=("w",), init="pissa"), 4 * (D + F)),
    (LoRAFA(rank=4, targets=("w",)), 4 * F),
    (DoRA(rank=4, targets=("w",)), 4 * (D + F) + F),
])  # fmt: skip
def test_number_of_parameters(config, parameters):
    """r (in + out); and out for a bias, out for lengths; r out where A is frozen."""
    w = adapted(config)
    assert tree.count(tree.partition(w, tree.trainable_mask(w))[0]) == L * parameters


def test_lora_plus_raises_the_rate_of_b():
    """Of B, and as in peft of vectors; of an embedding both factors keep theirs."""
    params = jaxft_peft.adapt(
        pairs.model("llama"), jax.random.key(0), LoRA(rank=2, targets=("embed_tokens", "q_proj"), lora_plus=16)
    )
    trainable, _ = tree.partition(params, tree.trainable_mask(params))
    groups = jaxft_peft.METHODS["lora"].groups
    assert groups(LoRA()) == {}
    factors = dict(tree.paths(optim.multipliers(groups(LoRA(lora_plus=16)), trainable)))
    assert factors == {
        "embed/tokens/a": 1.0, "embed/tokens/b": 1.0, "layers/attn/q/a": 1.0, "layers/attn/q/b": 16.0,
    }  # fmt: skip
    dora = jaxft_peft.adapt(pairs.model("qwen2"), jax.random.key(0), DoRA(rank=2, targets=("q_proj",), bias="all"))
    trainable, _ = tree.partition(dora, tree.trainable_mask(dora))
    high = {p for p, f in tree.paths(optim.multipliers(groups(DoRA(lora_plus=4)), trainable)) if f == 4.0}
    assert high == {"layers/attn/q/base/b", "layers/attn/q/base/magnitude"}


def test_padding_and_unadapted_layers_never_move():
    """Through Adam with weight decay, and through muon, which mixes the columns of a matrix."""
    config = LoRA(rank=3, targets=("w",), layers=(0, 2), rank_pattern={"2.w": 5})
    w = adapted(config)
    np.testing.assert_array_equal(w.rank, [3, 0, 5])
    np.testing.assert_array_equal(w.scale, np.float32([2.0, 0.0, 6 / 5]))
    trainable, frozen = tree.partition(w, tree.trainable_mask(w))
    x = jax.random.normal(jax.random.key(1), (L, 7, D))

    def loss(t):
        return jnp.sum(jnp.sin(jax.vmap(lambda x, w: x @ w)(x, tree.combine(t, frozen))))

    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    by_layer = jax.tree.map(lambda _: numbers, trainable)
    for optimiser in (
        optax.adamw(0.1, weight_decay=0.1),
        optax.contrib.muon(0.1, weight_decay=0.1, muon_weight_dimension_numbers=by_layer),
    ):
        t, state = trainable, optimiser.init(trainable)
        for _ in range(3):
            updates, state = optimiser.update(jax.grad(loss)(t), state, t)
            t = optax.apply_updates(t, updates)
        assert np.abs(t.a[0, :, :3] - w.a[0, :, :3]).max() > 1e-2 and np.abs(t.b[2]).max() > 1e-2
        for layer, rank in enumerate([3, 0, 5]):
            assert np.count_nonzero(t.a[layer, :, rank:]) == 0 == np.count_nonzero(t.b[layer, rank:])


class TestDropout:
    """Off in evaluation, on in training: the adapter's input only, with its own mask for each path, layer and step."""

    RATE = 0.4

    def weight(self):
        w = adapted(LoRA(rank=4, targets=("w",), dropout=self.RATE))
        return dataclasses.replace(w, b=jax.random.normal(jax.random.key(3), w.b.shape))

    def keyed(self, seed=0):
        return tree.dropout_keys({"layers": {"w": self.weight()}}, jax.random.key(seed))["layers"]["w"]

    def test_off_in_evaluation(self):
        x = jax.random.normal(jax.random.key(0), (5, D))
        plain = dataclasses.replace(self.weight(), rate=0.0)
        chex.assert_trees_all_equal(x @ self.weight()[0], x @ plain[0])
        off = tree.dropout_keys({"w": self.keyed()}, None)["w"]
        chex.assert_trees_all_equal(x @ off[0], x @ plain[0])
        assert jax.tree.structure(off) == jax.tree.structure(self.weight())

    def test_statistics_in_training(self):
        """Kept features are scaled by 1/(1 - rate), so the mean is that of evaluation; the base is not dropped."""
        w = dataclasses.replace(  # y = 0 x + x: reads the dropped input back
            self.keyed(), base=jnp.zeros((L, D, D)), a=jnp.stack([jnp.eye(D)] * L), b=jnp.stack([jnp.eye(D)] * L),
            scale=jnp.ones(L),
        )  # fmt: skip
        y = jnp.ones((400, D)) @ w[1]
        values = np.unique(np.asarray(y).round(4))
        np.testing.assert_allclose(values, [0, 1 / (1 - self.RATE)], rtol=1e-3)
        np.testing.assert_allclose((y > 0).mean(), 1 - self.RATE, atol=4 * np.sqrt(0.24 / y.size))
        only_base = dataclasses.replace(self.keyed(), b=jnp.zeros((L, 4, F)))
        x = jax.random.normal(jax.random.key(0), (5, D))
        chex.assert_trees_all_equal(x @ only_base[0], x @ self.weight().base[0])

    def test_masks_differ_by_path_layer_and_step(self):
        params = jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), LoRA(rank=4, dropout=0.5))
        keys = {
            (path, step, i): tuple(np.asarray(jax.random.key_data(k)).tolist())
            for step in (0, 1)
            for path, leaf in tree.paths(tree.dropout_keys(params, jax.random.key(step)))
            if path.endswith("/key")
            for i, k in enumerate(leaf)
        }
        assert len(keys) == 7 * 3 * 2 == len(set(keys.values()))

    def test_same_key_same_mask_under_scan_remat_and_grad(self):
        """The recomputed forward pass drops what the first one dropped."""
        w, x = self.keyed(), jax.random.normal(jax.random.key(0), (5, D))
        square = dataclasses.replace(w, base=jnp.zeros((L, D, D)), b=jnp.zeros((L, 4, D)) + 0.1)

        def value(x, step):
            return jnp.sum(jax.lax.scan(step, x, square)[0] ** 2)

        step = lambda h, w: (h + jnp.tanh(h @ w), None)  # noqa: E731
        chex.assert_trees_all_close(
            jax.grad(value)(x, step), jax.grad(value)(x, jax.checkpoint(step)), rtol=1e-5, atol=1e-5
        )

        def unrolled(x):
            for i in range(L):
                x = x + jnp.tanh(x @ square[i])
            return jnp.sum(x**2)

        chex.assert_trees_all_close(jax.grad(value)(x, step), jax.grad(unrolled)(x), rtol=1e-5, atol=1e-5)

    def test_drops_in_a_whole_model_in_training_only(self):
        params = jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), LoRA(rank=4, dropout=0.5))
        params = pairs.moved(params, jax.random.key(1))
        one, two = (pairs.logits("llama", tree.dropout_keys(params, jax.random.key(i))) for i in (0, 1))
        again = pairs.logits("llama", tree.dropout_keys(params, jax.random.key(0)))
        assert np.abs(one - two).max() > 1e-3
        np.testing.assert_array_equal(one, again)
        evaluated = pairs.logits("llama", tree.dropout_keys(params, None))
        np.testing.assert_array_equal(evaluated, pairs.logits("llama", params))

    def test_none_where_the_rate_is_zero(self):
        params = jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), LoRA(rank=4))
        keyed = tree.dropout_keys(params, jax.random.key(0))
        assert jax.tree.structure(keyed) == jax.tree.structure(params)


def test_in_place_modules_train_their_bias_and_leave_the_original():
    config = LoRA(rank=4, targets=("q_proj",), modules_to_save=("up_proj", "norm"))
    params = jaxft_peft.adapt(pairs.model("llama_bias"), jax.random.key(0), config)
    up = params["layers"]["mlp"]["up"]
    assert isinstance(up, InPlace) and isinstance(up.value, Affine) and isinstance(up.base, Affine)
    assert up.value.base.dtype == jnp.float32 and up.value.bias is not up.base.bias
    assert {p for p, hit in tree.paths(tree.trainable_mask(params)) if hit} == {
        "layers/attn/q/base/a", "layers/attn/q/base/b", "layers/mlp/up/value/base", "layers/mlp/up/value/bias",
        "layers/attn_norm/scale/value", "layers/mlp_norm/scale/value", "final_norm/scale/value",
    }  # fmt: skip


def test_several_methods_in_order():
    params = jaxft_peft.adapt(
        pairs.model("llama"), jax.random.key(0), [LoRA(rank=2, targets=("q_proj",)), LoRA(rank=3, targets=("v_proj",))]
    )
    attn = params["layers"]["attn"]
    assert (attn["q"].a.shape[-1], attn["v"].a.shape[-1]) == (2, 3)


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(targets=("q_prj",)), r"peft.targets: 'q_prj' selects no weight.*Known modules: .*q_proj.*all-linear"),
        (dict(targets=("q_proj", "c_attn")), "'c_attn' selects no weight"),
        (dict(targets=r".*\.bogus"), "bogus"),
        (dict(targets=()), "the empty list"),
        (dict(targets=("q_proj",), layers=()), "'q_proj' selects no weight of this model \\(3 layers\\)"),
        (dict(targets=("q_proj",), layers=(0, 7)), r"peft.layers: got \[0, 7\]; expected indices from 0 to 2"),
        (dict(targets=("q_proj",), exclude=("q_proj",)), "'q_proj' selects no weight"),
        (dict(modules_to_save=("lm_heat",)), "peft.modules_to_save: 'lm_heat' selects no weight"),
        (dict(rank_pattern={"q_prj": 4}), "peft.rank_pattern: 'q_prj' matches no adapted module"),
        (dict(alpha_pattern={"lm_head": 4}), "peft.alpha_pattern: 'lm_head' matches no adapted module"),
        (dict(modules_to_save=("1.mlp.up_proj",)), r"selects layers \[1\] of layers/mlp/up"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(config, message):
    with pytest.raises(ValueError, match=message):
        jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), LoRA(**config))


@pytest.mark.parametrize("wrong", [dict(rank=0), dict(dropout=1.0), dict(dropout=-0.1)])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=f"peft.{next(iter(wrong))}: got"):
        LoRA(**wrong)


def test_our_own_paths_are_targets_too():
    for targets in (("layers/attn/q",), "layers/attn/q", ("attn/q",)):
        params = jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), LoRA(rank=2, targets=targets))
        assert {p for p, hit in tree.paths(tree.trainable_mask(params)) if hit} == {
            "layers/attn/q/a",
            "layers/attn/q/b",
        }
    saved = LoRA(rank=2, targets=("q_proj",), modules_to_save=("final_norm",))
    assert isinstance(jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), saved)["final_norm"]["scale"], InPlace)


def test_all_linear_in_any_case():
    assert jax.tree.structure(
        jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), LoRA(targets="All-Linear"))
    ) == (jax.tree.structure(jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), LoRA())))
