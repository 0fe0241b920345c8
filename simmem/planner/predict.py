"""What is to be expected of one candidate? Event runs over trace tokens, an interval, a bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from simmem.cost.roofline import durations
from simmem.planner.candidate import Candidate, contention_of
from simmem.planner.document import (
    Alternative,
    CacheUse,
    MemoryUse,
    Percentiles,
    Predicted,
    QualityCost,
)
from simmem.planner.uncertainty import TRACE_STREAM, curve_factors, draws, spread
from simmem.policy.base import Block, Policy
from simmem.policy.context import Context
from simmem.schedule import Durations, Schedule
from simmem.sim.analytic import analytic, dedicated
from simmem.sim.events import events
from simmem.sim.timeline import BREAKDOWN, Timeline, critical_path
from simmem.spec.device import Device
from simmem.spec.workload import Workload

__all__ = [
    "alternative",
    "column_of",
    "energy_j",
    "felt",
    "interval_factors",
    "law_factors",
    "load_seconds",
    "memory_use",
    "placement_gap",
    "predict",
    "prefill_changed",
    "prefill_seconds",
    "prompt_seconds",
    "quality_of",
    "timelines",
    "token_seconds",
    "tokens_per_s",
]

Array = NDArray[np.float64]
Seconds = TypeVar("Seconds", float, Array)

ROUNDING = 1e-6
"""A share that a bound may be above what it bounds."""
NOT_FELT = 5e-5
"""Analytic changes of a latency below this are not worth an event run."""


def timelines(candidate: Candidate, rows: NDArray[np.int64], factors: dict[str, float | Array] | None = None,
              schedule: Schedule | None = None) -> list[Timeline]:
    """Timelines of a decode step at each of the table rows; `schedule` is that step's, where it is at hand.

    The event engine runs where ops that overlap ask for more than there is; elsewhere the recurrence says the same.
    """
    context = candidate.context
    schedule = schedule or candidate.policy.decode(context, candidate.block, rows)
    took = durations(schedule, context.device, factors)
    contention = contention_of(context, factors)
    return [events(alone.schedule, column_of(took, i), contention, alone)
            for i, alone in enumerate(dedicated(schedule, took))]


def token_seconds(candidate: Candidate, rows: NDArray[np.int64], changes: dict[str, float] | None = None,
                  schedule: Schedule | None = None) -> float:
    """Mean token latency by the event engine, with some figures changed by a factor. [s]"""
    factors: dict[str, float | Array] = {}
    for key, factor in (changes or {}).items():
        factors.update(curve_factors(key, factor))
    return float(np.mean([t.token_s for t in timelines(candidate, rows, factors, schedule)])
                 / candidate.context.workload.tokens_per_step)


def felt(candidate: Candidate, schedule: Schedule, keys: Sequence[str], factor: float) -> list[str]:
    """Those of some figures whose change by a factor moves the analytic latency at all, all tried at once."""
    n, rows = len(keys), schedule.n_candidates
    device = candidate.context.device
    each = schedule.repeated(n)  # figures fastest
    took = durations(each, device, _one_changed(keys, factor, rows))
    seconds = analytic(each, took).token_s.reshape(rows, n).mean(axis=0)
    base = float(analytic(schedule, durations(schedule, device)).token_s.mean())
    return [key for key, changed in zip(keys, seconds, strict=True) if abs(changed / base - 1.0) >= NOT_FELT]


def _one_changed(keys: Sequence[str], factor: float, rows: int) -> dict[str, float | Array]:
    """Factors for columns rows × figures, figures fastest, in which column k of a row has figure k changed."""
    n = len(keys)
    factors: dict[str, float | Array] = {}
    for column, key in enumerate(keys):
        for part, value in curve_factors(key, factor).items():
            changed = np.array(factors.get(part, np.ones(n * rows)))
            changed[column::n] *= value
            factors[part] = changed
    return factors


def interval_factors(candidate: Candidate, rows: NDArray[np.int64]) -> tuple[float, float]:
    """5 % and 95 % quantiles of (analytic draw / analytic nominal), over draws of every figure.

    The interval holds the nominal: figures that can only be worse than stated may push all draws to one side of it.
    """
    context = candidate.context
    nominal = candidate.policy.decode(context, candidate.block, rows)
    base = _analytic_seconds(candidate, nominal)
    drawn = draws(context)
    if not drawn:
        return 1.0, 1.0
    n, factors = len(next(iter(drawn.values()))), dict(drawn)
    seconds = []
    for row in range(nominal.n_candidates):  # one after the other: all rows × draws together would be copied and spill
        schedule = nominal.column(row).repeated(n)
        seconds.append(analytic(schedule, durations(schedule, context.device, factors)).token_s)
    ratio = np.mean(seconds, axis=0) / base
    for index, (low_factor, high_factor) in enumerate(law_factors(candidate).values()):
        ratio = ratio * spread(TRACE_STREAM + index, low_factor, high_factor, n)
    low, high = np.quantile(ratio, [0.05, 0.95])
    return min(float(low), 1.0), max(float(high), 1.0)


def law_factors(candidate: Candidate) -> dict[str, tuple[float, float]]:
    """Latency with each figure of a synthetic trace's law at the ends of its range over the nominal one.

    The plan is held fixed. Empty for a captured trace, and where the policy does not look at the trace.
    """
    context, replayed = candidate.context, candidate.context.replayed
    if replayed is None or not candidate.policy.uses_trace:
        return {}
    key = ("law", candidate.policy.name, *candidate.knobs.items())
    if key in context.memo:
        known: dict[str, tuple[float, float]] = context.memo[key]
        return known
    found: dict[str, tuple[float, float]] = {}
    base: dict[int, float] = {}  # by how many tokens there are of the other laws
    for name, (_, low, _, high) in replayed.ends.items():
        rows = np.arange(len(low.timed))
        schedules = [candidate.policy.decode(context.with_trace(end), candidate.block, rows) for end in (low, high)]
        if len(rows) not in base:
            base[len(rows)] = _analytic_seconds(candidate, candidate.policy.decode(context, candidate.block, rows))
        at = [_analytic_seconds(candidate, schedule) / base[len(rows)] for schedule in schedules]
        found[name] = (at[0], at[1])
    context.memo[key] = found
    return found


def _analytic_seconds(candidate: Candidate, schedule: Schedule) -> float:
    """Mean over the columns, which are tokens. [s]"""
    return float(analytic(schedule, durations(schedule, candidate.context.device)).token_s.mean())


def prefill_seconds(candidate: Candidate) -> float:
    """Time to the first token with the planned residency loaded. [s]"""
    context, key = candidate.context, ("prefill", candidate.policy.name, *candidate.knobs.items())
    if key not in context.memo:
        context.memo[key] = float(prompt_seconds(candidate.policy, context, candidate.block)[0])
    known: float = context.memo[key]
    return known


def prompt_seconds(policy: Policy, context: Context, block: Block) -> Array:
    """The same of every candidate of a block, (n_candidates,). [s]"""
    schedule = policy.prefill(context, block)
    return analytic(schedule, durations(schedule, context.device)).makespan_s


def prefill_changed(candidate: Candidate, keys: Sequence[str], factor: float) -> dict[str, float]:
    """The same with one figure at a time changed by a factor, figure → time. [s]"""
    if not keys:
        return {}
    schedule = candidate.policy.prefill(candidate.context, candidate.block).repeated(len(keys))
    took = durations(schedule, candidate.context.device, _one_changed(keys, factor, 1))
    return dict(zip(keys, analytic(schedule, took).makespan_s.tolist(), strict=True))


def tokens_per_s(workload: Workload, first_token_s: Seconds, token_latency_s: Seconds) -> Seconds:
    """Tokens a second of the whole answer, prompt included: batch·N / (first + (N − 1)·latency), of one plan or of
    each of several. [token/s]"""
    n = workload.new_tokens
    return workload.batch * n / (first_token_s + (n - 1) * token_latency_s)


def load_seconds(candidate: Candidate) -> float:
    """Time to read what stays resident from storage, once. [s]"""
    context = candidate.context
    total = 0.0
    for placement in candidate.policy.placements(context, candidate.block):
        if placement.loaded and placement.tier != context.device.storage:
            links = context.device.path(context.device.storage, placement.tier)
            total += placement.bytes / min(context.device.link[n].rate.value for n in links)
    return total


def predict(candidate: Candidate, rows: NDArray[np.int64], *, interval_rows: NDArray[np.int64] | None = None
            ) -> Predicted:
    """Everything `predicted` of simmem.plan/1 for one candidate.

    Parameters
    ----------
    rows : table rows (trace tokens) to run through the event engine.
    interval_rows : fewer rows for the draws; `rows` when None.
    """
    context, workload = candidate.context, candidate.context.workload
    runs, per = timelines(candidate, rows), workload.tokens_per_step  # what a step moves and takes is for so many
    seconds = np.array([t.token_s for t in runs]) / per
    mean = float(seconds.mean())
    low, high = interval_factors(candidate, rows if interval_rows is None else interval_rows)
    paths = [critical_path(t) for t in runs]
    first = prefill_seconds(candidate)
    report = candidate.policy.report(context, candidate.block, rows)
    moved = [t.schedule.timed_bytes for t in runs]
    links = {name: float(np.mean([m.get(f"link.{name}", np.zeros(1))[0] for m in moved])) / per
             for name in context.device.link}
    requests = {name: float(np.mean([_requests(t, name) for t in runs])) / per for name in context.device.link}
    p50, p95, p99 = (float(q) for q in np.quantile(seconds, [0.5, 0.95, 0.99]))
    return Predicted(
        token_latency_s=mean,
        token_latency_interval_s=(mean * low, mean * high),
        token_latency_percentiles_s=Percentiles(p50=p50, p95=p95, p99=p99),
        first_token_s=first,
        load_s=load_seconds(candidate),
        tokens_per_s=tokens_per_s(workload, first, mean),
        decode_tokens_per_s=workload.batch / mean,
        breakdown_s={k: float(np.mean([p[k] for p in paths])) / per for k in BREAKDOWN},
        busy_s={k: float(np.mean([t.busy_s[k] for t in runs])) / per for k in runs[0].busy_s},
        bytes_per_token=links,
        requests_per_token=requests,
        requested_bytes_per_token=report["requested_bytes"] / per,
        bytes_written_per_token=sum((n for name, n in links.items()
                                     if context.device.link[name].target == context.device.storage), 0.0),
        cache={k: CacheUse(hit_ratio=v["hit_ratio"], bytes_per_token=v["bytes_per_token"] / per)
               for k, v in report["cache"].items()},
        active_share=report["active_share"],
        energy_j_per_token=_mean_energy([energy_j(context.device, t.schedule, mean * per) for t in runs],
                                        workload.batch * per),
    )


def placement_gap(candidate: Candidate, predicted: Predicted, report: Mapping[str, Any], objective: str
                  ) -> float | None:
    """Share by which another placement of the same kind could at most be faster; None where the policy knows no bound.

    Either its own share (`gap`), or how far the predicted time is above the least that it knows (`least_s`): of the
    whole answer where throughput is the objective, else of a step.
    """
    least = report.get("least_s")
    if not least:
        return report.get("gap")
    n = candidate.context.workload.new_tokens
    took = {"total": predicted.first_token_s + (n - 1) * predicted.token_latency_s, "step": predicted.token_latency_s}
    what = "step" if objective != "throughput" and "step" in least else "total"
    gap = 1.0 - float(least[what]) / took[what]
    # A bound above the plan's own time is none: laws hold them below it, but for rounding.
    return max(gap, 0.0) if gap > -ROUNDING else None


def _requests(run: Timeline, link: str) -> float:
    s = run.schedule
    uses = np.bincount(s.op_class[s.timed], minlength=len(s.classes))
    return float(sum(uses[k] * s.requests[k, 0] for k, c in enumerate(s.classes) if c.link == link))


def _mean_energy(steps_j: list[float | None], batch: float) -> float | None:
    known = [j for j in steps_j if j is not None]
    return float(np.mean(known)) / batch if len(known) == len(steps_j) else None


def energy_j(device: Device, schedule: Schedule, step_s: float) -> float | None:
    """Σ bytes·J/byte + Σ flop·J/flop + idle power·time of the timed step; None where a figure has no source. [J]

    schedule : its columns are tokens, which are averaged.
    """
    if device.idle is None:
        return None
    total = device.idle.value * step_s
    for resource, amount in schedule.timed_bytes.items():
        what, name = resource.split(".", 1)
        if what == "bus":
            continue  # its links say what a byte over them takes
        figure = (device.link[name] if what == "link" else device.memory[name]).energy_per_byte
        if amount.any():
            if figure is None:
                return None
            total += float(amount.mean()) * figure.value
    uses = np.bincount(schedule.op_class[schedule.timed], minlength=len(schedule.classes))
    for k, c in enumerate(schedule.classes):
        flop = float(uses[k] * schedule.flop[k].mean())
        if flop > 0:
            per_flop = device.agent[str(c.agent)].energy_per_flop
            if per_flop is None:
                return None
            total += flop * per_flop.value
    return total


def quality_of(candidate: Candidate) -> QualityCost:
    """What the plan's dropped work costs; null where that was not measured (quantisation never is here)."""
    rows = np.zeros(1, dtype=np.int64)
    report = candidate.policy.report(candidate.context, candidate.block, rows)
    native = candidate.context.model.own_precision
    workload = candidate.context.workload
    for what, precision in (*(("weights", p) for p in workload.precisions), ("keys and values", workload.kv)):
        if precision not in (native, "fp32", "fp16", "bf16"):
            return QualityCost(perplexity_ratio=None, source=f"the cost of {precision} {what} was not measured")
    return QualityCost(perplexity_ratio=report["perplexity_ratio"], source=report["quality_source"])


def memory_use(candidate: Candidate) -> dict[str, MemoryUse]:
    """Used and allowed bytes of every tier. [B]"""
    budget = candidate.context.budget_bytes
    return {k: MemoryUse(used_bytes=v, budget_bytes=budget[k]) for k, v in candidate.used_bytes().items()}


def alternative(candidate: Candidate, rows: NDArray[np.int64]) -> Alternative:
    """A candidate as an entry of `alternatives` or `pareto`."""
    return Alternative(
        weights=candidate.context.workload.weights, policy=candidate.policy.name, knobs=candidate.knobs,
        predicted=predict(candidate, rows, interval_rows=rows[:1]),
        memory=memory_use(candidate), quality=quality_of(candidate))


def column_of(took: Durations, index: int) -> Durations:
    """The durations of one candidate."""
    which = slice(index, index + 1)
    return Durations(took.occupancy_s[:, which], took.latency_s[:, which])

