"""Reward hacking, to be seen: what a policy has become while its reward rose.

Of the held-out answers, side by side with their rewards (one of weight 0 is a true score that is not trained on): how
far the policy is from its reference, how long and how varied they are, and how often it refuses harmless prompts.
"""

from collections.abc import Sequence

import jax
import numpy as np

from jaxft.border.errors import ConfigError
from jaxft.cli import answers, assemble, forgetting, single
from jaxft.config import RunConfig
from jaxft.core import tree
from jaxft.data import Prompt, questions
from jaxft.model import Model
from jaxft.objectives import terms
from jaxft.rollout import diversity, layout
from jaxft.rollout.drift import make_drift
from jaxft.rollout.generate import Completion
from jaxft.rollout.replies import Reply
from jaxft.sharding import mesh as mesh_
from jaxft.training.config import EvalConfig
from jaxft.training.state import TrainState

KEYS = ("harmless", "refusals", "kl")


def check(config: RunConfig, wanted: bool) -> None:
    """Raises ConfigError where the keys of `eval` that are about this do not fit the rest. ``wanted``: whether the run
    is one on rollouts."""
    given = [key for key in KEYS if getattr(config.eval, key) != getattr(EvalConfig(), key)]
    if given and not wanted:
        name = config.objective.name
        raise ConfigError(f"`eval.{given[0]}`: is told of runs on rollouts, and objective {name} is none; leave it out")
    if "refusals" in given and config.eval.harmless is None:
        raise ConfigError("`eval.refusals`: nothing is asked without eval.harmless, a file of harmless prompts")


def harmless(config: RunConfig, base: Model, room: int) -> list[Prompt]:
    """The harmless prompts, as many as an evaluation judges; none where none are asked for."""
    if config.eval.harmless is None:
        return []
    with forgetting.called("data.path", "eval.harmless"):
        found = questions.prepare(forgetting.elsewhere(config.data, config.eval.harmless), base.tokenizer, room)
    return found.train[: config.eval.rewards or None]


def refusal_rate(config: RunConfig, texts: Sequence[str]) -> dict[str, float]:
    """``refusal_rate``: the share of answers with one of the phrases `eval.refusals` in them."""
    if not texts:
        return {}
    phrases = [_plain(phrase) for phrase in config.eval.refusals]
    refused = [any(phrase in _plain(text) for phrase in phrases) for text in texts]
    return {"refusal_rate": sum(refused) / len(refused)}


def _plain(text: str) -> str:
    return text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def described(said: Sequence[Reply], end: Sequence[int]) -> dict[str, float]:
    """Length (tokens, with what ended them), the share that did not end, and diversity of answers."""
    if not said:
        return {}
    lengths = {
        "completions/mean_length": sum(len(reply.tokens) for reply in said) / len(said),
        "completions/clipped_ratio": sum(not reply.finished for reply in said) / len(said),
    }
    return lengths | diversity.metrics([spoken(reply.tokens, end) for reply in said])


def spoken(ids: Sequence[int], end: Sequence[int]) -> Sequence[int]:
    """Token ids without the one that ended them."""
    return ids[:-1] if len(ids) and ids[-1] in end else ids


class Watch:
    """What is watched at each evaluation of a run."""

    def __init__(self, config: RunConfig, begun: single.Begun, prompts: Sequence[Prompt]):
        """``prompts``: harmless ones."""
        self.config, self.begun, self.prompts = config, begun, prompts
        self.end, self.reserved = answers.ends(config, begun.base), assemble.virtual(config).get("prompt", 0)
        other = begun.others.get("reference")
        drift = make_drift(
            begun.base.config, None if other is None else other.config, dtype=begun.dtype, execution=begun.how,
            reserved=self.reserved,
        )  # fmt: skip
        self.drift = jax.jit(
            lambda policy, reference, batch: drift(policy, reference, {n: a[0] for n, a in batch.items()})
        )

    def metrics(self, state: TrainState, params: tree.Params, said: Sequence[Reply]) -> dict[str, float]:
        """``kl`` (where there is a reference), lengths, diversity, and ``refusal_rate``. ``params``: the policy's, as
        they answer; ``said``: its answers to held-out prompts."""
        replied = answers.ask(self.config, params, self.prompts, self.begun.base, self.begun.how)
        refused = refusal_rate(self.config, [reply.text for reply in replied])
        return described(said, self.end) | self._kl(state, params, said) | refused

    def _kl(self, state: TrainState, params: tree.Params, said: Sequence[Reply]) -> dict[str, float]:
        """The mean over answers, in nats."""
        reference = self.begun.views.get("reference")
        if not said or (reference is None and state.start is None):
            return {}
        if reference is None:
            begun = tree.combine(terms.actor(state.start), terms.actor(self.begun.frozen))
            reference = tree.cast(begun, self.begun.dtype)
        tokenizer, rows, apart = self.begun.base.tokenizer, self.config.train.batch, list[np.ndarray]()
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        place = mesh_.placer(self.begun.how.mesh)
        arrays = layout.arrays(
            [reply.prompt for reply in said],
            [Completion([*r.tokens], [0.0] * len(r.tokens), r.finished, []) for r in said],
            samples=1, pad_id=pad, reserved=self.reserved, multiple=self.config.data.length_multiple,
        )  # fmt: skip
        names = [n for n in ("tokens", "positions", "segments", "loss_mask", "task_ids") if n in arrays]
        for at in range(0, len(said), rows):
            some = np.minimum(np.arange(at, at + rows), len(said) - 1)  # the last fills up
            batch = place({n: arrays[n][some][None] for n in names})
            apart.append(np.asarray(self.drift(params, reference, batch))[: len(said) - at])
        return {"kl": float(np.concatenate(apart).mean())}
