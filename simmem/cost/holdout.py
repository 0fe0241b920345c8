"""Which measured products may a cost model be fitted on, and which are kept to judge it by?

Products of one weight matrix share a kernel and its quirks, so a random split of points would let a model see nearly
the answer. Whole families go to one side instead: the matrix, its transpose, and every precision, batch, level and
number of threads they were measured with. Which side is a property of the family alone, whatever else was measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from simmem.spec.measurement import Measurement

__all__ = ["family", "held_out"]


def family(point: Measurement) -> str | None:
    """The pair of sides of the weight matrix, the smaller first; None for what is no matrix product."""
    sides = [point.conditions.get(side) for side in ("rows", "cols")]
    if not all(isinstance(side, int) for side in sides):
        return None
    return "x".join(str(side) for side in sorted(int(side) for side in sides if side is not None))


def held_out(points: Iterable[Measurement], *, share: float = 0.5, salt: str = "") -> NDArray[np.bool_]:
    """Which points to judge by: about `share` of the families, (n_points,); False for what is no matrix product.

    Another `salt` is another split.
    """
    chosen = []
    for point in points:
        name = family(point)
        digest = hashlib.sha256(f"{salt}{name}".encode()).digest()
        chosen.append(name is not None and int.from_bytes(digest[:8]) < share * 2**64)
    return np.array(chosen, dtype=np.bool_)
