"""Where the policy is its own reference, the first loss of a preference is ln 2: for every method, on every mesh."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jaxft import peft
from jaxft.core import tree
from jaxft.model import Model
from jaxft.models import families, init, slots
from jaxft.models.decoder import Execution
from jaxft.objectives import DPO, OBJECTIVES
from jaxft.rollout import score
from jaxft.sharding import mesh as mesh_
from jaxft.sharding import rules
from jaxft.training import step
from tests.peft.small import SMALL

RAW = {"model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
       "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
NOT_THE_IDENTITY = {"lora_pissa": {"init": "pissa"}, "lora_olora": {"init": "olora"}}
NAMES = sorted(name for name, method in peft.METHODS.items() if name != "adapter")


@functools.cache
def model():
    config, names = families.read(RAW)
    return Model(config, init.random(config, names, jax.random.key(0), jnp.float32, 0.3), names, RAW)


def pair(reserved=0, rows=1):
    """A chosen and a rejected sequence in each row, after ``reserved`` positions each."""
    rng, length = np.random.default_rng(0), 2 * (6 + reserved)
    half = length // 2
    at = np.arange(length)
    row = {
        "tokens": rng.integers(0, 64, length).astype(np.int32),
        "positions": (at % half).astype(np.int32),
        "segments": (1 + at // half).astype(np.int32),
        "loss_mask": at % half >= reserved + 3,
        "sequence_mask": np.ones(2, bool),
    }
    return {name: np.broadcast_to(a, (1, rows, *a.shape)) for name, a in row.items()}


def first_loss(params, mask, batch, execution):
    trainable, frozen = tree.partition(params, mask)
    scored = score.make_score(model().config, dtype=jnp.float32, execution=execution)
    evaluate = step.make_eval_step(OBJECTIVES["dpo"], DPO(), scored)
    found = evaluate(trainable, trainable, frozen, batch)["loss/sigmoid"]
    return float(found.total / found.weight)


def adapted(name):
    settings = NOT_THE_IDENTITY.get(name, SMALL.get(name, {}))
    config = peft.METHODS[name.partition("_")[0] if name in NOT_THE_IDENTITY else name].config(**settings)
    return peft.adapt_for_training(model(), jax.random.key(1), [config])[:2]


@pytest.mark.parametrize("name", [*NAMES, *NOT_THE_IDENTITY])
def test_the_first_loss_is_ln_2(name):
    params, mask = adapted(name)
    found = first_loss(params, mask, pair(slots.prompt_length(params)), Execution())
    assert found == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("name", ["lora_pissa", "prompt_tuning"])
@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 2, 2)])
def test_on_a_mesh_of_devices_in_any_order(name, shape):
    params, mask = adapted(name)
    devices = np.random.default_rng(1).permutation(np.asarray(jax.devices()[:8])).reshape(shape)
    mesh = Mesh(devices, mesh_.AXES, axis_types=(AxisType.Auto,) * 3)
    params = jax.device_put(params, rules.shardings(params, mesh))
    batch = mesh_.placer(mesh)(pair(slots.prompt_length(params), 4))
    assert first_loss(params, mask, batch, Execution(mesh=mesh)) == pytest.approx(math.log(2), abs=1e-6)
