"""Does the executor's neuron cache hold what the replay says, row by row, whatever the window and the room?"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from simmem.runtime.execute.cache import NewRows, WindowCache, padded
from simmem.trace.replay import shrink_to_capacity, window_table
from tests.laws.test_replay import activity, trace_of


def content(units: np.ndarray, width: int = 4) -> torch.Tensor:
    """Rows that say which unit they are."""
    return torch.from_numpy(units.astype(np.float64))[:, None].repeat(1, width)


@given(activity(min_tokens=6), st.integers(0, 4), st.data())
def test_it_counts_as_the_replay_does_and_its_rows_are_those_units(
        bits: np.ndarray, window: int, data: st.DataObject) -> None:
    tokens, layers, units = bits.shape
    table = window_table(trace_of(bits), window) if tokens > window else None
    capacity = data.draw(st.integers(0, units))
    for layer in range(layers):
        rows = torch.full((padded(capacity), 4), -1.0, dtype=torch.float64)
        cache = WindowCache(rows, units, window, capacity)
        if data.draw(st.booleans()):
            cache._whole = None  # as of a GPU's rows
        new, held, spans = [], [], []
        for token in range(tokens):
            active = np.flatnonzero(bits[token, layer])
            before = set(cache.ids.tolist())
            spans.append(cache.span)
            step = cache.step(token, active, cache.missing(active))
            assert set(step.new.tolist()) == set(active.tolist()) - before
            assert step.hits + len(step.new) == len(active)
            cache.settle(step)
            cache.fill(step, [NewRows(slice(0, 4), content(step.new), None)])
            if not step.kept:
                assert set(cache.ids.tolist()) == set(active.tolist()) & before
                cache.forget()
            assert cache.n <= capacity
            assert torch.equal(rows[: cache.n], content(cache.ids))
            assert len(set(cache.ids.tolist())) == cache.n
            new.append(len(step.new))
            held.append(cache.n)
        if table is None:
            continue
        # A window that had to shrink before the table begins has grown again after as many tokens as it is long.
        settled = slice(2 * window, None)
        state = shrink_to_capacity(table, window, capacity)
        assert new[settled] == state.new_units[window:, layer].tolist()
        assert spans[settled] == state.window[window:, layer].tolist()
        if window:
            assert held[settled] == state.held_units[window:, layer].tolist()


def test_it_can_begin_in_the_middle() -> None:
    rng = np.random.default_rng(0)
    bits = rng.random((12, 1, 60)) < 0.3
    whole, later = (WindowCache(None, 60, 3, 60) for _ in range(2))
    for token in range(6):
        active = np.flatnonzero(bits[token, 0])
        step = whole.step(token, active, whole.missing(active))
        whole.settle(step)
    held = later.start([np.flatnonzero(bits[token, 0]) for token in (3, 4, 5)], 6)
    assert set(held.tolist()) == set(whole.ids.tolist())
    for token in range(6, 12):
        active = np.flatnonzero(bits[token, 0])
        one, two = (cache.step(token, active, cache.missing(active)) for cache in (whole, later))
        assert one.new.tolist() == two.new.tolist()
        whole.settle(one)
        later.settle(two)
