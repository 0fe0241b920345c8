"""Do the two engines say the same where they must, and is one a bound where they may differ?"""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from simmem.cost.roofline import durations
from simmem.errors import SpecError
from simmem.planner.candidate import contention_of
from simmem.policy.base import Block, Policy
from simmem.policy.context import Context
from simmem.schedule import DemandClass, Durations, OpKind, Schedule, ScheduleBuilder
from simmem.sim import events as events_module
from simmem.sim.analytic import analytic
from simmem.sim.events import Contention, contends, events, fair_speeds
from tests.agreement.simpy_engine import simulate
from tests.strategies import (
    MANY,
    any_durations,
    column_of,
    contentions,
    devices,
    plans,
    rows_of,
    schedules,
    seeds,
)


def by_the_book(schedule: Schedule, took: Durations, i: int) -> list[float]:
    """End of every op of candidate `i`, as the words of `simmem.schedule` say it."""
    free = [0.0] * len(schedule.streams)
    end: list[float] = []
    for op, deps in enumerate(schedule.deps):
        k, stream = int(schedule.op_class[op]), int(schedule.op_stream[op])
        ready = max([0.0, *(end[d] for d in deps)])
        demands = schedule.flop[k, i] or schedule.requests[k, i] or any(b[k, i] for b in schedule.bytes.values())
        if not demands:
            end.append(ready)
            continue
        free[stream] = max(ready, free[stream]) + float(took.occupancy_s[k, i])
        end.append(free[stream] + float(took.latency_s[k, i]))
    return end


@st.composite
def timed_schedules(draw: st.DrawFn) -> tuple[Schedule, Durations, Contention]:
    device = draw(devices())
    schedule = draw(schedules(device))
    took = durations(schedule, device) if draw(st.booleans()) else draw(any_durations(schedule))
    return schedule, took, draw(contentions(schedule, device))


# --------------------------------------------------------------------------------------- nothing shared: equal


@MANY
@given(timed_schedules())
def test_both_engines_are_the_recurrence(case: tuple[Schedule, Durations, Contention]) -> None:
    """To the last bit: the same additions and maxima in the same order. Absent ops included."""
    schedule, took, _ = case
    found = analytic(schedule, took)
    for i in range(schedule.n_candidates):
        expected = by_the_book(schedule, took, i)
        run = events(schedule.column(i), column_of(took, i))
        assert run.engine == "events"
        assert run.end_s.tolist() == expected
        assert found.makespan_s[i] == max(expected) == run.makespan_s
        assert found.token_end_s[:, i].tolist() == [expected[op] for op in schedule.token_ends]
        assert found.token_s[i] == run.token_s


@given(timed_schedules())
def test_the_event_loop_is_processes_of_simpy(case: tuple[Schedule, Durations, Contention]) -> None:
    """The loop that is written out against one process a stream and an event for each op."""
    schedule, took, contention = case
    for i in range(schedule.n_candidates):
        column, seconds = schedule.column(i), column_of(took, i)
        for one in (None, contention):
            with patch.object(events_module, "contends", return_value=True):
                found, expected = events(column, seconds, one), simulate(column, seconds, one)
            for name in ("start_s", "free_s", "end_s"):
                assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9, abs=0)


@MANY
@given(timed_schedules())
def test_contends_is_a_proof(case: tuple[Schedule, Durations, Contention]) -> None:
    """Where it says no, the fluid engine has nothing to share: forced to run, it gives the dedicated answer."""
    schedule, took, contention = case
    roomy = Contention({k: v * 1e3 for k, v in contention.capacity_bytes_per_s.items()}, {}, contention.background)
    for i in range(schedule.n_candidates):
        column, seconds = schedule.column(i), column_of(took, i)
        for one in (contention, roomy):
            plain = events(column, seconds)
            if contends(plain, seconds, one):
                continue
            assert events(column, seconds, one).engine == "events"
            with patch.object(events_module, "contends", return_value=True):
                forced = events(column, seconds, one)
            assert forced.engine == "events, shared"
            for name in ("start_s", "free_s", "end_s"):
                assert getattr(forced, name) == pytest.approx(getattr(plain, name), rel=1e-12, abs=0)


@MANY
@given(plans(n=2))
def test_every_token_of_every_policy(case: tuple[Context, Policy, Block]) -> None:
    """Decode and prefill, one agent or several: equal on dedicated resources, a lower bound on shared ones."""
    context, policy, block = case
    contention = contention_of(context)
    for schedule in (policy.decode(context, block, rows_of(context, policy)), policy.prefill(context, block)):
        took = durations(schedule, context.device)
        found = analytic(schedule, took)
        for i in range(schedule.n_candidates):
            column, seconds = schedule.column(i), column_of(took, i)
            alone = events(column, seconds)
            assert alone.token_end_s == pytest.approx(found.token_end_s[:, i], rel=1e-12, abs=0)
            assert alone.token_s == pytest.approx(found.token_s[i], rel=1e-12, abs=0)
            shared = events(column, seconds, contention)
            assert (found.token_end_s[:, i] <= shared.token_end_s * (1 + 1e-12)).all()
            if not contends(alone, seconds, contention):
                assert shared.token_s == pytest.approx(found.token_s[i], rel=1e-12, abs=0)


def test_an_absent_op_passes_on_what_it_waits_for() -> None:
    """a → (absent) → (absent) → b over another stream: b waits for a, and the absent ops take their own stream's
    turn from nobody."""
    builder = ScheduleBuilder(2, ["one", "two"])
    slow = builder.demand(DemandClass("slow", OpKind.COMPUTE, agent="x"), flop=np.array([5.0, 5.0]))
    gone = builder.demand(DemandClass("gone", OpKind.COMPUTE, agent="x"), flop=np.array([0.0, 1.0]))
    a = builder.op(slow, "one")
    first = builder.op(gone, "two", deps=[a])
    second = builder.op(gone, "two", deps=[first])
    free = builder.op(slow, "two")
    b = builder.op(slow, "one", deps=[second, free])
    builder.end_token(b)
    schedule = builder.build()
    took = Durations(schedule.flop.copy(), np.zeros((2, 2)))
    found = analytic(schedule, took)
    assert found.makespan_s.tolist() == [10.0, 17.0]
    run = events(schedule.column(0), column_of(took, 0))
    assert run.start_s.tolist() == [0.0, 5.0, 5.0, 0.0, 5.0]
    assert events(schedule.column(1), column_of(took, 1)).end_s.tolist() == [5.0, 6.0, 7.0, 12.0, 17.0]


# --------------------------------------------------------------------------------------- shared: a lower bound


@MANY
@given(timed_schedules())
def test_analytic_is_a_lower_bound_under_sharing_interference_background_and_queues(
        case: tuple[Schedule, Durations, Contention]) -> None:
    schedule, took, contention = case
    found = analytic(schedule, took)
    for i in range(schedule.n_candidates):
        run = events(schedule.column(i), column_of(took, i), contention)
        assert (found.token_end_s[:, i] <= run.token_end_s * (1 + 1e-12)).all()
        assert found.makespan_s[i] <= run.makespan_s * (1 + 1e-12)
        held = run.free_s - run.start_s
        assert (held >= took.occupancy_s[schedule.op_class, i] * (1 - 1e-9) - 1e-12 * run.makespan_s).all()


def two_flows(work_s: tuple[float, float], n_bytes: tuple[float, float], agents: tuple[str, str] = ("a", "b")
              ) -> tuple[Schedule, Durations]:
    builder = ScheduleBuilder(1, ["one", "two"])
    for stream, agent, amount in zip(("one", "two"), agents, n_bytes, strict=True):
        last = builder.op(builder.demand(DemandClass(stream, OpKind.COMPUTE, agent=agent), requests=1.0,
                                         bytes={"memory.m": amount}), stream)
    builder.end_token(last)
    return builder.build(), Durations(np.array(work_s)[:, None], np.zeros((2, 1)))


def test_two_that_share_take_turns_by_hand() -> None:
    """10 B/s between a flow that wants 8 for 1 s and one that wants 6 for 2 s: 5 each, then 6 for what is left."""
    schedule, took = two_flows((1.0, 2.0), (8.0, 12.0))
    run = events(schedule, took, Contention({"memory.m": 10.0}))
    assert run.free_s.tolist() == pytest.approx([1.6, 1.6 + (12 - 8) / 6])


def test_what_is_left_of_a_flow_is_done_however_short_the_run() -> None:
    """Rounding is measured against the time so far: in a run of microseconds a femtosecond is no rounding."""
    schedule, took = two_flows((1e-6, 1e-6 * (1 + 9e-10)), (1.0, 1.0))
    with patch.object(events_module, "contends", return_value=True):
        run = events(schedule, took, Contention({"memory.m": 1e12}))
    assert run.free_s == pytest.approx(took.occupancy_s[:, 0], rel=1e-12, abs=0)


def test_background_takes_its_share_by_hand() -> None:
    schedule, took = two_flows((1.0, 1.0), (6.0, 2.0))
    run = events(schedule, took, Contention({"memory.m": 10.0}, background={"memory.m": 0.5}))
    assert run.free_s.tolist() == pytest.approx([1 + (6 - 3) / 5, 1.0])


def test_interference_slows_the_victim_while_the_other_runs() -> None:
    schedule, took = two_flows((1.0, 2.0), (1.0, 1.0))
    for capacity in ({"memory.m": 100.0}, {}):  # a measured share needs no known bandwidth
        run = events(schedule, took, Contention(capacity, {("b", "a", "memory.m"): 0.5}))
        assert run.free_s.tolist() == pytest.approx([1.0, 1.0 + (2.0 - 0.5)])


def test_a_queue_holds_no_more_than_its_limit() -> None:
    """Three sends of 1 s whose answers take 10 s: unlimited 13 s, one at a time 33 s, two at a time 22 s."""
    for limit, expected in ((None, 13.0), (1, 33.0), (2, 22.0)):
        builder = ScheduleBuilder(1, ["out"])
        send = builder.demand(DemandClass("send", OpKind.TRANSFER, link="out"), requests=1.0)
        for _ in range(3):
            last = builder.op(send, "out")
        builder.end_token(last)
        took = Durations(np.array([[1.0]]), np.array([[10.0]]))
        limits = {} if limit is None else {"out": limit}
        assert events(builder.build(), took, Contention(queue_limit=limits)).makespan_s == expected


@pytest.mark.parametrize("wrong", [
    {"capacity_bytes_per_s": {"memory.m": 0.0}}, {"background": {"memory.m": 1.0}}, {"background": {"memory.m": -0.1}},
    {"interference": {("a", "b", "memory.m"): 0.0}}, {"queue_limit": {"one": 0}},
    {"capacity_bytes_per_s": {"memory.m": float("nan")}}])
def test_contention_that_cannot_be_is_an_error(wrong: dict) -> None:
    with pytest.raises(SpecError):
        Contention(**wrong)


# --------------------------------------------------------------------------------------- fairness


def max_min_by_linear_programs(draws: list[dict[str, float]], room: dict[str, float], caps: list[float]) -> list[float]:
    """Raise the least bandwidth as far as it goes, fix whom that binds, repeat: one linear program at a time.

    The bandwidth of a flow is its speed × the most it draws anywhere. Feasible is what no resource overflows.
    """
    most = [max(d.values()) for d in draws]
    n, fixed = len(draws), {}
    rows = [[*(d.get(r, 0.0) / most[i] for i, d in enumerate(draws)), 0.0] for r in room]

    def solve(objective: list[float], floor: float, loose: list[int]) -> np.ndarray:
        bounds = [(floor, most[i] * caps[i]) if i in loose else (fixed[i], fixed[i]) for i in range(n)]
        rising = [[*(-float(j == i) for j in range(n)), 1.0] for i in loose]  # t ≤ b_i
        answer = linprog(objective, A_ub=rows + rising, b_ub=[*room.values(), *([0.0] * len(loose))],
                         bounds=[*bounds, (0, None)], method="highs")
        assert answer.status == 0, answer.message
        return answer.x

    while len(fixed) < n:
        loose = [i for i in range(n) if i not in fixed]
        least = solve([0.0] * n + [-1.0], 0.0, loose)[-1]
        bound = []
        for i in loose:
            best = solve([*(-float(j == i) for j in range(n)), 0.0], least * (1 - 1e-9), loose)[i]
            if best <= least * (1 + 1e-6):
                bound.append(i)
        assert bound
        fixed |= dict.fromkeys(bound, least)
    return [fixed[i] / most[i] for i in range(n)]


@MANY
@given(seeds(), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_speeds_are_max_min_fair(rng: np.random.Generator, n_flows: int, n_resources: int, alike: bool) -> None:
    """Against linear programs; with flows that draw the same everywhere, as copies do, and with any others."""
    names = [f"r{r}" for r in range(n_resources)]
    draws = []
    for _ in range(n_flows):
        used = [n for n in names if rng.random() < 0.7] or names[:1]
        one = rng.uniform(1, 20)
        draws.append({n: float(one if alike else rng.uniform(1, 20)) for n in used})
    room = {n: float(rng.uniform(1, 30)) for n in names}
    caps = [float(rng.choice([1.0, rng.uniform(0.2, 1)])) for _ in range(n_flows)]
    found = fair_speeds(draws, room, caps)
    assert found == pytest.approx(max_min_by_linear_programs(draws, room, caps), rel=1e-5)


@MANY
@given(seeds(), st.integers(1, 7), st.integers(1, 4))
def test_speeds_fit_and_waste_nothing(rng: np.random.Generator, n_flows: int, n_resources: int) -> None:
    """No resource overflows, and whoever is below its cap uses a full one where no one has more bandwidth."""
    names = [f"r{r}" for r in range(n_resources)]
    draws = [{n: float(np.exp(rng.uniform(0, 20))) for n in names if rng.random() < 0.6} for _ in range(n_flows)]
    room = {n: float(np.exp(rng.uniform(0, 20))) for n in names if rng.random() < 0.9}
    caps = [float(rng.choice([1.0, rng.uniform(0.2, 1)])) for _ in range(n_flows)]
    speeds = fair_speeds(draws, room, caps)
    assert all(0 < s <= c for s, c in zip(speeds, caps, strict=True))
    used = {r: sum(d.get(r, 0) * s for d, s in zip(draws, speeds, strict=True)) for r in room}
    assert all(used[r] <= room[r] * (1 + 1e-9) for r in room)
    bandwidth = [s * max((v for r, v in d.items() if r in room), default=0) for d, s in zip(draws, speeds, strict=True)]
    for i, draw in enumerate(draws):
        if speeds[i] < caps[i] * (1 - 1e-9):
            full = [r for r in draw if r in room and used[r] >= room[r] * (1 - 1e-9)]
            assert any(all(bandwidth[j] <= bandwidth[i] * (1 + 1e-9) for j, d in enumerate(draws) if r in d)
                       for r in full)
