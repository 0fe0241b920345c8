"""How sure is a prediction, and what would change it? Draws and changes of figures, as columns.

A figure states its 90 % range or its kind gives one; a draw is log-normal within it, each side on
its own. The figures of a link are one curve: a draw moves them together, each within its range.
Nothing here knows how a prediction is made: it only makes factors that `cost.durations` applies.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
from numpy.typing import NDArray

from simmem.cost.phases import phase_key
from simmem.cost.roofline import error_key
from simmem.policy.context import Context
from simmem.spec.base import Kind, weakest

__all__ = [
    "N_DRAWS",
    "TRACE_STREAM",
    "curve_factors",
    "draws",
    "spread",
    "uncertain_figures",
    "weakest_kind",
]

Array = NDArray[np.float64]

N_DRAWS = 256
SEED = 20231221
Z_90 = 1.6448536269514722
"""95 % quantile of the standard normal: the edges of a central 90 % range."""
TRACE_STREAM = 10_000
"""Seed of the draws of the trace's law, apart from those of the device's figures."""
COST_STREAM = 20_000
"""Seed of the draws of a cost model's own error."""
_CURVE = {"rate": 1, "request_rate": 1, "single_rate": 1, "latency": -1, "request_time": -1}
_OWN = ("saturation_exponent", "batch_time", "reader_time")
"""Figures of a link that are no part of how fast its device is."""


def uncertain_figures(context: Context) -> tuple[str, ...]:
    """Keys of the figures that a latency can depend on, sorted; a link appears once, as "link.<name>.throughput"."""
    device = context.device
    keys = [key for key in device.figures() if key.split(".")[0] in ("agent", "memory")
            and key.split(".")[-1] not in ("capacity", "reserved") and "energy" not in key]
    keys += [f"link.{name}.{field}" for name, link in device.link.items() for field in _OWN if getattr(link, field)]
    return tuple(sorted([*keys, *(f"link.{name}.throughput" for name in device.link)]))


def curve_factors(key: str, factor: float | Array) -> dict[str, float | Array]:
    """A change of one figure as the factors that cost understands; a link's whole curve moves."""
    if key.startswith("link.") and key.endswith(".throughput"):
        name = key.removesuffix(".throughput")
        return {f"{name}.{field}": factor if sign > 0 else 1.0 / factor for field, sign in _CURVE.items()}
    return {key: factor}


def draws(context: Context, n: int = N_DRAWS) -> dict[str, Array]:
    """Factors of `n` draws for every figure, key → (n,). The seed is fixed: same plan, same answer."""
    found: dict[str, Array] = {}
    figures = context.device.figures()
    for index, key in enumerate(uncertain_figures(context)):
        if key in figures:
            figure = figures[key]
            factor = spread(index, *figure.factors, n)
            # No draw makes a share exceed one.
            found[key] = np.minimum(factor, 1.0 / figure.value) if key.endswith("_share") else factor
            continue
        for field, sign in _CURVE.items():  # one curve: its figures move together, each within its own range
            part = f"{key.removesuffix('.throughput')}.{field}"
            if part in figures:
                low, high = figures[part].factors
                found[part] = spread(index, low, high, n) if sign > 0 else spread(index, high, low, n)
    model = context.device.cost_model
    own = {*map(error_key, model.groups), *map(phase_key, model.phases)} if model else set()
    for key in sorted(own):
        # Shapes of one kind, and ops of one phase, are taken to be off together, which is the widest they can be.
        found[key] = spread(COST_STREAM + zlib.crc32(key.encode()), 1.0 / math.e, math.e, n)
    return found


def spread(stream: int, low: float | Array, high: float | Array, n: int = N_DRAWS) -> Array:
    """`n` factors with median 1 and `low`, `high` as 5 % and 95 % quantiles: log-normal on each side.

    `stream` seeds them; with low and high exchanged the same draws go the other way.
    """
    z = np.random.default_rng([SEED, stream]).standard_normal(n) / Z_90
    return np.asarray(np.where(z >= 0, high ** np.maximum(z, 0.0), low ** np.maximum(-z, 0.0)))


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
