"""Random matrices as GPTQModel, AutoAWQ, HQQ and compressed-tensors store them: word by word, from the formats'
definitions, each with the matrix [out, in] that it stands for. Nothing here is shared with the code that reads them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tests.checkpoint import files

Made = tuple[dict[str, np.ndarray], np.ndarray]
LINEAR = r"(q|k|v|o|gate|up|down|qkv|gate_up)_proj\.weight$|c_attn\.weight$|c_proj\.weight$|c_fc\.weight$"


def words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """int32: each row of numbers in words, the first in the lowest bits."""
    out = np.zeros((len(numbers), numbers.shape[1] * bits // 32), np.uint32)
    for i in range(numbers.shape[1]):
        out[:, i * bits // 32] |= numbers[:, i].astype(np.uint32) << np.uint32(i * bits % 32)
    return out.view(np.int32)


def drawn(r, rows: int, columns: int, bits: int, count: int):
    """Codes [in, out], scales float16[groups, out] and whole zero points [groups, out]."""
    scale = r.uniform(0.01, 0.03, (count, columns)).astype(np.float16)
    return r.integers(0, 2**bits, (rows, columns)), scale, r.integers(0, 2**bits, (count, columns))


def gptq(r, columns: int, rows: int, bits=4, size=16, form="gptq", desc_act=False, sym=False) -> Made:
    whole = rows if size == -1 else size
    count = -(-rows // whole)
    codes, scale, zero = drawn(r, rows, columns, bits, count)
    zero = np.full_like(zero, 2 ** (bits - 1)) if sym else zero
    of = np.arange(rows) // whole
    of = r.permutation(of) if desc_act else of
    kept = (zero - 1) % 2**bits if form == "gptq" else zero
    made = {"qweight": words(codes.T, bits).T, "qzeros": words(kept, bits), "scales": scale, "g_idx": of}
    return made | {"g_idx": of.astype(np.int32)}, ((codes - zero[of]) * scale[of].astype(np.float64)).T


def awq(r, columns: int, rows: int, size=16) -> Made:
    codes, scale, zero = drawn(r, rows, columns, 4, rows // size)
    order = [8 * i + j for i in range(columns // 8) for j in (0, 2, 4, 6, 1, 3, 5, 7)]
    of = np.arange(rows) // size
    made = {"qweight": words(codes[:, order], 4), "qzeros": words(zero[:, order], 4), "scales": scale}
    return made, ((codes - zero[of]) * scale[of].astype(np.float64)).T


def hqq(r, columns: int, rows: int, bits=4, size=16, as_float=False, **changes) -> Made:
    codes = r.integers(0, 2**bits, (columns * rows // size, size)).astype(np.uint8)
    scale = r.uniform(0.01, 0.03, (len(codes), 1)).astype(np.float16)
    zero = r.uniform(0, 2**bits - 1, (len(codes), 1)).astype(np.float16)
    half = len(codes) // 2
    stored = codes if bits == 8 else (codes[:half] << 4) | codes[half:]
    numbers = {"nbits": bits, "group_size": size, "axis": 1} | changes
    flags = {"view_as_float": as_float, "channel_wise": True, "optimize": True, "round_zero": False}
    flags |= {"quant_scale": False, "quant_zero": False, "offload_meta": False, "encoded_state_dict": True}
    text = np.frombuffer(b"4bit_u8" if bits == 4 else b"8bit_u8", np.uint8)
    made = {"W_q": stored.view(np.float16) if as_float else stored, "scale": scale, "zero": zero, "packing": text}
    made |= {"shape": np.asarray([columns, rows], np.int64), "stores_quant_config": np.uint8(1)}
    made |= {name: np.int32(n) for name, n in numbers.items()} | {name: np.uint8(on) for name, on in flags.items()}
    value = (codes.astype(np.float64) - zero) * scale
    return {name: np.asarray(array) for name, array in made.items()}, value.reshape(columns, rows)


def compressed(r, columns: int, rows: int, bits=4, size=16, sym=False, desc_act=False) -> Made:
    count = 1 if size == -1 else rows // size
    codes, scale, zero = drawn(r, rows, columns, bits, count)
    zero = np.full_like(zero, 2 ** (bits - 1)) if sym else zero
    of = np.arange(rows) // (rows // count)
    of = r.permutation(of) if desc_act else of
    made = {"weight_packed": words(codes.T, bits), "weight_scale": np.ascontiguousarray(scale.T)}
    made |= {"weight_shape": np.asarray([columns, rows], np.int64)}
    made |= {} if sym else {"weight_zero_point": words(zero, bits).T}  # neighbours of a column of [out, groups]
    made |= {"weight_g_idx": of.astype(np.int32)} if desc_act else {}
    return made, ((codes - zero[of]) * scale[of].astype(np.float64)).T


def write(source: Path, out: Path, make: Callable[..., Made], config: dict, only=LINEAR, bias=False, beside=None):
    """``out/packed``, the checkpoint with random packed matrices in the place of those that ``only`` finds, and
    ``out/dense`` with what they stand for. ``bias``: zeros are saved beside each, as AutoGPTQ did. ``beside``: a file
    of its own for the settings."""
    r = np.random.default_rng(0)
    plain = {name: torch.tensor(array) for name, array in files.read(source).items()}
    packed, dense = {}, {}
    for name, tensor in plain.items():
        if not re.search(only, name):
            packed[name] = dense[name] = tensor
            continue
        conv1d = "c_" in name  # [in, out] on disk
        columns, rows = tensor.shape[::-1] if conv1d else tensor.shape
        parts, value = make(r, columns, rows)
        module = name.removesuffix("weight")
        packed |= {module + key: torch.tensor(np.ascontiguousarray(array)) for key, array in parts.items()}
        dense[name] = torch.tensor(np.ascontiguousarray(value.T if conv1d else value), dtype=torch.float32)
        if bias and f"{module}bias" not in plain:
            packed[f"{module}bias"] = torch.zeros(columns, dtype=torch.float16)
    for folder, tensors in (("packed", packed), ("dense", dense)):
        (out / folder).mkdir(parents=True)
        raw = json.loads((source / "config.json").read_text())
        if folder == "packed" and beside is None:
            raw["quantization_config"] = config
        (out / folder / "config.json").write_text(json.dumps(raw))
        save_file({k: t.contiguous() for k, t in tensors.items()}, out / folder / "model.safetensors")
    if beside is not None:
        (out / "packed" / beside).write_text(json.dumps(config))
    return out / "packed", out / "dense"
