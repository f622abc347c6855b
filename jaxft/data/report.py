"""Numbers about a data set: how long examples are, how much is learnt, what was cut or left out, how full rows are."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from jaxft.data import pack, sequences
from jaxft.data.examples import Examples, Reading

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)


@dataclass(frozen=True)
class Report:
    """Counts of a data set as it goes into training; `lines` says them in words."""

    reading: Reading
    examples: int
    tokens: int
    learnt_tokens: int
    """Targets: learnt tokens, without those that nothing precedes in a piece (in a row, when wrapped)."""
    length_percentiles: dict[int, int]
    truncated: int
    cut_tokens: int
    split: int
    dropped_overlong: int
    dropped_unlearnt: int
    dropped_tokens: int
    rows: int
    row_length: int
    packed_tokens: int
    """Tokens that training sees: those of the examples, less what was cut or left out."""
    shared_tokens: int
    """Tokens of prompts that are computed once for two sequences; counted once in `packed_tokens`."""
    reserved_positions: int
    """Positions taken by the prompts before the documents of packed rows."""
    form: str = "tokens"
    """What the rows are to the objective (`Objective.rows`)."""
    counts: dict[str, int] = field(default_factory=dict)
    """Of judged rows: `pairs`; `desirable` and `undesirable` completions; `steps`, and how many are `right`."""
    parts: dict[str, dict[int, int]] = field(default_factory=dict)
    """Of judged rows, the percentiles of the tokens in a prompt and in each kind of completion."""
    filled: tuple[str, ...] = ()
    """Where the first rows stand whose prompts leave nothing to learn."""

    @property
    def efficiency(self) -> float:
        """Share of the positions of all rows that hold a token."""
        return (self.packed_tokens + self.reserved_positions) / (self.rows * self.row_length)

    def lines(self) -> list[str]:
        """The report in words; what was lost is always said."""
        return [*self._facts(), *self._losses()]

    def _facts(self) -> Iterator[str]:
        percentiles = "  ".join(f"p{name} {value:,}" for name, value in self.length_percentiles.items())
        yield f"{self._named()} of {self.reading.rows:,} rows read"
        yield f"{self.tokens:,} tokens, {self.learnt_tokens:,} learnt ({self.learnt_tokens / max(self.tokens, 1):.1%})"
        yield f"tokens an example: {percentiles}"
        for part, lengths in self.parts.items():
            percentiles = "  ".join(f"p{name} {value:,}" for name, value in lengths.items())
            yield f"tokens of {part}: {percentiles}"
        prompts = f", {self.reserved_positions:,} of them for the prompt" if self.reserved_positions else ""
        yield f"{self.rows:,} rows of {self.row_length:,} tokens, {self.efficiency:.1%} full{prompts}"
        if self.shared_tokens:
            saved = self.shared_tokens / (self.shared_tokens + self.packed_tokens)
            yield f"{self.shared_tokens:,} tokens of prompts computed once for both completions ({saved:.1%} saved)"

    def _named(self) -> str:
        if self.form == "pairs":
            return f"{self.counts['pairs']:,} pairs"
        if self.form == "labelled":
            both = f"{self.counts['desirable']:,} desirable, {self.counts['undesirable']:,} undesirable"
            return f"{self.examples:,} completions ({both})"
        if self.form == "steps":
            return f"{self.examples:,} solutions ({self.counts['steps']:,} steps, {self.counts['right']:,} right)"
        return f"{self.examples:,} examples"

    def _losses(self) -> Iterator[str]:
        read = self.reading
        silent = "without a message to learn" if self.form == "tokens" else "with nothing to compare"
        counts = (
            (read.skipped, "bad rows skipped"),
            (read.silent_rows, f"rows {silent} left out"),
            (read.extra_examples, "extra examples, for turns that the chat template shows differently later"),
            (read.cut_boundaries, "learnt parts tokenised apart from their prompts, as at inference"),
            (read.shared_boundaries, "learnt parts whose first token may hold the end of the prompt too"),
            (self.split, "examples split, longer than a row"),
            (self.dropped_overlong, "examples left out, longer than a row"),
            (self.dropped_unlearnt, "examples or pieces left out, with nothing to learn in them"),
        )
        yield from (f"! {count:,} {words}" for count, words in counts if count)
        if self.truncated:
            remedy = "data.overlong=split keeps them" if self.form == "tokens" else "raise data.max_length"
            lost = f"losing {self.cut_tokens:,} tokens ({remedy})"
            yield f"! {self.truncated:,} examples truncated, {lost}"
        if self.dropped_tokens:
            yield f"! {self.dropped_tokens:,} tokens left out with them"
        if self.filled:
            yield f"  data.max_length leaves nothing to learn of {', '.join(self.filled)}"
        yield from (f"  {error}" for error in read.errors)


@dataclass(frozen=True)
class Reports:
    """The reports of a mixture's sources, and the parts in which they are mixed."""

    sources: dict[str, Report]
    parts: dict[int, dict[str, float]]
    """By step, each source's part of the rows of a batch."""
    left_out: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of an epoch: those of all sources."""
        return sum(report.rows for report in self.sources.values())

    def lines(self) -> list[str]:
        """A table of the sources, and what there is to say of each."""
        said = [f"{len(self.sources)} sources, {self.rows:,} rows an epoch", *self._table()]
        said += [f"! source {name} left out: its weight is 0" for name in self.left_out]
        for name, report in self.sources.items():
            said += [
                f"{'! ' if line.startswith('!') else ''}{name}: {line.removeprefix('! ')}" for line in report.lines()
            ]
        return said

    def shares(self, step: int) -> dict[str, tuple[float, float, float]]:
        """From a step of `parts` on, of each source: its part of the rows, its part of the tokens, and how often an
        epoch of the mixture goes through it."""
        tokens = {name: self.parts[step][name] * r.packed_tokens / r.rows for name, r in self.sources.items()}
        return {
            name: (
                self.parts[step][name],
                tokens[name] / sum(tokens.values()),
                self.parts[step][name] * self.rows / r.rows,
            )
            for name, r in self.sources.items()
        }

    def _table(self) -> Iterator[str]:
        width = max(map(len, [*self.sources, "source"]))
        heads = f"{'examples':>11} {'tokens':>13} {'rows':>9} {'of rows':>8} {'of tokens':>9} {'times':>7}"
        yield f"{'source':<{width}} {heads}"
        for step in self.parts:
            if len(self.parts) > 1:
                yield f"from step {step:,} on" if step == max(self.parts) else f"at step {step:,}"
            for name, (rows, tokens, times) in self.shares(step).items():
                r = self.sources[name]
                counted = f"{r.examples:>11,} {r.packed_tokens:>13,} {r.rows:>9,}"
                yield f"{name:<{width}} {counted} {rows:>8.1%} {tokens:>9.1%} {times:>7.2f}"


def report(examples: Examples, plan: pack.Plan, rows: pack.Epoch) -> Report:
    """The report of examples packed by a plan into the rows of the first epoch."""
    found, lengths = plan.pieces, np.diff(examples.offsets)
    judged = examples.form != "tokens"
    first = found.start if plan.packing == "best_fit" or judged else rows.start[rows.offsets[:-1]]
    return Report(
        reading=examples.reading,
        examples=len(examples),
        tokens=int(lengths.sum()),
        learnt_tokens=int(pack.counted(examples.loss, found.start, found.stop).sum() - examples.loss[first].sum()),
        length_percentiles=percentiles(lengths),
        truncated=found.truncated,
        cut_tokens=found.cut_tokens,
        split=found.split,
        dropped_overlong=found.dropped_overlong,
        dropped_unlearnt=found.dropped_unlearnt,
        dropped_tokens=found.dropped_tokens,
        rows=len(plan),
        row_length=plan.capacity,
        packed_tokens=int((found.stop - found.start).sum()),
        shared_tokens=int(found.shared.sum()),
        reserved_positions=plan.reserved * plan.documents if plan.packing == "best_fit" or judged else 0,
        form=examples.form,
        counts=counted(examples),
        parts=parts(examples) if judged and len(examples) else {},
        filled=tuple(pack.left_unlearnt(examples, found)),
    )


def percentiles(lengths: np.ndarray) -> dict[int, int]:
    """The lengths at `PERCENTILES`."""
    return {p: int(np.percentile(lengths, p, method="lower")) for p in PERCENTILES}


def counted(examples: Examples) -> dict[str, int]:
    """See `Report.counts`."""
    if examples.form == "pairs":
        return {"pairs": len(examples) // 2}
    if examples.steps is not None:
        return {"steps": int((examples.steps > 0).sum()), "right": int((examples.steps == 2).sum())}
    if examples.form == "labelled":
        good = int(examples.columns["label"].sum())
        return {"desirable": good, "undesirable": len(examples) - good}
    return {}


def parts(examples: Examples) -> dict[str, dict[int, int]]:
    """See `Report.parts`."""
    begin = sequences.completions(examples, examples.offsets[:-1])
    prompt, reply = begin - examples.offsets[:-1], examples.offsets[1:] - begin
    if examples.form == "pairs":
        kinds = {"chosen": slice(0, None, 2), "rejected": slice(1, None, 2)}
    elif examples.form == "labelled":
        kinds = {"desirable": examples.columns["label"], "undesirable": ~examples.columns["label"]}
    else:
        kinds = {"a solution": slice(None)}
    named = {"a prompt": prompt} | {name: reply[which] for name, which in kinds.items()}
    return {name: percentiles(lengths) for name, lengths in named.items() if len(lengths)}
