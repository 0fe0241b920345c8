"""How much of a unit's peak can a product use, and how fast does it read what its cache holds? From shapes alone.

Both need figures of the unit, and change nothing where it states none.

Waves: a product is worked on in tiles, one processor each, in rounds of as many tiles as there are processors; the
last round may be nearly empty (NVIDIA, Matrix Multiplication Background User's Guide, "wave quantization"). Libraries
split a product with fewer tiles than processors along its inner dimension.

Cache: a step goes through the same bytes again and again. With random replacement a block that stood in the cache is
still there with the probability that none of the misses since took its place: of a loop over r caches full, the share
h that hits solves h = exp(-r (1 - h)), which is all of it up to r = 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simmem.schedule import Schedule

__all__ = ["TILE", "cached_rate", "hit_share", "wave_factor", "working_set"]

Array = NDArray[np.float64]
Amount = Array | float

TILE = 128
"""Rows and columns of the output that a processor works on at once, as libraries prefer for large products."""
_ROUNDS = 64
"""Of the fixed point: past r = 1.05 the error is below a hundredth, and right at r = 1 the law has a kink anyway."""


def wave_factor(m: Amount, n: Amount, k: Amount, processors: float, tile: int = TILE) -> Array:
    """How many times longer than with evenly busy processors a product (m, k) × (k, n) takes; at least 1."""
    tiles = np.maximum(np.ceil(np.asarray(m) / tile), 1.0) * np.maximum(np.ceil(np.asarray(n) / tile), 1.0)
    pieces = np.clip(np.floor(processors / tiles), 1.0, np.maximum(np.ceil(np.asarray(k) / tile), 1.0))
    return np.asarray(np.ceil(tiles * pieces / processors) * processors / (tiles * pieces))


def hit_share(working_set: Amount, cache_bytes: Amount) -> Array:
    """Share of a loop over `working_set` bytes that a cache of `cache_bytes` holds, with random replacement."""
    ratio = np.maximum(np.asarray(working_set, dtype=np.float64) / cache_bytes, 1.0)
    share = np.zeros_like(ratio)
    for _ in range(_ROUNDS):
        share = np.exp(-ratio * (1.0 - share))
    return np.where(ratio <= 1.0, 1.0, share)


def cached_rate(working_set: Amount, rate: Amount, cache_bytes: Amount, cache_rate: Amount) -> Array:
    """Rate of a loop over `working_set` bytes that a cache holds a part of; never below `rate`. [B/s]"""
    hits = hit_share(working_set, cache_bytes)
    return np.asarray(1.0 / (hits / np.maximum(cache_rate, rate) + (1.0 - hits) / rate))


def working_set(schedule: Schedule, agent: str, memory: str) -> Array:
    """Bytes of its memory that an agent goes through in the timed token, (n_candidates,). [B]"""
    moved = schedule.bytes.get(f"memory.{memory}")
    if moved is None:
        return np.zeros(schedule.n_candidates)
    uses = np.bincount(schedule.op_class[schedule.timed], minlength=len(schedule.classes)).astype(np.float64)
    mine = np.array([what.agent == agent for what in schedule.classes])
    return np.asarray((uses * mine) @ moved)
