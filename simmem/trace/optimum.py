"""How many hits could a cache of this size have at most, if it knew the future?

Belady's cache (`simmem.trace.caches`) replays it; this counts it, for many sizes at once and without replaying any.
A hit keeps a unit from one use to its next, so it is an interval of steps, and c units of cache let c intervals cross
from any step to the one after. The most intervals that go together are, by duality, a shortest path (the constraints
form an interval matrix, which is totally unimodular): with H(t) the most hits on the steps up to t,

    H(t) = min over r < t of H(r) + c + A(r, t),   A(r, t) = intervals that begin after step r and end by t,

and at most all intervals that end by t. A(r, t) satisfies the quadrangle inequality, so that the best r never moves
back, and what lies before it need not be looked at again. A unit is used once a token, so no interval lies within a
token: one cache for all layers takes a token's steps at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simmem.trace.caches import Scope

__all__ = ["most_hits"]

Ints = NDArray[np.int64]
_SIZES_AT_ONCE = 64
_CUTS = 1 << 12


def most_hits(active: NDArray[np.uint8], n_units: int, capacity: Ints, scope: Scope, counted_from: int = 0) -> Ints:
    """(N,) hits on the tokens from `counted_from` on.

    Parameters
    ----------
    active : packed bits (T, L, n_bytes).
    capacity : (N,) units, of each layer's cache or (global) of the one for all layers; or (N, L) of each layer's.
    """
    n_layers = active.shape[1]
    rows = n_layers if scope == "layer" else 1
    caches = np.repeat(capacity[:, None], rows, axis=1) if capacity.ndim == 1 else capacity
    caches = np.minimum(caches, n_units * n_layers)  # more is the same, and could overflow
    if not len(active) or not len(capacity):
        return np.zeros(len(capacity), np.int64)
    found = [_block(active, n_units, caches[i : i + _SIZES_AT_ONCE], counted_from)
             for i in range(0, len(caches), _SIZES_AT_ONCE)]
    return np.concatenate(found)


def _block(active: NDArray[np.uint8], n_units: int, capacity: Ints, counted_from: int) -> Ints:
    n_layers = active.shape[1]
    rows = capacity.shape[1]
    per_token = n_layers // rows
    row_of, place_of = np.divmod(np.repeat(np.arange(n_layers), n_units), per_token)
    used = np.unpackbits(np.bitwise_or.reduce(active, axis=0), axis=1, count=n_units, bitorder="little")
    binding = capacity < used.reshape(rows, -1).sum(axis=1)
    bounded = np.flatnonzero(binding.any(axis=1)).tolist()
    last = np.full(n_layers * n_units, -1)
    cuts = _Cuts(capacity.shape, per_token)
    ended = np.zeros((rows, 1), np.int64)
    hits = np.zeros((*capacity.shape, per_token), np.int64)
    low = dict.fromkeys(bounded, 0)
    for token, layers in enumerate(active):
        now = token * per_token
        ids = np.flatnonzero(np.unpackbits(layers, axis=1, count=n_units, bitorder="little"))
        begun = last[ids]
        last[ids] = now + place_of[ids]
        if token >= counted_from:
            start = min(low.values(), default=cuts.n)
            span = cuts.n - start
            row, place = row_of[ids], place_of[ids]
            ends = np.bincount((row * per_token + place)[begun >= 0], minlength=rows * per_token)
            ended = ended[:, -1:] + ends.reshape(rows, per_token).cumsum(axis=1)
            before = np.searchsorted(cuts.step[start : cuts.n], begun)  # cuts that an interval begins after
            at = (row * (span + 1) + before) * per_token + place
            begins = np.bincount(at, minlength=rows * (span + 1) * per_token).reshape(rows, span + 1, per_token)
            # intervals that begin after each cut and end by each of this token's steps
            more = begins[:, :0:-1].cumsum(axis=1)[:, ::-1].cumsum(axis=2)
            hits[:] = ended
            for i in bounded:
                if low[i] == cuts.n:
                    continue
                paths = (cuts.hits[i, :, low[i] : cuts.n] + cuts.inside[:, low[i] : cuts.n])[:, :, None] \
                    + more[:, low[i] - start :]
                np.minimum(hits[i], paths.min(axis=1) + capacity[i][:, None], out=hits[i])
                low[i] = cuts.n - 1 - int(paths[:, ::-1, -1].argmin(axis=1).max())
            cuts.inside[:, start : cuts.n] += more[:, :, -1]
        if cuts.full:
            cuts.thin(binding, min(low.values(), default=cuts.n))
            low = dict.fromkeys(bounded, 0)
        cuts.add(now, hits)
    found: Ints = hits[:, :, -1].sum(axis=1)
    return found


class _Cuts:
    """The steps r that a path may come from, each with H(r) and with A(r, t) as of the last step t."""

    def __init__(self, caches: tuple[int, ...], per_token: int) -> None:
        room = max(_CUTS, 2 * per_token)
        self.n, self.per_token = 0, per_token
        self.step = np.zeros(room, np.int64)
        self.hits = np.zeros((*caches, room), np.int64)
        self.inside = np.zeros((caches[1], room), np.int64)

    @property
    def full(self) -> bool:
        return self.n + self.per_token > self.step.size

    def add(self, first: int, hits: Ints) -> None:
        new = slice(self.n, self.n + self.per_token)
        self.step[new] = np.arange(first, first + self.per_token)
        self.hits[:, :, new], self.inside[:, new] = hits, 0
        self.n = new.stop

    def thin(self, binding: NDArray[np.bool_], start: int) -> None:
        """Leave out cuts that a later one is no worse than: it stays so, for more intervals begin after the earlier.

        `binding`: the (S, R) caches that count. Cuts before `start` are behind every best one.
        """
        kept = np.ones(self.n, np.bool_)
        kept[:start] = False
        paths = self.hits[..., start : self.n] + self.inside[:, start : self.n]
        least_after = np.minimum.accumulate(paths[..., ::-1], axis=-1)[..., -2::-1]
        kept[start:-1] = ((paths[..., :-1] < least_after) & binding[..., None]).any(axis=(0, 1))
        n_kept = int(kept.sum())
        room = self.step.size * (2 if n_kept + self.per_token > self.step.size // 2 else 1)
        for name in ("step", "hits", "inside"):
            old = getattr(self, name)
            new = np.zeros((*old.shape[:-1], room), np.int64)
            new[..., :n_kept] = old[..., : self.n][..., kept]
            setattr(self, name, new)
        self.n = n_kept
