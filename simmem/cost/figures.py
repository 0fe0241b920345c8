"""What is a measured figure of a device, and how do judged samples become one?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simmem.cost.noise import Judgement
from simmem.spec.base import Kind
from simmem.spec.measurement import Measurement

__all__ = ["Judged", "MeasuredFigure", "of", "rate_figure", "rate_of", "reaching", "reference", "said", "share_figure",
           "sum_figure", "surely", "threads", "top_figure"]

Judged = tuple[Measurement, Judgement]


@dataclass(frozen=True)
class MeasuredFigure:
    """A figure of a device, in SI base units."""

    key: str
    """As in a device file: "link.flash.rate"."""
    value: float
    low: float
    high: float
    """The 90 % range that its own samples give."""
    kind: Kind
    what: str
    """What was done, in words."""
    n: int = 0
    """Samples behind it; 0 for what the system says."""
    noise_floor: float | None = None
    drift: float | None = None
    """Change over the run, where it is more than chance and noise; positive is slower."""

    @property
    def spread(self) -> float:
        """Half the 90 % range over the value."""
        return (self.high - self.low) / 2 / self.value


def of(trusted: Sequence[Judged], probe: str, agent: str) -> list[Judged]:
    return [(p, j) for p, j in trusted if p.probe == probe and p.conditions.get("agent", "cpu") == agent]


def reference(some: Sequence[Judged]) -> list[Judged]:
    """Those that every run measures, marked `reference`; all of them where too few of those are trusted."""
    marked = [one for one in some if one[0].conditions.get("reference") is True]
    return marked if len(marked) >= _ENOUGH else list(some)


def rate_of(one: Judged) -> float:
    return one[0].bytes / one[1].median_s


def surely(one: Judged) -> float:
    """The slow end of a rate's range: of many noisy rates the highest median is the luckiest."""
    return one[0].bytes / one[1].high_s


def rate_figure(key: str, one: Judged, what: str) -> MeasuredFigure:
    p, j = one
    return MeasuredFigure(key, p.bytes / j.median_s, p.bytes / j.high_s, p.bytes / j.low_s, Kind.MEASURED, what, j.n,
                          j.noise_floor, j.drift if j.drifts else None)


def reaching(figure: MeasuredFigure, reached: Sequence[float]) -> MeasuredFigure:
    """The figure, its range as far as visits went: what neighbours leave of a machine changes over minutes, and the few
    visits to one case know less of that than all visits to its like."""
    low, high = min([figure.low, *reached]), max([figure.high, *reached])
    if (low, high) == (figure.low, figure.high):
        return figure
    return replace(figure, low=low, high=high, what=f"{figure.what}; the range is what all visits reached")


def threads(point: Measurement) -> str:
    n = point.conditions.get("threads", 1)
    return f"{n} thread{'' if n == 1 else 's'}"


def said(point: Measurement) -> str:
    conditions: Mapping[str, object] = point.conditions
    return ", ".join(f"{key} {value}" for key, value in conditions.items())


def share_figure(key: str, shares: NDArray[np.float64], judged: Sequence[Judged], what: str) -> MeasuredFigure:
    low, value, high = (float(q) for q in np.quantile(shares, (0.05, 0.5, 0.95)))
    return MeasuredFigure(key, value, low, high, Kind.MEASURED, what, sum(j.n for _, j in judged),
                          float(np.median([j.noise_floor for _, j in judged])))


def sum_figure(key: str, parts: Sequence[tuple[str, Judged, float]]) -> MeasuredFigure:
    value = sum(sign * j.median_s for _, (_, j), sign in parts)
    low = sum(sign * (j.low_s if sign > 0 else j.high_s) for _, (_, j), sign in parts)
    high = sum(sign * (j.high_s if sign > 0 else j.low_s) for _, (_, j), sign in parts)
    floor = max(j.noise_floor for _, (_, j), _ in parts)
    return MeasuredFigure(key, value, max(low, 0.1 * value), high, Kind.MEASURED,
                          " + ".join(words for words, _, _ in parts if words), sum(j.n for _, (_, j), _ in parts),
                          floor, next((j.drift for _, (_, j), _ in parts if j.drifts), None))


_TOP = 0.9
_ENOUGH = 3
"""Of fewer points the fastest is a matter of luck."""
_RESAMPLES = 200


def top_figure(key: str, judged: Sequence[Judged], speed: Callable[[Measurement], float], what: str
               ) -> tuple[MeasuredFigure, list[Judged]]:
    """What the fastest tenth of some points reaches, with the number of threads that reaches most, and its points.

    The 90 % quantile over points rather than the fastest of them, which would be the luckiest. The range is that of the
    same quantile when points are drawn anew, each within its own range. Numbers of threads are compared on the points
    that each of them has, by the geometric mean; those with fewer than three trusted points compete only where none has
    more, and without common points the fastest tenth decides.

    Parameters
    ----------
    speed : demand of a point, over which its time is taken. [B] or [FLOP]
    """
    groups: dict[object, list[Judged]] = {}
    for one in judged:
        groups.setdefault(one[0].conditions.get("threads"), []).append(one)
    enough = [g for g in groups.values() if len(g) >= _ENOUGH] or list(groups.values())
    best = _best(enough, speed)
    value = _quantile([speed(p) / j.median_s for p, j in best])
    draw = np.random.default_rng(0)
    low_s, high_s, demand = (np.array(column) for column in zip(
        *((j.low_s, j.high_s, speed(p)) for p, j in best), strict=True))
    which = draw.integers(0, len(best), (_RESAMPLES, len(best)))
    drawn = demand[which] / (low_s[which] * (high_s[which] / low_s[which]) ** draw.random(which.shape))
    low, high = (float(q) for q in np.quantile(np.quantile(drawn, _TOP, axis=1), (0.05, 0.95)))
    floor = float(np.median([j.noise_floor for _, j in best]))
    return MeasuredFigure(
        key, value, min(low, value * (1 - min(floor, 0.9))), max(high, value * (1 + floor)), Kind.MEASURED,
        f"fastest tenth of {len(best)} {what}, {threads(best[0][0])}", sum(j.n for _, j in best), floor), best


def _case(point: Measurement) -> tuple[tuple[str, object], ...]:
    return tuple(sorted((k, v) for k, v in point.conditions.items() if k != "threads"))


def _best(groups: Sequence[list[Judged]], speed: Callable[[Measurement], float]) -> list[Judged]:
    """The group whose points are fastest, like beside like."""
    by_case = [{_case(p): math.log(speed(p) / j.median_s) for p, j in g} for g in groups]
    common = set.intersection(*(set(cases) for cases in by_case))
    if common:
        means = [float(np.mean([cases[c] for c in common])) for cases in by_case]
    else:
        means = [_quantile([speed(p) / j.median_s for p, j in g]) for g in groups]
    return groups[int(np.argmax(means))]


def _quantile(values: Sequence[float]) -> float:
    return float(np.quantile(values, _TOP))
