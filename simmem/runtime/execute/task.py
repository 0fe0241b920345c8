"""What does a plan ask the executor to do, token by token? Knobs, bytes and trace tokens of one candidate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.planner.candidate import Candidate
from simmem.planner.predict import timelines
from simmem.policy.context import Context
from simmem.policy.families.flash_window import FlashWindow
from simmem.policy.families.hot_cold import HotCold
from simmem.policy.layers import WARM_UP
from simmem.runtime.execute.layout import Layout, ffn_parts, layout_of, whole_blocks
from simmem.runtime.execute.measured import demands_of
from simmem.schedule import Schedule
from simmem.sim.timeline import Timeline
from simmem.trace.replay import shrink_to_capacity

__all__ = ["RUNNABLE", "HotTask", "Task", "task_of"]

Ints = NDArray[np.int64]

RUNNABLE = ("resident", "stream", "flash-window", "hot-cold")
"""Policies that the executor knows how to carry out."""


@dataclass(frozen=True)
class Task:
    """A candidate and the tokens it is to run."""

    candidate: Candidate
    layout: Layout
    n_tokens: int
    """Tokens that are measured."""
    lead: int
    """Tokens run before them, so that what is read ahead is under way."""
    first_row: int
    """Row of the window table that the first measured token is; 0 without a trace."""

    # --- knobs ----------------------------------------------------------------------------------

    @cached_property
    def knobs(self) -> dict[str, object]:
        return dict(self.candidate.knobs)

    @property
    def agent(self) -> str:
        return str(self.knobs["agent"])

    @property
    def prefetch(self) -> int:
        return int(str(self.knobs.get("prefetch_layers", 0)))

    @property
    def depth(self) -> int:
        return int(str(self.knobs.get("reader_threads", 1)))

    @property
    def window(self) -> int:
        return int(str(self.knobs.get("window_tokens", 0)))

    @property
    def coalesce(self) -> bool:
        return bool(self.knobs.get("coalesce", False))

    @property
    def by_neuron(self) -> bool:
        return bool(self.layout.parts)

    # --- the schedule ---------------------------------------------------------------------------

    @cached_property
    def schedule(self) -> Schedule:
        """Columns: the tokens that are run, leading ones first."""
        n = self.lead + self.n_tokens
        if not self.by_neuron:
            rows = np.zeros(1, np.int64)
            return self.candidate.policy.decode(self.candidate.context, self.candidate.block, rows).repeated(n)
        rows = np.arange(self.first_row - self.lead, self.first_row + self.n_tokens)
        return self._decode(rows)

    def _decode(self, rows: Ints) -> Schedule:
        """The schedule of window-table rows."""
        return self.candidate.policy.decode(self.candidate.context, self.candidate.block, rows)

    def predicted(self) -> list[Timeline]:
        """What the event engine expects of the measured tokens."""
        return timelines(self.candidate, self.rows, schedule=self.schedule.columns(slice(self.lead, None)))

    def column(self, token: int) -> Schedule:
        """The schedule of a token of the run."""
        return self.schedule.column(token)

    @property
    def rows(self) -> Ints:
        """Window-table rows of the measured tokens; as many zeros without a trace."""
        if not self.by_neuron:
            return np.zeros(self.n_tokens, np.int64)
        return np.arange(self.first_row, self.first_row + self.n_tokens)

    @cached_property
    def hops(self) -> tuple[str, ...]:
        """Links that streamed weights pass."""
        context = self.candidate.context
        host = self.knobs.get("source_tier") == "host"
        return context.device.path(context.device.host if host else context.device.storage, self.memory)

    @cached_property
    def memory(self) -> str:
        """The tier that is computed out of."""
        return self.candidate.context.memory_of(self.agent)

    @cached_property
    def unit_hops(self) -> tuple[str, ...]:
        return self.candidate.context.path_to(self.agent)

    @cached_property
    def streamed(self) -> tuple[int, ...]:
        """Bytes streamed of each layer, and last of the head, in whole blocks. [B]"""
        column, layers = self.column(0), len(self.layout.layers)
        if not self.hops:
            return (0,) * (layers + 1)
        link = self.hops[0]
        amounts = [0.0] * (layers + 1)
        for name in (f"weights.{link}", f"head weights.{link}"):
            for layer, k in demands_of(column, name).items():
                amounts[layer] = float(column.bytes[f"link.{link}"][k, 0])
        return tuple(whole_blocks(amount, self.layout.block_bytes) for amount in amounts)

    @cached_property
    def unit_bytes(self) -> NDArray[np.float64]:
        """Bytes of predicted units that each token and layer reads, (tokens, layers). [B]"""
        found = np.zeros((self.lead + self.n_tokens, len(self.layout.layers)))
        if self.by_neuron:
            link, s = self.unit_hops[0], self.schedule
            for op in np.flatnonzero(s.timed):
                k = int(s.op_class[op])
                if s.classes[k].name == f"units.{link}":
                    found[:, int(s.op_layer[op])] = s.bytes[f"link.{link}"][k]
        return found

    @cached_property
    def predictor_params(self) -> float:
        """Parameters that predicting one layer multiplies."""
        for k in demands_of(self.column(0), "predictor").values():
            return float(self.column(0).flop[k, 0]) / 2.0
        return 0.0

    @cached_property
    def looks_up(self) -> bool:
        """Does a token read its row of the input embedding from storage?"""
        return bool(demands_of(self.column(0), f"embedding rows.{self.unit_hops[0]}")) if self.unit_hops else False

    # --- the trace ------------------------------------------------------------------------------

    @cached_property
    def capacity(self) -> Ints:
        """Units that each layer's cache has room for, (layers,)."""
        policy = self.candidate.policy
        assert isinstance(policy, FlashWindow)
        return policy.cache_units(self.candidate.context, self.candidate.block).astype(np.int64)

    def past(self) -> list[list[Ints]]:
        """Per layer, the units of the tokens before the first that its cache then spans, the latest last.

        None where the run begins with the first token there is.
        """
        if self.first_row == 0:
            return [[] for _ in self.layout.layers]
        known = _known(self.candidate)
        state = shrink_to_capacity(known.table, self.window, self.capacity)
        spans = state.window[self.first_row - self.lead] if self.window else np.zeros(len(self.layout.layers), int)
        before = [self.active(-back) for back in range(self.window, 0, -1)]
        return [[units[layer] for units in before[len(before) - int(span):]] for layer, span in enumerate(spans)]

    def active(self, token: int) -> list[Ints]:
        """Units that token `token` of the run uses, by layer; negative tokens lie before it."""
        context = _known(self.candidate)
        assert context.trace is not None
        at = int(context.table.tokens[0]) + self.first_row - self.lead + token
        bits = np.unpackbits(context.trace.active[at], axis=1, bitorder="little", count=context.trace.header.n_units)
        return [np.flatnonzero(row) for row in bits]

    @cached_property
    def gap_units(self) -> int:
        """Units that may lie unused inside a merged read: what is cheaper to read than a second request."""
        link = self.candidate.context.storage_link[1]
        assert link.request_time is not None and link.request_rate is not None and self.layout.units is not None
        return int(link.request_time.value * link.request_rate.value // self.layout.units.slot_bytes)

    @cached_property
    def known_first(self) -> tuple[str, ...]:
        """Matrices of the FFN that lie beside the fetched neurons and tell which those are."""
        return tuple(n for n in ffn_parts(self.layout.architecture) if n not in self.layout.parts)


@dataclass(frozen=True)
class HotTask(Task):
    """A task whose neurons and heads are shared by a unit with a memory of its own and the processor beside it."""

    @cached_property
    def hot(self) -> NDArray[np.bool_]:
        """(layers, units) neurons in the unit's memory; the others lie in the host's."""
        return self.policy.hot_units(self.candidate.context, self.candidate.block)

    @cached_property
    def heads(self) -> Ints:
        """(layers,) heads in the unit's memory, the first ones; those that share keys and values count as one."""
        return self.policy.hot_heads(self.candidate.context, self.candidate.block)

    @property
    def policy(self) -> HotCold:
        assert isinstance(self.candidate.policy, HotCold)
        return self.candidate.policy

    @property
    def host(self) -> str:
        """The agent that computes out of host memory."""
        return self.policy.agents(self.candidate.context, self.candidate.block)[1]

    @property
    def kv_on_host(self) -> bool:
        """Do all keys and values lie in host memory? Else each head's beside its weights."""
        return self.knobs["kv_cache"] == "host"

    @cached_property
    def links(self) -> tuple[str, str]:
        """From the unit's memory to the host's, and back."""
        device = self.candidate.context.device
        (down,), (up,) = device.path(self.memory, device.host), device.path(device.host, self.memory)
        return down, up

    def _decode(self, rows: Ints) -> Schedule:
        return self.policy.counted(self.candidate.context, self.candidate.block, rows, self.hot)

    def active(self, token: int) -> list[Ints]:
        if self.knobs["predictor"] == "none":
            return [np.arange(self.hot.shape[1])] * len(self.hot)
        return super().active(token)


def task_of(candidate: Candidate, n_tokens: int) -> Task:
    """What running `n_tokens` of a candidate means; consecutive tokens from the start of its trace's steady state.

    Raises SpecError where the executor cannot carry the plan out.
    """
    name, context = candidate.policy.name, candidate.context
    if name not in RUNNABLE:
        raise SpecError(f"found {name!r}, but only {', '.join(RUNNABLE)} can be run", key="policy.name")
    if context.workload.draft_length:
        raise SpecError(f"found {context.workload.draft_length}, expected 0: plans with a draft model cannot be run",
                        key="workload.draft_length")
    if context.workload.batch != 1:
        raise SpecError(f"found {context.workload.batch}, but only a single sequence can be run", key="workload.batch")
    knobs, context = candidate.knobs, _known(candidate)
    if name == "hot-cold":
        _check_hot(candidate, context)
    by_neuron = name == "hot-cold" or (name == "flash-window" and knobs["predictor"] != "none")
    layout = layout_of(context, by_neuron=by_neuron, bundled=bool(knobs.get("bundled", True)))
    ahead = int(str(knobs.get("prefetch_layers", 0)))
    stages = len(layout.layers) + 1
    lead = 1 + (max(1, math.ceil(WARM_UP * (ahead + 1) / stages)) if ahead else 0)
    if by_neuron:
        # The row before the first one that is run says what the cache holds then.
        rows = len(context.table.tokens) - 1 - lead
        if rows < 1:
            raise SpecError(f"has {len(context.table.tokens)} tokens behind a full window, at least {lead + 2} are "
                            "needed to run", key="trace")
        n_tokens = min(n_tokens, rows)
    kind = HotTask if name == "hot-cold" else Task
    return kind(candidate, layout, n_tokens, lead, 1 + lead if by_neuron else 0)


def _check_hot(candidate: Candidate, known: Context) -> None:
    """Raise SpecError where neurons and heads cannot be shared as the plan says."""
    assert isinstance(candidate.policy, HotCold)
    a, knobs = known.model.architecture, candidate.knobs
    if knobs["placement"] != "frequency":
        raise SpecError(f"found {knobs['placement']!r}, but only neurons placed by frequency can be run",
                        key="placement")
    if known.unit_matrices < known.model.unit_matrices:
        raise SpecError(f"has units of {known.unit_matrices} of the {known.model.unit_matrices} matrices of a neuron: "
                        "both sides would need what the others say, which the executor does not hand over", key="trace")
    used = candidate.policy.used_heads(candidate.context, candidate.block)
    if used < 1.0:
        raise SpecError(f"says that a token uses {100 * used:g} % of the attention heads, not which", key="trace")
    device, memory = known.device, known.memory_of(str(knobs["agent"]))
    between = (*device.path(memory, device.host), *device.path(device.host, memory))
    if len(between) != 2:
        raise SpecError(f"has {len(between)} links between {memory} and {device.host}, expected one each way",
                        key=device.name)
    if a.n_heads * a.d_head != a.d_model:
        raise SpecError(f"has {a.n_heads} heads of {a.d_head}, expected them to make up its width of {a.d_model}",
                        key=known.model.name)


def _known(candidate: Candidate) -> Context:
    """The candidate's context, with the units that its predictor asks for where it follows one."""
    knobs = candidate.knobs
    return candidate.context.asking(str(knobs.get("predictor")), int(str(knobs.get("prefetch_layers", 0))))
