"""What resident and stream share: dense layers of which a share is resident and the rest is streamed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.policy.base import Block, Knob, Placement
from simmem.policy.context import Context
from simmem.policy.layers import Demands

__all__ = ["READER_THREADS", "agent_knob", "dense_demands", "dense_footprint", "dense_placements", "dense_report"]

Array = NDArray[np.float64]

READER_THREADS = (4, 8, 16, 32, 64)
"""Depths that are searched; any number may be set."""


def agent_knob(context: Context) -> Knob:
    """Which unit computes; searched unless named."""
    return Knob("agent", "structural", tuple(context.device.agent), "which unit computes the layers")


def source_tier(context: Context, block: Block) -> str:
    """Where streamed weights come from: storage, or host memory in front of a discrete GPU."""
    if block.structural.get("source_tier", "storage") == "host":
        return context.device.host
    return context.device.storage


def streamed(context: Context, ratio: Array) -> tuple[Array, Array]:
    """Bytes streamed per layer and for the head when `ratio` of the weights is resident. [B]"""
    return (1.0 - ratio) * context.layer_bytes, (1.0 - ratio) * context.head_bytes


def dense_demands(context: Context, block: Block, n_rows: int = 1) -> Demands:
    """Demands of a dense model with `resident_ratio` of its weights resident."""
    def column(name: str, value: float) -> Array:
        given = block.columns.get(name)
        return np.repeat(np.full(block.n_candidates, value) if given is None else given.astype(np.float64), n_rows)

    ratio = column("resident_ratio", 1.0)
    layer, head = streamed(context, ratio)
    agent = str(block.structural["agent"])
    held = {tier: np.repeat(amount, n_rows) for tier, amount in _held(context, block).items()}
    return Demands(agent=agent, prefetch=int(block.structural.get("prefetch_layers", 0)),
                   source=source_tier(context, block), depth=column("reader_threads", 1.0),
                   layer_stream_bytes=layer, head_stream_bytes=head, held_bytes=held)


def _held(context: Context, block: Block) -> dict[str, Array]:
    ratio = block.columns.get("resident_ratio", np.ones(block.n_candidates)).astype(np.float64)
    fast = context.memory_of(str(block.structural["agent"]))
    held = {fast: ratio * context.total_bytes + context.kv_bytes + context.working_bytes}
    if source_tier(context, block) == context.device.host != fast:
        held[context.device.host] = (1.0 - ratio) * context.total_bytes
    return held


def dense_footprint(context: Context, block: Block) -> dict[str, Array]:
    """Held bytes and the staging buffers of streamed stages. [B]"""
    used = dict(_held(context, block))
    ratio = block.columns.get("resident_ratio", np.ones(block.n_candidates)).astype(np.float64)
    layer, head = streamed(context, ratio)
    buffers = int(block.structural.get("prefetch_layers", 0)) + 1
    staging = buffers * np.maximum(layer, head)
    fast = context.memory_of(str(block.structural["agent"]))
    used[fast] = used[fast] + staging
    source = source_tier(context, block)
    if source == context.device.storage and fast != context.device.host:
        host = context.device.host
        used[host] = used.get(host, np.zeros(block.n_candidates)) + staging
    used[context.device.storage] = np.full(block.n_candidates, context.total_bytes)
    return used


def dense_placements(context: Context, block: Block) -> list[Placement]:
    """Where the weights, the keys and values and the buffers live, for one candidate."""
    ratio = float(block.columns["resident_ratio"][0]) if "resident_ratio" in block.columns else 1.0
    fast = context.memory_of(str(block.structural["agent"]))
    found = []
    if ratio > 0:
        found.append(Placement("weights, resident share", fast, ratio * context.total_bytes, loaded=True))
    if ratio < 1:
        source = source_tier(context, block)
        found.append(Placement("weights, streamed share", source, (1.0 - ratio) * context.total_bytes,
                               loaded=source != context.device.storage))
        used = dense_footprint(context, block)[fast][0] - _held(context, block)[fast][0]
        found.append(Placement("staging buffers", fast, float(used)))
    found.append(Placement("keys and values", fast, context.kv_bytes))
    found.append(Placement("activations", fast, context.working_bytes))
    return found


def dense_report(context: Context, block: Block) -> dict[str, Any]:
    """A dense plan reads what it asks for, drops no work and computes every unit on its agent."""
    ratio = float(block.columns["resident_ratio"][0]) if "resident_ratio" in block.columns else 1.0
    a = context.model.architecture
    layer, head = streamed(context, np.array([ratio]))
    from_storage = source_tier(context, block) == context.device.storage
    return {
        "requested_bytes": float(a.n_layers * layer[0] + head[0]) if from_storage else 0.0,
        "cache": {}, "active_share": {str(block.structural["agent"]): 1.0}, "notes": [], "perplexity_ratio": 1.0,
        "quality_source": "dense: no work is dropped",
    }
