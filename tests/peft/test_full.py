"""Full fine-tuning as a method: a mask, no new parameters."""

import jax
import pytest

from jaxft import peft
from jaxft.core import tree
from jaxft.peft import Full, LoRA
from tests.peft import pairs


def trained(config: Full) -> set[str]:
    params = peft.adapt(pairs.model("llama_bias"), jax.random.key(0), config)
    assert params is pairs.ours("llama_bias").params, "nothing is copied or wrapped"
    select = peft.method_of(config).select(config)
    return {path for path, hit in tree.paths(tree.trainable_mask(params, select)) if hit}


def test_selects():
    everything = {path for path, _ in tree.paths(pairs.ours("llama_bias").params)}
    assert trained(Full()) == everything
    assert trained(Full("bitfit")) == {p for p in everything if p.endswith("/bias")}
    assert trained(Full("norms")) == {p for p in everything if "norm" in p}
    assert trained(Full("embeddings")) == {"embed/tokens", "head"}
    assert trained(Full("mlp/down")) == {"layers/mlp/down/base", "layers/mlp/down/bias"}


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="q_prj"):
        peft.adapt(pairs.model("llama"), jax.random.key(0), Full("q_prj"))
    with pytest.raises(ValueError, match="bitfit"):  # this model has no biases
        peft.adapt(pairs.model("llama"), jax.random.key(0), Full("bitfit"))


def test_methods_know_their_learning_rate():
    """Full fine-tuning wants a tenth of LoRA's."""
    assert {name: row.lr for name, row in peft.METHODS.items() if name in ("full", "lora")} == {
        "full": 2e-5,
        "lora": 2e-4,
    }
    assert peft.method_of(LoRA()).select(LoRA()) is None
    with pytest.raises(TypeError, match=r"expected one of .*LoRA"):
        peft.method_of("lora")
