r"""Distillation: a student learns the next-token distribution of a teacher, on tokens that are given.

.. math:: L = w \cdot \overline{D(T_t, S_t)} + w_{ce} \cdot \overline{-\log S_t(y_t)} + w_h \cdot \overline{H_t}

Each mean is over the target tokens of the optimiser step. D is one of the divergences of Hinton et al. 2015
(arXiv:1503.02531, forward KL), Gu et al. 2024 (arXiv:2306.08543, reverse KL), Agarwal et al. 2024 (arXiv:2306.13649,
their mixtures) and others; H is the distance of hidden states after a learnt projection (Jiao et al. 2020,
arXiv:1909.10351, eq. 8). What they are is computed where the models are; here they are numbers, one a token.

With teacher tokens in the batch (``uld``, a teacher with another tokenizer), the divergence counts at the targets that
have a counterpart among the teacher's, in the order of each sequence: Boizard et al. 2024 (arXiv:2402.12030), sec. 3.2.
"""

from dataclasses import dataclass
from typing import Literal

import jax

from jaxft.objectives import terms
from jaxft.objectives.terms import Batch, Carry, Follow, Mean, Means, Scores

METRICS = {
    "agreement": "teacher_agreement",
    "teacher_entropy": "teacher_entropy",
    "correct": "mean_token_accuracy",
    "entropy": "entropy",
}


@dataclass(frozen=True)
class Distil:
    """Distillation from a larger or different model, on the tokens the data marks as targets."""

    divergence: Literal["forward_kl", "reverse_kl", "js", "jsd", "tvd", "skew_forward_kl", "skew_reverse_kl", "uld"] = (
        "forward_kl"
    )
    """Distance of the two next-token distributions. ``forward_kl`` covers all that the teacher would say,
    ``reverse_kl`` settles on the likeliest of it, ``jsd`` is between them by ``beta`` (``js``: half way), ``tvd`` is
    half the L1 distance; the skewed ones mix a share of the first distribution into the second; ``uld`` compares
    probabilities in order of size, for a teacher with another tokenizer."""
    beta: float = 0.5
    """Share of the teacher in the mixture of ``jsd``; 0 is forward KL and 1 reverse KL."""
    skew: float = 0.1
    """Share of the first distribution in the second one of ``skew_forward_kl`` and ``skew_reverse_kl``."""
    temperature: float = 1.0
    """What both models' logits are divided by in the divergence. The loss is not multiplied by its square."""
    weight: float = 1.0
    """Weight of the divergence."""
    ce_weight: float = 0.0
    """Weight of the cross-entropy of the targets themselves."""
    teacher: Literal["live", "stored", "ema"] = "live"
    """A model that runs beside the student, or its likeliest tokens that were stored beforehand, or the running mean of
    the student itself, which costs no second model: a copy of what trains, on the same frozen base."""
    ema: float = 0.99
    """With teacher=ema: the share of itself that the teacher keeps in each step; the rest of it is the student."""
    rest: Literal["bucket", "none"] = "bucket"
    """Of a stored teacher: all tokens that were not kept are one more outcome, or are as if they did not exist."""
    hidden_layers: tuple[tuple[int, int], ...] = ()
    """Pairs of a student's and a teacher's layer, from 0 (-1 is the last), whose outputs are to match."""
    hidden_loss: Literal["mse", "cosine"] = "mse"
    """Mean square of the difference, or 1 minus the cosine, of each token's projected state and the teacher's."""
    hidden_weight: float = 1.0
    """Weight of the hidden states' distance, averaged over the pairs."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"objective.temperature: got {self.temperature}; expected a number above 0")
        for name, value, least in (("beta", self.beta, True), ("skew", self.skew, False)):
            if not 0 <= value <= 1 or (value == 1 and not least):
                raise ValueError(f"objective.{name}: got {value}; expected 0 to {'1' if least else 'below 1'}")
        weights = {"weight": self.weight, "ce_weight": self.ce_weight, "hidden_weight": self.hidden_weight}
        for name, value in weights.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"objective.{name}: got {value}; expected a finite number, 0 or more")
        if self.weight == 0 and not self.hidden_layers:
            raise ValueError("objective.weight: got 0 and no hidden_layers, so nothing is learnt from the teacher")
        if self.hidden_weight == 0 and self.hidden_layers:
            raise ValueError("objective.hidden_weight: got 0 with hidden_layers; expected more, or no hidden_layers")
        if not 0 <= self.ema < 1:
            raise ValueError(f"objective.ema: got {self.ema}; expected 0 to below 1")
        if self.ema != Distil.ema and self.teacher != "ema":
            raise ValueError(f"objective.ema: got {self.ema} with teacher={self.teacher}; expected teacher=ema")
        if self.teacher == "ema" and self.divergence == "uld":
            raise ValueError("objective.divergence: got uld with teacher=ema, which has the student's own tokenizer")
        if self.teacher == "stored" and (self.hidden_layers or self.divergence == "uld"):
            what = "hidden_layers" if self.hidden_layers else "divergence=uld"
            raise ValueError(f"objective.{what}: needs the teacher itself; got teacher=stored, expected teacher=live")


def needs(config: Distil) -> tuple[str, ...]:
    """What is differentiated."""
    asked = {"divergence": config.weight > 0, "logp": config.ce_weight > 0, "hidden": bool(config.hidden_layers)}
    return tuple(name for name, wanted in asked.items() if wanted)


def reports(config: Distil) -> tuple[str, ...]:
    """What is measured besides."""
    of_teacher = () if config.divergence == "uld" else ("agreement", "teacher_entropy")
    known = ("divergence", "logp", "correct", "entropy", *of_teacher)
    return tuple(name for name in known if name not in needs(config))


def views(config: Distil) -> tuple[str, ...]:
    """The teacher is scored first: the policy is compared with what it said."""
    first = {"live": ("teacher",), "stored": (), "ema": ("start",)}
    return (*first[config.teacher], "policy")


def follow(config: Distil) -> Follow | None:
    """How the teacher moves that is the student's running mean: Tarvainen & Valpola 2017 (arXiv:1703.01780), eq. 2."""
    return Follow(1 - config.ema, 1) if config.teacher == "ema" else None


def distil(config: Distil, scores: Scores, batch: Batch, carry: Carry) -> tuple[Means, Means]:
    """Sums over target tokens; nats.

    Args:
      scores: ``policy``, float32[B, T] each: divergence, logp and hidden (see `needs`) and, where they are there, what
        `reports` names.
      batch: ``loss_mask`` bool[B, T], and ``teacher_loss_mask`` where the teacher has tokens of its own
        (`terms.counterparts`).

    Returns the terms ``distil``, ``ce`` and ``hidden`` (those that are needed, each times its weight) and the metrics
    divergence, nll, mean_token_accuracy, entropy, teacher_agreement, teacher_entropy and hidden."""
    del carry
    policy, targets_BT = scores["policy"], batch["loss_mask"]
    both_BT = terms.counterparts(batch)[1] if "teacher_loss_mask" in batch else targets_BT
    parts = {
        "divergence": ("distil", "divergence", config.weight, both_BT),
        "logp": ("ce", "nll", -config.ce_weight, targets_BT),
        "hidden": ("hidden", "hidden", config.hidden_weight, both_BT),
    }
    losses: Means = {}
    metrics: Means = {}
    for name in (name for name in parts if name in policy):
        term, metric, weight, keep_BT = parts[name]
        mean = terms.masked(policy[name], keep_BT)
        if name in needs(config):
            losses[term] = Mean(mean.total * weight, mean.weight)
        sign = -1 if name == "logp" else 1
        metrics[metric] = Mean(jax.lax.stop_gradient(sign * mean.total), mean.weight)
    for name, metric in METRICS.items():
        if name in policy:
            metrics[metric] = terms.masked(jax.lax.stop_gradient(policy[name]), targets_BT)
    return losses, metrics
