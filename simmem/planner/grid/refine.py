"""Which cells should be added to a sample once its outcomes are there?

Around the boundary: between two neighbours of which one passes and the other fails or is infeasible. Two cells that
differ only along ranges and rising lists are neighbours where no third is nearer to both (the relative neighbourhood
graph of Toussaint, 1980), so that in one dimension this is bisection, the widest gap first. Around the best: half-way
from each of the best cells to what is next to it along every axis (a compass search).

Cells are added in rounds, each decided by outcomes alone: whoever answers, and whenever, they are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.planner.grid.cells import CellOutcome
from simmem.planner.grid.gate import kept_limits
from simmem.planner.grid.ranges import Range
from simmem.planner.grid.sample import Point, is_ordered
from simmem.planner.grid.spec import Cell, Grid, SearchSpec, cell_at

__all__ = ["Refinement", "refinement"]

ROUND = 8
"""Cells of a grid that are added at once: later ones know how these came out."""
_BEST = {"latency": ("token_latency_s", 1.0), "throughput": ("tokens_per_s", -1.0),
         "energy": ("energy_j_per_token", 1.0), "memory": ("held_bytes", 1.0)}
"""Objective → figure, and what it is multiplied by to be minimised."""

Answered = Sequence[tuple[Cell, CellOutcome]]
Refinement = Callable[[Answered], list[Cell]]
"""Cells to answer next, given those that are answered; none when it is enough."""


def refinement(spec: SearchSpec) -> Refinement | None:
    """What adds cells to the samples of a search file; None where none asks for it."""
    grids = [_Refined(grid, spec) for grid in spec.grid if grid.is_sampled and grid.sample and grid.sample.refine]
    return (lambda answered: [cell for grid in grids for cell in grid.next(answered)]) if grids else None


class _Refined:
    """A sampled grid that cells are added to, and where each of its cells lies."""

    def __init__(self, grid: Grid, spec: SearchSpec) -> None:
        assert grid.sample is not None
        self._grid, self._spec, self._sample, self._left = grid, spec, grid.sample, grid.sample.refine
        self._points: dict[str, Point] = {}
        for point in grid.points():
            self._points.setdefault(cell_at(grid, spec, point).id, point)
        self._objective = grid.objective or spec.objective

    def next(self, answered: Answered) -> list[Cell]:
        """The next round."""
        mine = [(self._points[cell.id], cell, outcome) for cell, outcome in answered if cell.id in self._points]
        points = [point for point, _, _ in mine]
        if self._sample.around == "best":
            figure, sign = _BEST[self._objective]
            worth = [sign * outcome.figures[figure] if kept_limits(cell, outcome) == "pass" and figure
                     in outcome.figures else float("inf") for _, cell, outcome in mine]
            wanted = self._beside(points, worth)
        else:
            wanted = self._between(points, [kept_limits(cell, outcome) for _, cell, outcome in mine])
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

    def _between(self, points: Sequence[Point], status: Sequence[str]) -> Iterator[Point]:
        """Half-way between neighbours of another status: of the same choices the farthest apart first; then, of cells
        whose choices all came out alike, towards the nearest of other choices."""
        place, choices = self._laid_out(points)
        codes = np.unique(np.asarray(status), return_inverse=True)[1]
        pairs: list[tuple[int, float, int, int]] = []
        for i in range(len(points)):
            others = np.flatnonzero(codes != codes[i])
            if not len(others):
                continue
            differ = (choices[others] != choices[i]).sum(axis=1)
            apart = np.linalg.norm(place[others] - place[i], axis=1)
            nearest = np.lexsort((apart, differ))[0]
            j, n_differ, far = int(others[nearest]), int(differ[nearest]), float(apart[nearest])
            if far == 0 or (n_differ == 0 and self._third_between(i, j, far, place, choices)):
                continue
            pairs.append((n_differ, -far, i, j))
        for _, _, i, j in sorted(pairs):
            yield self._middle(points[i], points[j])

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
                    if end != here:
                        yield self._moved(points[i], {name: (here + float(end)) / 2})

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

    def _moved(self, point: Point, shares: dict[str, float]) -> Point:
        axes = point.axes(self._grid.space)
        return Point(point.entries, {**point.at, **{name: _placed(axes[name], share)
                                                    for name, share in shares.items()}})


def _share(axis: Any, at: float | int) -> float:
    """How far along an ordered axis, 0 to 1."""
    return float(at) if isinstance(axis, Range) else at / (len(axis) - 1)


def _placed(axis: Any, share: float) -> float | int:
    """A place on an ordered axis; of a list, the last one that is no farther."""
    return share if isinstance(axis, Range) else int(share * (len(axis) - 1) + 1e-9)
