"""Scores of a student beside its teacher: how far their next-token distributions and their hidden states are apart.

The step scores the view ``teacher`` first and hands what it returns, hidden states and the head that reads them, to the
``policy`` as ``batch["teacher"]``: the two meet in the chunked head, so neither model's logits ever exist at once. A
teacher that was stored is in the batch as its likeliest tokens: ``teacher_ids`` int32[B, T, K] and ``teacher_logp``
[B, T, K], aligned with the tokens as ``logp`` is.

Hidden states are compared after a projection that is learnt with the student, and thrown away after it: arrays at
``params["distil"]``, which the decoder does not know.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxft.core import tree
from jaxft.core.weight import Weight, trainable, weight
from jaxft.models import decoder, divergences, heads, slots, unfold
from jaxft.models.config import ModelConfig
from jaxft.models.decoder import Execution
from jaxft.models.divergences import Divergence
from jaxft.objectives import terms
from jaxft.objectives.terms import Batch
from jaxft.rollout import score as score_
from jaxft.rollout.score import Score

PROJECTIONS = "distil"
Pairs = Sequence[tuple[int, int]]
"""Layers of the student and of the teacher whose outputs are to match, from 0; negative ones count from the end."""


@weight
class Projection(Weight):
    """From the student's hidden states to the teacher's; trained, in float32. value: [D, D of the teacher]."""

    value: jax.Array = trainable()
    adapter: ClassVar[bool] = False

    @property
    def shape(self):
        return self.value.shape

    @property
    def dtype(self):
        return self.value.dtype

    def __rmatmul__(self, x):
        return x @ self.value.astype(x.dtype)

    def dense(self):
        return self.value

    def axes(self, names):
        return {"value": ()}


def project(
    params: tree.Params, config: ModelConfig, teacher_config: ModelConfig, layers: Pairs, key: jax.Array
) -> tree.Params:
    """The student's parameters with a projection for each pair of layers: the identity between states of one width,
    else random with variance 1 / D. Raises ValueError for a layer that is not there, and for a pair given twice."""
    shape = config.hidden_size, teacher_config.hidden_size

    def made(i: int) -> jax.Array:
        if shape[0] == shape[1]:
            return jnp.eye(shape[0], dtype=jnp.float32)
        return jax.random.normal(jax.random.fold_in(key, i), shape) / math.sqrt(shape[0])

    names = [_name(pair) for pair in _resolved(config, teacher_config, layers)]
    return {**params, PROJECTIONS: {name: Projection(made(i)) for i, name in enumerate(names)}}


def without(params: tree.Params) -> tree.Params:
    """The student alone, as it is used and exported: no projections."""
    return {name: part for name, part in params.items() if name != PROJECTIONS}


def _name(pair: tuple[int, int]) -> str:
    return f"{pair[0]}-{pair[1]}"


def _resolved(config: ModelConfig, teacher_config: ModelConfig, layers: Pairs) -> list[tuple[int, int]]:
    """The pairs with layers counted from 0."""
    found = []
    for pair in layers:
        for i, one, whose in zip(pair, (config, teacher_config), ("student", "teacher"), strict=True):
            if not -one.num_layers <= i < one.num_layers:
                n = one.num_layers
                raise ValueError(
                    f"objective.hidden_layers: got {i} for the {whose}, which has {n} layers; expected {-n} to {n - 1}"
                )
        found.append((pair[0] % config.num_layers, pair[1] % teacher_config.num_layers))
    if len(set(found)) < len(found):
        raise ValueError(f"objective.hidden_layers: got {list(layers)}; expected each pair of layers once")
    return found


def shared_vocabulary(
    config: ModelConfig, tokenizer: Any, teacher_config: ModelConfig, teacher_tokenizer: Any, what: str = "teacher"
) -> int:
    """How many ids from 0 both models have, where their tokenizers are the same but for tokens beyond that number.

    Models pad their embedding with rows for no token, each in its own way. Raises ValueError naming a token that the
    two number differently."""
    common = min(config.vocab_size, teacher_config.vocab_size)
    own, other = ({i: t for t, i in one.get_vocab().items() if i < common} for one in (tokenizer, teacher_tokenizer))
    apart = sorted(i for i in own.keys() | other.keys() if own.get(i) != other.get(i))
    if apart:
        i = apart[0]
        remedy = ", or objective.divergence=uld, which compares different tokenizers" if what == "teacher" else ""
        raise ValueError(
            f"`{what}.path`: its tokenizer differs from the model's in {len(apart)} of {common} ids: id {i} is "
            f"{other.get(i)!r} for the {what} and {own.get(i)!r} for the model; expected the same tokens{remedy}"
        )
    return common


def make_score(
    config: ModelConfig,
    teacher_config: ModelConfig | None,
    needs: tuple[str, ...],
    *,
    dtype: Any,
    divergence: Divergence,
    reports: tuple[str, ...] = (),
    vocabulary: int | None = None,
    layers: Pairs = (),
    hidden_loss: Literal["mse", "cosine"] = "mse",
    reserved: int = 0,
    execution: Execution = decoder.DEFAULT,
    teacher_execution: Execution | None = None,
    neftune_alpha: float = 0.0,
) -> Score:
    """Builds ``score(view, params, batch, key=None)`` for the views ``policy`` and ``teacher``, or ``start``: the
    student's own arrays, as they were or moving after it, as the teacher.

    Args:
      teacher_config: the teacher's; None for one that was stored.
      needs: what the policy returns with a gradient, float32[B, T] each: divergence, logp, hidden.
      reports: what it returns without: see `divergences.token_scores`.
      vocabulary: see there, and `shared_vocabulary`.
      layers: the pairs of ``hidden``, averaged; ``params`` then have their projections (`project`).
      reserved: positions before each document that the batch keeps for the student's prompt; not the teacher's.
      teacher_execution: how the teacher is computed, if not as the student is.

    The teacher returns ``hidden`` [B, T, D of its own], its ``head`` and the layers asked of it; it reads the arrays
    ``teacher_tokens``, ``teacher_positions`` and ``teacher_segments`` of a batch that has them, which then also has
    ``teacher_loss_mask`` (see `terms.counterparts`). Raises ValueError for what cannot be compared."""
    pairs = [] if teacher_config is None else _resolved(config, teacher_config, layers)
    compared = tuple(name for name in needs if name != "hidden")
    if ("hidden" in needs) != bool(pairs):
        raise ValueError(
            f"hidden_layers: got {list(layers)} with needs {needs} and teacher {teacher_config is not None}"
        )

    def teacher(config: ModelConfig, params: tree.Params, batch: Batch, own: bool) -> dict[str, Any]:
        params, capture = tree.cast(params, dtype), tuple(dict.fromkeys(f"layers/{j}" for _, j in pairs))
        if own:
            rows: Batch = batch
        elif "teacher_tokens" in batch:
            names = ("tokens", "positions", "segments")
            rows = {name: batch[f"teacher_{name}"] for name in names if f"teacher_{name}" in batch}
        else:
            rows = unreserved(batch, reserved)
        if not own and score_.reserved_in(params, rows):
            raise ValueError("teacher: it has a learnt prompt, for which these rows keep no place; merge or drop it")
        how = execution if teacher_execution is None else teacher_execution
        hidden_BTD, captured = score_.states(config, params, rows, execution=how, capture=capture)
        return {"hidden": hidden_BTD, "head": heads.head_of(config, params), **captured}

    def policy(params: tree.Params, batch: Batch, key: jax.Array | None) -> dict[str, jax.Array]:
        _check_prompt(params, batch, reserved)
        noise_BTD = score_.noise(config, neftune_alpha, batch, key, score_.reserved_in(params, batch))
        params = tree.cast(tree.dropout_keys(params, score_.dropout_key(key)), dtype)
        capture = tuple(dict.fromkeys(f"layers/{i}" for i, _ in pairs))
        hidden_BTD, captured = score_.states(config, params, batch, noise_BTD, execution=execution, capture=capture)
        given = (config, heads.head_of(config, params), hidden_BTD, score_.predicted(batch["tokens"]))
        how = {"reports": reports, "mesh": execution.mesh}
        if teacher_config is None:
            stored = score_.predicted(batch["teacher_ids"]), score_.predicted(batch["teacher_logp"])
            out = divergences.token_scores_stored(divergence, *given, stored, compared, vocabulary=vocabulary, **how)
            return score_.aligned(out, params, batch)
        said: Any = jax.lax.stop_gradient(batch["teacher"])
        bring = _brought(batch, divergence)
        held = (teacher_config, said["head"], bring(said["hidden"]))
        out = divergences.token_scores(divergence, *given, held, compared, vocabulary=vocabulary, **how)
        if pairs:
            distances = [
                distance(hidden_loss, captured[f"layers/{i}"] @ params[PROJECTIONS][_name((i, j))], there)
                for i, j in pairs
                for there in [bring(said[f"layers/{j}"])]
            ]
            out["hidden"] = sum(distances[1:], distances[0]) / len(distances)
        return score_.aligned(out, params, batch)

    def score(view: str, params: tree.Params, batch: Batch, key: jax.Array | None = None) -> dict[str, Any]:
        if view in ("teacher", "start") and teacher_config is not None:
            return teacher(teacher_config, params, batch, view == "start")
        if view == "policy":
            return policy(params, batch, key)
        raise ValueError(f"view: got {view!r}; expected policy{'' if teacher_config is None else ', teacher or start'}")

    return score


def distance(name: Literal["mse", "cosine"], x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
    """float32[B, T]: the mean square of the difference, or 1 minus the cosine."""
    x, y = (a.astype(jnp.float32) for a in (x_BTD, y_BTD))
    if name == "mse":
        return jnp.mean(jnp.square(x - y), -1)
    norms = jnp.sum(jnp.square(x), -1) * jnp.sum(jnp.square(y), -1)
    return 1 - jnp.sum(x * y, -1) * jax.lax.rsqrt(jnp.maximum(norms, 1e-12))


def _brought(batch: Batch, divergence: Divergence) -> Callable[[jax.Array], jax.Array]:
    """Brings what the teacher says at each of its places, [B, W, D], to the student's: [B, T, D]."""
    if "teacher_tokens" not in batch:
        return lambda x: x
    if divergence.name != "uld":
        raise ValueError(f"divergence: got {divergence.name} with teacher_tokens in the batch; expected uld")
    places_BT, _ = terms.counterparts(batch)
    # each is the place of a token; the states are those that predict it
    places_BT = jnp.maximum(score_.predicted(places_BT) - 1, 0)
    return lambda x: jnp.take_along_axis(x, places_BT[..., None], axis=1)


def unreserved(batch: Batch, reserved: int) -> dict[str, jax.Array]:
    """A student's rows as a teacher without its prompt reads them: what is kept for that is padding."""
    unfolded = ("unfold", "unfold_segments", "fold", "fold_again")
    names = ("tokens", "positions", "segments", *unfolded)
    kept = {name: batch[name] for name in names if name in batch}
    if not reserved or "segments" not in batch:
        return kept
    positions_BT = score_.positions(batch)
    segments_BT = jnp.where(positions_BT < reserved, 0, batch["segments"])
    kept |= {"positions": jnp.maximum(positions_BT - reserved, 0), "segments": segments_BT}
    if (shared := unfold.of(batch)) is not None:
        kept["unfold_segments"] = jnp.where(unfold.whole(positions_BT, shared) < reserved, 0, shared.segments)
    return kept


def _check_prompt(params: tree.Params, batch: Batch, reserved: int) -> None:
    """The teacher must not read as tokens what stands where a prompt goes."""
    kept = score_.reserved_in(params, batch)
    if kept != (reserved if "segments" in batch else 0):
        raise ValueError(
            f"reserved: got {reserved}; the student has a prompt of {slots.prompt_length(params)} positions"
        )
