"""Where metrics are written."""

import builtins
import json

import pytest

from jaxft.training import sinks
from jaxft.training.config import LogConfig


def test_a_fresh_run_starts_an_empty_file_and_a_resumed_one_cuts_it_back(tmp_path):
    path = tmp_path / sinks.FILE
    path.write_text('{"step": 0, "eval_loss": 3}\n{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    sink = sinks.jsonl(path, resumed_at=1)
    sink.write(2, {"loss": float("nan"), "grad_norm": float("inf"), "x": 1})
    sink.close()
    assert sinks.read(tmp_path) == [
        {"step": 0, "eval_loss": 3},
        {"step": 1, "loss": 2},
        {"step": 2, "loss": None, "grad_norm": None, "x": 1},
    ]
    sinks.jsonl(path, resumed_at=None).close()
    assert sinks.read(tmp_path) == []


def test_every_line_is_there_as_soon_as_it_is_written(tmp_path):
    sink = sinks.jsonl(tmp_path / sinks.FILE, None)
    for step in (1, 2):
        sink.write(step, {"loss": 1.0})
        assert len(sinks.read(tmp_path)) == step
    sink.close()


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_tracker_that_is_not_installed_says_what_to_do(name, module, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(wanted, *args, **more):
        if wanted.split(".")[0] == module:
            raise ImportError(wanted)
        return real(wanted, *args, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ImportError, match=rf"log.to: {name} needs the package {module}.*pip install 'jaxft\[track\]'"):
        sinks.open_all(LogConfig(to=(name,)), tmp_path, None, {})


def test_json_numbers_are_exact(tmp_path):
    """A float32 loss read back is the same number: resumes are compared bit for bit."""
    value = float.fromhex("0x1.99999ap-4")
    sink = sinks.jsonl(tmp_path / sinks.FILE, None)
    sink.write(1, {"loss": value})
    sink.close()
    assert json.loads((tmp_path / sinks.FILE).read_text())["loss"] == value
