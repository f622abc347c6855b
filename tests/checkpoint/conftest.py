"""Saved tiny models, made once a session, copied for each test that changes them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import tiny


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``saved(name)``: the directory of a row of `tiny.CONFIGS`, not to be written to."""
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in made:
            made[name] = tiny.save(name, tmp_path_factory.mktemp("saved") / name)
        return made[name]

    return directory


@pytest.fixture
def copy(saved: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``copy(name)``: the same, in a directory of the test's own."""
    return lambda name: Path(shutil.copytree(saved(name), tmp_path / "model"))
