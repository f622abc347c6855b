"""Models of this machine as judges (`rewards.feedback.asking.Judge`): a loaded model that chooses labels by its
log-probabilities and writes critiques and revisions, and the policy whose replies are judged."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxft.checkpoint import identity
from jaxft.cli import assemble, prompting, written
from jaxft.cli.prompting import Speaker
from jaxft.cli.target import Target
from jaxft.config import RunConfig
from jaxft.data import Prompt
from jaxft.models.decoder import Execution
from jaxft.peft import disk
from jaxft.rewards import judge
from jaxft.rewards.feedback import constitution
from jaxft.rewards.feedback import questions as questions_
from jaxft.rewards.feedback.asking import Answer, Failure, Ledger, Question
from jaxft.rewards.feedback.endpoint import Client, Writing
from jaxft.rewards.judge import Local
from jaxft.rewards.settings import Function, Reward
from jaxft.rollout import choice, generate, replies
from jaxft.rollout.generate import GenerateConfig

NAME = "judge"
"""Of such a reward in the table."""
LEDGER = "judgements.jsonl"
"""File of a run's folder: all that judges were asked and answered."""


def loaded(section: Any, config: RunConfig, mesh: Mesh | None) -> tuple[Speaker, dict[str, Any]]:
    """The model that a section names, and what tells it from others: where it is from and what its weights are."""
    adapter = None if not section.adapter else Path(section.adapter)
    speaker = prompting.load(Target(config, adapter), mesh)
    about = {"model": section.path, "weights": identity.fingerprint(speaker.model), "quantize": section.quantize}
    data = config.data
    written_in = [speaker.tokenizer.chat_template, data.template, dict(data.template_options)]
    about |= {"template": constitution.digest(written_in).hex()[:8]}
    if adapter is not None:
        files = [adapter / name for name in (disk.WEIGHTS, disk.PICKLE) if (adapter / name).is_file()]
        digests = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]
        about |= {"adapter": section.adapter, "adapter_weights": digests}
    return speaker, about | {"dtype": section.dtype}


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model as judge; questions are asked as a user's message in its chat template."""

    speaker: Speaker
    about: Mapping[str, Any]
    """What tells it from others."""
    how: Execution
    batch: int
    writing: Writing = dataclasses.field(default_factory=Writing)

    def identity(self, labels: bool) -> Mapping[str, Any]:
        """See `asking.Judge`."""
        writing = {"temperature": self.writing.temperature, "tokens": self.writing.max_new_tokens}
        return {**self.about} if labels else {**self.about, **writing}

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer | Failure]]:
        """See `asking.Judge`."""
        rows = [self.speaker.chat([dict(turn) for turn in question.chat]) for question in questions]
        config = self.speaker.model.config
        room = config.max_positions if config.learned_positions else max(map(len, rows), default=0) + 2**30
        fits = []
        for i, question in enumerate(questions):
            needed = len(rows[i]) + (4 if question.labels else self.writing.max_new_tokens)
            if needed > room:
                yield i, Failure(f"the question needs {needed} positions and the judge has {room}")
            else:
                fits.append(i)
        kinds = dict.fromkeys(questions[i].labels for i in fits)
        for labels in kinds:
            mine = [i for i in fits if questions[i].labels == labels]
            for begin in range(0, len(mine), self.batch):
                part = mine[begin : begin + self.batch]
                said = self._chosen if labels else self._written
                yield from zip(part, said([questions[i] for i in part], [rows[i] for i in part]), strict=True)

    def _chosen(self, questions: Sequence[Question], rows: Sequence[Sequence[int]]) -> list[Answer]:
        speaker = self.speaker
        labels = choice.spellings(speaker.tokenizer, questions[0].labels)
        model, params = speaker.model, speaker.params
        found = choice.logprobs(model.config, params, rows, labels, batch=self.batch, execution=self.how)
        return [Answer(max(said, key=lambda label: said[label]), said) for said in found]

    def _written(self, questions: Sequence[Question], rows: Sequence[Sequence[int]]) -> list[Answer]:
        speaker = self.speaker
        settings = GenerateConfig(self.writing.max_new_tokens, self.writing.temperature, batch=self.batch)
        made = generate.generate(
            speaker.model.config, speaker.params, rows, settings, speaker.end, execution=self.how,
            seeds=[question.seed for question in questions],
        )  # fmt: skip
        return [
            Answer(replies.spoken(speaker.tokenizer, done.tokens, speaker.end), None, done.finished) for done in made
        ]


@dataclasses.dataclass(frozen=True)
class Policy:
    """The model whose replies are judged, answering the prompts of data: `samples` replies to each, read once."""

    speaker: Speaker
    about: Mapping[str, Any]
    how: Execution
    settings: GenerateConfig
    samples: int
    prompts: Mapping[str, Prompt]
    """By where they are in the data."""

    def questions(self, prompt: Prompt, seed: int) -> list[Question]:
        """What asks for the replies to a prompt."""
        chat = prompt.given if isinstance(prompt.given, list) else [{"role": "text", "content": prompt.given}]
        tools = [{"role": "tools", "content": json.dumps(list(prompt.tools))}] if prompt.tools else []
        about = {"asks": "reply", "where": prompt.where}
        return [Question((*tools, *chat), (), seed + i, {**about, "sample": i}) for i in range(self.samples)]

    def identity(self, labels: bool) -> Mapping[str, Any]:
        """See `asking.Judge`."""
        settings = dataclasses.asdict(self.settings)
        return {**self.about, **{name: settings[name] for name in settings if name not in ("batch", "seed")}}

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer | Failure]]:
        """See `asking.Judge`. A prompt of which some replies are known is answered again as a whole, the same way."""
        asked: dict[str, dict[int, int]] = {}
        for number, question in enumerate(questions):
            asked.setdefault(question.about["where"], {})[question.about["sample"]] = number
        every, each = [*asked], max(1, self.settings.batch // self.samples)
        speaker = self.speaker
        for begin in range(0, len(every), each):
            part = every[begin : begin + each]
            prompts = [self.prompts[where] for where in part]
            seeds = [next(questions[n].seed - i for i, n in asked[where].items()) for where in part]
            tasks = [prompt.task for prompt in prompts]
            made = generate.generate(
                speaker.model.config, speaker.params, [prompt.tokens for prompt in prompts], self.settings,
                speaker.end, execution=self.how, samples=self.samples, seeds=seeds, tokenizer=speaker.tokenizer,
                tasks=tasks if any(tasks) else None,
            )  # fmt: skip
            for at, where in enumerate(part):
                for i, number in asked[where].items():
                    done = made[at * self.samples + i]
                    text = replies.spoken(speaker.tokenizer, done.tokens, speaker.end, self.settings.stop)
                    yield number, Answer(text, None, done.finished)


def local(section: Local, mesh: Mesh | None, writing: Writing | None = None) -> Model:
    """A model as judge. Raises CheckpointError, and ValueError for one whose tokenizer cannot tell labels apart."""
    config = written.model(section)
    speaker, about = loaded(section, config, mesh)
    for labels in (questions_.LETTERS, questions_.SCALE):
        choice.spellings(speaker.tokenizer, labels)  # refused now rather than in the middle of a run
    return Model(speaker, about, assemble.execution(config, mesh), section.batch, writing or Writing())


def table(known: Mapping[str, Reward], folder: Path | None, mesh: Mesh | None) -> dict[str, Reward]:
    """A table of rewards with one whose judge may be a model, which is then loaded. What judges say is kept in the
    run's folder, or (None) in memory. Raises ConfigError and CheckpointError when it is made."""
    ledgers: dict[Path | None, Ledger] = {}

    def made(config: judge.Judge) -> Function:
        file = None if folder is None else folder / LEDGER
        file = file if config.cache is None else Path(config.cache)
        ledger = ledgers.setdefault(file, Ledger(file))
        if config.endpoint is not None:
            return judge.by(config, Client(config.endpoint), ledger)
        if config.model is not None:
            return judge.by(config, local(config.model, mesh), ledger)
        return judge.make(config)  # says what is missing

    return {**known, NAME: Reward(judge.Judge, made)}
