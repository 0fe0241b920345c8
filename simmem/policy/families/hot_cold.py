"""PowerInfer: frequently used neurons in the GPU's memory, the others in the host's; both compute what a token needs.

Song et al., arXiv 2312.12456 (SOSP 2024). A predictor per layer says which neurons a token uses. Those in the GPU's
memory are multiplied there, the others by the CPU out of host memory, at the same time, and the results are added: no
weights move while decoding (§5). Attention is placed by heads, as skipped heads are with the FFN's neurons (§5.1), and
its keys and values lie in host memory (as in its evaluation) or beside their heads. Which neurons lie where is chosen
by how often profile tokens used them (§6), under the GPU's capacity; here for the least time
(`simmem.policy.placement`).

Tokens that are timed are never those that frequencies were counted on (`simmem.trace.hot`). Within a class of equally
frequent units the hot ones are a share while plans are compared: which of them they are is left open. A plan that is
run takes those used most, of equals by number (`HotCold.hot_units`), and `HotCold.counted` then says what it
multiplies, to the unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.policy.base import Block, Knob, Placement, register, why_not_plan
from simmem.policy.context import Context
from simmem.policy.families._hot_cold_ops import Parts, decode_ops, prompt_ops
from simmem.policy.families._predicted import predictor_knobs, said_of_predictor, unknown_cost
from simmem.policy.families._two_agents import gpu_knob, host_of, output_bytes, pass_through_bytes, why_not_two
from simmem.policy.placement import Balance, Placed, Stage, first_of_classes
from simmem.schedule import Schedule
from simmem.trace.hot import HotTable
from simmem.trace.hot_order import first_units
from simmem.trace.trace import TraceHeader

__all__ = ["HotCold"]

Array = NDArray[np.float64]

SIZES = 9
"""Sizes of the GPU's part that are searched; the largest that fits is added to them."""
REFINE_STEPS = 48
"""Sizes tried at once where that one is looked for; twice, so it is found to a two-thousandth of the range."""
ATTENTION_KERNELS, FFN_KERNELS = 7, 3
"""Kernels that the CPU runs for its part of a stage, besides what it reads."""


@dataclass(frozen=True)
class _Split:
    """What lies in the GPU's memory, for each candidate of a block."""

    heads: Array
    """(n_layers, n) share of the attention heads of each layer."""
    neurons: Array
    """(n_layers, n) share of the neurons of each layer."""
    placed_bytes: Array
    """Of both together, (n,). [B]"""
    kv_bytes: Array
    """Keys and values in the GPU's memory, (n,). [B]"""


@register
class HotCold:
    """Hot neurons on the GPU, cold ones on the CPU, side by side."""

    name = "hot-cold"
    summary = "frequently used neurons on the GPU, the others on the CPU beside it"
    uses_trace = True
    same_at_every_budget = True

    def why_not(self, context: Context) -> str | None:
        """Why this policy cannot plan a context with a trace; None where it can."""
        alone = why_not_two(context)
        if alone is None and context.trace and len(context.table.tokens) == context.trace.header.n_tokens:
            return f"the trace {context.trace.header.name} has no tokens beside those that are timed"
        return alone

    def knobs(self, context: Context) -> tuple[Knob, ...]:
        if why_not_plan(self, context) is not None:
            return ()
        _, predictor = predictor_knobs(context)
        low = max(self._fixed_bytes(context, str(p)) for p in (*predictor.values, *predictor.unsearched))
        high = low + self._movable_bytes(context)
        return (
            gpu_knob(context),
            predictor,
            Knob("placement", "structural", ("frequency",), "what decides where a neuron lies", default="frequency",
                 unsearched=("layer", "random"),
                 hint="layer fills whole layers in their order, random takes neurons blindly"),
            Knob("kv_cache", "structural", ("host", "with-heads"), "where keys and values lie", default="host"),
            Knob("gpu_weight_bytes", "demand", tuple(np.linspace(low, high, SIZES).tolist()),
                 "weights in the GPU's memory, predictor and output projection included, in bytes or e.g. 10GB",
                 low=low, high=high, dimension="bytes"),
        )

    def agents(self, context: Context, block: Block) -> tuple[str, ...]:
        return str(block.structural["agent"]), host_of(context)

    def refine(self, context: Context, block: Block, fixed: Mapping[str, object]) -> Block:
        """Add the largest part that fits the GPU: memory grows with it, so two looks at the range find it."""
        if "gpu_weight_bytes" in fixed:
            return block
        gpu = context.memory_of(str(block.structural["agent"]))
        sizes = block.columns["gpu_weight_bytes"]
        low, high = float(sizes.min()), float(sizes.max())
        for _ in range(2):
            tried = np.linspace(low, high, REFINE_STEPS)
            used = self.footprint(context, Block(block.structural, {"gpu_weight_bytes": tried}))[gpu]
            fitting = int((used <= context.budget_bytes[gpu]).sum())
            if fitting in (0, REFINE_STEPS):
                return block
            low, high = float(tried[fitting - 1]), float(tried[fitting])
        return Block(block.structural, {"gpu_weight_bytes": np.append(sizes, low)})

    # --- what is there to place -----------------------------------------------------------------

    def _heads(self, context: Context) -> int:
        """Attention heads that are placed apart: those that share keys and values stay together."""
        return context.model.architecture.n_kv_heads

    def _attention_bytes(self, context: Context) -> float:
        """Attention of one layer. [B]"""
        return context.group_bytes["attention"] / context.model.architecture.n_layers

    def _neuron_bytes(self, context: Context) -> float:
        """All neurons. [B]"""
        a = context.model.architecture
        return context.unit_bytes * a.d_ff * a.n_layers

    def _movable_bytes(self, context: Context) -> float:
        return context.group_bytes["attention"] + self._neuron_bytes(context)

    def _predictor_bytes(self, context: Context, predictor: str) -> float:
        if predictor != "low-rank":
            return 0.0
        trace = context.asking(predictor, 0).trace
        assert trace is not None
        return trace.header.predictor_params_share * context.total_bytes

    def _fixed_bytes(self, context: Context, predictor: str) -> float:
        """On the GPU whatever the knobs: predictor, output projection, norms, an FFN's rest beside neurons. [B]"""
        known = context.asking(predictor, 0)
        beside = known.group_bytes["ffn"] - self._neuron_bytes(known)
        return (output_bytes(context) + known.group_bytes.get("norms", 0.0) + beside
                + self._predictor_bytes(context, predictor))

    def _host_fixed_bytes(self, context: Context) -> float:
        """In host memory whatever the knobs: embeddings that are only looked up. [B]"""
        untied = 0.0 if context.model.architecture.tied_head else context.group_bytes["embedding"]
        return untied + context.group_bytes.get("positions", 0.0)

    def _attention_share(self, context: Context, predictor: str) -> float:
        """Share of the heads that a step uses, its tokens together; all where nothing is known of it."""
        if predictor == "none":
            return 1.0
        return float(1.0 - (1.0 - context.attention_active_share) ** context.workload.step_tokens)

    def _table(self, context: Context, predictor: str) -> HotTable:
        """Classes of neurons, of those that the predictor asks for."""
        known = context.asking(predictor, 0)
        assert known.replayed is not None
        return known.replayed.hot

    def _stages(self, context: Context, block: Block) -> list[Stage]:
        """Attention of every layer, then the FFN of every layer."""
        predictor = str(block.structural["predictor"])
        table, known, dense = self._table(context, predictor), context.asking(predictor, 0), predictor == "none"
        gpu, host = self.agents(context, block)
        near, far = context.memory_of(gpu), context.device.host
        links = sum(context.device.link[name].latency.value
                    for name in (*context.device.path(near, far), *context.device.path(far, near)))
        join = links + context.agent(gpu).op_overhead.value
        kernel, heads = context.agent(host).op_overhead.value, self._heads(context)
        attention = Stage(np.array([self._attention_share(context, predictor)]), np.array([float(heads)]),
                          self._attention_bytes(context) / heads, join + ATTENTION_KERNELS * kernel)
        cold_ffn = join + FFN_KERNELS * kernel
        ffn = [Stage(np.ones_like(f) if dense else f, u.astype(np.float64), known.unit_bytes, cold_ffn)
               for f, u in zip(table.frequency, table.units, strict=True)]
        return [attention] * len(ffn) + ffn

    def _balance(self, context: Context, block: Block) -> Balance:
        key = "balance", block.structural["predictor"], block.structural["agent"]
        if key not in context.memo:
            context.memo[key] = self._shared_balance(context, block)
        found: Balance = context.memo[key]
        return found

    def _shared_balance(self, context: Context, block: Block) -> Balance:
        """The one of all contexts that have the same trace and the same stages: budgets have no part in it."""
        fast, slow = (1.0 / (agent.rate.value * agent.rate_share.value)
                      for agent in map(context.agent, self.agents(context, block)))
        stages, replayed = self._stages(context, block), context.asking(str(block.structural["predictor"]), 0).replayed
        assert replayed is not None
        ends = [(s.unit_bytes, s.join_s, *s.frequency.tolist()) for s in (stages[0], stages[-1])]
        alike = ("balance", fast, slow, *ends)
        if alike not in replayed.memo:
            replayed.memo[alike] = Balance(stages, fast, slow)
        found: Balance = replayed.memo[alike]
        return found

    def _placed(self, context: Context, block: Block) -> Placed:
        """The placement by frequency."""
        fixed = self._fixed_bytes(context, str(block.structural["predictor"]))
        return self._balance(context, block).at(block.columns["gpu_weight_bytes"].astype(np.float64) - fixed)

    def _shares(self, context: Context, block: Block) -> Array:
        """Share of each stage in the GPU's memory, whole layers or any units, (n_stages, n)."""
        stages = self._balance(context, block).stages
        fixed = self._fixed_bytes(context, str(block.structural["predictor"]))
        rooms = block.columns["gpu_weight_bytes"].astype(np.float64) - fixed
        sizes = np.array([float(s.units.sum()) * s.unit_bytes for s in stages])
        if block.structural["placement"] == "random":
            return np.tile(np.clip(rooms / sizes.sum(), 0.0, 1.0), (len(stages), 1))
        # A layer's attention, its FFN, the next layer's.
        order = np.arange(len(stages)).reshape(2, -1).T.reshape(-1)
        before = np.zeros(len(stages))
        before[order] = np.cumsum(sizes[order]) - sizes[order]
        return np.asarray(np.clip((rooms[None, :] - before[:, None]) / sizes[:, None], 0.0, 1.0))

    def _split(self, context: Context, block: Block) -> _Split:
        layers, predictor = context.model.architecture.n_layers, str(block.structural["predictor"])
        if block.structural["placement"] == "frequency":
            counts = self._placed(context, block).counts
        else:
            units = np.array([float(s.units.sum()) for s in self._balance(context, block).stages])
            counts = units[:, None] * self._shares(context, block)
        heads, neurons = counts[:layers] / self._heads(context), counts[layers:]
        near_heads = _added(heads)
        placed = (near_heads * self._attention_bytes(context)
                  + _added(neurons) * context.asking(predictor, 0).unit_bytes)
        kv = context.kv_bytes / layers if block.structural["kv_cache"] == "with-heads" else 0.0
        return _Split(heads, neurons / context.model.architecture.d_ff, placed, kv * near_heads)

    def _classes(self, context: Context, block: Block) -> Array:
        """Share of each class of neurons in the GPU's memory, (n_layers, C, n)."""
        table = self._table(context, str(block.structural["predictor"]))
        layers = len(table.units)
        if block.structural["placement"] == "frequency":
            units = first_of_classes(table.units.astype(np.float64), self._placed(context, block).counts[layers:])
            return np.asarray(units / np.maximum(table.units, 1)[:, :, None])
        return np.asarray((table.units > 0)[:, :, None] * self._shares(context, block)[layers:, None, :])

    # --- memory ---------------------------------------------------------------------------------

    def _beside(self, context: Context) -> tuple[float, float]:
        """What GPU and host hold beside weights, keys and values: activations, slices of passing weights. [B]"""
        passing = pass_through_bytes(context)
        return context.working_bytes + passing, context.working_bytes

    def _stored_bytes(self, context: Context, block: Block) -> float:
        return context.total_bytes + self._predictor_bytes(context, str(block.structural["predictor"]))

    def footprint(self, context: Context, block: Block) -> dict[str, Array]:
        split, (gpu, host) = self._split(context, block), self.agents(context, block)
        near, far = self._beside(context)
        fixed = self._fixed_bytes(context, str(block.structural["predictor"]))
        return {
            context.memory_of(gpu): fixed + split.placed_bytes + split.kv_bytes + near,
            context.memory_of(host): (self._host_fixed_bytes(context) + self._movable_bytes(context)
                                      - split.placed_bytes + context.kv_bytes - split.kv_bytes + far),
            context.device.storage: np.full(block.n_candidates, self._stored_bytes(context, block))}

    # --- demand ---------------------------------------------------------------------------------

    def _parts(self, context: Context, block: Block, split: _Split, n_rows: int = 1) -> Parts:
        gpu, host = self.agents(context, block)
        return Parts(gpu, host, np.repeat(split.heads, n_rows, axis=1), block.structural["kv_cache"] == "host",
                     np.repeat(split.neurons, n_rows, axis=1))

    def _used_rows(self, context: Context, block: Block, rows: NDArray[np.int64]) -> tuple[Array, Array]:
        """Neurons a token uses on the GPU and on the CPU, both (n_layers, candidates × rows), rows fastest."""
        table = self._table(context, str(block.structural["predictor"]))
        active = table.used_by(rows).astype(np.float64)
        if block.structural["predictor"] == "none":
            active = np.repeat(table.units[None].astype(np.float64), len(rows), axis=0)
        by_class = active.transpose(2, 1, 0)[:, :, None, :]  # (C, L, 1, T)
        classes = self._classes(context, block)
        near = np.zeros((classes.shape[0], classes.shape[2], len(rows)))
        for used, here in zip(by_class, classes.swapaxes(0, 1)[:, :, :, None], strict=True):
            near += used * here
        far = np.maximum(active.sum(axis=2).T[:, None, :] - near, 0.0)
        return near.reshape(len(near), -1), far.reshape(len(far), -1)

    def _held(self, context: Context, block: Block, split: _Split, n_rows: int = 1) -> dict[str, Array]:
        gpu, host = (context.memory_of(name) for name in self.agents(context, block))
        used = self.footprint(context, block)
        near, far = self._beside(context)
        return {gpu: np.repeat(used[gpu] - near, n_rows), host: np.repeat(used[host] - far, n_rows)}

    def decode(self, context: Context, block: Block, rows: NDArray[np.int64]) -> Schedule:
        return self._step(context, block, *self._used_rows(context, block, rows), n_rows=len(rows))

    def counted(self, context: Context, block: Block, rows: NDArray[np.int64], hot: NDArray[np.bool_]) -> Schedule:
        """The same of one candidate whose neurons `hot` (L, U) are on the GPU: whole neurons, no shares of a class."""
        predictor = str(block.structural["predictor"])
        replayed = context.asking(predictor, 0).replayed
        assert replayed is not None
        packed = np.packbits(hot, axis=1, bitorder="little")
        active = [np.packbits(np.ones_like(hot), axis=1, bitorder="little") if predictor == "none"
                  else replayed.trace.active[token] for token in replayed.timed[rows].tolist()]
        near, far = (np.array([np.bitwise_count(used & side).sum(axis=1, dtype=np.int64) for used in active]).T
                     for side in (packed, ~packed))
        return self._step(context, block, near.astype(np.float64), far.astype(np.float64), n_rows=len(rows))

    def _step(self, context: Context, block: Block, near: Array, far: Array, *, n_rows: int) -> Schedule:
        """A decode step in which the GPU and the CPU multiply so many neurons of each layer, (n_layers, columns)."""
        split, predictor = self._split(context, block), str(block.structural["predictor"])
        known, params = context.asking(predictor, 0), 0.0
        if predictor not in ("none", "oracle"):
            assert known.trace is not None
            params = (known.trace.header.predictor_params_share * context.model.params
                      / context.model.architecture.n_layers)
        ops, last = decode_ops(known, self._parts(known, block, split, n_rows), near_rows=near, far_rows=far,
                               heads_used=self._attention_share(context, predictor), predictor_params=params)
        last = ops.op(ops.head(ops.agents[0]), deps=[last], layer=len(near))
        for what in ops.step(ops.agents[0]):
            last = ops.op(what, deps=[last], layer=len(near))
        return ops.build(last, self._held(context, block, split, n_rows))

    def prefill(self, context: Context, block: Block) -> Schedule:
        split = self._split(context, block)
        known = context.asking(str(block.structural["predictor"]), 0)
        ops, last = prompt_ops(known, self._parts(known, block, split))
        last = ops.op(ops.head(ops.agents[0]), deps=[last], layer=context.model.architecture.n_layers)
        return ops.build(last, self._held(context, block, split))

    # --- one by one -----------------------------------------------------------------------------

    def hot_units(self, context: Context, block: Block) -> NDArray[np.bool_]:
        """Neurons of one candidate, placed by frequency, in the GPU's memory, (n_layers, units): of a class that is
        split those used most by the profile tokens, of equally used ones those of the lowest number."""
        replayed = context.asking(str(block.structural["predictor"]), 0).replayed
        assert replayed is not None
        layers = context.model.architecture.n_layers
        return first_units(replayed.trace, replayed.timed, self._counts(context, block)[layers:])

    def hot_heads(self, context: Context, block: Block) -> NDArray[np.int64]:
        """Attention heads of one candidate in the GPU's memory, (n_layers,); those that share keys count as one."""
        return self._counts(context, block)[: context.model.architecture.n_layers]

    def _counts(self, context: Context, block: Block) -> NDArray[np.int64]:
        assert block.structural["placement"] == "frequency"
        return np.round(self._placed(context, block).counts[:, 0]).astype(np.int64)

    def used_heads(self, context: Context, block: Block) -> float:
        """Share of the attention heads that a step multiplies."""
        return self._attention_share(context, str(block.structural["predictor"]))

    # --- what to tell ---------------------------------------------------------------------------

    def placements(self, context: Context, block: Block) -> list[Placement]:
        split, predictor = self._split(context, block), str(block.structural["predictor"])
        (gpu, host), storage = (context.memory_of(n) for n in self.agents(context, block)), context.device.storage
        near, far = self._beside(context)
        attention = float(split.heads[:, 0].sum()) * self._attention_bytes(context)
        neurons = float(split.placed_bytes[0]) - attention
        kv, predicting = float(split.kv_bytes[0]), self._predictor_bytes(context, predictor)
        found = [
            Placement("output projection, norms", gpu, self._fixed_bytes(context, predictor) - predicting, loaded=True),
            Placement("predictor", gpu, predicting, loaded=True),
            Placement("attention, hot heads", gpu, attention, loaded=True),
            Placement("FFN neurons, hot", gpu, neurons, loaded=True),
            Placement("attention, cold heads", host, context.group_bytes["attention"] - attention, loaded=True),
            Placement("FFN neurons, cold", host, self._neuron_bytes(context) - neurons, loaded=True),
            Placement("embeddings", host, self._host_fixed_bytes(context), loaded=True),
            Placement("keys and values", gpu, kv),
            Placement("keys and values", host, context.kv_bytes - kv),
            Placement("activations, passing weights", gpu, near),
            Placement("activations", host, far),
            Placement("copy of everything", storage, self._stored_bytes(context, block)),
        ]
        return [p for p in found if p.bytes > 0]

    def _load(self, context: Context, block: Block, split: _Split, rows: NDArray[np.int64]) -> tuple[float, float]:
        """Bytes of active units (heads and neurons) that the GPU and the CPU multiply in a mean token. [B]"""
        near, far = self._used_rows(context, block, rows)
        known = context.asking(str(block.structural["predictor"]), 0)
        used = self._attention_share(context, str(block.structural["predictor"])) * self._attention_bytes(context)
        heads = split.heads[:, 0]
        return (float(near.sum() / len(rows) * known.unit_bytes + used * heads.sum()),
                float(far.sum() / len(rows) * known.unit_bytes + used * (1.0 - heads).sum()))

    def report(self, context: Context, block: Block, rows: NDArray[np.int64]) -> dict[str, Any]:
        with_stage = Block({**block.structural, "prefetch_layers": 0}, block.columns)
        split, predictor = self._split(context, block), str(block.structural["predictor"])
        unknown, trace = unknown_cost(context, with_stage), context.asking(predictor, 0).trace
        assert trace is not None
        gpu, host = self.agents(context, block)
        on_gpu, on_cpu = self._load(context, block, split, rows)
        share, held = on_gpu / (on_gpu + on_cpu), float(split.placed_bytes[0]) / self._movable_bytes(context)
        table = self._table(context, predictor)
        frequent = block.structural["placement"] == "frequency"
        gap = float(self._placed(context, block).gap[0]) if frequent else None
        notes = [f"the {gpu} holds {100 * held:.1f} % of attention and neurons and does {100 * share:.1f} % of their "
                 f"work; which is frequent was counted on {table.profile_tokens} tokens that are not timed"]
        if gap is not None:
            notes.append(f"no placement under this capacity would be more than {100 * gap:.2f} % faster, by the "
                         "expected load")
        if self._attention_share(context, predictor) == 1.0 and predictor != "none":
            notes.append("every attention head is computed: the trace does not say how many a token uses")
        notes += said_of_predictor(context, with_stage) + self._said_of_trace(context, trace.header, predictor)
        quality = trace.header.quality if predictor != "none" else None
        return {
            "requested_bytes": 0.0, "cache": {}, "active_share": {gpu: share, host: 1.0 - share}, "notes": notes,
            "perplexity_ratio": 1.0 if predictor == "none" else (
                quality.perplexity_ratio if quality and not unknown else None),
            "quality_source": "dense: no work is dropped" if predictor == "none" else unknown or (
                f"{quality.text}, {quality.tokens} tokens" if quality else None),
            "gap": gap,
        }

    def _said_of_trace(self, context: Context, header: TraceHeader, predictor: str) -> list[str]:
        if predictor == "none":
            return []
        notes = []
        if predictor == "oracle":
            notes.append("the trace's criterion is an oracle: no predictor knew these units before they were needed, "
                         "so a real engine will be slower")
        if header.kind == "synthetic":
            whose = header.statistics.get("published_for", header.model)
            source = ("drawn from the statistics of a captured one" if "like" in header.statistics
                      else f"fitted to what was published of {whose}, not captured")
            notes.append(f"the trace {header.name} is synthetic: {source}")
        elif header.model != context.model.name:
            notes.append(f"the trace {header.name} was captured from {header.model}, not from this model")
        return notes


def _added(parts: Array) -> Array:
    """The sum over the first axis, one after the other: a candidate's must not depend on how many stand beside it."""
    return np.asarray(np.cumsum(parts, axis=0)[-1])
