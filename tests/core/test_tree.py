"""Functions on parameter trees, on a literal tree."""

import chex
import jax
import jax.numpy as jnp
import pytest

from jaxft.core import tree
from jaxft.core.names import Name
from jaxft.core.weight import Affine, InPlace, NotMergeable, Split, Weight, static, trainable, weight
from jaxft.peft import sites, whole
from jaxft.peft.lora import LoRA, LoRAWeight

L, D, F, V, R = 2, 4, 6, 8, 3
NAMES = (
    Name("embed/tokens", "model.embed_tokens", "embedding"),
    Name("layers/norm", "model.layers.{}.norm", "norm"),
    Name("layers/mlp/up", "model.layers.{}.mlp.up_proj", "linear", bias=True),
    Name("layers/mlp/down", "model.layers.{}.mlp.down_proj", "linear"),
    Name("head", "lm_head", "linear"),
)


def plain() -> tree.Params:
    return {
        "embed": {"tokens": jnp.ones((V, D))},
        "layers": {
            "norm": {"scale": jnp.ones((L, D))},
            "mlp": {"up": Affine(jnp.ones((L, D, F)), jnp.zeros((L, F))), "down": jnp.ones((L, F, D))},
        },
        "head": jnp.ones((D, V)),
    }


def with_lora(key) -> tree.Params:
    return sites.adapt(plain(), NAMES, key, LoRA(rank=R, targets=("up_proj", "down_proj")))


def shapes(params):
    return {path: leaf.shape for path, leaf in tree.paths(params)}


BASE = {
    "embed/tokens": (V, D),
    "layers/norm/scale": (L, D),
    "layers/mlp/up/base": (L, D, F),
    "layers/mlp/up/bias": (L, F),
    "layers/mlp/down": (L, F, D),
    "head": (D, V),
}
ADAPTED = {
    "embed/tokens": (V, D),
    "layers/norm/scale": (L, D),
    "layers/mlp/up/base/base": (L, D, F),  # a map on the matrix goes inside the Affine
    "layers/mlp/up/base/a": (L, D, R),
    "layers/mlp/up/base/b": (L, R, F),
    "layers/mlp/up/base/scale": (L,),
    "layers/mlp/up/base/rank": (L,),
    "layers/mlp/up/bias": (L, F),
    "layers/mlp/down/base": (L, F, D),
    "layers/mlp/down/a": (L, F, R),
    "layers/mlp/down/b": (L, R, D),
    "layers/mlp/down/scale": (L,),
    "layers/mlp/down/rank": (L,),
    "head": (D, V),
}


def trained_paths(params, select=None):
    return {path for path, hit in tree.paths(tree.trainable_mask(params, select)) if hit}


def test_paths_and_shapes(key):
    assert shapes(plain()) == BASE
    assert shapes(with_lora(key)) == ADAPTED
    assert [p for p, _ in tree.paths(with_lora(key), inside=False)] == [
        "embed/tokens", "head", "layers/mlp/down", "layers/mlp/up", "layers/norm/scale",
    ]  # fmt: skip


def test_mask_without_a_pattern_is_the_adapters(key):
    assert trained_paths(with_lora(key)) == {
        "layers/mlp/up/base/a", "layers/mlp/up/base/b", "layers/mlp/down/a", "layers/mlp/down/b",
    }  # fmt: skip


@pytest.mark.parametrize(
    "select, expected",
    [
        ("full", set(BASE)),
        ("bitfit", {"layers/mlp/up/bias"}),
        ("norms", {"layers/norm/scale"}),
        ("embeddings", {"embed/tokens", "head"}),
        ("mlp/(up|down)", {"layers/mlp/up/base", "layers/mlp/up/bias", "layers/mlp/down"}),
        ("^head$", {"head"}),
    ],
)
def test_mask_of_plain_arrays(select, expected):
    assert trained_paths(plain(), select) == expected


def test_pattern_adds_to_the_adapters_but_never_their_constants(key):
    """`full` with LoRA trains bases and factors; scale and rank are constants of the method."""
    adapted = with_lora(key)
    assert trained_paths(adapted, "full") == {p for p in ADAPTED if not p.endswith(("scale", "rank"))} | {
        "layers/norm/scale"
    }
    assert trained_paths(adapted, "bitfit") == {*trained_paths(adapted), "layers/mlp/up/bias"}


def test_integers_never_train():
    params = {"layers": {"w": jnp.ones((2, 2)), "codes": jnp.ones((2, 2), jnp.int8)}}
    assert trained_paths(params, "full") == {"layers/w"}
    with pytest.raises(ValueError, match="codes"):
        tree.trainable_mask(params, "codes")


def test_nothing_to_train_is_an_error(key):
    with pytest.raises(ValueError, match="hold no adapter"):
        tree.trainable_mask(plain())
    with pytest.raises(ValueError, match=r"'q_prj' matches no weight.*Presets: full.*paths: .*layers/mlp"):
        tree.trainable_mask(plain(), "q_prj")
    with pytest.raises(ValueError, match="q_prj"):  # although there are adapters to train
        tree.trainable_mask(with_lora(key), "q_prj")


def test_select_lists_weights_and_refuses_nothing(key):
    assert tree.select(with_lora(key), "mlp") == ["layers/mlp/down", "layers/mlp/up"]
    with pytest.raises(ValueError, match="nothing_like_it"):
        tree.select(plain(), "nothing_like_it")


def test_mask_of_abstract_parameters(key):
    abstract = jax.eval_shape(lambda: with_lora(key))
    assert tree.paths(tree.trainable_mask(abstract)) == tree.paths(tree.trainable_mask(with_lora(key)))


def test_partition_and_combine(key):
    params = with_lora(key)
    trainable_, frozen = tree.partition(params, tree.trainable_mask(params, "norms"))
    assert shapes(trainable_) == {p: s for p, s in ADAPTED.items() if p.endswith(("/a", "/b")) or "norm" in p}
    assert shapes(frozen) == {p: s for p, s in ADAPTED.items() if p not in shapes(trainable_)}
    chex.assert_trees_all_equal(tree.combine(trainable_, frozen), params)
    assert isinstance(trainable_["layers"]["mlp"]["up"].base, Weight), "the wrappers stay: the trees fit each other"


def test_partition_inside_a_gradient(key):
    """Only the trainable part is differentiated; what comes back has its structure."""
    params = with_lora(key)
    trainable_, frozen = tree.partition(params, tree.trainable_mask(params))

    def loss(trainable_):
        p = tree.layer(tree.combine(trainable_, frozen)["layers"], 1)
        return jnp.sum((jnp.ones((3, D)) @ p["mlp"]["up"]) @ p["mlp"]["down"])

    gradient = jax.jit(jax.grad(loss))(trainable_)
    assert jax.tree.structure(gradient) == jax.tree.structure(trainable_)
    assert shapes(gradient) == shapes(trainable_)


def test_count(key):
    """Elements by hand; a method's constants are no parameters."""
    base = V * D + L * D + L * (D * F + F) + L * F * D + D * V
    adapters = L * R * (D + F) * 2
    params = with_lora(key)
    trainable_, frozen = tree.partition(params, tree.trainable_mask(params))
    assert (tree.count(plain()), tree.count(params)) == (base, base + adapters)
    assert (tree.count(trainable_), tree.count(frozen)) == (adapters, base)


def test_strip_gives_the_model_back(key):
    params = plain()
    adapted = sites.adapt(params, NAMES, key, LoRA(rank=R, modules_to_save=("lm_head", "norm")))
    bare = tree.strip(adapted)
    assert jax.tree.structure(bare) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(bare), jax.tree.leaves(params), strict=True))


def test_merge_gives_plain_weights(key):
    params = sites.adapt(plain(), NAMES, key, LoRA(rank=R, modules_to_save=("embed_tokens", "lm_head", "norm")))
    assert isinstance(params["head"], InPlace) and isinstance(params["layers"]["norm"]["scale"], InPlace)
    assert shapes(tree.merge(params)) == BASE
    assert not any(isinstance(w, LoRAWeight | InPlace) for _, w in tree.paths(tree.merge(params), inside=False))


@weight
class OutputMap(Weight):
    """An adapter that is not a map on the weight."""

    mergeable = False
    base: jax.Array
    bottleneck: jax.Array = trainable()
    width: int = static(default=1)


def test_merge_names_what_it_cannot_merge():
    params = {"layers": {"mlp": {"up": Affine(OutputMap(jnp.ones((2, 2)), jnp.ones(2)), jnp.ones(2))}}}
    with pytest.raises(NotMergeable, match="layers/mlp/up/base: OutputMap"):
        tree.merge(params)


def test_wrap_and_replace_copy_nothing_else():
    params = plain()
    changed = tree.wrap(params, "layers/mlp/up", whole.in_place)
    assert isinstance(changed["layers"]["mlp"]["up"], Affine), "a map on the matrix goes inside the bias"
    assert changed["layers"]["mlp"]["down"] is params["layers"]["mlp"]["down"]
    assert (
        changed["head"] is params["head"]
        and params["layers"]["mlp"]["up"].base is not changed["layers"]["mlp"]["up"].base
    )
    with pytest.raises(KeyError, match="no 'upp' on the way to 'layers/mlp/upp'"):
        tree.get(params, "layers/mlp/upp")


def test_cast(key):
    half = tree.cast(with_lora(key), jnp.bfloat16)
    floats = {p: leaf.dtype for p, leaf in tree.paths(half)}
    assert {p for p, d in floats.items() if d == jnp.bfloat16} == {
        p for p in ADAPTED if not p.endswith(("/a", "/b", "base/scale", "down/scale", "/rank"))
    }


def test_split_and_stack_layers(key):
    params = with_lora(key)
    held = tree.split_layers(params)
    down = held["layers"]["mlp"]["down"]
    assert isinstance(down.a, Split) and down.shape == (L, F, D) and down.a.ndim == 3 and len(down.a.parts) == L
    assert held["head"] is params["head"]
    chex.assert_trees_all_equal(tree.stack_layers(held), params)
    assert shapes(held) == shapes(params), "paths are the same: users' patterns keep their meaning"
    mask = tree.trainable_mask(held, "norms")
    assert jax.tree.structure(mask) == jax.tree.structure(held)
    assert tree.count(tree.partition(held, mask)[0]) == L * R * (D + F) * 2 + L * D
    assert tree.num_layers(held) == tree.num_layers(params) == L
    chex.assert_trees_all_equal(tree.layer(held["layers"], 1), tree.layer(params["layers"], 1))


def test_dropout_keys_reach_every_adapter(key):
    """A key for each path, layer and step; none where the rate is 0; `None` switches off."""
    config = LoRA(rank=R, targets=("up_proj", "down_proj"), dropout=0.5)
    params = sites.adapt(with_lora(key), NAMES, key, config)  # a second adapter on top, with dropout
    keyed = tree.dropout_keys(params, jax.random.key(1))
    found = {p: leaf for p, leaf in tree.paths(keyed) if p.endswith("key")}
    assert {p: leaf.shape for p, leaf in found.items()} == {
        "layers/mlp/up/base/key": (L,), "layers/mlp/down/key": (L,),
    }  # fmt: skip
    data = jnp.concatenate([jax.random.key_data(leaf) for leaf in found.values()])
    later = tree.dropout_keys(params, jax.random.key(2))
    both = jnp.concatenate([data, *(jax.random.key_data(v) for p, v in tree.paths(later) if p.endswith("key"))])
    assert len({tuple(k) for k in both.tolist()}) == 4 * L
    assert jax.tree.structure(tree.dropout_keys(keyed, None)) == jax.tree.structure(params)
    assert trained_paths(keyed) == trained_paths(params)
