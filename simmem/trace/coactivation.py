"""Which unit goes with which: if a unit is used, how likely is the one that most often goes with it?

That is what storing two units side by side would save. The best of many partners looks better than it is: the maximum
over thousands of chances finds luck. So partners are chosen on one half of the tokens and judged on the other, and
beside both stands how often the partner is used anyway. Units used by more than half of the tokens are nobody's
partner: they go with everything, and storing them with everything stores them many times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.trace.trace import Trace

__all__ = ["ALWAYS_ON", "co_activation"]

ALWAYS_ON = 0.5
"""A unit that more than this share of the tokens use is not taken as a partner."""
_MOST_LAYERS = 6
_MOST_TOKENS = 2048
_MOST_UNITS = 256
_LEAST_TOKENS = 16
_LEAST_USES = 4
"""Units used less often in a half are left out: a share of fewer uses says nothing."""
_BLOCK_UNITS = 2048


def co_activation(trace: Trace) -> dict[str, Any] | None:
    """How often the best partner of a unit is used with it, counted on a bounded sample.

    The sample is up to 6 layers at equal distances, the first 2048 tokens, and in each layer up to 256 units at equal
    distances by id; partners are sought among all units of the layer. Means over units, then over layers.

    Returns
    -------
    best_partner : P(partner | unit) on the tokens that chose the partner, the first half; biased up.
    best_partner_held_out : the same pairs on the second half.
    partner_frequency : share of the second half's tokens that use the partner: P(partner | unit) if units were
        independent.
    best_partner_by_layer, best_partner_held_out_by_layer, partner_frequency_by_layer : of each of `layers`.
    layers, units, tokens : the sample: which layers, how many pairs in all, and how many tokens in both halves.

    None where there are fewer than 16 tokens, or no unit is used 4 times in each half and has a partner.
    """
    h = trace.header
    n_tokens = min(h.n_tokens, _MOST_TOKENS)
    if n_tokens < _LEAST_TOKENS:
        return None
    sampled = np.unique(np.linspace(0, h.n_layers - 1, min(h.n_layers, _MOST_LAYERS)).round().astype(int))
    rows = [(layer, found) for layer in sampled.tolist()
            if (found := _layer_pairs(trace.active[:n_tokens, layer], h.n_units)) is not None]
    if not rows:
        return None
    by_layer = np.array([[part.mean() for part in found] for _, found in rows])
    seen, held_out, chance = by_layer.mean(axis=0).tolist()
    return {
        "best_partner": seen, "best_partner_held_out": held_out, "partner_frequency": chance,
        "best_partner_by_layer": by_layer[:, 0].tolist(), "best_partner_held_out_by_layer": by_layer[:, 1].tolist(),
        "partner_frequency_by_layer": by_layer[:, 2].tolist(),
        "layers": [layer for layer, _ in rows], "units": sum(len(found[0]) for _, found in rows), "tokens": n_tokens,
    }


def _layer_pairs(active: NDArray[np.uint8], n_units: int) -> tuple[NDArray[np.float64], ...] | None:
    """(n,) P(partner | unit) on the first half and on the second, and the partner's frequency there; packed (T, B)."""
    half = len(active) // 2
    bits = np.unpackbits(active, axis=1, count=n_units, bitorder="little")
    parts = bits[:half], bits[half:]
    uses = [part.sum(axis=0, dtype=np.int64) for part in parts]
    often = np.flatnonzero((uses[0] >= _LEAST_USES) & (uses[1] >= _LEAST_USES))
    if not often.size:
        return None
    units = often[np.linspace(0, often.size - 1, min(often.size, _MOST_UNITS)).round().astype(int)]
    first, second = (part[:, units].astype(np.float32) for part in parts)
    together, partner = np.full(units.size, -1.0, np.float32), np.zeros(units.size, np.int64)
    for start in range(0, n_units, _BLOCK_UNITS):
        block = slice(start, start + _BLOCK_UNITS)
        both = first.T @ parts[0][:, block].astype(np.float32)
        both[:, uses[0][block] > ALWAYS_ON * half] = -1.0
        own = np.flatnonzero((units >= start) & (units < start + _BLOCK_UNITS))
        both[own, units[own] - start] = -1.0
        best = both.argmax(axis=1)
        most = both[np.arange(units.size), best]
        better = most > together
        together[better], partner[better] = most[better], best[better] + start
    has = together >= 0.0
    if not has.any():
        return None
    units, partner, together = units[has], partner[has], together[has].astype(np.float64)
    again = (second[:, has] * parts[1][:, partner]).sum(axis=0, dtype=np.float64)
    return together / uses[0][units], again / uses[1][units], uses[1][partner] / (len(active) - half)
