"""What does a trace look like that has the statistics of a captured one, and nothing else of it?

Token by token: a kind of token, which follows the kind before it, and a normal number of the layer's own give the
number of units n that the layer uses, through the distribution of such numbers. Every unit has a score: its offset, and
a standard normal number of which a part decays from token to token. The n units with the highest scores are used.
Offsets are such that each unit comes out as often as it should (`simmem.trace.ranking`).

What follows a kind of token is drawn in random order from equal strata, 32 at a time, so that a trace of a few hundred
tokens has the kinds in the shares of the law: a cache a little smaller than what a token uses is sensitive to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.trace.caches import POLICIES, Scope
from simmem.trace.curves import replay_document
from simmem.trace.likeness import DECAYS, LEVEL_RANKS, TraceLaw, frequencies_of
from simmem.trace.ranking import normal_cdf, offsets
from simmem.trace.trace import Trace, TraceHeader, digest_of

__all__ = ["SIZES", "generate_like", "replay_difference"]

Floats = NDArray[np.float64]
SIZES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of the units, of a layer's or (global) of the model's, that caches are compared at."""
_MOST_TOKENS = 100_000
_LEVELS = 64
_SETTLED = 256
_STRATA = 32


def generate_like(law: TraceLaw, n_tokens: int, seed: int = 0) -> Trace:
    """A synthetic trace of `n_tokens` tokens with the law of a captured one.

    The same law and seed give the same trace, and the first n tokens do not depend on how many are drawn. Memory is
    a few numbers per unit of the model, and the packed bits.

    Raises SpecError for fewer than 1 or more than 100 000 tokens, or a negative seed.
    """
    if not 1 <= n_tokens <= _MOST_TOKENS or seed < 0:
        raise SpecError(f"found {n_tokens} tokens and the seed {seed}, expected 1 to {_MOST_TOKENS} tokens and a seed "
                        "of 0 or more", key=law.fitted_to)
    units, levels, scores = (np.random.Generator(np.random.PCG64(s)) for s in np.random.SeedSequence(seed).spawn(3))
    middles = (np.arange(_LEVELS) + 0.5) / _LEVELS
    offset = np.array([offsets(row, np.interp(middles, LEVEL_RANKS, used) / law.n_units)
                       for row, used in zip(frequencies_of(law), law.active_units, strict=True)]).astype(np.float32)
    units.permuted(offset, axis=1, out=offset)
    active = np.empty((n_tokens, law.n_layers, -(-law.n_units // 8)), np.uint8)
    noise = _Scores(law, scores)
    for token, used in enumerate(_numbers_of_units(law, n_tokens, levels)):
        score = noise.next()
        score += offset
        lowest = np.take_along_axis(np.sort(score, axis=1), np.minimum(law.n_units - used, law.n_units - 1)[:, None], 1)
        active[token] = np.packbits((score >= lowest) & (used > 0)[:, None], axis=1, bitorder="little")
    header = TraceHeader(
        name=f"like-{law.fitted_to}", kind="synthetic", model=law.model, n_tokens=n_tokens, n_layers=law.n_layers,
        n_units=law.n_units, unit=law.unit, unit_bytes=law.unit_bytes, unit_precision=law.unit_precision,
        criterion=law.criterion, threshold=law.threshold, records=law.records, predictor=law.predictor,
        predictor_params_share=law.predictor_params_share, quality=law.quality,
        text=f"none: drawn from {law.n_numbers} statistics of the captured trace {law.fitted_to}",
        statistics={"law": "the n units with the highest of offset + autoregressive normal; n from the kind of "
                           "token", "like": law.model_dump(mode="json", by_alias=True), "seed": seed},
        weakest_kind="fitted", digest=digest_of(active))
    return Trace(header, active)


def replay_difference(captured: Trace, synthetic: Trace, *, policies: Sequence[str] = POLICIES,
                      scope: Scope = "layer", sizes: Sequence[float] = SIZES) -> dict[str, Floats]:
    """Hit ratio in steady state on the synthetic trace less that on the captured one, by policy, at each size.

    A window, which only a layer has, is compared at the lengths that `replay_document` takes. Both traces are of one
    shape; SpecError otherwise.
    """
    a, b = captured.header, synthetic.header
    if (a.n_layers, a.n_units) != (b.n_layers, b.n_units):
        raise SpecError(f"found {b.n_layers} layers of {b.n_units} units, expected {a.n_layers} of {a.n_units}",
                        key=b.name)
    units = a.n_units * (a.n_layers if scope == "global" else 1)
    chosen = [policy for policy in policies if policy != "window" or scope == "layer"]
    seen, drawn = (replay_document(
        trace, policies=chosen, scope=scope,
        sizes_bytes=[max(round(share * units), 1) * trace.header.unit_bytes for share in sizes])["curves"]
        for trace in (captured, synthetic))
    return {one["policy"]: np.array(other["hit_ratio"]) - np.array(one["hit_ratio"])
            for one, other in zip(seen, drawn, strict=True)}


class _Scores:
    """Standard normal numbers, (n_layers, n_units) a token, with the memory of the law."""

    def __init__(self, law: TraceLaw, rng: np.random.Generator) -> None:
        share = np.array(law.unit_memory)
        self._rng, self._shape = rng, (law.n_layers, law.n_units)
        self._fresh = np.sqrt(np.maximum(1.0 - share.sum(axis=1), 0.0)).astype(np.float32)[:, None]
        self._parts = [(float(decay), np.sqrt(column).astype(np.float32)[:, None], self._draw())
                       for decay, column in zip(DECAYS, share.T, strict=True) if column.any()]
        self._started = False

    def _draw(self) -> NDArray[np.float32]:
        return self._rng.standard_normal(self._shape, np.float32)

    def next(self) -> NDArray[np.float32]:
        score = self._draw()
        score *= self._fresh
        for decay, scale, state in self._parts:
            if self._started:
                state *= np.float32(decay)
                state += np.float32(np.sqrt(1.0 - decay * decay)) * self._draw()
            score += scale * state
        self._started = True
        return score


def _numbers_of_units(law: TraceLaw, n_tokens: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(n_tokens, n_layers) units that each token uses."""
    follows = np.array(law.follows)
    follows /= follows.sum(axis=1, keepdims=True)
    share = np.full(len(follows), 1.0 / len(follows))
    for _ in range(_SETTLED):
        share = share @ follows
    chances: list[list[float]] = [[] for _ in follows]
    normals = np.empty((n_tokens, law.n_layers))
    kind = np.empty(n_tokens, np.int64)
    before = int(np.argmax(share))
    for token in range(n_tokens):  # drawn token by token, so that more tokens change none
        if not chances[before]:
            chances[before] = ((rng.permutation(_STRATA) + rng.random(_STRATA)) / _STRATA).tolist()
        before = int(np.searchsorted(np.cumsum(follows[before]), chances[before].pop()))
        kind[token] = before = min(before, len(follows) - 1)
        normals[token] = rng.standard_normal(law.n_layers)
    level, spread = np.array(law.level), np.maximum(np.array(law.level_spread), 1e-6)[:, None]
    score = level.T[kind] + normals * spread.T
    # the rank of a score among those of all kinds
    rank = sum(normal_cdf((score - level[:, k]) / spread[:, 0]) * share[k] for k in range(len(follows)))
    used = np.stack([np.interp(column, LEVEL_RANKS, row)
                     for column, row in zip(np.asarray(rank).T, law.active_units, strict=True)], axis=1)
    whole: NDArray[np.int64] = np.rint(used).astype(np.int64)
    return whole
