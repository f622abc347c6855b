"""Every example of a data set as tokens: read, converted and tokenised once, in workers, in the order of the files.

Memory is 5 bytes a token: 100 million tokens take 0.5 GB; or they are on disk (`store`). The held-out part is chosen
by a hash of a row's content, so it is the same for every seed, row order and number of workers, and equal rows never
fall on both sides.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxft.data import encode, formats, records, store, texts, trees, wordings
from jaxft.data.config import DataConfig
from jaxft.data.encode import Chunk
from jaxft.data.errors import DataError, called
from jaxft.data.forms import Conversation, Stepwise, parsed, taught
from jaxft.data.records import Row
from jaxft.data.sources import Mixture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK = 256
"""Rows tokenised together: the unit of work of a worker."""


@dataclass(frozen=True)
class Reading:
    """What was met while reading: rows, bad ones (with the first messages), and boundaries inside tokens."""

    rows: int = 0
    skipped: int = 0
    errors: tuple[str, ...] = ()
    silent_rows: int = 0
    extra_examples: int = 0
    cut_boundaries: int = 0
    shared_boundaries: int = 0


@dataclass(frozen=True)
class Examples:
    """Examples end to end: example `i` is `tokens[offsets[i] : offsets[i + 1]]`, from row `rows[i]` of `source`."""

    tokens: np.ndarray
    loss: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    tasks: np.ndarray
    """The number of each example's task."""
    pad_id: int
    source: records.Records
    reading: Reading
    form: str = "tokens"
    """What they are to an objective (`Objective.rows`); of `pairs`, two in a row are the chosen and the rejected."""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """What else is known of each example: `label`, `margin`."""
    steps: np.ndarray | None = None
    """As long as `tokens`: 2 where a right step ends, 1 where a wrong one does; None without steps."""
    mixture: Mixture | None = None
    """The sources they are of, if there are several."""

    @property
    def group(self) -> int:
        """How many examples in a row belong together."""
        return 2 if self.form == "pairs" else 1

    def once(self) -> "Examples":
        """The same, each row of which comes once in an epoch whatever the parts of a mixture."""
        if self.mixture is None:
            return self
        return dataclasses.replace(self, mixture=dataclasses.replace(self.mixture, once=True))

    def __len__(self) -> int:
        return len(self.rows)

    def example_at(self, token: int) -> int:
        """The number of the example that holds this token."""
        return int(np.searchsorted(self.offsets, token, side="right")) - 1

    def digest(self) -> str:
        """A hash of all tokens and masks: what a cursor belongs to."""
        state = hashlib.blake2b(self.form.encode() if self.form != "tokens" else b"", digest_size=16)
        steps = [] if self.steps is None else [self.steps]
        more = [*([self.tasks] if self.tasks.any() else []), *self.columns.values(), *steps]
        more += [] if self.mixture is None else [np.array(self.mixture.edges, np.int64)]
        for array in (self.tokens, self.loss, self.offsets, *more):
            state.update(np.ascontiguousarray(array).view(np.uint8).data)
        return state.hexdigest()

    def source_rows(self) -> list[Row]:
        """The rows behind these examples, each once, as they were read."""
        numbers = np.unique(self.rows)
        read = [self.source.rows(int(number), int(number) + 1)[0] for number in numbers]
        return [row for row in read if isinstance(row, Row)]


@dataclass(frozen=True)
class Prepared:
    """Training examples, and held-out ones if the config asks for any."""

    train: Examples
    held_out: Examples | None
    format: str
    held_format: str = ""
    """How the held-out rows are written, where they have a source of their own."""

    @property
    def asked(self) -> str:
        """How the held-out rows are written."""
        return self.held_format or self.format


def prepare(
    config: DataConfig, tokenizer: "PreTrainedTokenizerFast", rows: str = "tokens", reserved: int = 0
) -> Prepared:
    """`mixture.prepare` of a config without a mixture."""
    check(config, rows)
    loaded = functools.partial(load, config=config, tokenizer=tokenizer, rows=rows, reserved=reserved)
    train, keys, format = loaded(read(config), config.path)
    held_out, held_format = None, ""
    if config.eval_path is not None or config.eval_split is not None:
        path, split = config.eval_path or config.path, config.eval_split or config.split
        with called("data.path", "data.eval_path"), called("data.split", "data.eval_split"):
            source = read(dataclasses.replace(config, path=path, split=split, limit=None))
        held_out, _, held_format = loaded(source, path)
    elif config.eval_fraction or config.eval_examples:
        aside = hold_out(train.rows, keys, config)
        train, held_out = select(train, ~aside), select(train, aside)
    if not len(train):
        got = f"no example to train on ({train.reading.rows} rows, {train.reading.skipped} skipped)"
        raise DataError(str(config.path), "", got, "at least one", "See data.on_error, data.eval_fraction, data.limit.")
    return Prepared(train, held_out, format, held_format)


def read(config: DataConfig) -> records.Records:
    """The rows of `data.path`, told by prompt templates if there are any."""
    source = records.read(config.path, config.split, config.subset, config.limit, config.columns)
    return source if config.prompts is None else wordings.told(source, config)


def check(config: DataConfig, rows: str) -> None:
    """Refuse settings that contradict each other, or the rows that the objective wants."""
    if rows not in formats.FORMATS:
        raise ValueError(f"rows: got {rows!r}; expected one of {', '.join(formats.FORMATS)}")
    if config.format not in ("auto", "oasst"):
        formats.check(config.format, rows)
    if rows != "tokens":
        for name, value, expected in (
            ("packing", "wrapped", "best_fit or none: a sequence is judged whole"),
            ("overlong", "split", "truncate or drop: a sequence is judged whole"),
            ("loss_on", "all", "assistant or last: a completion is judged, not its prompt"),
        ):
            if dataclasses.asdict(config)[name] == value:
                raise DataError("", f"data.{name}", f"{value}, for an objective on {rows}", expected, "")
    ways = [config.eval_path is not None or config.eval_split is not None, config.eval_fraction, config.eval_examples]
    if sum(bool(way) for way in ways) > 1:
        got = "several ways to hold out data"
        raise DataError(
            "", "data.eval_*", got, "one of eval_path/eval_split, eval_fraction, eval_examples", "Keep one."
        )
    if not 0 <= config.eval_fraction < 1:
        raise DataError("", "data.eval_fraction", str(config.eval_fraction), "a share from 0 to below 1", "")
    if config.workers < 0:
        raise DataError("", "data.workers", str(config.workers), "0 (this process) or a number of processes", "")
    for name in ("max_length", "length_multiple"):
        value = dataclasses.asdict(config)[name]
        if value < (2 if name == "max_length" else 1):
            raise DataError("", f"data.{name}", str(value), "a positive number of tokens", "")


def load(
    source: records.Records,
    path: str | Sequence[str],
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    rows: str,
    reserved: int,
) -> tuple[Examples, np.ndarray, str]:
    """The examples of a source, the content key of each, and the format."""
    source, format = opened(source, path, config, rows)
    margin = rows == "pairs" and has_margin(source)
    encoder = texts.encoder(tokenizer, config, format, has_chats(source, format, rows), rows, margin, reserved)
    padding: Any = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    all, met = kept(source, encoder, config) if config.cache is not None else held(source, encoder, config)
    examples = Examples(
        all.tokens,
        all.loss,
        np.concatenate(([0], np.cumsum(all.lengths))).astype(np.int64),
        all.rows,
        all.tasks,
        padding,
        source,
        met,
        rows,
        all.columns,
        all.steps if rows == "steps" else None,
    )
    return examples, all.keys, format


def held(source: records.Records, encoder: texts.Encoder, config: DataConfig) -> tuple[Chunk, Reading]:
    """All examples in memory, as one chunk."""
    with contextlib.closing(encoded(source, encoder, config)) as found:
        chunks = [*found]
    arrays = {name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in (*store.ARRAYS, "steps")}
    columns = {name: np.concatenate([chunk.columns[name] for chunk in chunks]) for name in chunks[0].columns}
    return Chunk(**arrays, columns=columns, errors=(), silent=0, cut=0, shared=0), reading(len(source), chunks, encoder)


def kept(source: records.Records, encoder: texts.Encoder, config: DataConfig) -> tuple[Chunk, Reading]:
    """All examples as one chunk, tokens and masks on disk (`data.cache`)."""
    folder = store.place(str(config.cache), source, encoder, config.on_error)
    with contextlib.ExitStack() as stack:

        def chunks(first: int) -> Iterator[Chunk]:
            return stack.enter_context(contextlib.closing(encoded(source, encoder, config, first)))

        done = store.fill(folder, len(source), chunks, CHUNK)
    arrays = store.read(folder, done.sizes)
    met = Reading(
        len(source), done.skipped, tuple(done.errors), done.silent_rows, done.extra_examples, done.cut_boundaries,
        done.shared_boundaries,
    )  # fmt: skip
    return Chunk(**arrays, columns={}, steps=np.zeros(0, np.int8), errors=(), silent=0, cut=0, shared=0), met


def opened(
    source: records.Records, path: str | Sequence[str], config: DataConfig, rows: str = "tokens"
) -> tuple[records.Records, str]:
    """The rows to convert, which are those of the source unless these make up trees, and their format."""
    start = source.rows(0, CHUNK)
    if config.format == "oasst" or (config.format == "auto" and trees.hold(start)):
        source = trees.flatten(source, config.paths, pairs=rows in ("pairs", "labelled"))
        return source, "messages" if rows == "tokens" else "preference"
    label = path if isinstance(path, str) else ", ".join(path)
    return source, config.format if config.format != "auto" else formats.detect(start, label, rows)


def has_margin(source: records.Records) -> bool:
    """Whether the first good row has a margin."""
    first = next((row for row in source.rows(0, CHUNK) if isinstance(row, Row)), None)
    return first is not None and first.fields.get("margin") is not None


def has_chats(source: records.Records, format: str, rows: str = "tokens") -> bool:
    """Whether rows of the format need a chat template; prompt and completion do when they are messages."""
    good = (row for row in source.rows(0, CHUNK) if isinstance(row, Row))
    if format == "prompt_completion":
        return any(not isinstance(parsed(row, "prompt"), str) for row in good if row.fields.get("prompt") is not None)
    if format not in ("preference", "labelled", "stepwise"):
        return format != "text"
    for row in good:
        with contextlib.suppress(DataError):
            form = formats.convert(row, format, rows)
            return isinstance(form.prompt if isinstance(form, Stepwise) else taught(form), Conversation)
    return False


def encoded(
    source: records.Records, encoder: texts.Encoder, config: DataConfig, first: int = 0
) -> Generator[Chunk, None, None]:
    """Chunks in the order of the rows, from one on, whatever the number of workers: grain's return elements in turn.

    Raises the refusal of the first chunk with a bad row, unless they are skipped."""
    import grain

    starts = grain.MapDataset.range(first, len(source), CHUNK)
    work = starts.map(Work(source, encoder, CHUNK)).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    if config.workers:
        from absl import flags

        # grain's workers read absl flags, which only an absl program parses.
        flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=2)
        work = work.mp_prefetch(options)
    iterator = iter(work)
    try:
        for chunk in iterator:
            if chunk.errors and config.on_error == "refuse":
                raise refusal(chunk.errors)
            yield chunk
    finally:
        iterator.close()  # ends the workers


@dataclass(frozen=True)
class Work:
    """What a worker does with the number of a chunk's first row."""

    source: records.Source
    encoder: texts.Encoder
    size: int

    def __call__(self, start: int) -> Chunk:
        stop = min(int(start) + self.size, len(self.source))
        return encode.encode(self.encoder, self.source.rows(int(start), stop), int(start))


def refusal(errors: Sequence[DataError]) -> DataError:
    """The first bad row's error, which mentions the next ones."""
    first, others = errors[0], [error.where for error in errors[1:4]]
    if not others:
        return first
    more = f" ({len(errors) - 1} more bad rows near it: {', '.join(others)}{', …' if len(errors) > 4 else ''})"
    return DataError(first.where, first.field, first.got, first.expected, first.remedy + more)


def reading(size: int, chunks: list[Chunk], encoder: texts.Encoder) -> Reading:
    """The counts of all chunks."""
    errors = [str(error) for chunk in chunks for error in chunk.errors]
    examples = sum(len(chunk.rows) for chunk in chunks)
    sources = sum(len(np.unique(chunk.rows)) for chunk in chunks)
    return Reading(
        size,
        len(errors),
        tuple(errors[:5]),
        sum(chunk.silent for chunk in chunks),
        examples - sources if encoder.rows == "tokens" else 0,
        sum(chunk.cut for chunk in chunks),
        sum(chunk.shared for chunk in chunks),
    )


def hold_out(rows: np.ndarray, keys: np.ndarray, config: DataConfig) -> np.ndarray:
    """Which examples are held out: those of the rows with the smallest keys, with all rows equal to them."""
    _, first = np.unique(rows, return_index=True)
    size = config.eval_examples or int(np.ceil(config.eval_fraction * len(first)))
    if size == 0:
        return np.zeros(len(rows), bool)
    limit = np.sort(keys[first])[min(size, len(first)) - 1]
    return keys <= limit


def select(examples: Examples, keep: np.ndarray) -> Examples:
    """Some of the examples, in the same order."""
    lengths, long = np.diff(examples.offsets), {"tokens": examples.tokens, "loss": examples.loss}
    if isinstance(examples.tokens, np.memmap):
        long = store.copied(long, lengths, keep)
    else:
        tokens = np.repeat(keep, lengths)
        long = {name: array[tokens] for name, array in long.items()}
    offsets = np.concatenate(([0], np.cumsum(lengths[keep]))).astype(np.int64)
    return dataclasses.replace(
        examples,
        **long,
        offsets=offsets,
        rows=examples.rows[keep],
        tasks=examples.tasks[keep],
        columns={name: array[keep] for name, array in examples.columns.items()},
        steps=None if examples.steps is None else examples.steps[np.repeat(keep, lengths)],
    )
