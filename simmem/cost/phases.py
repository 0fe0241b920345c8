"""What did plans that were run say of the time of a phase, and which ops does that correct?

A factor on all ops of one phase, precision and agent: measured ≈ factor · predicted (`simmem.cost.phasefit` learns and
judges it). `simmem.cost.roofline` applies it to what an op would take otherwise, so both engines see the same
seconds, and never below the roofline: no factor makes an op faster than the full rates of its agent or link.

Runs decode a single sequence, so a factor on products says nothing of prompts or of batches and is not applied there.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from simmem.schedule import DemandClass, OpKind
from simmem.spec.costmodel import PhaseFactor, PhaseName
from simmem.spec.device import Device

__all__ = ["class_phase", "drawn_factor", "keeper", "phase_key", "phase_kind", "phase_of"]

Array = NDArray[np.float64]

_OF_KIND: dict[OpKind, PhaseName] = {
    OpKind.IO: "flash", OpKind.TRANSFER: "copy", OpKind.MEMORY: "upkeep", OpKind.PREDICTOR: "predictor",
    OpKind.SYNC: "step"}
_OF_CLASS: dict[str, PhaseName] = {"ffn": "FFN", "head": "head"}
_MULTIPLIES = ("predictor", "attention", "FFN", "head")
_MOVES = ("flash", "copy")


def phase_of(what: DemandClass) -> PhaseName:
    """The phase of a run that a class of ops is part of; what computes and is neither FFN nor head is attention."""
    return _OF_CLASS.get(what.name) or _OF_KIND.get(what.kind, "attention")


def phase_kind(phase: PhaseName, dtype: str, agent: str, keeps: str) -> tuple[PhaseName, str, str]:
    """What a factor is told apart by: phase, precision and agent; the last two are empty where they do not matter.

    keeps : the agent that rearranges what `agent` computes with.
    """
    if phase in _MOVES:
        return phase, "", ""
    return phase, dtype if phase in _MULTIPLIES else "", keeps if phase == "upkeep" else agent


def keeper(device: Device, agent: str) -> str:
    """Who rearranges the rows that an agent computes with: in main memory the processor, elsewhere the agent itself."""
    host = [name for name, a in device.agent.items() if a.memory == device.host]
    if device.agent[agent].memory != device.host or not host:
        return agent
    return "cpu" if "cpu" in host else host[0]


def class_phase(device: Device, what: DemandClass) -> PhaseFactor | None:
    """The factor that corrects a class of ops; None where runs said nothing of it."""
    model = device.cost_model
    if model is None or not model.phases or what.kind is OpKind.DRAFT:  # no run had a draft model
        return None
    name = phase_of(what)
    if name in _MULTIPLIES and what.products is not None and what.products.batch > 1:
        return None
    if name == "flash" and model.name != device.name:  # it was given the drive of another
        return None
    agent = what.agent or ""
    kind = phase_kind(name, what.precision, agent, agent)
    return next((p for p in model.phases if (p.phase, p.dtype, p.agent) == kind), None)


def phase_key(phase: PhaseFactor) -> str:
    """The factor that stands for the error of a phase; to the power of its range, it is the error's."""
    return f"cost_model.phase.{phase.phase}.{phase.dtype}.{phase.agent}"


def drawn_factor(phase: PhaseFactor, factors: Mapping[str, Array | float]) -> Array | float:
    """The factor on a phase, or what a draw makes of it: 1/e and e stand for the ends of its 90 % range."""
    drawn = factors.get(phase_key(phase))
    if drawn is None:
        return phase.factor
    power = np.log(drawn)
    return np.asarray(phase.factor * np.where(power >= 0, phase.high / phase.factor, phase.factor / phase.low) ** power)
