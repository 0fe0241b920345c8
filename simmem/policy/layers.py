"""Which ops make up a decode step and a prefill, layer by layer? The one builder of all families here.

Per layer: (read streamed weights → copy) → attention → predictor → (read units → copy) → upkeep → FFN.
After the last layer the output projection is one more stage of the same pipeline. A policy only
fills in the demands; what it does not demand takes no time.

Streamed weights are known in advance: their read waits only for a free buffer, that is for the
compute of the stage `prefetch + 1` before, across the end of a token too. Predicted units of
layer l need the predictor, which runs on the attention output of layer l − prefetch (0: of the
layer itself, as in LLM in a flash, §3.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmem.policy.context import Context
from simmem.policy.ops import ATTENTION_KERNELS, HEAD_KERNELS, STREAM_CHUNK_BYTES, Demand, Ops, stream_requests
from simmem.schedule import OpKind, Phase, Products, Schedule

__all__ = [
    "ATTENTION_KERNELS",
    "HEAD_KERNELS",
    "STREAM_CHUNK_BYTES",
    "Demands",
    "UnitDemands",
    "decode_schedule",
    "prefill_schedule",
    "stream_requests",
]

Array = NDArray[np.float64]

WARM_UP = 4
"""Stages, in pipeline depths, that pass before the timed step: a test compares with very many."""


@dataclass(frozen=True)
class UnitDemands:
    """Predicted units of a decode step, arrays (n_layers, n_columns)."""

    requests: Array
    read_bytes: Array
    """What storage moves, alignment and bridged gaps included. [B]"""
    upkeep_bytes: Array
    """Memory traffic of rearranging the cache. [B]"""
    rows: Array
    """Units the FFN multiplies."""
    predictor_params: float
    """Parameters of one layer's predictor."""


@dataclass(frozen=True)
class Demands:
    """What a block of candidates asks of a decode step or a prefill; arrays are (n_columns,) unless they say more."""

    agent: str
    prefetch: int
    source: str
    """Tier that streamed weights come from."""
    depth: Array
    layer_stream_bytes: Array
    """(n_kinds, n_columns) for each kind of layer of the model. [B]"""
    head_stream_bytes: Array
    held_bytes: Mapping[str, Array]
    """Kept in each tier throughout, staging buffers apart. [B]"""
    units: UnitDemands | None = None
    lookup_bytes: float = 0.0
    """Rows of an input embedding that stays in storage, read at the start of a token. [B]"""


def _streams(ops: Ops, demands: Demands) -> tuple[list[list[Demand]], list[Demand]]:
    """Reads of the streamed weights: of each kind of layer, and of the head."""
    hops = ops.context.device.path(demands.source, ops.context.memory_of(demands.agent))

    def reads(name: str, n_bytes: Array) -> list[Demand]:
        return ops.move(name, n_bytes, hops, staged=n_bytes)

    return ([reads("weights", n_bytes) for n_bytes in demands.layer_stream_bytes],
            reads("head weights", demands.head_stream_bytes))


def _feeds(ops: Ops, demands: Demands) -> list[Demand]:
    """The whole FFN of each kind of layer for all its tokens."""
    memory = ops.context.memory_of(demands.agent)
    return [ops.feed(demands.agent, name, ops.n_tokens, release={memory: streamed})
            for name, streamed in zip(ops.context.layers.names, demands.layer_stream_bytes, strict=True)]


def decode_schedule(context: Context, demands: Demands) -> Schedule:
    """Ops of a decode step in steady state.

    With prefetch the reads of a step begin during the one before, so the schedule holds at least
    two steps and times the last.
    """
    model, agent = context.model, demands.agent
    n_columns = len(demands.depth)
    ops = Ops(context, n_columns, agents=(agent,), depth=demands.depth)
    n_tokens, memory = ops.n_tokens, context.memory_of(agent)
    layers, kind = model.architecture.n_layers, context.layers.kind
    stream_layer, stream_head = _streams(ops, demands)
    # With reads ahead nobody knows beforehand whether an op will find its bytes there: then none is said to wait.
    idle = 0.0 if demands.prefetch else 1.0
    attend = ops.mixer(agent, n_tokens, ops.context_flop, ops.context_bytes,
                       waits=np.where((demands.layer_stream_bytes > 0).any(axis=0), idle, 0.0))
    units = demands.units
    predict: Demand | None = None
    if units is None:
        feeds = _feeds(ops, demands)
    else:  # a demand for each layer
        if units.predictor_params:
            predict = ops.compute("predictor", OpKind.PREDICTOR, agent, 2.0 * n_tokens * units.predictor_params,
                                  ops.read_bytes(agent, "ffn", units.predictor_params, 0.0), 2,
                                  products=Products(n_tokens, float(model.architecture.d_model), 2.0))
        # Rows are rearranged where they live: by the CPU in unified memory, by the GPU in its own.
        keeper = context.host_agent if memory == context.device.host and context.host_agent else agent
        unit_moves = ops.move("units", units.read_bytes, context.path_to(agent), requests=units.requests,
                              staged=units.read_bytes)
        waits, kept_some = units.read_bytes > 0, units.upkeep_bytes > 0
        upkeep = ops.compute("upkeep", OpKind.MEMORY, keeper, 0.0, units.upkeep_bytes, np.where(kept_some, 2.0, 0.0),
                             products=Products(1.0, context.unit_bytes, 1.0),
                             waits=np.where(waits & kept_some, idle, 0.0))
        feed = ops.feed(agent, "plain", n_tokens, rows=units.rows, waits=np.where(waits & ~kept_some, idle, 0.0),
                        release={memory: demands.layer_stream_bytes[list(kind)] + units.read_bytes})
    head = ops.head(agent, release={memory: demands.head_stream_bytes},
                    waits=np.where(demands.head_stream_bytes > 0, idle, 0.0))
    step = ops.step(agent)
    lookup = ops.move("embedding rows", np.full(n_columns, demands.lookup_bytes), context.path_to(agent),
                      requests=np.full(n_columns, float(n_tokens))) if demands.lookup_bytes else []

    builder, p = ops.builder, demands.prefetch
    computed: list[int] = []  # op that frees a stage's buffer, all tokens in one sequence
    last: int | None = None
    n_stages = layers + 1
    # Enough steps for the pipeline to fill: one before the timed one, more where the model is short for its prefetch.
    # Whether anything is streamed must not matter here: a candidate's schedule depends on no other's.
    n_steps = 1 + max(1, math.ceil(WARM_UP * (p + 1) / n_stages)) if p else 1
    fetched: dict[int, int] = {}  # stage number → op after which its streamed weights are there

    def fetch(stage: int) -> None:
        """Issue the read of a stage once its buffer's last user stands in the program.

        Those of the step after the timed one are issued too: they are in the way of its other reads.
        """
        if stage in fetched:
            return
        where = stage % n_stages
        moves = stream_head if where == layers else stream_layer[kind[where]]
        free = computed[stage - 1 - p] if stage - 1 - p >= 0 else None
        op = free
        for demand, stream in moves:
            op = builder.op(demand, stream, deps=[op], token=stage // n_stages, layer=where)
        if op is not None:
            fetched[stage] = op

    for token in range(n_steps):
        predicted: dict[int, int | None] = {}
        read: dict[int, int | None] = {}

        def look_ahead(layer: int, after: int | None, token: int = token, predicted: dict[int, int | None] = predicted,
                       read: dict[int, int | None] = read) -> None:
            op = builder.op(predict[0], predict[1], deps=[after], token=token, layer=layer) if predict else after
            predicted[layer] = op
            for demand, stream in unit_moves:
                op = builder.op(demand + layer, stream, deps=[op], token=token, layer=layer)
            read[layer] = op

        for demand, stream in lookup:
            last = builder.op(demand, stream, deps=[last], token=token)
        if units is not None:
            for layer in range(min(p, layers)):
                look_ahead(layer, last)
        for layer in range(layers):
            stage = token * n_stages + layer
            fetch(stage)
            attended = builder.op(*attend, deps=[last, fetched.get(stage)], token=token, layer=layer)
            if units is None:
                fed = builder.op(*feeds[kind[layer]], deps=[attended], token=token, layer=layer)
            else:
                if layer + p < layers:
                    look_ahead(layer + p, attended)
                kept = ops.op(upkeep, deps=[read[layer], predicted[layer]], token=token, layer=layer, nth=layer)
                fed = ops.op(feed, deps=[attended, kept], token=token, layer=layer, nth=layer)
            last = fed
            computed.append(fed)
            if p:
                fetch(stage + p)
        stage = token * n_stages + layers
        fetch(stage)
        last = builder.op(*head, deps=[last, fetched.get(stage)], token=token, layer=layers)
        computed.append(last)
        if p:
            fetch(stage + p)
        for demand, stream in step:
            last = builder.op(demand, stream, deps=[last], token=token, layer=layers)
        builder.end_token(last)
    return builder.build(demands.held_bytes)


def prefill_schedule(context: Context, demands: Demands) -> Schedule:
    """Ops of the prompt: every layer once over all its tokens; what is not resident is streamed whole.

    A prompt touches most units (the union over its tokens), so the FFN is read sequentially
    rather than unit by unit; the keys and values are written once.
    """
    agent = demands.agent
    ops = Ops(context, len(demands.depth), agents=(agent,), phase=Phase.PREFILL, depth=demands.depth)
    layers, kind = context.model.architecture.n_layers, context.layers.kind
    stream_layer, stream_head = _streams(ops, demands)
    attend = ops.mixer(agent, ops.n_tokens, ops.context_flop, ops.context_bytes)
    feed = _feeds(ops, demands)
    head = ops.head(agent, release={context.memory_of(agent): demands.head_stream_bytes})
    ahead = demands.prefetch
    computed: list[int] = []
    last: int | None = None
    for stage in range(layers + 1):
        free = computed[stage - 1 - ahead] if stage - 1 - ahead >= 0 else None
        read = ops.chain(stream_head if stage == layers else stream_layer[kind[stage]], deps=[free], layer=stage)
        if stage == layers:
            last = ops.op(head, deps=[last, *read], layer=stage)
        else:
            attended = ops.op(attend, deps=[last, *read], layer=stage)
            last = ops.op(feed[kind[stage]], deps=[attended], layer=stage)
        computed.append(last)
    assert last is not None
    return ops.build(last, demands.held_bytes)
