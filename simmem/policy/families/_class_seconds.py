"""What does an op of each class take at least? At achieved rates: the cost layer knows more than a schedule needs."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from simmem.policy.context import Context
from simmem.schedule import DRAFT, DemandClass, OpKind, Schedule
from simmem.spec.device import Agent, Device

__all__ = ["class_seconds", "memory_rate", "uncached"]

Array = NDArray[np.float64]


def class_seconds(context: Context, schedule: Schedule) -> Array:
    """Least seconds of each class, (n_classes, n): at achieved rates, or at full ones without constants where a fitted
    model times each shape. [s]"""
    seconds, device = np.zeros_like(schedule.flop), context.device
    fitted = device.cost_model is not None
    for k, what in enumerate(schedule.classes):
        if what.link is not None:
            seconds[k] = schedule.bytes[f"link.{what.link}"][k] / device.link[what.link].rate.value
            continue
        name = str(what.agent)
        agent = device.agent[name]
        precision = agent.computes_as(what.precision)
        rate, peak = memory_rate(device, name, what.rate), agent.flop_per_s[precision].value if precision else math.inf
        if not fitted:
            peak *= agent.flop_share.value
        moved = schedule.bytes.get(f"memory.{agent.memory}", seconds)[k] * uncached(schedule, name, agent, rate)
        seconds[k] = np.maximum(schedule.flop[k] / peak, moved / rate)
        if not fitted:
            seconds[k] += schedule.requests[k] * _constant_s(what, agent, precision)
    return seconds


def memory_rate(device: Device, name: str, kind: str | None) -> float:
    """At what rate an agent goes through its memory at most, for attention or (None) other ops. [B/s]"""
    agent = device.agent[name]
    if kind == "attention" and agent.attention_rate is not None:
        return agent.attention_rate.value
    return agent.rate.value * (1.0 if device.cost_model else agent.rate_share.value)


def _constant_s(what: DemandClass, agent: Agent, precision: str | None) -> float:
    """What a kernel of a class takes at least beside its bytes and its arithmetic. [s]"""
    if what.kind is OpKind.SYNC and agent.step_overhead is not None:
        return agent.step_overhead.value
    if what.launch == "graph" and agent.graph_overhead is not None:
        return agent.graph_overhead.value
    does = what.name.removeprefix(DRAFT)
    kernel = f"{'attention' if does == 'projections' else does}-{precision}"
    return agent.kernel_overhead.get(kernel, agent.op_overhead).value


def uncached(schedule: Schedule, name: str, agent: Agent, rate: float) -> float:
    """Least share of an agent's bytes that cost as much as from memory: of a step at most a cache full comes faster."""
    moved = schedule.bytes.get(f"memory.{agent.memory}")
    if agent.cache is None or agent.cache_rate is None or agent.cache_rate.value <= rate or moved is None:
        return 1.0
    uses = np.bincount(schedule.op_class[schedule.timed], minlength=len(schedule.classes))
    mine = np.array([what.agent == name for what in schedule.classes])
    looped = float(((uses * mine) @ moved).min())
    saved = min(agent.cache.value / max(looped, 1e-300), 1.0)
    return 1.0 - saved * (1.0 - rate / agent.cache_rate.value)
