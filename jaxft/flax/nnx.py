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
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxft.core import tree
from jaxft.flax import adapt as adapting
from jaxft.flax import storage
from jaxft.flax.kernel import Kernel, on, settled
from jaxft.model import Model
from jaxft.models import decoder, heads
from jaxft.models.config import ModelConfig
from jaxft.models.decoder import Execution

Call = str | Callable[..., Any]


class Adapter(nnx.Variable):
    """An array that an adapter trains."""


class Constant(nnx.Variable):
    """An array of an adapter that does not train: a scale, a rank, a random projection."""


class Arrays(nnx.Module):
    """A tree of Weights, each of its arrays a variable under its path; ``trains`` and ``own`` say of what kind."""

    def __init__(self, weights: Any, trains: Any, own: Any = None):
        self.structure = jax.tree.structure(weights)
        self.names = tuple(path for path, _ in tree.paths(weights))
        owns = [False] * len(self.names) if own is None else jax.tree.leaves(own)
        kinds = [
            Adapter if t else nnx.Param if o else Constant for t, o in zip(jax.tree.leaves(trains), owns, strict=True)
        ]
        arrays = zip(self.names, kinds, jax.tree.leaves(weights), strict=True)
        self.arrays = nnx.Dict({name: kind(array) for name, kind, array in arrays})

    def tree(self) -> Any:
        """The tree of Weights as the variables now are."""
        return self.structure.unflatten([self.arrays[name].get_value() for name in self.names])


class Adapted(nnx.Module):
    """A model with adapters in effect. Called like the model; its methods and data are the model's.

    ``model`` is the model without them; what a call changes in its variables is changed, as ever, but not what it
    assigns to plain attributes. ``deterministic`` (set by ``train`` and ``eval``): whether adapters' dropout is off."""

    def __init__(self, model: nnx.Module, kernels: dict[str, Kernel], key: jax.Array):
        self.model = model
        hollow = {path: on(kernel, None) for path, kernel in kernels.items()}
        self.adapters = nnx.Dict({path: Arrays(w, tree.trainable_mask({"": w})) for path, w in hollow.items()})
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


def adapt(
    model: nnx.Module, key: jax.Array, method: Any, /, *args: Any, call: Call = "__call__", **kwargs: Any
) -> Adapted:
    """The model with one method, or a list of them in order, on the parameters that its ``targets`` select.

    ``args`` and ``kwargs`` are an example of a call (arrays may be ShapeDtypeStructs): which axes of a parameter are
    inputs and outputs is read off what the call does with it. ``call``: the name of the method that is called, or a
    function of the model and the arguments, where one method does not use all parameters. Targets are names of modules
    (or of a parameter that is not called kernel or embedding), endings of them, a regex, or all-linear. The model's
    parameters are shared. Raises ValueError naming a target that selects nothing."""
    bare, params = (model.model, _params(model)) if isinstance(model, Adapted) else (model, _own_params(model))
    filled, arrays = adapting.abstract((args, kwargs))

    def example(values: dict[str, Any], *arrays: Any) -> Any:
        return _prepared(bare, call, *filled(arrays))(values)

    seen = adapting.observe(example, params, *arrays)
    made = Adapted(bare, adapting.adapt(params, seen, key, method), jax.random.fold_in(key, len(params)))

    def trial(*arrays: Any) -> Any:
        return adapting.run(_prepared(bare, call, *filled(arrays)), _params(made, key))

    jax.eval_shape(trial, *arrays)
    return made


def merge(model: Adapted) -> Any:
    """A copy of the model with every adapter folded in; see `adapt.merge` for what is refused."""
    merged, plain = adapting.merge(_params(model)), nnx.clone(model.model)
    state = {path: v.copy(merged[_text(path)]) for path, v in _flat(plain) if _text(path) in merged}
    nnx.update(plain, nnx.from_flat_state(state))
    return plain


def save(model: Adapted, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Writes the adapters, without the model; see `storage.save` for what is refused."""
    return storage.save(_params(model), directory, overwrite)


def load(model: nnx.Module, directory: str | os.PathLike[str], key: jax.Array | None = None) -> Adapted:
    """The plain model with saved adapters in effect; see `storage.load` for what is refused.

    ``key``: for their dropout, if they are to be trained on."""
    found = storage.load(_own_params(model), directory).items()
    kernels = {path: w for path, w in found if isinstance(w, Kernel)}
    return Adapted(model, kernels, jax.random.key(0) if key is None else key)


class LanguageModel(nnx.Module):
    """A jaxft model as an NNX module: the arrays that its adapters train are `Adapter` variables, other arrays of
    adapters `Constant`, and the model's own `nnx.Param`."""

    def __init__(self, config: ModelConfig, params: tree.Params, execution: Execution):
        self.config, self.execution = config, execution
        own = tree.trainable_mask(params, "full")
        adapted = jax.tree.structure(params) != jax.tree.structure(tree.strip(params))
        trains = tree.trainable_mask(params) if adapted else jax.tree.map(lambda _: False, own)
        self.params = Arrays(params, trains, own)

    def __call__(self, tokens: jax.Array, positions: jax.Array | None = None, segments: jax.Array | None = None):
        """Token ids int32[B, T] to logits float32[B, T, V]; ``positions`` and ``segments`` as in `decoder.forward`."""
        params = self.params.tree()
        hidden, _, _ = decoder.forward(self.config, params, tokens, positions, segments, execution=self.execution)
        return heads.logits(self.config, heads.head_of(self.config, params), hidden)


def from_model(model: Model, params: tree.Params = None, execution: Execution = decoder.DEFAULT) -> LanguageModel:
    """The model as a module, with its own parameters or ``params``, adapted ones for example.

    ``module.params.tree()`` gives them back, trained, for `jaxft.save_adapter` and all else."""
    return LanguageModel(model.config, model.params if params is None else params, execution)


def _run(model: Adapted, name: str, /, *args: Any, **kwargs: Any) -> Any:
    """A method of the model with the adapters in effect; what it changes in the model or its arguments is changed."""
    key = None if model.deterministic or not model.drops else model.rngs.dropout()
    out, state = adapting.run(_prepared(model.model, name, args, kwargs), _params(model, key))
    nnx.update((model.model, args, kwargs), state)
    return out


def _prepared(model: nnx.Module, method: Call, args: Any, kwargs: Any) -> Callable[[dict[str, Any]], Any]:
    """A pure function of parameters by path: (result, variables of the model and its arguments afterwards)."""
    graph, state = nnx.split((model, args, kwargs))

    def call(values: dict[str, Any]) -> Any:
        given = {p: v.copy(values[_text(p[1:])]) if _is_given(p, values) else v for p, v in nnx.to_flat_state(state)}
        whole = nnx.merge(graph, nnx.from_flat_state(given), copy=True)
        bound = getattr(whole[0], method) if isinstance(method, str) else functools.partial(method, whole[0])
        out = bound(*whole[1], **whole[2])
        after = {p: v for p, v in _flat(whole) if isinstance(v, nnx.Variable) and not _is_given(p, values)}
        return out, nnx.from_flat_state(after)

    return call


def _is_given(path: Any, values: dict[str, Any]) -> bool:
    return path[0] == 0 and _text(path[1:]) in values


def _own_params(model: nnx.Module) -> dict[str, Any]:
    """The model's parameters by path."""
    found = ((path, v.get_value()) for path, v in _flat(model) if isinstance(v, nnx.Param))
    return {_text(path): value for path, value in found if hasattr(value, "ndim")}


def _params(model: Adapted, key: jax.Array | None = None) -> dict[str, Any]:
    """The model's parameters by path, adapted; dropout is on with a ``key``."""
    own = _own_params(model.model)
    return own | tree.dropout_keys(
        {path: settled(on(arrays.tree(), own[path])) for path, arrays in model.adapters.items()}, key
    )


def _flat(node: Any) -> list[tuple[Any, Any]]:
    return list(nnx.to_flat_state(nnx.state(node)))


def _text(path: Any) -> str:
    return "/".join(map(str, path))


def _is_module(x: Any) -> bool:
    return isinstance(x, nnx.Module)
