"""What does one decode step of a plan do when, and what else could be had for more or less memory?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simmem.planner.candidate import Candidate, blocks, stratified_rows
from simmem.planner.document import Alternative, Plan
from simmem.planner.predict import timelines
from simmem.planner.question import Question
from simmem.planner.replan import candidate_of
from simmem.policy.base import policy_named
from simmem.policy.drafting import drafted
from simmem.report.closeup import begin_s, close_up, worked
from simmem.report.plan import step_words, trace_words, weights_words
from simmem.report.plots.style import (
    GREY,
    INK,
    MARKERS,
    PALETTE,
    heading,
    label_lines,
    legend_below,
    log_ticks,
    panel,
    picture,
    plain,
    show_units,
)
from simmem.schedule import OpKind
from simmem.sim.timeline import Timeline
from simmem.spec.device import Device, load_device
from simmem.units import format_quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["evidence_in_words", "pareto_front", "plan_in_words", "plot_plan", "timeline"]

_COLOURS = {
    OpKind.IO: PALETTE[0], OpKind.TRANSFER: PALETTE[5], OpKind.MEMORY: PALETTE[4], OpKind.COMPUTE: PALETTE[2],
    OpKind.PREDICTOR: PALETTE[3], OpKind.SYNC: PALETTE[6], OpKind.DRAFT: PALETTE[1],
}
_WORDS = {
    OpKind.IO: "reading from storage", OpKind.TRANSFER: "copying over the host link",
    OpKind.MEMORY: "cache upkeep", OpKind.COMPUTE: "computing", OpKind.PREDICTOR: "predicting neurons",
    OpKind.SYNC: "fixed costs of a step", OpKind.DRAFT: "drafting tokens",
}
_DARK = (OpKind.IO, OpKind.COMPUTE, OpKind.SYNC)
"""Bars that white letters are read on."""


def plot_plan(path: Path, plan: Plan, question: Question) -> None:
    """Write the timeline of one decode step of `plan`, the answer to `question`, and its front to `path`.

    Raises what `picture` raises.
    """
    timeline = _steady_step(plan, question)
    w, p = plan.workload, plan.predicted
    with picture(path) as figure:
        heading(figure, f"{plain(question.model.name)} on {plain(question.device.name)}: {plan.policy.name}, "
                        f"{weights_words(plan)}, {format_quantity(p.token_latency_s, 's')} a {step_words(plan)}",
                f"{plain(question.device.title, 50, prose=True)} · {w.prompt_tokens} prompt tokens, {w.new_tokens} "
                f"new, batch {w.batch} · {evidence_in_words(plan)}")
        n_streams = len(_busy(timeline))
        grid = figure.add_gridspec(3, 1, height_ratios=(0.5 + 0.34 * n_streams, 0.5 + 0.34 * n_streams, 3.2))
        whole, close, front = (figure.add_subplot(grid[row]) for row in range(3))
        _gantt(whole, timeline, 0.0, timeline.token_s, named=False)
        whole.set_title("When: one decode step in steady state"
                        + (", median token of the trace" if policy_named(plan.policy.name).uses_trace else ""))
        _legend_of_kinds(whole, timeline)
        close.set_title(f"Close-up: {_close_up(close, timeline)}")
        _front(figure, front, plan, question.device)
        front.set_title("Instead: latency, with its 90 % interval, against memory; at the right, baselines at "
                        f"{w.label}")


def timeline(plan: Plan, *, ax: Axes | None = None, close_up: bool = False) -> Axes:
    """What one decode step of a plan does when, a row for each in-order stream.

    close_up : three layers from the middle, every op by its name, instead of the whole step.
    """
    candidate = candidate_of(plan)
    line = timelines(candidate, stratified_rows(candidate.context, candidate.policy, 1))[0]
    what = "three layers of a decode step" if close_up else "one decode step"
    with panel(ax, f"What happens when in {what}", f"{plan_in_words(plan)} · {evidence_in_words(plan)}",
               height_in=1.6 + 0.5 * len(_busy(line))) as axes:
        if close_up:
            _close_up(axes, line)
        else:
            _gantt(axes, line, 0.0, line.token_s, named=False)
        _legend_of_kinds(axes, line)
    return axes


def pareto_front(plan: Plan, *, ax: Axes | None = None) -> Axes:
    """Latency with its 90 % interval against memory: this plan, what less memory would do, other precisions, baselines.

    Every entry but the baselines is of the same question; heights at the right are the baselines' and the bound's.
    """
    with panel(ax, "Latency against memory: this plan, less memory, other precisions",
               f"{plan_in_words(plan)} · whiskers: 90 % intervals · {evidence_in_words(plan)}", height_in=5.6) as axes:
        figure = axes.get_figure(root=True)
        assert figure is not None
        _front(figure, axes, plan, load_device(plan.device), columns=3)
    return axes


def evidence_in_words(plan: Plan) -> str:
    """The trace and the weakest figure that a plan rests on, as a subtitle says it."""
    kind = plan.evidence.weakest_kind
    said = "rests on ESTIMATED figures" if kind == "estimated" else f"weakest figure: {kind}"
    return f"{plain(trace_words(plan))} · {said}"


def plan_in_words(plan: Plan) -> str:
    """Model, device, policy and precision, as a title says them."""
    return f"{plain(plan.model, 24)} on {plain(plan.device, 24)}, {plan.policy.name} at {plan.workload.label}"


# --- the timeline --------------------------------------------------------------------------------------------------


def _steady_step(plan: Plan, question: Question) -> Timeline:
    """The event engine's run of the plan on the median token of its trace."""
    context = question.context(plan.workload.weights)
    policy = drafted(policy_named(plan.policy.name), context)
    (block,) = blocks(policy, context, plan.policy.knobs)  # a plan names every knob
    return timelines(Candidate(context, policy, block), stratified_rows(context, policy, 1))[0]


def _busy(timeline: Timeline) -> dict[str, float]:
    """Share of the step that each stream is held for; streams without work are left out."""
    return {name: seconds / timeline.token_s for name, seconds in timeline.busy_s.items() if seconds > 0}


def _gantt(axes: Axes, timeline: Timeline, low_s: float, high_s: float, *, named: bool) -> None:
    """Bars of every op between two times after the start of the step; `named` writes on them what they are.

    Steps repeat: what was read for this step before it began stands, paler, where the next step's reads begin.
    """
    s, begin = timeline.schedule, begin_s(timeline)
    busy = _busy(timeline)
    rows = {s.streams.index(name): row for row, name in enumerate(busy)}
    for op in np.flatnonzero(worked(timeline)):
        what, row = s.classes[int(s.op_class[op])], rows[int(s.op_stream[op])]
        start, free = timeline.start_s[op] - begin, timeline.free_s[op] - begin
        for left, right, alpha in ((max(start, 0.0), free, 1.0),
                                   (start + timeline.token_s, min(free, 0.0) + timeline.token_s, 0.45)):
            left, right = max(left, low_s), min(right, high_s)
            if left >= right:
                continue
            # a line around what is thinner than a pixel keeps it in sight; a white one tells neighbours apart
            apart = named and right - left > 0.005 * (high_s - low_s)
            axes.broken_barh([(left, right - left)], (row - 0.38, 0.76), facecolor=_COLOURS[what.kind], alpha=alpha,
                             edgecolor="white" if apart else _COLOURS[what.kind], linewidth=0.8 if apart else 0.5)
            name = plain(what.name.split(".")[0], 16)
            if named and (right - left) / (high_s - low_s) > 0.011 * len(name):
                axes.text((left + right) / 2, row, name, ha="center", va="center", fontsize=8.5,
                          color="white" if what.kind in _DARK else INK)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_yticks(range(len(rows)), [plain(name.removeprefix("link."), 18) + (
        "" if named else f"  {format_quantity(share, 'ratio', 2)} busy") for name, share in busy.items()])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(low_s, high_s)
    show_units(axes.xaxis, "Time in the step", "s", high_s)


def _legend_of_kinds(axes: Axes, timeline: Timeline) -> None:
    from matplotlib.patches import Patch

    s, held = timeline.schedule, worked(timeline)
    there = {s.classes[k].kind for k in np.unique(s.op_class[held])}
    handles = [Patch(color=colour, label=_WORDS[kind]) for kind, colour in _COLOURS.items() if kind in there]
    if timeline.start_s[held].min(initial=np.inf) < begin_s(timeline):
        handles.append(Patch(color=GREY, alpha=0.45, label="paler: for the next step"))
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.1), borderaxespad=0.0)


def _close_up(axes: Axes, timeline: Timeline) -> str:
    """Three layers from the middle; which they are."""
    found = close_up(timeline)
    if found is None:
        _gantt(axes, timeline, 0.0, timeline.token_s, named=True)
        return "no layer computes"
    _gantt(axes, timeline, max(found.low_s, 0.0), found.high_s, named=True)
    first, last = found.layers[0], found.layers[-1]
    return f"layers {first} to {last}" if last != first else f"layer {first}"


# --- the front -----------------------------------------------------------------------------------------------------


def _front(figure: Figure, axes: Axes, plan: Plan, device: Device, columns: int = 5) -> None:
    """Latency against memory: the front, the best of other precisions, baselines and the bound as heights."""
    p, w = plan.predicted, plan.workload
    chosen = Alternative(weights=w.weights, policy=plan.policy.name, knobs=plan.policy.knobs, predicted=p,
                         memory=plan.memory, quality=plan.quality)
    entries = list({_place(a, device): a for a in (*plan.alternatives, *plan.pareto, chosen)}.values())
    ranked = sorted(_place(a, device) for a in (chosen, *plan.pareto))
    axes.plot(*zip(*ranked, strict=True), color=GREY, linewidth=1.0, zorder=1.5, drawstyle="steps-post",
              label="front: no plan found is better in both")
    precisions = sorted({a.weights for a in entries})
    policies = sorted({a.policy for a in entries})
    for weights, policy in sorted({(a.weights, a.policy) for a in entries},
                                  key=lambda pair: (precisions.index(pair[0]), pair[1])):
        mine = [a for a in entries if (a.weights, a.policy) == (weights, policy)]
        places = np.array([_place(a, device) for a in mine])
        reach = np.array([a.predicted.token_latency_interval_s for a in mine])
        axes.errorbar(places[:, 0], places[:, 1],
                      yerr=np.maximum([places[:, 1] - reach[:, 0], reach[:, 1] - places[:, 1]], 0.0),
                      fmt=MARKERS[policies.index(policy) % len(MARKERS)], markersize=8, capsize=3, elinewidth=1.2,
                      color=PALETTE[precisions.index(weights) % len(PALETTE)], label=f"{weights} {policy}")
    x, y = _place(chosen, device)
    axes.plot([x], [y], "o", markersize=15, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.6,
              linestyle="none", label="this plan")
    heights = [(b.token_latency_s, f"{plain(b.policy)}: {format_quantity(b.token_latency_s, 's')}", GREY)
               for b in plan.baselines]
    heights += [(y, f"this plan: {format_quantity(y, 's')}", INK),
                (plan.bound.token_latency_s, f"bound: {format_quantity(plan.bound.token_latency_s, 's')}", INK)]
    for at, _, colour in heights:
        axes.axhline(at, color=colour, linestyle=":", linewidth=1.0, zorder=1)
    every = [at for at, _, _ in heights] + [edge for a in entries for edge in a.predicted.token_latency_interval_s]
    low, high = min(every), max(every)
    if high > 5 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.25, high * 1.25)
        log_ticks(axes.yaxis, low, high)
    else:
        axes.set_ylim(0.0, 1.1 * high)
    show_units(axes.yaxis, f"Time of a {step_words(plan)}", "s", p.token_latency_s)
    right = 1.08 * max(_place(a, device)[0] for a in entries)
    fast = [tier for tier in plan.memory if tier != device.storage]
    for tier in fast if len(fast) == 1 else ():
        budget = plan.memory[tier].budget_bytes
        if budget < right:
            axes.axvline(budget, color=INK, linestyle="--", linewidth=1.0, zorder=1,
                         label=f"budget, {format_quantity(budget, 'bytes')}")
    axes.set_xlim(0.0, right)
    show_units(axes.xaxis, f"Memory held in {' + '.join(plain(tier, 16) for tier in fast)}", "bytes", right)
    legend_below(axes, columns)
    label_lines(figure, axes, heights)


def _place(entry: Alternative, device: Device) -> tuple[float, float]:
    """Memory outside storage [B] and token latency [s]."""
    used = sum(use.used_bytes for tier, use in entry.memory.items() if tier != device.storage)
    return used, entry.predicted.token_latency_s
