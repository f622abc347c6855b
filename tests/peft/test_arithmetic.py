"""Several adapters as one: what peft's add_weighted_adapter makes of them, and exact sums."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from jaxft import peft as jaxft_peft
from jaxft.core import tree
from jaxft.core.weight import Affine, InPlace
from jaxft.peft import (
    IA3,
    AdaLoRA,
    BitFit,
    DoRA,
    FourierFT,
    Houlsby,
    LoRA,
    LoRAFA,
    LoRAWeight,
    MiSS,
    SHiRA,
    VeRA,
    merging,
)  # fmt: skip
from tests.peft import pairs

EQUAL = {  # of one rank, with targets in common and not; peft's own cannot be of different layers
    "a": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "b": {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]},
    "c": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "alpha_pattern": {"1.self_attn.q_proj": 9}},
}
UNEQUAL = {**EQUAL, "c": {"r": 6, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {"0.*q_proj": 3}}}
WEIGHTS = [0.7, -0.4, 1.3]


@functools.cache
def in_peft(equal: bool) -> peft.PeftModel:
    """llama with three LoRAs, off their initialisation."""
    configs = {name: peft.LoraConfig(**fields) for name, fields in (EQUAL if equal else UNEQUAL).items()}
    torch.manual_seed(1)
    model = pairs.quietly(peft.get_peft_model, pairs.torch_model("llama"), configs["a"], adapter_name="a")
    for name in ("b", "c"):
        model.add_adapter(name, configs[name])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@functools.cache
def loaded(equal: bool):
    """The same three here."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        pairs.quietly(in_peft(equal).save_pretrained, folder)
        return [pairs.load("llama", Path(folder) / name) for name in "abc"]


def by_peft(equal: bool, how: str, **options):
    """Logits, and the factors of layer 0's q_proj as ours lie: a, b."""
    model = in_peft(equal)
    add = model.base_model.add_weighted_adapter
    try:
        pairs.quietly(add, ["a", "b", "c"], WEIGHTS, "made", combination_type=how, **options)
        model.set_adapter("made")
        q = model.base_model.model.model.layers[0].self_attn.q_proj
        factors = (q.lora_A["made"].weight.detach().numpy().T, q.lora_B["made"].weight.detach().numpy().T)
        return pairs.torch_logits(model), factors
    finally:
        pairs.quietly(model.delete_adapter, "made")


def check(equal, how, tolerance=1e-5, **options):
    renamed = {{"svd_rank": "rank", "majority_sign_method": "sign"}.get(n, n): v for n, v in options.items()}
    made = jaxft_peft.combine(loaded(equal), WEIGHTS, how, **renamed)
    logits, (a, b) = by_peft(equal, how, **options)
    chex.assert_trees_all_close(pairs.logits("llama", made), logits, rtol=tolerance, atol=tolerance)
    w = made["layers"]["attn"]["q"]
    if how.endswith("svd"):  # unique up to signs, and zeros beyond the rank there is
        chex.assert_trees_all_close(w.a[0] @ w.b[0], a @ b, rtol=1e-4, atol=1e-5)
    else:
        chex.assert_trees_all_close((w.a[0][:, : a.shape[1]], w.b[0][: a.shape[1]]), (a, b), rtol=1e-5, atol=1e-6)
    return made


@pytest.mark.parametrize("how", ["linear", "ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"])
def test_as_peft_does(how):
    check(True, how, **({} if how == "linear" else {"density": 0.6}))


def test_ties_by_the_sign_of_most():
    made = check(True, "ties", density=0.6, majority_sign_method="frequency")
    total = jaxft_peft.combine(loaded(True), WEIGHTS, "ties", density=0.6)
    assert not np.array_equal(made["layers"]["attn"]["q"].a, total["layers"]["attn"]["q"].a)


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_as_peft_does_with_the_same_mask(how, monkeypatch):
    def kept(rows, columns):  # the same for a matrix and its transpose
        i, j = np.indices((rows, columns))
        return (i * j + i + j) % 5 < 3

    monkeypatch.setattr(merging, "_kept", lambda draws, shape, density: kept(*shape))
    monkeypatch.setattr(torch, "bernoulli", lambda p: torch.tensor(kept(*p.shape), dtype=p.dtype))
    check(True, how, density=0.6)


@pytest.mark.parametrize("options", [{}, {"svd_rank": 3}], ids=str)
def test_svd_of_different_ranks_as_peft_does(options):
    made = check(False, "svd", **options)
    assert made["layers"]["attn"]["q"].a.shape[-1] == options.get("svd_rank", 6)


def test_the_sum_of_different_ranks_as_peft_has_it():
    made = check(False, "cat")
    assert made["layers"]["attn"]["q"].rank.tolist() == [11, 14, 14]  # 4 + 4 + 3, then 4 + 4 + 6


def test_dare_keeps_the_mean_and_follows_its_seed():
    many = [
        jaxft_peft.combine(loaded(True), WEIGHTS, "dare_linear", density=0.5, seed=seed)["layers"]["attn"]["q"].a
        for seed in range(60)
    ]
    linear = jaxft_peft.combine(loaded(True), WEIGHTS, "linear")["layers"]["attn"]["q"].a
    spread = np.std(many, axis=0)
    assert np.all(np.abs(np.mean(many, axis=0) - linear) <= 5 * spread / np.sqrt(60) + 1e-6)
    again = jaxft_peft.combine(loaded(True), WEIGHTS, "dare_linear", density=0.5, seed=7)["layers"]["attn"]["q"].a
    chex.assert_trees_all_equal(again, many[7])
    assert not np.array_equal(many[7], many[8])


EXACT = {
    "ranks and layers": (LoRA(rank=3, targets=("q_proj",), layers=(1,)), LoRA(rank=5, targets=("q_proj", "up_proj"))),
    "biases of B": (LoRA(rank=2, targets=("q_proj",), lora_bias=True), LoRA(rank=2, targets=("q_proj", "k_proj"))),
    "pissa": (LoRA(rank=2, targets=("q_proj",), init="pissa"), LoRA(rank=2, targets=("q_proj",))),
    "adalora and lora": (AdaLoRA(rank=2, init_rank=3, targets=("q_proj",), layers=(0, 2)), LoRA(targets=("q_proj",))),
    "lora-fa": (LoRAFA(rank=3, targets=("q_proj",)), LoRA(rank=2, targets=("q_proj",))),
    "saved modules": (
        LoRA(rank=2, targets=("q_proj",), modules_to_save=("lm_head", "norm")),
        LoRA(rank=2, targets=("v_proj",), modules_to_save=("norm",)),
    ),
}


def adapted(config, seed, model="llama"):
    return pairs.moved(jaxft_peft.adapt(pairs.model(model), jax.random.key(5), config), jax.random.key(seed))


def summed(adapters, weights, model):
    """base + sum of weight * (merged - base), from the merged models."""
    base = pairs.ours(model).params
    whole = [tree.merge(params) for params in adapters]

    def one(b, *merged):
        return b + sum(w * (m - b) for w, m in zip(weights, merged, strict=True))

    return jax.tree.map(one, base, *whole)


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_sum(name):
    model = "llama_bias" if name == "biases of B" else "llama"
    adapters = [adapted(config, seed, model) for seed, config in enumerate(EXACT[name])]
    made = jaxft_peft.combine(adapters, (0.5, -2.0))
    chex.assert_trees_all_close(tree.merge(made), summed(adapters, (0.5, -2.0), model), rtol=1e-5, atol=1e-5)
    assert {type(w) for w in tree.adapters(made)} <= {LoRAWeight, InPlace}


LISTS = {
    "lora on lora": ([LoRA(rank=2, targets=("q_proj",))] * 2, LoRA(rank=3, targets=("q_proj", "v_proj"))),
    "lora and added biases": ([LoRA(rank=2, targets=("q_proj",)), BitFit(targets=("q_proj", "up_proj"))],) * 2,
    "in another order": (
        [LoRA(rank=2, targets=("q_proj",)), BitFit(targets=("q_proj",))],
        [BitFit(targets=("q_proj",)), LoRA(rank=2, targets=("q_proj",))],
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_are_summed_part_by_part(name):
    adapters = [adapted(methods, seed) for seed, methods in enumerate(LISTS[name])]
    made = tree.merge(jaxft_peft.combine(adapters, (0.5, -2.0)))["layers"]
    base = pairs.ours("llama").params["layers"]
    each = [tree.merge(params)["layers"] for params in adapters]
    for path in ("attn/q", "attn/v", "mlp/up"):
        got, start, *parts = (_affine(tree.get(layers, path)) for layers in (made, base, *each))
        want = [b + 0.5 * (x - b) - 2.0 * (y - b) for b, x, y in zip(start, *parts, strict=True)]
        chex.assert_trees_all_close(list(got), want, rtol=1e-5, atol=1e-5)


def _affine(w):
    """Matrix and bias, zero where there is none."""
    return (w.base, w.bias) if isinstance(w, Affine) else (w, jnp.zeros(()))


def test_embeddings_and_heads_of_a_tied_model():
    both = [
        adapted(LoRA(rank=2, targets=("embed_tokens",)), 1, "llama_tied"),
        adapted(LoRA(rank=3, targets=("lm_head", "q_proj")), 2, "llama_tied"),
    ]
    made = jaxft_peft.combine(both, (2.0, 0.5))
    tokens = made["embed"]["tokens"]
    chex.assert_trees_all_close(jnp.asarray(tokens.base.scale), 1.0)
    base = pairs.ours("llama_tied").params["embed"]["tokens"]
    first, second = (params["embed"]["tokens"] for params in both)
    chex.assert_trees_all_close(tokens.base.dense() - base, 2 * (first.dense() - base), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        tokens.head.base.dense() - base.T, 0.5 * (second.head.base.dense() - base.T), rtol=1e-5, atol=1e-6
    )
    again = jaxft_peft.combine([made, both[1]], (1.0, 1.0))["embed"]["tokens"].head.base
    assert isinstance(again, LoRAWeight) and again.a.shape[-1] == 6
    with pytest.raises(ValueError, match="embed/tokens: the tied head follows the embedding in one adapter and has"):
        follows = adapted(LoRA(rank=2, targets=("embed_tokens",), ensure_weight_tying=True), 1, "llama_tied")
        jaxft_peft.combine([follows, both[1]])


LINEAR = {
    "vera": VeRA(rank=4, targets=("q_proj",)),
    "shira": SHiRA(rank=2, targets=("q_proj",), layers=(0, 2)),
    "fourierft": FourierFT(frequencies=20, targets=("q_proj",)),
    "miss": MiSS(rank=8, targets=("q_proj", "up_proj")),
    "miss bat": MiSS(rank=8, variant="bat", targets=("q_proj",)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_sum_in_the_fields_that_a_method_is_linear_in(name):
    first = jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), LINEAR[name])
    adapters = []
    for seed in (1, 2):

        def moved(path, w, seed=seed):
            key = jax.random.fold_in(jax.random.key(seed), len(path))
            return dataclasses.replace(w, **{n: jax.random.normal(key, getattr(w, n).shape) for n in w.linear})

        adapters.append(tree.map_weights(lambda p, w: moved(p, w) if tree.is_weight(w) else w, first))
    made = jaxft_peft.combine(adapters, (3.0, -1.0))
    assert {type(w) for w in tree.adapters(made)} == {type(w) for w in tree.adapters(first)}
    chex.assert_trees_all_close(tree.merge(made), summed(adapters, (3.0, -1.0), "llama"), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="expected LoRA, of which svd is made"):
        jaxft_peft.combine(adapters, how="svd")


def test_what_differs_elsewhere_has_no_sum():
    config = LINEAR["vera"]
    with pytest.raises(ValueError, match="layers/attn/q: the VeRAWeight differ in d"):
        jaxft_peft.combine([adapted(config, 1), adapted(config, 2)])
    shira = [jaxft_peft.adapt(pairs.model("llama"), jax.random.key(seed), LINEAR["shira"]) for seed in (1, 2)]
    with pytest.raises(ValueError, match="the SHiRAWeight differ in at_in"):
        jaxft_peft.combine(shira)


def test_multiples():
    params = loaded(True)[0]
    base = pairs.logits("llama", pairs.ours("llama").params)
    chex.assert_trees_all_equal(pairs.logits("llama", jaxft_peft.scale(params, 0.0)), base)
    twice = jaxft_peft.scale(params, 2.0)
    chex.assert_trees_all_close(tree.merge(twice), summed([params], [2.0], "llama"), rtol=1e-5, atol=1e-5)
    for config in (DoRA(rank=2, targets=("q_proj",)), IA3(), Houlsby(reduction_factor=8)):
        with pytest.raises(ValueError, match=r"layers/.*Weight; expected adapters of one method that adds its update"):
            jaxft_peft.scale(adapted(config, 1), 2.0)


def test_what_has_no_sum_is_refused():
    a, b, c = loaded(False)
    with pytest.raises(ValueError, match=r"layers/attn/q: adapters of ranks \[3, 4\]; expected one rank"):
        jaxft_peft.combine([a, c], how="linear")
    with pytest.raises(ValueError, match="density: ties keeps a share"):
        jaxft_peft.combine([a, b], how="ties")
    with pytest.raises(ValueError, match=r"density: got 0.5; expected none, as svd keeps all"):
        jaxft_peft.combine([a, b], how="svd", density=0.5)
    with pytest.raises(ValueError, match=r"rank: got 3 with how=cat"):
        jaxft_peft.combine([a, b], rank=3)
    with pytest.raises(ValueError, match="how: got 'slerp'; expected one of cat, svd"):
        jaxft_peft.combine([a, b], how="slerp")
    with pytest.raises(ValueError, match="weights: got 1 for 2 adapters"):
        jaxft_peft.combine([a, b], [1.0])
    with pytest.raises(ValueError, match=r"weights: got nan, 1\.0; expected finite"):
        jaxft_peft.combine([a, b], [float("nan"), 1.0])
    q = b["layers"]["attn"]["q"]
    broken = tree.replace(b, "layers/attn/q", dataclasses.replace(q, b=q.b.at[1, 0, 0].set(jnp.inf)))
    with pytest.raises(ValueError, match="layers/attn/q/b: adapter 2 of 2 has numbers that are not finite"):
        jaxft_peft.combine([a, broken])
    with pytest.raises(ValueError, match=r"the sum with weights 1e\+39, 1.0 has numbers that are not finite"):
        jaxft_peft.combine([a, b], [1e39, 1.0])
    with pytest.raises(ValueError, match=r"layers/attn/q: got LoRAWeight on LoRAWeight, from a list .*how=svd"):
        jaxft_peft.combine([adapted([LoRA(targets=("q_proj",)), LoRA(targets=("q_proj",))], 1), a], how="svd")
    with pytest.raises(ValueError, match=r"layers/attn/q: got VeRAWeight on LoRAWeight, from a list"):
        jaxft_peft.scale(adapted([LoRA(targets=("q_proj",)), VeRA(rank=4, targets=("q_proj",))], 1), 2.0)
    with pytest.raises(ValueError, match="LoRAWeight and VeRAWeight; expected adapters of one method"):
        jaxft_peft.combine([a, adapted(VeRA(rank=4, targets=("q_proj",)), 1)])
    moved = jax.tree.map(lambda p: p + 1, pairs.ours("llama").params["layers"]["attn"]["k"])
    with pytest.raises(ValueError, match="layers/attn/k: the arrays differ; expected adapters on one base"):
        jaxft_peft.combine([a, tree.replace(b, "layers/attn/k", moved)])
