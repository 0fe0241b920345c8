"""The ops of a step in which a GPU and a CPU multiply each their part of every layer, and add their results up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmem.policy.context import Context
from simmem.policy.families._two_agents import PROMPT_ON_GPU
from simmem.policy.ops import Demand, Ops
from simmem.schedule import OpKind, Phase

__all__ = ["Parts", "decode_ops", "prompt_ops"]

Array = NDArray[np.float64]

PREDICTOR_KERNELS = 2
"""Down to its rank and up again. [kernels]"""
_ID_BYTES = 4.0
"""A neuron's number, as the GPU tells it to the CPU."""
_NOTHING = 1e-9
"""Shares below this are what rounding leaves of nothing."""


@dataclass(frozen=True)
class Parts:
    """Who has what of every layer; arrays are (n_layers, n_columns)."""

    gpu: str
    host: str
    heads: Array
    """Share of the attention heads whose weights the GPU has."""
    kv_on_host: bool
    """All keys and values lie in host memory; else each head's beside its weights."""
    neurons: Array
    """Share of the neurons that the GPU has."""


def decode_ops(context: Context, parts: Parts, *, heads_used: float, near_rows: Array, far_rows: Array,
               predictor_params: float) -> tuple[Ops, int]:
    """A decode step, without its end: the ops so far and the last of them.

    heads_used : share of the heads that a step multiplies.
    near_rows, far_rows : (n_layers, n_columns) neurons that the GPU and the CPU multiply.
    predictor_params : of one layer's predictor; 0 where there is none.
    """
    ops = Ops(context, near_rows.shape[1], agents=(parts.gpu, parts.host))
    predict = ops.compute("predictor", OpKind.PREDICTOR, parts.gpu, 2.0 * ops.n_tokens * predictor_params,
                          ops.read_bytes(parts.gpu, "ffn", predictor_params, 0.0), PREDICTOR_KERNELS) \
        if predictor_params else None
    attention = _Attention.of(ops, parts, heads_used)
    feed = _Feed.of(ops, parts, near_rows, np.where(far_rows < _NOTHING * (near_rows + far_rows), 0.0, far_rows),
                    predicted=True)
    last: int | None = None
    for layer in range(len(near_rows)):
        last = attention.append(ops, layer, last)
        asked = last if predict is None else ops.op(predict, deps=[last], layer=layer)
        last = feed.append(ops, layer, asked)
    assert last is not None
    return ops, last


def prompt_ops(context: Context, parts: Parts) -> tuple[Ops, int]:
    """The prompt, which touches most units and so is multiplied whole: what the CPU has is copied to the GPU, a layer
    after the other, or multiplied where it is when the prompt is short."""
    n_layers, n_columns = parts.heads.shape
    ops = Ops(context, n_columns, agents=(parts.gpu, parts.host), phase=Phase.PREFILL)
    last: int | None = None
    if ops.n_tokens < PROMPT_ON_GPU:
        attention = _Attention.of(ops, parts, 1.0)
        fed = _Feed.of(ops, parts, parts.neurons, _rest(parts.neurons), predicted=False)
        for layer in range(n_layers):
            last = fed.append(ops, layer, attention.append(ops, layer, last))
    else:
        device, gpu = context.device, parts.gpu
        vram = context.memory_of(gpu)
        attend = ops.mixer(gpu, ops.n_tokens, ops.context_flop, ops.context_bytes)
        feed = ops.feed(gpu, "plain", ops.n_tokens)
        missing = ((1.0 - parts.heads) * context.group_bytes["attention"] / n_layers
                   + (1.0 - parts.neurons) * context.unit_bytes * context.model.architecture.d_ff)
        away = np.ones_like(parts.heads) if parts.kv_on_host else 1.0 - parts.heads
        weights = ops.move("weights", missing, device.path(device.host, vram))
        written = ops.move("keys and values", away * ops.context_bytes / n_layers, device.path(vram, device.host))
        for layer in range(n_layers):
            copied = ops.chain(weights, layer=layer, nth=layer)
            attended = ops.op(attend, deps=[last, *copied], layer=layer)
            ops.chain(written, deps=[attended], layer=layer, nth=layer)
            last = ops.op(feed, deps=[attended], layer=layer)
    assert last is not None
    return ops, last


@dataclass(frozen=True)
class _Attention:
    """Attention on both, heads where their weights are, the context where keys and values are: the demands of every
    layer, one for each."""

    projected: Demand
    sent: list[Demand]
    cold: Demand
    known: list[Demand]
    there: Demand
    here: Demand
    got: list[Demand]
    joined: Demand

    @classmethod
    def of(cls, ops: Ops, parts: Parts, used: float) -> _Attention:
        context, near = ops.context, parts.heads
        far = _rest(near)
        seen_near = np.zeros_like(near) if parts.kv_on_host else near
        handed = near * used if parts.kv_on_host else np.zeros_like(near)
        crossing, cold_heads = _some((far > 0) | (handed > 0)), _some(far > 0)
        out, back, vector = _between(ops, parts)
        keys = 2.0 * context.model.architecture.n_kv_heads / context.model.architecture.n_heads
        flop, seen = ops.context_flop * used, ops.context_bytes * (used if ops.phase is Phase.DECODE else 1.0)
        n = ops.n_tokens
        return cls(
            projected=ops.projections(parts.gpu, n, near * used),
            sent=ops.move("attention input", vector * cold_heads, out),
            cold=ops.projections(parts.host, n, far * used),
            known=ops.move("queries, keys, values", vector * (1.0 + keys) * handed, out),
            there=ops.attention(parts.host, n, flop * (1.0 - seen_near), seen * (1.0 - seen_near)),
            here=ops.attention(parts.gpu, n, flop * seen_near, seen * seen_near),
            # What the cold heads add up to, and what the hot ones saw of the context, for their output projection.
            got=ops.move("attention output", vector * (cold_heads + handed), back),
            joined=ops.join(parts.gpu, n, crossing))

    def append(self, ops: Ops, layer: int, last: int | None) -> int:
        """One layer's ops; returns the last of them."""
        projected = ops.op(self.projected, deps=[last], layer=layer, nth=layer)
        sent = ops.chain(self.sent, deps=[last], layer=layer, nth=layer)
        cold = ops.op(self.cold, deps=sent, layer=layer, nth=layer)
        known = ops.chain(self.known, deps=[projected], layer=layer, nth=layer)
        there = ops.op(self.there, deps=[cold, *known], layer=layer, nth=layer)
        here = ops.op(self.here, deps=[projected], layer=layer, nth=layer)
        got = ops.chain(self.got, deps=[there], layer=layer, nth=layer)
        return ops.op(self.joined, deps=[here, *got], layer=layer, nth=layer)


@dataclass(frozen=True)
class _Feed:
    """The FFN on both: the demands of every layer, one for each."""

    sent: list[Demand]
    there: Demand
    here: Demand
    got: list[Demand]
    joined: Demand

    @classmethod
    def of(cls, ops: Ops, parts: Parts, near: Array, far: Array, *, predicted: bool) -> _Feed:
        """`near` and `far` are neurons where they are predicted, else shares of all of them."""
        cold = _some(far > 0)
        out, back, vector = _between(ops, parts)
        ids = _ID_BYTES * far if predicted else 0.0
        there_share, here_share = (cold, 1.0) if predicted else (far, near)
        there_rows, here_rows = (far, near) if predicted else (None, None)
        return cls(
            sent=ops.move("ffn input", vector * cold + ids, out),
            there=ops.feed(parts.host, "plain", ops.n_tokens, there_share, there_rows, norms=False),
            here=ops.feed(parts.gpu, "plain", ops.n_tokens, here_share, here_rows),
            got=ops.move("ffn output", vector * cold, back),
            joined=ops.join(parts.gpu, ops.n_tokens, cold))

    def append(self, ops: Ops, layer: int, last: int | None) -> int:
        """One layer's ops; returns the last of them."""
        sent = ops.chain(self.sent, deps=[last], layer=layer, nth=layer)
        there = ops.op(self.there, deps=sent, layer=layer, nth=layer)
        here = ops.op(self.here, deps=[last], layer=layer, nth=layer)
        got = ops.chain(self.got, deps=[there], layer=layer, nth=layer)
        return ops.op(self.joined, deps=[here, *got], layer=layer, nth=layer)


def _some(which: NDArray[np.bool_]) -> Array:
    return which.astype(np.float64)


def _rest(share: Array) -> Array:
    """What the other one has, and nothing where only rounding says that it has something."""
    return np.asarray(np.where(1.0 - share < _NOTHING, 0.0, 1.0 - share), np.float64)


def _between(ops: Ops, parts: Parts) -> tuple[tuple[str, ...], tuple[str, ...], float]:
    """Links from the GPU's memory to the host's and back, and the bytes of the hidden vectors (fp32 activations)."""
    device, near = ops.context.device, ops.context.memory_of(parts.gpu)
    return (device.path(near, device.host), device.path(device.host, near),
            ops.context.activation_bytes(ops.n_tokens, "fp32"))
