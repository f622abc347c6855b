"""trl's own losses on given log-probabilities: its trainers' methods, on models that say what they are told."""

import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from tests.objectives.completions import Sequences

ACCELERATOR = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


class Told(torch.nn.Module):
    """A causal model whose scores are given: for a batch of its own mark in ``input_ids``, as trl has them from it."""

    is_gradient_checkpointing = False

    def __init__(self, **said: dict[str, Any]) -> None:
        super().__init__()
        self.said = said

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> SimpleNamespace:
        said = self.said["kl" if input_ids[0, 0] == 1 else "own"]
        keep = labels[:, 1:] != -100
        zeros = torch.zeros(keep.shape)
        out = {"entropy": zeros, "is_top1": zeros > 0, "mean_logits": zeros, "log_sum_sq_probs": zeros}
        logp = torch.where(keep, said["log_probs"], torch.zeros(()))
        return SimpleNamespace(**{**out, **said, "log_probs": logp})


def trainer(cls: type, **settings: Any) -> Any:
    """A trainer that was never set up, but for what its loss reads."""
    made = object.__new__(cls)
    metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    usual = {
        "accelerator": ACCELERATOR, "_metrics": metrics, "aux_loss_enabled": False, "precompute_ref_logps": False,
        "_total_train_tokens": 0, "_tp_size": 1, "label_smoothing": 0.0, "beta": 0.1,
    }  # fmt: skip
    made.__dict__.update(usual | settings)
    return made


def order(given: Sequences) -> np.ndarray:
    """Rows as trl's batch of pairs has them: all chosen, then all rejected."""
    return np.concatenate([np.arange(0, len(given.logp), 2), np.arange(1, len(given.logp), 2)])


def models(given: Sequences, rows: np.ndarray, beside: Sequences | None = None) -> tuple[Told, Told, torch.Tensor]:
    """Policy, reference, and the leaf that gradients are taken of: log-probs [N, LENGTH] of the policy."""
    leaf = torch.tensor(given.logp, requires_grad=True)
    own = {
        "log_probs": leaf[rows][:, 1:],
        "entropy": torch.tensor(given.entropy[rows, 1:]),
        "is_top1": torch.tensor(given.correct[rows, 1:]),
        "log_sum_sq_probs": torch.tensor(np.log(given.sum_p2[rows, 1:])),
    }
    policy, reference = {"own": own}, {"own": {"log_probs": torch.tensor(given.ref[rows, 1:])}}
    if beside is not None:
        policy["kl"] = {"log_probs": torch.tensor(beside.logp[:, 1:])}
        reference["kl"] = {"log_probs": torch.tensor(beside.ref[:, 1:])}
    return Told(**policy), Told(**reference), leaf


def dpo(given: Sequences, loss: tuple[str, ...], **settings: Any) -> tuple[float, np.ndarray, dict[str, float]]:
    """(loss, gradient [N, LENGTH], metrics) of pairs: sequences 2p and 2p + 1."""
    tau = settings.pop("discopop_tau", 0.05)
    usual = {
        "loss_types": loss, "loss_weights": [1.0] * len(loss), "ld_alpha": None, "use_weighting": False,
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=tau),
    }  # fmt: skip
    made = trainer(DPOTrainer, **usual | settings)
    rows = order(given)
    policy, reference, leaf = models(given, rows)
    made.model, made.ref_model = policy, reference
    value = made._compute_loss(policy, _inputs(given, rows), return_outputs=False)
    return _said(made, value, leaf)


def kto(given: Sequences, beside: Sequences, label: np.ndarray, **settings: Any) -> tuple[float, np.ndarray, dict]:
    """(loss, gradient [N, LENGTH], metrics) of labelled sequences and the mismatched ones."""
    usual = {"desirable_weight": 1.0, "undesirable_weight": 1.0, "loss_type": "kto"} | settings
    args = SimpleNamespace(gradient_checkpointing_kwargs=None)
    made = trainer(KTOTrainer, args=args, calculate_KL=usual["loss_type"] == "kto", **usual)
    every = np.arange(len(given.logp))
    policy, reference, leaf = models(given, every, beside)
    made.model, made.ref_model = policy, reference
    mismatched = {f"KL_{name}": value for name, value in _inputs(beside, every).items()}
    mismatched["KL_input_ids"] = torch.ones_like(mismatched["KL_input_ids"])
    inputs = _inputs(given, every) | mismatched | {"label": torch.tensor(label)}
    return _said(made, made._compute_loss(policy, inputs, return_outputs=False), leaf)


def orpo(logp: np.ndarray, beta: float) -> tuple[np.ndarray, ...]:
    """(βlog σ, its gradient) of the mean log-probs [2, B] of chosen and rejected."""
    leaf = torch.tensor(logp, requires_grad=True)
    losses = trainer(ORPOTrainer, beta=beta).odds_ratio_loss(*leaf)[0]
    losses.sum().backward()
    return losses.detach().numpy(), leaf.grad.numpy()


def cpo(logp: np.ndarray, **settings: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(loss, rewards [2, B], gradient) of log-probs [2, B] of chosen and rejected."""
    leaf = torch.tensor(logp, requires_grad=True)
    losses, *rewards = trainer(CPOTrainer, **settings).cpo_loss(*leaf)
    losses.sum().backward()
    return losses.detach().numpy(), torch.stack(rewards).numpy(), leaf.grad.numpy()


def _inputs(given: Sequences, rows: np.ndarray) -> dict[str, torch.Tensor]:
    mask = torch.tensor(given.completion[rows])
    return {
        "input_ids": torch.zeros(mask.shape, dtype=torch.long),
        "completion_mask": mask.long(),
        "attention_mask": torch.tensor(given.real[rows]).long(),
    }


def _said(made: Any, value: torch.Tensor, leaf: torch.Tensor) -> tuple[float, np.ndarray, dict[str, float]]:
    value.backward()
    return value.item(), leaf.grad.numpy(), {name: v[-1] for name, v in made._metrics["train"].items()}
