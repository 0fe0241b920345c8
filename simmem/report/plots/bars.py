"""Which figures does a plan hang on, and how much of each memory does it take?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from simmem.errors import SpecError
from simmem.planner.document import Plan
from simmem.report.plots.plan import evidence_in_words, plan_in_words
from simmem.report.plots.style import GREY, INK, PALETTE, legend_below, panel, plain, show_units
from simmem.units import format_quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["residency", "sensitivity"]

_MOST = 12
"""Figures that are shown, those that matter most."""
_SEEN = 5e-4
"""A smaller change reads as 0.0 %."""
_FASTER, _SLOWER = PALETTE[2], PALETTE[1]


def sensitivity(plan: Plan, *, ax: Axes | None = None) -> Axes:
    """By how much a token's time (or the tokens a second) changes with each figure, largest first.

    Raises SpecError for a plan without sensitivities, such as those of a search.
    """
    if not plan.sensitivity:
        raise SpecError("has no sensitivities: plan it by itself, with simmem.plan", key="plan")
    by_rate = plan.objective == "throughput"
    result = "the rate" if by_rate else "a token's time"
    felt = [(s, s.token_latency_change if s.tokens_per_s_change is None else s.tokens_per_s_change)
            for s in plan.sensitivity]
    found = [(s, change) for s, change in felt if s.replanned or abs(change) >= _SEEN][:_MOST]
    changes = [change for _, change in found]
    with panel(ax, f"What {result} hangs on: each figure changed alone",
               f"{plan_in_words(plan)} · {evidence_in_words(plan)}", height_in=1.5 + 0.32 * len(found),
               letters=80) as axes:
        better = [(change > 0) == by_rate for change in changes]
        bars = axes.barh(range(len(found)), [c if abs(c) >= _SEEN else 0.0 for c in changes], height=0.7,
                         color=[_FASTER if good else _SLOWER for good in better])
        axes.bar_label(bars, [f"{100 * change:+.1f} %" if abs(change) >= _SEEN else "0 %" for change in changes],
                       padding=4, fontsize=9)
        axes.set_yticks(range(len(found)), [
            f"{plain(s.figure, 34)}  {100 * s.change:+.0f} %{', replanned' if s.replanned else ''}" for s, _ in found])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.axvline(0.0, color=INK, linewidth=0.8)
        least, most = min(*changes, 0.0), max(*changes, 0.0)
        room = 0.18 * (most - least or 1.0)
        axes.set_xlim(least - (room if least < 0 else 0.1 * room), most + room)
        show_units(axes.xaxis, "Change of the tokens a second" if by_rate else "Change of a token's time", "ratio", 1.0)
    return axes


def residency(plans: Plan | Mapping[str, Plan], *, ax: Axes | None = None) -> Axes:
    """What lives in which memory, and what is left of the budget, of one plan or of several under names."""
    named = {"": plans} if isinstance(plans, Plan) else dict(plans)
    if not named:
        raise SpecError("found no plan, expected at least one", key="plans")
    rows = [(name, plan, tier) for name, plan in named.items() for tier in plan.memory]
    tensors = list(dict.fromkeys(part.tensors for plan in named.values() for part in plan.residency))
    colours = {what: PALETTE[number % len(PALETTE)] for number, what in enumerate(tensors)}
    hatches = {what: ("", "//", "..", "xx")[number // len(PALETTE) % 4] for number, what in enumerate(tensors)}
    largest = max(use.used_bytes for plan in named.values() for use in plan.memory.values())
    first = next(iter(named.values()))
    said = f"{plan_in_words(first)} · " if len(named) == 1 else ""
    with panel(ax, "What lives where, and what it may take", f"{said}upright line: the budget, where it is near",
               height_in=2.0 + 0.42 * len(rows) + 0.16 * len(tensors)) as axes:
        for row, (_, plan, tier) in enumerate(rows):
            left = 0.0
            for part in plan.residency:
                if part.tier == tier and part.bytes > 0:
                    axes.barh(row, part.bytes, left=left, color=colours[part.tensors], hatch=hatches[part.tensors],
                              edgecolor="white", linewidth=0.6, height=0.62)
                    left += part.bytes
            use = plan.memory[tier]
            if use.budget_bytes <= 1.3 * largest:
                axes.plot([use.budget_bytes] * 2, [row - 0.42, row + 0.42], color=INK, linewidth=2.0)
            axes.annotate(f"{format_quantity(use.used_bytes, 'bytes')} of {format_quantity(use.budget_bytes, 'bytes')}",
                          (max(left, use.budget_bytes if use.budget_bytes <= 1.3 * largest else 0.0), row),
                          xytext=(6, 0), textcoords="offset points", va="center", fontsize=9, color=GREY,
                          annotation_clip=False)
        axes.set_yticks(range(len(rows)), [f"{plain(name, 24)}  {plain(tier, 14)}".strip() for name, _, tier in rows])
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0.0, 1.32 * largest)
        show_units(axes.xaxis, "Bytes held", "bytes", largest)
        _legend(axes, colours, hatches)
    return axes


def _legend(axes: Axes, colours: Mapping[str, str], hatches: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    legend_below(axes, 2, handles=[Patch(facecolor=colour, hatch=hatches[what], edgecolor="white",
                                         label=plain(what, 44)) for what, colour in colours.items()])
