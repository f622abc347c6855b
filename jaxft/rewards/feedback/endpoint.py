"""A judge behind an OpenAI-compatible endpoint: `POST URL/chat/completions`, many at a time, within its limits.

Labels are chosen by the log-probabilities of the label's token where the endpoint gives them, else by the text. What
fails for a while (no connection, timeouts, 408, 409, 425, 429, 5xx, a body that is no answer) is asked again after a
pause; what is wrong with one question (400, 413, 422) fails that question; what is wrong with all of them (the key, the
model's name, the address) is raised at once.
"""

import concurrent.futures
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxft.border.errors import ConfigError
from jaxft.rewards.feedback import questions as questions_
from jaxft.rewards.feedback.asking import Answer, Failure, Question, Unreachable
from jaxft.rewards.feedback.transport import Gone, Refused, Sender

GIVEN_UP = 3
"""Questions in a row that got no answer at all, after which none is asked any more."""
OWN = ("model", "messages", "stream", "n", "logprobs", "top_logprobs", "temperature", "seed", "max_tokens")
OWN += ("max_completion_tokens",)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An OpenAI-compatible endpoint of chat completions."""

    url: str
    """Address, up to /chat/completions: https://host/v1."""
    model: str
    """Name of the model there."""
    key_env: str | None = None
    """Name of the environment variable that holds the key. The key itself is never written anywhere."""
    timeout: float = 60.0
    """Seconds for one answer."""
    retries: int = 5
    """Times that a question is asked again after a failure that may pass."""
    backoff: float = 1.0
    """Seconds of the longest first pause before asking again; each next one is twice as long. The pause is drawn
    between 0 and that, or what the endpoint's Retry-After says."""
    longest_pause: float = 120.0
    """Greatest pause in seconds; a Retry-After above it counts as a failure that does not pass."""
    concurrency: int = 8
    """Questions under way at once."""
    per_minute: float | None = None
    """Most requests a minute."""
    logprobs: bool = True
    """Whether to ask for log-probabilities of labels. Some endpoints refuse that."""
    top_logprobs: int = 20
    """How many tokens' log-probabilities to ask for; most endpoints allow 20 at most."""
    label_tokens: int = 16
    """Longest answer where a label is asked for."""
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls the greatest length of an answer."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further keys of each request, such as reasoning_effort: low."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", self.url) or self.url.endswith("/completions"):
            # an address may hold a password, which is not repeated
            raise ValueError("url: expected http(s)://host/v1, without a password, a query or /chat/completions")
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", self.key_env):
            raise ValueError("key_env: expected the name of an environment variable, such as JUDGE_KEY, and not a key")
        good = {
            "model": bool(self.model), "timeout": self.timeout > 0, "retries": self.retries >= 0,
            "backoff": self.backoff >= 0, "longest_pause": self.longest_pause >= 0,
            "concurrency": self.concurrency >= 1, "per_minute": self.per_minute is None or self.per_minute > 0,
            "top_logprobs": self.top_logprobs >= 2, "label_tokens": self.label_tokens >= 1,
        }  # fmt: skip
        for name, fine in good.items():
            if not fine:
                least = {"retries": "at least 0", "top_logprobs": "at least 2", "model": "a name"}
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected {least.get(name, 'more than 0')}")
        if taken := [key for key in self.extra if key in OWN]:
            raise ValueError(f"extra: got {taken[0]!r}, which is set elsewhere; leave it out")


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How a judge writes texts."""

    max_new_tokens: int = 512
    """Longest text, in tokens."""
    temperature: float = 0.7
    """0 is greedy; higher is more varied."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {self.max_new_tokens}; expected at least 1")
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: got {self.temperature}; expected at least 0")


class Client:
    """The judge. Raises ConfigError if the variable of its key is not set."""

    def __init__(self, config: Endpoint, writing: Writing | None = None):
        self.config, self.writing = config, writing or Writing()
        key = None if config.key_env is None else os.environ.get(config.key_env)
        if config.key_env is not None and not key:
            raise ConfigError(f"`key_env`: the environment variable {config.key_env} is not set; export the key there")
        self.sender = Sender(config, key)

    def identity(self, labels: bool) -> Mapping[str, Any]:
        """See `asking.Judge`."""
        config = self.config
        about = {"url": config.url, "model": config.model} | ({"extra": config.extra} if config.extra else {})
        if labels:
            return about | {"logprobs": config.top_logprobs if config.logprobs else 0, "tokens": config.label_tokens}
        return about | {"temperature": self.writing.temperature, "tokens": self.writing.max_new_tokens}

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer | Failure]]:
        """See `asking.Judge`. What is under way when something ends the asking is still waited for: it is paid."""
        stop, gone, ended = threading.Event(), 0, None
        pool = concurrent.futures.ThreadPoolExecutor(self.config.concurrency, "judge")
        try:
            futures = {pool.submit(self._answer, question, stop): i for i, question in enumerate(questions)}
            for future in concurrent.futures.as_completed(futures):
                answer = None if future.cancelled() else future.result()
                gone = gone + 1 if isinstance(answer, Gone) else 0
                if isinstance(answer, Answer) or (isinstance(answer, Failure) and ended is None):
                    yield futures[future], answer
                if ended is None and (gone == GIVEN_UP or isinstance(answer, Refused)):
                    said = f"{answer}; {gone} questions in a row got no answer, so no more are asked"
                    ended = answer if isinstance(answer, Refused) else Unreachable(said)
                    stop.set()
                    for other in futures:
                        other.cancel()
            if ended is not None:
                raise ended
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, question: Question, stop: threading.Event) -> Answer | Failure | Refused:
        labels = question.labels
        try:
            return self.sender.send(self._body(question), lambda said: read(said, labels), stop)
        except (Failure, Refused) as problem:
            return problem

    def _body(self, question: Question) -> dict[str, Any]:
        config, writing = self.config, self.writing
        about = {**config.extra, "model": config.model, "messages": [*map(dict, question.chat)]}
        if not question.labels:
            how = {"temperature": writing.temperature, "seed": question.seed}
            return about | how | {config.max_tokens_key: writing.max_new_tokens}
        asked = {"logprobs": True, "top_logprobs": config.top_logprobs} if config.logprobs else {}
        return about | asked | {"temperature": 0, config.max_tokens_key: config.label_tokens}


def read(said: Any, labels: Sequence[str]) -> Answer:
    """The answer in a body. Raises ValueError for one that has none."""
    try:
        choice = said["choices"][0]
        text, ended = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the body has no choices[0].message.content ({error!r})") from None
    if not isinstance(text, str):
        raise ValueError(f"choices[0].message.content is {text!r}; expected text")
    logp = _logp((choice.get("logprobs") or {}).get("content"), text, labels) if labels else None
    return Answer(text, logp, ended != "length")


def _logp(content: Any, text: str, labels: Sequence[str]) -> dict[str, float] | None:
    """The log-probability of each label where the text gives its own; None where the body does not say.

    A label that begins with another (10 with 1) may be two tokens; then the second's probability divides the first's
    between the two."""
    said = questions_.parsed(text, labels)
    if not isinstance(content, list) or said is None:
        return None
    try:
        at = [i for i, token in enumerate(content) if _bare(token["token"]) == said]
        split = [i for i in range(len(content) - 1) if _bare(content[i]["token"] + content[i + 1]["token"]) == said]
        place = at[-1] if at else split[-1] if split else None
        found = {} if place is None else _tops(content[place], labels)
        after = {} if place is None or place + 1 == len(content) else _tops(content[place + 1], ())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"logprobs cannot be read ({error!r})") from None
    shorter = "" if place is None else _bare(content[place]["token"])
    for label in labels:
        rest = label.removeprefix(shorter)
        if shorter in found and rest not in ("", label) and label not in found and rest in after:
            more = min(after[rest], 0.0)
            found[label] = found[shorter] + more
            found[shorter] += math.log1p(-math.exp(more)) if more < 0 else -math.inf
    return {label: found[label] for label in labels if label in found} or None


def _tops(token: Mapping[str, Any], labels: Sequence[str]) -> dict[str, float]:
    """Log-probabilities of one place by what the tokens say, spaces and marks apart; all, or those of labels."""
    tops = {top["token"]: float(top["logprob"]) for top in [*(token.get("top_logprobs") or ()), token]}
    found: dict[str, float] = {}
    for name, value in tops.items():
        bare = _bare(name) if labels else name
        if (bare in labels or not labels) and math.isfinite(value):
            both = [value, found[bare]] if bare in found else [value]
            found[bare] = max(both) + math.log(math.fsum(math.exp(v - max(both)) for v in both))
    return found


def _bare(token: str) -> str:
    return token.strip(" \t\n\"'`*_()[].:\u2581\u0120")
