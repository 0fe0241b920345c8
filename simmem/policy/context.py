"""What does a policy know when it lays out a schedule, and what must any of them hold in memory?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from simmem.errors import TraceError
from simmem.policy.layer_kinds import Layers, layers_of
from simmem.spec.device import Agent, Device, Link
from simmem.spec.model import Model
from simmem.spec.precision import FILE, matrix_bytes_per_param, vector_bytes_per_param
from simmem.spec.workload import Workload
from simmem.trace.drawn import uniform_routing
from simmem.trace.hot import HotTable, hot_table
from simmem.trace.replay import WindowTable, run_table, window_table
from simmem.trace.trace import Predictor, Trace

__all__ = ["MAX_WINDOW", "Context", "Replayed"]

Array = NDArray[np.float64]

MAX_WINDOW = 32
"""Longest sliding window that is searched. [tokens]"""
ROUTING_DRAWS = 8192
"""Choices of a layer's experts that are drawn where no trace of the routing is given: the standard error of a hit ratio
is then half a point (0.5 / √8192) at most, and a replay of all cache sizes takes a tenth of a second."""


@dataclass(frozen=True)
class Replayed:
    """A trace and what its replay counted; shared by every context that plans with it."""

    trace: Trace
    vary: Callable[[Sequence[tuple[float, float]]], list[Trace]] | None = None
    """The trace with factors on its law's (active share, concentration), for a synthetic one."""
    longest_window: int | None = None

    @property
    def _longest(self) -> int:
        return self.longest_window or min(MAX_WINDOW, self.trace.header.n_tokens // 3)

    @cached_property
    def table(self) -> WindowTable:
        """Active, held and new units under every window up to MAX_WINDOW."""
        return window_table(self.trace, self._longest)

    @property
    def timed(self) -> NDArray[np.int64]:
        """Tokens of the table, without counting anything of them."""
        return np.arange(self._longest, self.trace.header.n_tokens)

    @cached_property
    def ends(self) -> dict[str, tuple[float, Replayed, float, Replayed]]:
        """Per figure of the trace's law: low factor, the trace there, high factor, the trace there (90 % range)."""
        if self.vary is None:
            return {}
        statistics = self.trace.header.statistics
        (less, more), (flat, steep) = (statistics[name]["factors"] for name in ("active_share", "concentration"))
        at = [Replayed(trace, longest_window=self._longest)
              for trace in self.vary([(less, 1.0), (more, 1.0), (1.0, flat), (1.0, steep)])]
        return {"active_share": (less, at[0], more, at[1]), "concentration": (flat, at[2], steep, at[3])}

    @cached_property
    def memo(self) -> dict[tuple[object, ...], Any]:
        """Results that contexts with this trace share, by all else that they depend on."""
        return {}

    @cached_property
    def hot(self) -> HotTable:
        """Classes of equally frequent units, told by the tokens that the table does not time."""
        return hot_table(self.trace, self.timed)

    @cached_property
    def _asked(self) -> dict[tuple[str, int], Replayed]:
        return {}

    def asking(self, name: Literal["low-rank", "gate"], layers_ahead: int) -> Replayed:
        """The trace of what one of its predictors asked for; see `Trace.asking`."""
        found, _ = self.trace.asked_by(name, layers_ahead)
        key = name, found.layers_ahead or 0
        if key not in self._asked:
            self._asked[key] = Replayed(self.trace.asking(*key), longest_window=self.table.max_window)
        return self._asked[key]

    @cached_property
    def _runs(self) -> dict[tuple[int, tuple[int, ...], tuple[int, ...]],
                            tuple[NDArray[np.int64], NDArray[np.int64]]]:
        return {}

    def runs(self, rows: NDArray[np.int64], gap_units: int, windows: tuple[int, ...]
             ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(requests, units read) of merged reads for table rows; each (n_rows, n_layers, n_windows)."""
        key = (gap_units, windows, tuple(rows.tolist()))
        if key not in self._runs:
            self._runs[key] = run_table(self.trace, self.table.tokens[rows], windows, gap_units)
        return self._runs[key]

    @cached_property
    def _widest(self) -> dict[int, int]:
        return {}

    def widest_read(self, gap_units: int) -> int:
        """Most units that merged reads of one token in one layer span, whatever the cache holds."""
        if gap_units not in self._widest:  # a closing grows with its set: nothing cached spans the most
            _, spanned = run_table(self.trace, self.table.tokens, (0,), gap_units)
            self._widest[gap_units] = int(spanned.max())
        return self._widest[gap_units]


@lru_cache(maxsize=4)
def _drawn(model: str, n_layers: int, n_experts: int, per_token: int, batch: int, unit_bytes: float) -> Replayed:
    """Drawn routing, and what is counted on it, kept for the precisions and budgets that a search goes through."""
    return Replayed(uniform_routing(model, n_layers, n_experts, per_token, batch=batch, draws=ROUTING_DRAWS,
                                    unit_bytes=unit_bytes))


@dataclass(frozen=True)
class Context:
    """Model, device, workload and trace, with the bytes each tier may hold."""

    device: Device
    model: Model
    workload: Workload
    replayed: Replayed | None
    budget_bytes: Mapping[str, float]
    routing: Replayed | None = None
    """A trace of which experts tokens chose, beside or instead of one of neurons."""

    @cached_property
    def memo(self) -> dict[tuple[object, ...], Any]:
        """Results that several blocks of one context share (shrunk windows)."""
        return {}

    @cached_property
    def routed(self) -> Replayed:
        """The trace of the routing; where none is given, one that is drawn (`simmem.trace.drawn`).

        Only for a mixture of experts.
        """
        a = self.model.architecture
        assert a.experts is not None
        return self.routing or _drawn(self.model.name, a.n_expert_layers, a.experts.count, a.experts.per_token,
                                      self.workload.step_tokens, 2.0 * self.model.expert_params)

    # --- device -----------------------------------------------------------------------------

    @cached_property
    def able_agents(self) -> dict[str, Agent]:
        """Units that can multiply weights of every precision that the workload has, a draft model's too."""
        precisions = (*self.workload.precisions, *(self.drafting.workload.precisions if self.drafting else ()))
        return {name: a for name, a in self.device.agent.items() if all(a.computes_as(p) for p in precisions)}

    @cached_property
    def fastest_agent(self) -> str | None:
        """The able unit that goes through its memory fastest; None where no unit is able."""
        return max(self.able_agents, key=lambda name: self.able_agents[name].rate.value, default=None)

    def memory_of(self, agent: str) -> str:
        """The tier an agent computes out of."""
        return self.device.agent[agent].memory

    def path_to(self, agent: str) -> tuple[str, ...]:
        """Links from storage to an agent's memory."""
        return self.device.path(self.device.storage, self.memory_of(agent))

    @cached_property
    def storage_link(self) -> tuple[str, Link]:
        """Name and description of the link out of storage."""
        name = next(n for n, k in self.device.link.items() if k.source == self.device.storage)
        return name, self.device.link[name]

    @cached_property
    def host_agent(self) -> str | None:
        """An agent that computes out of host memory (the CPU), if there is one."""
        host = [n for n, a in self.device.agent.items() if a.memory == self.device.host]
        return "cpu" if "cpu" in host else (host[0] if host else None)

    # --- weights ----------------------------------------------------------------------------

    def group_precision(self, group: str) -> str:
        """The precision that a tensor group is stored in."""
        return self.workload.precision_of(group)

    @cached_property
    def group_bytes(self) -> dict[str, float]:
        """Stored bytes of each tensor group at its precision. [B]"""
        at = {p: self.model.group_bytes(p) for p in {self.group_precision(g.name) for g in self.model.groups()}}
        return {g.name: at[self.group_precision(g.name)][g.name] for g in self.model.groups()}

    @cached_property
    def total_bytes(self) -> float:
        return sum(self.group_bytes.values())

    @cached_property
    def layers(self) -> Layers:
        """Which kinds of layer there are, and what each takes in storage."""
        return layers_of(self.model, self.group_bytes)

    @cached_property
    def mixer_bytes(self) -> float:
        """Attention (or state space) and norm weights of one layer, its share of the final norm included. [B]"""
        return self.layers.mixer_bytes

    @cached_property
    def head_bytes(self) -> float:
        """Weights the output projection multiplies; the embedding's own where the head is tied. [B]"""
        return self.group_bytes["embedding"] if self.model.architecture.tied_head else self.group_bytes["head"]

    @cached_property
    def unit_matrices(self) -> int:
        """Matrices a fetched unit has a row or column in; one less where the gate itself is the predictor."""
        if self.trace is None:
            return self.model.unit_matrices
        header = self.trace.header
        row_bytes = self.model.architecture.d_model * matrix_bytes_per_param(header.unit_precision)
        matrices, most = round(header.unit_bytes / row_bytes), self.model.unit_matrices
        if not 1 <= matrices <= most:
            raise TraceError(f"has units of {header.unit_bytes:g} bytes at {header.unit_precision}; "
                             f"a neuron of {self.model.name} has 1 to {most} rows of {row_bytes:g}", key=header.name)
        return matrices

    @cached_property
    def unit_params(self) -> int:
        """Parameters fetched with one FFN neuron."""
        return self.unit_matrices * self.model.architecture.d_model

    @cached_property
    def unit_bytes(self) -> float:
        """Stored bytes of what is fetched with one FFN neuron. [B]"""
        return self.unit_params * self.stored_bytes_per_param("ffn")[0]

    def stored_bytes_per_param(self, group: str) -> tuple[float, float]:
        """Bytes (matrix, vector) a parameter of a group takes in storage. [B]"""
        return self._bytes_per_param(self.group_precision(group), group)

    def _bytes_per_param(self, precision: str, group: str) -> tuple[float, float]:
        """Bytes of a (matrix, vector) parameter of a group; their mean where a file holds the group in several. [B]"""
        if precision != FILE:
            return matrix_bytes_per_param(precision), vector_bytes_per_param(precision)
        key = ("mean bytes", group)
        if key not in self.memo:  # asked for by every op
            held = self.model.group_bytes(FILE).get(group, 0.0)  # a model may have no norms with parameters (OLMo)
            self.memo[key] = held / max(self.model.group(group).params, 1)
        mean: float = self.memo[key]
        return mean, mean

    def read_precision(self, agent: str, group: str) -> str:
        """The precision weights of a group are read in by the multiply on an agent."""
        return self.device.agent[agent].compute_precision or self.group_precision(group)

    def read_bytes_per_param(self, agent: str, group: str) -> tuple[float, float]:
        """Bytes (matrix, vector) a parameter of a group costs to read in the multiply on an agent. [B]"""
        return self._bytes_per_param(self.read_precision(agent, group), group)

    # --- what every policy holds --------------------------------------------------------------

    @cached_property
    def kv_bytes(self) -> float:
        """Keys and values of the longest context. [B]"""
        return self.model.kv_bytes(self.workload.kv, self.workload.context_tokens) * self.workload.batch

    @cached_property
    def decode_kv_bytes(self) -> float:
        """Keys and values that a mean decode step reads, all sequences; a state is read and written. [B]"""
        w, a = self.workload, self.model.architecture
        once = self.model.kv_bytes(w.kv, w.mean_decode_context, w.mean_decode_window(a.window))
        return once * w.batch * (2 if a.state_space else 1)

    @cached_property
    def working_bytes(self) -> float:
        """Activations of the prompt (or of a longer draft) through one layer, and a row of logits for each token that a
        step verifies, in fp32. [B]"""
        return float(self.working_bytes_of(self.workload.batch, "fp32"))

    def working_bytes_of(self, gpu_batch: Array | float, precision: str = "fp16") -> Array | float:
        """The same of a batch of the sequences, for engines that take them one batch after the other. [B]"""
        a, each, verified = self.model.architecture, matrix_bytes_per_param(precision), 1 + self.workload.draft_length
        return each * gpu_batch * (max(self.workload.prompt_tokens, verified) * a.activations + verified * a.vocab)

    def activation_bytes(self, n_tokens: float, precision: str = "fp16") -> float:
        """Hidden vectors between two layers. [B]"""
        return n_tokens * self.model.architecture.d_model * matrix_bytes_per_param(precision)

    @cached_property
    def kv_token_bytes(self) -> float:
        """Keys and values (or the state) that one token of one sequence adds, all layers. [B]"""
        return self.model.kv_bytes(self.workload.kv, 1.0)

    # --- a draft model --------------------------------------------------------------------------

    @cached_property
    def drafting(self) -> Context | None:
        """The draft model, as it is published, decoding a token of each sequence at a time; None where nothing is
        drafted."""
        w = self.workload
        if w.draft is None or not w.draft.length:
            return None
        return replace(self, model=w.draft.model, replayed=None, routing=None, workload=replace(
            w, weights=w.draft.model.own_precision, mixed=(), draft=None))

    # --- the trace ----------------------------------------------------------------------------

    @property
    def trace(self) -> Trace | None:
        return self.replayed.trace if self.replayed else None

    @cached_property
    def attention_active_share(self) -> float:
        """Share of the attention heads that a token uses; 1 where the trace does not say. TraceError for no share."""
        if self.trace is None or "attention_active_share" not in self.trace.header.statistics:
            return 1.0
        stated = self.trace.header.statistics["attention_active_share"]
        share = stated.get("value") if isinstance(stated, Mapping) else None
        if not isinstance(share, (int, float)) or not 0.0 <= share <= 1.0:
            raise TraceError(f"found {stated!r}, expected a value from 0 to 1", key="statistics.attention_active_share")
        return float(share)

    @property
    def fitted(self) -> tuple[Predictor, ...]:
        """Predictors other than the trace's own whose questions it holds, those that a policy can plan with."""
        if self.trace is None:
            return ()
        header = self.trace.header
        return tuple(p for p in header.predictors if p.held and p.name in ("low-rank", "gate")
                     and p.name != header.predictor)

    def asking(self, predictor: str, layers_ahead: int) -> Context:
        """The same with the trace of what a predictor asked for, where it is one of `fitted`."""
        if self.replayed is None or all(predictor != p.name for p in self.fitted):
            return self
        name: Literal["low-rank", "gate"] = "low-rank" if predictor == "low-rank" else "gate"
        return self.with_trace(self.replayed.asking(name, layers_ahead))

    def with_trace(self, replayed: Replayed) -> Context:
        """The same with another trace; for the same one always the same context, which keeps what it has counted."""
        key = ("with trace", id(replayed))
        if key not in self.memo:
            self.memo[key] = replace(self, replayed=replayed)
        found: Context = self.memo[key]
        return found

    @property
    def table(self) -> WindowTable:
        """Counts of the trace's replay; only for a context that has one."""
        assert self.replayed is not None
        return self.replayed.table

    def runs(self, rows: NDArray[np.int64], gap_units: int, windows: tuple[int, ...]
             ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `Replayed.runs`."""
        assert self.replayed is not None
        return self.replayed.runs(rows, gap_units, windows)

    def widest_read(self, gap_units: int) -> int:
        """See `Replayed.widest_read`."""
        assert self.replayed is not None
        return self.replayed.widest_read(gap_units)

    def agent(self, name: str) -> Agent:
        return self.device.agent[name]
