"""Answers to held-out prompts while training: exact match, and samples to read, greedy so that they can be compared."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft import data
from jaxft.config import RunConfig
from jaxft.core import tree
from jaxft.data import Examples, Prompt
from jaxft.model import Model
from jaxft.models.decoder import Execution
from jaxft.rollout import generate
from jaxft.training.evaluate import Evaluator
from jaxft.training.state import TrainState

FILE = "samples.jsonl"


def exact(answer: str, wanted: str) -> bool:
    """Whether two answers are the same, white space at their ends aside."""
    return answer.strip() == wanted.strip()


def chosen(config: RunConfig, held_out: Examples | None, form: str, base: Model) -> list[Prompt]:
    """The first held-out prompts that fit the model's positions, as many as the evaluation asks for."""
    wanted = max(config.eval.samples, config.eval.exact_match)
    if held_out is None or wanted == 0:
        return []
    found = data.prompts(held_out.source_rows()[:wanted], form, config.data, base.tokenizer)
    room = base.config.max_positions - config.generate.max_new_tokens
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
    settings = generate.GenerateConfig(config.generate.max_new_tokens, temperature=0.0, batch=config.generate.batch)
    ends = base.ends

    def evaluate(step: int, state: TrainState) -> dict[str, float]:
        params = tree.cast(tree.combine(state.trainable, frozen), dtype)
        asked = [list(prompt.tokens) for prompt in prompts]
        made = generate.generate(base.config, params, asked, settings, ends, execution=how)
        texts = [base.tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in made]
        write(folder / FILE, step, prompts[: config.eval.samples], texts)
        right = [exact(text, prompt.answer) for text, prompt in zip(texts, prompts, strict=True)]
        scored = right[: config.eval.exact_match]
        return {"exact_match": sum(scored) / len(scored)} if scored else {}

    return evaluate


def write(file: Path, step: int, prompts: Sequence[Prompt], texts: Sequence[str]) -> None:
    """Appends the answers of one evaluation; a line each."""
    with file.open("a", encoding="utf-8") as lines:
        for prompt, text in zip(prompts, texts, strict=False):
            row = {"step": step, "prompt": prompt.text, "completion": text, "answer": prompt.answer}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def read(file: Path) -> dict[int, list[dict[str, str]]]:
    """The samples of each step, in order; of a step evaluated twice (after a resume), the later ones."""
    steps: dict[int, dict[str, dict[str, str]]] = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            steps.setdefault(row["step"], {})[row["prompt"]] = row
    return {step: list(rows.values()) for step, rows in sorted(steps.items())}
