"""What holds for a draft model beside every policy, whichever devices, models and knobs?"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmem.cost.roofline import durations
from simmem.planner.bound import lower_bound
from simmem.planner.candidate import contention_of
from simmem.policy.base import Block, Policy, policies
from simmem.policy.check import check_policy
from simmem.policy.context import Context
from simmem.policy.drafting import Drafted, drafted
from simmem.schedule import OpKind
from simmem.sim.analytic import analytic
from simmem.sim.events import events
from simmem.spec.model import Model
from simmem.spec.workload import Draft
from tests.laws.running import assert_bounded
from tests.strategies import MANY, Array, column_of, contexts, models, plans, rows_of

Case = tuple[Context, Policy, Block]
LENGTHS = st.integers(1, 8)
SHARES = st.sampled_from([0.0, 0.3, 0.8, 1.0])


def with_draft(context: Context, draft: Draft) -> Context:
    return replace(context, workload=replace(context.workload, draft=draft))


def token_s(case: Case) -> Array:
    """Seconds a token by the analytic engine, (candidates × rows,). [s]"""
    context, policy, block = case
    schedule = policy.decode(context, block, rows_of(context, policy))
    return analytic(schedule, durations(schedule, context.device)).token_s / context.workload.tokens_per_step


@MANY
@given(plans(), models(), SHARES)
def test_a_draft_of_no_tokens_is_no_draft(case: Case, model: Model, acceptance: float) -> None:
    context, policy, block = case
    nothing = with_draft(context, Draft(model, 0, acceptance))
    assert drafted(policy, nothing) is policy
    assert (token_s((nothing, policy, block)) == token_s(case)).all()
    for tier, used in policy.footprint(context, block).items():
        assert (policy.footprint(nothing, block)[tier] == used).all()
    assert lower_bound(nothing) == lower_bound(context)


@MANY
@given(plans(), models(), LENGTHS, SHARES)
def test_no_step_with_a_draft_is_faster_than_the_bound(case: Case, model: Model, length: int, acceptance: float
                                                       ) -> None:
    context, block = with_draft(case[0], Draft(model, length, acceptance)), case[2]
    policy = drafted(case[1], context)
    took = token_s((context, policy, block)).reshape(block.n_candidates, -1)
    assert_bounded(context, policy, block, took)


@MANY
@given(plans(), models(), LENGTHS)
def test_a_draft_that_is_never_accepted_never_helps(case: Case, model: Model, length: int) -> None:
    context, policy, block = case
    if block.structural.get("cpu_experts"):  # where experts are computed is decided by an estimate, which may change
        block = Block({**block.structural, "cpu_experts": False}, block.columns)
    rejected = with_draft(context, Draft(model, length, 0.0))
    alone = token_s((context, policy, block))
    assert (token_s((rejected, drafted(policy, rejected), block)) >= alone * (1 - 1e-9)).all()


@MANY
@given(plans(n=2), models(), LENGTHS)
def test_both_engines_say_the_same_of_a_draft(case: Case, model: Model, length: int) -> None:
    context, block = with_draft(case[0], Draft(model, length, 0.5)), case[2]
    policy = drafted(case[1], context)
    for schedule in (policy.decode(context, block, rows_of(context, policy)[:2]), policy.prefill(context, block)):
        took = durations(schedule, context.device)
        found = analytic(schedule, took)
        drafts = [k for k, what in enumerate(schedule.classes) if what.kind is OpKind.DRAFT]
        for i in range(schedule.n_candidates):
            alone = events(schedule.column(i), column_of(took, i))
            assert alone.token_s == pytest.approx(found.token_s[i], rel=1e-12, abs=0)
            shared = events(schedule.column(i), column_of(took, i), contention_of(context))
            assert shared.token_s >= found.token_s[i] * (1 - 1e-12)
            # One agent has the draft in every step: so a step cannot be shorter.
            assert found.token_s[i] >= took.occupancy_s[drafts, i].sum() * (1 - 1e-12)


@given(contexts(), models(), LENGTHS, st.sampled_from(sorted(policies())), st.integers(0, 99))
def test_policies_keep_the_contract_beside_a_draft(context: Context, model: Model, length: int, name: str, seed: int
                                                   ) -> None:
    check_policy(Drafted(policies()[name]), with_draft(context, Draft(model, length, 0.5)), seed=seed)
