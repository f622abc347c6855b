"""The notebooks run from the first cell to the last."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(notebook: Path) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(notebook, tmp_path):
    (tmp_path / "cells.py").write_text("\n\n".join(cells(notebook)))
    environment = {**os.environ, "JAXFT_ROOT": str(ROOT), "PYTHONPATH": str(ROOT), "STEPS": "3", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "cells.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "every property holds" in done.stdout and "merged - adapted" in done.stdout


def test_the_method_of_the_second_notebook_is_short():
    first = cells(ROOT / "notebooks" / "02_your_own_peft_method.ipynb")[0]
    method = first.split("'''")[1]
    assert len(method.splitlines()) < 30 and "def wrap" in method
