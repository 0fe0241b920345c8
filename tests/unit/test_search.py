"""Does the search find what trying everything would, and does it say so when it does not know?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmem.errors import InfeasiblePlanError, SpecError, TraceError
from simmem.planner import api, ranking
from simmem.planner import candidate as candidate_module
from simmem.planner.api import answer
from simmem.planner.bound import agent_bound, lower_bound
from simmem.planner.candidate import Candidate, blocks, capacity_cut, stratified_rows
from simmem.planner.document import Plan
from simmem.planner.predict import energy_j, prefill_seconds, token_seconds
from simmem.planner.question import Question, ask
from simmem.planner.ranking import SCORING_ROWS
from simmem.policy.base import policies, policy_named
from simmem.policy.context import Context, Replayed
from simmem.policy.families import _dense, flash_window, stream
from simmem.spec.model import load_model
from simmem.trace import open_trace
from tests.strategies import contexts, rows_of, same_knobs
from tests.unit.gguf_files import a_gguf_model

FEW = settings(max_examples=max(10, settings.default.max_examples // 2 if settings.default else 0))
"""A law that tries every candidate of a grid in the event engine."""
PRECISIONS = ("fp16", "int4")


@contextmanager
def tiny_grid() -> Iterator[None]:
    """Few enough candidates that no filter has anything to drop."""
    with (patch.object(stream, "RATIO_STEP", 1 / 3), patch.object(_dense, "READER_THREADS", (8,)),
          patch.object(flash_window, "WINDOWS", (0, 2)),
          patch.object(ranking, "SURVIVORS", 1000), patch.object(ranking, "FRONT_SURVIVORS", 1000)):
        yield


def question_of(context: Context, **given: object) -> Question:
    q = Question("device", "model", context.device, context.model, context.replayed, context.workload, PRECISIONS,
                 context.budget_bytes, tuple(policies()), {}, open_choice=False)
    return replace(q, **given)  # type: ignore[arg-type]


def every_candidate(question: Question) -> list[Candidate]:
    """Everything that fits, one by one."""
    found = []
    for precision in question.precisions:
        context = question.context(precision)
        for name in question.policy_names:
            policy = policy_named(name)
            for block in blocks(policy, context, question.fixed):
                cut = capacity_cut(policy, context, block)
                found += [Candidate(context, policy, block.only(np.array([i])), fast_bytes=float(cut.fast_bytes[i]))
                          for i in np.flatnonzero(cut.fits)]
    return found


def seconds_of(candidate: Candidate) -> float:
    return token_seconds(candidate, stratified_rows(candidate.context, candidate.policy, SCORING_ROWS))


def chosen(question: Question, plan: Plan) -> Candidate:
    context = question.context(plan.workload.weights)
    policy = policy_named(plan.policy.name)
    return Candidate(context, policy, same_knobs(policy, context, plan.policy.knobs))


def plan_of(question: Question) -> Plan | None:
    """The plan, or None where nothing fits, which trying everything must confirm."""
    try:
        return answer(question, brief=True)
    except InfeasiblePlanError:
        assert not every_candidate(question)
        return None


# ------------------------------------------------------------------------------------------------ the best


@FEW
@given(contexts())
def test_the_answer_is_that_of_trying_everything_in_the_event_engine(context: Context) -> None:
    with tiny_grid():
        question = question_of(context)
        plan = plan_of(question)
        if plan is None:
            return
        best = min(seconds_of(c) for c in every_candidate(question))
        found = seconds_of(chosen(question, plan))
        gap = plan.evidence.search_gap
        assert gap is not None
        assert 0 <= gap < 1
        assert best * (1 - 1e-12) <= found
        assert found * (1 - gap) <= best * (1 + 2e-6), "what the gap leaves open is open"
        if gap == 0:
            assert found == pytest.approx(best, rel=2e-6, abs=0), "proved best"


@FEW
@given(contexts(), st.integers(1, 2))
def test_the_gap_is_honest_where_the_search_stops_early(context: Context, limit: int) -> None:
    with tiny_grid(), patch.object(ranking, "EVENT_LIMIT", limit):
        question = question_of(context, policy_names=("resident", "stream"))
        plan = plan_of(question)
        if plan is None:
            return
        best = min(seconds_of(c) for c in every_candidate(question))
        assert plan.evidence.search_gap is not None
        assert seconds_of(chosen(question, plan)) * (1 - plan.evidence.search_gap) <= best * (1 + 2e-6)


@FEW
@given(st.booleans().flatmap(lambda trace: contexts(trace=trace)))
def test_nothing_beats_the_bound(context: Context) -> None:
    """Without constants per kernel, which would hide a bound that is too high."""
    agents = {name: agent.model_copy(update={
        "op_overhead": agent.op_overhead.model_copy(update={"value": 1e-15}), "step_overhead": None})
        for name, agent in context.device.agent.items()}
    with tiny_grid():
        question = question_of(context, device=context.device.model_copy(update={"agent": agents}))
        for candidate in every_candidate(question)[::3]:
            rows = rows_of(candidate.context, candidate.policy)
            each = [token_seconds(candidate, rows[i: i + 1]) for i in range(len(rows))]
            assert lower_bound(candidate.context).token_latency_s <= np.mean(each) * (1 + 1e-9)
            agent = str(candidate.block.structural["agent"])
            if candidate.policy.uses_trace:  # every single token
                least = agent_bound(candidate.context, agent, any_token=True).token_latency_s
                assert least <= min(each) * (1 + 1e-9)


def stub(policy: str, score_s: float, event_s: float) -> Candidate:
    """What the proof looks at of a candidate."""
    return cast(Candidate, SimpleNamespace(policy=SimpleNamespace(name=policy), context=None, score_s=score_s,
                                           event_s=event_s))


@pytest.mark.parametrize(("ranked", "pruned_s", "limit", "expected"), [
    # The better bound is the worse run: it must not win for being simpler.
    ([("stream", 8.0, 20.0), ("flash-window", 9.0, 10.0)], np.inf, 8, ("flash-window", 0.0)),
    # As fast to a millionth, in the event engine: the policy that moves least.
    ([("flash-window", 9.0, 9.0), ("stream", 9.0, 9.0), ("resident", 9.0 + 1e-6, 9.0 + 1e-6)], np.inf, 8,
     ("resident", 0.0)),
    ([("flash-window", 9.0, 9.0), ("stream", 9.0, 9.5), ("resident", 9.1, 9.1)], np.inf, 8, ("flash-window", 0.0)),
    ([("theirs", 9.0, 9.0), ("resident", 9.0, 9.0)], np.inf, 8, ("resident", 0.0)),
    # What was cut by a bound below the best run might have been faster.
    ([("stream", 8.0, 10.0)], 9.0, 8, ("stream", 0.1)),
    ([("stream", 8.0, 10.0)], 12.0, 8, ("stream", 0.0)),
    # Stopped early: the next bound says by how much at most.
    ([("stream", 6.0, 10.0), ("stream", 7.0, 7.0)], np.inf, 1, ("stream", 0.3)),
    ([("stream", 6.0, 10.0), ("stream", 7.0, 7.0)], np.inf, 2, ("stream", 0.0)),
])
def test_the_proof_by_hand(ranked: list[tuple[str, float, float]], pruned_s: float, limit: int,
                           expected: tuple[str, float]) -> None:
    by_hand = patch.object(ranking, "event_seconds", lambda c, n_rows: c.event_s)
    with by_hand, patch.object(ranking, "EVENT_LIMIT", limit):
        best, gap = ranking.prove([stub(*r) for r in ranked], pruned_s)
    assert (best.policy.name, pytest.approx(gap)) == expected


@given(contexts())
def test_a_simpler_policy_is_chosen_only_where_it_is_as_fast(context: Context) -> None:
    """Sharing can make the candidate with the better analytic score the worse one: it must not win as 'simpler'."""
    slow = {name: memory.model_copy(update={"rate": memory.capacity.model_copy(update={"value": 5e8})})
            if memory.kind != "storage" else memory for name, memory in context.device.memory.items()}
    device = context.device.model_copy(update={"memory": slow})
    with tiny_grid():
        question = question_of(context, device=device, precisions=("fp16",))
        plan = plan_of(question)
        if plan is not None and plan.evidence.search_gap == 0:
            assert seconds_of(chosen(question, plan)) == pytest.approx(
                min(seconds_of(c) for c in every_candidate(question)), rel=2e-6, abs=0)


# ------------------------------------------------------------------------------------------------ what does not fit


@given(contexts(), st.sampled_from([("fp16",), PRECISIONS]), st.booleans())
def test_what_is_missing_is_enough(context: Context, precisions: tuple[str, ...], placed: bool) -> None:
    """A budget too small names the tier and the bytes; with so many more in each tier that was short, a plan is found.

    One pair of tier and bytes cannot name two tiers, so a discrete device may need the same again in the other. Nothing
    less would do, but for policies that place shares by budget: with one nearer to what they need they place better.
    """
    small = {k: v if k == context.device.storage else 100.0 for k, v in context.budget_bytes.items()}
    with tiny_grid():
        question = question_of(context, budget_bytes=small, precisions=precisions)
        if not placed:
            question = replace(question, policy_names=("resident", "stream", "flash-window"))
        with pytest.raises(InfeasiblePlanError) as caught:
            answer(question)
        error = caught.value
        assert error.exit_code == 3
        assert error.tier in set(small) - {context.device.storage}
        assert error.missing_bytes is not None
        assert error.missing_bytes == int(error.missing_bytes) > 0
        assert f"{error.missing_bytes:.0f} more bytes of {error.tier}" in error.message
        enough = {k: v + (0 if k == context.device.storage else error.missing_bytes) for k, v in small.items()}
        plan = answer(replace(question, budget_bytes=enough), brief=True)
        for use in plan.memory.values():
            assert use.used_bytes <= use.budget_bytes
        if placed:
            return
        less = {k: v - (0 if k == context.device.storage else 1) for k, v in enough.items()}
        with pytest.raises(InfeasiblePlanError) as again:
            answer(replace(question, budget_bytes=less), brief=True)
        assert again.value.missing_bytes == 1


@given(contexts())
def test_storage_that_is_too_small_is_a_tier_like_any_other(context: Context) -> None:
    budget = {k: 1.0 if k == context.device.storage else 1e15 for k in context.budget_bytes}
    with tiny_grid(), pytest.raises(InfeasiblePlanError) as caught:
        answer(question_of(context, budget_bytes=budget))
    assert caught.value.tier == context.device.storage


def test_without_a_trace_only_policies_that_need_none_are_planned() -> None:
    question = api.ask("m1-max", "opt-125m", policy="flash-window")
    for names in (("flash-window",), ("flash-window", "layer-split")):  # the first one's reason is its own
        with pytest.raises(SpecError, match=r"flash-window cannot plan this: it needs a trace of .* opt-125m"):
            answer(replace(question, replayed=None, policy_names=names))
    plan = answer(replace(question, replayed=None, policy_names=tuple(policies())), brief=True)
    assert plan.trace is None
    assert plan.policy.name in ("resident", "stream")


# ------------------------------------------------------------------------------------------------ objectives


@FEW
@given(contexts(energy=True), st.sampled_from(["memory", "throughput", "energy"]))
def test_objectives_do_what_they_say(context: Context, objective: str) -> None:
    with tiny_grid():
        question = question_of(context, objective=objective, precisions=("fp16",))
        plan = plan_of(question)
        if plan is None:
            return
        workload = question.workload

        def value(candidate: Candidate) -> float:
            rows = stratified_rows(candidate.context, candidate.policy, SCORING_ROWS)
            if objective == "memory":
                return sum(v for k, v in candidate.used_bytes().items() if k != context.device.storage)
            seconds = candidate_module.score(candidate.policy, candidate.context, candidate.block, rows)[0]
            if objective == "throughput":
                steps = workload.new_tokens - 1
                return (prefill_seconds(candidate) + steps * seconds) / (workload.batch * workload.new_tokens)
            schedule = candidate.policy.decode(candidate.context, candidate.block, rows)
            joule = energy_j(context.device, schedule, seconds)
            assert joule is not None
            return joule

        best = min(value(c) for c in every_candidate(question))
        assert value(chosen(question, plan)) == pytest.approx(best, rel=2e-6, abs=0)
        assert plan.objective == objective
        if objective == "energy":
            assert plan.predicted.energy_j_per_token is not None


@pytest.mark.parametrize(("ranked", "objective", "expected"), [
    # (policy, what is minimised, the second figure, seconds by the event engine)
    ([("layer-stream", 9.0, 1.0, 1.0), ("resident", 9.0 * (1 + 5e-7), 1.0, 1.0)], "throughput", "resident"),
    ([("theirs", 9.0, 1.0, 1.0), ("tier-percent", 9.0, 1.0, 1.0), ("stream", 9.0, 1.0, 1.0)], "throughput", "stream"),
    ([("layer-stream", 9.0, 1.0, 1.0), ("resident", 9.1, 1.0, 1.0)], "throughput", "layer-stream"),
    # As good by the analytic engine, slower where it shares a memory: not for being simpler.
    ([("layer-stream", 9.0, 1.0, 1.0), ("stream", 9.0, 1.0, 1.2)], "throughput", "layer-stream"),
    # Of the same bytes the fastest, of the same speed the simplest.
    ([("hot-cold", 9.0, 1.0, 1.0), ("stream", 9.0, 2.0, 2.0), ("layer-split", 9.0, 1.0, 1.0)], "memory", "layer-split"),
])
def test_of_equally_good_plans_the_simplest(ranked: list[tuple[str, float, float, float]], objective: str,
                                            expected: str) -> None:
    candidates = [cast(Candidate, SimpleNamespace(policy=SimpleNamespace(name=name), context=None, value=value,
                                                  event_s=event_s)) for name, *value, event_s in ranked]
    with (patch.object(ranking, "event_seconds", lambda c, n_rows: c.event_s),
          patch.object(ranking, "objective_value", lambda c, objective: tuple(c.value))):
        for order in (candidates, candidates[::-1]):
            assert ranking.choose(order, objective)[0].policy.name == expected


def test_what_fits_is_resident_whatever_the_objective() -> None:
    for objective in ("latency", "throughput"):
        plan = api.plan("rtx4090-pc", "opt-1.3b", weights="fp16", batch=4, objective=objective)
        assert plan.policy.name == "resident"


# ------------------------------------------------------------------------------------------------ more memory


@FEW
@given(contexts(), st.sampled_from(["latency", "throughput", "memory"]))
def test_more_memory_never_hurts(context: Context, objective: str) -> None:
    """The plan at hand still fits, so by what is optimised a larger budget brings something or nothing."""
    with tiny_grid():
        question = question_of(context, objective=objective, precisions=("fp16",))
        try:
            plan = answer(question)
        except InfeasiblePlanError:
            return
        for found in plan.sensitivity:
            if found.replanned and objective == "throughput":
                assert found.tokens_per_s_change is not None
                assert found.tokens_per_s_change >= 0
            elif found.replanned and objective == "latency":
                assert found.token_latency_change <= 0
            assert (found.tokens_per_s_change is None) == (objective != "throughput")


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_a_search_that_misses_the_plan_at_hand_does_not_make_memory_cost(objective: str) -> None:
    """What filters leave of the larger budget's grid may all be worse: then the plan stays as it is."""
    question = ask("rtx4090-pc", "opt-1.3b", weights="fp16", batch=4, objective=objective)
    found = ranking.search(question, "fp16")
    worse = replace(found, ranked=tuple(c for c in found.ranked if c.policy.name == "stream" and c.score_s > 0.1))
    with patch.object(api, "search", lambda asked, weights: found if asked.budget_bytes == question.budget_bytes
                      else worse):
        plan = answer(question)
    replanned = [s for s in plan.sensitivity if s.replanned]
    assert len(replanned) == 2
    assert all(s.token_latency_change == 0 and s.tokens_per_s_change in (None, 0) for s in replanned)


@pytest.mark.parametrize("objective", ["memory", "throughput"])
def test_objectives_on_a_whole_grid(objective: str) -> None:
    """On the full grid, where most candidates are filtered out by their latency, the objective still rules."""
    fast = api.plan("m1-max", "opt-125m", weights="fp16")
    other = api.plan("m1-max", "opt-125m", weights="fp16", objective=objective)
    held = [sum(u.used_bytes for k, u in p.memory.items() if k != "flash") for p in (fast, other)]
    assert (held[1] < held[0]) if objective == "memory" else other.predicted.tokens_per_s >= fast.predicted.tokens_per_s


def test_the_least_memory_of_a_whole_grid() -> None:
    question = api.ask("m1-max", "opt-125m", weights="fp16", objective="memory")
    plan = answer(question, brief=True)
    least = min(c.fast_bytes for c in every_candidate(question))
    assert sum(u.used_bytes for k, u in plan.memory.items() if k != "flash") == pytest.approx(least)


def test_energy_without_sourced_figures_is_an_error() -> None:
    with pytest.raises(SpecError, match="no sourced energy figures"):
        api.plan("m1-max", "opt-125m", weights="fp16", objective="energy")


@given(contexts(energy=True))
def test_energy_by_hand(context: Context) -> None:
    """All of a resident token: its bytes and flop at their price, and idle power while it lasts."""
    device, policy = context.device, policies()["resident"]
    block = next(iter(blocks(policy, context, {})))
    schedule = policy.decode(context, block, np.zeros(1, np.int64))
    memory = context.memory_of(str(block.structural["agent"]))
    agent = device.agent[str(block.structural["agent"])]
    n_bytes = sum(schedule.bytes[f"memory.{memory}"][k, 0] for k in schedule.op_class)
    flop = sum(schedule.flop[k, 0] for k in schedule.op_class)
    assert device.idle is not None
    assert energy_j(device, schedule, 0.0) == pytest.approx(
        n_bytes * device.memory[memory].energy_per_byte.value + flop * agent.energy_per_flop.value, rel=1e-9, abs=0)
    assert energy_j(device, schedule, 1e6) == pytest.approx(1e6 * device.idle.value, rel=1e-3)
    assert energy_j(device.model_copy(update={"idle": None}), schedule, 0.5) is None


# ------------------------------------------------------------------------------------------------ batches, repeats


@pytest.mark.parametrize("model", ["llama-2-7b", "opt-6.7b"])  # a head smaller and one larger than a layer's attention
def test_no_memory_is_left_idle_where_attention_is_read_for_every_token(model: str) -> None:
    """Of flash-window: windows and the prompt's buffers take their room, and attention has all that is left."""
    latencies, base = [], api.ask("iphone15", model, weights="fp16", policy="flash-window")
    for budget in (1.6e9, 2.0e9, 2.4e9, 2.8e9):
        question = replace(base, budget_bytes={**base.budget_bytes, "dram": budget})
        context, policy = question.context("fp16"), policy_named("flash-window")
        [block] = [b for b in blocks(policy, context, {"agent": "gpu", "reader_threads": 32})
                   if b.structural["predictor"] == "low-rank"]
        fitted = block.only(np.flatnonzero(~np.isin(block.columns["attention_resident"], (0.0, 0.5, 1.0))))
        used = policy.footprint(context, fitted)["dram"]
        assert fitted.n_candidates > 0
        assert (used <= budget).all()
        assert (used >= budget * 0.999).all()
        latencies.append(ranking.search(question, "fp16").ranked[0].score_s)
    steps = -np.diff(latencies)
    assert (steps > 0).all()
    assert steps.max() < 2 * steps.min()  # as smooth as bytes are


def test_a_batch_reads_the_union_of_what_its_sequences_use() -> None:
    """Two sequences in step: the plan reads what either uses, counted here unit by unit."""
    model = load_model("opt-125m")
    trace = open_trace(None, model, n_tokens=36)
    assert trace is not None
    both = trace.batched(2)
    bits = np.unpackbits(trace.active, axis=2, count=model.architecture.d_ff, bitorder="little").astype(bool)
    union = bits[:18] | bits[18:]
    assert both.active_counts.tolist() == union.sum(axis=2).tolist()
    question = replace(api.ask("m1-max", "opt-125m", weights="fp16", batch=2), replayed=Replayed(both))
    context = question.context("fp16")
    policy = policy_named("flash-window")
    knobs = {"agent": "cpu", "prefetch_layers": 0, "predictor": "low-rank", "bundled": True, "coalesce": False,
             "window_tokens": 0, "attention_resident": 1.0, "reader_threads": 32}
    rows = rows_of(context, policy)
    report = policy.report(context, same_knobs(policy, context, knobs), rows)
    read = union[context.table.tokens].sum(axis=(1, 2)).mean() * context.unit_bytes
    assert report["requested_bytes"] == pytest.approx(read)
    one = policy.decode(replace(context, workload=replace(context.workload, batch=1)),
                        same_knobs(policy, context, knobs), rows)
    two = policy.decode(context, same_knobs(policy, context, knobs), rows)
    assert (two.flop[:, 0][two.flop[:, 0] > 0] > one.flop[:, 0][one.flop[:, 0] > 0]).all()


@settings(max_examples=4)
@given(contexts(), st.sampled_from([7, 64]))
def test_twice_the_same_question_twice_the_same_answer(context: Context, columns: int) -> None:
    """Byte for byte, also from fresh objects and for other block sizes."""
    if context.trace is None:
        return
    try:
        first = answer(question_of(context, precisions=("int4",))).to_json()
    except InfeasiblePlanError:
        return
    again = question_of(context, precisions=("int4",), replayed=Replayed(context.trace))
    with patch.object(candidate_module, "BLOCK_COLUMNS", columns):
        assert answer(again).to_json() == first
    assert answer(again).to_json() == first


@pytest.mark.parametrize("called", ["opt-6.7b", "smollm2-135m", "something-else"])
def test_a_file_called_as_a_built_in_model_is_not_planned_with_its_trace(tmp_path: Path, called: str) -> None:
    """The file has experts, or other sizes: what that model's neurons do says nothing of it."""
    (tmp_path / f"{called}.gguf").write_bytes(a_gguf_model())
    assert ask("m1-max", str(tmp_path / f"{called}.gguf")).replayed is None
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
              "num_hidden_layers": 2, "vocab_size": 100}
    (tmp_path / called).mkdir()
    (tmp_path / called / "config.json").write_text(json.dumps(config))
    assert ask("m1-max", str(tmp_path / called)).replayed is None


@pytest.mark.parametrize("model", ["mixtral-8x7b", "deepseek-v3", "mamba-2.8b"])
@pytest.mark.parametrize("trace", ["opt-published", "smollm2-135m-wina-50"])
def test_neurons_of_a_trace_are_no_experts(model: str, trace: str) -> None:
    with pytest.raises(TraceError, match=rf"neurons, which {model}|{model} has none"):
        ask("m1-max", model, trace=trace)
    assert ask("m1-max", model).replayed is None
