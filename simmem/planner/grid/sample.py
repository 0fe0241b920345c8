"""Which cells stand for a grid that is too large to enumerate? A Sobol sample, balanced over its lists.

A space has parts (devices, models, workloads, budgets, policies), each with entries, and an entry has axes of its own
(a workload's prompt tokens, a budget's DRAM). Every choice is a dimension of a scrambled Sobol sequence (Sobol, 1967;
Owen, 1998): points fill all of them together more evenly than random ones would.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

from simmem.errors import MachineError
from simmem.planner.grid.ranges import Axis, Range, magnitude

__all__ = ["Point", "Space", "enumerated", "has_range", "is_ordered", "sobol_points"]

STEPS = 2**16
"""Into which a rank is divided."""


@dataclass(frozen=True)
class Space:
    """Part → the axes of each of its entries."""

    parts: Mapping[str, Sequence[Mapping[str, Axis]]]

    def every_axis(self) -> list[Axis]:
        """The axes of all entries."""
        return [axis for entries in self.parts.values() for axes in entries for axis in axes.values()]

    def size(self) -> int:
        """Cells of its lists; a range counts as one."""
        n = 1
        for entries in self.parts.values():
            each = 0
            for axes in entries:
                many = 1
                for axis in axes.values():
                    many *= 1 if isinstance(axis, Range) else len(axis)
                each += many
            n *= each
        return n


@dataclass(frozen=True)
class Point:
    """A place in a space: which entry of each part, and where on its axes."""

    entries: tuple[int, ...]
    """Of each part, in its order."""
    at: Mapping[str, float | int] = field(hash=False)
    """Axis → the place in a list, or how far along a range (0 to 1)."""

    def values(self, space: Space) -> list[tuple[int, dict[str, Any]]]:
        """Of each part, the entry and the values of its axes."""
        found = []
        for which, entries in zip(self.entries, space.parts.values(), strict=True):
            found.append((which, {name: axis.at(self.at[name]) if isinstance(axis, Range) else axis[int(self.at[name])]
                                  for name, axis in entries[which].items()}))
        return found

    def axes(self, space: Space) -> dict[str, Axis]:
        """The axes that this point has."""
        return {name: axis for which, entries in zip(self.entries, space.parts.values(), strict=True)
                for name, axis in entries[which].items()}


def has_range(space: Space) -> bool:
    """Whether there is anything that cannot be listed."""
    return any(isinstance(axis, Range) for axis in space.every_axis())


def is_ordered(axis: Axis) -> bool:
    """Whether there is something between two of its values: a range, or a list of numbers or sizes that rises."""
    if isinstance(axis, Range):
        return True
    try:
        sizes = [magnitude(value) for value in axis]
    except ValueError:
        return False
    return len(sizes) > 1 and all(a < b for a, b in pairwise(sizes))


def enumerated(space: Space) -> list[Point]:
    """Every point of a space without ranges, the last part's last axis fastest."""
    parts = [[(which, dict(zip(axes, places, strict=True))) for which, axes in enumerate(entries)
              for places in product(*(range(1 if isinstance(axis, Range) else len(axis)) for axis in axes.values()))]
             for entries in space.parts.values()]
    return [Point(tuple(which for which, _ in chosen), {k: v for _, at in chosen for k, v in at.items()})
            for chosen in product(*parts)]


def sobol_points(space: Space, n: int, seed: int) -> list[Point]:
    """`n` points: each entry of a list stands in as many as any other, to within one; ranges are filled evenly.

    Lists are dealt by rank, so that they are balanced for any number of entries and points: of all points for parts, of
    the points with that entry for its axes.

    Raises
    ------
    MachineError
        scipy is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise MachineError("a sample needs scipy; install with: pip install 'simmem[search]'", key="sample")
    import numpy as np
    from scipy.stats import qmc

    chosen_of = [part for part, entries in space.parts.items() if len(entries) > 1]
    axes_of = [name for entries in space.parts.values() for axes in entries for name, axis in axes.items()
               if isinstance(axis, Range) or len(axis) > 1]
    varied = list(dict.fromkeys([*chosen_of, *axes_of]))
    # A whole power of two, of which the first n: the sequence is balanced in such blocks.
    drawn = qmc.Sobol(max(len(varied), 1), scramble=True, rng=seed).random_base2(max(n - 1, 1).bit_length())[:n]
    column = {name: drawn[:, i] for i, name in enumerate(varied)}
    everyone, offsets = np.arange(n), np.random.default_rng([seed, len(varied)])
    chosen = {part: _dealt(column.get(part), everyone, len(entries), offsets) for part, entries in space.parts.items()}
    at: list[dict[str, float | int]] = [{} for _ in range(n)]
    for part, entries in space.parts.items():
        for which, axes in enumerate(entries):
            mine = np.flatnonzero(chosen[part] == which)
            for name, axis in axes.items():
                places = column[name][mine] if isinstance(axis, Range) else \
                    _dealt(column.get(name), mine, len(axis), offsets)[mine]
                for point, place in zip(mine.tolist(), places.tolist(), strict=True):
                    at[point][name] = place
    return [Point(tuple(int(chosen[part][i]) for part in space.parts), at[i]) for i in range(n)]


def _dealt(shares: Any, which: Any, n_levels: int, offsets: Any) -> Any:
    """Levels of the points in `which` by the rank of their shares, as many of each as can be; 0 for other points.

    The ranks are moved on by a share of one that is drawn from `offsets` (systematic sampling: Madow & Madow, 1944):
    where there are fewer points than levels, or some levels get a point more, every level is as likely as any other.
    """
    import numpy as np

    levels = np.zeros(int(which.max(initial=-1)) + 1, dtype=np.int64)
    if shares is not None and n_levels > 1:
        ranked = which[np.argsort(shares[which], kind="stable")]
        # In whole numbers: rounding would put a point more than its due on a level.
        levels[ranked] = (np.arange(len(ranked)) * STEPS + offsets.integers(STEPS)) * n_levels // (
            max(len(ranked), 1) * STEPS)
    return levels
