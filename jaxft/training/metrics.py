"""Throughput, model FLOP utilisation and device memory, as numbers for the log."""

import collections
import time
from collections.abc import Callable

import jax

# Dense bfloat16 peak of one device, FLOP/s, by the start of jax.Device.device_kind; vendors' data sheets.
PEAK_FLOPS: dict[str, float] = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A10": 125e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 123e12,
    "TPU v2": 45e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak of a device, or None if it is not in the table (a CPU, say)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if device_kind.startswith(name)), None)


def memory() -> dict[str, float]:
    """``memory_gb``: the most any local device has held at once; empty where the backend does not say (a CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return {"memory_gb": max(known) / 1e9} if known else {}


class Meter:
    """Tokens per second over the last steps, and what share of the devices' peak that is."""

    def __init__(self, flops_per_token: float | None, window: int = 20, clock: Callable[[], float] = time.perf_counter):
        """``flops_per_token``: of forward and backward pass, recomputation not counted; None if not known."""
        devices = jax.devices()
        peak = peak_flops(devices[0].device_kind)
        self.ceiling = None if peak is None or not flops_per_token else peak * len(devices) / flops_per_token
        self.clock = clock
        self.marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=window + 1)

    def add(self, tokens: int) -> None:
        """A step of that many tokens has just finished. The first one only starts the clock: it compiled."""
        self.marks.append((self.clock(), tokens))

    def pause(self) -> None:
        """Something else than training takes place now (evaluation, say); it does not count."""
        self.marks.clear()

    def rates(self) -> dict[str, float]:
        """``tokens_per_second``, ``steps_per_second``, ``mfu`` (0 to 1); what is not known is left out."""
        if len(self.marks) < 2:
            return {}
        seconds = max(self.marks[-1][0] - self.marks[0][0], 1e-9)
        speed = sum(tokens for _, tokens in list(self.marks)[1:]) / seconds
        out = {"tokens_per_second": speed, "steps_per_second": (len(self.marks) - 1) / seconds}
        return out if self.ceiling is None else {**out, "mfu": speed / self.ceiling}
