"""What reward functions say of what a policy writes: in its rollouts, and of its greedy answers to held-out prompts."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from jaxft import rewards
from jaxft.border.errors import ConfigError
from jaxft.cli import answers, assemble, judge_models, reward_models, single, watching
from jaxft.cli.watching import Watch
from jaxft.config import RunConfig
from jaxft.core import tree
from jaxft.data import Prompt, questions
from jaxft.data.questions import Questions
from jaxft.model import Model
from jaxft.models.decoder import Execution
from jaxft.objectives import terms
from jaxft.rewards.settings import Reward
from jaxft.rollout import diversity, replies
from jaxft.rollout.replies import Reply
from jaxft.rollout.source import Rewards, Said, combined
from jaxft.training.evaluate import Evaluator
from jaxft.training.state import TrainState

SHOWN_REPORTS = 3


def room(config: RunConfig) -> int:
    """Tokens that a prompt may have."""
    return config.data.max_length - config.rollout.max_new_tokens - assemble.virtual(config).get("prompt", 0)


class Judge:
    """The reward functions of a run, and how completions come to them; what goes wrong there is said."""

    def __init__(
        self,
        functions: Sequence[rewards.Asked],
        tokenizer: Any,
        end: Sequence[int],
        stop: Sequence[str],
        columns: Sequence[str],
        console: Console,
    ):
        self.functions, self.columns, self.console = functions, columns, console
        self.tokenizer, self.end, self.stop = tokenizer, end, stop
        names, weights = tuple(one.name for one in functions), tuple(one.weight for one in functions)
        self.rewards = Rewards(names, weights, self.completions)

    def completions(self, prompts: Sequence[Prompt], made: Sequence[Any]) -> Said:
        """Of completions in tokens."""
        texts = [replies.spoken(self.tokenizer, completion.tokens, self.end, self.stop) for completion in made]
        return self.texts(prompts, texts, [list(c.tokens) for c in made], [c.finished for c in made])

    def texts(self, prompts: Sequence[Prompt], texts: list[str], ids: list[list[int]], finished: list[bool]) -> Said:
        """Of completions in text."""
        columns: dict[str, list[Any]] = {n: [prompt.columns.get(n) for prompt in prompts] for n in self.columns}
        columns |= {"completion_ids": ids, "finished": finished}
        judged = rewards.call(self.functions, [prompt.given for prompt in prompts], texts, columns)
        beside: list[dict[str, Any]] = [
            {name: values[i] for name, values in judged.extras.items()} for i in range(len(texts))
        ]
        for report in judged.reports:
            if report.sample is not None:
                beside[report.sample].setdefault("problems", []).append(f"{report.reward}: {report.problem}")
        for report in judged.reports[:SHOWN_REPORTS]:
            self.console.print(str(report), markup=False)
        if (more := len(judged.reports) - SHOWN_REPORTS) > 0:
            self.console.print(f"... and {more} more that rewards failed on")
        varied = diversity.metrics([watching.spoken(each, self.end) for each in ids])
        return Said(texts, judged.values, beside, {**judged.metrics, **varied})

    def means(self, said: Sequence[Reply]) -> dict[str, float]:
        """Of answers: ``reward`` and ``rewards/NAME``; what no function says anything of is left out."""
        if not said:
            return {}
        ids, finished = [list(reply.tokens) for reply in said], [reply.finished for reply in said]
        found = self.texts([reply.prompt for reply in said], [reply.text for reply in said], ids, finished).values
        every = {"reward": combined(found, self.rewards.weights)}
        every |= {f"rewards/{name}": found[:, i] for i, name in enumerate(self.rewards.names)}
        return {name: float(np.nanmean(of)) for name, of in every.items() if not np.isnan(of).all()}


def judge(
    config: RunConfig, base: Model, asked: Questions, console: Console, table: Mapping[str, Reward] = rewards.REWARDS
) -> Judge:
    """The judge of a run. ``table``: `rewards.REWARDS` with the models that the run has loaded."""
    functions = rewards.made(table, [(choice.name, choice.value) for choice in config.rewards])
    return Judge(functions, base.tokenizer, answers.ends(config, base), config.rollout.stop, asked.columns, console)


def held_out(config: RunConfig, asked: Questions) -> list[Prompt]:
    """The held-out prompts that an evaluation answers. Raises ConfigError where exact match has nothing to compare."""
    count = max(config.eval.samples, config.eval.exact_match, config.eval.rewards)
    found = (asked.held_out or [])[:count]
    without = [prompt.where for prompt in found[: config.eval.exact_match] if not prompt.answer]
    if without:
        raise ConfigError(f"`eval.exact_match`: {without[0]} has no `answer` to compare with; leave it out")
    return found


def evaluator(
    config: RunConfig, prompts: Sequence[Prompt], begun: single.Begun, judge: Judge, folder: Path, watch: Watch
) -> Evaluator:
    """``(step, state) -> metrics`` of greedy answers: ``exact_match`` (if asked for), ``reward``, the weighted sum of
    all rewards, ``rewards/NAME``, and what is watched beside them; the first answers are appended to the run's
    samples."""

    def evaluate(step: int, state: TrainState) -> Mapping[str, float]:
        params = tree.cast(terms.actor(tree.combine(state.trainable, begun.frozen)), begun.dtype)
        said = answers.ask(config, params, prompts, begun.base, begun.how)
        values = answers.tell(config, folder, step, said, begun.base.tokenizer)
        judged = said[: config.eval.rewards]
        return values | judge.means(judged) | watch.metrics(state, params, judged)

    return evaluate


def measured(
    config: RunConfig, base: Model, params: tree.Params, how: Execution, limit: int | None, console: Console
) -> tuple[str, list[Reply], dict[str, float]]:
    """For `jaxft eval`: what the prompts are of, greedy answers to them, and their metrics. The prompts are those held
    out, or all of them where none are."""
    section, held = config.data, False
    if section.eval_path is not None or section.eval_split is not None:
        path, split = section.eval_path or section.path, section.eval_split or section.split
        section = dataclasses.replace(section, path=path, split=split, eval_path=None, eval_split=None, limit=None)
    asked = questions.prepare(section, base.tokenizer, room(config))
    held = asked.held_out is not None
    prompts = (asked.held_out if asked.held_out else asked.train)[:limit]
    said = answers.ask(config, params, prompts, base, how) if prompts else []
    values = answers.exact(said) if all(reply.prompt.answer for reply in said) else {}
    source = f"the part held out of {section.path}" if held else str(section.path)
    models = reward_models.load(config, base, how.mesh)
    table = models.table(models.params, base.params["embed"]["tokens"].dtype, how)
    table = judge_models.table(table, None, how.mesh)
    found = values | judge(config, base, asked, console, table).means(said)
    replied = answers.ask(config, params, watching.harmless(config, base, room(config)), base, how)
    found |= watching.refusal_rate(config, [reply.text for reply in replied])
    return source, said, found | watching.described(said, answers.ends(config, base))
