"""What did an earlier search find, and what is different now? Baselines written, read back and compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simmem import __version__
from simmem.errors import SpecError
from simmem.planner.grid.cells import CellOutcome, contents_of
from simmem.planner.grid.document import Baseline, BaselineCell, ChangedInput, InputFile
from simmem.planner.grid.spec import Cell
from simmem.spec.base import validate
from simmem.spec.device import load_device
from simmem.spec.jsonfile import read_json
from simmem.units import format_quantity

__all__ = ["baseline_of", "changed_inputs", "partners", "read_baseline", "search_inputs"]

MAX_BASELINE_BYTES = 256 << 20
MOST_CHANGES = 8
"""Figures of one file that are named; the others are counted."""

Answered = Sequence[tuple[Cell, CellOutcome]]


def search_inputs(answered: Answered) -> list[InputFile]:
    """Devices, models and traces that cells rest on, each once, sorted."""
    found: dict[tuple[str, str], InputFile] = {}
    for cell, outcome in answered:
        files = [("device", cell.question.device, outcome.device_digest),
                 ("model", cell.question.model, outcome.model_digest)]
        if cell.question.draft is not None:
            files.append(("model", cell.question.draft, outcome.draft_digest))
        if outcome.plan is not None and outcome.plan.trace is not None:
            files.append(("trace", _trace_name(outcome), outcome.plan.trace.digest))
        for what, name, digest in files:
            found[what, name] = InputFile.model_validate({"what": what, "name": name, "digest": digest})
    return [found[key] for key in sorted(found)]


def _trace_name(outcome: CellOutcome) -> str:
    """A synthetic trace is drawn in the shape of each model, at its precision, so it is several."""
    plan = outcome.plan
    assert plan is not None and plan.trace is not None
    return f"{plan.trace.name} for {plan.model}, {plan.workload.batch} at once"


def baseline_of(answered: Answered, folder: Path) -> Baseline:
    """Everything that a later search is compared with."""
    inputs = search_inputs(answered)
    contents = {f"{one.what} {one.name}": contents_of(one.what, one.name, str(folder.resolve()))
                for one in inputs if one.what != "trace"}
    found = Baseline(simmem=__version__, inputs=inputs, contents=contents, cells=[_cell(*one) for one in answered])
    return found.model_copy(update={"digest": _digest(found.model_dump(mode="json", by_alias=True))})


def _cell(cell: Cell, outcome: CellOutcome) -> BaselineCell:
    plan = outcome.plan
    return BaselineCell(
        id=cell.id, place=cell.place, question=cell.question, feasible=plan is not None,
        policy=plan.policy.name if plan else None, knobs=plan.policy.knobs if plan else {},
        weights=plan.workload.label if plan else None, bound=plan.bound if plan else None,
        trace=plan.trace.digest if plan and plan.trace else None, figures=outcome.figures)


def _digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of a baseline without its own digest."""
    return hashlib.sha256(json.dumps({k: v for k, v in data.items() if k != "digest"}, sort_keys=True).encode()
                          ).hexdigest()


def read_baseline(path: Path) -> Baseline:
    """A baseline from a file. Raises SpecError where it is none, of another schema, or not as it was written."""
    data = read_json(path, what="a baseline", max_bytes=MAX_BASELINE_BYTES)
    if data.get("schema") != "simmem.search-baseline/1":
        raise SpecError(f"found {data.get('schema')!r}, expected 'simmem.search-baseline/1'; write it anew with "
                        "--save-baseline", file=str(path), key="schema")
    if data.get("digest") != _digest(data):
        raise SpecError("is not as it was written (its digest differs); write it anew with --save-baseline",
                        file=str(path), key="digest")
    return validate(Baseline, data, file=str(path))


def partners(cells: Sequence[Cell], baseline: Baseline) -> dict[str, BaselineCell]:
    """Cell → the baseline's cell it is compared with: of the same name; else of the same but for its budget.

    Budgets that were changed are found by their order, and only where as many went as came.
    """
    by_id = {one.id: one for one in baseline.cells}
    found = {cell.id: by_id[cell.id] for cell in cells if cell.id in by_id}
    now, then = {cell.id for cell in cells}, {one.id for one in baseline.cells}
    came: dict[str, list[Cell]] = {}
    went: dict[str, list[BaselineCell]] = {}
    for cell in cells:
        if cell.id not in then:
            came.setdefault(cell.place, []).append(cell)
    for one in baseline.cells:
        if one.id not in now:
            went.setdefault(one.place, []).append(one)
    for place, new in came.items():
        if len(went.get(place, [])) == len(new):
            found.update({cell.id: one for cell, one in zip(new, went[place], strict=True)})
    return found


def changed_inputs(inputs: Sequence[InputFile], baseline: Baseline, folder: Path) -> list[ChangedInput]:
    """Inputs whose digest is not the baseline's, with what they say now and said then."""
    before = {(one.what, one.name): one.digest for one in baseline.inputs}
    found = []
    for one in inputs:
        was = before.get((one.what, one.name))
        if was is None or was == one.digest:
            continue
        changes = [] if one.what == "trace" else _differences(
            baseline.contents.get(f"{one.what} {one.name}", {}),
            contents_of(one.what, one.name, str(folder.resolve())), _dimensions(one, folder))
        found.append(ChangedInput(what=one.what, name=one.name, before=was, after=one.digest, changes=changes))
    return found


def _dimensions(one: InputFile, folder: Path) -> dict[str, str]:
    """Key of a figure's value → its dimension."""
    if one.what != "device":
        return {}
    figures = load_device(one.name, relative_to=folder).figures()
    return {f"{key}.value": figure.dimension for key, figure in figures.items()}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], dimensions: Mapping[str, str]) -> list[str]:
    """In words, figures first."""
    keys = [key for key in {*before, *now} if before.get(key) != now.get(key) or (key in before) != (key in now)]
    keys.sort(key=lambda key: (not key.endswith(".value"), key))
    said = [_difference(key, before, now, dimensions) for key in keys[:MOST_CHANGES]]
    rest = len(keys) - MOST_CHANGES
    return [*said, f"and {rest} more"] if rest > 0 else said


def _difference(key: str, before: Mapping[str, Any], now: Mapping[str, Any], dimensions: Mapping[str, str]) -> str:
    name = key.removesuffix(".value")
    if key not in now:
        return f"{name} is gone"
    if key not in before:
        return f"{name} is new"
    was, new = before[key], now[key]
    numbers = isinstance(was, (int, float)) and isinstance(new, (int, float)) and not isinstance(was, bool)
    if key in dimensions and numbers:
        texts = [format_quantity(v, dimensions[key], 4) if dimensions[key] not in ("ratio", "count") else f"{v:g}"
                 for v in (was, new)]
        return f"{name} {texts[0]} → {texts[1]}"
    if isinstance(was, str) and isinstance(new, str) and max(len(was), len(new)) > 40:
        return f"{name} says something else"
    return f"{name} {was} → {new}"
