"""Methods from outside the package: named in a config, kept in a run, refused by name."""

import importlib.metadata

import jax
import pytest
import yaml

from jaxft import config, peft
from jaxft.border.errors import ConfigError
from jaxft.peft import registry
from tests.peft import pairs

SOURCE = '''
from dataclasses import dataclass
from typing import Any
import jax
import jax.numpy as jnp
from jaxft.core.weight import Weight, parameter, trainable, weight
from jaxft.peft import Targeted


@dataclass(frozen=True)
class Gain(Targeted):
    """A trained factor of each input feature."""

    start: float = 0.0
    """Where it starts."""

    def wrap(self, site):
        shape = (*site.layers.shape, site.shape[0])
        return GainWeight(site.base, jnp.full(shape, self.start), site.gate)


@weight
class GainWeight(Weight):
    base: Any = parameter()
    gain: jax.Array = trainable()
    gate: jax.Array

    def __rmatmul__(self, x):
        return (x * (1 + self.gate * self.gain).astype(x.dtype)) @ self.base


NOTHING = 1
'''


@pytest.fixture
def file(tmp_path):
    (tmp_path / "gain.py").write_text(SOURCE)
    return tmp_path / "gain.py"


def test_a_class_in_a_file_is_a_method(file, tmp_path):
    words = ["model.path=x", f"peft.module={file}:Gain", "peft.start=0.5", "peft.targets=[q_proj]"]
    loaded = config.load(None, words)
    (chosen,) = loaded.peft
    assert type(chosen.value).__name__ == "Gain" and chosen.value.start == 0.5
    assert peft.method_of(chosen.value).lr == 1e-3
    params = peft.adapt(pairs.model("llama"), jax.random.key(0), chosen.value)
    assert params["layers"]["attn"]["q"].gain.shape == (3, 32)
    (tmp_path / "again.yaml").write_text(config.dump(loaded))
    assert config.load(tmp_path / "again.yaml") == loaded
    assert registry.load(registry.name_of(type(chosen.value))) is type(chosen.value)


def test_it_may_stand_in_a_list(file, tmp_path):
    written = {"model": {"path": "x"}, "peft": [{"method": "lora", "rank": 2}, {"module": f"{file}:Gain"}]}
    (tmp_path / "run.yaml").write_text(yaml.dump(written))
    loaded = config.load(tmp_path / "run.yaml", ["peft.1.start=1.0"])
    assert [type(c.value).__name__ for c in loaded.peft] == ["LoRA", "Gain"] and loaded.peft[1].value.start == 1.0


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["peft.module=gain.py"], "expected file.py:Class"),
        (["peft.module=nowhere.py:Gain"], "no file"),
        (["peft.module={file}:Gian"], "it has Gain"),
        (["peft.module={file}:NOTHING"], "is no method"),
        (["peft.module=no.such:Gain"], "No module named"),
        (["peft.module={file}:Gain", "peft.method=lora"], "expected one of the two"),
        (["peft.module={file}:Gain", "peft.strat=1"], "did you mean `peft.start`"),
    ],
)
def test_refused_by_name(file, extra, said):
    with pytest.raises(ConfigError, match=said):
        config.load(None, ["model.path=x", *(word.format(file=file) for word in extra)])


def test_installed_packages_offer_methods(file, monkeypatch):
    cls = registry.load(f"{file}:Gain")
    point = importlib.metadata.EntryPoint("gain", "a_package:Gain", registry.GROUP)
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: cls)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == registry.GROUP else [])
    registry.installed.cache_clear()
    try:
        assert registry.installed() == {"gain": cls}
        monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: dict)
        registry.installed.cache_clear()
        with pytest.raises(ValueError, match=r"the entry point gain \(a_package:Gain\) is no method"):
            registry.installed()
    finally:
        registry.installed.cache_clear()
