"""Rows of Houlsby's adapters, which stand around a projection and are no map on it."""

from jaxft.peft import Houlsby, LoRA
from tests.core.rows.build import Row, adapted, affine, matrix

W = Houlsby(reduction_factor=4, targets=("w",))
ZERO = Houlsby(reduction_factor=4, targets=("w",), init="zero", scale=3.0, dropout=0.5, layers=(0, 2))

ROWS: dict[str, Row] = {
    "houlsby": Row(adapted(matrix, W), identity=False, matrix=False),
    "houlsby from zero around a bias, dropout, some layers": Row(adapted(affine, ZERO), matrix=False),
    "houlsby around lora": Row(
        adapted(affine, LoRA(rank=3, targets=("w",)), W), identity=False, matrix=False
    ),
}  # fmt: skip
