"""The gradients of one step, here and by torch's autograd through peft, under peft's tensor names."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch

from jaxft.core import tree
from jaxft.models import decoder, heads
from jaxft.peft import disk
from tests.peft import pairs


def equal_torch(name: str, params: tree.Params, directory: Path, frozen_ends: tuple[str, ...] = ()) -> None:
    """Asserts that the gradients of the mean cross-entropy are torch's, tensor by tensor.

    ``frozen_ends``: endings of tensors that are stored but do not train."""
    adapter = pairs.save(name, params, directory / "adapter")
    made = pairs.quietly(peft.PeftModel.from_pretrained, pairs.torch_model(name), str(adapter), is_trainable=True)
    batch = torch.as_tensor(pairs.TOKENS).long()
    pairs.quietly(made.eval(), batch, labels=batch).loss.backward()
    theirs = {_on_disk(key): p.grad.numpy() for key, p in made.named_parameters() if p.requires_grad}
    trainable, frozen = tree.partition(params, tree.trainable_mask(params))
    gradient = jax.jit(jax.grad(lambda t: loss(name, tree.combine(t, frozen))))(trainable)
    # a gradient has the structure of what it is of, so the writer of adapters gives its tensors peft's names
    _, tensors = disk.read(pairs.save(name, tree.combine(gradient, frozen), directory / "gradient"))
    assert {key for key in tensors if not key.endswith(frozen_ends)} == set(theirs)
    for tensor, expected in theirs.items():
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(tensors[tensor], expected, rtol=1e-5, atol=1e-5, err_msg=tensor)


def _on_disk(key: str) -> str:
    """What a parameter of peft's model is called in an adapter's file."""
    for own, stored in ((".default", ""), (".modules_to_save", ""), ("magnitude_vector.weight", "magnitude_vector")):
        key = key.replace(own, stored)
    return key.removeprefix("base_model.model.")


def loss(name: str, params: tree.Params) -> jax.Array:
    """The mean cross-entropy of `pairs.TOKENS`."""
    config = pairs.ours(name).config
    tokens = jnp.asarray(pairs.TOKENS)
    hidden, _, _ = decoder.forward(config, params, tokens, None, None)
    logits = heads.logits(config, heads.head_of(config, params), hidden[:, :-1])
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1))
