"""Where a method goes: the weights its config selects, each handed over as a `Site` to be wrapped.

A method is a config that inherits `Targeted` and says in ``wrap(site)`` which Weight stands for an adapted base; the
walk over the model, tied heads, layers left out, and what is trained whole beside it are the same for all, and here.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.core.names import Name, Names
from jaxft.core.weight import Weight
from jaxft.peft import places, targets, whole

Originals = Callable[[Name, tuple[int, ...]], jax.Array]
"""(name of a weight, index of a layer) -> its matrix [in, out] before it was packed."""


class Site(NamedTuple):
    """One weight to adapt, all its layers at once."""

    base: Any
    """The weight that is wrapped, [*stack, in, out] ([vocab, features] for an embedding)."""
    name: Name
    modules: tuple[str, ...]
    """Torch module name of each layer."""
    layers: np.ndarray
    """bool[*stack]: the layers to adapt."""
    key: jax.Array
    """For drawing the initial values."""
    follows: bool | None = None
    """Of an embedding: whether the head tied to it follows the adapter; None if no head is tied to it."""
    statistics: Any = None
    """What a calibration measured here; None without one."""
    shared: Any = None
    """What ``config.share`` made for all sites together."""
    original: Callable[[tuple[int, ...]], jax.Array] | None = None
    """Of a model that was packed as it was read: a layer's matrix [in, out] as it is on disk."""

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out) of one layer."""
        return self.base.shape[-2], self.base.shape[-1]

    @property
    def gate(self) -> jax.Array:
        """float32[*stack]: 1 where the layer is adapted, else 0."""
        return jnp.asarray(self.layers, jnp.float32)

    def values(self, default: Any, pattern: dict[str, Any] | None = None, dtype: Any = np.float32) -> np.ndarray:
        """[*stack]: ``default``, or what ``pattern`` says of a module's name; 0 where the layer is not adapted."""
        found = targets.pattern_values(self.modules, dict(pattern or {}), default).reshape(self.layers.shape)
        return np.where(self.layers, found, 0).astype(dtype)

    def draw(self, fn: Callable[[jax.Array], Any]) -> Any:
        """``fn(key)``, the initial arrays of one layer, with a key for each: stacked like the base."""
        return jax.vmap(fn)(jax.random.split(self.key, self.layers.shape)) if self.layers.ndim else fn(self.key)


@dataclass(frozen=True, kw_only=True)
class Targeted:
    """The settings of every method that wraps chosen modules."""

    targets: str | tuple[str, ...] = "all-linear"
    """Modules to adapt: torch names (q_proj, ...), our paths, a full-match regex, or all-linear."""
    exclude: str | tuple[str, ...] = ()
    """Modules never adapted: names, or a full-match regex."""
    layers: tuple[int, ...] | None = None
    """Layer indices to adapt; default: all."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole and saved beside the adapter, such as embed_tokens or lm_head."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases trained too: none, all of the model's, or (lora_only) those of the adapted modules."""
    ensure_weight_tying: bool = False
    """Whether a tied head follows a trained embedding; otherwise, as in peft, it keeps the original."""

    learning_rate: ClassVar[float] = 1e-3
    """Default peak learning rate with AdamW of a method that has no row in `METHODS`."""
    outside: ClassVar[bool] = False
    """Whether the method maps the output, bias included, and so goes around an Affine instead of inside it."""
    embeddings: ClassVar[bool] = False
    """Whether the method can adapt a look-up table."""
    patterns: ClassVar[tuple[str, ...]] = ()
    """Fields that map the ends of module names to values."""

    def share(self, shapes: Sequence[tuple[int, int]], key: jax.Array) -> Any:
        """What all sites have in common (`Site.shared`), given the (in, out) of each."""
        return None

    def wrap(self, site: Site) -> Weight:
        """The adapted weight: the identity at initialisation unless the method's docstring says otherwise."""
        raise NotImplementedError(
            f"{type(self).__name__} has no wrap(site), which gives the Weight that stands for site.base in an adapted "
            "model; expected one. Define it beside the settings."
        )


def adapt(
    params: tree.Params,
    names: Names,
    key: jax.Array,
    config: Targeted,
    statistics: Mapping[str, Any] | None = None,
    originals: Originals | None = None,
) -> tree.Params:
    """Wraps every selected weight by ``config.wrap``; trains `modules_to_save` and `bias` in place.

    ``statistics``: what a calibration measured, by path. ``originals``: what packed weights were made from. Raises
    ValueError naming a target, module or pattern that matches nothing, and a target that the method cannot adapt."""
    num_layers = tree.num_layers(params)
    if config.outside and config.bias != "none":
        remedy = f"{type(config).__name__} maps outputs, biases included. Add the method full with select=bitfit."
        raise ValueError(f"peft.bias: got {config.bias!r}; expected none: {remedy}")
    found = find(params, names, config)
    for field in config.patterns:
        targets.refuse_unused(field, getattr(config, field), found)
    shared = config.share([places.sizes(params, t.name) for t in found], jax.random.fold_in(key, len(found)))
    for i, target in enumerate(found):
        mine = (statistics or {}).get(target.name.path)
        original = originals and functools.partial(originals, target.name)
        here = (jax.random.fold_in(key, i), mine, shared, original)
        params = wrap(params, config, target.name, target.layers, *here)
    params = whole.adapt(params, names, num_layers, config.modules_to_save, config.ensure_weight_tying)
    if config.bias != "none":
        params = whole.adapt_biases(params, names, config.bias, found)
    return params


def find(params: tree.Params, names: Names, config: Targeted) -> list[targets.Target]:
    """What ``config`` selects; a tied head that is to follow its embedding is no target of its own."""
    found = targets.find(
        places.rows(names),
        tree.num_layers(params),
        config.targets,
        exclude=config.exclude,
        layers=config.layers,
        saved=config.modules_to_save,
    )
    if config.ensure_weight_tying and any(t.name.path == places.TOKENS for t in found):
        found = [t for t in found if not places.is_tied_head(params, t.name)]
    return found


def wrap(
    params: tree.Params,
    config: Targeted,
    name: Name,
    layers: np.ndarray,
    key: jax.Array,
    statistics: Any = None,
    shared: Any = None,
    original: Any = None,
) -> tree.Params:
    """The parameters with one row's weight adapted in ``layers`` (bool[*stack])."""
    if name.kind == "embedding" and not config.embeddings:
        raise ValueError(
            f"peft.targets: {name.module} is an embedding, which {type(config).__name__} cannot adapt; expected linear "
            "layers. Leave it out of targets, or train it whole with peft.modules_to_save."
        )
    follows = places.head_follows(params, name, config.ensure_weight_tying)
    modules = name.modules(tree.num_layers(params))

    def adapted(base: Any) -> Weight:
        return config.wrap(Site(base, name, modules, np.asarray(layers), key, follows, statistics, shared, original))

    return places.wrap(params, name, adapted, config.outside)
