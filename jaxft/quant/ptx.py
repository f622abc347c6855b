"""Look-ups in a table of 16 numbers as NVIDIA machine instructions: ``prmt`` picks four bytes of eight by four indices.

A GPU gathers single numbers slowly and a tree of selects takes four times as many instructions. The index is split: its
low three bits pick from either half of the table, its high bit, spread over a byte, picks the half.
"""

import functools

import jax.numpy as jnp
import numpy as np

_HALVES = "lop3.b32 {0}, b, a, m, 0xe4;"  # where m: b, else a


def _picks(plane: np.ndarray, name: str) -> list[str]:
    """The bytes of ``plane`` (uint8[16]) at the four indices in ``s``, whose high bits are the bytes of ``m``."""
    table = [f"0x{word:08x}" for word in plane.view("<u4")]
    return [f"prmt.b32 a, {table[0]}, {table[1]}, s;", f"prmt.b32 b, {table[2]}, {table[3]}, s;", _HALVES.format(name)]


@functools.cache
def float32(values: tuple[float, ...], high: bool) -> str:
    """Of four bytes: float32 of the high, or the low, four bits of each."""
    planes = np.array(values, "<f4").view(np.uint8).reshape(16, 4).T.copy()
    lines = ["shr.u32 s, $4, 4;", "mov.b32 m, $4;"] if high else ["mov.b32 s, $4;", "shl.b32 m, $4, 4;"]
    lines += ["and.b32 s, s, 0x07070707;", "prmt.b32 m, m, m, 0xba98;", "shr.u32 a, s, 4;", "or.b32 s, s, a;"]
    lines += ["prmt.b32 s, s, 0, 0x4420;"]
    for number, plane in enumerate(planes):
        lines += _picks(plane, f"p{number}")
    for first, order in ((0, "0x5140"), (2, "0x7362")):
        lines += [f"prmt.b32 a, p0, p1, {order};", f"prmt.b32 b, p2, p3, {order};"]
        lines += [f"prmt.b32 ${first}, a, b, 0x5410;", f"prmt.b32 ${first + 1}, a, b, 0x7632;"]
    return _block(lines, "s, m, a, b, p0, p1, p2, p3")


@functools.cache
def bfloat16_pairs(values: tuple[float, ...]) -> str:
    """Of four bytes: a word for each, bfloat16 of its low four bits below that of its high four."""
    planes = np.array(values, "<f4").astype(jnp.bfloat16).view(np.uint8).reshape(16, 2).T.copy()
    lines = ["and.b32 s, $4, 0x77777777;", "shl.b32 t, $4, 4;"]
    for first, signs in ((0, "0xd9c8"), (2, "0xfbea")):
        lines += [f"prmt.b32 m, t, $4, {signs};", *_picks(planes[0], "p0"), *_picks(planes[1], "p1")]
        lines += [f"prmt.b32 ${first}, p0, p1, 0x5140;", f"prmt.b32 ${first + 1}, p0, p1, 0x7362;"]
        lines += ["shr.u32 s, s, 16;"] if first == 0 else []
    return _block(lines, "s, t, m, a, b, p0, p1")


def _block(lines: list[str], registers: str) -> str:
    return "\n".join(["{", f".reg .b32 {registers};", *lines, "}"])


CONSTRAINTS = "=r,=r,=r,=r,r"
"""Of the registers: four words out of one."""
