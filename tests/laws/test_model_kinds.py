"""Do mixtures of experts, windows, state spaces and files' own precisions obey what plain decoders obey?"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from simmem.cost.roofline import durations
from simmem.planner.bound import agent_bound, lower_bound
from simmem.planner.candidate import contention_of, score
from simmem.policy.base import policies
from simmem.policy.context import Context
from simmem.policy.layer_kinds import touched_experts
from simmem.sim.analytic import analytic
from simmem.sim.events import events
from simmem.spec.model import Model
from simmem.spec.workload import Workload
from tests.strategies import MANY, column_of, contexts, other_models, policy_blocks, rich, seeds

DENSE = st.sampled_from(["resident", "stream"])


@MANY
@given(contexts(other=True))
def test_the_layers_and_what_is_around_them_hold_the_whole_model(context: Context) -> None:
    layers, held = context.layers, context.group_bytes
    inside = sum(layers.stored_bytes[kind] for kind in layers.kind)
    around = sum(held.get(name, 0.0) for name in ("embedding", "positions", "head"))
    assert inside + around == pytest.approx(context.total_bytes, rel=1e-12)


@MANY
@given(contexts(other=True), DENSE, st.data())
def test_schedules_move_what_is_not_resident_and_bounds_hold(context: Context, name: str, data: st.DataObject) -> None:
    policy = policies()[name]
    block = data.draw(policy_blocks(policy, context, 3))
    rows = np.zeros(1, np.int64)
    schedule = policy.decode(context, block, rows)
    took = durations(schedule, context.device)
    seconds = analytic(schedule, took).token_s
    bound = lower_bound(rich(context)).token_latency_s  # without the reads that a tight budget forces
    alone = agent_bound(context, str(block.structural["agent"])).token_latency_s
    assert (seconds >= bound * (1 - 1e-9)).all()
    assert (seconds >= alone * (1 - 1e-9)).all()
    asked = policy.report(context, block.only(np.array([0])), rows)["requested_bytes"]
    from_storage = schedule.timed_bytes.get(f"link.{context.device.storage}", np.zeros(3))
    if block.structural.get("prefetch_layers", 0) == 0:
        assert from_storage[0] == pytest.approx(asked, rel=1e-9, abs=1e-6)
    run = events(schedule.column(0), column_of(took, 0), contention_of(context))
    assert run.token_s >= seconds[0] * (1 - 1e-9)


@MANY
@given(contexts(other=True), DENSE, st.data())
def test_the_score_is_finite_and_the_footprint_holds_the_weights(context: Context, name: str,
                                                                 data: st.DataObject) -> None:
    policy = policies()[name]
    block = data.draw(policy_blocks(policy, context, 3))
    assert np.isfinite(score(policy, context, block, np.zeros(1, np.int64))).all()
    placements = policy.placements(context, block.only(np.array([0])))
    placed = sum(p.bytes for p in placements if p.tensors.startswith("weights"))
    assert placed == pytest.approx(context.total_bytes, rel=1e-9)


@given(seeds(), st.integers(1, 64), st.integers(1, 40))
def test_touched_experts_are_counted_as_random_routing_touches_them(rng: np.random.Generator, count: int,
                                                                    n_tokens: int) -> None:
    per_token = int(rng.integers(1, count + 1))
    drawn = np.argsort(rng.random((400, n_tokens, count)), axis=2)[:, :, :per_token]
    distinct = [len(np.unique(batch)) for batch in drawn]
    error = 5 * np.std(distinct) / math.sqrt(len(distinct)) + 12 / len(distinct)  # what 400 draws may never show
    assert touched_experts(count, per_token, n_tokens) == pytest.approx(np.mean(distinct), abs=error)


@given(other_models())
def test_active_parameters_are_all_but_the_experts_left_out(model: Model) -> None:
    x = model.architecture.experts
    if x is None:
        assert model.active_params == model.params
        return
    without = model.model_copy(update={"architecture": model.architecture.model_copy(update={
        "experts": x.model_copy(update={"count": x.per_token})})})
    left_out = (x.count - x.per_token) * model.architecture.n_expert_layers
    router = model.architecture.d_model + (1 if x.router_bias else 0)
    assert model.active_params == without.params + left_out * router


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 80))
def test_windows_are_averaged_over_the_very_steps(prompt: int, new: int, window: int) -> None:
    workload = Workload(prompt, new)
    steps = [min(prompt + i, window) for i in range(1, new)] or [min(workload.mean_decode_context, window)]
    assert workload.mean_decode_window(window) == pytest.approx(np.mean(steps))
    assert workload.mean_decode_window(None) == workload.mean_decode_context
    for limit in (window, None):
        assert workload.mean_prompt_window(limit) == pytest.approx(
            np.mean([min(i, limit or prompt) for i in range(1, prompt + 1)]))


@given(other_models(), st.integers(1, 500), st.integers(1, 500))
def test_the_context_takes_more_the_longer_it_is_and_a_state_does_not(model: Model, short: int, longer: int) -> None:
    a = model.architecture
    assume(a.n_window_layers < a.n_layers)
    less, more = model.kv_bytes("fp16", short), model.kv_bytes("fp16", short + longer)
    assert less == more if a.state_space else less < more
    if a.window and not a.latent_attention:
        held = 2 * a.n_kv_heads * a.d_head * 2
        assert less == held * sum(min(short, a.window) if i < a.n_window_layers else short for i in range(a.n_layers))
