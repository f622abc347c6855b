"""How judges are asked: questions, answers, and a ledger that asks nothing twice.

The ledger is a jsonl of all that was asked and answered, a line each, written as soon as the answer is there. It is the
cache and the record to audit in one: what is in it is answered from it, in this run and in one that goes on.
"""

import contextlib
import fcntl
import json
import math
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxft.border.errors import ConfigError
from jaxft.rewards.feedback import constitution

Message = Mapping[str, str]


@dataclass(frozen=True)
class Question:
    """What a judge is asked."""

    chat: tuple[Message, ...]
    labels: tuple[str, ...] = ()
    """What it chooses from; none: it writes a text."""
    seed: int = 0
    """Of the text that is written."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What is noted beside it and is no part of it: the principle, the order."""


class Answer(NamedTuple):
    """What a judge says."""

    text: str
    logp: Mapping[str, float] | None = None
    """Of each label the log-probability, in nats; those that are missing have none to speak of. None: the judge gives
    no log-probabilities, and the text says which label it is."""
    finished: bool = True
    """Whether the text ended by itself."""


class Failure(Exception):
    """A question that this judge gives no usable answer to; others it may."""


class Unreachable(RuntimeError):
    """The judge answers nothing at all. What was answered is kept."""


class Judge(Protocol):
    """Whoever answers questions."""

    def identity(self, labels: bool) -> Mapping[str, Any]:
        """What tells its answers from another judge's; ``labels``: those by labels, or texts."""
        ...

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer | Failure]]:
        """Each question's number and answer, as they come. Raises Unreachable, and ValueError for what is wrong with
        every question."""
        ...


class Ledger:
    """Everything that judges were asked and answered; in a file, for one process, or (None) in memory alone."""

    def __init__(self, file: Path | None = None):
        self.file, self.known = file, dict[str, Answer]()
        self.asked = 0
        """Questions that were put to a judge since it was opened."""
        self._lines: Any = None
        self._lock = threading.RLock()

    def __enter__(self) -> "Ledger":
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def open(self) -> None:
        """Reads what is there; a line that was cut short goes. Raises ConfigError for a file that is in use or is no
        ledger. Without it, the first question opens it."""
        if self._lines is not None or self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            lines = stack.enter_context(self.file.open("a+b"))
            try:
                fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{self.file}: another process is writing it; let it end") from None
            except OSError:  # no locks on this file system
                pass
            lines.seek(0)
            text = lines.read()
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):
                lines.truncate(len(whole))
            for number, line in enumerate(whole.splitlines(), 1):
                try:
                    record = json.loads(line)
                    if "failed" not in record:
                        self.known[record["id"]] = Answer(**record["answer"])
                except (ValueError, KeyError, TypeError) as error:
                    remedy = "mend or delete the line"
                    raise ConfigError(f"{self.file}:{number}: no answer of a judge ({error!r}); {remedy}") from None
            stack.pop_all()
        self._lines = lines
        weakref.finalize(self, lines.close)  # for those that no `with` closes

    def ask(self, judge: Judge, questions: Sequence[Question]) -> list[Answer | Failure]:
        """The answer to each question, or why there is none; only what is not known is asked, equal questions once.

        A failure is written down and asked again when it comes up again. Raises what the judge raises."""
        with self._lock:
            self.open()
            names = [identity(judge, question) for question in questions]
            first = dict(zip(reversed(names), reversed(questions), strict=True))
            new = [name for name in dict.fromkeys(names) if name not in self.known]
            asked = [first[name] for name in new]
            failed = dict[str, Failure]()
            try:
                for number, answer in judge.answers(asked) if asked else ():
                    self.asked += 1
                    name = new[number]
                    if isinstance(answer, Failure):
                        failed[name] = answer
                    else:
                        self.known[name] = answer
                    self._write(name, judge, asked[number], answer)
            finally:
                if self._lines is not None:
                    os.fsync(self._lines.fileno())
            return [failed[name] if name in failed else self.known[name] for name in names]

    def _write(self, name: str, judge: Judge, question: Question, answer: Answer | Failure) -> None:
        if self._lines is None:
            return
        said = {"failed": str(answer)} if isinstance(answer, Failure) else {"answer": answer._asdict()}
        how = {"labels": list(question.labels)} if question.labels else {"seed": question.seed}
        by = {"judge": dict(judge.identity(bool(question.labels)))}
        record = {"id": name, **question.about, **by, "chat": [*map(dict, question.chat)], **how, **said}
        self._lines.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
        self._lines.flush()


def identity(judge: Judge, question: Question) -> str:
    """What tells a question to a judge from others."""
    how: Any = list(question.labels) or question.seed
    by = dict(judge.identity(bool(question.labels)))
    return constitution.digest([by, [*map(dict, question.chat)], how]).hex()


def shares(answer: Answer, labels: Sequence[str], parsed: str | None) -> dict[str, float] | None:
    """The probability of each label, of them alone; None where the answer is none of them.

    Without log-probabilities the label that was read in the text (``parsed``) has all of it."""
    if answer.logp is None:
        return None if parsed is None else {label: float(label == parsed) for label in labels}
    known = {label: answer.logp[label] for label in labels if answer.logp.get(label, -math.inf) > -math.inf}
    if not known:
        return None
    top = max(known.values())
    weights = {label: math.exp(known[label] - top) if label in known else 0.0 for label in labels}
    total = math.fsum(weights.values())
    return {label: weight / total for label, weight in weights.items()}
