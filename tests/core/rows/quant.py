"""Packed weights, and methods on them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxft import peft
from jaxft.core.weight import Affine
from jaxft.peft import METHODS
from jaxft.quant import eight_bit, four_bit, groups
from jaxft.testing.subject import IN, OUT, Row, adapted, affine, matrix

SIZES = (32, 48)


def packed(key, dtype, sizes=SIZES, kind="nf4"):
    """A plain stack of matrices in four bits."""
    return four_bit.quantize(matrix(key, dtype, sizes), kind, block_size=32)


def with_bias(key, dtype, sizes=SIZES):
    """A packed stack of matrices with biases."""
    made = affine(key, dtype, sizes)
    return Affine(four_bit.quantize(made.base, block_size=32), made.bias)


def eight(key, dtype, sizes=(IN, OUT), kind="int8"):
    """A plain stack of matrices in eight bits, multiplied exactly."""
    return eight_bit.quantize(matrix(key, dtype, sizes), kind, exact=True)


def eight_with_bias(key, dtype, sizes=(IN, OUT)):
    """A stack of matrices in eight bits with biases."""
    made = affine(key, dtype, sizes)
    return Affine(eight_bit.quantize(made.base, exact=True), made.bias)


def in_groups(key, dtype, sizes=SIZES, bits=4, symmetric=True):
    """A plain stack of matrices in groups of integers."""
    return groups.quantize(matrix(key, dtype, sizes), bits, 16, symmetric)


def by_activation(key, dtype, sizes=SIZES):
    """The same with zero points, and rows of any group."""
    made = in_groups(key, dtype, sizes, symmetric=False)
    order = jax.random.permutation(key, jnp.repeat(jnp.arange(2), sizes[0] // 2)).astype(jnp.int32)
    return dataclasses.replace(made, group=jnp.broadcast_to(order, made.shape[:-1]))


ROWS = {
    "nf4": Row(packed, embedding=True),
    "fp4": Row(functools.partial(packed, kind="fp4"), embedding=True),
    "int8": Row(functools.partial(eight, kind="int8"), embedding=True),
    "fp8": Row(functools.partial(eight, kind="fp8"), embedding=True),
    "int4": Row(in_groups, embedding=True),
    "int8 blockwise": Row(functools.partial(in_groups, bits=8, symmetric=False), embedding=True),
    "int4 in order of activation": Row(by_activation, embedding=True),
    "lora on int4": Row(adapted(by_activation, peft.LoRA(rank=4, targets=("w",)), sizes=SIZES)),
    "lora on int8 in affine": Row(adapted(eight_with_bias, peft.LoRA(rank=4, targets=("w",)))),
    "lora on nf4": Row(adapted(packed, peft.LoRA(rank=4, targets=("w",)), sizes=SIZES)),
    "dora on nf4 in affine": Row(adapted(with_bias, peft.DoRA(rank=4, targets=("w",)), sizes=SIZES)),
    "ia3 around nf4": Row(adapted(with_bias, METHODS["ia3"].config(targets=("w",)), sizes=SIZES)),
    "oft on nf4": Row(adapted(packed, METHODS["oft"].config(targets=("w",), block_size=8), sizes=SIZES)),
    "lora pissa on nf4": Row(adapted(packed, peft.LoRA(rank=4, init="pissa", targets=("w",)), sizes=SIZES)),
}
