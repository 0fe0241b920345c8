"""How is a figure taken on a machine that others use too? Work and yardstick in turns; medians and ratios.

Nothing here asserts on time. Every figure is a line of the table that the run ends with:
what was measured, its target, the median with the 10th and 90th percentile, and the same of the
yardstick or peer that ran in turns with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

LINES: list[str] = []


@dataclass(frozen=True)
class Spread:
    """Median and the 10th to 90th percentile of the samples."""

    median: float
    low: float
    high: float

    def text(self, unit: str) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g}) {unit}"


def spread(samples: list[float]) -> Spread:
    low, median, high = np.quantile(samples, [0.1, 0.5, 0.9])
    return Spread(float(median), float(low), float(high))


class Figures:
    """Takes one figure in a test and adds its line to the table."""

    def __init__(self, benchmark: Any) -> None:
        self.benchmark = benchmark

    def line(self, what: str, target: str, found: str, beside: str = "") -> None:
        LINES.append(f"{what:<58} {target:<15} {found:<30} {beside}".rstrip())

    def timed(self, what: str, target: str, work: Callable[[], object], *, unit: str = "s",
              convert: Callable[[float], float] = lambda seconds: seconds,
              beside: Callable[[], object] | None = None, beside_name: str = "",
              convert_beside: Callable[[float], float] | None = None, is_rate: bool = False, rounds: int = 9,
              note: Callable[[], str] = str) -> Spread | None:
        """Time `work`, in turns with `beside` where there is one.

        convert : seconds of one call → the figure, in `unit`; the same for `beside` unless given.
        beside : what simmem is compared with; may return its own seconds, else it is timed like `work`.
        is_rate : the figure is the better the larger it is.
        note : more to say once the rounds are done.

        Returns how many times faster than `beside` each round was, None without one.
        """
        samples: list[float] = []
        others: list[float] = []
        convert_beside = convert_beside or convert

        def yardstick() -> None:
            if beside is not None:
                started = time.perf_counter()
                seconds = beside()
                passed = time.perf_counter() - started
                others.append(convert_beside(seconds if isinstance(seconds, float) else passed))

        def measured() -> None:
            started = time.perf_counter()
            work()
            samples.append(convert(time.perf_counter() - started))

        work()  # files into the page cache, imports into memory
        self.benchmark.pedantic(measured, setup=yardstick, rounds=rounds, warmup_rounds=0)
        ours, ratio, remark = spread(samples), None, note()
        if others:
            ratio = spread([(s / o if is_rate else o / s) for s, o in zip(samples, others, strict=True)])
            remark += f"{beside_name} {spread(others).text(unit)}, ratio {ratio.text('x')}"
        self.benchmark.extra_info.update({"figure": ours.text(unit), "target": target, "beside": remark})
        self.line(what, target, ours.text(unit), remark)
        return ratio


@pytest.fixture
def figures(benchmark: Any) -> Figures:
    return Figures(benchmark)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    if LINES:
        terminalreporter.section("figures: median (p10 to p90); ratio = how many times faster simmem is")
        for line in LINES:
            terminalreporter.write_line(line)
