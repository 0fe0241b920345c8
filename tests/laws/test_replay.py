"""Replay counts exactly what a plain-Python cache would, on any trace."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmem.errors import SpecError, TraceError
from simmem.trace.replay import lru_curve, run_table, shrink_to_capacity, window_curve, window_table
from simmem.trace.trace import Trace, TraceHeader, digest_of


def trace_of(bits: np.ndarray) -> Trace:
    """A trace from booleans (tokens, layers, units)."""
    active = np.packbits(bits, axis=2, bitorder="little")
    header = TraceHeader(name="random", kind="synthetic", model="none", n_tokens=bits.shape[0],
                         n_layers=bits.shape[1], n_units=bits.shape[2], unit_bytes=10.0, criterion="random",
                         threshold="none", records="active", predictor="none", text="none", digest=digest_of(active))
    return Trace(header, active)


@st.composite
def activity(draw: st.DrawFn, min_tokens: int = 1, max_units: int = 150) -> np.ndarray:
    shape = (draw(st.integers(min_tokens, 14)), draw(st.integers(1, 3)), draw(st.integers(1, max_units)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from([0.0, 0.03, 0.2, 0.5, 0.9, 1.0]))
    often = rng.random(shape[1:]) if draw(st.booleans()) else np.full(shape[1:], 0.5)
    return rng.random(shape) < 2 * share * often


def sets(bits: np.ndarray, token: int, layer: int) -> set[int]:
    return set(np.flatnonzero(bits[token, layer]).tolist()) if token >= 0 else set()


def plain_lru(bits: np.ndarray, capacity: int, scope: str, cold: int) -> tuple[int, int]:
    """Hits (cold, steady), unit by unit as the design words it."""
    n_tokens, n_layers, _ = bits.shape
    caches: dict[int, dict[tuple[int, int], int]] = {}  # (layer, unit) -> last step used
    hits = [0, 0]
    for token in range(n_tokens):
        for layer in range(n_layers):
            cache = caches.setdefault(0 if scope == "global" else layer, {})
            step = token * n_layers + layer
            used = {(layer, unit) for unit in sets(bits, token, layer)}
            pinned = used & cache.keys()
            hits[token >= cold] += len(pinned)
            for unit in pinned:
                cache[unit] = step
            for unit in sorted(used - pinned):
                if len(cache) >= capacity:
                    loose = [u for u in cache if u not in used]
                    if not loose:
                        continue  # read, not cached
                    del cache[min(loose, key=lambda u: (cache[u], u))]
                cache[unit] = step
    return hits[0], hits[1]


@given(bits=activity(), scope=st.sampled_from(["layer", "global"]), data=st.data())
def test_lru_equals_a_plain_cache_and_never_loses_hits_with_capacity(bits, scope, data):
    largest = bits.shape[1] * bits.shape[2] if scope == "global" else bits.shape[2]
    capacities = sorted({0, largest, largest + 3, *data.draw(st.lists(st.integers(0, largest), max_size=4))})
    cold = data.draw(st.integers(0, bits.shape[0] - 1))
    curve = lru_curve(trace_of(bits), capacities, scope=scope, cold_tokens=cold)
    expected = [plain_lru(bits, c, scope, cold) for c in capacities]
    assert [(int(a), int(b)) for a, b in zip(curve.cold_hits, curve.hits, strict=True)] == expected
    assert set((curve.hits + curve.misses).tolist()) == {int(bits[cold:].sum())}
    assert set((curve.cold_hits + curve.cold_misses).tolist()) == {int(bits[:cold].sum())}
    assert curve.cold_first_uses + curve.first_uses == int(bits.any(axis=0).sum()) == curve.cold_misses[-1] + \
        curve.misses[-1]
    stack = [c for c in capacities if c >= bits.sum(axis=2).max()]
    total = [h for c, h in zip(capacities, curve.hits, strict=True) if c in stack]
    assert total == sorted(total)


@given(bits=activity(min_tokens=2), data=st.data())
def test_window_counts_equal_sets(bits, data):
    longest = data.draw(st.integers(0, min(6, bits.shape[0] - 1)))
    trace = trace_of(bits)
    table = window_table(trace, longest)
    assert table.tokens.tolist() == list(range(longest, bits.shape[0]))
    some = data.draw(st.lists(st.sampled_from(table.tokens.tolist()), min_size=1, max_size=4))
    picked = window_table(trace, longest, tokens=np.array(some))
    windows = list(range(longest + 1))
    curve = window_curve(trace, windows)
    cold_misses = np.zeros(longest + 1, np.int64)
    for token in range(bits.shape[0]):
        for layer in range(bits.shape[1]):
            now = sets(bits, token, layer)
            for k in windows:
                past = set().union(*(sets(bits, token - j, layer) for j in range(1, k + 1)))
                kept = set().union(now, *(sets(bits, token - j, layer) for j in range(1, k)))
                if token < longest:
                    cold_misses[k] += len(now - past)
                    continue
                row = token - longest
                assert table.new_units[row, layer, k] == len(now - past)
                assert table.held_units[row, layer, k] == len(kept)
            if token >= longest:
                assert table.active_units[row, layer] == len(now)
    assert np.array_equal(picked.new_units, table.new_units[np.array(some) - longest])
    assert np.array_equal(picked.held_units, table.held_units[np.array(some) - longest])
    assert np.array_equal(curve.misses, table.new_units.sum(axis=(0, 1)))
    assert np.array_equal(curve.cold_misses, cold_misses)
    assert np.allclose(curve.sizes_units[1:], table.held_units.mean(axis=(0, 1))[1:])


@given(bits=activity(min_tokens=2), data=st.data())
def test_a_shrinking_window_equals_a_step_by_step_simulation(bits, data):
    longest = data.draw(st.integers(0, min(5, bits.shape[0] - 1)))
    window = data.draw(st.integers(0, longest))
    capacity = np.array(data.draw(st.lists(st.integers(0, bits.shape[2]), min_size=bits.shape[1],
                                           max_size=bits.shape[1])))
    table = window_table(trace_of(bits), longest)
    state = shrink_to_capacity(table, window, capacity)
    for layer in range(bits.shape[1]):
        k = None
        for row, token in enumerate(table.tokens.tolist()):
            def held(k: int, token: int = token, layer: int = layer) -> int:
                return len(set().union(*(sets(bits, token - j, layer) for j in range(k))))
            limit = window if k is None else min(window, k + 1)
            after = max((j for j in range(1, limit + 1) if held(j) <= capacity[layer]), default=0)
            before = after if k is None else k
            past = set().union(*(sets(bits, token - j, layer) for j in range(1, before + 1)))
            assert state.window[row, layer] == before
            assert state.new_units[row, layer] == len(sets(bits, token, layer) - past)
            assert state.held_units[row, layer] == (held(after) if after else 0)
            k = after
    assert np.all(state.held_units <= capacity)


def plain_runs(units: set[int], gap: int) -> tuple[int, int]:
    requests = spanned = 0
    last = None
    for unit in sorted(units):
        if last is not None and unit - last - 1 <= gap:
            spanned += unit - last
        else:
            requests, spanned = requests + 1, spanned + 1
        last = unit
    return requests, spanned


@given(bits=activity(min_tokens=2, max_units=330), gap=st.integers(0, 350), data=st.data())
def test_runs_equal_a_walk_over_the_units(bits, gap, data):
    longest = data.draw(st.integers(0, min(3, bits.shape[0] - 1)))
    gap = data.draw(st.sampled_from([0, 1, 2, 5, 63, 64, gap]))
    trace = trace_of(bits)
    tokens = window_table(trace, longest).tokens[:3]
    requests, spanned = run_table(trace, tokens, range(longest + 1), gap)
    for row, token in enumerate(tokens.tolist()):
        for layer in range(bits.shape[1]):
            for k in range(longest + 1):
                past = set().union(*(sets(bits, token - j, layer) for j in range(1, k + 1)))
                expected = plain_runs(sets(bits, token, layer) - past, gap)
                assert (requests[row, layer, k], spanned[row, layer, k]) == expected


def test_what_a_replay_refuses():
    trace = trace_of(np.ones((5, 1, 9), bool))
    with pytest.raises(TraceError, match="too few for a window of 5"):
        window_table(trace, 5)
    with pytest.raises(TraceError, match="can cover tokens 2 to 4"):
        window_table(trace, 2, tokens=[1])
    with pytest.raises(TraceError, match="consecutive"):
        shrink_to_capacity(window_table(trace, 1, tokens=[2, 4]), 1, 9)
    with pytest.raises(SpecError, match="covers 0 to 1"):
        shrink_to_capacity(window_table(trace, 1), 2, 9)
    with pytest.raises(SpecError, match="capacities"):
        lru_curve(trace, [-1])
    with pytest.raises(TraceError, match="too few to count 5"):
        lru_curve(trace, [1], cold_tokens=5)
