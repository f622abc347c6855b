"""Answers to held-out prompts while training: exact match, and samples to read, greedy so that they can be compared."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft import data
from jaxft.border.errors import ConfigError
from jaxft.cli import assemble
from jaxft.config import RunConfig
from jaxft.core import tree
from jaxft.data import Examples, Prompt, template
from jaxft.model import Model
from jaxft.models.decoder import Execution
from jaxft.rollout import generate, replies
from jaxft.rollout.replies import Reply
from jaxft.training import by_source
from jaxft.training.evaluate import Evaluator
from jaxft.training.state import TrainState

FILE = "samples.jsonl"


def chosen(config: RunConfig, held_out: Examples | None, form: str, base: Model) -> list[Prompt]:
    """The first held-out prompts that fit the model's positions, as many as the evaluation asks for."""
    if base.config.labels and config.eval.exact_match:
        raise ConfigError("`eval.exact_match`: a reward model answers nothing; leave it out")
    wanted = 0 if base.config.labels else max(config.eval.samples, config.eval.exact_match)
    if held_out is None or wanted == 0:
        return []
    found = data.prompts_of(held_out, form, config.data, base.tokenizer, wanted)
    room = base.config.max_positions - config.generate.max_new_tokens - sum(assemble.virtual(config).values())
    return [prompt for prompt in found if len(prompt.tokens) <= room] if base.config.learned_positions else found


def evaluator(
    config: RunConfig,
    prompts: Sequence[Prompt],
    base: Model,
    dtype: Any,
    how: Execution,
    frozen: tree.Params,
    folder: Path,
) -> Evaluator:
    """``(step, state) -> {"exact_match": share}`` (if asked for); the samples are appended to ``folder``."""

    def evaluate(step: int, state: TrainState) -> dict[str, float]:
        params = tree.cast(tree.combine(state.trainable, frozen), dtype)
        return tell(config, folder, step, ask(config, params, prompts, base, how), base.tokenizer)

    return evaluate


def ask(
    config: RunConfig,
    params: tree.Params,
    prompts: Sequence[Prompt],
    base: Model,
    how: Execution,
    adapters: Sequence[int] | None = None,
) -> list[Reply]:
    """Greedy replies; ``adapters``: of stacked ones, that of each prompt."""
    settings = generate.GenerateConfig(config.generate.max_new_tokens, temperature=0.0, batch=config.generate.batch)
    end = ends(config, base)
    return replies.replies(
        base.config, params, prompts, base.tokenizer, settings, end, execution=how, adapters=adapters
    )


def tell(config: RunConfig, folder: Path, step: int, said: Sequence[Reply], tokenizer: Any) -> dict[str, float]:
    """Appends the samples to a run's own, and returns the share of exact answers (if asked for)."""
    write(folder / FILE, step, said[: config.eval.samples], tokenizer)
    return exact(said[: config.eval.exact_match])


def exact(said: Sequence[Reply]) -> dict[str, float]:
    """``exact_match``, the share of replies that are the answer of the data, and that of each source of a mixture."""
    groups = {"exact_match": said}
    for name in dict.fromkeys(reply.prompt.source for reply in said if reply.prompt.source):
        groups[f"{by_source.PREFIX}{name}/exact_match"] = [reply for reply in said if reply.prompt.source == name]
    return {name: sum(reply.exact for reply in own) / len(own) for name, own in groups.items() if own}


def ends(config: RunConfig, base: Model) -> list[int]:
    """Token ids that end a reply: the model's own, and what ends a turn in the chat template of the data."""
    named = config.data.template != "tokenizer" or base.tokenizer.chat_template
    options = config.data.template_options
    render = template.renderer(base.tokenizer, config.data.template, options) if named else None
    return replies.ends(base.ends, render, base.tokenizer)


def write(file: Path, step: int, said: Sequence[Reply], tokenizer: Any) -> None:
    """Appends the samples of one evaluation; a line each. Prompts are shown without special tokens."""
    with file.open("a", encoding="utf-8") as lines:
        for reply in said:
            prompt = tokenizer.decode(reply.prompt.tokens, skip_special_tokens=True)
            row = {"step": step, "prompt": prompt, "completion": reply.text, "answer": reply.prompt.answer}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def read(file: Path) -> dict[int, list[dict[str, str]]]:
    """The samples of each step, in order; of a step evaluated twice (after a resume), the later ones."""
    steps: dict[int, dict[str, dict[str, str]]] = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            steps.setdefault(row["step"], {})[row["prompt"]] = row
    return {step: list(rows.values()) for step, rows in sorted(steps.items())}
