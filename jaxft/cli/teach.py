"""`jaxft teach CONFIG`: a teacher answers prompts several times, a verifier judges the answers, and what passes becomes
rows to train on: sequence-level distillation (Kim and Rush 2016), rejection sampling, reasoning traces.

In the run's folder `samples.jsonl` holds every sample with its verdict, a line a prompt, on the disk as soon as it is
made; a run that was killed goes on after the last of them, and samples what it would have sampled. `rows.jsonl` is
written when all prompts are answered.
"""

import argparse
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console

from jaxft import config as config_
from jaxft import run_dir
from jaxft.border import fields
from jaxft.border.errors import ConfigError
from jaxft.cli import assemble, judgements, prompting, written
from jaxft.cli.prompting import Speaker
from jaxft.cli.target import Target
from jaxft.config import Packing, RunConfig
from jaxft.data import DataConfig, Prompt, questions
from jaxft.models.decoder import Execution
from jaxft.rewards import REWARDS, answers, function
from jaxft.rollout import generate, verify
from jaxft.rollout.generate import GenerateConfig
from jaxft.rollout.verify import Judge, Sample, Verdict, VerifyConfig
from jaxft.sharding import mesh as mesh_
from jaxft.sharding.mesh import MeshConfig

SAMPLES = "samples.jsonl"
Columns = Mapping[str, Mapping[str, Any]]
"""Of each row, by its place in the data."""


@dataclass(frozen=True)
class AnsweringTeacher:
    """The model that answers."""

    path: str
    """Folder or hub id of the model."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    adapter: str | None = None
    """Folder of an adapter on it."""
    quantize: Packing = "none"
    """Few bits for its weights."""
    dtype: Literal["bfloat16", "float16", "float32", "auto"] = "bfloat16"
    """Dtype of its weights and of the computation."""


@dataclass(frozen=True)
class TeachConfig:
    """Everything that decides what a teacher writes."""

    teacher: AnsweringTeacher
    """The model that answers."""
    data: DataConfig = field(default_factory=DataConfig)
    """The prompts: rows with a `prompt` and any other columns, or rows of any format, of which the last reply is left
    out (and is their `answer`)."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """How answers are sampled; generate.batch counts answers."""
    samples: int = 4
    """Answers to each prompt."""
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    """Which answers are right."""
    keep: Literal["best", "all", "first"] = "best"
    """Which of the right answers to a prompt become rows."""
    reasoning: Literal["content", "field", "drop"] = "content"
    """Where the reasoning of an answer goes: content: it stays in the reply as it was written; field: to
    `reasoning_content`, for a student whose chat template reads that; drop: only the final answer is learnt."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices are arranged."""
    run_dir: str | None = None
    """Folder for what is written. Default: runs/ with the config file's name."""
    resume: bool = False
    """Whether to go on with what is in run_dir. Otherwise that is refused."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples: got {self.samples}; expected at least 1")
        if self.samples > 1 and self.generate.temperature == 0.0:
            raise ValueError("generate.temperature: got 0, which gives samples that are all the same; set samples: 1")

    @property
    def run(self) -> RunConfig:
        """The teacher as other verbs know a model."""
        made = written.model(self.teacher)
        return dataclasses.replace(made, data=self.data, generate=self.generate, mesh=self.mesh)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the config and `--resume`."""
    written.arguments(parser, TeachConfig)


def command(args: argparse.Namespace) -> int:
    """Asks, judges, writes."""
    return written.command(args, "teach", run)


def run(config: TeachConfig) -> int:
    """Answers what is not answered yet and writes the rows; 1 if none passes."""
    if not config.data.path or config.data.sources:
        raise ConfigError("`data.path` must be given: prompts of one source, data.path=prompts.jsonl")
    judge = _judge(config.verify.function)
    folder, console = Path(str(config.run_dir)), Console(highlight=False, markup=False)
    written.refuse_other(folder, config)
    mesh_.start(config.mesh)
    mesh = mesh_.create(config.mesh) if len(jax.devices()) > 1 else None
    rows, form = questions.rows_of(config.data, "tokens", config.data.limit)
    speaker = prompting.load(
        Target(config.run, None if not config.teacher.adapter else Path(config.teacher.adapter)), mesh
    )
    prompts = questions.prompts(rows, form, config.data, speaker.tokenizer)
    if not prompts:
        raise ConfigError(f"`data.path`: {config.data.path} holds no prompts; expected rows with a `prompt`, or chats")
    fields = {row.where: row.fields for row in rows}
    columns = {prompt.where: _columns(prompt, fields[prompt.where]) for prompt in prompts}
    for prompt in prompts:
        _judged(config, prompt, [], columns, None)  # a row without an answer is named before any is asked for
    how = assemble.execution(config.run, mesh)
    first = jax.process_index() == 0
    if first:
        run_dir.keep(folder, run_dir.CONFIG, config_.dump(config))
    with run_dir.held(folder) if first else contextlib.nullcontext():
        done = _done(folder / SAMPLES, prompts, config)
        if done:
            console.print(f"{len(done)} of {len(prompts)} prompts are answered in {folder / SAMPLES}")
        for records in _answered(config, speaker, how, prompts, columns, judge, len(done)):
            done += records
            if first:
                _append(folder / SAMPLES, records)
            console.print(_told(done, len(prompts)))
        made = [row for record in done for row in training_rows(config, record)]
        if not made:
            console.print(f"No answer passed, so there is nothing to train on; {folder / SAMPLES} says why of each.")
            return 1
        if first:
            run_dir.put(folder / written.ROWS, "".join(map(_line, made)))
    console.print(f"{len(made)} rows in {folder / written.ROWS}; every sample and its verdict in {folder / SAMPLES}")
    return 0


def _answered(
    config: TeachConfig,
    speaker: Speaker,
    how: Execution,
    prompts: Sequence[Prompt],
    columns: Columns,
    judge: Judge | None,
    done: int,
) -> Iterator[list[dict[str, Any]]]:
    """The records of the prompts that are left, some at a time: always the same ones together, with the same draws."""
    count, batch = config.samples, max(1, config.generate.batch // config.samples)
    for begin in range(done // batch * batch, len(prompts), batch):
        part = prompts[begin : begin + batch]
        settings = dataclasses.replace(
            config.generate, batch=batch * count, seed=(config.generate.seed * 1_000_003 + begin) % 2**31
        )
        asked, tasks = [prompt.tokens for prompt in part], [prompt.task for prompt in part]
        made = generate.generate(
            speaker.model.config, speaker.params, asked, settings, speaker.end,
            execution=how, tasks=tasks if any(tasks) else None, samples=count, tokenizer=speaker.tokenizer,
        )  # fmt: skip
        records = []
        for number, prompt in enumerate(part):
            own = made[number * count : (number + 1) * count]
            samples = [
                Sample(spoken(speaker, c.tokens, config.verify.tags, settings.stop), len(c.tokens), c.finished)
                for c in own
            ]
            records.append(_record(config, prompt, samples, columns, judge))
        yield records[max(0, done - begin) :]


def _record(
    config: TeachConfig, prompt: Prompt, samples: Sequence[Sample], columns: Columns, judge: Judge | None
) -> dict[str, Any]:
    """A line of `samples.jsonl`."""
    verdicts = _judged(config, prompt, samples, columns, judge)
    chosen = verify.kept(samples, verdicts, config.keep)
    said = [
        {**sample._asdict(), **verdict._asdict(), "kept": i in chosen}
        for i, (sample, verdict) in enumerate(zip(samples, verdicts, strict=True))
    ]
    tools = {"tools": list(prompt.tools)} if prompt.tools else {}
    return {"where": prompt.where, "prompt": prompt.given, **tools, "samples": said}


def _columns(prompt: Prompt, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns of a row; of rows that are no prompts, with the last reply as `answer`."""
    return fields if "prompt" in fields else {**fields, "answer": prompt.answer}


def _judged(
    config: TeachConfig, prompt: Prompt, samples: Sequence[Sample], columns: Columns, judge: Judge | None
) -> list[Verdict]:
    try:
        return verify.judged(config.verify, prompt.given, samples, columns[prompt.where], judge)
    except ValueError as error:
        raise ConfigError(f"{prompt.where}: {error}") from None


def training_rows(config: TeachConfig, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that a record gives: prompt and completion, as texts or as messages."""
    found = []
    for sample in record["samples"]:
        if not sample["kept"]:
            continue
        reasoning, final = answers.parts(sample["text"], config.verify.tags)
        content = sample["text"].strip() if config.reasoning == "content" else str(final)
        more = {"tools": record["tools"]} if record.get("tools") else {}
        if isinstance(record["prompt"], str):
            if config.reasoning == "field" and reasoning:
                raise ConfigError("`reasoning`: got field; prompts that are text have none: expected content or drop")
            found.append({"prompt": record["prompt"], "completion": content, **more})
            continue
        message = {"role": "assistant", "content": content}
        message |= {"reasoning_content": reasoning} if config.reasoning == "field" and reasoning else {}
        found.append({"prompt": record["prompt"], "completion": [message], **more})
    return found


def spoken(speaker: Speaker, tokens: Sequence[int], tags: Sequence[str], stop: Sequence[str] = ()) -> str:
    """The text of a completion without its end and without special tokens, but with tags of reasoning that are such."""
    kept = [*tokens[:-1]] if tokens and tokens[-1] in speaker.end else [*tokens]
    special = {i: tag for tag in tags for i in [speaker.tokenizer.convert_tokens_to_ids(tag)] if i in _special(speaker)}
    pieces, begin = [], 0
    for at, token in enumerate([*kept, None]):
        if token is None or token in special:
            options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            pieces += [speaker.tokenizer.decode(kept[begin:at], **options), "" if token is None else special[token]]
            begin = at + 1
    return generate.cut("".join(pieces), stop)


def _special(speaker: Speaker) -> set[int]:
    return {*speaker.tokenizer.all_special_ids}


def _judge(spec: str | None) -> Judge | None:
    """The function of the user's file, or that of a reward. Raises ConfigError."""
    if spec is None or spec not in REWARDS:
        return None if spec is None else function.load(spec, "verify.function")
    entry = REWARDS[spec]
    if lacking := [field.name for field in fields.fields(entry.config) if field.required]:
        needs = ", ".join(lacking)
        raise ConfigError(f"`verify.function`: got {spec}, a reward that must be given {needs}; expected one without")
    return entry.make(entry.config())


def _done(file: Path, prompts: Sequence[Prompt], config: TeachConfig) -> list[dict[str, Any]]:
    """What is answered already; a line that was cut short goes. Raises ConfigError where it is of other prompts."""
    if not file.exists():
        return []
    text = file.read_bytes()
    if not text.endswith(b"\n"):
        text = text[: text.rfind(b"\n") + 1]
        if jax.process_index() == 0:
            os.truncate(file, len(text))
    records = [json.loads(line) for line in text.splitlines()]
    same = [judgements.identity(prompt.given) for prompt in prompts[: len(records)]]
    if [judgements.identity(record["prompt"]) for record in records] != same:
        raise ConfigError(f"{file}: it answers other prompts than {config.data.path}; choose another run_dir")
    return records


def _append(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """At once, and to the disk."""
    with file.open("ab") as lines:
        lines.write("".join(map(_line, records)).encode())
        lines.flush()
        os.fsync(lines.fileno())


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _told(done: Sequence[Mapping[str, Any]], total: int) -> str:
    """How far it is, and why samples fail."""
    every = [sample for record in done for sample in record["samples"]]
    with_one = sum(any(sample["kept"] for sample in record["samples"]) for record in done)
    reasons = [sample["failed"] for sample in every if sample["failed"]]
    failed = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted({*reasons}))
    passed = f"{len(every) - len(reasons)} of {len(every)} samples passed"
    return f"{len(done)} of {total} prompts, {with_one} with a right answer; {passed}{f' ({failed})' if failed else ''}"
