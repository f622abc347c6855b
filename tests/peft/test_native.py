"""Our own format: what peft has no word for, bit by bit; what is refused, by name."""

import dataclasses
import json
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxft import peft
from jaxft.core import tree
from jaxft.core.weight import Weight, parameter, static, trainable, weight
from jaxft.peft import Full, Houlsby, LoRA, Parallel, Targeted, VeRA, disk, native, store
from jaxft.peft.disk import AdapterError
from tests.peft import pairs


@weight
class ScaledWeight(Weight):
    """``(x @ base) * scale``, with an array of every kind that a field may hold."""

    base: object = parameter()
    scale: object = trainable()
    gate: object = None
    names: tuple = static(default=())

    def __rmatmul__(self, x):
        return (x @ self.base) * (1 + self.gate[..., None] * self.scale["by"][0]).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Scaled(Targeted):
    """A method from outside the package."""

    outside = True

    def wrap(self, site):
        scale = {"by": [jnp.zeros((*site.layers.shape, site.shape[1]))]}
        return ScaledWeight(site.base, scale, site.gate, names=("a", ("b", 1)))


Q = ("q_proj",)
LISTS = {
    "lora on lora": ("llama", [LoRA(rank=2, targets=Q), LoRA(rank=3, targets=("q_proj", "v_proj"), layers=(0, 2))]),
    "from outside, on a bias": ("llama_bias", [LoRA(rank=2, targets=Q), Scaled(targets=Q, layers=(1,))]),
    "by a pattern": ("llama_bias", [LoRA(rank=2, targets=Q), Full("norm|q/bias|down/base$")]),
    "one matrix for all": ("llama", [VeRA(rank=3), LoRA(rank=2, targets=Q)]),
    "in the stream": ("llama", [Houlsby(), Parallel()]),
    "tied head": (
        "llama_tied",
        [LoRA(rank=2, targets=("lm_head",)), LoRA(rank=2, targets=("lm_head", "embed_tokens"))],
    ),
}


def adapted(name: str) -> tree.Params:
    """The model with the methods of a case on it, as training could have left it."""
    model, methods = LISTS[name]
    params, mask, _ = peft.adapt_for_training(pairs.model(model), jax.random.key(1), methods)
    return jax.tree.map(
        lambda p, hit: p + 0.1 * jnp.cos(jnp.arange(p.size).reshape(p.shape)) if hit else p, params, mask
    )


@pytest.mark.parametrize("case", LISTS)
def test_round_trip_is_bitwise(case, tmp_path):
    model, methods = LISTS[case]
    params = adapted(case)
    pairs.save(model, params, tmp_path / "adapter", methods=methods, base_model_name_or_path="org/base")
    again = pairs.load(model, tmp_path / "adapter")
    chex.assert_trees_all_equal(again, params)
    config = json.loads((tmp_path / "adapter" / disk.CONFIG).read_text())
    assert (config["peft_type"], config["format"], config["base_model_name_or_path"]) == ("JAXFT", 1, "org/base")
    assert len(config["methods"]) == len(methods)
    tensors = load_file(tmp_path / "adapter" / disk.WEIGHTS)
    base = {id(a) for a in jax.tree.leaves(pairs.ours(model).params)}
    own = {id(a) for a in jax.tree.leaves(params)} - base
    assert len(tensors) == len(own), "each own array once, no base"
    assert len({id(a) for a in jax.tree.leaves(again)} - base) == len(own)


def test_arrays_trained_by_a_pattern_are_found_by_comparison(tmp_path):
    """`jaxft.save_adapter` needs no configs: what differs from the model's own is part of the adapter."""
    loaded, params = pairs.ours("llama_bias"), adapted("by a pattern")
    store.save(params, loaded.names, loaded.config.num_layers, tmp_path / "a", base=loaded.params)
    chex.assert_trees_all_equal(pairs.load("llama_bias", tmp_path / "a"), params)


def test_layers_held_apart_are_saved_as_stacks(tmp_path):
    params = adapted("by a pattern")
    pairs.save("llama_bias", tree.split_layers(params), tmp_path / "a", methods=LISTS["by a pattern"][1])
    chex.assert_trees_all_equal(pairs.load("llama_bias", tmp_path / "a"), params)


def rewrite(directory, config=None, tensors=None) -> None:
    found, arrays = disk.read(directory)
    arrays = {f"/{name.removeprefix('/')}": a for name, a in arrays.items()}
    (config or (lambda c: None))(found)
    (tensors or (lambda t: None))(arrays)
    disk.write(directory, found, arrays, "")


def leaf(config: dict) -> dict:
    return config["leaves"]["layers/attn/q"]


WRONG = {
    "a newer format": (lambda c: c.update(format=2), None, "format: got 2; expected 1. Read it with a newer jaxft"),
    "an unknown class": (
        lambda c: leaf(c).update({"class": "my.module:MyWeight"}), None, "Import my.module:MyWeight first"
    ),
    "an unknown field": (lambda c: leaf(c)["fields"].update(z=None), None, "got fields z, which .*LoRAWeight does not"),
    "a missing tensor": (None, lambda t: t.pop("/layers/attn/q/a"), "no tensor layers/attn/q/a"),
    "a tensor too many": (None, lambda t: t.update({"/x": np.ones(2, np.float32)}), "unused tensors /x"),
    "another shape": (
        None, lambda t: t.update({"/layers/attn/q/a": np.ones((3, 2, 2), np.float32)}), r"float32\[3,2,2\]; expected"
    ),
    "another dtype": (
        None, lambda t: t.update({"/layers/attn/q/a": t["/layers/attn/q/a"].astype("float16")}), "float16"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return pairs.save("llama", adapted("lora on lora"), tmp_path_factory.mktemp("native") / "adapter")


@pytest.mark.parametrize("case", WRONG)
def test_refused_by_name(case, saved, tmp_path):
    config, tensors, said = WRONG[case]
    found, arrays = disk.read(saved)
    disk.write(tmp_path / "a", found, {f"/{n.removeprefix('/')}": a for n, a in arrays.items()}, "")
    rewrite(tmp_path / "a", config, tensors)
    with pytest.raises(AdapterError, match=said):
        pairs.load("llama", tmp_path / "a")


@pytest.mark.parametrize(
    ("other", "said"), [("gpt2", "an adapter of layers/attn/q|with nothing there"), ("qwen3", "shape")]
)
def test_another_model_is_refused(other, said, saved):
    with pytest.raises(AdapterError, match=rf"{said}.*made for another model"):
        pairs.load(other, saved)


def test_what_cannot_be_written_is_refused(tmp_path):
    params = {"w": ScaledWeight(jnp.ones((2, 2)), object(), jnp.ones(()))}
    with pytest.raises(AdapterError, match="w/scale: got a object"):
        native.export("here", params, set(), [])
    with pytest.raises(AdapterError, match="w/names: got a dict"):
        native.export("here", {"w": ScaledWeight(jnp.ones((2, 2)), None, None, names=({},))}, set(), [])
    with pytest.raises(AdapterError, match="parameters without an adapter"):
        native.export("here", pairs.ours("llama").params, set(), [SimpleNamespace])
    assert not list(tmp_path.iterdir())
