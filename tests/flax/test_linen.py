"""Methods on linen models: the same numbers as the plain model that merging gives, and nothing dense on the way."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

import jaxft
from jaxft.core import tree
from jaxft.core.weight import NotMergeable
from jaxft.flax import linen
from jaxft.flax.kernel import Kernel
from jaxft.peft import METHODS, LoRA
from jaxft.peft.disk import AdapterError
from jaxft.testing import jaxprs
from tests.flax.linen_models import CASES, Transformer, ids, methods_that_wrap, numbers

KEY = jax.random.key(1)
cases = pytest.mark.parametrize("name", CASES)


@functools.cache
def plain(name: str):
    case = CASES[name]
    return jax.jit(case.model.init)(jax.random.key(0), case.example())


@functools.cache
def adapted(name: str):
    case = CASES[name]
    config = LoRA(rank=2, targets=case.targets)
    return jax.jit(lambda v: linen.adapt(case.model, v, KEY, config, case.example()))(plain(name))


@functools.partial(jax.jit, static_argnames="by")
def moved(variables, by=0.3):
    """Adapters away from the identity."""
    trainable, frozen = jaxft.partition(variables, jaxft.trainable_mask(variables))
    drawn = jax.tree.map(lambda a: a + by * jax.random.normal(KEY, a.shape), trainable)
    return jaxft.combine(drawn, frozen)


def kernels(variables) -> dict[str, Kernel]:
    return {path: w for path, w in tree.paths(variables["params"], inside=False) if isinstance(w, Kernel)}


def merged(model, variables, *args, **kwargs):
    """What the plain model gives with the adapters folded in."""
    return model.apply(linen.merge(variables), *args, **kwargs)


def losses(name: str):
    """Of the trainable arrays: through the adapters, and through the merged model."""
    case, variables = CASES[name], moved(adapted(name))
    trainable, frozen = jaxft.partition(variables, jaxft.trainable_mask(variables))

    def loss(run, trainable):
        return jnp.square(run(case.model, jaxft.combine(trainable, frozen), case.example())).sum()

    return trainable, functools.partial(loss, linen.apply), functools.partial(loss, merged)


@functools.cache
def results(name: str):
    """Everything that is computed of a case, in one program."""
    case, x = CASES[name], CASES[name].example()
    trainable, factored, dense = losses(name)

    @jax.jit
    def program(base, start, variables, trainable):
        return {
            "base": case.model.apply(base, x),
            "start": linen.apply(case.model, start, x),
            "trained": linen.apply(case.model, variables, x),
            "merged": merged(case.model, variables, x),
            "stripped": linen.strip(variables),
            "gradients": jax.grad(factored)(trainable),
            "dense gradients": jax.grad(dense)(trainable),
        }

    return program(plain(name), adapted(name), moved(adapted(name)), trainable)


@cases
def test_what_is_adapted_and_in_which_shape(name):
    assert {path: w.base.a.shape for path, w in kernels(adapted(name)).items()} == CASES[name].adapted


@cases
def test_starts_as_the_model_and_strips_to_it(name):
    chex.assert_trees_all_close(results(name)["start"], results(name)["base"], atol=1e-6)
    chex.assert_trees_all_equal(results(name)["stripped"], plain(name))


@cases
def test_equals_the_merged_model(name):
    found = results(name)
    chex.assert_trees_all_close(found["trained"], found["merged"], atol=2e-5)
    assert float(jnp.abs(found["trained"] - found["base"]).max()) > 1e-2


@cases
def test_gradients_are_those_of_the_merged_model(name):
    chex.assert_trees_all_close(results(name)["gradients"], results(name)["dense gradients"], rtol=1e-4, atol=1e-4)


@cases
def test_nothing_dense_is_made(name):
    trainable, factored, dense = losses(name)
    program, other = (jax.make_jaxpr(jax.grad(loss))(trainable) for loss in (factored, dense))
    for path, w in kernels(adapted(name)).items():
        assert not jaxprs.matrix_products(program, w.base.shape[-2:]), path
        assert jaxprs.matrix_products(other, w.base.shape[-2:]), path  # so the check can fail


def test_layers_of_a_scan_are_not_copied():
    """The stacks go into the scans of a step and none comes out."""
    trainable, factored, _ = losses("transformer")
    program = jax.make_jaxpr(jax.grad(factored))(trainable)
    stacks = {w.base.base.base.shape for w in kernels(adapted("transformer")).values() if w.base.ndim > 2}
    outputs = {v.aval.shape for eqn in jaxprs.equations(program) if eqn.primitive.name == "scan" for v in eqn.outvars}
    assert len(stacks) == 4 and not stacks & outputs


def test_buffers_are_shared():
    base = plain("mlp")
    variables = linen.adapt(CASES["mlp"].model, base, KEY, LoRA(rank=2), CASES["mlp"].example())
    assert all(a is b for a, b in zip(jax.tree.leaves(linen.strip(variables)), jax.tree.leaves(base), strict=True))
    assert variables["params"]["split"]["kernel"].base.base.base is base["params"]["split"]["kernel"]


class Wide(nn.Module):
    """Wide enough for every method's defaults: a bias, an output of two axes, an input of two axes."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64, bias_init=nn.initializers.normal(), name="biased")(x)
        x = nn.DenseGeneral((4, 16), use_bias=False, name="split")(nn.tanh(x))
        return nn.DenseGeneral(64, axis=(-2, -1), bias_init=nn.initializers.normal(), name="join")(x)


@pytest.mark.parametrize("method", methods_that_wrap())
def test_every_method(method):
    """Equal to the merged model, biases included; a method that cannot be merged says where."""
    model, x, config = Wide(), numbers(4, 64), METHODS[method].config(targets=("biased", "split", "join"))

    @jax.jit
    def program(base):
        variables = moved(linen.adapt(model, base, KEY, config, x), by=0.05)
        mergeable = all(w.base.mergeable for w in kernels(variables).values())
        return variables, linen.apply(model, variables, x), merged(model, variables, x) if mergeable else None

    base = model.init(KEY, x)
    variables, got, plainly = program(base)
    assert float(jnp.abs(got - model.apply(base, x)).max()) > 1e-3
    if plainly is not None:
        chex.assert_trees_all_close(got, plainly, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(NotMergeable, match=r"(biased|split|join)/kernel"):
            linen.merge(variables)


def test_a_map_on_the_output_sees_the_bias():
    def around(model, base, x, targets):
        made = linen.adapt(model, base, KEY, METHODS["ia3"].config(targets=targets), x)
        return made, {path: w.bias for path, w in kernels(made).items()}

    _, biases = around(CASES["mlp"].model, plain("mlp"), CASES["mlp"].example(), ("twice", "split"))
    assert biases == {"twice/kernel": "twice/bias", "split/kernel": None}
    case = CASES["einmix"]  # whose product is transposed before the bias is added
    made, biases = around(case.model, plain("einmix"), case.example(), ("weight",))
    assert biases == {"weight": "bias"}
    doubled = jax.tree.map(lambda a: 2.0 * a, (part := jaxft.partition(made, jaxft.trainable_mask(made)))[0])
    got = linen.apply(case.model, jaxft.combine(doubled, part[1]), case.example())
    chex.assert_trees_all_close(got, 2.0 * case.model.apply(plain("einmix"), case.example()), atol=1e-5)


def test_a_constant_of_an_adapter_is_merged_into_the_bias():
    """Alone, and on either side of a map on the output; where no bias can take it, merging is refused."""
    case, lora = CASES["mlp"], LoRA(rank=2, lora_bias=True, targets=("twice", "join"))
    around = METHODS["ia3"].config(targets=("twice",))
    for methods in (lora, [lora, around], [around, lora]):
        variables = moved(linen.adapt(case.model, plain("mlp"), KEY, methods, case.example()))
        got = linen.apply(case.model, variables, case.example())
        chex.assert_trees_all_close(got, merged(case.model, variables, case.example()), atol=2e-5)
        chex.assert_trees_all_equal(linen.strip(variables), plain("mlp"))

    class Sometimes(nn.Module):
        @nn.compact
        def __call__(self, x):
            w, b = self.param("w", nn.initializers.ones, (4, 4)), self.param("b", nn.initializers.ones, (4,))
            return nn.tanh(x @ w + b) @ w * 2.0

    for model, x, target in ((case.model, case.example(), "out"), (Sometimes(), numbers(2, 4), "w")):
        config = LoRA(rank=2, lora_bias=True, targets=(target,))
        variables = moved(linen.adapt(model, model.init(KEY, x), KEY, config, x))
        with pytest.raises(NotMergeable, match=rf"{target}.*adds a constant.* no bias"):
            linen.merge(variables)


def test_a_training_step_moves_only_the_adapter():
    case = CASES["transformer"]
    trainable, frozen = jaxft.partition(adapted("transformer"), jaxft.trainable_mask(adapted("transformer")))
    optimizer = optax.adam(1e-2)

    def loss(trainable):
        logits = linen.apply(case.model, jaxft.combine(trainable, frozen), ids())
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids()[:, 1:]).mean()

    @jax.jit
    def step(trainable, state):
        value, gradients = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = optimizer.init(trainable), []
    for _ in range(5):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
    assert tree.count(trainable) == 3 * (4 * 2 * 16 + 2 * 2 * 20) + 2 * 19


def test_lists_compose_and_layers_are_chosen():
    case = CASES["transformer"]
    first = LoRA(rank=2, targets=("query", "value"), layers=(0, 2))
    methods = [first, LoRA(rank=1, targets=("query",)), METHODS["houlsby"].config(targets=("out",))]
    variables = moved(linen.adapt(case.model, plain("transformer"), KEY, methods, ids()))
    found = kernels(variables)
    assert found["layers/attention/value/kernel"].base.adapted.tolist() == [True, False, True]
    assert found["layers/attention/query/kernel"].base.base.a.shape == (3, 8, 2)
    again = linen.adapt(case.model, variables, KEY, LoRA(rank=3, targets=("value",)), ids())
    run = jax.jit(linen.apply, static_argnums=0)
    chex.assert_trees_all_close(run(case.model, again, ids()), run(case.model, variables, ids()), atol=1e-5)


def test_the_call_is_flax_own(key):
    """Mutable collections, dropout keys, other methods and static arguments go where model.apply sends them."""
    settings = {
        "convolutions": (numbers(2, 6, 6, 4), {"train": True, "mutable": ["batch_stats"]}),
        "transformer": (ids(), {"deterministic": False, "rngs": {"dropout": key}}),
    }
    for name, (x, kwargs) in settings.items():
        model = CASES[name].model
        got = jax.jit(lambda v, x=x, kwargs=kwargs, model=model: linen.apply(model, v, x, **kwargs))(adapted(name))
        expected = jax.jit(lambda v, x=x, kwargs=kwargs, model=model: model.apply(v, x, **kwargs))(plain(name))
        chex.assert_trees_all_close(got, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_adapter_dropout_follows_the_dropout_key(name, key):
    case = CASES[name]
    config = LoRA(rank=2, dropout=0.5, targets=case.targets)
    variables = moved(linen.adapt(case.model, plain(name), KEY, config, case.example()))
    run = functools.partial(linen.apply, case.model, variables, case.example())
    still, first, second = run(), run(rngs={"dropout": key}), run(rngs={"dropout": key})
    chex.assert_trees_all_equal(first, second)
    assert float(jnp.abs(first - still).max()) > 1e-2
    chex.assert_trees_all_close(still, case.model.apply(linen.merge(variables), case.example()), atol=1e-5)


def test_bfloat16_computation_keeps_float32_parameters():
    model = Transformer(jnp.bfloat16)
    variables = moved(linen.adapt(model, plain("transformer"), KEY, LoRA(rank=2, targets=("query", "up")), ids()))
    run, fold = jax.jit(linen.apply, static_argnums=0), jax.jit(merged, static_argnums=0)
    got, folded, exact = (
        run(model, variables, ids()),
        fold(model, variables, ids()),
        fold(Transformer(), variables, ids()),
    )
    assert got.dtype == folded.dtype == jnp.bfloat16
    assert float(jnp.abs(got - exact).max()) < 2 * float(jnp.abs(folded - exact).max())


def test_an_example_may_be_shapes_only():
    case = CASES["mlp"]
    shape = jax.ShapeDtypeStruct((4, 6), jnp.float32)
    got = linen.adapt(case.model, plain("mlp"), KEY, LoRA(rank=2), shape)
    chex.assert_trees_all_equal(got, adapted("mlp"))


def test_the_precision_and_result_that_the_model_asks_for():
    """bfloat16 operands and a float32 result, summed in float32: at the start exactly the model."""

    class Wider(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(), (64, 32), jnp.bfloat16)
            return jnp.einsum("bi,io->bo", x, w, preferred_element_type=jnp.float32, precision="highest")

    model, x = Wider(), numbers(3, 64).astype(jnp.bfloat16)
    variables = model.init(KEY, x)
    made = linen.adapt(model, variables, KEY, LoRA(rank=2), x)
    got = jax.make_jaxpr(lambda v: linen.apply(model, v, x))(made)
    assert (
        next(
            eqn.params["preferred_element_type"] for eqn in jaxprs.equations(got) if eqn.primitive.name == "dot_general"
        )
        == jnp.float32
    )
    chex.assert_trees_all_equal(linen.apply(model, made, x), model.apply(variables, x))


class Odd(nn.Module):
    """Parameters that make no matrix: normalised, in groups, joined."""

    @nn.compact
    def __call__(self, x):
        x = nn.WeightNorm(nn.Dense(4, name="normed"))(x)
        x = nn.Conv(4, (2,), feature_group_count=2, name="grouped")(x)
        w = self.param("w", nn.initializers.ones, (4, 4))
        return nn.Dense(3, name="fine")(x @ jnp.concatenate([w, w]).T)


def test_refusals():
    model, x = Odd(), numbers(2, 5, 4)
    variables = model.init(KEY, x)

    def adapt(**settings):
        return linen.adapt(model, variables, KEY, LoRA(rank=2, **settings), x)

    assert set(kernels(adapt())) == {"fine/kernel"}
    for target, user in {"normed": "mul", "grouped": "conv_general_dilated", "w": "concatenate"}.items():
        with pytest.raises(ValueError, match=rf"peft.targets: .*fine.*{target}.* goes into '{user}'"):
            adapt(targets=(target,))
    with pytest.raises(ValueError, match=r"modules_to_save.*trainable_mask"):
        adapt(modules_to_save=("fine",))
    with pytest.raises(ValueError, match=r"layers.*stack of one layer"):
        adapt(layers=(0,))
    with pytest.raises(TypeError, match="wraps weights"):
        linen.adapt(model, variables, KEY, jaxft.peft.Full(), x)
    with pytest.raises(TypeError, match="select='bitfit'"):
        linen.adapt(model, variables, KEY, METHODS["bitfit"].config(), x)
    with pytest.raises(TypeError, match="AdaLoRA, which changes its parameters in every training step"):
        linen.adapt(model, variables, KEY, jaxft.peft.AdaLoRA(), x)
    with pytest.raises(ValueError, match="embed is an embedding, which VeRA cannot adapt"):
        linen.adapt(Transformer(), plain("transformer"), KEY, METHODS["vera"].config(targets=("embed",)), ids())
    for init in ("eva", "corda", "loftq", "qpissa"):
        with pytest.raises(ValueError, match=rf"peft.init: got '{init}'.*such as pissa"):
            adapt(init=init)


@pytest.mark.parametrize("method", methods_that_wrap())
def test_every_method_on_convolutions(method):
    """Those that only multiply their input; the others are refused by name."""
    model, x = nn.Sequential([nn.Conv(64, (3,), strides=2)]), numbers(2, 6, 64)
    settings = {"rank": 2} if method in ("loha", "shira") else {}
    config, base = METHODS[method].config(targets=("layers_0",), **settings), model.init(KEY, x)
    if method in ("oft", "boft", "hra", "lokr", "miss"):
        with pytest.raises(TypeError, match=rf"(?i)layers_0/kernel, used as a window: {method}Weight .*leave it out"):
            linen.adapt(model, base, KEY, config, x)
        return

    @jax.jit
    def program(base):
        variables = moved(linen.adapt(model, base, KEY, config, x), by=0.05)
        mergeable = all(w.base.mergeable for w in kernels(variables).values())
        return linen.apply(model, variables, x), merged(model, variables, x) if mergeable else None

    got, plainly = program(base)
    assert float(jnp.abs(got - model.apply(base, x)).max()) > 1e-3
    if plainly is not None:
        chex.assert_trees_all_close(got, plainly, rtol=1e-4, atol=1e-4)


def test_an_example_of_another_method():
    class Two(nn.Module):
        def setup(self):
            self.embed, self.dense = nn.Embed(11, 4), nn.Dense(3)

        def __call__(self, ids):
            return self.embed(ids)

        def score(self, ids):
            return self.dense(self(ids))

    model = Two()
    variables = model.init(KEY, ids(), method="score")
    made = linen.adapt(model, variables, KEY, LoRA(rank=2), ids(), method="score")
    assert set(kernels(made)) == {"dense/kernel"}
    chex.assert_trees_all_equal(linen.apply(model, made, ids()), model.apply(variables, ids()))


def test_another_call_that_uses_an_adapted_parameter_otherwise_is_refused():
    class Two(nn.Module):
        def setup(self):
            self.dense = nn.Dense(4)

        def __call__(self, x):
            return self.dense(x)

        def norm(self, x):
            return jnp.square(self.dense.variables["params"]["kernel"]).sum() + self.dense(x).sum()

    model, x = Two(), numbers(2, 3)
    variables = linen.adapt(model, model.init(KEY, x), KEY, LoRA(rank=2), x)
    with pytest.raises(TypeError, match=r"dense/kernel is adapted.*'square'"):
        linen.apply(model, variables, x, method="norm")


def test_a_bias_that_is_only_sometimes_added_is_refused_under_a_map_on_the_output():
    class Sometimes(nn.Module):
        @nn.compact
        def __call__(self, x):
            w, b = self.param("w", nn.initializers.ones, (4, 4)), self.param("b", nn.initializers.ones, (4,))
            return nn.tanh(x @ w + b) @ w * 2.0

    model, x = Sometimes(), numbers(2, 4)
    variables = model.init(KEY, x)
    linen.adapt(model, variables, KEY, LoRA(rank=2), x)
    with pytest.raises(TypeError, match=r"w is adapted by a map on its output, b included.* 'mul' first"):
        linen.adapt(model, variables, KEY, METHODS["ia3"].config(targets=("w",)), x)


def test_merging_numbers_that_are_not_finite_is_refused():
    broken = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan) if a.shape == (6, 2) else a, adapted("mlp"))
    with pytest.raises(ValueError, match="not finite"):
        linen.merge(broken)


def test_saved_and_loaded(tmp_path):
    """On the plain variables, whatever the method: nothing has to be adapted again."""
    for name in ("transformer", "t5", "partitioned"):
        variables = moved(adapted(name))
        linen.save(variables, tmp_path / name)
        loaded = linen.load(plain(name), tmp_path / name)
        chex.assert_trees_all_equal(loaded, variables)
        assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    several = [METHODS["houlsby"].config(targets=("twice",)), METHODS["vera"].config(targets=("twice", "out"), rank=3)]
    variables = linen.adapt(CASES["mlp"].model, plain("mlp"), KEY, several, CASES["mlp"].example())
    linen.save(variables, tmp_path / "several")
    chex.assert_trees_all_equal(linen.load(plain("mlp"), tmp_path / "several"), variables)
    with pytest.raises(AdapterError, match=r"adapter of .*/kernel.*made for another model"):
        linen.load(plain("t5"), tmp_path / "several")
    with pytest.raises(AdapterError, match="not empty"):
        linen.save(variables, tmp_path / "several")
