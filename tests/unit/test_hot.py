"""Are units classed by what other tokens used, and counted as by hand?"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmem.errors import TraceError
from simmem.trace import hot
from simmem.trace.hot import hot_table
from tests.laws.test_replay import trace_of
from tests.strategies import seeds

# Three profile tokens, two timed ones; one layer of five units.
BITS = np.array([[[1, 1, 0, 0, 0]], [[1, 0, 1, 0, 0]], [[1, 1, 0, 0, 0]],
                 [[1, 0, 0, 0, 1]], [[0, 1, 1, 1, 0]]], np.bool_)


def test_counted_by_hand() -> None:
    found = hot_table(trace_of(BITS), np.array([3, 4]))
    assert found.profile_tokens == 3
    assert found.frequency.tolist() == [[1.0, 2 / 3, 1 / 3, 0.0]]
    assert found.units.tolist() == [[1, 1, 1, 2]]
    assert found.used_by(np.array([1])).tolist() == [[[0, 1, 1, 1]]]
    assert found.used_by(np.array([1, 0, 1])).tolist() == [[[0, 1, 1, 1]], [[1, 0, 0, 1]], [[0, 1, 1, 1]]]
    assert found.used_by(np.arange(len(found.tokens))).tolist() == [[[1, 0, 0, 1]], [[0, 1, 1, 1]]]


@given(seeds(), st.integers(1, 4), st.integers(1, 90), st.integers(2, 12), st.booleans())
def test_every_unit_is_in_one_class_and_timed_tokens_are_left_out(rng: np.random.Generator, layers: int, units: int,
                                                                  tokens: int, few: bool) -> None:
    bits = rng.random((tokens, layers, units)) < rng.random((layers, units))
    timed = np.sort(rng.choice(tokens, int(rng.integers(1, tokens)), replace=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hot, "MAX_CLASSES", 3 if few else 64)
        found = hot_table(trace_of(bits), timed)
        changed = bits.copy()
        changed[timed] = rng.random((len(timed), layers, units)) < 0.5
        assert hot_table(trace_of(changed), timed).frequency.tolist() == found.frequency.tolist()
    assert found.units.sum(axis=1).tolist() == [units] * layers
    np.testing.assert_array_equal(found.used_by(np.arange(len(found.tokens))).sum(axis=2), bits[timed].sum(axis=2))
    profile = np.delete(bits, timed, axis=0)
    uses = (found.frequency * found.units).sum(axis=1)
    np.testing.assert_allclose(uses, profile.mean(axis=0).sum(axis=1), atol=1e-12)
    for frequency, held in zip(found.frequency, found.units, strict=True):
        assert (np.diff(frequency[held > 0]) < 0).all()


def test_a_trace_without_other_tokens_is_refused() -> None:
    with pytest.raises(TraceError, match="none is left"):
        hot_table(trace_of(BITS), np.arange(5))
