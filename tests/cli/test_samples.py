"""The table of samples: what a run writes, it and others can read."""

import numpy as np

from jaxft.cli import samples


def test_whatever_functions_log_can_be_written(tmp_path):
    row = {"number": np.float32(0.5), "array": np.arange(2), "set": {"a"}, "text": "ü"}
    samples.Samples(tmp_path).write(3, [row, {"text": "b"}])
    said = {"step": 3, "number": 0.5, "array": [0, 1], "set": "{'a'}", "text": "ü"}
    assert samples.read(tmp_path) == [said, {"step": 3, "text": "b"}]
