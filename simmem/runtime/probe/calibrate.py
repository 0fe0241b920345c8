"""What does one run of all probes bring back? Measurements, within a time and with a bounded file to read from."""

from __future__ import annotations

import datetime
import importlib.util
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simmem.errors import CalibrationError, MachineError, SpecError
from simmem.runtime.probe import cuda, decoders, gather, interference, machine, matmul, memory, overheads, storage
from simmem.runtime.probe.base import Case, Progress, Setting, measure
from simmem.runtime.probe.journal import Journal
from simmem.runtime.probe.load import Load
from simmem.runtime.probe.scratch import Scratch, open_file, open_scratch
from simmem.spec.measurement import Measurements

__all__ = ["FULL_S", "QUICK_S", "Asked", "Told", "calibrate"]

QUICK_S, FULL_S = 60.0, 600.0
_SCRATCH_BYTES = {True: 512 << 20, False: 2 << 30}
_LEAST_SCRATCH_BYTES = 64 << 20
_ARRAYS_BYTES = {True: 1 << 30, False: 2 << 30}
_SUSTAINED_SHARE = 0.08
_RESERVE_SHARE, _RESERVE_S = 0.15, {True: 8.0, False: 25.0}
"""Of the time, at most: for fitting, judging and writing."""
_STORAGE_WEIGHT = 3.0
_PRODUCT_ROUNDS = 3


@dataclass(frozen=True)
class Asked:
    """What a user asks of a calibration."""

    quick: bool = False
    budget_s: float | None = None
    scratch: Path = Path()
    """A folder on the drive to be measured."""
    file: Path | None = None
    """A large file there that is read in the place of one written for it; None: one is written."""
    threads: int | None = None
    device: str | None = None
    """cpu or cuda; None: cuda where there is one."""
    seed: int = 0
    """Of the random shapes of products."""
    dtypes: tuple[str, ...] = ()
    """Precisions that matter, of whose products there is then time for more, all with all threads; (): every one."""
    needs_storage: bool = True
    """Nothing is measured at all where storage cannot be."""

    @property
    def total_s(self) -> float:
        return self.budget_s if self.budget_s is not None else QUICK_S if self.quick else FULL_S

    @property
    def scratch_bytes(self) -> int:
        """What is written to storage: less where there is no time to read it."""
        usual = QUICK_S if self.quick else FULL_S
        return int(max(min(self.total_s / usual, 1.0) * _SCRATCH_BYTES[self.quick], _LEAST_SCRATCH_BYTES))


@dataclass
class Told:
    """What a run says while it goes on."""

    words: Callable[[str], None] = lambda _: None
    visits: Progress = lambda *_: None


def calibrate(asked: Asked, *, name: str, journal: Callable[[dict[str, Any]], Journal], told: Told) -> Measurements:
    """Run the probes.

    Parameters
    ----------
    journal : opens the journal of a request; what it holds already is not measured again.

    Raises
    ------
    MachineError
        torch is missing, or the scratch folder cannot be used.
    SpecError
        More threads than cores, or a GPU that is not there.
    CalibrationError
        The scratch folder is in memory.
    """
    begun = time.monotonic()
    _check(asked)
    threads = asked.threads or machine.usable_cores()
    device = _device(asked.device)
    request = {"mode": "quick" if asked.quick else "full", "threads": threads, "device": device,
               "seed": asked.seed, "scratch": str(asked.scratch.resolve()), "versions": machine.versions()}
    request |= {"dtypes": ",".join(asked.dtypes)} if asked.dtypes else {}
    with ExitStack() as stack:
        kept = journal(request)
        stack.callback(kept.close)
        if asked.file is None:
            scratch = stack.enter_context(open_scratch(asked.scratch, asked.scratch_bytes, told.words))
            kept.wrote(scratch.size_bytes)
        else:
            scratch = stack.enter_context(open_file(asked.file))
        said = machine.describe(scratch.volume, threads=threads, device=device)
        said |= {"seed": asked.seed} if asked.seed else {}
        said["direct_io"] = scratch.why_not_direct or "yes"
        if asked.needs_storage and scratch.volume.in_memory:
            raise CalibrationError(f"{scratch.why_not_direct}; name a folder on a drive", key="--scratch")
        if scratch.why_not_direct:
            told.words(f"no direct reads: {scratch.why_not_direct}")
        setting = _setting(asked, threads, device, scratch)
        load, skipped = Load(), dict[str, str]()
        cases = _cases(setting, scratch)
        left = asked.total_s - min(_RESERVE_SHARE * asked.total_s, _RESERVE_S[asked.quick]) - (time.monotonic() - begun)
        lasting = 0.0 if asked.quick else _SUSTAINED_SHARE * asked.total_s
        budget_s = max(left - lasting, 1.0)
        points = measure(cases, budget_s, journal=kept, progress=told.visits, skipped=skipped)
        if len(points) + len(skipped) < len(cases):
            told.words(f"{len(points)} of {len(cases)} cases, spread over all probes, are what the time allowed")
        if lasting:
            told.words(f"two more probes without pause, {lasting:.0f} s")
            last = [*memory.sustained_cases(setting), *storage.sustained_cases(scratch)]
            past_s = max((v.ended_s for v in kept.visits), default=0.0)
            points += measure(last, past_s + lasting, journal=kept, rounds=1, skipped=skipped)
        for why in sorted({*skipped.values()}):
            told.words(f"left out: {why}")
        said |= load.others()
    return Measurements(name=name, date=datetime.datetime.now(datetime.UTC).date().isoformat(), machine=said,
                        versions=machine.versions(), mode="quick" if asked.quick else "full",
                        points=tuple(storage.guard(points)), bytes_written=float(kept.bytes_written))


def _check(asked: Asked) -> None:
    for package, extra in (("torch", "capture"), ("scipy", "fit")):
        if importlib.util.find_spec(package) is None:
            raise MachineError(f'calibrating needs {package}; install with: pip install "simmem[{extra}]"')
    cores = machine.usable_cores()
    if asked.threads is not None and not 1 <= asked.threads <= cores:
        raise SpecError(f"found {asked.threads}, expected 1 to {cores}, the cores this process may use",
                        key="--threads")
    if not asked.scratch.is_dir():
        raise SpecError("is no folder", file=str(asked.scratch), key="--scratch")


def _device(asked: str | None) -> str:
    if asked not in (None, "cpu", "cuda"):
        raise SpecError(f"found {asked!r}, expected cpu or cuda", key="--device")
    if asked == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise SpecError("no CUDA GPU is here, or torch was built without CUDA", key="--device")
    return "cpu"


def _setting(asked: Asked, threads: int, device: str, scratch: Scratch) -> Setting:
    available = machine.memory().available_bytes
    return Setting(quick=asked.quick, threads=threads, device=device, cache_bytes=machine.cache_bytes(),
                   memory_bytes=min(_ARRAYS_BYTES[asked.quick], available // 3),
                   scratch_fd=scratch.fd if scratch.direct_fd is None else scratch.direct_fd,
                   scratch_bytes=scratch.size_bytes, scratch_direct=scratch.direct_fd is not None, seed=asked.seed,
                   dtypes=asked.dtypes)


def _cases(setting: Setting, scratch: Scratch) -> list[Case]:
    found = [replace(c, weight=c.weight * _STORAGE_WEIGHT) for c in storage.cases(scratch, quick=setting.quick)]
    found += storage.batch_cases(scratch)
    found += memory.cases(setting) + overheads.cases(setting) + decoders.cases(setting)
    for module in (matmul, gather, interference, cuda):
        found += [c if c.rounds is not None else replace(c, rounds=_PRODUCT_ROUNDS) for c in module.cases(setting)]
    return found
