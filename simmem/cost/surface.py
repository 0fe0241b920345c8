"""How long does one read from storage take, by its size, by how many are in flight, by how it is asked for?

    t = max( ( (A/q)^p + D^p (1 − 1/q^p) )^(1/p), s/R )       A = max(L + s/r, D)       D = a·o + s/B

Seconds per request of s bytes with q in flight. Alone (q = 1) a request takes A: its latency L, then its bytes at the
rate r that one request reaches by itself. Saturated, the device spends D a request whatever the depth: a for serving
it, its bytes at B. In between, Little's law (A/q) and saturation are joined by a norm p, weighted so that a request
alone takes A and no more: the more service times differ, the earlier requests wait for one another. With p = 1 that is
the mean value analysis of exponential service (Reiser and Lavenberg, JACM 27, 1980), with p → ∞ the bound of constant
service. Nothing exceeds the sequential rate R. Past `best_depth` serving takes o = (q / best_depth)^overload_exponent
times as long. p is 2 unless points tell: chosen on the 4 KiB curve of the M4 Max; the curves it is judged on are in
`validate/curves`, and docs/ledger.md says what came of it.

`fit_surface` finds the figures from measured points. What the points do not determine stays at what is usual for a
drive, and the fit says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from simmem.errors import CalibrationError, MachineError, SpecError

__all__ = ["PARAMETERS", "ReadPoint", "Regime", "Surface", "SurfaceFit", "fit_surface", "read_seconds"]

Array = NDArray[np.float64]

Regime = Literal["random", "sequential", "cached"]
"""random: requests that nothing foresees. sequential: each follows the one before, so that the device or the system has
begun to read it: latency and serving are hidden, the bytes remain. cached: the page cache of the system holds it; a
copy in memory, whose rate a device states or does not."""

PARAMETERS = ("latency", "single_rate", "request_time", "request_rate", "rate")
"""What `fit_surface` takes as known and names as undetermined: L, r, a, B and R, called as in a device file."""
USUAL_SATURATION = 2.0


def read_seconds(size_bytes: Array | float, depth: Array | float, *, latency_s: Array | float, rate: Array | float,
                 request_time_s: Array | float, request_rate: Array | float, single_rate: Array | float | None = None,
                 best_depth: float | None = None, overload_exponent: float | None = None,
                 saturation_exponent: Array | float | None = None, cached_rate: Array | float | None = None,
                 regime: Regime = "random") -> Array:
    """Mean seconds per request of a steady stream of reads; all arguments broadcast. [s]

    Parameters
    ----------
    size_bytes : request size s. [B]
    depth : requests in flight q; fewer than one counts as one.
    latency_s : L. [s]
    rate : R, the cap. [B/s]
    request_time_s, request_rate : a and B of a saturated device. [s], [B/s]
    single_rate : r, R when None. [B/s]
    best_depth, overload_exponent : no overload when either is None.
    saturation_exponent : p, taken as 1 where it is less; 2 when None.
    cached_rate : of regime "cached", all readers together; SpecError where it is asked for and None. [B/s]
    """
    if regime == "cached":
        if cached_rate is None:
            raise SpecError("no rate is known of reads that the page cache holds", key="cached_rate")
        return np.asarray(size_bytes / cached_rate + 0.0 * np.asarray(depth))
    q = np.maximum(depth, 1.0)
    transfer = size_bytes / (rate if single_rate is None else single_rate)
    if regime == "sequential":
        return np.asarray(np.maximum(transfer / q, size_bytes / rate))
    serve = request_time_s
    if best_depth is not None and overload_exponent is not None:
        serve = serve * np.maximum(q / best_depth, 1.0) ** overload_exponent
    saturated = serve + size_bytes / request_rate
    alone = np.maximum(latency_s + transfer, saturated)
    p = np.maximum(USUAL_SATURATION if saturation_exponent is None else saturation_exponent, 1.0)
    share = saturated * q / alone  # at most q: no power overflows that a drive could ask for
    joined = alone / q * (1.0 + share**p * (1.0 - q**-p)) ** (1.0 / p)
    return np.asarray(np.maximum(joined, size_bytes / rate))


@dataclass(frozen=True)
class ReadPoint:
    """One measured throughput: size [B], requests in flight, throughput [B/s]."""

    size_bytes: float
    depth: float
    bytes_per_s: float
    regime: Regime = "random"


@dataclass(frozen=True)
class Surface:
    """The figures of one surface, in SI units."""

    latency_s: float
    single_rate: float
    request_time_s: float
    request_rate: float
    rate: float
    best_depth: float | None = None
    overload_exponent: float | None = None
    saturation_exponent: float | None = None
    cached_rate: float | None = None

    def throughput(self, size_bytes: Array | float, depth: Array | float, regime: Regime = "random") -> Array:
        """Bytes a second at a request size and depth. [B/s]"""
        return np.asarray(size_bytes / read_seconds(size_bytes, depth, regime=regime, **vars(self)))


@dataclass(frozen=True)
class SurfaceFit:
    """A surface, how far it is from the points, and what those points could not tell."""

    surface: Surface
    residuals: tuple[float, ...]
    """Predicted / measured − 1, for each point."""
    undetermined: tuple[str, ...]
    """Members of `PARAMETERS` that the points hardly moved from their usual value."""


# What is usual, and how far drives lie from it: the spread is one standard deviation of the logarithm. Ratios and
# latencies are those of the drives in validate/curves, rounded.
_USUAL_LATENCY_S = 90e-6
_LATENCY_PER_REQUEST_TIME = 40.0
_REQUEST_RATE_PER_RATE = 1.3
"""Serving a request overlaps the transfer of others, so that less than its own transfer is added: 1.10 on the Phison
E27T and 1.71 on the M1 Max, whose points tell."""
_SPREAD = {"latency": 0.9, "single_rate": 0.7, "request_time": 1.2, "request_rate": 0.4, "rate": 0.1}
_USUAL_OVERLOAD, _OVERLOAD_SPREAD = 0.2, 0.15
_SATURATION_SPREAD = 1.0
"""Of the logarithm of what p has over 1."""
_MOST_SATURATION = 64.0
_BEND = "saturation_exponent"
_DECLINE = 0.02
_REMAINS = 0.5
"""A parameter keeping more than this share of the variance it had before the points is not determined by them."""


def fit_surface(points: Sequence[ReadPoint], *, known: Mapping[str, float] | None = None,
                scatter: float = 0.05, decline: float = _DECLINE) -> SurfaceFit:
    """The surface that fits measured points best, in the logarithm of the throughput.

    Least squares with what is usual for a drive as further, weak observations: three points give a sensible surface,
    many points overrule it. Unless given or shown otherwise: L is near 90 µs, a near L/40, r and R near the highest
    throughput seen, B near 1.3 R. Overload is looked for where throughput declines with depth. Cached reads, which are
    no reads of the device, give `cached_rate` and nothing else.

    Parameters
    ----------
    points : at least one random read unless the rate is known.
    known : members of `PARAMETERS` with a source of their own, held fixed. [s] or [B/s]
    scatter : how far a measured point is expected to lie from a surface, as a share of it.
    decline : a throughput lower than that of a smaller depth by more than this share is overload, not scatter.

    Raises
    ------
    CalibrationError
        With neither a random read nor a known rate, or with a point that is no measurement.
    MachineError
        scipy is not installed.
    """
    known = dict(known or {})
    if unknown := sorted(set(known) - set(PARAMETERS)):
        raise SpecError(f"found {unknown[0]!r}, expected some of {', '.join(PARAMETERS)}", key="known")
    if not all(math.isfinite(v) and v > 0 for v in known.values()):
        raise SpecError("every known figure is a positive number", key="known")
    if "rate" not in known and not any(p.regime == "random" for p in points):
        raise CalibrationError("a surface needs a known rate or a random read, found neither")
    if not all(math.isfinite(v) and v > 0 for p in points for v in (p.size_bytes, p.depth, p.bytes_per_s)):
        raise CalibrationError("a point has a positive size, depth and throughput")
    if not (math.isfinite(scatter) and scatter > 0):
        raise SpecError(f"found {scatter!r}, expected a positive share", key="scatter")
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise MachineError('fitting a surface needs scipy; install with: pip install "simmem[fit]"') from None

    size, depth, measured = (np.array([getattr(p, name) for p in points], dtype=np.float64)
                             for name in ("size_bytes", "depth", "bytes_per_s"))
    reads = {regime: np.array([p.regime == regime for p in points]) for regime in {p.regime for p in points}}
    best_depth = _best_depth(points, decline)
    free = [*(name for name in PARAMETERS if name not in known), _BEND]
    seen = max((p.bytes_per_s for p in points if p.regime != "cached"), default=0.0)
    held = [math.log(p.bytes_per_s) for p in points if p.regime == "cached"]
    cached_rate = math.exp(sum(held) / len(held)) if held else None

    def surface(x: Array) -> Surface:
        shift = dict(zip(free, map(math.exp, x), strict=False))
        latency = known.get("latency", _USUAL_LATENCY_S * shift.get("latency", 1.0))
        rate = known.get("rate", seen * shift.get("rate", 1.0))
        return Surface(
            latency_s=latency, rate=rate,
            single_rate=known.get("single_rate", rate * shift.get("single_rate", 1.0)),
            request_time_s=known.get("request_time",
                                     latency / _LATENCY_PER_REQUEST_TIME * shift.get("request_time", 1.0)),
            request_rate=known.get("request_rate", rate * _REQUEST_RATE_PER_RATE * shift.get("request_rate", 1.0)),
            best_depth=best_depth, overload_exponent=None if best_depth is None else max(float(x[-1]), 0.0),
            saturation_exponent=min(1.0 + (USUAL_SATURATION - 1.0) * shift[_BEND], _MOST_SATURATION),
            cached_rate=cached_rate)

    def predicted(x: Array) -> Array:
        found, result = surface(x), np.empty(len(points))
        for regime, where in reads.items():
            result[where] = found.throughput(size[where], depth[where], regime)
        return result

    usual = np.zeros(len(free))
    spread = np.array([{**_SPREAD, _BEND: _SATURATION_SPREAD}[name] for name in free])
    if best_depth is not None:
        usual, spread = np.append(usual, _USUAL_OVERLOAD), np.append(spread, _OVERLOAD_SPREAD)
    if len(usual):
        def distance(x: Array) -> Array:
            return np.concatenate([np.log(predicted(x) / measured) / scatter, (x - usual) / spread])

        # The caps make corners, where a single start can stick: begin from slower single requests as well.
        slower = np.array([name == "single_rate" for name in (*free, "overload")[:len(usual)]])
        starts = [usual, *(usual - step * slower for step in (1.0, 2.0) if slower.any())]
        found = min((least_squares(distance, x0, x_scale=spread) for x0 in starts), key=lambda fit: float(fit.cost))
        x, remaining = found.x, np.diag(np.linalg.inv(found.jac.T @ found.jac)) / spread**2
    else:
        x, remaining = usual, usual
    return SurfaceFit(
        surface(x), tuple(float(e) for e in predicted(x) / measured - 1.0),
        tuple(name for name, share in zip(free, remaining, strict=False) if share > _REMAINS and name != _BEND))


def _best_depth(points: Sequence[ReadPoint], decline: float) -> float | None:
    """The depth of the highest throughput, at the size where more depth costs most; None where it never costs."""
    worst, best = 1.0 - decline, None
    for size in {p.size_bytes for p in points}:
        curve = sorted((p for p in points if p.size_bytes == size and p.regime == "random"), key=lambda p: p.depth)
        if not curve:
            continue
        peak = max(curve, key=lambda p: p.bytes_per_s)
        past = [p.bytes_per_s / peak.bytes_per_s for p in curve if p.depth > peak.depth]
        if past and min(past) < worst:
            worst, best = min(past), peak.depth
    return best
