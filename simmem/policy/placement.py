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
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = ["Balance", "Placed", "Stage", "balanced", "first_of_classes", "stage_seconds"]

Array = NDArray[np.float64]
_SLACK = 1e-9
_ROUNDING = 1e-12
"""A gap below is what rounding leaves of none."""


@dataclass(frozen=True)
class Stage:
    """Units that two agents share in one stage of a step: classes of alike units, most frequent first. (C,) each."""

    frequency: Array
    """Share of the steps that multiply a unit of the class."""
    units: Array
    unit_bytes: float
    join_s: float
    """What it takes longer where the slow agent has a unit at all: handing over, kernels, handing back. [s]"""


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
class _Segments:
    """Pieces of the lower convex hulls of the stages' seconds over their bytes in fast memory; (n,) each."""

    stage: NDArray[np.int64]
    begin_bytes: Array
    length_bytes: Array
    slope: Array
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
    """What `balanced` knows before it is told a capacity."""

    def __init__(self, stages: Sequence[Stage], fast_s: float, slow_s: float) -> None:
        self.stages, self.fast_s, self.slow_s = tuple(stages), fast_s, slow_s
        curves = {id(stage): _Curve(stage, fast_s, slow_s) for stage in stages}  # layers may share a stage
        self._curves = [curves[id(stage)] for stage in stages]
        self._whole = _steepest_first([curve.whole for curve in self._curves])
        self._filled = np.cumsum(self._whole.length_bytes)
        self._known: dict[float, Array] = {}
        self._least = min(stage.unit_bytes for stage in stages) * (1 - _SLACK)

    def at(self, rooms_bytes: Array) -> Placed:
        """The placement under each capacity, (n_rooms,). [B]"""
        rooms = np.maximum(np.asarray(rooms_bytes, np.float64), 0.0)
        taken = np.array([self._followed(room) for room in rooms.tolist()]).T
        return Placed(self, rooms, np.round(taken / np.array([[stage.unit_bytes] for stage in self.stages])))

    def bound_s(self, rooms_bytes: Array) -> Array:
        """No placement under a capacity takes less. [s]"""
        return np.interp(rooms_bytes, *self._bound)

    @cached_property
    def _bound(self) -> tuple[Array, Array]:
        """Seconds of all stages over the bytes in fast memory, when nothing has to be whole: (bytes, seconds)."""
        relaxed = _steepest_first([curve.relaxed for curve in self._curves])
        return np.append(0.0, np.cumsum(relaxed.length_bytes)), sum(
            float(curve.relaxed[1][0]) for curve in self._curves) + np.append(
                0.0, np.cumsum(relaxed.length_bytes * relaxed.slope))

    def _followed(self, room: float) -> Array:
        """Bytes of every stage in fast memory when the curves' hulls are followed, steepest first, (n_stages,). [B]"""
        if room in self._known:
            return self._known[room]
        first = int(np.searchsorted(self._filled, room, side="right"))  # so many fit together
        whole = self._whole
        taken: Array = np.bincount(whole.stage[:first], whole.length_bytes[:first],
                                   len(self.stages)).astype(np.float64)
        left = room - (float(self._filled[first - 1]) if first else 0.0)
        stopped: set[int] = set()
        for place in range(first, len(whole.stage)):
            if left < self._least:
                break
            stage, length = int(whole.stage[place]), float(whole.length_bytes[place])
            if stage in stopped:
                continue
            if length > left * (1 + _SLACK):
                stopped.add(stage)
                # What does not fit as a whole still helps up to where both sides take equally long.
                useful = min(left, max(self._curves[stage].even_bytes - float(whole.begin_bytes[place]), 0.0))
                unit = self.stages[stage].unit_bytes
                length = float(np.floor(useful / unit * (1 + _SLACK))) * unit
            taken[stage] += length
            left = max(left - length, 0.0)
        self._known[room] = taken
        return taken


@dataclass(frozen=True)
class Placed:
    """What lies in the fast memory under each of several capacities; n_rooms of them."""

    balance: Balance
    rooms_bytes: Array
    counts: Array
    """Whole units of each stage, its most frequent ones, (n_stages, n_rooms)."""

    @cached_property
    def units(self) -> tuple[Array, ...]:
        """Per stage (C, n_rooms): whole units of each class."""
        return tuple(first_of_classes(stage.units, each)
                     for stage, each in zip(self.balance.stages, self.counts, strict=True))

    @cached_property
    def seconds(self) -> Array:
        """Expected seconds of all stages so, (n_rooms,). [s]"""
        fast_s, slow_s = self.balance.fast_s, self.balance.slow_s
        return sum((stage_seconds(s, u, fast_s, slow_s) for s, u in zip(self.balance.stages, self.units, strict=True)),
                   np.zeros(len(self.rooms_bytes)))

    @cached_property
    def bound_s(self) -> Array:
        """No placement under that capacity takes less, (n_rooms,). [s]"""
        return np.minimum(self.balance.bound_s(self.rooms_bytes), self.seconds)

    @property
    def gap(self) -> Array:
        """Share by which a better placement could at most be faster, (n_rooms,)."""
        share = 1.0 - self.bound_s / np.maximum(self.seconds, 1e-300)
        return np.where(share > _ROUNDING, share, 0.0)


def first_of_classes(units: Array, counts: Array) -> Array:
    """Units of each class among the first `counts` (…, n) of stages with classes of `units` (…, C), (…, C, n)."""
    before = np.cumsum(units, axis=-1) - units
    return np.asarray(np.clip(counts[..., None, :] - before[..., None], 0.0, units[..., None]))


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


def _steepest_first(curves: Sequence[tuple[Array, Array]]) -> _Segments:
    """The falling parts of the lower convex hulls, steepest first; within a stage they are in order already."""
    known: dict[int, list[tuple[float, float, float]]] = {}
    found: list[tuple[float, float, float, float]] = []
    for index, curve in enumerate(curves):
        if id(curve) not in known:  # stages may share one
            known[id(curve)] = _falling(*(values.tolist() for values in curve))
        found += [(index, *piece) for piece in known[id(curve)]]
    stage, begin, end, slope = np.array(found).reshape(-1, 4).T
    order = np.argsort(slope, kind="stable")
    return _Segments(stage[order].astype(np.int64), begin[order], (end - begin)[order], slope[order])


def _falling(x: list[float], y: list[float]) -> list[tuple[float, float, float]]:
    """(begin, end, slope) of the pieces of the lower convex hull that fall."""
    hull: list[int] = []
    for point in range(len(x)):
        while len(hull) > 1 and ((y[hull[-1]] - y[hull[-2]]) * (x[point] - x[hull[-2]])
                                 > (y[point] - y[hull[-2]]) * (x[hull[-1]] - x[hull[-2]])):
            hull.pop()  # it lies above the line through its neighbours
        hull.append(point)
    pieces = [(x[i], x[j], (y[j] - y[i]) / (x[j] - x[i])) for i, j in itertools.pairwise(hull)]
    return [piece for piece in pieces if piece[2] < 0]
