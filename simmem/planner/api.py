"""Which policy is best on this device, and why? What `simmem plan` and `simmem.plan` answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from simmem.errors import InfeasiblePlanError, SpecError
from simmem.planner.batches import TOLERANCE
from simmem.planner.bound import lower_bound
from simmem.planner.candidate import Candidate, blocks, capacity_cut, score, stratified_rows
from simmem.planner.document import (
    Alternative,
    Baseline,
    Evidence,
    Fit,
    Plan,
    PolicyChoice,
    Residency,
    Sensitivity,
    TraceRef,
    WorkloadRef,
    measured_here,
)
from simmem.planner.drafts import at_draft, searches_lengths, tried_in_words
from simmem.planner.explain import rate_digits, rate_words, reasons
from simmem.planner.fitted import fitted_use
from simmem.planner.predict import (
    alternative,
    felt,
    law_factors,
    memory_use,
    placement_gap,
    predict,
    prefill_changed,
    prefill_seconds,
    quality_of,
    token_seconds,
    tokens_per_s,
)
from simmem.planner.question import FINAL_ROWS, Question, ask
from simmem.planner.ranking import (
    SCORING_ROWS,
    Found,
    choose,
    event_seconds,
    is_needless,
    is_oracle,
    objective_value,
    pareto_front,
    search,
)
from simmem.planner.uncertainty import uncertain_figures, weakest_kind
from simmem.policy.base import agents_of, policies, policy_named, why_not_plan
from simmem.policy.context import Context
from simmem.spec.base import weakest
from simmem.units import format_quantity

__all__ = ["answer", "plan"]

SIDE_ROWS = 4
"""Trace tokens that sensitivities, alternatives and the front are run on."""
SENSITIVITY_CHANGE = 0.1


def plan(
    device: str,
    model: str,
    *,
    dram: str | float | None = None,
    vram: str | float | None = None,
    prompt: int = 128,
    new_tokens: int = 256,
    batch: int | None = None,
    weights: str | Mapping[str, str] | None = None,
    kv: str = "fp16",
    trace: str | None = None,
    policy: str | Sequence[str] | None = None,
    knobs: Mapping[str, object] | None = None,
    objective: str = "latency",
    engine: str | None = None,
    max_quality_loss: float | None = None,
    draft: str | None = None,
    acceptance: float | None = None,
) -> Plan:
    """The best policy for a model on a device, and what to expect of it.

    Parameters
    ----------
    device, model, trace : built-in names, aliases or paths.
    dram, vram : what the process may hold there, e.g. "6.7GB", or a number of bytes. [B]
    batch : sequences decoded together; one when None, or where throughput is the objective the fewest within
        `batches.TOLERANCE` of the most tokens a second.
    weights : one precision, or one for each of some tensor groups; None searches the native one, int8 and int4.
    policy, knobs : restrict the search to policies, and hold knobs at a value.
    max_quality_loss : leave out plans that raise perplexity by more than this share, or by what nobody measured.
    draft, acceptance : a small model that proposes tokens for each step to verify, and the share of them that is
        accepted; the knob `draft_length` says how many, and is searched where it is not named.

    Raises
    ------
    SpecError, TraceError
        The question is wrong.
    InfeasiblePlanError
        Nothing fits; names the binding tier and the missing bytes.
    """
    def at(sequences: int, length: int | None) -> Question:
        return ask(device, model, dram=dram, vram=vram, prompt=prompt, new_tokens=new_tokens, batch=sequences,
                   weights=weights, kv=kv, trace=trace, policy=policy, knobs=knobs, objective=objective,
                   engine=engine, max_quality_loss=max_quality_loss, draft=draft, acceptance=acceptance,
                   draft_length=length)

    question = at_draft(at, batch, objective, searched=searches_lengths(draft, knobs))
    if engine is not None:
        question.device.check_engine(engine)
    return answer(question)


def answer(question: Question, *, brief: bool = False, compared: bool = True) -> Plan:
    """Search, prove, predict and explain.

    brief : leave out sensitivities, alternatives and the front.
    compared : with the best of policies that were not asked for; else baselines are those of the ones that were.
    """
    found = [search(question, p) for p in question.precisions]
    if not any(f.ranked for f in found):
        lossy = [c for f in found for c in f.too_lossy]
        if lossy:
            raise InfeasiblePlanError(
                "nothing that fits is known to keep perplexity within "
                f"{format_quantity(question.max_quality_loss or 0.0, 'ratio')} of the dense "
                f"model's: {_loss(_best_of(question, lossy), question)}")
        f = min(found, key=lambda f: f.missing_bytes)
        missing = float(math.ceil(f.missing_bytes))  # budgets are whole bytes
        if f.binding_tier is None:
            for name in question.policy_names:
                why = why_not_plan(policy_named(name), f.context)
                if why is not None:
                    raise SpecError(f"{name} cannot plan this: {why}", key="--policy")
            raise SpecError(f"{' and '.join(question.policy_names)} cannot plan {question.model.name} with these "
                            "knobs alone: no combination of the others is searched; name more of them", key="--set")
        raise InfeasiblePlanError(
            f"nothing fits: {question.model.name} on {question.device.name} needs {missing:.0f} more bytes of "
            f"{f.binding_tier} than the {f.context.budget_bytes[f.binding_tier]:.0f} allowed, in the smallest plan "
            f"found ({f.context.workload.label}; tried: "
            f"{f.context.workload.label if f.context.workload.mixed else ', '.join(question.precisions)})",
            tier=f.binding_tier, missing_bytes=missing)
    ranked = [c for f in found for c in f.ranked]
    best, gap = choose(ranked, question.objective, min(f.pruned_s for f in found))
    context = best.context
    rows = stratified_rows(context, best.policy, FINAL_ROWS)
    few = stratified_rows(context, best.policy, SCORING_ROWS)
    predicted = predict(best, rows, interval_rows=few)
    fitted, report = fitted_use(best, few), best.policy.report(context, best.block, rows)
    same = next(f for f in found if f.context is context)
    agent = str(best.block.structural["agent"])
    recommended = Alternative(weights=context.workload.weights, policy=best.policy.name, knobs=best.knobs,
                              predicted=predicted, memory=memory_use(best), quality=quality_of(best))
    result = Plan(
        device=question.device_name, model=question.model_name,
        workload=WorkloadRef(**{k: getattr(context.workload, k) for k in WorkloadRef.model_fields
                                if k not in ("mixed", "draft")},
                             mixed=dict(context.workload.mixed), draft=question.draft_name),
        trace=_trace(context),
        feasible=True, policy=PolicyChoice(name=best.policy.name, knobs=best.knobs),
        residency=[Residency(tensors=p.tensors, tier=p.tier, bytes=p.bytes)
                   for p in best.policy.placements(context, best.block)],
        memory=recommended.memory, predicted=predicted, quality=recommended.quality, bound=lower_bound(context),
        baselines=_baselines(question, same, best, predicted.token_latency_s, compared=compared),
        sensitivity=[] if brief else _sensitivities(question, best, stratified_rows(context, best.policy, SIDE_ROWS)),
        alternatives=[] if brief else [alternative(c, _some(c)) for c in (
            choose(f.ranked, question.objective, n_rows=SIDE_ROWS)[0]
            for f in found if f.context is not context and f.ranked)],
        pareto=[] if brief else [
            alternative(c, _some(c)) if c.block is not best.block else recommended for c in pareto_front(ranked)],
        evidence=Evidence(
            engine="events", weakest_kind=str(weakest([weakest_kind(context, name, uses_trace=best.policy.uses_trace)
                                                       for name in agents_of(best.policy, context, best.block)])),
            cost_model=fitted.cost_model, search_gap=gap, extrapolating=fitted.extrapolating,
            placement_gap=placement_gap(best, predicted, report, question.objective),
            measured=measured_here(question.device)),
        fit=_fit(question, agent), objective=question.objective, engine=question.engine, why=[])
    notes = [*fitted.notes, *_batches(question), *tried_in_words(question), *report["notes"], *_shares(result, report),
             *_curve(best), *_set_aside(question, same, best), *_too_lossy(question, found, best)]
    return result.model_copy(update={"why": reasons(result, question.device, notes)})


def _batches(question: Question) -> list[str]:
    """What other numbers of sequences would bring, where the number was searched."""
    if not question.batches_tried:
        return []
    said = ", ".join(f"{batch}: {rate_digits(rate)}" for batch, rate in question.batches_tried)
    asked, (most, best) = question.workload.batch, max(question.batches_tried, key=lambda one: one[1])
    if len(question.batches_tried) == 1:
        return []
    why = (f"{asked} sequences at once bring the most tokens a second of the numbers tried" if asked == most else
           f"{asked} sequences at once are the fewest within {format_quantity(TOLERANCE, 'ratio', 2)} of the most "
           f"tokens a second of the numbers tried ({rate_words(best)} with {most})")
    # Lengths of drafts are tried after the batch was found without any.
    alone = ", nothing drafted" if question.workload.draft_length and question.drafts_tried else ""
    return [why, f"tokens a second by sequences at once{alone}: {said}"]


def _shares(plan: Plan, report: Mapping[str, object]) -> list[str]:
    """How far shares on the tiers are from the best, where a policy knows a bound for them."""
    gap = plan.evidence.placement_gap
    if gap is None or not report.get("least_s"):
        return []
    return [f"with these GPU batches no other shares on the tiers are more than {gap:.1%} faster: the predicted time, "
            "against what a linear programme says that no shares beat"]


def _trace(context: Context) -> TraceRef | None:
    """The trace that was planned with, of neurons or of the routing."""
    replayed = context.replayed or context.routing
    if replayed is None:
        return None
    header = replayed.trace.header
    return TraceRef(name=header.name, kind=header.kind, digest=header.digest)


def _curve(candidate: Candidate) -> list[str]:
    """What leaving out less or more would cost, where the trace that is planned with says so."""
    trace = candidate.context.trace
    quality = trace.header.quality if trace and candidate.policy.uses_trace else None
    report = candidate.policy.report(candidate.context, candidate.block, np.zeros(1, dtype=np.int64))
    if quality is None or len(quality.levels) < 2 or report["perplexity_ratio"] in (None, 1.0):
        return []
    points = [f"{format_quantity(sparsity, 'ratio', 2)} × {ratio:.{3 if ratio < 10 else 0}f}"
              for sparsity, ratio in quality.curve]
    return [f"perplexity by share of the units left out, as measured with the trace: {', '.join(points)}"]


def _some(candidate: Candidate) -> NDArray[np.int64]:
    """Tokens that entries of the front and the alternatives are run on."""
    return stratified_rows(candidate.context, candidate.policy, SIDE_ROWS)


def _best_of(question: Question, candidates: Sequence[Candidate]) -> Candidate:
    """The most productive where tokens a second are the objective, else the fastest, by the analytic engine."""
    return min(candidates, key=lambda c: _seconds(question, c))


def _seconds(question: Question, candidate: Candidate) -> float:
    """A step, or for throughput the time of the whole answer for each token of it. [s]"""
    value = objective_value(candidate, "throughput") if question.objective == "throughput" else None
    return candidate.score_s if value is None else value[0]


def _would(question: Question, candidate: Candidate) -> str:
    """What a plan that is not the answer would do, in the words of the objective."""
    seconds = _seconds(question, candidate)
    if question.objective == "throughput":
        return f"would bring {rate_words(1.0 / seconds)}"
    return f"would take {format_quantity(seconds, 's')}"


def _set_aside(question: Question, same: Found, best: Candidate) -> list[str]:
    """What would be faster if work were dropped, and why it is not the answer."""
    if not same.set_aside:
        return []
    fastest = _best_of(question, same.set_aside)
    if _seconds(question, fastest) >= _seconds(question, best):
        return []
    ratio = quality_of(fastest).perplexity_ratio
    cost = "what that costs in quality was not measured" if ratio is None else f"that costs perplexity × {ratio:.3f}"
    why = ("its trace is an oracle's, which no engine can follow" if is_oracle(fastest) else
           f"it leaves neurons out although all weights fit, and {cost}")
    return [f"{fastest.policy.name} {_would(question, fastest)}, but {why}; "
            f"--policy {fastest.policy.name} asks for it"]


def _loss(candidate: Candidate, question: Question) -> str:
    """What is known of the quality that a candidate costs."""
    quality, weights = quality_of(candidate), candidate.context.workload.label
    cost = (f"perplexity × {quality.perplexity_ratio:.3f}" if quality.perplexity_ratio is not None
            else "an unknown amount of quality")
    most = "most productive" if question.objective == "throughput" else "fastest"
    return f"{candidate.policy.name} at {weights}, the {most} of the others, costs {cost}"


def _too_lossy(question: Question, found: Sequence[Found], best: Candidate) -> list[str]:
    """What would be faster if more quality could be lost."""
    faster = [c for f in found for c in f.too_lossy if _seconds(question, c) < _seconds(question, best)]
    if not faster:
        return []
    fastest = _best_of(question, faster)
    return [f"{_loss(fastest, question)} and {_would(question, fastest)}: more than was allowed or measured"]


def _baselines(question: Question, same: Found, best: Candidate, latency_s: float, *, compared: bool
               ) -> list[Baseline]:
    """The best of every other policy (or of those that were asked for) at the same precision and budget, and
    nothing resident at all.

    What drops work where it need not, or could not be followed, stands for its policy only where nothing else does.
    """
    others, fits = [*same.ranked, *same.set_aside], same.fits
    missing = [n for n in policies() if n not in question.policy_names]
    if missing and compared:
        more = search(replace(question, policy_names=tuple(missing), fixed={}, defaults=False),
                      best.context.workload.weights)
        others, fits = [*others, *more.ranked, *more.set_aside], fits or more.fits

    def aside(c: Candidate) -> bool:
        alike = best.policy.uses_trace and (is_oracle(best) or not is_oracle(c))
        return is_needless(c, fits=fits) and not alike

    found: dict[str, tuple[Candidate, float]] = {}
    for name in policies():
        mine = [c for c in others if c.policy.name == name]
        if mine and name != best.policy.name:
            rivals = [c for c in mine if not aside(c)] or mine
            # By the energy of a plan nothing can be compared where figures are missing, by its bytes no speed.
            objective = question.objective if question.objective == "throughput" else "latency"
            fastest, _ = choose(rivals, objective, n_rows=SIDE_ROWS)
            found[name + (", by an oracle" if is_oracle(fastest) else "")] = (
                fastest, event_seconds(fastest, SCORING_ROWS))
    naive = _naive(question, best.context.workload.weights, str(best.block.structural["agent"]))
    if naive is not None:
        found["stream, nothing resident"] = naive, naive.score_s
    return [Baseline(policy=name, token_latency_s=seconds, speedup=seconds / latency_s, set_aside=aside(c),
                     tokens_per_s=tokens_per_s(c.context.workload, prefill_seconds(c), seconds))
            for name, (c, seconds) in found.items()]


def _naive(question: Question, weights: str, agent: str) -> Candidate | None:
    """The plan that reads the whole model for each token, nothing resident and nothing drafted; None where nothing is
    left for it."""
    fixed = {"agent": agent, "source_tier": "storage", "resident_ratio": 0.0, "prefetch_layers": 0,
             "reader_threads": 32}
    context = replace(question, workload=replace(question.workload, draft=None)).context(weights)
    if agent not in context.able_agents:
        return None
    policy = policy_named("stream")
    for block in blocks(policy, context, fixed):
        if capacity_cut(policy, context, block).fits.all():
            return Candidate(context, policy, block, float(score(policy, context, block, np.zeros(1, np.int64))[0]))
    return None


def _fit(question: Question, agent: str) -> Fit:
    native = question.precisions[0]  # the one that was asked for, else the model's own
    context = question.context(native)
    tier = context.memory_of(agent)
    needed = context.total_bytes + context.kv_bytes + context.working_bytes
    if context.drafting is not None:
        needed += context.drafting.total_bytes + context.drafting.kv_bytes
    budget, naive = context.budget_bytes[tier], _naive(question, native, agent)
    return Fit(weights=native, tier=tier, needed_bytes=needed, budget_bytes=budget,
               missing_bytes=max(needed - budget, 0.0),
               stream_token_latency_s=None if naive is None else naive.score_s)


def _used_links(best: Candidate, rows: NDArray[np.int64]) -> list[str]:
    """Links that a step of a plan moves anything over."""
    moved = best.policy.decode(best.context, best.block, rows).timed_bytes
    return [name for name in best.context.device.link if moved.get(f"link.{name}", np.zeros(1)).any()]


def _sensitivities(question: Question, best: Candidate, rows: NDArray[np.int64]) -> list[Sensitivity]:
    """The latency with one figure changed by a tenth: plan held fixed, or replanned for a capacity.

    Where tokens a second are the objective, their change too, prompt included, and sorted by it.
    """
    context, agent = best.context, str(best.block.structural["agent"])
    schedule = best.policy.decode(context, best.block, rows)
    base, found, keys = token_seconds(best, rows, schedule=schedule), [], []
    by_rate = question.objective == "throughput"
    first = prefill_seconds(best)
    base_rate = tokens_per_s(context.workload, first, base)

    def changed(figure: str, change: float, token_s: float, first_s: float, *, replanned: bool = False) -> Sensitivity:
        rate = tokens_per_s(context.workload, first_s, token_s) / base_rate - 1.0 if by_rate else None
        return Sensitivity(figure=figure, change=change, token_latency_change=token_s / base - 1.0,
                           replanned=replanned, tokens_per_s_change=rate)

    used = {*agents_of(best.policy, context, best.block), context.host_agent}
    links = {*context.path_to(agent), *_used_links(best, rows)}
    for key in uncertain_figures(context):
        part, name = key.split(".")[:2]
        if (part == "agent" and name not in used) or part == "memory" or (part, key[-6:]) == ("agent", "_share"):
            continue  # an achieved share moves the latency exactly as its rate does
        if part != "link" or name in links:
            keys.append(key)
    factor = 1.0 + SENSITIVITY_CHANGE
    steps = {key: token_seconds(best, rows, {key: factor}, schedule) for key in felt(best, schedule, keys, factor)}
    prompts = prefill_changed(best, keys, factor) if by_rate else {}
    for key in keys:
        one = changed(key, SENSITIVITY_CHANGE, steps.get(key, base), prompts.get(key, first))
        if max(abs(one.token_latency_change), abs(one.tokens_per_s_change or 0.0)) >= 1e-4:
            found.append(one)
    draft = context.workload.draft
    if draft is not None and draft.length and draft.acceptance:
        more = replace(draft, acceptance=min(draft.acceptance * factor, 1.0))
        found.append(changed("acceptance", more.acceptance / draft.acceptance - 1.0,
                             base * draft.tokens_per_step / more.tokens_per_step, first))
    for name, (_, at_high) in law_factors(best).items():
        replayed = best.context.replayed
        assert replayed is not None
        found.append(changed(f"trace.{name}", replayed.ends[name][2] - 1.0, at_high * base, first))
    for tier in dict.fromkeys((best.context.memory_of(agent), best.context.device.host)):
        budget = dict(question.budget_bytes)
        budget[tier] *= 1.0 + SENSITIVITY_CHANGE
        again = search(replace(question, budget_bytes=budget), best.context.workload.weights)
        if again.ranked:
            other, _ = choose(again.ranked, question.objective, n_rows=len(rows))
            took = token_seconds(other, stratified_rows(other.context, other.policy, len(rows)))
            its_first = prefill_seconds(other) if by_rate else first
            # The plan at hand still fits a larger budget, so a replanned one that is no better is not taken.
            if not _is_better(question.objective, (other, took, its_first), (best, base, first)):
                took, its_first = base, first
            found.append(changed(f"memory.{tier}.budget", SENSITIVITY_CHANGE, took, its_first, replanned=True))
    return sorted(found, key=lambda s: (
        -abs(s.token_latency_change if s.tokens_per_s_change is None else s.tokens_per_s_change), s.figure))


def _is_better(objective: str, other: tuple[Candidate, float, float], held: tuple[Candidate, float, float]) -> bool:
    """Whether one plan beats another by what is optimised, each with its step and its prompt. [s]"""
    if objective == "latency":
        return other[1] < held[1]
    if objective == "throughput":
        workload = held[0].context.workload
        return tokens_per_s(workload, other[2], other[1]) > tokens_per_s(workload, held[2], held[1])
    values = [objective_value(candidate, objective) for candidate, _, _ in (other, held)]
    return values[0] is not None and values[1] is not None and values[0] < values[1]
