"""The `data` section: where the rows are, how they become tokens, which tokens are learnt, how rows are packed."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Training data and its held-out part."""

    path: str | tuple[str, ...] = ""
    """A .jsonl, .json, .csv, .parquet or .txt file (a text is one document), a glob, a directory of such files, one
    written by `datasets.save_to_disk`, a hub name such as `trl-lib/Capybara`; or several, read one after the other."""
    subset: str | None = None
    """The configuration of a hub data set that has several (`main` in `openai/gsm8k`)."""
    split: str = "train"
    """The split to train on, where the source has splits."""
    limit: int | None = None
    """Use only the first so many rows; None uses all."""
    columns: dict[str, str] = field(default_factory=dict)
    """Rename columns before the format is recognised: `{question: prompt, answer: completion}`."""
    task_column: str | None = None
    """Column that numbers the task of a row, from 0, for multitask prompt tuning; None: every row is of task 0."""
    format: Literal[
        "auto",
        "messages",
        "conversations",
        "prompt_completion",
        "ultrafeedback",
        "dolly",
        "alpaca",
        "text",
        "flan",
        "hh_rlhf",
        "preference",
        "labelled",
        "stepwise",
        "oasst",
    ] = "auto"
    """How rows are written; `auto` recognises it from the first good row, in the order of this list, among the formats
    that the objective can use. In sft, `preference` (which must be asked for), `hh_rlhf` and `ultrafeedback` learn the
    preferred completions alone."""
    paths: Literal["best", "all"] = "best"
    """What is taken of OpenAssistant's trees. To learn: the path of the replies ranked best, or every path from the
    root. To compare: at each prompt its best reply with its worst, or every two replies of different rank."""
    step_separator: str = "\n"
    """What stands after each step of a solution (format `stepwise`); there the step is judged."""
    on_error: Literal["refuse", "skip"] = "refuse"
    """A bad row (malformed, missing field, empty completion, roles out of order, the same text chosen and rejected, a
    prompt that leaves no room for its completion) stops the run, or is skipped and counted."""

    template: str = "tokenizer"
    """Chat template: `tokenizer` (its own), one shipped here (`chatml`, `llama`, `gemma`, `alpaca`, `plain`), or a
    .jinja file."""
    template_options: dict[str, str | int | float | bool] = field(default_factory=dict)
    """Variables passed to the chat template, such as `{enable_thinking: false}`."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are learnt: every assistant turn (and every completion), the last one only, or all tokens. A
    `train: true` or `train: false` on a message overrides it for that message. Plain text is always learnt whole."""

    max_length: int = 2048
    """Tokens in a row, and the longest example kept whole. Rows of pairs hold twice as many: each of the two may be as
    long."""
    length_multiple: int = 1
    """Rows are padded up to a multiple of this many tokens (the block of an attention kernel); no example is longer
    than `max_length`."""
    overlong: Literal["truncate", "split", "drop"] = "truncate"
    """An example longer than `max_length` keeps its start, is cut into several pieces, or is left out. Counted in the
    report. Not used by `packing: wrapped`, which cuts everything at row ends."""
    packing: Literal["best_fit", "wrapped", "none"] = "best_fit"
    """`best_fit`: several examples in a row, each blind to the others. `wrapped`: all tokens in one stream chopped into
    full rows, documents seeing what came before them in the row (pretraining style). `none`: one example in a row."""

    shuffle: bool = True
    """A new order every epoch, from `seed` and the epoch's number; otherwise the order of the file."""
    seed: int = 0
    """Of the order of examples. The held-out part does not depend on it."""
    workers: int = 0
    """Processes that tokenise; 0 tokenises in this process (the tokenizer itself uses every core). Batches never depend
    on it."""
    prefetch: int = 2
    """Batches made ahead of the training step."""
    cache: str | None = None
    """Folder in which what was tokenised is kept and read from, for data larger than memory: one pass writes it, going
    on where it was if it is cut short, and later runs on the same rows begin at once. 5 bytes a token on disk, some 50
    bytes an example in memory. None: all in memory."""

    eval_path: str | tuple[str, ...] | None = None
    """Held-out data in a source of its own, read like `path`."""
    eval_split: str | None = None
    """Held-out data in another split of `path` (or of `eval_path`)."""
    eval_fraction: float = 0.0
    """Share of the rows held out of `path`, chosen by their content: independent of seed and row order; copies of a row
    stay together."""
    eval_examples: int = 0
    """Number of rows held out of `path`, instead of a share."""
