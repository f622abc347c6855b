"""Learning-rate schedules by name: the rate of a step, as a function of the step's number alone.

Unusual: the first step already has a rate above zero (``peak / warmup_steps``), and the last one is the last above the
minimum, so no step of a short run is wasted. A schedule reads the run's own step counter, not one inside the optimiser,
so a skipped step does not shift it.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]
"""``step: int32[] -> rate: float32[]``"""

Name = Literal["cosine", "linear", "constant", "wsd"]


def make(
    name: Name, peak: float, total_steps: int, warmup_steps: int, minimum: float = 0.0, decay_ratio: float = 0.1
) -> Schedule:
    """A linear warm-up to ``peak``, then the named course down to ``minimum * peak`` at ``total_steps``.

    Args:
      name: ``cosine`` (Loshchilov & Hutter 2017, eq. 5), ``linear``, ``constant``, or ``wsd``: constant, then over the
        last ``decay_ratio`` of the run falling as 1 - sqrt (Haegele et al. 2024, eq. 2, arXiv:2405.18392).
      peak: the highest rate.
      total_steps: steps of the whole run, the warm-up included.
      warmup_steps: steps of the warm-up.
      minimum: final rate over peak rate.
      decay_ratio: share of the run in which ``wsd`` decays.
    """
    if name not in COURSES:
        raise ValueError(f"optim.schedule: got {name!r}; expected one of {', '.join(COURSES)}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"optim.warmup_steps: got {warmup_steps} with {total_steps} steps in all; expected 0 to {total_steps}"
        )
    course = COURSES[name]

    def rate(step: jax.Array) -> jax.Array:
        step_f = jnp.asarray(step, jnp.float32)
        warm = (step_f + 1) / max(warmup_steps, 1)
        done = jnp.clip((step_f - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
        fall = course(done, decay_ratio * total_steps / max(total_steps - warmup_steps, 1))
        return jnp.float32(peak) * jnp.where(step_f < warmup_steps, warm, minimum + (1 - minimum) * fall)

    return rate


def _cosine(done: jax.Array, decay: float) -> jax.Array:
    return 0.5 * (1 + jnp.cos(jnp.pi * done))


def _linear(done: jax.Array, decay: float) -> jax.Array:
    return 1 - done


def _constant(done: jax.Array, decay: float) -> jax.Array:
    return jnp.ones_like(done)


def _wsd(done: jax.Array, decay: float) -> jax.Array:
    into = jnp.clip((done - (1 - decay)) / max(decay, 1e-6), 0.0, 1.0)
    return 1 - jnp.sqrt(into)


# name -> share of the peak (1 to 0) as a function of the share of the run after warm-up that is done
COURSES: dict[str, Callable[[jax.Array, float], jax.Array]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "wsd": _wsd,
}
