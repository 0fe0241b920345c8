"""How long does each class of op take on a device? Roofline with achieved shares and constants.

Compute and upkeep:  max(waves · flop / (peak · share), bytes / (rate · share)) + kernels · overhead + wait · wake,
                     with waves 1, and a rate that no cache helps, where the agent states no `processors`, no `cache`
                     (`simmem.cost.occupancy`)
Storage reads:       max(n · read_seconds(s, q), q · reader), and `batch` until dependants may start: a surface over
                     request size and depth (`simmem.cost.surface`) and, where they were measured, what it takes to
                     wake q readers and to hand in a batch and wait for it
Copies:              bytes / R, and L until dependants may start

A batch of n requests has at most n in flight.

Where a device names a cost model fitted to its own measurements (`simmem.cost.fitted`), a class that it covers takes
the longer of its time and the roofline's, without the constant. Where plans were run and their phases took other times
than predicted (`simmem.cost.phases`), a class takes its phase's factor times as long, and never less than at the full
rates.

Every figure may carry a factor per candidate: that is how draws and sensitivities become columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from simmem.cost.fitted import class_group, class_work, floor_s, half_width, product_s
from simmem.cost.occupancy import cached_rate, wave_factor, working_set
from simmem.cost.phases import class_phase, drawn_factor
from simmem.cost.surface import Regime, read_seconds
from simmem.errors import SpecError
from simmem.schedule import DRAFT, DemandClass, Durations, OpKind, Schedule
from simmem.spec.costmodel import Group
from simmem.spec.device import Agent, Device, Link

__all__ = [
    "Factors",
    "arithmetic_peak",
    "capacity_bytes_per_s",
    "durations",
    "error_key",
    "storage_seconds_per_request",
    "storage_throughput",
    "sure_shares",
]

Array = NDArray[np.float64]
Index = NDArray[np.int64]
"""Places of alike classes in a schedule; amounts of theirs are (n_alike, n_candidates)."""
Factors = Mapping[str, Array | float]
"""Figure key, e.g. "link.flash.rate" → factor on its value, scalar or (n_candidates,)."""


def durations(schedule: Schedule, device: Device, factors: Factors | None = None) -> Durations:
    """Evaluate every class of a schedule on a device; classes that differ in their amounts alone, all at once.

    Classes without demand get zero. Raises SpecError where a class names an agent or link the
    device has not.
    """
    factors = factors or {}
    occupancy = np.zeros_like(schedule.flop)
    latency = np.zeros_like(schedule.flop)
    alike: dict[DemandClass, list[int]] = {}
    for position in np.flatnonzero(schedule.present.any(axis=1)).tolist():
        alike.setdefault(schedule.classes[position], []).append(position)
    for what, positions in alike.items():
        index = np.array(positions)
        if what.agent is not None:
            occupancy[index] = _compute_s(schedule, index, what, device, factors)
        elif what.link is not None:
            occupancy[index], latency[index] = _move_s(schedule, index, what, device, factors)
        else:
            raise SpecError(f"the class {what.name!r} names neither an agent nor a link")
    occupancy[~schedule.present] = 0.0
    latency[~schedule.present] = 0.0
    return Durations(occupancy, latency)


def _compute_s(schedule: Schedule, index: Index, what: DemandClass, device: Device, factors: Factors) -> Array:
    name = str(what.agent)
    agent = _agent(device, name)
    key, peak = arithmetic_peak(agent, name, what.precision)
    flop_per_s = peak * _factor(factors, key)
    # A special rate is an achieved one already.
    special = what.rate == "attention" and agent.attention_rate is not None
    rate_key = "attention_rate" if special else "rate"
    rate = getattr(agent, rate_key).value * _factor(factors, f"agent.{name}.{rate_key}")
    # A sync op is the fixed cost of a step; every other op pays its kernels.
    constant = "step_overhead" if what.kind is OpKind.SYNC and agent.step_overhead else "op_overhead"
    overhead = getattr(agent, constant).value * _factor(factors, f"agent.{name}.{constant}")
    # What was measured of attention holds for its products without the context too, and for a draft model's.
    does = what.name.removeprefix(DRAFT)
    kernel = f"{'attention' if does == 'projections' else does}-{agent.computes_as(what.precision)}"
    measured = agent.kernel_overhead.get(kernel)
    if what.launch == "graph" and agent.graph_overhead is not None and what.kind is not OpKind.SYNC:
        overhead = agent.graph_overhead.value * _factor(factors, f"agent.{name}.graph_overhead")
        measured = None
    if measured is not None:
        overhead = measured.value * _factor(factors, f"agent.{name}.kernel_overhead.{kernel}")
    beside: Array | float = 0.0
    if agent.wake_time is not None:
        beside = schedule.waits[index] * agent.wake_time.value * _factor(factors, f"agent.{name}.wake_time")
    moved = schedule.bytes.get(f"memory.{agent.memory}")
    n_bytes = np.zeros(schedule.n_candidates) if moved is None else moved[index]
    looped = _looped(schedule, name, agent)
    floor = np.maximum(schedule.flop[index] / flop_per_s,
                       n_bytes / _memory_rate(agent, name, rate, looped, factors))
    fitted = _fitted_s(schedule, index, what, device, agent, key, factors)
    if fitted is not None:
        floor = np.maximum(floor, fitted[1])
        if measured is not None:  # a group knows what launching its products costs, but not what stands between them
            beside = beside + schedule.requests[index] * np.maximum(overhead - fitted[2], 0.0)
        return _corrected(np.maximum(floor, fitted[0]) + beside, floor, what, device, factors)
    flop_per_s = flop_per_s * agent.flop_share.value * _factor(factors, f"agent.{name}.flop_share")
    if not special:
        rate = rate * agent.rate_share.value * _factor(factors, f"agent.{name}.rate_share")
    rate = _memory_rate(agent, name, rate, looped, factors)
    arithmetic = _in_waves(schedule, index, what, agent) / flop_per_s
    seconds = np.maximum(arithmetic, n_bytes / rate) + schedule.requests[index] * overhead
    return _corrected(seconds + beside, floor, what, device, factors)


def _looped(schedule: Schedule, name: str, agent: Agent) -> Array | None:
    """What an agent with a cache goes through in a step; None where there is none. [B]"""
    return None if agent.cache is None or agent.cache_rate is None else working_set(schedule, name, agent.memory)


def _memory_rate(agent: Agent, name: str, rate: Array | float, looped: Array | float | None,
                factors: Factors | None = None) -> Array | float:
    """`rate`, or what a cache makes of it for a step that goes through `looped` bytes. [B/s]"""
    if looped is None or agent.cache is None or agent.cache_rate is None:
        return rate
    factors = factors or {}
    return cached_rate(looped, rate, agent.cache.value * _factor(factors, f"agent.{name}.cache"),
                       agent.cache_rate.value * _factor(factors, f"agent.{name}.cache_rate"))


def _in_waves(schedule: Schedule, index: Index, what: DemandClass, agent: Agent) -> Array:
    """Arithmetic of a class, more of it where processors stand idle in the last wave of its products. [flop]"""
    flop: Array = schedule.flop[index]
    shape = what.products
    if agent.processors is None or shape is None or what.kind is OpKind.MEMORY:
        return flop
    wide = flop / max(2.0 * shape.batch * shape.cols * shape.count, 1e-300)  # columns of each product's output
    return np.asarray(flop * wave_factor(shape.batch, wide, shape.cols, max(agent.processors.value, 1.0)))


def _corrected(found: Array, floor: Array, what: DemandClass, device: Device, factors: Factors) -> Array:
    """Seconds of a class as plans that were run correct them, never less than `floor`. [s]"""
    phase = class_phase(device, what)
    return np.asarray(found if phase is None else np.maximum(found * drawn_factor(phase, factors), floor))


def _fitted_s(schedule: Schedule, index: Index, what: DemandClass, device: Device, agent: Agent, peak_key: str,
              factors: Factors) -> tuple[Array, Array, Array | float] | None:
    """Seconds by the device's fitted cost model, the least it knows, and what of them one launch is; None where it has
    none for this class.

    A figure of the device that changes takes the terms with it that it stands for.
    """
    group = class_group(device.cost_model, what, agent) if device.cost_model else None
    if group is None:
        return None
    name = f"agent.{what.agent}"
    slower = {
        "overhead": _factor(factors, f"{name}.op_overhead"),
        "memory": 1.0 / (_factor(factors, f"{name}.rate") * _factor(factors, f"{name}.rate_share")),
        "arithmetic": 1.0 / (_factor(factors, peak_key) * _factor(factors, f"{name}.flop_share"))}
    work = class_work(schedule, index, what, agent.memory, group)
    drawn = factors.get(error_key(group))
    return (product_s(group, work, slower, 1.0 if drawn is None else drawn ** half_width(group, work)),
            floor_s(group, work, slower),
            sum(t.coefficient for t in group.terms if t.feature == "launches") * slower["overhead"])


def _move_s(schedule: Schedule, index: Index, what: DemandClass, device: Device, factors: Factors
            ) -> tuple[Array, Array]:
    name = str(what.link)
    if name not in device.link:
        raise SpecError(f"device {device.name} has no link {name!r}")
    link = device.link[name]
    moved = schedule.bytes.get(f"link.{name}")
    n_bytes = np.zeros(schedule.n_candidates) if moved is None else moved[index]
    requests = schedule.requests[index]
    floor = n_bytes / (link.rate.value * _factor(factors, f"link.{name}.rate"))
    if link.kind == "copy":
        latency = link.latency.value * _factor(factors, f"link.{name}.latency")
        return _corrected(floor, floor, what, device, factors), np.broadcast_to(latency, n_bytes.shape)
    count = np.maximum(requests, 1e-300)
    depth = np.minimum(schedule.depth[index], np.maximum(requests, 1.0))
    seconds = storage_seconds_per_request(link, n_bytes / count, depth, factors=factors, name=name)
    seconds = np.asarray(seconds * requests, dtype=np.float64)
    if link.reader_time is not None:
        wake = link.reader_time.value * _factor(factors, f"link.{name}.reader_time")
        # Beside the reads, not under them: a reader that wakes has nothing in flight, and takes a core from the others.
        seconds = np.asarray(seconds + np.minimum(depth, requests) * wake)
    late: Array = np.zeros_like(n_bytes)  # handing in and waking up keep nobody but who waits
    if link.batch_time is not None:
        late = np.asarray((requests > 0) * link.batch_time.value * _factor(factors, f"link.{name}.batch_time"))
    return _corrected(np.asarray(seconds), floor, what, device, factors), np.asarray(late, dtype=np.float64)


def storage_seconds_per_request(link: Link, size_bytes: Array | float, depth: Array | float, *,
                                factors: Factors | None = None, name: str = "", regime: Regime = "random") -> Array:
    """Mean seconds per request of a saturated or latency-bound stream of reads. [s]

    Parameters
    ----------
    size_bytes : request size, broadcastable. [B]
    depth : requests in flight, broadcastable.
    regime : whether anything foresees the reads; "cached" raises SpecError where the link states no `cached_rate`.
    """
    factors = factors or {}
    assert link.request_time is not None and link.request_rate is not None

    def of(field: str) -> Array | float | None:
        figure = getattr(link, field)
        return None if figure is None else figure.value * _factor(factors, f"link.{name}.{field}")

    return read_seconds(
        size_bytes, depth, regime=regime,
        latency_s=link.latency.value * _factor(factors, f"link.{name}.latency"),
        rate=link.rate.value * _factor(factors, f"link.{name}.rate"),
        request_time_s=link.request_time.value * _factor(factors, f"link.{name}.request_time"),
        request_rate=link.request_rate.value * _factor(factors, f"link.{name}.request_rate"),
        single_rate=of("single_rate"), cached_rate=of("cached_rate"),
        saturation_exponent=of("saturation_exponent"),
        best_depth=None if link.best_depth is None else link.best_depth.value,
        overload_exponent=None if link.overload_exponent is None else link.overload_exponent.value)


def sure_shares(device: Device, agent: Agent) -> tuple[float, float]:
    """Shares of rate and peak that no op exceeds: the achieved ones, or all where a fitted model times each shape."""
    return (1.0, 1.0) if device.cost_model is not None else (agent.rate_share.value, agent.flop_share.value)


def error_key(group: Group) -> str:
    """The factor that stands for the error of a group of a fitted cost model; to its half width, it is the error's."""
    return f"cost_model.{group.kind}.{group.dtype}"


def storage_throughput(link: Link, size_bytes: Array | float, depth: Array | float,
                       regime: Regime = "random") -> Array:
    """Throughput of a storage link at a request size and depth. [B/s]"""
    return np.asarray(size_bytes / storage_seconds_per_request(link, size_bytes, depth, regime=regime))


def arithmetic_peak(agent: Agent, name: str, precision: str) -> tuple[str, float]:
    """Key and value of the peak rate that weights of a precision compute at. [FLOP/s]"""
    computed = agent.computes_as(precision)
    if computed is None:
        raise SpecError(f"has no arithmetic rate for {precision} weights", key=f"agent.{name}.flop_per_s")
    return f"agent.{name}.flop_per_s.{computed}", agent.flop_per_s[computed].value


def capacity_bytes_per_s(device: Device, resource: str, factors: Factors | None = None) -> float | Array:
    """What a resource can deliver to all its users together. [B/s]"""
    rates: list[float | Array] = [figure.value * _factor(factors or {}, key)
                                  for key, figure in device.capacity_figures(resource).items()]
    best = rates[0]
    for rate in rates[1:]:
        best = np.maximum(best, rate)
    return best


def _agent(device: Device, name: str) -> Agent:
    if name not in device.agent:
        raise SpecError(f"device {device.name} has no agent {name!r}; it has {', '.join(device.agent)}")
    return device.agent[name]


def _factor(factors: Factors, key: str) -> float | Array:
    return factors.get(key, 1.0)
