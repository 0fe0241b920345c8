"""What holds for every device, model, trace, policy and knob, and for every schedule at all."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from simmem.cost.roofline import durations
from simmem.planner import candidate as candidate_module
from simmem.planner.candidate import Candidate, contention_of, score
from simmem.planner.predict import predict
from simmem.policy import layers
from simmem.policy.base import Block, Policy, policies
from simmem.policy.context import Context, Replayed
from simmem.policy.layers import Demands, decode_schedule, prefill_schedule
from simmem.schedule import DemandClass, Durations, OpKind, Schedule, ScheduleBuilder
from simmem.sim.analytic import analytic
from simmem.sim.events import events
from simmem.sim.timeline import critical_path, occupancy
from tests.laws.running import alone_s, assert_in_order, shared_s, slowed
from tests.strategies import (
    MANY,
    any_durations,
    column_of,
    contentions,
    contexts,
    devices,
    plans,
    policy_blocks,
    rich,
    rows_of,
    same_knobs,
    schedules,
    seeds,
    traces,
)

Case = tuple[Context, Policy, Block]
READS_AND_HANDS_ON = ("resident", "stream", "flash-window", "layer-stream")
"""Policies of one agent that keep nothing in host memory of what they read for an agent beyond it."""


def decoded(case: Case) -> tuple[Schedule, Durations]:
    context, policy, block = case
    schedule = policy.decode(context, block, rows_of(context, policy)[:4])
    return schedule, durations(schedule, context.device)


# ------------------------------------------------------------------------------------------------ conservation


@MANY
@given(plans())
def test_bytes_are_conserved(case: Case) -> None:
    """Class by class, op by op, interval by interval and in the prediction: the same bytes."""
    context, policy, block = case
    rows = rows_of(context, policy)[:4]
    schedule, took = decoded(case)
    for i in range(0, schedule.n_candidates, 3):
        run = events(schedule.column(i), column_of(took, i), contention_of(context))
        moved: dict[str, float] = defaultdict(float)
        for op in np.flatnonzero(schedule.timed):
            k = schedule.op_class[op]
            for resource, amount in schedule.bytes.items():
                moved[resource] += amount[k, i]
            link = schedule.classes[k].link
            if link:
                rate = context.device.link[link].rate.value
                held = run.free_s[op] - run.start_s[op] + 1e-14 * run.makespan_s  # what a difference of times rounds
                assert schedule.bytes[f"link.{link}"][k, i] <= held * rate * (1 + 1e-12)
        assert {r: v[0] for r, v in run.schedule.timed_bytes.items()} == pytest.approx(dict(moved))
    one = Candidate(context, policy, block.only(np.array([0])))
    told = predict(one, rows)
    share = {k: v[: len(rows)].mean() for k, v in schedule.timed_bytes.items()}
    assert told.bytes_per_token == pytest.approx({n: share.get(f"link.{n}", 0.0) for n in context.device.link})
    assert told.requested_bytes_per_token <= told.bytes_per_token["flash"] * (1 + 1e-9) + 1e-3
    assert sum(told.breakdown_s.values()) == pytest.approx(told.token_latency_s, rel=1e-12, abs=0)


@MANY
@given(plans(READS_AND_HANDS_ON))
def test_what_is_read_for_an_agent_passes_every_link_to_it(case: Case) -> None:
    context, _, block = case
    schedule, _ = decoded(case)
    path = context.path_to(str(block.structural["agent"]))
    if block.structural.get("source_tier") == "host":
        path = path[1:]
    moved = [schedule.timed_bytes.get(f"link.{name}", np.zeros(schedule.n_candidates)) for name in path]
    for earlier, later in pairwise(moved):
        assert later == pytest.approx(earlier)


@given(contexts(), st.integers(0, 2))
def test_with_nothing_resident_every_weight_that_is_multiplied_is_read(context: Context, ahead: int) -> None:
    policy, model = policies()["stream"], context.model
    block = same_knobs(policy, context, {"agent": next(iter(context.device.agent)), "source_tier": "storage",
                                         "prefetch_layers": ahead, "resident_ratio": 0.0, "reader_threads": 8})
    read = policy.decode(context, block, np.zeros(1, np.int64)).timed_bytes["link.flash"][0]
    looked_up = {"positions"} | (set() if model.architecture.tied_head else {"embedding"})
    assert read == pytest.approx(sum(v for k, v in context.group_bytes.items()
                                     if k not in looked_up and (k != "head" or not model.architecture.tied_head)))


@MANY
@given(plans(), st.booleans())
def test_no_tier_ever_holds_more_than_its_footprint(case: Case, shared: bool) -> None:
    context, policy, block = case
    footprint = policy.footprint(context, block)
    rows = rows_of(context, policy)[:4]
    for schedule, per in ((policy.decode(context, block, rows), len(rows)), (policy.prefill(context, block), 1)):
        took = durations(schedule, context.device)
        for i in range(0, schedule.n_candidates, 2):
            run = events(schedule.column(i), column_of(took, i), contention_of(context) if shared else None)
            for tier, (_, held) in occupancy(run).items():
                most = footprint[tier][i // per] if tier in footprint else 0.0
                assert held.max() <= most * (1 + 1e-9) + 1e-3
                assert held.min() >= -1e-9 * most - 1e-3


@MANY
@given(st.data())
def test_one_op_at_a_time_on_a_stream(data: st.DataObject) -> None:
    device = data.draw(devices())
    schedule = data.draw(schedules(device))
    took = data.draw(any_durations(schedule))
    contention = data.draw(st.none() | contentions(schedule, device))
    for i in range(schedule.n_candidates):
        assert_in_order(events(schedule.column(i), column_of(took, i), contention))


# ------------------------------------------------------------------------------------------------ time


@MANY
@given(st.data())
def test_no_run_is_faster_than_a_resource(data: st.DataObject) -> None:
    device = data.draw(devices())
    schedule = data.draw(schedules(device))
    took = durations(schedule, device)
    contention = data.draw(contentions(schedule, device))
    runs = analytic(schedule, took)
    for i in range(schedule.n_candidates):
        assert runs.makespan_s[i] >= alone_s(schedule, device, i) * (1 - 1e-9)
        shared = events(schedule.column(i), column_of(took, i), contention).makespan_s
        assert shared >= shared_s(schedule, contention, i) * (1 - 1e-9)


@MANY
@given(st.data(), st.floats(1e-3, 1e3))
def test_all_durations_times_c_is_the_makespan_times_c(data: st.DataObject, c: float) -> None:
    device = data.draw(devices())
    schedule = data.draw(schedules(device))
    took = data.draw(any_durations(schedule))
    slower = Durations(took.occupancy_s * c, took.latency_s * c)
    expected = c * analytic(schedule, took).makespan_s
    assert analytic(schedule, slower).makespan_s == pytest.approx(expected, rel=1e-12, abs=0)
    given_s = data.draw(contentions(schedule, device))
    scaled = slowed(given_s, c)
    for i in range(min(schedule.n_candidates, 2)):
        base = events(schedule.column(i), column_of(took, i), given_s)
        other = events(schedule.column(i), column_of(slower, i), scaled)
        assert other.end_s == pytest.approx(c * base.end_s, rel=1e-9, abs=0)


RATES = ("rate", "request_rate", "single_rate", "rate_share", "flop_share", "cache", "cache_rate", "attention_rate")
TIMES = ("latency", "request_time", "op_overhead", "step_overhead", "graph_overhead")


@MANY
@given(plans(), seeds())
def test_alone_on_its_resources_a_slower_part_never_helps(case: Case, rng: np.random.Generator) -> None:
    context = case[0]
    schedule, took = decoded(case)
    fast = analytic(schedule, took)
    factors = {}
    for key in context.device.figures():
        field = key.split(".")[2] if key.count(".") > 1 else ""
        if rng.random() < 0.4 and field in (*RATES, *TIMES, "flop_per_s"):
            factors[key] = float(rng.uniform(1, 3)) ** (1 if field in TIMES else -1)
    slow = analytic(schedule, durations(schedule, context.device, factors))
    assert (slow.token_end_s >= fast.token_end_s * (1 - 1e-12)).all()
    assert (slow.makespan_s >= fast.makespan_s * (1 - 1e-12)).all()


@MANY
@given(st.data())
def test_alone_on_its_resources_nothing_takes_longer_than_one_op_after_the_other(data: st.DataObject) -> None:
    schedule = data.draw(schedules(data.draw(devices())))
    took = data.draw(any_durations(schedule))
    serial = (took.occupancy_s + took.latency_s)[schedule.op_class].sum(axis=0)
    assert (analytic(schedule, took).makespan_s <= serial * (1 + 1e-12)).all()


@MANY
@given(st.data())
def test_the_critical_path_sums_to_the_token(data: st.DataObject) -> None:
    device = data.draw(devices())
    schedule = data.draw(schedules(device))
    took = data.draw(any_durations(schedule))
    contention = data.draw(st.none() | contentions(schedule, device))
    for i in range(schedule.n_candidates):
        run = events(schedule.column(i), column_of(took, i), contention)
        path = critical_path(run)
        assert sum(path.values()) == pytest.approx(run.token_s, rel=1e-12, abs=1e-13 * run.makespan_s)
        assert min(path.values()) >= 0
        if contention is None or not contention.queue_limit:
            assert path["wait"] <= 1e-12 * run.makespan_s, "an op starts when a predecessor lets it"


def test_a_critical_path_by_hand() -> None:
    """A copy holds its link for 1 s and arrives 10 s later; the next copy waits 4 s for a kernel, not for the link."""
    builder = ScheduleBuilder(1, ["link", "gpu"])
    copy = builder.demand(DemandClass("copy", OpKind.TRANSFER, link="link"), requests=1.0)
    kernel = builder.demand(DemandClass("kernel", OpKind.COMPUTE, agent="gpu"), requests=1.0)
    builder.op(copy, "link")
    ran = builder.op(kernel, "gpu")
    builder.end_token(builder.op(copy, "link", deps=[ran]))
    run = events(builder.build(), Durations(np.array([[1.0], [4.0]]), np.array([[10.0], [0.0]])))
    path = critical_path(run)
    assert {k: v for k, v in path.items() if v} == {"compute": 4.0, "transfer": 11.0}
    assert run.busy_s == {"link": 2.0, "gpu": 4.0}


# ------------------------------------------------------------------------------------------------ knobs


def seconds_of(context: Context, schedule: Schedule) -> np.ndarray:
    return analytic(schedule, durations(schedule, context.device)).token_s


@MANY
@given(contexts(), st.data())
def test_a_stream_with_everything_resident_is_resident(context: Context, data: st.DataObject) -> None:
    resident, streaming = policies()["resident"], policies()["stream"]
    block = data.draw(policy_blocks(streaming, context, 3))
    block.columns["resident_ratio"][:] = 1.0
    plain = Block({"agent": block.structural["agent"]}, {})
    row = np.zeros(1, np.int64)
    for phase in ("decode", "prefill"):
        args = (row,) if phase == "decode" else ()
        one = getattr(resident, phase)(context, plain, *args)
        other = getattr(streaming, phase)(context, block, *args)
        assert seconds_of(context, other) == pytest.approx(seconds_of(context, one)[0], rel=1e-12, abs=0)
    footprint = resident.footprint(context, plain)
    for tier, used in streaming.footprint(context, block).items():
        assert used == pytest.approx(footprint[tier][0] if tier in footprint else 0.0)


@MANY
@given(contexts(), st.data())
def test_weights_in_the_agents_own_memory_need_not_move(context: Context, data: st.DataObject) -> None:
    """Streaming from host memory to an agent that computes out of host memory is being resident, not a free lunch."""
    streaming = policies()["stream"]
    block = data.draw(policy_blocks(streaming, context, 3))
    agent = str(block.structural["agent"])
    if context.memory_of(agent) != context.device.host:
        return
    block = Block({**block.structural, "source_tier": "host"}, block.columns)
    row = np.zeros(1, np.int64)
    resident = Block({"agent": agent}, {})
    plain = policies()["resident"]
    assert seconds_of(context, streaming.decode(context, block, row)) == pytest.approx(
        seconds_of(context, plain.decode(context, resident, row))[0], rel=1e-12, abs=0)
    assert streaming.footprint(context, block)[context.device.host] == pytest.approx(
        plain.footprint(context, resident)[context.device.host][0])


@MANY
@given(contexts(), st.data())
def test_a_window_without_a_predictor_streams_the_whole_ffn(context: Context, data: st.DataObject) -> None:
    policy = policies()["flash-window"]
    block = data.draw(policy_blocks(policy, context, 3))
    block = Block({**block.structural, "predictor": "none"},
                  {**block.columns, "attention_resident": np.ones(3)})
    ahead, agent = int(block.structural["prefetch_layers"]), str(block.structural["agent"])
    ffn = context.model.group("ffn").matrix_params * context.unit_bytes / context.unit_params
    per_layer = np.full((1, 3), ffn / context.model.architecture.n_layers)
    demands = Demands(agent=agent, prefetch=ahead, source=context.device.storage,
                      depth=block.columns["reader_threads"].astype(float), layer_stream_bytes=per_layer,
                      head_stream_bytes=np.zeros(3), held_bytes={})
    if context.unit_params != context.model.unit_params:
        return  # the gate that predicts is no part of a unit: there is no policy without it
    rows = rows_of(context, policy)[:1]
    lookup = policy.decode(context, block, rows).timed_bytes["link.flash"] - ffn  # rows of an untied embedding
    if context.model.architecture.tied_head:
        assert lookup == pytest.approx(0.0, abs=1e-6 * ffn)
        assert seconds_of(context, policy.decode(context, block, rows)) == pytest.approx(
            seconds_of(context, decode_schedule(context, demands)), rel=1e-12, abs=0)
    prompt = replace(demands, prefetch=max(ahead, 1))  # nothing has to be predicted to read a prompt ahead
    assert seconds_of(context, policy.prefill(context, block)) == pytest.approx(
        seconds_of(context, prefill_schedule(context, prompt)), rel=1e-12, abs=0)


@MANY
@given(contexts(), st.data())
def test_readers_and_prefetch_without_reads_change_nothing(context: Context, data: st.DataObject) -> None:
    policy = policies()["stream"]
    agent = data.draw(st.sampled_from(sorted(context.device.agent)))
    took = []
    for ahead in (0, 1, 2, 5):
        for threads in (1, 8, 64):
            block = same_knobs(policy, context, {"agent": agent, "source_tier": "storage", "prefetch_layers": ahead,
                                                 "resident_ratio": 1.0, "reader_threads": threads})
            took.append(seconds_of(context, policy.decode(context, block, np.zeros(1, np.int64)))[0])
    assert took == pytest.approx([took[0]] * len(took), rel=1e-12, abs=0)


@MANY
@given(contexts(), st.data())
def test_more_resident_is_never_slower(context: Context, data: st.DataObject) -> None:
    """And never by a step: the last byte that becomes resident saves next to nothing.

    Where a step is no whole number of rounds of the buffers, stages end in bunches and the step that is timed may hold
    one more end of a bunch than another: a law of the mean step, not of one.
    """
    policy = policies()["stream"]
    block = data.draw(policy_blocks(policy, context, 1))
    assume((context.model.architecture.n_layers + 1) % (int(block.structural["prefetch_layers"]) + 1) == 0)
    ratio = np.linspace(0, 1, 97)
    many = Block(block.structural, {"resident_ratio": ratio,
                                    "reader_threads": np.repeat(block.columns["reader_threads"], len(ratio))})
    with patch.object(layers, "STREAM_CHUNK_BYTES", 4096.0):  # several to a layer, in models as small as these
        took = seconds_of(context, policy.decode(context, many, np.zeros(1, np.int64)))
    assert (np.diff(took) <= 1e-12 * took[:-1]).all()


@MANY
@given(contexts())
def test_hits_never_fall_with_the_window_where_memory_is_no_limit(context: Context) -> None:
    roomy, policy = rich(context), policies()["flash-window"]
    rows = rows_of(roomy, policy)
    knobs = {k.name: k.values[0] for k in policy.knobs(roomy)}
    if knobs["predictor"] == "none":
        return
    hits, read = [], []
    for window in range(roomy.table.max_window + 1):
        report = policy.report(roomy, same_knobs(policy, roomy, {**knobs, "window_tokens": window}), rows)
        hits.append(report["cache"]["ffn"]["hit_ratio"])
        read.append(report["requested_bytes"])
    assert np.all(np.diff(hits) >= 0)
    assert np.all(np.diff(read) <= 1e-9)


# ------------------------------------------------------------------------------------------------ blocks, steady state


@pytest.mark.parametrize("columns", [1, 7, 4096])
@MANY
@given(case=plans(n=6))
def test_the_score_does_not_depend_on_the_block(columns: int, case: Case) -> None:
    context, policy, block = case
    rows = rows_of(context, policy)
    whole = score(policy, context, block, rows)
    with patch.object(candidate_module, "BLOCK_COLUMNS", columns):
        assert np.array_equal(score(policy, context, block, rows), whole), "to the last bit"
    if columns == 1 and getattr(policy, "same_at_every_budget", False):  # then a search scores it once for all budgets
        more = replace(context, budget_bytes={tier: 1.3 * room for tier, room in context.budget_bytes.items()})
        assert np.array_equal(score(policy, more, block, rows), whole), "to the last bit"


@MANY
@given(contexts(), st.sampled_from(["stream", "flash-window"]), st.sampled_from([3, 6, 12, 24]), st.integers(1, 4),
       st.data())
def test_the_timed_step_is_the_steady_state(context: Context, name: str, n_layers: int, ahead: int,
                                            data: st.DataObject) -> None:
    """The few steps that are scheduled stand for very many, to within the bunching of one round of the buffers.

    A pipeline that is bound by the delay of its reads ends its stages in bunches, `ahead + 1` to a round: a token of
    n stages holds q or q + 1 rounds where its mean is n / (ahead + 1), so one step differs from the mean by at most
    one round, the share (ahead + 1) / n. That is 6 % at one stage ahead in a model of 32 layers.
    """
    assume(ahead <= n_layers)
    model = context.model.model_copy(update={
        "architecture": context.model.architecture.model_copy(update={"n_layers": n_layers})})
    context = replace(context, model=model, replayed=Replayed(data.draw(traces(model))))
    policy = policies()[name]
    block = data.draw(policy_blocks(policy, context, 3))
    block = Block({**block.structural, "prefetch_layers": ahead}, block.columns)
    rows = rows_of(context, policy)[:2]
    timed = seconds_of(context, policy.decode(context, block, rows))
    with patch.object(layers, "WARM_UP", 24 * (n_layers + 1) // (ahead + 1)):
        schedule = policy.decode(context, block, rows)
    ends = analytic(schedule, durations(schedule, context.device)).token_end_s
    assert len(ends) >= 20
    steady = np.diff(ends, axis=0)[-12:].mean(axis=0)
    assert timed == pytest.approx(steady, rel=(ahead + 1) / (n_layers + 1), abs=0)
