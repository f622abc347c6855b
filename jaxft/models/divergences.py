r"""How far a student's next-token distribution is from a teacher's, chunk by chunk: neither model's [B, T, V] exists.

With T the teacher's distribution, S the student's and a temperature in both softmaxes,

.. math::
    \text{forward\_kl} &= KL(T \| S), \quad \text{reverse\_kl} = KL(S \| T), \quad
    \text{tvd} = \tfrac12 \textstyle\sum_v |T_v - S_v| \\
    \text{jsd} &= \beta\, KL(T \| M) + (1 - \beta)\, KL(S \| M), \quad M = \beta T + (1 - \beta) S \\
    \text{skew\_forward\_kl} &= KL(T \| \alpha T + (1 - \alpha) S), \quad
    \text{skew\_reverse\_kl} = KL(S \| \alpha S + (1 - \alpha) T) \\
    \text{uld} &= \textstyle\sum_i |T_{(i)} - S_{(i)}| \quad \text{of probabilities in order of size}

jsd: Agarwal et al. 2024, eq. 1 (arXiv:2306.13649); 0 and 1 for its beta mean forward and reverse KL, js is beta = 1/2.
Skew: Ko et al. 2024, eq. 3 (arXiv:2402.03898). uld, which needs no common vocabulary: Boizard et al. 2024, eq. 3
(arXiv:2402.12030). Unusual: as in trl, nothing is multiplied by the squared temperature (Hinton et al. 2015, sec. 2.1),
so that the gradient falls with it.

Of a teacher's K likeliest tokens alone, what is compared is K of the vocabulary and one bucket for all the rest, or
those K as if there were no others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxft.models import heads
from jaxft.models.config import ModelConfig

Name = Literal["forward_kl", "reverse_kl", "js", "jsd", "tvd", "skew_forward_kl", "skew_reverse_kl", "uld"]
GRADIENTS = ("logp", "divergence")  # what may be differentiated, if asked
REPORTS = ("agreement", "teacher_entropy")
NEEDS = (*GRADIENTS, *REPORTS, *heads.METRICS)
LEAST = -100.0  # a log-probability that is 0 in float32
LEAST_REST = 2.0**-23  # of a teacher whose K likeliest tokens sum to 1 as far as float32 can tell


@dataclass(frozen=True)
class Divergence:
    """Which, and how it is made."""

    name: Name = "forward_kl"
    beta: float = 0.5
    """Share of the teacher in the mixture of ``jsd``."""
    skew: float = 0.1
    """Share of the first distribution in the second, alpha, in the skewed ones."""
    temperature: float = 1.0
    """What both models' logits are divided by; stored log-probabilities have it already."""
    rest: Literal["bucket", "none"] = "bucket"
    """What is done about tokens that are not among the stored: one bucket for all, or as if there were none."""

    def __call__(self, t: jax.Array, s: jax.Array) -> jax.Array:
        """From log-probabilities float32[..., V] of teacher and student: float32[...], nats (tvd has no unit). Not
        ``uld``: see `ranked_distance`."""
        return MEASURES[self.name](self, t, s)


def kl(p: jax.Array, q: jax.Array) -> jax.Array:
    """KL of log-probabilities, float32[..., V] -> float32[...]."""
    return jnp.sum(jnp.exp(p) * (p - q), -1)


def mixture(p: jax.Array, q: jax.Array, share: float) -> jax.Array:
    """Log-probabilities of ``share`` of p and the rest of q."""
    if share in (0.0, 1.0):
        return p if share else q
    return jnp.logaddexp(p + jnp.log(jnp.float32(share)), q + jnp.log1p(-jnp.float32(share)))


def jsd(t: jax.Array, s: jax.Array, beta: float) -> jax.Array:
    """The generalised Jensen-Shannon divergence; at the ends of beta, where it would be 0, forward and reverse KL."""
    if beta in (0.0, 1.0):
        return kl(s, t) if beta else kl(t, s)
    m = mixture(t, s, beta)
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


MEASURES: dict[str, Callable[[Divergence, jax.Array, jax.Array], jax.Array]] = {
    "forward_kl": lambda _, t, s: kl(t, s),
    "reverse_kl": lambda _, t, s: kl(s, t),
    "js": lambda _, t, s: jsd(t, s, 0.5),
    "jsd": lambda how, t, s: jsd(t, s, how.beta),
    "tvd": lambda _, t, s: 0.5 * jnp.sum(jnp.abs(jnp.exp(t) - jnp.exp(s)), -1),
    "skew_forward_kl": lambda how, t, s: kl(t, mixture(t, s, how.skew)),
    "skew_reverse_kl": lambda how, t, s: kl(s, mixture(s, t, how.skew)),
}


@dataclass(frozen=True)
class _Compared:
    """Statistics of a chunk (see `heads.Statistics`); all but the divergence are of the student at temperature 1."""

    divergence: Divergence
    needs: tuple[str, ...]
    gradients: tuple[str, ...]

    def _own(self, y: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        names = tuple(n for n in self.needs if n in heads.NEEDS)
        return heads.TokenScores(names)(y, labels) if names else {}


@dataclass(frozen=True)
class _Live(_Compared):
    """``rows``: labels and the teacher's hidden states; its head is the other one."""

    teacher: ModelConfig
    vocabulary: int
    """The ids from 0 that the two have in common."""

    def _log_softmax(self, y: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(y[..., : self.vocabulary] / self.divergence.temperature)

    def given(self, other: Any, rows: tuple[jax.Array, jax.Array]) -> Any:
        labels, hidden = rows
        return labels, self._log_softmax(heads.logits(self.teacher, other, hidden))

    def __call__(self, y: jax.Array, given: Any) -> dict[str, jax.Array]:
        labels, t = given
        out = self._own(y, labels)
        if "divergence" in self.needs:
            out["divergence"] = self.divergence(t, self._log_softmax(y))
        if "agreement" in self.needs:
            own = jnp.argmax(y[..., : self.vocabulary], -1)
            out["agreement"] = (own == jnp.argmax(t, -1)).astype(jnp.float32)
        if "teacher_entropy" in self.needs:
            out["teacher_entropy"] = -jnp.sum(jnp.exp(t) * t, -1)
        return out


@dataclass(frozen=True)
class _Ranked(_Compared):
    """``uld``. ``rows``: labels and the teacher's hidden states; its head is the other one."""

    teacher: ModelConfig

    def given(self, other: Any, rows: tuple[jax.Array, jax.Array]) -> Any:
        labels, hidden = rows
        y = heads.logits(self.teacher, other, hidden)
        return labels, jnp.sort(jax.nn.softmax(y / self.divergence.temperature), -1)

    def __call__(self, y: jax.Array, given: Any) -> dict[str, jax.Array]:
        labels, t = given
        out = self._own(y, labels)
        if "divergence" in self.needs:
            out["divergence"] = ranked_distance(t, jax.nn.softmax(y / self.divergence.temperature))
        return out


def ranked_distance(t: jax.Array, s: jax.Array) -> jax.Array:
    """The sum of the differences of probabilities of equal rank: t float32[..., V] in rising order and s float32[...,
    V of its own] in any, to float32[...]; the smaller vocabulary has tokens of probability 0 besides.

    Unusual: t is brought into the order of s, so that the gradient is a sign for each word and no scatter."""
    more = s.shape[-1] - t.shape[-1]
    t = jnp.pad(t, [(0, 0)] * (t.ndim - 1) + [(max(more, 0), 0)])
    least, t = t[..., : max(-more, 0)], t[..., max(-more, 0) :]
    place = jax.lax.broadcasted_iota(jnp.int32, s.shape, s.ndim - 1)
    _, order = jax.lax.sort((jax.lax.stop_gradient(s), place), num_keys=1)
    _, t = jax.lax.sort((order, t), num_keys=1)
    return jnp.sum(jnp.abs(t - s), -1) + jnp.sum(least, -1)


@dataclass(frozen=True)
class _Stored(_Compared):
    """``rows``: labels, and the teacher's likeliest tokens with their log-probabilities, [..., K]."""

    vocabulary: int
    """The ids from 0 that the teacher chose among."""

    def given(self, other: None, rows: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        labels, ids, logp = rows
        t = jnp.maximum(logp.astype(jnp.float32), LEAST)
        if self.divergence.rest == "bucket":
            rest = jnp.maximum(1 - jnp.sum(jnp.exp(t), -1, keepdims=True), LEAST_REST)
            t = jnp.concatenate([t, jnp.log(rest)], -1)
        return labels, ids, jax.nn.log_softmax(t)

    def __call__(self, y: jax.Array, given: Any) -> dict[str, jax.Array]:
        labels, ids, t = given
        out = self._own(y, labels)
        if "divergence" in self.needs:
            scaled = y[..., : self.vocabulary] / self.divergence.temperature
            s = jnp.take_along_axis(scaled, ids, -1)
            if self.divergence.rest == "bucket":
                # not 1 minus the others, which has no digits left where the student is sure
                others = jnp.put_along_axis(scaled, ids, -jnp.inf, axis=-1, inplace=False)
                s = jnp.concatenate([s, jax.nn.logsumexp(others, -1, keepdims=True)], -1)
            out["divergence"] = self.divergence(t, jax.nn.log_softmax(s))
        if "agreement" in self.needs:
            best = jnp.take_along_axis(ids, jnp.argmax(t[..., : ids.shape[-1]], -1, keepdims=True), -1)
            own = jnp.argmax(y[..., : self.vocabulary], -1)
            out["agreement"] = (own == best[..., 0]).astype(jnp.float32)
        if "teacher_entropy" in self.needs:
            out["teacher_entropy"] = -jnp.sum(jnp.exp(t) * t, -1)
        return out


def token_scores(
    divergence: Divergence,
    config: ModelConfig,
    head: Any,
    x_BTD: jax.Array,
    labels_BT: jax.Array,
    teacher: tuple[ModelConfig, Any, jax.Array],
    needs: tuple[str, ...] = ("divergence",),
    *,
    reports: tuple[str, ...] = (),
    vocabulary: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, jax.Array]:
    """`heads.token_scores` with the divergence of the student from a teacher, float32[B, T] each.

    Args:
      head, x_BTD, labels_BT: the student's, as there.
      teacher: config, head and hidden states [B, T, D of its own]; none of it gets a gradient.
      needs: what is differentiated, of ``logp`` and ``divergence``: each costs a product with the head.
      reports: what is not: names of `heads.NEEDS`; agreement (1 where both find the same token likeliest) and
        teacher_entropy (nats, at the temperature).
      vocabulary: compare the first so many ids, where the tokenizers agree and one model has rows of padding.

    Raises ValueError for other needs, and for vocabularies of different sizes where nothing says what they share."""
    sizes, asked = (config.vocab_size, teacher[0].vocab_size), _asked(needs, reports)
    if divergence.name == "uld":
        if refused := set(reports) & set(REPORTS):
            raise ValueError(f"reports: got {sorted(refused)}; divergence=uld compares no token with another")
        ask = _Ranked(divergence, *asked, teacher[0])
    else:
        if vocabulary is None and sizes[0] != sizes[1]:
            raise ValueError(
                f"vocabulary: the student has {sizes[0]} tokens, the teacher {sizes[1]}; expected equal numbers, or to "
                "be told how many ids from 0 mean the same in both (divergence=uld compares different tokenizers)"
            )
        if vocabulary is not None and not 0 < vocabulary <= min(sizes):
            raise ValueError(f"vocabulary: got {vocabulary}; expected 1 to {min(sizes)}, the smaller model's")
        ask = _Live(divergence, *asked, teacher[0], vocabulary or sizes[0])
    rows = (labels_BT, jax.lax.stop_gradient(teacher[2]))
    return heads.over_chunks(ask, config, head, x_BTD, rows, teacher[:2], mesh)


def token_scores_stored(
    divergence: Divergence,
    config: ModelConfig,
    head: Any,
    x_BTD: jax.Array,
    labels_BT: jax.Array,
    teacher: tuple[jax.Array, jax.Array],
    needs: tuple[str, ...] = ("divergence",),
    *,
    reports: tuple[str, ...] = (),
    vocabulary: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, jax.Array]:
    """`token_scores` from what was kept of a teacher: ``teacher`` is the ids int32[B, T, K] of the K likeliest tokens
    after each hidden state, all different, and their log-probabilities at ``divergence.temperature``, floating
    [B, T, K].

    ``vocabulary``: the ids from 0 that it chose among; all of the student's by default. Raises ValueError for other
    needs, for ``uld``, for ids that the student lacks, and for a K that leaves no rest."""
    ids, logp = teacher
    vocabulary = config.vocab_size if vocabulary is None else vocabulary
    if not 0 < vocabulary <= config.vocab_size:
        raise ValueError(f"vocabulary: got {vocabulary} for stored tokens; the student has {config.vocab_size} ids")
    if divergence.name == "uld":
        raise ValueError("divergence: got uld with a stored teacher; expected one that compares token by token")
    if divergence.rest == "bucket" and ids.shape[-1] >= vocabulary:
        raise ValueError(f"teacher_ids: {ids.shape[-1]} of {vocabulary} tokens leave no rest; expected fewer")
    ask = _Stored(divergence, *_asked(needs, reports), vocabulary)
    return heads.over_chunks(ask, config, head, x_BTD, (labels_BT, ids, jax.lax.stop_gradient(logp)), None, mesh)


def _asked(needs: tuple[str, ...], reports: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All that is asked, and what of it is differentiated."""
    everything = tuple(dict.fromkeys((*needs, *reports)))
    for what, names, known in (("needs", needs, GRADIENTS), ("reports", reports, NEEDS)):
        unknown = [n for n in names if n not in known]
        if unknown:
            raise ValueError(f"{what}: got {unknown}; expected names among {known}")
    return everything, tuple(needs)


@dataclass(frozen=True)
class _Top:
    """The likeliest tokens, of which nothing is differentiated."""

    count: int
    temperature: float
    vocabulary: int
    needs: tuple[str, ...] = ("ids", "logp")
    gradients: tuple[str, ...] = ()

    def given(self, other: None, rows: None) -> None:
        return None

    def __call__(self, y: jax.Array, given: None) -> dict[str, jax.Array]:
        y = y[..., : self.vocabulary] / self.temperature
        best, ids = jax.lax.top_k(y, self.count)
        return {"ids": ids, "logp": best - jax.nn.logsumexp(y, -1, keepdims=True)}


def top(
    config: ModelConfig,
    head: Any,
    x_BTD: jax.Array,
    count: int,
    *,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, jax.Array]:
    """The ``count`` likeliest next tokens after each hidden state, likeliest first: ids int32 and logp float32, both
    [B, T, count]. ``vocabulary``: as if there were only so many ids. Raises ValueError for a count that is not below
    their number."""
    ids = config.vocab_size if vocabulary is None else vocabulary
    if not 0 < ids <= config.vocab_size:
        raise ValueError(f"vocabulary: got {ids}; expected 1 to {config.vocab_size}, the model's")
    if not 0 < count < ids:
        raise ValueError(f"top_k: got {count}; expected 1 to {ids - 1}, fewer than the vocabulary")
    return heads.over_chunks(_Top(count, temperature, ids), config, head, x_BTD, None, None, mesh)
