"""How long does an op take by a fitted cost model, how far may that be off, and is it inside what was measured?

    t = max(W / rate, flop / peak, (overhead + (memory^p + arithmetic^p)^(1/p)) · exp(correction))

Overhead, memory and arithmetic are sums of coefficient · feature; with p = 1 all of it adds up, and the larger p the
better memory and arithmetic overlap. The floors are those of the level of memory that the weights live in. Evaluated in
numpy alone: a plan needs neither scipy nor scikit-learn.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from simmem.cost.features import Work, feature
from simmem.schedule import DemandClass, OpKind, Schedule
from simmem.spec.costmodel import FittedCost, Group, Residual, Spline
from simmem.spec.device import Agent

__all__ = [
    "PARTS",
    "class_group",
    "class_work",
    "correction",
    "floor_s",
    "half_width",
    "joined",
    "octaves_outside",
    "physical_s",
    "product_s",
]

Array = NDArray[np.float64]

PARTS = {
    "launches": "overhead", "rows": "overhead",
    "weights": "memory", "activations": "memory", "row_starts": "memory", "far_weights": "memory",
    "passes": "memory",
    "flop": "arithmetic", "far_flop": "arithmetic", "tiles": "arithmetic",
    "fit_tiles": "arithmetic",
}
"""What a feature is part of, and so which figures of the device it would be faster with."""


_NOTHING_KNOWN = 7.0
"""Half of an interval that spans a factor of a thousand either way."""


def physical_s(group: Group, work: Work, slower: Mapping[str, Array | float] | None = None) -> Array:
    """The physical terms, joined. [s]

    slower : factor on the terms of each part: "overhead", "memory", "arithmetic".
    """
    slower = slower or {}
    parts: dict[str, Array] = {part: np.zeros(()) for part in ("overhead", "memory", "arithmetic")}
    for term in group.terms:
        part = PARTS[term.feature]
        parts[part] = parts[part] + term.coefficient * feature(term, work) * slower.get(part, 1.0)
    return parts["overhead"] + joined(parts["memory"], parts["arithmetic"], group.overlap)


def joined(memory: Array, arithmetic: Array, overlap: float) -> Array:
    """(memory^p + arithmetic^p)^(1/p), without overflow. [s]"""
    if overlap == 1.0:
        return memory + arithmetic
    larger = np.maximum(memory, arithmetic)
    share = np.minimum(memory, arithmetic) / np.maximum(larger, 1e-300)
    return np.asarray(larger * (1.0 + share**overlap) ** (1.0 / overlap))


def product_s(group: Group, work: Work, slower: Mapping[str, Array | float] | None = None,
              error: Array | float = 1.0) -> Array:
    """Seconds of ops by their group: the sum, corrected, and never below the floors of its level. [s]

    error : factor on the sum, as of a draw of the model's own error.
    """
    found = physical_s(group, work, slower) * error
    if group.residual is not None:
        found = found * np.exp(correction(group.residual, work))
    return np.asarray(np.maximum(found, floor_s(group, work, slower)))


def floor_s(group: Group, work: Work, slower: Mapping[str, Array | float] | None = None) -> Array:
    """What ops take at the fastest that was measured of their level of memory and of their arithmetic. [s]"""
    slower = slower or {}
    floor = np.asarray(work.weight_bytes / group.bytes_per_s * slower.get("memory", 1.0))
    if group.flop_per_s is not None:
        floor = np.maximum(floor, work.flop / group.flop_per_s * slower.get("arithmetic", 1.0))
    return floor


def correction(residual: Residual, work: Work) -> Array:
    """Logarithm of the factor on the physical part; constant beyond the ends of each axis."""
    bases = [_basis(s, np.asarray(work.at(s.axis), dtype=np.float64)) for s in residual.splines]
    total: Array = np.asarray(residual.intercept)
    for spline, basis in zip(residual.splines, bases, strict=True):
        total = total + basis @ np.array(spline.coefficients)
    for pair in residual.pairs:
        total = total + ((bases[pair.first] @ np.array(pair.coefficients)) * bases[pair.second]).sum(axis=-1)
    return np.asarray(total)


def _basis(spline: Spline, x: Array) -> Array:
    """B-spline basis at x, (..., n_coefficients): Cox–de Boor."""
    knots, degree = np.array(spline.knots), spline.degree
    first, last = knots[degree], knots[-degree - 1]
    at = np.clip(np.log2(np.maximum(x, 2.0**-64)), first, last)[..., None]
    found = ((knots[:-1] <= at) & (at < knots[1:])).astype(np.float64)
    for k in range(1, degree + 1):
        rising = (at - knots[: -k - 1]) / (knots[k:-1] - knots[: -k - 1])
        falling = (knots[k + 1:] - at) / (knots[k + 1:] - knots[1:-k])
        found = rising * found[..., :-1] + falling * found[..., 1:]
    return np.asarray(found)


def octaves_outside(group: Group, work: Work) -> Array:
    """How far ops lie outside the range of what was measured, in doublings, added over rows, columns and batch."""
    total: Array = np.zeros(())
    for axis, (low, high) in group.range.items():
        at = np.maximum(np.asarray(work.at(axis), dtype=np.float64), 1e-9)
        total = total + np.maximum(np.log2(at / high), 0.0) + np.maximum(np.log2(low / at), 0.0)
    return total


def half_width(group: Group, work: Work) -> Array:
    """Half of the 90 % interval of log(measured / predicted).

    Outside the range that was measured it grows by itself once more with every doubling: nothing is known there, so the
    rule is only that it widens.
    """
    i = group.interval
    power: Array = np.asarray(i.intercept)
    for axis, slope in i.slopes.items():
        low, high = group.range[axis]
        power = power + slope * np.log2(np.clip(work.at(axis), low, high))
    scale = np.clip(np.exp(power), *i.bounds)
    return np.asarray(np.minimum(i.quantile * scale * (1.0 + octaves_outside(group, work)), _NOTHING_KNOWN))


# --- ops of a schedule ----------------------------------------------------------------------------------------------


def class_group(model: FittedCost, what: DemandClass, agent: Agent) -> Group | None:
    """The group that times a class of ops; None where nothing like it was fitted.

    Weights of a plan come from memory, not from a cache, and all threads that were measured work on them.
    """
    if what.kind in (OpKind.COMPUTE, OpKind.PREDICTOR, OpKind.DRAFT):
        batch = what.products.batch if what.products else 1.0
        kind, dtype = "gemm" if batch > 1 else "gemv", agent.compute_precision or what.precision
    elif what.kind is OpKind.MEMORY:
        kind, dtype = "upkeep", None  # rows are copied whole, whatever is in them
    else:
        return None
    found = [g for g in model.groups if g.agent == what.agent and g.kind == kind and dtype in (g.dtype, None)
             and g.level != "cache" and not g.variant]
    return max(found, key=lambda g: g.threads, default=None)


def class_work(schedule: Schedule, index: int | NDArray[np.int64], what: DemandClass, memory: str, group: Group
               ) -> Work:
    """A class of ops as products of one shape, or several classes that differ in their amounts alone.

    Where the class does not say what it multiplies, every kernel is taken for one square matrix.
    """
    shape = what.products
    launches, flop = schedule.requests[index], schedule.flop[index]
    moved = schedule.bytes.get(f"memory.{memory}")
    n_bytes = np.zeros(schedule.n_candidates) if moved is None else moved[index]
    count = np.maximum(launches, 1.0) if shape is None else np.full(schedule.n_candidates, shape.count)
    params = n_bytes / group.bytes_per_param / count
    rows, cols = (np.sqrt(params),) * 2 if shape is None else (params / shape.cols, np.asarray(shape.cols))
    return Work(launches, count, 1.0 if shape is None else shape.batch, rows, cols, n_bytes, flop,
                group.bytes_per_param, group.units, whole=False)
