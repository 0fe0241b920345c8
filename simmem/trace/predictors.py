"""Who could have known which units a token needs, how well, and at what price?

Every predictor is judged on the bits of a trace: units that it asked for beside units that were needed. Recall is
the share of the needed units that it asked for, precision the share of the asked ones that were needed, both counted
over all tokens and layers together. Two predictors need nothing but the bits: what the token before used in this
layer, and the units of this layer that were used most often so far. Those that look at the network are fitted where
it runs (`simmem.runtime.predictors`) and judged here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.trace.trace import Predictor, Trace

__all__ = ["ASKED_FACTORS", "Judgement", "judge", "simple_predictors"]

Bits = NDArray[np.uint8]

ASKED_FACTORS = (1.0, 1.5, 2.0)
"""How many units the most frequent ones are asked for, over the mean number that is active."""


class Judgement(NamedTuple):
    """What a predictor asked for, beside what was needed."""

    judged_tokens: int
    recall: float
    precision: float
    recall_by_layer: tuple[float | None, ...]
    precision_by_layer: tuple[float | None, ...]
    asked_share: float
    wasted_bytes_per_token: float


def judge(needed: Bits, asked: Bits, *, n_units: int, unit_bytes: float, first_layer: int = 0) -> Judgement:
    """Count hits and misses of packed bits, both of shape (n_tokens, n_layers, ceil(n_units / 8)).

    unit_bytes : of one unit that is asked for. [B]
    first_layer : layers below it could not be asked and do not count.
    """
    if needed.shape != asked.shape or not 0 <= first_layer < needed.shape[1]:
        raise SpecError(f"found masks of {needed.shape} and {asked.shape} from layer {first_layer} on", key="predictor")
    counted = slice(first_layer, None)

    def by_layer(bits: Bits) -> NDArray[np.int64]:
        counts: NDArray[np.int64] = np.bitwise_count(bits[:, counted]).sum(axis=(0, 2), dtype=np.int64)
        return counts

    hits, n_needed, n_asked = by_layer(needed & asked), by_layer(needed), by_layer(asked)
    before: tuple[None, ...] = (None,) * first_layer
    tokens, layers = needed.shape[0], needed.shape[1] - first_layer
    return Judgement(
        judged_tokens=tokens,
        recall=_ratio(hits.sum(), n_needed.sum()) or 0.0, precision=_ratio(hits.sum(), n_asked.sum()) or 0.0,
        recall_by_layer=before + tuple(map(_ratio, hits, n_needed)),
        precision_by_layer=before + tuple(map(_ratio, hits, n_asked)),
        asked_share=float(n_asked.sum() / (tokens * layers * n_units)),
        wasted_bytes_per_token=float((n_asked - hits).sum() / tokens * unit_bytes))


def simple_predictors(trace: Trace, factors: Sequence[float] = ASKED_FACTORS) -> tuple[Predictor, ...]:
    """The two that need no network: the token before, and the most frequent units at several numbers of units.

    Frequencies are counted on the first half of the trace; both are judged on the other half. They cost neither
    arithmetic nor parameters. Empty for a trace too short to halve.
    """
    header = trace.header
    half = header.n_tokens // 2
    if not half:
        return ()
    needed = trace.active[half:]

    def row(name: str, asks: str, asked: Bits, fitted_tokens: int) -> Predictor:
        found = judge(needed, asked, n_units=header.n_units, unit_bytes=header.unit_bytes)
        return Predictor.model_validate({"name": name, "asks": asks, "fitted_tokens": fitted_tokens,
                                         "unit_bytes": header.unit_bytes, **found._asdict()})

    uses = np.zeros((header.n_layers, header.n_units), np.int64)
    for token in trace.active[:half]:
        uses += np.unpackbits(token, axis=1, count=header.n_units, bitorder="little")
    per_token = uses.sum(axis=1) / half
    most_first = np.argsort(-uses, axis=1, kind="stable")
    rows = [row("previous-token", "what it used", trace.active[half - 1:-1], 0)]
    for factor in factors:
        mask = np.zeros(uses.shape, np.bool_)
        for layer, count in enumerate(np.rint(per_token * factor).astype(np.int64)):
            mask[layer, most_first[layer, :count]] = True
        asked = np.broadcast_to(np.packbits(mask, axis=1, bitorder="little"), needed.shape)
        times = "" if factor == 1.0 else f"{factor:g} times "
        rows.append(row("frequency", f"{times}as many as are active", asked, half))
    return tuple(rows)


def _ratio(part: np.int64, whole: np.int64) -> float | None:
    return float(part / whole) if whole else None
