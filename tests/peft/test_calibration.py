"""Initialisations from data: what is measured, and EVA and CorDA against peft's own functions."""

import dataclasses
import functools
import importlib
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import jaxft
from jaxft import peft as jaxft_peft
from jaxft.core import tree
from jaxft.models.decoder import Execution
from jaxft.peft import EVA, CorDA, DoRA, LoRA, LoRAWeight, calibration, places
from jaxft.rollout import score
from tests.peft import pairs

ROWS, LENGTH = 8, 24
RNG = np.random.default_rng(1)
TOKENS = RNG.integers(3, 97, (ROWS, LENGTH)).astype(np.int32)
LEARNT = RNG.random((ROWS, LENGTH)) < 0.7
TARGETS = ("q_proj", "k_proj", "up_proj", "down_proj")


def forward(params: tree.Params, batch: Any) -> jax.Array:
    """Scores under scan with rematerialisation, as a run computes them."""
    scored = score.make_score(pairs.ours("llama").config, dtype=jnp.float32, execution=Execution(remat="full"))
    return scored("policy", params, batch)["logp"]


def calibrated(config: LoRA, *batches: dict[str, np.ndarray]) -> tree.Params:
    statistics = jaxft_peft.calibrate(pairs.model("llama"), batches, config, forward)
    return jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), config, statistics)


def layers(params: tree.Params) -> dict[str, LoRAWeight]:
    """Each adapted module's layer."""
    found = {}
    for row in pairs.ours("llama").names:
        w = None if row.kind == "norm" else places.get(params, row)
        if isinstance(w, LoRAWeight):
            found |= {module: w[i] for i, module in enumerate(row.modules(3))}
    return found


def of_peft(made: Any) -> dict[str, Any]:
    named = ((name.removeprefix("base_model.model."), layer) for name, layer in made.named_modules())
    return {name: layer for name, layer in named if isinstance(layer, peft.tuners.lora.LoraLayer)}


def eva_of_peft(rho: float, rslora: bool, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """peft's adapted layers, its incremental decompositions exact ones: by default they are randomised and rough."""
    from peft.tuners.lora import eva

    exact = functools.partial(eva.IncrementalPCA, lowrank=False)
    monkeypatch.setattr(eva, "IncrementalPCA", lambda n_components, copy, **_: exact(n_components, copy))
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=list(TARGETS), init_lora_weights="eva", use_rslora=rslora,
        eva_config=peft.EvaConfig(rho=rho), rank_pattern={"up_proj": 2}, alpha_pattern={"k_proj": 5},
    )  # fmt: skip
    made = pairs.quietly(peft.get_peft_model, pairs.torch_model("llama"), config)
    batch = {"input_ids": torch.tensor(TOKENS).long(), "labels": torch.tensor(np.where(LEARNT, TOKENS, -100)).long()}
    pairs.quietly(peft.initialize_lora_eva_weights, made, [batch], show_progress_bar=False)
    return of_peft(made)


@pytest.mark.parametrize("rho, rslora", [(2.0, False), (1.0, True)])
def test_eva_is_pefts(rho, rslora, monkeypatch):
    """The same ranks and scales, the same directions; layers that get no rank are left alone."""
    theirs = eva_of_peft(rho, rslora, monkeypatch)
    config = LoRA(
        rank=4, alpha=6, targets=TARGETS, init="eva", eva=EVA(rho=rho), rslora=rslora,
        rank_pattern={"up_proj": 2}, alpha_pattern={"k_proj": 5},
    )  # fmt: skip
    params = calibrated(config, {"tokens": TOKENS, "loss_mask": LEARNT})
    found = layers(params)
    assert {m for m, w in found.items() if w.rank > 0} == set(theirs)
    moved = {int(w.rank) for m, w in found.items() if "up_proj" not in m}
    assert len(moved) > 1 if rho > 1 else moved == {4}
    for module, layer in theirs.items():
        w = found[module]
        assert int(w.rank) == layer.r["default"] and float(w.scale) == pytest.approx(layer.scaling["default"])
        a, expected = np.asarray(w.a)[:, : w.rank], layer.lora_A["default"].weight.detach().numpy()
        cosines = np.linalg.svd(expected @ a, compute_uv=False)
        np.testing.assert_allclose(cosines, 1.0, atol=1e-5, err_msg=module)  # the same subspace
        np.testing.assert_allclose(a.T @ a, np.eye(int(w.rank)), atol=1e-5)
        assert not np.asarray(w.b).any() and not np.asarray(w.a)[:, w.rank :].any()
    np.testing.assert_array_equal(pairs.logits("llama", params), pairs.logits("llama", pairs.ours("llama").params))


def test_eva_adapter_with_moved_ranks_is_pefts_too(tmp_path):
    config = LoRA(rank=4, targets=TARGETS, init="eva", eva=EVA(rho=4.0))
    params = pairs.moved(calibrated(config, {"tokens": TOKENS}), jax.random.key(1))
    # padding and layers without a rank stay where they are in training
    params = tree.map_weights(lambda path, w: _real(w) if isinstance(w, LoRAWeight) else w, params)
    read = pairs.peft_load("llama", pairs.save("llama", params, tmp_path / "adapter"))
    np.testing.assert_allclose(pairs.torch_logits(read), pairs.logits("llama", params), atol=1e-5)


def _real(w: LoRAWeight) -> LoRAWeight:
    real = jnp.arange(w.a.shape[-1]) < w.rank[:, None]
    return dataclasses.replace(w, a=w.a * real[:, None], b=w.b * real[..., None])


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_pefts(method, monkeypatch):
    """The same factors up to sign, from samples in any batches; and with them the model is the base."""
    monkeypatch.setitem(
        sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass)
    )  # peft wants one name
    corda = importlib.import_module("peft.tuners.lora.corda")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=method),
    )  # fmt: skip
    model = pairs.torch_model("llama")

    def run() -> None:
        with torch.no_grad():
            for row in TOKENS:
                model(torch.tensor(row).long()[None])

    corda.preprocess_corda(model, config, run_model=run)
    theirs = of_peft(pairs.quietly(peft.get_peft_model, model, config))
    ours = LoRA(rank=4, alpha=6, targets=("q_proj", "down_proj"), init="corda", corda=CorDA(method))
    params = calibrated(ours, {"tokens": TOKENS[:4]}, {"tokens": TOKENS[4:]})
    found = layers(params)
    for module, layer in theirs.items():
        a, b = (getattr(layer, n)["default"].weight.detach().numpy().T for n in ("lora_A", "lora_B"))
        w = found[module]
        sign = np.sign(np.sum(np.asarray(w.a) * a, 0))
        np.testing.assert_allclose(w.a * sign, a, rtol=1e-4, atol=1e-4, err_msg=module)
        np.testing.assert_allclose(w.b * sign[:, None], b, rtol=1e-4, atol=1e-4, err_msg=module)
    np.testing.assert_allclose(
        pairs.logits("llama", params), pairs.logits("llama", pairs.ours("llama").params), atol=1e-5
    )


def test_packing_and_padding_change_nothing():
    """Three documents alone in padded rows, and packed into one: the same moments, and none of padding."""
    lengths = [9, 6, 4]
    alone = {"tokens": np.zeros((3, 12), np.int32), "positions": np.zeros((3, 12), np.int32)}
    packed = {name: np.zeros((1, 24), np.int32) for name in ("tokens", "positions", "segments")}
    at = 0
    for i, n in enumerate(lengths):
        for batch, row, start in ((alone, i, 0), (packed, 0, at)):
            batch["tokens"][row, start : start + n] = TOKENS[i, :n]
            batch["positions"][row, start : start + n] = np.arange(n)
        packed["segments"][0, at : at + n] = i + 1
        at += n
    config = LoRA(rank=2, targets=("q_proj", "down_proj"), init="eva")
    need = jaxft_peft.METHODS["lora"].calibrate(config)
    loaded = pairs.ours("llama")
    one, two = (
        calibration.measure(loaded.params, loaded.names, config, need, [batch], forward) for batch in (alone, packed)
    )
    for path, m in one.items():
        assert m.count.tolist() == [sum(lengths)] * 3 == two[path].count.tolist()
        np.testing.assert_allclose(m.gram, two[path].gram, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(m.total, two[path].total, rtol=1e-4, atol=1e-4)


def test_which_positions_count():
    batch = {"tokens": jnp.zeros((2, 4), jnp.int32)}
    assert calibration.counted(batch, False).all()
    positions = jnp.array([[0, 1, 2, 0], [0, 0, 0, 0]])
    expected = [[True, True, True, False], [False] * 4]
    assert calibration.counted({**batch, "positions": positions}, False).tolist() == expected
    segments = jnp.array([[1, 1, 2, 0], [0, 0, 0, 0]])
    assert calibration.counted({**batch, "positions": positions, "segments": segments}, True).tolist() == expected
    learnt = jnp.array([[0, 1, 0, 0], [0, 0, 1, 1]], bool)
    assert calibration.counted({**batch, "loss_mask": learnt}, True).tolist() == learnt.tolist()


def test_public_names(tmp_path):
    """From a loaded model and plain batches to an adapted one, in three lines; DoRA's lengths begin from data too."""
    pairs.torch_model("llama").save_pretrained(tmp_path)
    model = jaxft.load(tmp_path, dtype="float32")
    config = DoRA(rank=2, targets=("q_proj",), init="eva")
    statistics = jaxft.peft.calibrate(model, [{"tokens": TOKENS}], config)
    params = jaxft.peft.adapt(model, jax.random.key(0), config, statistics=statistics)
    np.testing.assert_allclose(pairs.logits("llama", params), pairs.logits("llama", model.params), atol=1e-5)
    assert jnp.any(params["layers"]["attn"]["q"].a != 0)


@pytest.mark.parametrize(
    "config, batches, message",
    [
        (LoRA(), [{"tokens": TOKENS}], r"calibrate: got LoRA.*expected a method that begins from data"),
        (LoRA(targets=("lm_head",), init="eva"), [{"tokens": TOKENS}], r"peft.targets: lm_head reads its inputs"),
        (LoRA(targets=("q_proj",), init="eva"), [], "got no position that counts"),
    ],
)
def test_refusals(config, batches, message):
    with pytest.raises(ValueError, match=message):
        jaxft_peft.calibrate(pairs.model("llama"), batches, config, forward)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"peft.eva.rho: got 0.5; expected at least 1"):
        EVA(rho=0.5)
