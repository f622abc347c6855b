"""A judge's opinion as a reward: how often a completion is preferred to others of its prompt, or how good it is rated.

The judge is an endpoint, or a model that the command line loads; `rewards.feedback` says what it is asked. Completions
of one prompt are a group: a rollout's samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxft.rewards import answers, settings
from jaxft.rewards.feedback import constitution, endpoint, verdicts
from jaxft.rewards.feedback.asking import Judge as Asked
from jaxft.rewards.feedback.asking import Ledger, Unreachable
from jaxft.rewards.feedback.endpoint import Endpoint
from jaxft.rewards.feedback.transport import Refused
from jaxft.rewards.feedback.verdicts import Pair
from jaxft.rewards.settings import Final, Function, Weighted


@dataclass(frozen=True, kw_only=True)
class Local:
    """A model that is loaded beside the run to judge."""

    path: str
    """Folder or hub id of the model."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    adapter: str | None = None
    """Folder of an adapter on it."""
    quantize: Literal["none", "nf4", "fp4", "int8", "fp8"] = "none"
    """Few bits for its weights."""
    dtype: Literal["bfloat16", "float16", "float32", "auto"] = "bfloat16"
    """Dtype of its weights and of the computation."""
    batch: int = 16
    """Questions answered together."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch: got {self.batch}; expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Judge(Final, Weighted):
    """What a judge says of completions by the principles of a constitution."""

    endpoint: Endpoint | None = None
    """The judge, behind an address."""
    model: Local | None = None
    """The judge, loaded here. One of the two must be given."""
    method: Literal["pairwise", "pointwise"] = "pairwise"
    """pairwise: the mean probability of being better than another completion of the same prompt, from 0 to 1, each two
    compared in both orders; pointwise: the expected rating, from 1 to 10."""
    opponents: int | None = None
    """How many of the others each completion is put beside, pairwise; each is then compared with twice as many.
    Default: every two are compared."""
    reference: str | None = None
    """Column of a reply that completions are compared with, in place of each other."""
    constitution: str | None = None
    """YAML file of the principles. Default: the one that ships."""
    principles: int = 1
    """How many principles are drawn for each prompt; their verdicts are averaged."""
    seed: int = 0
    """Of the draws of principles."""
    cache: str | None = None
    """File (.jsonl) of all that was asked and answered. Default: judgements.jsonl in the run's folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.endpoint is not None and self.model is not None:
            raise ValueError("model: got an endpoint as well; expected one of the two to judge")
        if self.opponents is not None and self.opponents < 1:
            raise ValueError(f"opponents: got {self.opponents}; expected at least 1")
        if self.principles < 1:
            raise ValueError(f"principles: got {self.principles}; expected at least 1")
        if self.method == "pointwise" and (self.opponents or self.reference):
            key = "opponents" if self.opponents else "reference"
            raise ValueError(
                f"{key}: nothing is compared where completions are rated (method: pointwise); leave it out"
            )
        if self.opponents and self.reference:
            raise ValueError("opponents: completions are compared with the reference alone; leave one of them out")

    @property
    def compares(self) -> bool:
        """Whether completions of one prompt are compared with each other, so that a single one has no reward."""
        return self.method == "pairwise" and self.reference is None


def make(config: Judge) -> Function:
    """The reward, by an endpoint. Raises ConfigError, and ValueError for a model, which only the command line loads."""
    if config.endpoint is None:
        got = "nothing" if config.model is None else "model, which the command line loads (jaxft train)"
        raise ValueError(f"endpoint: got {got}; expected endpoint: {{url: ..., model: ...}}")
    client, ledger = endpoint.Client(config.endpoint), Ledger(None if config.cache is None else Path(config.cache))
    return by(config, client, ledger)


def by(config: Judge, asked: Asked, ledger: Ledger) -> Function:
    """The reward by any judge. Raises ConfigError."""
    read = constitution.read(config.constitution, rated=config.method == "pointwise", least=config.principles)

    def judge(
        prompts: Sequence[Any], completions: Sequence[str], log_metric: Callable[..., None], **columns: Sequence[Any]
    ) -> list[Any]:
        texts = [answers.parts(text, config.tags)[1] or "" for text in completions]
        drawn = [read.chosen(prompt, config.seed, config.principles) for prompt in prompts]
        try:
            if config.method == "pointwise":
                rated = verdicts.rate(ledger, asked, list(zip(prompts, texts, drawn, strict=True)))
                return [ValueError(r.problem) if r.score is None else r.score for r in rated]
            beside = None if config.reference is None else settings.column(columns, config.reference, "reference")
            matches = _matches(prompts, config.opponents) if beside is None else [(i, i) for i in range(len(texts))]
            others = texts if beside is None else [str(text) for text in beside]
            pairs = [Pair(prompts[i], texts[i], others[j], drawn[i]) for i, j in matches]
            found = verdicts.compare(ledger, asked, pairs)
        except Refused as error:
            raise settings.Unable(str(error)) from None
        except Unreachable as error:
            return [error] * len(completions)
        for name, value in told(found).items():
            log_metric(f"judge/{name}", value)
        won: list[list[float]] = [[] for _ in texts]
        problems = dict[int, str]()
        for (i, j), one in zip(matches, found, strict=True):
            for k in {i, j}:
                if one.first is None:
                    problems[k] = one.problem
                else:
                    won[k].append(one.first if k == i else 1.0 - one.first)
        return [
            sum(shares) / len(shares) if shares else ValueError(problems[k]) if k in problems else None
            for k, shares in enumerate(won)
        ]

    return judge


def _matches(prompts: Sequence[Any], opponents: int | None) -> list[tuple[int, int]]:
    """Which completions are compared: every two of the same prompt, or each with the next ones around its group."""
    groups: dict[bytes, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(constitution.digest(prompt), []).append(i)
    found = dict[tuple[int, int], None]()
    for group in groups.values():
        size = len(group)
        most = size - 1 if opponents is None else min(opponents, size - 1)
        for at in range(size):
            for step in range(1, most + 1):
                i, j = group[at], group[(at + step) % size]
                if (j, i) not in found:
                    found[i, j] = None
    return [*found]


def told(found: Sequence[verdicts.Comparison]) -> dict[str, float]:
    """Of comparisons: the mean confidence, the share that the order decided, by how much the first place is favoured,
    and the share without an answer."""
    known = [one for one in found if one.first is not None]
    asked = sum(len(one.orders) for one in known)
    metrics = {"no_answer": 1.0 - len(known) / len(found)} if found else {}
    if known:
        metrics["confidence"] = sum(one.confidence for one in known) / len(known)
    if asked:
        metrics["order_decided"] = sum(one.swayed for one in known) / asked
        metrics["first_favoured"] = sum(one.leaning * len(one.orders) for one in known) / asked
    return metrics
