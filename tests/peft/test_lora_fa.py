"""LoRA-FA: what its gradient is, against peft's optimiser, and what its backward pass keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, lorafa

from jaxft import peft as jaxft_peft
from jaxft.core import tree
from jaxft.core.names import Name
from jaxft.peft import LoRA, LoRAFA, sites
from jaxft.testing import jaxprs
from tests.peft import gradients, pairs

L, D, F, R = 3, 40, 24, 4
NAMES = (Name("layers/w", "layers.{}.w", "linear"),)


def adapted(config: LoRA) -> tree.Params:
    params = {"layers": {"w": jax.random.normal(jax.random.key(0), (L, D, F)) / 8}}
    w = sites.adapt(params, NAMES, jax.random.key(1), config)["layers"]["w"]
    return pairs.moved({"layers": {"w": w}}, jax.random.key(2))["layers"]["w"]


def of_b(w: tree.Params, x: jax.Array) -> tree.Params:
    trainable, frozen = tree.partition(w, tree.trainable_mask(w))
    return jax.grad(lambda t: jnp.sum(jnp.sin(x @ tree.combine(t, frozen)[1])))(trainable)


def test_the_step_of_b_is_the_projected_step_of_the_whole_weight():
    """A g_B = P G / s: the gradient G of W projected on the columns of A, over the scale; A has no gradient."""
    w = adapted(LoRAFA(rank=R, alpha=6, targets=("w",), rank_pattern={"1.w": 3}))
    x = jax.random.normal(jax.random.key(3), (7, D))
    got = of_b(w, x)
    assert got.a is None and got.b is not None
    whole = jax.grad(lambda m: jnp.sum(jnp.sin(x @ m)))(w[1].dense())
    basis, _ = np.linalg.qr(w.a[1][:, :3])
    np.testing.assert_allclose(w.a[1] @ got.b[1], basis @ basis.T @ whole / w.scale[1], rtol=1e-4, atol=1e-5)
    assert not got.b[1, 3:].any() and not got.b[0].any()


def test_one_step_is_that_of_pefts_optimiser(tmp_path, monkeypatch):
    """B's first moments after one step, which are a tenth of what peft made of the gradient."""
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # it would round to bfloat16
    params = pairs.adapted("llama", LoRAFA(rank=R, alpha=6, targets=("q_proj", "down_proj")), jax.random.key(0))
    adapter = str(pairs.save("llama", params, tmp_path / "a"))
    made = pairs.quietly(peft.PeftModel.from_pretrained, pairs.torch_model("llama"), adapter, is_trainable=True)
    optimiser = create_lorafa_optimizer(made, r=R, lora_alpha=6, lr=1e-3)
    batch = torch.as_tensor(pairs.TOKENS).long()
    made.eval()(batch, labels=batch).loss.backward()
    optimiser.step()
    trainable, frozen = tree.partition(params, tree.trainable_mask(params))
    got = jax.jit(jax.grad(lambda t: gradients.loss("llama", tree.combine(t, frozen))))(trainable)["layers"]
    for ours, module in ((got["attn"]["q"], "self_attn.q_proj"), (got["mlp"]["down"], "mlp.down_proj")):
        for i in range(3):
            state = optimiser.state[f"base_model.model.model.layers.{i}.{module}.lora"]
            expected = 10 * state["exp_avg_B"].numpy().T
            size = np.abs(expected).max()
            assert size > 0
            np.testing.assert_allclose(ours.b[i], expected, rtol=1e-4, atol=1e-4 * size)


def test_the_input_is_not_kept():
    """The backward pass keeps x A of width r, and not x as it does for LoRA."""

    def kept(config: LoRA) -> list:
        w = adapted(config)[1]
        trainable, frozen = tree.partition(w, tree.trainable_mask(w))
        x = jax.random.normal(jax.random.key(3), (7, D))
        # an input that is computed, so that keeping it shows
        return jaxprs.computed_residuals(
            lambda t, x: jax.lax.stop_gradient(jnp.sin(x)) @ tree.combine(t, frozen), trainable, x
        )

    assert (7, D) in kept(LoRA(rank=R, targets=("w",)))
    assert (7, D) not in kept(LoRAFA(rank=R, targets=("w",)))
    assert (7, R) in kept(LoRAFA(rank=R, targets=("w",)))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(init="a_zero"), r"peft.init: got 'a_zero'; LoRA-FA never moves A"),
        (dict(targets=("embed_tokens",)), "peft.targets: model.embed_tokens is an embedding, whose A begins at zero"),
    ],
)
def test_what_could_not_learn_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), LoRAFA(**settings))
