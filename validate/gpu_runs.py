"""How well are plans predicted that compute on this CUDA GPU: resident, out of host memory, off the drive, hot/cold?

    python validate/gpu_runs.py --out DIR

In ten minutes at most: calibrates host and GPU for a fifth of it, writes every prediction down
(DIR/predictions.json), then runs the plans at OPT-1.3B and OPT-6.7B shapes with random weights, in rounds. Writes
DIR/rows.json (rows as of `simmem run --json`), DIR/samples.json (every token), DIR/device.toml with its measurements,
and DIR/report.json: errors of each group beside what must hold. Needs torch built for CUDA, a folder on a drive with
30 GB free (`--scratch`), and what `pip install "simmem[fit]"` brings. A model or plan that fails says so and the next
goes on, so that a borrowed GPU is not borrowed in vain. `--group` runs some kinds of plans only.

Hot/cold plans (group hot-cold) have the GPU and the processor multiply side by side, at bf16: torch multiplies fp16 on
a processor at a fiftieth of the rate. Their limit is that of DRAM offload.

`--device cpu` computes on the processor, without plans that need a GPU's memory: that proves the script; its figures
mean nothing. With a device that has a GPU (`--with t4-cloud`), hot/cold plans are run too, the processor in its place.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from simmem.errors import SimmemError
from simmem.planner.candidate import Candidate
from simmem.planner.question import ask
from simmem.planner.ranking import event_seconds
from simmem.policy.base import policy_named
from simmem.report.calibration import calibrate_device
from simmem.runtime.execute.rounds import Repeats, Rounds, run_rounds, write_files
from simmem.runtime.execute.session import How
from simmem.runtime.execute.task import Task, task_of
from simmem.runtime.probe.calibrate import Asked
from simmem.sim.timeline import Timeline
from simmem.validation.ladder import POLICIES, Cell, Rung, fit_rung
from simmem.validation.runs import RunRow, run_row

HOT = "hot-cold"
TOTAL_S, CALIBRATION_SHARE = 540.0, 0.2
PASS_S, TOKENS = 1.5, (6, 32)
LIMITS = {"resident": 0.07, "dram": 0.10, "flash": 0.15, "hot-cold": 0.10}
"""Median |error| that must hold of each group; its 90 % quantile: twice that."""
MODELS = ("opt-1.3b", "opt-6.7b")
NEAR = ((0.25, "host"), (0.75, "host"), (0.5, "with-heads"))
"""Hot/cold plans: share of attention and neurons in the GPU's memory, and where keys and values lie."""


@dataclass(frozen=True)
class Plan:
    """A plan that is run, and what is expected of it."""

    name: str
    group: str
    candidate: Candidate
    task: Task
    predicted: list[Timeline]


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def rungs(agent: str) -> Iterator[tuple[str, Rung]]:
    """(group, plan) for an agent with a memory of its own, where that is what it has."""
    host = {"agent": agent, "source_tier": "host", "reader_threads": 32}
    flash = {"agent": agent, "reader_threads": 32, "prefetch_layers": 0}
    window = {**flash, "bundled": True, "coalesce": False}
    yield "resident", Rung("resident", "resident", {"agent": agent})
    for ratio in (0.0, 0.5):
        for ahead in (0, 1):
            yield "dram", Rung(f"host-{100 * ratio:g}%-ahead-{ahead}", "stream",
                               {**host, "resident_ratio": ratio, "prefetch_layers": ahead})
    yield "flash", Rung("flash-50%", "stream", {**flash, "source_tier": "storage", "resident_ratio": 0.5})
    yield "flash", Rung("window-4", "flash-window", {**window, "window_tokens": 4}, "attention_resident")
    yield "flash", Rung("window-12", "flash-window", {**window, "window_tokens": 12}, "attention_resident")
    yield "flash", Rung("merged", "flash-window", {**window, "window_tokens": 4, "coalesce": True},
                        "attention_resident")


def hot_rungs(cell: Cell) -> Iterator[tuple[str, Rung]]:
    """(group, plan) with hot neurons on the fastest GPU and cold ones on the processor beside it; none without both."""
    known = {knob.name: knob for knob in policy_named(HOT).knobs(cell.question.context(cell.weights))}
    if not known:
        return
    size, agent = known["gpu_weight_bytes"], known["agent"].values[0]
    assert size.low is not None
    assert size.high is not None
    for near, kv in NEAR:
        yield HOT, Rung(f"hot-{100 * near:g}%-kv-{kv}", HOT, {
            "agent": agent, "kv_cache": kv, "gpu_weight_bytes": size.low + near * (size.high - size.low)})


def plans_of(device: str, model: str, agent: str, weights: str, groups: Collection[str], failed: dict[str, str]
             ) -> Iterator[Plan]:
    """The plans of a model that fit this machine; why one cannot be run is added to `failed`."""
    def cell_of(weights: str) -> Cell:
        return Cell(ask(device, model, prompt=128, new_tokens=64, weights=weights, kv=weights, policy=POLICIES),
                    weights, "real", 0.5)

    plain = cell_of(weights)
    is_apart = plain.question.device.agent[agent].memory != plain.question.device.host
    some = [(plain, *one) for one in rungs(agent)]
    if HOT in groups:
        both = plain if weights != "fp16" else cell_of("bf16")
        some += [(both, *one) for one in hot_rungs(both)]
    for cell, group, rung in some:
        if group not in groups or (group == "dram" and not is_apart):
            continue
        candidate = fit_rung(cell, rung)
        if candidate is None:
            say(f"{model}/{rung.name}: does not fit, or there is no trace to plan it with")
            continue
        try:
            task = task_of(candidate, int(np.clip(PASS_S / event_seconds(candidate, 4), *TOKENS)))
        except SimmemError as error:
            failed[f"{model}/{rung.name}"] = str(error)
            continue
        yield Plan(f"{model}/{rung.name}", group, candidate, task, task.predicted())


def how_to(plan: Plan, device: str) -> How:
    """Nothing of a plan that reads no drive has to be written to one: a part of its weights stands for all of them."""
    return How(storage="real" if plan.group == "flash" else "emulated", device=device, say=say)


def row_of(plan: Plan, repeats: Repeats) -> RunRow:
    return run_row(plan.name, plan.candidate, plan.predicted, [r.timelines for r in repeats.runs],
                   np.array([r.counted.moved_bytes for r in repeats.runs], np.float64), "real",
                   conditions=repeats.conditions)


def summary_of(rows: list[RunRow], groups: dict[str, str]) -> dict[str, Any]:
    """Errors of each group over conclusive rows, beside what must hold."""
    found: dict[str, Any] = {}
    for group, limit in LIMITS.items():
        errors = [abs(r.error) for r in rows if groups[r.id] == group and r.status != "inconclusive"]
        if errors:
            middle, high = float(np.median(errors)), float(np.quantile(errors, 0.9))
            found[group] = {"n": len(errors), "median": middle, "p90": high, "limit": limit,
                            "holds": middle <= limit and high <= 2 * limit}
    found["bytes_exact"] = all(r.bytes.predicted == r.bytes.measured and "bytes" not in r.why for r in rows)
    return found


def write(out: Path, name: str, document: Any) -> None:
    beside = out / f"{name}.partial"
    beside.write_text(json.dumps(document, indent=1), encoding="utf-8")
    beside.replace(out / name)
    say(f"wrote {out / name}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--with", dest="known", default=None, help="a device to predict with; default: calibrate")
    parser.add_argument("--model", action="append", default=None, help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--group", action="append", choices=tuple(LIMITS), default=None, help="default: all")
    parser.add_argument("--scratch", type=Path, default=None, help="folder on the drive to read")
    parser.add_argument("--budget", type=float, default=TOTAL_S, help=f"seconds for all of it; default {TOTAL_S:.0f}")
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    begun, agent = time.monotonic(), "gpu" if asked.device == "cuda" else "cpu"
    weights = "fp16" if asked.device == "cuda" else "fp32"
    failed: dict[str, str] = {}
    rows: list[RunRow] = []
    groups: dict[str, str] = {}
    samples: dict[str, Any] = {}
    models = asked.model or list(MODELS)
    with tempfile.TemporaryDirectory(prefix="simmem-gpu-", dir=asked.scratch) as name:
        device = asked.known
        if device is None:
            device = str(asked.out / "device.toml")
            calibrate_device(Path(device), Asked(quick=True, budget_s=CALIBRATION_SHARE * asked.budget,
                                                 scratch=Path(name), device=asked.device))
        plans: dict[str, list[Plan]] = {}
        for model in models:
            try:
                if found := list(plans_of(device, model, agent, weights, asked.group or LIMITS, failed)):
                    plans[model] = found
            except SimmemError as error:
                failed[model] = str(error)
        write(asked.out, "predictions.json", {
            p.name: {"group": p.group, "knobs": p.candidate.knobs, "token_s": [t.token_s for t in p.predicted]}
            for some in plans.values() for p in some})
        for number, (model, some) in enumerate(plans.items()):
            # One after another, so that what fails of one leaves the others; drift is told by the rounds.
            try:
                with tempfile.TemporaryDirectory(dir=name) as folder:
                    ready = write_files([(p.task, how_to(p, asked.device)) for p in some], Path(folder))
                    share_s = (asked.budget - (time.monotonic() - begun)) / (len(plans) - number)
                    for plan, repeats in zip(some, run_rounds(ready, Rounds(budget_s=share_s)), strict=True):
                        if repeats.stopped is not None:
                            failed[plan.name] = repeats.stopped
                            continue
                        rows.append(row_of(plan, repeats))
                        groups[plan.name] = plan.group
                        samples[plan.name] = [r.token_s.tolist() for r in repeats.runs]
            except Exception as error:  # noqa: BLE001  (whatever it is, the other models are worth having)
                failed[model] = f"{type(error).__name__}: {error}"
                say(traceback.format_exc())
            write(asked.out, "rows.json", [r.model_dump(mode="json", by_alias=True) for r in rows])
            write(asked.out, "samples.json", {"unit": "s, one list of tokens a round", **samples})
    for model, why in failed.items():
        say(f"FAILED {model}: {why}")
    report = {"device": asked.device, "failed": failed, "load": os.getloadavg(), "groups": summary_of(rows, groups)}
    write(asked.out, "report.json", report)
    for row in rows:
        say(f"{row.id}: predicted {1e3 * row.predicted_s:.2f} ms, measured {1e3 * row.measured_s.median:.2f} ms, "
            f"{row.error:+.1%}, {row.status}: {row.why}")
    say(json.dumps(report["groups"], indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
