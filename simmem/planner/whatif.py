"""What if there were more memory, a faster link, or another knob? Every point is planned or simulated, none is guessed.

A memory budget is planned anew, among every policy at the plan's precision. The other two hold what was planned at that
budget: one link's whole curve is scaled, one knob of its policy is set. Bandwidths and knobs of a budget are columns of
one schedule, so all combinations of the three are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simmem.cost.roofline import durations
from simmem.errors import SimmemError
from simmem.planner.candidate import Candidate, capacity_cut, stratified_rows
from simmem.planner.document import Plan
from simmem.planner.predict import felt, memory_use, timelines, tokens_per_s
from simmem.planner.question import FINAL_ROWS, Question
from simmem.planner.ranking import SCORING_ROWS, choose, event_seconds, is_oracle, search
from simmem.planner.replan import candidate_of, question_of
from simmem.planner.uncertainty import curve_factors
from simmem.policy.base import Block, Setting
from simmem.sim.analytic import analytic
from simmem.sim.timeline import BREAKDOWN, Timeline, critical_path
from simmem.units import format_quantity

__all__ = ["Aside", "Budget", "Point", "WhatIf", "what_if"]

Array = NDArray[np.float64]

BUDGETS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Shares of a tier's budget that are planned for."""
BUDGETS_OF_TWO = (0.5, 0.75, 1.0, 1.5, 2.0)
"""The same where there are two tiers."""
FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""What a link's bandwidth is multiplied with, its latency divided by."""
KNOB_VALUES = 6
SHARED_BUDGETS, SHARED_FACTORS, SHARED_ROWS, SHARED_KNOB_VALUES = (0.5, 1.0, 2.0), (0.5, 1.0, 2.0), 4, 2
"""Fewer, where ops share bandwidth and each column is an event run of its own: a hundred times the work."""
SAME = 1e-3
"""Latencies that differ by less read the same in three digits."""


@dataclass(frozen=True)
class Point:
    """A decode step at one budget, with one value of the knob and one factor on the link; means over trace tokens."""

    token_latency_s: float
    first_token_s: float
    tokens_per_s: float
    breakdown_s: dict[str, float]
    """Critical path, summing to the latency. [s]"""
    step: Timeline
    """Of the token that takes the median time."""


@dataclass(frozen=True)
class Aside:
    """A faster plan that is not the answer, as it leaves neurons out where all weights fit."""

    policy: str
    token_latency_s: float
    """With every link as it is, over as many tokens as a point. [s]"""


@dataclass(frozen=True)
class Budget:
    """What is planned within some budgets. [B]"""

    tier: str
    """The one that differs from the plan's; empty for the plan itself."""
    budget_bytes: dict[str, float]
    policy: str | None
    """None where nothing fits, or where the planner says no."""
    knobs: dict[str, Setting]
    used_bytes: dict[str, float]
    bytes_per_token: tuple[dict[str, float], ...]
    """Link → bytes, by value of the knob. [B]"""
    points: tuple[tuple[Point | None, ...], ...]
    """By value of the knob and by factor; None where a value does not fit, or is none of this policy."""
    notes: tuple[str, ...]
    aside: Aside | None
    """None where nothing that drops work is faster."""


@dataclass(frozen=True)
class WhatIf:
    """The plan (the first budget) and its neighbours."""

    budgets: tuple[Budget, ...]
    replans: str
    """What is planned anew, in words."""
    tokens: int
    """Trace tokens that a point is run on, at most."""
    link: str | None
    """The one that is scaled; None where no plan here feels any."""
    factors: tuple[float, ...]
    knob: str | None
    knob_help: str
    knob_dimension: str
    """What its values count; empty for plain numbers."""
    values: tuple[float | None, ...]
    """Of the knob; the first, None, is what was planned for each budget."""
    base_s: float
    """The plan's own latency as it is predicted here and now, over as many tokens as the plan's. [s]"""


def what_if(plan: Plan, *, file: str | None = None) -> tuple[Candidate, WhatIf]:
    """The candidate of a plan that was read back, and its neighbours. Raises SpecError and TraceError."""
    try:
        base = candidate_of(plan, file=file)
    except SimmemError as error:  # a name or knob in the plan is wrong, so its file is
        error.file = error.file or file
        raise
    question, replans, own = _to_replan(plan, base)
    steps = timelines(base, stratified_rows(base.context, base.policy, SCORING_ROWS))
    shared = any(step.engine != "analytic" for step in steps)
    limit = SHARED_ROWS if shared else SCORING_ROWS
    chosen = [("", dict(base.context.budget_bytes), replace(own, candidate=base)), *(
        (tier, budget, _planned(question, budget, plan.workload.weights))
        for tier, budget in _budgets(base, shared))]
    candidates = [choice.candidate for _, _, choice in chosen if choice.candidate is not None]
    link = _link(candidates, limit)
    knob = next((k for k in base.policy.knobs(base.context) if k.kind == "demand" and _is_number(k.values[0])), None)
    values: tuple[float | None, ...] = (None,) if knob is None else (None, *_thinned(
        [float(v) for v in knob.values if isinstance(v, (int, float))], SHARED_KNOB_VALUES if shared else KNOB_VALUES))
    factors = (1.0,) if link is None else SHARED_FACTORS if shared else FACTORS
    knob_name = None if knob is None else knob.name
    budgets = [_answered(tier, budget, choice, base, knob_name, values, link, factors, limit)
               for tier, budget, choice in chosen]
    return base, WhatIf(
        budgets=tuple(budgets), replans=replans, tokens=limit, link=link, factors=factors,
        knob=knob_name, knob_help=knob.help if knob else "",
        knob_dimension=knob.dimension if knob else "", values=values,
        base_s=event_seconds(base, FINAL_ROWS))


# --- which plans -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """What the planner says to a budget: a plan, or why there is none, and what would be faster but is no answer."""

    candidate: Candidate | None
    notes: tuple[str, ...] = ()
    aside: Candidate | None = None


def _to_replan(plan: Plan, base: Candidate) -> tuple[Question, str, _Choice]:
    """The question that planning anew answers: over every policy, unless the plan is not the answer to that one.

    A plan does not say whether a policy was named when it was made, or knobs held; so what is found at its own budget
    tells, and is the third that is returned.
    """
    opened = base.context.replayed or base.context.routing
    every = question_of(plan, held=False, opened=opened)
    own = _planned(every, base.context.budget_bytes, plan.workload.weights)
    if _is_answer(base, own.candidate):
        return every, "among every policy", own
    alone = question_of(plan, held=False, policy=plan.policy.name, opened=opened)
    own = _planned(alone, base.context.budget_bytes, plan.workload.weights)
    if _is_answer(base, own.candidate):
        return alone, f"with {plan.policy.name} alone, as this plan was not the best of every policy", own
    return alone, (f"with {plan.policy.name} alone and all of its knobs free, whereas this plan holds some: at its own "
                   "budget another choice of them would be taken"), own


def _is_answer(base: Candidate, found: Candidate | None) -> bool:
    if found is None or found.policy.name != base.policy.name:
        return False
    if found.knobs == base.knobs:
        return True
    return abs(event_seconds(found, SCORING_ROWS) / event_seconds(base, SCORING_ROWS) - 1.0) < SAME


def _budgets(base: Candidate, shared: bool) -> list[tuple[str, dict[str, float]]]:
    """Other budgets of the memory that is computed out of, and of the one that storage is read into."""
    context = base.context
    tiers = dict.fromkeys((context.memory_of(str(base.block.structural["agent"])), context.device.host))
    shares = SHARED_BUDGETS if shared else BUDGETS if len(tiers) == 1 else BUDGETS_OF_TWO
    return [(tier, {**context.budget_bytes, tier: float(math.floor(context.budget_bytes[tier] * share))})
            for tier in tiers for share in shares if share != 1.0]


def _planned(question: Question, budget: Mapping[str, float], weights: str) -> _Choice:
    """The planner's choice within a budget; else why there is none."""
    found = search(replace(question, budget_bytes=dict(budget)), weights)
    if not found.ranked:
        if found.binding_tier is None:
            return _Choice(None, ("no policy can plan this",))
        missing = format_quantity(math.ceil(found.missing_bytes), "bytes")
        return _Choice(None, (f"nothing fits: {missing} more of {found.binding_tier} would be needed",))
    best, _ = choose(found.ranked, question.objective, found.pruned_s)
    # An oracle's plan is no answer at any budget; one that drops work is none from the budget on that holds everything.
    real = [c for c in found.set_aside if not is_oracle(c)]
    if found.fits and real and real[0].score_s < best.score_s:
        return _Choice(best, aside=real[0])
    return _Choice(best)


def _link(candidates: Sequence[Candidate], limit: int) -> str | None:
    """The link over which most bytes move in any of the plans, of those whose bandwidth is felt."""
    most: dict[str, float] = {}
    for c in candidates:
        schedule = c.policy.decode(c.context, c.block, stratified_rows(c.context, c.policy, limit))
        moved = {name: float(schedule.timed_bytes.get(f"link.{name}", np.zeros(1)).mean())
                 for name in c.context.device.link}
        keys = [f"link.{name}.throughput" for name, amount in moved.items() if amount > 0]
        for key in felt(c, schedule, keys, 2.0) if keys else []:
            name = key.split(".")[1]
            most[name] = max(most.get(name, 0.0), moved[name])
    return max(most, key=lambda name: most[name]) if most else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _thinned(values: Sequence[float], most: int) -> list[float]:
    """At most so many of some values, both ends among them, evenly spaced in their order."""
    ordered = sorted(set(values))
    which = np.unique(np.linspace(0, len(ordered) - 1, min(most, len(ordered))).round().astype(np.int64))
    return [ordered[i] for i in which]


# --- how fast ---------------------------------------------------------------------------------------------------------


def _answered(tier: str, budget: dict[str, float], choice: _Choice, base: Candidate, knob: str | None,
              values: Sequence[float | None], link: str | None, factors: Sequence[float], limit: int) -> Budget:
    """Run every value of the knob and every factor within one budget."""
    candidate = choice.candidate
    if candidate is None:
        return Budget(tier, budget, None, {}, {}, (), (), choice.notes, None)
    context, policy = candidate.context, candidate.policy
    tried = [0] if policy.name != base.policy.name else list(range(len(values)))
    block = _with_values(candidate.block, knob, [values[i] for i in tried])
    fits = np.flatnonzero(capacity_cut(policy, context, block).fits)
    fits = np.union1d([0], fits)  # the plan itself is what it says, also where a tier's budget was rounded
    several = replace(candidate, block=block.only(fits))
    rows = stratified_rows(context, policy, limit)
    schedule, prompt = policy.decode(context, several.block, rows), policy.prefill(context, several.block)
    per, n = context.workload.tokens_per_step, len(rows)
    columns: list[list[Point]] = [[] for _ in fits]
    for factor in factors:
        changed = {} if link is None or factor == 1.0 else curve_factors(f"link.{link}.throughput", factor)
        steps = timelines(several, rows, changed, schedule)
        first = analytic(prompt, durations(prompt, context.device, changed)).makespan_s
        for place, (column, begin) in enumerate(zip(columns, first.tolist(), strict=True)):
            mine = steps[place * n:(place + 1) * n]
            took = float(np.mean([t.token_s for t in mine])) / per
            paths = [critical_path(t) for t in mine]
            column.append(Point(
                token_latency_s=took, first_token_s=begin, tokens_per_s=tokens_per_s(context.workload, begin, took),
                breakdown_s={k: float(np.mean([p[k] for p in paths])) / per for k in BREAKDOWN},
                step=sorted(mine, key=lambda t: t.token_s)[len(mine) // 2]))
    moved = {name: schedule.timed_bytes.get(f"link.{name}", np.zeros(schedule.n_candidates)).reshape(-1, n).mean(axis=1)
             for name in context.device.link}
    at = {int(i): n for n, i in enumerate(fits)}
    return Budget(
        tier, budget, policy.name, candidate.knobs, {k: v.used_bytes for k, v in memory_use(candidate).items()},
        tuple({name: float(amount[at[i]]) / per for name, amount in moved.items()} if i in at else {}
              for i in range(len(values))),
        tuple(tuple(columns[at[i]]) if i in at else (None,) * len(factors) for i in range(len(values))), choice.notes,
        None if choice.aside is None else Aside(choice.aside.policy.name, event_seconds(choice.aside, limit)))


def _with_values(block: Block, knob: str | None, values: Sequence[float | None]) -> Block:
    """The candidate once for each value of a knob, None being its own."""
    columns = {name: np.repeat(column, len(values), axis=0) for name, column in block.columns.items()}
    if knob is not None and len(values) > 1:
        own = block.columns[knob][0]
        columns[knob] = np.array([own if v is None else v for v in values], dtype=block.columns[knob].dtype)
    return Block(block.structural, columns)
