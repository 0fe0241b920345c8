"""Which figures of a storage link follow from reads of it: a surface, a cap, a page cache, what lasts?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simmem.cost.figures import Judged, MeasuredFigure, rate_figure, rate_of, reaching, said, surely
from simmem.cost.noise import TOO_NOISY, Judgement, run_medians
from simmem.cost.surface import ReadPoint, SurfaceFit, fit_surface
from simmem.spec.base import Kind
from simmem.spec.measurement import Measurement

__all__ = ["StorageFit", "settled", "storage_figures"]

_RESAMPLES = 40
_FOLDS = 5
_CACHED_READ_BYTES = 1 << 16
_LARGE_READ_BYTES = 1 << 20
_COMMON_SIZES, _COMMON_DEPTHS = (4096, 1 << 16, 1 << 20, 1 << 24), (1, 4, 32)
"""What every run reads, however short: the highest of some rates is of these, or it would grow with their number."""
_BEND_KNOWN = 1.0
"""How the surface bends is measured where refits differ by less than this share of it."""
_FEW_BATCHES, _NOTHING_S = 5, 1e-7
"""Two figures and a fit without each batch in turn ask for more than four; a tenth of a microsecond is none. [s]"""
_SETTLED = 0.5
"""The later half of a sustained run is what lasts."""


@dataclass(frozen=True)
class StorageFit:
    """How well the surface tells reads it was not fitted to: every fifth point left out in turn."""

    points: int
    quiet: int
    """Of which the noise floor is under 10 %."""
    median_error: float | None
    """Of the quiet ones; None where there is none."""
    undetermined: tuple[str, ...]


def storage_figures(trusted: Sequence[Judged], judged: Sequence[Judged], notes: list[str]
                    ) -> tuple[list[MeasuredFigure], StorageFit | None]:
    reads = [(p, j) for p, j in trusted if p.probe == "storage-read"]
    direct = [one for one in reads if one[0].conditions["how"] == "direct"]
    how = "direct"
    if not direct:
        direct, how = [one for one in reads if one[0].conditions["how"] == "buffered"], "buffered"
        if direct:
            notes.append("No direct I/O: storage was read through a page cache that had been emptied.")
    random = [one for one in direct if one[0].conditions["pattern"] == "random"]
    found = _cached(reads)
    if not random:
        return found, None
    large = _common([one for one in direct if one[0].bytes >= _LARGE_READ_BYTES]) or direct
    top = max(large, key=surely)
    fastest = rate_figure("link.flash.rate", top, f"fastest of {len(large)} large {how} reads: {said(top[0])}")
    rate = reaching(fastest, _visits(large, top))
    found.append(rate)
    decline = 0.02 if _declines(random) else 1.0

    def fitted(some: Sequence[Judged]) -> SurfaceFit:
        return fit_surface([_point(*one) for one in some], known={"rate": rate.value}, decline=decline)

    fit = fitted(random)
    names = {"latency": "latency_s", "single_rate": "single_rate", "request_time": "request_time_s",
             "request_rate": "request_rate"}
    draws = _resampled(random, fitted, [*names.values(), "saturation_exponent", "overload_exponent"])
    floor = float(np.median([j.noise_floor for _, j in random]))
    n = sum(j.n for _, j in random)
    for name, attribute in names.items():
        value = float(getattr(fit.surface, attribute))
        what = f"surface fitted to {len(random)} random {how} reads"
        if name not in fit.undetermined:
            low, high = (float(q) for q in np.quantile(draws[attribute], (0.05, 0.95)))
            found.append(MeasuredFigure(f"link.flash.{name}", value, min(low, value), max(high, value), Kind.MEASURED,
                                        what, n, floor))
        elif name != "single_rate":
            found.append(MeasuredFigure(f"link.flash.{name}", value, value / 1.5, value * 1.5, Kind.ESTIMATED,
                                        f"usual of drives; {what} does not tell", n, floor))
    bend = fit.surface.saturation_exponent
    assert bend is not None
    low, high = (float(q) for q in np.quantile(draws["saturation_exponent"], (0.05, 0.95)))
    # Written however little is known of it: the other figures were found together with it.
    found.append(MeasuredFigure("link.flash.saturation_exponent", bend, min(low, bend), max(high, bend),
                                Kind.MEASURED if high - low < _BEND_KNOWN * bend else Kind.ESTIMATED,
                                f"surface fitted to {len(random)} random {how} reads", n, floor))
    if fit.surface.best_depth is not None and fit.surface.overload_exponent:
        depth, power = fit.surface.best_depth, fit.surface.overload_exponent
        low, high = (float(q) for q in np.quantile(draws["overload_exponent"], (0.05, 0.95)))
        found += [MeasuredFigure("link.flash.best_depth", depth, depth / 2, depth * 2, Kind.MEASURED,
                                 "depth of the highest throughput; range: the depths beside it", n, floor),
                  MeasuredFigure("link.flash.overload_exponent", power, min(low, power), max(high, power),
                                 Kind.MEASURED, "decline beyond it", n, floor)]
    found += _batch(judged, fit)
    lasting = next((one for one in trusted if one[0].probe == "storage-sustained"), None)
    if lasting is not None:
        found.append(reaching(rate_figure("link.flash.sustained_rate", lasting, "the later half of reads without "
                                          f"pause, {said(lasting[0])}"), _visits(large, lasting)))
    return found, _held_out(random, fitted, fit)


def _batch(reads: Sequence[Judged], fit: SurfaceFit) -> list[MeasuredFigure]:
    """What waking a reader takes, and a batch beside it, from batches behind a product:

        t = n · read_seconds(s, q) + q · reader_time + batch_time

    of n reads by q readers, by least squares in the logarithm; ranges are those of the fits without each of the batches
    in turn. Such times scatter by nature: they count however noisy they are.
    """
    some = [(p, j) for p, j in reads if p.probe == "batch-read" and p.refused is None]
    if len(some) < _FEW_BATCHES:
        return []
    readers, took = (np.array(column) for column in
                     zip(*((float(p.conditions.get("depth", p.requests)), j.median_s) for p, j in some), strict=True))
    surface = np.array([p.bytes / float(fit.surface.throughput(p.bytes / p.requests, depth))
                        for (p, _), depth in zip(some, readers, strict=True)])

    def fitted(which: NDArray[np.bool_]) -> tuple[float, float]:
        from scipy.optimize import least_squares

        def off(x: NDArray[np.float64]) -> NDArray[np.float64]:
            reader, batch = np.exp(x)
            return np.asarray(np.log((surface + readers * reader + batch) / took)[which])

        starts = [np.log([reader, batch]) for reader in (5e-6, 2e-5, 8e-5) for batch in (5e-5, 3e-4)]
        found = min((least_squares(off, x0, loss="soft_l1", f_scale=0.2) for x0 in starts), key=lambda f: float(f.cost))
        return float(np.exp(found.x[0])), float(np.exp(found.x[1]))

    every = np.ones(len(some), np.bool_)
    values = fitted(every)
    others = np.array([fitted(np.arange(len(some)) != left_out) for left_out in range(len(some))])
    floor = float(np.median([j.noise_floor for _, j in some]))
    kind = Kind.MEASURED if floor <= TOO_NOISY else Kind.ESTIMATED
    return [MeasuredFigure(f"link.flash.{name}", value, min(value * (1 - min(floor, 0.9)), float(others[:, i].min())),
                           max(value * (1 + floor), float(others[:, i].max())), kind,
                           f"{len(some)} kinds of batches behind other work", sum(j.n for _, j in some), floor)
            for i, (name, value) in enumerate(zip(("reader_time", "batch_time"), values, strict=True))
            if value > _NOTHING_S]


def _visits(large: Sequence[Judged], top: Judged) -> list[float]:
    """Rates of all visits to large reads with as many in flight or more. [B/s]"""
    return [p.bytes / seconds for p, _ in large if float(p.conditions["depth"]) >= float(top[0].conditions["depth"])
            for seconds in run_medians(p.samples_s, p.at_s, p.runs)[0].tolist()]


def settled(point: Measurement) -> Measurement:
    """The later half of what ran without pause: a burst before it is no second mode. Else the point as it is."""
    if not point.probe.endswith("-sustained"):
        return point
    return point.model_copy(update={"samples_s": point.samples_s[int(len(point.samples_s) * _SETTLED):], "at_s": (),
                                    "runs": ()})


def _common(some: Sequence[Judged]) -> list[Judged]:
    """Those that every run measures; all of them where there are none of those."""
    return [one for one in some if one[0].bytes in _COMMON_SIZES and one[0].conditions["depth"] in _COMMON_DEPTHS
            ] or list(some)


def _point(point: Measurement, judgement: Judgement) -> ReadPoint:
    return ReadPoint(point.bytes, float(point.conditions["depth"]), point.bytes / judgement.median_s)


def _declines(random: Sequence[Judged]) -> bool:
    """Is some read at a greater depth slower than one of its size at a smaller one, beyond both their ranges?"""
    return any(a.bytes == b.bytes and float(a.conditions["depth"]) < float(b.conditions["depth"]) and i.high_s < j.low_s
               for a, i in random for b, j in random)


def _resampled(random: Sequence[Judged], fitted: Callable[[Sequence[Judged]], SurfaceFit],
               attributes: Sequence[str]) -> dict[str, list[float]]:
    """Each figure of the surface when the points are drawn anew, with replacement, and each within its own range."""
    draw = np.random.default_rng(0)
    found: dict[str, list[float]] = {name: [] for name in attributes}
    for _ in range(_RESAMPLES):
        some = [random[i] for i in draw.integers(0, len(random), len(random))]
        some = [(p, replace(j, median_s=j.median_s * (1 + j.noise_floor * draw.uniform(-1, 1)))) for p, j in some]
        surface = fitted(some).surface
        for name in attributes:
            found[name].append(float(getattr(surface, name) or 0.0))
    return found


def _held_out(random: Sequence[Judged], fitted: Callable[[Sequence[Judged]], SurfaceFit],
              fit: SurfaceFit) -> StorageFit:
    errors, quiet = [], [j.noise_floor < 0.1 for _, j in random]
    order = np.random.default_rng(0).permutation(len(random))
    if len(random) >= 2 * _FOLDS:
        for fold in range(_FOLDS):
            left_out = set(order[fold::_FOLDS].tolist())
            surface = fitted([one for i, one in enumerate(random) if i not in left_out]).surface
            for i in left_out:
                if quiet[i]:
                    p, j = random[i]
                    errors.append(abs(float(surface.throughput(p.bytes, float(p.conditions["depth"])))
                                      / (p.bytes / j.median_s) - 1))
    return StorageFit(len(random), sum(quiet), float(np.median(errors)) if errors else None, fit.undetermined)


def _cached(reads: Sequence[Judged]) -> list[MeasuredFigure]:
    """The highest rate over depths for each size of at least 64 KiB; their median, and what they span."""
    held = _common([one for one in reads
                    if one[0].conditions["how"] == "cached" and one[0].bytes >= _CACHED_READ_BYTES])
    best: dict[float, Judged] = {}
    for one in held:
        if one[0].bytes not in best or surely(one) > surely(best[one[0].bytes]):
            best[one[0].bytes] = one
    if not best:
        return []
    rates = [rate_of(one) for one in best.values()]
    low = min(p.bytes / j.high_s for p, j in best.values())
    high = max(p.bytes / j.low_s for p, j in best.values())
    return [MeasuredFigure("link.flash.cached_rate", float(np.median(rates)), low, high, Kind.MEASURED,
                           f"reads that the page cache holds, of {len(best)} sizes", sum(j.n for _, j in held),
                           float(np.median([j.noise_floor for _, j in best.values()])))]
