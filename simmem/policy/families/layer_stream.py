"""The first layers stay on the GPU, every other one is copied to it for each token, whole (Hugging Face accelerate,
ZeRO-Inference, Superpipeline).

A layer's copy waits for a free buffer: with one buffer nothing overlaps, with two the next layer comes while one
computes. Where `stream` keeps a share of every layer, this keeps whole layers; of a mixture of experts it copies
all of them, as these engines do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.policy.base import Block, Knob, Placement, register, why_not_plan, with_largest_that_fits
from simmem.policy.context import Context
from simmem.policy.families._dense import READER_THREADS
from simmem.policy.families._unpack import unpacking
from simmem.policy.layer_kinds import ffn_work
from simmem.policy.layers import WARM_UP
from simmem.policy.ops import Ops
from simmem.schedule import Phase, Schedule

__all__ = ["LayerStream"]

Array = NDArray[np.float64]
SIZES = 25
"""Numbers of resident layers that are searched at most, the largest that fits apart."""
UNPACK_KERNELS = 7
"""query, key, value, output, and up to three matrices of the FFN. [kernels]"""


@register
class LayerStream:
    """Whole layers, resident or streamed."""

    name = "layer-stream"
    summary = "the first layers on the GPU, the others copied to it for every token"
    uses_trace = False
    same_at_every_budget = True

    def why_not(self, context: Context) -> str | None:
        """Why this policy cannot plan a context; None where it can."""
        return None if _agents(context) else f"no unit of {context.device.name} has memory of its own to copy layers to"

    def knobs(self, context: Context) -> tuple[Knob, ...]:
        if why_not_plan(self, context) is not None:
            return ()
        layers = context.model.architecture.n_layers
        return (
            Knob("agent", "structural", _agents(context), "which unit computes the layers"),
            Knob("source_tier", "structural", ("host", "storage"), "where streamed layers come from", default="host"),
            Knob("buffers", "structural", (1, 2, 3), "layers there is room for beside the resident ones", default=2,
                 low=1, high=9),
            Knob("resident_layers", "demand",
                 tuple(sorted({round(v) for v in np.linspace(0, layers + 1, min(layers + 2, SIZES)).tolist()})),
                 "layers that stay on the GPU; one more than there are: embeddings and head too", low=0,
                 high=layers + 1),
        )

    def refine(self, context: Context, block: Block, fixed: Mapping[str, object]) -> Block:
        """Add the most layers that fit, which a coarse grid may leave out."""
        if "resident_layers" in fixed:
            return block
        sizes = np.arange(context.model.architecture.n_layers + 2)
        return with_largest_that_fits(self, context, block, "resident_layers", sizes)

    def footprint(self, context: Context, block: Block) -> dict[str, Array]:
        used = dict(_held(context, block))
        staging, fast = _staging(context, block), context.memory_of(str(block.structural["agent"]))
        used[fast] = used[fast] + staging
        if _from_storage(block):
            used[context.device.host] = staging
        used[context.device.storage] = np.full(block.n_candidates, context.total_bytes)
        return used

    def decode(self, context: Context, block: Block, rows: NDArray[np.int64]) -> Schedule:
        buffers, n_stages = int(block.structural["buffers"]), context.model.architecture.n_layers + 1
        # As in `decode_schedule`: enough steps for the pipeline to fill, of which the last is timed.
        n_tokens = 1 + max(1, math.ceil(WARM_UP * buffers / n_stages)) if buffers > 1 else 1
        return _schedule(context, block, len(rows), Phase.DECODE, n_tokens)

    def prefill(self, context: Context, block: Block) -> Schedule:
        return _schedule(context, block, 1, Phase.PREFILL, 1)

    def placements(self, context: Context, block: Block) -> list[Placement]:
        resident = float(_resident_bytes(context, block)[0])
        fast, source = context.memory_of(str(block.structural["agent"])), _source(context, block)
        found = [Placement("weights, resident layers", fast, resident, loaded=True)] if resident else []
        if resident < context.total_bytes:
            staging = float(_staging(context, block)[0])
            found += [Placement("weights, streamed layers", source, context.total_bytes - resident,
                                loaded=source != context.device.storage),
                      Placement("staging buffers", fast, staging)]
            if _from_storage(block):
                found.append(Placement("staging buffers", context.device.host, staging))
        listed = sum(p.bytes for p in found if p.tier == context.device.storage)
        if listed < context.total_bytes:
            found.append(Placement("copy of what is elsewhere", context.device.storage, context.total_bytes - listed))
        return [*found, Placement("keys and values", fast, context.kv_bytes),
                Placement("activations", fast, context.working_bytes)]

    def report(self, context: Context, block: Block, rows: NDArray[np.int64]) -> dict[str, Any]:
        streamed = _stage_bytes(context, block, 1)
        notes, experts = [], context.model.architecture.experts
        if experts is not None and streamed[:-1].any():
            notes.append(f"all {experts.count} experts of a streamed layer are copied for every token, which uses "
                         f"{experts.per_token}: expert-cache copies only those")
        return {"requested_bytes": float(streamed.sum()) if _from_storage(block) else 0.0,
                "cache": {}, "active_share": {str(block.structural["agent"]): 1.0}, "notes": notes,
                "perplexity_ratio": 1.0, "quality_source": "dense: no work is dropped"}


def _agents(context: Context) -> tuple[str, ...]:
    """Units that compute out of a memory which host memory has to be copied to."""
    return tuple(name for name in context.able_agents if context.memory_of(name) != context.device.host)


def _source(context: Context, block: Block) -> str:
    return context.device.storage if block.structural["source_tier"] == "storage" else context.device.host


def _from_storage(block: Block) -> bool:
    return block.structural["source_tier"] == "storage"


def _resident(block: Block) -> Array:
    return np.asarray(block.columns["resident_layers"], dtype=np.float64)


def _stage_bytes(context: Context, block: Block, n_rows: int) -> Array:
    """Bytes streamed for each layer and, last, for the head; (n_layers + 1, n_candidates · n_rows). [B]"""
    layers = context.layers
    # With a narrow embedding the head multiplies its projections too, which are stored with the embedding.
    projected = context.model.head_params * context.stored_bytes_per_param("embedding")[0]
    stored = np.array([*(layers.stored_bytes[k] for k in layers.kind), max(context.head_bytes, projected)])
    streams = np.arange(len(stored))[:, None] >= _resident(block)
    return np.asarray(np.repeat(np.where(streams, stored[:, None], 0.0), n_rows, axis=1))


def _resident_bytes(context: Context, block: Block) -> Array:
    """Weights that stay on the GPU, (n_candidates,). [B]"""
    layers = context.layers
    up_to = np.cumsum([0.0, *(layers.stored_bytes[k] for k in layers.kind)])
    every = len(up_to)  # one more than there are layers: all weights
    return np.append(up_to, context.total_bytes)[np.minimum(_resident(block), every).astype(np.int64)]


def _staging(context: Context, block: Block) -> Array:
    return np.asarray(int(block.structural["buffers"]) * _stage_bytes(context, block, 1).max(axis=0))


def _held(context: Context, block: Block) -> dict[str, Array]:
    resident = _resident_bytes(context, block)
    held = {context.memory_of(str(block.structural["agent"])): resident + context.kv_bytes + context.working_bytes}
    if not _from_storage(block):
        held[context.device.host] = context.total_bytes - resident
    return held


def _schedule(context: Context, block: Block, n_rows: int, phase: Phase, n_tokens: int) -> Schedule:
    """Read → copy → (unpack →) attention → FFN, layer by layer, then the head; see `layers.decode_schedule`."""
    agent, buffers = str(block.structural["agent"]), int(block.structural["buffers"])
    model, layers = context.model, context.layers
    best = context.storage_link[1].best_depth
    ops = Ops(context, block.n_candidates * n_rows, agents=(agent,), phase=phase,
              depth=float(READER_THREADS[-1] if best is None else best.value))
    memory, n_layers = context.memory_of(agent), model.architecture.n_layers
    streamed = _stage_bytes(context, block, n_rows)
    hops = context.device.path(_source(context, block), memory)
    # With reads ahead nobody knows beforehand whether an op will find its bytes there: then none is said to wait.
    waits = np.where(streamed > 0, 1.0 if phase is Phase.DECODE and buffers == 1 else 0.0, 0.0)
    fetched = ops.move("weights", streamed[:n_layers], hops, staged=streamed[:n_layers])
    fetched_head = ops.move("head weights", streamed[n_layers], hops, staged=streamed[n_layers])
    unpack = {}
    for kind in set(layers.kind):
        params = ffn_work(model, layers.names[kind], ops.n_tokens).read_matrix_params
        unpack[kind] = unpacking(ops, agent, {**params, model.mixer.name: model.mixer.matrix_params / n_layers},
                                 UNPACK_KERNELS)
    each_waits = phase is Phase.DECODE and buffers == 1
    attend = ops.mixer(agent, ops.n_tokens, ops.context_flop, ops.context_bytes,
                       waits=waits[:n_layers] if each_waits else waits[0])
    feed = {kind: ops.feed(agent, layers.names[kind], ops.n_tokens,
                           release={memory: streamed[:n_layers][np.array(layers.kind) == kind]})
            for kind in set(layers.kind)}
    of_its_kind = [layers.kind[:layer].count(kind) for layer, kind in enumerate(layers.kind)]
    head = ops.head(agent, release={memory: streamed[n_layers]}, waits=waits[n_layers])
    step = ops.step(agent) if phase is Phase.DECODE else []
    n_stages = n_layers + 1
    computed: list[int] = []
    arrived: dict[int, tuple[int | None, ...]] = {}
    last: int | None = None

    def fetch(stage: int) -> None:
        """Issue the copy of a stage once its buffer's last user stands in the program; also past the timed token."""
        if stage not in arrived:
            free = computed[stage - buffers] if stage >= buffers else None
            token, layer = divmod(stage, n_stages)
            moves, nth = (fetched_head, 0) if layer == n_layers else (fetched, layer)
            arrived[stage] = ops.chain(moves, deps=[free], token=token, layer=layer, nth=nth)

    for token in range(n_tokens):
        for layer in range(n_stages):
            stage = token * n_stages + layer
            fetch(stage)
            deps: tuple[int | None, ...] = (last, *arrived[stage])
            if layer == n_layers:
                last = ops.op(head, deps=deps, token=token, layer=layer)
            else:
                wide = unpack[layers.kind[layer]]
                if wide is not None:
                    deps = (ops.op(wide, deps=deps, token=token, layer=layer),)
                attended = ops.op(attend, deps=deps, token=token, layer=layer, nth=layer if each_waits else 0)
                last = ops.op(feed[layers.kind[layer]], deps=[attended], token=token, layer=layer,
                              nth=of_its_kind[layer])
            computed.append(last)
            if phase is Phase.DECODE and buffers > 1:
                fetch(stage + buffers - 1)
        assert last is not None
        for what in step:
            last = ops.op(what, deps=[last], token=token, layer=n_layers)
        if token < n_tokens - 1:
            ops.builder.end_token(last)
    assert last is not None
    return ops.build(last, {tier: np.repeat(amount, n_rows) for tier, amount in _held(context, block).items()})
