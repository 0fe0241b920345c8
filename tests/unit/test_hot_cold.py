"""Does hot-cold multiply exactly what a token needs, on both sides at once, and tell what it cannot know?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmem.cost.roofline import durations
from simmem.errors import SpecError, TraceError
from simmem.planner.api import answer
from simmem.planner.candidate import contention_of
from simmem.planner.question import ask
from simmem.policy.base import Block, why_not_plan
from simmem.policy.check import check_policy
from simmem.policy.context import Context, Replayed
from simmem.policy.families.hot_cold import HotCold
from simmem.policy.families.layer_split import LayerSplit
from simmem.sim.analytic import analytic
from simmem.sim.events import events
from tests.strategies import column_of, contexts, policy_blocks, rows_of

POLICY = HotCold()
ASKED: dict[str, Any] = {"weights": "fp16", "prompt": 16, "new_tokens": 16}


def context_of(model: str = "opt-1.3b", device: str = "powerinfer-pc-high", **asked: Any) -> Context:
    question = ask(device, model, **{**ASKED, **asked})
    return question.context(question.precisions[0])


def block_of(sizes: Any, **changed: str) -> Block:
    structural = {"agent": "gpu", "predictor": "low-rank", "placement": "frequency", "kv_cache": "host", **changed}
    return Block(structural, {"gpu_weight_bytes": np.asarray(sizes, np.float64)})


def sizes_of(context: Context, n: int = 9) -> np.ndarray:
    knob = next(k for k in POLICY.knobs(context) if k.name == "gpu_weight_bytes")
    assert knob.low is not None and knob.high is not None
    return np.linspace(knob.low, knob.high, n)


@pytest.mark.parametrize("placement", ["frequency", "layer", "random"])
@pytest.mark.parametrize("kv_cache", ["host", "with-heads"])
def test_every_active_unit_is_multiplied_once(placement: str, kv_cache: str) -> None:
    context = context_of("opt-1.3b", trace="opt-30b-published")
    block, rows = block_of(sizes_of(context), placement=placement, kv_cache=kv_cache), np.arange(5)
    schedule = POLICY.decode(context, block, rows)
    a, model = context.model.architecture, context.model
    uses = np.bincount(schedule.op_class, minlength=len(schedule.classes))

    def read(name: str) -> np.ndarray:
        found = sum(uses[k] * schedule.bytes[f"memory.{context.memory_of(str(c.agent))}"][k]
                    for k, c in enumerate(schedule.classes) if c.agent is not None and c.name == name)
        return np.asarray(found).reshape(block.n_candidates, len(rows))

    ffn = model.group("ffn")
    beside = 2.0 * (ffn.vector_params + model.norm_params * a.norms_per_layer / 2 * a.n_layers)
    active = context.table.active_units[rows].sum(axis=1) * context.unit_bytes
    np.testing.assert_allclose(read("ffn"), np.broadcast_to(active + beside, (9, 5)), rtol=1e-9)
    np.testing.assert_allclose(read("attention"), 0.4 * context.decode_kv_bytes, rtol=1e-12)
    whole = 0.4 * 2.0 * model.group("attention").matrix_params  # 40 % of the heads, by the trace
    vectors = 2.0 * (model.group("attention").vector_params + model.norm_params * a.norms_per_layer / 2 * a.n_layers)
    assert ((read("projections") >= whole + vectors - 1) & (read("projections") <= whole + 2 * vectors + 1)).all()
    assert {k: v.tolist() for k, v in schedule.timed_bytes.items() if k == "link.flash"} in (
        {}, {"link.flash": [0.0] * 45})


def test_both_sides_work_at_once_and_meet() -> None:
    context = context_of("opt-6.7b", vram="8 GB")
    block, rows = POLICY.refine(context, block_of(sizes_of(context), kv_cache="with-heads"), {}), np.arange(3)
    schedule = POLICY.decode(context, block, rows)
    took = durations(schedule, context.device)
    token_s = analytic(schedule, took).token_s
    uses = np.bincount(schedule.op_class, minlength=len(schedule.classes))
    busy = {name: sum(uses[k] * took.occupancy_s[k] for k, c in enumerate(schedule.classes) if c.agent == name)
            for name in ("gpu", "cpu")}
    assert (token_s >= np.maximum(busy["gpu"], busy["cpu"])).all()
    turns = (busy["gpu"] + busy["cpu"]).reshape(-1, 3)
    assert (token_s.reshape(-1, 3) < turns)[1:5].all(), "side by side while both have much to do"
    for i in (0, 14, schedule.n_candidates - 1):
        run = events(schedule.column(i), column_of(took, i), contention_of(context))
        assert token_s[i] <= run.token_s * (1 + 1e-9)
    used = POLICY.footprint(context, block)["vram"]
    assert used[-1] <= context.budget_bytes["vram"] < used[-1] * 1.002, "the largest that fits is among them"


def test_frequency_beats_whole_layers_and_blind_choice() -> None:
    context = context_of("opt-6.7b")
    size = float(sizes_of(context)[3])
    shares, seconds = {}, {}
    for placement in ("frequency", "layer", "random"):
        block, rows = block_of([size], placement=placement), np.arange(4)
        schedule = POLICY.decode(context, block, rows)
        seconds[placement] = float(analytic(schedule, durations(schedule, context.device)).token_s.mean())
        report = POLICY.report(context, block, rows)
        shares[placement] = report["active_share"]["gpu"]
        assert (report["gap"] is None) == (placement != "frequency")
        assert report["gap"] is None or report["gap"] <= 0.01
    assert seconds["frequency"] < 0.95 * min(seconds["layer"], seconds["random"])
    assert shares["frequency"] > shares["random"] + 0.1


def test_a_token_that_is_timed_does_not_decide_what_is_hot() -> None:
    """With what timed tokens use drawn anew, the same units are placed."""
    context = context_of("opt-125m")
    assert context.trace is not None
    first = int(context.table.tokens[0])
    active = context.trace.active.copy()
    active[first:] = active[:1]
    trace = replace(context.trace, active=active)
    other = replace(context, replayed=Replayed(trace))
    block = block_of(sizes_of(context))
    mine, theirs = POLICY.footprint(context, block), POLICY.footprint(other, block)
    assert {k: v.tolist() for k, v in mine.items()} == {k: v.tolist() for k, v in theirs.items()}
    fast, slow = (POLICY.decode(c, block, np.arange(2)) for c in (other, context))
    assert not np.array_equal(fast.bytes["memory.vram"], slow.bytes["memory.vram"])


def test_without_a_predictor_it_is_dense_and_loses_nothing() -> None:
    context = context_of("opt-1.3b")
    block = block_of(sizes_of(context), predictor="none")
    report = POLICY.report(context, block.only(np.array([4])), np.arange(2))
    assert report["perplexity_ratio"] == 1.0
    schedule = POLICY.decode(context, block, np.arange(2))
    dense = LayerSplit().decode(context, Block({"agent": "gpu"}, {"gpu_layers": np.array([0])}), np.zeros(1, np.int64))
    assert schedule.flop.sum(axis=0).min() > 0.99 * dense.flop[:, 0].sum() / len(dense.classes)
    assert "perplexity_ratio" in POLICY.report(context, block_of([float(sizes_of(context)[4])]), np.arange(2))
    assert POLICY.report(context, block_of([float(sizes_of(context)[4])]), np.arange(2))["perplexity_ratio"] is None


@settings(max_examples=30)
@given(contexts(), st.data())
def test_it_keeps_the_contract_on_any_device_with_two_memories(context: Context, data: st.DataObject) -> None:
    if why_not_plan(POLICY, context) is not None:
        assert POLICY.knobs(context) == ()
        return
    check_policy(POLICY, context, seed=data.draw(st.integers(0, 99)))
    schedule = POLICY.decode(context, data.draw(policy_blocks(POLICY, context, 2)), rows_of(context, POLICY)[:2])
    took = durations(schedule, context.device)
    found = analytic(schedule, took)
    for i in range(schedule.n_candidates):
        run = events(schedule.column(i), column_of(took, i), contention_of(context))
        assert found.token_s[i] <= run.token_s * (1 + 1e-9)


def test_the_share_of_heads_in_use_is_one_figure_of_the_trace() -> None:
    context = context_of("opt-1.3b", trace="opt-30b-published", batch=2)
    assert context.attention_active_share == 0.4 and replace(context, replayed=None).attention_active_share == 1.0
    attention = POLICY._stages(context, block_of([1e9]))[0]
    assert attention.frequency == pytest.approx(1 - 0.6**2)  # either of two sequences
    assert context.replayed is not None
    trace = context.replayed.trace
    for wrong in (0.4, {"value": 1.4}, {}):
        header = trace.header.model_copy(update={"statistics": {"attention_active_share": wrong}})
        with pytest.raises(TraceError, match="expected a value from 0 to 1"):
            assert replace(context, replayed=Replayed(replace(trace, header=header))).attention_active_share


def test_it_says_why_it_cannot() -> None:
    assert "a trace" in str(why_not_plan(POLICY, context_of("mixtral-8x7b")))
    assert "one memory" in str(why_not_plan(POLICY, context_of("opt-1.3b", "m1-max")))
    context = context_of("opt-1.3b")
    links = {name: link for name, link in context.device.link.items() if name != "d2h"}
    no_way_back = replace(context, device=context.device.model_copy(update={"link": links}))
    assert "both ways" in str(why_not_plan(POLICY, no_way_back)) and POLICY.knobs(no_way_back) == ()
    for knob, wrong, said in (("placement", "hottest", "expected one of frequency, layer, random"),
                              ("gpu_weight_bytes", "1e3", "expected a value from"), ("predictor", "gate", "capture")):
        with pytest.raises(SpecError, match=said):
            answer(ask("powerinfer-pc-high", "opt-1.3b", policy="hot-cold", knobs={knob: wrong}, **ASKED))
