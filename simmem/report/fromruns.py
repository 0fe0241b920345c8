"""What do plans that were run say of the costs they were predicted with, and what becomes of the device file?

Reads what `validate --json`, `validate --record` and `run --json` write, which may come from anywhere: sizes, lengths
and numbers are bounded before anything is believed, and of each row only what is needed is read. The device that learns
gets another name, so that a row always says which costs it was predicted with, and none is corrected twice.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from rich.text import Text

from simmem.cost.phasefit import Learnt, PhaseTook, PhaseVerdict, RunPhases, TotalError, composed, learn_phases
from simmem.cost.phases import keeper, phase_kind
from simmem.errors import CalibrationError, SpecError
from simmem.report.costfile import cost_path, write_device
from simmem.report.devicefile import device_name, tables_of, to_device
from simmem.report.files import check_writable
from simmem.report.format import console, new_table, number, section, share
from simmem.spec import library
from simmem.spec.base import validate
from simmem.spec.costmodel import MAX_FILE_BYTES, FittedCost, PhaseFactor, PhaseName
from simmem.spec.device import Device, load_device
from simmem.spec.jsonfile import read_json, shown

__all__ = ["LearntDocument", "LearntPhase", "ReadRuns", "learn_from_runs", "show_learnt"]

MAX_DOCUMENT_BYTES = 16 << 20
MAX_ROWS = 1024
"""Of all documents together."""
RECORDED = "validate.json"
"""What of a folder is read, as `validate --record` names it."""
_SAME = 1e-6
"""A step of a row that differs by more of itself was not predicted with these figures."""

_Text = Annotated[str, Field(max_length=200,
                             pattern=r"^[^\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]*$")]
"""Nothing that moves the cursor or turns the direction of writing."""
_Word = Annotated[str, Field(max_length=40, pattern=r"^[a-z0-9_-]*$")]
_Seconds = Annotated[float, Field(ge=0, le=1e9)]
_Bytes = Annotated[float, Field(ge=0, le=1e18)]


# --- what is read ---------------------------------------------------------------------------------------------------


class _Read(BaseModel):
    """The keys that are needed; there are others."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class _Phase(_Read):
    name: Literal[PhaseName, "wait"]
    predicted_s: _Seconds
    measured_s: _Seconds


class _Knobs(_Read):
    agent: _Text | None = None


class _Moved(_Read):
    predicted: _Bytes
    measured: _Bytes


class _Exact(_Read):
    largest_difference: float
    tolerance: float


class _Row(_Read):
    id: _Text
    model: _Text
    device: _Text
    storage: Literal["real", "emulated"]
    policy: _Text
    knobs: _Knobs
    bytes: _Moved
    phases: Annotated[tuple[_Phase, ...], Field(max_length=16)]
    status: Literal["pass", "fail", "inconclusive"]
    why: Annotated[str, Field(max_length=1000)]
    weights: _Word
    exact: _Exact | None = None
    cell: _Text | None = None
    """Of a ladder; one plan by itself does not say its budget."""

    @property
    def digest(self) -> str:
        """Of what is read of it: the same row in another file is the same row."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


class _Ladder(_Read):
    rows: Annotated[tuple[_Row, ...], Field(max_length=MAX_ROWS)]


# --- what is said ---------------------------------------------------------------------------------------------------


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, ser_json_inf_nan="null")


class ReadRuns(_Part):
    """A document of runs."""

    file: str
    rows: int
    used: int


class LearntPhase(_Part):
    """One phase: what its rows say, and what is multiplied by what."""

    verdict: PhaseVerdict
    factor_before: float | None
    """That the rows were predicted with; None where there was none."""
    factor: float | None
    """That is written; None where there is none."""


class LearntDocument(_Part):
    """`simmem calibrate --from-runs --json`."""

    schema_: Literal["simmem.calibration-runs/1"] = Field(default="simmem.calibration-runs/1", alias="schema")
    device: str
    """That the rows were predicted with."""
    name: str | None
    """Of the device that is written."""
    out: str | None
    """Device file; None where nothing is kept, and nothing written."""
    cost_model: str | None
    runs: list[ReadRuns]
    left_out: dict[str, str]
    """Rows that are not learnt from, and why."""
    held_out_by: Literal["cell", "policy"]
    groups: list[str]
    """Held out in turn."""
    phases: list[LearntPhase]
    total: TotalError
    notes: list[str]


@dataclass(frozen=True)
class _Document:
    path: Path
    rows: tuple[_Row, ...]


def learn_from_runs(runs: Sequence[Path], base: str, out: Path) -> LearntDocument:
    """Learn what to multiply the phases of a device by, and write it as a device file with another name.

    Parameters
    ----------
    runs : documents of `validate` or `run`, or folders of `validate --record`.
    base : the device that all rows were predicted with, by name or path; it is left as it is.

    Raises
    ------
    SpecError
        A file is not what it should be, or its rows were not predicted with this device as it is.
    CalibrationError
        There is nothing to learn from, or nothing to judge it by.
    """
    path = library.resolve("device", base)
    device, tables, name = load_device(base), tables_of(path), device_name(out)
    beside = path.parent / str(tables["cost_model"]) if "cost_model" in tables else None
    files = [p / RECORDED if p.is_dir() else p for p in runs]
    check_writable(out, inputs=(path, *files), suffix=".toml")
    check_writable(cost_path(out), inputs=(path, *files, *([beside] if beside else [])))
    if name == device.name:
        raise SpecError(f"would be another device of the name {name!r}, and a run would not say which of the two it "
                        "was predicted with; name another file", file=str(out), key="--out")
    documents = [_read(p) for p in files]
    rows, used, left_out = _usable(documents, device)
    try:
        learnt = learn_phases([_phases_of(row, device) for row in rows])
    except CalibrationError as error:
        if left_out:
            error.message += f"; left out: {_counted(left_out)}"
        raise
    old = () if device.cost_model is None else device.cost_model.phases
    new = composed(old, learnt.factors)
    if learnt.factors:
        model = _model(device, name, new, cost_path(out))
        changed = {k: v for k, v in tables.items() if k not in ("aliases", "cost_model")} | {"name": name}
        to_device(changed, file=str(out))
        write_device(out, changed, model)
    return _document(device, out, name, documents, used, left_out, learnt, new)


# --- rows -----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> _Document:
    data = read_json(path, what="a document of runs", max_bytes=MAX_DOCUMENT_BYTES)
    match data.get("schema"):
        case "simmem.validate/1":
            return _Document(path, validate(_Ladder, data, file=str(path)).rows)
        case "simmem.run/1":
            return _Document(path, (validate(_Row, data, file=str(path)),))
        case other:
            raise SpecError(f"found {shown(other)}, expected 'simmem.validate/1' or 'simmem.run/1'", file=str(path),
                            key="schema")


def _usable(documents: Sequence[_Document], device: Device
            ) -> tuple[list[_Row], dict[str, int], dict[str, str]]:
    """The rows to learn from, how many each file gave, and why others are left out.

    Raises SpecError where a row is of another device, or was spent before.
    """
    total = sum(len(d.rows) for d in documents)
    if total > MAX_ROWS:
        raise SpecError(f"found {total} rows, at most {MAX_ROWS} are learnt from at once", key="--from-runs")
    old = device.cost_model.phases if device.cost_model else ()
    spent = {entry.split(" ", 1)[0] for phase in old for entry in phase.spent}
    found: list[_Row] = []
    used: dict[str, int] = {}
    left_out: dict[str, str] = {}
    seen: dict[str, Path] = {}
    for document in documents:
        for row in document.rows:
            if row.digest in seen:
                raise SpecError(f"the row {row.id!r} is in {seen[row.digest]} too, and a row is learnt from once",
                                file=str(document.path))
            seen[row.digest] = document.path
            _check_device(row, device, document.path)
            if row.digest in spent:
                raise SpecError(f"the row {row.id!r} was spent on {device.name} before", file=str(document.path))
            why = _unusable(row, device)
            if why is not None:
                left_out[row.id if row.id not in left_out else f"{row.id} ({row.digest})"] = why
            else:
                found.append(row)
                used[str(document.path)] = used.get(str(document.path), 0) + 1
    return found, used, left_out


def _check_device(row: _Row, device: Device, file: Path) -> None:
    """Was a row predicted with this device as it is? Its name says so, and the constant of its steps."""
    named = row.device == device.name or (row.storage == "emulated" and row.device.startswith(f"{device.name}+"))
    if not named:
        raise SpecError(f"the row {row.id!r} was predicted with {row.device!r}, expected {device.name!r}",
                        file=str(file), key="device")
    agent = _agent(row, device)
    if agent is None:
        return
    figure = device.agent[agent].step_overhead
    model = device.cost_model
    known = next((p.factor for p in (model.phases if model else ()) if (p.phase, p.agent) == ("step", agent)), 1.0)
    expected = 0.0 if figure is None else figure.value * known
    step = next((p.predicted_s for p in row.phases if p.name == "step"), 0.0)
    if not math.isclose(step, expected, rel_tol=_SAME):
        raise SpecError(f"the row {row.id!r} was predicted with {step:.6g} s for the constant of a step, and "
                        f"{device.name} says {expected:.6g} s: its figures were others then", file=str(file),
                        key="device")


def _agent(row: _Row, device: Device) -> str | None:
    """The agent that computes; None where neither the row nor the device says which."""
    if row.knobs.agent is not None:
        return row.knobs.agent if row.knobs.agent in device.agent else None
    return next(iter(device.agent)) if len(device.agent) == 1 else None


def _unusable(row: _Row, device: Device) -> str | None:
    if row.status == "inconclusive":
        return "inconclusive"
    if row.bytes.predicted != row.bytes.measured or "bytes" in row.why:
        return "it moved other bytes than the plan says"
    if row.exact is not None and not row.exact.largest_difference <= row.exact.tolerance:
        return "its logits are not those of the network"
    if _agent(row, device) is None:
        return "it does not say which agent of the device computes"
    return None


def _phases_of(row: _Row, device: Device) -> RunPhases:
    """A row as it is learnt from: without waiting, a consequence of the rest; emulated reads are no drive's."""
    agent = str(_agent(row, device))
    took = []
    for phase in row.phases:
        if phase.name == "wait":
            continue
        emulated = phase.name == "flash" and row.storage == "emulated"
        took.append(PhaseTook(None if emulated else phase_kind(phase.name, row.weights, agent, keeper(device, agent)),
                              phase.predicted_s, phase.measured_s))
    return RunPhases(f"{row.digest} {row.id}"[:200], row.cell or f"{row.model}/{row.storage}", row.policy, tuple(took))


# --- the files ------------------------------------------------------------------------------------------------------


def _model(device: Device, name: str, phases: tuple[PhaseFactor, ...], path: Path) -> FittedCost:
    """The cost model of a device with these factors, as it can be read back."""
    before = device.cost_model
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    found = FittedCost(name=name, date=today, groups=before.groups if before else (),
                       left_out=before.left_out if before else {}, phases=phases)
    text = found.to_json()
    if len(text.encode()) > MAX_FILE_BYTES:
        raise SpecError(f"would be {len(text.encode())} bytes long with all rows that were spent, and {MAX_FILE_BYTES} "
                        "can be read back; learn from fewer", file=str(path))
    return validate(FittedCost, json.loads(text), file=str(path))


def _document(device: Device, out: Path, name: str, documents: Sequence[_Document], used: dict[str, int],
              left_out: dict[str, str], learnt: Learnt, new: tuple[PhaseFactor, ...]) -> LearntDocument:
    old = device.cost_model.phases if device.cost_model else ()
    before, after = ({(p.phase, p.dtype, p.agent): p.factor for p in all_} for all_ in (old, new))
    phases = [LearntPhase(verdict=v, factor_before=before.get((v.phase, v.dtype, v.agent)),
                          factor=after.get((v.phase, v.dtype, v.agent))) for v in learnt.verdicts]
    notes = [f"{_named(p.verdict)}: the rows were predicted with a factor of {number(p.factor_before)}, which is now "
             f"{number(p.factor_before)} × {number(p.verdict.learnt)} = {number(p.factor)}"
             for p in phases if p.factor_before is not None and p.factor is not None and p.verdict.kept]
    if any(v.kept and v.learnt < 1 for v in learnt.verdicts):
        notes.append("no factor makes anything faster than the full rates: below 1, times may fall by less")
    if not learnt.factors:
        notes.append("nothing is kept, so no file is written")
    wrote = bool(learnt.factors)
    return LearntDocument(
        device=device.name, name=name if wrote else None, out=str(out) if wrote else None,
        cost_model=str(cost_path(out)) if wrote else None,
        runs=[ReadRuns(file=str(d.path), rows=len(d.rows), used=used.get(str(d.path), 0)) for d in documents],
        left_out=left_out, held_out_by=learnt.held_out_by, groups=list(learnt.groups), phases=phases,
        total=learnt.total, notes=notes)


def _named(phase: PhaseFactor | PhaseVerdict) -> str:
    return " ".join(part for part in (phase.phase, phase.dtype, phase.agent) if part)


def _counted(left_out: dict[str, str]) -> str:
    return ", ".join(f"{n} × {why}" for why, n in Counter(left_out.values()).most_common())


# --- as it is shown -------------------------------------------------------------------------------------------------


def show_learnt(found: LearntDocument, *, as_json: bool) -> None:
    """Print one JSON document, or what a person wants to know."""
    if as_json:
        print(found.model_dump_json(by_alias=True, indent=2))
        return
    out = console()
    rows, used = sum(r.rows for r in found.runs), sum(r.used for r in found.runs)
    out.print(Text(f"{used} of {rows} rows, predicted with {found.device}", style="bold"))
    if found.left_out:
        out.print(Text(f"Left out: {_counted(found.left_out)}."))
    out.print()
    table = new_table("phase", "rows", "measured / predicted", "error", "held out", "kept")
    for phase in found.phases:
        v = phase.verdict
        ends = "" if v.range_90 is None else f" ({number(v.range_90[0], 3)} to {number(v.range_90[1], 3)})"
        table.add_row(_named(v), number(v.rows), f"{number(v.learnt, 3)}{ends}",
                      "-" if v.error_before is None else share(v.error_before),
                      "-" if v.error_after is None else share(v.error_after), "yes" if v.kept else "no",
                      style=None if v.kept else "dim")
    section(out, f"Each {found.held_out_by} of {len(found.groups)} held out in turn", table)
    for phase in found.phases:
        if not phase.verdict.kept:
            out.print(Text(f"{_named(phase.verdict)} is not kept: {phase.verdict.why}."))
    out.print(Text(f"Sum of the phases of held-out rows: off by {share(found.total.before)} before, "
                   f"{share(found.total.after)} after (mean)."))
    for note in found.notes:
        out.print(Text(f"{note[0].upper()}{note[1:]}."))
    if found.out is not None:
        out.print(Text(f"device file {found.out}, cost model {found.cost_model}", style="dim"), soft_wrap=True)
