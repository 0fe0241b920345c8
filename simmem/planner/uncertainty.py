"""How sure is a prediction, and what would change it? Draws and changes of figures, as columns.

A figure's kind gives its 90 % range; a draw is log-normal within it, each side on its own. All
figures of a link are one curve, and a draw multiplies the whole curve. Nothing here knows how a
prediction is made: it only makes factors that `cost.durations` applies.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simmem.policy.context import Context
from simmem.schedule import Schedule
from simmem.spec.base import Figure, Kind, weakest

__all__ = [
    "N_DRAWS",
    "TRACE_FIGURE",
    "curve_factors",
    "draws",
    "scale_trace",
    "uncertain_figures",
    "weakest_kind",
]

Array = NDArray[np.float64]

N_DRAWS = 256
SEED = 20231221
Z_90 = 1.6448536269514722
"""95 % quantile of the standard normal: the edges of a central 90 % range."""
TRACE_FIGURE = "trace.active_share"
_CURVE = {"rate": 1, "request_rate": 1, "latency": -1, "request_time": -1}


def uncertain_figures(context: Context) -> dict[str, tuple[float, float]]:
    """Figure key → 90 % range as factors; links appear once, as "link.<name>.throughput"."""
    found: dict[str, tuple[float, float]] = {}
    device = context.device
    for key, figure in device.figures().items():
        part, name, field = (*key.split(".", 2), "")[:3]
        if part == "link":
            continue
        if field in ("capacity", "reserved") or "energy" in field or part in ("idle", "interference"):
            continue
        del name
        found[key] = figure.factors
    for name, link in device.link.items():
        curve = [f for f in (getattr(link, field) for field in _CURVE) if isinstance(f, Figure)]
        kind = weakest([f.kind for f in curve])
        widest = max(curve, key=lambda f: (f.kind is kind, f.factors[1] / f.factors[0]))
        found[f"link.{name}.throughput"] = widest.factors
    if context.trace is not None and context.trace.header.active_share_range is not None:
        low, high = context.trace.header.active_share_range
        share = context.trace.active_share
        found[TRACE_FIGURE] = (min(low / share, 1.0), max(high / share, 1.0))
    return found


def curve_factors(key: str, factor: float | Array) -> dict[str, float | Array]:
    """A change of one figure as the factors that cost understands; a link's whole curve moves."""
    if key.startswith("link.") and key.endswith(".throughput"):
        name = key.removesuffix(".throughput")
        return {f"{name}.{field}": factor if sign > 0 else 1.0 / factor for field, sign in _CURVE.items()}
    return {key: factor}


def draws(context: Context, n: int = N_DRAWS) -> dict[str, Array]:
    """Factors of `n` draws for every figure, key → (n,). The seed is fixed: same plan, same answer."""
    rng = np.random.default_rng(SEED)
    found: dict[str, Array] = {}
    for key, (low, high) in sorted(uncertain_figures(context).items()):
        z = rng.standard_normal(n) / Z_90
        factor = np.where(z >= 0, high ** np.maximum(z, 0.0), low ** np.maximum(-z, 0.0))
        if key.endswith("_share") and key != TRACE_FIGURE:  # no draw makes a share exceed one
            part, name, field = key.split(".", 2)
            value = getattr(getattr(context.device, part)[name], field).value
            factor = np.minimum(factor, 1.0 / value)
        found.update({k: np.asarray(v) for k, v in curve_factors(key, factor).items()})
    return found


def scale_trace(schedule: Schedule, factor: float | Array) -> Schedule:
    """The schedule with everything that the trace's activity demands multiplied, per candidate."""
    from dataclasses import replace

    rows = np.array([c.from_trace for c in schedule.classes])[:, None]
    scale = np.where(rows, factor, 1.0)
    return replace(schedule, flop=schedule.flop * scale, requests=schedule.requests * scale,
                   bytes={k: v * scale for k, v in schedule.bytes.items()})


def weakest_kind(context: Context, agent: str, *, uses_trace: bool) -> Kind:
    """The least well known figure that an answer computed on `agent` rests on."""
    kept = {f"agent.{agent}", f"memory.{context.memory_of(agent)}", *(f"link.{n}" for n in context.path_to(agent))}
    if uses_trace and context.host_agent:
        kept.add(f"agent.{context.host_agent}")
    kinds = [f.kind for k, f in context.device.figures().items()
             if ".".join(k.split(".")[:2]) in kept and "energy" not in k]
    if uses_trace and context.trace is not None:
        kinds.append(Kind(context.trace.header.weakest_kind))
    return weakest(kinds)
