"""What keeps each op of a decode step from being faster: arithmetic, memory, or a link that feeds it?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from simmem.cost.roofline import arithmetic_peak, durations
from simmem.planner.candidate import Candidate, stratified_rows
from simmem.planner.document import Plan
from simmem.planner.predict import timelines
from simmem.planner.replan import candidate_of
from simmem.report.plots.plan import evidence_in_words, plan_in_words
from simmem.report.plots.style import GREY, INK, MARKERS, PALETTE, log_ticks, panel, plain, show_units
from simmem.units import format_quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["roofline"]

_SEEN = 0.005
"""Ops and links that take a smaller share of the step are left out."""


@dataclass(frozen=True)
class _Work:
    """What ops of one name on one agent do in a step, together."""

    name: str
    agent: str
    precision: str
    flop: float
    bytes: float
    seconds: float


def roofline(plan: Plan, *, ax: Axes | None = None) -> Axes:
    """Arithmetic rate against flop per byte, log-log: roofs of each unit, its ops in a decode step on them.

    A mark is an op (all layers together; the larger, the more of the step it takes) over the bytes that it reads from
    its unit's memory. A star is the whole step over the bytes that come over one link: where it lies on the link's
    slope, that link is what the step waits for. Williams, Waterman and Patterson, CACM 52(4), 2009.
    """
    candidate = candidate_of(plan)
    device = candidate.context.device
    rows = stratified_rows(candidate.context, candidate.policy, 1)
    every, moved = _works(candidate, rows)
    step_s = timelines(candidate, rows)[0].token_s
    total = sum(work.flop for work in every)
    works = [work for work in every if work.seconds >= _SEEN * step_s and work.bytes > 0]
    agents = list(dict.fromkeys(work.agent for work in works))
    links = {name: amount for name, amount in moved.items()
             if amount / device.link[name].rate.value >= _SEEN * step_s}
    at = [work.flop / work.bytes for work in works] + [total / amount for amount in links.values()]
    reached = [work.flop / work.seconds for work in works] + [total / step_s]
    with panel(ax, "Roofline of a decode step, with its ops",
               f"{plan_in_words(plan)} · thin: full rates, thick: the share of them that ops reach · "
               f"{evidence_in_words(plan)}", height_in=5.4) as axes:
        low, high = min(at) / 4, max(*at, _ridge(candidate, works)) * 4
        across = np.geomspace(low, high, 200)
        tops = []
        for number, name in enumerate(agents):
            agent, colour = device.agent[name], PALETTE[number]
            precisions = list(dict.fromkeys(work.precision for work in works if work.agent == name))
            peak = max(arithmetic_peak(agent, name, precision)[1] for precision in precisions)
            tops.append(peak)
            rate, share = agent.rate.value, agent.rate_share.value
            axes.plot(across, np.minimum(across * rate, peak), color=colour, linewidth=0.9, zorder=1.5)
            axes.plot(across, np.minimum(across * rate * share, peak * agent.flop_share.value), color=colour,
                      linewidth=2.4, zorder=1.6,
                      label=f"{plain(name, 14)}: {format_quantity(peak, 'flop_per_s')}, "
                            f"{plain(agent.memory, 14)} at {format_quantity(rate, 'bytes_per_s')}")
        for number, (name, amount) in enumerate(links.items()):
            rate, colour = device.link[name].rate.value, PALETTE[(len(agents) + number) % len(PALETTE)]
            axes.plot(across, np.minimum(across * rate, max(tops)), color=colour, linestyle="--", linewidth=1.4,
                      label=f"link {plain(name, 14)} at {format_quantity(rate, 'bytes_per_s')}")
            axes.plot([total / amount], [total / step_s], "*", color=colour, markersize=16, markeredgecolor=INK,
                      linestyle="none", label=f"whole step over the bytes of {plain(name, 14)}", zorder=4)
        for number, work in enumerate(works):
            share = work.seconds / step_s
            axes.plot([work.flop / work.bytes], [work.flop / work.seconds],
                      MARKERS[number % len(MARKERS)], markersize=8 + 11 * min(share, 1.0) ** 0.5, linestyle="none",
                      color=PALETTE[agents.index(work.agent)], markeredgecolor="white", markeredgewidth=0.7, zorder=3,
                      label=f"{plain(work.name, 18)} on {plain(work.agent, 14)}: "
                            f"{format_quantity(share, 'ratio', 2)} of the step")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(min(reached) / 4, max(tops) * 2.5)
        log_ticks(axes.xaxis, low, high)
        log_ticks(axes.yaxis, min(reached), max(tops))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("Arithmetic for each byte [FLOP/B]")
        show_units(axes.yaxis, "Arithmetic rate", "flop_per_s", max(tops))
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), labelspacing=0.7)
        axes.grid(color=GREY, alpha=0.25)
    return axes


def _works(candidate: Candidate, rows: np.ndarray) -> tuple[list[_Work], dict[str, float]]:
    """What multiplies in the timed step, by name and agent, most time first; bytes over each link. [B]"""
    schedule = candidate.policy.decode(candidate.context, candidate.block, rows)
    took = durations(schedule, candidate.context.device).occupancy_s[:, 0]
    uses = np.bincount(schedule.op_class[schedule.timed], minlength=len(schedule.classes))
    found: dict[tuple[str, str, str], list[float]] = {}
    for index, what in enumerate(schedule.classes):
        flop = float(schedule.flop[index, 0] * uses[index])
        if what.agent is None or flop <= 0:
            continue
        memory = schedule.bytes.get(f"memory.{candidate.context.device.agent[what.agent].memory}")
        read = 0.0 if memory is None else float(memory[index, 0] * uses[index])
        parts = found.setdefault((what.name.split(".")[0], what.agent, what.precision), [0.0, 0.0, 0.0])
        for place, amount in enumerate((flop, read, float(took[index] * uses[index]))):
            parts[place] += amount
    works = [_Work(name, agent, precision, *parts) for (name, agent, precision), parts in found.items()]
    moved = {name: float(schedule.timed_bytes[f"link.{name}"][0]) for name in candidate.context.device.link
             if f"link.{name}" in schedule.timed_bytes}
    return sorted(works, key=lambda work: -work.seconds), moved


def _ridge(candidate: Candidate, works: list[_Work]) -> float:
    """The largest flop per byte from which arithmetic limits one of the agents. [FLOP/B]"""
    device = candidate.context.device
    return max(arithmetic_peak(device.agent[work.agent], work.agent, work.precision)[1] / device.agent[work.agent]
               .rate.value for work in works)
