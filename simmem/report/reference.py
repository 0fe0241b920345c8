"""Published against predicted, as a table a reviewer can read."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from simmem.report.format import console as new_console
from simmem.validation.reference import Reproduction, RowResult

__all__ = ["print_reproduction"]

STYLES = {"pass": "green", "fail": "bold red", "xpass": "bold red", "error": "bold red", "infeasible": "bold red",
          "anchor": "dim", "excluded": "dim", "xfail": "yellow"}


def print_reproduction(document: Reproduction) -> None:
    """Print every row, the reasons of those that are not judged, and the summary."""
    console = new_console()
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for name in ("row", "published", "predicted", "error", "allowed", "status"):
        table.add_column(name, justify="left" if name in ("row", "status") else "right", no_wrap=name != "row",
                         overflow="fold", min_width=28 if name == "row" else None)
    for row in document.rows:
        table.add_row(row.id, f"{_number(row.published)} {row.unit}", _predicted(row), _percent(row.error),
                      _allowed(row), Text(row.status, style=STYLES[row.status]))
    console.print(table)
    said: dict[tuple[str, str], list[str]] = {}
    for row in document.rows:
        text = row.message or row.reason
        if text:
            said.setdefault((row.status, text), []).append(row.id)
    for (status, text), rows in said.items():
        console.print(Text(f"\n{status}, {', '.join(rows)}: {text}", style="dim"))
    s = document.summary
    counts = {k: sum(r.status == k for r in document.rows) for k in STYLES}
    line = ", ".join(f"{n} {k}" for k, n in counts.items() if n)
    console.print()
    if s.n and s.mape is not None and s.median is not None and s.max is not None:
        console.print(Text(f"{line}; over {s.n} judged: mean |error| {100 * s.mape:.1f} %, median "
                           f"{100 * s.median:.1f} %, largest {100 * s.max:.1f} %", style="bold"))
    else:
        console.print(Text(line, style="bold"))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f} %"


def _predicted(row: RowResult) -> str:
    if row.predicted_interval is not None:
        return f"{row.predicted_interval[0]:.3g} … {row.predicted_interval[1]:.3g}"
    return _number(row.predicted)


def _allowed(row: RowResult) -> str:
    if row.interval is not None:
        return "inside"
    return "" if row.tolerance is None or row.expect == "excluded" else f"±{100 * row.tolerance:.0f} %"
