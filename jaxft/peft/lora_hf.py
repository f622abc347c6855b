"""LoRA in peft's format: torch's [out, in] factors of each layer's module, to and from our stacks.

Linear: ``M.lora_A.weight`` [r, in] and ``M.lora_B.weight`` [out, r]. Embedding: ``M.lora_embedding_A`` [r, vocab] and
``M.lora_embedding_B`` [features, r]. Padding to the largest rank and layers that are not adapted exist only here.
"""

import collections
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.core.names import Name, Names
from jaxft.peft import disk, lora, places, targets
from jaxft.peft.disk import AdapterError, Tensors
from jaxft.peft.lora import LoRAWeight

# init_lora_weights that leave the base as it is; the others (pissa, olora, loftq, corda, lora_ga) subtract from it
INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

FIELDS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "use_rslora",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "megatron_core", "qalora_group_size", "runtime_config", "eva_config", "corda_config", "lora_ga_config",
)  # fmt: skip


def export(found: dict[str, LoRAWeight], params: tree.Params, names: Names, num_layers: int) -> tuple[dict, Tensors]:
    """Config fields and tensors of the LoRA weights ``found`` by path; ``names`` with the head's row."""
    rows = [name for name in names if name.path in found]
    tensors: Tensors = {}
    chosen, values = {}, {}
    rslora = all(found[name.path].rslora for name in rows)
    for name in rows:
        w = found[name.path]
        ranks, scale = disk.host(w.rank), disk.host(w.scale)
        chosen[name.path] = ranks > 0
        flipped = places.is_tied_head(params, name)
        tensors |= _factors(name, num_layers, w, ranks, flipped)
        for module, rank, s in zip(name.modules(num_layers), np.atleast_1d(ranks), np.atleast_1d(scale), strict=True):
            values[module] = (int(rank), _alpha(float(s), int(rank), rslora))
    tensors |= _tied_head(found, params, names)
    pairs = targets.patterns(chosen, names, num_layers, values)
    used = [values[m] for name in rows for m in targets.adapted(name, num_layers, chosen[name.path])]
    rank, alpha = collections.Counter(used).most_common(1)[0][0]
    modules, layers = targets.describe(chosen, names, num_layers)
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(found[name.path].rate for name in rows),
        "target_modules": modules,
        "fan_in_fan_out": any(name.kind == "conv1d" for name in rows),
        "init_lora_weights": True,
        "layers_to_transform": layers,
        "rank_pattern": {k: r for k, (r, _) in pairs.items() if r != rank},
        "alpha_pattern": {k: a for k, (_, a) in pairs.items() if a != alpha},
    }
    # newer fields only where they say something: an older peft refuses a field it does not know
    config |= {"use_rslora": True} if rslora else {}
    return config, tensors


def _factors(name: Name, num_layers: int, w: LoRAWeight, ranks: np.ndarray, flipped: bool) -> Tensors:
    """Each adapted layer's factors as torch holds them, without padding."""
    a, b = disk.host(w.a), disk.host(w.b)
    if flipped:  # a tied head is held [vocab, features]
        a, b = b.T, a.T
    if not name.stacked:
        a, b, ranks = a[None], b[None], ranks[None]
    out: Tensors = {}
    for i, (module, rank) in enumerate(zip(name.modules(num_layers), ranks, strict=True)):
        if rank:
            keys = _keys(name, module)
            out |= dict(zip(keys, (a[i, :, :rank].T, b[i, :rank].T), strict=True))
    return out


def _keys(name: Name, module: str) -> tuple[str, str]:
    if name.kind == "embedding":
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _tied_head(found: dict[str, LoRAWeight], params: tree.Params, names: Names) -> Tensors:
    """With ensure_weight_tying peft also stores the embedding's factors as the head's, transposed."""
    w = found.get(places.TOKENS)
    if w is None or not w.tied:
        return {}
    head = next(name for name in names if name.path == places.HEAD)
    return dict(zip(_keys(head, head.module), (disk.host(w.b), disk.host(w.a)), strict=True))


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    """The alpha that gives back the float32 ``scale``: a round number wherever one does."""
    exact = scale * (np.sqrt(rank) if rslora else rank)
    for alpha in (round(exact), round(exact, 3), round(exact, 6)):
        if lora.scales(np.array(rank), np.array(float(alpha)), rslora) == np.float32(scale):
            return alpha
    return float(exact)


def refuse_unknown(where: object, config: dict[str, Any]) -> None:
    """Raises AdapterError for an initialisation that changed the base."""
    init = config.get("init_lora_weights", True)
    if init not in INITS:
        remedy = (
            "That initialisation subtracted from the base weights, so the factors alone do not fit the original model. "
            "Save it again in peft with save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
        raise AdapterError(f"{where}: init_lora_weights", repr(init), "an adapter of the original base", remedy)


def restore(where: object, config: dict[str, Any], tensors: Tensors, params: tree.Params, names: Names) -> tree.Params:
    """Wraps every module that has factors; what is used is taken out of ``tensors``; ``names`` with the head's row."""
    num_layers = tree.num_layers(params)
    tying = bool(config.get("ensure_weight_tying"))
    if tying and places.HEAD not in params and any(k.endswith("lora_embedding_A") for k in tensors):
        head = next(name for name in names if name.path == places.HEAD)
        for key in _keys(head, head.module):  # a copy of the embedding's factors
            tensors.pop(key, None)
    used = set()
    for name in names:
        modules = name.modules(num_layers)
        held = [m for m in modules if name.kind != "norm" and any(k in tensors for k in _keys(name, m))]
        if held:
            used.update(held)
            params = _restore(where, config, tensors, params, name, modules, tying)
    _refuse_other_targets(where, config, names, num_layers, used)
    return params


def _restore(
    where: object,
    config: dict[str, Any],
    tensors: Tensors,
    params: tree.Params,
    name: Name,
    modules: tuple[str, ...],
    tying: bool,
) -> tree.Params:
    """One row: its layers' factors stacked and padded."""
    flipped = places.is_tied_head(params, name)
    weight = tree.get(params, places.TOKENS) if flipped else tree.get(params, name.path)
    rows, columns = weight.shape[-2:][::-1] if flipped else weight.shape[-2:]
    held = np.array([any(k in tensors for k in _keys(name, m)) for m in modules])
    ranks = np.where(
        held, targets.pattern_values(modules, config.get("rank_pattern") or {}, config.get("r", 8)), 0
    ).astype(int)
    alphas = targets.pattern_values(modules, config.get("alpha_pattern") or {}, config.get("lora_alpha", 8))
    a = np.zeros((len(modules), rows, ranks.max()), np.float32)
    b = np.zeros((len(modules), ranks.max(), columns), np.float32)
    for i, (module, rank) in enumerate(zip(modules, ranks, strict=True)):
        if rank:
            key_a, key_b = _keys(name, module)
            a[i, :, :rank] = _take(where, tensors, key_a, (int(rank), rows)).T
            b[i, :rank] = _take(where, tensors, key_b, (columns, int(rank))).T
    rslora = bool(config.get("use_rslora", False))
    scale = lora.scales(ranks, alphas, rslora)
    if not name.stacked:
        a, b, scale, ranks = a[0], b[0], scale[0], ranks[0]
    a, b = (b.T, a.T) if flipped else (a, b)
    embedding = name.kind == "embedding"
    follows = True if flipped else places.head_follows(params, name, tying)
    return places.wrap(
        params,
        name,
        lambda base: LoRAWeight(
            base=base,
            a=jnp.asarray(a),
            b=jnp.asarray(b),
            scale=jnp.asarray(scale),
            rank=jnp.asarray(ranks, jnp.int32),
            rate=0.0 if embedding else float(config.get("lora_dropout", 0.0)),
            rslora=rslora,
            tied=follows,
        ),
    )


def _take(where: object, tensors: Tensors, key: str, shape: tuple[int, ...]) -> np.ndarray:
    if key not in tensors:
        raise AdapterError(where, f"no tensor {key}", "both factors of every adapted module", "It was not saved whole.")
    array = tensors.pop(key)
    if array.shape != shape:
        remedy = "The adapter was made for another model, or its config gives another rank."
        raise AdapterError(f"{where}: {key}", f"shape {list(array.shape)}", f"{list(shape)}", remedy)
    return array.astype(np.float32)


def _refuse_other_targets(where: object, config: dict, names: Names, num_layers: int, used: set[str]) -> None:
    """peft adapts what the config selects: modules with factors that it does not, or without any that it does."""
    wanted = config.get("target_modules")
    if not wanted:
        raise AdapterError(f"{where}: target_modules", repr(wanted), "the modules that were adapted")
    wanted = wanted if isinstance(wanted, str) else tuple(wanted)
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers or None
    exclude = config.get("exclude_modules") or ()
    selected = set()
    for name in names:
        target = targets.of_row(
            name,
            num_layers,
            wanted,
            exclude=exclude if isinstance(exclude, str) else tuple(exclude),
            layers=layers,
            saved=config.get("modules_to_save") or (),
        )
        if target is not None:
            selected.update(targets.adapted(name, num_layers, target.layers))
    if config.get("ensure_weight_tying"):
        selected -= {n.module for n in names if n.path == places.HEAD} - used
    if used - selected:
        got = f"factors of {disk.some(sorted(used - selected))}, which target_modules does not select"
        raise AdapterError(where, got, "factors of the modules that the config selects")
    if selected - used:
        got = f"no factors of {disk.some(sorted(selected - used))}, which target_modules selects"
        raise AdapterError(where, got, "factors of every module that the config selects", "It was not saved whole.")
