"""P-tuning v2: learnt keys and values in every layer, with or without a reparametrisation.

Liu et al. 2021, "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks",
section 3 (arXiv:2110.07602). As a map it is prefix tuning and nothing else; the paper's point is that deep prompts work
for understanding as well as for generation, at every size, that the network that makes them helps in some tasks and
harms in others, and that hard tasks want longer ones. So this is `prefix_tuning` under the paper's name with its
defaults, and peft stores it as prefix tuning. Trained parameters: as there.
"""

from dataclasses import dataclass

from jaxft.peft.prefix_tuning import PrefixTuning


@dataclass(frozen=True)
class PTuningV2(PrefixTuning):
    """Prefix tuning as in P-tuning v2: longer, without the network unless asked for. Default learning rate 3e-2, with
    the network 3e-3."""

    tokens: int = 100
    """Length n of the prefix: about 20 for simple tasks, 100 for hard ones."""
