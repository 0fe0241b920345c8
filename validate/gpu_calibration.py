"""What can this CUDA GPU do, and how well does a cost model fitted to it tell products it has not seen?

    python validate/gpu_calibration.py --out DIR

In ten minutes at most: the GPU's memory, transfers both ways, launches, overlap, and products over decoder shapes and
precisions; then, briefly, the host that it sits in. Writes DIR/measurements.json (every sample) as soon as the GPU is
measured and again with the host, DIR/device.toml, DIR/cost.json (the fitted model) and DIR/report.json: held-out
errors beside a plain roofline's. Needs torch built for CUDA, and what `pip install "simmem[fit]"` brings. Every stage
says what failed and the next goes on, so that a borrowed GPU is not borrowed in vain.

`--device cpu` runs all of it with the CPU in the place of the GPU: that proves the script; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from simmem.cost.derive import derive
from simmem.cost.noise import judge
from simmem.cost.regression import fit_cost_model
from simmem.report.devicefile import new_tables, toml_text
from simmem.runtime.probe import cuda, machine
from simmem.runtime.probe.agents import Cpu
from simmem.runtime.probe.base import Case, NotHereError, Progress, Run, Setting, measure
from simmem.runtime.probe.calibrate import Asked, Told, calibrate
from simmem.runtime.probe.journal import Journal
from simmem.spec.measurement import Measurement, Measurements
from simmem.validation.costs import judge_costs

BUDGET_S = 540.0
_HOST_S, _FIT_S = 75.0, 75.0
_QUICK_S, _QUICK_HOST_S = 60.0, 30.0
_TELL_S = 20.0
_HOST_ARRAYS_BYTES = 8 << 30
_STAND_IN_BYTES, _STAND_IN_CACHE_BYTES = 16 << 20, 1 << 18


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def transfer_errors(points: list[Measurement]) -> list[dict[str, Any]]:
    """How well do a latency and a rate, fitted to every other size, tell the sizes between?

    Least squares of relative errors, for each direction, kind of host memory, and in a row or waited for.
    """
    groups: dict[tuple[str, bool, bool], list[tuple[float, float]]] = defaultdict(list)
    for point in points:
        if point.probe in (cuda.HOST_TO_DEVICE, cuda.DEVICE_TO_HOST) and point.refused is None:
            said = point.conditions
            key = point.probe, bool(said["pinned"]), bool(said["waited"])
            groups[key].append((point.bytes, judge(point).median_s))
    found = []
    for (probe, pinned, waited), rows in groups.items():
        n_bytes, seconds = np.array(sorted(rows)).T
        fitted, other = np.arange(len(rows)) % 2 == 0, np.arange(len(rows)) % 2 == 1
        if fitted.sum() < 2 or not other.any():
            continue
        terms = np.stack([np.ones_like(n_bytes), n_bytes], axis=1) / seconds[:, None]
        latency, per_byte = np.linalg.lstsq(terms[fitted], np.ones(fitted.sum()), rcond=None)[0]
        errors = np.abs(terms[other] @ (latency, per_byte) - 1.0)
        found.append({"probe": probe, "pinned": pinned, "waited": waited, "n": int(other.sum()),
                      "latency_s": float(latency), "bytes_per_s": float(1.0 / per_byte),
                      "median": float(np.median(errors)), "max": float(errors.max())})
    return found


def tolerant(case: Case) -> Case:
    """The case, left out with its reason where torch cannot do it: nobody has tried it on this GPU yet."""
    @contextmanager
    def setup() -> Iterator[Run]:
        try:
            with case.setup() as run:
                yield run
        except RuntimeError as error:
            raise NotHereError(f"{case.probe}: {str(error).splitlines()[0][:200]}") from None

    return replace(case, setup=setup)


def gpu_points(setting: Setting, budget_s: float, skipped: dict[str, str]) -> list[Measurement]:
    """What the GPU's probes bring back."""
    if setting.device == "cuda":
        cases = cuda.cases(setting)
    else:
        cases = cuda.agent_cases(setting, Cpu("gpu"), cache_bytes=_STAND_IN_CACHE_BYTES, memory_bytes=_STAND_IN_BYTES)
    say(f"{len(cases)} cases on the GPU, {budget_s:.0f} s")
    return measure([tolerant(case) for case in cases], budget_s, skipped=skipped, progress=_progress())


def _progress() -> Progress:
    told = time.monotonic()

    def progress(done: int, n: int, _what: str) -> None:
        nonlocal told
        if time.monotonic() - told > _TELL_S:
            told = time.monotonic()
            say(f"  {done} of {n} visits")

    return progress


def host_points(quick: bool, folder: Path) -> Measurements:
    """The host: its drive under `folder`, memory, cores and overheads, briefly."""
    asked = Asked(quick=True, budget_s=_QUICK_HOST_S if quick else _HOST_S, scratch=folder, device="cpu")
    journals: list[Journal] = []

    def journal(request: dict[str, Any]) -> Journal:
        journals.append(Journal(folder / "host.partial", request))
        return journals[-1]

    try:
        return calibrate(asked, name="host", journal=journal, told=Told(words=say))
    finally:
        for one in journals:
            one.discard()


def write(out: Path, name: str, text: str) -> None:
    beside = out / f"{name}.partial"
    beside.write_text(text, encoding="utf-8")
    beside.replace(out / name)
    say(f"wrote {out / name}")


def attempt(what: str, stage: Callable[[], Any], failed: dict[str, str]) -> Any:
    """A stage's result; None, and why, where it failed."""
    begun = time.monotonic()
    try:
        return stage()
    except Exception as error:  # noqa: BLE001  (whatever it is, the other stages are worth having)
        failed[what] = f"{type(error).__name__}: {error}"
        say(traceback.format_exc())
        return None
    finally:
        say(f"{what}: {time.monotonic() - begun:.0f} s")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="few shapes, a minute or so")
    parser.add_argument("--budget", type=float, default=None, help=f"seconds for all of it; default {BUDGET_S:.0f}")
    parser.add_argument("--name", default="gpu-machine", help="of the device")
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    total_s = asked.budget or (_QUICK_S if asked.quick else BUDGET_S)
    host_s = _QUICK_HOST_S if asked.quick else _HOST_S
    failed: dict[str, str] = {}
    skipped: dict[str, str] = {}

    setting = Setting(quick=asked.quick, threads=machine.usable_cores(), device=asked.device,
                      memory_bytes=min(machine.memory().available_bytes // 3, _HOST_ARRAYS_BYTES))
    before = machine.describe(None, threads=setting.threads, device=asked.device)
    if asked.device == "cpu":
        before |= {"gpu": "none: the CPU stood in for it", "gpu_memory_bytes": _STAND_IN_BYTES,
                   "gpu_cache_bytes": _STAND_IN_CACHE_BYTES, "gpu_sms": 1}
    points = attempt("GPU", lambda: gpu_points(setting, total_s - host_s - _FIT_S * (not asked.quick), skipped),
                     failed) or []
    after = machine.describe(None, threads=setting.threads, device=asked.device)
    # Right after the last products: the clock and power that they ran at, where the driver's library tells them.
    said = before | {f"{k}_after": v for k, v in after.items() if k in ("gpu_clock_mhz", "gpu_power_mw", "gpu_celsius")}
    measured = Measurements(name=asked.name, date=datetime.datetime.now(datetime.UTC).date().isoformat(), machine=said,
                            versions=machine.versions(), mode="quick" if asked.quick else "full", points=tuple(points))
    write(asked.out, "measurements.json", measured.model_dump_json(by_alias=True))
    host = attempt("host", lambda: host_points(asked.quick, asked.out), failed)
    if host is not None:
        measured = measured.model_copy(update={"points": (*points, *host.points), "machine": host.machine | said,
                                               "bytes_written": host.bytes_written})
        write(asked.out, "measurements.json", measured.model_dump_json(by_alias=True))
    tables = attempt("device file", lambda: new_tables(derive(measured), measured), failed)
    if tables is not None:
        write(asked.out, "device.toml", toml_text(tables))
    model = attempt("cost model", lambda: fit_cost_model(measured), failed)
    if model is not None:
        write(asked.out, "cost.json", model.to_json())
    costs = attempt("held-out shapes", lambda: judge_costs(measured), failed)
    report = {
        "device": asked.device, "gpu": said.get("gpu"), "n_points": len(measured.points), "failed": failed,
        "left_out": sorted({*skipped.values()}),
        "refused": Counter(f"{p.probe}: {judge(p).refused}"[:100] for p in measured.points if judge(p).refused),
        "transfers": transfer_errors(points), "costs": None if costs is None else json.loads(costs.model_dump_json())}
    write(asked.out, "report.json", json.dumps(report, indent=1))
    for row in report["transfers"]:
        say(f"{row['probe']} pinned={row['pinned']} waited={row['waited']}: {row['bytes_per_s'] / 1e9:.1f} GB/s, "
            f"{row['latency_s'] * 1e6:.1f} us, held out median {row['median']:.1%}, largest {row['max']:.1%} "
            f"of {row['n']}")
    if costs is not None:
        say("\n".join(costs.table()))
    for what, why in failed.items():
        say(f"FAILED {what}: {why}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
