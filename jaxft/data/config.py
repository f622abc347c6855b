"""The `data` section: where the rows are, how they become tokens, which tokens are learnt, how rows are packed, and in
what parts several sources are mixed."""

from dataclasses import dataclass, field
from typing import Literal

Format = Literal[
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
]
Prompts = str | tuple[str | dict[str, str], ...] | None


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture. What is null here is as in `data`."""

    path: str | tuple[str, ...]
    """As `data.path`."""
    weight: float | None = None
    """Its part of the rows of a batch, relative to those of the others (`data.mix.rule: weights`); null: 1."""
    subset: str | None = None
    """The configuration of a hub data set that has several."""
    split: str | None = None
    """The split to train on, where the source has splits."""
    limit: int | None = None
    """Use only the first so many rows."""
    columns: dict[str, str] = field(default_factory=dict)
    """Rename columns before the format is recognised."""
    task_column: str | None = None
    """Column that numbers the task of a row, from 0."""
    task: int | None = None
    """The number of the task of all its rows, instead of a column of them."""
    format: Format | None = None
    """How its rows are written."""
    paths: Literal["best", "all"] | None = None
    """What is taken of OpenAssistant's trees."""
    prompts: Prompts = None
    """Prompt templates of its task."""
    prompts_a_row: int | None = None
    """Prompt templates that each row is told by."""
    template: str | None = None
    """Chat template."""
    template_options: dict[str, str | int | float | bool] | None = None
    """Variables passed to the chat template."""
    loss_on: Literal["assistant", "last", "all"] | None = None
    """Which tokens are learnt."""
    eval_path: str | tuple[str, ...] | None = None
    """Held-out data in a source of its own."""
    eval_split: str | None = None
    """Held-out data in another split."""
    eval_fraction: float | None = None
    """Share of its rows held out."""
    eval_examples: int | None = None
    """Number of its rows held out. Of the four `eval_` keys those of `data` count where a source has none."""


@dataclass(frozen=True)
class MixConfig:
    """In what parts `data.sources` are mixed."""

    rule: Literal["weights", "proportional", "temperature", "capped"] = "weights"
    """`weights`: each source's own part of the rows of a batch. By size otherwise, n being the number of a source's
    `unit`s: `proportional` to n (every example as often as any other); `temperature`: to n^(1/T); `capped`: to
    min(n, K), the examples-proportional mixing of T5 (Raffel et al. 2020, arXiv:1910.10683, section 3.5.2)."""
    unit: Literal["examples", "tokens"] = "examples"
    """What n counts, and what the parts are parts of: sources whose examples are short take fewer rows for as many."""
    temperature: float = 2.0
    """T: 1 is proportional; the higher, the more alike are the parts."""
    cap: int | None = None
    """K: the size from which on a source counts as no larger."""
    schedule: dict[int, dict[str, float]] = field(default_factory=dict)
    """Weights that change: those of every source at some steps, `{0: {chat: 1, domain: 0}, 1000: {chat: 1, domain:
    3}}`. Between two of them the parts move in a straight line; after the last they stay."""


@dataclass(frozen=True)
class DataConfig:
    """Training data and its held-out part."""

    path: str | tuple[str, ...] = ""
    """A .jsonl, .json, .csv, .parquet or .txt file (a text is one document), a glob, a directory of such files, one
    written by `datasets.save_to_disk`, a hub name such as `trl-lib/Capybara`; or several, read one after the other."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several sources, by names of your own, instead of `path`: `{chat: {path: chat.jsonl, weight: 3}, domain: {path:
    logs.jsonl}}`. Each is packed apart, so that a row of a batch is of one source, and is repeated in epochs and an
    order of its own. An epoch is as many rows as all of them have."""
    mix: MixConfig = field(default_factory=MixConfig)
    """In what parts they are mixed."""
    subset: str | None = None
    """The configuration of a hub data set that has several (`main` in `openai/gsm8k`)."""
    split: str = "train"
    """The split to train on, where the source has splits."""
    limit: int | None = None
    """Use only the first so many rows; None uses all."""
    columns: dict[str, str] = field(default_factory=dict)
    """Rename columns before the format is recognised: `{question: prompt, answer: completion}`."""
    task_column: str | None = None
    """Column that numbers the task of a row, from 0, for multitask prompt tuning; None: every row is of `task`."""
    task: int = 0
    """The number of the task of every row, where no column has it."""
    format: Format = "auto"
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

    prompts: Prompts = None
    """Prompt templates, of which each row is told by one: a YAML file of them, or a list. A template is a text with
    `|||` between input and target, or a mapping of columns to texts (`{input: ..., target: ...}`; `prompt` and
    `completion` for text that is no chat; `prompt`, `chosen`, `rejected`). The row's columns stand in it as `{name}`,
    or as Jinja has them. Files of promptsource (P3) are read as they are."""
    prompts_a_row: int = 1
    """Prompt templates that each row is told by, an example each. Which ones depends on the row's content and
    `prompts_seed` alone."""
    prompts_seed: int = 0
    """Of the choice of prompt templates."""
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

    share_prompts: bool = True
    """Whether the prompt of a chosen and a rejected completion is computed once for both. Saves its tokens; never
    changes the result beyond rounding."""

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
    on where it was if it is cut short, and later runs on the same rows begin at once. 5 bytes a token on disk, some 100
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

    @property
    def given(self) -> bool:
        """Whether any training data are named."""
        return bool(self.path or self.sources)

    @property
    def holds_out(self) -> bool:
        """Whether any rows are held out."""
        every = [self, *self.sources.values()]
        return any(one.eval_path or one.eval_split or one.eval_fraction or one.eval_examples for one in every)
