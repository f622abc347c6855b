"""Small networks that make the rows of a slot from learnt inputs, for P-tuning and the projection of a prefix.

As torch initialises them: U(-1/sqrt(k), 1/sqrt(k)), k the width of the input (of the state, for an LSTM). Unusual: one
bias for each LSTM gate where torch adds two.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Layers = dict[str, dict[str, jax.Array]]
"""Linear layers by number, {weight: [in, out], bias: [out]} each."""
LSTM = dict[str, dict[str, jax.Array]]
"""Layers by number, {in: [2, in, 4h], state: [2, h, 4h], bias: [2, 4h]} each: forwards and backwards; gates input,
forget, cell, output."""


def uniform(key: jax.Array, shape: tuple[int, ...], width: int) -> jax.Array:
    """float32 within 1 / sqrt(width)."""
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / math.sqrt(width)


def linears(key: jax.Array, widths: Sequence[int]) -> Layers:
    """Linear layers from each width to the next."""
    made = {}
    for i, (rows, columns) in enumerate(itertools.pairwise(widths)):
        a, b = jax.random.split(jax.random.fold_in(key, i))
        made[str(i)] = {"weight": uniform(a, (rows, columns), rows), "bias": uniform(b, (columns,), rows)}
    return made


def mlp(layers: Layers, x: jax.Array, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The layers in turn, with the activation between them."""
    for i in range(len(layers)):  # by number: a pytree sorts "10" before "2"
        x = (activation(x) if i else x) @ layers[str(i)]["weight"] + layers[str(i)]["bias"]
    return x


def lstm_layers(key: jax.Array, width: int, hidden: int, layers: int) -> LSTM:
    """The weights of a bidirectional LSTM; each layer after the first reads both directions."""

    def one(key: jax.Array, width: int) -> dict[str, jax.Array]:
        a, b, c = jax.random.split(key, 3)
        shapes = {
            "in": (a, (2, width, 4 * hidden)),
            "state": (b, (2, hidden, 4 * hidden)),
            "bias": (c, (2, 4 * hidden)),
        }
        return {name: uniform(k, shape, hidden) for name, (k, shape) in shapes.items()}

    return {str(i): one(jax.random.fold_in(key, i), width if i == 0 else 2 * hidden) for i in range(layers)}


def lstm(layers: LSTM, x_nD: jax.Array, between: Callable[[int, jax.Array], jax.Array]) -> jax.Array:
    """The states of both directions side by side, [n, 2h]. ``between(i, x)`` is applied after each layer but the last
    (dropout)."""
    for i in range(len(layers)):
        x_nD = _both(layers[str(i)], x_nD)
        x_nD = between(i, x_nD) if i + 1 < len(layers) else x_nD
    return x_nD


def _both(layer: dict[str, jax.Array], x_nD: jax.Array) -> jax.Array:
    """One layer; Hochreiter & Schmidhuber 1997 with forget gates."""

    def one(wide: Any, x_nD: jax.Array) -> jax.Array:
        def turn(carry: tuple[jax.Array, jax.Array], gates: jax.Array):
            state, cell = carry
            i, f, g, o = jnp.split(gates + state @ wide["state"], 4)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            state = jax.nn.sigmoid(o) * jnp.tanh(cell)
            return (state, cell), state

        zero = jnp.zeros(wide["state"].shape[0], x_nD.dtype)
        return jax.lax.scan(turn, (zero, zero), x_nD @ wide["in"] + wide["bias"])[1]

    both = jax.vmap(one)(layer, jnp.stack([x_nD, x_nD[::-1]]))
    return jnp.concatenate([both[0], both[1][::-1]], axis=-1)
