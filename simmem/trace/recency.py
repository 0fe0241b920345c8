"""Which units does a least-recently-used cache of a given size still hold when they are needed again?

A token-layer's accesses are one step: its hits are decided by the cache as it stood before the step,
and units it uses are pinned while it runs. Units are ordered by (last step used, unit id), the lowest
going first. A cache of at least the largest step's units always holds the most recent ones, so the rank
of a unit in that order before its next use says for every such size at once whether it hits
(Mattson et al. 1970, stack algorithms). Smaller caches fill up within a step; they are replayed one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Ranks", "global_ranks", "layer_ranks", "replay_small", "steps_of_layer", "steps_of_trace"]

_FLUSH = 1 << 20
Ids = NDArray[np.intp]


@dataclass(frozen=True)
class Ranks:
    """How often each recency rank was asked for: `cold[r]`, `steady[r]`; hits of a cache of c units are the
    sum over r < c. First uses of a unit have no rank and always miss."""

    cold: NDArray[np.int64]
    steady: NDArray[np.int64]
    cold_first_uses: int
    steady_first_uses: int


def layer_ranks(active: NDArray[np.uint8], n_units: int, cold_tokens: int) -> Ranks:
    """Ranks of one layer's own cache. `active`: packed bits (n_tokens, n_bytes) of that layer."""
    order = np.empty(0, np.intp)  # used units, most recent last
    found: list[Ids] = []
    firsts = [0, 0]
    split = 0
    for token, row in enumerate(active):
        used = _unpack(row, n_units)
        ids = np.flatnonzero(used)
        again = used[order]
        ranks = order.size - 1 - np.flatnonzero(again)
        found.append(ranks)
        steady = token >= cold_tokens
        firsts[steady] += ids.size - ranks.size
        split += 0 if steady else 1
        order = np.concatenate((order[~again], ids))
    cold, warm = ([np.empty(0, np.intp), *part] for part in (found[:split], found[split:]))
    return Ranks(np.bincount(np.concatenate(cold), minlength=n_units),
                 np.bincount(np.concatenate(warm), minlength=n_units), *firsts)


def global_ranks(active: NDArray[np.uint8], n_units: int, cold_tokens: int) -> Ranks:
    """Ranks of one cache shared by all layers. `active`: packed bits (n_tokens, n_layers, n_bytes).

    The rank of unit u of layer l, last used by token p, is its rank among its own layer's units plus what
    the other layers used since: those below have run in this token already and count what they used after
    token p, those above count what they used from token p on. Both are sums over how many units of a layer
    were last used by which token.
    """
    n_tokens, n_layers = active.shape[:2]
    orders = [np.empty(0, np.intp)] * n_layers
    last = np.full((n_layers, n_units), -1, np.intp)
    last_used_by = np.zeros((n_layers, n_tokens + 1), np.int64)
    histograms = np.zeros((2, n_layers * n_units), np.int64)
    firsts = [0, 0]
    pending: list[Ids] = []
    waiting = 0
    for token in range(n_tokens):
        steady = int(token >= cold_tokens)
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
            firsts[steady] += ids.size - place.size
            last_used_by[layer] -= np.bincount(previous, minlength=n_tokens + 1)
            last_used_by[layer, token] = ids.size
            last[layer, ids] = token
            orders[layer] = np.concatenate((order[~again], ids))
        after = _used_since(last_used_by[:, : token + 2])
        below = np.cumsum(after, axis=0) - after
        above = np.cumsum(before[::-1], axis=0)[::-1] - before
        for layer, (ranks, previous) in enumerate(local):
            pending.append(ranks + below[layer, previous + 1] + above[layer, previous])
            waiting += ranks.size
        if waiting > _FLUSH or token + 1 in (cold_tokens, n_tokens):
            histograms[steady] += np.bincount(np.concatenate(pending), minlength=n_layers * n_units)
            pending, waiting = [], 0
    return Ranks(histograms[0], histograms[1], *firsts)


def _used_since(last_used_by: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n_layers, n): units whose last use was by token p or later, at index p."""
    return np.cumsum(last_used_by[:, ::-1], axis=1)[:, ::-1]


def steps_of_layer(active: NDArray[np.uint8], n_units: int) -> Iterator[tuple[int, Ids]]:
    """(token, ids used) of one layer."""
    for token, row in enumerate(active):
        yield token, np.flatnonzero(_unpack(row, n_units))


def steps_of_trace(active: NDArray[np.uint8], n_units: int) -> Iterator[tuple[int, Ids]]:
    """(token, ids used) of all layers in program order; unit u of layer l is l * n_units + u."""
    for token, rows in enumerate(active):
        for layer, row in enumerate(rows):
            yield token, np.flatnonzero(_unpack(row, n_units)) + layer * n_units


def replay_small(steps: Iterator[tuple[int, Ids]], n_items: int, capacity: int, cold_tokens: int) -> tuple[int, int]:
    """Hits (cold, steady) of one cache of `capacity` units, of any size, step by step.

    Of a step's misses the lowest ids are kept while there is room beside what it pins; the rest are read
    and not cached.
    """
    hits = [0, 0]
    cached = np.empty(0, np.intp)  # most recent last
    used = np.zeros(n_items, np.bool_)
    for token, ids in steps:
        used[ids] = True
        again = used[cached]
        pinned, others = cached[again], cached[~again]
        hits[token >= cold_tokens] += pinned.size
        used[pinned] = False
        kept_misses = ids[used[ids]][: capacity - pinned.size]
        used[ids] = False
        members = np.sort(np.concatenate((pinned, kept_misses)))
        room = capacity - members.size
        cached = np.concatenate((others[max(0, others.size - room) :], members))
    return hits[0], hits[1]


def _unpack(row: NDArray[np.uint8], n_units: int) -> NDArray[np.bool_]:
    return np.unpackbits(row, count=n_units, bitorder="little").view(np.bool_)
