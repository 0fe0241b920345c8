"""Were the drive and the processor, while plans were run, those that they were predicted for?

A machine that others share is another one some minutes later. So plain reads and one product are timed right before and
right after every run of a plan, and its prediction is judged for the machine that these controls found. A drive changes
within seconds, so plans that read layer by layer, and nothing ahead, have plain reads timed behind each token too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmem.cost.roofline import durations, storage_seconds_per_request
from simmem.planner.predict import token_seconds
from simmem.policy.layers import STREAM_CHUNK_BYTES
from simmem.runtime.execute.drive import Reads, batch_reads, plain_reads
from simmem.runtime.execute.layout import whole_blocks
from simmem.runtime.execute.product import ProductControl
from simmem.runtime.execute.rounds import Condition, Repeats
from simmem.runtime.execute.task import Task
from simmem.runtime.probe.scratch import BLOCK_BYTES
from simmem.schedule import DemandClass, OpKind, Products, ScheduleBuilder
from simmem.validation.runs import error_by_repeat, phase_seconds

__all__ = ["Controls", "main_read", "product_seconds"]

Array = NDArray[np.float64]
_LOOKS = 2
"""A run has one before and one after it."""
_ROWS = 2
"""Trace tokens on which a changed machine is compared with the calibrated one."""


class Controls:
    """What plain reads and a product took beside the runs of each plan.

    Parameters
    ----------
    tasks : plans, all at one precision; those that read the real drive have their most usual read looked at.
    file : that these read.
    """

    def __init__(self, tasks: Sequence[tuple[Task, bool]], file: Path, *, threads: int | None = None) -> None:
        self._tasks, self._file = [task for task, _ in tasks], file
        self._product = ProductControl(self._tasks[0].layout.precision, threads)
        largest = file.stat().st_size // 2
        self._reads = [read if real and (read := main_read(task)) is not None and read[0] <= largest else None
                       for task, real in tasks]
        self.read_s: list[list[list[float]]] = [[] for _ in tasks]
        """Of each plan and look, samples of the seconds per plain read; () where it reads nothing. [s]"""
        self.between_s: list[list[list[float]]] = [[] for _ in tasks]
        """Of each plan and run, seconds per plain read behind each token; () where it reads ahead. [s]"""
        self.batches_s: list[list[list[float]]] = [[] for _ in tasks]
        """Of each plan and run, seconds of a token's batches read plainly, behind each token. [s]"""
        self.product_s: list[list[float]] = [[] for _ in tasks]
        """Of each plan and look, seconds per product. [s]"""

    def look(self, index: int) -> None:
        """Time what stands for the plan `index` once."""
        read = self._reads[index]
        if read is not None:
            if len(self.read_s[index]) % _LOOKS == 0:  # a run begins
                self.between_s[index].append([])
                self.batches_s[index].append([])
            self.read_s[index].append(plain_reads(self._file, read))
        self.product_s[index].append(self._product.seconds())

    def between(self, index: int) -> Callable[[], None] | None:
        """What is called behind each token of a plan; None where a read of its own would be in flight, or none is."""
        task, read = self._tasks[index], self._reads[index]
        if read is None or task.by_neuron or task.prefetch or len(task.hops) > 1:
            return None

        def look() -> None:
            self.between_s[index][-1].append(float(np.mean(plain_reads(self._file, read, samples=2))))
            self.batches_s[index][-1].append(
                batch_reads(self._file, task.streamed, int(STREAM_CHUNK_BYTES), task.depth))

        return look

    def raw(self, index: int) -> dict[str, object]:
        """All looks of a plan."""
        read = self._reads[index]
        found: dict[str, object] = {"product_s": self.product_s[index]}
        return found if read is None else {**found, "size_bytes": read[0], "depth": read[1],
                                           "read_s": self.read_s[index], "between_s": self.between_s[index],
                                           "batches_s": self.batches_s[index]}

    def conditions(self, index: int, repeats: Repeats) -> dict[str, Condition]:
        """Of a plan: how fast drive and products were beside their calibration, and it beside plain reads.

        Medians over the rounds. The rates of a streaming plan compare bytes over the time that its reads took: token by
        token with plain reads before and behind each, or run by run where it reads ahead. Plain reads never stop;
        plain batches begin and end as those of its layers do.
        """
        n = len(repeats.runs)
        if not self.product_s[index]:
            return {}
        found: dict[str, Condition] = {
            "products_over_calibrated": float(np.median(self._products(index)[:n]))}
        drive, read = self._drive(index), self._reads[index]
        if drive is not None and read is not None:
            found["drive_over_calibrated"] = float(np.median(drive[:n]))
            rates = self._rates(index, repeats)
            found |= {name: float(np.median(values)) for name, values in rates.items()}
        return found

    def error(self, index: int, predicted_s: float, repeats: Repeats) -> float | None:
        """Predicted over measured less one, for the machine that the controls found; the median over the rounds. None
        where none were timed."""
        if not self.product_s[index]:
            return None
        task = self._tasks[index]
        candidate = task.candidate
        agent, link = str(candidate.block.structural["agent"]), candidate.context.storage_link[0]
        rows = np.unique(np.linspace(0, len(task.rows) - 1, _ROWS).astype(np.int64))
        base, drive = token_seconds(candidate, task.rows[rows]), self._drive(index)
        expected = []
        for number, product in enumerate(self._products(index)[:len(repeats.runs)].tolist()):
            changes = {f"agent.{agent}.rate": product}
            if drive is not None:
                changes[f"link.{link}.throughput"] = float(drive[number])
            expected.append(predicted_s * token_seconds(candidate, task.rows[rows], changes) / base)
        return error_by_repeat(expected, [run.token_s for run in repeats.runs])

    def _rates(self, index: int, repeats: Repeats) -> dict[str, Array]:
        """Rate of a plan's own reads over that of plain ones, a figure a token, or a run; {} for one of neurons."""
        task, read, runs = self._tasks[index], self._reads[index], repeats.runs
        if read is None or task.by_neuron or len(task.hops) > 1:
            return {}
        own = np.array([[phase_seconds([line])["flash"] for line in run.timelines] for run in runs])
        if not (own > 0).all():
            return {}
        if self.between(index) is not None:
            moved = np.array([run.counted.moved_bytes for run in runs], np.float64)
            plain, batches = (np.array([looks[task.lead - 1:] for looks in found[:len(runs)]])
                              for found in (self.between_s[index], self.batches_s[index]))
            found = {"rate_over_plain_reads": np.sqrt(plain[:, :-1] * plain[:, 1:]) / read[0] * moved / own,
                     "rate_over_plain_batches": np.sqrt(batches[:, :-1] * batches[:, 1:]) / own}
        else:
            moved = np.array([float(np.mean(run.counted.moved_bytes)) for run in runs])
            looks = _per_run([float(np.median(s)) for s in self.read_s[index]])[:len(runs)]
            found = {"rate_over_plain_reads": looks / read[0] * moved / own.mean(axis=1)}
        return found

    def _products(self, index: int) -> Array:
        """Rate of products over the calibrated one, a figure a run."""
        task = self._tasks[index]
        return product_seconds(task, self._product.rows, self._product.cols) / _per_run(self.product_s[index])

    def _drive(self, index: int) -> Array | None:
        """Rate of plain reads over the calibrated one, a figure a run; None for a plan that reads nothing."""
        read = self._reads[index]
        if read is None:
            return None
        link = self._tasks[index].candidate.context.storage_link[1]
        calibrated = float(storage_seconds_per_request(link, read[0], read[1]))
        found = _per_run([float(np.median(samples)) for samples in self.read_s[index]])
        for run, looks in enumerate(self.between_s[index][:len(found)]):
            if looks:
                found[run] = float(np.mean(looks))
        return calibrated / found


def _per_run(looks: Sequence[float]) -> Array:
    """The mean of the looks before and after each run."""
    whole = len(looks) // _LOOKS * _LOOKS
    return np.asarray(np.array(looks[:whole]).reshape(-1, _LOOKS).mean(axis=1), dtype=np.float64)


def product_seconds(task: Task, rows: int, cols: int) -> float:
    """What a plan's device is expected to take for a product of one token with a matrix (rows, cols). [s]"""
    context = task.candidate.context
    agent, weights = str(task.candidate.block.structural["agent"]), context.workload.weights
    builder = ScheduleBuilder(1, [agent])
    n_bytes = rows * cols * context.read_bytes_per_param(agent, "ffn")[0]
    what = DemandClass("ffn", OpKind.COMPUTE, agent=agent, precision=weights, products=Products(1.0, float(cols), 1.0))
    builder.end_token(builder.op(builder.demand(
        what, flop=2.0 * rows * cols, requests=1.0, bytes={f"memory.{context.memory_of(agent)}": n_bytes}), agent))
    return float(durations(builder.build(), context.device).occupancy_s[0, 0])


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
