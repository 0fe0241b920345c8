"""Which ops make up a step with a cache of experts?

Per layer: attention → router → copies of what is missed, then of what the next layer's gate asks for → shared
experts → the chosen ones. These run in grouped kernels, which begin when the last of them has arrived: what is missed
is waited for, what was asked for early came while the layer before computed. Where the CPU computes missed experts:
hidden vectors to it, its products, the results back, the sum, beside what the GPU does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmem.policy.base import Block
from simmem.policy.context import Context
from simmem.policy.families import _experts
from simmem.policy.families._dense import READER_THREADS
from simmem.policy.families._unpack import unpacking
from simmem.policy.layer_kinds import ROUTER_KERNELS, ffn_products, ffn_work, touched_experts
from simmem.policy.ops import STREAM_CHUNK_BYTES, Ops
from simmem.schedule import OpKind, Phase, Products, Schedule

__all__ = ["decode_step", "prefill"]

Array = NDArray[np.float64]
Demand = tuple[int, str]

MIXER_MATRICES, FFN_MATRICES = 4.0, 3.0
"""Kernels that unpack them where an engine does that, one a matrix. [kernels]"""
GUESS_KERNELS = 2.0
"""The next layer's scores on this layer's input, and the choice. [kernels]"""
GATE_KERNELS = float(ROUTER_KERNELS)
"""The norm before it, scores and choice; the weighted sum is left to the experts. [kernels]"""
SHARED_KERNELS, GATED_SHARED_KERNELS = 4.0, 6.0
"""What every token uses beside the chosen experts: as many as a plain FFN, and the sum. [kernels]"""


@dataclass(frozen=True)
class _Layers:
    """Demand classes of the layers with experts, one for each in every demand but `shared`."""

    gate: Demand
    missed: list[Demand]
    """Copies of what its router finds missing."""
    guess: Demand | None
    """Asking its gate during the layer before; for the first there is none."""
    ahead: list[Demand]
    """Copies of what that asks for."""
    shared: list[Demand]
    """The same in every layer."""
    experts: list[Demand]
    beside: tuple[list[Demand], list[Demand], list[Demand], Demand] | None
    """To the CPU, there, back, the sum."""


def _ops(context: Context, agents: Sequence[str], n_columns: int, phase: Phase) -> Ops:
    best = context.storage_link[1].best_depth
    return Ops(context, n_columns, agents=agents, phase=phase,
               depth=float(READER_THREADS[-1] if best is None else best.value))


def _held(context: Context, block: Block, n_rows: int) -> dict[str, Array]:
    parts = _experts.parts_of(context, block)
    held = {parts.fast: parts.resident + parts.cached}
    if parts.host is not None:
        held[context.device.host] = parts.host
    return {tier: np.repeat(amount, n_rows) for tier, amount in held.items()}


def _beside_kernels(context: Context) -> float:
    """Kernels of what every token uses, shared experts."""
    a = context.model.architecture
    if a.experts is None or not a.experts.d_shared:
        return 0.0
    return GATED_SHARED_KERNELS if a.gated else SHARED_KERNELS


def _opened(ops: Ops, agent: str, kind: str) -> list[Demand]:
    """Unpacking of a layer's resident matrices, where the engine does that."""
    model = ops.context.model
    always = ffn_work(model, kind, ops.n_tokens).read_matrix_params["ffn"]
    found = unpacking(ops, agent, {model.mixer.name: model.mixer.matrix_params / model.architecture.n_layers,
                                   "ffn": always}, MIXER_MATRICES + (FFN_MATRICES if always else 0.0))
    return [] if found is None else [found]


class _Classes:
    """Makes the demand classes of a decode step; amounts are (n_expert_layers, n_columns)."""

    def __init__(self, context: Context, block: Block, rows: NDArray[np.int64]) -> None:
        self.context, self.agent = context, str(block.structural["agent"])
        self.helper = _experts.helper_of(context) if _experts.computes_on_cpu(context, block) else None
        self.ahead = block.structural["prefetch"] == "next-layer"
        self.ops = _ops(context, (self.agent, *([self.helper] if self.helper else [])),
                        block.n_candidates * len(rows), Phase.DECODE)
        self.use, self.each = _experts.usage(context, block, rows), _experts.expert_bytes(context)
        self.memory, self.host = context.memory_of(self.agent), context.device.host
        held = np.repeat(np.asarray(block.columns["experts_per_layer"], dtype=np.float64), len(rows))
        self.spare = _experts.experts_of(context).count - held
        """Experts of a layer that never lie in its cache together with those that do: what needs a buffer at most."""
        self.vector_params = context.model.group("experts").vector_params / (
            context.model.architecture.n_expert_layers * _experts.experts_of(context).count)
        """Of one expert."""
        self.work = ffn_work(context.model, "experts", self.ops.n_tokens)
        self.products = Products(*ffn_products(context.model, "experts", self.ops.n_tokens))

    def fetch(self, name: str, units: Array, from_storage: Array, buffered: Array) -> list[Demand]:
        """Experts on their way: what host memory lacks out of storage, then all over the link.

        buffered : share of them that comes into buffers; the cache has room left for the others (a cold one).
        """
        device = self.context.device
        read = self.ops.move(name, from_storage * self.each, device.path(device.storage, self.host),
                             requests=from_storage * max(self.each / STREAM_CHUNK_BYTES, 1.0),
                             staged=from_storage * buffered * self.each)
        if self.memory == self.host:
            return read
        return read + self.ops.move(name, units * self.each, device.path(self.host, self.memory), copies=units,
                                    staged=units * buffered * self.each)

    def freed(self, units: Array, from_storage: Array, buffered: Array) -> dict[str, Array]:
        """The buffers of experts that are no longer needed. [B]"""
        if self.memory == self.host:
            return {self.memory: from_storage * buffered * self.each}
        return {self.memory: units * buffered * self.each, self.host: from_storage * buffered * self.each}

    def experts(self, agent: str, units: Array, used: Array, waits: Array | float = 0.0,
                release: Mapping[str, Array] | None = None) -> list[Demand]:
        """Products of `units` of the experts in use, unpacked first where the engine does that."""
        context, model = self.context, self.context.model
        share = np.divide(units, used, out=np.zeros_like(units), where=used > 0)
        read = self.ops.read_bytes(agent, "experts", model.expert_params, self.vector_params)
        made = self.ops.compute(
            "ffn", OpKind.COMPUTE, agent, 2.0 * self.work.multiplied_params["experts"] * share, read * units,
            (self.work.kernels - GATE_KERNELS - _beside_kernels(context)) * share,
            precision=context.group_precision("experts"), waits=waits, release=release, products=self.products)
        unpack = unpacking(self.ops, agent, {"experts": model.expert_params * units}, FFN_MATRICES * units)
        return [made] if unpack is None else [unpack, made]

    def guess(self, some: Array) -> Demand:
        """The gate of the next layer on this layer's input, for the columns where anything is asked for."""
        context, router = self.context, self.work.read_matrix_params["router"]
        asks = np.where(some > 0, 1.0, 0.0)
        return self.ops.compute(
            "guess", OpKind.PREDICTOR, self.agent, 2.0 * self.work.multiplied_params["router"] * asks,
            self.ops.read_bytes(self.agent, "router", router, 0.0) * asks, GUESS_KERNELS * asks,
            precision=context.group_precision("router"),
            products=Products(self.ops.n_tokens, float(context.model.architecture.d_model), 1.0))

    def layers(self) -> _Layers:
        """Of every layer that has experts."""
        ops, use, agent, to_cpu = self.ops, self.use, self.agent, self.helper is not None
        used, early, late, wasted = use.used, use.early, use.late, use.wasted
        early_below, late_below = use.early_from_storage, use.late_from_storage
        asked = early + wasted
        right = early_below * np.divide(early, asked, out=np.zeros_like(early), where=asked > 0)
        shared = _beside_kernels(self.context)
        early_room = _share(self.spare, asked)
        late_room = _share(np.maximum(self.spare - early * early_room, 0.0), late)
        freed = self.freed(early, right, early_room)
        return _Layers(
            gate=ops.feed(agent, "experts", ops.n_tokens, groups=("router",), kernels=GATE_KERNELS,
                          release=self.freed(wasted, early_below - right, early_room)),
            missed=self.fetch("missed experts", np.zeros_like(late) if to_cpu else late, late_below, late_room),
            guess=self.guess(asked) if self.ahead else None,
            ahead=self.fetch("experts asked for early", asked, early_below, early_room) if self.ahead else [],
            shared=[ops.feed(agent, "experts", ops.n_tokens, groups=("ffn",), kernels=shared, norms=False)]
            if shared else [],
            experts=self.experts(agent, used - late, used, release=freed) if to_cpu else self.experts(
                agent, used, used, np.where(late_below > 0, 1.0, 0.0),
                _sums(freed, self.freed(late, late_below, late_room))),
            beside=self.beside(late, used, late_below * late_room) if to_cpu else None)

    def beside(self, late: Array, used: Array, buffered: Array
               ) -> tuple[list[Demand], list[Demand], list[Demand], Demand]:
        """Hidden vectors to the CPU, its experts, what they make back to the GPU, and the sum there."""
        assert self.helper is not None
        some = np.where(late > 0, 1.0, 0.0)
        tokens = some * self.ops.n_tokens
        return (self.ops.hidden("to the CPU", self.memory, self.host, tokens),
                self.experts(self.helper, late, used, release={self.host: buffered * self.each}),
                self.ops.hidden("from the CPU", self.host, self.memory, tokens),
                self.ops.join(self.agent, self.ops.n_tokens, some))


def _sums(one: Mapping[str, Array], other: Mapping[str, Array]) -> dict[str, Array]:
    """Both together, of the same tiers."""
    return {tier: amount + other[tier] for tier, amount in one.items()}


def _share(part: Array, whole: Array) -> Array:
    """part / whole, 1 at most and where there is no whole."""
    return np.minimum(np.divide(part, whole, out=np.ones_like(whole), where=whole > 0), 1.0)


def decode_step(context: Context, block: Block, rows: NDArray[np.int64]) -> Schedule:
    """The schedule of a decode step; columns are candidates × tokens of the routing trace, tokens fastest."""
    made = _Classes(context, block, rows)
    ops, agent, a, kinds = made.ops, made.agent, context.model.architecture, context.layers
    where = {layer: index for index, layer in enumerate(a.expert_layers)}
    each = made.layers()
    attend = ops.mixer(agent, ops.n_tokens, ops.context_flop, ops.context_bytes)
    plain = [ops.feed(agent, "plain", ops.n_tokens)] if "plain" in kinds.names else []
    opened = {name: _opened(ops, agent, name) for name in kinds.names}
    head, step = ops.head(agent), ops.step(agent)
    done: tuple[int | None, ...] = (None,)
    coming: tuple[int | None, ...] = ()
    for layer in range(a.n_layers):
        name = kinds.names[kinds.kind[layer]]
        attended = done = ops.chain([*opened[name], attend], deps=done, layer=layer)
        arrived, fetched = coming, attended
        nth, following = where.get(layer), where.get(layer + 1)
        if nth is not None:
            done = ops.chain([each.gate], deps=done, layer=layer, nth=nth)
            fetched = ops.chain(each.missed, deps=done, layer=layer, nth=nth)
        coming = ()
        if following and each.guess is not None:  # before the first nothing is asked for
            asked = ops.op(each.guess, deps=attended, layer=layer, nth=following)
            # After what this layer misses: its tokens are waited for now.
            coming = ops.chain(each.ahead, deps=[asked, *fetched], layer=layer, nth=following)
        if nth is None:
            done = ops.chain(plain, deps=done, layer=layer)
            continue
        joined: tuple[int | None, ...] = ()
        if each.beside is not None:
            sent = ops.chain(each.beside[0], deps=done, layer=layer, nth=nth)
            summed = ops.chain(each.beside[1], deps=[*sent, *fetched], layer=layer, nth=nth)
            joined = ops.chain(each.beside[2], deps=summed, layer=layer, nth=nth)
        done = ops.chain(each.shared, deps=done, layer=layer)
        if each.beside is None:
            done = ops.chain(each.experts, deps=[*done, *arrived, *fetched], layer=layer, nth=nth)
        else:
            done = ops.chain(each.experts, deps=[*done, *arrived], layer=layer, nth=nth)
            done = ops.chain([each.beside[3]], deps=[*done, *joined], layer=layer, nth=nth)
    last = ops.op(head, deps=done, layer=a.n_layers)
    for what in step:
        last = ops.op(what, deps=[last], layer=a.n_layers)
    return ops.build(last, _held(context, block, len(rows)))


def prefill(context: Context, block: Block) -> Schedule:
    """The schedule of the prompt: every layer computes what it holds while the other experts that its tokens use pass
    through the buffers, one after the other."""
    agent, x = str(block.structural["agent"]), _experts.experts_of(context)
    model, device = context.model, context.device
    ops = _ops(context, (agent,), block.n_candidates, Phase.PREFILL)
    held, each = np.asarray(block.columns["experts_per_layer"], dtype=np.float64), _experts.expert_bytes(context)
    share = 1.0 - held / x.count
    missed = touched_experts(x.count, x.per_token, ops.n_tokens) * share
    below = _experts.host_experts(context, agent)
    from_storage = missed * (1.0 - _experts.host_share(x.count, held, below))
    passing = ops.move("experts", from_storage * each, device.path(device.storage, device.host))
    if below is not None:
        passing += ops.move("experts", missed * each, device.path(device.host, context.memory_of(agent)))
    attend, head = ops.mixer(agent, ops.n_tokens, ops.context_flop, ops.context_bytes), ops.head(agent)
    plain = [ops.feed(agent, "plain", ops.n_tokens)] if "plain" in context.layers.names else []
    opened = {name: _opened(ops, agent, name) for name in context.layers.names}
    work = ffn_work(model, "experts", ops.n_tokens)
    gate = ops.feed(agent, "experts", ops.n_tokens, groups=("router", "ffn"), kernels=GATE_KERNELS)

    def experts(part: Array) -> list[Demand]:
        used = work.read_matrix_params["experts"] * part
        unpack = unpacking(ops, agent, {"experts": used}, FFN_MATRICES * used / model.expert_params)
        fed = ops.feed(agent, "experts", ops.n_tokens, part, groups=("experts",), norms=False,
                       kernels=(work.kernels - GATE_KERNELS) * part)
        return [fed] if unpack is None else [unpack, fed]

    here, there = experts(1.0 - share), experts(share)  # many tokens each: what is held has enough to do meanwhile
    done: tuple[int | None, ...] = (None,)
    for layer, kind in enumerate(context.layers.kind):
        name = context.layers.names[kind]
        done = ops.chain([*opened[name], attend], deps=done, layer=layer)
        if name != "experts":
            done = ops.chain(plain, deps=done, layer=layer)
            continue
        done = ops.chain([gate], deps=done, layer=layer)
        arrived = ops.chain(passing, deps=done, layer=layer)
        done = ops.chain(here, deps=done, layer=layer)
        done = ops.chain(there, deps=[*done, *arrived], layer=layer)
    return ops.build(ops.op(head, deps=done, layer=model.architecture.n_layers), _held(context, block, 1))
