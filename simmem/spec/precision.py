"""How many bytes does a parameter take at a precision, and on which units does it compute?

Below 8 bits weights are stored in groups of 64 with an fp16 scale and an fp16 zero point, so
each parameter carries 32/64 = 0.5 bit more than its name says. Norms and biases (vectors) stay
at 16 bits or more, as every common quantiser leaves them.
"""

from __future__ import annotations

from typing import Literal

from simmem.errors import SpecError

__all__ = ["COMPUTE_FALLBACK", "FILE", "PRECISIONS", "matrix_bytes_per_param", "vector_bytes_per_param"]

GROUP_SIZE = 64
GROUP_OVERHEAD_BITS = 32

_BITS = {"fp32": 32.0, "fp16": 16.0, "bf16": 16.0, "int8": 8.0, "int4": 4.0, "int3": 3.0, "int2": 2.0}
PRECISIONS = tuple(_BITS)
FILE = "file"
"""Every tensor at the precision it has in the file the model was read from (GGUF, quantised checkpoints)."""

COMPUTE_FALLBACK: dict[str, tuple[Literal["fp32", "fp16", "bf16", "int8"], ...]] = {
    "fp32": ("fp32",),
    "fp16": ("fp16", "fp32"),
    "bf16": ("bf16", "fp16", "fp32"),
    "int8": ("fp16", "fp32"),
    "int4": ("fp16", "fp32"),
    "int3": ("fp16", "fp32"),
    "int2": ("fp16", "fp32"),
    FILE: ("fp16", "fp32"),
}
"""Weight-only quantisation: weights are expanded before the multiply, so int weights compute as fp16."""


def matrix_bytes_per_param(precision: str) -> float:
    """Bytes per parameter of a weight matrix, scales and zeros included. [B]"""
    if precision not in _BITS:
        raise SpecError(f"found {precision!r}, expected one of {', '.join(PRECISIONS)}", key="weights")
    bits = _BITS[precision]
    return (bits + (GROUP_OVERHEAD_BITS / GROUP_SIZE if bits < 8 else 0.0)) / 8


def vector_bytes_per_param(precision: str) -> float:
    """Bytes per parameter of a norm or bias. [B]"""
    return max(2.0, matrix_bytes_per_param(precision))
