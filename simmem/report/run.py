"""A plan that was run, measured beside predicted: a table for people, a timeline for Perfetto."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.text import Text

from simmem.report.format import console as new_console
from simmem.report.format import new_table, section
from simmem.report.perfetto import chrome_trace
from simmem.sim.timeline import Timeline
from simmem.units import format_quantity
from simmem.validation.runs import RunRow

__all__ = ["print_run", "side_by_side"]

STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}


def side_by_side(predicted: Sequence[Timeline], measured: Sequence[Timeline], title: str) -> str:
    """Predicted and measured tokens as two processes of one Chrome/Perfetto trace."""
    whole = json.loads(chrome_trace(predicted, f"predicted: {title}"))
    other = json.loads(chrome_trace(measured, f"measured: {title}"))
    for event in other["traceEvents"]:
        event["pid"] = 2
    whole["traceEvents"] = sorted([*whole["traceEvents"], *other["traceEvents"]], key=lambda e: e.get("ts", -1.0))
    whole["otherData"]["title"] = title
    return json.dumps(whole)


def print_run(row: RunRow) -> None:
    """Print what was measured beside what was predicted."""
    console = new_console()
    m = row.measured_s
    where = "" if row.storage == "real" else f", EMULATED storage of {row.device}"
    console.print(Text(f"{row.policy}, {row.model} at {row.weights}{where}", style="bold"))
    low, high = row.interval_s
    noise = "unknown from one repeat" if row.noise_floor is None else f"{100 * row.noise_floor:.1f} %"
    console.print(Text.assemble(
        (f"predicted {_s(row.predicted_s)} a token", "bold"), f" (90 % interval {_s(low)} to {_s(high)}), ",
        (f"measured {_s(m.median)}", "bold"), f" (p10 {_s(m.p10)}, p90 {_s(m.p90)}, {row.tokens} tokens × "
        f"{row.repeats}), noise floor {noise}\n",
        (f"{row.status}: error {100 * row.error:+.1f} %; {row.why}\n", STYLES[row.status])))
    table = new_table("phase, per token", "predicted", "measured", "error")
    for phase in row.phases:
        error = f"{100 * (phase.predicted_s / phase.measured_s - 1):+.0f} %" if phase.measured_s > 0 else "-"
        table.add_row(phase.name, _s(phase.predicted_s), _s(phase.measured_s), error)
    section(console, "Where the time goes", table)
    same = "exactly as planned" if row.bytes.predicted == row.bytes.measured else \
        f"planned were {format_quantity(row.bytes.predicted, 'bytes')}"
    console.print(Text(f"Moved per token: {format_quantity(row.bytes.measured, 'bytes')}, {same}."))
    if row.exact is not None:
        e = row.exact
        console.print(Text(f"Logits over {e.tokens} tokens of text: at most {e.largest_difference:.1e} of the largest "
                           f"away from the network's ({e.tolerance:.0e} allowed), {100 * e.same_choice:.1f} % of the "
                           "next tokens the same."))
    console.print(Text(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
                                 for k, v in row.conditions.items()), style="dim"))


def _s(value: float) -> str:
    return format_quantity(value, "s")
