"""Was the drive, while plans were run, the one that they were predicted for?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simmem.cost.roofline import storage_seconds_per_request
from simmem.policy.layers import STREAM_CHUNK_BYTES
from simmem.runtime.execute.drive import DriveLooks, Reads, look
from simmem.runtime.execute.layout import whole_blocks
from simmem.runtime.execute.rounds import Repeats
from simmem.runtime.execute.task import Task
from simmem.runtime.probe.scratch import BLOCK_BYTES
from simmem.validation.runs import phase_seconds

__all__ = ["Drive", "main_read"]

_MOST_READS = 8


class Drive:
    """The drive as plain reads see it at the start of each round, beside what was predicted of it.

    Parameters
    ----------
    tasks : plans that read it; of all their sizes and depths the most usual ones are looked at.
    file : that they read.
    """

    def __init__(self, tasks: Sequence[Task], file: Path) -> None:
        self.looks, self._file = DriveLooks(), file
        self._of = {id(task): main_read(task) for task in tasks}
        wanted = Counter(read for read in self._of.values() if read is not None)
        self._reads = [read for read, _ in wanted.most_common(_MOST_READS)]

    def look(self) -> None:
        """Time plain reads once."""
        largest = self._file.stat().st_size // 2
        look(self._file, [(size, depth) for size, depth in self._reads if size <= largest], self.looks)

    def conditions(self, task: Task, repeats: Repeats) -> dict[str, float]:
        """Of a plan: how fast the drive was beside its calibration, and how fast the plan read beside plain reads.

        Medians over the rounds; of a streaming plan the second compares bytes over the time that its reads took.
        """
        read = self._of.get(id(task))
        if read not in self.looks.seconds:
            return {}
        link = task.candidate.context.storage_link[1]
        looked = np.array(self.looks.per_look(read)[:len(repeats.runs)])
        calibrated = float(storage_seconds_per_request(link, read[0], read[1]))
        found = {"drive_over_calibrated": float(np.median(calibrated / looked))}
        if not task.by_neuron:
            flash = np.array([phase_seconds(run.timelines)["flash"] for run in repeats.runs])
            moved = np.array([float(np.mean(run.counted.moved_bytes)) for run in repeats.runs])
            if (flash > 0).all() and len(task.hops) == 1:
                found["rate_over_plain_reads"] = float(np.median(moved / flash / (read[0] / looked)))
        return found


def main_read(task: Task) -> Reads | None:
    """The read that a plan spends its storage time on: size in whole blocks, and how many of them are in flight."""
    if task.by_neuron:
        assert task.layout.units is not None
        return task.layout.units.slot_bytes, task.depth
    amounts = [amount for amount in task.streamed if amount]
    if not amounts:
        return None
    n_bytes = float(np.median(amounts))
    n = max(int(np.ceil(n_bytes / STREAM_CHUNK_BYTES)), 1)
    return whole_blocks(n_bytes / n, max(task.layout.block_bytes, BLOCK_BYTES)), min(task.depth, n)
