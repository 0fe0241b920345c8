"""LLM in a flash: attention stays, predicted FFN neurons of the last k tokens stay, new ones are read.

Alizadeh et al., arXiv 2312.11514 (ACL 2024), §3: selective persistence of embeddings and
attention, a predictor per layer, a sliding window over tokens, and row-column bundling, so that
a neuron is one read of 2·d_model (3·d_model when gated) parameters. Bytes come from replaying
the trace, never from a formula.

The FFN multiplies every row that is held, not only the predicted ones: the rows are one dense
matrix. Upkeep follows the paper's Appendix: deleting a row moves the last row into its place and
a new row is appended, two row copies a new row, each read once and written once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.policy.base import Block, Knob, KnobValue, Placement, register, why_not_plan
from simmem.policy.context import Context
from simmem.policy.families._dense import agent_knob, depths
from simmem.policy.families._predicted import as_known, predictor_knobs, said_of_predictor, unknown_cost, unmeasured
from simmem.policy.layers import Demands, UnitDemands, decode_schedule, prefill_schedule
from simmem.schedule import Schedule
from simmem.trace.replay import shrink_to_capacity

__all__ = ["FlashWindow"]

Array = NDArray[np.float64]

WINDOWS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
"""Windows that are searched; any whole number up to the largest may be set. [tokens]"""

TRAFFIC_PER_NEW_BYTE = 4.0
"""Two row copies per new row (append, fill the hole), each a read and a write."""


@dataclass(frozen=True)
class _Cache:
    """Cache counts of the distinct (window, room) pairs of a block.

    new_units, held_units and window are (n_states, n_rows, n_layers) over all table rows; `state`
    (n_candidates,) says which of them a candidate is in. `window` is the one that decided the
    hits of a token, below the knob's where the budget binds.
    """

    new_units: NDArray[np.int64]
    held_units: NDArray[np.int64]
    window: NDArray[np.int64]
    state: NDArray[np.int64]
    rows_bytes: Array
    """Preallocated for the cache, (n_candidates,). [B]"""


@register
class FlashWindow:
    """Windowed, bundled reads of predicted neurons from storage."""

    name = "flash-window"
    summary = "attention resident, neurons of recent tokens cached, new ones read in bundles"
    uses_trace = True

    def knobs(self, context: Context) -> tuple[Knob, ...]:
        if why_not_plan(self, context) is not None:
            return ()
        return (
            agent_knob(context),
            *predictor_knobs(context),
            Knob("bundled", "demand", (True, False), "rows and columns of a neuron stored side by side", default=True),
            Knob("coalesce", "demand", (False, True), "merge reads whose gap costs less than a request",
                 default=False),
            Knob("window_tokens", "demand", tuple(k for k in WINDOWS if k <= context.table.max_window),
                 "tokens whose neurons stay cached", low=0, high=context.table.max_window),
            Knob("attention_resident", "demand", (1.0, 0.5, 0.0),
                 "share of embeddings and attention that stays resident", default=1.0, low=0.0, high=1.0),
            Knob("reader_threads", "demand", depths(context), "reads in flight", default=32, low=1, high=1024),
        )

    def unmeasured(self, context: Context, structural: Mapping[str, KnobValue], fixed: Mapping[str, object]) -> bool:
        """Whether nobody measured what a combination costs; it may be set, but is not searched."""
        return "prefetch_layers" not in fixed and unmeasured(context, structural)

    def refine(self, context: Context, block: Block, fixed: Mapping[str, object]) -> Block:
        """Add, for every window, the largest share of attention that leaves room for all of it, and for the prompt.

        What is held is convex in the share, so a chord up to the far end never says too much: one from nothing, and
        one more from where that led, past where the head of a prompt gives way to its layers as the widest read. Where
        nothing fits without any share, because the head is wider than what the share holds, none is looked for.
        """
        if "attention_resident" in fixed or block.structural["predictor"] == "none":
            return block
        context = as_known(context, block)
        # The other knobs once each, at the first share of the grid: the share is about to be replaced.
        one = block.only(np.flatnonzero(block.columns["attention_resident"] == block.columns["attention_resident"][0]))
        fast = context.memory_of(str(block.structural["agent"]))
        windows = one.columns["window_tokens"].astype(np.int64)
        cache = context.table.held_units.max(axis=0).sum(axis=0)[windows] * context.unit_bytes * (windows > 0)

        def held(share: Array) -> tuple[Array, ...]:  # while decoding, and while the prompt passes: as `_buffers` does
            at = Block(one.structural, {**one.columns, "attention_resident": share})
            fixed = self._fixed(context, at)
            return fixed + self._staging(context, at) + cache, fixed + self._prefill_staging(context, at)

        share, full = np.zeros(one.n_candidates), held(np.ones(one.n_candidates))
        for _ in range(2):
            steps = [np.where(most > least, (context.budget_bytes[fast] - least) / np.maximum(most - least, 1.0), 1.0)
                     for least, most in zip(held(share), full, strict=True)]
            share = share + (1.0 - share) * np.clip(np.minimum(*steps), 0.0, 1.0)
        share = share * (1 - 1e-9)  # sums are rounded
        inside = np.flatnonzero((share > 0) & (share < 1 - 1e-6))  # all of it stands in the grid
        added = {**one.only(inside).columns, "attention_resident": share[inside]}
        return Block(block.structural, {k: np.concatenate([v, added[k]]) for k, v in block.columns.items()})

    # --- memory ---------------------------------------------------------------------------------

    def _fixed(self, context: Context, block: Block) -> Array:
        """Everything in fast memory but the neuron cache and the read buffers, (n_candidates,). [B]"""
        share = block.columns["attention_resident"].astype(np.float64)
        dense = context.total_bytes - self._stored_bytes(context)
        return np.asarray(share * dense + self._predictor_bytes(context, block) + context.kv_bytes
                          + context.working_bytes)

    def _stored_bytes(self, context: Context) -> float:
        """What stays in storage whatever the knobs: FFN neurons, and an input embedding that nothing multiplies. [B]"""
        tied = context.model.architecture.tied_head
        return self._neuron_bytes(context) + (0.0 if tied else context.group_bytes["embedding"])

    def _neuron_bytes(self, context: Context) -> float:
        """All FFN neurons. [B]"""
        return context.unit_bytes * context.model.architecture.d_ff * context.model.architecture.n_layers

    def _lookup_bytes(self, context: Context) -> float:
        """One row of that embedding per token, rounded up to whole blocks. [B]"""
        a, link = context.model.architecture, context.storage_link[1]
        if a.tied_head:
            return 0.0
        block_bytes = link.block.value if link.block else 1.0
        row = context.group_bytes["embedding"] / a.vocab
        return float(context.workload.step_tokens * np.ceil(row / block_bytes) * block_bytes)

    def _streamed(self, context: Context, block: Block, *, neurons: bool = False) -> tuple[Array, Array]:
        """Bytes read in sequence per layer and for the head; with `neurons` the whole FFN too. [B]"""
        share = 1.0 - block.columns["attention_resident"].astype(np.float64)
        # What the FFN keeps beside its fetched neurons (a gate that predicts, biases) streams like attention.
        beside = (context.group_bytes["ffn"] - self._neuron_bytes(context)) / context.model.architecture.n_layers
        layer = share * (context.mixer_bytes + beside)
        if block.structural["predictor"] == "none":  # nothing is predicted, so everything is read: stored packed
            layer = layer + self._neuron_bytes(context) / context.model.architecture.n_layers
        elif neurons:
            layer = layer + self._slots_bytes(context, block) / context.model.architecture.n_layers
        return layer, share * context.head_bytes

    def _slots_bytes(self, context: Context, block: Block) -> Array:
        """The file of all FFN neurons, each in whole blocks, (n_candidates,). [B]"""
        a = context.model.architecture
        split, whole = (float(np.multiply(*self._slot_bytes(context, way))) for way in (False, True))
        return np.asarray(np.where(block.columns["bundled"].astype(np.bool_), whole, split) * a.d_ff * a.n_layers)

    def _predictor_bytes(self, context: Context, block: Block) -> float:
        if block.structural["predictor"] != "low-rank":  # a gate is part of the resident weights already
            return 0.0
        assert context.trace is not None
        return context.trace.header.predictor_params_share * context.total_bytes

    def _slot_bytes(self, context: Context, bundled: bool) -> tuple[float, int]:
        """Bytes one read of a neuron occupies in the file, and reads a neuron takes."""
        link = context.storage_link[1]
        block_bytes = link.block.value if link.block else 1.0
        parts = 1 if bundled else context.unit_matrices
        size = context.unit_bytes / parts
        return float(np.ceil(size / block_bytes) * block_bytes), parts

    def _gap_units(self, context: Context, slot_bytes: float) -> int:
        """Unused units between two reads that cost less to read than a second request."""
        link = context.storage_link[1]
        assert link.request_time is not None and link.request_rate is not None
        return int(link.request_time.value * link.request_rate.value // slot_bytes)

    def _staging(self, context: Context, block: Block) -> Array:
        """Read buffers of a decode step, (n_candidates,): each stage that is ahead and the one that computes. [B]"""
        stages = int(block.structural["prefetch_layers"]) + 1
        layer, head = self._streamed(context, block)
        buffers = stages * np.maximum(layer, head)
        if block.structural["predictor"] != "none":
            # As many as a token can touch in one layer: where the budget binds, a token may find nothing cached.
            bundled, merged = (block.columns[k].astype(np.bool_) for k in ("bundled", "coalesce"))
            for way in (True, False):
                slot, parts = self._slot_bytes(context, way)
                units = np.where(merged, context.widest_read(self._gap_units(context, slot)) if merged.any() else 0,
                                 context.table.active_units.max())
                buffers = buffers + np.where(bundled == way, stages * units * parts * slot, 0.0)
        return np.asarray(buffers)

    def _prefill_staging(self, context: Context, block: Block) -> Array:
        """Read buffers of the prompt, which reads every layer whole, (n_candidates,). [B]"""
        layer, head = self._streamed(context, block, neurons=True)
        return np.asarray((self._prompt_ahead(block) + 1) * np.maximum(layer, head))

    def _prompt_ahead(self, block: Block) -> int:
        """Layers the prompt is read ahead: nothing has to be predicted for that, so at least one."""
        return max(int(block.structural["prefetch_layers"]), 1)

    def _buffers(self, context: Context, block: Block, rows_bytes: Array) -> Array:
        """Read buffers, and what the prompt needs beyond them. [B]

        The prompt streams every neuron past once. Those that its last tokens used stay, so the window is full when
        decoding starts; while it fills, layers pass through what is left of the room in ever smaller slices.
        """
        return np.maximum(self._staging(context, block), self._prefill_staging(context, block) - rows_bytes)

    def _cache(self, context: Context, block: Block) -> _Cache:
        """Replay every (window, room) pair that occurs in the block once."""
        table = context.table
        windows = block.columns["window_tokens"].astype(np.int64)
        fast = context.memory_of(str(block.structural["agent"]))
        room = context.budget_bytes[fast] - self._fixed(context, block) - self._staging(context, block)
        peaks = table.held_units.max(axis=0).astype(np.float64)  # (layers, K+1)
        need = peaks.sum(axis=0)[windows] * context.unit_bytes
        fits = np.minimum(np.maximum(room, 0.0), need)
        if block.structural["predictor"] == "none":  # nothing is predicted, so everything is read and nothing kept
            whole = np.full((1, *table.active_units.shape), table.n_units)
            return _Cache(whole, whole, np.zeros_like(whole), np.zeros(len(windows), np.int64), np.zeros(len(windows)))
        pairs, state = np.unique(np.stack([windows, fits]), axis=1, return_inverse=True)
        new, held, used, kept = [], [], [], []
        for k, have in zip(pairs[0].astype(int).tolist(), pairs[1].tolist(), strict=True):
            wanted = float(peaks[:, k].sum() * context.unit_bytes)
            if k == 0:  # nothing is kept: units live in the read buffer while their layer runs
                new.append(table.active_units)
                held.append(table.active_units)
                used.append(np.zeros_like(table.active_units))
                kept.append(0.0)
            elif have >= wanted:
                new.append(table.new_units[:, :, k])
                held.append(table.held_units[:, :, k])
                used.append(np.full_like(table.active_units, k))
                kept.append(wanted)
            else:
                capacity = np.floor(peaks[:, k] * (have / wanted))
                key = ("shrunk", k, have)
                if key not in context.memo:
                    context.memo[key] = shrink_to_capacity(table, k, capacity)
                shrunk = context.memo[key]
                new.append(shrunk.new_units)
                held.append(shrunk.held_units)
                used.append(shrunk.window)
                kept.append(float(capacity.sum() * context.unit_bytes))
        state = state.reshape(-1)
        return _Cache(np.array(new), np.array(held), np.array(used), state, np.array(kept)[state])

    def cache_units(self, context: Context, block: Block) -> Array:
        """Units that the cache of each layer has room for, for a block of one candidate, (n_layers,)."""
        context = as_known(context, block)
        window = int(block.columns["window_tokens"][0])
        peaks = context.table.held_units[:, :, window].max(axis=0) * float(window > 0)
        wanted = float(peaks.sum() * context.unit_bytes)
        fast = context.memory_of(str(block.structural["agent"]))
        room = float((context.budget_bytes[fast] - self._fixed(context, block) - self._staging(context, block))[0])
        return np.asarray(np.floor(peaks * (min(max(room, 0.0), wanted) / max(wanted, 1.0))))

    def footprint(self, context: Context, block: Block) -> dict[str, Array]:
        context = as_known(context, block)
        fast = context.memory_of(str(block.structural["agent"]))
        rows_bytes = self._cache(context, block).rows_bytes
        stored = np.full(block.n_candidates, context.total_bytes)
        if block.structural["predictor"] != "none":
            stored = stored - self._neuron_bytes(context) + self._slots_bytes(context, block)
        used = {fast: self._fixed(context, block) + self._buffers(context, block, rows_bytes) + rows_bytes,
                context.device.storage: stored + self._predictor_bytes(context, block)}
        if fast != context.device.host:
            used[context.device.host] = self._host_buffers(context, block)
        return used

    def _host_buffers(self, context: Context, block: Block) -> Array:
        """What passes through host memory on its way to a discrete GPU, (n_candidates,). [B]"""
        decode = self._staging(context, block) + self._lookup_bytes(context)
        return np.maximum(decode, self._prefill_staging(context, block))

    # --- demand ---------------------------------------------------------------------------------

    def _reads(self, context: Context, block: Block, cache: _Cache, rows: NDArray[np.int64]) -> tuple[Array, Array]:
        """Requests and bytes read, each (n_candidates, n_rows, n_layers)."""
        t, layers = np.arange(len(rows))[:, None], np.arange(cache.new_units.shape[2])[None, :]
        how = np.stack([cache.state, block.columns["bundled"].astype(np.int64),
                        block.columns["coalesce"].astype(np.int64)])
        ways, which = np.unique(how, axis=1, return_inverse=True)
        requests, read = [], []
        windows = np.unique(cache.window[:, rows])
        for state, bundled, coalesce in ways.T.tolist():
            slot, parts = self._slot_bytes(context, bool(bundled))
            units = cache.new_units[state][rows].astype(np.float64)
            if coalesce:
                n_runs, spanned = context.runs(rows, self._gap_units(context, slot), tuple(windows.tolist()))
                pick = np.searchsorted(windows, cache.window[state][rows])
                requests.append(n_runs[t, layers, pick].astype(np.float64) * parts)
                units = spanned[t, layers, pick].astype(np.float64)
            else:
                requests.append(units * parts)
            read.append(units * parts * slot)
        which = which.reshape(-1)
        return np.array(requests)[which], np.array(read)[which]

    def _demands(self, context: Context, block: Block, rows: NDArray[np.int64]) -> Demands:
        n = len(rows)
        layer, head = self._streamed(context, block)
        fast = context.memory_of(str(block.structural["agent"]))
        cache = self._cache(context, block)
        dense = block.structural["predictor"] == "none"
        return Demands(
            agent=str(block.structural["agent"]), prefetch=int(block.structural["prefetch_layers"]),
            source=context.device.storage, depth=np.repeat(block.columns["reader_threads"].astype(np.float64), n),
            layer_stream_bytes=np.repeat(layer, n)[None], head_stream_bytes=np.repeat(head, n),
            held_bytes={fast: np.repeat(self._fixed(context, block) + cache.rows_bytes, n)},
            units=None if dense else self._unit_demands(context, block, cache, rows),
            lookup_bytes=self._lookup_bytes(context))

    def _unit_demands(self, context: Context, block: Block, cache: _Cache, rows: NDArray[np.int64]) -> UnitDemands:
        requests, read = self._reads(context, block, cache, rows)
        new = cache.new_units[:, rows].astype(np.float64)[cache.state]
        # A token multiplies at least what it uses, also where its units do not fit the cache.
        held = np.maximum(cache.held_units[:, rows], context.table.active_units[rows]).astype(np.float64)[cache.state]
        kept = (block.columns["window_tokens"] > 0)[:, None, None]

        def columns(x: Array) -> Array:  # (candidates, rows, layers) → (layers, candidates × rows)
            return np.ascontiguousarray(x.transpose(2, 0, 1).reshape(x.shape[2], -1))

        new_bytes = new * context.unit_bytes
        assert context.trace is not None
        params = 0.0
        if block.structural["predictor"] != "oracle":
            params = (context.trace.header.predictor_params_share * context.model.params
                      / context.model.architecture.n_layers)
        return UnitDemands(
            requests=columns(requests), read_bytes=columns(read),
            upkeep_bytes=columns(np.where(kept, TRAFFIC_PER_NEW_BYTE * new_bytes, 0.0)), rows=columns(held),
            predictor_params=params)

    def decode(self, context: Context, block: Block, rows: NDArray[np.int64]) -> Schedule:
        context = as_known(context, block)
        return decode_schedule(context, self._demands(context, block, rows))

    def prefill(self, context: Context, block: Block) -> Schedule:
        context = as_known(context, block)
        layer, head = self._streamed(context, block, neurons=True)
        fast = context.memory_of(str(block.structural["agent"]))
        return prefill_schedule(context, Demands(
            agent=str(block.structural["agent"]), prefetch=self._prompt_ahead(block),
            source=context.device.storage, depth=block.columns["reader_threads"].astype(np.float64),
            layer_stream_bytes=layer[None], head_stream_bytes=head, held_bytes={fast: self._fixed(context, block)}))

    def _missing_for_next(self, context: Context, block: Block, window: int) -> tuple[int, float] | None:
        """The next longer window that is searched and the bytes it lacks; None where it fits or there is none."""
        longer = [k for k in WINDOWS if window < k <= context.table.max_window]
        if not longer:
            return None
        fast = context.memory_of(str(block.structural["agent"]))
        room = context.budget_bytes[fast] - float((self._fixed(context, block) + self._staging(context, block))[0])
        need = float(context.table.held_units[:, :, longer[0]].max(axis=0).sum() * context.unit_bytes)
        return (longer[0], need - room) if need > room else None

    # --- what to tell ---------------------------------------------------------------------------

    def placements(self, context: Context, block: Block) -> list[Placement]:
        context = as_known(context, block)
        fast = context.memory_of(str(block.structural["agent"]))
        share = float(block.columns["attention_resident"][0])
        stored = self._stored_bytes(context)
        dense = context.total_bytes - stored
        what = "embeddings, attention, norms" if context.model.architecture.tied_head else "attention, head, norms"
        far = "FFN neurons" if context.model.architecture.tied_head else "FFN neurons, input embedding"
        cache = self._cache(context, block)
        if block.structural["predictor"] != "none":
            stored += float(self._slots_bytes(context, block)[0]) - self._neuron_bytes(context)
        copied = share * dense + self._predictor_bytes(context, block)
        found = [
            Placement(what, fast, share * dense, loaded=True),
            Placement("attention and head, streamed share", context.device.storage, (1 - share) * dense),
            Placement("predictor", fast, self._predictor_bytes(context, block), loaded=True),
            Placement("FFN neurons, cached window", fast, float(cache.rows_bytes[0])),
            Placement(far, context.device.storage, stored),
            Placement("copy of what is resident", context.device.storage, copied),
            Placement("read buffers", fast, float(self._buffers(context, block, cache.rows_bytes)[0])),
            Placement("keys and values", fast, context.kv_bytes),
            Placement("activations", fast, context.working_bytes),
        ]
        if fast != context.device.host:
            found.append(Placement("read buffers", context.device.host, float(self._host_buffers(context, block)[0])))
        return [p for p in found if p.bytes > 0]

    def report(self, context: Context, block: Block, rows: NDArray[np.int64]) -> dict[str, Any]:
        said, unknown = said_of_predictor(context, block), unknown_cost(context, block)
        context = as_known(context, block)
        cache = self._cache(context, block)
        trace = context.trace
        assert trace is not None
        none = block.structural["predictor"] == "none"
        new = cache.new_units[0][rows].sum(axis=1).astype(np.float64)
        asked = cache.new_units[0][rows].sum(axis=1) if none else context.table.active_units[rows].sum(axis=1)
        layer, head = self._streamed(context, block)  # without a predictor these are all that is read
        a = context.model.architecture
        rows_bytes = 0.0 if a.tied_head else context.workload.step_tokens * context.group_bytes["embedding"] / a.vocab
        missed = 0.0 if none else float(new.mean() * context.unit_bytes)
        requested = float(missed + layer[0] * a.n_layers + head[0] + rows_bytes)
        knob = int(block.columns["window_tokens"][0])
        mean_window = float(cache.window[0][rows].mean())
        notes = []
        if not none and mean_window < knob:
            notes.append(f"the budget binds: the window shrinks from {knob} to {mean_window:.1f} tokens on average")
        elif not none:
            more = self._missing_for_next(context, block, knob)
            if more is not None:
                notes.append(f"the budget holds a window of {knob} tokens: {more[0]} would need {more[1]:.0f} more "
                             "bytes")
        notes += said
        if block.structural["predictor"] == "oracle":
            notes.append("the trace's criterion is an oracle: no predictor knew these units before they were read, "
                         "so a real engine will be slower")
        header = trace.header
        if header.kind == "synthetic" and not none:
            whose = header.statistics.get("published_for", header.model)
            source = ("drawn from the statistics of a captured one" if "like" in header.statistics
                      else f"fitted to what was published of {whose}, not captured")
            notes.append(f"the trace {header.name} is synthetic: {source}")
        elif header.model != context.model.name and not none:
            notes.append(f"the trace {header.name} was captured from {header.model}, not from this model")
        quality = header.quality
        return {
            "requested_bytes": requested,
            "cache": {"ffn": {"hit_ratio": float(1 - new.sum() / max(asked.sum(), 1)),
                              "bytes_per_token": float(new.mean() * context.unit_bytes)}},
            "active_share": {str(block.structural["agent"]): 1.0},
            "notes": notes,
            "perplexity_ratio": 1.0 if none else (quality.perplexity_ratio if quality and not unknown else None),
            "quality_source": "dense: no work is dropped" if none else unknown or (
                f"{quality.text}, {quality.tokens} tokens" if quality else None),
            "held_share": float(cache.held_units[0][rows].mean() / context.table.n_units),
        }
