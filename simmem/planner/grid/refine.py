"""Which cells should be added to a sample once its outcomes are there?

Around the boundary: between two neighbours of which one passes and the other does not. Two cells that
differ only along ranges and rising lists are neighbours where no third is nearer to both (the relative neighbourhood
graph of Toussaint, 1980), so that in one dimension this is bisection. Around the best: half-way from each of the best
cells to what is next to it along every axis (a compass search).

Cells are added in rounds, each decided by outcomes alone: whoever answers, and whenever, they are the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.planner.grid.cells import CellOutcome
from simmem.planner.grid.gate import passes
from simmem.planner.grid.ranges import Range
from simmem.planner.grid.sample import Point, is_ordered
from simmem.planner.grid.spec import Cell, Grid, SearchSpec, cell_at

__all__ = ["Refinement"]

ROUND = 8
"""Cells of a grid that are added at once: later ones know how these came out."""
NEAREST = 1 / 512
"""Share of an axis that neighbours are apart at least: no prediction is as sure as that."""
_BEST = {"latency": ("token_latency_s", 1.0), "throughput": ("tokens_per_s", -1.0),
         "energy": ("energy_j_per_token", 1.0), "memory": ("held_bytes", 1.0)}
"""Objective → figure, and what it is multiplied by to be minimised."""

Answered = Sequence[tuple[Cell, CellOutcome]]


class Refinement:
    """What adds cells to the samples of a search file that ask for it."""

    def __init__(self, spec: SearchSpec) -> None:
        self._grids = [_Refined(grid, spec) for grid in spec.grid
                       if grid.is_sampled and grid.sample and grid.sample.refine]

    def next(self, answered: Answered) -> list[Cell]:
        """Cells to answer next, given those that are answered; none when it is enough."""
        return [cell for grid in self._grids for cell in grid.next(answered)]

    def boundary(self, answered: Answered) -> list[tuple[str, str]]:
        """(a cell that passes, its neighbour of the same choices that does not), the nearest to each other first.

        Of the grids that are refined around their boundary: those around the best say nothing of where theirs lies.
        """
        return [pair for grid in self._grids if grid.is_around_boundary for pair in grid.boundary(answered)]


class _Refined:
    """A sampled grid that cells are added to, and where each of its cells lies."""

    def __init__(self, grid: Grid, spec: SearchSpec) -> None:
        assert grid.sample is not None
        self._grid, self._spec, self._sample, self._left = grid, spec, grid.sample, grid.sample.refine
        self._points: dict[str, Point] = {}
        for point in grid.points():
            self._points.setdefault(cell_at(grid, spec, point).id, point)
        self._objective = grid.objective or spec.objective
        self.is_around_boundary = self._sample.around == "boundary"

    def next(self, answered: Answered) -> list[Cell]:
        """The next round."""
        mine, points = self._mine(answered)
        if self._sample.around == "best":
            figure, sign = _BEST[self._objective]
            wanted = self._beside(points, [
                sign * outcome.figures[figure] if passes(cell, outcome) and figure in outcome.figures else float("inf")
                for cell, outcome in mine])
        else:
            wanted = self._around(points, np.array([passes(cell, outcome) for cell, outcome in mine]))
        found: list[Cell] = []
        for point in wanted:
            if len(found) == min(ROUND, self._left):
                break
            cell = cell_at(self._grid, self._spec, point, refined=True)
            if cell.id not in self._points:
                self._points[cell.id] = point
                found.append(cell)
        self._left -= len(found)
        return found

    def boundary(self, answered: Answered) -> list[tuple[str, str]]:
        """See `Refinement.boundary`."""
        mine, points = self._mine(answered)
        passed = np.array([passes(cell, outcome) for cell, outcome in mine])
        pairs = sorted(self._neighbours(*self._laid_out(points), passed))
        ends = [(i, j) if passed[i] else (j, i) for _, i, j in pairs]
        return [(mine[inside][0].id, mine[outside][0].id) for inside, outside in dict.fromkeys(ends)]

    def _mine(self, answered: Answered) -> tuple[list[tuple[Cell, CellOutcome]], list[Point]]:
        mine = [(cell, outcome) for cell, outcome in answered if cell.id in self._points]
        return mine, [self._points[cell.id] for cell, _ in mine]

    def _around(self, points: Sequence[Point], passed: NDArray[np.bool_]) -> Iterator[Point]:
        """Half-way across every gap that a boundary may lie in, the widest first.

        Such are those between neighbours, and where all cells of the same choices came out alike, that between the
        outermost of them and the corner towards which, of all cells, the others lie.
        """
        if passed.all() or not passed.any():
            return
        place, choices = self._laid_out(points)
        gaps = [(-far, i, self._middle(points[i], points[j])) for far, i, j in self._neighbours(place, choices, passed)]
        names, rising = self._ordered_names(), np.sign(place[passed].mean(axis=0) - place[~passed].mean(axis=0))
        for alike in np.unique(choices, axis=0):
            which = np.flatnonzero((choices == alike).all(axis=1))
            if passed[which].any() and not passed[which].all():
                continue
            towards = -rising if passed[which[0]] else rising
            i = int(which[np.argmax(place[which] @ towards)])
            mine = {name for name, axis in points[i].axes(self._grid.space).items() if is_ordered(axis)}
            corner = {name: float(there > 0) for name, there in zip(names, towards, strict=True)
                      if there and name in mine}
            here = {name: place[i, names.index(name)] for name in corner}
            far = float(np.linalg.norm([corner[name] - here[name] for name in corner]))
            gaps.append((-far, i, self._moved(points[i], {name: (here[name] + corner[name]) / 2 for name in corner},
                                              up=[name for name in corner if corner[name] > 0])))
        for far, _, point in sorted(gaps, key=lambda gap: gap[:2]):
            if -far > NEAREST:
                yield point

    def _neighbours(self, place: NDArray[np.float64], choices: NDArray[np.int64], passed: NDArray[np.bool_]
                    ) -> list[tuple[float, int, int]]:
        """(distance, i, j): each cell with the nearest of the same choices that came out otherwise, none between."""
        found = []
        for i in range(len(place)):
            others = np.flatnonzero((passed != passed[i]) & (choices == choices[i]).all(axis=1))
            if len(others):
                apart = np.linalg.norm(place[others] - place[i], axis=1)
                j, far = int(others[np.argmin(apart)]), float(apart.min())
                if far > 0 and not self._third_between(i, j, far, place, choices):
                    found.append((far, i, j))
        return found

    @staticmethod
    def _third_between(i: int, j: int, far: float, place: NDArray[np.float64], choices: NDArray[np.int64]) -> bool:
        """Whether a cell of the same choices is nearer to both than they are to each other."""
        alike = np.flatnonzero((choices == choices[i]).all(axis=1))
        to_both = np.maximum(np.linalg.norm(place[alike] - place[i], axis=1),
                             np.linalg.norm(place[alike] - place[j], axis=1))
        return bool((to_both < far * (1 - 1e-12)).any())

    def _beside(self, points: Sequence[Point], worth: Sequence[float]) -> Iterator[Point]:
        """Half-way from each cell that passes, the best first, to the next one along every axis, or to its end."""
        place, choices = self._laid_out(points)
        names = self._ordered_names()
        for i in sorted(range(len(points)), key=lambda i: (worth[i], i)):
            if worth[i] == float("inf"):
                return
            alike = place[(choices == choices[i]).all(axis=1)]
            for k, name in enumerate(names):
                if name not in points[i].at or not is_ordered(points[i].axes(self._grid.space)[name]):
                    continue
                here, there = place[i, k], alike[:, k]
                for end in (there[there < here].max(initial=0.0), there[there > here].min(initial=1.0)):
                    if abs(end - here) > NEAREST:
                        yield self._moved(points[i], {name: (here + float(end)) / 2}, up=[name] if end > here else [])

    def _ordered_names(self) -> list[str]:
        space = self._grid.space
        return list(dict.fromkeys(name for entries in space.parts.values() for axes in entries
                                  for name, axis in axes.items() if is_ordered(axis)))

    def _laid_out(self, points: Sequence[Point]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """(points × ordered axes) places from 0 to 1, and (points × the rest) what was chosen."""
        names, space = self._ordered_names(), self._grid.space
        every = list(dict.fromkeys(name for entries in space.parts.values() for axes in entries for name in axes))
        place = np.zeros((len(points), len(names)))
        choices = np.full((len(points), len(space.parts) + len(every)), -1, dtype=np.int64)
        for i, point in enumerate(points):
            choices[i, :len(space.parts)] = point.entries
            for name, axis in point.axes(space).items():
                if is_ordered(axis):
                    place[i, names.index(name)] = _share(axis, point.at[name])
                else:
                    choices[i, len(space.parts) + every.index(name)] = point.at[name]
        return place, choices

    def _middle(self, one: Point, other: Point) -> Point:
        """Half-way towards another point along the axes that both have in order, the rest as the first one's."""
        axes, its = one.axes(self._grid.space), other.axes(self._grid.space)
        return self._moved(one, {name: (_share(axis, one.at[name]) + _share(its[name], other.at[name])) / 2
                                 for name, axis in axes.items()
                                 if is_ordered(axis) and name in its and is_ordered(its[name])})

    def _moved(self, point: Point, shares: dict[str, float], up: Collection[str] = ()) -> Point:
        """Moved along axes; lists of `up` are rounded up, so that what goes up a list comes to its last value."""
        axes = point.axes(self._grid.space)
        return Point(point.entries, {**point.at, **{name: _placed(axes[name], share, name in up)
                                                    for name, share in shares.items()}})


def _share(axis: Any, at: float | int) -> float:
    """How far along an ordered axis, 0 to 1."""
    return float(at) if isinstance(axis, Range) else at / (len(axis) - 1)


def _placed(axis: Any, share: float, up: bool) -> float | int:
    """A place on an ordered axis; of a list, the last one that is no farther, or, upwards, the first that is as far."""
    if isinstance(axis, Range):
        return share
    return math.ceil(share * (len(axis) - 1) - 1e-9) if up else int(share * (len(axis) - 1) + 1e-9)
