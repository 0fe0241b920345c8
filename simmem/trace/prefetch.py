"""Which units would a predictor have asked for before each step?

Three simple ones, to see what a better one could win: what the token before used in this layer; what the layer used
most often so far, as many units as the token before used; and one of which only the quality is stated, that finds each
unit used with the probability `recall`, and adds units not used so that a share of `precision` of what it asks for is
used on average. And those that looked at the network when the trace was captured, of which it holds what they asked
for; where one was asked at several distances, that is the farthest, as reading ahead takes time.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from simmem.errors import SpecError
from simmem.trace.bits import Words, count, words_of
from simmem.trace.ordering import numbers
from simmem.trace.trace import Trace

__all__ = ["Predictor", "Quality", "parse_predictor", "predicted_units"]

_LEVELS = 1 << 16
_SEED = 0


Simple = Literal["previous-token", "frequent"]
Held = Literal["gate", "low-rank", "next-layer"]
_NAMED: tuple[Simple | Held, ...] = ("previous-token", "frequent", "gate", "low-rank", "next-layer")


class Quality(NamedTuple):
    """How good a predictor is, where nothing else is known of it."""

    recall: float
    precision: float


Predictor = Simple | Held | Quality


def parse_predictor(text: str) -> Predictor:
    """One by name, or `RECALL:PRECISION`, two shares above 0 and up to 1. Raises SpecError."""
    for name in _NAMED:
        if text == name:
            return name
    recall, colon, precision = text.partition(":")
    try:
        found = Quality(float(recall), float(precision)) if colon else None
    except ValueError:
        found = None
    if found is None or not all(0 < share <= 1 for share in found):
        raise SpecError(f"found {text!r}, expected {', '.join(_NAMED)}, or RECALL:PRECISION with shares above 0 "
                        "and up to 1, e.g. 0.9:0.6", key="--prefetch")
    return found


def predicted_units(trace: Trace, predictor: Predictor) -> Words:
    """(T, L, W) units a predictor asks for before each token's layers.

    Before the first token the two simple ones ask for none. The draws of a `Quality` are the same on every call.

    Raises TraceError where the trace does not hold what a predictor asked for.
    """
    words = words_of(trace.active)
    if isinstance(predictor, Quality):
        return _drawn(trace, predictor)
    if predictor not in ("previous-token", "frequent"):
        return words_of(trace.asked_by(predictor)[1])
    before = np.zeros_like(words)
    before[1:] = words[:-1]
    if predictor == "previous-token":
        return before
    uses = numbers(words.shape[1:], len(words))
    seen = np.zeros_like(words[0])
    found = np.empty_like(words)
    everywhere = slice(None)
    for token, used in enumerate(before):
        uses.increment(used, everywhere)
        seen |= used
        found[token] = uses.highest(seen, count(used))
    return found


def _drawn(trace: Trace, quality: Quality) -> Words:
    header = trace.header
    rng = np.random.default_rng(_SEED)
    found = np.empty_like(trace.active)
    wrong_per_right = quality.recall * (1.0 - quality.precision) / quality.precision
    for token, rows in enumerate(trace.active):
        used = np.unpackbits(rows, axis=1, count=header.n_units, bitorder="little").view(np.bool_)
        n_used = used.sum(axis=1, keepdims=True)
        false_alarm = np.minimum(n_used * wrong_per_right / np.maximum(header.n_units - n_used, 1), 1.0)
        # 16 random bits decide for a unit, as in the synthetic traces
        border = np.rint(np.where(used, quality.recall, false_alarm) * _LEVELS)
        asked = rng.integers(0, _LEVELS, used.shape, dtype=np.uint32) < border
        found[token] = np.packbits(asked, axis=1, bitorder="little")
    return words_of(found)
