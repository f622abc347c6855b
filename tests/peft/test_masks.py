"""Biases, norms and the last layers: what trains, what does not move, and how it is exported."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import transformers

import jaxft
from jaxft import peft as jaxft_peft
from jaxft.checkpoint.errors import CheckpointError
from jaxft.core import tree
from jaxft.core.weight import InPlace
from jaxft.models import decoder, heads
from jaxft.peft import BitFit, LastLayers, LoRA, Norms, disk
from jaxft.sharding import mesh, rules
from tests.peft import pairs

KEY = jax.random.key(0)


def sizes(name: str, *methods) -> int:
    """How many numbers train."""
    params, mask, _ = jaxft_peft.adapt_for_training(pairs.model(name), KEY, methods)
    return sum(a.size for a in jax.tree.leaves(tree.partition(params, mask)[0]))


def test_parameter_counts():
    """D=32, F=48, V=97, 3 layers, 4 heads over 2 of width 8."""
    qkvo, mlp = 32 + 16 + 16 + 32, 48 + 48 + 32
    assert sizes("llama", BitFit()) == 3 * (qkvo + mlp), "one for every linear layer, as there is none"
    assert sizes("qwen2", BitFit()) == 3 * (32 + 16 + 16), "those that there are"
    assert sizes("qwen2", BitFit(targets=("o_proj",))) == 3 * 32, "zeros where there is none"
    assert sizes("gpt2", BitFit()) == 3 * (96 + 32 + 128 + 32 + 32 + 32) + 32, "norms have biases too"
    assert sizes("llama", BitFit(layers=(1,))) == 3 * (qkvo + mlp), "padding counts, and never moves"
    assert sizes("qwen2", BitFit(layers=(1,))) == 32 + 16 + 16
    assert sizes("llama", Norms()) == 7 * 32 and sizes("gpt2", Norms()) == 7 * 64
    assert sizes("llama", Norms(layers=(0,))) == 2 * 32
    layer = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48 + 2 * 32
    assert sizes("llama", LastLayers(n=2)) == 2 * layer + 32
    assert sizes("llama", LastLayers(n=1, final_norm=False, head=True)) == layer + 32 * 97


def test_only_the_last_layers_move():
    """One AdamW step with decay: the others' arrays are the very same, and none of them has an optimiser state."""
    loaded = pairs.ours("llama")
    params, mask, _ = jaxft_peft.adapt_for_training(pairs.model("llama"), KEY, [LastLayers(n=1)])
    trainable, frozen = tree.partition(params, mask)

    def loss(trainable):
        x, _, _ = decoder.forward(loaded.config, tree.combine(trainable, frozen), jnp.asarray(pairs.TOKENS))
        return jnp.mean(heads.logits(loaded.config, frozen["head"], x)[..., 3])

    adam = optax.adamw(1e-2, weight_decay=0.1)
    state = adam.init(trainable)
    updates, state = adam.update(jax.jit(jax.grad(loss))(trainable), state, trainable)
    after = tree.merge(tree.combine(optax.apply_updates(trainable, updates), frozen))
    for path, a in tree.paths(loaded.params["layers"]):
        new = tree.get(after["layers"], path)
        np.testing.assert_array_equal(new[:2], a[:2], err_msg=path)
        assert (new[2] != a[2]).any(), path
    sizes = {a.size for a in jax.tree.leaves(state) if a.ndim}
    assert max(sizes) == 32 * 48, "no state of a whole stack"


def test_nothing_is_computed_backwards_below_the_last_layers():
    """Backwards a layer costs about two times forwards: the last of three less than the model forwards."""
    loaded = pairs.ours("llama")
    params, mask, _ = jaxft_peft.adapt_for_training(pairs.model("llama"), KEY, [LastLayers(n=1)])
    trainable, frozen = tree.partition(params, mask)

    def loss(trainable):
        x, _, _ = decoder.forward(loaded.config, tree.combine(trainable, frozen), jnp.asarray(pairs.TOKENS))
        return jnp.sum(x**2)

    forward, both = (jax.jit(f).lower(trainable).cost_analysis()["flops"] for f in (loss, jax.grad(loss)))
    assert 1.3 * forward < both < 2 * forward


LISTS = {
    "last layers": ("llama", [LastLayers(n=2, head=True)], "JAXFT"),
    "last layers, tied head": ("llama_tied", [LastLayers(n=1, head=True)], "JAXFT"),
    "last layers with biases, under lora": ("llama_bias", [LoRA(rank=2), LastLayers(n=1)], "JAXFT"),
    "biases": ("llama_bias", [BitFit()], "JAXFT"),
    "biases of some layers": ("gpt2", [BitFit(layers=(0, 1), exclude=("ln_1",))], "JAXFT"),
    "added and existing biases": ("qwen2", [BitFit(targets=("q_proj", "o_proj"))], "JAXFT"),
    "lora and biases": ("llama_bias", [LoRA(rank=2, targets=("q_proj",)), BitFit()], "LORA"),
    "biases and lora": ("gpt2", [BitFit(), LoRA(rank=2, targets=("c_attn",))], "LORA"),
    "lora and added biases": ("llama", [LoRA(rank=2, targets=("q_proj",)), BitFit(targets=("q_proj",))], "JAXFT"),
    "lora and norms": ("llama", [LoRA(rank=2, targets=("q_proj",)), Norms()], "LORA"),
    "norms and a norm's bias": ("gpt2", [Norms(targets=("ln_1",)), BitFit(targets=("ln_2",))], "JAXFT"),
}  # fmt: skip


@pytest.mark.parametrize("case", LISTS)
def test_round_trip_and_merge(case, tmp_path):
    """In peft's format where it has the words, with peft's logits, else in ours; merged, the same logits."""
    name, methods, kind = LISTS[case]
    params = pairs.adapted(name, methods, KEY)
    directory = pairs.save(name, params, tmp_path / "a", methods=methods)
    assert json.loads((directory / disk.CONFIG).read_text())["peft_type"] == kind
    chex.assert_trees_all_equal(pairs.load(name, directory), params)
    expected = pairs.logits(name, params)
    assert np.abs(expected - pairs.logits(name, pairs.ours(name).params)).max() > 1e-3
    chex.assert_trees_all_close(pairs.logits(name, tree.merge(params)), expected, atol=1e-5)
    chex.assert_trees_all_equal(tree.strip(params), pairs.ours(name).params)
    if kind == "LORA":
        np.testing.assert_allclose(pairs.torch_logits(pairs.peft_load(name, directory)), expected, atol=1e-5)


def test_beft_of_peft_on_a_model_with_biases(tmp_path):
    made = pairs.peft_model("qwen2", peft.BeftConfig(target_modules=["v_proj", "o_proj"]))
    params = pairs.load("qwen2", pairs.peft_save(made, tmp_path / "a"))
    for one in (params, tree.merge(params)):
        np.testing.assert_allclose(pairs.logits("qwen2", one), pairs.torch_logits(made), atol=1e-5)


def exported(name: str, methods: list, directory) -> tuple[np.ndarray, transformers.PreTrainedModel]:
    pairs.torch_model(name).save_pretrained(directory / "base")
    model = jaxft.load(directory / "base", dtype="float32")
    params = pairs.moved(jaxft_peft.adapt(model, KEY, methods), KEY)
    out = jaxft.save_hf(model, jaxft.merge(params), directory / "merged")
    return pairs.logits(name, params), transformers.AutoModelForCausalLM.from_pretrained(
        out, attn_implementation="eager"
    )


@pytest.mark.parametrize(
    ("name", "targets", "switches"),
    [
        ("llama", ("q_proj",), {"attention_bias": True, "mlp_bias": False}),
        ("granite", "all-linear", {"mlp_bias": True}),
    ],
)
def test_added_biases_are_exported_where_the_family_can_have_them(name, targets, switches, tmp_path):
    """Zeros stand where a switch asks for more biases than were trained."""
    expected, read = exported(name, [BitFit(targets=targets)], tmp_path)
    np.testing.assert_allclose(pairs.torch_logits(read.eval()), expected, atol=1e-5)
    assert {field: getattr(read.config, field) for field in switches} == switches


def test_a_bias_that_a_family_cannot_have_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"o_proj: got a bias; expected biases that a config of qwen2 can switch on"
    ):
        exported("qwen2", [BitFit(targets=("o_proj",))], tmp_path)
    assert not (tmp_path / "merged").exists()


def test_layers_on_a_mesh():
    """Each trained layer is laid out as its stack is."""
    params = jaxft_peft.adapt(pairs.model("llama"), KEY, LastLayers(n=1))
    places = rules.shardings(params, mesh.create(mesh.MeshConfig(fsdp=2, tensor=4)))
    chex.assert_trees_all_equal_structs(places, params)
    w = places["layers"]["attn"]["q"]
    assert isinstance(w, InPlace) and tuple(w.value.parts[2].spec) == tuple(w.base.spec)[1:]
    jax.block_until_ready(jax.device_put(params, places))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (LastLayers(n=4), "peft.n: got 4; expected at most 3"),
        (Norms(targets=("q_proj",)), "'q_proj' selects no weight .* Known modules: input_layernorm, norm"),
        (BitFit(targets=("lm_head",)), "'lm_head' selects no weight"),
    ],
)  # fmt: skip
def test_refused_by_name(method, said):
    with pytest.raises(ValueError, match=said):
        jaxft_peft.adapt(pairs.model("llama"), KEY, method)
    with pytest.raises(ValueError, match=r"peft\.bias"):
        BitFit(bias="all")
    with pytest.raises(ValueError, match=r"peft\.n: got 0"):
        LastLayers(n=0)
