"""How good was each predictor of a trace, and what does it cost? A table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from simmem.report.format import new_table, number, parameters, quantity, share
from simmem.trace import TraceHeader
from simmem.trace.trace import Predictor

__all__ = ["predictor_table"]


def predictor_table(header: TraceHeader) -> Table:
    """A row for every predictor of a trace, those that need no network first; below a share that of the worst layer."""
    table = new_table("predictor", "recall", "precision", "asked", "in vain", "weights", "ppl", left=1)
    table.columns[0].min_width = 18
    for row in header.predictors:
        own = parameters(row.params) if row.params else "-"
        quality = "-" if row.quality is None else f"× {number(row.quality.perplexity_ratio)}"
        table.add_row(Text(f"{_name(row)}\n{row.asks}"), _spread(row.recall, row.recall_by_layer),
                      _spread(row.precision, row.precision_by_layer), share(row.asked_share),
                      quantity(row.wasted_bytes_per_token, "bytes", 3), own, quality)
    for column in table.columns[1:]:
        column.no_wrap = True  # a figure that is cut is another figure
    return table


def _name(row: Predictor) -> str:
    rank = f", rank {row.rank}" if row.rank else ""
    ahead = row.layers_ahead
    when = "" if ahead is None else ", in its own layer" if ahead == 0 else (
        f", {ahead} layer{'s' if ahead > 1 else ''} ahead")
    return f"{row.name}{rank}{when}"


def _spread(mean: float, by_layer: Sequence[float | None]) -> str:
    known = [value for value in by_layer if value is not None]
    return share(mean) + (f"\n≥ {share(min(known))}" if len(known) > 1 else "")
