"""Which cells break a limit, by how much, and what moved since the baseline?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simmem import __version__
from simmem.planner.document import Plan
from simmem.planner.grid.baseline import changed_inputs, partners, search_inputs
from simmem.planner.grid.cells import CellOutcome
from simmem.planner.grid.document import (
    Baseline,
    BaselineCell,
    BaselineRef,
    BoundaryPair,
    ChangedInput,
    SearchCell,
    SearchDocument,
    SearchSummary,
    Violation,
)
from simmem.planner.grid.spec import LIMITS, Cell, said
from simmem.spec.workload import mixed_text, weights_label
from simmem.units import format_quantity

__all__ = ["judge", "passes"]

SAME = 1e-9
"""Figures that differ by no more than this share are the same."""
_WORDS = {"token_latency_s": ("a token", "s"), "first_token_s": ("the first token", "s"),
          "tokens_per_s": ("tokens a second", "tokens_per_s"), "energy_j_per_token": ("energy a token", "joule"),
          "perplexity_ratio": ("perplexity over the dense model's", "count"),
          "held_bytes": ("bytes held outside storage", "bytes")}


def judge(answered: Sequence[tuple[Cell, CellOutcome]], spec_file: Path, baseline: Baseline | None = None,
          baseline_file: str | None = None, boundary: Sequence[tuple[str, str]] = ()) -> SearchDocument:
    """Hold every cell to its limits and, where there is one, to the baseline.

    boundary : neighbours of which the first passes by its limits and the second does not.
    """
    folder = spec_file.parent
    inputs = search_inputs(answered)
    changed = changed_inputs(inputs, baseline, folder) if baseline else []
    pairs = partners([cell for cell, _ in answered], baseline) if baseline else {}
    cells = [_judged(cell, outcome, pairs.get(cell.id), changed, baseline) for cell, outcome in answered]
    compared = {one.id for one in pairs.values()}
    counts = {status: sum(c.status == status for c in cells) for status in ("pass", "fail", "infeasible")}
    return SearchDocument(
        simmem=__version__, spec=str(spec_file),
        baseline=BaselineRef(file=baseline_file or "", simmem=baseline.simmem, digest=baseline.digest)
        if baseline else None,
        inputs=inputs, changed_inputs=changed, cells=cells,
        new_cells=[c.id for c, _ in answered if c.id not in pairs] if baseline else [],
        left_out=[one.id for one in baseline.cells if one.id not in compared] if baseline else [],
        summary=SearchSummary(n=len(cells), passed=counts["pass"], failed=counts["fail"],
                              infeasible=counts["infeasible"], broken=sum(bool(c.violations) for c in cells)),
        boundary=[BoundaryPair(passes=inside, breaks=outside) for inside, outside in boundary])


def passes(cell: Cell, outcome: CellOutcome) -> bool:
    """Whether a cell has a plan that keeps its own limits, whatever was expected of it and a baseline says."""
    return outcome.plan is not None and not _against_limits(cell, outcome, outcome.plan, None)


def _judged(cell: Cell, outcome: CellOutcome, before: BaselineCell | None, changed: Sequence[ChangedInput],
            baseline: Baseline | None) -> SearchCell:
    plan = outcome.plan
    given, chosen = _inputs_moved(cell, outcome, before, changed), _choices_moved(outcome, before)
    since = _since(given, chosen, before, baseline)
    if plan is None:
        violations = [] if cell.expect != "feasible" else [Violation(
            limit="feasible", figure=None, value=None, allowed=None,
            cause=_joined(outcome.infeasible or "nothing fits", since if before and before.feasible else None))]
    else:
        violations = _against_limits(cell, outcome, plan, since if given or chosen else None)
        if cell.expect == "infeasible":
            violations.append(Violation(limit="infeasible", figure=None, value=None, allowed=None, cause=_joined(
                f"nothing was expected to fit, and {plan.policy.name} at {plan.workload.label} does",
                since if before and not before.feasible else None)))
        if before is not None and before.feasible:
            violations += _regressions(cell, outcome, before, since)
    status = "infeasible" if plan is None else "fail" if violations else "pass"
    return SearchCell.model_validate({
        "id": cell.id, "status": status, "question": cell.question, "expect": cell.expect,
        "limits": {k: v for k in LIMITS if (v := getattr(cell.limits, k)) is not None}, "plan": plan,
        "figures": outcome.figures, "infeasible": outcome.infeasible, "tier": outcome.tier,
        "missing_bytes": outcome.missing_bytes, "violations": violations,
        "changes": [*given, *chosen, *_latency_change(outcome, before)],
        "compared_with": before.id if before else None, "refined": cell.refined})


def _against_limits(cell: Cell, outcome: CellOutcome, plan: Plan, since: str | None) -> list[Violation]:
    figures, limits, p = outcome.figures, cell.limits, plan.predicted
    part, seconds = max(p.breakdown_s.items(), key=lambda one: one[1])
    share = format_quantity(seconds / p.token_latency_s if p.token_latency_s else 0.0, "ratio")
    slow = (f"{share} of it is {part}, by {plan.policy.name}; no policy beats "
            f"{format_quantity(plan.bound.token_latency_s, 's')} here ({plan.bound.resource})")
    held = {tier: format_quantity(use.used_bytes, "bytes") for tier, use in plan.memory.items()}
    quality = figures.get("perplexity_ratio")
    rows: list[tuple[str, str, float | None, bool, str]] = [
        ("max_latency", "token_latency_s", figures.get("token_latency_s"), True, slow),
        ("min_tokens_per_s", "tokens_per_s", figures.get("tokens_per_s"), False,
         f"the prompt takes {format_quantity(p.first_token_s, 's')} and a token "
         f"{format_quantity(p.token_latency_s, 's')}; {slow}"),
        ("max_dram", f"memory.{outcome.host}", figures.get(f"memory.{outcome.host}"), True,
         f"{plan.policy.name} holds {', '.join(f'{v} in {k}' for k, v in held.items())}"),
        ("max_energy", "energy_j_per_token", figures.get("energy_j_per_token"), True,
         f"{plan.policy.name} at {plan.workload.label}"),
        ("max_quality_loss", "perplexity_ratio", None if quality is None else max(quality - 1.0, 0.0), True,
         plan.quality.source or f"{plan.policy.name} at {plan.workload.label}"),
    ]
    found = []
    for limit, figure, value, is_most, why in rows:
        allowed = getattr(limits, limit)
        if allowed is None or (value is not None and (value <= allowed if is_most else value >= allowed)):
            continue
        text = (f"found {said(value, limit)}, allowed {'at most' if is_most else 'at least'} {said(allowed, limit)}: "
                f"{why}" if value is not None else
                f"cannot be judged: {'energy' if limit == 'max_energy' else 'quality'} of this plan has no sourced "
                "figure")
        found.append(Violation(limit=limit, figure=figure, value=value, allowed=allowed, cause=_joined(text, since)))
    return found


def _regressions(cell: Cell, outcome: CellOutcome, before: BaselineCell, since: str | None) -> list[Violation]:
    """Figures that are worse than in the baseline by more than is allowed; fewer tokens a second are worse.

    Of memory the sum outside storage: what moves from one tier to another is no larger.
    """
    most = cell.limits.max_regress
    assert most is not None  # the search file gives one to every cell
    found = []
    for figure, was in before.figures.items():
        now = outcome.figures.get(figure)
        if now is None or figure not in _WORDS:
            continue
        falls = figure == "tokens_per_s"
        allowed = was / (1.0 + most) if falls else was * (1.0 + most)
        if now >= allowed * (1 - SAME) if falls else now <= allowed * (1 + SAME):
            continue
        words, dimension = _WORDS[figure]
        change = f" ({100 * (now / was - 1):+.1f} %, allowed {'−' if falls else '+'}{format_quantity(most, 'ratio')})"
        text = f"{words}: {_number(was, dimension)} → {_number(now, dimension)}{change if was else ''}"
        found.append(Violation(limit="max_regress", figure=figure, value=now, allowed=allowed,
                               cause=_joined(text, since)))
    return found


def _joined(text: str, since: str | None) -> str:
    return text if since is None else f"{text}; {since}"


def _since(given: Sequence[str], chosen: Sequence[str], before: BaselineCell | None, baseline: Baseline | None
           ) -> str | None:
    """What is different since the baseline, in words: what was asked and rests on, then what the planner made of it."""
    if before is None or baseline is None:
        return None
    if given:
        return f"since the baseline: {', '.join([*given, *chosen])}"
    code = (f"simmem {baseline.simmem} → {__version__}" if baseline.simmem != __version__ else
            "simmem's own code or its environment answers otherwise")
    return f"from the same inputs, {code}: {', '.join(chosen) or 'same policy, knobs and bound'}"


def _inputs_moved(cell: Cell, outcome: CellOutcome, before: BaselineCell | None, changed: Sequence[ChangedInput]
                  ) -> list[str]:
    """Device, model and trace, and what was asked: budget, knobs that are held, limits on quality."""
    if before is None:
        return []
    q = cell.question
    mine = ("device", q.device), ("model", q.model), ("model", q.draft)
    found = [f"{one.what} {one.name} changed ({'; '.join(one.changes)})" for one in changed
             if (one.what, one.name) in mine]
    trace = outcome.plan.trace if outcome.plan else None
    if trace is not None and before.trace is not None and trace.digest != before.trace:
        found.append(f"trace {trace.name} changed ({before.trace[:12]} → {trace.digest[:12]})")
    for name in type(q).model_fields:
        was, now = getattr(before.question, name), getattr(q, name)
        if was != now and name != "knobs":
            found.append(f"{name} {_plain(was)} → {_plain(now)}")
    return found + [f"held knob {key} {_plain(before.question.knobs.get(key))} → {_plain(q.knobs.get(key))}"
                    for key in sorted({*before.question.knobs, *q.knobs})
                    if _value(before.question.knobs.get(key)) != _value(q.knobs.get(key))]


def _choices_moved(outcome: CellOutcome, before: BaselineCell | None) -> list[str]:
    """Precision, policy or knobs, and the bound that no policy beats."""
    plan = outcome.plan
    if before is None or not before.feasible:
        return []
    if plan is None:
        return [f"{before.policy} no longer fits"]
    found: list[str] = []
    now_weights = weights_label(plan.workload.weights, plan.workload.mixed)
    if before.weights != now_weights:
        found.append(f"weights {before.weights} → {now_weights}")
    if before.policy != plan.policy.name:
        found.append(f"policy {before.policy} → {plan.policy.name}")
    else:
        found += [f"knob {key} {_plain(before.knobs.get(key))} → {_plain(plan.policy.knobs.get(key))}"
                  for key in sorted({*before.knobs, *plan.policy.knobs})
                  if _value(before.knobs.get(key)) != _value(plan.policy.knobs.get(key))]
    bound = before.bound
    if bound is not None and (bound.resource != plan.bound.resource
                              or not _same(bound.token_latency_s, plan.bound.token_latency_s)):
        found.append(f"bound {format_quantity(bound.token_latency_s, 's')} ({bound.resource}) → "
                     f"{format_quantity(plan.bound.token_latency_s, 's')} ({plan.bound.resource})")
    return found


def _latency_change(outcome: CellOutcome, before: BaselineCell | None) -> list[str]:
    was, now = (before.figures.get("token_latency_s") if before else None), outcome.figures.get("token_latency_s")
    if was is None or now is None or _same(was, now):
        return []
    return [f"a token {_number(was, 's')} → {_number(now, 's')}"]


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= SAME * max(abs(a), abs(b))


def _value(setting: Any) -> Any:
    """Lists and tuples of JSON are the same."""
    return list(setting) if isinstance(setting, (list, tuple)) else setting


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return mixed_text(value) or "none"
    if isinstance(value, (list, tuple)):
        return "/".join(_plain(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: float, dimension: str) -> str:
    return f"{value:.4g}" if dimension == "count" else format_quantity(value, dimension, 4)
