r"""A weight that measures what is multiplied by it: exact second moments of a layer's inputs, for every layer at once.

.. math:: G = \sum_t x_t x_t^\top, \qquad m = \sum_t x_t, \qquad n = \sum_t 1

over the positions t that count. Unusual: the moments come out as *gradients*. ``x @ tap`` is ``x @ base``, and the
custom derivative gives G, m and n as the cotangents of three fields of zeros, whatever flows in from above. So one
backward pass of any function of the model's output measures all layers, under scan, remat and packing alike, and no
model code knows of it.
"""

import jax
import jax.numpy as jnp

from jaxft.core.weight import Shared, Weight, parameter, static, weight


@weight
class Tap(Weight):
    """``x @ base`` for x [B, T, in]; the gradients of ``gram`` [*stack, in, in], ``total`` [*stack, in] and ``count``
    [*stack] (float32 zeros) are G, m and n.

    ``mask``: bool[B, T], the positions that count. ``scaled``: each row of the batch is first divided by its largest
    entry, as CorDA does, and ``count`` counts the rows.
    """

    base: jax.Array | Weight = parameter()
    gram: jax.Array
    total: jax.Array
    count: jax.Array
    mask: Shared
    scaled: bool = static(default=False)

    def __rmatmul__(self, x):
        mask = self.mask.value
        if x.shape[:-1] != mask.shape:
            raise ValueError(f"tap: got inputs {list(x.shape)}; expected [*{list(mask.shape)}, features], as the mask")
        return _watched(x, self.gram, self.total, self.count, *_weights(x, mask, self.scaled)) @ self.base

    def dense(self):
        return self.base.dense() if isinstance(self.base, Weight) else self.base

    def axes(self, names):
        stack, rows = names[:-2], names[-2]
        moments = {"gram": (*stack, rows, None), "total": (*stack, rows), "count": stack}
        return {"base": names, **moments, "mask": (None, None)}


def zeros(base: jax.Array | Weight) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(gram, total, count) of a weight [*stack, in, out] before anything was measured."""
    *stack, rows, _ = base.shape
    sizes = ((*stack, rows, rows), (*stack, rows), tuple(stack))
    gram, total, count = (jnp.zeros(size, jnp.float32) for size in sizes)
    return gram, total, count


def _weights(x: jax.Array, mask: jax.Array, scaled: bool) -> tuple[jax.Array, jax.Array]:
    """What each position is multiplied by, and what it adds to the count: [B, T] each."""
    weight = mask.astype(jnp.float32)
    if not scaled:
        return weight, weight
    top = jnp.max(jnp.where(mask[..., None], x.astype(jnp.float32), -jnp.inf), axis=(1, 2), keepdims=True)[..., 0]
    rows = jnp.where(jnp.any(mask, axis=1, keepdims=True), 1.0 / jnp.abs(top), 0.0)
    first = jnp.cumsum(weight, axis=1) * weight == 1.0
    return weight * rows, first.astype(jnp.float32)


@jax.custom_vjp
def _watched(x, gram, total, count, weight, counted):
    del gram, total, count, weight, counted
    return x


def _forward(x, gram, total, count, weight, counted):
    del gram, total, count
    return x, (x, weight, counted)


def _backward(kept, g):
    x, weight, counted = kept
    x = x * weight[..., None].astype(x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    gram = jnp.matmul(flat.T, flat, precision="highest", preferred_element_type=jnp.float32)
    total = jnp.sum(flat, axis=0, dtype=jnp.float32)
    return g, gram, total, jnp.sum(counted), None, None


_watched.defvjp(_forward, _backward)
