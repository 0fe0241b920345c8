"""Statistics and replay documents of small traces equal a count by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from simmem.errors import SpecError, TraceError
from simmem.trace.curves import replay_document
from simmem.trace.statistics import trace_statistics
from simmem.trace.trace import Trace, TraceHeader, digest_of


def trace_of(bits: np.ndarray) -> Trace:
    active = np.packbits(bits, axis=2, bitorder="little")
    return Trace(TraceHeader(name="hand", kind="captured", model="toy", n_tokens=bits.shape[0], n_layers=bits.shape[1],
                             n_units=bits.shape[2], unit_bytes=100.0, criterion="c", threshold="t", records="active",
                             predictor="none", text="t", digest=digest_of(active)), active)


def test_statistics_of_a_trace_counted_by_hand():
    # one layer of 4 units; uses: {0,1} {0,1} {0,2} {0}
    bits = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]], bool)[:, None, :]
    found = trace_statistics(trace_of(bits), windows=(1, 2, 9))
    assert found["active_share"] == pytest.approx(7 / 16)
    assert found["sparsity_by_layer"] == pytest.approx([9 / 16])
    assert found["adjacent_overlap"] == pytest.approx(4 / 5)  # 2 + 1 + 1 of the 5 uses after the first token
    # pairs of tokens in any order: unit 0 always both, unit 1 with chance 1/6
    assert found["adjacent_overlap_independent"] == pytest.approx((1 + 1 / 6) / (7 / 4))
    assert found["units_covering_80_percent"] == pytest.approx(2 / 4)  # units 0 and 1: 6 of 7
    assert found["run_length"] == pytest.approx(7 / 5)
    assert found["run_length_random_order"] == pytest.approx(7 / ((3 * 2 * 3 + 1 * 4) / 4))
    one, two = found["windows"]
    assert (one["tokens"], two["tokens"]) == (1, 2)  # 9 is longer than the trace
    assert one["union"] == pytest.approx(3 / 8)  # over tokens 2 and 3, which have both windows behind them
    assert two["union"] == pytest.approx((3 + 2) / 8)
    assert one["new"] == pytest.approx(1 / 3)
    assert two["new_share_of_units"] == pytest.approx(1 / 8)
    assert two["union_independent"] == pytest.approx((1 + 5 / 6 + 1 / 2) / 4)


def test_statistics_of_nothing_and_of_everything():
    nothing = trace_statistics(trace_of(np.zeros((3, 2, 5), bool)), windows=(1,))
    everything = trace_statistics(trace_of(np.ones((3, 2, 5), bool)), windows=(1,))
    assert nothing["active_share"] == nothing["adjacent_overlap"] == nothing["run_length"] == 0
    assert everything["adjacent_overlap"] == everything["adjacent_overlap_independent"] == 1
    assert everything["run_length"] == everything["run_length_random_order"] == 5
    assert json.loads(json.dumps(nothing, allow_nan=False)) == nothing
    with pytest.raises(TraceError, match="too few"):
        trace_statistics(trace_of(np.ones((1, 1, 1), bool)))
    with pytest.raises(SpecError, match="windows"):
        trace_statistics(trace_of(np.ones((3, 1, 1), bool)), windows=(0,))


def test_the_replay_document():
    bits = np.random.default_rng(3).random((40, 2, 30)) < 0.3
    trace = trace_of(bits)
    document = replay_document(trace)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["schema"] == "simmem.replay/1"
    assert document["trace"] == {"name": "hand", "kind": "captured", "digest": trace.header.digest}
    assert document["cold"]["tokens"] == 10
    window, lru, pinned, best = document["curves"]
    assert [c["policy"] for c in document["curves"]] == ["window", "lru", "pin-hot", "belady"]
    assert document["levels"] is None
    used = bits[10:].sum() / 30 * 100.0  # bytes per token that no cache at all reads
    assert window["bytes_per_token"][0] == pytest.approx(used)
    assert window["hit_ratio"][0] == 0 and window["sizes_bytes"][0] == 0
    for curve in (lru, pinned):
        for read, least, regret in zip(curve["bytes_per_token"], best["bytes_per_token"], curve["regret"], strict=True):
            assert read == pytest.approx(least * (1 + regret)) if regret is not None else least == 0 < read
    assert best["regret"] == [0.0] * len(best["sizes_bytes"])
    assert window["regret"][0] == 0 and min(window["regret"]) >= 0
    for curve in (window, lru, pinned, best):
        for hit, read in zip(curve["hit_ratio"], curve["bytes_per_token"], strict=True):
            assert read == pytest.approx((1 - hit) * used)
    assert lru["sizes_bytes"][-1] == 3000.0
    half = replay_document(trace, policies=["lru"], sizes_bytes=[3000, 100 * 6.0 * 0.140625 * 2], precision="int4")
    assert half["unit_bytes"] == pytest.approx(100 * 0.5625 / 2)
    assert half["curves"][0]["parameter"] == [106, 6]
    shared = replay_document(trace, policies=["lru"], scope="global")["curves"][0]
    assert shared["scope"] == "global" and shared["sizes_bytes"][-1] == 6000.0
    with pytest.raises(SpecError, match="window, lru, lfu"):
        replay_document(trace, policies=["fifo"])
