"""The check that the base is only read finds a base that is stacked again."""

import jax
import pytest

from jaxft.peft import LoRA
from jaxft.testing import structure_checks
from jaxft.testing.claims import Broken
from jaxft.testing.subject import Row, Subject, adapted, matrix


def test_a_base_that_is_stacked_again_is_found(monkeypatch):
    subject = Subject(Row(adapted(matrix, LoRA(rank=2, targets=("w",)))))
    structure_checks.scan_does_not_restack_the_base(subject)
    right = structure_checks.loss

    def wasteful(trainable, frozen, x):
        copied = jax.lax.map(lambda w: w * x[0, 0], frozen.base)
        return right(trainable, frozen, x) * copied.sum()

    monkeypatch.setattr(structure_checks, "loss", wasteful)
    with pytest.raises(Broken, match="is written"):
        structure_checks.scan_does_not_restack_the_base(subject)
