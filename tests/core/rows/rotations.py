"""Rows of the methods that turn or scale the input or the output."""

from jaxft.peft import BOFT, HRA, IA3, OFT, LoRA, RoAd
from tests.core.rows.build import Row, adapted, affine, embedding, matrix

LORA = LoRA(rank=2, targets=("w",))
W = ("w",)

ROWS: dict[str, Row] = {
    "oft exact": Row(adapted(matrix, OFT(targets=W, block_size=5, neumann_terms=None))),
    "oft coft": Row(adapted(matrix, OFT(targets=W, blocks=2, coft_eps=0.5, neumann_terms=2))),
    "oft shared, in affine": Row(adapted(affine, OFT(targets=W, block_size=5, block_share=True, neumann_terms=3))),
    "oft on some layers": Row(adapted(matrix, OFT(targets=W, layers=(0, 2)))),
    "oft on lora": Row(adapted(matrix, LORA, OFT(targets=W, block_size=5))),
    "oft embedding": Row(embedding(OFT(targets=("embed",), block_size=7), tied=False), embedding=True),
    "oft embedding, tied head": Row(embedding(OFT(targets=("embed",), block_size=7), tied=True), embedding=True),
    "oft on a tied head": Row(embedding(OFT(targets=("lm_head",), block_size=7), tied=True), embedding=True),
    "boft": Row(adapted(matrix, BOFT(targets=W, block_size=5))),
    "boft butterfly, dropout": Row(
        adapted(matrix, BOFT(targets=W, block_size=2, factors=3, dropout=0.5), sizes=(16, 14)),
    ),
    "boft in affine, on some layers": Row(adapted(affine, BOFT(targets=W, blocks=5, layers=(0, 2)))),
    "boft on lora": Row(adapted(affine, LORA, BOFT(targets=W, block_size=5))),
    "hra gram-schmidt": Row(adapted(matrix, HRA(targets=W, rank=3, gram_schmidt=True)), identity=False),
    "hra odd": Row(adapted(matrix, HRA(targets=W, rank=3)), identity=False),
    "hra in affine, on some layers": Row(adapted(affine, HRA(targets=W, rank=4, layers=(0, 2)))),
    "hra on lora": Row(adapted(matrix, LORA, HRA(targets=W, rank=4))),
    "road": Row(adapted(matrix, RoAd(targets=W, group_size=14))),
    "road_2 around affine": Row(adapted(affine, RoAd(targets=W, group_size=2, variant="road_2"))),
    "road_4 on some layers": Row(adapted(affine, RoAd(targets=W, group_size=14, variant="road_4", layers=(0, 2)))),
    "road on lora": Row(adapted(affine, LORA, RoAd(targets=W, group_size=2))),
    "ia3 around affine": Row(adapted(affine, IA3(targets=W))),
    "ia3 feedforward": Row(adapted(affine, IA3(targets=W, feedforward=W))),
    "ia3 on some layers": Row(adapted(matrix, IA3(targets=W, layers=(0, 2)))),
    "ia3 on lora": Row(adapted(affine, LORA, IA3(targets=W, feedforward=W))),
}  # fmt: skip
