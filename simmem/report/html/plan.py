"""What does the page of a plan know? The plan, what it rests on, a decode step of it, and its neighbours."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from simmem import __version__
from simmem.planner.candidate import Candidate, stratified_rows
from simmem.planner.document import Plan
from simmem.planner.explain import LIMITS
from simmem.planner.predict import timelines
from simmem.planner.whatif import Point, WhatIf, what_if
from simmem.policy.base import agents_of
from simmem.report.html.page import page
from simmem.report.html.reading import check_plan
from simmem.report.html.steps import Steps
from simmem.report.plan import caveat, quality_words, step_words, weights_words
from simmem.spec.device import load_device
from simmem.units import format_quantity

__all__ = ["plan_page"]


def plan_page(plan: Plan, path: Path) -> str:
    """One page about a plan that was read from `path`; its timeline and what-ifs are simulated here and now.

    Raises SpecError where the plan, or a file that it names, is wrong; TraceError where its trace is another one now.
    """
    check_plan(plan, load_device(plan.device), file=str(path))
    candidate, neighbours = what_if(plan, file=str(path))
    context, steps = candidate.context, Steps()
    device, model = context.device, context.model
    step = timelines(candidate, stratified_rows(context, candidate.policy, 1))[0]
    replayed = context.replayed or context.routing
    title = f"{plan.model} on {device.title}"
    headline = (f"{plan.policy.name}, {weights_words(plan)}: "
                f"{format_quantity(plan.predicted.token_latency_s, 's')} a {step_words(plan)}")
    data: dict[str, Any] = {
        "about": "plan", "simmem": __version__, "title": title, "file": path.name,
        "plan": plan.model_dump(mode="json", by_alias=True, exclude={"emit"}),
        "words": {"caveat": caveat(plan, device), "weights": weights_words(plan), "step": step_words(plan),
                  "quality": quality_words(plan), "parts": LIMITS},
        "device": {"name": device.name, "title": device.title, "storage": device.storage, "notes": list(device.notes),
                   "capacity_bytes": {name: m.capacity.value for name, m in device.memory.items()},
                   "figures": _figures(candidate)},
        "model": {"title": model.title, "source": model.source},
        "trace": None if replayed is None else replayed.trace.header.model_dump(mode="json", include={
            "name", "kind", "criterion", "threshold", "text", "predictor", "weakest_kind", "digest"}),
        "uses_trace": candidate.policy.uses_trace,
        "step": steps.whole(step), "what_if": _neighbours(neighbours, steps),
        "streams": steps.streams, "kinds": steps.kinds,
    }
    return page(title, data, ("charts.js", "plan.js"), f"{headline}. The rest of this page needs JavaScript.")


def _figures(candidate: Candidate) -> list[dict[str, Any]]:
    """Every figure of the device; `used` are those of the units that compute, their memories, and of all links."""
    context = candidate.context
    agents = agents_of(candidate.policy, context, candidate.block)
    used = {*(f"agent.{name}" for name in agents), *(f"memory.{context.memory_of(name)}" for name in agents),
            *(f"link.{name}" for agent in agents for name in context.path_to(agent))}
    return [{"key": key, "value": f.value, "dimension": f.dimension, "kind": f.kind.value, "source": f.source,
             "range": [f.value * factor for factor in f.factors], "used": ".".join(key.split(".")[:2]) in used}
            for key, f in context.device.figures().items()]


def _neighbours(found: WhatIf, steps: Steps) -> dict[str, Any]:
    return {
        "replans": found.replans, "tokens": found.tokens, "link": found.link, "factors": found.factors,
        "knob": found.knob, "knob_help": found.knob_help, "knob_dimension": found.knob_dimension,
        "values": found.values, "base_s": found.base_s,
        "budgets": [{
            "tier": b.tier, "budget_bytes": b.budget_bytes, "policy": b.policy, "knobs": b.knobs,
            "used_bytes": b.used_bytes, "bytes_per_token": b.bytes_per_token, "notes": b.notes,
            "aside": None if b.aside is None else asdict(b.aside),
            "points": [[_point(p, steps) for p in row] for row in b.points],
        } for b in found.budgets]}


def _point(point: Point | None, steps: Steps) -> dict[str, Any] | None:
    return None if point is None else {
        "token_latency_s": point.token_latency_s, "first_token_s": point.first_token_s,
        "tokens_per_s": point.tokens_per_s, "breakdown_s": {k: v for k, v in point.breakdown_s.items() if v > 0},
        "step": steps.close_up(point.step)}
