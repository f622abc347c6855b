"""What every Weight is, whatever it computes: a pytree that JAX's transformations may take apart, and cheap.

Like `weight_checks`: one function a property, its docstring the property in words.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import align, many, tree, verbs
from jaxft.core import weight as weights
from jaxft.core.weight import Shared, Weight
from jaxft.testing import jaxprs
from jaxft.testing.claims import Broken, require, same
from jaxft.testing.subject import F32, LAYERS, Subject, split, trained


def scanned(x: jax.Array, w: Any, remat: bool = False) -> jax.Array:
    """A residual network over the stack: h + tanh(h @ w) for every layer, cut to the width of h."""
    sliced, whole = tree.hold_shared(w)

    def body(h, part):
        return h + _cut(jnp.tanh(h @ whole(part)), h), None

    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, sliced)[0]


def loop(x: jax.Array, w: Any) -> jax.Array:
    """The same network unrolled, by indexing layers."""
    for i in range(LAYERS):
        x = x + _cut(jnp.tanh(x @ w[i]), x)
    return x


def _cut(y: jax.Array, like: jax.Array) -> jax.Array:
    """``y`` with its last axis cut, or filled with zeros, to that of ``like``."""
    wide = like.shape[-1]
    return y[..., :wide] if y.shape[-1] >= wide else jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, wide - y.shape[-1])])


def loss(trainable: Any, frozen: Any, x: jax.Array, forward: Callable = scanned) -> jax.Array:
    """The mean square of the network's output."""
    return jnp.mean(forward(x, tree.combine(trainable, frozen)) ** 2)


def jit_scan_remat_and_indexing_agree(s: Subject) -> None:
    """The same numbers under jit, scanned, rematerialised and unrolled, and so are the gradients."""
    eager = loop(s.x, s.stack)
    same(jax.jit(loop)(s.x, s.stack), eager, "jit and eager")
    same(scanned(s.x, s.stack), eager, "scan and a loop over layers")
    same(scanned(s.x, s.stack, remat=True), eager, "scan with rematerialisation and a loop over layers")
    if s.trains:
        parts = split(s.stack)
        plain, remat, unrolled = (
            jax.jit(jax.grad(lambda t, f, forward=forward: loss(t, f, s.x, forward)))(*parts)
            for forward in (scanned, lambda x, w: scanned(x, w, remat=True), loop)
        )
        same(plain, remat, "gradients with and without rematerialisation")
        same(plain, unrolled, "gradients of scan and of a loop over layers")


def split_layers_equal_stacked(s: Subject) -> None:
    """Held as separate layers (for unrolling) it is the same weight."""
    held = tree.split_layers({"layers": s.stack})["layers"]
    same(loop(s.x, held), loop(s.x, s.stack), "split and stacked layers")
    same(tree.stack_layers(held), s.stack, "split and stacked again", 0)
    if s.trains:
        counted = tree.count(tree.partition(held, tree.trainable_mask(held))[0])
        require(counted == tree.count(split(s.stack)[0]), f"{counted} trained parameters when split")
    if s.row.matrix:
        same(loop(s.x, tree.merge(held)), loop(s.x, s.stack), "merged from split layers", 1e-4)


def many_adapters_are_one_vmap(s: Subject) -> None:
    """With the trained part batched and the base not: equal to a loop, and no copy of the base for each adapter."""
    if not s.trains:
        return
    n = 4
    trainable, frozen = split(s.stack[1])
    many = jax.tree.map(lambda p: jnp.stack([p * (1 + i) for i in range(n)]), trainable)
    xs = jnp.stack([s.x + i for i in range(n)])

    def apply(trainable, x):
        return x @ tree.combine(trainable, frozen)

    batched = jax.vmap(apply)(many, xs)
    each = jnp.stack([apply(jax.tree.map(lambda p, i=i: p[i], many), xs[i]) for i in range(n)])
    same(batched, each, "vmap over adapters and a loop")
    given = {p.shape for p in jax.tree.leaves(many)}
    for eqn in jaxprs.equations(jax.make_jaxpr(jax.vmap(apply))(many, xs)):
        for v in eqn.outvars:
            copied = v.aval.shape == (n, *s.sizes) and v.aval.shape not in given
            require(not copied or s.row.dense_gradient, f"the base is copied for each adapter: {jaxprs.said(eqn)}")


def rows_of_a_batch_meet_their_own_adapter(s: Subject) -> None:
    """Two adapters and none at work in one batch: each row is what it would be with its own, alone."""
    if not s.trains:
        return
    members = align.align([s.stack, trained(s.fresh, jax.random.key(8)), align.off(s.stack)])
    each, common, _ = align.split(members)
    stacked = many.wrap({"layers": {"w": each}}, {"layers": {"w": common}}, len(members))
    ids = (1, 0, -1, 1)
    w = many.for_rows(stacked, ids)["layers"]["w"][1]
    x = jax.random.normal(s.key, (len(ids), 3, s.sizes[0]))
    uses: list[tuple[Callable, jax.Array]] = [(lambda w, x: x @ w, x)]
    if s.row.embedding:
        rows = jnp.arange(3 * len(ids)).reshape(-1, 3) % s.sizes[0]
        uses += [(verbs.take, rows), (verbs.unembed, jax.random.normal(s.key, (len(ids), 3, s.sizes[1])))]
    for use, given in uses:
        got = jax.jit(use)(w, given)
        for i, member in enumerate(ids):
            same(got[i], use(members[member][1], given[i]), f"row {i} of a batch of adapters and its own adapter alone")
        same(got[2], use(tree.strip(s.stack)[1], given[2]), "a row whose adapter is off and the stripped weight")


def eval_shape(s: Subject) -> None:
    """It can be built and used without a single array: no value decides a shape."""
    w = jax.eval_shape(lambda k: s.row.build(k, F32), s.key)
    require(w.shape == s.fresh.shape and w.dtype == s.fresh.dtype, f"shape {w.shape}, dtype {w.dtype}")
    out = jax.eval_shape(scanned, s.x, w)
    require((out.shape, out.dtype) == (s.x.shape, s.x.dtype), f"x @ w gives {out.dtype}{list(out.shape)}")
    require(tree.count(w) == tree.count(s.fresh), f"{tree.count(w)} parameters instead of {tree.count(s.fresh)}")


def partition_round_trip(s: Subject) -> None:
    """Split into trained and frozen and put together, the very same arrays come back."""
    trainable, frozen = split(s.stack)
    whole = tree.combine(trainable, frozen)
    require(jax.tree.structure(whole) == jax.tree.structure(s.stack), "combine() gives another structure")
    pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(s.stack), strict=True)
    require(all(a is b for a, b in pairs), "combine() gives other arrays")
    parts = len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen))
    require(parts == len(jax.tree.leaves(s.stack)), "an array is in both parts, or in none")


def flatten_and_unflatten_keep_paths(s: Subject) -> None:
    """It is a pytree with a name for every array, and tree operations may fill it with anything."""
    leaves, treedef = jax.tree.flatten(s.stack)
    again = jax.tree.structure(jax.tree.unflatten(treedef, leaves))
    require(again == treedef, "unflatten(flatten(w)) has another structure: keep validation out of __post_init__")
    names = [path for path, _ in tree.paths({"layers": {"q": s.stack}})]
    require(len(set(names)) == len(names) and all(name.startswith("layers/q/") for name in names), f"paths {names}")
    shown = repr(s.stack)
    sizes = ",".join(map(str, s.stack.shape))
    require(shown.startswith(type(s.stack).__name__) and f"[{sizes}]" in shown, f"repr: {shown}")
    jax.tree.map(lambda _: None, s.stack)


def backward_holds_nothing_dense(s: Subject) -> None:
    """No product of the weight's shape is computed, and nothing of that shape is kept for the backward pass."""
    if not s.trains or s.row.dense_gradient:
        return
    for forward, w in ((scanned, s.stack), (loop, tree.split_layers({"layers": s.stack})["layers"])):
        trainable, frozen = split(w)

        def value(t, x, forward=forward, frozen=frozen):
            return loss(t, frozen, x, forward)

        found = jaxprs.matrix_products(jax.make_jaxpr(jax.grad(value, (0, 1)))(trainable, s.x), s.sizes)
        require(not found, f"a dense product: multiply x by the factors one after the other. {_some(found)}")
        kept = jaxprs.computed_residuals(value, trainable, s.x)
        dense = [shape for shape in kept if sorted(shape[-2:]) == sorted(s.sizes)]
        require(not dense, f"kept for the backward pass: {dense}; wrap what computes it in jax.checkpoint")


def scan_does_not_restack_the_base(s: Subject) -> None:
    """The compiled gradient is the adapter's and nothing else, and the base's stack is only ever read."""
    layers = 16
    if s.row.dense_gradient or s.row.embedding or not s.trains:
        return
    w = jax.tree.map(
        lambda a: a if isinstance(a, Shared) else jnp.concatenate([a] * layers)[:layers],
        s.fresh,
        is_leaf=lambda a: isinstance(a, Shared),
    )
    trainable, frozen = split(w)
    x = jnp.ones((2, s.sizes[0]))
    step: Any = jax.jit(jax.grad(loss)).lower(trainable, frozen, x).compile()
    size, made = sum(a.nbytes for a in jax.tree.leaves(trainable)), step.memory_analysis().output_size_in_bytes
    require(size <= made < size + 512, f"the gradient has {made} bytes, the adapter {size}")
    stacks = (
        rf"= f32\[{layers},({s.sizes[0]},{s.sizes[1]}|{s.sizes[1]},{s.sizes[0]})\]\S* (?!parameter|get-tuple|bitcast)"
    )
    written = sorted({found[2] for found in re.finditer(stacks + r"([\w-]+)", step.as_text())})
    advice = "add what the factors make of x to x @ base, rather than the factors to the base"
    require(not written, f"a stack of the base's shape is written, by {_some(written)}: {advice}")


def _some(found: list[str]) -> str:
    """The first two, and how many more there are."""
    return "; ".join(found[:2]) + (f"; and {len(found) - 2} more" if len(found) > 2 else "")


def stray_products_raise(s: Subject) -> None:
    """jnp.dot, matmul and einsum raise at once: nothing builds the dense matrix silently."""
    require(not hasattr(s.stack, "__jax_array__"), "it defines __jax_array__, which JAX tries before __rmatmul__")
    for call in (jnp.dot, jnp.matmul, lambda x, w: jnp.einsum("bti,io->bto", x, w)):
        try:
            call(s.x, s.stack[0])  # type: ignore[arg-type]
        except (TypeError, ValueError):
            continue
        raise Broken("jnp.dot, jnp.matmul or jnp.einsum took it for an array")


def numpy_operand_defers(s: Subject) -> None:
    """A numpy array on the left hands over to x @ w."""
    same(np.asarray(s.x) @ s.stack[1], s.x @ s.stack[1], "a numpy x and a jax x", 1e-6)


def strip_returns_the_same_buffers(s: Subject) -> None:
    """Stripped, it is the base's own arrays, none copied."""
    held = {id(a) for a in jax.tree.leaves(s.stack)}
    bare = tree.strip({"w": s.stack})["w"]
    require(all(id(a) in held for a in jax.tree.leaves(bare)), "strip() copies or computes an array")
    left = [w for w in jax.tree.leaves(bare, is_leaf=tree.is_weight) if isinstance(w, Weight) and w.adapter]
    require(not left, f"strip() leaves {left}")
    again = zip(jax.tree.leaves(tree.strip(bare)), jax.tree.leaves(bare), strict=True)
    require(all(a is b for a, b in again), "stripping twice is not stripping once")


def axes_name_every_array(s: Subject) -> None:
    """axes() names as many logical axes for each array field as it has dimensions."""

    def check(w: Weight, names: tuple[str | None, ...]) -> None:
        axes = w.axes(names)
        for f in dataclasses.fields(w):  # type: ignore[arg-type]
            value = getattr(w, f.name)
            if weights.role(f) == weights.STATIC or value is None:
                continue
            require(f.name in axes, f"{type(w).__name__}.axes says nothing of {f.name}")
            if isinstance(value, Weight):
                check(value, axes[f.name])
            else:
                found = f"{type(w).__name__}.axes gives {axes[f.name]} for {f.name}, which has {value.ndim} dimensions"
                require(len(axes[f.name]) == value.ndim, found)

    check(s.stack, ("layers", "embed", "mlp"))


def one_compile_for_new_values(s: Subject) -> None:
    """Other values use the same compiled program: no value is static."""
    traced = []

    def network(x: jax.Array, w: Weight) -> jax.Array:
        traced.append(None)
        return scanned(x, w)

    apply = jax.jit(network)
    apply(s.x, s.stack)
    apply(s.x, jax.tree.map(lambda a: a * 2, s.stack))
    require(len(traced) == 1, "new values compile a new program: keep numbers out of static fields")


CHECKS: tuple[Callable[[Subject], None], ...] = (
    jit_scan_remat_and_indexing_agree,
    split_layers_equal_stacked,
    many_adapters_are_one_vmap,
    rows_of_a_batch_meet_their_own_adapter,
    eval_shape,
    partition_round_trip,
    flatten_and_unflatten_keep_paths,
    backward_holds_nothing_dense,
    scan_does_not_restack_the_base,
    stray_products_raise,
    numpy_operand_defers,
    strip_returns_the_same_buffers,
    axes_name_every_array,
    one_compile_for_new_values,
)
