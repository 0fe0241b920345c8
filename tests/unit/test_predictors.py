"""Are predictors judged by counting, and does a plan with one read what it asked for, no more and no less?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from simmem.errors import InfeasiblePlanError, SpecError, TraceError
from simmem.planner.api import answer
from simmem.planner.bound import lower_bound
from simmem.planner.candidate import blocks
from simmem.planner.question import Question, _replay
from simmem.planner.replan import read_plan, resimulate
from simmem.policy.base import policy_named
from simmem.policy.context import Context, Replayed
from simmem.report.format import console
from simmem.report.predictors import predictor_table
from simmem.spec import load_device, load_model
from simmem.spec.workload import Workload
from simmem.trace.bits import words_of
from simmem.trace.predictors import judge, simple_predictors
from simmem.trace.prefetch import parse_predictor, predicted_units
from simmem.trace.store import load_trace_file, save_trace
from simmem.trace.trace import Predictor, Quality, Trace, TraceHeader, digest_of
from tests.strategies import same_knobs

TOKENS, UNITS, LAYERS = 24, 3001, 12
MODEL = load_model("opt-125m")
MODEL = MODEL.model_copy(update={"name": "small", "architecture": MODEL.architecture.model_copy(update={
    "n_layers": LAYERS, "d_ff": UNITS, "vocab": 500})})

Mask = NDArray[np.bool_]


def pack(mask: Mask) -> NDArray[np.uint8]:
    return np.packbits(mask, axis=-1, bitorder="little")


def drawn(share: float, seed: int = 0, tokens: int = TOKENS) -> Mask:
    return np.random.default_rng(seed).random((tokens, LAYERS, UNITS)) < share


def a_trace(mask: Mask, asked: dict[tuple[str, int], Mask] | None = None, *, params_share: float = 0.0,
            predictor: str = "oracle") -> Trace:
    """A trace of `MODEL` that holds what some predictors asked for."""
    active = pack(mask)
    unit_bytes = MODEL.unit_bytes("fp16")
    rows = tuple(Predictor.model_validate({
        "name": name, "asks": "as the test says", "layers_ahead": ahead, "held": True, "unit_bytes": unit_bytes,
        "params_share": params_share,
        "quality": Quality(text="a text", tokens=9, dense_perplexity=10.0, sparse_perplexity=11.0 + ahead),
        **judge(active, pack(bits), n_units=UNITS, unit_bytes=unit_bytes)._asdict(),
    }) for (name, ahead), bits in (asked or {}).items())
    header = TraceHeader.model_validate({
        "name": "by-hand", "kind": "captured", "model": "small", "n_tokens": len(mask), "n_layers": LAYERS,
        "n_units": UNITS, "unit_bytes": unit_bytes, "criterion": "test", "threshold": "none", "records": "active",
        "predictor": predictor, "text": "none",
        "predictor_params_share": params_share if predictor == "low-rank" else 0.0, "digest": digest_of(active),
        "predictors": rows,
        "quality": Quality(text="a text", tokens=9, dense_perplexity=10.0, sparse_perplexity=10.5)})
    extras = {"asked": np.stack([pack(bits) for bits in asked.values()])} if asked else {}
    return Trace.with_extras(header, active, extras)


def context_of(trace: Trace, share: float = 0.9) -> Context:
    """Memory for this share of the model."""
    device, workload = load_device("iphone15"), Workload(16, 16)
    whole = Context(device, MODEL, workload, Replayed(trace), {})
    room = share * whole.total_bytes + whole.kv_bytes + whole.working_bytes
    return Context(device, MODEL, workload, Replayed(trace),
                   {k: m.budget_bytes if k == device.storage else room for k, m in device.memory.items()})


def question_of(context: Context, fixed: dict[str, object] | None = None, **changes: Any) -> Question:
    question = Question("iphone15", "small", context.device, context.model, context.replayed, context.workload,
                        ("fp16",), context.budget_bytes, ("flash-window", "stream"), fixed or {})
    return replace(question, **changes)


# --- judging ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_hits_and_misses_are_counted_one_by_one(tokens: int, layers: int, units: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    needed, asked = (rng.random((tokens, layers, units)) < share for share in rng.random(2))
    first = int(rng.integers(0, layers))
    found = judge(pack(needed), pack(asked), n_units=units, unit_bytes=7.0, first_layer=first)
    hits, n_needed, n_asked = np.zeros(layers), np.zeros(layers), np.zeros(layers)
    for token in range(tokens):
        for layer in range(first, layers):
            for unit in range(units):
                n_needed[layer] += needed[token, layer, unit]
                n_asked[layer] += asked[token, layer, unit]
                hits[layer] += needed[token, layer, unit] and asked[token, layer, unit]
    assert found.recall == pytest.approx(hits.sum() / max(n_needed.sum(), 1))
    assert found.precision == pytest.approx(hits.sum() / max(n_asked.sum(), 1))
    assert found.asked_share == pytest.approx(n_asked.sum() / (tokens * (layers - first) * units))
    assert found.wasted_bytes_per_token == pytest.approx(7.0 * (n_asked.sum() - hits.sum()) / tokens)
    for layer in range(layers):
        assert found.recall_by_layer[layer] == (
            pytest.approx(hits[layer] / n_needed[layer]) if n_needed[layer] else None)
        assert found.precision_by_layer[layer] == (
            pytest.approx(hits[layer] / n_asked[layer]) if n_asked[layer] else None)


def test_previous_token_and_frequency_on_bits_written_out() -> None:
    mask = np.zeros((6, LAYERS, UNITS), np.bool_)
    mask[:, :, 0] = True                    # always
    mask[::2, :, 1] = True                  # tokens 0, 2, 4
    mask[3:, :, 2] = True                   # the second half
    before, once, more, _ = simple_predictors(a_trace(mask), (1.0, 1.5, 2.0))
    # Tokens 3, 4, 5 use {0, 2}, {0, 1, 2}, {0, 2}; tokens 2, 3, 4 used {0, 1}, {0, 2}, {0, 1, 2}.
    assert (before.recall, before.precision) == (pytest.approx(5 / 7), pytest.approx(5 / 7))
    # Tokens 0 to 2 use 5 units, {0} thrice and {1} twice: 5 / 3 units, so 2, then 2.5 units, so 2, are asked for.
    assert (once.recall, once.precision) == (pytest.approx(4 / 7), pytest.approx(4 / 6))
    assert more.judged_tokens == more.fitted_tokens == 3
    assert once.wasted_bytes_per_token == pytest.approx(2 / 3 * LAYERS * MODEL.unit_bytes("fp16"))
    assert simple_predictors(a_trace(mask[:1])) == ()


# --- files --------------------------------------------------------------------------------------------------------


def test_what_was_asked_comes_back_from_a_file_and_goes_with_its_tokens(tmp_path: Path) -> None:
    mask = drawn(0.2)
    asked = {("low-rank", 0): drawn(0.3, 1), ("low-rank", 1): drawn(0.3, 2), ("gate", 0): drawn(0.3, 3)}
    save_trace(a_trace(mask, asked), tmp_path / "t.safetensors")
    trace = load_trace_file(tmp_path / "t.safetensors")
    for (name, ahead), bits in asked.items():
        np.testing.assert_array_equal(trace.asked_by(name, ahead)[1], pack(bits))
        np.testing.assert_array_equal(trace.first(5).asked_by(name, ahead)[1], pack(bits[:5]))
        pairs = trace.batched(2)
        np.testing.assert_array_equal(pairs.asked_by(name, ahead)[1], pack(bits[:12] | bits[12:]))
        np.testing.assert_array_equal(pairs.active, pack(mask[:12] | mask[12:]))
    assert trace.asked_by("low-rank")[0].layers_ahead == trace.asked_by("low-rank", 5)[0].layers_ahead == 1
    np.testing.assert_array_equal(predicted_units(trace, parse_predictor("low-rank")),
                                  words_of(pack(asked["low-rank", 1])))
    for wrong in ("next-layer", "frequency"):
        with pytest.raises(TraceError, match="low-rank, gate"):
            trace.asked_by(wrong)


def test_a_file_that_asks_for_units_it_has_not_or_says_more_than_it_holds(tmp_path: Path) -> None:
    trace = a_trace(drawn(0.2), {("gate", 0): drawn(0.3, 1)})
    spare = trace.extras["asked"].copy()
    spare[0, 0, 0, -1] |= 0x80
    with pytest.raises(TraceError, match="past its 3001"):
        Trace.with_extras(trace.header, trace.active, {"asked": spare})
    with pytest.raises(TraceError, match="promises 1"):
        Trace.with_extras(trace.header, trace.active, {})
    two = np.repeat(trace.extras["asked"], 2, axis=0)
    with pytest.raises(TraceError, match="promises 1"):
        Trace.with_extras(trace.header, trace.active, {"asked": two})
    quiet = trace.header.model_copy(update={"predictors": (trace.header.predictors[0].model_copy(update={
        "asks": "\x1b[2J"}),)})
    save_trace(Trace.with_extras(quiet, trace.active, trace.extras), tmp_path / "t.safetensors")
    with pytest.raises(TraceError, match="cannot be printed"):
        load_trace_file(tmp_path / "t.safetensors")


@pytest.mark.parametrize("unit_bytes", [1e-300, 1.0, 1e5, 1e300])
def test_units_of_a_size_that_no_neuron_has_are_refused(unit_bytes: float) -> None:
    trace = a_trace(drawn(0.2), {("gate", 0): drawn(0.3, 1)})
    said = trace.header.predictors[0].model_copy(update={"unit_bytes": unit_bytes})
    context = context_of(replace(trace, header=trace.header.model_copy(update={"predictors": (said,)})))
    with pytest.raises(TraceError, match="a neuron of small has 1 to 2 rows"):
        answer(question_of(context, {"predictor": "gate"}, policy_names=("flash-window",)))


def test_a_captured_trace_that_claims_a_law_has_none(tmp_path: Path) -> None:
    trace = a_trace(drawn(0.2))
    header = trace.header.model_copy(update={"statistics": {"concentration": 0.5}})
    save_trace(replace(trace, header=header), tmp_path / "t.safetensors")
    assert _replay(str(tmp_path / "t.safetensors"), MODEL, 1).ends == {}  # type: ignore[union-attr]


def test_what_a_file_says_of_a_predictor_is_shown_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    header = a_trace(drawn(0.2), {("gate", 0): drawn(0.3, 1)}).header
    endless = Quality(text="a text", tokens=9, dense_perplexity=1e-308, sparse_perplexity=1e308)
    said = header.predictors[0].model_copy(update={"asks": "[/foo] [red]b", "quality": endless})
    console().print(predictor_table(header.model_copy(update={"predictors": (said,)})))
    shown = capsys.readouterr().out
    assert "[/foo] [red]b" in shown and "× inf" in shown


# --- plans --------------------------------------------------------------------------------------------------------


def test_a_predictor_that_knows_all_and_weighs_nothing_plans_like_the_oracle() -> None:
    mask = drawn(0.1)
    context = context_of(a_trace(mask, {("low-rank", 0): mask}))
    fixed = {"window_tokens": 3, "reader_threads": 16}
    oracle, known = (answer(question_of(context, {**fixed, "predictor": name}, open_choice=False,
                                        policy_names=("flash-window",))) for name in ("oracle", "low-rank"))
    assert known.predicted == oracle.predicted and known.memory == oracle.memory
    assert known.quality.perplexity_ratio == pytest.approx(1.1) != oracle.quality.perplexity_ratio


@pytest.mark.parametrize("share", [0.05, 0.6])
def test_a_plan_reads_what_the_predictor_asks_for(share: float) -> None:
    """Fewer or more units than are active, against a trace that has these as its activity."""
    asked = drawn(share, 1)
    context = context_of(a_trace(drawn(0.2), {("low-rank", 1): asked}, params_share=0.1), 0.99)
    alone = context_of(a_trace(asked, predictor="low-rank", params_share=0.1), 0.99)
    policy, rows = policy_named("flash-window"), np.arange(8)
    knobs = {k.name: k.values[0] for k in policy.knobs(context)} | {"window_tokens": 2, "predictor": "low-rank"}
    for ahead in (1, 3):  # three ahead was not measured: the nearest that was stands for it
        block = same_knobs(policy, context, {**knobs, "prefetch_layers": ahead})
        read, expected = (policy.decode(c, block, rows).timed_bytes["link.flash"] for c in (context, alone))
        np.testing.assert_array_equal(read, expected)
        said = policy.report(context, block, rows)
        if ahead == 1:
            assert said["perplexity_ratio"] == pytest.approx(1.2)
        else:
            assert said["perplexity_ratio"] is None and "3 layer(s) ahead was not measured" in said["quality_source"]
    notes = policy.report(context, block, rows)["notes"]
    assert any("finds" in note for note in notes) and any("not measured" in note for note in notes)
    assert policy.footprint(context, block) == policy.footprint(alone, block)
    own = {p.tensors: p.bytes for p in policy.placements(context, block)}["predictor"]
    assert own == pytest.approx(0.1 * context.total_bytes)
    assert lower_bound(context).token_latency_s <= min(
        lower_bound(c).token_latency_s for c in (alone, context_of(a_trace(drawn(0.2)), 0.99)))


def test_a_fitted_predictor_may_be_the_answer_and_an_oracle_may_not(tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    mask = drawn(0.05)
    asked = {("low-rank", ahead): mask | drawn(0.05, 2 + ahead) for ahead in (0, 1)}
    context = context_of(a_trace(mask, asked, params_share=0.01), 0.6)
    question = question_of(context)
    plan = answer(question)
    assert plan.policy.name == "flash-window" and plan.policy.knobs["predictor"] == "low-rank"
    assert any("an oracle's" in why for why in plan.why)
    policy = policy_named("flash-window")
    pairs = {(b.structural["predictor"], b.structural["prefetch_layers"]) for b in blocks(policy, context, {})}
    assert pairs == {("oracle", 0), ("low-rank", 0), ("low-rank", 1)}, "what was not measured is not searched"
    pairs = {(b.structural["predictor"], b.structural["prefetch_layers"])
             for b in blocks(policy, context, {"prefetch_layers": 1})}
    assert pairs == {("oracle", 1), ("low-rank", 1)}, "but may be set"
    without = answer(question_of(context_of(a_trace(mask), 0.6)))
    assert without.policy.name == "stream"
    # Written down, read back and run again, it is the same plan.
    (tmp_path / "p.json").write_text(plan.model_dump_json(by_alias=True))
    monkeypatch.setattr("simmem.planner.replan.ask", lambda *_a, **given: replace(
        question, policy_names=(given["policy"],), fixed=given["knobs"]))
    again, _ = resimulate(read_plan(tmp_path / "p.json"), 64)
    assert again.token_latency_s == pytest.approx(plan.predicted.token_latency_s, rel=1e-12)


def test_the_quality_bound_knows_the_predictors_apart() -> None:
    mask = drawn(0.05)
    context = context_of(a_trace(mask, {("low-rank", ahead): mask for ahead in (0, 1)}))
    plan = answer(question_of(context, {}, max_quality_loss=0.15, policy_names=("flash-window",)))
    assert plan.policy.knobs["prefetch_layers"] == 0, "one layer ahead costs a fifth"
    assert plan.quality.perplexity_ratio == pytest.approx(1.1)
    farther = {"predictor": "low-rank", "prefetch_layers": 2}
    with pytest.raises(InfeasiblePlanError, match="an unknown amount"):  # though one ahead keeps to it
        answer(question_of(context, farther, max_quality_loss=0.3, policy_names=("flash-window",)))


def test_a_predictor_that_the_trace_lacks_is_refused_in_one_line() -> None:
    context = context_of(a_trace(drawn(0.1), {("gate", 0): drawn(0.2)}))
    with pytest.raises(SpecError, match=r"expected one of oracle, gate, none.*capture --predictor"):
        list(blocks(policy_named("flash-window"), context, {"predictor": "low-rank"}))
