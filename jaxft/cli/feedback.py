"""What `jaxft critique` and `jaxft judge` share: a policy that replies, a judge, a constitution, and the ledger that
keeps every question and answer of both.

All of it goes through the ledger, the policy's replies too: a run that was killed asks only what has no answer there,
and ends with the rows of one that never was.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxft import config as config_
from jaxft import run_dir
from jaxft.border.errors import ConfigError
from jaxft.cli import assemble, judge_models, judgements, written
from jaxft.cli.teach import AnsweringTeacher
from jaxft.data import DataConfig, Prompt, questions
from jaxft.rewards import answers
from jaxft.rewards.feedback import asking, constitution
from jaxft.rewards.feedback.asking import Answer, Failure, Ledger, Unreachable
from jaxft.rewards.feedback.constitution import Constitution
from jaxft.rewards.feedback.endpoint import Client, Endpoint, Writing
from jaxft.rewards.feedback.transport import Refused
from jaxft.rewards.judge import Local
from jaxft.rollout.generate import GenerateConfig
from jaxft.sharding import mesh as mesh_
from jaxft.sharding.mesh import MeshConfig

REPORT = "report.json"
"""File of the numbers that sum a run up."""


@dataclass(frozen=True, kw_only=True)
class JudgeSection(Writing):
    """Who judges. By default the policy itself."""

    endpoint: Endpoint | None = None
    """An OpenAI-compatible endpoint."""
    model: Local | None = None
    """A model that is loaded beside the policy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.endpoint is not None and self.model is not None:
            raise ValueError("model: got an endpoint as well; expected one of the two to judge")

    @property
    def writing(self) -> Writing:
        return Writing(max_new_tokens=self.max_new_tokens, temperature=self.temperature)


@dataclass(frozen=True, kw_only=True)
class FeedbackConfig:
    """What decides replies and who judges them."""

    policy: AnsweringTeacher
    """The model that replies."""
    data: DataConfig = field(default_factory=DataConfig)
    """The prompts: rows with a `prompt`, or rows of any format, of which the last reply is left out."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """How replies are sampled; generate.batch counts replies."""
    judge: JudgeSection = field(default_factory=JudgeSection)
    """Who judges."""
    constitution: str | None = None
    """YAML file of the principles. Default: the one that ships."""
    seed: int = 0
    """Of the draws of principles, critiques and revisions; generate.seed is of replies."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices are arranged."""
    run_dir: str | None = None
    """Folder for what is written. Default: runs/ with the config file's name."""
    resume: bool = False
    """Whether to go on with what is in run_dir. Otherwise that is refused."""


@dataclass(frozen=True)
class Begun:
    """A run whose models are loaded."""

    prompts: list[Prompt]
    policy: judge_models.Policy
    judge: asking.Judge
    ledger: Ledger
    constitution: Constitution
    folder: Path
    console: Console

    def parts(self) -> Iterator[list[Prompt]]:
        """The prompts, some at a time."""
        size = max(1, self.policy.settings.batch // self.policy.samples)
        for begin in range(0, len(self.prompts), size):
            yield self.prompts[begin : begin + size]

    def replies(self, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        """The policy's replies to each prompt."""
        seeds = [number(self.policy.settings.seed, prompt.given) for prompt in prompts]
        asked = [
            question
            for prompt, seed in zip(prompts, seeds, strict=True)
            for question in self.policy.questions(prompt, seed)
        ]
        said = [one for one in self.ledger.ask(self.policy, asked) if not isinstance(one, Failure)]
        count = self.policy.samples
        return [said[i : i + count] for i in range(0, len(said), count)]


def number(*of: Any) -> int:
    """A seed that follows from what it is of."""
    return int.from_bytes(constitution.digest(list(of))[:4], "little") >> 2


@contextlib.contextmanager
def begin(config: FeedbackConfig, samples: int, principles: int, rated: bool = False) -> Iterator[Begun]:
    """Checks, loads, and holds the run's folder. Raises ConfigError, DataError and CheckpointError.

    ``samples``: replies to each prompt; ``principles``, ``rated``: see `constitution.read`."""
    if not config.data.path or config.data.sources:
        raise ConfigError("`data.path` must be given: prompts of one source, data.path=prompts.jsonl")
    if config.mesh.distributed:
        raise ConfigError("`mesh.distributed`: judging on several hosts is not there; use the devices of one")
    read = constitution.read(config.constitution, rated=rated, least=principles)
    writing, section = config.judge.writing, config.judge
    client = None if section.endpoint is None else Client(section.endpoint, writing)
    folder, console = Path(str(config.run_dir)), Console(highlight=False, markup=False, soft_wrap=True)
    written.refuse_other(folder, config)
    mesh = mesh_.create(config.mesh) if len(jax.devices()) > 1 else None
    rows, form = questions.rows_of(config.data, "tokens", config.data.limit)
    base = dataclasses.replace(written.model(config.policy), data=config.data, generate=config.generate)
    speaker, about = judge_models.loaded(config.policy, base, mesh)
    every = questions.prompts(rows, form, config.data, speaker.tokenizer)
    once = {judgements.identity([prompt.given, *prompt.tools]): prompt for prompt in reversed(every)}
    prompts = [*reversed(once.values())]
    if not prompts:
        raise ConfigError(f"`data.path`: {config.data.path} holds no prompts; expected rows with a `prompt`, or chats")
    how = assemble.execution(base, mesh)
    named = {prompt.where: prompt for prompt in prompts}
    policy = judge_models.Policy(speaker, about, how, config.generate, samples, named)
    judge: asking.Judge = judge_models.Model(speaker, about, how, config.generate.batch, writing)
    judge = judge if section.model is None else judge_models.local(section.model, mesh, writing)
    run_dir.keep(folder, run_dir.CONFIG, config_.dump(config))
    with run_dir.held(folder), Ledger(folder / judge_models.LEDGER) as ledger:
        if ledger.known:
            console.print(f"{len(ledger.known)} answers are there already, in {ledger.file}")
        try:
            yield Begun(prompts, policy, client or judge, ledger, read, folder, console)
        except (Unreachable, Refused) as error:
            raise RuntimeError(f"{error}\nWhat was answered is kept; the same command with --resume goes on.") from None


def final(text: str) -> str:
    """What is judged of a text: what follows its reasoning; empty where that never ends."""
    return (answers.parts(text)[1] or "").strip()


def reply(prompt: Prompt, text: str) -> Any:
    """A reply as rows to train on have it: text after text, a message after messages."""
    return text if isinstance(prompt.given, str) else [{"role": "assistant", "content": text}]


def asked(prompt: Prompt) -> dict[str, Any]:
    """What such rows say of the prompt."""
    return {"prompt": prompt.given} | ({"tools": list(prompt.tools)} if prompt.tools else {})
