r"""Losses over pairs of a chosen and a rejected completion, for researchers and for `dpo.dpo`: one table of functions.

``LOSSES[name](chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=0.1)`` takes the log-probabilities
of whole completions (sums over their tokens, nats) under policy and reference and gives the loss of each pair, not
reduced. Names, options and defaults are trl's. In the formulas below

.. math:: r_w = \log \frac{\pi(y_w|x)}{\pi_\text{ref}(y_w|x)}, \quad
          r_l = \log \frac{\pi(y_l|x)}{\pi_\text{ref}(y_l|x)}, \quad \Delta = s(r_w) - s(r_l)

w is the chosen and l the rejected completion, |y| a completion's tokens, and s(r) = r unless another f-divergence is
asked for (`divergences.score`). A loss whose pairs are independent is a function of that pair alone; ``aot``,
``aot_unpaired`` and ``sft`` look at all pairs given.

Values and gradients are finite however far apart the log-probabilities are: logarithms of sigmoids are taken as one
function, and exponents, logits and squares end before float32 does.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.objectives import divergences
from jaxft.objectives.divergences import Divergence

LARGEST_LOGIT = 1e35
LARGEST_ROOT = 1e17
"""Where logits end, and the roots of squares: sums over a batch are still float32. No gradient flows past them."""


class Pairs(NamedTuple):
    """What a loss sees of B pairs, float32[B] each: sums over completions."""

    chosen_logp: jax.Array
    rejected_logp: jax.Array
    ref_chosen_logp: jax.Array
    ref_rejected_logp: jax.Array
    chosen_len: jax.Array | None = None
    rejected_len: jax.Array | None = None
    """Tokens of each completion."""
    beta: float | jax.Array = 0.1
    f_divergence_type: Divergence = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5

    @property
    def chosen(self) -> jax.Array:
        """r_w"""
        return self.chosen_logp - self.ref_chosen_logp

    @property
    def rejected(self) -> jax.Array:
        """r_l"""
        return self.rejected_logp - self.ref_rejected_logp

    def scores(self) -> tuple[jax.Array, jax.Array]:
        """s(r_w) and s(r_l)"""
        how = self.f_divergence_type, self.f_alpha_divergence_coef
        return divergences.score(self.chosen, *how), divergences.score(self.rejected, *how)

    @property
    def logit(self) -> jax.Array:
        """βΔ"""
        chosen, rejected = self.scores()
        return jnp.clip(self.beta * (chosen - rejected), -LARGEST_LOGIT, LARGEST_LOGIT)

    @property
    def token_delta(self) -> jax.Array:
        """s(r_w) / \\|y_w\\| - s(r_l) / \\|y_l\\|"""
        (chosen, rejected), (w, l) = self.scores(), self.lengths()
        return chosen / w - rejected / l

    def lengths(self) -> tuple[jax.Array, jax.Array]:
        """Tokens of both completions, at least 1."""
        if self.chosen_len is None or self.rejected_len is None:
            raise ValueError("this loss is of means over tokens: give it chosen_len and rejected_len, float32[B]")
        return jnp.maximum(self.chosen_len, 1.0), jnp.maximum(self.rejected_len, 1.0)


# Losses of the difference Δ: a constant of the prompt, which other f-divergences than reverse KL bring, cancels.


def sigmoid(pairs: Pairs) -> jax.Array:
    """``-log σ(βΔ)``: ln 2 where policy and reference agree. Rafailov et al. 2023, eq. 7 (arXiv:2305.18290)."""
    return -jax.nn.log_sigmoid(pairs.logit)


def hinge(pairs: Pairs) -> jax.Array:
    """``max(0, 1 - βΔ)``. SLiC-HF, Zhao et al. 2023, sec. 2 (arXiv:2305.10425), of rewards as in RSO, Liu et al. 2023
    (arXiv:2309.06657)."""
    return jax.nn.relu(1 - pairs.logit)


def ipo(pairs: Pairs) -> jax.Array:
    """``(s(r_w)/|y_w| - s(r_l)/|y_l| - 1/2β)²``: the difference is drawn to 1/2β, not to infinity. Azar et al. 2023,
    eq. 17, whose τ is β (arXiv:2310.12036); its authors take means over tokens. Needs lengths."""
    return squared(pairs.token_delta - 1 / (2 * pairs.beta))


def sigmoid_norm(pairs: Pairs) -> jax.Array:
    """``-log σ(β(s(r_w)/|y_w| - s(r_l)/|y_l|))``: length-normalised DPO. Tülu 3, Lambert et al. 2024, sec. 5
    (arXiv:2411.15124). Needs lengths."""
    logit = jnp.clip(pairs.beta * pairs.token_delta, -LARGEST_LOGIT, LARGEST_LOGIT)
    return -jax.nn.log_sigmoid(logit)


def exo_pair(pairs: Pairs, *, label_smoothing: float = 0.0) -> jax.Array:
    """``σ(βΔ)[log σ(βΔ) - log(1-ε)] + σ(-βΔ)[log σ(-βΔ) - log ε]``: the KL divergence from what the policy prefers to
    the labels smoothed by ε, which must be above 0 (1e-3 is usual). EXO, Ji et al. 2024, eq. 16 (arXiv:2402.00856)."""
    if not 0 < label_smoothing < 1:
        raise ValueError(f"exo_pair: label_smoothing is {label_smoothing}; expected between 0 and 1, such as 1e-3")
    x, smooth = pairs.logit, jnp.float32(label_smoothing)
    right = jax.nn.sigmoid(x) * (jax.nn.log_sigmoid(x) - jnp.log1p(-smooth))
    return right + jax.nn.sigmoid(-x) * (jax.nn.log_sigmoid(-x) - jnp.log(smooth))


def robust(pairs: Pairs, *, label_smoothing: float = 0.0) -> jax.Array:
    """``[-(1-ε) log σ(βΔ) + ε log σ(-βΔ)] / (1-2ε)``: the loss of the true labels, in expectation, where a share ε of
    the labels is flipped. Chowdhury et al. 2024, sec. 3.1 (arXiv:2403.00409)."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"robust: label_smoothing is {label_smoothing}; expected from 0 up to (not with) 0.5")
    x = pairs.logit
    clean, flipped = -jax.nn.log_sigmoid(x), -jax.nn.log_sigmoid(-x)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def discopop(pairs: Pairs, *, discopop_tau: float = 0.05) -> jax.Array:
    """``(1-m)(-log σ(βΔ)) + m exp(-βΔ)`` with ``m = σ(βΔ/τ)``: logistic where the pair is still wrong, exponential
    where it is right. DiscoPOP, Lu et al. 2024, eq. 5 (arXiv:2406.08414)."""
    x = pairs.logit
    exponent = jax.nn.log_sigmoid(x / discopop_tau) - x  # of the product, whose second factor alone overflows
    exponential = jnp.exp(jnp.minimum(exponent, divergences.LARGEST_EXPONENT))
    return jax.nn.sigmoid(-x / discopop_tau) * -jax.nn.log_sigmoid(x) + exponential


# Losses of r_w and r_l each for itself.


def nca_pair(pairs: Pairs) -> jax.Array:
    """``-log σ(βr_w) - ½ log σ(-βr_w) - ½ log σ(-βr_l)``: keeps the chosen likely too. NCA, Chen et al. 2024, sec. 4.1
    (arXiv:2402.05369)."""
    chosen, rejected = pairs.beta * pairs.chosen, pairs.beta * pairs.rejected
    return -jax.nn.log_sigmoid(chosen) - 0.5 * jax.nn.log_sigmoid(-chosen) - 0.5 * jax.nn.log_sigmoid(-rejected)


def bco_pair(pairs: Pairs) -> jax.Array:
    """``-log σ(βr_w) - log σ(-βr_l)``: a classifier of chosen against rejected. BCO, Jung et al. 2024, sec. 4, without
    the shift of rewards (arXiv:2404.04656); with it: `bco.bco`."""
    return -jax.nn.log_sigmoid(pairs.beta * pairs.chosen) - jax.nn.log_sigmoid(-pairs.beta * pairs.rejected)


def sppo_hard(pairs: Pairs) -> jax.Array:
    """``(r_w - 1/2β)² + (r_l + 1/2β)²``: the chosen wins with probability 1. SPPO, Wu et al. 2024, eq. 4.7
    (arXiv:2405.00675)."""
    return squared(pairs.chosen - 0.5 / pairs.beta) + squared(pairs.rejected + 0.5 / pairs.beta)


def apo_zero(pairs: Pairs) -> jax.Array:
    """``1 - σ(βr_w) + σ(βr_l)``: chosen up, rejected down, for chosen better than the model's own. APO,
    D'Oosterlinck et al. 2024, eq. 7 (arXiv:2408.06266)."""
    return jax.nn.sigmoid(-pairs.beta * pairs.chosen) + jax.nn.sigmoid(pairs.beta * pairs.rejected)


def apo_down(pairs: Pairs) -> jax.Array:
    """``σ(βr_w) + 1 - σ(β(r_w - r_l))``: both down, the rejected further, for chosen worse than the model's own.
    APO, D'Oosterlinck et al. 2024, eq. 8 (arXiv:2408.06266)."""
    return jax.nn.sigmoid(pairs.beta * pairs.chosen) + jax.nn.sigmoid(-pairs.beta * (pairs.chosen - pairs.rejected))


# Losses of all pairs given.


def aot(pairs: Pairs, *, label_smoothing: float = 0.0) -> jax.Array:
    """``-(1-ε) log σ(βδ) - ε log σ(-βδ)`` with δ the quantiles (sorted values) of ``log π(y_w) - log π(y_l)`` less
    those of the reference: value k is of the k-th smallest, not of pair k. The policy is to prefer the chosen by more,
    in distribution. AOT, Melnyk et al. 2024, sec. 3 (arXiv:2406.05882)."""
    policy = jnp.sort(pairs.chosen_logp - pairs.rejected_logp)
    reference = jnp.sort(pairs.ref_chosen_logp - pairs.ref_rejected_logp)
    return smoothed(pairs.beta * (policy - reference), label_smoothing)


def aot_unpaired(pairs: Pairs, *, label_smoothing: float = 0.0) -> jax.Array:
    """As ``aot`` with δ the quantiles of r_w less those of r_l: the chosen need not answer the rejected's prompts. AOT,
    Melnyk et al. 2024, sec. 3 (arXiv:2406.05882)."""
    return smoothed(pairs.beta * (jnp.sort(pairs.chosen) - jnp.sort(pairs.rejected)), label_smoothing)


def sft(pairs: Pairs) -> jax.Array:
    """``-Σ log π(y_w) / Σ |y_w|``, over all pairs, for each of them: the token-mean negative log-likelihood of the
    chosen. Weighted, beside others: RPO, Pang et al. 2024, eq. 1 (arXiv:2404.19733) and MPO. Needs lengths."""
    chosen_len, _ = pairs.lengths()
    return jnp.broadcast_to(-jnp.sum(pairs.chosen_logp) / jnp.sum(chosen_len), pairs.chosen_logp.shape)


def smoothed(x: jax.Array, label_smoothing: float) -> jax.Array:
    """``-(1-ε) log σ(x) - ε log σ(-x)``: cross-entropy of a preference of odds e^x with labels smoothed by ε (cDPO)."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(x) - label_smoothing * jax.nn.log_sigmoid(-x)


def squared(x: jax.Array) -> jax.Array:
    """``x²``, constant where its sum over a batch would not be a float32."""
    return jnp.square(jnp.clip(x, -LARGEST_ROOT, LARGEST_ROOT))


@dataclass(frozen=True)
class Loss:
    """A row of `LOSSES`; call it."""

    fn: Callable[..., jax.Array]
    """Of `Pairs`, with the loss's own options as keywords."""
    divergence: bool = False
    """Whether it is a function of Δ, so that other f-divergences than reverse KL mean something."""

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options it takes."""
        own = tuple(p.name for p in inspect.signature(self.fn).parameters.values() if p.kind is p.KEYWORD_ONLY)
        return own + (("f_divergence_type", "f_alpha_divergence_coef") if self.divergence else ())

    def __call__(
        self,
        chosen_logp: jax.Array,
        rejected_logp: jax.Array,
        ref_chosen_logp: jax.Array,
        ref_rejected_logp: jax.Array,
        *,
        chosen_len: jax.Array | None = None,
        rejected_len: jax.Array | None = None,
        beta: float | jax.Array = 0.1,
        **options: Any,
    ) -> jax.Array:
        """The loss of each pair, float32[B], not reduced.

        Args:
          chosen_logp, rejected_logp: [B], log π of whole completions: sums over their tokens; nats.
          ref_chosen_logp, ref_rejected_logp: [B], those of the reference; zeros for no reference.
          chosen_len, rejected_len: [B], tokens of the completions, where the loss says that it needs them.
          beta: how far the policy may go from the reference; higher stays closer.
          options: those of the loss (`options`): label_smoothing, discopop_tau, f_divergence_type ("reverse_kl",
            "forward_kl", "js_divergence", "alpha_divergence"), f_alpha_divergence_coef.

        Raises TypeError for an option that this loss does not take, ValueError for a value that it cannot take and for
        arrays of unequal shapes."""
        if unknown := [name for name in options if name not in self.options]:
            known = ", ".join(self.options) or "none"
            raise TypeError(f"{self.fn.__name__}: got the option {', '.join(unknown)}; this loss takes {known}")
        arrays = (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, chosen_len, rejected_len)
        if len(shapes := {jnp.shape(a) for a in arrays if a is not None}) > 1:
            raise ValueError(f"{self.fn.__name__}: got arrays of the shapes {sorted(shapes)}; expected one shape, [B]")
        given = [None if a is None else jnp.asarray(a, jnp.float32) for a in arrays]
        pairs = Pairs(*given, beta=beta)._replace(  # type: ignore[arg-type]
            **{name: value for name, value in options.items() if name in Pairs._fields}
        )
        return self.fn(pairs, **{name: value for name, value in options.items() if name not in Pairs._fields})


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(sigmoid, divergence=True),
    "hinge": Loss(hinge, divergence=True),
    "ipo": Loss(ipo, divergence=True),
    "exo_pair": Loss(exo_pair, divergence=True),
    "nca_pair": Loss(nca_pair),
    "robust": Loss(robust, divergence=True),
    "bco_pair": Loss(bco_pair),
    "sppo_hard": Loss(sppo_hard),
    "aot": Loss(aot),
    "aot_unpaired": Loss(aot_unpaired),
    "apo_zero": Loss(apo_zero),
    "apo_down": Loss(apo_down),
    "discopop": Loss(discopop, divergence=True),
    "sft": Loss(sft),
    "sigmoid_norm": Loss(sigmoid_norm, divergence=True),
}
