"""Names for element types that JAX has no dtype of: what a packed weight answers when asked for its ``dtype``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PackedDType:
    """An element type of few bits. It compares equal to its name."""

    name: str
    bits: float
    """Bits of one element's code, its share of the scales left out."""

    def __eq__(self, other: object) -> bool:
        return self.name == getattr(other, "name", other)

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__


BITS = {"nf4": 4, "fp4": 4, "int4": 4, "int8": 8, "fp8": 8}
DTYPES = {name: PackedDType(name, bits) for name, bits in BITS.items()}
