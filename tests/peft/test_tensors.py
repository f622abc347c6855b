"""VeRA, LoHa, LoKr, RandLora, FourierFT, SHiRA and MiSS: gradients, parameter counts, what torch drew, refusals."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization

from jaxft import peft as jaxft_peft
from jaxft.core import tree
from jaxft.core.names import Name
from jaxft.peft import (
    FourierFT,
    LoHa,
    LoKr,
    MiSS,
    RandLora,
    SHiRA,
    VeRA,
    disk,
    fourierft,
    lokr,
    places,
    sites,
    torch_draws,
)
from jaxft.peft.disk import AdapterError
from tests.peft import gradients, pairs

L, D, F = 2, 24, 60
NAMES = (Name("layers/w", "model.layers.{}.w", "linear"), Name("head", "lm_head", "linear"))


def adapted(config, rows=D, columns=F, seed=0):
    """The config on a stack [L, rows, columns] of random matrices."""
    w = jax.random.normal(jax.random.key(9), (L, rows, columns)) / 8
    params = {"layers": {"w": w}, "head": jnp.zeros((4, 4))}
    return sites.adapt(params, NAMES, jax.random.key(seed), config)["layers"]["w"]


def prime(size):
    """What peft makes of decompose_factor -1."""
    return factorization(size, -1)


(M, N), (P, K) = prime(D), prime(F)
COUNTS = {
    "vera: r + out": (VeRA(rank=7), 7 + F),
    "loha: 2 r (in + out)": (LoHa(rank=3), 2 * 3 * (D + F)),
    "lokr: m l + n k": (LoKr(rank=50), M * P + N * K),
    "lokr: m l + r (n + k)": (LoKr(rank=2), M * P + 2 * (N + K)),
    "lokr: r (m + l) + r (n + k)": (LoKr(rank=2, decompose_both=True), 2 * (M + P) + 2 * (N + K)),
    "randlora: n (r + smallest)": (RandLora(rank=7), 4 * (7 + D)),
    "fourierft: n": (FourierFT(frequencies=100), 100),
    "shira: r (in + out)": (SHiRA(rank=3), 3 * (D + F)),
    "miss: r out": (MiSS(rank=7), 7 * F),
    "miss mini: r mini": (MiSS(rank=7, variant="mini", mini_rank=5), 7 * 5),
    "miss bat: r out": (MiSS(rank=6, variant="bat"), 6 * F),
}


@pytest.mark.parametrize("case", COUNTS)
def test_parameters_of_a_module(case):
    config, expected = COUNTS[case]
    w = adapted(dataclasses.replace(config, targets=("w",)))
    assert tree.count(tree.partition(w, tree.trainable_mask(w))[0]) == L * expected


TWO = ("q_proj", "down_proj")
GRADIENTS = {
    "vera": VeRA(rank=6, targets=TWO),
    "loha": LoHa(rank=3, targets=TWO, rank_pattern={"q_proj": 2}),
    "lokr": LoKr(rank=2, targets=TWO, decompose_both=True),
    "randlora": RandLora(rank=5, alpha=10, targets=("down_proj", "up_proj")),
    "fourierft": FourierFT(frequencies=40, targets=TWO, frequencies_pattern={"1.self_attn.q_proj": 30}),
    "shira": SHiRA(rank=2, targets=TWO),
    "miss": MiSS(rank=7, targets=TWO),
    "miss mini": MiSS(rank=8, variant="mini", mini_rank=4, targets=TWO),
    "miss bat": MiSS(rank=8, variant="bat", targets=TWO),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_of_one_step_equal_torch(case, tmp_path, key):
    params = pairs.adapted("llama", GRADIENTS[case], key)
    gradients.equal_torch("llama", params, tmp_path, ("vera_A", "vera_B", "randlora_A", "randlora_B", "shira_indices"))


class TestShared:
    """Random matrices that all modules have in common."""

    @pytest.mark.parametrize("config, fields", [(VeRA(rank=6), ("down", "up")), (RandLora(rank=5), ("a", "b"))])
    def test_one_buffer(self, config, fields, tmp_path):
        """After adapting, and after loading."""
        params = jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), config)
        for some in (params, pairs.load("llama", pairs.save("llama", params, tmp_path / "adapter"))):
            leaves = [places.get(some, name) for name in pairs.ours("llama").names if "_proj" in name.module]
            for field in fields:
                assert len({id(getattr(w, field).value) for w in leaves}) == 1 and len(leaves) == 7

    def test_vera_is_drawn_as_in_peft(self):
        """Uniform within sqrt(6 / fan in), as large as the largest module needs."""
        w = jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), VeRA(rank=64))["layers"]["mlp"]["down"]
        assert w.down.shape == (64, 48) and w.up.shape == (48, 64)
        for array, bound in ((w.down.value, np.sqrt(6 / 48)), (w.up.value, np.sqrt(6 / 64))):
            assert 0.99 * bound < np.abs(array).max() <= bound
            np.testing.assert_allclose(array.std(), bound / np.sqrt(3), rtol=0.03)  # the deviation of random draws

    @pytest.mark.parametrize("basis, zeros", [("dense", 0.0), ("sparse", 2 / 3), ("very_sparse", 1 - 24**-0.5)])
    def test_randlora_is_drawn_as_in_peft(self, basis, zeros):
        b = adapted(RandLora(rank=8, basis=basis, targets=("w",)), columns=400).b.value
        assert b.shape == (400, 3, 8)
        np.testing.assert_allclose(b.std(), 1.0, rtol=1e-4)
        np.testing.assert_allclose((b == 0).mean(), zeros, atol=0.03)  # the share among random draws
        assert len(np.unique(b)) == 3 or basis == "dense"

    def test_vera_without_its_matrices_is_read_from_the_seed(self, tmp_path):
        config = peft.VeraConfig
        made = pairs.quietly(
            config, r=6, target_modules=list(TWO), save_projection=False, projection_prng_key=2**33 + 5
        )
        theirs = pairs.peft_model("llama", made)
        directory = pairs.peft_save(theirs, tmp_path / "theirs")
        assert not any("vera_A" in name for name in disk.read(directory)[1])
        expected = pairs.torch_logits(theirs)
        chex.assert_trees_all_close(
            pairs.logits("llama", pairs.load("llama", directory)), expected, rtol=1e-5, atol=1e-5
        )

    def test_randlora_without_its_matrices_is_refused(self, tmp_path):
        params = jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), RandLora(rank=5, targets=TWO))
        directory = pairs.save("llama", params, tmp_path / "adapter")
        config, tensors = disk.read(directory)
        config["save_projection"] = False
        kept = {name: array for name, array in tensors.items() if not name.startswith("/")}
        disk.write(tmp_path / "bare", config, kept, "")
        with pytest.raises(AdapterError, match=r"no random matrices; expected .*randlora_A.*save_projection=True"):
            pairs.load("llama", tmp_path / "bare")

    def test_two_adapters_are_not_saved_as_one_of_peft(self, tmp_path):
        some = [VeRA(rank=6, targets=("q_proj",)), VeRA(rank=6, targets=("v_proj",))]
        params = jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), some)
        directory = pairs.save("llama", params, tmp_path / "adapter")
        assert disk.read(directory)[0]["peft_type"] == "JAXFT"
        chex.assert_trees_all_equal(pairs.load("llama", directory), params)


class TestTorchDraws:
    """Bit for bit, as adapters are read by it."""

    @pytest.mark.parametrize("seed", [0, 777, 2**40 + 3, -5])
    def test_uniform(self, seed):
        theirs = torch.Generator().manual_seed(seed)
        ours = torch_draws.generator(seed)
        for shape, bound in (((37, 13), 0.7), ((300, 20), 0.1234)):
            expected = torch.empty(shape).uniform_(-bound, bound, generator=theirs).numpy()
            np.testing.assert_array_equal(torch_draws.uniform(ours, shape, bound), expected)

    @pytest.mark.parametrize("size, count", [(1, 1), (2, 2), (10, 10), (10, 9), (10, 3), (1536, 1000), (100_000, 40)])
    def test_permutation(self, size, count):
        expected = torch.randperm(size, generator=torch.Generator().manual_seed(777))[:count]
        np.testing.assert_array_equal(torch_draws.permutation(777, size, count), expected)

    @pytest.mark.parametrize("size, count", [(1, 1), (50, 50), (50, 9), (8, 7), (4000, 3)])
    def test_permutation_of_what_is_large(self, size, count, monkeypatch):
        """torch's shuffle from 214,748,364 on, here at a size that one can follow: the numbers put in one by one, each
        at a random place up to its own, whose former number moves to its own. (torch at 214,748,364 and seed 777 begins
        150358698, 199533091, 83306822, 145970095; so does this, in 40 s.)"""
        monkeypatch.setattr(torch_draws, "_LARGE", 0)
        monkeypatch.setattr(torch_draws, "_CHUNK", 7)
        words = torch_draws.generator(3).randint(0, 2**32, 2 * size, np.uint32).astype(object)
        order: list[int] = []
        for i in range(size):
            place = (int(words[2 * i]) * 2**32 + int(words[2 * i + 1])) % (i + 1)
            order.append(i)
            order[i], order[place] = order[place], i
        np.testing.assert_array_equal(torch_draws.permutation.__wrapped__(3, size, count), order[:count])


def test_lokr_factors_sizes_as_peft():
    for factor in (-1, 1, 2, 3, 4, 5, 8, 16, 1000):
        for size in (*range(1, 200), 4096, 11008, 14336, 32003):
            assert lokr.split(size, factor) == factorization(size, factor), (size, factor)


def test_lyco_factors_are_drawn_as_in_peft():
    """Uniform within 1/sqrt(fan in), and the product zero at first."""
    w = adapted(LoHa(rank=9, targets=("w",)), 400, 300)
    for array, bound in ((w.a1, 1 / 20), (w.b1, 1 / 3), (w.b2, 1 / 3)):
        assert 0.99 * bound < np.abs(array).max() <= bound
    assert not w.a2.any() and not np.allclose(w.b1[0], w.b1[1]) and not np.allclose(w.b1, w.b2)
    w = adapted(LoKr(rank=4, decompose_both=True, targets=("w",)), 400, 300)
    assert (
        w.a1.shape == (L, 20, 4) and w.b1.shape == (L, 4, 15) and w.a2.shape == (L, 20, 4) and w.b2.shape == (L, 4, 20)
    )
    for array, bound in ((w.a1, 20**-0.5), (w.a2, 20**-0.5), (w.b2, 1 / 2)):
        assert 0.9 * bound < np.abs(array).max() <= bound
    assert not w.b1.any()
    other = adapted(LoKr(rank=100, init="second_zero", targets=("w",)), 400, 300)
    assert other.w1.any() and not other.w2.any()


def test_fourierft_is_the_inverse_transform():
    """Of the spectrum put in its places, at a size where a product of two indices is past int32."""
    w = adapted(FourierFT(frequencies=50, init="normal", targets=("w",)))[1]
    spectrum = np.zeros((F, D))
    spectrum[tuple(w.places.value)] = w.spectrum
    update = np.fft.ifft2(spectrum).real.T * 150
    np.testing.assert_allclose(jnp.eye(D) @ w - w.base, update, atol=1e-5)
    size, at = 262_144, np.array([1, 131_071, 262_143])
    turns = np.arange(size)[:, None] * at % size * (2 * np.pi / size)
    waves = fourierft._waves(size, jnp.asarray(at, jnp.int32))
    np.testing.assert_allclose(waves, np.concatenate([np.cos(turns), np.sin(turns)], -1), atol=1e-6)


def test_shira_chooses_distinct_entries_of_the_whole_matrix():
    w = adapted(SHiRA(rank=3, targets=("w",)))
    flat = np.asarray(w.at_out) * D + np.asarray(w.at_in)
    assert flat.shape == (L, 3 * (D + F)) and (np.diff(flat) > 0).all()
    assert flat.min() >= 0 and flat.max() < D * F and not np.array_equal(flat[0], flat[1])
    seen = np.zeros(D * F)
    for seed in range(60):
        other = adapted(SHiRA(rank=3, targets=("w",)), seed=seed)
        np.add.at(seen, np.asarray(other.at_out) * D + np.asarray(other.at_in), 1)
    rate = 120 * 3 * (D + F) / (D * F)
    assert seen.min() > 0 and abs(seen.mean() - rate) < 1e-9
    assert abs(seen.std() - np.sqrt(rate * (1 - rate / 120))) < 0.1 * np.sqrt(rate)


def test_shira_refuses_places_it_cannot_have(tmp_path):
    params = jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), SHiRA(rank=1, targets=("q_proj",)))
    config, tensors = disk.read(pairs.save("llama", params, tmp_path / "adapter"))
    tensors["model.layers.1.self_attn.q_proj.shira_indices"][1, 3] = 32
    disk.write(tmp_path / "bad", json.loads(json.dumps(config)), tensors, "")
    with pytest.raises(AdapterError, match=r"shira_indices.*outside the matrix"):
        pairs.load("llama", tmp_path / "bad")


def test_biases_that_peft_cannot_hold_are_saved_in_our_format(tmp_path):
    params = jaxft_peft.adapt(pairs.model("qwen2"), jax.random.key(0), LoHa(rank=2, targets=TWO, bias="lora_only"))
    directory = pairs.save("qwen2", params, tmp_path / "adapter")
    assert disk.read(directory)[0]["peft_type"] == "JAXFT"
    chex.assert_trees_all_equal(pairs.load("qwen2", directory), params)


@pytest.mark.parametrize("make, message", [
    (lambda: VeRA(rank=0), "peft.rank: got 0"),
    (lambda: VeRA(dropout=1.0), "peft.dropout: got 1.0"),
    (lambda: LoHa(rank=0), "peft.rank: got 0"),
    (lambda: LoKr(decompose_factor=0), "peft.decompose_factor: got 0"),
    (lambda: LoKr(init="both"), "peft.init: got 'both'"),
    (lambda: RandLora(basis="thin"), "peft.basis: got 'thin'"),
    (lambda: FourierFT(frequencies=0), "peft.frequencies: got 0"),
    (lambda: MiSS(variant="cat"), "peft.variant: got 'cat'"),
    (lambda: MiSS(variant="bat", dropout=0.1), "peft.dropout: got 0.1"),
    (lambda: adapted(FourierFT(targets=("w",)), 10, 14), r"peft.frequencies: got 1000 for model.layers.{}.w.* at most"),
    (lambda: adapted(SHiRA(rank=6, targets=("w",)), 10, 14), r"peft.rank: got 6 for model.layers.*expected at most 5"),
    (lambda: adapted(MiSS(targets=("w",))), r"peft.rank: got 64 for model.layers.*at most 24"),
    (lambda: adapted(MiSS(rank=8, variant="bat", targets=("w",))), r"got 8 for .*a divisor of both 24 and 60"),
    (lambda: adapted(MiSS(rank=8, variant="mini", mini_rank=7, targets=("w",))), "mini_rank: got 7 .*divisor of 60"),
    (lambda: adapted(LoKr(rank=2, targets=("w",), rank_pattern={"1.w": 30})), r"rank_pattern: got ranks \[2, 30\]"),
])  # fmt: skip
def test_wrong_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
