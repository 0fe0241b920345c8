"""How many accesses miss under each policy, and how many bytes is that, for a cache of every size?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simmem.report.plots.style import FAINT, INK, MARKERS, PALETTE, heading, panel, picture, plain, show_units
from simmem.report.replay import replay_answer
from simmem.units import format_quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["miss_ratio", "plot_replay"]

Array = NDArray[np.float64]

_FLOOR = "belady"
_SCOPES = {"layer": "a cache for each layer", "global": "one cache for all layers"}


def plot_replay(path: Path, document: dict[str, Any]) -> None:
    """Write the miss-ratio curves of a `replay --json` document to `path`: steady state alone.

    Raises what `picture` raises.
    """
    trace, cold = document["trace"], document["cold"]
    kind = "captured" if trace["kind"] == "captured" else "SYNTHETIC"
    regretted = [curve for curve in document["curves"] if any(r is not None for r in curve.get("regret") or ())]
    with picture(path) as figure:
        heading(figure, f"{plain(trace['name'], 50)}: what a cache of any size would miss",
                f"{kind} trace, model {plain(document['model'])}; a unit has "
                f"{format_quantity(document['unit_bytes'], 'bytes')} at {document['precision']} · steady state: "
                f"without the first {cold['tokens']} tokens (cold start)")
        grid = figure.add_gridspec(2 if regretted else 1, 1, height_ratios=(2.2, 1.0) if regretted else (1.0,))
        above = figure.add_subplot(grid[0])
        _misses(above, document)
        if regretted:
            below = figure.add_subplot(grid[1], sharex=above)
            _regret(below, document)
        above.legend(loc="upper left", bbox_to_anchor=(1.1 if above.child_axes[1:] else 1.01, 1.0), labelspacing=0.8)


def miss_ratio(trace: str | dict[str, Any], *, ax: Axes | None = None, **asked: Any) -> Axes:
    """Share of accesses that a cache of any size misses, a curve for each policy: steady state, without the cold start.

    trace : name or path of a trace, or a `replay --json` document.
    asked : with a name, what `simmem.report.replay.replay_answer` takes: policies, sizes, windows, weights, ...
    """
    document = replay_answer(trace, **asked) if isinstance(trace, str) else trace
    kind = "captured" if document["trace"]["kind"] == "captured" else "SYNTHETIC"
    with panel(ax, f"What a cache of any size would miss: {plain(document['trace']['name'], 50)}",
               f"{kind} trace, model {plain(document['model'])} at {document['precision']} · steady state · "
               f"a unit has {format_quantity(document['unit_bytes'], 'bytes')}") as axes:
        _misses(axes, document, alone=True)
        axes.legend(loc="upper left", bbox_to_anchor=(1.12 if axes.child_axes else 1.01, 1.0), labelspacing=0.8)
    return axes


def _sizes(document: dict[str, Any], curve: dict[str, Any], which: str = "sizes_bytes") -> Array:
    """Size of all caches together, as a window's on average or (peak_bytes) at most. [B]"""
    return np.asarray(curve[which], dtype=np.float64) * (
        1 if curve["scope"] == "global" else document["n_layers"])


def _looks(document: dict[str, Any], number: int) -> dict[str, Any]:
    """Colour, marker and name of a curve: Belady's is the floor; the others differ in more than colour."""
    curve = document["curves"][number]
    scopes = {c["scope"] for c in document["curves"]}
    label = plain(curve["policy"], 24)
    if len(scopes) > 1:
        label += f",\n{_SCOPES.get(curve['scope'], curve['scope'])}"
    if curve["policy"] == _FLOOR:
        return {"color": INK, "linewidth": 2.4, "linestyle": "-", "label": f"{label}:\nno policy misses less"}
    others = [i for i, c in enumerate(document["curves"]) if c["policy"] != _FLOOR]
    place = others.index(number)
    return {"label": label, "color": PALETTE[place % 6], "marker": MARKERS[place % len(MARKERS)], "markersize": 5,
            "markevery": max(1, len(curve["sizes_bytes"]) // 24), "linestyle": ("-", "--", "-.", ":")[(place // 6) % 4]}


def _misses(axes: Axes, document: dict[str, Any], *, alone: bool = False) -> None:
    """Curves of all policies, a window's at the mean of what it holds; with the share of all units above.

    alone : no regret stands below, so a window is drawn at the most it holds, as Belady's policy is to be compared
        with it; and there is no second scale above.
    """
    top, largest, per_miss = 0.0, 0.0, []
    for number, curve in enumerate(document["curves"]):
        sizes = _sizes(document, curve, "peak_bytes" if alone else "sizes_bytes")
        misses = 1.0 - np.asarray(curve["hit_ratio"], dtype=np.float64)
        order = np.argsort(sizes, kind="stable")
        looks = _looks(document, number)
        if alone and curve["policy"] == "window":
            looks["label"] += ",\nat the most it holds"
        axes.plot(sizes[order], misses[order], **looks)
        if curve["policy"] == _FLOOR:
            axes.fill_between(sizes[order], 0.0, misses[order], color=FAINT, alpha=0.6, linewidth=0, zorder=0)
        top, largest = max(top, float(misses.max())), max(largest, float(sizes.max()))
        read = np.asarray(curve["bytes_per_token"], dtype=np.float64)
        per_miss += (read[misses > 1e-9] / misses[misses > 1e-9]).tolist()
    axes.set_xlim(0.0, (largest or 1.0) * 1.02)
    axes.set_ylim(0.0, (top or 1.0) * 1.06)
    show_units(axes.yaxis, "Accesses that miss", "ratio", 1.0)
    show_units(axes.xaxis, "Cache, all layers together", "bytes", largest or 1.0)
    whole = document["unit_bytes"] * document["n_units"] * document["n_layers"]
    if not alone:
        above = axes.secondary_xaxis("top", functions=_by(1.0 / whole))
        show_units(above.xaxis, "Share of all units", "ratio", 1.0)
    if per_miss and np.ptp(per_miss) <= 1e-6 * max(per_miss):  # then one scale serves every curve
        accessed = float(np.mean(per_miss))
        amounts = axes.secondary_yaxis("right", functions=_by(accessed))
        show_units(amounts.yaxis, "Read a token", "bytes", accessed * top)


def _by(factor: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """From an axis to one whose values are `factor` times as large, and back."""
    return lambda value: value * factor, lambda value: value / factor


def _regret(axes: Axes, document: dict[str, Any]) -> None:
    for number, curve in enumerate(document["curves"]):
        if curve["policy"] != _FLOOR and curve.get("regret") is not None:
            sizes = _sizes(document, curve, "peak_bytes")  # what the optimum it is held to may hold
            regret = np.array([np.nan if r is None else r for r in curve["regret"]], dtype=np.float64)
            order = np.argsort(sizes, kind="stable")
            axes.plot(sizes[order], regret[order], **_looks(document, number))
    axes.set_ylim(bottom=0.0)
    show_units(axes.xaxis, "Cache, all layers together", "bytes", axes.get_xlim()[1])
    axes.set_title("Regret against Belady's policy")
    show_units(axes.yaxis, "Regret", "ratio", 1.0)
