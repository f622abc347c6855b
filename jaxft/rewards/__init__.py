"""Rewards: plain functions from prompts and completions to numbers, with no model and no arrays of jax.

`REWARDS` is the literal table: a reward is a config, one function that makes it, and one line here. `call` asks several
of them of the completions of one rollout.
"""

from jaxft.rewards import code, format, function, judge, length, math, model
from jaxft.rewards.calling import Asked, Judged, Report, RewardError, call, made
from jaxft.rewards.code import Code
from jaxft.rewards.format import ExactMatch, JSONSchema, MultipleChoice, Pattern, ThinkFormat
from jaxft.rewards.function import Own
from jaxft.rewards.judge import Judge
from jaxft.rewards.length import CosineLength, Repetition, SoftOverlong
from jaxft.rewards.math import Math
from jaxft.rewards.model import RewardModel
from jaxft.rewards.settings import Reward

REWARDS: dict[str, Reward] = {
    "math": Reward(Math, math.make),
    "code": Reward(Code, code.make),
    "exact_match": Reward(ExactMatch, format.exact),
    "multiple_choice": Reward(MultipleChoice, format.choice),
    "think_format": Reward(ThinkFormat, format.think),
    "regex": Reward(Pattern, format.pattern),
    "json_schema": Reward(JSONSchema, format.json_schema),
    "soft_overlong": Reward(SoftOverlong, length.overlong),
    "repetition": Reward(Repetition, length.repetition),
    "cosine_length": Reward(CosineLength, length.cosine),
    "model": Reward(RewardModel, model.make),
    "judge": Reward(Judge, judge.make),
    "function": Reward(Own, function.make),
}

__all__ = [
    "REWARDS", "Asked", "Code", "CosineLength", "ExactMatch", "JSONSchema", "Judge", "Judged", "Math",
    "MultipleChoice", "Own", "Pattern", "Repetition", "Report", "Reward", "RewardError", "RewardModel", "SoftOverlong",
    "ThinkFormat", "call", "made",
]  # fmt: skip
