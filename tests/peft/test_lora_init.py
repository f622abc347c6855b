"""How LoRA's factors begin: what is taken out of the base, against peft; quantisation; what a saved one is."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest

from jaxft import peft as jaxft_peft
from jaxft.core import tree, verbs
from jaxft.core.names import Name
from jaxft.peft import DoRA, LoftQ, LoRA, LoRAFA, LoRAWeight, lora_init, places, sites
from jaxft.peft.disk import AdapterError
from tests.peft import pairs

L, D, F = 3, 64, 48
NAMES = (Name("layers/w", "model.layers.{}.w", "linear"), Name("head", "lm_head", "linear"))


@functools.cache
def stack() -> jax.Array:
    """Matrices whose singular values fall off, as those of trained models do: [L, D, F]."""
    u, _, vt = np.linalg.svd(np.random.default_rng(0).normal(size=(L, D, F)), full_matrices=False)
    return jnp.asarray(u * (0.9 ** np.arange(F)) @ vt, jnp.float32)


def adapted(config: LoRA, seed: int = 0) -> LoRAWeight:
    params = {"layers": {"w": stack()}, "head": jnp.zeros((D, D))}
    return sites.adapt(params, NAMES, jax.random.key(seed), config)["layers"]["w"]


def product(w: LoRAWeight) -> np.ndarray:
    """scale * A B, [L, in, out]."""
    return np.asarray(w.scale[:, None, None] * (w.a @ w.b))


def factors(params: tree.Params, name: str) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """A [in, r], B [r, out] and the scale of each adapted module."""
    found = {}
    for row in places.rows(pairs.ours(name).names):
        w = None if row.kind == "norm" else places.get(params, row)
        if isinstance(w, LoRAWeight):
            for i, module in enumerate(row.modules(pairs.ours(name).config.num_layers)):
                found[module] = (np.asarray(w.a[i]), np.asarray(w.b[i]), float(w.scale[i]))
    return found


def of_peft(made: peft.PeftModel) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    return {
        module.removeprefix("base_model.model."): (
            layer.lora_A["default"].weight.detach().numpy().T,
            layer.lora_B["default"].weight.detach().numpy().T,
            layer.scaling["default"],
        )
        for module, layer in made.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


TAKEN = {
    "pissa": ("llama", LoRA(rank=4, alpha=6, targets=("q_proj", "down_proj"), init="pissa")),
    "olora": ("llama", LoRA(rank=4, alpha=6, targets=("q_proj", "down_proj"), init="olora")),
    "pissa conv1d": ("gpt2", LoRA(rank=4, targets=("c_attn",), init="pissa")),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_taken_out_is_what_peft_takes(case):
    """The same factors up to sign; and with them the model is the base."""
    name, config = TAKEN[case]
    theirs = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha or 2 * config.rank, target_modules=list(config.targets),
        init_lora_weights=config.init, fan_in_fan_out=name == "gpt2",
    )  # fmt: skip
    made = of_peft(pairs.quietly(peft.get_peft_model, pairs.torch_model(name), theirs))
    params = jaxft_peft.adapt(pairs.model(name), jax.random.key(0), config)
    ours = factors(params, name)
    assert set(ours) == set(made)
    for module, (a, b, scale) in made.items():
        sign = np.sign(np.sum(ours[module][0] * a, 0))
        np.testing.assert_allclose(ours[module][0] * sign, a, rtol=1e-4, atol=1e-5, err_msg=module)
        np.testing.assert_allclose(ours[module][1] * sign[:, None], b, rtol=1e-4, atol=1e-5, err_msg=module)
        assert ours[module][2] == pytest.approx(scale)
    np.testing.assert_allclose(pairs.logits(name, params), pairs.logits(name, pairs.ours(name).params), atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_residual_and_factors_are_the_weight(init):
    """The base is untouched; half of what the module computes is frozen, half trains."""
    w = adapted(LoRA(rank=8, targets=("w",), init=init, rank_pattern={"1.w": 3}))
    assert w.base is stack() and tree.strip({"w": w})["w"] is stack()
    np.testing.assert_array_equal(w.a, w.a0)
    assert w.a is not w.a0 and w.b is not w.b0, "the trained factors are donated"
    residual = verbs.dense(jaxft_peft.LoRAWeight(w.base, -w.a0, w.b0, w.scale, w.rank))
    np.testing.assert_allclose(residual + product(w), stack(), atol=1e-6)
    ranks = [np.linalg.matrix_rank(p, tol=1e-4) for p in product(w)]
    assert ranks == [8, 3, 8]


def test_pissa_takes_the_largest_part():
    """What is left has the singular values that follow the first r; the randomised one comes near."""
    values = np.linalg.svd(stack(), compute_uv=False)
    w = adapted(LoRA(rank=8, targets=("w",), init="pissa"))
    left = np.linalg.svd(stack() - product(w), compute_uv=False)
    np.testing.assert_allclose(left[:, : F - 8], values[:, 8:], atol=1e-5)
    fast = adapted(LoRA(rank=8, targets=("w",), init="pissa", pissa_iterations=16))
    near = np.linalg.norm(stack() - product(fast), axis=(1, 2))
    assert (near < 1.02 * np.linalg.norm(stack() - product(w), axis=(1, 2))).all()
    rough = adapted(LoRA(rank=8, targets=("w",), init="pissa", pissa_iterations=0))
    assert (near < np.linalg.norm(stack() - product(rough), axis=(1, 2))).all()


def test_orthogonal():
    w = adapted(LoRA(rank=8, targets=("w",), init="orthogonal"))
    np.testing.assert_allclose(product(w), 0, atol=1e-6)
    # deviations of a few thousand draws, hence a tolerance for chance
    np.testing.assert_allclose(w.a.std(), 0.1 * np.sqrt(0.5), rtol=0.1)  # rows of Q of half its rank, entries 1/10
    np.testing.assert_allclose(w.b.std(), 0.1 * np.sqrt(0.5), rtol=0.1)
    with pytest.raises(ValueError, match=r"peft.rank: got an odd one for model.layers.2.w"):
        adapted(LoRA(rank=8, targets=("w",), init="orthogonal", rank_pattern={"2.w": 3}))


def test_random_is_no_identity():
    w = adapted(LoRA(rank=8, targets=("w",), init="random"))
    bound = 1 / np.sqrt(8)
    assert np.abs(product(w)).max() > 0.1 and np.abs(w.b).max() <= bound
    np.testing.assert_allclose(w.b.std(), bound / np.sqrt(3), rtol=0.05)  # the deviation of random draws


class TestQuantised:
    def errors(self, bits: int) -> np.ndarray:
        """Frobenius norms of what plain quantisation loses, by layer."""
        plain = [lora_init.normal_float(w, bits) for w in stack()]
        return np.array([np.linalg.norm(w - q) for w, q in zip(stack(), plain, strict=True)])

    def test_levels(self):
        """NF4's published values; with any bits they go from -1 to 1 and hold 0."""
        nf4 = [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ]  # fmt: skip
        np.testing.assert_allclose(lora_init.levels(4), nf4, atol=1e-6)
        for bits in (2, 4, 8):
            values = lora_init.levels(bits)
            assert len(set(values)) == 2**bits and values[0] == -1 and values[-1] == 1 and 0 in values

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_rounds_to_the_nearest_level_of_a_block(self, bits):
        w = np.asarray(stack()[0])
        blocks = w.T.reshape(-1, 64)
        scale = np.abs(blocks).max(1, keepdims=True)
        values = lora_init.levels(bits)
        nearest = values[np.abs(blocks[..., None] / scale[..., None] - values).argmin(-1)] * scale
        np.testing.assert_allclose(lora_init.normal_float(w, bits), nearest.reshape(w.T.shape).T, atol=1e-6)

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_loftq_loses_less_than_quantisation(self, bits):
        def lost(iterations: int) -> np.ndarray:
            config = LoRA(rank=8, targets=("w",), init="loftq", loftq=LoftQ(bits, iterations))
            w = adapted(config)
            for layer in w.base:  # at most 2^bits values in a block
                assert len(np.unique(np.asarray(layer).T.reshape(-1, 64)[0])) <= 2**bits
            return np.linalg.norm(stack() - verbs.dense(w), axis=(1, 2))

        plain, one, five = self.errors(bits), lost(1), lost(5)
        assert (one < 0.9 * plain).all() and (five < one).all()

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_pissa_loses_less_than_quantisation(self, bits):
        """Its residual is smaller than the weight, so quantising it loses less (QPiSSA)."""
        w = adapted(LoRA(rank=8, targets=("w",), init="pissa"))
        left = stack() - product(w)
        lost = [np.linalg.norm(r - lora_init.normal_float(r, bits)) for r in left]
        assert (np.array(lost) < 0.9 * self.errors(bits)).all()

    def test_another_quantiser_may_stand_in(self):
        """Any function from a matrix to a weight: what it gives takes the place of the base."""
        from jaxft.core.weight import Transposed

        w = stack()[0]
        q, a, b = lora_init.loftq(w, 8, 2.0, lambda m: Transposed(jnp.round(m.T, 1)), 2)
        assert isinstance(q, Transposed)
        assert np.linalg.norm(w - q.dense() - 2 * a @ b) < np.linalg.norm(w - jnp.round(w, 1))

    def test_saved_and_loaded(self, tmp_path):
        """The file says how the base was quantised, and it is again when it is loaded."""
        config = LoRA(rank=4, targets=("q_proj",), init="loftq", loftq=LoftQ(2, 2), layers=(0, 2))
        params = pairs.adapted("llama", config, jax.random.key(1))
        directory = pairs.save("llama", params, tmp_path / "adapter")
        written = json.loads((directory / "adapter_config.json").read_text())
        assert (written["init_lora_weights"], written["loftq_config"]["loftq_bits"]) == ("loftq", 2)
        again = pairs.load("llama", directory)
        np.testing.assert_array_equal(pairs.logits("llama", again), pairs.logits("llama", params))
        assert not np.array_equal(
            tree.strip(again)["layers"]["attn"]["q"], pairs.ours("llama").params["layers"]["attn"]["q"]
        )
        del written["loftq_config"]["normal_float"]
        (directory / "adapter_config.json").write_text(json.dumps(written))
        with pytest.raises(AdapterError, match=r"init_lora_weights: got 'loftq'"):
            pairs.load("llama", directory)


@pytest.mark.parametrize(
    "config",
    [
        LoRA(
            rank=4, alpha=3, targets=("q_proj", "up_proj"), init="pissa", rslora=True, rank_pattern={"1.mlp.up_proj": 2}
        ),
        LoRA(rank=4, targets=("q_proj",), init="olora", layers=(0, 2)),
        DoRA(rank=4, targets=("q_proj", "up_proj"), init="pissa"),
        LoRAFA(rank=4, targets=("q_proj",), init="pissa"),
    ],
    ids=["pissa", "olora", "dora pissa", "lora_fa pissa"],
)
def test_saved_it_is_an_adapter_of_the_original_base(config, tmp_path):
    """Of twice the rank, in peft and here."""
    params = pairs.adapted("llama", config, jax.random.key(2))
    expected = pairs.logits("llama", params)
    assert np.abs(expected - pairs.logits("llama", pairs.ours("llama").params)).max() > 1e-2
    directory = pairs.save("llama", params, tmp_path / "adapter")
    assert json.loads((directory / "adapter_config.json").read_text())["r"] == 8
    np.testing.assert_allclose(pairs.torch_logits(pairs.peft_load("llama", directory)), expected, atol=1e-5)
    again = pairs.load("llama", directory)
    np.testing.assert_allclose(pairs.logits("llama", again), expected, atol=1e-5)
    np.testing.assert_allclose(pairs.logits("llama", tree.merge(params)), expected, atol=1e-5)


def test_an_adapter_that_peft_converted(tmp_path):
    """peft's PiSSA, trained and saved for the original base, is loaded like any LoRA; unconverted it is refused."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    made = pairs.quietly(peft.get_peft_model, pairs.torch_model("llama"), config)
    made.peft_config["default"].init_lora_weights = True
    pairs.peft_save(made, tmp_path / "start")
    made.peft_config["default"].init_lora_weights = "pissa"
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    pairs.quietly(
        made.save_pretrained, str(tmp_path / "end"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    params = pairs.load("llama", tmp_path / "end")
    np.testing.assert_allclose(pairs.logits("llama", params), pairs.torch_logits(made.eval()), atol=1e-5)
    with pytest.raises(AdapterError, match=r"init_lora_weights: got 'pissa'.*path_initial_model_for_weight_conversion"):
        pairs.load("llama", pairs.peft_save(made, tmp_path / "raw"))


@pytest.mark.parametrize(
    "config, message",
    [
        (LoRA(rank=50, targets=("w",), init="pissa"), "peft.rank: got 50 for model.layers.0.w, which is 64 x 48"),
        (LoRA(targets=("w",), init="eva"), "peft.init: eva begins from what the data show.*jaxft.peft.calibrate"),
        (LoRA(targets=("w",), init="corda"), "peft.init: corda"),
    ],
)
def test_refusals(config, message):
    with pytest.raises(ValueError, match=message):
        adapted(config)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"peft.init: got 'pisa'; expected one of kaiming"):
        LoRA(init="pisa")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"peft.loftq.iterations: got 0"):
        LoftQ(iterations=0)
    with pytest.raises(ValueError, match=r"peft.lora_plus: got 0"):
        LoRA(lora_plus=0)
    with pytest.raises(
        ValueError, match=r"loftq puts a quantised .* of model.layers.{}.w, which is a .* here.*put it first"
    ):
        params = sites.adapt(
            {"layers": {"w": stack()}, "head": stack()[0]}, NAMES, jax.random.key(0), LoRA(targets=("w",))
        )
        sites.adapt(params, NAMES, jax.random.key(0), LoRA(targets=("w",), init="loftq"))
