"""A plan that was written down: read it back, rebuild its candidate, run it through the event engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from simmem.cost.roofline import durations
from simmem.errors import SimmemError, SpecError, TraceError
from simmem.planner.candidate import Candidate, blocks, contention_of, stratified_rows
from simmem.planner.document import MeasuredHere, Percentiles, Plan, measured_here
from simmem.planner.predict import column_of
from simmem.planner.question import FINAL_ROWS, Question, ask
from simmem.policy.base import policy_named
from simmem.policy.context import Replayed
from simmem.policy.drafting import drafted
from simmem.sim.events import events
from simmem.sim.timeline import BREAKDOWN, Timeline, critical_path, occupancy
from simmem.spec.base import validate

__all__ = ["Simulation", "candidate_of", "question_of", "read_plan", "resimulate"]

MAX_PLAN_BYTES = 16 << 20


class Simulation(BaseModel):
    """`simulate --json`: what the event engine says of a plan, beside what the plan says."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["simmem.simulation/1"] = Field(default="simmem.simulation/1", alias="schema")
    device: str
    model: str
    policy: str
    tokens: int
    engine: str
    planned_token_latency_s: float
    token_latency_s: float
    token_latency_percentiles_s: Percentiles
    breakdown_s: dict[str, float]
    busy_s: dict[str, float]
    bytes_per_token: dict[str, float]
    peak_bytes: dict[str, float]
    background: dict[str, float]
    measured: MeasuredHere | None = None
    """Which figures of the device were measured on it."""


def read_plan(path: Path) -> Plan:
    """A plan document from a file of at most 16 MiB. Raises SpecError."""
    try:
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise SpecError(f"is larger than a plan can be ({MAX_PLAN_BYTES} bytes)", file=str(path))
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror or error}", file=str(path)) from None
    except (ValueError, RecursionError) as error:
        raise SpecError(f"is not a JSON document: {error}", file=str(path)) from None
    if not isinstance(data, dict) or data.get("schema") != "simmem.plan/1":
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise SpecError(f"found {found!r}, expected the schema 'simmem.plan/1'", file=str(path), key="schema")
    return validate(Plan, data, file=str(path))


def question_of(plan: Plan, *, held: bool = True, policy: str | None = None, opened: Replayed | None = None
                ) -> Question:
    """What a plan answers, at its precision, trace and budgets. Raises SpecError.

    held : with its policy and knobs; else over every policy, or all knobs of `policy`.
    opened : its trace, where that was opened already.
    """
    w = plan.workload
    question = ask(plan.device, plan.model, prompt=w.prompt_tokens, new_tokens=w.new_tokens, batch=w.batch,
                   weights=w.mixed or w.weights, kv=w.kv, trace=plan.trace.name if plan.trace else None,
                   policy=plan.policy.name if held else policy, knobs=plan.policy.knobs if held else None,
                   objective=plan.objective, engine=plan.engine, draft=w.draft, acceptance=w.acceptance,
                   draft_length=w.draft_length if w.draft or w.draft_length else None, opened=opened)
    budget = {**question.budget_bytes, **{k: v.budget_bytes for k, v in plan.memory.items()
                                          if k in question.budget_bytes}}
    return replace(question, budget_bytes=budget)


def candidate_of(plan: Plan, *, file: str | None = None) -> Candidate:
    """The candidate a plan describes, with its budgets; the trace must still be the one it names."""
    context = question_of(plan).context(plan.workload.weights)
    replayed = context.replayed or context.routing
    if plan.trace and replayed and replayed.trace.header.digest != plan.trace.digest:
        raise TraceError(f"the trace {plan.trace.name} is not the one this plan was made from (its digest differs)",
                         file=file, key="trace.digest")
    policy = drafted(policy_named(plan.policy.name), context)
    found = list(blocks(policy, context, plan.policy.knobs))
    if len(found) != 1 or found[0].n_candidates != 1:
        raise SpecError("does not name every knob of its policy", file=file, key="policy.knobs")
    return Candidate(context, policy, found[0])


def resimulate(plan: Plan, tokens: int, background: Mapping[str, float] | None = None, *, file: str | None = None
               ) -> tuple[Simulation, list[Timeline]]:
    """Event runs of a plan over `tokens` stratified trace tokens.

    background : resource ("memory.dram", "link.flash") → share other programs take, in [0, 1).
    """
    try:
        candidate = candidate_of(plan, file=file)
    except SimmemError as error:  # a name or knob in the plan is wrong, so its file is
        error.file = error.file or file
        raise
    context = candidate.context
    contention = contention_of(context)
    for resource, share in (background or {}).items():
        if resource not in contention.capacity_bytes_per_s:
            raise SpecError(f"no resource {resource!r}; this device has "
                            f"{', '.join(contention.capacity_bytes_per_s)}", key="--background")
        if not 0 <= share < 1:
            raise SpecError(f"found {share!r}, expected a share in [0, 1)", key="--background")
    contention = replace(contention, background=dict(background or {}))
    rows = stratified_rows(context, candidate.policy, min(tokens, FINAL_ROWS))
    schedule = candidate.policy.decode(context, candidate.block, rows)
    took = durations(schedule, context.device)
    runs = [events(schedule.column(i), column_of(took, i), contention) for i in range(schedule.n_candidates)]
    per = context.workload.tokens_per_step
    seconds = np.array([r.token_s for r in runs]) / per
    paths = [critical_path(r) for r in runs]
    p50, p95, p99 = (float(q) for q in np.quantile(seconds, [0.5, 0.95, 0.99]))
    peaks: dict[str, float] = {}
    for run in runs:
        for tier, (_, held) in occupancy(run).items():
            peaks[tier] = max(peaks.get(tier, 0.0), float(held.max()))
    moved = [r.schedule.timed_bytes for r in runs]
    result = Simulation(
        device=plan.device, model=plan.model, policy=plan.policy.name, tokens=len(rows),
        engine=max((r.engine for r in runs), key=len), planned_token_latency_s=plan.predicted.token_latency_s,
        token_latency_s=float(seconds.mean()), token_latency_percentiles_s=Percentiles(p50=p50, p95=p95, p99=p99),
        breakdown_s={k: float(np.mean([p[k] for p in paths])) / per for k in BREAKDOWN},
        busy_s={k: float(np.mean([r.busy_s[k] for r in runs])) / per for k in runs[0].busy_s},
        bytes_per_token={n: float(np.mean([m[f"link.{n}"][0] for m in moved])) / per for n in context.device.link
                         if f"link.{n}" in moved[0]},
        peak_bytes=peaks, background=dict(background or {}), measured=measured_here(context.device))
    return result, runs
