"""What every Weight computes, whatever it is: one function a property, its docstring the property in words.

A check gets a `Subject` and raises `Broken`, saying what was found and what to do about it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import tree, verbs
from jaxft.core import weight as weights
from jaxft.core.weight import Affine, Weight, is_packed
from jaxft.testing.claims import Broken, require, same
from jaxft.testing.subject import F32, LAYERS, Subject, split, trained


def identity_at_initialisation(s: Subject) -> None:
    """At initialisation the adapted weight equals the base."""
    if s.row.identity:
        same(s.x @ s.fresh[1], s.x @ tree.strip(s.fresh)[1], "x @ w before training and x @ base")


def training_changes_it(s: Subject) -> None:
    """Two steps of training change the output: every map has gradients at its initialisation."""
    if s.trains:
        moved = jnp.abs(_outputs(s.stack[0], s.x) - _outputs(s.fresh[0], s.x)).max()
        require(moved > 1e-2, f"the output moved by {moved:.2g} only: are all factors zero, or the gradient cut?")


def _outputs(w: Weight, x: jax.Array) -> jax.Array:
    """The product and, where the head is another matrix, its logits."""
    y = x @ w
    if isinstance(w, weights.Untied):
        y = jnp.concatenate([y, verbs.unembed(w, jnp.ones((*x.shape[:-1], w.shape[-1])))], -1)
    return y


def shape_and_dtype(s: Subject) -> None:
    """shape, ndim and dtype are those of the matrix it stands for; a layer is one matrix."""
    w, (rows, columns) = s.stack, s.sizes
    require(w.shape == (LAYERS, rows, columns) and w.ndim == 3, f"shape {w.shape}")
    require(weights.dense_dtype(w) == F32, f"dtype {w.dtype}")
    require(w[0].shape == (rows, columns), f"a layer has shape {w[0].shape}")
    if s.row.matrix:
        require(verbs.dense(w).dtype == F32, f"dense() has dtype {verbs.dense(w).dtype}")
        require(verbs.dense(w).shape == w.shape, f"dense() has shape {verbs.dense(w).shape}, the weight {w.shape}")
        require(verbs.dense(w[0]).shape == w[0].shape, f"dense() of a layer has shape {verbs.dense(w[0]).shape}")


def product_equals_dense(s: Subject) -> None:
    """x @ w is x @ w.dense() plus a constant."""
    if s.row.matrix:
        w = s.stack[1]
        same(s.x @ w, s.x @ verbs.dense(w) + jnp.zeros_like(s.x) @ w, "x @ w and x @ dense(w) + constant")


def dense_of_a_layer_is_the_layer_of_dense(s: Subject) -> None:
    """dense() of one layer is that layer of the stack's dense()."""
    if s.row.matrix:
        same(verbs.dense(s.stack[2]), verbs.dense(s.stack)[2], "dense(w[2]) and dense(w)[2]")


def gradients_equal_dense_autodiff(s: Subject) -> None:
    """Gradients of the trained fields and of the input are those of x @ dense(w)."""
    if not (s.row.matrix and s.trains):
        return
    trainable, frozen = split(s.stack[1])

    def value(trainable, x, multiply):
        w = tree.combine(trainable, frozen)
        return jnp.sum(jnp.sin(multiply(x, w, jnp.zeros_like(x) @ w)))

    mine = jax.grad(value, (0, 1))(trainable, s.x, lambda x, w, c: x @ w)
    theirs = jax.grad(value, (0, 1))(trainable, s.x, lambda x, w, c: x @ verbs.dense(w) + c)
    same(mine, theirs, "the gradient through x @ w and through x @ dense(w)")


def layers_left_out_are_the_base(s: Subject) -> None:
    """A layer that is not adapted is the base, and its gradients are exactly zero: multiply by the gate."""
    w = s.stack
    for i in s.row.left_out:
        require(not np.asarray(w.adapted)[i], f"layer {i} is not adapted, yet w.adapted says so: keep site.gate")
        same(s.x @ w[i], s.x @ tree.strip(w)[i], f"layer {i}, which is not adapted, and the base", 0)
        trainable, frozen = split(w[i])
        grads = jax.grad(lambda t, f: jnp.sum(jnp.sin(s.x @ tree.combine(t, f))))(trainable, frozen)
        require(not any(g.any() for g in jax.tree.leaves(grads)), f"layer {i} is not adapted but has gradients")


def multiples_of_linear_fields(s: Subject) -> None:
    """A multiple of the fields that it calls linear is that multiple of what it adds to the base."""
    w = s.stack[1]
    if w.linear:
        thrice = dataclasses.replace(w, **{name: 3.0 * getattr(w, name) for name in w.linear})  # type: ignore[type-var]
        base = s.x @ w.base
        same(s.x @ thrice - base, 3.0 * (s.x @ w - base), f"3 times {', '.join(w.linear)} and 3 times the update", 1e-4)


def take_and_unembed_equal_dense(s: Subject) -> None:
    """As an embedding: look-up and tied head are those of the dense matrix, gradients too."""
    if not s.row.embedding:
        return
    w, (rows, columns) = s.stack[1], s.sizes
    ids = jnp.array([[0, 3, rows - 1], [3, 3, 1]])
    features = jax.random.normal(jax.random.key(5), (2, 3, columns))
    trainable, frozen = split(w)

    def value(t, take, unembed):
        w = tree.combine(t, frozen)
        return jnp.sum(jnp.sin(take(w))) + jnp.sum(jnp.sin(unembed(w)))

    def mine(t):
        return value(t, lambda w: verbs.take(w, ids), lambda w: verbs.unembed(w, features))

    def theirs(t):
        return value(t, lambda w: verbs.dense(w)[ids], lambda w: features @ _head_matrix(w).T)

    same(verbs.take(w, ids), verbs.dense(w)[ids], "take and rows of dense()")
    same(verbs.unembed(w, features), features @ _head_matrix(w).T, "unembed and the head's matrix")
    same(jax.grad(mine)(trainable), jax.grad(theirs)(trainable), "gradients of take and unembed, and of dense()")


def _head_matrix(w: Weight) -> jax.Array:
    """What a tied head reads: its own matrix, the trained embedding, or the original one."""
    if isinstance(w, weights.Untied):
        return verbs.dense(w.head)
    return verbs.dense(w) if w.tied else verbs.dense(tree.strip(w))


def ragged_dot_equals_each_expert(s: Subject) -> None:
    """Holding experts, each token's product is that of its own expert."""
    if not (s.row.experts and _holds_experts(s.stack)):
        return
    x = jax.random.normal(jax.random.key(2), (7, s.sizes[0]))
    expected = jnp.concatenate([x[:4] @ s.stack[0], x[4:] @ s.stack[2]])
    same(verbs.ragged_dot(x, s.stack, jnp.array([4, 0, 3])), expected, "ragged_dot and each expert's product")


def _holds_experts(w: Any) -> bool:
    """Whether `ragged_dot` is defined by the weight and by all that it wraps."""
    if not isinstance(w, Weight):
        return True
    return type(w).ragged_dot is not Weight.ragged_dot and _holds_experts(getattr(w, "base", None))


def bf16_model_with_f32_adapters(s: Subject) -> None:
    """On a bfloat16 base the trained fields are float32, the product keeps the dtype of x and bfloat16's accuracy."""
    w = trained(s.row.build(s.key, jnp.dtype("bfloat16")), s.key)
    require(weights.dense_dtype(w) == jnp.bfloat16, f"dtype {w.dtype} on a bfloat16 base")
    dtypes = {a.dtype for a in jax.tree.leaves(split(w)[0])}
    require(dtypes <= {F32}, f"trained fields are {dtypes}: a bfloat16 parameter cannot hold small updates")
    x = jax.random.normal(s.key, (4, s.sizes[0])).astype(jnp.bfloat16)
    y = x @ w[1]
    require(y.dtype == jnp.bfloat16, f"a bfloat16 x gives {y.dtype}: cast the fields, .astype(x.dtype)")
    full = jax.tree.map(lambda a: a.astype(F32) if jnp.issubdtype(a.dtype, jnp.inexact) else a, w[1])
    truth = x.astype(F32) @ full
    off, scale = jnp.abs(y.astype(F32) - truth).max(), jnp.abs(truth).max()
    require(off <= 4 * 2.0**-8 * scale, f"bfloat16 is off by {off:.2g} of {scale:.2g}; expected a few units of 2^-8")
    require(not s.row.matrix or verbs.dense(w).dtype == jnp.bfloat16, "dense() is not in the dtype of the base")
    if s.row.embedding:
        require(verbs.take(w[1], jnp.array([1, 2])).dtype == jnp.bfloat16, "take changes the dtype")
        logits = verbs.unembed(w[1], jnp.ones((2, s.sizes[1]), jnp.bfloat16))
        require(logits.dtype == jnp.bfloat16, "unembed changes the dtype")
    if s.row.experts and _holds_experts(w):
        y = verbs.ragged_dot(x, w, jnp.array([1, 2, 1]))
        require(y.dtype == jnp.bfloat16, "ragged_dot changes the dtype")


def merge_equals_unmerged(s: Subject) -> None:
    """Merged it computes the same, holds no adapter, and merging again changes nothing; or merging is refused."""
    if not s.row.matrix:
        try:
            tree.merge({"layers": {"q": s.stack}})
        except weights.NotMergeable as error:
            require("layers/q" in str(error), f"the refusal does not name the path: {error}")
            return
        raise Broken("it merges, but x @ w is no matrix: set mergeable = False")
    merged = tree.merge({"layers": {"q": s.stack}})
    same(s.x @ tree.layer(merged, 1)["layers"]["q"], s.x @ s.stack[1], "merged and unmerged")
    left = jax.tree.leaves(merged, is_leaf=tree.is_weight)
    require(not any(w.adapter for w in left if isinstance(w, Weight)), "an adapter is left after merging")
    same(tree.merge(merged), merged, "merged once and twice", 0)
    if s.row.embedding:
        m, ids, features = merged["layers"]["q"][1], jnp.array([2]), jnp.ones((2, s.sizes[1]))
        same(verbs.take(m, ids), verbs.take(s.stack[1], ids), "take, merged and unmerged")
        if isinstance(s.stack, weights.Untied) or s.stack.tied is not None:
            same(verbs.unembed(m, features), verbs.unembed(s.stack[1], features), "unembed, merged and unmerged")


def merge_in_bf16_rounds_once(s: Subject) -> None:
    """On a bfloat16 base the merged matrix is that of float32 arithmetic, rounded once for each adapter."""
    if not s.row.matrix:
        return
    w = trained(s.row.build(s.key, jnp.dtype("bfloat16")), s.key)
    merged, truth = verbs.dense(tree.merge({"w": w})["w"]), verbs.dense(tree.cast(w, F32))
    require(merged.dtype == jnp.bfloat16, f"merged to {merged.dtype}")
    several = len([p for p, _ in tree.paths(w) if p.endswith("base/base") or "base/base/base" in p]) > 0
    if several and not isinstance(w, Affine):
        same(merged.astype(F32), truth, "merged in bfloat16 and in float32", 2 * 2.0**-8)
    else:
        same(merged, truth.astype(jnp.bfloat16), "merged in bfloat16, and merged in float32 and rounded", 2.0**-7)


def merging_numbers_that_are_not_finite_is_refused(s: Subject) -> None:
    """A diverged adapter is not merged: the error names the weight."""
    if not (s.row.matrix and s.trains):
        return
    trainable, frozen = split(s.stack)
    spoilt = jax.tree.map(lambda a: a.at[(-1,) * a.ndim].set(jnp.nan), trainable)
    try:
        tree.merge({"layers": {"q": tree.combine(spoilt, frozen)}})
    except ValueError as error:
        require("layers/q" in str(error), f"the refusal does not name the path: {error}")
        return
    raise Broken("an adapter with NaN was merged")


def cast_leaves_adapters_alone(s: Subject) -> None:
    """Casting the model casts its bases and biases, never what a method added."""
    half = tree.cast({"w": s.stack}, jnp.bfloat16)["w"]
    packed = any(is_packed(w) for w in _within(s.stack))
    require(packed or half.dtype == jnp.bfloat16, f"the base stays {half.dtype}")
    own = _model_paths(s.stack)
    for (path, was), (_, now) in zip(tree.paths(s.stack), tree.paths(half), strict=True):
        wanted = jnp.bfloat16 if path in own else was.dtype
        require(now.dtype == wanted, f"{path} is {now.dtype}, expected {jnp.dtype(wanted).name}")


def _within(w: Any) -> list[Any]:
    """The weight and all that it wraps."""
    return [w, *_within(w.base)] if hasattr(w, "base") else [w]


def _model_paths(w: Any, path: str = "") -> set[str]:
    """Paths of the arrays that belong to the model itself."""
    if not isinstance(w, Weight):
        return {path}
    fields = [f for f in dataclasses.fields(w) if weights.role(f) == weights.PARAMETER]  # type: ignore[arg-type]
    return set().union(*(_model_paths(getattr(w, f.name), f"{path}/{f.name}".strip("/")) for f in fields))


CHECKS: tuple[Callable[[Subject], None], ...] = (
    identity_at_initialisation,
    training_changes_it,
    shape_and_dtype,
    product_equals_dense,
    dense_of_a_layer_is_the_layer_of_dense,
    gradients_equal_dense_autodiff,
    layers_left_out_are_the_base,
    multiples_of_linear_fields,
    take_and_unembed_equal_dense,
    ragged_dot_equals_each_expert,
    bf16_model_with_f32_adapters,
    merge_equals_unmerged,
    merge_in_bf16_rounds_once,
    merging_numbers_that_are_not_finite_is_refused,
    cast_leaves_adapters_alone,
)
