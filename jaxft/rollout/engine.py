"""Continuous batching: a fixed number of rows decode together, and a row that ends is filled with the next prompt.

The device has three programs: one adds prompts to the cache, one copies pages, one decodes ``CHUNK`` tokens in every
row. Between chunks the host looks at what was said, gives the pages of finished rows back, and lets prompts in; all
that a program reads besides the model and the pages are a few integers a row, which it sends along.

Unusual: a prompt is read up to its last token but one. A row begins by decoding the last token, as if it had just been
drawn, so prefill needs no head, and samples of one prompt share what it read: its full pages are held together, the
last one is copied.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.models import slots
from jaxft.models.cache import Cache
from jaxft.rollout import decode
from jaxft.rollout.decode import Laid, Plan, Turn
from jaxft.rollout.pages import Pages
from jaxft.rollout.sample import Drawn, Knobs

CHUNK = 16
"""Tokens that each row decodes before the host looks at them."""

AHEAD = {"cpu": 0}
"""Chunks that are sent before the host looks at the one that is due, so that the device never waits for it; elsewhere
1. A row that ended is idle for as many more."""

PREFILL = 32768
"""Tokens of prompts, padding included, that are read at once."""

Stop = Callable[[Sequence[int]], int | None]
"""Tokens made so far to how many of them a completion has that a stop string ended; None: it goes on."""


@dataclass
class Request:
    """A prompt, and how it is to be completed."""

    number: int
    prompt: Sequence[int]
    budget: int
    keys: Sequence[np.ndarray]
    """Key data of each of its samples."""
    adapter: int = -1
    task: int = 0


@dataclass
class Sample:
    """One completion in the making."""

    request: Request
    which: int
    pages: list[int]
    sent: int = 0
    """Tokens that the device was asked for."""
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    policy_logp: list[float] = field(default_factory=list)
    finished: bool = False


@dataclass
class _Read:
    """A prompt that was read: pages that its samples share, and how many of those have begun."""

    request: Request
    pages: list[int]
    begun: int = 0


@dataclass(frozen=True)
class _Chunk:
    """Tokens that are being made, and whose they are."""

    made: Drawn
    rows: list[Sample | None]


@dataclass
class Shard:
    """The rows of one device of the mesh, their pages, and who waits for them."""

    rows: list[Sample | None]
    pages: Pages
    waiting: deque[Request] = field(default_factory=deque)
    reading: deque[_Read] = field(default_factory=deque)

    @property
    def idle(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row is None]


class Engine:
    """A model ready to complete prompts; `run` yields completions as they end."""

    def __init__(self, plan: Plan, params: tree.Params, knobs: Knobs, ends: Sequence[int], stop: Stop | None = None):
        self.plan, self.params, self.knobs, self.stop = plan, params, knobs, stop
        self.end_E = np.asarray(sorted(ends) or [-1], np.int32)
        self.reserved = slots.prompt_length(params) + slots.prefix_length(params)
        self.prompt_length, self.prefix_length = slots.prompt_length(params), slots.prefix_length(params)
        each = plan.rows // plan.shards
        self.shards = [Shard([None] * each, Pages(plan.pages)) for _ in range(plan.shards)]
        self.cache = decode.create(plan, params)
        self.last = jnp.zeros((2, plan.rows), jnp.int32)
        self.occurred = decode.nothing_occurred(plan) if plan.sampling.penalties else None

    def run(self, requests: Sequence[Request], chunk: int = CHUNK) -> Iterator[Sample]:
        """All samples of all requests, in the order in which they end. ``chunk``: see `CHUNK`; each is compiled."""
        for number, request in enumerate(requests):
            self.shards[number % self.plan.shards].waiting.append(request)
        ahead, flying = AHEAD.get(jax.default_backend(), 1), deque[_Chunk]()
        while True:
            self._admit()
            if more := any(row is not None and row.sent < row.request.budget for row in self._rows()):
                flying.append(self._send(chunk))
            elif not flying:
                return
            if len(flying) > ahead or not more:
                yield from self._hear(flying.popleft())

    def tokens(self, request: Request) -> Iterator[int]:
        """The tokens of a single sample, one by one."""
        self.shards[0].waiting.append(request)
        self._admit()
        sample, done = next(row for row in self._rows() if row is not None), list[Sample]()
        while not done:
            told = len(sample.tokens)
            done = self._hear(self._send(1))
            yield from sample.tokens[told:]

    def _send(self, chunk: int) -> "_Chunk":
        """Asks the device for ``chunk`` more tokens in each row."""
        rows = self._rows()
        columns = zip(*(_turn(row, self.prompt_length) for row in rows), strict=True)
        turn = Turn(*(np.array(column, kind) for column, kind in zip(columns, _KINDS, strict=True)))
        cache = self._with(self._table())
        given = (self.params, cache, turn, self.last, self.knobs, self.end_E, self.occurred)
        made, self.last, cache, self.occurred = decode.decode(self.plan, chunk, *given)
        self._keep(cache)
        for row in rows:
            if row is not None:
                row.sent += chunk
        return _Chunk(made, rows)

    def _hear(self, chunk: "_Chunk") -> list[Sample]:
        """Waits for a chunk, and adds what it says to its samples; those that ended."""
        told = jax.device_get(chunk.made)
        ends = np.isin(told.token_B, self.end_E)
        return [row for i, row in enumerate(chunk.rows) if row is not None and self._heard(i, row, told, ends)]

    def _with(self, table: np.ndarray, fresh: bool = False) -> Cache:
        return Cache(self.cache.k, self.cache.v, jnp.asarray(table), fresh)

    def _keep(self, cache: Cache) -> None:
        self.cache = cache

    def _rows(self) -> list[Sample | None]:
        return [row for shard in self.shards for row in shard.rows]

    def _table(self) -> np.ndarray:
        table = np.zeros((self.plan.rows, self.plan.width), np.int32)
        for i, row in enumerate(self._rows()):
            if row is not None:
                table[i, : len(row.pages)] = row.pages
        return table

    def _heard(self, i: int, row: Sample, told: Drawn, ends: np.ndarray) -> bool:
        """Adds what row ``i`` said to its sample; whether that was its end. ``ends``: bool[chunk, B]."""
        if row.finished or len(row.tokens) == row.request.budget:
            return False  # it ended before this chunk
        said = min(len(ends), row.request.budget - len(row.tokens))
        if ends[:said, i].any():
            said, row.finished = int(ends[:, i].argmax()) + 1, True
        for kept, column in zip((row.tokens, row.logp, row.policy_logp), told, strict=True):
            kept += column[:said, i].tolist()
        if self.stop is not None and (length := self.stop(row.tokens)) is not None:
            row.finished = True
            del row.tokens[length:], row.logp[length:], row.policy_logp[length:]
        if not row.finished and len(row.tokens) < row.request.budget:
            return False
        shard = self.shards[i // (self.plan.rows // self.plan.shards)]
        shard.rows[i % len(shard.rows)] = None
        shard.pages.give_back(row.pages)
        return True

    def _needs(self, request: Request) -> tuple[int, int]:
        """Full pages of what a prompt's samples share, and pages of one sample."""
        read = self._read_length(request)
        return read // self.plan.page, -(-(read + request.budget) // self.plan.page)

    def _admit(self) -> None:
        """Reads prompts and begins samples where rows and pages are free."""
        while self._reads():
            pass
        self._begin()

    def _reads(self) -> bool:
        """Reads the next prompts of each shard for which there is room, as one batch; whether there were any."""
        chosen = [self._next(shard) for shard in self.shards]
        if any(chosen):
            self._prefill(chosen)
        for shard, mine in zip(self.shards, chosen, strict=True):
            shard.reading.extend(mine)
        return any(chosen)

    def _next(self, shard: Shard) -> list[_Read]:
        """The prompts of a shard that are read next, and the pages that they are read into."""
        room, mine, longest = len(shard.idle) - _left(shard.reading), list[_Read](), 1
        while shard.waiting and room > 0:
            request = shard.waiting[0]
            full, whole = self._needs(request)
            longest = max(longest, self._read_length(request))
            owed = self._owed([*shard.reading, *mine])
            needed = full + 1 + min(len(request.keys), room) * (whole - full)
            if owed + needed > len(shard.pages.free):
                break
            if mine and (len(mine) + 1) * _width(longest) * self.plan.shards > PREFILL:
                break
            shared = -(-self._read_length(request) // self.plan.page)
            mine.append(_Read(shard.waiting.popleft(), shard.pages.take(shared)))
            room -= len(request.keys)
        return mine

    def _owed(self, reading: Iterable[_Read]) -> int:
        """Pages that samples of prompts which were read will still take."""
        needs = ((read, *self._needs(read.request)) for read in reading)
        return sum(_left([read]) * (whole - full) for read, full, whole in needs)

    def _read_length(self, request: Request) -> int:
        """Tokens of a prompt that are read before its samples begin, what is learnt before it included."""
        return self.reserved + len(request.prompt) - 1

    def _prefill(self, chosen: list[list[_Read]]) -> None:
        """Reads prompts into their pages, all tokens but the last of each."""
        longest = max(self.prompt_length + len(read.request.prompt) - 1 for mine in chosen for read in mine)
        if longest + self.prefix_length == 0:
            return
        width, each = _width(max(longest, 1)), 1
        while each < max(map(len, chosen)):
            each *= 4  # few numbers, as each is compiled
        count = each * self.plan.shards
        tokens, segments = np.zeros((count, width), np.int32), np.zeros((count, width), np.int32)
        tasks, adapters = np.zeros((count, width), np.int32), np.full(count, -1, np.int32)
        table = np.zeros((count, self.plan.width), np.int32)
        for s, mine in enumerate(chosen):
            for i, read in enumerate(mine, s * each):
                own = read.request.prompt[:-1]
                tokens[i, self.prompt_length : self.prompt_length + len(own)] = own
                segments[i, : self.prompt_length + len(own)] = 1
                tasks[i], adapters[i] = read.request.task, read.request.adapter
                table[i, : len(read.pages)] = read.pages
        laid = Laid(tokens, segments, tasks, adapters)
        self._keep(decode.read(self.plan, self.params, self._with(table, fresh=True), laid))

    def _begin(self) -> None:
        """Gives idle rows the samples of prompts that were read."""
        copies: list[list[tuple[int, int]]] = []
        for s, shard in enumerate(self.shards):
            mine = list[tuple[int, int]]()
            for row in shard.idle:
                if not shard.reading:
                    break
                read = shard.reading[0]
                full, whole = self._needs(read.request)
                own = shard.pages.take(whole - full)
                mine += [(page, own[0]) for page in read.pages[full:]]
                shard.pages.share(read.pages[:full])
                sample = Sample(read.request, read.begun, [*read.pages[:full], *own])
                shard.rows[row] = sample
                self._forget(s * len(shard.rows) + row, sample)
                read.begun += 1
                if read.begun == len(read.request.keys):
                    shard.reading.popleft()
                    shard.pages.give_back(read.pages)
            copies.append(mine)
        if any(copies):
            rows = self.plan.rows // self.plan.shards
            source, to = (
                np.zeros((self.plan.shards, rows), np.int32),
                np.full((self.plan.shards, rows), self.plan.pages, np.int32),
            )
            for s, mine in enumerate(copies):
                for i, (a, b) in enumerate(mine):
                    source[s, i], to[s, i] = a, b
            self._keep(decode.copy(self._with(self._table()), source, to))

    def _forget(self, row: int, sample: Sample) -> None:
        """Begins a row's record of what occurred."""
        if self.occurred is not None:
            prompt = np.zeros(self.plan.config.vocab_size, bool)
            prompt[list(sample.request.prompt)] = True
            self.occurred = decode.forgotten(self.occurred, row, prompt)


_WIDTHS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
_KINDS = (bool, np.int32, np.int32, np.int32, np.int32, np.uint32, np.int32)


def _width(longest: int) -> int:
    """Tokens of a batch of prompts: few widths, as each is compiled."""
    return next((w for w in _WIDTHS if w >= longest), -(-longest // 1024) * 1024)


def _left(reading: Sequence[_Read]) -> int:
    """Samples that have not begun."""
    return sum(len(read.request.keys) - read.begun for read in reading)


def _turn(row: Sample | None, before: int) -> tuple[Any, ...]:
    """A row's part of a `Turn`; ``before``: positions of a learnt prompt (those of a prefix are added in the model)."""
    if row is None:
        return True, 0, 0, 0, 0, np.zeros(2, np.uint32), -1
    request, position = row.request, before + len(row.request.prompt) - 1 + row.sent
    first = (row.sent == 0, request.prompt[-1], position, request.budget)
    return *first, row.sent, request.keys[row.which], request.adapter
