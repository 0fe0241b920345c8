"""Which units should lie in the fast memory, so that two agents side by side are done soonest, and how close is that?

A decode step runs through *stages* (the attention of a layer, its FFN). In each, a fast agent multiplies what lies in
its memory and a slow one the rest, at the same time, and they meet: T = max(fast load · s_f, slow load · s_s), and a
join where the slow one has anything at all. PowerInfer (arXiv 2312.12456, §6.3) puts the most frequent units on the
GPU under its capacity, by an integer program; here the time itself is minimised. Within a stage the most frequent units
come first, whatever their number, so T is a function of the bytes placed; under one capacity the sum of such functions
is bounded from below by the sum of their lower convex hulls (Lagrange), and following the steepest segments first comes
within one segment of it. No solver is needed: the bound is the relaxed program's, and so the gap to it is known.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Balance", "Placed", "Stage", "balanced", "stage_seconds"]

Array = NDArray[np.float64]
_SLACK = 1e-9


@dataclass(frozen=True)
class Stage:
    """Units that two agents share in one stage of a step: classes of alike units, most frequent first. (C,) each."""

    frequency: Array
    """Share of the steps that multiply a unit of the class."""
    units: Array
    unit_bytes: float
    join_s: float
    """What it takes longer where the slow agent has a unit at all: handing over, kernels, handing back. [s]"""


@dataclass(frozen=True)
class Placed:
    """What lies in the fast memory under each of several capacities."""

    units: tuple[Array, ...]
    """Per stage (C, n_rooms): whole units of each class."""
    seconds: Array
    """Expected seconds of all stages so, (n_rooms,). [s]"""
    bound_s: Array
    """No placement under that capacity takes less, (n_rooms,). [s]"""

    @property
    def gap(self) -> Array:
        """Share by which a better placement could at most be faster, (n_rooms,)."""
        return np.asarray(np.maximum(1.0 - self.bound_s / np.maximum(self.seconds, 1e-300), 0.0))


def stage_seconds(stage: Stage, units: Array, fast_s: float, slow_s: float) -> Array:
    """Expected seconds of a stage with `units` (C, n) of each class in fast memory, (n,). [s]

    fast_s, slow_s : seconds a byte that each agent multiplies out of its memory.
    """
    load = (stage.frequency * stage.unit_bytes)[:, None]
    there = (load * units).sum(axis=0)
    left = (load * (stage.units[:, None] - units)).sum(axis=0)
    joined = (stage.units[:, None] - units).sum(axis=0) > 0
    return np.asarray(np.maximum(there * fast_s, left * slow_s) + joined * stage.join_s)


@dataclass(frozen=True)
class _Segment:
    """A piece of the lower convex hull of a stage's seconds over its bytes in fast memory."""

    stage: int
    begin_bytes: float
    end_bytes: float
    slope: float
    """Seconds a byte; below 0."""


def balanced(stages: Sequence[Stage], rooms_bytes: Array, fast_s: float, slow_s: float) -> Placed:
    """The units that lie in the fast memory when it has room for so many bytes.

    Parameters
    ----------
    rooms_bytes : (n_rooms,) capacities; below 0 counts as none. [B]
    fast_s, slow_s : seconds a byte that each agent multiplies out of its memory.
    """
    return Balance(stages, fast_s, slow_s).at(rooms_bytes)


class Balance:
    """What `balanced` knows before it is told a capacity; each capacity is looked at once."""

    def __init__(self, stages: Sequence[Stage], fast_s: float, slow_s: float) -> None:
        self.stages, self.fast_s, self.slow_s = tuple(stages), fast_s, slow_s
        curves = {id(stage): _Curve(stage, fast_s, slow_s) for stage in stages}  # layers may share a stage
        self._curves = [curves[id(stage)] for stage in stages]
        self._whole = _steepest_first([curve.whole for curve in self._curves])
        self._relaxed = _steepest_first([curve.relaxed for curve in self._curves])
        self._known: dict[float, tuple[tuple[Array, ...], float, float]] = {}

    def at(self, rooms_bytes: Array) -> Placed:
        """The placement under each capacity, (n_rooms,). [B]"""
        rooms = np.maximum(np.asarray(rooms_bytes, np.float64), 0.0).tolist()
        new = sorted({room for room in rooms if room not in self._known})
        if new:
            found = self._placed(np.array(new))
            for i, room in enumerate(new):
                self._known[room] = (tuple(u[:, i] for u in found.units), float(found.seconds[i]),
                                     float(found.bound_s[i]))
        known = [self._known[room] for room in rooms]
        units = tuple(np.stack([one[0][s] for one in known], axis=1) for s in range(len(self.stages)))
        return Placed(units, np.array([one[1] for one in known]), np.array([one[2] for one in known]))

    def _placed(self, rooms: Array) -> Placed:
        units, seconds = self._followed(rooms)
        bound = np.full(len(rooms), sum(float(curve.relaxed[1][0]) for curve in self._curves))
        for s in self._relaxed:
            length = s.end_bytes - s.begin_bytes
            bound += s.slope * np.minimum(rooms, length)
            rooms = np.maximum(rooms - length, 0.0)
        return Placed(units, seconds, np.minimum(bound, seconds))

    def _followed(self, rooms: Array) -> tuple[tuple[Array, ...], Array]:
        """Whole units of every stage when the curves' hulls are followed, steepest first, and the seconds of all."""
        taken = np.zeros((len(self.stages), len(rooms)))
        stopped = np.zeros((len(self.stages), len(rooms)), np.bool_)
        left = rooms.copy()
        for s in self._whole:
            stage, length = self.stages[s.stage], s.end_bytes - s.begin_bytes
            fits = ~stopped[s.stage] & (length <= left * (1 + _SLACK))
            # What does not fit as a whole still helps up to where both sides take equally long.
            useful = np.minimum(left, max(self._curves[s.stage].even_bytes - s.begin_bytes, 0.0))
            part = np.floor(useful / stage.unit_bytes * (1 + _SLACK)) * stage.unit_bytes
            more = np.where(stopped[s.stage], 0.0, np.where(fits, length, part))
            taken[s.stage] += more
            left = np.maximum(left - more, 0.0)
            stopped[s.stage] |= ~fits
        units = tuple(_units(stage, n_bytes) for stage, n_bytes in zip(self.stages, taken, strict=True))
        seconds = sum((stage_seconds(s, u, self.fast_s, self.slow_s)
                       for s, u in zip(self.stages, units, strict=True)), np.zeros(len(rooms)))
        return units, seconds


def _units(stage: Stage, taken_bytes: Array) -> Array:
    """Whole units of each class among the first `taken_bytes` (n,) of a stage, (C, n)."""
    before = np.cumsum(stage.units) - stage.units
    taken = np.round(taken_bytes / stage.unit_bytes)
    return np.asarray(np.clip(taken[None, :] - before[:, None], 0.0, stage.units[:, None]))


class _Curve:
    """Seconds of a stage over its bytes in fast memory, most frequent units first: (bytes, seconds) at its corners."""

    def __init__(self, stage: Stage, fast_s: float, slow_s: float) -> None:
        load = np.append(0.0, np.cumsum(stage.frequency * stage.units * stage.unit_bytes))
        placed = np.append(0.0, np.cumsum(stage.units * stage.unit_bytes))
        at_even = load[-1] * slow_s / (fast_s + slow_s)  # both sides take equally long
        self.even_bytes = float(np.interp(at_even, load, placed))
        """Beyond this many, only the last unit of all helps: nothing is joined then. [B]"""

        def seconds(at: Array) -> Array:
            there = np.interp(at, placed, load)
            joined = stage.join_s * (at < placed[-1])
            return np.asarray(np.maximum(there * fast_s, (load[-1] - there) * slow_s) + joined)

        size = stage.unit_bytes
        around = np.array([np.floor(self.even_bytes / size), np.ceil(self.even_bytes / size)]) * size
        points = np.unique(np.clip(np.append(placed, around), 0.0, placed[-1]))
        self.whole = points, seconds(points)
        """What whole units reach."""
        points = np.unique(np.append(placed, self.even_bytes))
        alike = len(stage.units) == 1  # then so many units are so many units, and no other choice comes nearer to even
        self.relaxed = self.whole if alike else (points, seconds(points))
        """What no choice of units beats."""


def _steepest_first(curves: Sequence[tuple[Array, Array]]) -> list[_Segment]:
    """The falling parts of the lower convex hulls, steepest first; within a stage they are in order already."""
    found: list[_Segment] = []
    for index, (at, seconds) in enumerate(curves):
        hull: list[int] = []
        for point in range(len(at)):
            while len(hull) > 1 and _above(at, seconds, hull[-2], hull[-1], point):
                hull.pop()
            hull.append(point)
        for begin, end in itertools.pairwise(hull):
            slope = float((seconds[end] - seconds[begin]) / (at[end] - at[begin]))
            if slope < 0:
                found.append(_Segment(index, float(at[begin]), float(at[end]), slope))
    return sorted(found, key=lambda s: s.slope)


def _above(x: Array, y: Array, first: int, middle: int, last: int) -> bool:
    """Whether the middle of three points lies above the line through the others."""
    return bool((y[middle] - y[first]) * (x[last] - x[first]) > (y[last] - y[first]) * (x[middle] - x[first]))
