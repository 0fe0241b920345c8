"""The ops of a decode step and of a prompt under the percentages of `tier-percent` (FlexGen).

The GPU batches of a layer are one op with their demands added up: within a layer all of them do the same, and what
comes for one while another computes (its states, its part of the next layer's weights) here comes for the next layer
while this one computes. It differs by what fills the pipeline, at most one GPU batch a step. Weights and states of the
next layer arrive while one computes; what a layer made is stored before the layer after it ends. Where the CPU attends,
its results go over the same link as the next layer's weights: as many of those as can be copied until the results are
there are copied before them, the others after, so that neither waits for the other. An engine that does not copy to the
GPU while the CPU computes (`h2d_overlaps_cpu`) does the CPU's attention in the stream of those copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmem.policy.context import Context
from simmem.policy.families._class_seconds import class_seconds
from simmem.policy.families._dense import READER_THREADS
from simmem.policy.families._fair_share import fair_share
from simmem.policy.families._tier_bytes import BUFFERS, Layout, held, kv_batch_bytes, route, stage_bytes
from simmem.policy.families._unpack import unpacking
from simmem.policy.layer_kinds import ffn_work
from simmem.policy.ops import (
    ATTENTION_KERNELS,
    CONTEXT_KERNELS,
    HEAD_KERNELS,
    LATENT_ATTENTION_KERNELS,
    Demand,
    Ops,
)
from simmem.schedule import OpKind, Phase, Schedule
from simmem.spec.precision import matrix_bytes_per_param

__all__ = ["IN_SERIES", "tier_schedule"]

Array = NDArray[np.float64]

UNPACK_KERNELS = 7
"""query, key, value, output, and up to three matrices of the FFN. [kernels]"""
KV_UNPACK_KERNELS = 2
"""keys, values. [kernels]"""
UNPACKED_BYTES = 2.0
"""An element of the keys and values that takes fewer bytes is packed. [B]"""
IN_SERIES = ("to the CPU.", "from the CPU.", "activations in.", "activations out.")
"""Copies that a layer's ops wait for."""


@dataclass(frozen=True)
class _Parts:
    """Demand classes of one step or prompt; moves may be empty where the device has no such link."""

    read_weights: list[list[Demand]]
    """Per kind of layer, last the head: out of storage."""
    early_weights: list[list[Demand]]
    """Copied on to the GPU while the CPU attends."""
    copy_weights: list[list[Demand]]
    """And after that."""
    read_state: list[Demand]
    """Keys and values, and activations, of one layer out of storage."""
    copy_state: list[Demand]
    activations_in: list[Demand]
    projections: Demand
    to_cpu: list[Demand]
    attention: Demand
    far_attention: Demand | None
    from_cpu: list[Demand]
    unpack: list[Demand | None]
    """Weights, per kind of layer."""
    unpack_kv: Demand | None
    feed: list[Demand]
    activations_out: list[Demand]
    store: list[Demand]
    """What a layer made, to host memory."""
    write: list[Demand]
    """And on to storage."""
    head: Demand
    step: list[Demand]


def _parts(context: Context, at: Layout, ops: Ops) -> _Parts:
    model, device = context.model, context.device
    layers, n, decoding = model.architecture.n_layers, at.n_batches, ops.phase is Phase.DECODE
    fast, host, storage, cpu = context.memory_of(at.gpu), device.host, device.storage, context.host_agent
    from_storage, to_gpu, to_host = (device.path(*ends) for ends in ((storage, host), (host, fast), (fast, host)))
    to_storage = route(context, host, storage) or ()
    stages = stage_bytes(context)
    shares = [at.weights] * (len(stages) - 1) + [at.head]
    # Attention: the CPU's part, and what has to come to the GPU for its own.
    far = np.where(at.cpu_attention, at.kv.away, 0.0) if decoding and cpu else 0.0 * at.kv.away
    fetched = at.kv.away - far if decoding else 0.0 * far
    kv = ops.context_bytes / layers if decoding else 0.0
    made = context.kv_token_bytes * ops.n_tokens / layers if decoding else ops.context_bytes / layers
    room = kv_batch_bytes(context, n) if decoding else 0.0
    vectors = context.activation_bytes(ops.n_tokens)  # of all sequences
    # With one GPU batch a layer waits for the activations of the one before; with several they come meanwhile.
    waits, meanwhile = np.where(n == 1, vectors, 0.0), np.where(n > 1, vectors, 0.0)
    near = 1.0 - far
    attention = _attention(ops, at, at.gpu, near, {
        fast: fetched * room, host: np.where(far > 0, 0.0, at.kv.storage * room)})
    far_attention: Demand | None = None
    early = [np.zeros(len(n))] * len(stages)
    if cpu:
        far_attention = _attention(ops, at, cpu, far, {host: np.where(far > 0, at.kv.storage * room, 0.0)})
        if context.agent(cpu).h2d_overlaps_cpu is False:
            far_attention = far_attention[0], f"link.{to_gpu[-1]}"
        else:
            early = _early_shares(ops, at, far, to_gpu, to_host)
    return _Parts(
        [ops.move("weights", s.storage * b, from_storage, staged=s.storage * b)
         for s, b in zip(shares, stages, strict=True)],
        [ops.move("weights", e * s.away * b, to_gpu, staged=e * s.away * b)
         for e, s, b in zip(early, shares, stages, strict=True)],
        [ops.move("weights", (1.0 - e) * s.away * b, to_gpu, staged=(1.0 - e) * s.away * b)
         for e, s, b in zip(early, shares, stages, strict=True)],
        ops.move("state", at.kv.storage * kv + at.hidden.storage * vectors, from_storage,
                 staged=at.kv.storage * room),
        ops.move("state", fetched * kv + at.hidden.away * meanwhile, to_gpu, copies=n, staged=fetched * room),
        ops.move("activations in", at.hidden.away * waits, to_gpu),
        _projections(ops, at),
        _to_cpu(ops, at, far, to_host),
        attention, far_attention,
        ops.move("from the CPU", far * vectors, to_gpu, copies=n),
        [_unpack(ops, at, name) for name in context.layers.names],
        _unpack_kv(ops, at, near),
        [_feed(ops, at, kind) for kind in range(len(context.layers.names))],
        ops.move("activations out", at.hidden.away * waits, to_host),
        ops.move("made", np.where(far > 0, 0.0, at.kv.away) * made + at.hidden.away * meanwhile, to_host, copies=n),
        ops.move("made", at.kv.storage * made + at.hidden.storage * vectors, to_storage) if to_storage else [],
        ops.compute("head", OpKind.COMPUTE, at.gpu, 2.0 * ops.n_outputs * model.head_params,
                    ops.head_bytes(at.gpu) * n, HEAD_KERNELS * n,
                    precision=context.group_precision("embedding" if model.architecture.tied_head else "head"),
                    release=_done(context, at, len(stages) - 1)),
        ops.step(at.gpu) if decoding else [])


def _early_shares(ops: Ops, at: Layout, far: Array, to_gpu: tuple[str, ...], to_host: tuple[str, ...]) -> list[Array]:
    """Share of each stage's weights that can be copied out of host memory until the CPU has attended for the layer
    before, while both have its memory: an engine that gives the small copies precedence does as well."""
    context, device, stages = ops.context, ops.context.device, stage_bytes(ops.context)
    cpu, one = str(context.host_agent), Ops(ops.context, len(far), agents=ops.agents, phase=ops.phase, depth=ops.depth)
    asked = [_projections(one, at), *_to_cpu(one, at, far, to_host)]
    attention, feeds = _attention(one, at, cpu, far), [_feed(one, at, kind) for kind in range(len(stages) - 1)]
    for what in (*asked, attention, *feeds):
        last = one.op(what)
    schedule = one.build(last)
    took = class_seconds(context, schedule)
    slowest = min(to_gpu, key=lambda name: device.link[name].rate.value)
    copying_at = fair_share(context, slowest, [slowest])
    left = device.capacity_bytes_per_s(f"memory.{device.host}") - copying_at
    attending = np.maximum(took[attention[0]], schedule.bytes[f"memory.{device.host}"][attention[0]] / left)
    latency = sum(device.link[name].latency.value for name in to_host)
    until = sum((took[k] for k, _ in asked), attending + latency)
    whole = until + np.max([took[k] for k, _ in feeds], axis=0)
    arriving = device.link[to_gpu[-1]].latency.value
    found = []
    for shares, n_bytes in zip([at.weights] * (len(stages) - 1) + [at.head], stages, strict=True):
        copying = shares.away * n_bytes / copying_at
        # Where a layer waits for its weights, it begins when the last copy's latency is over, and the next copy before.
        share = (until + np.where(copying > whole, arriving, 0.0)) / np.maximum(copying, 1e-300)
        share = np.minimum(share, shares.host / np.maximum(shares.away, 1e-300))
        found.append(np.where(far > 0, np.minimum(share, 1.0), 0.0))
    return found


def _to_cpu(ops: Ops, at: Layout, far: Array, to_host: tuple[str, ...]) -> list[Demand]:
    """New keys and values, and queries, for what the CPU attends to in one layer."""
    context = ops.context
    made = context.kv_token_bytes * ops.n_tokens / context.model.architecture.n_layers
    return ops.move("to the CPU", far * (made + context.activation_bytes(ops.n_tokens)), to_host, copies=at.n_batches)


def _attention(ops: Ops, at: Layout, agent: str, share: Array, release: dict[str, Array] | None = None) -> Demand:
    """A share of one layer's attention to the context, for all GPU batches."""
    return ops.attention(agent, ops.n_tokens, ops.context_flop * share, ops.context_bytes * share,
                         kernels=at.n_batches * CONTEXT_KERNELS, release=release)


def _done(context: Context, at: Layout, stage: int) -> dict[str, Array]:
    """Buffers that are free when a stage was computed. [B]"""
    n_bytes = stage_bytes(context)[stage]
    shares = at.head if stage == len(stage_bytes(context)) - 1 else at.weights
    return {context.memory_of(at.gpu): shares.away * n_bytes, context.device.host: shares.storage * n_bytes}


def _projections(ops: Ops, at: Layout) -> Demand:
    """The products of one layer's attention for all GPU batches, the context left out."""
    model = ops.context.model
    a, mixer = model.architecture, model.mixer
    kernels = LATENT_ATTENTION_KERNELS if a.latent_attention else ATTENTION_KERNELS
    read = (ops.read_bytes(at.gpu, mixer.name, mixer.matrix_params / a.n_layers, mixer.vector_params / a.n_layers)
            + ops.read_bytes(at.gpu, "norms", 0.0, ops.norm_params))
    return ops.compute("projections", OpKind.COMPUTE, at.gpu, 2.0 * ops.n_tokens * mixer.matrix_params / a.n_layers,
                       read * at.n_batches, (kernels - CONTEXT_KERNELS) * at.n_batches,
                       precision=ops.context.group_precision(mixer.name))


def _feed(ops: Ops, at: Layout, kind: int) -> Demand:
    """The FFN of one layer of a kind for all GPU batches."""
    context, n = ops.context, at.n_batches
    name = context.layers.names[kind]
    flop, n_bytes, kernels = np.zeros((3, len(n)))
    for each in np.unique(n).tolist():  # experts that a GPU batch uses depend on its tokens
        work, here = ffn_work(context.model, name, ops.n_tokens / each), n == each
        flop[here] = each * 2.0 * sum(work.multiplied_params.values())
        read = sum(ops.read_bytes(at.gpu, group, matrices, work.read_vector_params[group])
                   for group, matrices in work.read_matrix_params.items() if matrices)
        norms = ops.read_bytes(at.gpu, "norms", 0.0, ops.norm_params) if work.kernels else 0.0
        n_bytes[here], kernels[here] = each * (read + norms), each * work.kernels
    return ops.compute("ffn", OpKind.COMPUTE, at.gpu, flop, n_bytes, kernels,
                       precision=context.group_precision("experts" if name == "experts" else "ffn"),
                       release=_done(context, at, kind))


def _unpack(ops: Ops, at: Layout, kind: str) -> Demand | None:
    """Unpacking one layer's weights for each GPU batch; None where the engine does it in its products."""
    model, n = ops.context.model, at.n_batches
    params: dict[str, Array] = {model.mixer.name: n * model.mixer.matrix_params / model.architecture.n_layers}
    for each in np.unique(n).tolist():
        for group, matrices in ffn_work(model, kind, ops.n_tokens / each).read_matrix_params.items():
            params.setdefault(group, np.zeros(len(n)))[n == each] = each * matrices
    return unpacking(ops, at.gpu, params, UNPACK_KERNELS * n)


def _unpack_kv(ops: Ops, at: Layout, near: Array) -> Demand | None:
    """Unpacking one layer's keys and values that the GPU attends to in a decode step."""
    context = ops.context
    traffic, stored = context.agent(at.gpu).dequantise_bytes, matrix_bytes_per_param(context.workload.kv)
    if traffic is None or not traffic.value or stored >= UNPACKED_BYTES or ops.phase is Phase.PREFILL:
        return None
    elements = ops.context_bytes / stored / context.model.architecture.n_layers * near
    return ops.compute("unpack states", OpKind.MEMORY, at.gpu, 0.0, traffic.value * elements,
                       np.where(elements > 0, KV_UNPACK_KERNELS * at.n_batches, 0.0))


def tier_schedule(context: Context, at: Layout, phase: Phase, n_tokens: int) -> Schedule:
    """Read → copy → (unpack →) projections → attention on GPU and CPU → FFN, layer by layer, then the head."""
    cpu, best = context.host_agent, context.storage_link[1].best_depth
    ops = Ops(context, len(at.n_batches), agents=(at.gpu, *((cpu,) if cpu else ())), phase=phase,
              depth=float(READER_THREADS[-1] if best is None else best.value))
    parts, kinds = _parts(context, at, ops), context.layers.kind
    n_layers, n_stages = len(kinds), len(kinds) + 1
    computed: list[int] = []  # op that ends a stage, all tokens in one sequence
    attended: list[tuple[int | None, ...]] = []  # ops after which the states of a layer are no longer needed
    kept: tuple[int | None, ...] = ()
    issued: dict[tuple[str, str, int], tuple[int | None, ...]] = {}
    last: int | None = None

    def bring(what: str, place: int, upto: str = "copy") -> tuple[int | None, ...]:
        """Issue the read of a stage's weights or a layer's states, then what is copied of it early, then the rest, when
        not yet done; only up to one of them.

        Also past the timed token: they are in the way of its other reads.
        """
        per = n_stages if what == "weights" else n_layers
        if phase is Phase.PREFILL and place >= per:
            return ()  # nothing follows the prompt here
        where, token = place % per, place // per
        free: tuple[int | None, ...] = ()
        found: tuple[int | None, ...] = ()
        if place >= BUFFERS:
            free = (computed[place - BUFFERS],) if what == "weights" else attended[place - BUFFERS]
        if what == "weights":
            kind = -1 if where == n_layers else kinds[where]
            moves = {"read": parts.read_weights[kind], "early": parts.early_weights[kind],
                     "copy": parts.copy_weights[kind]}
        else:
            moves = {"read": parts.read_state, "copy": parts.copy_state}
        waited = free
        for step, demands in moves.items():
            if (what, step, place) not in issued:
                # What is copied early lies in host memory; only the rest waits for a read.
                issued[what, step, place] = ops.chain(demands, deps=free if step == "early" else waited, token=token,
                                                      layer=where)
            mine = issued[what, step, place]
            waited, found = (waited, (*found, *mine)) if step == "early" else ((*waited, *mine), (*found, *mine))
            if step == upto:
                break
        return found

    for token in range(n_tokens):
        for layer in range(n_stages):
            stage, state = token * n_stages + layer, token * n_layers + layer
            weights = bring("weights", stage)
            if layer == n_layers:
                last = ops.op(parts.head, deps=[last, *weights, *kept], token=token, layer=layer)
                computed.append(last)
                bring("weights", stage + 1)
                continue
            copied = bring("state", state)
            bring("weights", stage + 1, "read")
            bring("state", state + 1, "read")
            there = ops.chain(parts.activations_in, deps=[last], token=token, layer=layer)
            deps: tuple[int | None, ...] = (*there, *weights)
            unpack = parts.unpack[kinds[layer]]
            if unpack is not None:
                deps = (ops.op(unpack, deps=deps, token=token, layer=layer),)
            asked = ops.op(parts.projections, deps=deps, token=token, layer=layer)
            wide: tuple[int | None, ...] = (asked, *copied)
            if parts.unpack_kv is not None:
                wide = (ops.op(parts.unpack_kv, deps=wide, token=token, layer=layer),)
            near = ops.op(parts.attention, deps=wide, token=token, layer=layer)
            sent = ops.chain(parts.to_cpu, deps=[asked], token=token, layer=layer)
            users: tuple[int | None, ...] = (near,)
            back: tuple[int | None, ...] = (near,)
            if parts.far_attention is not None:
                bring("weights", stage + 1, "early")
                states = issued["state", "read", state]
                far = ops.op(parts.far_attention, deps=[*sent, *states], token=token, layer=layer)
                users = (near, far)
                back = (near, *ops.chain(parts.from_cpu, deps=[far], token=token, layer=layer))
            attended.append(users)
            bring("weights", stage + 1)
            bring("state", state + 1)
            fed = ops.op(parts.feed[kinds[layer]], deps=[*back, *kept], token=token, layer=layer)
            (last,) = ops.chain(parts.activations_out, deps=[fed], token=token, layer=layer)
            assert last is not None
            computed.append(last)
            stored = ops.chain(parts.store, deps=[asked], token=token, layer=layer)
            kept = ops.chain(parts.write, deps=[*stored, *sent], token=token, layer=layer)
        assert last is not None
        for what in parts.step:
            last = ops.op(what, deps=[last], token=token, layer=n_layers)
        if token < n_tokens - 1:
            ops.builder.end_token(last)
    assert last is not None
    return ops.build(last, held(context, at))
