"""Data: rows in any of the usual formats become packed, masked, reproducible batches of numpy arrays.

    prepared = data.prepare(config, tokenizer)   # reads, converts, tokenises; every bad row is named
    loader = data.Loader(prepared.train, config, batch_rows=8, epochs=3)
    for batch in loader: ...                     # {"tokens", "positions", "segments", "loss_mask"}, each [8, T]
    cursor = loader.state()                      # JSON; `loader.restore(cursor)` goes on with the very next batch

For objectives that judge whole sequences, `prepare(..., rows="pairs")` (or `labelled`, `steps`) makes pairs of a chosen
and a rejected completion, labelled completions, or solutions whose steps have labels; see `Loader` for their arrays.

The whole data set is tokenised once, before the first batch. So a bad row stops the run at its start, the number of
batches in an epoch is known, packing sees every length, and batch `i` is a pure function of (examples, settings, i):
resuming is exact and free, whatever the number of workers.
"""

from jaxft.data.config import DataConfig
from jaxft.data.errors import DataError
from jaxft.data.examples import Examples, Prepared, opened
from jaxft.data.loader import Loader
from jaxft.data.mixture import prepare
from jaxft.data.preview import preview
from jaxft.data.prompts import Prompt, prompts, prompts_of
from jaxft.data.report import Report
from jaxft.data.template import install

__all__ = [
    "DataConfig",
    "DataError",
    "Examples",
    "Loader",
    "Prepared",
    "Prompt",
    "Report",
    "install",
    "opened",
    "prepare",
    "preview",
    "prompts",
    "prompts_of",
]
