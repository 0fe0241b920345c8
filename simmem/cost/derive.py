"""Which figures of a device follow from what was measured on it, and how well is each known?

Pure: from `Measurements` to figures with their own 90 % range, number of samples, noise floor and drift. What is too
noisy, has two modes or was refused by its probe supports no figure, and is listed. Where several thread counts were
measured, the fastest counts. A figure that the points do not determine is not called measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from simmem.cost.derive_storage import StorageFit, settled, storage_figures
from simmem.cost.figures import (
    Judged,
    MeasuredFigure,
    of,
    rate_figure,
    rate_of,
    reaching,
    reference,
    said,
    share_figure,
    sum_figure,
    surely,
    threads,
    top_figure,
)
from simmem.cost.interference import KeptShare, kept_shares
from simmem.cost.noise import TOO_NOISY, judge, run_medians
from simmem.errors import SpecError
from simmem.spec.base import Kind
from simmem.spec.measurement import Condition, Measurement, Measurements
from simmem.units import format_quantity

__all__ = ["Derived", "Refused", "derive"]

_LARGE_BATCH = 64
_AGENT_OF = {"dram": "cpu", "vram": "gpu"}
_ANY = ("fp32", "bf16")
_LARGE_BYTES = 4 << 20
"""Products of smaller matrices take about as long as their call."""
_FEW_CALLS = 15
"""With as many samples two modes can be told at all (`simmem.cost.noise`)."""
_LARGE_SHARE = 0.1
"""A product of less than this share of what the largest computes is not a large one."""


@dataclass(frozen=True)
class Refused:
    """A measurement that no figure rests on."""

    probe: str
    conditions: str
    why: str


@dataclass(frozen=True)
class Derived:
    """All that follows from one file of measurements."""

    figures: dict[str, MeasuredFigure]
    refused: tuple[Refused, ...]
    storage: StorageFit | None
    notes: tuple[str, ...]


def derive(measured: Measurements) -> Derived:
    """Every figure that the measurements support; deterministic.

    Raises
    ------
    SpecError
        A point does not say what its probe says.
    MachineError
        scipy is not installed.
    """
    for number, point in enumerate(measured.points):
        _check(point, f"points.{number}")
    judged = [(point, judge(settled(point))) for point in measured.points]
    trusted = [(p, j) for p, j in judged if j.refused is None]
    notes = _lasting(judged)
    storage, fit = storage_figures(trusted, judged, notes)
    figures = [*_of_machine(measured), *_memory(trusted, judged, "cpu", "dram"), *_arithmetic(trusted, "cpu"),
               *_overheads(trusted, judged), *storage, *_memory(trusted, judged, "gpu", "vram"),
               *_arithmetic(trusted, "gpu"), *_copies(trusted), *_launches(trusted),
               *_interference(kept_shares(measured.points))]
    doubted = [(p, j) for p, j in judged if j.refused is not None]
    figures = [_with_doubt(f, doubted, {f.key: f.value for f in figures}) for f in figures]
    if measured.machine.get("virtual") is True:
        notes.append("A virtual machine: its host may cache what the drive reads, and neighbours share both.")
    others = measured.machine.get("cores_used_by_others")
    if isinstance(others, float) and others > 0.1:
        notes.append(f"While it was measured, other programs kept {others:.1f} of {measured.machine.get('cores')} "
                     "cores busy: the figures are of what they left.")
    return Derived({f.key: f for f in figures},
                   tuple(Refused(p.probe, said(p), j.refused) for p, j in judged if j.refused is not None),
                   fit, tuple(notes))


def _lasting(judged: Sequence[Judged]) -> list[str]:
    """What the probes that go on without pause found, or why that says nothing."""
    found = []
    for probe, what in (("memory-sustained", "Memory"), ("storage-sustained", "Storage")):
        for point, j in (one for one in judged if one[0].probe == probe):
            if j.refused is not None:
                found.append(f"{what}: no sustained rate, {j.refused}.")
            else:
                rate = format_quantity(point.bytes / j.median_s, "bytes_per_s")
                lasted = f" for {point.at_s[-1] - point.at_s[0]:.0f} s" if point.at_s else ""
                found.append(f"{what} read without pause{lasted} gives {rate} in the later half.")
    return found


# What figures read of a point: words and positive numbers among its conditions, and its own demands.
_SAYS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "storage-read": (("pattern", "how"), ("size_bytes", "depth"), ("bytes",)),
    "storage-sustained": ((), (), ("bytes",)), "memory-read": ((), (), ("bytes",)), "memory-copy": ((), (), ("bytes",)),
    "gemv": ((), (), ("bytes",)), "gemm": ((), (), ("flop",)), "host-to-device": ((), (), ("bytes",)),
    "device-to-host": ((), (), ("bytes",)), "launch": ((), (), ("requests",)),
    "batch-read": ((), (), ("bytes", "requests")),
    "interference": (("victim", "aggressor"), (), ()), "decoder-op": (("op", "decoder", "dtype"), (), ("requests",)),
}


def _check(point: Measurement, key: str) -> None:
    words, numbers, demands = _SAYS.get(point.probe, ((), (), ()))
    for name in words:
        if not isinstance(point.conditions.get(name), str):
            raise SpecError(f"a {point.probe} says its {name} in words", key=f"{key}.conditions")
    for name in numbers:
        value = point.conditions.get(name)
        if isinstance(value, (bool, str)) or value is None or not value > 0:
            raise SpecError(f"a {point.probe} says its {name}, a positive number", key=f"{key}.conditions")
    pause = point.conditions.get("pause_s")
    if point.probe == "decoder-op" and (isinstance(pause, (bool, str)) or pause is None or not pause >= 0):
        raise SpecError("a decoder-op says its pause_s, zero or a positive number", key=f"{key}.conditions")
    for name in demands:
        if not getattr(point, name) > 0:
            raise SpecError(f"a {point.probe} has some {name}, found none", key=f"{key}.{name}")


# --- what the system says -------------------------------------------------------------------------------------------


def _of_machine(measured: Measurements) -> list[MeasuredFigure]:
    machine = measured.machine

    def size(name: str) -> float | None:
        value = machine.get(name)
        return float(value) if isinstance(value, (int, float)) and value > 0 else None

    found = []
    for key, value, what in (
        ("memory.flash.capacity", size("volume_bytes"), f"size of the {machine.get('filesystem', 'file')} volume"),
        ("memory.dram.capacity", size("memory_bytes"), "memory that the system has"),
        ("memory.vram.capacity", size("gpu_memory_bytes"), "memory that the GPU has"),
        ("link.flash.block", size("block_bytes"), "physical block, as the system says"),
    ):
        if value is not None:
            found.append(MeasuredFigure(key, value, value, value, Kind.MEASURED, what))
    total, free = size("memory_bytes"), size("available_bytes")
    if total is not None and free is not None and total - free >= 1:
        used = total - free
        found.append(MeasuredFigure("memory.dram.reserved", used, used, used, Kind.MEASURED,
                                    "what the system and other programs held when it began"))
    return found


# --- memory and arithmetic ------------------------------------------------------------------------------------------


def _memory(trusted: Sequence[Judged], judged: Sequence[Judged], agent: str, memory: str) -> list[MeasuredFigure]:
    """What the memory gives to copies and sums, and what an agent's products get of it.

    An agent's rate is that of its products wherever those were measured: what a product gets is set by the instructions
    of its threads as much as by the memory, and the two change apart from each other.
    """
    streams = [max((one for one in of(trusted, p, agent) if one[0].conditions.get("level") == "dram"),
                   key=surely, default=None) for p in ("memory-read", "memory-copy")]
    best = [one for one in streams if one is not None]
    found = []
    if best:
        top = max(best, key=surely)
        found.append(reaching(rate_figure(f"memory.{memory}.rate", top, f"{top[0].probe} with {threads(top[0])}"),
                              _visits(top, judged, agent)))
    products = reference([one for one in of(trusted, "gemv", agent) if one[0].conditions.get("level") == "dram"])
    large = [one for one in products if one[0].bytes >= _LARGE_BYTES] or products
    if large:
        rate, used = top_figure(f"agent.{agent}.rate", large, lambda p: p.bytes, "products with one token")
        shares = np.minimum(np.array([rate_of(one) for one in used]) / rate.value, 1.0)
        found += [rate, share_figure(f"agent.{agent}.rate_share", shares, used, f"{len(used)} products with one token, "
                                     f"weights out of memory, {threads(used[0][0])}")]
    elif streams[0] is not None:
        found.append(rate_figure(f"agent.{agent}.rate", streams[0], f"reads with {threads(streams[0][0])}"))
    return found


def _visits(top: Judged, judged: Sequence[Judged], agent: str) -> list[float]:
    """Rates of all visits to the memory with as many threads, and what ran without pause. [B/s]"""
    return [p.bytes / seconds for probe in ("memory-read", "memory-copy", "memory-sustained")
            for p, j in of(judged, probe, agent)
            if (p.conditions.get("level"), p.conditions.get("threads")) == ("dram", top[0].conditions.get("threads"))
            for seconds in ((j.p10_s, j.p90_s) if probe == "memory-sustained" else
                            run_medians(p.samples_s, p.at_s, p.runs)[0].tolist())]


def _with_doubt(figure: MeasuredFigure, doubted: Sequence[Judged], values: Mapping[str, float]) -> MeasuredFigure:
    """The range of a rate as far as measurements reached that it may not rest on.

    Where other programs take a core, what all threads reach is refused, and what one reaches is all there is: that is
    no upper end of what the machine does.
    """
    kind, name, field, *rest = figure.key.split(".")
    agent = _AGENT_OF.get(name, name)
    if (kind, field) not in (("memory", "rate"), ("agent", "rate"), ("agent", "rate_share"), ("agent", "flop_per_s")):
        return figure
    probes = {"rate_share": ("gemv",), "flop_per_s": ("gemm",)}.get(
        field, ("memory-read", "memory-copy") if kind == "memory" else ("gemv",))
    reached: dict[tuple[str, Condition | None], list[float]] = {}
    for probe in probes:
        for p, j in of(doubted, probe, agent):
            same = probe not in ("gemv", "gemm") or p.conditions.get("reference") is True
            if same and p.conditions.get("level") == "dram" and p.conditions.get("dtype") in (None, *(rest or _ANY)):
                reached.setdefault((probe, p.conditions.get("threads")), []).append(
                    (p.flop if field == "flop_per_s" else p.bytes) / j.p10_s)
    high = max((float(np.median(speeds)) for speeds in reached.values()), default=0.0)
    if field == "rate_share":
        high = min(high / values[f"agent.{name}.rate"], 1.0)
    if high <= figure.high:
        return figure
    return replace(figure, high=high, what=f"{figure.what}; the range goes up to what refused measurements reached")


def _arithmetic(trusted: Sequence[Judged], agent: str) -> list[MeasuredFigure]:
    products = [one for one in of(trusted, "gemm", agent) if _tokens(one) >= _LARGE_BATCH]
    found, shares, large = [], [], []
    for dtype in ("fp32", "bf16", "fp16", "int8"):
        some = reference([one for one in products if one[0].conditions.get("dtype") == dtype])
        if not some:
            continue
        most = max(p.flop for p, _ in some)
        peak, best_ones = top_figure(f"agent.{agent}.flop_per_s.{dtype}",
                                     [one for one in some if one[0].flop >= _LARGE_SHARE * most], lambda p: p.flop,
                                     f"products with {_LARGE_BATCH} tokens and more")
        found.append(peak)
        shares += [min(p.flop / j.median_s / peak.value, 1.0) for p, j in best_ones]
        large += best_ones
    if shares:
        found.append(share_figure(f"agent.{agent}.flop_share", np.array(shares), large,
                                  f"{len(shares)} large products with {_LARGE_BATCH} tokens and more"))
    return found


def _tokens(one: Judged) -> float:
    batch = one[0].conditions.get("batch")
    return float(batch) if isinstance(batch, (int, float)) else 0.0


def _overheads(trusted: Sequence[Judged], judged: Sequence[Judged]) -> list[MeasuredFigure]:
    def one(some: Sequence[Judged], probe: str, **conditions: object) -> Judged | None:
        return next(((p, j) for p, j in some if p.probe == probe
                     and all(p.conditions.get(k) == v for k, v in conditions.items())), None)

    found = []
    call = one(trusted, "op-call")
    if call is not None:
        threads = call[0].conditions.get("threads")
        parts = [("a product of 16 × 16", call, 1.0)]
        alone, shared = one(trusted, "op-parallel", threads=1), one(trusted, "op-parallel", threads=threads)
        if threads != 1 and alone is not None and shared is not None and shared[1].median_s > alone[1].median_s:
            parts += [(f"what sharing a kernel among {threads} threads adds", shared, 1.0), ("", alone, -1.0)]
        found.append(sum_figure("agent.cpu.op_overhead", parts))
    elif (call := one(judged, "op-call")) is not None and call[0].refused is None and call[1].n >= _FEW_CALLS:
        # Every device needs it and it is small: one visit beside others is no reason to end without a device file.
        figure = sum_figure("agent.cpu.op_overhead", [("a product of 16 × 16", call, 1.0)])
        found.append(replace(figure, kind=Kind.ESTIMATED, what=f"{figure.what}; {call[1].refused}"))
    found += _executor(judged)
    choice, hand_off = one(trusted, "token-choice"), one(trusted, "hand-off")
    if choice is not None and hand_off is not None:
        found.append(sum_figure("agent.cpu.step_overhead", [("choosing a token", choice, 1.0),
                                                      ("a hand-off to a thread and back", hand_off, 1.0)]))
    return found


def _executor(judged: Sequence[Judged]) -> list[MeasuredFigure]:
    """What the executor's own ops cost with next to no weights, per kernel, and what the first one behind a pause costs
    more; medians over the kinds of decoder, ranges from the least of them to the largest.

    Behind a pause times scatter by nature: those count however noisy they are, and widen the range.
    """
    ops: dict[str, list[Judged]] = {}
    paused: list[Judged] = []
    alone: dict[tuple[object, object], float] = {}
    for p, j in judged:
        if p.probe != "decoder-op" or p.refused is not None or (j.refused is not None and not p.conditions["pause_s"]):
            continue
        if float(p.conditions["pause_s"]) > 0:
            paused.append((p, j))
        elif p.conditions["op"] == "layer":
            alone[p.conditions["decoder"], p.conditions["dtype"]] = j.median_s
        else:
            ops.setdefault(f"{p.conditions['op']}-{p.conditions['dtype']}", []).append((p, j))
    found = [_span(f"agent.cpu.kernel_overhead.{op}", [j.median_s / p.requests for p, j in some], some,
                   f"a kernel of a decoder with next to no weights, {len(some)} kinds") for op, some in ops.items()]
    more = [(j.median_s - alone[key], (p, j)) for p, j in paused
            if (key := (p.conditions["decoder"], p.conditions["dtype"])) in alone]
    if more and np.median([s for s, _ in more]) > 0:
        found.append(_span("agent.cpu.wake_time", [s for s, _ in more], [one for _, one in more],
                           f"a layer behind a pause, less one that follows another, {len(more)} kinds and pauses"))
    return found


def _span(key: str, values: Sequence[float], judged: Sequence[Judged], what: str) -> MeasuredFigure:
    floor = float(np.median([j.noise_floor for _, j in judged]))
    middle = float(np.median(values))
    return MeasuredFigure(key, middle, max(min(*values, middle * (1 - min(floor, 0.9))), 0.1 * middle),
                          max(*values, middle * (1 + floor)), Kind.MEASURED if floor <= TOO_NOISY else Kind.ESTIMATED,
                          what, sum(j.n for _, j in judged), floor)


# --- what only a GPU has, and what disturbs what --------------------------------------------------------------------


def _copies(trusted: Sequence[Judged]) -> list[MeasuredFigure]:
    """Pinned copies: the fastest of those in a row, and the smallest that the host waits for."""
    found = []
    for probe, link in (("host-to-device", "h2d"), ("device-to-host", "d2h")):
        pinned = [one for one in of(trusted, probe, "gpu") if one[0].conditions.get("pinned") is True]
        row = max((one for one in pinned if not one[0].conditions.get("waited")), key=surely, default=None)
        waited = min((one for one in pinned if one[0].conditions.get("waited")), key=lambda one: one[0].bytes,
                     default=None)
        if row is not None:
            found.append(rate_figure(f"link.{link}.rate", row, f"pinned copies of {row[0].bytes:.0f} B"))
        if waited is not None:
            found.append(sum_figure(f"link.{link}.latency",
                                    [(f"a pinned copy of {waited[0].bytes:.0f} B, waited for", waited, 1.0)]))
    return found


def _launches(trusted: Sequence[Judged]) -> list[MeasuredFigure]:
    """Kernels launched one after the other, not waited for."""
    rows = [one for one in of(trusted, "launch", "gpu") if one[0].conditions.get("launch") == "stream"]
    most = max(rows, key=lambda one: one[0].requests, default=None)
    if most is None:
        return []
    point, j = most
    each = 1.0 / point.requests
    return [MeasuredFigure("agent.gpu.op_overhead", j.median_s * each, j.low_s * each, j.high_s * each, Kind.MEASURED,
                           f"a kernel of {point.requests:.0f} launched in a row", j.n, j.noise_floor,
                           j.drift if j.drifts else None)]


def _interference(kept: Sequence[KeptShare]) -> list[MeasuredFigure]:
    """What a product keeps beside reads from storage, and reads beside a product: of the pair that every run measures,
    or all that were measured together."""
    who = {"gemv": "cpu", "storage-read": "flash"}
    found = []
    for victim, aggressor in (("gemv", "storage-read"), ("storage-read", "gemv")):
        some = [k for k in kept if k.victim.get("victim") == victim and k.aggressor.get("aggressor") == aggressor]
        some = [k for k in some if k.aggressor.get("aggressor_reference") is True] or some
        if some:
            value = min(float(np.median([k.share for k in some])), 1.0)
            found.append(MeasuredFigure(f"interference.{who[victim]}.{who[aggressor]}.dram", value,
                                        min(value, *(k.low for k in some)), max(value, *(k.high for k in some)),
                                        Kind.MEASURED, f"{victim} beside {aggressor}, {len(some)} pairs",
                                        sum(k.n for k in some), max(k.noise_floor for k in some)))
    return found
