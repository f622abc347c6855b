"""What `jaxft data CONFIG` shows: rows exactly as the model gets them, learnt tokens in colour, and the report.

Without colour (a pipe, NO_COLOR), learnt stretches stand in ⟦brackets⟧.
"""

from typing import TYPE_CHECKING

import numpy as np

from jaxft.data.config import DataConfig
from jaxft.data.loader import Batch, Loader
from jaxft.data.mixture import prepare

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerFast

LEARNT = ("bold black on green3", "bold black on spring_green2")
GIVEN = ("grey62", "grey78")
TOKENWISE = {"tokens", "positions", "loss_mask", "segments", "task_ids", "step_mask", "step_label"}
"""The arrays of a batch that have a value for every token."""


def preview(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    console: "Console",
    *,
    rows: int = 2,
    batch_rows: int = 8,
    reserved: int = 0,
    form: str = "tokens",
) -> None:
    """Print the first rows of training, token by token, then the reports of the training and the held-out data.

    ``form``: what the objective wants of the rows (`Objective.rows`); judged sequences are shown one by one, prompt,
    completion and what is known of it."""
    prepared = prepare(config, tokenizer, form, reserved)
    loader = Loader(prepared.train, config, batch_rows=batch_rows, epochs=1, reserved=reserved)
    console.print(legend(console, form))
    batch = loader.batch(0)
    for row in range(min(rows, batch_rows, len(loader.plan))):
        source = f" ({loader.mixed.mixture.names[batch['source'][row]]})" if loader.mixed else ""
        console.rule(f"row {row + 1}{source}")
        shown = without_prompts({name: array[row] for name, array in batch.items()}, reserved)
        if form == "tokens":
            console.print(tokens_in_colour(shown, tokenizer, console), soft_wrap=True)
        else:
            judged(shown, form, tokenizer, console)
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
    return {name: row[name][~prompts] if name in TOKENWISE else array for name, array in row.items()}


def judged(row: Batch, form: str, tokenizer: "PreTrainedTokenizerFast", console: "Console") -> None:
    """Each sequence of a row: the prompt (once for a pair), the completion, and how it is judged."""
    for number in range(1, int(row["segments"].max(initial=0)) + 1):
        at = row["segments"] == number
        one = {name: row[name][at] for name in TOKENWISE & row.keys()}
        begin = int(np.argmax(one["loss_mask"]))
        chosen = form == "pairs" and number % 2
        if number > 1 and (form != "pairs" or chosen):
            console.print("────", style="cyan")
        if form != "pairs" or chosen:
            piece(console, "prompt", {name: array[:begin] for name, array in one.items()}, tokenizer)
        if form == "steps":
            ends = [*(np.flatnonzero(one["step_mask"]) + 1)]
            for low, high in zip([begin, *ends], ends, strict=False):
                name = "right" if one["step_label"][high - 1] else "wrong"
                piece(console, name, {name: array[low:high] for name, array in one.items()}, tokenizer)
            continue
        name = "chosen" if chosen else "rejected"
        if form == "labelled":
            name = "desirable" if row["label"][number - 1] else "undesirable"
        piece(console, name, {name: array[begin:] for name, array in one.items()}, tokenizer)
        if chosen and "margin" in row:
            console.print(f"{'margin':<12}{row['margin'][number - 1]:g}")


def piece(console: "Console", name: str, row: Batch, tokenizer: "PreTrainedTokenizerFast") -> None:
    """A stretch of tokens after its name."""
    from rich.text import Text

    text = tokens_in_colour(row, tokenizer, console) if len(row["tokens"]) else Text("(empty)")
    console.print(Text(f"{name:<12}", style="bold") + text, soft_wrap=True)


def legend(console: "Console", form: str) -> "Text":
    """How learnt and given tokens look."""
    from rich.text import Text

    if not console.color_system:
        return Text("⟦learnt⟧ given" + ("; a line parts the documents of a row" if form == "tokens" else ""))
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
