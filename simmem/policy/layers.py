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
from simmem.policy.layer_kinds import ffn_products, ffn_work
from simmem.schedule import DemandClass, OpKind, Phase, Products, Schedule, ScheduleBuilder

__all__ = ["STREAM_CHUNK_BYTES", "Demands", "UnitDemands", "decode_schedule", "prefill_schedule", "stream_requests"]

Array = NDArray[np.float64]

STREAM_CHUNK_BYTES = 4.0 * (1 << 20)
"""Request size of streamed weights: large enough for the sequential rate of every device here. [B]"""

ATTENTION_KERNELS = 8
"""norm, q, k, v, position, attention, output, residual: what a plain decoder launches. [kernels]"""
LATENT_ATTENTION_KERNELS = 12
"""norm, query down, its norm, query up, key-value down, its norm, position, query absorbed, attention, value absorbed,
output, residual. [kernels]"""
STATE_SPACE_KERNELS = 9
"""norm, input projection, convolution, step and state projections, step, scan, gate, output, residual. [kernels]"""

WARM_UP = 4
"""Stages, in pipeline depths, that pass before the timed step: a test compares with very many."""

MIXER_PRODUCTS = 4.0
"""query, key, value, output; with latent attention and in a state space about as many."""
HEAD_KERNELS = 3
"""norm, output projection, sampling. [kernels]"""


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


def stream_requests(n_bytes: Array) -> Array:
    """Requests that read `n_bytes` in sequence: one, or as many chunks as they are.

    Not rounded up: a second request that appears when one byte more is read would use the depth that one request
    cannot, and reading more would be faster.
    """
    return np.where(n_bytes > 0, np.maximum(n_bytes / STREAM_CHUNK_BYTES, 1.0), 0.0)


class _Ops:
    """Demand classes that both phases share."""

    def __init__(self, context: Context, demands: Demands, n_columns: int) -> None:
        self.context, self.demands = context, demands
        device = context.device
        self.memory = context.memory_of(demands.agent)
        self.hops = device.path(demands.source, self.memory)
        streams = [f"link.{n}" for n in device.link] + list(device.agent)
        self.builder = ScheduleBuilder(n_columns, streams)

    def move(self, name: str, n_bytes: Array, requests: Array, hops: tuple[str, ...],
             staged: Array | float = 0.0) -> list[tuple[int, str]]:
        """A demand class for each hop; returns (class, stream) pairs in order."""
        found = []
        device = self.context.device
        for index, hop in enumerate(hops):
            link = device.link[hop]
            amounts: dict[str, float | Array] = {f"link.{hop}": n_bytes, f"memory.{link.target}": n_bytes}
            if link.kind == "copy":
                amounts[f"memory.{link.source}"] = n_bytes
            kind = OpKind.IO if link.kind == "storage" else OpKind.TRANSFER
            last = index == len(hops) - 1
            found.append((self.builder.demand(
                DemandClass(f"{name}.{hop}", kind, link=hop),
                requests=requests if link.kind == "storage" else np.where(n_bytes > 0, 1.0, 0.0),
                depth=self.demands.depth, bytes=amounts,
                acquire={link.target: staged if last else n_bytes},
                release={link.source: n_bytes} if index else {},
            ), f"link.{hop}"))
        return found

    def compute(self, name: str, kind: OpKind, agent: str, flop: Array | float, n_bytes: Array | float,
                kernels: Array | float, release: Mapping[str, Array | float] | None = None,
                products: Products | None = None, waits: Array | float = 0.0) -> tuple[int, str]:
        memory = self.context.memory_of(agent)
        return self.builder.demand(
            DemandClass(name, kind, agent=agent, precision=self.context.workload.weights, products=products),
            flop=flop, requests=kernels, waits=waits, bytes={f"memory.{memory}": n_bytes}, release=release), agent

    def streams(self) -> tuple[list[list[tuple[int, str]]], list[tuple[int, str]]]:
        """Reads of the streamed weights: of each kind of layer, and of the head."""
        def reads(name: str, n_bytes: Array) -> list[tuple[int, str]]:
            return self.move(name, n_bytes, stream_requests(n_bytes), self.hops, n_bytes)

        return ([reads("weights", n_bytes) for n_bytes in self.demands.layer_stream_bytes],
                reads("head weights", self.demands.head_stream_bytes))

    def read_bytes(self, group: str, matrices: float, vectors: float) -> float:
        """Bytes the agent reads to multiply parameters of a group. [B]"""
        matrix, vector = self.context.read_bytes_per_param(self.demands.agent, group)
        return matrices * matrix + vectors * vector

    def head_bytes(self) -> float:
        """Bytes the agent reads for the output projection and the norm before it. [B]"""
        model = self.context.model
        a = model.architecture
        return (self.read_bytes("embedding" if a.tied_head else "head", model.head_params, 0.0)
                + self.read_bytes("norms", 0.0, model.norm_params * a.final_norm))

    def mixer(self, n_tokens: float, context_flop: float, context_bytes: float, norm_params: float,
              waits: Array | float = 0.0) -> tuple[int, str]:
        """Attention (or the state space) of one layer for all its tokens; what it does with the context is given."""
        model = self.context.model
        mixer, layers = model.mixer, model.architecture.n_layers
        return self.compute(
            mixer.name, OpKind.COMPUTE, self.demands.agent,
            2.0 * n_tokens * mixer.matrix_params / layers + context_flop / layers,
            self.read_bytes(mixer.name, mixer.matrix_params / layers, mixer.vector_params / layers)
            + self.read_bytes("norms", 0.0, norm_params) + context_bytes / layers,
            STATE_SPACE_KERNELS if model.architecture.state_space else LATENT_ATTENTION_KERNELS
            if model.architecture.latent_attention else ATTENTION_KERNELS,
            products=Products(n_tokens, float(model.architecture.d_model), MIXER_PRODUCTS), waits=waits)

    def feeds(self, n_tokens: float, norm_params: float) -> list[tuple[int, str]]:
        """The whole FFN of each kind of layer for all its tokens."""
        model, found = self.context.model, []
        for name, streamed in zip(self.context.layers.names, self.demands.layer_stream_bytes, strict=True):
            work = ffn_work(model, name, n_tokens)
            n_bytes = sum(self.read_bytes(group, matrices, work.read_vector_params[group])
                          for group, matrices in work.read_matrix_params.items() if matrices)
            found.append(self.compute(
                "ffn", OpKind.COMPUTE, self.demands.agent, 2.0 * sum(work.multiplied_params.values()),
                n_bytes + self.read_bytes("norms", 0.0, norm_params if work.kernels else 0.0), work.kernels,
                {self.memory: streamed}, Products(*ffn_products(model, name, n_tokens))))
        return found


def decode_schedule(context: Context, demands: Demands) -> Schedule:
    """Ops of a decode step in steady state.

    With prefetch the reads of a step begin during the one before, so the schedule holds at least
    two steps and times the last.
    """
    model, workload = context.model, context.workload
    a, batch, agent = model.architecture, workload.batch, demands.agent
    n_columns = len(demands.depth)
    ops = _Ops(context, demands, n_columns)
    layers, kind = a.n_layers, context.layers.kind
    norm_params = model.norm_params * a.norms_per_layer / 2  # half of a layer's with its attention, half with its FFN
    stream_layer, stream_head = ops.streams()
    context_flop = batch * model.attention_flop(workload.mean_decode_context, workload.mean_decode_window(a.window))
    # With reads ahead nobody knows beforehand whether an op will find its bytes there: then none is said to wait.
    idle = 0.0 if demands.prefetch else 1.0
    attend = ops.mixer(batch, context_flop, context.decode_kv_bytes, norm_params,
                       waits=np.where((demands.layer_stream_bytes > 0).any(axis=0), idle, 0.0))
    units = demands.units
    predict: tuple[int, str] | None = None
    unit_moves: list[list[tuple[int, str]]] = []
    upkeep: list[tuple[int, str]] = []
    feed: list[tuple[int, str]] = []
    if units is None:
        whole = ops.feeds(batch, norm_params)
        feed = [whole[k] for k in kind]
    else:
        ffn = model.group("ffn")
        if units.predictor_params:
            predict = ops.compute("predictor", OpKind.PREDICTOR, agent, 2.0 * batch * units.predictor_params,
                                  ops.read_bytes("ffn", units.predictor_params, 0.0), 2,
                                  products=Products(batch, float(a.d_model), 2.0))
        beside = ops.read_bytes("ffn", 0.0, ffn.vector_params / layers) + ops.read_bytes("norms", 0.0, norm_params)
        kernels = ffn_work(model, "plain", batch).kernels
        # Rows are rearranged where they live: by the CPU in unified memory, by the GPU in its own.
        keeper = context.host_agent if ops.memory == context.device.host and context.host_agent else agent
        unit_hops = context.path_to(agent)
        for layer in range(layers):
            unit_moves.append(ops.move("units", units.read_bytes[layer], units.requests[layer], unit_hops,
                                       units.read_bytes[layer]))
            waits, kept = units.read_bytes[layer] > 0, units.upkeep_bytes[layer] > 0
            upkeep.append(ops.compute("upkeep", OpKind.MEMORY, keeper, 0.0, units.upkeep_bytes[layer],
                                      np.where(kept, 2.0, 0.0), products=Products(1.0, context.unit_bytes, 1.0),
                                      waits=np.where(waits & kept, idle, 0.0)))
            params = units.rows[layer] * context.unit_params
            feed.append(ops.compute(
                "ffn", OpKind.COMPUTE, agent, 2.0 * batch * params,
                params * context.read_bytes_per_param(agent, "ffn")[0] + beside, kernels,
                {ops.memory: demands.layer_stream_bytes[kind[layer]] + units.read_bytes[layer]},
                Products(batch, float(a.d_model), float(model.unit_matrices)),
                waits=np.where(waits & ~kept, idle, 0.0)))
    head = ops.compute("head", OpKind.COMPUTE, agent, 2.0 * batch * model.head_params,
                       ops.head_bytes(), HEAD_KERNELS,
                       {ops.memory: demands.head_stream_bytes}, Products(batch, float(a.d_model), 1.0),
                       waits=np.where(demands.head_stream_bytes > 0, idle, 0.0))
    step = ops.compute("step", OpKind.SYNC, agent, 0.0, 0.0, 1.0) if context.agent(agent).step_overhead else None
    lookup = ops.move("embedding rows", np.full(n_columns, demands.lookup_bytes), np.full(n_columns, float(batch)),
                      context.path_to(agent)) if demands.lookup_bytes else []

    builder, p = ops.builder, demands.prefetch
    computed: list[int] = []  # op that frees a stage's buffer, all tokens in one sequence
    last: int | None = None
    n_stages = layers + 1
    # Enough steps for the pipeline to fill: one before the timed one, more where the model is short for its prefetch.
    # Whether anything is streamed must not matter here: a candidate's schedule depends on no other's.
    n_tokens = 1 + max(1, math.ceil(WARM_UP * (p + 1) / n_stages)) if p else 1
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

    for token in range(n_tokens):
        predicted: dict[int, int | None] = {}
        read: dict[int, int | None] = {}

        def look_ahead(layer: int, after: int | None, token: int = token, predicted: dict[int, int | None] = predicted,
                       read: dict[int, int | None] = read) -> None:
            op = builder.op(predict[0], predict[1], deps=[after], token=token, layer=layer) if predict else after
            predicted[layer] = op
            for demand, stream in unit_moves[layer]:
                op = builder.op(demand, stream, deps=[op], token=token, layer=layer)
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
                fed = builder.op(*feed[layer], deps=[attended], token=token, layer=layer)
            else:
                if layer + p < layers:
                    look_ahead(layer + p, attended)
                kept = builder.op(*upkeep[layer], deps=[read[layer], predicted[layer]], token=token, layer=layer)
                fed = builder.op(*feed[layer], deps=[attended, kept], token=token, layer=layer)
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
        if step is not None:
            last = builder.op(*step, deps=[last], token=token, layer=layers)
        builder.end_token(last)
    return builder.build(demands.held_bytes)


def prefill_schedule(context: Context, demands: Demands) -> Schedule:
    """Ops of the prompt: every layer once over all its tokens; what is not resident is streamed whole.

    A prompt touches most units (the union over its tokens), so the FFN is read sequentially
    rather than unit by unit; the keys and values are written once.
    """
    model, workload = context.model, context.workload
    a, agent = model.architecture, demands.agent
    ops = _Ops(context, demands, len(demands.depth))
    layers, n, kind = a.n_layers, workload.prompt_tokens * workload.batch, context.layers.kind
    stream_layer, stream_head = ops.streams()
    seen = workload.mean_prompt_window(None), workload.mean_prompt_window(a.window)
    written = model.kv_bytes(workload.kv, workload.prompt_tokens) * workload.batch
    attend = ops.mixer(n, n * model.attention_flop(*seen, prompt=True), written, 0.0)
    feed = ops.feeds(n, 0.0)
    head = ops.compute("head", OpKind.COMPUTE, agent, 2.0 * workload.batch * model.head_params, ops.head_bytes(),
                       HEAD_KERNELS, {ops.memory: demands.head_stream_bytes},
                       Products(workload.batch, float(a.d_model), 1.0))
    builder = ops.builder
    ahead = demands.prefetch
    computed: list[int] = []
    last: int | None = None
    for stage in range(layers + 1):
        op = computed[stage - 1 - ahead] if stage - 1 - ahead >= 0 else None
        for demand, stream in stream_head if stage == layers else stream_layer[kind[stage]]:
            op = builder.op(demand, stream, deps=[op], phase=Phase.PREFILL, layer=stage)
        if stage == layers:
            last = builder.op(*head, deps=[last, op], phase=Phase.PREFILL, layer=stage)
        else:
            attended = builder.op(*attend, deps=[last, op], phase=Phase.PREFILL, layer=stage)
            last = builder.op(*feed[kind[stage]], deps=[attended], phase=Phase.PREFILL, layer=stage)
        computed.append(last)
    assert last is not None
    builder.end_token(last)
    return builder.build(demands.held_bytes)
