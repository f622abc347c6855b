"""From paths to shardings: every weight of every published model has a place, adapters lie like what they adapt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxft import peft
from jaxft.core import tree
from jaxft.core.weight import Affine, InPlace
from jaxft.models import families, init
from jaxft.quant import QuantConfig
from jaxft.sharding import rules
from jaxft.training import optim, state
from jaxft.training.config import OptimConfig
from tests.models.published import PUBLISHED
from tests.sharding import steps

LARGE = 2**20
LORA = peft.LoRA(rank=8, targets="all-linear", modules_to_save=("embed_tokens",), bias="all")


def shapes(raw, method):
    """The shapes of an adapted bfloat16 model."""
    config, names = families.read(raw)

    def make(key):
        return peft.adapt(steps.Base(init.random(config, names, key, jnp.bfloat16), names, config), key, method)

    return jax.eval_shape(make, jax.random.key(0))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_large_matrix_of_every_model_is_sharded(name):
    """Over both axes of the weights where they divide; the memory of a device is what its share says."""
    mesh = steps.mesh((2, 2, 2))
    params = shapes(PUBLISHED[name], peft.Full())
    places = dict(tree.paths(rules.shardings(params, mesh)))
    leaves = tree.paths(params)
    assert [path for path, _ in leaves] == list(places)
    for path, leaf in leaves:
        if leaf.size > LARGE and not path.endswith("bias"):
            share = np.prod(places[path].shard_shape(leaf.shape)) / leaf.size
            odd = [n for n in leaf.shape[-2:] if n % 2]
            assert share == (0.5 if odd or path == "embed/positions" else 0.25), (path, leaf.shape)


def test_adapters_lie_like_the_matrix_they_adapt():
    raw = {**PUBLISHED["Qwen2.5-0.5B"], "tie_word_embeddings": False}
    mesh = steps.mesh((1, 2, 2))
    params = rules.shardings(shapes(raw, LORA), mesh)
    q, o = params["layers"]["attn"]["q"], params["layers"]["attn"]["o"]
    assert isinstance(q, Affine) and isinstance(q.bias, InPlace)
    assert q.base.base.spec == P(None, "fsdp", "tensor")
    assert q.base.a.spec == P(None, "fsdp", None)
    assert q.base.b.spec == P(None, None, "tensor")
    assert q.base.scale.spec == q.base.rank.spec == P(None)
    assert q.bias.base.spec == q.bias.value.spec == P(None, "tensor")
    assert o.a.spec == P(None, "tensor", None) and o.b.spec == P(None, None, "fsdp")
    tokens = params["embed"]["tokens"]
    assert isinstance(tokens, InPlace) and tokens.base.spec == tokens.value.spec == P("tensor", "fsdp")
    assert params["head"].spec == P("fsdp", "tensor")
    assert params["final_norm"]["scale"].spec == P()


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "schedule_free", "sgd", "adafactor"])
def test_the_optimizers_state_lies_like_its_parameters(name):
    """Every array of a parameter's shape, and all others are small."""
    mesh = steps.mesh((1, 4, 2))
    params = shapes(PUBLISHED["Qwen3-0.6B"], peft.Full())
    settings = OptimConfig(name=name, lr=1e-3, schedule="constant")
    shaped = state.abstract(params, optim.make(settings, params, 10), jax.random.key(0), reference=True)
    places = state.shardings(shaped, rules.shardings(params, mesh), jax.sharding.NamedSharding(mesh, P()))
    whole = dict(tree.paths(rules.shardings(params, mesh)))
    kept = 0
    for (path, leaf), (_, place) in zip(tree.paths(shaped), tree.paths(places), strict=True):
        owner = [p for p in whole if f"/{p}" in f"/{path}" and dict(tree.paths(params))[p].shape == leaf.shape]
        if owner:
            assert place == whole[owner[0]], path
            kept += leaf.size
        else:
            assert leaf.size < LARGE, path
    copies = {"adamw": 2, "lion": 1, "muon": 1, "schedule_free": 2, "sgd": 1, "adafactor": 0}[name]
    assert kept >= (2 + copies) * tree.count(params)  # with the parameters themselves and their start


def test_what_is_gathered_of_a_layer():
    """The arrays of a packed weight, whatever is around it, over fsdp alone; nothing else."""
    mesh = steps.mesh((2, 2, 2))
    raw = {**PUBLISHED["Qwen2.5-0.5B"], "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1,
           "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
    made = steps.parts(raw, LORA, jnp.bfloat16, OptimConfig(), quant=QuantConfig("nf4"))
    whole = tree.combine(made.trainable, made.frozen)
    layer = tree.layer(jax.device_put(whole, rules.shardings(whole, mesh))["layers"], 0)
    gather = rules.gather(mesh)
    assert gather is not None and rules.gather(steps.mesh((2, 1, 4))) is None
    after = jax.jit(lambda p: gather(p))(layer)
    q, o = after["attn"]["q"].base, after["attn"]["o"]
    assert q.base.codes.sharding.spec == q.base.absmax.sharding.spec == P(None, "tensor")
    assert o.base.codes.sharding.spec == P("tensor")
    named = str(jax.make_jaxpr(gather)(layer)).count("name=gathered")
    assert named == 7 * len(jax.tree.leaves(q.base))
    jax.tree.map(np.testing.assert_array_equal, after, layer)


def test_a_path_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"no sharding rule for the weight 'layers/attn/gate'.*LOGICAL"):
        rules.shardings({"layers": {"attn": {"gate": jnp.zeros((2, 4, 4))}}}, steps.mesh((1, 2, 2)))


def test_an_axis_that_does_not_divide_is_left_whole():
    mesh = steps.mesh((1, 4, 2))
    assert rules.spec(("layers", "embed", "heads"), (3, 8, 6), mesh) == P(None, "fsdp", "tensor")
    assert rules.spec(("layers", "embed", "heads"), (3, 6, 6), mesh) == P(None, None, "tensor")
    assert rules.spec(("vocab", "embed"), (50257, 768), mesh) == P(None, "fsdp")


def test_one_mesh_axis_for_two_axes_is_an_error():
    both = {**rules.RULES, "heads": "fsdp"}
    with pytest.raises(ValueError, match=r"two axes of \('layers', 'embed', 'heads'\) on the mesh axis 'fsdp'"):
        rules.shardings({"layers": {"attn": {"q": jnp.zeros((2, 8, 8))}}}, steps.mesh((1, 2, 2)), both)
    # also where the first of them does not divide: what a rule means must not depend on a size
    with pytest.raises(ValueError, match="two axes"):
        rules.spec(("layers", "embed", "heads"), (2, 7, 8), steps.mesh((1, 2, 2)), both)
