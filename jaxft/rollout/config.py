"""The `rollout` section: what an on-policy run samples, and how often it trains on it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RolloutConfig:
    """How the policy's own completions are sampled, for objectives that learn from them."""

    prompts: int = 16
    """Prompts of a rollout. The optimiser's step takes train.batch x train.accumulate of its prompts x samples
    completions, so that one rollout makes several steps."""
    samples: int = 8
    """Completions of each prompt, which are compared with each other."""
    epochs: int = 1
    """Passes over a rollout, each in an order of its own."""
    max_new_tokens: int = 256
    """Longest completion, in tokens. A prompt may have what that leaves of data.max_length."""
    temperature: float = 1.0
    """Above 0; 1 samples from the policy itself. Held-out prompts are answered greedily whatever it is."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probability reaches this."""
    min_p: float = 0.0
    """Draw from tokens at least this likely, relative to the most likely; 0: all."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, besides the end tokens."""
    seed: int = 0
    """Of the draws. The order of the prompts has its own, data.seed."""
    batch: int = 128
    """Completions generated together: as one ends, the next takes its place."""
    merge: Literal["auto", "always", "never"] = "auto"
    """Whether completions are sampled from a copy of the weights with the adapters worked in, where they can be: faster
    and off from the adapted model by rounding (sampling/sampling_logp_difference tells it). auto: on a GPU."""
    dynamic: bool = False
    """Whether prompts whose completions all have the same reward, of which nothing can be learnt, give their place to
    the next prompts: dynamic sampling, Yu et al. 2025 (arXiv:2503.14476), section 3.2."""
    dynamic_rounds: int = 4
    """How often a rollout is filled up so. Places that are empty then go to prompts without a difference after all."""
    fraction: float | None = None
    """Distillation alone: the share of rollouts, drawn one by one, in whose place the student learns from its own
    completions; else it learns from as many batches of the data's. Agarwal et al. 2024 (arXiv:2306.13649), lambda of
    algorithm 1. Default: 1, all of them, where the run has anything else of this section; without the section the data
    alone."""
    log_samples: int = 32
    """Completions of each rollout that are written to rollouts.jsonl in the run's folder, with their rewards and
    advantages: jaxft samples RUN. 0: none."""

    def __post_init__(self) -> None:
        fine = {
            **{name: (getattr(self, name) >= 1, "at least 1") for name in _COUNTS},
            **{name: (getattr(self, name) >= 0, "at least 0") for name in ("top_k", "log_samples", "seed")},
            "temperature": (self.temperature > 0, "a number above 0: greedy completions of a prompt are all the same"),
            "top_p": (0 < self.top_p <= 1, "a share above 0, at most 1"),
            "fraction": (self.fraction is None or 0 <= self.fraction <= 1, "from 0 to 1"),
            "min_p": (0 <= self.min_p < 1, "from 0 to below 1"),
            "stop": (all(self.stop), "no empty text"),
        }
        for name, (good, expected) in fine.items():
            if not good:
                raise ValueError(f"rollout.{name}: got {getattr(self, name)}; expected {expected}")

    @property
    def sequences(self) -> int:
        """Completions of a rollout."""
        return self.prompts * self.samples


_COUNTS = ("prompts", "samples", "epochs", "max_new_tokens", "batch", "dynamic_rounds")
