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


@dataclass(frozen=True)
class Unfinished(Targeted):
    """Settings alone."""


class Undecorated(Gain):
    start: float = 1.0


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


def test_a_file_runs_again_only_when_it_has_changed(file):
    """Edited to the same length within the same second, as a notebook does."""
    before = registry.load(f"{file}:Gain")
    assert registry.load(f"{file}:Gain") is before
    file.write_text(SOURCE.replace("start: float = 0.0", "start: float = 2.0"))
    after = registry.load(f"{file}:Gain")
    assert (before().start, after().start) == (0.0, 2.0)
    assert registry.load(f"{file}:Gain") is after
    file.write_text("nonsense(")
    with pytest.raises(ValueError, match="SyntaxError"):
        registry.load(f"{file}:Gain")
    file.write_text(SOURCE)
    again = registry.load(f"{file}:Gain")
    assert again().start == 0.0 and registry.load(registry.name_of(again)) is again


def test_an_adapter_is_read_as_the_class_that_the_file_has_now(file, tmp_path):
    def adapted():
        return peft.adapt(pairs.model("llama"), jax.random.key(0), registry.load(f"{file}:Gain")(targets=("q_proj",)))

    params = adapted()
    pairs.save("llama", params, tmp_path / "adapter")
    for value in range(3):  # each class stays loaded
        file.write_text(SOURCE.replace("start: float = 0.0", f"start: float = {value}.5"))
        now = type(adapted()["layers"]["attn"]["q"])
        assert now is not type(params["layers"]["attn"]["q"])
        assert type(pairs.load("llama", tmp_path / "adapter")["layers"]["attn"]["q"]) is now


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
        (["peft.module={file}:Gian"], "it has Gain, Unfinished, Undecorated"),
        (["peft.module={file}:NOTHING"], "is no method"),
        (["peft.module={file}:Unfinished"], r"is no method; expected .* has wrap\(site\)"),
        (["peft.module={file}:Undecorated"], "Undecorated is a class without @dataclass"),
        (["peft.module=no.such:Gain"], "No module named"),
        (["peft.module={file}:Gain", "peft.method=lora"], "expected one of the two"),
        (["peft.module={file}:Gain", "peft.strat=1"], "did you mean `peft.start`"),
    ],
)
def test_refused_by_name(file, extra, said):
    with pytest.raises(ConfigError, match=said):
        config.load(None, ["model.path=x", *(word.format(file=file) for word in extra)])


def test_a_file_is_found_from_other_folders(file, tmp_path, monkeypatch):
    """A run keeps the whole path; a file that is gone is asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(config.dump(config.load(None, ["model.path=x", "peft.module=gain.py:Gain"])))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (chosen,) = config.load(tmp_path / "run.yaml").peft
    assert chosen.name == f"{file}:Gain"
    file.rename(tmp_path / "moved.py")
    with pytest.raises(ConfigError, match=r"no file .*gain\.py.* say where it is now, peft\.module=FILE\.py:Gain"):
        config.load(tmp_path / "run.yaml")
    (chosen,) = config.load(tmp_path / "run.yaml", [f"peft.module={tmp_path / 'moved.py'}:Gain"]).peft
    assert chosen.name == f"{tmp_path / 'moved.py'}:Gain"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("def f(:", "line 2: SyntaxError: "),
        ("import no_such_module", "line 2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("import dataclasses; dataclasses.fields(1)", "line 2: TypeError: "),
    ],
)
def test_a_file_that_does_not_run_is_told_with_its_line(tmp_path, line, said):
    (tmp_path / "broken.py").write_text(f'"""A method."""\n{line}\n')
    with pytest.raises(ConfigError) as caught:
        config.load(None, ["model.path=x", f"peft.module={tmp_path}/broken.py:Mine"])
    assert f"{tmp_path}/broken.py, {said}" in str(caught.value)


def test_a_module_that_does_not_run_is_told_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "jaxft_broken.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"jaxft_broken\.py, line 1: ModuleNotFoundError: No module named 'no_such"):
        config.load(None, ["model.path=x", "peft.module=jaxft_broken:Mine"])


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
