"""Run a ladder of plans here, measured against predicted: calibrate, write down, run, judge, record."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simmem.errors import MachineError, SpecError
from simmem.planner.predict import timelines
from simmem.report.calibration import calibrate_device, raw_path
from simmem.report.files import write_text
from simmem.runtime.execute.baselines import PageCache, accelerate_token_s, has_accelerate, mapped_token_s
from simmem.runtime.execute.rounds import LEAST_ROUNDS, Repeats, run_rounds, write_files
from simmem.runtime.execute.session import How, open_session
from simmem.runtime.execute.task import Task, task_of
from simmem.runtime.models import require
from simmem.runtime.probe.calibrate import Asked
from simmem.sim.timeline import Timeline
from simmem.spec.device import load_device
from simmem.validation.ladder import Cell, Step, cells, climb, rungs
from simmem.validation.runs import Measured, RunRow, demanded_bytes, noise_floor, run_row
from simmem.validation.verdict import BaselineRow, LadderRow, Validation, judge, step_ratios

__all__ = ["FULL", "QUICK", "Ladder", "Length", "validate_machine"]

WRITE_TIMES_READ = 2.0
"""Writing a weight file, taken as so many times reading it: random numbers, checksums, a drive slower at writing."""
BASELINE_TOKENS, BASELINE_S = 6, 8.0
"""Tokens of a round at most, and about the time that loading all weights for them may take. [s]"""
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
        The machine failed, or a plan could not be run.
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
        device = asked.device or _calibrate(asked, folder)
        left_out: dict[str, str] = {}
        plans = _plans(asked, device, left_out, end_s)
        kept = folder if asked.record is None else asked.record
        digest = _write_predictions(plans, device, kept)
        ready = write_files([(p.task, How(storage=p.step.cell.storage, threads=asked.threads, say=_say))
                             for p in plans], folder)
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else -1.0
        repeats = run_rounds(ready, budget_s=end_s - time.monotonic(), told=_progress)
        rows = [_row(plan, repeat) for plan, repeat in zip(plans, repeats, strict=True)]
        samples: dict[str, Any] = {p.step.id: [r.token_s.tolist() for r in repeat.runs]
                                   for p, repeat in zip(plans, repeats, strict=True)}
        baselines = _baselines(asked, plans, ready, rows, folder, left_out, samples) if asked.baselines else []
        whole, by_storage, verdicts, gates = judge(rows)
        found = Validation(
            mode="quick" if asked.quick else "full", device=load_device(device).name,
            date=datetime.datetime.now(datetime.UTC).date().isoformat(), took_s=time.monotonic() - begun,
            predictions_sha256=digest, rows=rows, summary=whole, by_storage=by_storage, cells=verdicts,
            steps=step_ratios(rows), gates=gates, baselines=baselines, left_out=left_out,
            conditions={"rounds": len(repeats[0].runs), "load_before": load, "calibrated": asked.device is None})
        if asked.record is not None:
            _record(asked.record, found, Path(device) if asked.device is None else None, samples)
        return found


# --- before -----------------------------------------------------------------------------------------


def _check_record(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpecError("is there already and is not overwritten; name a new folder", file=str(folder), key="--record")


def _calibrate(asked: Ladder, folder: Path) -> str:
    """The device file of this machine."""
    seconds = min(asked.length.calibration_s, (asked.total_s or asked.length.total_s) / 4)
    _say(f"calibrating for {seconds:.0f} s")
    out = folder / "here.toml"
    calibrate_device(out, Asked(quick=asked.quick, budget_s=seconds, scratch=folder, threads=asked.threads,
                                device="cpu"))
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
    return _Plan(step, task, timelines(step.candidate, task.rows))


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

    files = {(p.task.layout.model, p.task.layout.parts, p.task.layout.bundled):
             p.task.layout.n_bytes / p.step.candidate.context.storage_link[1].rate.value for p in plans
             if p.step.cell.storage == "real"}
    left_s -= WRITE_TIMES_READ * sum(files.values())
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
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "predictions.json", text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    _say(f"{len(plans)} predictions written down, sha256 {digest}")
    return digest


# --- after ------------------------------------------------------------------------------------------


def _row(plan: _Plan, repeats: Repeats) -> LadderRow:
    row: RunRow = run_row(
        plan.step.id, plan.step.candidate, plan.predicted, [r.timelines for r in repeats.runs],
        np.array([r.counted.moved_bytes for r in repeats.runs], np.float64), plan.step.cell.storage,
        conditions=repeats.conditions)
    return LadderRow(**{name: getattr(row, name) for name in RunRow.model_fields}, cell=plan.step.cell.name,
                     budget_share=plan.step.cell.share, chosen=plan.step.chosen)


def _baselines(asked: Ladder, plans: Sequence[_Plan], ready: Sequence[tuple[Task, How]], rows: Sequence[LadderRow],
               folder: Path, left_out: dict[str, str], samples: dict[str, Any]) -> list[BaselineRow]:
    """What users run today, for every model; adds its raw samples."""
    found: list[BaselineRow] = []
    dense = {p.task.layout.model: (p, how.file) for p, (_, how) in zip(plans, ready, strict=True)
             if p.step.candidate.policy.name == "resident"}
    for model, (plan, file) in dense.items():
        mine = [r for r in rows if r.model == model and r.storage == "real" and r.budget_share < 1]
        fastest = min((r.measured_s.median for r in mine), default=None)
        context = plan.step.candidate.context
        loading_s = context.total_bytes / context.storage_link[1].rate.value
        n = int(np.clip(BASELINE_S / loading_s, 1, BASELINE_TOKENS))
        for what in ("mapped", "accelerate-disk"):
            if what == "accelerate-disk" and not has_accelerate():
                left_out[f"{model}/{what}"] = "accelerate is not installed"
                continue
            for cache in ("kept", "dropped"):
                name = f"{model}/{what}/{cache}"
                _say(f"running {name}")
                runs = []
                try:
                    for number in range(LEAST_ROUNDS if what == "mapped" else 1):
                        if what == "mapped":
                            assert file is not None
                            task = task_of(plan.step.candidate, n)
                            runs.append(mapped_token_s(task, file, cache, threads=asked.threads))
                        else:
                            with tempfile.TemporaryDirectory(dir=folder) as offloaded:
                                runs += np.array_split(accelerate_token_s(
                                    context.model, context.workload.weights, Path(offloaded), cache,
                                    context=round(context.workload.mean_decode_context),
                                    n_tokens=LEAST_ROUNDS * -(-n // 2), threads=asked.threads),
                                    LEAST_ROUNDS)
                        del number
                except SpecError as error:
                    left_out[name] = str(error)
                    continue
                samples[name] = [r.tolist() for r in runs]
                found.append(_baseline(name, model, context.workload.weights, what, cache, runs, fastest))
    return found


def _baseline(name: str, model: str, weights: str, what: str, cache: PageCache, runs: Sequence[np.ndarray[Any, Any]],
              fastest: float | None) -> BaselineRow:
    every = np.concatenate(runs)
    medians = [float(np.median(r)) for r in runs]
    middle = float(np.median(medians))
    return BaselineRow(
        id=name, model=model, weights=weights, what=what, page_cache=cache, noise_floor=noise_floor(medians),
        measured_s=Measured(median=middle, p10=float(np.quantile(every, 0.1)), p90=float(np.quantile(every, 0.9)),
                            n=len(every)),
        times_fastest=None if fastest is None else middle / fastest)


def _record(folder: Path, found: Validation, device: Path | None, samples: Mapping[str, Any]) -> None:
    """Keep the document, the raw samples and what was calibrated; the predictions lie there already."""
    write_text(folder / "validate.json", found.model_dump_json(by_alias=True, indent=1) + "\n")
    write_text(folder / "samples.json", json.dumps({"unit": "s, one list of tokens a round", **samples}) + "\n")
    for path in _calibrated(device):
        write_text(folder / path.name, path.read_text(encoding="utf-8"))


def _calibrated(device: Path | None) -> Iterable[Path]:
    return () if device is None else (device, raw_path(device))


def _progress(number: int, done: int, n: int) -> None:
    if done == 0:
        _say(f"round {number + 1}: {n} plans")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
