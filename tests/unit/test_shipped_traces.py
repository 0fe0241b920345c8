"""Do the captured traces that simmem ships say what their bits say, and what others measured on the same model?"""

from __future__ import annotations

import numpy as np
import pytest

from simmem.spec import library, load_model
from simmem.trace.curves import replay_document
from simmem.trace.statistics import trace_statistics
from simmem.trace.store import load_trace_file

# 1024 tokens of free-running, KV-cached decode of SmolLM2-135M on other prompts, counted by another program:
# share of the units in the union of the last 1, 2, 5, 10 tokens, and new units per active one after as many.
ELSEWHERE = {50: ([.497, .709, .931, .990], [.429, .236, .048, .006]),
             70: ([.296, .465, .738, .900], [.573, .409, .168, .053])}
# Geometric mean of sparse / dense perplexity over four texts, same program.
ELSEWHERE_QUALITY = {50: 1.030, 70: 1.169}

pytestmark = pytest.mark.parametrize("percent", [50, 70])


def test_header_figures_are_those_of_the_bits(percent: int) -> None:
    trace = load_trace_file(library.resolve("trace", f"smollm2-135m-wina-{percent}"))
    trace.check_model(load_model("smollm2-135m"))
    assert trace.header.unit_bytes == load_model("smollm2-135m").unit_bytes("fp16")
    assert trace.header.kind == "captured" and trace.header.is_oracle
    for found, stated in zip(replay_document(trace)["curves"], trace.header.curves, strict=True):
        assert found.keys() == stated.keys()
        for key, values in found.items():
            if isinstance(values, list):
                np.testing.assert_allclose(stated[key], values, rtol=1e-12, err_msg=key)
            else:
                assert stated[key] == values
    statistics = trace_statistics(trace)
    assert trace.header.statistics["sparsity"] == pytest.approx(statistics["sparsity"], rel=1e-12)
    assert trace.header.statistics["windows"] == [pytest.approx(w, rel=1e-12) for w in statistics["windows"]]


def test_locality_and_quality_are_near_those_measured_elsewhere(percent: int) -> None:
    trace = load_trace_file(library.resolve("trace", f"smollm2-135m-wina-{percent}"))
    windows = trace_statistics(trace, (1, 2, 5, 10))["windows"]
    union, new = ELSEWHERE[percent]
    np.testing.assert_allclose([w["union"] for w in windows], union, atol=0.025)
    np.testing.assert_allclose([w["new"] for w in windows], new, atol=0.02)
    assert abs(1 - trace.active_share - percent / 100) < 0.02
    assert trace.header.quality is not None
    assert trace.header.quality.perplexity_ratio == pytest.approx(ELSEWHERE_QUALITY[percent], abs=0.04)
