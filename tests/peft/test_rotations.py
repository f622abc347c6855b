"""OFT, BOFT, HRA, RoAd and (IA)^3: gradients against torch, orthogonality, sizes, initialisation, refusals."""

import dataclasses
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from peft.tuners.boft import layer as peft_boft
from peft.tuners.oft.layer import OFTLayer
from peft.utils import constants

from jaxft import peft as jaxft_peft
from jaxft.core import tree
from jaxft.core.names import Name
from jaxft.core.weight import Affine
from jaxft.peft import BOFT, HRA, IA3, OFT, AdaLoRA, RoAd, boft, hra, oft, targets
from jaxft.peft.disk import AdapterError
from tests.peft import gradients, pairs

NAMES = (Name("layers/w", "model.layers.{}.w", "linear"), Name("head", "lm_head", "linear"))
QV, QD = ("q_proj", "v_proj"), ("q_proj", "down_proj")


def adapted(config, base=None, seed=0):
    """The method on a stack [3, 24, 16] of random matrices, off its initialisation."""
    w = jax.random.normal(jax.random.key(9), (3, 24, 16)) / 5 if base is None else base
    params = {"layers": {"w": w}, "head": jnp.zeros((16, 16))}
    config = dataclasses.replace(config, targets=("w",))
    params = jaxft_peft.method_of(config).adapt(params, NAMES, jax.random.key(seed), config)
    return pairs.moved(params, jax.random.key(1))["layers"]["w"]


@jax.jit
def rotation(w):
    """R of a layer whose base is the identity."""
    return jnp.eye(24) @ w


GRADIENTS = {
    "ia3": ("qwen2", IA3()),
    "ia3, conv1d": ("gpt2", IA3()),
    "oft": ("llama", OFT(targets=QD)),
    "coft": ("llama", OFT(targets=QV, block_size=8, coft_eps=0.3)),
    "boft": ("qwen2", BOFT(targets=QV)),
    "hra": ("llama", HRA(targets=QV, rank=4)),
    "hra gram-schmidt": ("llama", HRA(targets=QV, rank=3, gram_schmidt=True)),
    "road_4": ("qwen2", RoAd(targets=QV, group_size=8, variant="road_4")),
}  # fmt: skip


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_of_one_step_equal_torch(case, tmp_path, key):
    name, config = GRADIENTS[case]
    gradients.equal_torch(name, pairs.adapted(name, config, key), tmp_path)


# of a q_proj of 32 x 32 and a down_proj of 48 x 32, in three layers
COUNTS = {
    "oft": (OFT(targets=QD, block_size=8), (32 + 48) * 7 // 2),
    "oft by number": (OFT(targets=QD, blocks=2), 32 * 15 // 2 + 48 * 23 // 2),
    "oft shared": (OFT(targets=QD, block_size=8, block_share=True), 2 * 8 * 7 // 2),
    "boft": (BOFT(targets=QD, block_size=4, factors=2), 2 * (32 + 48) * 4 + 2 * 32),
    "hra": (HRA(targets=QD, rank=6), (32 + 48) * 6),
    "road_1": (RoAd(targets=QD, group_size=8), 2 * 32),
    "road_2": (RoAd(targets=QD, group_size=8, variant="road_2"), 2 * 2 * 32),
    "road_4": (RoAd(targets=QD, group_size=8, variant="road_4"), 2 * 4 * 32),
    "ia3": (IA3(targets=QD), 32 + 48),
}


@pytest.mark.parametrize("case", COUNTS)
def test_parameter_count(case, key):
    """The formula in each method's docstring, by hand."""
    config, expected = COUNTS[case]
    params = jaxft_peft.adapt(pairs.model("llama"), key, config)
    assert tree.count(tree.partition(params, tree.trainable_mask(params))[0]) == 3 * expected


@pytest.mark.parametrize(
    "config", [OFT(neumann_terms=None, block_size=8), HRA(rank=6), HRA(rank=5, gram_schmidt=True)], ids=str
)
def test_rotations_keep_lengths(config):
    """``x R`` is as long as x."""
    w = adapted(config, base=jnp.stack([jnp.eye(24)] * 3))
    r = rotation(w[0])
    assert np.abs(r - jnp.eye(24)).max() > 0.1
    np.testing.assert_allclose(r @ r.T, jnp.eye(24), atol=2e-6)


def test_a_butterfly_mixes_what_its_factors_pair():
    """m factors: each feature reaches b 2^(m-1) others, and lengths are kept."""
    for factors, reach in ((1, 2), (2, 4), (3, 8)):
        w = adapted(BOFT(block_size=2, factors=factors), base=jnp.stack([jnp.eye(24)] * 3))
        r = rotation(dataclasses.replace(w, scale=jnp.ones_like(w.scale))[1])
        np.testing.assert_allclose(r @ r.T, jnp.eye(24), atol=2e-6)
        np.testing.assert_array_equal((np.abs(r) > 1e-7).sum(0), reach)


def test_the_series_nears_the_inverse():
    """(I + Q)(I - Q)^-1, which the exact map takes for -Q."""
    vector = 0.1 * jax.random.normal(jax.random.key(0), (3, 15))
    exact = oft.turns(-vector, None, None)
    errors = [float(jnp.abs(oft.turns(vector, terms, None) - exact).max()) for terms in (2, 5, 8, 24)]
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors)) and errors[-1] < 1e-6


def test_reflections_are_those_of_the_chain():
    """The compact form equals the product of the reflections, written out in float64."""
    u = np.asarray(jax.random.normal(jax.random.key(0), (24, 7)), np.float64)
    chain = np.eye(24)
    for i in reversed(range(7)):
        unit = u[:, i : i + 1] / np.linalg.norm(u[:, i])
        chain = chain @ (np.eye(24) - 2 * unit @ unit.T)
    units, t = hra.compact(jnp.asarray(u, jnp.float32), False)
    np.testing.assert_allclose(np.eye(24) - units @ t.T @ units.T, chain, atol=3e-6)


def test_block_sizes_are_those_of_peft():
    for width in (1, 2, 6, 11, 24, 36, 48):
        for wanted in range(1, 60):
            fits = width % wanted == 0
            expected = wanted if fits else OFTLayer.adjust_oft_parameters(None, width, wanted)  # type: ignore[arg-type]
            assert oft.nearest_divisor(width, wanted) == expected, (width, wanted)


class Kernel:
    """In place of the CUDA extension that peft needs for several factors."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@pytest.mark.parametrize("theirs_first", [True, False])
def test_several_butterfly_factors_equal_peft(monkeypatch, tmp_path, key, theirs_first):
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: Kernel)
    if theirs_first:
        config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["q_proj", "down_proj"])
        theirs = pairs.peft_model("llama", config)
        params = pairs.load("llama", pairs.peft_save(theirs, tmp_path / "theirs"))
    else:
        params = pairs.adapted("llama", BOFT(targets=QV, blocks=8, factors=2), key)
        theirs = pairs.peft_load("llama", pairs.save("llama", params, tmp_path / "ours"))
    expected = pairs.torch_logits(theirs)
    assert np.abs(expected - pairs.logits("llama", tree.strip(params))).max() > 1e-3
    chex.assert_trees_all_close(pairs.logits("llama", params), expected, rtol=1e-5, atol=1e-5)


def test_factors_that_peft_could_not_train(tmp_path):
    """Without its extension peft trains one factor, and its config keeps saying three."""
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["q_proj"])
    theirs = pairs.peft_model("llama", config)
    directory = pairs.peft_save(theirs, tmp_path / "theirs")
    assert json.loads((directory / "adapter_config.json").read_text())["boft_n_butterfly_factor"] == 3
    params = pairs.load("llama", directory)
    chex.assert_trees_all_close(pairs.logits("llama", params), pairs.torch_logits(theirs), rtol=1e-5, atol=1e-5)


def test_dropout_leaves_blocks_of_one_factor_unturned():
    kept = jax.jit(jax.vmap(lambda key: boft.kept(key, 0.4, 3, 8)))(jax.random.split(jax.random.key(0), 200))
    dropped = np.asarray(~kept).sum(-1)  # [200, 3]
    np.testing.assert_array_equal(np.sort(dropped, -1), [[0, 0, 3]] * 200)
    assert (dropped > 0).mean(0).min() > 0.2 and np.asarray(~kept).any(1).mean(0).min() > 0.2
    w = adapted(BOFT(block_size=4, dropout=0.5))
    keyed = tree.dropout_keys({"layers": {"w": w}}, jax.random.key(0))["layers"]["w"]
    x = jnp.ones((2, 24))
    assert np.abs(x @ keyed[0] - x @ w[0]).max() > 1e-3
    chex.assert_trees_all_equal(x @ tree.dropout_keys({"w": keyed}, None)["w"][0], x @ w[0])


def test_reflections_start_in_pairs_drawn_as_in_peft():
    base = jnp.zeros((1, 400, 4))
    params = {"layers": {"w": base}, "head": jnp.zeros((4, 4))}
    u = jaxft_peft.sites.adapt(params, NAMES, jax.random.key(0), HRA(targets=("w",), rank=8))["layers"]["w"].u
    np.testing.assert_array_equal(u[..., ::2], u[..., 1::2])
    theirs = torch.zeros(400, 4)
    torch.nn.init.kaiming_uniform_(theirs, a=5**0.5)
    np.testing.assert_allclose(u.std(), theirs.std().item(), rtol=0.06)  # of two sets of random draws
    assert 0.49 < np.abs(u).max() <= 0.5


def test_merging_keeps_the_matrix_beside_a_large_bias():
    """Float32's 24 bits are those of the matrix, not those of a bias a thousand times larger."""
    w, b = jax.random.normal(jax.random.key(0), (3, 24, 16)) / 50, 300 + jnp.arange(48.0).reshape(3, 16)
    scaled = adapted(IA3(feedforward=()), base=Affine(w, b))
    merged = scaled.merged()
    np.testing.assert_allclose(merged.base, w * scaled.scale[:, None, :], rtol=1e-6)
    np.testing.assert_allclose(merged.bias, b * scaled.scale, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox"])
def test_default_targets_of_ia3_are_those_of_peft(name):
    attention, feedforward = default_targets(name)
    kind = pairs.torch_model(name).config.model_type
    assert feedforward == set(constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[kind])
    assert attention | feedforward == set(constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[kind])


def test_default_targets_of_ia3_in_a_family_that_peft_does_not_list():
    assert default_targets("phi3") == ({"qkv_proj"}, {"down_proj"})


def default_targets(name):
    """Modules whose output is scaled, and those whose input is."""
    params = jaxft_peft.adapt(pairs.model(name), jax.random.key(0), IA3())
    rows = pairs.ours(name).names
    found = {row: w for row in rows if isinstance(w := tree.get(params, row.path), jaxft_peft.ia3.IA3Weight)}
    endings = {targets.ending(row, rows): w.feedforward for row, w in found.items()}
    return {e for e, feedforward in endings.items() if not feedforward}, {e for e, hit in endings.items() if hit}


def test_coft_trains_as_in_peft(tmp_path, key):
    """Losses of five steps in which rotations reach their limit, and the logits after them."""
    config, steps, tokens = OFT(block_size=8, targets=QD, coft_eps=0.05), 5, torch.as_tensor(pairs.TOKENS).long()
    params = jaxft_peft.adapt(pairs.model("qwen2"), key, config)
    adapter = pairs.save("qwen2", params, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(pairs.torch_model("qwen2"), str(adapter), is_trainable=True).eval()
    adamw = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    trainable, frozen = tree.partition(params, tree.trainable_mask(params))
    hooks, made = jaxft_peft.hooks([config], params, steps), optax.adamw(1e-2, weight_decay=0.1)

    @jax.jit
    def step(trainable, state):
        value = lambda t: gradients.loss("qwen2", tree.combine(t, frozen))  # noqa: E731
        loss, grads = jax.value_and_grad(value)(trainable)
        updates, state = made.update(grads, state, trainable)
        return *hooks.update(1, optax.apply_updates(trainable, updates), grads, None)[:1], state, loss

    state = made.init(trainable)
    for _ in range(steps):
        adamw.zero_grad()
        expected = theirs(tokens, labels=tokens).loss
        expected.backward()
        adamw.step()
        trainable, state, loss = step(trainable, state)
        np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    limit = 0.05 / np.sqrt(4)  # of the four blocks of q_proj
    norms = np.linalg.norm(trainable["layers"]["attn"]["q"].base.skew, axis=-1) * np.sqrt(2)
    assert norms.max() <= limit * (1 + 1e-6) and norms.min() > 0.99 * limit
    got = pairs.logits("qwen2", tree.combine(trainable, frozen))
    np.testing.assert_allclose(got, pairs.torch_logits(theirs), rtol=0, atol=1e-4)


def test_several_coft_methods_share_one_hook():
    first, second = (OFT(targets=(name,), coft_eps=0.05) for name in QD)
    assert jaxft_peft.hooks([first, OFT(), second], {}, 5) is jaxft_peft.hooks([first], {}, 5)
    with pytest.raises(ValueError, match="peft: OFT, AdaLoRA each change the parameters in every step"):
        jaxft_peft.hooks([first, AdaLoRA()], jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), AdaLoRA()), 50)


WRONG = {
    "two sizes": (lambda: OFT(block_size=8, blocks=4), "peft.blocks: got 4 besides peft.block_size=8"),
    "one term": (lambda: OFT(neumann_terms=1), "peft.neumann_terms: got 1; expected at least 2"),
    "no freedom": (lambda: OFT(coft_eps=0.0), "peft.coft_eps: got 0.0"),
    "no blocks": (lambda: BOFT(blocks=0), "peft.blocks: got 0"),
    "everything dropped": (lambda: BOFT(dropout=1.0), "peft.dropout: got 1.0"),
    "no reflection": (lambda: HRA(rank=0), "peft.rank: got 0"),
    "no such variant": (
        lambda: RoAd(variant="road_3"),  # type: ignore[arg-type]
        "peft.variant: got 'road_3'; expected road_1, road_2, road_4",
    ),
    "odd group": (lambda: RoAd(group_size=7), "peft.group_size: got 7"),
    "blocks of one": (OFT(blocks=30), r"peft.blocks: got 30 for model.layers.0.self_attn.q_proj, 32 wide"),
    "blocks that do not fit": (BOFT(block_size=5), r"peft.block_size: got 5 for model.layers.0.*, 32 wide"),
    "factors that do not fit": (BOFT(block_size=8, factors=4), "with peft.factors=4; .*a multiple of 8"),
    "odd blocks": (BOFT(blocks=32, factors=2), "peft.blocks: got 32"),
    "too many reflections": (
        HRA(rank=33, gram_schmidt=True),
        "peft.rank: got 33 orthogonal directions for .*, 32 wide",
    ),
    "group that does not fit": (RoAd(), r"peft.group_size: got 64, no divisor of the 32 outputs of model.layers.0"),
    "trained bias": (RoAd(bias="all", group_size=8), "peft.bias: got 'all'; expected none: RoAd maps outputs"),
    "no such feed-forward": (IA3(feedforward=("down_prj",)), "peft.feedforward: got 'down_prj', which selects none"),
    "half a stack": (IA3(feedforward=r".*\.1\.mlp\.down_proj"), "only some layers of layers/mlp/down"),
    "an embedding": (HRA(targets=("embed_tokens",)), "an embedding, which HRA cannot adapt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case):
    config, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), config() if callable(config) else config)


def test_a_tied_head_cannot_follow_a_rotation():
    config = OFT(targets=("embed_tokens",), ensure_weight_tying=True)
    with pytest.raises(ValueError, match=r"peft.ensure_weight_tying: got true; expected false"):
        jaxft_peft.adapt(pairs.model("llama_tied"), jax.random.key(0), config)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"peft_version": None}, "peft_version: got .*; expected 0.18.0 or later"),
        ({"peft_version": "0.17.1"}, "peft_version: got .*; expected 0.18.0 or later"),
        ({"num_cayley_neumann_terms": 1}, "num_cayley_neumann_terms: got 1; expected at least 2"),
    ],
)
def test_other_series_of_peft_are_refused(changed, message, tmp_path, key):
    directory = pairs.save("llama", pairs.adapted("llama", OFT(targets=("q_proj",)), key), tmp_path / "adapter")
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(AdapterError, match=message):
        pairs.load("llama", directory)


def test_feedforward_modules_are_compared_as_in_peft(tmp_path, key):
    """A list by the plain ends of names, and a subset of target_modules; a config without one is refused."""
    config = IA3(targets=("k_proj", "down_proj"), layers=(1,))
    directory = pairs.save("llama", pairs.adapted("llama", config, key), tmp_path / "adapter")
    file = directory / "adapter_config.json"
    fields = json.loads(file.read_text())
    assert fields["feedforward_modules"] == ["model.layers.1.mlp.down_proj"]
    file.write_text(json.dumps(fields | {"feedforward_modules": ["wn_proj"]}))
    assert pairs.load("llama", directory)["layers"]["mlp"]["down"].feedforward
    file.write_text(json.dumps(fields | {"feedforward_modules": None}))
    with pytest.raises(AdapterError, match="feedforward_modules: got none"):
        pairs.load("llama", directory)
