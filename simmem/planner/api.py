"""Which policy is best on this device, and why? The search behind `simmem plan`.

Capacity cuts first; one representative token filters each block; survivors are scored on up to
eight stratified tokens; then the event engine runs candidates in ascending analytic order until
the next analytic time is no better than the best events time (a proof, as analytic is a lower
bound) or a limit is reached, which `search_gap` states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmem.errors import InfeasiblePlanError, SpecError
from simmem.planner.bound import agent_bound, lower_bound
from simmem.planner.candidate import Candidate, blocks, capacity_cut, front, score, stratified_rows
from simmem.planner.document import (
    Baseline,
    Evidence,
    Fit,
    Plan,
    PolicyChoice,
    Residency,
    Sensitivity,
    TraceRef,
    WorkloadRef,
)
from simmem.planner.explain import reasons
from simmem.planner.predict import (
    activity_factors,
    alternative,
    energy_j,
    memory_use,
    predict,
    prefill_seconds,
    quality_of,
    token_seconds,
)
from simmem.planner.uncertainty import TRACE_FIGURE, uncertain_figures, weakest_kind
from simmem.policy.base import Policy, policies, policy_named
from simmem.policy.context import MAX_WINDOW, Context, Replayed
from simmem.spec.device import Device, load_device
from simmem.spec.model import Model, load_model
from simmem.spec.precision import PRECISIONS
from simmem.spec.workload import Workload
from simmem.trace import open_trace
from simmem.units import format_quantity, parse_quantity

__all__ = ["Question", "ask", "plan", "search"]

Array = NDArray[np.float64]

OBJECTIVES = ("latency", "throughput", "energy", "memory")
SCORING_ROWS = 8
FINAL_ROWS = 64
SIDE_ROWS = 2
SURVIVORS = 48
"""Candidates of a policy and precision that go from one token to eight."""
EVENT_LIMIT = 8
"""Candidates that the event engine runs before the search stops without a proof."""
PARETO_LIMIT = 6
FRONT_SURVIVORS = 16
SENSITIVITY_CHANGE = 0.1
SIMPLICITY = ("resident", "stream", "flash-window")
"""Among equally fast plans the one with the fewest moving parts is the answer."""


@dataclass(frozen=True)
class Question:
    """What `plan` is asked, with names resolved."""

    device_name: str
    model_name: str
    device: Device
    model: Model
    replayed: Replayed | None
    workload: Workload
    precisions: tuple[str, ...]
    budget_bytes: Mapping[str, float]
    policy_names: tuple[str, ...]
    fixed: Mapping[str, object]
    objective: str = "latency"
    engine: str | None = None
    activity_range: tuple[Replayed, Replayed] | None = None
    defaults: bool = False
    """Knobs that are not named take their default (published configurations)."""

    def context(self, weights: str) -> Context:
        """Everything a policy needs at one precision."""
        return Context(self.device, self.model, self.workload.at(weights), self.replayed, self.budget_bytes,
                       self.activity_range)


def ask(
    device: str,
    model: str,
    *,
    dram: str | float | None = None,
    vram: str | float | None = None,
    prompt: int = 128,
    new_tokens: int = 256,
    batch: int = 1,
    weights: str | None = None,
    kv: str = "fp16",
    trace: str | None = None,
    policy: str | Sequence[str] | None = None,
    knobs: Mapping[str, object] | None = None,
    objective: str = "latency",
    engine: str | None = None,
    defaults: bool = False,
    relative_to: Path | None = None,
) -> Question:
    """Check the arguments of `plan` and resolve every name. Raises SpecError."""
    spec_device = load_device(device, relative_to=relative_to)
    spec_model = load_model(model, relative_to=relative_to)
    if objective not in OBJECTIVES:
        raise SpecError(f"found {objective!r}, expected one of {', '.join(OBJECTIVES)}", key="--objective")
    names = (policy,) if isinstance(policy, str) else tuple(policy or policies())
    for name in names:
        policy_named(name)
    if knobs and policy is None:
        raise SpecError("knobs belong to a policy: name it with --policy", key="--set")
    if weights == "file":
        raise SpecError("found 'file', which needs a model read from a file with its own precisions", key="--weights")
    if weights is not None and weights not in PRECISIONS:
        raise SpecError(f"found {weights!r}, expected one of {', '.join(PRECISIONS)}", key="--weights")
    precisions = (weights,) if weights else tuple(dict.fromkeys((spec_model.native_precision, "int8", "int4")))
    workload = Workload(prompt, new_tokens, batch, precisions[0], kv)
    workload.check(spec_model)
    fixed = dict(knobs or {})
    if engine:
        runs = [e.agent for key, e in spec_device.engine.items()
                if key.split("/")[0] == engine and e.compute_precision == weights]
        if runs and defaults:  # the stack is known to run this precision on one unit
            fixed.setdefault("agent", runs[0])
        spec_device = spec_device.with_engine(engine)
    replayed, activity_range = _replays(trace, spec_model, batch)
    return Question(device, model, spec_device, spec_model, replayed, workload, precisions,
                    _budgets(spec_device, dram, vram), names, fixed, objective, engine, activity_range,
                    defaults)


def _replays(name: str | None, model: Model, batch: int) -> tuple[Replayed | None, tuple[Replayed, Replayed] | None]:
    """The trace, and where its activity is an estimate the trace at the ends of its 90 % range."""
    opened = open_trace(name, model, batch=batch, n_tokens=MAX_WINDOW + FINAL_ROWS)
    if opened is None:
        return None, None
    share = opened.header.active_share_range
    if share is None:
        return Replayed(opened), None
    nominal = float(opened.header.statistics["active_share"]["value"])
    low, high = (open_trace(name, model, batch=batch, n_tokens=MAX_WINDOW + FINAL_ROWS, activity=end / nominal)
                 for end in share)
    assert low is not None and high is not None
    return Replayed(opened), (Replayed(low), Replayed(high))


def _budgets(device: Device, dram: str | float | None, vram: str | float | None) -> dict[str, float]:
    budget = {name: memory.budget_bytes for name, memory in device.memory.items()}
    special = [n for n, m in device.memory.items() if m.kind == "device"]
    for given, tiers, flag in ((dram, [device.host], "--dram"), (vram, special, "--vram")):
        if given is None:
            continue
        if not tiers:
            raise SpecError(f"{device.name} has unified memory and no VRAM of its own; use --dram", key=flag)
        amount = float(given) if isinstance(given, (int, float)) else parse_quantity(given, "bytes", key=flag)
        if not amount >= 1:  # also false for NaN
            raise SpecError(f"found {given!r}, expected at least a byte", key=flag)
        capacity = device.memory[tiers[0]].capacity.value
        if amount > capacity:
            raise SpecError(f"found {given!r}, but {device.name} has {format_quantity(capacity, 'bytes')} of it",
                            key=flag)
        budget[tiers[0]] = amount
    return budget


@dataclass(frozen=True)
class Found:
    """Survivors of one precision, best first, and what was in the way of the others."""

    context: Context
    ranked: tuple[Candidate, ...]
    binding_tier: str | None
    missing_bytes: float
    pruned_s: float = float("inf")
    """What was left out because a bound said so could not be faster than this. [s]"""


def search(question: Question, weights: str) -> Found:
    """Every policy's grid at one precision: capacity cut, filter, scores on stratified tokens."""
    context = question.context(weights)
    ranked: list[Candidate] = []
    nearest: tuple[float, str] | None = None
    floor = {name: agent_bound(context, name, any_token=True).token_latency_s for name in context.device.agent}
    fastest = pruned = float("inf")
    for name in question.policy_names:
        policy = policy_named(name)
        pool: list[Candidate] = []
        for block in blocks(policy, context, question.fixed, defaults=question.defaults):
            # Nothing this agent could do is as fast as what was already found: the whole block is out. Sharing may
            # make what was found slower than the bound, so the proof has to know where the cut was.
            least = floor[str(block.structural["agent"])]
            if question.objective == "latency" and least > fastest:
                pruned = min(pruned, least)
                continue
            cut = capacity_cut(policy, context, block)
            if not cut.fits.any():
                nearest = min(nearest or (cut.missing_bytes, cut.binding_tier), (cut.missing_bytes, cut.binding_tier))
                continue
            kept = np.flatnonzero(cut.fits)
            block, held = block.only(kept), cut.fast_bytes[kept]
            seconds = score(policy, context, block, stratified_rows(context, policy, 1))
            lean = front(seconds, held)
            lean = lean[np.unique(np.linspace(0, len(lean) - 1, min(len(lean), FRONT_SURVIVORS)).astype(np.int64))]
            best = np.argsort(seconds, kind="stable")[:SURVIVORS]
            chosen = list(dict.fromkeys([*best.tolist(), *lean.tolist()]))
            pool += [Candidate(context, policy, block.only(np.array([i])), float(seconds[i]), float(held[i]))
                     for i in chosen]
        scored = _rescore(policy, context, _thin(pool))
        fastest = min([fastest, *(c.score_s for c in scored)])
        ranked += scored
    ranked.sort(key=lambda c: c.score_s)
    return Found(context, tuple(ranked), nearest[1] if nearest else None, nearest[0] if nearest else 0.0, pruned)


def _thin(pool: list[Candidate]) -> list[Candidate]:
    """The fastest candidates, and those on the front of latency and memory."""
    if not pool:
        return pool
    order = np.argsort([c.score_s for c in pool], kind="stable")[:SURVIVORS].tolist()
    lean = front(np.array([c.score_s for c in pool]), np.array([c.fast_bytes for c in pool]))
    lean = lean[np.unique(np.linspace(0, len(lean) - 1, min(len(lean), FRONT_SURVIVORS)).astype(np.int64))]
    return [pool[i] for i in dict.fromkeys([*order, *lean.tolist()])]


def _rescore(policy: Policy, context: Context, pool: list[Candidate]) -> list[Candidate]:
    """Score candidates on up to eight tokens, those of one structure in one block."""
    rows = stratified_rows(context, policy, SCORING_ROWS)
    if len(rows) == 1:
        return pool
    groups: dict[tuple[tuple[str, object], ...], list[Candidate]] = {}
    for candidate in pool:
        groups.setdefault(tuple(candidate.block.structural.items()), []).append(candidate)
    result = []
    for members in groups.values():
        columns = {k: np.concatenate([m.block.columns[k] for m in members]) for k in members[0].block.columns}
        block = replace(members[0].block, columns=columns)
        seconds = score(policy, context, block, rows)
        result += [replace(m, score_s=float(s)) for m, s in zip(members, seconds, strict=True)]
    return result


def _objective_value(candidate: Candidate, objective: str) -> tuple[float, float]:
    """What is minimised, and the tie-break."""
    workload = candidate.context.workload
    if objective == "latency":
        return candidate.score_s, 0.0
    if objective == "memory":
        return candidate.fast_bytes, candidate.score_s
    if objective == "throughput":
        n = workload.new_tokens
        return (prefill_seconds(candidate) + (n - 1) * candidate.score_s) / (workload.batch * n), candidate.score_s
    rows = stratified_rows(candidate.context, candidate.policy, SCORING_ROWS)
    energy = energy_j(candidate.context.device, candidate.policy.decode(candidate.context, candidate.block, rows),
                      candidate.score_s)
    if energy is None:
        raise SpecError(f"{candidate.context.device.name} has no sourced energy figures for every part of the plan",
                        key="--objective")
    return energy, candidate.score_s


def _prove(ranked: Sequence[Candidate], pruned_s: float = float("inf")) -> tuple[Candidate, float]:
    """The fastest by the event engine, and the share by which one it did not run could still be faster.

    ranked : ascending in their analytic score, a lower bound on the scoring tokens.
    pruned_s : a lower bound on everything the search left out. [s]
    """
    seconds, best, unrun_s = float("inf"), ranked[0], float("inf")
    for index, candidate in enumerate(ranked):
        if candidate.score_s >= seconds * (1 - 1e-12):
            break
        if index == EVENT_LIMIT:
            unrun_s = candidate.score_s
            break
        took = _event_seconds(candidate)
        if took < seconds:
            seconds, best = took, candidate
    return _simplest(best, seconds, ranked), max(1.0 - min(unrun_s, pruned_s) / seconds, 0.0)


def _event_seconds(candidate: Candidate) -> float:
    """Mean latency of the scoring tokens by the event engine. [s]"""
    return token_seconds(candidate, stratified_rows(candidate.context, candidate.policy, SCORING_ROWS))


def _simplest(best: Candidate, seconds: float, ranked: Sequence[Candidate]) -> Candidate:
    """The policy that moves least (resident before stream) where it is as fast as the best to a millionth."""
    limit = seconds * (1 + 1e-6)
    for name in SIMPLICITY:
        if name == best.policy.name:
            break
        tie = next((c for c in ranked if c.policy.name == name and c.context is best.context
                    and c.score_s <= limit), None)
        if tie is not None and _event_seconds(tie) <= limit:
            return tie
    return best


def plan(
    device: str,
    model: str,
    *,
    dram: str | float | None = None,
    vram: str | float | None = None,
    prompt: int = 128,
    new_tokens: int = 256,
    batch: int = 1,
    weights: str | None = None,
    kv: str = "fp16",
    trace: str | None = None,
    policy: str | Sequence[str] | None = None,
    knobs: Mapping[str, object] | None = None,
    objective: str = "latency",
    engine: str | None = None,
) -> Plan:
    """The best policy for a model on a device, and what to expect of it.

    Parameters
    ----------
    device, model, trace : built-in names, aliases or paths.
    dram, vram : what the process may hold there, e.g. "6.7GB", or a number of bytes. [B]
    weights : one precision; None searches the native one, int8 and int4.
    policy, knobs : restrict the search to policies, and hold knobs at a value.

    Raises
    ------
    SpecError, TraceError
        The question is wrong.
    InfeasiblePlanError
        Nothing fits; names the binding tier and the missing bytes.
    """
    question = ask(device, model, dram=dram, vram=vram, prompt=prompt, new_tokens=new_tokens, batch=batch,
                   weights=weights, kv=kv, trace=trace, policy=policy, knobs=knobs, objective=objective, engine=engine)
    if engine is not None:
        question.device.check_engine(engine)
    return answer(question)


def answer(question: Question, *, brief: bool = False) -> Plan:
    """Search, prove, predict and explain. `brief` leaves out sensitivities, alternatives and the front."""
    found = [search(question, p) for p in question.precisions]
    if not any(f.ranked for f in found):
        f = min(found, key=lambda f: f.missing_bytes)
        missing = float(math.ceil(f.missing_bytes))  # budgets are whole bytes
        if f.binding_tier is None:
            raise SpecError(f"{' and '.join(question.policy_names)} cannot plan {question.model.name} without a trace "
                            "of its activity; name one with --trace", key="--policy")
        raise InfeasiblePlanError(
            f"nothing fits: {question.model.name} on {question.device.name} needs {missing:.0f} more bytes of "
            f"{f.binding_tier} than the {f.context.budget_bytes[f.binding_tier]:.0f} allowed, in the smallest plan "
            f"found ({f.context.workload.weights})", tier=f.binding_tier, missing_bytes=missing)
    ranked = [c for f in found for c in f.ranked]
    if question.objective == "latency":
        best, gap = _prove(sorted(ranked, key=lambda c: c.score_s), min(f.pruned_s for f in found))
    else:
        best, gap = min(ranked, key=lambda c: _objective_value(c, question.objective)), float("nan")
    context = best.context
    rows = stratified_rows(context, best.policy, FINAL_ROWS)
    few = stratified_rows(context, best.policy, SCORING_ROWS)
    predicted = predict(best, rows, interval_rows=few)
    same = next(f for f in found if f.context is context)
    agent = str(best.block.structural["agent"])
    result = Plan(
        device=question.device_name, model=question.model_name,
        workload=WorkloadRef(**{k: getattr(context.workload, k) for k in WorkloadRef.model_fields}),
        trace=TraceRef(name=context.trace.header.name, kind=context.trace.header.kind,
                       digest=context.trace.header.digest) if context.trace else None,
        feasible=True, policy=PolicyChoice(name=best.policy.name, knobs=best.knobs),
        residency=[Residency(tensors=p.tensors, tier=p.tier, bytes=p.bytes)
                   for p in best.policy.placements(context, best.block)],
        memory=memory_use(best), predicted=predicted, quality=quality_of(best), bound=lower_bound(context),
        baselines=_baselines(question, same, best, predicted.token_latency_s),
        sensitivity=[] if brief else _sensitivities(question, best, stratified_rows(context, best.policy, SIDE_ROWS)),
        alternatives=[] if brief else [alternative(c, _some(c)) for c in (
            _simplest(f.ranked[0], _event_seconds(f.ranked[0]), f.ranked)
            for f in found if f.context is not context and f.ranked)],
        pareto=[] if brief else [alternative(c, _some(c)) for c in _front(ranked)],
        evidence=Evidence(engine="events", weakest_kind=str(weakest_kind(
            context, agent, uses_trace=best.policy.uses_trace)), cost_model="roofline",
            search_gap=None if np.isnan(gap) else gap, extrapolating=False),
        fit=_fit(question, agent), objective=question.objective, engine=question.engine, why=[])
    return result.model_copy(update={"why": reasons(result, question.device, _notes(best, rows))})


def _notes(candidate: Candidate, rows: NDArray[np.int64]) -> list[str]:
    return list(candidate.policy.report(candidate.context, candidate.block, rows)["notes"])


def _some(candidate: Candidate) -> NDArray[np.int64]:
    """Tokens that entries of the front and the alternatives are run on."""
    return stratified_rows(candidate.context, candidate.policy, SIDE_ROWS)


def _baselines(question: Question, same: Found, best: Candidate, latency_s: float) -> list[Baseline]:
    """The best of every other policy at the same precision and budget, and nothing resident at all."""
    found: dict[str, float] = {}
    for candidate in same.ranked:
        name = candidate.policy.name
        if name != best.policy.name and name not in found:
            found[name] = candidate.score_s
    missing = [n for n in policies() if n not in question.policy_names]
    if missing:
        others = search(replace(question, policy_names=tuple(missing), fixed={}, defaults=False),
                        best.context.workload.weights)
        for candidate in others.ranked:
            found.setdefault(candidate.policy.name, candidate.score_s)
    naive = _naive_seconds(question, best.context.workload.weights, str(best.block.structural["agent"]))
    if naive is not None:
        found["stream, nothing resident"] = naive
    return [Baseline(policy=k, token_latency_s=v, speedup=v / latency_s) for k, v in found.items()]


def _naive_seconds(question: Question, weights: str, agent: str) -> float | None:
    """A token when the whole model is read for each of them. [s]"""
    fixed = {"agent": agent, "source_tier": "storage", "resident_ratio": 0.0, "prefetch_layers": 0,
             "reader_threads": 32}
    context = question.context(weights)
    policy = policy_named("stream")
    for block in blocks(policy, context, fixed):
        if capacity_cut(policy, context, block).fits.all():
            return float(score(policy, context, block, np.zeros(1, dtype=np.int64))[0])
    return None


def _fit(question: Question, agent: str) -> Fit:
    native = question.model.native_precision
    context = question.context(native)
    tier = context.memory_of(agent)
    needed = context.total_bytes + context.kv_bytes + context.working_bytes
    budget = context.budget_bytes[tier]
    return Fit(weights=native, tier=tier, needed_bytes=needed, budget_bytes=budget,
               missing_bytes=max(needed - budget, 0.0), stream_token_latency_s=_naive_seconds(question, native, agent))


def _front(ranked: Sequence[Candidate]) -> list[Candidate]:
    """Non-dominated in latency and bytes outside storage, thinned evenly to a readable number."""
    which = front(np.array([c.score_s for c in ranked]), np.array([c.fast_bytes for c in ranked]))
    if len(which) > PARETO_LIMIT:  # evenly in the logarithm of memory, ends included
        held = np.log([ranked[i].fast_bytes for i in which])
        wanted = np.linspace(held[0], held[-1], PARETO_LIMIT)
        which = which[np.unique([int(np.argmin(np.abs(held - w))) for w in wanted])]
    return [ranked[i] for i in which]


def _sensitivities(question: Question, best: Candidate, rows: NDArray[np.int64]) -> list[Sensitivity]:
    """The latency with one figure changed by a tenth: plan held fixed, or replanned for a capacity."""
    base = token_seconds(best, rows)
    found = []
    agent = str(best.block.structural["agent"])
    used = {agent, *(() if best.context.host_agent is None else (best.context.host_agent,))}
    for key in uncertain_figures(best.context):
        part, name = key.split(".")[:2]
        if (part == "agent" and name not in used) or part == "memory" or (part, key[-6:]) == ("agent", "_share"):
            continue  # an achieved share moves the latency exactly as its rate does
        if part == "link" and name not in best.context.path_to(agent):
            continue
        factor = 1.0 + SENSITIVITY_CHANGE
        change = token_seconds(best, rows, {key: factor}) / base - 1.0
        if abs(change) >= 1e-4:
            found.append(Sensitivity(figure=key, change=SENSITIVITY_CHANGE, token_latency_change=change,
                                     replanned=False))
    activity = activity_factors(best, rows)
    if activity is not None:
        trace = best.context.trace
        assert trace is not None and trace.header.active_share_range is not None
        share = trace.header.active_share_range[1] / float(trace.header.statistics["active_share"]["value"])
        found.append(Sensitivity(figure=TRACE_FIGURE, change=share - 1.0, token_latency_change=activity[1] - 1.0,
                                 replanned=False))
    for tier in {best.context.memory_of(agent), best.context.device.host}:
        budget = dict(question.budget_bytes)
        budget[tier] *= 1.0 + SENSITIVITY_CHANGE
        again = search(replace(question, budget_bytes=budget), best.context.workload.weights)
        if again.ranked:
            other, _ = _prove(again.ranked)
            change = token_seconds(other, stratified_rows(other.context, other.policy, len(rows))) / base - 1.0
            found.append(Sensitivity(figure=f"memory.{tier}.budget", change=SENSITIVITY_CHANGE,
                                     token_latency_change=min(change, 0.0), replanned=True))
    return sorted(found, key=lambda s: -abs(s.token_latency_change))
