"""Batches by number: batch `i` is a pure function of (examples, settings, i), made ahead of time by grain.

So the cursor of a run is one integer. Restoring is exact and immediate, and neither the workers that tokenised nor the
batches made ahead matter to it. The last batch of an epoch is filled up with empty rows, in training and evaluation
alike: nothing is lost, and an empty row has no weight in a loss that counts tokens.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxft.data import mixture, pack, records, sequences
from jaxft.data import report as report_
from jaxft.data.config import DataConfig
from jaxft.data.errors import DataError
from jaxft.data.examples import Examples
from jaxft.data.known import Known
from jaxft.data.retold import Retold
from jaxft.data.topk import Stored

Batch = dict[str, np.ndarray]
FOREVER = 2**60


class Loader:
    """An iterator over batches `[batch_rows, T]`: `tokens`, `positions`, `loss_mask`, `segments` if packed, and
    `task_ids` if the examples are of several tasks. Of a mixture each row is of one source, whose number is in
    `source`, int32 `[batch_rows]`.

    Rows of whole sequences, for objectives that judge them, always have `segments`, which number a row's sequences
    from 1, and arrays `[batch_rows, S]`, S being the most that a row of this loader holds: `sequence_mask` and what is
    known of each (`label`, `margin`). Of pairs, sequences 2p and 2p + 1 are the chosen and the rejected of one. Steps
    are `step_mask` and `step_label`, bool `[batch_rows, T]`: where one ends, and whether it is right.
    With `share`, the prompt of a pair stands once in its row, and `sequences.unfolded` are the arrays by which
    attention sees both sequences whole.
    With `mismatched`, labelled ones come with the same arrays again, under names that begin with `kl_`, for their
    prompts with the completions of others.

    With `reserved` positions for a prompt, `max_length` counts them too: packed, every document begins with so many
    positions whose tokens mean nothing; otherwise rows are shorter by as much, and the model adds the prompt itself.

    What stands `beside` the examples gives further arrays: what a teacher said of them (`topk`) or they in its own
    tokens (`retold`), names that begin with `teacher_`; or what a reference said (`known`), `ref_logp`.
    """

    def __init__(
        self,
        examples: Examples,
        config: DataConfig,
        *,
        batch_rows: int,
        epochs: int | None = None,
        reserved: int = 0,
        mismatched: bool = True,
        share: bool = False,
        beside: Stored | Retold | Known | None = None,
    ):
        """`epochs` None goes on for ever."""
        self.examples, self.config, self.batch_rows, self.epochs = examples, config, batch_rows, epochs
        self.reserved, room = reserved, config.max_length - reserved
        if room < 2:
            got, expected = f"{config.max_length} tokens", f"more than the {reserved} that the prompt takes, and 1"
            raise DataError("", "data.max_length", got, expected, "Raise it, or use a shorter prompt.")
        if config.packing == "wrapped" and examples.tasks.any():
            got, remedy = "wrapped, with rows of several tasks", "Set data.packing=best_fit or none."
            raise DataError("", "data.packing", got, "documents that do not share a prompt", remedy)
        self.judged = examples.form != "tokens"
        self.segmented = config.packing == "best_fit" or self.judged
        whole = whole_blocks(config.max_length * examples.group, config)
        self.length = whole if self.segmented else whole - reserved
        longest = 2**62 if config.packing == "wrapped" else room
        plans = [self._plan(part, longest, share) for part in mixture.parts(examples)]
        self.mixed = None if examples.mixture is None else mixture.Mixed(examples, config, plans, batch_rows)
        self.plan = pack.joined(plans, [0] if self.mixed is None else self.mixed.shifts)
        if not len(self.plan):
            got, remedy = (
                "no example with anything to learn",
                "See the report: raise data.max_length or set data.overlong.",
            )
            raise DataError("", "data", got, "at least one", remedy)
        shared = self.plan.pieces.given is not None
        if shared and config.packing == "none":
            found = self.plan.pieces
            self.length = whole_blocks(int((found.lengths + reserved * found.documents).max()), config)
        self.width = whole_blocks(self.plan.width, config) if shared else 0
        self.room = room
        self._beside = None if beside is None else beside.beside(examples, self.plan, room, config)
        self.kl_length = 0
        if mismatched and examples.form == "labelled":
            self.kl_length = whole_blocks(sequences.mismatched_width(examples, self.plan, room), config)
        self.batches_per_epoch = -(-len(self.plan) // batch_rows)
        self.total_batches = None if epochs is None else epochs * self.batches_per_epoch
        self._consumed = 0
        self._ahead: Any = None
        self._rows = functools.lru_cache(maxsize=2)(self._rows_of_epoch)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._ahead is None:
            self._ahead = self._start()
        batch = next(self._ahead)
        self._consumed += 1
        return batch

    @property
    def epoch(self) -> float:
        """Epochs consumed so far."""
        return self._consumed / self.batches_per_epoch

    def batch(self, number: int) -> Batch:
        """Batch `number`, counted from the start of the first epoch."""
        rows, first, which = self._rows_of(int(number))
        shape = (self.batch_rows, self.length)
        made = assemble(self.examples, rows, first, shape, self.segmented, self.reserved)
        made |= {} if self._beside is None else self._beside(rows, first, shape)
        made |= {} if which is None else {"source": which}
        return made | self._sequences(rows, first) if self.judged else made

    def places(self, number: int) -> list[tuple[int, int, int, int]]:
        """Where the tokens of batch `number` lie: `pack.places`."""
        rows, first, _ = self._rows_of(int(number))
        return pack.places(rows, first, self.batch_rows, self.plan.reserved)

    def state(self) -> dict[str, Any]:
        """The cursor behind the last consumed batch, and what it belongs to; JSON."""
        return {"consumed": self._consumed, **self._identity()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on right after the batch at which `state()` was taken; refuses the cursor of other data or settings."""
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                got = f"{state.get(name)!r} in the checkpoint and {mine!r} now"
                expected = "the same, else batches would be repeated or left out"
                remedy = "Resume with the data and settings of the run, or start a new run_dir."
                raise DataError("", f"data cursor: {name}", got, expected, remedy)
        self.seek(int(state["consumed"]))

    def seek(self, consumed: int) -> None:
        """Go on after `consumed` batches; 0 starts again."""
        self.close()
        self._consumed = consumed

    def close(self) -> None:
        """Stop making batches ahead; the next one asked for starts again."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def report(self) -> "report_.Report | report_.Reports":
        """What became of the rows: lengths, what is learnt, what was cut or left out, how full the rows are."""
        if self.mixed is not None:
            return self.mixed.report()
        return report_.report(self.examples, self.plan, self._rows(0))

    def _start(self) -> Any:
        import grain

        stop = FOREVER if self.total_batches is None else self.total_batches
        # One thread keeps order and cost low: a batch is a few copies of memory.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self.config.prefetch)
        return iter(grain.MapDataset.range(self._consumed, stop).map(self.batch).to_iter_dataset(options))

    def _plan(self, part: Examples, longest: int, share: bool) -> pack.Plan:
        """How the examples of a source share rows."""
        found = pack.pieces(part, longest, self.config.overlong)
        if self.config.on_error == "refuse" and (filled := pack.left_unlearnt(part, found)):
            got = f"a prompt that leaves nothing to learn in a window of {longest:,} tokens"
            remedy = "Raise data.max_length, or set data.overlong=split. " + records.SKIP
            remedy += f" (more such rows: {', '.join(filled[1:])})" if filled[1:] else ""
            raise DataError(filled[0], "prompt", got, "room for what is learnt", remedy)
        if share and part.form == "pairs":
            found = pack.share(found, sequences.completions(part, found.start))
        return pack.plan(found, self.length, self.config.packing, self.reserved if self.segmented else 0)

    def _rows_of(self, number: int) -> tuple[pack.Epoch, int, np.ndarray | None]:
        """Rows, the first of them that is in this batch, and the source of each."""
        if self.mixed is not None:
            rows, which = self.mixed.batch(number)
            return rows, 0, which
        turn, index = divmod(number, self.batches_per_epoch)
        return self._rows(turn), index * self.batch_rows, None

    def _rows_of_epoch(self, number: int) -> pack.Epoch:
        return pack.epoch(self.plan, self.config.seed, number, self.config.shuffle)

    def _sequences(self, rows: pack.Epoch, first: int) -> Batch:
        """What rows of whole sequences have besides their tokens."""
        shape = (self.batch_rows, self.plan.sequences)
        found = sequences.about(self.examples, rows, first, shape)
        if self.width:
            wide = (self.batch_rows, self.length, self.width)
            found |= sequences.unfolded(rows, first, wide, self.plan.reserved)
        if self.kl_length:
            other, within = sequences.mismatched(self.examples, rows, first, self.batch_rows, self.room)
            arrays = assemble(other, within, 0, (self.batch_rows, self.kl_length), True, self.reserved)
            arrays |= sequences.about(other, within, 0, shape)
            if self.examples.tasks.any():
                arrays.setdefault("task_ids", np.zeros_like(arrays["tokens"]))
            found |= {f"kl_{name}": array for name, array in arrays.items()}
        return found

    def _identity(self) -> dict[str, Any]:
        config = self.config
        return {
            "examples": self._digest,
            "batch_rows": self.batch_rows,
            "max_length": config.max_length,
            "row_length": self.length,
            "reserved": self.reserved,
            **({"shared_prompts": True} if self.width else {}),
            "packing": config.packing,
            "overlong": config.overlong,
            "shuffle": config.shuffle,
            "seed": config.seed,
            **({} if self.mixed is None else self.mixed.identity()),
        }

    @functools.cached_property
    def _digest(self) -> str:
        return self.examples.digest()


def whole_blocks(length: int, config: DataConfig) -> int:
    """The length of rows that hold so many tokens."""
    return -(-length // config.length_multiple) * config.length_multiple


def assemble(
    examples: Examples, rows: pack.Epoch, first: int, shape: tuple[int, int], segmented: bool, reserved: int = 0
) -> Batch:
    """Rows from `first` on as arrays `[rows, T]`, empty beyond the last; with `segmented`, pieces are documents, each
    after `reserved` positions of its own."""
    tokens = np.full(shape, examples.pad_id, np.int32)
    positions, segments, loss = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    tasks, steps = np.zeros(shape, np.int32), np.zeros(shape, np.int8)
    before = reserved if segmented else 0
    for row in range(min(shape[0], len(rows.offsets) - 1 - first)):
        at = 0
        for number, i in enumerate(range(rows.offsets[first + row], rows.offsets[first + row + 1]), 1):
            start, stop = int(rows.start[i]), int(rows.stop[i])
            given = rows.precedes(i)
            begin, first_position = (at, before + given) if given else (at + before, 0)
            end = begin + stop - start
            tokens[row, begin:end] = examples.tokens[start:stop]
            loss[row, begin:end] = examples.loss[start:stop]
            if segmented or number == 1:
                loss[row, begin] = False
            positions[row, at:end] = np.arange(end - at) + (first_position if segmented else at)
            segments[row, at:end] = number
            tasks[row, at:end] = examples.tasks[examples.example_at(start)]
            if examples.steps is not None:
                steps[row, begin:end] = examples.steps[start:stop]
            at = end
    batch = {"tokens": tokens, "positions": positions, "loss_mask": loss}
    batch |= {"segments": segments} if segmented else {}
    batch |= {} if examples.steps is None else {"step_mask": steps > 0, "step_label": steps == 2}
    return batch | {"task_ids": tasks} if examples.tasks.any() else batch
