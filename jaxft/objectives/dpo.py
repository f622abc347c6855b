r"""Direct preference optimisation: the losses of `preference.LOSSES`, one or a weighted sum of several, over a batch.

.. math:: L = \sum_k \frac{w_k}{|P|} \sum_{p \in P} L_k(p)

P are the pairs of the optimiser step, whatever row, micro-batch or device they are in; ``sft`` alone is a mean over
tokens (of the chosen). The reference is the policy as the stage began. What may change in a pair's log-probabilities:

- ``ld_alpha``: LD-DPO, Liu et al. 2024 (arXiv:2409.06411). Of two completions the longer one's tokens beyond the
  other's length count alpha times.
- ``use_weighting``: WPO, Zhou et al. 2024, eq. 2 (arXiv:2406.11827). A pair's loss counts by how likely the policy is
  to write both completions, a constant of the gradient: the product of exp(mean over tokens of log p - log Σ p²).
- ``ref_sync_steps``: TR-DPO, Gorbatovski et al. 2024, eq. 3 (arXiv:2404.09656). The reference follows the policy.
- ``f_divergence_type``: other divergences from the reference than reverse KL (`divergences`).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxft.objectives import preference, sequences, terms
from jaxft.objectives.divergences import Divergence
from jaxft.objectives.preference import LOSSES
from jaxft.objectives.sequences import Pair
from jaxft.objectives.terms import Batch, Carry, Follow, Mean, Means, Scores

LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
SORTED = ("aot", "aot_unpaired")
"""Losses that compare a pair with others of the whole batch."""


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation and its relatives, on pairs of a chosen and a rejected completion."""

    loss: LossType | tuple[LossType, ...] = "sigmoid"
    """Loss of a pair, or a list of several to be summed."""
    loss_weights: tuple[float, ...] | None = None
    """Weight of each of them. Default: 1 each."""
    beta: float = 0.1
    """How closely the policy keeps to the reference; lower goes further. 1/2β is the difference that ipo draws to."""
    label_smoothing: float = 0.0
    """Share of labels taken to be wrong (robust, aot), or the smoothing of exo_pair, where it is above 0 (1e-3)."""
    discopop_tau: float = 0.05
    """Temperature of discopop."""
    f_divergence_type: Divergence = "reverse_kl"
    """What measures the distance from the reference, in the losses of the difference of two completions."""
    f_alpha_divergence_coef: float = 0.5
    """alpha of alpha_divergence: 0 is forward KL, 1 reverse KL."""
    ld_alpha: float | None = None
    """LD-DPO: what a token counts beyond the other completion's length, from 0 to 1. Default: 1."""
    use_weighting: bool = False
    """WPO: whether pairs count by how likely the policy is to write them."""
    reference_free: bool = False
    """Whether the reference is the same for all completions, so that no model stands for it."""
    ref_sync_steps: int | None = None
    """TR-DPO: steps after which the reference moves towards the policy; 512 is usual. Default: it stays."""
    ref_mixup: float = 0.6
    """TR-DPO: how far it moves; 1 is all the way."""

    @property
    def losses(self) -> dict[LossType, float]:
        """Weight of each loss."""
        names = (self.loss,) if isinstance(self.loss, str) else self.loss
        return dict(zip(names, self.loss_weights or (1.0,) * len(names), strict=True))

    def options(self, name: LossType) -> dict[str, float | str]:
        """The settings that a loss takes."""
        return {option: getattr(self, option) for option in LOSSES[name].options}

    def __post_init__(self) -> None:
        names = (self.loss,) if isinstance(self.loss, str) else self.loss
        if not names or len(set(names)) < len(names):
            raise ValueError(f"objective.loss: got {list(names)}; expected one loss or more, each once")
        if self.loss_weights is not None and len(self.loss_weights) != len(names):
            got = list(self.loss_weights)
            raise ValueError(f"objective.loss_weights: got {got}; expected {len(names)}, one for each of {list(names)}")
        if not all(weight > 0 for weight in self.loss_weights or ()):
            raise ValueError(f"objective.loss_weights: got {list(self.loss_weights or ())}; expected numbers above 0")
        for name in ("beta", "discopop_tau"):
            if not getattr(self, name) > 0:
                raise ValueError(f"objective.{name}: got {getattr(self, name)}; expected a number above 0")
        self._check_options(names)
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"objective.ld_alpha: got {self.ld_alpha}; expected from 0 to 1")
        if self.use_weighting and (apart := sorted({*SORTED, "sft"} & {*names})):
            raise ValueError(
                f"objective.use_weighting: got true with {', '.join(apart)}, which is no loss of single pairs that "
                "could be weighed; leave out one of them"
            )
        if self.ref_sync_steps is not None and (self.ref_sync_steps < 1 or self.reference_free):
            got = "reference_free=true" if self.reference_free else str(self.ref_sync_steps)
            raise ValueError(f"objective.ref_sync_steps: got {got}; expected at least 1, and a reference to move")
        if not 0 < self.ref_mixup <= 1:
            raise ValueError(f"objective.ref_mixup: got {self.ref_mixup}; expected above 0 and at most 1")

    def _check_options(self, names: tuple[LossType, ...]) -> None:
        """Refuses an option that no loss, or not every loss, can take."""
        smoothing = self.label_smoothing
        if "exo_pair" in names and not 0 < smoothing < 1:
            raise ValueError(f"objective.label_smoothing: got {smoothing}; exo_pair expects it above 0, such as 1e-3")
        below = 0.5 if "robust" in names else 1
        if not 0 <= smoothing < below:
            raise ValueError(f"objective.label_smoothing: got {smoothing}; expected from 0 to below {below}")
        if self.f_divergence_type != "reverse_kl":
            if without := [name for name in names if not LOSSES[name].divergence and name != "sft"]:
                raise ValueError(
                    f"objective.f_divergence_type: got {self.f_divergence_type} with {', '.join(without)}, where a "
                    "term of the prompt would not cancel; use reverse_kl, or losses of the difference of completions: "
                    + ", ".join(name for name, loss in LOSSES.items() if loss.divergence)
                )
        if self.f_alpha_divergence_coef != 0.5 and self.f_divergence_type != "alpha_divergence":
            raise ValueError(
                f"objective.f_alpha_divergence_coef: got {self.f_alpha_divergence_coef}, of which "
                f"{self.f_divergence_type} makes no use; set objective.f_divergence_type=alpha_divergence"
            )
        elsewhere = {"label_smoothing": 0.0, "discopop_tau": 0.05}
        for option, default in elsewhere.items():
            takers = [name for name, loss in LOSSES.items() if option in loss.options]
            if getattr(self, option) != default and not {*takers} & {*names}:
                raise ValueError(
                    f"objective.{option}: got {getattr(self, option)}, which {', '.join(names)} makes no use of; it is "
                    f"an option of {', '.join(takers)}"
                )


def needs(config: DPO) -> tuple[str, ...]:
    """Scores it asks for."""
    return ("logp", "sum_p2") if config.use_weighting else ("logp",)


def views(config: DPO) -> tuple[str, ...]:
    """Parameter sets it asks for."""
    return ("policy",) if config.reference_free else ("policy", "reference")


def follow(config: DPO) -> Follow | None:
    """How the reference moves."""
    return None if config.ref_sync_steps is None else Follow(config.ref_mixup, config.ref_sync_steps)


def couples(config: DPO) -> bool:
    """Whether a loss looks at all pairs of the batch."""
    return bool({*SORTED} & {*config.losses})


def dpo(config: DPO, scores: Scores, batch: Batch, carry: Carry) -> tuple[Means, Means]:
    """Sums over pairs, of ``sft`` over tokens; nats.

    Args:
      scores: ``policy`` and, unless reference_free, ``reference`` with ``logp`` float32[B, T]; for ``use_weighting``
        the policy's ``sum_p2`` [B, T], Σp² over the vocabulary; if there, ``correct`` and ``entropy``.
      batch: see `sequences`; for aot and aot_unpaired what `annotate` finds.

    Returns a term for each loss, weighted, and the metrics of `sequences.pair_metrics` with rewards βr."""
    del carry
    logp, ref = log_probs(config, scores, batch)
    length, keep, means = sequences.pairs(sequences.lengths(batch)), sequences.pair_mask(batch), {}
    for name, weight in config.losses.items():
        if name == "sft":
            mean = terms.masked(-scores["policy"]["logp"], sequences.chosen_tokens(batch))
        elif name in SORTED:
            mean = terms.masked(matched(config, name, logp, ref, batch), keep)
        else:
            loss = LOSSES[name](
                *logp, *ref, chosen_len=length.chosen, rejected_len=length.rejected, beta=config.beta,
                **config.options(name),
            )  # fmt: skip
            if config.use_weighting:
                loss = loss * likelihood(scores, batch)
            mean = terms.masked(loss, keep)
        means[name] = Mean(weight * mean.total, mean.weight)
    rewards = Pair(*(config.beta * (l - r) for l, r in zip(logp, ref, strict=True)))
    return means, sequences.pair_metrics(rewards, logp, scores, batch)


def log_probs(config: DPO, scores: Scores, batch: Batch) -> tuple[Pair, Pair]:
    """Log-probabilities of completions under policy and reference: float32[B, S/2] each, nats."""

    def completions(view: str) -> Pair:
        logp_BT = scores[view]["logp"]
        if config.ld_alpha is not None:
            logp_BT = logp_BT * jnp.where(shared(batch), 1.0, config.ld_alpha)
        return sequences.pairs(sequences.sums(logp_BT, batch))

    logp = completions("policy")
    return logp, Pair(*map(jnp.zeros_like, logp)) if config.reference_free else completions("reference")


def shared(batch: Batch) -> jax.Array:
    """bool[B, T]: the token of a completion is within the length of the pair's shorter one."""
    shorter = jnp.minimum(*sequences.pairs(sequences.lengths(batch)))
    segment = jnp.arange(1, batch["sequence_mask"].shape[1] + 1)[None, None]
    own = (batch["segments"][:, :, None] == segment) & batch["loss_mask"][:, :, None]
    own = own.astype(jnp.float32)
    number = jnp.sum(own * jnp.cumsum(own, axis=1), axis=2)  # of the token in its completion, from 1
    return number <= sequences.of_token(jnp.repeat(shorter, 2, axis=1), batch)


def likelihood(scores: Scores, batch: Batch) -> jax.Array:
    """How likely the policy is to write a pair, next to how likely it is to write anything: float32[B, S/2]."""
    policy = jax.lax.stop_gradient(dict(scores["policy"]))
    sum_p2 = jnp.where(policy["sum_p2"] > 0, policy["sum_p2"], 1.0)  # 0: nothing was predicted there
    aligned = sequences.sums(policy["logp"] - jnp.log(sum_p2), batch)
    mean = sequences.pairs(aligned / jnp.maximum(sequences.lengths(batch), 1.0))
    return jnp.exp(mean.chosen + mean.rejected)


def annotate(config: DPO, scores: Scores, batch: Batch, carry: Carry) -> tuple[dict[str, jax.Array], Carry]:
    """For aot and aot_unpaired the partners of each pair: the values of the same rank in the whole batch.

    Returns ``aot_reference`` (of a pair's log π(y_w) - log π(y_l) among the reference's), or ``aot_rejected`` (of its
    r_w among all r_l) and ``aot_chosen`` (of its r_l among all r_w), float32[B, S/2]."""
    logp, ref = log_probs(config, scores, batch)
    keep, found = sequences.pair_mask(batch), {}
    if "aot" in config.losses:
        found["aot_reference"] = partners(logp.chosen - logp.rejected, ref.chosen - ref.rejected, keep)
    if "aot_unpaired" in config.losses:
        chosen, rejected = logp.chosen - ref.chosen, logp.rejected - ref.rejected
        found["aot_rejected"] = partners(chosen, rejected, keep)
        found["aot_chosen"] = partners(rejected, chosen, keep)
    return found, carry


def partners(own: jax.Array, others: jax.Array, keep: jax.Array) -> jax.Array:
    """For each of ``own`` the one of ``others`` with its rank. All of one shape, ranked as one, where ``keep``."""
    ranked = jnp.where(keep, own, jnp.inf).ravel()
    values = jnp.sort(jnp.where(keep, others, jnp.inf).ravel())
    found = jnp.zeros_like(values).at[jnp.argsort(ranked)].set(values).reshape(own.shape)
    return jnp.where(keep, found, jnp.zeros_like(found))


def matched(config: DPO, name: LossType, logp: Pair, ref: Pair, batch: Batch) -> jax.Array:
    """The loss of each pair against its partner in the whole batch, float32[B, S/2]."""

    def loss(delta: jax.Array) -> jax.Array:
        return preference.smoothed(config.beta * delta, config.label_smoothing)

    if name == "aot":
        return loss(logp.chosen - logp.rejected - batch["aot_reference"])
    # A partner is a constant here. Both sides of a match train: the rejected's gradient comes from its own match, as a
    # term of value 0.
    rejected = loss(batch["aot_chosen"] - (logp.rejected - ref.rejected))
    return loss(logp.chosen - ref.chosen - batch["aot_rejected"]) + rejected - jax.lax.stop_gradient(rejected)
