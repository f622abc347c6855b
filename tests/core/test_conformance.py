"""What every Weight must do, whatever it is: one test per property, one row of `weights.ROWS` per kind."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from jaxft.core import tree, verbs
from jaxft.core import weight as weights
from jaxft.core.weight import Weight
from tests.core import jaxprs
from tests.core.weights import IN, LAYERS, OUT, ROWS, Row, matrix, split, trained

F32 = jnp.dtype("float32")
SIMPLE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=ROWS, ids=lambda name: name.replace(" ", "_").replace(",", ""))
def row(request) -> Row:
    return ROWS[request.param]


@functools.cache
def stack_of(name: str) -> Weight:
    return trained(ROWS[name].build(jax.random.key(0), F32), jax.random.key(7))


@pytest.fixture
def stack(row: Row) -> Weight:
    """A stack of layers, off its initialisation."""
    return stack_of(next(name for name, other in ROWS.items() if other is row))


@pytest.fixture
def x(key) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, 3), (2, 3, IN))


def has_trainable(w: Weight) -> bool:
    return bool(jax.tree.leaves(split(w)[0]))


def scanned(x: jax.Array, w: Weight, remat: bool = False) -> jax.Array:
    """A residual network over the stack: h + tanh(h @ w) for every layer, cut to the width of h."""

    def body(h, layer):
        return h + jnp.tanh(h @ layer)[..., :IN], None

    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, w)[0]


def loop(x: jax.Array, w: Weight) -> jax.Array:
    """The same network unrolled, by indexing layers."""
    for i in range(LAYERS):
        x = x + jnp.tanh(x @ w[i])[..., :IN]
    return x


def loss(trainable, frozen, x, forward=scanned):
    return jnp.mean(forward(x, tree.combine(trainable, frozen)) ** 2)


def test_identity_at_initialisation(row: Row, key, x):
    w = row.build(key, F32)
    if row.identity:
        chex.assert_trees_all_close(x @ w[1], x @ tree.strip(w)[1], rtol=1e-6, atol=1e-6)


def test_training_changes_it(row: Row, stack, key, x):
    if has_trainable(stack):
        before, after = (outputs(w[0], x) for w in (row.build(key, F32), stack))
        assert jnp.abs(after - before).max() > 1e-2


def outputs(w: Weight, x: jax.Array) -> jax.Array:
    """The product and, where the head is another matrix, its logits."""
    y = x @ w
    if isinstance(w, weights.Untied):
        y = jnp.concatenate([y, verbs.unembed(w, jnp.ones((*x.shape[:-1], OUT)))], -1)
    return y


def test_shape_and_dtype(stack):
    chex.assert_shape(verbs.dense(stack), stack.shape)
    assert stack.shape == (LAYERS, IN, OUT) and stack.ndim == 3 and stack.dtype == F32
    assert verbs.dense(stack).dtype == F32
    assert stack[0].shape == (IN, OUT) == verbs.dense(stack[0]).shape


def test_product_equals_dense(row: Row, stack, x):
    if row.matrix:
        constant = jnp.zeros_like(x) @ stack[1]
        chex.assert_trees_all_close(x @ stack[1], x @ verbs.dense(stack[1]) + constant, **SIMPLE)


def test_dense_of_a_layer_is_the_layer_of_dense(stack):
    chex.assert_trees_all_close(verbs.dense(stack[2]), verbs.dense(stack)[2], **SIMPLE)


def test_gradients_equal_dense_autodiff(row: Row, stack, x):
    """Of the trained fields and of the input, through ``x @ w`` and through ``x @ dense(w)``."""
    if not (row.matrix and has_trainable(stack)):
        return
    trainable, frozen = split(stack[1])

    def value(trainable, x, multiply):
        w = tree.combine(trainable, frozen)
        constant = jnp.zeros_like(x) @ w
        return jnp.sum(jnp.sin(multiply(x, w, constant)))

    mine = jax.grad(value, (0, 1))(trainable, x, lambda x, w, c: x @ w)
    theirs = jax.grad(value, (0, 1))(trainable, x, lambda x, w, c: x @ verbs.dense(w) + c)
    chex.assert_trees_all_close(mine, theirs, **SIMPLE)


def test_jit_scan_remat_and_indexing_agree(stack, x):
    eager = loop(x, stack)
    chex.assert_trees_all_close(jax.jit(loop)(x, stack), eager, **SIMPLE)
    chex.assert_trees_all_close(scanned(x, stack), eager, **SIMPLE)
    chex.assert_trees_all_close(scanned(x, stack, remat=True), eager, **SIMPLE)
    if has_trainable(stack):
        parts = split(stack)
        plain, remat, unrolled = (
            jax.jit(jax.grad(lambda t, f, forward=forward: loss(t, f, x, forward)))(*parts)
            for forward in (scanned, lambda x, w: scanned(x, w, remat=True), loop)
        )
        chex.assert_trees_all_close(plain, remat, **SIMPLE)
        chex.assert_trees_all_close(plain, unrolled, **SIMPLE)


def test_split_layers_equal_stacked(stack, x):
    held = tree.split_layers({"layers": stack})["layers"]
    chex.assert_trees_all_close(loop(x, held), loop(x, stack), **SIMPLE)
    chex.assert_trees_all_equal(tree.stack_layers(held), stack)
    if has_trainable(stack):
        assert tree.count(tree.partition(held, tree.trainable_mask(held))[0]) == tree.count(split(stack)[0])
    chex.assert_trees_all_close(loop(x, tree.merge(held)), loop(x, stack), rtol=1e-4, atol=1e-4)


def test_many_adapters_are_one_vmap(stack, x):
    """The trainable part batched, the frozen part not: equal to a loop, and no copy of the base for each adapter."""
    if not has_trainable(stack):
        return
    n = 4
    trainable, frozen = split(stack[1])
    many = jax.tree.map(lambda p: jnp.stack([p * (1 + i) for i in range(n)]), trainable)
    xs = jnp.stack([x + i for i in range(n)])

    def apply(trainable, x):
        return x @ tree.combine(trainable, frozen)

    batched = jax.vmap(apply)(many, xs)
    chex.assert_trees_all_close(
        batched, jnp.stack([apply(jax.tree.map(lambda p, i=i: p[i], many), xs[i]) for i in range(n)]), **SIMPLE
    )
    given = {p.shape for p in jax.tree.leaves(many)}
    for eqn in jaxprs.equations(jax.make_jaxpr(jax.vmap(apply))(many, xs)):
        for v in eqn.outvars:
            assert v.aval.shape != (n, IN, OUT) or v.aval.shape in given, f"the base is copied for each adapter: {eqn}"


def test_eval_shape(row: Row, key, x):
    """Built and used without a single array."""
    w = jax.eval_shape(lambda k: row.build(k, F32), key)
    assert w.shape == (LAYERS, IN, OUT) and w.dtype == F32
    out = jax.eval_shape(scanned, x, w)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    assert tree.count(w) == tree.count(row.build(key, F32))


def test_partition_round_trip(stack):
    """The very same arrays come back, and the two parts have nothing in common."""
    trainable, frozen = split(stack)
    whole = tree.combine(trainable, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(stack)
    assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(stack), strict=True))
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(stack))


def test_flatten_and_unflatten_keep_paths(stack):
    leaves, treedef = jax.tree.flatten(stack)
    assert jax.tree.structure(jax.tree.unflatten(treedef, leaves)) == treedef
    names = [path for path, _ in tree.paths({"layers": {"q": stack}})]
    assert len(set(names)) == len(names) and all(name.startswith("layers/q/") for name in names)
    assert repr(stack).startswith(type(stack).__name__) and "[3,10,14]" in repr(stack)
    jax.tree.map(lambda _: None, stack)  # tree operations rebuild the class with things that are not arrays


def test_save_and_restore(stack, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"w": stack})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: {"w": stack}))
    chex.assert_trees_all_equal(restored, {"w": stack})
    assert jax.tree.structure(restored) == jax.tree.structure({"w": stack})


def test_backward_holds_nothing_dense(row: Row, stack, x):
    """From the jaxpr: no product the shape of the weight, and nothing of that shape computed and kept.

    A weight trained whole has its dense gradient, but keeps nothing computed either."""
    if not has_trainable(stack):
        return
    for forward, w in ((scanned, stack), (loop, tree.split_layers({"layers": stack})["layers"])):
        trainable, frozen = split(w)

        def value(t, x, forward=forward, frozen=frozen):
            return loss(t, frozen, x, forward)

        if not row.dense_gradient:
            found = jaxprs.matrix_products(jax.make_jaxpr(jax.grad(value, (0, 1)))(trainable, x), (IN, OUT))
            assert not found, "\n".join(found)
        kept = jaxprs.computed_residuals(value, trainable, x)
        dense = [shape for shape in kept if sorted(shape[-2:]) == sorted((IN, OUT))]
        assert row.dense_gradient or not dense, dense


def test_scan_does_not_restack_the_base(row: Row, key):
    """The compiled step returns the adapter and nothing else, and needs no temporary the size of the base's stack."""
    layers = 16
    if row.dense_gradient or row.embedding or not has_trainable(row.build(key, F32)):
        return
    w = jax.tree.map(lambda a: jnp.concatenate([a] * layers)[:layers], row.build(key, F32))
    trainable, frozen = split(w)
    x = jnp.ones((2, IN))
    step = jax.jit(jax.grad(loss)).lower(trainable, frozen, x).compile().memory_analysis()
    size = sum(a.nbytes for a in jax.tree.leaves(trainable))
    base = layers * IN * OUT * 4
    assert size <= step.output_size_in_bytes < size + 512, (step.output_size_in_bytes, size)
    assert step.temp_size_in_bytes < size + base, (step.temp_size_in_bytes, size, base)


@pytest.mark.parametrize("call", [jnp.dot, jnp.matmul, lambda x, w: jnp.einsum("bti,io->bto", x, w)])
def test_stray_dot_raises(stack, x, call):
    """Nothing silently builds the dense matrix."""
    with pytest.raises(TypeError):
        call(x, stack[0])
    with pytest.raises((TypeError, ValueError)):
        jnp.asarray(stack[0])
    assert not hasattr(stack, "__jax_array__")


def test_numpy_operand_defers(stack, x):
    import numpy as np

    chex.assert_trees_all_close(np.asarray(x) @ stack[1], x @ stack[1], rtol=1e-6, atol=1e-6)


def test_take_and_unembed_equal_dense(row: Row, stack):
    """Values, and gradients of the trained fields."""
    if not row.embedding:
        return
    ids = jnp.array([[0, 3, IN - 1], [3, 3, 1]])
    features = jax.random.normal(jax.random.key(5), (2, 3, OUT))
    trainable, frozen = split(stack[1])

    def value(t, take, unembed):
        w = tree.combine(t, frozen)
        return jnp.sum(jnp.sin(take(w))) + jnp.sum(jnp.sin(unembed(w)))

    def mine(t):
        return value(t, lambda w: verbs.take(w, ids), lambda w: verbs.unembed(w, features))

    def theirs(t):
        return value(t, lambda w: verbs.dense(w)[ids], lambda w: features @ head_matrix(w).T)

    chex.assert_trees_all_close(verbs.take(stack[1], ids), verbs.dense(stack[1])[ids], **SIMPLE)
    chex.assert_trees_all_close(verbs.unembed(stack[1], features), features @ head_matrix(stack[1]).T, **SIMPLE)
    chex.assert_trees_all_close(jax.grad(mine)(trainable), jax.grad(theirs)(trainable), **SIMPLE)


def head_matrix(w: Weight) -> jax.Array:
    """What a tied head reads: its own matrix, the trained embedding, or the original one."""
    if isinstance(w, weights.Untied):
        return verbs.dense(w.head)
    return verbs.dense(w) if w.tied else verbs.dense(tree.strip(w))


def test_ragged_dot_equals_each_expert(row: Row, stack):
    if not row.experts:
        return
    sizes = jnp.array([4, 0, 3])
    x = jax.random.normal(jax.random.key(2), (7, IN))
    expected = jnp.concatenate([x[:4] @ stack[0], x[4:] @ stack[2]])
    chex.assert_trees_all_close(verbs.ragged_dot(x, stack, sizes), expected, **SIMPLE)


def test_bf16_model_with_f32_adapters(row: Row, key):
    """Products keep the dtype of the activations and agree with float32 to bf16's accuracy (8 bits, a few ulp)."""
    w = trained(row.build(key, jnp.dtype("bfloat16")), key)
    assert w.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves(split(w)[0])} <= {F32}
    x = jax.random.normal(key, (4, IN)).astype(jnp.bfloat16)
    y = x @ w[1]
    assert y.dtype == jnp.bfloat16
    full = jax.tree.map(lambda a: a.astype(F32) if jnp.issubdtype(a.dtype, jnp.inexact) else a, w[1])
    truth = x.astype(F32) @ full
    scale = jnp.abs(truth).max()
    assert jnp.abs(y.astype(F32) - truth).max() <= 4 * 2.0**-8 * scale
    assert verbs.dense(w).dtype == jnp.bfloat16
    if row.embedding:
        assert verbs.take(w[1], jnp.array([1, 2])).dtype == jnp.bfloat16
        assert verbs.unembed(w[1], jnp.ones((2, OUT), jnp.bfloat16)).dtype == jnp.bfloat16
    if row.experts:
        assert verbs.ragged_dot(x, w, jnp.array([1, 2, 1])).dtype == jnp.bfloat16


def test_merge_equals_unmerged(row: Row, stack, x):
    """Merging twice is merging once; what is left has no adapter."""
    merged = tree.merge({"layers": {"q": stack}})
    chex.assert_trees_all_close(x @ tree.layer(merged, 1)["layers"]["q"], x @ stack[1], **SIMPLE)
    left = jax.tree.leaves(merged, is_leaf=tree.is_weight)
    assert not any(w.adapter for w in left if isinstance(w, Weight))
    chex.assert_trees_all_equal(tree.merge(merged), merged)
    if row.embedding:
        m, features = merged["layers"]["q"], jnp.ones((2, OUT))
        m = m[1]
        chex.assert_trees_all_close(verbs.take(m, jnp.array([2])), verbs.take(stack[1], jnp.array([2])), **SIMPLE)
        if isinstance(stack, weights.Untied) or stack.tied is not None:
            chex.assert_trees_all_close(verbs.unembed(m, features), verbs.unembed(stack[1], features), **SIMPLE)


def test_merge_in_bf16_rounds_once(row: Row, key):
    """The merged matrix is that of float32 arithmetic on the stored numbers, rounded; once for each adapter."""
    w = trained(row.build(key, jnp.dtype("bfloat16")), key)
    merged = verbs.dense(tree.merge({"w": w})["w"])
    truth = verbs.dense(tree.cast(w, F32))
    assert merged.dtype == jnp.bfloat16
    if repr(w).count("LoRAWeight") > 1:
        chex.assert_trees_all_close(merged.astype(F32), truth, rtol=2 * 2.0**-8, atol=2.0**-8)
    else:
        chex.assert_trees_all_equal(merged, truth.astype(jnp.bfloat16))


def test_strip_returns_the_same_buffers(stack):
    """Nothing is copied: each array of the stripped weight is one that the wrapped weight holds."""
    held = {id(a) for a in jax.tree.leaves(stack)}
    bare = tree.strip({"w": stack})["w"]
    assert all(id(a) in held for a in jax.tree.leaves(bare))
    assert not any(w.adapter for w in jax.tree.leaves(bare, is_leaf=tree.is_weight) if isinstance(w, Weight))
    again = tree.strip(bare)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(bare), strict=True))


def test_axes_name_every_array(stack):
    """Each array field's logical axes are as many as its dimensions."""

    def check(w, names):
        axes = w.axes(names)
        for f in dataclasses.fields(w):
            value = getattr(w, f.name)
            if weights.role(f) == weights.STATIC or value is None:
                continue
            assert f.name in axes, f"{type(w).__name__}.axes says nothing of {f.name}"
            if isinstance(value, Weight):
                check(value, axes[f.name])
            else:
                assert len(axes[f.name]) == value.ndim, (type(w).__name__, f.name)

    check(stack, ("layers", "embed", "mlp"))


def test_cast_leaves_adapters_alone(stack):
    half = tree.cast({"w": stack}, jnp.bfloat16)["w"]
    assert half.dtype == jnp.bfloat16
    for (path, was), (_, now) in zip(tree.paths(stack), tree.paths(half), strict=True):
        own = path.split("/")[-1] in ("base", "bias", "head") and "value" not in path
        assert now.dtype == (jnp.bfloat16 if own else was.dtype), path


def test_unshard_changes_nothing(stack, x):
    chex.assert_trees_all_equal(verbs.unshard(stack), stack)


def test_one_compile_for_new_values(stack, x):
    """Values are no part of the jit key: other numbers, same program."""
    apply = jax.jit(lambda x, w: scanned(x, w))
    apply(x, stack)
    apply(x, jax.tree.map(lambda a: a * 2, stack))
    assert apply._cache_size() == 1


def test_plain_arrays_pass_the_same_doors(key, x):
    w = matrix(key, F32)
    chex.assert_trees_all_close(verbs.dense(w), w)
    chex.assert_trees_all_close(loop(x, w), scanned(x, w), **SIMPLE)
    assert verbs.unshard(w) is w
