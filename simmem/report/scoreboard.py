"""All errors of predictions on one page of Markdown, with nothing in it that was typed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from simmem.report.format import markdown, number
from simmem.validation.reference import FAILING, Summary
from simmem.validation.scoreboard import FittedCosts, KnownMiss, Record, Scoreboard, System

__all__ = ["costs_table", "markdown_page", "misses_table", "published_table", "recorded_tables"]

NOT_RECORDED = "not recorded"

_HEAD = """# Scoreboard

How far off predictions are, beside published results, recorded runs and runs of your own. This page is what
`simmem scoreboard --out docs/scoreboard.md` prints: do not edit it, run the command again. An error is predicted over
published (or measured) less one; means, medians and largest are of its absolute value.
"""
_PUBLISHED = """## Published results

Predicted anew by the code of `simmem reproduce`. An *anchor* is a row that a figure was taken from: it counts for
nothing ([ledger](ledger.md)). *Missed* rows are known to miss (`xfail`), *excluded* ones cannot be judged; `simmem
reproduce SET` gives every row and each reason. Rows judged by an interval have no error that counts.
"""
_RECORDED = """## Recorded runs

Plans that were run for real, each predicted before (`simmem validate --record`, [validate.md](validate.md)). All
figures are worked out here from the recorded rows, over those that are conclusive. *Beside controls* judges for the
machine that was found right before and after each run, instead of the calibrated one. *not recorded*: what the record
does not hold; –: nothing to judge by. Rules changed over time: what did not hold is said by the rules of the day.
Records stand in the order in which their predictions were written; none of the files says that it replaces another,
and why each was made stands in the README of its folder under `validate/measured/`.
"""
_COSTS = """## Fitted costs of products

Of each recorded cost model: the error on shapes that were held out by cross-validation when it was fitted (the median
of each kind of product, averaged over kinds by the number of products), and the roofline's on the same. It is of the
logarithm, so 10 % is a factor of 1.1. Records of raw samples alone carry no figure of error.
"""
_NOTHING_HERE = """\
Nothing was given. `simmem scoreboard --here DIR`, with the folder of a `simmem validate --record DIR`,
puts your machine here.
"""


def markdown_page(found: Scoreboard) -> str:
    """The page; the same text for the same code, data and records."""
    parts = [_HEAD, _PUBLISHED, published_table(found.published, found.summary)]
    if found.misses:
        parts += ["### Rows that miss\n", misses_table(found.misses)]
    parts += [_RECORDED, recorded_tables(found.recorded), _COSTS, costs_table(found.costs), "## Here\n"]
    parts.append(recorded_tables(found.here) if found.here else _NOTHING_HERE)
    return "\n".join(parts)


def published_table(systems: Sequence[System], total: Summary) -> str:
    """A line for each system of each set, and one for all."""
    rows = [[s.reference_set, s.system, _judged(s), *_errors(s.summary), f"`{s.furthest}`" if s.furthest else "–",
             *(str(sum(s.counts.get(status, 0) for status in which))
               for which in (("anchor",), ("xfail",), ("excluded",), FAILING))] for s in systems]
    counted = [sum(s.counts.get(status, 0) for s in systems for status in which)
               for which in (("pass", "fail"), ("anchor",), ("xfail",), ("excluded",), FAILING)]
    rows.append(["**all**", "", _of(counted[0], total.n), *_errors(total), "", *map(str, counted[1:])])
    return _table(["set", "system", "rows judged", "mean", "median", "largest", "which row", "anchors", "missed",
                   "excluded", "failing"], rows, words=(0, 1, 6))


def misses_table(misses: Sequence[KnownMiss]) -> str:
    """Each row that is known to miss, or fails, with its reason."""
    return _table(["row", "status", "published", "predicted", "error", "why"],
                  [[f"`{m.id}`", m.status, f"{_number(m.published)} {markdown(m.unit)}", _number(m.predicted),
                    "–" if m.error is None else f"{100 * m.error:+.1f} %", markdown(m.why)] for m in misses],
                  words=(0, 1, 5))


def recorded_tables(found: Sequence[Record]) -> str:
    """Figures of each record and storage, then the conditions of each record."""
    figures = []
    for record in found:
        if not record.summaries:
            figures.append([f"`{markdown(record.name)}`", *[NOT_RECORDED] * 11])
        for storage, s in record.summaries.items():
            controls = s.mape_beside is not None
            figures.append([
                f"`{markdown(record.name)}`", storage, f"{s.n} of {record.rows[storage]}",
                _share(s.mape), _share(s.mape_beside) if controls else NOT_RECORDED, _share(s.p90_error),
                "–" if s.kendall_tau is None else f"{s.kendall_tau:.2f}", _share(s.regret), _share(s.coverage, 0),
                _share(s.coverage_beside, 0) if controls else NOT_RECORDED, _share(s.conclusive_share, 0),
                _share(record.step_ratio_error) if storage == "real" else "–"])
    conditions = [[
        f"`{markdown(r.name)}`", _text(r.written), _text(r.device), _versions(r.versions), _text(r.mode),
        _text(r.rounds), NOT_RECORDED if r.took_s is None else f"{r.took_s:.0f} s",
        NOT_RECORDED if r.failed is None else markdown("; ".join(r.failed)) or "nothing"] for r in found]
    return "\n".join([
        _table(["record", "storage", "conclusive rows", "MAPE, as predicted", "MAPE, beside controls", "p90", "tau-b",
                "regret", "coverage, as predicted", "coverage, beside controls", "conclusive",
                "I/O ratio of published steps, largest error"], figures, words=(0, 1)),
        _table(["record", "predictions written", "device", "versions", "mode", "rounds", "took", "what did not hold"],
               conditions, words=range(8))])


def costs_table(found: Sequence[FittedCosts]) -> str:
    """A line for each recorded cost model."""
    return _table(["cost model", "date", "kinds", "products", "median error", "roofline"],
                  [[f"`{c.name}`", c.date, str(c.kinds), str(c.products), _share(c.median), _share(c.roofline_median)]
                   for c in found], words=(0, 1))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: Collection[int]) -> str:
    """Markdown; columns of words to the left, figures to the right."""
    lines = [columns, ["---" if i in words else "--:" for i in range(len(columns))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _judged(system: System) -> str:
    return _of(sum(system.counts.get(status, 0) for status in ("pass", "fail")), system.summary.n)


def _of(judged: int, counted: int) -> str:
    return str(judged) if judged == counted else f"{judged} ({counted} with an error that counts)"


def _errors(summary: Summary) -> list[str]:
    return [_share(summary.mape), _share(summary.median), _share(summary.max)]


def _share(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else number(value)


def _text(value: object) -> str:
    return NOT_RECORDED if value is None else markdown(str(value))


def _versions(found: dict[str, str]) -> str:
    return markdown(", ".join(f"{name} {version}" for name, version in sorted(found.items()))) or NOT_RECORDED
