"""Is a run judged as its docstring says? Timelines small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest

from simmem.schedule import DemandClass, OpKind, Schedule, ScheduleBuilder
from simmem.sim.timeline import Timeline
from simmem.spec.device import load_device
from simmem.validation.runs import (
    Exactness,
    _judge,
    demanded_bytes,
    noise_floor,
    phase_seconds,
    with_storage_of,
)


def schedule() -> Schedule:
    builder = ScheduleBuilder(1, ["link.flash", "cpu"])
    read = builder.demand(DemandClass("weights.flash", OpKind.IO, link="flash"), requests=1.0,
                          bytes={"link.flash": 5000.0})
    attend = builder.demand(DemandClass("attention", OpKind.COMPUTE, agent="cpu"), flop=1.0)
    feed = builder.demand(DemandClass("ffn", OpKind.COMPUTE, agent="cpu"), flop=1.0)
    for token in range(2):
        first = builder.op(read, "link.flash", token=token)
        second = builder.op(attend, "cpu", deps=[first], token=token)
        builder.end_token(builder.op(feed, "cpu", deps=[second], token=token))
    return builder.build()


def timeline() -> Timeline:
    """The second token's read begins during the first, and the processor waits 1 s between its two products."""
    start, free = np.array([0.0, 2.0, 3.0, 3.0, 7.0, 9.0]), np.array([2.0, 3.0, 5.0, 6.5, 8.0, 10.0])
    return Timeline(schedule(), start, free, free, "by hand")


def test_phases_of_the_timed_token() -> None:
    found = phase_seconds([timeline()])
    assert found == {"flash": 3.5, "copy": 0.0, "upkeep": 0.0, "predictor": 0.0, "attention": 1.0, "FFN": 1.0,
                     "head": 0.0, "step": 0.0, "wait": 1.5}


def test_bytes_in_whole_blocks() -> None:
    assert demanded_bytes(schedule(), 4096) == 8192
    assert demanded_bytes(schedule(), 1000) == 5000


def test_the_noise_floor() -> None:
    assert noise_floor([1.0]) is None
    assert noise_floor([2.0, 2.0, 2.0]) == 0.0
    assert noise_floor([1.0, 2.0, 3.0]) == pytest.approx((2.8 - 1.2) / 2 / 2)  # p10, p90 by linear interpolation


@pytest.mark.parametrize(("error", "noise", "same", "storage", "difference", "status"), [
    (0.1, 0.02, True, "real", None, "pass"),
    (-0.23, 0.02, True, "real", None, "pass"),
    (0.2, 0.02, True, "emulated", None, "fail"),
    (0.25, 0.02, True, "real", None, "fail"),
    (0.1, 0.02, False, "real", None, "fail"),
    (0.1, None, True, "real", None, "inconclusive"),
    (0.9, 0.11, True, "real", None, "inconclusive"),
    (0.9, 0.11, False, "real", None, "fail"),
    (0.1, 0.02, True, "real", 0.2, "fail"),
    (0.1, 0.02, True, "real", 1e-7, "pass"),
])
def test_the_judgement(error: float, noise: float | None, same: bool, storage: str, difference: float | None,
                       status: str) -> None:
    exact = None if difference is None else Exactness(tokens=200, largest_difference=difference, same_choice=1.0,
                                                      tolerance=1e-4)
    assert _judge(error, noise, same, storage, exact)[0] == status  # type: ignore[arg-type]


def test_a_machine_with_another_drive() -> None:
    mine, other = load_device("cloud-vm"), load_device("iphone15")
    both = with_storage_of(mine, other)
    theirs = next(k for k in other.link.values() if k.kind == "storage")
    assert (both.agent, both.memory, both.storage, both.host) == (mine.agent, mine.memory, mine.storage, mine.host)
    assert both.link["flash"].request_time == theirs.request_time
    assert both.path(both.storage, both.host) == ("flash",)
    assert both.name == "cloud-vm+iphone15"
