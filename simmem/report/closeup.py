"""Which ops of a decode step are worth drawing? Those that held a stream, and, close up, those of a few layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmem.sim.timeline import Timeline

__all__ = ["CloseUp", "begin_s", "close_up", "worked"]

_LAYERS = 3


@dataclass(frozen=True)
class CloseUp:
    """Neighbouring layers, and when their arithmetic begins and ends, counted from the begin of the step. [s]"""

    layers: tuple[int, ...]
    low_s: float
    high_s: float


def begin_s(timeline: Timeline) -> float:
    """When the timed (last) token begins: where the one before it ends. [s]"""
    ends = timeline.token_end_s
    return float(ends[-2]) if len(ends) > 1 else 0.0


def worked(timeline: Timeline) -> NDArray[np.bool_]:
    """Ops of the step that held their stream, shape (n_ops,)."""
    held: NDArray[np.bool_] = (timeline.free_s > timeline.start_s) & timeline.schedule.timed
    return held


def close_up(timeline: Timeline) -> CloseUp | None:
    """Three layers from the middle of those that compute; None where none does."""
    s, begin = timeline.schedule, begin_s(timeline)
    computes = worked(timeline) & np.array([c.agent is not None for c in s.classes])[s.op_class]
    layers = np.unique(s.op_layer[computes])
    first = max((len(layers) - _LAYERS) // 2, 0)
    chosen = layers[first: first + _LAYERS]
    ops = np.flatnonzero(computes & np.isin(s.op_layer, chosen))
    if not len(ops):
        return None
    return CloseUp(tuple(chosen.tolist()), float(timeline.start_s[ops].min()) - begin,
                   float(timeline.free_s[ops].max()) - begin)
