"""Statistics and replay documents of small traces equal a count by hand, those of captured ones what was published."""

from __future__ import annotations

import json

import numpy as np
import pytest

from simmem.errors import SpecError, TraceError
from simmem.spec import library
from simmem.trace import load_trace_file
from simmem.trace.coactivation import co_activation
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
    assert found["token_run_length"] == pytest.approx(7 / 3)  # unit 0 for four tokens, 1 for two, 2 for one
    # four uses in a row; two uses make 2 * 3 / 4 runs on average; one use makes one
    assert found["token_run_length_independent"] == pytest.approx(7 / (1 + 1.5 + 1))
    assert found["busiest_unit_load"] == pytest.approx(4 / 7) and found["busiest_unit_load_even"] == 1 / 4
    assert found["dead_units"] == 1 / 4 and found["dead_units_by_layer"] == [1 / 4]
    assert found["co_activation"] is None  # four tokens are too few
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
    assert everything["token_run_length"] == everything["token_run_length_independent"] == 3
    assert nothing["token_run_length"] == nothing["busiest_unit_load"] == 0 and nothing["dead_units"] == 1
    assert json.loads(json.dumps(nothing, allow_nan=False)) == nothing
    with pytest.raises(TraceError, match="too few"):
        trace_statistics(trace_of(np.ones((1, 1, 1), bool)))
    with pytest.raises(SpecError, match="windows"):
        trace_statistics(trace_of(np.ones((3, 1, 1), bool)), windows=(0,))


def test_partners_are_judged_on_tokens_that_did_not_choose_them():
    rng = np.random.default_rng(5)
    half = rng.random((800, 2, 60)) < 0.2
    pairs = np.concatenate((half, half), axis=2)  # unit u and u + 60 are one
    pairs[:, :, 7] = rng.random((800, 2)) < 0.6  # goes with everything, and is nobody's partner
    found = co_activation(trace_of(pairs))
    assert found is not None and found["layers"] == [0, 1] and found["tokens"] == 800
    assert found["best_partner"] > 0.98 and found["best_partner_held_out"] > 0.98
    assert found["partner_frequency"] == pytest.approx(0.2, abs=0.03)
    alone = co_activation(trace_of(rng.random((800, 2, 4000)) < 0.2))
    assert alone is not None and alone["units"] == 512
    # 80 uses choose among 4000: the luckiest of so many lies 3.5 standard deviations of 0.045 up
    assert alone["best_partner"] == pytest.approx(0.2 + 3.5 * 0.045, abs=0.03)
    assert alone["best_partner_held_out"] == pytest.approx(alone["partner_frequency"], abs=0.01)
    assert alone["partner_frequency"] == pytest.approx(0.2, abs=0.02)


def test_statistics_of_a_routing_are_those_of_few_units():
    rng = np.random.default_rng(2)
    chosen = rng.random((640, 3, 8)).argsort(axis=2)[:, :, :2]
    chosen[:, :, 0] = np.where(rng.random((640, 3)) < 0.5, 0, chosen[:, :, 0])  # expert 0 is busy
    bits = np.zeros((640, 3, 8), bool)
    np.put_along_axis(bits, chosen, True, axis=2)
    found = trace_statistics(trace_of(bits))
    assert [row["tokens"] for row in found["windows"]] == [1, 2, 4, 8]
    assert found["busiest_unit_load_by_layer"] == pytest.approx(bits[:, :, 0].sum(axis=0) / bits.sum(axis=(0, 2)))
    assert found["busiest_unit_load"] > 1.5 * found["busiest_unit_load_even"] == 1.5 / 8
    assert found["windows"][3]["union"] == pytest.approx(
        np.mean([bits[t - 7 : t + 1].any(axis=0).mean() for t in range(8, 640)]))
    assert found["adjacent_overlap"] == pytest.approx(found["adjacent_overlap_independent"], abs=0.03)
    assert found["token_run_length"] == pytest.approx(found["token_run_length_independent"], abs=0.05)


@pytest.mark.parametrize(("name", "overlap", "unions", "news"), [
    ("smollm2-135m-wina-50", 0.564, (0.497, 0.709, 0.931, 0.990), (0.429, 0.236, 0.048, 0.006)),
    ("smollm2-135m-wina-70", 0.419, (0.296, 0.465, 0.738, 0.900), (0.573, 0.409, 0.168, 0.053))])
def test_captured_traces_have_the_statistics_measured_elsewhere(name, overlap, unions, news):
    # measured on 1024 tokens of free-running decode of other prompts, by another program; the same model and criterion
    # differed by up to .021 (union) and .016 (new) between texts
    found = trace_statistics(load_trace_file(library.resolve("trace", name)))
    assert found["adjacent_overlap"] == pytest.approx(overlap, abs=0.016)
    assert found["adjacent_overlap"] > found["adjacent_overlap_independent"] + 0.02
    assert [row["union"] for row in found["windows"]] == pytest.approx(unions, abs=0.021)
    assert [row["new"] for row in found["windows"]] == pytest.approx(news, abs=0.016)
    pairs = found["co_activation"]
    if name.endswith("70"):  # six layers, chosen and judged on the same tokens
        assert all(0.59 <= share <= 0.78 for share in pairs["best_partner_by_layer"])
    assert pairs["partner_frequency"] < pairs["best_partner_held_out"] < pairs["best_partner"]


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
