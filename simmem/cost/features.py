"""What makes a product, a gather or a copy take time? The physical features that a cost model is fitted on.

An op is `count` products of `batch` tokens with a matrix of `rows` × `cols`, of the same shape each. Where bytes are
only moved, they are `rows` of `cols` bytes, counted once for each side. With W bytes a matrix and b bytes a parameter:

launches      kernels
weights       count · W                                   bytes out of the level that holds them
activations   count · batch · (rows + cols) · b           inputs and outputs
rows          count · rows                                the end of a dot product, the start of the next
row_starts    count · rows · √(cols · b)                  a prefetcher finds its stride while a row lasts
far_weights   count · max(W − above, 0)                   what no longer fits a cache or the reach of its TLB
passes        count · W for every block of tokens; what is left over is split into powers of two, one pass each
flop          as demanded
far_flop      count · batch · max(W − above, 0) · 2 / b   the same, where it is packed for every block of tokens
tiles         flop of whole tiles: the last of each side is as long as the others, and so is the last wave of tiles on
              the multiprocessors
fit_tiles     the same, where a few tokens get tiles of as few: of 16 and doubled until they fit

Each grows with bytes and flop and has no step in them, so that a sum with non-negative coefficients is monotone and
continuous. A plan does not know the shape of every product, and its rows are no whole numbers: with `whole` False the
last tile of the rows and the last wave count as half full.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmem.spec.costmodel import Term

__all__ = ["Work", "feature"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Work:
    """Ops of one kind; arrays broadcast against each other."""

    launches: Array | float
    count: Array | float
    batch: Array | float
    rows: Array | float
    cols: Array | float
    weight_bytes: Array | float
    """Of all products together. [B]"""
    flop: Array | float
    bytes_per_param: float
    units: int = 1
    """Multiprocessors."""
    whole: bool = True
    """Rows are whole numbers that were measured."""

    def at(self, axis: str) -> Array | float:
        """Rows, columns or batch."""
        return {"rows": self.rows, "cols": self.cols, "batch": self.batch}[axis]


def feature(term: Term, work: Work) -> Array:
    """Amount of a term's feature in each op."""
    w, b = work, work.bytes_per_param
    far = w.count * np.maximum(w.weight_bytes / w.count - term.above_bytes, 0.0)
    match term.feature:
        case "launches":
            found = w.launches
        case "weights":
            found = w.weight_bytes
        case "activations":
            found = w.count * w.batch * (w.rows + w.cols) * b
        case "rows":
            found = w.count * w.rows
        case "row_starts":
            found = w.count * w.rows * np.sqrt(w.cols * b)
        case "far_weights":
            found = far
        case "passes":
            found = w.weight_bytes * _passes(np.asarray(w.batch), term.tile[0])
        case "flop":
            found = w.flop
        case "far_flop":
            found = w.batch * far * (2.0 / b)
        case "tiles":
            found = _tiles(np.asarray(float(term.tile[0])), term.tile[1], w)
        case "fit_tiles":
            fitting = 2.0 ** np.ceil(np.log2(np.maximum(w.batch, 16.0)))
            found = _tiles(np.minimum(fitting, term.tile[0]), term.tile[1], w)
    return np.asarray(found, dtype=np.float64)


def _passes(batch: Array, block: int) -> Array:
    whole, left = np.divmod(np.ceil(batch).astype(np.int64), block)
    return np.asarray(whole + np.bitwise_count(left), dtype=np.float64)


def _tiles(high: Array, wide: int, w: Work) -> Array:
    """Flop of whole tiles of `high` tokens by `wide` rows, and of whole waves of them."""
    # Bytes of the context are read but not multiplied by every token: no more parameters than there is flop for.
    params = np.minimum(w.weight_bytes / w.bytes_per_param, w.flop / (2.0 * np.maximum(w.batch, 1.0)))
    rows = params / np.maximum(w.count * w.cols, 1e-300)
    across = np.ceil(w.batch / high)
    if w.whole:
        waves = np.ceil(across * np.ceil(np.round(rows) / wide) / w.units)
    else:
        along = rows if wide == 1 else np.maximum(rows / wide + 0.5, 1.0) * np.minimum(rows, 1.0)
        waves = across * along / w.units
        if w.units > 1:
            waves = np.maximum(waves + 0.5, 1.0) * np.minimum(rows, 1.0)
    return np.asarray(2.0 * w.count * w.cols * high * wide * w.units * waves)
