"""Adapter arithmetic: multiples of an adapter, and several adapters of one base as one.

Adapters may have different ranks, targets and layers. LoRA is merged in the ways of `merging` (AdaLoRA as the LoRA that
it equals). Of other methods there is only the exact sum: a method names the fields that its update is `linear` in, and
a weighted sum of updates is that of these fields where all others are equal. A weight trained whole counts from its
original. A list of methods that add their updates independently is summed part by part. Whatever has no such sum is
refused by name.
"""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.core import weight as weights_
from jaxft.core.weight import Head, InPlace, Slot, Transposed, Untied, Weight
from jaxft.peft import adalora_hf, disk, formats, lora_hf, merging
from jaxft.peft.adalora import AdaLoRAWeight
from jaxft.peft.bitfit import BiasedWeight
from jaxft.peft.lora import LoRAWeight
from jaxft.peft.lora_fa import LoRAFAWeight
from jaxft.peft.merging import Recipe, Update

LOW_RANK = (LoRAWeight, LoRAFAWeight, AdaLoRAWeight)
INDEPENDENT = (*LOW_RANK, BiasedWeight)
"""Those whose update is the same whatever they stand on."""
Mine = list[tuple[Any, float]]
"""The adapters at one place, each with its weight."""


def scale(params: tree.Params, factor: float) -> tree.Params:
    """The parameters with ``factor`` times what their adapter adds to the base. Raises as `combine`."""
    return combine([params], [factor])


def combine(
    adapted: Sequence[tree.Params],
    weights: Sequence[float] | None = None,
    how: str = "cat",
    *,
    density: float | None = None,
    rank: int | None = None,
    sign: Literal["total", "frequency"] = "total",
    seed: int = 0,
) -> tree.Params:
    """The base that all the parameters share, with one adapter: their weighted sum, or what ``how`` makes of them.

    Args:
      adapted: parameters of one model, each with an adapter of its own.
      weights: of the adapters, by default 1 each; they may be negative.
      how: cat (the exact sum), linear, svd, ties, ties_svd, dare_linear, dare_linear_svd, dare_ties, dare_ties_svd,
        magnitude_prune, magnitude_prune_svd: see `merging`.
      density: share of the numbers that ties, dare and magnitude_prune keep.
      rank: of the result of svd; by default the largest of the adapters.
      sign: whose sign counts in ties: that of the sum (total) or of most (frequency).
      seed: of what dare zeroes.

    Raises ValueError for what makes no sense, for adapters of different bases, and naming a place that has no sum."""
    given = [1.0] * len(adapted) if weights is None else [float(w) for w in weights]
    if not adapted or len(given) != len(adapted):
        raise ValueError(f"weights: got {len(given)} for {len(adapted)} adapters; expected one each")
    if not all(map(math.isfinite, given)):
        raise ValueError(f"weights: got {', '.join(map(str, given))}; expected finite numbers")
    stacked = [tree.stack_layers(params) for params in adapted]
    for i, params in enumerate(stacked, 1):
        _refuse_not_finite(f"adapter {i} of {len(stacked)}", params)
    leaves = [dict(tree.paths(params, inside=False)) for params in stacked]
    apart = sorted({path for found in leaves for path in found} - set.intersection(*map(set, leaves)))
    if apart:
        raise ValueError(f"{disk.some(apart)}: not in all the parameters; expected adapters on weights of one model")
    widths = [w.a.shape[-1] for params in stacked for w in tree.adapters(params) if isinstance(w, LOW_RANK)]
    job = _Job(Recipe(how, density, rank, sign, seed), given, rank or max(widths, default=1))
    out = stacked[0]
    with np.errstate(over="ignore", invalid="ignore"):  # refused below, by name
        for path in leaves[0]:
            out = tree.replace(out, path, _joined(job, path, [found[path] for found in leaves]))
    _refuse_not_finite(f"the sum with weights {', '.join(map(str, given))}", out)
    return out


def _refuse_not_finite(what: str, params: tree.Params) -> None:
    """Raises ValueError if an adapter holds numbers that are not finite. The base is not looked at."""
    base = {id(a) for a in jax.tree.leaves(tree.strip(params))}
    for path, a in tree.arrays(params):
        if id(a) not in base and jnp.issubdtype(a.dtype, jnp.inexact) and not bool(jnp.isfinite(a).all()):
            raise ValueError(
                f"{path}: {what} has numbers that are not finite; expected finite ones. Inspect the adapters (jaxft "
                "inspect), and go back to a checkpoint from before training diverged."
            )


@dataclass(frozen=True)
class _Job:
    """What is the same at every place."""

    recipe: Recipe
    weights: list[float]
    rank: int
    """The largest of a result that is an approximation."""


def _joined(job: _Job, path: str, ws: list[Any]) -> Any:
    """One weight for those that the adapted models have at one place."""
    ws = _alike(path, ws)
    depths = [_depth(w) for w in ws]
    if max(depths):
        on = [depth == max(depths) for depth in depths]
        bases = [_base(job, path, w) if hit else w for w, hit in zip(ws, on, strict=True)]
        mine = [(w, weight) for w, weight, hit in zip(ws, job.weights, on, strict=True) if hit]
        return _summed(job, path, _joined(job, path, bases), mine)
    first = ws[0]
    if not isinstance(first, Weight):
        if not all(_equal(first, w) for w in ws[1:]):
            raise ValueError(
                f"{path}: the arrays differ; expected adapters on one base, which is in all the parameters"
            )
        return first
    if {type(w) for w in ws} != {type(first)}:
        kinds = " and ".join(sorted({type(w).__name__ for w in ws}))
        raise ValueError(f"{path}: got {kinds}; expected adapters on one base")
    fields = [f.name for f in dataclasses.fields(first) if weights_.role(f) != weights_.STATIC]  # type: ignore[arg-type]
    parts = {name: [getattr(w, name) for w in ws] for name in fields}
    made = {n: _joined(job, f"{path}/{n}", each) for n, each in parts.items() if each[0] is not None}
    return dataclasses.replace(first, **made)  # type: ignore[type-var]


def _depth(w: Any) -> int:
    """How many adapters stand on one another."""
    if not isinstance(w, Weight) or not w.adapter:
        return 0
    return 1 if isinstance(w, Slot) else 1 + _depth(w.base)


def _base(job: _Job, path: str, w: Any) -> Any:
    """What an adapter stands on. Raises ValueError for one that stands on nothing, and for another adapter unless the
    two add their updates independently, so that a sum of both is both sums."""
    if isinstance(w, Slot):
        raise ValueError(f"{path}: {type(w).__name__} is no map on a weight, so it has no sum")
    if _depth(w.base) and not (job.recipe.how == "cat" and type(w) in INDEPENDENT):
        raise ValueError(
            f"{path}: got {type(w).__name__} on {type(w.base).__name__}, from a list of methods, with "
            f"how={job.recipe.how}; expected one adapter at a place, or how=cat and LoRA or bitfit on another. Merge "
            "all but one of the list into the base first."
        )
    return w.base


def _alike(path: str, ws: list[Any]) -> list[Any]:
    """The weights with a tied head held apart from its embedding in all, if any has it so."""
    if any(isinstance(w, Untied) for w in ws):
        if any(isinstance(w, Weight) and w.tied for w in ws):
            raise ValueError(f"{path}: the tied head follows the embedding in one adapter and has its own in another")
        ws = [w if isinstance(w, Untied) else Untied(_free(w), tree.strip(w)) for w in ws]
    if any(isinstance(w, Head) for w in ws):
        ws = [w if isinstance(w, Head) else Head(Transposed(w)) for w in ws]
    return ws


def _free(w: Any) -> Any:
    """An embedding that has no head to think of."""
    return dataclasses.replace(w, tied=None) if isinstance(w, Weight) and w.adapter else w  # type: ignore[type-var]


def _summed(job: _Job, path: str, base: Any, mine: Mine) -> Weight:
    """One adapter on ``base``."""
    kinds, first = {type(w) for w, _ in mine}, mine[0][0]
    if {w.tied for w, _ in mine} != {first.tied}:
        raise ValueError(f"{path}: the tied head follows the embedding in one adapter and not in another")
    if kinds <= set(LOW_RANK):
        return _low_rank(job, path, base, mine)
    names = " and ".join(sorted(kind.__name__ for kind in kinds))
    if job.recipe.how not in ("cat", "linear"):
        raise ValueError(f"{path}: got {names}; expected LoRA, of which {job.recipe.how} is made. Use cat, a sum.")
    if kinds == {InPlace}:
        start = jax.tree.map(lambda b: b.astype(jnp.float32), weights_.plain(base))
        values = [jax.tree.map(lambda v, b, weight=weight: weight * (v - b), w.value, start) for w, weight in mine]
        return dataclasses.replace(first, base=base, value=jax.tree.map(lambda *parts: sum(parts), start, *values))
    if len(kinds) > 1 or not first.linear:
        raise ValueError(f"{path}: got {names}; expected adapters of one method that adds its update to the base")
    return _linear(path, base, mine)


def _linear(path: str, base: Any, mine: Mine) -> Weight:
    """The sum in the fields that the update is linear in. Raises ValueError if adapters differ in another one."""
    first = mine[0][0]
    for f in dataclasses.fields(first):
        apart = [w for w, _ in mine[1:] if not _equal(getattr(first, f.name), getattr(w, f.name))]
        if apart and f.name not in ("base", "gate", "key", *first.linear):
            raise ValueError(f"{path}: the {type(first).__name__} differ in {f.name}; only equal ones have a sum")

    def total(name: str) -> Any:
        fields = [(getattr(w, name), w.gate, weight) for w, weight in mine]
        return sum(weight * gate.reshape(*gate.shape, *[1] * (v.ndim - gate.ndim)) * v for v, gate, weight in fields)

    gate = jnp.stack([w.gate for w, _ in mine]).max(0)
    return dataclasses.replace(first, base=base, gate=gate, **{name: total(name) for name in first.linear})


def _equal(a: Any, b: Any) -> bool:
    """Whether two arrays, or things made of arrays, or static values, are the same."""
    if a is b:
        return True
    one, other = jax.tree.flatten(a), jax.tree.flatten(b)
    pairs = zip(one[0], other[0], strict=False)
    return one[1] == other[1] and all(
        x.shape == y.shape and x.dtype == y.dtype and bool(jnp.array_equal(x, y)) if hasattr(x, "shape") else x == y
        for x, y in pairs
    )


def _low_rank(job: _Job, path: str, base: Any, mine: Mine) -> LoRAWeight:
    """A LoRA of scale 1, made layer by layer on the host; its ranks may differ by layer."""
    held = [(dataclasses.replace(formats.host(w), base=None), weight) for w, weight in mine]
    first, stack = mine[0][0], base.shape[:-2]
    made: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}
    for index in np.ndindex(stack):
        layers = [(w[index], weight) for w, weight in held]
        updates = [_update(w, weight) for w, weight in layers if np.any(w.adapted)]
        updates = [u for u in updates if u.a.shape[1]]
        draws = np.random.default_rng([job.recipe.seed, zlib.crc32(path.encode()), *index])
        try:
            made |= {index: merging.merged(job.recipe, updates, job.rank, draws)} if updates else {}
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    width = max((a.shape[1] for a, _ in made.values()), default=1)
    a, b = np.zeros((*base.shape[:-1], width), np.float32), np.zeros((*stack, width, base.shape[-1]), np.float32)
    rank = np.zeros(stack, np.int32)
    for index, (left, right) in made.items():
        rank[index] = left.shape[1]
        a[index][:, : left.shape[1]], b[index][: left.shape[1]] = left, right
    return LoRAWeight(
        base=base,
        a=jnp.asarray(a),
        b=jnp.asarray(b),
        scale=jnp.asarray(rank > 0, jnp.float32),
        rank=jnp.asarray(rank),
        bias=_bias(job, path, mine),
        rate=first.rate,
        lookup=isinstance(first, LoRAWeight) and first.lookup,
        tied=first.tied,
        loftq=first.loftq if isinstance(first, LoRAWeight) else None,
    )


def _update(w: Any, weight: float) -> Update:
    """What one layer of an adapter adds, without padding."""
    if isinstance(w, AdaLoRAWeight):
        tensors = adalora_hf.write(w)
        a, b = tensors[adalora_hf.A], tensors[adalora_hf.E].T * tensors[adalora_hf.B]
    else:
        tensors = lora_hf.write(w)
        a, b = (tensors[end] for end in (lora_hf.EMBEDDING if w.lookup else lora_hf.LINEAR))
    return Update(a.T, b.T, float(w.scale), weight)


def _bias(job: _Job, path: str, mine: Mine) -> jax.Array | None:
    """The sum of the biases of B, if an adapter has one. Raises ValueError where it is not a sum that is asked for."""
    with_bias = [(w, weight) for w, weight in mine if isinstance(w, LoRAWeight) and w.bias is not None]
    biases = [weight * w.scale[..., None] * w.bias for w, weight in with_bias]
    if biases and job.recipe.how != "cat":
        raise ValueError(f"{path}: {job.recipe.how} has no meaning for the bias of B (lora_bias); use cat")
    return sum(biases) if biases else None  # type: ignore[return-value]
