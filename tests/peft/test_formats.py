"""What all methods share in peft's format: settings that differ by module, and layers that are not adapted."""

import json

import chex
import jax
import pytest

from jaxft.core import tree
from jaxft.peft import (
    BOFT,
    HRA,
    IA3,
    METHODS,
    OFT,
    AdaLoRA,
    BitFit,
    DoRA,
    FourierFT,
    LoftQ,
    LoHa,
    LoKr,
    LoRA,
    LoRAFA,
    MiSS,
    RandLora,
    RoAd,
    SHiRA,
    VeRA,
    disk,
    formats,
)
from tests.peft import pairs

Q, V = ("q_proj",), ("v_proj",)
MIXED = {
    AdaLoRA: (
        {"rank": 2, "init_rank": 4},
        [{"rank": 3, "init_rank": 6}, {"alpha": 30}, {"dropout": 0.1}],
    ),
    BitFit: ({}, [{}]),
    BOFT: ({"block_size": 4}, [{"block_size": 2}, {"block_size": None, "blocks": 8}, {"factors": 2}, {"dropout": 0.1}]),
    DoRA: ({"rank": 4}, [{"rslora": True}, {"rank": 2}, {"dropout": 0.1}]),
    FourierFT: ({"frequencies": 9}, [{"scale": 50.0}, {"seed": 2}, {"frequencies": 7}]),
    HRA: ({"rank": 4}, [{"rank": 2}, {"gram_schmidt": True}]),
    IA3: ({"feedforward": ()}, [{"feedforward": V}]),
    LoHa: ({"rank": 2}, [{"rank": 3}, {"alpha": 5}]),
    LoKr: ({"rank": 2, "decompose_factor": 4}, [{"decompose_factor": 8}, {"decompose_both": True}, {"alpha": 5}]),
    LoRA: (
        {"rank": 4},
        [
            *({"rank": 2, "alpha": 3}, {"rslora": True}, {"dropout": 0.1}, {"lora_bias": True}, {"init": "pissa"}),
            *({"init": "loftq"}, {"init": "loftq", "loftq": LoftQ(2)}),
        ],
    ),
    LoRAFA: ({"rank": 4}, [{"rank": 2, "alpha": 3}, {"rslora": True}]),
    MiSS: ({"rank": 8}, [{"rank": 4}, {"variant": "bat"}, {"variant": "mini", "mini_rank": 2}, {"dropout": 0.1}]),
    OFT: (
        {"block_size": 8},
        [{"block_size": 4}, {"neumann_terms": None}, {"neumann_terms": 4}, {"coft_eps": 0.1}, {"block_share": True}],
    ),
    RandLora: ({"rank": 6}, [{"rank": 5}, {"alpha": 9.0}, {"dropout": 0.1}]),
    RoAd: ({"group_size": 8}, [{"group_size": 16}, {"variant": "road_2"}]),
    SHiRA: ({"rank": 2}, [{"rank": 4}]),
    VeRA: ({"rank": 8}, [{"rank": 4}, {"dropout": 0.1}]),
}  # fmt: skip
LISTS = [(method, usual, usual | other) for method, (usual, others) in MIXED.items() for other in others]


def mapped(params: tree.Params) -> list:
    """What the two modules make of the same input, and their dropout."""
    x_TD = jax.random.normal(jax.random.key(7), (5, 32))
    weights = [params["layers"]["attn"][name] for name in "qv"]
    return [(x_TD @ w[0], x_TD @ w[2], getattr(w, "rate", None)) for w in weights]


@pytest.mark.parametrize(("method", "first", "second"), LISTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_settings_that_differ_by_module(method, first, second, tmp_path):
    """One method on two modules comes back from its directory as it was, in whichever format that is."""
    params = pairs.adapted("llama", [method(targets=Q, **first), method(targets=V, **second)], jax.random.key(3))
    again = pairs.load("llama", pairs.save("llama", params, tmp_path / "adapter"))
    chex.assert_trees_all_close(mapped(again), mapped(params), rtol=0, atol=1e-5)


def test_every_method_is_mixed():
    assert set(MIXED) == {m.config for m in METHODS.values() if isinstance(m.hf, formats.Format)}


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        (RandLora(rank=6, alpha=-3.0, targets=Q + V, layers=(0,)), {"randlora_alpha": -3.0}),
        (FourierFT(frequencies=9, scale=-20.0, targets=Q + V, layers=(0,)), {"scaling": -20.0}),
        (LoRA(rank=4, alpha=-3.0, targets=Q + V, layers=(0,)), {"lora_alpha": -3}),
        (LoHa(rank=4, alpha=-3.0, targets=Q + V, layers=(0,)), {"alpha": -3.0}),
        (LoKr(rank=4, alpha=-3.0, targets=Q + V, layers=(0,)), {"alpha": -3.0}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_negative_scale_of_some_layers(method, fields, tmp_path, key):
    """A layer that is not adapted says nothing of the scale."""
    params = pairs.adapted("llama", method, key)
    directory = pairs.save("llama", params, tmp_path / "adapter")
    assert fields.items() <= json.loads((directory / disk.CONFIG).read_text()).items()
    chex.assert_trees_all_close(mapped(pairs.load("llama", directory)), mapped(params), rtol=0, atol=1e-5)
