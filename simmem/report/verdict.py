"""A validation as a table that a reviewer can read: every row, every gate, what users run today."""

from __future__ import annotations

from rich.text import Text

from simmem.report.format import console as new_console
from simmem.report.format import new_table, section
from simmem.report.run import STYLES
from simmem.units import format_quantity
from simmem.validation.verdict import Gate, Summary, Validation

__all__ = ["print_validation"]


def print_validation(found: Validation) -> None:
    """Print rows, cells, gates, baselines and what was left out."""
    console = new_console()
    console.print(Text(f"{found.device}, {found.mode}: {len(found.rows)} plans × {found.conditions['rounds']} rounds "
                       f"in {found.took_s:.0f} s; predictions written first, sha256 {found.predictions_sha256[:12]}…",
                       style="bold"))
    for verdict in found.cells:
        table = new_table("plan", "predicted", "measured", "in 90 %", "noise", "error", "controls", "status")
        for row in (r for r in found.rows if r.cell == verdict.cell):
            name = row.id.removeprefix(f"{verdict.cell}/")
            table.add_row(
                f"{name} (chosen)" if row.chosen and name != "chosen" else name, _s(row.predicted_s),
                _s(row.measured_s.median),
                "yes" if row.interval_s[0] <= row.measured_s.median <= row.interval_s[1] else "no",
                _percent(row.noise_floor), f"{100 * row.error:+.1f} %",
                "-" if row.error_beside is None else f"{100 * row.error_beside:+.1f} %",
                Text(row.status, style=STYLES[row.status]))
        tau = "no pair to rank" if verdict.kendall_tau is None else f"tau-b {verdict.kendall_tau:.2f}"
        lost = "" if verdict.regret is None else f", regret {100 * verdict.regret:.1f} %"
        section(console, f"{verdict.cell}: {tau}{lost}", table)
    for name, part in found.by_storage.items():
        console.print(Text(f"{name} storage: {_said(part)}"))
    table = new_table("what must hold", "found", "allowed", "status")
    for gate in found.gates:
        table.add_row(gate.name, "-" if gate.value is None else f"{gate.value:.3f}", _allowed(gate),
                      Text(gate.status, style=STYLES.get(gate.status, "yellow")))
    console.print()
    section(console, "Verdict", table)
    if found.steps:
        table = new_table("reading time over naive loading's", "predicted", "measured", "error", "published")
        for step in found.steps:
            table.add_row(f"{step.cell}/{step.step}", f"{step.predicted:.3f}", f"{step.measured:.3f}",
                          f"{100 * step.error:+.1f} %" + ("" if step.conclusive else " (noisy)"),
                          "-" if step.published is None else f"{step.published:.3f}")
        section(console, "The steps of LLM in a flash", table)
    if found.baselines:
        table = new_table("what users run today", "page cache", "measured", "noise", "times the fastest plan")
        for b in found.baselines:
            table.add_row(f"{b.model}, {b.what}", b.page_cache, _s(b.measured_s.median), _percent(b.noise_floor),
                          "-" if b.times_fastest is None else f"{b.times_fastest:.2f}")
        section(console, "Timed, bytes not judged", table)
    reasons: dict[str, list[str]] = {}
    for name, why in found.left_out.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        console.print(Text(f"not run, {why}: {', '.join(names)}", style="dim"))


def _said(part: Summary) -> str:
    if part.mape is None or part.p90_error is None:
        return "no conclusive row"
    beside = "" if part.mape_beside is None else f" (beside controls {100 * part.mape_beside:.1f} %)"
    inside = "" if part.coverage is None else f", {100 * part.coverage:.0f} % inside the 90 % interval"
    if part.coverage_beside is not None:
        inside += f" (beside controls {100 * part.coverage_beside:.0f} %)"
    return (f"MAPE {100 * part.mape:.1f} %{beside}, p90 {100 * part.p90_error:.1f} %{inside}, over {part.n} conclusive "
            f"rows ({100 * part.conclusive_share:.0f} %)")


def _allowed(gate: Gate) -> str:
    ends = [f"≥ {gate.low:g}" if gate.low is not None else "", f"≤ {gate.high:g}" if gate.high is not None else ""]
    return ", ".join(e for e in ends if e)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _s(value: float) -> str:
    return format_quantity(value, "s")
