"""One token after another: read, copy, rearrange, multiply, in the order of the plan's schedule.

The thread that runs here is the computing unit. Reads are handed to the store and copies to their own thread, each in
the order of the schedule, and waited for where an op depends on them. Every op leaves the times at which it really
began and ended; bytes and units are counted where they are handed in, for the caller to compare with the plan's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from simmem.policy.layers import STREAM_CHUNK_BYTES
from simmem.runtime.execute.cache import CacheStep, NewRows, padded
from simmem.runtime.execute.copies import Copier, Move
from simmem.runtime.execute.kernels import Decoder, FfnRows, Weights
from simmem.runtime.execute.measured import Clock, Key
from simmem.runtime.execute.memory import Memory
from simmem.runtime.execute.task import Task
from simmem.runtime.execute.units import unit_reads
from simmem.runtime.reader import Reads, Store, in_chunks

if TYPE_CHECKING:
    import torch

__all__ = ["Counted", "Engine"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Counted:
    """What was really moved and found."""

    requests: Ints
    """(tokens, layers) reads of units."""
    read_bytes: Ints
    """(tokens, layers) of units. [B]"""
    new_units: Ints
    """(tokens, layers)"""
    rows: Ints
    """(tokens, layers) units that the FFN multiplied."""
    moved_bytes: Ints
    """(tokens,) over all links. [B]"""
    rows_beside: Ints | None = None
    """(tokens, layers) units that a second unit multiplied beside it; None where there is none."""

    def of(self, tokens: slice) -> Counted:
        """The same of some tokens."""
        return Counted(self.requests[tokens], self.read_bytes[tokens], self.new_units[tokens], self.rows[tokens],
                       self.moved_bytes[tokens], None if self.rows_beside is None else self.rows_beside[tokens])


@dataclass(frozen=True)
class _Coming:
    """Units of a layer that are on their way."""

    move: Move
    step: CacheStep
    new: Sequence[NewRows]
    """Where they will lie, for the cache to copy."""
    held: Sequence[FfnRows]
    """What the FFN multiplies once they are there."""


class Engine:
    """Runs the tokens of a task; a context manager that ends its thread.

    Parameters
    ----------
    store : where weights are read from; the caller closes it.
    memory : what is held, loaded.
    decoder : the state of the sequence.
    exact : leave out the units that are held but not active, as the masked network does.
    """

    def __init__(self, task: Task, store: Store, memory: Memory, decoder: Decoder, *, n_tokens: int,
                 exact: bool = False) -> None:
        self.task, self.clock = task, Clock(memory.device)
        self._store, self._memory, self._decoder, self._exact = store, memory, decoder, exact
        self._layers, self._ahead, self._by_neuron = len(task.layout.layers), task.prefetch, task.by_neuron
        self._gap_units = task.gap_units if task.by_neuron and task.coalesce else None
        self._n_stages = n_tokens * (self._layers + 1)
        self._copier = Copier(memory.device, self.clock) if memory.apart else None
        self._fetched: dict[int, Move] = {}
        self._computed: dict[int, Key] = {}
        asked, read, new, rows = (np.zeros((n_tokens, self._layers), np.int64) for _ in range(4))
        self.counted = Counted(asked, read, new, rows, np.zeros(n_tokens, np.int64))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._copier is not None:
            self._copier.close()

    def token(self, number: int, token_id: int, position: int, active: Sequence[Ints], next_id: int | None = None
              ) -> torch.Tensor:
        """Run one token of the run.

        Parameters
        ----------
        active : units it uses, by layer; () where units are not fetched one by one.
        next_id : the token that follows, where that is given rather than chosen.

        Returns the id of the likeliest next token, on the computing device; `decoder.logits` are its logits.
        """
        decoder, memory, ahead = self._decoder, self._memory, self._ahead
        coming: dict[int, _Coming] = {}
        decoder.embed(self._embedding(number, token_id), memory.fixed, position)
        if self._by_neuron:
            for layer in range(min(ahead, self._layers)):
                coming[layer] = self._look_ahead(number, layer, active[layer], None)
        for layer in range(self._layers):
            stage = self._arrive(number, layer)
            weights = memory.weights(layer, stage)
            attended, fed = (number, "attention", layer), (number, "ffn", layer)
            with self.clock.op(attended):
                decoder.attend(layer, weights, position)
            if self._by_neuron:
                if layer + ahead < self._layers:
                    coming[layer + ahead] = self._look_ahead(number, layer + ahead, active[layer + ahead], attended)
                if ahead:  # behind the units on the link, as the schedule has it
                    self._fetch(stage + ahead)
                self._feed_units(number, layer, coming.pop(layer), weights)
            else:
                with self.clock.op(fed):
                    decoder.feed(weights)
            self._leave(stage, fed)
        stage = self._arrive(number, self._layers)
        key = (number, "head", self._layers)
        with self.clock.op(key):
            chosen = decoder.finish(memory.weights(self._layers, stage), memory.fixed)
        if memory.head_rows_leave:
            memory.keep_row(int(chosen) if next_id is None else next_id, stage)
        self._leave(stage, key)
        if self._by_neuron and ahead:
            self._fetch(stage + ahead)
        return chosen

    # --- streamed weights -------------------------------------------------------------------------

    def _arrive(self, number: int, where: int) -> int:
        """Wait for the weights of a stage; returns its number, counted over all tokens."""
        stage = number * (self._layers + 1) + where
        self._fetch(stage)
        if self._ahead and not self._by_neuron:
            self._fetch(stage + self._ahead)  # the stage before is computed: its buffer is free
        move = self._fetched.pop(stage, None)
        if move is not None:
            self._wait(move)
        return stage

    def _leave(self, stage: int, key: Key) -> None:
        """A stage was computed with: its buffer is free for another."""
        self._computed[stage] = key

    def _fetch(self, stage: int) -> None:
        """Hand in the read of a stage, once what its buffer held was computed with."""
        task, memory = self.task, self._memory
        number, where = divmod(stage, self._layers + 1)
        n_bytes = task.streamed[where]
        if n_bytes == 0 or stage in self._fetched or stage >= self._n_stages:
            return
        self.clock.wait(self._computed.get(stage - 1 - self._ahead))
        whole = task.layout.head if where == self._layers else task.layout.layers[where]
        asked = None
        if memory.host_copy is None:
            asked = in_chunks(whole.offset + whole.n_bytes - n_bytes, n_bytes, int(STREAM_CHUNK_BYTES),
                              memory.staging(where, stage).host)
        name = "head weights" if where == self._layers else "weights"
        self._fetched[stage] = self._move(number, name, where, asked, task.hops, n_bytes, stage)

    def _move(self, number: int, name: str, where: int, asked: Reads | None, hops: tuple[str, ...], n_bytes: int,
              stage: int = 0) -> Move:
        """Read, where something is asked of the store, and copy on over what links are left."""
        move = Move(None if asked is None else self._store.submit(asked))
        if asked is not None:
            move.read_key, hops = (number, f"{name}.{hops[0]}", where), hops[1:]
            self.counted.moved_bytes[number] += n_bytes
        for hop in hops:
            assert self._copier is not None and len(hops) == 1
            move.copy_key = (number, f"{name}.{hop}", where)
            self.counted.moved_bytes[number] += n_bytes
            self._copier.submit(move, *self._memory.copy_ends(name, where, stage, n_bytes))
        return move

    def _wait(self, move: Move) -> None:
        move.wait()
        if move.ticket is not None:
            assert move.read_key is not None
            self.clock.times[move.read_key] = (move.ticket.start_s, move.ticket.free_s)
            self._memory.verify(move.ticket.asked)
        if move.copy_key is not None:
            assert self._copier is not None
            self._copier.arrive(move)

    # --- neurons ----------------------------------------------------------------------------------

    def _look_ahead(self, number: int, layer: int, active: Ints, after: Key | None) -> _Coming:
        """Predict a layer's units and hand in the reads of those that are not held.

        While they are read, everything is decided that does not ask for their bytes: what stays, what goes where.
        """
        task, memory, counted = self.task, self._memory, self.counted
        if task.predictor_params:
            after = (number, "predictor", layer)
            with self.clock.op(after):
                if task.known_first:
                    weights = memory.weights(layer, number * (self._layers + 1) + layer)
                    self._decoder.predict_whole(weights, task.known_first)
                else:
                    self._decoder.predict_low_rank(*memory.predictors[layer])
        self.clock.wait(after)  # which units are needed is known only now
        cache, room = memory.caches[layer], memory.unit_buffers[layer % len(memory.unit_buffers)]
        new = cache.missing(active)
        read = unit_reads(task.layout, layer, new, room.host, self._gap_units)
        n_bytes = read.asked.n_bytes
        move = self._move(number, "units", layer, read.asked, task.unit_hops, n_bytes)
        time.sleep(0.0)  # threads that read need the interpreter to begin
        counted.requests[number, layer] = len(read.asked.offsets)
        counted.read_bytes[number, layer] = n_bytes
        counted.new_units[number, layer] = len(new)
        step = cache.step(number, active, new)
        cache.settle(step)
        counted.rows[number, layer] = cache.n + (0 if step.kept else len(new))
        mask = self._mask(cache.ids, active) if self._exact and step.kept else None
        held = [FfnRows(memory.cached_parts(layer), cache.ids, mask)] if cache.n else []
        if step.kept:
            return _Coming(move, step, read.new_rows(room.near, task.layout), held)
        # They do not fit: what is held of them, and what is read, are used and forgotten.
        cache.fill(step, ())
        cache.forget()
        return _Coming(move, step, (), [*held, read.rows(room.near, task.layout)])

    def _feed_units(self, number: int, layer: int, coming: _Coming, weights: Weights) -> None:
        x = self._decoder.feed_input(weights)
        self._wait(coming.move)
        if coming.step.kept:
            with self.clock.op((number, "upkeep", layer)):
                self._memory.caches[layer].fill(coming.step, coming.new)
        with self.clock.op((number, "ffn", layer)):
            self._decoder.feed_rows(x, weights, coming.held, self.task.known_first)

    def _mask(self, held: Ints, active: Ints) -> torch.Tensor:
        import torch

        wanted = np.zeros(padded(len(held)), np.float32)
        wanted[: len(held)] = np.isin(held, active)
        return torch.from_numpy(wanted).to(self._memory.device, self._decoder.dtype)

    def _embedding(self, number: int, token_id: int) -> torch.Tensor:
        """The input embedding of a token: held, kept from the head's last visit, or read now."""
        memory, slots = self._memory, self.task.layout.embedding
        if memory.lookup is None:
            return memory.embedding_row(token_id)
        assert slots is not None
        one = np.zeros(1, np.int64)
        asked = Reads(one + slots.offset + token_id * slots.slot_bytes, one + slots.slot_bytes, one,
                      memory.lookup.host)
        self._wait(self._move(number, "embedding rows", 0, asked, self.task.unit_hops, slots.slot_bytes))
        return memory.looked_up()
