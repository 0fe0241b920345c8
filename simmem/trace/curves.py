"""What does `simmem replay` say about a trace: hits and bytes by policy and size?

One document (schema simmem.replay/1) with a curve per policy over the same grid of sizes, steady state and
cold start apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from simmem.errors import SpecError
from simmem.spec.precision import matrix_bytes_per_param
from simmem.trace.replay import ReplayCurve, lru_curve, window_curve
from simmem.trace.trace import Trace

__all__ = ["REPLAY_POLICIES", "replay_document", "unit_bytes_at"]

REPLAY_POLICIES = ("window", "lru")
_GRID = np.arange(1, 21) / 20
_WINDOWS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
_COLD_SHARE = 4
"""A quarter of the trace is cold start: an LRU cache of any size below the trace's working set is full by then."""


def replay_document(
    trace: Trace,
    *,
    policies: Sequence[str] = REPLAY_POLICIES,
    sizes_bytes: Sequence[float] | None = None,
    windows: Sequence[int] | None = None,
    scope: Literal["layer", "global"] = "layer",
    precision: str | None = None,
) -> dict[str, Any]:
    """Replay cache policies against a trace and return the `replay --json` document.

    Parameters
    ----------
    policies : of `REPLAY_POLICIES`.
    sizes_bytes : cache capacities for lru, of one layer's cache or (global) of the one cache; 5 % … 100 % of the
        units in steps of 5 % when None. [B]
    windows : lengths in tokens for the window policy, whose sizes are what they hold on average.
    scope : whose capacity it is; a window is always a layer's.
    precision : at which a unit's bytes are counted; the trace's own when None.

    Returns
    -------
    schema, trace {name, kind, digest}, unit_bytes, curves [{policy, scope, parameter, sizes_bytes, peak_bytes,
    hit_ratio, bytes_per_token, regret}] and cold {tokens, first_uses, curves [{policy, hit_ratio, bytes_per_token}]}.
    `regret` against Belady is null: Belady's policy is not replayed.

    Raises
    ------
    SpecError
        An unknown policy, no sizes, or sizes that are negative.
    TraceError
        The trace is too short to tell a cold start from steady state.
    """
    header = trace.header
    unknown = [name for name in policies if name not in REPLAY_POLICIES]
    if unknown or not policies:
        raise SpecError(f"found {', '.join(unknown) or 'no policy'}, expected some of {', '.join(REPLAY_POLICIES)}",
                        key="policies")
    unit_bytes = unit_bytes_at(trace, precision)
    cold_tokens = header.n_tokens // _COLD_SHARE
    lengths = [k for k in _WINDOWS if k <= cold_tokens] if windows is None else list(windows)
    if "window" in policies:
        cold_tokens = max(cold_tokens, max(lengths, default=0))
    curves: list[ReplayCurve] = []
    for policy in dict.fromkeys(policies):
        if policy == "window":
            curves.append(window_curve(trace, lengths, cold_tokens=cold_tokens))
        else:
            all_units = header.n_units * (header.n_layers if scope == "global" else 1)
            capacities = _GRID * all_units if sizes_bytes is None else np.asarray(sizes_bytes) / unit_bytes
            # a capacity in bytes holds whole units; the nudge keeps 3 * unit_bytes from holding 2
            curves.append(lru_curve(trace, np.floor(capacities + 1e-9), scope=scope, cold_tokens=cold_tokens))
    return {
        "schema": "simmem.replay/1",
        "trace": {"name": header.name, "kind": header.kind, "digest": header.digest},
        "unit_bytes": unit_bytes,
        "curves": [_steady(curve, unit_bytes) for curve in curves],
        "cold": {
            "tokens": cold_tokens,
            "first_uses": curves[0].cold_first_uses,
            "curves": [_cold(curve, unit_bytes) for curve in curves],
        },
    }


def unit_bytes_at(trace: Trace, precision: str | None) -> float:
    """Bytes of one unit of a trace, at its own precision or another. [B]"""
    header = trace.header
    if precision is None or precision == header.unit_precision:
        return header.unit_bytes
    return header.unit_bytes * matrix_bytes_per_param(precision) / matrix_bytes_per_param(header.unit_precision)


def _steady(curve: ReplayCurve, unit_bytes: float) -> dict[str, Any]:
    return {
        "policy": curve.policy,
        "scope": curve.scope,
        "parameter": curve.parameter.tolist(),
        "sizes_bytes": (curve.sizes_units * unit_bytes).tolist(),
        "peak_bytes": (curve.peak_units * unit_bytes).tolist(),
        "hit_ratio": curve.hit_ratio.tolist(),
        "bytes_per_token": curve.bytes_per_token(unit_bytes).tolist(),
        "regret": None,
    }


def _cold(curve: ReplayCurve, unit_bytes: float) -> dict[str, Any]:
    accesses = np.maximum(curve.cold_hits + curve.cold_misses, 1)
    return {
        "policy": curve.policy,
        "hit_ratio": (curve.cold_hits / accesses).tolist(),
        "bytes_per_token": (curve.cold_misses * (unit_bytes / max(curve.cold_tokens, 1))).tolist(),
    }
