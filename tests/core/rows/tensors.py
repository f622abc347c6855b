"""Rows of the methods whose update is made of tensors other than two factors."""

from jaxft.peft import FourierFT, LoHa, LoKr, LoRA, MiSS, RandLora, SHiRA, VeRA
from tests.core.rows.build import Row, adapted, affine, matrix

W = ("w",)
RANKS = {"0.w": 1, "2.w": 2}

ROWS: dict[str, Row] = {
    "vera": Row(adapted(matrix, VeRA(rank=5, targets=W))),
    "vera on some layers in affine, dropout": Row(adapted(affine, VeRA(rank=5, targets=W, dropout=0.5, layers=(0, 2)))),
    "vera on lora": Row(adapted(matrix, LoRA(rank=2, targets=W), VeRA(rank=5, targets=W))),
    "loha": Row(adapted(matrix, LoHa(rank=3, targets=W))),
    "loha ranks by layer, on some, in affine": Row(
        adapted(affine, LoHa(rank=3, targets=W, layers=(0, 2), rank_pattern=RANKS, alpha_pattern={"2.w": 2}))
    ),
    "lokr": Row(adapted(matrix, LoKr(rank=4, targets=W))),
    "lokr of products, ranks by layer, on some, in affine": Row(
        adapted(
            affine,
            LoKr(
                rank=1, alpha=2, decompose_both=True, decompose_factor=5, targets=W, layers=(0, 2), rank_pattern=RANKS
            ),
        )
    ),
    "randlora": Row(adapted(matrix, RandLora(rank=3, alpha=6, targets=W))),
    "randlora from wide to narrow, sparse, on some layers in affine, dropout": Row(
        adapted(
            affine,
            RandLora(rank=4, alpha=8, basis="sparse", targets=W, dropout=0.5, layers=(0, 2)),
            sizes=(14, 10),
        )
    ),
    "fourierft": Row(adapted(matrix, FourierFT(frequencies=4, scale=30, targets=W))),
    "fourierft normal, numbers by layer, on some, in affine": Row(
        adapted(
            affine,
            FourierFT(
                frequencies=4, scale=30, seed=1, init="normal", targets=W, layers=(0, 2), frequencies_pattern=RANKS
            ),
        ),
        identity=False,
    ),
    "shira": Row(adapted(matrix, SHiRA(rank=2, targets=W)), dense_gradient=True),
    "shira on some layers in affine": Row(
        adapted(affine, SHiRA(rank=5, targets=W, layers=(0, 2))), dense_gradient=True
    ),
    "miss": Row(adapted(matrix, MiSS(rank=5, targets=W))),
    "miss filled up, on some layers in affine, dropout": Row(
        adapted(affine, MiSS(rank=4, targets=W, dropout=0.5, layers=(0, 2)))
    ),
    "miss mini": Row(adapted(matrix, MiSS(rank=3, variant="mini", mini_rank=7, targets=W))),
    "miss bat": Row(adapted(matrix, MiSS(rank=2, variant="bat", targets=W)), dense_gradient=True),
    "miss bat on lora, on some layers in affine": Row(
        adapted(affine, LoRA(rank=2, targets=W), MiSS(rank=2, variant="bat", targets=W, layers=(0, 2))),
        dense_gradient=True,
    ),
}
