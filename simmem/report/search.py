"""A search as a table on a terminal, as JUnit XML for a build server, and as Markdown for a pull request."""

from __future__ import annotations

from rich.text import Text

from simmem.planner.explain import rate_digits
from simmem.planner.grid.document import ChangedInput, SearchCell, SearchDocument
from simmem.report.format import console as new_console
from simmem.report.format import markdown as _md
from simmem.report.format import new_table, section
from simmem.units import format_quantity

__all__ = ["junit_of", "markdown_of", "notes_of", "print_search", "verdict_of"]

MOST_TURNS = 10
"""Pairs of cells around a boundary that are named."""
STYLES = {"pass": "green", "expected": "dim", "broken": "bold red"}
MOST_ROWS = 200
"""Cells that a terminal or a pull request is shown; the JSON has all."""


def print_search(found: SearchDocument) -> None:
    """Print cells, what broke and why, and which inputs are not what they were."""
    console = new_console()
    table = new_table("cell", "status", "policy", "a token", "tokens/s", "held", left=3)
    table.columns[0].min_width, table.columns[1].no_wrap, table.columns[-1].no_wrap = 22, True, False
    for cell in _shown(found):
        word, style = _status(cell)
        table.add_row(cell.id, Text(word, style=STYLES[style]), *_figures(cell))
    section(console, f"{_title(found)}{_first_of(found)}", table)
    for cell in found.broken:
        console.print(Text(f"{cell.id}", style=STYLES["broken"]))
        for one in cell.violations:
            console.print(Text(f"  {one.limit}: {one.cause}"))
    if found.broken:
        console.print()
    for line in notes_of(found):
        console.print(Text(line, style="dim"))
    console.print(Text(verdict_of(found), style="bold"))


def _shown(found: SearchDocument) -> list[SearchCell]:
    """Those that broke first, where there are more than can be shown."""
    if len(found.cells) <= MOST_ROWS:
        return found.cells
    return sorted(found.cells, key=lambda c: not c.violations)[:MOST_ROWS]


def _first_of(found: SearchDocument) -> str:
    return f" (the first {MOST_ROWS}, broken ones first)" if len(found.cells) > MOST_ROWS else ""


def _title(found: SearchDocument) -> str:
    against = f", against {found.baseline.file}" if found.baseline else ""
    return f"{found.spec}: {found.summary.n} cells{against}"


def _status(cell: SearchCell) -> tuple[str, str]:
    if cell.violations:
        return cell.status, "broken"
    return (cell.status, "pass") if cell.status == "pass" else ("expected", "expected")


def _figures(cell: SearchCell) -> tuple[str, str, str, str]:
    plan = cell.plan
    if plan is None:
        return "-", "-", "-", "-"
    held = ", ".join(f"{format_quantity(value, 'bytes')} {key.removeprefix('memory.')}"
                     for key, value in cell.figures.items() if key.startswith("memory.") and value)
    searched = "" if cell.question.weights else f", {plan.workload.label}"  # else the cell's name says it
    return (f"{plan.policy.name}{searched}", format_quantity(plan.predicted.token_latency_s, "s"),
            rate_digits(plan.predicted.tokens_per_s), held)


def verdict_of(found: SearchDocument) -> str:
    """How many cells keep to their limits, in a sentence."""
    s = found.summary
    counts = f"{s.passed} pass, {s.failed} fail, {s.infeasible} infeasible"
    return f"{counts}: {s.broken} of {s.n} cells broken" if s.broken else f"{counts}: nothing broken"


def notes_of(found: SearchDocument) -> list[str]:
    """What changed since the baseline, without breaking anything or as its cause."""
    lines = [_changed(one) for one in found.changed_inputs]
    if found.baseline and found.baseline.simmem != found.simmem:
        lines.append(f"the baseline was written by simmem {found.baseline.simmem}, this is {found.simmem}")
    moved = [cell.id for cell in found.cells if cell.changes and not cell.violations]
    if moved:
        lines.append(f"moved within their limits: {_listed(moved)}")
    if found.new_cells:
        lines.append(f"not in the baseline, so held to their limits alone: {_listed(found.new_cells)}")
    added = sum(cell.refined for cell in found.cells)
    if added:
        lines.append(f"{added} of the cells were added where the sample asked for it")
    lines += [f"turns between {pair.passes} (passes) and {pair.breaks}" for pair in found.boundary[:MOST_TURNS]]
    if len(found.boundary) > MOST_TURNS:
        lines.append(f"and between {len(found.boundary) - MOST_TURNS} pairs more; --json has them all")
    if found.left_out:
        lines.append(f"in the baseline, and no longer searched: {_listed(found.left_out)}")
    return lines


def _changed(one: ChangedInput) -> str:
    what = f": {'; '.join(one.changes)}" if one.changes else ""
    return f"changed since the baseline: {one.what} {one.name} ({(one.before or '')[:12]} → {one.after[:12]}){what}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def junit_of(found: SearchDocument) -> str:
    """JUnit XML: a test case for each cell, a failure for each that broke; no times in it."""
    from xml.etree import ElementTree

    suites = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(suites, "testsuite", name="simmem search", tests=str(found.summary.n),
                                   failures=str(found.summary.broken), errors="0", skipped="0")
    properties = ElementTree.SubElement(suite, "properties")
    for key, value in (("simmem", found.simmem), *((f"{i.what} {i.name}", i.digest) for i in found.inputs)):
        ElementTree.SubElement(properties, "property", name=_xml(key), value=_xml(value))
    for cell in found.cells:
        q = cell.question
        case = ElementTree.SubElement(suite, "testcase", classname=_xml(f"{q.device}.{q.model}"), name=_xml(cell.id))
        if cell.violations:
            failure = ElementTree.SubElement(case, "failure", type=cell.violations[0].limit,
                                             message=_xml(cell.violations[0].cause))
            failure.text = _xml("\n".join(f"{one.limit}: {one.cause}" for one in cell.violations))
        elif cell.changes:
            ElementTree.SubElement(case, "system-out").text = _xml("\n".join(cell.changes))
    ElementTree.SubElement(suite, "system-out").text = _xml("\n".join([verdict_of(found), *notes_of(found)]))
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    """Without the characters that XML 1.0 cannot hold."""
    return "".join(c for c in text if c in "\t\n" or (c.isprintable() and c not in "\ufffe\uffff"))


def markdown_of(found: SearchDocument) -> str:
    """A summary that a pull request shows: the verdict, what broke and why, changed inputs; all cells folded away."""
    lines = [f"## simmem search: {'❌' if found.summary.broken else '✅'} {verdict_of(found)}", ""]
    if found.broken:
        lines += ["| cell | limit | why |", "|---|---|---|"]
        for cell in found.broken[:MOST_ROWS]:
            lines += [f"| `{_md(cell.id)}` | {one.limit} | {_md(one.cause)} |" for one in cell.violations]
        if len(found.broken) > MOST_ROWS:
            lines.append(f"| and {len(found.broken) - MOST_ROWS} more | | |")
        lines.append("")
    lines += [f"- {_md(line)}" for line in notes_of(found)]
    lines += [*([""] if notes_of(found) else []), f"<details><summary>{_md(_title(found))}</summary>", "",
              "| cell | status | policy | a token | tokens/s | held |", "|---|---|---|--:|--:|---|"]
    for cell in _shown(found):
        lines.append("| " + " | ".join([f"`{_md(cell.id)}`", _status(cell)[0], *map(_md, _figures(cell))]) + " |")
    return "\n".join([*lines, "", "</details>", ""])
