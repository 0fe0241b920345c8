"""Does a cost model behave like physics: no free lunch, no steps, nothing faster than its link or unit?

`check_cost_model` holds anything that is called like `roofline.durations` to what the search relies on. A search
finds every step in a cost and settles behind it, and every bound rests on the rates of the device, so a fitted
model must be smooth and may only add to the roofline.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from simmem.cost.roofline import arithmetic_peak
from simmem.errors import SpecError
from simmem.schedule import DemandClass, Durations, OpKind, Products, Schedule, ScheduleBuilder
from simmem.spec.device import Device, load_device

__all__ = ["CostModel", "check_cost_model"]

Array = NDArray[np.float64]
CostModel = Callable[[Schedule, Device], Durations]
"""Seconds of every class of a schedule, called as cost(schedule, device)."""

SLACK = 1e-9
POINTS = 256
LARGEST_JUMP = 1e-5
"""A change of the time by more than this share of it, over less than HALVINGS allow to see, is a step."""
HALVINGS = 36
SIZES_BYTES = (64.0, 7e7)
DEPTHS = (1.0, 512.0)
PRODUCTS = (None, Products(1.0, 4096.0, 4.0), Products(37.0, 700.0, 3.0))
"""Nothing known of the shapes; a decode step; a short prompt."""


def check_cost_model(cost: CostModel, device: Device | None = None) -> None:
    """Raise SpecError, saying where, unless a cost model keeps the contract on every link and agent of a device.

    zero        no demand takes no time
    monotone    more bytes or flop never take less time, on a link at the same number of requests
    continuous  no step in request size, depth, bytes or flop
    floor       never faster than the link's rate, nor than the agent's peak and memory rate

    Parameters
    ----------
    device : one unified and one discrete of those that ship when None.
    """
    for each in [load_device("m1-max"), load_device("rtx4090-pc")] if device is None else [device]:
        probe = _Probe(cost, each)
        for name in each.link:
            probe.link(name)
        for name in each.agent:
            for precision in ("fp32", "fp16", "bf16", "int8", "int4"):
                for products in PRODUCTS:
                    probe.agent(name, DemandClass(f"agent.{name}", OpKind.COMPUTE, agent=name, precision=precision,
                                                  products=products))
            probe.agent(name, DemandClass(f"agent.{name}", OpKind.MEMORY, agent=name))


class _Probe:
    def __init__(self, cost: CostModel, device: Device) -> None:
        self.cost, self.device = cost, device

    def seconds(self, what: DemandClass, n: int, *, bytes: dict[str, Array], flop: Array | float = 0.0,  # noqa: A002
                requests: Array | float = 0.0, depth: Array | float = 1.0) -> Array:
        """Time of one class over n candidates, occupancy and latency together. [s]"""
        builder = ScheduleBuilder(n, ["stream"])
        builder.end_token(builder.op(builder.demand(what, flop=flop, requests=requests, depth=depth, bytes=bytes),
                                     "stream"))
        took = self.cost(builder.build(), self.device)
        total = np.asarray(took.occupancy_s[0] + took.latency_s[0])
        self.require(total.shape == (n,), what, f"gives {total.shape} times for {n} candidates")
        self.require(np.isfinite(total).all() and (total >= 0).all(), what, "a time is negative or not finite")
        return total

    def require(self, kept: bool | np.bool_, what: DemandClass, rule: str) -> None:
        if not kept:
            raise SpecError(f"{rule} (on {self.device.name})", key=what.name)

    # --- links ----------------------------------------------------------------------------------

    def link(self, name: str) -> None:
        link = self.device.link[name]
        storage = link.kind == "storage"
        what = DemandClass(f"link.{name}", OpKind.IO if storage else OpKind.TRANSFER, link=name)

        def move(size: Array, count: Array, depth: Array) -> Array:
            n_bytes = size * count
            moved = {f"link.{name}": n_bytes, f"memory.{link.target}": n_bytes}
            if not storage:
                moved[f"memory.{link.source}"] = n_bytes
            return self.seconds(what, len(n_bytes), bytes=moved, requests=count, depth=depth)

        zero, one = np.zeros(1), np.ones(1)
        self.require(move(zero, zero, one)[0] == 0.0, what, "takes time for nothing")
        sizes = np.geomspace(*SIZES_BYTES, POINTS)
        for count in (1.0, 100.0, 10_000.0) if storage else (1.0,):
            for depth in (1.0, 7.0, 32.0, 200.0) if storage else (1.0,):
                def by_size(x: Array, count: float = count, depth: float = depth) -> Array:
                    return move(x, np.full_like(x, count), np.full_like(x, depth))

                took = by_size(sizes)
                self.rising(what, took, "bytes")
                fastest = float((sizes * count / took).max())
                self.require(fastest <= link.rate.value * (1 + SLACK), what,
                             f"moves {fastest:.4g} B/s, faster than its rate of {link.rate.value:.4g}")
                self.smooth(what, by_size, sizes, "request size")
        if storage:
            for size in (512.0, 4096.0, 65536.0, 1.5e6):
                def by_depth(x: Array, size: float = size) -> Array:
                    return move(np.full_like(x, size), np.full_like(x, 10_000.0), x)

                self.smooth(what, by_depth, np.geomspace(*DEPTHS, POINTS), f"depth at {size:.0f} B")

    # --- agents ---------------------------------------------------------------------------------

    def agent(self, name: str, what: DemandClass) -> None:
        agent, precision = self.device.agent[name], what.precision
        peak, rate = arithmetic_peak(agent, name, precision)[1], agent.rate.value

        def compute(flop: Array, n_bytes: Array, kernels: float) -> Array:
            moved = {f"memory.{agent.memory}": n_bytes}
            return self.seconds(what, len(flop), bytes=moved, flop=flop, requests=np.full_like(flop, kernels))

        zero = np.zeros(1)
        self.require(compute(zero, zero, 0.0)[0] == 0.0, what, "takes time for nothing")
        steps = np.geomspace(1e3, 1e13, POINTS)
        for kernels in (0.0, 8.0):
            for other in (0.0, 2e6, 2e9):
                def by_flop(x: Array, kernels: float = kernels, other: float = other) -> Array:
                    return compute(x, np.full_like(x, other), kernels)

                def by_bytes(x: Array, kernels: float = kernels, other: float = other) -> Array:
                    return compute(np.full_like(x, other), x, kernels)

                for axis, along in (("flop", by_flop), ("bytes", by_bytes)):
                    took = along(steps)
                    self.rising(what, took, axis)
                    flop, n_bytes = (steps, other) if axis == "flop" else (other, steps)
                    least = np.maximum(flop / peak, n_bytes / rate)
                    self.require((took >= least * (1 - SLACK)).all(), what,
                                 f"{precision} {axis} take less time than at {peak:.4g} FLOP/s and {rate:.4g} B/s")
                    self.smooth(what, along, steps, axis)

    # --- shapes ---------------------------------------------------------------------------------

    def rising(self, what: DemandClass, took: Array, axis: str) -> None:
        self.require((np.diff(took) >= -SLACK * took[1:]).all(), what, f"more {axis} take less time")

    def smooth(self, what: DemandClass, along: Callable[[Array], Array], points: Array, axis: str) -> None:
        """Close in on the largest changes between neighbours: a continuous function's vanish, a step's stay."""
        took = along(points)
        change = np.abs(np.diff(took)) / np.maximum(took[1:], took[:-1])
        widest = np.argsort(change)[-8:]
        low, high = points[widest], points[widest + 1]
        for _ in range(HALVINGS):
            middle = np.sqrt(low * high)
            at_low, at_middle, at_high = (along(x) for x in (low, middle, high))
            left = np.abs(at_middle - at_low) >= np.abs(at_high - at_middle)
            low, high = np.where(left, low, middle), np.where(left, middle, high)
        before, after = along(low), along(high)
        jump = np.abs(after - before) / np.maximum(before, after)
        worst = int(np.argmax(jump))
        self.require(jump[worst] <= LARGEST_JUMP, what,
                     f"a step of {jump[worst]:.2%} in the {axis} at {low[worst]:.6g}: a search would settle behind it")
