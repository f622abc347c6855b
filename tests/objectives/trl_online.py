"""trl's own losses of online RL on given log-probabilities: its trainers' methods, on a policy that says what it is
told."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.objectives import trl_reference  # noqa: F401  (silences the experimental trainers)
from tests.objectives.written import Written

# isort: split
from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

ACCELERATOR = SimpleNamespace(
    gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x, num_processes=1,
    pad_across_processes=lambda x, dim, pad_index: x, sync_gradients=True,
)  # fmt: skip


def trainer(cls: type, **settings: Any) -> Any:
    """A trainer that was never set up, but for what its loss reads."""
    made = object.__new__(cls)
    usual = {
        "accelerator": ACCELERATOR, "_metrics": {"train": defaultdict(list)}, "aux_loss_enabled": False,
        "current_gradient_accumulation_steps": 1, "model": SimpleNamespace(training=True), "beta": 0.0,
    }  # fmt: skip
    made.__dict__.update(usual | settings)
    return made


def grpo(given: Written, config: Any, made: Any = None) -> tuple[float, np.ndarray, np.ndarray, dict[str, float], Any]:
    """(loss, gradients [N, LENGTH] of log-probs and of entropies, metrics, the trainer) with the settings of `GRPO`."""
    low, high = config.clip
    named = (
        "use_bias_correction_kl", "delta", "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos",
        "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "entropy_target", "entropy_coef_min",
        "entropy_coef_max", "entropy_coef_delta",
    )  # fmt: skip
    corrects = config.importance_sampling_correction != "none"
    made = made or trainer(
        GMPOTrainer if config.loss == "gmpo" else GRPOTrainer, loss_type=config.loss, epsilon_low=low,
        epsilon_high=high, args=SimpleNamespace(steps_per_generation=1, **{n: getattr(config, n) for n in named}),
        use_vllm=corrects, vllm_importance_sampling_correction=corrects, _last_world_entropy=float("inf"),
        _entropy_bonus_enabled=config.entropy_coef != 0 or config.use_adaptive_entropy, _entropy_window_stats=None,
        **{n: getattr(config, n) for n in (
            "top_entropy_quantile", "off_policy_mask_threshold", "importance_sampling_level", "beta", "entropy_coef",
            "max_completion_length", "use_adaptive_entropy",
        )},
    )  # fmt: skip
    inputs = _inputs(given) | {
        "advantages": torch.tensor(given.advantage),
        "old_per_token_logps": torch.tensor(given.old),
        "ref_per_token_logps": torch.tensor(given.ref),
        "num_items_in_batch": torch.tensor(given.completion.sum()),
    }
    if corrects:
        inputs["sampling_per_token_logps"] = torch.tensor(given.sampler)
        inputs["importance_sampling_ratio"] = torch.tensor(given.ratio(config))
    logp, entropy = (torch.tensor(x, requires_grad=True) for x in (given.logp, given.entropy))
    made._get_per_token_logps_and_entropies = lambda *_, **__: (logp, entropy, None)
    loss = made._compute_loss(None, inputs)
    loss.backward()
    more = np.zeros_like(given.entropy) if entropy.grad is None else entropy.grad.numpy()
    return loss.item(), logp.grad.numpy(), more, {n: v[-1] for n, v in made._metrics["train"].items()}, made


def rloo(given: Written, low: float, high: float) -> tuple[float, np.ndarray, dict[str, float]]:
    """(loss, gradient [N, LENGTH] of log-probs, metrics)."""
    made = trainer(RLOOTrainer, epsilon_low=low, epsilon_high=high)
    logp = torch.tensor(given.logp, requires_grad=True)
    made._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.tensor(given.entropy), None)
    old = torch.tensor((given.old * given.completion).sum(1))
    loss = made._compute_loss(None, _inputs(given) | {"old_logps": old, "advantages": torch.tensor(given.advantage)})
    loss.backward()
    return loss.item(), logp.grad.numpy(), {n: v[-1] for n, v in made._metrics["train"].items()}


def judged(given: Written, reward: np.ndarray, samples: int, finished: np.ndarray, cls: type, **settings: Any):
    """(advantages [N], tokens that count of each completion [N], metrics, its weights for the sampler) of a rollout of
    completions without gaps."""
    old, sampler, ref = (compact(given, x) for x in (given.old, given.sampler, given.ref))
    lengths = given.completion.sum(1)
    ids = [[5] * (n - 1) + [2 if end else 5] for n, end in zip(lengths, finished, strict=True)]
    policy, reference = (SimpleNamespace(training=True, is_gradient_checkpointing=False) for _ in range(2))
    said = {id(policy): torch.tensor(old), id(reference): torch.tensor(ref)}
    prompts = ([[3]] * len(ids), ids)
    whole = [None, [""] * len(ids), [list(x[:n]) for x, n in zip(sampler, lengths, strict=True)], {}, None, None]
    made = trainer(
        cls, model=policy, ref_model=reference, num_generations=samples, eos_token_ids=[2], pad_to_multiple_of=None,
        _tokenizer=SimpleNamespace(pad_token_id=0), environment_factories=None, environments=None, tools=None,
        _generate=lambda _: (*prompts, *whole) if cls is GRPOTrainer else (*prompts, whole[1]), num_iterations=1,
        _calculate_rewards=lambda *_: torch.tensor(reward), reward_func_names=["0", "1"], reward_funcs=[0, 1],
        _logs=defaultdict(list) | {"rewards": defaultdict(list), "extra": {}}, _pending_extra_logs={},
        _pending_metrics={}, _is_vlm=False, use_vllm=True, log_multimodal=False,
        args=SimpleNamespace(
            per_device_train_batch_size=4, gradient_checkpointing_kwargs=None, steps_per_generation=1,
            gradient_accumulation_steps=1,
        ),
        **settings,
    )  # fmt: skip
    made.accelerator = SimpleNamespace(**vars(ACCELERATOR), device="cpu", process_index=0)
    made._get_per_token_logps_and_entropies = lambda model, *_, **__: (said[id(model)], None, None)
    out = made._generate_and_score_completions([{"prompt": "x"}] * len(ids))
    metrics = {n: v[-1] for n, v in made._metrics["train"].items()}
    return out["advantages"].numpy(), out["completion_mask"].sum(1).numpy(), metrics, out


def compact(given: Written, x: np.ndarray) -> np.ndarray:
    """[N, LENGTH] of sequences to those of completions alone, from the first column on."""
    lengths = given.completion.sum(1)
    out = np.zeros((len(x), lengths.max()), np.float32)
    for row, (values, keep) in enumerate(zip(x, given.completion, strict=True)):
        out[row, : keep.sum()] = values[keep]
    return out


def _inputs(given: Written) -> dict[str, torch.Tensor]:
    mask = torch.tensor(given.completion).long()
    return {
        "prompt_ids": torch.zeros((mask.shape[0], 0), dtype=torch.long),
        "prompt_mask": torch.zeros((mask.shape[0], 0), dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
    }
