"""How sparse, how skewed and how local is a trace, and how much of that is frequency alone?

Beside every figure of locality stands its independence baseline: what units that fire as often as seen, but
without any memory of the last token, would give. The gap between the two is temporal locality; most of what
a window saves is frequency. Everything is counted over all tokens, layers and units but co-activation, which
is counted on a bounded sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError, TraceError
from simmem.trace.bits import runs, words_of
from simmem.trace.coactivation import co_activation
from simmem.trace.replay import window_table
from simmem.trace.trace import Trace

__all__ = ["independent_union", "trace_statistics", "unit_frequencies"]

_COVERED = 0.8
_BLOCK_TOKENS = 64
_WINDOWS = (1, 2, 5, 10)
_FEW_WINDOWS = (1, 2, 4, 8)
_FEW_UNITS = 256
"""With no more units than a mixture has experts, a window of ten tokens has often used them all."""


def unit_frequencies(trace: Trace) -> NDArray[np.float64]:
    """Share of tokens that use each unit, shape (n_layers, n_units)."""
    h = trace.header
    uses = np.zeros((h.n_layers, h.n_units), np.int64)
    for start in range(0, h.n_tokens, _BLOCK_TOKENS):
        block = trace.active[start : start + _BLOCK_TOKENS]
        uses += np.unpackbits(block, axis=2, count=h.n_units, bitorder="little").sum(axis=0, dtype=np.int64)
    return uses.astype(np.float64) / h.n_tokens


def independent_union(frequencies: NDArray[np.float64], tokens: int, seen_tokens: int) -> NDArray[np.float64]:
    """Expected share of each layer's units that `tokens` tokens use if tokens were independent, (n_layers,).

    Each unit's uses are laid on the `seen_tokens` tokens in random order: it is absent from k of them with
    probability Π (1 - uses / (seen_tokens - j)), j = 0 … k-1. For long traces that is (1 - frequency)^k, for
    short ones it has no bias, which that power has.
    """
    silent = np.ones_like(frequencies)
    for j in range(tokens):
        silent *= np.maximum(1.0 - frequencies * (seen_tokens / (seen_tokens - j)), 0.0)
    absent: NDArray[np.float64] = silent.mean(axis=1)
    return 1.0 - absent


def trace_statistics(trace: Trace, windows: Sequence[int] | None = None) -> dict[str, Any]:
    """Sparsity, locality and layout of a trace, as plain numbers for JSON.

    Parameters
    ----------
    windows : in tokens; 1, 2, 5 and 10 when None, or 1, 2, 4 and 8 where a layer has few units (experts).

    Returns
    -------
    sparsity, active_share : of all tokens and layers; `sparsity_by_layer` per layer.
    windows : for each k of `windows` that the trace is long enough for, `union` (share of the units that k tokens
        use) and `new` (units a token uses that the k before did not, as a share of those it uses), each with its
        `_independent` baseline, and `new_share_of_units`.
    adjacent_overlap : share of a token's units that the token before used too, and its baseline.
    units_covering_80_percent : smallest share of the whole model's units that takes 80 % of the activations, and
        the mean of that share taken layer by layer.
    run_length : mean units in a run of adjacent active units, and what each token-layer's m units would give in
        random order: m (n - m + 1) / n runs on average.
    token_run_length : mean consecutive tokens that a unit stays active, and what each unit's m uses would give in
        random order over the tokens.
    busiest_unit_load : share of a layer's uses that its most used unit takes, mean over layers and by layer; if all
        were used alike, `busiest_unit_load_even`. What experts on different devices, or in different files, wait for.
    dead_units : share of the units that no token uses, in all and by layer.
    co_activation : see `simmem.trace.coactivation.co_activation`; counted on a sample.
    """
    if windows is None:
        windows = _FEW_WINDOWS if trace.header.n_units <= _FEW_UNITS else _WINDOWS
    if not windows or min(windows) < 1:
        raise SpecError(f"found the windows {list(windows)}, expected lengths of 1 token and more", key="windows")
    header = trace.header
    usable = [int(k) for k in windows if k < header.n_tokens]
    if not usable:
        raise TraceError(f"has {header.n_tokens} tokens, too few for a window of {min(windows)}", key=header.name)
    frequencies = unit_frequencies(trace)
    share_by_layer = frequencies.mean(axis=1)
    share = float(share_by_layer.mean())
    # over the same tokens for every k, so that the figures can be compared
    table = window_table(trace, max(usable))
    active = max(float(table.active_units.mean()), np.finfo(np.float64).tiny)
    by_window = []
    for k in usable:
        union, next_union = (float(independent_union(frequencies, n, header.n_tokens).mean()) for n in (k, k + 1))
        new = float(table.new_units[:, :, k].mean())
        by_window.append({
            "tokens": k,
            "union": float(table.held_units[:, :, k].mean()) / header.n_units,
            "union_independent": union,
            "new": new / active,
            "new_independent": (next_union - union) / share if share else 0.0,
            "new_share_of_units": new / header.n_units,
        })
    counts = trace.active_counts
    n_active, n_runs = float(counts.sum()), float(runs(words_of(trace.active))[0].sum())
    fresh = float(window_table(trace, 1).new_units[:, :, 1].sum())
    n_runs_random = float((counts * (header.n_units - counts + 1)).sum()) / header.n_units
    uses = np.rint(frequencies * header.n_tokens)
    n_stays = fresh + float(counts[0].sum())
    n_stays_random = float((uses * (header.n_tokens - uses + 1)).sum()) / header.n_tokens
    layer_uses = uses.sum(axis=1)
    load = uses.max(axis=1) / np.maximum(layer_uses, 1.0)
    two_tokens = float(independent_union(frequencies, 2, header.n_tokens).mean())
    overlap_independent = (2 * share - two_tokens) / share if share else 0.0
    return {
        "active_share": share,
        "sparsity": 1.0 - share,
        "sparsity_by_layer": (1.0 - share_by_layer).tolist(),
        "windows": by_window,
        "adjacent_overlap": 1.0 - fresh / max(int(counts[1:].sum()), 1) if share else 0.0,
        "adjacent_overlap_independent": overlap_independent,
        "units_covering_80_percent": _covering_share(frequencies.ravel()),
        "units_covering_80_percent_by_layer": float(np.mean([_covering_share(row) for row in frequencies])),
        "run_length": n_active / n_runs if n_runs else 0.0,
        "run_length_random_order": n_active / n_runs_random if n_runs else 0.0,
        "token_run_length": n_active / n_stays if n_active else 0.0,
        "token_run_length_independent": n_active / n_stays_random if n_active else 0.0,
        "busiest_unit_load": float(load.mean()),
        "busiest_unit_load_by_layer": load.tolist(),
        "busiest_unit_load_even": 1.0 / header.n_units,
        "dead_units": float((uses == 0).mean()),
        "dead_units_by_layer": (uses == 0).mean(axis=1).tolist(),
        "co_activation": co_activation(trace),
    }


def _covering_share(frequencies: NDArray[np.float64]) -> float:
    """Smallest share of units, most frequent first, that takes 80 % of all activations."""
    most_first = np.sort(frequencies)[::-1]
    taken = np.cumsum(most_first)
    if not taken[-1]:
        return 0.0
    return float(np.searchsorted(taken, _COVERED * taken[-1]) + 1) / frequencies.size
