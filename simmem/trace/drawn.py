"""Which experts would tokens choose if no router had favourites, and what would its gate ask for a layer early?

Where nothing was recorded, routing is drawn: every token of a step chooses its experts of each layer uniformly and
independently of every other choice. A cache of k of n experts then hits k times in n in the mean, whatever it evicts,
but a layer waits for what it misses, and the mean of waits is not the wait for the mean: so steps are drawn one by one
and replayed like recorded ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simmem.trace.bits import count, words_of
from simmem.trace.trace import Trace, TraceHeader, digest_of

__all__ = ["asked_at_recall", "uniform_routing"]

Ints = NDArray[np.int64]
Bits = NDArray[np.uint8]
SEED, ASKED_SEED = 20231, 20232
CHUNK = 1 << 22
"""Random numbers held at once."""


def uniform_routing(model: str, n_layers: int, n_experts: int, per_token: int, *, batch: int, draws: int,
                    unit_bytes: float) -> Trace:
    """A trace of routing without favourites; the same arguments give the same trace.

    It begins with steps that go through all experts of each layer, so that caches are full before the first quarter
    has passed.

    Parameters
    ----------
    model : name of the model it is for.
    batch : tokens that pass through a layer together; a step uses what any of them chose.
    draws : choices (of a token in a layer) that are wanted altogether, within 192 and 1024 steps.
    unit_bytes : one expert at fp16. [B]
    """
    most = min(per_token * batch, n_experts)
    filling = -(-n_experts // most)
    n_tokens = max(min(max(-(-draws // (n_layers * batch)), 192), 1024), 4 * filling)
    rng = np.random.default_rng(SEED)
    used = np.zeros((n_tokens, n_layers), np.int64)
    for _ in range(batch):  # of the next one's choices some were made before: all are equally likely to be those
        used += rng.hypergeometric(n_experts - used, used, per_token)
        if (used == n_experts).all():
            break
    active = _chosen(rng, used, n_experts)
    order = np.argsort(rng.random((n_layers, n_experts)), axis=1)
    for token in range(filling):
        bits = np.zeros((n_layers, n_experts), np.bool_)
        np.put_along_axis(bits, order[:, (token * most + np.arange(most)) % n_experts], True, axis=1)
        active[token] = np.packbits(bits, axis=1, bitorder="little")
    return Trace(TraceHeader(
        name="uniform", kind="synthetic", model=model, n_tokens=n_tokens, n_layers=n_layers, n_units=n_experts,
        unit="expert", unit_bytes=unit_bytes, criterion="uniform", threshold=f"{per_token} experts a token",
        records="active", predictor="none", text="none", weakest_kind="estimated",
        statistics={"experts per token": per_token, "sequences": batch}, digest=digest_of(active)), active)


def asked_at_recall(trace: Trace, recall: float) -> Bits:
    """(T, L, ceil(n_units / 8)) what a gate asks for that finds each used unit with the probability `recall`.

    It asks for as many units as are used: one that is not, equally likely any, for each that it does not find.
    """
    h = trace.header
    rng = np.random.default_rng(ASKED_SEED)
    asked = np.zeros_like(trace.active)
    used_counts = count(words_of(trace.active))
    for part in _parts(h.n_tokens, h.n_layers * h.n_units):
        used = np.unpackbits(trace.active[part], axis=2, count=h.n_units, bitorder="little").astype(np.bool_)
        found = used & (rng.random(used.shape) < recall)
        wrong = np.minimum(used_counts[part] - found.sum(axis=2), h.n_units - used_counts[part])
        asked[part] = np.packbits(found | _first(np.where(used, 2.0, rng.random(used.shape)), wrong), axis=2,
                                  bitorder="little")
    return asked


def _chosen(rng: np.random.Generator, how_many: Ints, n_units: int) -> Bits:
    """Packed bits of `how_many` (T, L) units, any as likely as any other."""
    active = np.zeros((*how_many.shape, -(-n_units // 8)), np.uint8)
    for part in _parts(len(how_many), how_many.shape[1] * n_units):
        active[part] = np.packbits(_first(rng.random((*how_many[part].shape, n_units)), how_many[part]), axis=2,
                                   bitorder="little")
    return active


def _parts(n_tokens: int, each: int) -> list[slice]:
    step = max(CHUNK // each, 1)
    return [slice(first, min(first + step, n_tokens)) for first in range(0, n_tokens, step)]


def _first(keys: NDArray[np.float64], n: Ints) -> NDArray[np.bool_]:
    """The n lowest of each row."""
    padded = np.concatenate([np.full((*n.shape, 1), -1.0), np.sort(keys, axis=-1)], axis=-1)
    limits = np.take_along_axis(padded, n[..., None], axis=-1)
    return np.asarray(keys <= limits)
