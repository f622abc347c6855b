"""What `jaxft data CONFIG` shows: rows exactly as the model gets them, learnt tokens in colour, and the report.

Without colour (a pipe, NO_COLOR), learnt stretches stand in ⟦brackets⟧.
"""

from typing import TYPE_CHECKING

import numpy as np

from jaxft.data.config import DataConfig
from jaxft.data.examples import prepare
from jaxft.data.loader import Batch, Loader

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerFast

LEARNT = ("bold black on green3", "bold black on spring_green2")
GIVEN = ("grey62", "grey78")


def preview(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    console: "Console",
    *,
    rows: int = 2,
    batch_rows: int = 8,
    reserved: int = 0,
) -> None:
    """Print the first rows of training, token by token, then the reports of the training and the held-out data."""
    prepared = prepare(config, tokenizer)
    loader = Loader(prepared.train, config, batch_rows=batch_rows, epochs=1, reserved=reserved)
    console.print(legend(console))
    batch = loader.batch(0)
    for row in range(min(rows, batch_rows, len(loader.plan))):
        console.rule(f"row {row + 1}")
        shown = without_prompts({name: array[row] for name, array in batch.items()}, reserved)
        console.print(tokens_in_colour(shown, tokenizer, console), soft_wrap=True)
    parts = [("training data", loader)]
    if prepared.held_out is not None and len(prepared.held_out):
        held_out = Loader(prepared.held_out, config, batch_rows=batch_rows, epochs=1, reserved=reserved)
        parts.append(("held-out data", held_out))
    for title, part in parts:
        console.rule(f"{title} ({prepared.format})")
        for line in part.report().lines():
            console.print(line, style="yellow" if line.startswith("!") else "", highlight=not line.startswith("!"))


def without_prompts(row: Batch, reserved: int) -> Batch:
    """One row of a batch without the positions that are reserved for a prompt."""
    if "segments" not in row:
        return row
    prompts = (row["segments"] > 0) & (row["positions"] < reserved)
    return {name: array[~prompts] for name, array in row.items()}


def legend(console: "Console") -> "Text":
    """How learnt and given tokens look."""
    from rich.text import Text

    if not console.color_system:
        return Text("⟦learnt⟧ given; a line parts the documents of a row")
    return Text.assemble(("learnt", LEARNT[0]), " ", ("given", GIVEN[0]), "; shades alternate from token to token")


def tokens_in_colour(row: Batch, tokenizer: "PreTrainedTokenizerFast", console: "Console") -> "Text":
    """One row of a batch as text, token by token; padding is left out."""
    from rich.text import Text

    colour = console.color_system is not None
    # Positions go on counting in a row without segments, and padding has none.
    size = int((row["segments"] > 0).sum() if "segments" in row else row["positions"].max() + 1)
    document = row["segments"] if "segments" in row else np.ones_like(row["tokens"])
    loss = np.append(row["loss_mask"][:size], False)
    text = Text()
    for i, piece in enumerate(spelled(row["tokens"][:size], tokenizer)):
        new = i > 0 and document[i] != document[i - 1]
        ends = i + 1 == size or document[i + 1] != document[i]
        if new:
            text.append("\n────\n", style="cyan")
        if colour:
            text.append(piece, style=(LEARNT if loss[i] else GIVEN)[i % 2])
            continue
        opens, closes = loss[i] and (new or i == 0 or not loss[i - 1]), loss[i] and (ends or not loss[i + 1])
        text.append(f"{'⟦' if opens else ''}{piece}{'⟧' if closes else ''}")
    return text


def spelled(tokens: np.ndarray, tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """The text that each token adds to the one before; a character made of several tokens is shown with its last."""
    ids, pieces, start = tokens.tolist(), [], 0
    for i in range(len(ids)):
        before = ids[max(start - 1, 0) : start]
        known = tokenizer.decode(before, clean_up_tokenization_spaces=False)
        shown = tokenizer.decode([*before, *ids[start : i + 1]], clean_up_tokenization_spaces=False)
        text = str(shown)[len(known) :]
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}") or i - start > 6
        pieces.append(text if whole else "")
        start = i + 1 if whole else start
    return pieces
