"""Several sources as one data set: read apart, put end to end, packed apart, and mixed row by row.

Each source goes through its own rows in epochs of its own, in an order that its name decides with the seed. Which
source a row of a batch is of, `allot` says.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxft.data import examples as examples_
from jaxft.data import pack, records, sources, store
from jaxft.data import report as report_
from jaxft.data.allot import Parts, Turns
from jaxft.data.config import DataConfig
from jaxft.data.errors import DataError
from jaxft.data.examples import Examples, Prepared, Reading
from jaxft.data.sources import Mixture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def prepare(
    config: DataConfig, tokenizer: "PreTrainedTokenizerFast", rows: str = "tokens", reserved: int = 0
) -> Prepared:
    """Read and tokenise everything the config names. Raises DataError at the first bad row, unless skipping.

    ``rows``: what the objective wants of them (`Objective.rows`): tokens to learn, pairs of a chosen and a rejected
    completion, labelled completions (pairs are taken apart), or solutions with labelled steps; of every source alike.
    ``reserved``: positions of a sequence that a trained prompt takes (see `Loader`)."""
    sources.check(config)
    if not config.sources:
        return examples_.prepare(config, tokenizer, rows, reserved)
    names, left_out = sources.mixed(config)
    settings = [sources.alone(config, name) for name in names]
    made = [_named(name, one, tokenizer, rows, reserved) for name, one in zip(names, settings, strict=True)]
    formats = tuple(each.format for each in made)
    mixture = Mixture(tuple(names), (), formats, tuple(settings), left_out=tuple(left_out))
    held = [each.held_out if each.held_out is not None and len(each.held_out) else None for each in made]
    apart = dataclasses.replace(mixture, once=True, formats=tuple(each.asked for each in made))
    other = None if not any(held) else joined(held, apart)
    listed = ", ".join(f"{name}: {format}" for name, format in zip(names, formats, strict=True))
    return Prepared(joined([each.train for each in made], mixture), other, listed)


def _named(name: str, config: DataConfig, tokenizer: "PreTrainedTokenizerFast", rows: str, reserved: int) -> Prepared:
    """One source; what is wrong with its settings is said of its own keys."""
    try:
        return examples_.prepare(config, tokenizer, rows, reserved)
    except DataError as error:
        key = error.field.removeprefix("data.")
        if key == error.field:
            raise
        raise DataError(error.where, f"data.sources.{name}.{key}", error.got, error.expected, error.remedy) from error


def joined(parts: Sequence[Examples | None], mixture: Mixture) -> Examples:
    """Examples of several sources end to end, None for those that have none; a row keeps its number within its source
    after all rows of the sources before. Raises DataError where they know different things of their sequences."""
    there = [(name, part) for name, part in zip(mixture.names, parts, strict=True) if part is not None]
    first = there[0][1]
    for name, part in there:
        if part.columns.keys() != first.columns.keys():
            got = " and ".join(f"{', '.join(p.columns) or 'none'} in {n}" for n, p in (there[0], (name, part)))
            raise DataError(
                "", "data.sources", f"columns {got}", "the same in all sources", "Give all a margin, or none."
            )
    counts = [0 if part is None else len(part) for part in parts]
    sizes = [0 if part is None else len(part.source) for part in parts]
    before = np.cumsum([0, *sizes])
    every = [part for _, part in there]
    steps = [part.steps for part in every if part.steps is not None]
    return Examples(
        tokens=store.joined("tokens", [part.tokens for part in every]),
        loss=store.joined("loss", [part.loss for part in every]),
        offsets=np.concatenate(([0], np.cumsum(np.concatenate([np.diff(p.offsets) for p in every])))).astype(np.int64),
        rows=np.concatenate([p.rows + before[i] for i, p in enumerate(parts) if p is not None]),
        tasks=np.concatenate([part.tasks for part in every]),
        pad_id=first.pad_id,
        source=records.Records(tuple(part.source for part in every), sum(sizes), {}),
        reading=Reading(sum(part.reading.rows for part in every)),
        form=first.form,
        columns={name: np.concatenate([part.columns[name] for part in every]) for name in first.columns},
        steps=np.concatenate(steps) if steps else None,
        mixture=dataclasses.replace(
            mixture,
            edges=tuple(np.cumsum([0, *counts]).tolist()),
            readings=tuple(Reading() if part is None else part.reading for part in parts),
        ),
    )


def parts(examples: Examples) -> list[Examples]:
    """The examples of each source (views; `rows` are those of the whole), or all of them where there is no mixture."""
    if examples.mixture is None:
        return [examples]
    edges, readings = examples.mixture.edges, examples.mixture.readings
    return [_between(examples, *span) for span in zip(edges, edges[1:], readings, strict=False)]


def _between(examples: Examples, low: int, high: int, reading: Reading) -> Examples:
    begin, end = int(examples.offsets[low]), int(examples.offsets[high])
    return dataclasses.replace(
        examples,
        tokens=examples.tokens[begin:end],
        loss=examples.loss[begin:end],
        offsets=examples.offsets[low : high + 1] - begin,
        rows=examples.rows[low:high],
        reading=reading,
        tasks=examples.tasks[low:high],
        columns={name: array[low:high] for name, array in examples.columns.items()},
        steps=None if examples.steps is None else examples.steps[begin:end],
        mixture=None,
    )


class Mixed:
    """The sources of a loader, each packed by a plan of its own."""

    def __init__(self, examples: Examples, config: DataConfig, plans: Sequence[pack.Plan], batch_rows: int):
        """`plans`: of the tokens of each source alone."""
        assert examples.mixture is not None
        self.examples, self.mixture, self.config, self.plans = examples, examples.mixture, config, plans
        self.shifts = [int(examples.offsets[edge]) for edge in self.mixture.edges[:-1]]
        self.turns = Turns(row_parts(examples, self.mixture, config, plans), batch_rows)
        self._epoch = functools.lru_cache(maxsize=2 * len(plans))(self._rows_of_epoch)

    def batch(self, number: int) -> tuple[pack.Epoch, np.ndarray]:
        """The rows of a batch, and the number of the source of each: int32 [batch_rows], 0 where there is none."""
        chosen, before = self.turns.batch(number)
        if self.mixture.once:
            chosen = chosen[: max(sum(map(len, self.plans)) - number * self.turns.batch_rows, 0)]
        counts, start, stop, given = list(before), [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], []
        for source in chosen:
            turn, row = divmod(counts[source], len(self.plans[source]))
            rows = self._epoch(source, turn)
            here = slice(rows.offsets[row], rows.offsets[row + 1])
            start.append(rows.start[here] + self.shifts[source])
            stop.append(rows.stop[here] + self.shifts[source])
            given += [] if rows.given is None else [rows.given[here]]
            counts[source] += 1
        offsets = np.cumsum([len(each) for each in start]).astype(np.int64)
        numbers = np.zeros(self.turns.batch_rows, np.int32)
        numbers[: len(chosen)] = chosen
        known = np.concatenate(given) if given else None
        return pack.Epoch(np.concatenate(start), np.concatenate(stop), offsets, known), numbers

    def report(self) -> report_.Reports:
        """What became of the rows of each source, and its part of the rows of a batch."""
        named = zip(self.mixture.names, parts(self.examples), self.plans, strict=True)
        found = {
            name: report_.report(part, plan, self._epoch(i, 0))
            for i, (name, part, plan) in enumerate(named)
            if len(part)
        }
        shares = self.turns.parts
        by_step = {
            step: dict(zip(self.mixture.names, row.tolist(), strict=True))
            for step, row in zip(shares.steps, shares.values, strict=True)
        }
        return report_.Reports(found, by_step, self.mixture.left_out)

    def identity(self) -> dict[str, object]:
        """What a cursor belongs to, besides the examples."""
        shares = self.turns.parts
        return {"sources": list(self.mixture.names), "parts": [list(shares.steps), shares.values.tolist()]}

    def _rows_of_epoch(self, source: int, number: int) -> pack.Epoch:
        name = f"{self.config.seed}/{self.mixture.names[source]}".encode()
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
        return pack.epoch(self.plans[source], seed, number, self.config.shuffle)


def row_parts(examples: Examples, mixture: Mixture, config: DataConfig, plans: Sequence[pack.Plan]) -> Parts:
    """The part that each source has of the rows of a batch, given how each is packed.

    By size the rule gives parts of all examples (or tokens) that training sees; a source takes rows in inverse
    proportion to what a row of it holds."""
    rows = np.array([len(plan) for plan in plans], np.float64)
    if mixture.once:
        return Parts.of({0: rows.tolist()})
    mix = config.mix
    if mix.rule == "weights":
        given = sources.weights(config)
        return Parts.of({step: [row[name] for name in mixture.names] for step, row in given.items()})
    if mix.unit == "tokens":
        size = np.array([plan.pieces.lengths.sum() for plan in plans], np.float64)
    else:
        found = zip(parts(examples), plans, strict=True)
        at = [np.searchsorted(part.offsets, plan.pieces.start, side="right") for part, plan in found]
        size = np.array([len(np.unique(each)) / examples.group for each in at], np.float64)
    wanted = size_parts(size, mix.rule, mix.temperature, mix.cap)
    return Parts.of({0: (wanted * rows / size).tolist()})


def size_parts(size: np.ndarray, rule: str, temperature: float, cap: int | None) -> np.ndarray:
    """The parts of sources of so many examples (or tokens) by `MixConfig.rule`, float64 [sources]; they sum to 1."""
    if rule == "temperature":
        size = (size / size.max()) ** (1 / temperature)
    elif rule == "capped" and cap is not None:
        size = np.minimum(size, cap)
    return size / size.sum()
