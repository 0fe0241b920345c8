"""How far are predictions from published results? Rows from a TOML file, judged by their tolerance.

A row that a figure was taken from, or whose quantity follows from the statistics a trace was
fitted to, is an anchor: shown, never counted. One bad row does not stop the others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

from simmem.errors import InfeasiblePlanError, SimmemError, SpecError
from simmem.planner.api import answer
from simmem.planner.document import Plan
from simmem.planner.question import ask
from simmem.spec import library
from simmem.spec.base import Frozen, load_toml, validate

__all__ = ["ReferenceRow", "Reproduction", "RowResult", "Summary", "reproduce", "summary_of"]

Status = Literal["pass", "fail", "anchor", "xfail", "xpass", "excluded", "infeasible", "error"]
FAILING = ("fail", "xpass", "infeasible", "error")
MAX_ROWS = 10_000


class _Workload(Frozen):
    prompt_tokens: int = 128
    new_tokens: int = 256
    batch: int = 1
    weights: str | dict[str, str] | None = None
    kv: str = "fp16"
    draft: str | None = None
    acceptance: float | None = None
    """With a draft model; how many tokens it drafts is the knob `draft_length`."""


class _Budget(Frozen):
    dram: str | None = None
    vram: str | None = None


class ReferenceRow(Frozen):
    """One published figure, the configuration it belongs to, and how it is to be judged."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9._/-]*$", max_length=120)
    system: str = Field(min_length=1)
    device: str = ""
    model: str = ""
    policy: str | None = None
    knobs: dict[str, Any] = Field(default_factory=dict)
    workload: _Workload = _Workload()
    budget: _Budget = _Budget()
    trace: str | None = None
    quantity: str | dict[str, tuple[str, ...]]
    """A path into the plan; or of rows before it: the ratio of two, or the mean of some."""
    published: PositiveFloat
    unit: str
    tolerance: float = Field(gt=0, le=10)
    interval: str | None = None
    """Path to a [low, high] of the plan: the row passes when the published figure lies inside it."""
    expect: Literal["judged", "anchor", "xfail", "excluded"] = "judged"
    reason: str | None = None
    source: str = Field(min_length=4)

    @model_validator(mode="after")
    def _complete(self) -> ReferenceRow:
        if self.expect != "judged" and not self.reason:
            raise ValueError(f"expect = {self.expect!r} needs a reason")
        if isinstance(self.quantity, str) and not (self.device and self.model):
            raise ValueError("a row needs a device and a model")
        if self.knobs and self.policy is None:
            raise ValueError("knobs belong to a policy: name it")
        if isinstance(self.quantity, dict):
            counts = {what: len(names) for what, names in self.quantity.items()}
            if counts != {"ratio": 2} and not (set(counts) == {"mean"} and counts["mean"] > 1):
                raise ValueError("expected a path into the plan, { ratio = [two rows] } or { mean = [two or more] }")
        return self


class RowResult(BaseModel):
    """A row and what came of it."""

    model_config = ConfigDict(extra="forbid")

    id: str
    system: str
    device: str
    model: str
    policy: str | None
    knobs: dict[str, Any]
    workload: dict[str, Any]
    budget: dict[str, Any]
    trace: str | None
    quantity: Any
    published: float | None
    unit: str
    tolerance: float | None
    expect: str
    reason: str | None
    source: str
    interval: str | None
    predicted: float | None
    predicted_interval: tuple[float, float] | None
    error: float | None
    status: Status
    message: str | None
    """Why a row is infeasible or an error."""


class Summary(BaseModel):
    """Over |error| of judged rows (those judged by an interval have no error that counts)."""

    n: int
    mape: float | None
    median: float | None
    max: float | None


class Reproduction(BaseModel):
    """`reproduce --json`."""

    model_config = ConfigDict(populate_by_name=True)

    schema_: Literal["simmem.reproduce/1"] = Field(default="simmem.reproduce/1", alias="schema")
    rows: list[RowResult]
    summary: Summary

    @property
    def failed(self) -> list[RowResult]:
        return [r for r in self.rows if r.status in FAILING]


def reproduce(names: Iterable[str] = (), files: Iterable[Path] = ()) -> Reproduction:
    """Evaluate built-in reference sets by name and rows of the user's files; all built-in ones when neither.

    Raises SpecError for a file that is no reference file at all.
    """
    names, files = list(names), list(files)
    if not names and not files:
        names = library.names("reference")
    paths = [library.resolve("reference", n) for n in names] + files
    results: list[RowResult] = []
    plans: dict[str, Plan | SimmemError] = {}
    values: dict[str, float] = {}
    for path in paths:
        results.extend([_judge(raw, path, plans, values) for raw in _raw_rows(path)])
    seen: set[str] = set()
    for row in results:
        if row.id in seen:
            raise SpecError(f"the id {row.id!r} stands twice", key="row.id")
        seen.add(row.id)
    return Reproduction(rows=results, summary=summary_of(results))


def summary_of(rows: Iterable[RowResult]) -> Summary:
    """Over |error| of the judged rows among these."""
    errors = np.array([abs(r.error) for r in rows
                       if r.expect == "judged" and r.error is not None and r.interval is None])
    return Summary(n=len(errors), mape=float(errors.mean()) if len(errors) else None,
                   median=float(np.median(errors)) if len(errors) else None,
                   max=float(errors.max()) if len(errors) else None)


def _raw_rows(path: Path) -> list[Any]:
    data = load_toml(path)
    if data.get("schema") != "simmem.reference/1":
        raise SpecError(f"found {data.get('schema')!r}, expected 'simmem.reference/1'", file=str(path), key="schema")
    extra = set(data) - {"schema", "row"}
    if extra:
        raise SpecError("is not a key that is known here; expected schema and row", file=str(path), key=min(extra))
    rows = data.get("row")
    if not isinstance(rows, list) or not rows:
        raise SpecError("has no [[row]]", file=str(path), key="row")
    if len(rows) > MAX_ROWS:
        raise SpecError(f"has {len(rows)} rows, at most {MAX_ROWS} are read", file=str(path), key="row")
    return rows


def _judge(raw: Any, path: Path, plans: dict[str, Plan | SimmemError], values: dict[str, float]) -> RowResult:
    try:
        row = validate(ReferenceRow, raw, file=str(path))
    except SpecError as error:
        return _result(_salvage(raw), status="error", message=str(error))
    excluded = row.expect == "excluded"  # shown all the same, judged never
    bounds: tuple[float, float] | None = None
    try:
        if isinstance(row.quantity, dict):
            ((what, names),) = row.quantity.items()
            for name in names:
                if name not in values:
                    raise SpecError(f"the {what} names the row {name!r}, which stands nowhere before it",
                                    file=str(path), key=f"{row.id}.quantity")
            if what == "ratio" and not values[names[1]]:
                raise SpecError(f"the row {names[1]!r} below the line predicts 0", file=str(path),
                                key=f"{row.id}.quantity")
            predicted = (values[names[0]] / values[names[1]] if what == "ratio"
                         else float(np.mean([values[name] for name in names])))
        else:
            plan = _plan(row, path, plans)
            predicted = _number(plan, row.quantity, path, row.id)
            if row.interval:
                bounds = _pair(_lookup(plan, row.interval, path, row.id), path, row.id)
    except SimmemError as error:
        failed: Status = "infeasible" if isinstance(error, InfeasiblePlanError) else "error"
        return _result(row, status="excluded" if excluded else failed, message=None if excluded else str(error))
    values[row.id] = predicted
    error_share = predicted / row.published - 1.0
    inside = abs(error_share) <= row.tolerance if bounds is None else bounds[0] <= row.published <= bounds[1]
    status: Status
    if row.expect in ("anchor", "excluded"):
        status = row.expect
    elif row.expect == "xfail":
        status = "xpass" if inside else "xfail"
    else:
        status = "pass" if inside else "fail"
    return _result(row, status=status, predicted=predicted, error=error_share, bounds=bounds)


def _plan(row: ReferenceRow, path: Path, plans: dict[str, Plan | SimmemError]) -> Plan:
    w = row.workload
    engine = re.sub(r"[^a-z0-9]+", "-", row.system.lower()).strip("-")
    key = json.dumps([row.device, row.model, row.policy, row.knobs, w.model_dump(), row.budget.model_dump(), row.trace,
                      engine, str(path.parent)], sort_keys=True, default=str)
    if key not in plans:
        try:
            plans[key] = answer(ask(
                row.device, row.model, dram=row.budget.dram, vram=row.budget.vram, prompt=w.prompt_tokens,
                new_tokens=w.new_tokens, batch=w.batch, weights=w.weights, kv=w.kv, trace=row.trace,
                policy=row.policy, knobs=row.knobs, engine=engine, defaults=row.policy is not None,
                draft=w.draft, acceptance=w.acceptance, relative_to=path.parent), brief=True)
        except SimmemError as error:
            plans[key] = error
    found = plans[key]
    if isinstance(found, SimmemError):
        raise found
    return found


def _lookup(plan: Plan, quantity: str, path: Path, row: str) -> Any:
    """Follow a dotted path into the plan's JSON."""
    here: Any = plan.model_dump(by_alias=True)
    for part in quantity.split("."):
        if isinstance(here, Mapping) and part in here:
            here = here[part]
        elif isinstance(here, (list, tuple)) and part.isdigit() and int(part) < len(here):
            here = here[int(part)]
        else:
            known = ", ".join(map(str, here)) if isinstance(here, Mapping) else f"{type(here).__name__}"
            raise SpecError(f"the plan has no {quantity!r}: {part!r} is not among {known}", file=str(path),
                            key=f"{row}.quantity")
    return here


def _pair(value: Any, path: Path, row: str) -> tuple[float, float]:
    if not (isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)):
        raise SpecError("leads to no pair of numbers, expected a [low, high]", file=str(path), key=f"{row}.interval")
    return float(value[0]), float(value[1])


def _number(plan: Plan, quantity: str, path: Path, row: str) -> float:
    value = _lookup(plan, quantity, path, row)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SpecError(f"{quantity!r} is {value!r}, not a number", file=str(path), key=f"{row}.quantity")
    return float(value)


def _salvage(raw: Any) -> dict[str, Any]:
    """What can be said of a row that does not validate."""
    given = raw if isinstance(raw, dict) else {}
    return {k: str(given.get(k, "")) for k in ("id", "system", "device", "model", "unit", "source", "expect")}


def _result(row: ReferenceRow | dict[str, Any], *, status: Status, predicted: float | None = None,
            error: float | None = None, bounds: tuple[float, float] | None = None, message: str | None = None
            ) -> RowResult:
    if isinstance(row, dict):
        given: dict[str, Any] = {"policy": None, "knobs": {}, "workload": {}, "budget": {}, "trace": None,
                                 "quantity": None, "published": None, "tolerance": None, "reason": None,
                                 "interval": None, **row}
    else:
        given = row.model_dump()
    return RowResult(**given, predicted=predicted, error=error, predicted_interval=bounds, status=status,
                     message=message)
