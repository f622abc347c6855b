"""Parameter-efficient methods on any `flax.nnx` model, and a jaxft model as an NNX module.

    model = jaxft.flax.nnx.adapt(model, key, LoRA(rank=8), x)                            # x: an example input
    optimizer = nnx.Optimizer(model, optax.adamw(2e-4), wrt=jaxft.flax.nnx.Adapter)      # and nnx.DiffState(0, Adapter)
    y = model(x)                                                                         # adapters in effect
    model = jaxft.flax.nnx.merge(model)                                                  # a plain model again

`Adapted` holds the model as it is and beside it, by the path of the parameter, the arrays of each adapter: those that
train are `Adapter` variables, the others `Constant`, so that filters tell them from the model's own.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxft.core import tree
from jaxft.flax import adapt as adapting
from jaxft.flax.kernel import Kernel, rebased


class Adapter(nnx.Variable):
    """An array that an adapter trains."""


class Constant(nnx.Variable):
    """An array of an adapter that does not train: a scale, a rank, a random projection."""


class Fields(nnx.Module):
    """The arrays of one adapted parameter, by their path in its `Kernel`."""

    def __init__(self, kernel: Kernel):
        hollow = rebased(kernel, None)
        leaves, self.structure = jax.tree.flatten(hollow)
        trains = jax.tree.leaves(tree.trainable_mask({"": hollow}))
        self.arrays = nnx.Dict({
            path: (Adapter if train else Constant)(leaf)
            for (path, _), leaf, train in zip(tree.paths(hollow), leaves, trains, strict=True)
        })
        self.names = tuple(path for path, _ in tree.paths(hollow))

    def kernel(self, array: Any) -> Kernel:
        """The adapted parameter on the model's own array."""
        return rebased(self.structure.unflatten([self.arrays[n].get_value() for n in self.names]), array)


class Adapted(nnx.Module):
    """A model with adapters in effect. Called like the model; its methods and data are the model's.

    ``model`` is the model without them. ``deterministic`` (set by ``train`` and ``eval``): whether an adapter's own
    dropout is off."""

    def __init__(self, model: nnx.Module, kernels: dict[str, Kernel], key: jax.Array):
        self.model = model
        self.adapters = nnx.Dict({path: Fields(kernel) for path, kernel in kernels.items()})
        self.rngs = nnx.Rngs(dropout=key)
        self.deterministic = False
        keyed = tree.dropout_keys(kernels, key)
        self.drops = jax.tree.structure(keyed) != jax.tree.structure(kernels)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self, "__call__", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "model" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        value = getattr(self.model, name)
        if inspect.ismethod(value):
            return functools.partial(_run, self, name)
        if any(isinstance(part, nnx.Module) for part in jax.tree.leaves(value, is_leaf=_is_module)):
            raise AttributeError(
                f"{name!r} is a part of the model, which by itself does not see the adapters; expected a method or "
                f"data. Call the adapted model, adapt that part alone, or take .model.{name} without adapters."
            )
        return value


def adapt(model: nnx.Module, key: jax.Array, method: Any, *args: Any, **kwargs: Any) -> Adapted:
    """The model with one method, or a list of them in order, on the parameters that its ``targets`` select.

    ``args`` and ``kwargs`` are an example of a call (arrays may be ShapeDtypeStructs): which axes of a parameter are
    inputs and outputs is read off what the call does with it. Targets are names of modules (or of a parameter that is
    not called kernel or embedding), endings of them, a regex, or all-linear. The model's parameters are shared.
    Raises ValueError naming a target that selects nothing."""
    bare, params = (model.model, _params(model)) if isinstance(model, Adapted) else (model, _own_params(model))
    filled, arrays = adapting.abstract((args, kwargs))

    def call(values: dict[str, Any], *arrays: Any) -> Any:
        return _prepared(bare, "__call__", *filled(arrays))(values)

    seen = adapting.observe(call, params, *arrays)
    made = Adapted(bare, adapting.adapt(params, seen, key, method), jax.random.fold_in(key, len(params)))

    def trial(*arrays: Any) -> Any:
        return adapting.run(_prepared(bare, "__call__", *filled(arrays)), _params(made, key))

    jax.eval_shape(trial, *arrays)
    return made


def merge(model: Adapted) -> Any:
    """A copy of the model with every adapter folded in; see `adapt.merge` for what is refused."""
    merged, plain = adapting.merge(_params(model)), nnx.clone(model.model)
    state = {path: v.copy(merged[_text(path)]) for path, v in _flat(plain) if _text(path) in merged}
    nnx.update(plain, nnx.from_flat_state(state))
    return plain


def _run(model: Adapted, name: str, /, *args: Any, **kwargs: Any) -> Any:
    """A method of the model with the adapters in effect; what it changes in the model or its arguments is changed."""
    key = None if model.deterministic or not model.drops else model.rngs.dropout()
    out, state = adapting.run(_prepared(model.model, name, args, kwargs), _params(model, key))
    nnx.update((model.model, args, kwargs), state)
    return out


def _prepared(model: nnx.Module, name: str, args: Any, kwargs: Any) -> Callable[[dict[str, Any]], Any]:
    """A pure function of parameters by path: (result, variables of the model and its arguments afterwards)."""
    graph, state = nnx.split((model, args, kwargs))

    def call(values: dict[str, Any]) -> Any:
        given = {p: v.copy(values[_text(p[1:])]) if _is_given(p, values) else v for p, v in nnx.to_flat_state(state)}
        whole = nnx.merge(graph, nnx.from_flat_state(given), copy=True)
        out = getattr(whole[0], name)(*whole[1], **whole[2])
        after = {p: v for p, v in _flat(whole) if isinstance(v, nnx.Variable) and not _is_given(p, values)}
        return out, nnx.from_flat_state(after)

    return call


def _is_given(path: Any, values: dict[str, Any]) -> bool:
    return path[0] == 0 and _text(path[1:]) in values


def _own_params(model: nnx.Module) -> dict[str, Any]:
    """The model's parameters by path."""
    return {_text(path): v.get_value() for path, v in _flat(model) if isinstance(v, nnx.Param)}


def _params(model: Adapted, key: jax.Array | None = None) -> dict[str, Any]:
    """The model's parameters by path, adapted; dropout is on with a ``key``."""
    own = _own_params(model.model)
    return own | tree.dropout_keys({path: f.kernel(own[path]) for path, f in model.adapters.items()}, key)


def _flat(node: Any) -> list[tuple[Any, Any]]:
    return list(nnx.to_flat_state(nnx.state(node)))


def _text(path: Any) -> str:
    return "/".join(map(str, path))


def _is_module(x: Any) -> bool:
    return isinstance(x, nnx.Module)
