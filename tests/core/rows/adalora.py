"""Rows of AdaLoRA."""

from jaxft.peft import AdaLoRA
from tests.core.rows.build import Row, adapted, affine, matrix

W = AdaLoRA(rank=2, init_rank=3, targets=("w",))
SOME = AdaLoRA(rank=2, init_rank=4, alpha=5.0, dropout=0.5, layers=(0, 2), targets=("w",))

ROWS: dict[str, Row] = {
    "adalora": Row(adapted(matrix, W)),
    "adalora in affine, dropout, some layers": Row(adapted(affine, SOME)),
}
