"""How far back in a cache's order of recency is a unit when it is needed again? The whole miss-ratio curve of LRU.

A token-layer's accesses are one step: its hits are decided by the cache as it stood before the step,
and units it uses are pinned while it runs. Units are ordered by (last step used, unit id), the lowest
going first. A cache of at least the largest step's units always holds the most recent ones, so the rank
of a unit in that order before its next use says for every such size at once whether it hits
(Mattson et al. 1970, stack algorithms). Smaller caches fill up within a step: they have to be replayed one by one.

Many units a layer: its order is kept as a list. Few (a model's experts): all layers are sorted at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Ranks", "global_ranks", "layer_ranks"]

_FLUSH = 1 << 20
_FEW_UNITS = 512
_FEW_USES = 1024
Ids = NDArray[np.intp]
Ints = NDArray[np.int64]
Found = tuple[Ids, Ids]
"""Of one token the layer and the rank of each unit that was used before, layer by layer."""


@dataclass(frozen=True)
class Ranks:
    """How often each recency rank was asked for: `cold` and `steady` are (n_caches, n_ranks); hits of a cache of c
    units are the sum over r < c. First uses of a unit have no rank and always miss."""

    cold: Ints
    steady: Ints


def layer_ranks(active: NDArray[np.uint8], n_units: int, cold_tokens: int) -> Ranks:
    """Ranks in a cache for each layer. `active`: packed bits (n_tokens, n_layers, n_bytes)."""
    n_layers = active.shape[1]
    if n_units <= _FEW_UNITS:
        return _counted(_sorted_ranks(active, n_units, of_layers=True), (n_layers, n_units), cold_tokens)
    # layer by layer, so that a layer's order stays in the processor's cache
    parts = [_counted(_layer_by_layer(active[:, layer : layer + 1], n_units), (1, n_units), cold_tokens)
             for layer in range(n_layers)]
    return Ranks(np.concatenate([p.cold for p in parts]), np.concatenate([p.steady for p in parts]))


def global_ranks(active: NDArray[np.uint8], n_units: int, cold_tokens: int) -> Ranks:
    """Ranks in one cache shared by all layers. `active`: packed bits (n_tokens, n_layers, n_bytes)."""
    n_layers = active.shape[1]
    most = int(np.bitwise_count(active).sum(axis=(1, 2), dtype=np.int64).max())
    if n_units <= _FEW_UNITS and most <= _FEW_USES:
        found = _sorted_ranks(active, n_units, of_layers=False)
    else:
        found = _across_layers(active, n_units)
    return _counted(((np.zeros_like(layers), ranks) for layers, ranks in found), (1, n_layers * n_units), cold_tokens)


def _counted(found: Iterator[Found], shape: tuple[int, int], cold_tokens: int) -> Ranks:
    histograms = np.zeros((2, shape[0] * shape[1]), np.int64)
    pending: list[Ids] = []
    waiting = 0

    def flush(part: int) -> None:
        nonlocal pending, waiting
        if pending:
            histograms[part] += np.bincount(np.concatenate(pending), minlength=histograms.shape[1])
        pending, waiting = [], 0

    for token, (caches, ranks) in enumerate(found):
        if token == cold_tokens:
            flush(0)
        pending.append(caches * shape[1] + ranks)
        waiting += ranks.size
        if waiting > _FLUSH:
            flush(int(token >= cold_tokens))
    flush(int(len(pending) > 0 and token >= cold_tokens))
    return Ranks(histograms[0].reshape(shape), histograms[1].reshape(shape))


def _sorted_ranks(active: NDArray[np.uint8], n_units: int, *, of_layers: bool) -> Iterator[Found]:
    """By sorting all units by (layer where each has its own cache, last use, id) before each token.

    In one cache the layers below have run already: each of their units that lay behind has come before.
    """
    n_tokens, n_layers = active.shape[:2]
    n_all = n_layers * n_units
    layer_of = np.repeat(np.arange(n_layers), n_units)
    base = np.arange(n_all) + (layer_of * ((n_tokens + 1) * n_all) if of_layers else 0)
    ends = (layer_of + 1) * n_units if of_layers else np.full(n_all, n_all)
    keys = base.copy()  # never used: before the first token
    seen = np.zeros(n_all, np.bool_)
    for token, rows in enumerate(active):
        ids = np.flatnonzero(np.unpackbits(rows, axis=1, count=n_units, bitorder="little"))
        again = ids[seen[ids]]
        ranks = ends[again] - 1 - np.searchsorted(np.sort(keys), keys[again])
        if not of_layers:
            overtaken = (keys[ids] < keys[again][:, None]) & (layer_of[ids] < layer_of[again][:, None])
            ranks += np.count_nonzero(overtaken, axis=1)
        yield layer_of[again], ranks
        seen[ids] = True
        keys[ids] = base[ids] + (token + 1) * n_all


def _layer_by_layer(active: NDArray[np.uint8], n_units: int) -> Iterator[Found]:
    """Of one layer, (n_tokens, 1, n_bytes): its units in order of recency, those used taken out and put behind."""
    order = np.empty(0, np.intp)  # used units, most recent last
    for (row,) in active:
        used = _unpack(row, n_units)
        again = used[order]
        ranks = order.size - 1 - np.flatnonzero(again)
        yield np.zeros_like(ranks), ranks
        order = np.concatenate((order[~again], np.flatnonzero(used)))


def _across_layers(active: NDArray[np.uint8], n_units: int) -> Iterator[Found]:
    """The rank of unit u of layer l, last used by token p, is its rank among its own layer's units plus what
    the other layers used since: those below have run in this token already and count what they used after
    token p, those above count what they used from token p on. Both are sums over how many units of a layer
    were last used by which token.
    """
    n_tokens, n_layers = active.shape[:2]
    orders = [np.empty(0, np.intp)] * n_layers
    last = np.full((n_layers, n_units), -1, np.intp)
    last_used_by = np.zeros((n_layers, n_tokens + 1), np.int64)
    for token in range(n_tokens):
        before = _used_since(last_used_by[:, : token + 2])
        local: list[tuple[Ids, Ids]] = []
        for layer in range(n_layers):
            used = _unpack(active[token, layer], n_units)
            ids = np.flatnonzero(used)
            order = orders[layer]
            again = used[order]
            place = np.flatnonzero(again)
            previous = last[layer, order[place]]
            local.append((order.size - 1 - place, previous))
            last_used_by[layer] -= np.bincount(previous, minlength=n_tokens + 1)
            last_used_by[layer, token] = ids.size
            last[layer, ids] = token
            orders[layer] = np.concatenate((order[~again], ids))
        after = _used_since(last_used_by[:, : token + 2])
        below = np.cumsum(after, axis=0) - after
        above = np.cumsum(before[::-1], axis=0)[::-1] - before
        yield (np.repeat(np.arange(n_layers), [ranks.size for ranks, _ in local]),
               np.concatenate([ranks + below[layer, previous + 1] + above[layer, previous]
                               for layer, (ranks, previous) in enumerate(local)]))


def _used_since(last_used_by: Ints) -> Ints:
    """(n_layers, n): units whose last use was by token p or later, at index p."""
    return np.cumsum(last_used_by[:, ::-1], axis=1)[:, ::-1]


def _unpack(row: NDArray[np.uint8], n_units: int) -> NDArray[np.bool_]:
    return np.unpackbits(row, count=n_units, bitorder="little").view(np.bool_)
