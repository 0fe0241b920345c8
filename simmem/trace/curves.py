"""What does `simmem replay` say about a trace: hits and bytes by policy and size?

One document (schema simmem.replay/1) with a curve per policy over the same grid of sizes, steady state and
cold start apart.

The regret of a cache is its misses in steady state over the fewest that any cache of the same capacity and scope
could have there (Belady's), less 1: 0 is the optimum, 1 is twice the reads. Where the optimum has no misses it is 0 for
a cache that has none either, and null, for it has no value, for one that has some.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.spec.precision import matrix_bytes_per_param
from simmem.trace.bits import words_of
from simmem.trace.caches import POLICIES, Policy, Scope
from simmem.trace.prefetch import Predictor, predicted_units
from simmem.trace.replay import ReplayCurve, cache_curve, fewest_misses, window_curve
from simmem.trace.stepping import step_through
from simmem.trace.trace import Trace

__all__ = ["PAGE_BYTES", "QUICK_POLICIES", "REPLAY_POLICIES", "replay_document", "unit_bytes_at"]

REPLAY_POLICIES = POLICIES
QUICK_POLICIES: tuple[Policy, ...] = ("window", "lru", "pin-hot", "belady")
"""What a trace carries curves of: a reference for each question, computed in a second or two."""
PAGE_BYTES = 4096
"""A unit in the page cache fills whole pages of its own, as in a file whose units are aligned for direct reads. [B]"""
_GRID = np.arange(1, 11) / 10
_LEVEL_GRID = np.arange(1, 6) / 5
_WINDOWS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
_COLD_SHARE = 4
"""A quarter of the trace is cold start: an LRU cache of any size below the trace's working set is full by then."""
_MOST_UNITS = 2**53


def replay_document(
    trace: Trace,
    *,
    policies: Sequence[str] = QUICK_POLICIES,
    sizes_bytes: Sequence[float] | None = None,
    windows: Sequence[int] | None = None,
    scope: Scope = "layer",
    precision: str | None = None,
    page_cache_bytes: float | None = None,
    predictor: Predictor | None = None,
) -> dict[str, Any]:
    """Replay cache policies against a trace and return the `replay --json` document.

    Parameters
    ----------
    policies : of `REPLAY_POLICIES`.
    sizes_bytes : capacities, of one layer's cache or (global) of the one cache; when None 10 % … 100 % of the units in
        steps of 10 %, or of 20 % where there are other levels, which take longer; each once, at least a unit. [B]
    windows : lengths in tokens for the window policy, whose sizes are what they hold on average.
    scope : whose capacity it is; a window is always a layer's.
    precision : at which a unit's bytes are counted; the trace's own when None.
    page_cache_bytes : what the operating system's page cache beneath holds; none when None. [B]
    predictor : reads units ahead of each step; none when None.

    Returns
    -------
    schema, trace {name, kind, digest}, unit_bytes, curves [{policy, scope, parameter, sizes_bytes, peak_bytes,
    hit_ratio, bytes_per_token, regret}], cold {tokens, first_uses, curves [{policy, hit_ratio, bytes_per_token}]} and
    levels, null unless there is a page cache or a predictor (see `_levels`).

    Raises
    ------
    SpecError
        An unknown policy, no sizes, or sizes that are negative.
    TraceError
        The trace is too short to tell a cold start from steady state.
    """
    header = trace.header
    chosen = sorted((name for name in REPLAY_POLICIES if name in policies), key=list(policies).index)
    unknown = [name for name in policies if name not in REPLAY_POLICIES]
    if unknown or not chosen:
        raise SpecError(f"found {', '.join(unknown) or 'no policy'}, expected some of {', '.join(REPLAY_POLICIES)}",
                        key="policies")
    unit_bytes = unit_bytes_at(trace, precision)
    cold_tokens = header.n_tokens // _COLD_SHARE
    lengths = [k for k in _WINDOWS if k <= cold_tokens] if windows is None else list(windows)
    if "window" in chosen:
        cold_tokens = max(cold_tokens, max(lengths, default=0))
    all_units = header.n_units * (header.n_layers if scope == "global" else 1)
    layered = page_cache_bytes is not None or predictor is not None
    grid = _LEVEL_GRID if layered else _GRID
    capacities = grid * all_units if sizes_bytes is None else np.asarray(sizes_bytes) / unit_bytes
    # a capacity in bytes holds whole units; the nudge keeps 3 * unit_bytes from holding 2
    capacities = np.minimum(np.floor(capacities + 1e-9), _MOST_UNITS).astype(np.int64)
    if sizes_bytes is None:  # of a few units several steps are the same, or nothing
        capacities = np.unique(np.maximum(capacities, 1))
    curves: dict[Policy, ReplayCurve] = {}
    for policy in chosen:
        if policy == "window":
            curves[policy] = window_curve(trace, lengths, cold_tokens=cold_tokens)
        else:
            curves[policy] = cache_curve(trace, policy, capacities, scope=scope, cold_tokens=cold_tokens)
    best: dict[bool, NDArray[np.int64]] = {False: curves["belady"].misses} if "belady" in curves else {}
    for policy, curve in curves.items():
        windowed = policy == "window"
        if windowed not in best:
            best[windowed] = fewest_misses(trace, curve)
    return {
        "schema": "simmem.replay/1",
        "trace": {"name": header.name, "kind": header.kind, "digest": header.digest},
        "unit_bytes": unit_bytes,
        "curves": [_steady(curve, best[policy == "window"], unit_bytes) for policy, curve in curves.items()],
        "cold": {
            "tokens": cold_tokens,
            "first_uses": next(iter(curves.values())).cold_first_uses,
            "curves": [_cold(curve, unit_bytes) for curve in curves.values()],
        },
        "levels": _levels(trace, list(curves.values()), unit_bytes, page_cache_bytes, predictor) if layered else None,
    }


def unit_bytes_at(trace: Trace, precision: str | None) -> float:
    """Bytes of one unit of a trace, at its own precision or another. [B]"""
    header = trace.header
    if precision is None or precision == header.unit_precision:
        return header.unit_bytes
    return header.unit_bytes * matrix_bytes_per_param(precision) / matrix_bytes_per_param(header.unit_precision)


def _steady(curve: ReplayCurve, fewest: NDArray[np.int64], unit_bytes: float) -> dict[str, Any]:
    return {
        "policy": curve.policy,
        "scope": curve.scope,
        "parameter": curve.parameter.tolist(),
        "sizes_bytes": (curve.sizes_units * unit_bytes).tolist(),
        "peak_bytes": (curve.peak_units * unit_bytes).tolist(),
        "hit_ratio": curve.hit_ratio.tolist(),
        "bytes_per_token": curve.bytes_per_token(unit_bytes).tolist(),
        "regret": [(found / least - 1.0) if least else (None if found else 0.0)
                   for found, least in zip(curve.misses.tolist(), fewest.tolist(), strict=True)],
    }


def _cold(curve: ReplayCurve, unit_bytes: float) -> dict[str, Any]:
    accesses = np.maximum(curve.cold_hits + curve.cold_misses, 1)
    return {
        "policy": curve.policy,
        "hit_ratio": (curve.cold_hits / accesses).tolist(),
        "bytes_per_token": (curve.cold_misses * (unit_bytes / max(curve.cold_tokens, 1))).tolist(),
    }


def _levels(trace: Trace, curves: Sequence[ReplayCurve], unit_bytes: float, page_cache_bytes: float | None,
            predictor: Predictor | None) -> dict[str, Any]:
    """What prefetching and the page cache beneath make of each curve in steady state (`simmem.trace.stepping`).

    dram_bytes is what both levels take together, a window's at its peak; held_twice_bytes the part of the page cache
    that the private cache holds too, after a token on average. demand_bytes_per_token are those read while a step
    waits, ahead_bytes_per_token those the predictor asked for, of which wasted_bytes_per_token were not used. All of
    these are read through the page cache; storage_bytes_per_token are the whole pages that it has to read.
    """
    header = trace.header
    slot_bytes = float(np.ceil(unit_bytes / PAGE_BYTES)) * PAGE_BYTES
    pages = None if page_cache_bytes is None else int(min(page_cache_bytes / slot_bytes + 1e-9, _MOST_UNITS))
    predicted = None if predictor is None else predicted_units(trace, predictor)
    rows = []
    for curve in curves:
        found = step_through(words_of(trace.active), curve.policy, curve.parameter, curve.scope,
                             cold_tokens=curve.cold_tokens, predicted=predicted, page_units=pages)
        missed, wasted, ahead, stored, both = (part[curve.cold_tokens :].sum(axis=0) / curve.tokens for part in (
            found.missed, found.wasted, found.ahead, found.from_storage, found.in_both))
        read = missed + wasted
        page_hits = np.divide(read - stored, read, out=np.ones_like(read), where=read > 0)
        layers = header.n_layers if curve.scope == "layer" else 1
        rows.append({
            "policy": curve.policy,
            "scope": curve.scope,
            "dram_bytes": (curve.peak_units * (unit_bytes * layers) + (page_cache_bytes or 0.0)).tolist(),
            "demand_bytes_per_token": ((missed - ahead) * unit_bytes).tolist(),
            "ahead_bytes_per_token": ((ahead + wasted) * unit_bytes).tolist(),
            "wasted_bytes_per_token": (wasted * unit_bytes).tolist(),
            "page_cache_hit_ratio": None if pages is None else page_hits.tolist(),
            "storage_bytes_per_token": None if pages is None else (stored * slot_bytes).tolist(),
            "held_twice_bytes": None if pages is None else (both * slot_bytes).tolist(),
        })
    return {
        "page_cache": None if pages is None else {"size_bytes": page_cache_bytes, "page_bytes": PAGE_BYTES,
                                                  "slot_bytes": slot_bytes, "units": pages},
        "prefetch": predictor if predictor is None or isinstance(predictor, str) else
        {"recall": predictor.recall, "precision": predictor.precision},
        "curves": rows,
    }
