"""Rows of biases that are added."""

from jaxft.peft import BitFit, LoRA
from tests.core.rows.build import Row, adapted, affine, matrix

W = BitFit(targets=("w",))

ROWS: dict[str, Row] = {
    "bitfit": Row(adapted(matrix, W)),
    "bitfit on a bias": Row(adapted(affine, W)),
    "bitfit on some layers": Row(adapted(matrix, BitFit(targets=("w",), layers=(0, 2)))),
    "bitfit on lora": Row(adapted(matrix, LoRA(rank=2, targets=("w",)), W)),
    "lora in bitfit": Row(adapted(matrix, W, LoRA(rank=2, targets=("w",)))),
}
