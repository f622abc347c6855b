"""A method on the parameters of any Flax model: which of them it can adapt, by what the model does with them."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import peft
from jaxft.core import tree
from jaxft.core.names import Name
from jaxft.core.weight import Affine, NotMergeable
from jaxft.flax import kernel as kernels
from jaxft.flax import trace
from jaxft.flax.held import Seen, held
from jaxft.flax.kernel import KeptBias, Kernel, Layout
from jaxft.peft import targets
from jaxft.peft.bitfit import BitFit
from jaxft.peft.lora import LoRA
from jaxft.peft.sites import Site, Targeted

OWN_NAMES = ("kernel", "embedding")  # of parameters that are called by the name of their module


@dataclasses.dataclass(frozen=True)
class Place:
    """A parameter that can be adapted."""

    path: str
    name: Name
    use: str
    layout: Layout
    tied: bool
    """Of an embedding: whether the model also multiplies by its transpose."""
    bias: str | None
    """Of what is multiplied by: the one parameter that is added to the product."""
    always: bool
    """Whether it is added to every product, and used for nothing else."""


def abstract(example: Any) -> tuple[Callable[[Any], Any], list[Any]]:
    """The ShapeDtypeStructs of an example, and the function that puts arrays in their place."""
    leaves, treedef = jax.tree.flatten(example)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]

    def filled(arrays: Any) -> Any:
        found = dict(zip(at, arrays, strict=True))
        return treedef.unflatten([found.get(i, leaf) for i, leaf in enumerate(leaves)])

    return filled, [leaves[i] for i in at]


def observe(fn: Callable[[dict[str, Any]], Any], params: dict[str, Any], *args: Any) -> Seen:
    """How ``fn(arrays by path, *args)`` uses its parameters; nothing is computed."""
    seen = Seen()

    def walk(params: dict[str, Any], *args: Any) -> Any:
        return trace.run(lambda p: fn(p, *args), {path: held(path, a, seen) for path, a in params.items()})

    jax.eval_shape(walk, {p: jax.ShapeDtypeStruct(a.shape, a.dtype) for p, a in params.items()}, *args)
    return seen


def run(fn: Callable[[dict[str, Any]], Any], params: dict[str, Any]) -> Any:
    """``fn(arrays by path)`` with the adapters of ``params`` in effect; parameters without one are the caller's."""
    adapted = {path: w for path, w in params.items() if isinstance(w, Kernel)}
    biases = {w.bias: params[w.bias] for w in adapted.values() if w.bias is not None and kernels.keeps_bias(w.base)}
    return trace.run(fn, {path: held(path, w) for path, w in (adapted | biases).items()})


def places(seen: Seen, params: dict[str, Any]) -> list[Place]:
    """The parameters that make one matrix wherever they are used, and floating."""
    found = []
    for path, uses in seen.uses.items():
        use, layout = min(uses, key=lambda one: one[0] != "lookup")  # a look-up says what an embedding is
        transposed = ("product", dataclasses.replace(layout, rows=layout.columns, columns=layout.rows))
        allowed = {(use, layout), ("product", layout), transposed} if use == "lookup" else {(use, layout)}
        if not uses <= allowed:
            seen.elsewhere.setdefault(path, "products with different axes")
        if path in seen.elsewhere or not jnp.issubdtype(params[path].dtype, jnp.floating):
            continue
        added = seen.biases.get(path, set())
        bias = next(iter(added)) if len(added) == 1 else None
        columns = int(np.prod([params[path].shape[a] for a in (*layout.stack, *layout.columns)]))
        if bias is not None and (params[bias].size != columns or sum(bias in b for b in seen.biases.values()) > 1):
            bias = None
        always = path not in seen.unbiased and bias not in seen.elsewhere
        found.append(Place(path, _name(path, use), use, layout, transposed in uses, bias, always))
    return found


def _name(path: str, use: str) -> Name:
    parts = path.removesuffix("/value").split("/")  # of a box that carries metadata
    if parts[-1] in OWN_NAMES and len(parts) > 1:
        parts = parts[:-1]
    return Name(path, ".".join(parts), "embedding" if use == "lookup" else "linear")


def adapt(params: dict[str, Any], seen: Seen, key: jax.Array, methods: Any) -> dict[str, Kernel]:
    """The adapted parameters by path: those that ``methods``, one config or several in order, select.

    Raises ValueError naming a target that selects nothing, and TypeError for a config that wraps no weights."""
    made: dict[str, Kernel] = {path: w for path, w in params.items() if isinstance(w, Kernel)}
    for i, config in enumerate(methods if isinstance(methods, Sequence) else [methods]):
        _refuse(config)
        found, mine = _select(places(seen, params), config, seen), jax.random.fold_in(key, i)
        for place in found:
            if place.path not in made:
                bias = place.bias if place.always else None
                made[place.path] = kernels.make(params[place.path], place.layout, place.use, bias)
        sizes = [made[place.path].base.shape[-2:] for place in found]
        shared = config.share(sizes, jax.random.fold_in(mine, len(found)))
        for j, place in enumerate(found):
            made[place.path] = _wrap(made[place.path], place, config, jax.random.fold_in(mine, j), shared)
    return made


def _refuse(config: Any) -> None:
    if not isinstance(config, Targeted) or isinstance(config, BitFit):
        raise TypeError(
            f"got {config!r}; expected a method that wraps weights: any other has no place in a Flax model. Arrays of "
            "the model itself are trained in place: jaxft.trainable_mask(params, select='bitfit' or any regex)"
        )
    if peft.method_of(config).hooks is not peft.Method.hooks:
        raise TypeError(
            f"got {type(config).__name__}, which changes its parameters in every training step; expected a method that "
            "only trains them, as the loop around a Flax model is your own"
        )
    if isinstance(config, LoRA) and config.init in ("eva", "corda", "loftq", "qpissa"):
        reason = "puts a quantised matrix in the place of a parameter, and a Flax model keeps its own"
        if config.init not in ("loftq", "qpissa"):
            reason = "begins from what data show of a layer's input, and that is measured on jaxft's own models only"
        raise ValueError(f"peft.init: got {config.init!r}, which {reason}. Expected another one, such as pissa.")
    for field, remedy in {
        "modules_to_save": "train them in place: jaxft.trainable_mask(params, select=<regex>)",
        "bias": "train them in place: jaxft.trainable_mask(params, select='bitfit')",
        "ensure_weight_tying": "leave it out: an embedding that is also the head is one parameter, and both follow it",
    }.items():
        if (value := getattr(config, field)) not in ((), "none", False):
            raise ValueError(f"peft.{field}: got {value!r}, which a Flax model does not have; {remedy}")


def _select(found: list[Place], config: Targeted, seen: Seen) -> list[Place]:
    everything = isinstance(config.targets, str) and config.targets.lower() == "all-linear"
    rows = [p for p in found if not (everything and p.use == "window")]
    each = (config.targets,) if isinstance(config.targets, str) else tuple((t,) for t in config.targets)
    hits = [[p for p in rows if targets.of_row(p.name, 1, t, exclude=config.exclude)] for t in each]
    for target, hit in zip(each, hits, strict=True):
        if not hit:
            known = ", ".join(sorted(p.name.module for p in found))
            not_so = "; ".join(f"{path} (it goes into {user!r})" for path, user in sorted(seen.elsewhere.items()))
            raise ValueError(
                f"peft.targets: {target!r} selects no parameter that the example multiplies by, looks up or convolves "
                f"with. It does so with {known or 'none'}. Used otherwise: {not_so or 'none'}."
            )
    chosen = {id(p) for p in itertools.chain(*hits)}
    selected = [p for p in rows if id(p) in chosen]
    for field in config.patterns:
        as_found = [targets.Target(p.name, np.array(True), (p.name.module,)) for p in selected]
        targets.refuse_unused(field, getattr(config, field), as_found)
    return selected


def _wrap(old: Kernel, place: Place, config: Targeted, key: jax.Array, shared: Any) -> Kernel:
    """One parameter adapted, in all the layers of its stack or those of ``config.layers``."""
    if place.use == "lookup" and not config.embeddings:
        raise ValueError(
            f"peft.targets: {place.name.module} is an embedding, which {type(config).__name__} cannot adapt; expected "
            "linear layers. Leave it out of targets, or train it whole with jaxft.trainable_mask(params, select=...)."
        )
    layers = np.ones([old.sizes[a] for a in place.layout.stack], bool)
    if config.layers is not None:
        if not layers.ndim or not set(config.layers) <= {*range(len(layers))}:
            size = f"{len(layers)} layers" if layers.ndim else "one layer"
            raise ValueError(
                f"peft.layers: got {config.layers}; {place.path} is a stack of {size}. Layers that are modules of "
                "their own are chosen by name, with targets."
            )
        layers[[i for i in range(len(layers)) if i not in config.layers]] = False
    follows = True if place.tied else None

    def adapted(base: Any) -> Any:
        modules = (place.name.module,) * max(layers.size, 1)
        return config.wrap(Site(base, place.name, modules, layers, key, follows, shared=shared))

    if config.outside and place.bias is not None and not kernels.keeps_bias(old.base):
        return dataclasses.replace(old, base=adapted(KeptBias(old.base, None)), bias=place.bias)
    if isinstance(old.base, KeptBias) and not config.outside:
        return dataclasses.replace(old, base=dataclasses.replace(old.base, base=adapted(old.base.base)))
    return dataclasses.replace(old, base=adapted(old.base))


def merge(params: dict[str, Any]) -> dict[str, Any]:
    """Plain parameters by path, every adapter folded in.

    Raises NotMergeable naming the path, and ValueError where a merged parameter is not finite."""
    found = dict(params)
    for path, w in params.items():
        if not isinstance(w, Kernel):
            continue
        bias = None if w.bias is None else params[w.bias]
        stack = [w.sizes[a] for a in w.layout.stack]
        whole = kernels.with_bias(w.base, None if bias is None else bias.reshape(*stack, -1))
        folded = tree.merge({path: whole})[path]
        matrix = folded.base if isinstance(folded, Affine) else folded
        if isinstance(folded, Affine):
            if bias is None:
                raise NotMergeable(
                    f"{path}: the adapter adds a constant to every output, and the model has no bias of this parameter "
                    "alone, added to all its products, that it could become. Train without it (lora_bias), or keep the "
                    "adapter apart."
                )
            before = 0 if kernels.keeps_bias(w.base) else bias
            found[w.bias] = (before + folded.bias.reshape(bias.shape)).astype(bias.dtype)  # type: ignore[index]
        found[path] = kernels.as_parameter(w, matrix)
    return found


def strip(params: dict[str, Any]) -> dict[str, Any]:
    """Plain parameters by path without adapters: the buffers that were adapted."""
    return {path: kernels.original(w) if isinstance(w, Kernel) else w for path, w in params.items()}
