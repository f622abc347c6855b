"""On-policy data: batches of what the policy writes, made when a step asks for them.

A rollout is ``prompts`` x ``samples`` completions of the policy as it stands. They are judged, scored and turned into
advantages once; then come its minibatches, ``epochs`` times all of its rows. Only between rollouts is the policy looked
at, so what is left of one is part of the cursor, and a run that goes on from a checkpoint in the middle of a rollout
trains on the very same rows.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxft.data.errors import DataError
from jaxft.data.prompts import Prompt
from jaxft.data.questions import Questions
from jaxft.rollout import layout, pairs
from jaxft.rollout.config import RolloutConfig
from jaxft.rollout.generate import Completion
from jaxft.rollout.pairs import Pairs
from jaxft.rollout.policy import Annotator, Sampler

APART = ("reward", "reward_weight", "group", "finished", "value")
"""Arrays of a rollout that its minibatches do without: what they say is in the others."""
SECONDS = ("rollout", "reward", "score", "update")


class Table(Protocol):
    """Where samples of rollouts are kept."""

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Those of a rollout that ``step`` is the first on."""
        ...

    def cut(self, step: int) -> None:
        """Drops those of later steps."""
        ...


class Said(NamedTuple):
    """What the rewards say of completions."""

    texts: list[str]
    """The completions as they were judged."""
    values: np.ndarray
    """float32[N, F], NaN where a function said nothing."""
    beside: Sequence[Mapping[str, Any]]
    """What else stands in the table of samples beside each completion."""
    metrics: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Rewards:
    """The functions that judge completions."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    judge: Callable[[Sequence[Prompt], Sequence[Completion]], Said]
    """The prompt of each completion, and the completions."""


@dataclass(frozen=True)
class Rows:
    """How sequences become rows."""

    count: int
    """Rows of a minibatch."""
    pad_id: int
    reserved: int = 0
    """Positions before each that are a learnt prompt's."""
    multiple: int = 1
    """What their width is a multiple of."""
    paired: bool = False
    """Whether a row is a pair, of a prompt's best and worst completion (`pairs`), and not one completion."""


class _Group(NamedTuple):
    """The completions of one prompt, judged."""

    prompt: Prompt
    completions: list[Completion]
    said: Said

    def spread(self, weights: Sequence[float]) -> bool:
        """Whether the rewards differ."""
        total = combined(self.said.values, weights)
        total = total[~np.isnan(total)]
        return len(total) > 1 and bool((total != total[0]).any())


class Source:
    """Minibatches of rollouts, for `prefetch.as_asked`.

    A minibatch holds tokens, positions, segments, loss_mask, sequence_mask, sampler_logp, what the objective had scored
    beforehand and what it estimated (advantage, ...), each [rows, ...]; see `layout.arrays` and `Objective.estimate`.
    Of pairs it holds `pairs.rows`.
    """

    def __init__(
        self,
        config: RolloutConfig,
        questions: Questions,
        rewards: Rewards,
        sample: Sampler,
        annotate: Annotator,
        rows: Rows,
        *,
        running: Mapping[str, float],
        seed: int = 0,
        shuffle: bool = True,
        table: "Table | None" = None,
    ):
        """``running``: `Objective.running`. ``seed``, ``shuffle``: of the order of the prompts. ``table``: where
        samples go. Raises ValueError if the rows do not divide."""
        self.count = config.prompts if rows.paired else config.sequences
        if self.count % rows.count:
            made = "pairs" if rows.paired else f"x {config.samples} samples are {config.sequences} sequences"
            raise ValueError(
                f"rollout: {config.prompts} prompts {made}, which {rows.count} rows a step (train.batch x "
                "train.accumulate) do not divide"
            )
        self.config, self.questions, self.rewards, self.rows = config, questions, rewards, rows
        self.sample, self.annotate, self.seed, self.shuffle, self.table = sample, annotate, seed, shuffle, table
        self.minibatches = config.epochs * self.count // rows.count
        self.number, self.used, self.asked, self.step = 0, self.minibatches, 0, 0
        self.running = {name: float(value) for name, value in running.items()}
        self.arrays: dict[str, np.ndarray] = {}
        self._order = functools.lru_cache(maxsize=2)(self._order_of_pass)
        self._made: float | None = None  # when the last rollout was

    def next(self, state: Any) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """The next minibatch, and the metrics of the rollout that it is the first of."""
        metrics = self._make(state) if self.used == self.minibatches else {}
        epoch, place = divmod(self.used * self.rows.count, self.count)
        order = np.random.default_rng([self.seed, self.number, epoch]).permutation(self.count)
        chosen = order[place : place + self.rows.count]
        self.used += 1
        return {name: value[chosen] for name, value in self.arrays.items()}, metrics

    def state(self) -> dict[str, Any]:
        """The cursor behind the last minibatch, with the rows of its rollout while some are left; see
        `checkpoint.cursor`."""
        left = self.arrays if self.used < self.minibatches else {}
        counts = {name: getattr(self, name) for name in ("number", "used", "asked", "step")}
        return {**counts, "running": dict(self.running), "rows": dict(left), **self._identity()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on behind the minibatch at which ``state()`` was taken. Raises DataError for that of other data."""
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                got = f"{state.get(name)!r} in the checkpoint and {mine!r} now"
                remedy = "Resume with the data and settings of the run, or start a new run_dir."
                raise DataError("", f"rollout cursor: {name}", got, "the same", remedy)
        for name in ("number", "used", "asked", "step"):
            setattr(self, name, int(state[name]))
        self.running = {name: float(value) for name, value in state["running"].items()}
        self.arrays = dict(state["rows"])
        if self.table is not None:
            self.table.cut(self.step)

    def _make(self, state: Any) -> dict[str, float]:
        """The next rollout, and its metrics. ``time/update`` is what passed since the one before was made."""
        seconds: dict[str, float] = dict.fromkeys(SECONDS, 0.0)
        self.step = 1 + int(np.max(jax.device_get(state.step)))  # waits for the step before
        seconds["update"] = 0.0 if self._made is None else time.perf_counter() - self._made
        groups, metrics = self._sampled(state, seconds)
        prompts = [group.prompt for group in groups for _ in group.completions]
        completions = [completion for group in groups for completion in group.completions]
        about = {"samples": self.config.samples, "reserved": self.rows.reserved, "multiple": self.rows.multiple}
        arrays = layout.arrays(prompts, completions, pad_id=self.rows.pad_id, **about)
        arrays["reward"] = np.concatenate([group.said.values for group in groups]).astype(np.float32)
        arrays["reward_weight"] = np.array(self.rewards.weights, np.float32)
        begin = time.perf_counter()
        added, told, self.running = self.annotate(state, arrays, self.running)
        seconds["score"] = time.perf_counter() - begin
        arrays |= added
        metrics |= difference(arrays) | self._named(told)
        found = None
        if self.rows.paired:
            found = pairs.of(combined(arrays["reward"], self.rewards.weights), self.config.samples)
            metrics["pairs/ratio"] = float(found.exists.mean())
        if self.table is not None and self.config.log_samples:
            self.table.write(self.step, self._samples(groups, arrays, found))
        if found is not None:
            arrays = pairs.rows(arrays, found, self.rows.pad_id, self.rows.multiple)
        self.arrays = {name: value for name, value in arrays.items() if name not in APART}
        self.number, self.used, self._made = self.number + 1, 0, time.perf_counter()
        return metrics | {f"time/{name}": value for name, value in seconds.items()}

    def _sampled(self, state: Any, seconds: dict[str, float]) -> tuple[list[_Group], dict[str, float]]:
        """The groups of a rollout. With dynamic sampling, those without a spread only where the others are too few."""
        wanted, dynamic = self.config.prompts, self.config.dynamic
        kept, same, judged = list[_Group](), list[_Group](), list[np.ndarray]()
        rounds = 0
        while len(kept) < wanted and rounds <= (self.config.dynamic_rounds if dynamic else 0):
            for group in self._groups(state, rounds, seconds):
                if len(kept) == wanted:
                    break  # the prompts that are left come first in the next rollout
                self.asked += 1
                judged.append(combined(group.said.values, self.rewards.weights))
                (kept if not dynamic or group.spread(self.rewards.weights) else same).append(group)
            rounds += 1
        metrics = dict((kept or same)[-1].said.metrics)
        if not dynamic:
            return kept, metrics
        every = np.concatenate(judged)
        metrics |= {"dynamic/rounds": float(rounds), "dynamic/kept_ratio": len(kept) / len(judged)}
        metrics |= {} if np.isnan(every).all() else {"dynamic/reward": float(np.nanmean(every))}
        return (kept + same)[:wanted], metrics

    def _groups(self, state: Any, turn: int, seconds: dict[str, float]) -> list[_Group]:
        """The next prompts, answered and judged."""
        count, begin = self.config.samples, time.perf_counter()
        prompts = [self._prompt(self.asked + i) for i in range(self.config.prompts)]
        seed = (self.config.seed * 1_000_003 + self.number * (self.config.dynamic_rounds + 1) + turn) % 2**31
        completions = self.sample(state, prompts, seed)
        seconds["rollout"] += time.perf_counter() - begin
        begin = time.perf_counter()
        said = self.rewards.judge([prompt for prompt in prompts for _ in range(count)], completions)
        seconds["reward"] += time.perf_counter() - begin
        cuts = [slice(i * count, (i + 1) * count) for i in range(len(prompts))]
        parts = [Said(said.texts[cut], said.values[cut], said.beside[cut], said.metrics) for cut in cuts]
        return [_Group(p, completions[c], part) for p, c, part in zip(prompts, cuts, parts, strict=True)]

    def _prompt(self, number: int) -> Prompt:
        """Prompt ``number``, counted from the start of the first pass over them."""
        turn, place = divmod(number, len(self.questions.train))
        return self.questions.train[int(self._order(turn)[place])]

    def _order_of_pass(self, number: int) -> np.ndarray:
        count = len(self.questions.train)
        return np.random.default_rng([self.seed, number]).permutation(count) if self.shuffle else np.arange(count)

    def _named(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics with the name of each reward function in the place of its number: ``rewards/math/mean``."""
        numbers = {f"rewards/{number}/": f"rewards/{name}/" for number, name in enumerate(self.rewards.names)}

        def named(metric: str) -> str:
            head = next((head for head in numbers if metric.startswith(head)), "")
            return numbers.get(head, "") + metric.removeprefix(head)

        return {named(metric): value for metric, value in metrics.items()}

    def _samples(
        self, groups: Sequence[_Group], arrays: Mapping[str, np.ndarray], paired: Pairs | None
    ) -> list[dict[str, Any]]:
        """The first completions as rows of the table, with the advantage of each or its side of a pair."""
        advantage = None
        if "advantage" in arrays:
            size = np.maximum(arrays["loss_mask"].sum(1), 1)
            advantage = np.where(arrays["loss_mask"], arrays["advantage"], 0).sum(1) / size
        found = []
        for group in groups:
            for text, values, beside, completion in zip(*group.said[:3], group.completions, strict=True):
                total = combined(values[None], self.rewards.weights)[0]
                found.append(
                    {
                        "prompt": group.prompt.text,
                        "completion": text,
                        "rewards": dict(zip(self.rewards.names, map(_number, values), strict=True)),
                        "reward": _number(total),
                        **({} if advantage is None else {"advantage": float(advantage[len(found)])}),
                        **({} if paired is None else {"pair": paired.side(len(found))}),
                        "tokens": len(completion.tokens),
                        "finished": completion.finished,
                        **beside,
                    }
                )
        return found[: self.config.log_samples]

    def _identity(self) -> dict[str, Any]:
        config = self.config
        about = {name: getattr(config, name) for name in ("prompts", "samples", "epochs", "seed")}
        return {
            "data": self._digest,
            "rows_a_step": self.rows.count,
            "shuffle": self.shuffle,
            "order": self.seed,
            **({"pairs": True} if self.rows.paired else {}),
            **about,
        }

    @functools.cached_property
    def _digest(self) -> str:
        return self.questions.digest()


def combined(values: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """The weighted sum of what functions said of each sequence, float32[N], from [N, F]; NaN where none that counts
    did."""
    said, weight = ~np.isnan(values), np.array(weights, np.float32)
    total = np.sum(np.where(said, values, 0) * weight, axis=1)
    return np.where((said & (weight != 0)).any(axis=1), total, np.nan)


def difference(arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the trainer's of the same policy at the same temperature, in
    nats: rounding, and what a top-k, top-p or min-p leaves out."""
    if "old_logp" not in arrays:
        return {}
    apart = np.abs(arrays["sampler_logp"] - arrays["old_logp"])[arrays["loss_mask"]]
    if not apart.size:
        return {}
    name = "sampling/sampling_logp_difference"
    return {f"{name}/mean": float(apart.mean()), f"{name}/max": float(apart.max())}


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
