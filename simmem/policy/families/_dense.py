"""What resident and stream share: dense layers of which a share is resident and the rest is streamed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.policy.base import Block, Knob, Placement
from simmem.policy.context import Context
from simmem.policy.layer_kinds import touched_experts
from simmem.policy.layers import Demands

__all__ = [
    "READER_THREADS",
    "agent_knob",
    "dense_demands",
    "dense_footprint",
    "dense_placements",
    "dense_report",
    "depths",
    "resident_share",
    "source_tier",
    "streamed",
]

Array = NDArray[np.float64]

READER_THREADS = (4, 8, 16, 32, 64)
"""Depths that are searched beside the storage's own best one; any number may be set."""


def depths(context: Context) -> tuple[int, ...]:
    """Reads in flight that are searched on a device."""
    best = context.storage_link[1].best_depth
    return tuple(sorted({*READER_THREADS, *(() if best is None else (int(best.value),))}))


def agent_knob(context: Context) -> Knob:
    """Which unit computes; searched unless named."""
    agents = context.able_agents
    fastest_first = tuple(sorted(agents, key=lambda name: -agents[name].rate.value * agents[name].rate_share.value))
    return Knob("agent", "structural", fastest_first, "which unit computes the layers")


def source_tier(context: Context, block: Block) -> str:
    """Where streamed weights come from: storage, or host memory in front of a discrete GPU."""
    if block.structural.get("source_tier", "storage") == "host":
        return context.device.host
    return context.device.storage


def resident_share(context: Context, block: Block) -> Array:
    """Share of the weights that stays in the agent's memory, (n_candidates,); all where they need not move at all."""
    if source_tier(context, block) == context.memory_of(str(block.structural["agent"])):
        return np.ones(block.n_candidates)
    given = block.columns.get("resident_ratio")
    return np.ones(block.n_candidates) if given is None else given.astype(np.float64)


def streamed(context: Context, ratio: Array) -> tuple[Array, Array]:
    """Bytes streamed for each kind of layer (n_kinds, n) and for the head (n,) when `ratio` (n,) of the weights is
    resident. [B]"""
    return np.outer(context.layers.stored_bytes, 1.0 - ratio), (1.0 - ratio) * context.head_bytes


def _staging(context: Context, block: Block) -> Array:
    """Buffers for the stages that are streamed ahead and the one that computes, (n_candidates,). [B]"""
    layer, head = streamed(context, resident_share(context, block))
    return np.asarray((int(block.structural.get("prefetch_layers", 0)) + 1) * np.maximum(layer.max(axis=0), head))


def _passes_host(context: Context, block: Block) -> bool:
    """Whether what is streamed from storage has to be copied on from host memory."""
    fast = context.memory_of(str(block.structural["agent"]))
    return source_tier(context, block) == context.device.storage and fast != context.device.host


def dense_demands(context: Context, block: Block, n_rows: int = 1) -> Demands:
    """Demands of a dense model with `resident_ratio` of its weights resident."""
    layer, head = streamed(context, np.repeat(resident_share(context, block), n_rows))
    depth = block.columns.get("reader_threads", np.ones(block.n_candidates)).astype(np.float64)
    agent = str(block.structural["agent"])
    held = {tier: np.repeat(amount, n_rows) for tier, amount in _held(context, block).items()}
    return Demands(agent=agent, prefetch=int(block.structural.get("prefetch_layers", 0)),
                   source=source_tier(context, block), depth=np.repeat(depth, n_rows),
                   layer_stream_bytes=layer, head_stream_bytes=head, held_bytes=held)


def _held(context: Context, block: Block) -> dict[str, Array]:
    ratio = resident_share(context, block)
    fast = context.memory_of(str(block.structural["agent"]))
    held = {fast: ratio * context.total_bytes + context.kv_bytes + context.working_bytes}
    if source_tier(context, block) == context.device.host != fast:
        held[context.device.host] = (1.0 - ratio) * context.total_bytes
    return held


def dense_footprint(context: Context, block: Block) -> dict[str, Array]:
    """Held bytes and the staging buffers of streamed stages. [B]"""
    used = dict(_held(context, block))
    staging = _staging(context, block)
    fast = context.memory_of(str(block.structural["agent"]))
    used[fast] = used[fast] + staging
    if _passes_host(context, block):
        used[context.device.host] = staging
    used[context.device.storage] = np.full(block.n_candidates, context.total_bytes)
    return used


def dense_placements(context: Context, block: Block) -> list[Placement]:
    """Where the weights, the keys and values and the buffers live, for one candidate."""
    ratio = float(resident_share(context, block)[0])
    fast = context.memory_of(str(block.structural["agent"]))
    found = []
    if ratio > 0:
        found.append(Placement("weights, resident share", fast, ratio * context.total_bytes, loaded=True))
    if ratio < 1:
        source = source_tier(context, block)
        found.append(Placement("weights, streamed share", source, (1.0 - ratio) * context.total_bytes,
                               loaded=source != context.device.storage))
        staging = float(_staging(context, block)[0])
        found.append(Placement("staging buffers", fast, staging))
        if _passes_host(context, block):
            found.append(Placement("staging buffers", context.device.host, staging))
    listed = sum(p.bytes for p in found if p.tier == context.device.storage)
    if listed < context.total_bytes:
        found.append(Placement("copy of what is resident", context.device.storage, context.total_bytes - listed))
    found.append(Placement("keys and values", fast, context.kv_bytes))
    found.append(Placement("activations", fast, context.working_bytes))
    return found


def dense_report(context: Context, block: Block) -> dict[str, Any]:
    """A dense plan reads what it asks for, drops no work and computes every unit on its agent."""
    layer, head = streamed(context, resident_share(context, block))
    from_storage = source_tier(context, block) == context.device.storage
    return {
        "requested_bytes": float(layer[list(context.layers.kind), 0].sum() + head[0]) if from_storage else 0.0,
        "cache": {}, "active_share": {str(block.structural["agent"]): 1.0}, "notes": _notes(context, layer),
        "perplexity_ratio": 1.0,
        "quality_source": "dense: no work is dropped",
    }


def _notes(context: Context, streamed_layers: Array) -> list[str]:
    model, together = context.model, context.workload.step_tokens
    experts = model.architecture.experts
    if experts is None:
        return []
    found = []
    if streamed_layers.any():
        found.append(f"all {experts.count} experts of a layer are read for every token, which uses "
                     f"{experts.per_token}: expert-cache fetches only the chosen ones")
    if together > 1:
        touched = touched_experts(experts.count, experts.per_token, together)
        found.append(f"routing is taken as uniform: the {together} tokens of a step then use {touched:.1f} of "
                     f"{experts.count} experts a layer; real routing is skewed and uses fewer")
    return found
