"""How often is every unit used, and how many of the units that a token uses are the frequent ones?

A hot/cold placement ranks units by frequency. Ranked by the very tokens that are timed afterwards, the hot ones would
always be the right ones; so frequencies come from tokens of the same trace that are not timed (PowerInfer, arXiv
2312.12456, §6.1: profiled on general text, used on other tasks). Units that were used equally often are alike:
they form a class, and which of a class lie where is left open.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmem.errors import TraceError
from simmem.trace.trace import Trace

__all__ = ["MAX_CLASSES", "HotTable", "hot_table"]

Ints = NDArray[np.int64]

MAX_CLASSES = 64
"""Classes of frequency at most; of a longer profile, counts that lie next to each other share one."""


@dataclass(frozen=True)
class HotTable:
    """Classes of equally frequent units, most frequent first. C classes, L layers, T tokens."""

    frequency: NDArray[np.float64]
    """(L, C) mean share of the profile tokens that used a unit of the class; 0 where the class is empty."""
    units: Ints
    """(L, C) units in the class; a layer's sum to all of its units."""
    active: Ints
    """(T, L, C) units of the class that a timed token uses."""
    profile_tokens: int


def hot_table(trace: Trace, tokens: Ints) -> HotTable:
    """Classes by frequency over the tokens of a trace that are not in `tokens`, and what those in `tokens` use of them.

    Parameters
    ----------
    tokens : (T,) indices of the tokens that are timed.

    Raises
    ------
    TraceError
        Every token of the trace is timed: none is left to rank units by.
    """
    header = trace.header
    profile = np.setdiff1d(np.arange(header.n_tokens), tokens)
    if not len(profile):
        raise TraceError(f"has {header.n_tokens} tokens, all of which are timed: none is left to tell hot from cold",
                         key=header.name)
    used = np.zeros((header.n_layers, header.n_units), np.uint16 if len(profile) < 1 << 16 else np.uint32)
    for token in profile.tolist():
        used += np.unpackbits(trace.active[token], axis=1, count=header.n_units, bitorder="little")
    floors = _floors(used, len(profile))
    # The class of each unit, and one table of them for all layers: counting is then counting numbers.
    n_classes = len(floors)
    of_count = len(floors) - np.searchsorted(floors[::-1], np.arange(len(profile) + 1), side="right")
    place = (of_count[used] + n_classes * np.arange(header.n_layers)[:, None]).astype(np.int64)
    size = n_classes * header.n_layers
    shape = header.n_layers, n_classes
    units = np.bincount(place.reshape(-1), minlength=size).reshape(shape)
    uses = np.bincount(place.reshape(-1), used.reshape(-1), size).reshape(shape)
    active = np.empty((len(tokens), *shape), np.int64)
    for row, token in enumerate(tokens.tolist()):
        bits = np.unpackbits(trace.active[token], axis=1, count=header.n_units, bitorder="little")
        active[row] = np.bincount(place.take(np.flatnonzero(bits.view(np.bool_))), minlength=size).reshape(shape)
    return HotTable(uses / np.maximum(units, 1) / len(profile), units, active, len(profile))


def _floors(used: NDArray[np.unsignedinteger], n_profile: int) -> Ints:
    """Least count of each class, falling, the last 0; no two classes are the same set of units."""
    seen = np.flatnonzero(np.bincount(used.reshape(-1), minlength=n_profile + 1))
    if len(seen) > MAX_CLASSES:
        seen = seen[np.unique(np.linspace(0, len(seen) - 1, MAX_CLASSES).round().astype(np.int64))]
    found: Ints = np.unique(np.append(seen[1:], 0))[::-1].astype(np.int64)
    return found
