"""Parameter-efficient methods on any `flax.linen` model, and a jaxft model as a linen module.

    variables = jaxft.flax.linen.adapt(model, variables, key, LoRA(rank=8), x)      # x: an example input
    y = jaxft.flax.linen.apply(model, variables, x)                                 # model.apply, adapters in effect
    trainable, frozen = jaxft.partition(variables, jaxft.trainable_mask(variables)) # as for any jaxft model
    variables = jaxft.flax.linen.merge(variables)                                   # for model.apply again

Any model works, also one written by others: its modules are not known, replaced or patched (see `trace`). A linear
layer's kernel, an embedding, a convolution's kernel and a parameter of your own that is multiplied by are all targets.
"""

import os
from pathlib import Path
from typing import Any

import jax
from flax import core
from flax import linen as nn

from jaxft.core import tree
from jaxft.core.names import Names
from jaxft.flax import adapt as adapting
from jaxft.flax import storage
from jaxft.model import Model
from jaxft.models import decoder, heads
from jaxft.models import init as initial
from jaxft.models.config import ModelConfig
from jaxft.models.decoder import Execution

Variables = Any  # what init returns and apply takes: {"params": ..., other collections}


def adapt(
    model: nn.Module, variables: Variables, key: jax.Array, method: Any, /, *args: Any, **kwargs: Any
) -> Variables:
    """The variables with one method, or a list of them in order, on the parameters that its ``targets`` select.

    ``args`` and ``kwargs`` are an example of a call, as for ``model.apply`` (``rngs``, ``mutable``, ``method``; arrays
    may be ShapeDtypeStructs): which axes of a parameter are inputs and outputs is read off what the call does with it.
    Targets are names of modules (or of a parameter that is not called kernel or embedding), endings of them, a regex,
    or all-linear. The base's buffers are shared. Raises ValueError naming a target that selects nothing."""
    params = _leaves(variables)
    shapes, abstract = adapting.abstract((args, kwargs))

    def call(values: dict[str, Any], *arrays: Any) -> Any:
        args, kwargs = shapes(arrays)
        return model.apply(_replaced(variables, values), *args, **kwargs)

    seen = adapting.observe(call, params, *abstract)
    made = _replaced(variables, adapting.adapt(params, seen, key, method))

    def trial(*arrays: Any) -> Any:
        args, kwargs = shapes(arrays)
        return apply(model, tree.dropout_keys(made, key), *args, **kwargs)

    jax.eval_shape(trial, *abstract)
    return made


def apply(model: nn.Module, variables: Variables, /, *args: Any, **kwargs: Any) -> Any:
    """``model.apply(variables, *args, **kwargs)`` with the adapters in effect; meant to be jitted.

    An adapter's own dropout is on where ``rngs`` has a key for "dropout"."""
    rngs = kwargs.get("rngs")
    key = rngs.get("dropout") if isinstance(rngs, dict) else None
    if key is not None:
        variables = tree.dropout_keys(variables, jax.random.fold_in(key, 1))
    return adapting.run(lambda values: model.apply(_replaced(variables, values), *args, **kwargs), _leaves(variables))


def merge(variables: Variables) -> Variables:
    """Plain variables for ``model.apply``, every adapter folded in; see `adapt.merge` for what is refused."""
    return _replaced(variables, adapting.merge(_leaves(variables)))


def strip(variables: Variables) -> Variables:
    """The variables as they were before `adapt`: the same buffers."""
    return _replaced(variables, adapting.strip(_leaves(variables)))


def save(variables: Variables, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Writes the adapters, without the model; see `storage.save` for what is refused."""
    return storage.save(_leaves(variables), directory, overwrite)


def load(variables: Variables, directory: str | os.PathLike[str]) -> Variables:
    """The model's plain variables with saved adapters on them; see `storage.load` for what is refused."""
    return _replaced(variables, storage.load(_leaves(variables), directory))


class LanguageModel(nn.Module):
    """A jaxft model as a linen module. Its "params" are the model's own tree, adapters included."""

    config: ModelConfig
    names: Names
    dtype: Any = "float32"
    """Of parameters made by ``init``."""
    execution: Execution = decoder.DEFAULT

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array | None = None, segments: jax.Array | None = None):
        """Token ids int32[B, T] to logits float32[B, T, V]; ``positions`` and ``segments`` as in `decoder.forward`."""
        if self.is_initializing():
            made = initial.random(self.config, self.names, self.make_rng("params"), self.dtype)
            params = {name: self.param(name, lambda _, part=part: part) for name, part in made.items()}
        else:
            params = core.unfreeze({**self.variables})["params"]
        hidden, _, _ = decoder.forward(self.config, params, tokens, positions, segments, execution=self.execution)
        return heads.logits(self.config, heads.head_of(self.config, params), hidden)


def from_model(model: Model, execution: Execution = decoder.DEFAULT) -> tuple[LanguageModel, Variables]:
    """(module, variables): ``module.apply(variables, tokens)``. For adapters, ``{"params": adapted}``."""
    return LanguageModel(model.config, model.names, execution=execution), {"params": model.params}


def _leaves(variables: Variables) -> dict[str, Any]:
    """Parameters by path."""
    return dict(tree.paths(variables["params"], inside=False))


def _replaced(variables: Variables, values: dict[str, Any]) -> Variables:
    params = tree.map_weights(lambda path, w: values.get(path, w), variables["params"])
    return {**variables, "params": params}
