"""A language model small enough for tests of the room that knows no model: an embedding, stacked layers with LoRA."""

import contextlib
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.peft.lora import LoRAWeight

VOCAB, WIDTH, LAYERS, RANK = 11, 8, 3, 2


def params(key, rate=0.0):
    """Parameters with a LoRA on each layer's matrix; not the identity, so that gradients reach A and B."""
    k = jax.random.split(key, 5)
    lora = LoRAWeight(
        base=jax.random.normal(k[0], (LAYERS, WIDTH, WIDTH)) / WIDTH**0.5,
        a=jax.random.normal(k[1], (LAYERS, WIDTH, RANK)) / WIDTH**0.5,
        b=jax.random.normal(k[2], (LAYERS, RANK, WIDTH)) / RANK**0.5,
        scale=jnp.ones((LAYERS,)),
        rank=jnp.full((LAYERS,), RANK),
        rate=rate,
    )
    return {
        "embed": {"tokens": jax.random.normal(k[3], (VOCAB, WIDTH))},
        "layers": {"mlp": {"up": lora}, "mlp_norm": {"scale": jnp.ones((LAYERS, WIDTH))}},
        "head": jax.random.normal(k[4], (WIDTH, VOCAB)) / WIDTH**0.5,
    }


def parts(key, rate=0.0, select=None):
    """(trainable, frozen)"""
    whole = params(key, rate)
    return tree.partition(whole, tree.trainable_mask(whole, select))


def score(view, params, batch, key=None):
    """Log-probabilities of a model whose context is the running sum of its segment's earlier tokens."""
    del view
    params = tree.dropout_keys(params, key)
    tokens, segments = batch["tokens"], batch["segments"]
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool), -1)
    mix = jnp.where(same & causal, 1.0, 0.0)
    x = mix @ params["embed"]["tokens"][tokens] / 3.0

    def layer(x, p):
        return x + jnp.tanh((x * p["mlp_norm"]["scale"]) @ p["mlp"]["up"]), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    logits = jax.nn.log_softmax(x @ params["head"])
    logp = jnp.take_along_axis(logits, tokens[:, :, None], axis=-1)[:, :, 0]
    return {"logp": logp, "correct": jnp.argmax(logits, axis=-1) == tokens}


def batch(seed, rows=8, length=12):
    """Documents of ragged length, one a row; the first half of each carries no loss."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, length + 1, rows)
    where = np.arange(length)
    real = where < lengths[:, None]
    return {
        "tokens": np.where(real, rng.integers(0, VOCAB, (rows, length)), 0).astype(np.int32),
        "positions": np.where(real, where, 0).astype(np.int32),
        "segments": real.astype(np.int32),
        "loss_mask": real & (where >= lengths[:, None] // 2) & (where > 0),
    }


def micro(batch, accumulate):
    """[rows, T] -> [accumulate, rows / accumulate, T]"""
    return jax.tree.map(lambda a: a.reshape(accumulate, -1, *a.shape[1:]), batch)


@contextlib.contextmanager
def compiles(name="step"):
    """Collects what jax compiles of the functions called ``name``: ``["jit(step)"]`` for one compile."""
    found = []

    class Collect(logging.Handler):
        def emit(self, record):
            if match := re.match(rf"Finished XLA compilation of (jit\({name}\))", record.getMessage()):
                found.append(match.group(1))

    handler, logger = Collect(), logging.getLogger("jax")
    with jax.log_compiles():
        logger.addHandler(handler)
        try:
            yield found
        finally:
            logger.removeHandler(handler)


class Loader:
    """Batches by number, and a cursor."""

    def __init__(self, rows=4, length=None, poison=()):
        """``length``: batches until the data ends; ``poison``: numbers of batches whose first token is 7."""
        self.rows, self.length, self.poison, self.consumed = rows, length, poison, 0

    def __next__(self):
        if self.consumed == self.length:
            raise StopIteration
        out = batch(self.consumed, self.rows)
        out["tokens"][0, 0] = 7 if self.consumed in self.poison else 1
        out["sequence_id"] = np.full(out["tokens"].shape, self.consumed, np.int32)
        self.consumed += 1
        return out

    def state(self):
        return {"consumed": self.consumed}

    def restore(self, state):
        self.consumed = state["consumed"]


class Source:
    """Batches that depend on the state: two of each draw, of which the second is kept until it is asked for."""

    def __init__(self):
        self.draws, self.left = 0, {}

    def next(self, state):
        made = not self.left
        if made:
            said = float(np.abs(np.asarray(state.trainable["layers"]["mlp"]["up"].b)).sum())
            both = batch(int(1e4 * said) % 2**31, 8)
            both["tokens"][:, 0] = 1
            self.draws += 1
            self.left = {name: value[4:] for name, value in both.items()}
            out = {name: value[:4] for name, value in both.items()}
        else:
            out, self.left = self.left, {}
        return out, {"draws": self.draws} if made else {}

    def state(self):
        return {"draws": self.draws, "left": self.left}

    def restore(self, state):
        self.draws, self.left = state["draws"], state["left"]


def poisoned_score(view, params, batch, key=None):
    """`score`, except that a batch whose first token is 7 has a loss that is not a number."""
    out = score(view, params, batch, key)
    return out | {"logp": jnp.where(batch["tokens"][0, 0] == 7, jnp.nan, out["logp"])}
