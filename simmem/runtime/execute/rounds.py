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
from simmem.runtime.execute.session import How, Run, open_session
from simmem.runtime.execute.task import Task
from simmem.runtime.execute.weights import RandomWeights, weight_file
from simmem.units import format_quantity

__all__ = ["Repeats", "run_rounds", "write_files"]

Condition = bool | int | float | str
LEAST_ROUNDS = 3
"""Fewer say nothing of the noise."""


@dataclass
class Repeats:
    """What the rounds brought for one plan."""

    runs: list[Run] = field(default_factory=list)
    conditions: dict[str, Condition] = field(default_factory=dict)
    """Of the last session, and the load of the machine over the last minute at the start of each round."""


def write_files(tasks: Sequence[tuple[Task, How]], folder: Path) -> list[tuple[Task, How]]:
    """Write the weight files of all plans that read a real drive; returns the plans with their files.

    folder : existing, on the drive to be read; the caller removes it.

    Raises MachineError where the files find no room.
    """
    needed: dict[Path, int] = {}
    found = []
    for task, how in tasks:
        if how.storage == "real":
            source = how.source or RandomWeights(task.layout.precision)
            how = replace(how, file=folder / f"weights-{task.layout.digest(source.name)[:16]}", source=source)
            assert how.file is not None
            needed[how.file] = task.layout.n_bytes + 8 * task.layout.n_blocks
        found.append((task, how))
    total, free = sum(needed.values()), shutil.disk_usage(folder).free
    if total > free:
        raise MachineError(f"the weight files take {format_quantity(total, 'bytes')}, "
                           f"{format_quantity(free, 'bytes')} are free", file=str(folder), tier="storage",
                           missing_bytes=float(total - free))
    for task, how in found:
        if how.file is not None and not how.file.exists():
            assert how.source is not None
            with weight_file(task.layout, how.source, file=how.file, say=how.say):
                pass
    return found


def run_rounds(tasks: Sequence[tuple[Task, How]], *, budget_s: float, least: int = LEAST_ROUNDS, most: int = 7,
               seed: int = 0, told: Callable[[int, int, int], None] = lambda *_: None) -> list[Repeats]:
    """Run all plans, round after round.

    Parameters
    ----------
    budget_s : a round that would not end within it is not begun, once there were `least`. [s]
    most : rounds at most.
    told : (round, plans of it that are done, plans) as it goes on.

    Raises MachineError where a plan cannot be run.
    """
    found = [Repeats() for _ in tasks]
    order = np.random.default_rng(seed)
    begun = time.monotonic()
    for number in range(most):
        round_begun = time.monotonic()
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else -1.0
        for done, index in enumerate(order.permutation(len(tasks)).tolist()):
            told(number, done, len(tasks))
            with open_session(*tasks[index]) as session:
                found[index].runs.append(session.run())
                found[index].conditions |= session.conditions()
            found[index].conditions[f"load_round_{number + 1}"] = load
        now = time.monotonic()
        if number + 1 >= least and now - begun + (now - round_begun) > budget_s:
            break
    return found
