"""Where do the percentages of `tier-percent` put weights, keys and values, activations, and what does each tier hold?

Everything here is linear in the shares: the placement by linear programming reads its rows off these amounts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.policy.base import Block, Placement
from simmem.policy.context import Context

__all__ = ["BUFFERS", "Layout", "Shares", "footprint", "held", "hidden_bytes", "kv_batch_bytes", "layout", "placements",
           "route", "stage_bytes"]

Array = NDArray[np.float64]

BUFFERS = 2
"""One stage (or GPU batch) is computed while the next arrives."""


@dataclass(frozen=True)
class Shares:
    """Shares of one kind of tensor in each tier, (n,) each; they add up to 1."""

    gpu: Array
    host: Array
    storage: Array

    @property
    def away(self) -> Array:
        """What the GPU does not hold."""
        return self.host + self.storage


@dataclass(frozen=True)
class Layout:
    """Candidates of `tier-percent`, arrays (n,)."""

    gpu: str
    """The agent that computes."""
    weights: Shares
    """Of the layers."""
    head: Shares
    """Of what stands before and after the layers."""
    kv: Shares
    hidden: Shares
    n_batches: Array
    """GPU batches that a layer's weights are used for, one after the other, before the next layer's."""
    cpu_attention: NDArray[np.bool_]
    """Whether the CPU attends to the keys and values that the GPU does not hold."""


def layout(context: Context, block: Block, n_rows: int = 1) -> Layout:
    """The candidates of a block, each `n_rows` times."""

    def shares(knob: str) -> Shares:
        percent = np.repeat(np.asarray(block.columns[knob], dtype=np.float64) / 100.0, n_rows, axis=0)
        gpu, host = percent[:, 0], percent[:, 1]
        rest = 1.0 - gpu - host
        return Shares(gpu, host, np.where(rest > 1e-12, rest, 0.0))

    weights = head = shares("weights_percent")
    if block.structural.get("weights_split", "fractions") == "matrices":
        weights, head = _whole_matrices(context, weights)
    return Layout(str(block.structural["agent"]), weights, head, shares("kv_percent"), shares("activations_percent"),
                  np.repeat(np.asarray(block.columns["n_gpu_batches"], dtype=np.float64), n_rows),
                  np.repeat(np.asarray(block.columns["cpu_attention"], dtype=np.bool_), n_rows))


def _whole_matrices(context: Context, asked: Shares) -> tuple[Shares, Shares]:
    """What becomes of shares of the layers and of the head where a tier gets whole matrices.

    FlexGen's rule (flex_opt.py, init_weight_list): in an attention and in an FFN each, matrices stand in a row, storage
    takes its share of the row from the front, then the host, then the GPU; a matrix goes where its middle lies. So 20 %
    on the GPU become 8 % in OPT: the last of four matrices of attention, a third of a layer, and none of its FFN.
    """
    a, layers = context.model.architecture, context.layers
    plain = [i for i, name in enumerate(layers.names) if name == "plain"]
    rows: list[tuple[float, list[float]]] = []  # bytes of all layers, and the parts of one row
    attention = layers.mixer_bytes * a.n_layers
    if a.latent_attention:
        rows.append((attention, []))
    else:
        rows.append((attention, [a.n_heads, a.n_kv_heads, a.n_kv_heads, a.n_heads]))
    for kind, n_bytes in enumerate(layers.ffn_bytes):
        rows.append((n_bytes * layers.kind.count(kind), [1.0] * context.model.unit_matrices if kind in plain else []))
    total = sum(n_bytes for n_bytes, _ in rows)
    gpu, storage = (sum((n_bytes / total * _taken(asked, parts, last) for n_bytes, parts in rows), 0.0 * asked.gpu)
                    for last in (True, False))
    # Beside its norm the head is one matrix: wherever its middle lies.
    head_gpu, head_storage = _taken(asked, [1.0], True), _taken(asked, [1.0], False)
    return (Shares(gpu, np.maximum(1.0 - gpu - storage, 0.0), storage),
            Shares(head_gpu, 1.0 - head_gpu - head_storage, head_storage))


def _taken(asked: Shares, parts: list[float], last: bool) -> Array:
    """Share of a row of matrices that the GPU (`last`) or storage gets; what was asked where they are not known."""
    if not parts:
        return asked.gpu if last else asked.storage
    sizes = np.asarray(parts) / sum(parts)
    middle = np.cumsum(sizes) - sizes / 2
    taken = middle[:, None] >= 1.0 - asked.gpu if last else middle[:, None] < asked.storage
    return np.asarray((sizes[:, None] * taken).sum(axis=0))


def route(context: Context, source: str, target: str) -> tuple[str, ...] | None:
    """Links from one memory to another; None where there are none."""
    try:
        return context.device.path(source, target)
    except SpecError:
        return None


def stage_bytes(context: Context) -> tuple[float, ...]:
    """Weights of each kind of layer and, last, of the head. [B]"""
    return (*context.layers.stored_bytes, context.head_bytes)


def kv_batch_bytes(context: Context, n_batches: Array) -> Array:
    """Keys and values of one GPU batch in one layer at the longest context. [B]"""
    return np.asarray(context.kv_bytes / context.model.architecture.n_layers / n_batches)


def hidden_bytes(context: Context) -> float:
    """Hidden vectors of all prompt tokens (or of a longer draft) between two layers. [B]"""
    w = context.workload
    return context.activation_bytes(float(max(w.prompt_tokens, 1 + w.draft_length) * w.batch))


def _staging(context: Context, at: Layout) -> dict[str, list[tuple[str, Array]]]:
    """Buffers of what passes through each tier. [B]"""
    layer, kv = max(stage_bytes(context)[:-1]), kv_batch_bytes(context, at.n_batches)
    host = np.maximum(at.weights.storage * layer, at.head.storage * context.head_bytes)
    fast = np.maximum(at.weights.away * layer, at.head.away * context.head_bytes)
    hidden = hidden_bytes(context) / at.n_batches
    return {
        context.memory_of(at.gpu): [
            ("buffers of streamed weights", BUFFERS * fast),
            ("buffers of keys and values", BUFFERS * np.where(at.cpu_attention, 0.0, at.kv.away) * kv),
            ("buffers of activations", BUFFERS * at.hidden.away * hidden)],
        context.device.host: [
            ("buffers of streamed weights", BUFFERS * host),
            ("buffers of keys and values", BUFFERS * at.kv.storage * kv),
            ("buffers of activations", BUFFERS * at.hidden.storage * hidden)],
    }


def _homes(context: Context, at: Layout) -> dict[str, list[tuple[str, Array]]]:
    """What lives in each tier throughout. [B]"""
    fast, host, storage = context.memory_of(at.gpu), context.device.host, context.device.storage
    found: dict[str, list[tuple[str, Array]]] = {fast: [], host: [], storage: []}
    layers = sum(context.layers.stored_bytes[kind] for kind in context.layers.kind)
    for name, shares, n_bytes in (("weights", at.weights, layers), ("embedding and head", at.head,
                                                                    context.total_bytes - layers),
                                  ("keys and values", at.kv, context.kv_bytes),
                                  ("activations between layers", at.hidden, hidden_bytes(context))):
        for tier, share in ((fast, shares.gpu), (host, shares.host), (storage, shares.storage)):
            found[tier].append((name, share * n_bytes))
    working = context.working_bytes_of(context.workload.batch / at.n_batches)
    found[fast].append(("activations of one GPU batch", np.asarray(working, dtype=np.float64)))
    # The model's file stays whole in storage.
    found[storage][:2] = [("weights", np.full(len(at.n_batches), context.total_bytes))]
    return found


def held(context: Context, at: Layout) -> dict[str, Array]:
    """What each tier holds before the first op of a schedule: everything but the buffers that its ops fill. [B]"""
    filled = ("buffers of streamed weights", "buffers of keys and values")
    parts = {tier: list(items) for tier, items in _homes(context, at).items()}
    for tier, items in _staging(context, at).items():
        parts[tier] += [item for item in items if item[0] not in filled]
    return {tier: _sum(items) for tier, items in parts.items()}


def footprint(context: Context, at: Layout) -> dict[str, Array]:
    """Bytes each tier holds at its fullest, tier → (n,). [B]"""
    staging = _staging(context, at)
    return {tier: _sum([*items, *staging.get(tier, [])]) for tier, items in _homes(context, at).items()}


def placements(context: Context, at: Layout) -> list[Placement]:
    """What lives where, for one candidate."""
    staging, storage = _staging(context, at), context.device.storage
    found = []
    for tier, items in _homes(context, at).items():
        for name, n_bytes in (*items, *staging.get(tier, [])):
            if n_bytes[0] > 0:
                if tier == storage and name == "weights":
                    layers = sum(context.layers.stored_bytes[kind] for kind in context.layers.kind)
                    streamed = float(at.weights.storage[0] * layers
                                     + at.head.storage[0] * (context.total_bytes - layers))
                    found += [Placement("weights, streamed share", storage, streamed)] if streamed else []
                    found.append(Placement("copy of the weights that are elsewhere", storage,
                                           context.total_bytes - streamed))
                    continue
                found.append(Placement(name, tier, float(n_bytes[0]), loaded=name in ("weights", "embedding and head")))
    return found


def _sum(items: list[tuple[str, Array]]) -> Array:
    return np.asarray(sum((n_bytes for _, n_bytes in items), np.zeros(1)))
