"""Which ops of a plan are timed by a cost model fitted to this very device, or corrected by what was run on it, and is
the model asked beyond its range?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmem.cost.fitted import class_group, class_work, half_width, octaves_outside
from simmem.cost.phases import class_phase
from simmem.planner.candidate import Candidate
from simmem.schedule import OpKind, Schedule
from simmem.spec.costmodel import Group, PhaseFactor
from simmem.units import format_quantity

__all__ = ["FittedUse", "fitted_use"]

_COMPUTES = (OpKind.COMPUTE, OpKind.PREDICTOR, OpKind.DRAFT, OpKind.MEMORY)


@dataclass(frozen=True)
class FittedUse:
    """What `evidence` and the report say of the cost model."""

    cost_model: str = "roofline"
    extrapolating: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Op:
    group: Group
    half_width: float
    outside: float


def fitted_use(candidate: Candidate, rows: NDArray[np.int64]) -> FittedUse:
    """How a plan uses its device's cost model, in its decode steps at these table rows and in its prompt."""
    device = candidate.context.device
    if device.cost_model is None:
        return FittedUse()
    found: dict[str, _Op] = {}
    left: set[str] = set()
    learnt: dict[str, PhaseFactor] = {}
    for schedule in (candidate.policy.decode(candidate.context, candidate.block, rows),
                     candidate.policy.prefill(candidate.context, candidate.block)):
        for index, what in enumerate(schedule.classes):
            if not schedule.present[index].any():
                continue
            phase = class_phase(device, what)
            if phase is not None:
                learnt[f"{phase.phase} {phase.dtype}".strip()] = phase
            if what.kind not in _COMPUTES or what.agent is None or not device.cost_model.groups:
                continue
            agent = device.agent[what.agent]
            group = class_group(device.cost_model, what, agent)
            if group is None:
                left.add(what.name)
                continue
            op = _worst(schedule, index, agent.memory, group)
            key = f"{group.kind} {group.dtype}".strip()
            if key not in found or op.outside > found[key].outside:
                found[key] = op
    corrected = _corrected(learnt)
    if not found:
        none = (f"the cost model of {device.name} was fitted to no op of this plan",)
        return FittedUse("roofline" + corrected.cost_model, notes=corrected.notes or none)
    beyond = {key: op.outside for key, op in found.items() if op.outside > 0}
    points = sum({id(op.group): op.group.n_points for op in found.values()}.values())
    notes = [f"compute times come from a cost model fitted to {points} measurements of this device; its own error, "
             + ", ".join(f"{key} ±{format_quantity(float(np.sinh(op.half_width)), 'ratio', 2)}"
                         for key, op in sorted(found.items()))
             + " at 90 %, is part of the interval"]
    if beyond:
        notes.append("it is EXTRAPOLATING: "
                     + ", ".join(f"{key} by a factor of {2**octaves:.3g}" for key, octaves in sorted(beyond.items()))
                     + " beyond the shapes that were measured, where the interval widens by rule, not by knowledge")
    if left:
        notes.append(f"{', '.join(sorted(left))}: nothing like it was fitted, so the roofline says how long it takes")
    return FittedUse("fitted: " + ", ".join(sorted(found)) + ("; else roofline" if left else "") + corrected.cost_model,
                     bool(beyond), (*notes, *corrected.notes))


def _corrected(learnt: dict[str, PhaseFactor]) -> FittedUse:
    """What to add for the phases of a plan that runs have corrected."""
    if not learnt:
        return FittedUse("")
    factors = [f"{name} × {p.factor:.3g} ({p.low:.3g} to {p.high:.3g}, {p.rows} rows)"
               for name, p in sorted(learnt.items())]
    return FittedUse(f"; corrected by runs: {', '.join(sorted(learnt))}", notes=(
        "runs here took other times than the figures say, so that these are multiplied: " + ", ".join(factors),))


def _worst(schedule: Schedule, index: int, memory: str, group: Group) -> _Op:
    """The column of a class that lies furthest outside what was measured."""
    here = schedule.present[index]
    work = class_work(schedule, index, schedule.classes[index], memory, group)
    outside = np.broadcast_to(octaves_outside(group, work), here.shape)[here]
    wide = np.broadcast_to(half_width(group, work), here.shape)[here]
    return _Op(group, float(wide.max()), float(outside.max()))
