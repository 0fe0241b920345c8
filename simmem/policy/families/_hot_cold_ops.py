"""The ops of a step in which a GPU and a CPU multiply each their part of every layer, and add their results up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmem.policy.context import Context
from simmem.policy.families._two_agents import PROMPT_ON_GPU
from simmem.policy.ops import Ops
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
    last: int | None = None
    for layer, (near, far) in enumerate(zip(near_rows, far_rows, strict=True)):
        last = _attention(ops, parts, layer, last, heads_used)
        asked = last if predict is None else ops.op(predict, deps=[last], layer=layer)
        last = _feed(ops, parts, layer, asked, near, np.where(far < _NOTHING * (near + far), 0.0, far), predicted=True)
    assert last is not None
    return ops, last


def prompt_ops(context: Context, parts: Parts) -> tuple[Ops, int]:
    """The prompt, which touches most units and so is multiplied whole: what the CPU has is copied to the GPU, a layer
    after the other, or multiplied where it is when the prompt is short."""
    n_columns = parts.heads.shape[1]
    ops = Ops(context, n_columns, agents=(parts.gpu, parts.host), phase=Phase.PREFILL)
    last: int | None = None
    if ops.n_tokens < PROMPT_ON_GPU:
        for layer, share in enumerate(parts.neurons):
            attended = _attention(ops, parts, layer, last, 1.0)
            last = _feed(ops, parts, layer, attended, share, _rest(share), predicted=False)
    else:
        device, gpu = context.device, parts.gpu
        vram = context.memory_of(gpu)
        attend = ops.mixer(gpu, ops.n_tokens, ops.context_flop, ops.context_bytes)
        feed = ops.feed(gpu, "plain", ops.n_tokens)
        n_layers = context.model.architecture.n_layers
        for layer, (heads, neurons) in enumerate(zip(parts.heads, parts.neurons, strict=True)):
            missing = ((1.0 - heads) * context.group_bytes["attention"] / n_layers
                       + (1.0 - neurons) * context.unit_bytes * context.model.architecture.d_ff)
            copied = ops.chain(ops.move("weights", missing, device.path(device.host, vram)), layer=layer)
            away = np.ones(n_columns) if parts.kv_on_host else 1.0 - heads
            attended = ops.op(attend, deps=[last, *copied], layer=layer)
            ops.chain(ops.move("keys and values", away * ops.context_bytes / n_layers, device.path(vram, device.host)),
                      deps=[attended], layer=layer)
            last = ops.op(feed, deps=[attended], layer=layer)
    assert last is not None
    return ops, last


def _attention(ops: Ops, parts: Parts, layer: int, last: int | None, used: float) -> int:
    """One layer's attention on both: heads where their weights are, the context where keys and values are."""
    context, near = ops.context, parts.heads[layer]
    far = _rest(near)
    seen_near = np.zeros_like(near) if parts.kv_on_host else near
    handed = near * used if parts.kv_on_host else np.zeros_like(near)
    crossing = ((far > 0) | (handed > 0)).astype(np.float64)
    out, back, vector = _between(ops, parts)
    keys = 2.0 * context.model.architecture.n_kv_heads / context.model.architecture.n_heads
    decode = ops.phase is Phase.DECODE
    flop, seen = ops.context_flop * used, ops.context_bytes * (used if decode else 1.0)
    projected = ops.op(ops.projections(parts.gpu, ops.n_tokens, near * used), deps=[last], layer=layer)
    cold_heads = (far > 0).astype(np.float64)
    sent = ops.chain(ops.move("attention input", vector * cold_heads, out), deps=[last], layer=layer)
    cold = ops.op(ops.projections(parts.host, ops.n_tokens, far * used), deps=sent, layer=layer)
    known = ops.chain(ops.move("queries, keys, values", vector * (1.0 + keys) * handed, out), deps=[projected],
                      layer=layer)
    there = ops.op(ops.attention(parts.host, ops.n_tokens, flop * (1.0 - seen_near), seen * (1.0 - seen_near)),
                   deps=[cold, *known], layer=layer)
    here = ops.op(ops.attention(parts.gpu, ops.n_tokens, flop * seen_near, seen * seen_near), deps=[projected],
                  layer=layer)
    # What the cold heads add up to, and what the hot ones saw of the context, for their output projection to multiply.
    got = ops.chain(ops.move("attention output", vector * (cold_heads + handed), back), deps=[there], layer=layer)
    return ops.op(ops.join(parts.gpu, ops.n_tokens, crossing), deps=[here, *got], layer=layer)


def _feed(ops: Ops, parts: Parts, layer: int, last: int | None, near: Array, far: Array, *, predicted: bool) -> int:
    """One layer's FFN on both; `near` and `far` are neurons where they are predicted, else shares of all of them."""
    cold = (far > 0).astype(np.float64)
    out, back, vector = _between(ops, parts)
    ids = _ID_BYTES * far if predicted else 0.0
    there_share, here_share = (cold, 1.0) if predicted else (far, near)
    there_rows, here_rows = (far, near) if predicted else (None, None)
    sent = ops.chain(ops.move("ffn input", vector * cold + ids, out), deps=[last], layer=layer)
    there = ops.op(ops.feed(parts.host, "plain", ops.n_tokens, there_share, there_rows, norms=False), deps=sent,
                   layer=layer)
    here = ops.op(ops.feed(parts.gpu, "plain", ops.n_tokens, here_share, here_rows), deps=[last], layer=layer)
    got = ops.chain(ops.move("ffn output", vector * cold, back), deps=[there], layer=layer)
    return ops.op(ops.join(parts.gpu, ops.n_tokens, cold), deps=[here, *got], layer=layer)


def _rest(share: Array) -> Array:
    """What the other one has, and nothing where only rounding says that it has something."""
    return np.asarray(np.where(1.0 - share < _NOTHING, 0.0, 1.0 - share), np.float64)


def _between(ops: Ops, parts: Parts) -> tuple[tuple[str, ...], tuple[str, ...], float]:
    """Links from the GPU's memory to the host's and back, and the bytes of the hidden vectors (fp32 activations)."""
    device, near = ops.context.device, ops.context.memory_of(parts.gpu)
    return (device.path(near, device.host), device.path(device.host, near),
            ops.context.activation_bytes(ops.n_tokens, "fp32"))
