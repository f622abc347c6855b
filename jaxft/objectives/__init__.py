"""Objectives: pure functions from scores (log-probabilities and what else a loss asks for) to sums and weights.

`OBJECTIVES` is the literal table: an objective is one function, one line here, and a test with hand arithmetic.
`preference.LOSSES` are the losses of pairs of completions as plain functions.
"""

from jaxft.objectives import (
    bco,
    cpo,
    distil,
    dpo,
    grpo,
    kto,
    orpo,
    ppo,
    preference,
    prm,
    reinforce,
    reward,
    rloo,
    sft,
)
from jaxft.objectives.bco import BCO
from jaxft.objectives.cpo import CPO, SimPO
from jaxft.objectives.distil import Distil
from jaxft.objectives.dpo import DPO
from jaxft.objectives.grpo import GRPO
from jaxft.objectives.kto import KTO
from jaxft.objectives.orpo import ORPO
from jaxft.objectives.ppo import PPO
from jaxft.objectives.prm import PRM
from jaxft.objectives.reinforce import Reinforce
from jaxft.objectives.reward import Reward
from jaxft.objectives.rloo import RLOO
from jaxft.objectives.sft import SFT
from jaxft.objectives.terms import Mean, Objective

_REPORTS = ("correct", "entropy")

OBJECTIVES: dict[str, Objective] = {
    "sft": Objective(config=SFT, fn=sft.sft, needs=sft.needs, reports=_REPORTS, views=sft.views),
    "dpo": Objective(
        config=DPO, fn=dpo.dpo, needs=dpo.needs, reports=_REPORTS, views=dpo.views, rows="pairs",
        annotate=dpo.annotate, couples=dpo.couples, follow=dpo.follow,
    ),
    "orpo": Objective(config=ORPO, fn=orpo.orpo, reports=_REPORTS, rows="pairs"),
    "cpo": Objective(config=CPO, fn=cpo.cpo, reports=_REPORTS, rows="pairs"),
    "simpo": Objective(config=SimPO, fn=cpo.cpo, reports=_REPORTS, rows="pairs"),
    "kto": Objective(
        config=KTO, fn=kto.kto, reports=_REPORTS, views=("policy", "reference"), rows="labelled",
        asides=kto.asides, annotate=kto.annotate,
    ),
    "bco": Objective(
        config=BCO, fn=bco.bco, reports=_REPORTS, views=("policy", "reference"), rows="labelled",
        annotate=bco.annotate, carry=bco.begin,
    ),
    "reward": Objective(config=Reward, fn=reward.reward, needs=("reward",), rows="pairs", examine=reward.examine),
    "prm": Objective(config=PRM, fn=prm.prm, needs=("reward",), rows="steps", examine=prm.examine),
    "distil": Objective(
        config=Distil, fn=distil.distil, needs=distil.needs, reports=distil.reports, views=distil.views,
        follow=distil.follow,
    ),
    "grpo": Objective(
        config=GRPO, fn=grpo.grpo, needs=grpo.needs, reports=grpo.reports, rows="rollout",
        annotate=grpo.annotate, couples=grpo.couples, carry=grpo.begin,
        rollout_needs=grpo.rollout_needs, estimate=grpo.estimate, compares=lambda config: True,
    ),
    "rloo": Objective(
        config=RLOO, fn=rloo.rloo, reports=("entropy",), rows="rollout", rollout_needs=rloo.rollout_needs,
        estimate=rloo.estimate, compares=lambda config: True,
    ),
    "reinforce": Objective(
        config=Reinforce, fn=reinforce.reinforce, reports=("entropy",), rows="rollout",
        rollout_needs=reinforce.rollout_needs, estimate=reinforce.estimate, running=reinforce.begin,
        compares=reinforce.compares,
    ),
    "ppo": Objective(
        config=PPO, fn=ppo.ppo, reports=("entropy",), views=("policy", "value"), rows="rollout",
        rollout_needs=ppo.rollout_needs, estimate=ppo.estimate, running=ppo.begin,
    ),
}  # fmt: skip

__all__ = [
    "BCO", "CPO", "DPO", "GRPO", "KTO", "OBJECTIVES", "ORPO", "PPO", "PRM", "RLOO", "SFT", "Distil", "Mean",
    "Objective", "Reinforce", "Reward", "SimPO", "preference",
]  # fmt: skip
