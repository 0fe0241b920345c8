"""What does the process hold while it runs a plan? Weights that stay, buffers for the rest, the neuron caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.policy.layers import STREAM_CHUNK_BYTES
from simmem.runtime.execute.cache import GRAIN, WindowCache, padded
from simmem.runtime.execute.kernels import Weights, torch_dtype
from simmem.runtime.execute.layout import Slots, Stage
from simmem.runtime.execute.staging import Buffer, buffer, kept_bytes, stage_weights
from simmem.runtime.execute.task import Task
from simmem.runtime.execute.units import cache_parts, unit_reads
from simmem.runtime.execute.weights import WeightCheck
from simmem.runtime.reader import Reads, Store, in_chunks

if TYPE_CHECKING:
    import torch

__all__ = ["Memory", "memory_bytes"]

Ints = NDArray[np.int64]
PRELOAD_UNITS = 4096
"""Neurons read at once while a cache is filled."""


def memory_bytes(task: Task, *, apart: bool) -> float:
    """What a run holds, activations and logits apart. [B]

    apart : the computing device has a memory of its own, so buffers are there twice.
    """
    layout = task.layout
    stages = (*layout.layers, layout.head)
    twice = 2 if apart else 1
    total = layout.fixed.n_bytes + sum(kept_bytes(stage, streamed, layout.block_bytes)
                                       for stage, streamed in zip(stages, task.streamed, strict=True))
    total += (task.prefetch + 1) * twice * (max(task.streamed) + _unit_room(task))
    total += sum(_cache_rooms(task)) * len(layout.parts) * layout.unit_row_bytes
    if any(task.streamed) and task.hops[:1] != task.unit_hops[:1]:
        total += sum(task.streamed)  # in host memory
    if layout.embedding is not None and not task.looks_up:
        total += layout.embedding.area_bytes
    workload = task.candidate.context.workload
    return total + task.candidate.context.model.kv_bytes(layout.precision, workload.context_tokens)


def _unit_room(task: Task) -> int:
    """A buffer for the units of a layer, with room for a product to run on a few rows more. [B]"""
    slots = task.layout.units
    return 0 if slots is None else int(task.unit_bytes.max(initial=0.0)) + GRAIN * slots.slot_bytes


def _places(streamed: Sequence[int], n_buffers: int) -> list[int]:
    """Where in its buffer the streamed part of each stage begins: behind what that held before, where it fits. [B]

    A buffer holds the widest, so that narrower ones take turns. Reads into what the processor has just computed with
    take longer than into memory that its caches have let go: two of 3.5 MB 3.5 ms instead of 2.6, 32 of 64 KiB 1.7
    instead of 1.3, small ones a twentieth (a virtual drive).
    """
    found: list[int] = []
    for where, n_bytes in enumerate(streamed):
        before = where - n_buffers
        end = found[before] + streamed[before] if before >= 0 else 0
        found.append(end if end + n_bytes <= max(streamed) else 0)
    return found


def _cache_rooms(task: Task) -> list[int]:
    """Rows allocated for the cache of each layer."""
    return [padded(int(units)) for units in task.capacity] if task.by_neuron else []


class Memory:
    """Allocates everything a task needs and loads what stays.

    Parameters
    ----------
    device : that computes.
    apart : it has a memory of its own, so that what is read is copied there.
    check : told (offset, bytes) of all that is read, raises where they are not what was written; None: nothing is
        looked at.

    Raises
    ------
    MachineError
        The memory is not there, or reading failed.
    """

    def __init__(self, task: Task, store: Store, device: torch.device, *, apart: bool,
                 check: WeightCheck | None = None) -> None:
        import torch

        layout = task.layout
        self.task, self.device, self.apart, self.check = task, device, apart, check
        if task.known_first and task.by_neuron and task.prefetch and any(task.streamed[:-1]):
            raise SpecError("cannot ask a gate early that is itself streamed", key="prefetch_layers")
        self._store = store
        self._stages = (*layout.layers, layout.head)
        kept = [kept_bytes(stage, streamed, layout.block_bytes)
                for stage, streamed in zip(self._stages, task.streamed, strict=True)]
        ahead, widest = task.prefetch + 1, max(task.streamed)
        from_host = bool(widest) and task.hops[:1] != task.unit_hops[:1]
        unit_room, rooms = _unit_room(task), _cache_rooms(task)
        self.fixed = self._load_whole(layout.fixed)
        self._kept = [self._load(stage.offset, n) for stage, n in zip(self._stages, kept, strict=True)]
        self._staging = [buffer(widest, device, apart=apart) for _ in range(ahead)] if widest else []
        self._places = _places(task.streamed, ahead)
        self.host_copy = [self._host_part(stage, n) for stage, n in zip(self._stages, task.streamed, strict=True)
                          ] if from_host else None
        self._views: dict[tuple[int, int], Weights] = {}
        self.unit_buffers = [buffer(unit_room, device, apart=apart) for _ in range(ahead)] if layout.units else []
        width = len(layout.parts) * layout.architecture.d_model
        self._rows = [torch.zeros((room, width), dtype=torch_dtype(layout.precision), device=device) for room in rooms]
        self.caches: list[WindowCache] = []
        self.predictors = self._predictors()
        self.lookup = self._table = None
        if layout.embedding is not None:
            if task.looks_up:
                self.lookup = buffer(layout.embedding.slot_bytes, device, apart=apart)
            else:
                self._table = self._load(layout.embedding.offset, layout.embedding.area_bytes)
        self._row = torch.zeros(layout.architecture.d_model, dtype=torch_dtype(layout.precision), device=device)

    # --- weights --------------------------------------------------------------------------------

    def weights(self, where: int, stage: int) -> Weights:
        """The tensors of layer `where`, or of the head behind the last, in the buffer that stage number uses."""
        key = (where, stage % len(self._staging) if self._staging else 0)
        if key not in self._views:
            streamed = self.task.streamed[where]
            near = self.staging(where, stage).near if streamed else None
            self._views[key] = stage_weights(self._stages[where], self._kept[where], near, streamed,
                                             self.task.layout.precision)
        return self._views[key]

    def staging(self, where: int, stage: int) -> Buffer:
        """What the streamed part of layer `where` passes through, in the buffer that stage number uses."""
        begin = self._places[where]
        return self._staging[stage % len(self._staging)].part(begin, begin + self.task.streamed[where])

    def copy_ends(self, name: str, where: int, stage: int, n_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(source, target) of a copy to the computing device."""
        if name == "units":
            into = self.unit_buffers[where % len(self.unit_buffers)]
        elif name == "embedding rows":
            assert self.lookup is not None
            into = self.lookup
        else:
            into = self.staging(where, stage)
            if self.host_copy is not None:
                return self.host_copy[where], into.near[:n_bytes]
        return into.pinned[:n_bytes], into.near[:n_bytes]

    def _predictors(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Two thin random matrices a layer, of as many parameters as the plan's predictor has."""
        import torch

        a, task = self.task.layout.architecture, self.task
        if not task.predictor_params or task.known_first:
            return []
        rank = max(round(task.predictor_params / (a.d_model + a.d_ff)), 1)
        how = {"dtype": torch_dtype(task.layout.precision), "device": self.device}
        return [(torch.randn(rank, a.d_model, **how) / a.d_model, torch.randn(a.d_ff, rank, **how) / rank)
                for _ in task.layout.layers]

    # --- the embedding --------------------------------------------------------------------------

    @property
    def head_rows_leave(self) -> bool:
        """Is the embedding the head's, and streamed with it?"""
        return self.task.layout.embedding is None and self.task.streamed[-1] > 0

    def embedding_row(self, token_id: int) -> torch.Tensor:
        """The embedding of a token that is held, or was kept."""
        if self._table is not None:
            assert self.task.layout.embedding is not None
            return self._slot_row(self._table, token_id, self.task.layout.embedding)
        if self.head_rows_leave:
            return self._row
        return self._head_row(token_id, 0)

    def keep_row(self, token_id: int, stage: int) -> None:
        """Keep the embedding of the next token while the head that it is a row of is there."""
        self._row.copy_(self._head_row(token_id, stage))

    def read_row(self, token_id: int) -> None:
        """The same of the first token, whose head nobody streamed."""
        head, layout = self.task.layout.head, self.task.layout
        block = layout.block_bytes
        start = token_id * layout.unit_row_bytes
        first, last = start // block * block, min(-(-(start + layout.unit_row_bytes) // block) * block, head.n_bytes)
        data = self._load(head.offset + first, last - first)
        self._row.copy_(data[start - first : start - first + layout.unit_row_bytes].view(self._row.dtype))

    def looked_up(self) -> torch.Tensor:
        """The embedding row that was read for this token."""
        assert self.lookup is not None and self.task.layout.embedding is not None
        return self._slot_row(self.lookup.near, 0, self.task.layout.embedding)

    def _slot_row(self, table: torch.Tensor, row: int, slots: Slots) -> torch.Tensor:
        first = row * slots.slot_bytes
        return table[first : first + self.task.layout.unit_row_bytes].view(self._row.dtype)

    def _head_row(self, token_id: int, stage: int) -> torch.Tensor:
        pieces = self.weights(len(self.task.layout.layers), stage)["head.weight"]
        assert isinstance(pieces, tuple)
        return next(rows[token_id - first] for first, last, rows in pieces if first <= token_id < last)

    # --- neurons --------------------------------------------------------------------------------

    def cached_parts(self, layer: int) -> Mapping[str, torch.Tensor]:
        """Part → rows that the cache of a layer holds."""
        return cache_parts(self.task.layout, self._rows[layer], self.caches[layer].n)

    def start_caches(self, first: int, before: list[list[Ints]]) -> None:
        """Fill every cache as the tokens before token `first` leave it.

        before : for each layer, the units of those tokens of the past that its window spans.
        """
        task, layout = self.task, self.task.layout
        self.caches = [WindowCache(rows, layout.architecture.d_ff, task.window, int(capacity))
                       for rows, capacity in zip(self._rows, task.capacity, strict=True)]
        assert layout.units is not None
        per_unit = layout.units.slot_bytes * layout.areas_per_layer
        room = buffer(PRELOAD_UNITS * per_unit, self.device, apart=self.apart)
        for layer, (cache, past) in enumerate(zip(self.caches, before, strict=True)):
            units = cache.start(past, first)
            for begin in range(0, len(units), PRELOAD_UNITS):
                some = units[begin : begin + PRELOAD_UNITS]
                read = unit_reads(layout, layer, some, room.host, None)
                self._read(read.asked)
                if self.apart:
                    room.near.copy_(room.pinned)
                for part in read.new_rows(room.near, layout):
                    self._rows[layer][begin : begin + len(some), part.columns] = part.rows

    # --- loading --------------------------------------------------------------------------------

    def _load_whole(self, stage: Stage) -> Weights:
        return stage_weights(stage, self._load(stage.offset, stage.n_bytes), None, 0, self.task.layout.precision)

    def _load(self, offset: int, n_bytes: int) -> torch.Tensor:
        """Bytes of the file, on the computing device."""
        into = buffer(n_bytes, self.device, apart=False)
        self._read(in_chunks(offset, n_bytes, int(STREAM_CHUNK_BYTES), into.host))
        return into.pinned.to(self.device)

    def _host_part(self, stage: Stage, streamed: int) -> torch.Tensor:
        into: Buffer = buffer(streamed, self.device, apart=False)
        self._read(in_chunks(stage.offset + stage.n_bytes - streamed, streamed, int(STREAM_CHUNK_BYTES), into.host))
        return into.pinned

    def _read(self, asked: Reads) -> None:
        self._store.submit(asked).wait()
        self.verify(asked)

    def verify(self, asked: Reads) -> None:
        """Look at the checksums of what was read, where that is asked for."""
        if self.check is not None:
            for offset, size, place in zip(asked.offsets.tolist(), asked.sizes.tolist(), asked.places.tolist(),
                                           strict=True):
                self.check(offset, asked.buffer[place : place + size])
