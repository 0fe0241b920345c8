"""Which units come first where the most frequent ones do? The order that fills a share of a class of `HotTable`.

A class holds units that profile tokens used equally often (or nearly, of a long profile), and a plan says how many of
them are hot, not which. Whoever has to know takes the most used first, and of equally used ones the lowest number.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simmem.trace.trace import Trace

__all__ = ["first_units"]

Ints = NDArray[np.int64]


def first_units(trace: Trace, tokens: Ints, counts: Ints) -> NDArray[np.bool_]:
    """The `counts` (L,) units of each layer that the tokens of a trace outside `tokens` used most, (L, U).

    tokens : (T,) indices of the tokens that are timed.
    """
    header = trace.header
    used = np.zeros((header.n_layers, header.n_units), np.int64)
    for token in np.setdiff1d(np.arange(header.n_tokens), tokens).tolist():
        used += np.unpackbits(trace.active[token], axis=1, count=header.n_units, bitorder="little")
    found = np.zeros(used.shape, np.bool_)
    for layer, order in enumerate(np.argsort(-used, axis=1, kind="stable")):
        found[layer, order[: counts[layer]]] = True
    return found
