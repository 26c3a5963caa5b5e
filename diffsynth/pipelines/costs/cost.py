"""The cost of a computation."""

from typing import NamedTuple


class Cost(NamedTuple):
    """Bytes of live tensors at the worst moment, and floating-point operations."""

    nbytes: int
    flops: float
