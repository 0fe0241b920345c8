"""Do the captured traces that simmem ships say what their bits say, and what others measured on the same model?"""

from __future__ import annotations

import numpy as np
import pytest

from simmem.spec import library, load_model
from simmem.trace import default_trace_file
from simmem.trace.curves import replay_document
from simmem.trace.statistics import trace_statistics
from simmem.trace.store import load_trace_file, read_header

# 1024 tokens of free-running, KV-cached decode of SmolLM2-135M on other prompts, counted by another program:
# share of the units in the union of the last 1, 2, 5, 10 tokens, and new units per active one after as many.
ELSEWHERE = {50: ([.497, .709, .931, .990], [.429, .236, .048, .006]),
             70: ([.296, .465, .738, .900], [.573, .409, .168, .053])}
# Geometric mean of sparse / dense perplexity over four texts, same program.
ELSEWHERE_QUALITY = {50: 1.030, 70: 1.169}

CAPTURED = [name for name in library.names("trace") if library.resolve("trace", name).suffix == ".safetensors"]


@pytest.mark.parametrize("name", CAPTURED)
def test_header_figures_are_those_of_the_bits(name: str) -> None:
    trace = load_trace_file(library.resolve("trace", name))
    trace.check_model(load_model(trace.header.model))
    assert trace.header.kind == "captured" and trace.header.name == name
    for found, stated in zip(replay_document(trace)["curves"], trace.header.curves, strict=True):
        assert found.keys() == stated.keys()
        for key, values in found.items():
            if isinstance(values, list):
                both = [[np.nan if v is None else v for v in side] for side in (stated[key], values)]  # no regret
                np.testing.assert_allclose(*both, rtol=1e-12, err_msg=key)
            else:
                assert stated[key] == values
    statistics = trace_statistics(trace)
    assert trace.header.statistics["sparsity"] == pytest.approx(statistics["sparsity"], rel=1e-12)
    assert trace.header.statistics["windows"] == [pytest.approx(w, rel=1e-12) for w in statistics["windows"]]


@pytest.mark.parametrize(("name", "rows", "oracle"), [
    ("smollm2-135m-wina-50", 3, True), ("smollm2-135m-wina-70-kjv", 3, True),
    ("relu-decoder-4m-relu-zero", 1, False),  # up has been read whole by then, and tells which rows of down are needed
])
def test_a_unit_is_what_was_left_to_read(name: str, rows: int, oracle: bool) -> None:
    header = load_trace_file(library.resolve("trace", name)).header
    model = load_model(header.model)
    assert header.unit_bytes == rows * model.architecture.d_model * 2
    assert header.is_oracle == oracle


def test_the_router_of_the_small_mixture_chose_two_experts() -> None:
    trace = load_trace_file(library.resolve("trace", "moe-8x3m-router"))
    model = load_model("moe-8x3m")
    assert (trace.active_counts == 2).all()
    assert trace.header.unit_bytes == 2 * model.expert_params
    assert default_trace_file(model) is None, "no policy plans with experts yet"


@pytest.mark.parametrize("suffix", ["", "-kjv", "-python"])
@pytest.mark.parametrize("percent", [50, 70])
def test_the_curve_that_ships_is_of_the_text_that_ships(percent: int, suffix: str) -> None:
    header = read_header(library.resolve("trace", f"smollm2-135m-wina-{percent}{suffix}"))
    assert header.captured is not None and not header.captured.applied and header.text_licence is not None
    quality = header.quality
    assert quality is not None and [p.level for p in quality.levels] == [0.3, 0.5, 0.7, 0.8, 0.9]
    assert all(abs(point.sparsity - point.level) < 0.04 for point in quality.levels)
    assert next(p.perplexity for p in quality.levels if p.level == percent / 100) == quality.sparse_perplexity
    other = read_header(library.resolve("trace", f"smollm2-135m-wina-{120 - percent}{suffix}")).quality
    assert other is not None and other.levels == quality.levels, "one curve for a text, whatever was captured"


def test_shipped_traces_stay_small() -> None:
    assert sum(library.resolve("trace", name).stat().st_size for name in CAPTURED) < 20e6


@pytest.mark.parametrize("percent", [50, 70])
def test_locality_and_quality_are_near_those_measured_elsewhere(percent: int) -> None:
    trace = load_trace_file(library.resolve("trace", f"smollm2-135m-wina-{percent}"))
    windows = trace_statistics(trace, (1, 2, 5, 10))["windows"]
    union, new = ELSEWHERE[percent]
    np.testing.assert_allclose([w["union"] for w in windows], union, atol=0.025)
    np.testing.assert_allclose([w["new"] for w in windows], new, atol=0.02)
    assert abs(1 - trace.active_share - percent / 100) < 0.02
    assert trace.header.quality is not None
    assert trace.header.quality.perplexity_ratio == pytest.approx(ELSEWHERE_QUALITY[percent], abs=0.04)
