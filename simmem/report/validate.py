"""Run a ladder of plans here, measured against predicted: calibrate, write down, run, judge, record."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simmem.errors import CalibrationError, MachineError, SpecError
from simmem.planner.candidate import Candidate
from simmem.planner.question import ask
from simmem.report.baselines import time_today
from simmem.report.calibration import calibrate_device, raw_path
from simmem.report.controls import Controls
from simmem.report.files import write_text
from simmem.runtime.execute.drive import settle
from simmem.runtime.execute.layout import layout_of
from simmem.runtime.execute.rounds import (
    LEAST_ROUNDS,
    NO_TIME,
    Repeats,
    Rounds,
    run_rounds,
    write_files,
    write_random,
)
from simmem.runtime.execute.session import How, open_session
from simmem.runtime.execute.task import Task, task_of
from simmem.runtime.models import require
from simmem.runtime.probe.calibrate import Asked
from simmem.sim.timeline import Timeline
from simmem.spec.device import load_device
from simmem.validation.ladder import POLICIES, Cell, Step, cells, climb, rungs
from simmem.validation.runs import RunRow, demanded_bytes, run_row
from simmem.validation.verdict import LadderRow, Validation, judge, step_ratios

__all__ = ["FULL", "QUICK", "Ladder", "Length", "validate_machine"]

PROVISIONAL, PREFERRED = "cloud-vm", "bf16"
"""What a weight file is laid out for before the machine is known; another is written where that is wrong."""
CALIBRATION_BYTES = {True: 1 << 30, False: 2 << 30}
"""Of the weight file at least, where the drive is calibrated on it. [B]"""
SETTLING_S = {True: 20.0, False: 90.0}
"""A drive is waited for after writing at most so long. [s]"""
OPENING_S = 0.4
"""Beside reading what stays: a session's memory, threads and image. [s]"""


@dataclass(frozen=True)
class Length:
    """How much of a ladder is run, and for how long."""

    total_s: float
    calibration_s: float
    baselines_s: float
    """Kept for what users run today. [s]"""
    pass_s: float
    """About what one pass over the tokens of a plan takes. [s]"""
    tokens: tuple[int, int]
    """Tokens of a pass, at least and at most."""
    models: tuple[str, ...]
    shares: tuple[float, ...]
    """Budgets as shares of the weights."""


QUICK = Length(280.0, 75.0, 25.0, 0.8, (4, 24), ("smollm2-135m", "opt-125m"), (0.75, 1.0))
FULL = Length(1700.0, 240.0, 150.0, 2.5, (6, 48), ("smollm2-135m", "opt-1.3b"), (0.5, 0.75, 1.0))


@dataclass(frozen=True)
class Ladder:
    """What a user asks of a validation."""

    quick: bool = False
    device: str | None = None
    """A device file to predict with; None: calibrate first."""
    models: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()
    weights: str | None = None
    trace: str | None = None
    emulate: str | None = "iphone15"
    """Whose storage is emulated; None for none."""
    scratch: Path | None = None
    threads: int | None = None
    total_s: float | None = None
    record: Path | None = None
    baselines: bool = True
    prompt: int = 128
    new_tokens: int = 64

    @property
    def length(self) -> Length:
        return QUICK if self.quick else FULL


@dataclass(frozen=True)
class _Plan:
    step: Step
    task: Task
    predicted: list[Timeline]


def validate_machine(asked: Ladder) -> Validation:
    """Calibrate, predict, run and judge.

    Raises
    ------
    SpecError
        Something asked for cannot be.
    MachineError
        The machine failed, or no plan could be run.
    """
    require("torch")
    begun = time.monotonic()
    end_s = begun + (asked.total_s or asked.length.total_s) - (asked.length.baselines_s if asked.baselines else 0.0)
    if asked.record is not None:
        _check_record(asked.record)
    if asked.scratch is not None and not asked.scratch.is_dir():
        raise SpecError("is not a folder", file=str(asked.scratch), key="--scratch")
    with tempfile.TemporaryDirectory(prefix="simmem-validate-", dir=asked.scratch) as name:
        folder = Path(name)
        kept = folder if asked.record is None else asked.record
        kept.mkdir(parents=True, exist_ok=True)
        # Written first of all: a drive is not itself while it is still busy with what was written.
        file = _write_weights(asked, folder)
        waited_s = settle(file, SETTLING_S[asked.quick], _say)
        device = asked.device or _calibrate(asked, kept, folder, file)
        left_out: dict[str, str] = {}
        plans = _plans(asked, device, left_out, end_s)
        if not plans:
            raise MachineError(f"no plan can be run: {next(iter(left_out.values()), 'nothing was asked for')}")
        digest = _write_predictions(plans, device, kept)
        ran = _run(asked, plans, folder, file, end_s)
        left_out.update(ran.left_out)
        rows = [_row(plan, repeats, ran.controls, plans.index(plan)) for plan, repeats in ran.whole]
        samples = _samples(plans, ran.repeats, ran.controls)
        broken = sum(r.stopped not in (None, NO_TIME) for r in ran.repeats)
        summary, by_storage, verdicts, gates = judge(rows, broken=broken)
        result = Validation(
            mode="quick" if asked.quick else "full", device=load_device(device).name,
            date=datetime.datetime.now(datetime.UTC).date().isoformat(), took_s=time.monotonic() - begun,
            predictions_sha256=digest, rows=rows, summary=summary, by_storage=by_storage, cells=verdicts,
            steps=step_ratios(rows), gates=gates, baselines=[], left_out=left_out,
            conditions={"rounds": len(ran.whole[0][1].runs), "load_before": ran.load_before,
                        "calibrated": asked.device is None, "drive_settled_after_s": waited_s})
        if asked.record is not None:  # what users run today may take long, and be interrupted
            _write_result(asked.record, result)
        if asked.baselines:
            today = time_today(ran.resident, rows, folder, left_out, samples, threads=asked.threads)
            result = result.model_copy(update={"baselines": today, "left_out": left_out,
                                               "took_s": time.monotonic() - begun})
            if asked.record is not None:
                _write_samples(asked.record, samples)
                _write_result(asked.record, result)
        return result


@dataclass(frozen=True)
class _Ran:
    """What running the plans brought."""

    repeats: list[Repeats]
    whole: list[tuple[_Plan, Repeats]]
    """Those that were run in every round."""
    left_out: dict[str, str]
    resident: list[tuple[Candidate, Task, Path | None]]
    """Plans without reads, and their weight files."""
    controls: Controls
    load_before: float


def _run(asked: Ladder, plans: Sequence[_Plan], folder: Path, file: Path, end_s: float) -> _Ran:
    """Run all plans in rounds, with controls right before and after each run."""
    ready = write_files([(p.task, How(storage=p.step.cell.storage, threads=asked.threads, say=_say)) for p in plans],
                        folder)
    read = next((how.file for _, how in ready if how.file is not None), file)
    if read != file:  # laid out otherwise than was thought before the machine was known
        settle(read, SETTLING_S[asked.quick], _say)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else -1.0
    controls = Controls([(p.task, p.step.cell.storage == "real") for p in plans], read, threads=asked.threads)

    def begin(number: int) -> None:
        _say(f"round {number + 1}: {len(plans)} plans, {max(end_s - time.monotonic(), 0):.0f} s left")

    def keep(so_far: Sequence[Repeats]) -> None:
        if asked.record is not None:
            _write_samples(asked.record, _samples(plans, so_far, controls))

    found = run_rounds(ready, Rounds(budget_s=end_s - time.monotonic(), extra=[p.step.extra for p in plans],
                                     before=begin, beside=controls.look,
                                     between=controls.between, after=keep))
    left_out = {p.step.id: r.stopped for p, r in zip(plans, found, strict=True) if r.stopped is not None}
    whole = [(p, r) for p, r in zip(plans, found, strict=True) if r.stopped is None]
    if not whole:
        raise MachineError(f"no plan could be run: {next(iter(left_out.values()))}")
    resident = [(p.step.candidate, p.task, how.file) for p, (_, how) in zip(plans, ready, strict=True)
                if p.step.candidate.policy.name == "resident"]
    return _Ran(found, whole, left_out, resident, controls, load)


# --- before -----------------------------------------------------------------------------------------


def _check_record(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpecError("is there already and is not overwritten; name a new folder", file=str(folder), key="--record")


def _write_weights(asked: Ladder, folder: Path) -> Path:
    """The file of random weights that every plan finds its own in."""
    least = CALIBRATION_BYTES[asked.quick] if asked.device is None else 0
    tasks = []
    for model in asked.models or asked.length.models:
        context = ask(asked.device or PROVISIONAL, model, prompt=asked.prompt, new_tokens=asked.new_tokens,
                      weights=asked.weights or PREFERRED, kv=asked.weights or PREFERRED, trace=asked.trace,
                      policy=POLICIES).context(asked.weights or PREFERRED)
        tasks += [layout_of(context, by_neuron=False)]
        if context.trace is not None:
            tasks += [layout_of(context, by_neuron=True, bundled=bundled) for bundled in (False, True)]
    largest = max(tasks, key=lambda layout: layout.n_bytes)
    return write_random(largest, folder, at_least_bytes=least, say=_say)


def _calibrate(asked: Ladder, kept: Path, folder: Path, file: Path) -> str:
    """The device file of this machine, its drive measured on the file that the plans read."""
    seconds = min(asked.length.calibration_s, (asked.total_s or asked.length.total_s) / 4)
    _say(f"calibrating for {seconds:.0f} s")
    out = kept / "here.toml"
    try:
        calibrate_device(out, Asked(quick=asked.quick, budget_s=seconds, scratch=folder, file=file, device="cpu",
                                    threads=asked.threads, dtypes=(asked.weights or PREFERRED,)))
    except CalibrationError as error:
        if asked.record is None:
            error.message = error.message.replace(f" (raw samples are in {raw_path(out)})",
                                                  " (--record DIR keeps the raw samples)")
        raise
    return str(out)


def _plans(asked: Ladder, device: str, left_out: dict[str, str], end_s: float) -> list[_Plan]:
    """The plans that are run, with what is expected of each."""
    found = []
    for cell in _cells(asked, device):
        climbed = climb(cell, rungs(quick=asked.quick, emulated=cell.storage == "emulated"))
        left_out.update(climbed.left_out)
        found += [_plan(asked.length, step) for step in climbed.steps]
    found = _emulable(found, asked.threads, left_out)
    return _in_time(found, end_s - time.monotonic(), left_out)


def _cells(asked: Ladder, device: str) -> list[Cell]:
    weights = asked.weights
    if weights is None:
        here = load_device(device)
        agents = [a for a in here.agent.values() if a.memory == here.host]
        weights = "bf16" if any(a.computes_as("bf16") for a in agents) else "fp32"
    emulate = None if asked.emulate is None else load_device(asked.emulate)
    shares = asked.shares or asked.length.shares
    return [cell for model in asked.models or asked.length.models
            for cell in cells(device, model, shares, weights=weights, prompt=asked.prompt,
                              new_tokens=asked.new_tokens, trace=asked.trace, emulate=emulate)]


def _plan(length: Length, step: Step) -> _Plan:
    least, most = length.tokens
    task = task_of(step.candidate, int(np.clip(length.pass_s / step.expected_s, least, most)))
    return _Plan(step, task, task.predicted())


def _emulable(plans: list[_Plan], threads: int | None, left_out: dict[str, str]) -> list[_Plan]:
    """The plans without those of cells whose storage this machine is too slow to emulate."""
    refused: dict[str, str] = {}
    tried: set[str] = set()
    for plan in plans:
        cell = plan.step.cell
        if cell.storage == "emulated" and cell.name not in tried:
            tried.add(cell.name)
            try:
                with open_session(plan.task, How(storage="emulated", threads=threads)):
                    pass
            except MachineError as error:
                refused[cell.name] = str(error)
    left_out.update({p.step.id: refused[p.step.cell.name] for p in plans if p.step.cell.name in refused})
    return [p for p in plans if p.step.cell.name not in refused]


def _in_time(plans: list[_Plan], left_s: float, left_out: dict[str, str]) -> list[_Plan]:
    """The plans that can be run often enough in the time there is: the longest extra ones go first."""
    def seconds(plan: _Plan) -> float:
        context = plan.step.candidate.context
        held = plan.step.candidate.used_bytes()[context.device.host]
        return (plan.task.n_tokens + plan.task.lead) * plan.step.expected_s + OPENING_S \
            + held / context.storage_link[1].rate.value

    cost = {p.step.id: LEAST_ROUNDS * seconds(p) for p in plans}
    for plan in sorted((p for p in plans if p.step.extra), key=lambda p: -cost[p.step.id]):
        if sum(cost.values()) <= left_s:
            break
        del cost[plan.step.id]
        left_out[plan.step.id] = "no time for it"
    return [p for p in plans if p.step.id in cost]


def _write_predictions(plans: Sequence[_Plan], device: str, folder: Path) -> str:
    """Write down what is expected of every plan, before any is run; returns the file's SHA-256."""
    rows = []
    for plan in plans:
        link = plan.step.candidate.context.storage_link[1]
        block = link.block.value if link.block else 1.0
        moved = np.array([[demanded_bytes(t.schedule, block) for t in plan.predicted]])
        row = run_row(plan.step.id, plan.step.candidate, plan.predicted, [plan.predicted], moved,
                      plan.step.cell.storage)
        rows.append({"id": row.id, "policy": row.policy, "knobs": row.knobs, "tokens": row.tokens,
                     "predicted_s": row.predicted_s, "interval_s": row.interval_s, "bytes": row.bytes.predicted,
                     "token_s": [t.token_s for t in plan.predicted],
                     "phases": {p.name: p.predicted_s for p in row.phases}})
    text = json.dumps({"schema": "simmem.predictions/1", "device": load_device(device).name,
                       "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "rows": rows},
                      indent=1) + "\n"
    write_text(folder / "predictions.json", text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    _say(f"{len(plans)} predictions written down, sha256 {digest}")
    return digest


# --- after ------------------------------------------------------------------------------------------


def _row(plan: _Plan, repeats: Repeats, controls: Controls, index: int) -> LadderRow:
    conditions = repeats.conditions | controls.conditions(index, repeats)
    row: RunRow = run_row(
        plan.step.id, plan.step.candidate, plan.predicted, [r.timelines for r in repeats.runs],
        np.array([r.counted.moved_bytes for r in repeats.runs], np.float64), plan.step.cell.storage,
        conditions=conditions)
    return LadderRow(**{name: getattr(row, name) for name in RunRow.model_fields}, cell=plan.step.cell.name,
                     budget_share=plan.step.cell.share, chosen=plan.step.chosen,
                     error_beside=controls.error(index, row.predicted_s, repeats))


def _samples(plans: Sequence[_Plan], found: Sequence[Repeats], controls: Controls) -> dict[str, Any]:
    return {p.step.id: [r.token_s.tolist() for r in repeats.runs] for p, repeats in zip(plans, found, strict=True)
            } | {"controls": {p.step.id: controls.raw(index) for index, p in enumerate(plans)}}


def _write_samples(folder: Path, samples: Mapping[str, Any]) -> None:
    """Raw samples, after every round: what ends a run later does not take them along."""
    write_text(folder / "samples.json", json.dumps({
        "unit": "s, one list of tokens a round; controls before and after each, and behind tokens", **samples}) + "\n")


def _write_result(folder: Path, result: Validation) -> None:
    write_text(folder / "validate.json", result.model_dump_json(by_alias=True, indent=1) + "\n")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
