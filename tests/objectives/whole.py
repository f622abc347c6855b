"""An objective over a batch as a whole: what the step does with it where the batch is not in parts."""

import jax

from jaxft.objectives import terms


def annotated(row, config, scores, batch, carry):
    """The batch as the step gives it to the row's function, and the carry."""
    annotate = row.annotation(config)
    if annotate is None:
        return batch, carry
    added, carry = jax.jit(annotate)(jax.lax.stop_gradient(scores), batch, carry)
    return {**batch, **added}, carry


def with_logp(scores, logp):
    return {**scores, "policy": {**scores["policy"], "logp": logp}}


def total(row, config, scores, batch, carry=None):
    """(loss, gradient [B, T], metrics) of a batch as a whole."""

    def fn(logp):
        now = with_logp(scores, logp)
        more, after = annotated(row, config, now, batch, carry or {})
        losses, metrics = row.fn(config, now, more, after)
        return sum(terms.values(losses).values()), metrics

    (value, metrics), grad = jax.jit(jax.value_and_grad(fn, has_aux=True))(scores["policy"]["logp"])
    return float(value), grad, {name: float(x) for name, x in terms.values(metrics).items()}


def part_of(row, config, scores, batch, carry, first, end):
    """What the row's function says of the rows from ``first`` to ``end``."""
    scores, batch = jax.tree.map(lambda a: a[first:end], (scores, batch))
    return jax.jit(row.fn, static_argnums=0)(config, scores, batch, carry)
