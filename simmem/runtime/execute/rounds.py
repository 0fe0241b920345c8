"""How are many plans run so that whatever drifts on a machine touches all of them alike?

In rounds: each runs every plan once, in another order, in a session of its own, so that memory is allocated anew and
only one plan holds any. Weight files are written before the first round and shared by the plans of one layout.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from simmem.errors import MachineError
from simmem.runtime.execute.layout import Layout
from simmem.runtime.execute.session import How, Run, open_session
from simmem.runtime.execute.task import Task
from simmem.runtime.execute.weights import RandomWeights, Source, is_written, weight_file
from simmem.units import format_quantity

__all__ = [
    "LEAST_ROUNDS",
    "NO_TIME",
    "Condition",
    "Repeats",
    "Rounds",
    "run_rounds",
    "write_files",
    "write_random",
]

Condition = bool | int | float | str
LEAST_ROUNDS = 3
"""Fewer say nothing of the noise."""
NO_TIME = "no time for it"


@dataclass
class Repeats:
    """What the rounds brought for one plan."""

    runs: list[Run] = field(default_factory=list)
    conditions: dict[str, Condition] = field(default_factory=dict)
    """Of the last session, and the load of the machine over the last minute at the start of each round."""
    stopped: str | None = None
    """Why it was not run in every round: no time, or what went wrong."""


@dataclass(frozen=True)
class Rounds:
    """How rounds are run."""

    budget_s: float
    """A round that would not end within it is not begun, once there were `least`. [s]"""
    least: int = LEAST_ROUNDS
    most: int = 7
    seed: int = 0
    extra: Sequence[bool] = ()
    """Plans that may be dropped after the first round, where it took longer than the time allows; () for none."""
    before: Callable[[int], None] = lambda _: None
    """Called with the number of a round that begins."""
    beside: Callable[[int], None] = lambda _: None
    """Called with the place of a plan right before and right after it is run."""
    between: Callable[[int], Callable[[], None] | None] = lambda _: None
    """Of the place of a plan: what is called behind each of its tokens, on no token's time."""
    after: Callable[[Sequence[Repeats]], None] = lambda _: None
    """Called after each round with what there is."""


def write_files(tasks: Sequence[tuple[Task, How]], folder: Path) -> list[tuple[Task, How]]:
    """Write the weight files of all plans that read a real drive; returns the plans with their files.

    folder : existing, on the drive to be read; the caller removes it.

    Raises MachineError where the files find no room.
    """
    needed: dict[Path, int] = {}
    largest: dict[str, int] = {}
    for task, how in tasks:
        if how.storage == "real" and how.source is None:
            kind = task.layout.precision
            largest[kind] = max(largest.get(kind, 0), task.layout.n_bytes)
    found = []
    for task, how in tasks:
        if how.storage == "real":
            kind = task.layout.precision
            source = how.source or RandomWeights(kind, at_least_bytes=largest[kind])
            how = replace(how, file=_file_of(task.layout, source, folder), source=source)
            assert how.file is not None
            size = source.size_bytes(task.layout)
            needed[how.file] = size + 8 * (size // task.layout.block_bytes)
        found.append((task, how))
    absent = {how.file for task, how in found if how.file is not None and how.source is not None
              and not is_written(how.file, task.layout, how.source)}
    needed = {file: size for file, size in needed.items() if file in absent}
    total, free = sum(needed.values()), shutil.disk_usage(folder).free
    if total > free:
        raise MachineError(f"the weight files take {format_quantity(total, 'bytes')}, "
                           f"{format_quantity(free, 'bytes')} are free", file=str(folder), tier="storage",
                           missing_bytes=float(total - free))
    for task, how in found:
        if how.file in absent and how.file is not None:
            assert how.source is not None
            with weight_file(task.layout, how.source, file=how.file, say=how.say):
                pass
    return found


def write_random(layout: Layout, folder: Path, *, at_least_bytes: int = 0, say: Callable[[str], None] = lambda _: None
                 ) -> Path:
    """Write random weights where `write_files` finds them for any layout of this precision that needs no more."""
    source = RandomWeights(layout.precision, at_least_bytes=at_least_bytes)
    file = _file_of(layout, source, folder)
    with weight_file(layout, source, file=file, say=say):
        return file


def _file_of(layout: Layout, source: Source, folder: Path) -> Path:
    return folder / f"weights-{source.digest(layout)[:16]}"


def run_rounds(tasks: Sequence[tuple[Task, How]], rounds: Rounds) -> list[Repeats]:
    """Run all plans, round after round. What one plan breaks on ends that plan alone, and is said in its `stopped`."""
    found = [Repeats() for _ in tasks]
    took = [0.0] * len(tasks)
    order = np.random.default_rng(rounds.seed)
    begun = time.monotonic()
    for number in range(rounds.most):
        round_begun = time.monotonic()
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else -1.0
        rounds.before(number)
        for index in order.permutation(len(tasks)).tolist():
            mine = found[index]
            if mine.stopped is not None:
                continue
            plan_begun = time.monotonic()
            try:
                rounds.beside(index)
                with open_session(*tasks[index]) as session:
                    mine.runs.append(session.run(rounds.between(index)))
                    mine.conditions |= session.conditions()
                rounds.beside(index)
            except MachineError as error:
                mine.stopped = str(error)
            mine.conditions[f"load_round_{number + 1}"] = load
            took[index] = time.monotonic() - plan_begun
        rounds.after(found)
        now = time.monotonic()
        if number == 0:
            _drop(found, took, rounds, rounds.budget_s - (now - begun))
        if number + 1 >= rounds.least and now - begun + (now - round_begun) > rounds.budget_s:
            break
    return found


def _drop(found: Sequence[Repeats], took: Sequence[float], rounds: Rounds, left_s: float) -> None:
    """Drop extra plans, the longest first, until the rounds that are needed fit into the time left."""
    needed = (rounds.least - 1) * sum(t for t, mine in zip(took, found, strict=True) if mine.stopped is None)
    for index in sorted(range(len(took)), key=lambda i: -took[i]):
        if needed <= left_s:
            return
        if rounds.extra and rounds.extra[index] and found[index].stopped is None:
            found[index].stopped = NO_TIME
            needed -= (rounds.least - 1) * took[index]
