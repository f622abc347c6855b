"""The training step on eight simulated devices: for every shape of the mesh, the loss and gradients of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import peft
from jaxft.core import tree
from jaxft.core.weight import Weight
from jaxft.models.decoder import Execution
from jaxft.peft.lora import LoRAWeight
from jaxft.quant import FourBit, QuantConfig
from jaxft.sharding import mesh as mesh_
from jaxft.sharding import rules
from jaxft.training import state
from jaxft.training.config import OptimConfig
from tests.sharding import steps

ADAM = OptimConfig(lr=1e-3, clip_norm=None)  # its first moment is a tenth of the gradient, its second the square
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64}  # fmt: skip
MODELS = {
    "llama": {"model_type": "llama", **SIZES, "num_hidden_layers": 2, "tie_word_embeddings": False,
              "attention_bias": True},
    "gemma3_text": {"model_type": "gemma3_text", **SIZES, "num_hidden_layers": 4, "sliding_window": 5,
                    "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 8,
                    "final_logit_softcapping": 3.0, "tie_word_embeddings": True},
}  # fmt: skip
METHODS = {
    "full": peft.Full(),
    "lora": peft.LoRA(rank=4, modules_to_save=("embed_tokens",)),
    "qlora": peft.LoRA(rank=4, targets="all-linear"),
    "slots": [peft.PTuning(tokens=2, encoder="lstm", hidden=8), peft.PrefixTuning(tokens=3, projection=True, hidden=8)],
}
QUANT = {"qlora": QuantConfig("nf4", block_size=32)}
RESERVED = {"slots": 2}
SHAPES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2), (4, 1, 2)]  # data x fsdp x tensor
QUICK = {"xla_backend_optimization_level": 0}  # half the compile time
CASES = [(m, s, "scan") for m in (("llama", "full"), ("gemma3_text", "lora")) for s in SHAPES] + [
    (("llama", "lora"), (2, 2, 2), "unrolled"),
    (("gemma3_text", "full"), (2, 2, 2), "scan"),
    (("gemma3_text", "slots"), (2, 2, 2), "scan"),
    (("llama", "qlora"), (2, 2, 2), "keeping all"),
]


@functools.cache
def parts(model: str, method: str) -> steps.Parts:
    made = steps.parts(MODELS[model], METHODS[method], jnp.float32, ADAM, quant=QUANT.get(method))
    nudged = jax.tree.map(lambda a: a + 0.05, made.trainable)  # B = 0 would hide the gradient of A
    return made._replace(trainable=nudged)


@functools.cache
def one_device(model: str, method: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """State after a step, and its metrics."""
    made = parts(model, method)
    begin = state.create(made.trainable, made.optimizer, jax.random.key(2))
    run = steps.build(made, jnp.float32, Execution(remat="full"), None)
    batch = steps.batch(2, 8, 24, SIZES["vocab_size"], RESERVED.get(method, 0))
    return run.lower(begin, made.frozen, batch).compile(compiler_options=QUICK)(begin, made.frozen, batch)


def numbers(of) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in tree.paths(of)}


@pytest.mark.parametrize(("of", "dims", "loop"), CASES)
def test_every_mesh_gives_what_one_device_gives(of, dims, loop):
    """Packed rows in two micro-batches: loss, metrics, gradient (Adam's moments); all stays where it was declared."""
    made, mesh = parts(*of), steps.mesh(dims)
    where = steps.shardings(made, mesh)
    begin = state.create(made.trainable, made.optimizer, jax.random.key(2), shardings=where.state)
    frozen = jax.device_put(made.frozen, where.frozen)
    remat = "none" if loop == "keeping all" else "full"
    how = Execution(remat, unroll=loop == "unrolled", mesh=mesh, gather=rules.gather(mesh))
    run = steps.build(made, jnp.float32, how, where)
    batch = mesh_.placer(mesh)(steps.batch(2, 8, 24, SIZES["vocab_size"], RESERVED.get(of[1], 0)))
    run = run.lower(begin, frozen, batch).compile(compiler_options=QUICK)
    after, metrics = run(begin, frozen, batch)

    want, expected = one_device(*of)
    for name, value in numbers(expected).items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    assert float(metrics["loss"]) > 1 and float(metrics["grad_norm"]) > 0.1
    wanted = numbers(want.opt_state)
    for path, moment in numbers(after.opt_state).items():
        np.testing.assert_allclose(
            moment, wanted[path], rtol=1e-5, atol=1e-5 * np.abs(wanted[path]).max(), err_msg=path
        )
    for (path, leaf), (_, place) in zip(tree.paths(after), tree.paths(where.state), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim), path
    _, fsdp, tensor = dims
    leaves = tree.combine(after.trainable, frozen)["layers"]["mlp"]["up"]
    base = leaves.base if isinstance(leaves, Weight) else leaves
    packed = base.codes if isinstance(base, FourBit) else base
    rows = 64 // fsdp // (2 if isinstance(base, FourBit) else 1)
    assert packed.addressable_shards[0].data.shape == (base.shape[0], rows, 128 // tensor)
    if isinstance(leaves, LoRAWeight):
        assert leaves.a.addressable_shards[0].data.shape == (base.shape[0], 64 // fsdp, 4)
        assert leaves.b.addressable_shards[0].data.shape == (base.shape[0], 4, 128 // tensor)
