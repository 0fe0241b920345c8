"""Each formula of the roofline, worked out by hand on figures that leave round numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from simmem.cost.check import check_cost_model
from simmem.cost.roofline import (
    arithmetic_peak,
    capacity_bytes_per_s,
    durations,
    storage_seconds_per_request,
    storage_throughput,
)
from simmem.errors import SpecError
from simmem.schedule import DemandClass, Durations, OpKind, Schedule, ScheduleBuilder
from simmem.spec.base import Seconds
from simmem.spec.device import Device
from tests.strategies import devices


def fig(value: str | float) -> dict[str, Any]:
    return {"value": value, "kind": "measured", "source": "made up for this test"}


DEVICE = Device.model_validate({
    "schema": "simmem.device/1", "name": "hand", "title": "round numbers",
    "memory": {"flash": {"kind": "storage", "capacity": fig("1 TB")},
               "dram": {"kind": "host", "capacity": fig("64 GB")},
               "vram": {"kind": "device", "capacity": fig("8 GB"), "rate": fig("500 GB/s")}},
    "agent": {"cpu": {"memory": "dram", "flop_per_s": {"fp32": fig("1 TFLOP/s")}, "flop_share": fig(0.5),
                      "rate": fig("40 GB/s"), "rate_share": fig(0.5), "op_overhead": fig("10 us")},
              "gpu": {"memory": "vram", "flop_per_s": {"fp32": fig("10 TFLOP/s"), "fp16": fig("40 TFLOP/s")},
                      "flop_share": fig(0.5), "rate": fig("400 GB/s"), "rate_share": fig(0.5),
                      "op_overhead": fig("5 us"), "step_overhead": fig("1 ms")}},
    "link": {"flash": {"kind": "storage", "source": "flash", "target": "dram", "rate": fig("4 GB/s"),
                       "latency": fig("96 us"), "request_time": fig("3 us"), "request_rate": fig("8 GB/s"),
                       "block": fig("4 KiB"), "best_depth": fig(16), "overload_exponent": fig(0.5)},
             "h2d": {"kind": "copy", "source": "dram", "target": "vram", "rate": fig("20 GB/s"),
                     "latency": fig("8 us")}}})


def one(what: DemandClass, **demand: Any) -> Schedule:
    builder = ScheduleBuilder(1, ["stream"])
    builder.end_token(builder.op(builder.demand(what, **demand), "stream"))
    return builder.build()


def took(what: DemandClass, factors: dict[str, float] | None = None, **demand: Any) -> tuple[float, float]:
    found = durations(one(what, **demand), DEVICE, factors)
    return float(found.occupancy_s[0, 0]), float(found.latency_s[0, 0])


GPU = DemandClass("ffn", OpKind.COMPUTE, agent="gpu", precision="fp16")
COPY = DemandClass("copy", OpKind.TRANSFER, link="h2d")
READ = DemandClass("read", OpKind.IO, link="flash")


def test_compute_is_the_slower_of_arithmetic_and_memory_plus_a_constant_per_kernel() -> None:
    moving = {"memory.vram": 2e9}  # 2 GB at 400 · 0.5 GB/s = 10 ms
    assert took(GPU, flop=1e9, bytes=moving) == pytest.approx((10e-3, 0))  # 1 GFLOP at 40 · 0.5 TFLOP/s = 0.05 ms
    assert took(GPU, flop=4e11, bytes=moving) == pytest.approx((20e-3, 0))
    assert took(GPU, flop=4e11, bytes=moving, requests=6.0) == pytest.approx((20e-3 + 30e-6, 0))
    assert took(GPU, flop=4e11) == pytest.approx((20e-3, 0))
    assert took(GPU, requests=6.0) == pytest.approx((30e-6, 0))


def test_the_bytes_of_other_memories_are_not_the_agents() -> None:
    assert took(GPU, bytes={"memory.vram": 2e8, "memory.dram": 1e12}) == pytest.approx((1e-3, 0))


def test_a_step_constant_is_its_own_figure() -> None:
    step = DemandClass("step", OpKind.SYNC, agent="gpu")
    assert took(step, requests=1.0) == pytest.approx((1e-3, 0))
    assert took(step, {"agent.gpu.op_overhead": 3.0}, requests=1.0) == pytest.approx((1e-3, 0))
    assert took(step, {"agent.gpu.step_overhead": 3.0}, requests=1.0) == pytest.approx((3e-3, 0))
    assert took(DemandClass("meet", OpKind.SYNC, agent="cpu"), requests=2.0) == pytest.approx((20e-6, 0))


def test_kernels_of_a_phase_and_the_first_op_behind_a_wait_cost_what_was_measured() -> None:
    gpu = DEVICE.agent["gpu"].model_copy(update={
        "kernel_overhead": {"ffn-fp16": Seconds.model_validate(fig("20 us"))},
        "wake_time": Seconds.model_validate(fig("300 us"))})
    measured = DEVICE.model_copy(update={"agent": {**DEVICE.agent, "gpu": gpu}})

    def seconds(what: DemandClass, factors: dict[str, float] | None = None, **demand: Any) -> float:
        return float(durations(one(what, **demand), measured, factors).occupancy_s[0, 0])

    assert seconds(GPU, flop=4e11, requests=6.0) == pytest.approx(20e-3 + 120e-6)
    assert seconds(GPU, flop=4e11, requests=6.0, waits=1.0) == pytest.approx(20e-3 + 420e-6)
    assert seconds(GPU, {"agent.gpu.kernel_overhead.ffn-fp16": 2.0}, requests=6.0) == pytest.approx(240e-6)
    assert seconds(GPU, {"agent.gpu.wake_time": 2.0}, requests=6.0, waits=1.0) == pytest.approx(720e-6)
    other = DemandClass("attention", OpKind.COMPUTE, agent="gpu", precision="fp16")
    assert seconds(other, requests=6.0) == pytest.approx(30e-6)


def test_a_batch_of_reads_wakes_its_readers() -> None:
    link = DEVICE.link["flash"].model_copy(update={"reader_time": Seconds.model_validate(fig("40 us")),
                                                   "batch_time": Seconds.model_validate(fig("200 us"))})
    measured = DEVICE.model_copy(update={"link": {**DEVICE.link, "flash": link}})

    def seconds(n: float, size: float, depth: float) -> float:
        found = durations(one(READ, requests=n, depth=depth, bytes={"link.flash": n * size}), measured)
        assert float(found.latency_s[0, 0]) == pytest.approx(200e-6 * (n > 0))
        return float(found.occupancy_s[0, 0] + found.latency_s[0, 0])

    for n, size, depth in ((8, 4096, 8), (8, 4096, 2), (8, 4 << 20, 8), (200, 4096, 32)):
        steady = n * float(storage_seconds_per_request(DEVICE.link["flash"], size, depth))
        assert seconds(n, size, depth) == pytest.approx(steady + depth * 40e-6 + 200e-6)
    assert seconds(0, 4096, 8) == 0


def test_the_arithmetic_rate_is_that_of_the_precision_or_the_next_that_there_is() -> None:
    gpu, cpu = DEVICE.agent["gpu"], DEVICE.agent["cpu"]
    assert arithmetic_peak(gpu, "gpu", "int4") == ("agent.gpu.flop_per_s.fp16", 40e12)
    assert arithmetic_peak(gpu, "gpu", "bf16") == ("agent.gpu.flop_per_s.fp16", 40e12)
    assert arithmetic_peak(gpu, "gpu", "fp32") == ("agent.gpu.flop_per_s.fp32", 10e12)
    assert arithmetic_peak(cpu, "cpu", "int4") == ("agent.cpu.flop_per_s.fp32", 1e12)


def test_a_copy_holds_its_link_for_its_bytes_and_delays_what_waits_for_it() -> None:
    n = 4e8  # 20 ms at 20 GB/s
    moved = {"link.h2d": n, "memory.dram": n, "memory.vram": n}
    assert took(COPY, bytes=moved, requests=1.0) == pytest.approx((20e-3, 8e-6))
    assert took(COPY, {"link.h2d.rate": 0.5, "link.h2d.latency": 2.0}, bytes=moved) == pytest.approx((40e-3, 16e-6))


def test_reads_by_hand() -> None:
    """One 16 kB read: 96 us + 16 kB / 4 GB/s = 100 us. Saturated: 3 us + 16 kB / 8 GB/s = 5 us a read.

    With q in flight, saturation counts by 1 - 1/q²: not at all for one alone.
    """
    def read(n: float, depth: float, size: float = 16e3) -> float:
        return took(READ, requests=n, depth=depth, bytes={"link.flash": n * size, "memory.dram": n * size})[0]

    assert read(1, 1) == pytest.approx(100e-6)
    assert read(1000, 10) == pytest.approx(1000 * math.hypot(100e-6 / 10, 5e-6 * math.sqrt(99 / 100)))
    four = math.hypot(100e-6 / 4, 5e-6 * math.sqrt(15 / 16))
    assert read(4, 10) == pytest.approx(4 * four), "four reads have at most four in flight"
    assert read(1e6, 16) == pytest.approx(1e6 * math.hypot(100e-6 / 16, 5e-6 * math.sqrt(255 / 256)))
    # Past 16 readers a request costs (64/16)^0.5 = 2 times its 3 us: 6 + 2 = 8 us.
    assert read(1e6, 64) == pytest.approx(1e6 * math.hypot(100e-6 / 64, 8e-6 * math.sqrt(4095 / 4096)))
    # 4 MB reads: 96 + 1000 us alone, 503 us saturated, but never faster than 4 GB/s: 1000 us.
    assert read(1e3, 16, size=4e6) == pytest.approx(1e3 * 1e-3)


def test_storage_throughput_is_size_over_time() -> None:
    link = DEVICE.link["flash"]
    assert storage_throughput(link, 16e3, 10.0) == pytest.approx(16e3 / math.hypot(10e-6, 5e-6 * math.sqrt(0.99)))
    assert storage_seconds_per_request(link, 16e3, 1.0, factors={"link.flash.latency": 2.0}, name="flash") == \
        pytest.approx(196e-6)
    assert storage_seconds_per_request(link, 16e3, 1e9, factors={"link.flash.request_time": 2.0,
                                                                 "link.flash.request_rate": 0.5}, name="flash") == \
        pytest.approx(6e-6 * math.sqrt(1e9 / 16) + 4e-6)


def test_factors_are_columns() -> None:
    demand = one(GPU, flop=4e11, bytes={"memory.vram": 2e9}, requests=2.0).repeated(3)
    found = durations(demand, DEVICE, {"agent.gpu.flop_per_s.fp16": np.array([1.0, 0.5, 10.0]),
                                       "agent.gpu.rate": np.array([1.0, 1.0, 0.5])})
    assert found.occupancy_s[0] == pytest.approx(np.array([20e-3, 40e-3, 20e-3]) + 10e-6)


def test_what_shares_a_memory() -> None:
    assert capacity_bytes_per_s(DEVICE, "memory.vram") == 500e9, "its own figure where there is one"
    assert capacity_bytes_per_s(DEVICE, "memory.dram") == 40e9, "else the most that any of its users can draw"
    assert capacity_bytes_per_s(DEVICE, "link.h2d") == 20e9
    assert capacity_bytes_per_s(DEVICE, "memory.dram", {"agent.cpu.rate": 0.25}) == 20e9


def test_absent_classes_take_no_time() -> None:
    builder = ScheduleBuilder(2, ["stream"])
    n = np.array([0.0, 1e6])
    builder.op(builder.demand(COPY, requests=np.array([0.0, 1.0]), bytes={"link.h2d": n}), "stream")
    found = durations(builder.build(), DEVICE)
    assert found.occupancy_s[0].tolist() == [0.0, pytest.approx(5e-5)]
    assert found.latency_s[0].tolist() == [0.0, pytest.approx(8e-6)]


@pytest.mark.parametrize(("what", "says"), [
    (DemandClass("x", OpKind.COMPUTE, agent="npu"), "no agent 'npu'"),
    (DemandClass("x", OpKind.IO, link="tape"), "no link 'tape'"),
    (DemandClass("x", OpKind.SYNC), "neither an agent nor a link")])
def test_a_class_that_names_what_is_not_there(what: DemandClass, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        took(what, requests=1.0)


# --------------------------------------------------------------------------------------- as a whole


def best_depth_of(device: Device) -> float:
    best = device.link["flash"].best_depth
    return best.value if best else 1e6


@given(devices())
def test_the_storage_surface_rises_with_size_and_with_depth_up_to_its_best(device: Device) -> None:
    link = device.link["flash"]
    sizes = np.geomspace(512, 2**26, 80)[:, None]
    depths = np.geomspace(1, min(best_depth_of(device), 4096), 60)[None, :]
    surface = storage_throughput(link, sizes, depths)
    assert (np.diff(surface, axis=0) >= -1e-12 * surface[1:]).all()
    assert (np.diff(surface, axis=1) >= -1e-12 * surface[:, 1:]).all()
    assert (surface <= link.rate.value * (1 + 1e-12)).all()
    if link.best_depth and link.overload_exponent and link.overload_exponent.value:
        past = storage_throughput(link, sizes, np.geomspace(1, 8, 30)[None, :] * 1e3 * best_depth_of(device))
        assert (np.diff(past, axis=1) <= 1e-12 * past[:, 1:]).all(), "far past its best, more readers never help"


def test_the_roofline_keeps_the_contract_of_a_cost_model() -> None:
    check_cost_model(durations, DEVICE)


# --------------------------------------------------------------------------------------- check_cost_model catches


def _changed(change: Any) -> Any:
    def cost(schedule: Schedule, device: Device) -> Durations:
        base = durations(schedule, device)
        return Durations(change(schedule, base.occupancy_s.copy()), base.latency_s)
    return cost


def _blockwise(schedule: Schedule, seconds: np.ndarray) -> np.ndarray:
    """Rounds requests up to whole blocks, as the model before a search found every 4 KiB edge."""
    size = schedule.bytes.get("link.flash", np.zeros_like(seconds)) / np.maximum(schedule.requests, 1e-9)
    return np.where(size > 0, seconds * (1 + 0.2 * (np.ceil(size / 4096) * 4096 / np.maximum(size, 1) - 1)), seconds)


def _stepped_depth(schedule: Schedule, seconds: np.ndarray) -> np.ndarray:
    return seconds * np.where(schedule.depth > 32, 1.0, 1.1) if "link.flash" in schedule.bytes else seconds


BROKEN = {
    "faster than the link": (lambda s, t: t * 0.5, "faster than its rate|less time than"),
    "time for nothing": (lambda s, t: t + 1e-6, "takes time for nothing"),
    "a step at every block": (_blockwise, "a step|take less time"),
    "a step in depth": (_stepped_depth, "a step of .* in the depth"),
    "less for more": (lambda s, t: t + np.where(s.flop > 0, 1e3 / np.maximum(s.flop, 1.0), 0), "more flop take less"),
    "negative": (lambda s, t: t - 1.0, "negative"),
    "not a number": (lambda s, t: t * np.nan, "not finite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_cost_model_is_caught(name: str) -> None:
    change, says = BROKEN[name]
    with pytest.raises(SpecError, match=says):
        check_cost_model(_changed(change), DEVICE)
