"""How near do predictions come to what was measured or published?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simmem.errors import SpecError
from simmem.report.plots.style import FAINT, GREY, INK, MARKERS, PALETTE, log_ticks, panel, plain, show_units
from simmem.spec.jsonfile import read_json
from simmem.units import format_quantity
from simmem.validation.reference import Reproduction, RowResult
from simmem.validation.runs import ROW_TOLERANCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["predicted_and_measured", "published"]

_MOST_BYTES = 64 << 20
_RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0,
           50.0, 100.0)
_STATUS = {"pass": (PALETTE[2], "o", "passes"), "fail": (PALETTE[1], "X", "fails"),
           "infeasible": (PALETTE[1], "X", "fails"), "error": (PALETTE[1], "X", "fails"),
           "xpass": (PALETTE[1], "X", "fails"), "xfail": (PALETTE[4], "D", "known to miss"),
           "anchor": (GREY, "s", "anchor: a figure was taken from it"), "excluded": (GREY, "v", "not judged")}


def predicted_and_measured(record: str | Path | Mapping[str, Any] | Iterable[Mapping[str, Any]], *,
                           ax: Axes | None = None) -> Axes:
    """Predicted against measured seconds of a token, log-log: a mark for each plan that was run.

    Upright whiskers are predicted 90 % intervals, level ones the 10 % to 90 % range of measured tokens; hollow marks
    are inconclusive (too noisy to judge). The grey band is what a row's error may be.

    Parameters
    ----------
    record : a document of `validate --json` or `run --json`, the path of one, or rows of such.

    Raises
    ------
    SpecError
        It cannot be read as a JSON object, or holds no rows.
    """
    rows, what = _rows(record)
    storages = sorted({row["storage"] for row in rows})
    policies = sorted({row["policy"] for row in rows})
    tolerance = max(ROW_TOLERANCE[storage] for storage in storages)
    conclusive = [row for row in rows if row["status"] != "inconclusive"]
    mean = sum(abs(row["error"]) for row in conclusive) / len(conclusive) if conclusive else None
    said = "" if mean is None else f", mean error {format_quantity(mean, 'ratio')} of {len(conclusive)} conclusive rows"
    with panel(ax, f"Predicted against measured: {what}",
               f"{len(rows)} plans that were run{said} · upright whiskers: predicted 90 % intervals, level ones: "
               "10 % to 90 % of the measured tokens", height_in=6.4) as axes:
        edges = [edge for row in rows for edge in (*row["interval_s"], row["measured_s"]["p10"],
                                                   row["measured_s"]["p90"])]
        low, high = min(edges) / 1.3, max(edges) * 1.3
        axes.fill_between([low, high], [low * (1 - tolerance), high * (1 - tolerance)],
                          [low * (1 + tolerance), high * (1 + tolerance)], color=FAINT, alpha=0.6, linewidth=0,
                          label=f"within {format_quantity(tolerance, 'ratio', 2)}", zorder=0)
        axes.plot([low, high], [low, high], color=GREY, linewidth=1.0, zorder=1, label="predicted = measured")
        for policy in policies:
            for storage in storages:
                mine = [row for row in rows if (row["policy"], row["storage"]) == (policy, storage)]
                _marks(axes, mine, PALETTE[policies.index(policy) % len(PALETTE)],
                       MARKERS[storages.index(storage) % len(MARKERS)])
        for axis in (axes.xaxis, axes.yaxis):
            axis.axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        for axis, words in ((axes.xaxis, "Measured, median of a token"), (axes.yaxis, "Predicted, of a token")):
            log_ticks(axis, low, high)
            show_units(axis, words, "s", high / 1.3)
        axes.set_aspect("equal")
        handles = axes.get_legend_handles_labels()[0]
        handles += [axes.plot([], [], "s", color=PALETTE[n % len(PALETTE)], label=policy)[0]
                    for n, policy in enumerate(policies)]
        handles += [axes.plot([], [], MARKERS[n % len(MARKERS)], color=GREY, label=f"{storage} storage")[0]
                    for n, storage in enumerate(storages)]
        handles += axes.plot([], [], "o", markeredgecolor=GREY, markerfacecolor="white", label="too noisy to judge")
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return axes


def _marks(axes: Axes, rows: list[Mapping[str, Any]], colour: str, marker: str) -> None:
    for row in rows:
        measured, (least, most), at = row["measured_s"], row["interval_s"], row["predicted_s"]
        hollow = row["status"] == "inconclusive"
        axes.errorbar(
            [measured["median"]], [at], fmt=marker, color=colour, markersize=6.5, elinewidth=0.8, capsize=2,
            markerfacecolor="white" if hollow else colour, markeredgecolor=colour, zorder=3,
            xerr=[[max(measured["median"] - measured["p10"], 0.0)], [max(measured["p90"] - measured["median"], 0.0)]],
            yerr=[[max(at - least, 0.0)], [max(most - at, 0.0)]])


def _rows(record: Any) -> tuple[list[Mapping[str, Any]], str]:
    """Rows with `predicted_s` and `measured_s`, and what the record is called."""
    name = "a record"
    if isinstance(record, (str, Path)):
        path = Path(record)
        name = plain(f"{path.parent.name}/{path.name}" if path.name == "validate.json" else path.name, 48)
        record = read_json(path, what="a record of runs", max_bytes=_MOST_BYTES)
    if isinstance(record, Mapping):
        rows = record.get("rows", [record])
        name = name if name != "a record" else str(record.get("device", name))
    else:
        rows = list(record)
    wanted = {"predicted_s", "interval_s", "measured_s", "storage", "policy", "status", "error"}
    if not rows or any(not isinstance(row, Mapping) or wanted - set(row) for row in rows):
        raise SpecError("holds no rows of plans that were run; expected what `simmem validate --json` or `simmem run "
                        "--json` prints", key="record")
    return rows, name


def published(record: Reproduction | Sequence[RowResult], *, ax: Axes | None = None) -> Axes:
    """Predicted over published, a row for each reference row: the grey bar is what the row tolerates.

    Where a row is judged by an interval, a black whisker is that interval over what was published.

    Raises SpecError where no row has a prediction.
    """
    rows = [row for row in (record.rows if isinstance(record, Reproduction) else record)
            if row.predicted is not None and row.published is not None]
    if not rows:
        raise SpecError("no row has a prediction to draw", key="record")
    judged = [abs(row.error) for row in rows
              if row.expect == "judged" and row.error is not None and row.interval is None]
    said = "" if not judged else f"{len(judged)} judged rows, mean error " + format_quantity(
        sum(judged) / len(judged), "ratio") + " · "
    from matplotlib.ticker import NullLocator

    with panel(ax, "Predicted against published results", f"{said}grey: what the row tolerates",
               height_in=1.6 + 0.25 * len(rows), letters=80) as axes:
        seen: set[str] = set()
        for place, row in enumerate(rows):
            assert row.predicted is not None and row.published is not None
            colour, marker, label = _STATUS[row.status]
            if row.tolerance is not None and row.interval is None and row.expect != "excluded":
                axes.barh(place, 2 * row.tolerance, left=1 - row.tolerance, color=FAINT, height=0.7, zorder=0)
            if row.predicted_interval is not None:
                axes.plot([edge / row.published for edge in row.predicted_interval], [place] * 2, color=INK,
                          linewidth=1.2, marker="|", markersize=6)
            axes.plot([row.predicted / row.published], [place], marker, color=colour, markersize=6.5, linestyle="none",
                      label=None if label in seen else label)
            seen.add(label)
        ratios = [row.predicted / row.published for row in rows if row.predicted and row.published]
        low, high = min(*ratios, 0.5) / 1.15, max(*ratios, 1.6) * 1.15
        axes.axvline(1.0, color=INK, linewidth=0.9, zorder=1)
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_xticks([at for at in _RATIOS if low <= at <= high])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("Predicted over published [×]")
        axes.set_yticks(range(len(rows)), [plain(row.id, 46) for row in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return axes
