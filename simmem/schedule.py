"""The waist of the hourglass: what has to happen, in which order, and what each step demands.

A policy writes a `Schedule`; cost turns its demands into seconds; analytic and events turn
seconds into a timeline. Nothing above the waist knows of seconds, nothing below it of policies.

Ops stand in program order. Their structure (class, stream, dependencies) is shared by a block
of candidates; their demand is a column per candidate, candidate axis last and contiguous.

    start = max(end[deps], free[stream]);  free[stream] = start + occupancy_s
    end   = free[stream] + latency_s

An op without demand in a candidate takes no time, does not touch its stream, and ends when its
dependencies end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["DRAFT", "DemandClass", "Durations", "OpKind", "Phase", "Products", "Schedule", "ScheduleBuilder"]

Array = NDArray[np.float64]
DRAFT = "draft "
"""What the name of a class begins with that does the same for a draft model."""
Launch = Literal["stream", "graph"]
"""Kernels are launched one by one, or recorded once and launched together (CUDA graphs)."""


class OpKind(StrEnum):
    """What an op does; the names are those of the plan's breakdown."""

    IO = "io"
    TRANSFER = "transfer"
    MEMORY = "memory"
    COMPUTE = "compute"
    PREDICTOR = "predictor"
    SYNC = "sync"
    DRAFT = "draft"


class Phase(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class Products:
    """What a class multiplies: `count` products of `batch` tokens with a matrix whose rows are `cols` parameters long.

    Where rows are only moved, `cols` is their length in bytes. Only a fitted cost model looks at it.
    """

    batch: float
    cols: float
    count: float


@dataclass(frozen=True)
class DemandClass:
    """Ops that demand the same: who does the work, over which link, at which precision."""

    name: str
    kind: OpKind
    agent: str | None = None
    """Computes on this agent: roofline of its arithmetic and of its memory."""
    link: str | None = None
    """Moves over this link: its size × depth surface, or its copy rate."""
    precision: str = "fp16"
    """Arithmetic precision of a compute class."""
    products: Products | None = None
    """Of a compute class, where they are known."""
    launch: Launch = "stream"
    """Of a compute class: "graph" costs a kernel the agent's `graph_overhead`, where it has one."""
    rate: Literal["attention"] | None = None
    """Of a compute class: reads at the agent's `attention_rate`, where it has one."""


@dataclass(frozen=True)
class Schedule:
    """Ops in program order and the demand of each class in each candidate.

    Shapes: op_* are (n_ops,); flop, requests, depth, waits, and every entry of `bytes`, `acquire_bytes`
    and `release_bytes` are (n_classes, n_candidates). `bytes` is keyed by resource,
    "memory.<name>", "link.<name>" or "bus.<name>", and names every resource an op uses at once.
    """

    streams: tuple[str, ...]
    classes: tuple[DemandClass, ...]
    op_class: NDArray[np.int64]
    op_stream: NDArray[np.int64]
    op_phase: tuple[Phase, ...]
    op_token: NDArray[np.int64]
    op_layer: NDArray[np.int64]
    deps: tuple[tuple[int, ...], ...]
    flop: Array
    requests: Array
    depth: Array
    waits: Array
    """1 where the op begins behind a read that nothing was done during, 0 elsewhere."""
    bytes: Mapping[str, Array]
    acquire_bytes: Mapping[str, Array] = field(default_factory=dict)
    release_bytes: Mapping[str, Array] = field(default_factory=dict)
    held_bytes: Mapping[str, Array] = field(default_factory=dict)
    """What each tier holds before the first op, per candidate, shape (n_candidates,). [B]"""
    token_ends: tuple[int, ...] = ()
    """The op that ends each token; the last token is the one that is timed."""

    @property
    def n_ops(self) -> int:
        return len(self.op_class)

    @property
    def n_candidates(self) -> int:
        return int(self.flop.shape[1])

    @cached_property
    def present(self) -> NDArray[np.bool_]:
        """Which classes demand anything, shape (n_classes, n_candidates)."""
        some = (self.flop > 0) | (self.requests > 0)
        for amount in self.bytes.values():
            some = some | (amount > 0)
        return some

    @cached_property
    def timed(self) -> NDArray[np.bool_]:
        """Which ops belong to the timed (last) token, shape (n_ops,)."""
        if not self.token_ends:
            return np.ones(self.n_ops, dtype=np.bool_)
        return np.asarray(self.op_token == self.op_token[self.token_ends[-1]])

    @property
    def timed_bytes(self) -> dict[str, Array]:
        """Bytes that the timed token moves over each resource, per candidate. [B]"""
        uses = np.bincount(self.op_class[self.timed], minlength=len(self.classes)).astype(np.float64)
        return {name: uses @ amount for name, amount in self.bytes.items()}

    def column(self, index: int) -> Schedule:
        """The schedule of one candidate."""
        return self.columns(slice(index, index + 1))

    def columns(self, which: slice | NDArray[np.int64]) -> Schedule:
        """The schedule of some candidates; those of a slice share this one's arrays."""

        def cut(table: Mapping[str, Array]) -> dict[str, Array]:
            return {k: v[..., which] for k, v in table.items()}

        return Schedule(
            self.streams, self.classes, self.op_class, self.op_stream, self.op_phase, self.op_token, self.op_layer,
            self.deps, self.flop[:, which], self.requests[:, which], self.depth[:, which], self.waits[:, which],
            cut(self.bytes), cut(self.acquire_bytes), cut(self.release_bytes), cut(self.held_bytes), self.token_ends)

    def repeated(self, times: int) -> Schedule:
        """Every candidate `times` times over, each repeat next to its original; of one candidate nothing is copied."""

        def all_of(amount: Array) -> Array:
            each = np.broadcast_to(amount[..., None], (*amount.shape, times))
            return each.reshape(*amount.shape[:-1], self.n_candidates * times)

        def tables(some: Mapping[str, Array]) -> dict[str, Array]:
            return {k: all_of(v) for k, v in some.items()}

        return replace(
            self, flop=all_of(self.flop), requests=all_of(self.requests), depth=all_of(self.depth),
            waits=all_of(self.waits), bytes=tables(self.bytes), acquire_bytes=tables(self.acquire_bytes),
            release_bytes=tables(self.release_bytes), held_bytes=tables(self.held_bytes))


@dataclass(frozen=True)
class Durations:
    """What cost makes of a schedule's demands: seconds per class and candidate, both (n_classes, n_candidates)."""

    occupancy_s: Array
    """How long an op holds its stream. [s]"""
    latency_s: Array
    """How much later its dependants may start. [s]"""


_Rows = tuple[slice, float | Array]
"""Classes, and an amount of theirs."""


class ScheduleBuilder:
    """Collects classes and ops; the one way to make a Schedule."""

    def __init__(self, n_candidates: int, streams: Sequence[str]) -> None:
        self.n_candidates = n_candidates
        self._streams = {name: index for index, name in enumerate(streams)}
        self._classes: list[DemandClass] = []
        self._flop: list[_Rows] = []
        self._requests: list[_Rows] = []
        self._depth: list[_Rows] = []
        self._waits: list[_Rows] = []
        self._bytes: dict[str, list[_Rows]] = {}
        self._acquire: dict[str, list[_Rows]] = {}
        self._release: dict[str, list[_Rows]] = {}
        self._ops: list[tuple[int, int, Phase, int, int, tuple[int, ...]]] = []
        self._ends: list[int] = []

    def demand(
        self,
        what: DemandClass,
        *,
        flop: float | Array = 0.0,
        requests: float | Array = 0.0,
        depth: float | Array = 1.0,
        waits: float | Array = 0.0,
        bytes: Mapping[str, float | Array] | None = None,
        acquire: Mapping[str, float | Array] | None = None,
        release: Mapping[str, float | Array] | None = None,
    ) -> int:
        """Add a demand class; returns its index for `op`.

        Amounts are one number, (n_candidates,), or (m, n_candidates) for m classes that differ in them alone: their
        indices follow one another.
        """
        index, several = len(self._classes), 1
        for amount in (flop, requests, depth, waits, *(bytes or {}).values(), *(acquire or {}).values(),
                       *(release or {}).values()):
            if isinstance(amount, np.ndarray) and amount.ndim == 2:
                several = len(amount)
        self._classes += [what] * several
        where = slice(index, index + several)
        self._flop.append((where, flop))
        self._requests.append((where, requests))
        self._depth.append((where, depth))
        self._waits.append((where, waits))
        for table, given in ((self._bytes, bytes), (self._acquire, acquire), (self._release, release)):
            for name, amount in (given or {}).items():
                table.setdefault(name, []).append((where, amount))
        return index

    def op(self, demand: int, stream: str, *, deps: Sequence[int | None] = (), phase: Phase = Phase.DECODE,
           token: int = 0, layer: int = 0) -> int:
        """Append an op in program order; returns its index. `None` among the deps is left out."""
        waited = {d for d in deps if d is not None}
        earlier = tuple(sorted(waited)) if len(waited) > 1 else tuple(waited)
        index = len(self._ops)
        assert not earlier or earlier[-1] < index, "a dependency must stand earlier in program order"
        self._ops.append((demand, self._streams[stream], phase, token, layer, earlier))
        return index

    def end_token(self, op: int) -> None:
        """Mark `op` as the end of a token."""
        self._ends.append(op)

    def build(self, held_bytes: Mapping[str, float | Array] | None = None) -> Schedule:
        """The finished schedule."""

        def table(rows: Sequence[_Rows]) -> Array:
            full = np.zeros((len(self._classes), self.n_candidates))
            for where, amount in rows:
                full[where] = amount  # one number stands for every candidate
            return full

        columns = list(zip(*self._ops, strict=True))
        return Schedule(
            streams=tuple(self._streams),
            classes=tuple(self._classes),
            op_class=np.array(columns[0], dtype=np.int64),
            op_stream=np.array(columns[1], dtype=np.int64),
            op_phase=tuple(columns[2]),
            op_token=np.array(columns[3], dtype=np.int64),
            op_layer=np.array(columns[4], dtype=np.int64),
            deps=tuple(columns[5]),
            flop=table(self._flop),
            requests=table(self._requests),
            depth=table(self._depth),
            waits=table(self._waits),
            bytes={k: table(v) for k, v in self._bytes.items()},
            acquire_bytes={k: table(v) for k, v in self._acquire.items()},
            release_bytes={k: table(v) for k, v in self._release.items()},
            held_bytes={k: np.broadcast_to(np.asarray(v, dtype=np.float64), (self.n_candidates,)).copy()
                        for k, v in (held_bytes or {}).items()},
            token_ends=tuple(self._ends),
        )
