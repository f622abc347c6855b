r"""The diagonal of the empirical Fisher information of the trained arrays, from documents.

.. math:: F_i = \frac{\sum_s (\partial \log p(s) / \partial \theta_i)^2}{\sum_s |s|}, \qquad
          \log p(s) = \sum_{t \in s} \log p(s_t \mid s_{<t})

over documents s with the tokens that they have: the gradient of each document as a whole is squared (not that of a
batch, which would average it away first), and the sum is for a token, so that 1/2 sum_i F_i d_i^2 estimates by how many
nats a token the documents' likelihood falls when the parameters move by d, and ``optim.ewc=1`` weighs the old documents
like the new ones. For a model that fits its documents the gradients of a document's tokens are uncorrelated, and this
is the sum over tokens too.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.objectives.terms import Batch
from jaxft.training import prefetch
from jaxft.training.prefetch import Host, Place
from jaxft.training.step import Score


def estimate(
    score: Score,
    trainable: tree.Params,
    frozen: tree.Params,
    documents: Iterable[Host],
    place: Place,
    width: int = 1,
) -> tree.Params:
    """F at ``trainable``, float32, in its structure.

    Args:
      score: gives ``logp`` of the view ``policy``.
      documents: batches [1, T] of a document each, with ``loss_mask``; one without targets adds nothing.
      place: as in `loop.fit`.
      width: rows that a batch must have on the mesh: the others are left empty.

    Raises ValueError where there is no token to learn."""

    @functools.partial(jax.jit, donate_argnums=0)
    def more(total: tree.Params, trainable: tree.Params, frozen: tree.Params, batch: Batch) -> tree.Params:
        def likelihood(trainable: tree.Params) -> jax.Array:
            logp = score("policy", tree.combine(trainable, frozen), batch)["logp"]
            return jnp.sum(jnp.where(batch["loss_mask"], logp, 0.0))

        return jax.tree.map(lambda t, g: t + jnp.square(g), total, jax.grad(likelihood)(trainable))

    trainable = jax.tree.map(lambda a: a.astype(jnp.float32), trainable)
    total, tokens = jax.tree.map(jnp.zeros_like, trainable), 0
    for document in documents:
        tokens += int(document["loss_mask"].sum())
        rows = {name: np.pad(a, ((0, width - 1), *[(0, 0)] * (a.ndim - 1))) for name, a in document.items()}
        batch = {name: a[0] for name, a in place(prefetch.split(rows, 1)).items()}
        total = more(total, trainable, frozen, batch)
    if not tokens:
        raise ValueError("optim.ewc_data: no token to learn in its documents")
    return jax.tree.map(lambda t: t / tokens, total)
