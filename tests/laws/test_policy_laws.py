"""What holds for the decode step and the prompt of every policy, whichever devices, agents and links it has.

Drawn over all known policies, so a new one is under these laws from its first day. What they share with schedules of
any shape is in `test_schedule_laws`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmem.cost.roofline import durations
from simmem.planner.candidate import contention_of
from simmem.policy.base import Block, Policy
from simmem.policy.context import Context
from simmem.schedule import Durations, Schedule
from simmem.sim.analytic import analytic
from simmem.sim.events import events
from tests.laws.running import alone_s, assert_bounded, assert_in_order, shared_s, slowed
from tests.strategies import MANY, column_of, plans, rows_of

Case = tuple[Context, Policy, Block]


def phases(case: Case) -> Iterator[tuple[Schedule, Durations]]:
    """The schedules of a decode step and of the prompt, timed."""
    context, policy, block = case
    for schedule in (policy.decode(context, block, rows_of(context, policy)[:4]), policy.prefill(context, block)):
        yield schedule, durations(schedule, context.device)


@MANY
@given(plans())
def test_what_crosses_a_link_is_at_both_its_ends_and_takes_its_time(case: Case) -> None:
    """Op by op: the same bytes on the link, on its bus and in its memories, at no more than the rate of each."""
    device = case[0].device
    for schedule, took in phases(case):
        moved = {name: np.zeros(schedule.n_candidates) for name in schedule.bytes}
        for op in np.flatnonzero(schedule.timed):
            k = schedule.op_class[op]
            for name, amount in schedule.bytes.items():
                moved[name] += amount[k]
        for name, amount in schedule.timed_bytes.items():
            assert amount == pytest.approx(moved[name])
        for k, what in enumerate(schedule.classes):
            if what.link is None:
                continue
            link, crossing = device.link[what.link], schedule.bytes[f"link.{what.link}"][k]
            others = {f"memory.{link.target}", *([f"memory.{link.source}"] if link.kind == "copy" else []),
                      *([f"bus.{link.bus}"] if link.bus else [])}
            for other in others:
                assert schedule.bytes[other][k] == pytest.approx(crossing)
            assert (crossing <= took.occupancy_s[k] * link.rate.value * (1 + 1e-12)).all()


@MANY
@given(plans(), st.booleans())
def test_a_stream_does_one_op_at_a_time(case: Case, shared: bool) -> None:
    contention = contention_of(case[0]) if shared else None
    for schedule, took in phases(case):
        for i in range(0, schedule.n_candidates, 2):
            assert_in_order(events(schedule.column(i), column_of(took, i), contention))


@MANY
@given(plans())
def test_no_phase_is_faster_than_a_resource(case: Case) -> None:
    contention = contention_of(case[0])
    for schedule, took in phases(case):
        found = analytic(schedule, took)
        for i in range(0, schedule.n_candidates, 2):
            assert found.makespan_s[i] >= alone_s(schedule, case[0].device, i) * (1 - 1e-9)
            run = events(schedule.column(i), column_of(took, i), contention)
            assert run.makespan_s >= shared_s(schedule, contention, i) * (1 - 1e-9)


@MANY
@given(plans())
def test_no_step_is_faster_than_the_bound(case: Case) -> None:
    """What fits: neither faster than the agents that take part can be, nor than all of the device together."""
    context, policy, block = case
    rows = rows_of(context, policy)
    schedule = policy.decode(context, block, rows)
    took = analytic(schedule, durations(schedule, context.device)).token_s.reshape(block.n_candidates, len(rows))
    assert_bounded(context, policy, block, took)


@MANY
@given(plans(), st.floats(1e-3, 1e3))
def test_everything_c_times_slower_takes_c_times_as_long(case: Case, c: float) -> None:
    contention = contention_of(case[0])
    for schedule, took in phases(case):
        slower = Durations(took.occupancy_s * c, took.latency_s * c)
        expected = c * analytic(schedule, took).token_end_s
        assert analytic(schedule, slower).token_end_s == pytest.approx(expected, rel=1e-12, abs=0)
        base = events(schedule.column(0), column_of(took, 0), contention)
        other = events(schedule.column(0), column_of(slower, 0), slowed(contention, c))
        assert other.end_s == pytest.approx(c * base.end_s, rel=1e-9, abs=0)
