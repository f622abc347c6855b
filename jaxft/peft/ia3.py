r"""(IA)^3: learned vectors scale keys, values and what enters the second layer of the feed-forward block.

.. math:: y = l \odot (x W + b) \ \text{(attention)}, \qquad y = (l \odot x) W + b \ \text{(feed-forward)}

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", section 3.3
(arXiv:2205.05638). A module trains ``out`` numbers, a feed-forward one ``in``. The products with l are taken in
float32: in bfloat16 a factor of 1.002 would be 1.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.core.names import Names
from jaxft.core.weight import Weight, parameter, static, trainable, weight
from jaxft.peft import places, sites, targets
from jaxft.peft.disk import AdapterError, Tensors
from jaxft.peft.formats import Fields, Format
from jaxft.peft.sites import Site, Targeted

FEEDFORWARD = r"(.*\.)?(down_proj|mlp\.c_proj|dense_4h_to_h)"
KEYS = rf"(.*\.)?(k_proj|v_proj|qkv_proj|c_attn|query_key_value)|{FEEDFORWARD}"
QUERIES = rf"(.*\.)?(q_proj|v_proj)|{FEEDFORWARD}"
SCALE_QUERIES = ("gemma2", "gemma3_text", "qwen2", "qwen3")  # families in which peft scales queries instead of keys


@dataclass(frozen=True)
class IA3(Targeted):
    """Infused adapter by inhibiting and amplifying inner activations. Default learning rate 5e-3."""

    targets: str | tuple[str, ...] = KEYS
    """Modules to adapt; default: keys, values (fused projections where a model has them) and the down projection, as in
    the paper; of gemma2, gemma3_text, qwen2 and qwen3, as in peft, queries instead of keys."""
    feedforward: str | tuple[str, ...] = FEEDFORWARD
    """Of the targets, those whose input is scaled instead of the output: names, or a full-match regex."""

    outside: ClassVar[bool] = True

    def wrap(self, site: Site) -> "IA3Weight":
        modules = targets.adapted(site.name, len(site.modules), site.layers)
        hits = {targets.matches(m, site.name.path, self.feedforward) for m in modules}
        if len(hits) > 1:
            got = f"{self.feedforward!r}, which selects only some layers of {site.name.path}"
            raise ValueError(f"peft.feedforward: got {got}; expected all of its layers or none")
        feedforward = hits == {True}
        scale = jnp.ones((*site.layers.shape, site.shape[0 if feedforward else 1]))
        return IA3Weight(site.base, scale, site.gate, feedforward)


def settle(config: IA3, model: Any) -> IA3:
    """The config with the default targets of the model's family."""
    family = getattr(getattr(model, "config", None), "family", None)
    by_default = config.targets == KEYS and family in SCALE_QUERIES
    return dataclasses.replace(config, targets=QUERIES) if by_default else config


def adapt(params: tree.Params, names: Names, key: jax.Array, config: IA3) -> tree.Params:
    """As any method's; raises ValueError also for a name in ``feedforward`` that means no adapted module."""
    params = sites.adapt(params, names, key, config)
    rows = [name for name in places.rows(names) if isinstance(places.get(params, name), IA3Weight)]
    known = [(module, name.path) for name in rows for module in name.modules(tree.num_layers(params))]
    whole = isinstance(config.feedforward, str)
    for wanted in (config.feedforward,) if whole else tuple((name,) for name in config.feedforward):
        if wanted != FEEDFORWARD and not any(targets.matches(module, path, wanted) for module, path in known):
            got = f"{wanted if whole else wanted[0]!r}, which selects none of the adapted modules"
            raise ValueError(f"peft.feedforward: got {got}; expected some of {sorted(path for _, path in set(known))}")
    return params


@weight
class IA3Weight(Weight):
    """``(x * scale) @ base`` or ``(x @ base) * scale``. scale: [*stack, in or out]; gate: [*stack]."""

    base: Any = parameter()
    scale: jax.Array = trainable()
    gate: jax.Array
    feedforward: bool = static(default=False)

    def _scaled(self, x: jax.Array) -> jax.Array:
        return (x.astype(jnp.float32) * jnp.where(self.gate > 0, self.scale, 1.0)).astype(x.dtype)

    def __rmatmul__(self, x):
        return self._scaled(x) @ self.base if self.feedforward else self._scaled(x @ self.base)


def config_of(config: Fields) -> IA3:
    """Our settings from peft's, which compares names in a list with the plain ends of module names."""
    names = config["feedforward_modules"]
    if not isinstance(names, str):
        names = f".*({'|'.join(map(re.escape, names))})" if names else ()
    return IA3(feedforward=names)


def refuse(where: object, config: Fields) -> None:
    """Raises AdapterError for a config that leaves open which modules are feed-forward ones."""
    if config.get("feedforward_modules") is None:
        raise AdapterError(f"{where}: feedforward_modules", "none", "a list, which may be empty, or a regex")


def feedforward_modules(config: Fields, found: dict[str, Any], names: Names) -> Fields:
    """Those of the target modules whose input is scaled; peft wants a subset of their very names."""
    rows = [name for name in names if name.path in found and found[name.path].feedforward]
    modules = [module for name in rows for module in name.modules(found[name.path].scale.shape[0])]
    chosen = [t for t in config["target_modules"] if any(targets.matches(m, "", (t,)) for m in modules)]
    return {"feedforward_modules": chosen}


def write(w: IA3Weight) -> Tensors:
    """One layer's vector."""
    scale = np.asarray(w.scale)
    return {"ia3_l": scale[None] if w.feedforward else scale[:, None]}


def read(w: IA3Weight, tensors: Tensors) -> IA3Weight:
    """One layer with its vector."""
    return dataclasses.replace(w, scale=tensors["ia3_l"].reshape(-1))


FORMAT = Format(
    peft_type="IA3",
    leaf=IA3Weight,
    fields=("target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out", "init_ia3_weights"),
    config=config_of,
    describe=lambda w: {},
    suffixes=("ia3_l",),
    write=write,
    read=read,
    refuse=refuse,
    of_all=feedforward_modules,
)
