"""Every statistic a synthetic trace was fitted to comes out of it, and the same seed gives the same trace."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import betaln
from scipy.stats import beta

from simmem.errors import SpecError, TraceError, UnknownNameError
from simmem.spec import library
from simmem.spec.model import Model, load_model
from simmem.trace import default_trace_file, open_trace, save_trace, synthetic
from simmem.trace.replay import window_table
from simmem.trace.statistics import trace_statistics
from simmem.trace.synthetic import (
    SyntheticSpec,
    beta_quantiles,
    expected_new,
    expected_union,
    fit_concentration,
    fit_law,
    generate,
    law_statistic,
    load_synthetic,
)
from simmem.trace.trace import Trace

SPECS = [name for name in library.names("trace") if library.resolve("trace", name).suffix == ".toml"]


@cache
def spec_of(name: str) -> SyntheticSpec:
    return load_synthetic(library.resolve("trace", name))


@cache
def trace_of(name: str) -> Trace:
    spec = spec_of(name)
    return generate(spec, load_model(spec.published_for))


def tiny_model(d_ff: int = 203, n_layers: int = 3) -> Model:
    a = load_model("opt-125m").architecture.model_copy(update={"d_ff": d_ff, "n_layers": n_layers})
    return load_model("opt-125m").model_copy(update={"name": "tiny", "architecture": a})


@given(m=st.floats(0.01, 0.9), s=st.floats(0.2, 50.0), k=st.integers(0, 20))
def test_the_law_is_a_ratio_of_beta_functions_and_a_product(m, s, k):
    a, b = m * s, (1 - m) * s
    assert expected_union(m, s, k) == pytest.approx(1 - np.exp(betaln(a, b + k) - betaln(a, b)), abs=1e-11)
    product = np.prod([(b + j) / (s + j) for j in range(k)])
    assert expected_union(m, s, k) == pytest.approx(1 - product, abs=1e-11)
    assert expected_new(m, s, k) == pytest.approx(expected_union(m, s, k + 1) - expected_union(m, s, k), abs=1e-11)


def test_the_law_is_the_mean_over_the_quantiles():
    p = beta_quantiles(0.19, 1.6, 100_000)
    for k in (1, 4, 10):
        assert expected_union(0.19 / 1.79, 1.79, k) == pytest.approx(1 - ((1 - p) ** k).mean(), abs=1e-5)
        assert expected_new(0.19 / 1.79, 1.79, k) == pytest.approx((p * (1 - p) ** k).mean(), abs=1e-5)


@given(m=st.floats(0.01, 0.7), s=st.floats(0.2, 40.0), k=st.integers(2, 12))
def test_fits_find_the_law_they_are_given(m, s, k):
    union, new = expected_union(m, s, k), expected_new(m, s, k)
    assert fit_concentration(m, k, union) == pytest.approx(s, rel=1e-6)
    assert fit_law(k, union, new) == pytest.approx((m, s), rel=1e-5)


def test_what_no_law_has_is_refused():
    with pytest.raises(SpecError, match="no law"):
        fit_concentration(0.1, 4, 0.05)
    with pytest.raises(SpecError, match="no law"):
        fit_concentration(0.1, 4, 0.36)
    with pytest.raises(SpecError, match="no law"):
        fit_law(4, 0.1, 0.09)


@pytest.mark.parametrize(("a", "b"), [(0.19, 1.6), (0.09, 1.7), (0.35, 1.4), (0.5, 0.5), (2, 9), (30, 40), (3, 0.2)])
def test_quantiles_equal_scipys(a, b):
    expected = beta.ppf((np.arange(3000) + 0.5) / 3000, a, b)
    assert np.abs(beta_quantiles(a, b, 3000) - expected).max() < 1e-5


@pytest.mark.parametrize("name", SPECS)
def test_every_fitted_statistic_comes_out(name):
    spec, trace = spec_of(name), trace_of(name)
    share, _, _ = spec.share_for(spec.published_for)
    assert trace.active_share == pytest.approx(share, rel=0.01)
    for statistic in spec.statistics:
        law = law_statistic(spec, statistic, spec.published_for, trace.header.n_layers)
        assert law == pytest.approx(statistic.value, rel=statistic.tolerance)
        table = window_table(trace, max(statistic.window, 1))
        drawn = {"active_share": table.active_units, "union_share": table.held_units[:, :, statistic.window],
                 "new_share": table.new_units[:, :, statistic.window]}[statistic.quantity].mean()
        assert drawn / trace.header.n_units == pytest.approx(law, rel=0.01)


def test_the_shipped_fits_are_what_the_fit_gives():
    m, s = fit_law(4, 0.33, 0.031)
    falcon, opt = spec_of("falcon-7b-published"), spec_of("opt-published")
    assert falcon.active_share.value == pytest.approx(m, rel=1e-3)
    assert falcon.concentration.value == pytest.approx(s, rel=1e-3)
    shares = opt.share_by_layer("opt-6.7b", 32)

    def misfit(s: float) -> float:
        moved = opt.model_copy(update={"concentration": opt.concentration.model_copy(update={"value": s})})
        return sum((law_statistic(moved, statistic, "opt-6.7b", 32) / statistic.value - 1) ** 2
                   for statistic in opt.statistics)

    best = min(np.arange(1.5, 2.1, 0.005), key=misfit)
    assert opt.concentration.value == pytest.approx(best, abs=0.011)
    # Table 6 of LLM in a flash: layers 1, 16, 32 against the average layer
    assert shares[[0, 15, 31]] / shares.mean() == pytest.approx(np.array([1.56, 2.66, 5.36]) / 3.30, rel=2e-3)


@pytest.mark.parametrize("name", SPECS)
def test_tokens_are_independent_and_layers_follow_the_profile(name):
    trace, spec = trace_of(name), spec_of(name)
    statistics = trace_statistics(trace, windows=(1, 4, 10))
    for window in statistics["windows"]:
        assert window["union"] == pytest.approx(window["union_independent"], rel=0.01)
        assert window["new"] == pytest.approx(window["new_independent"], rel=0.02)
    assert statistics["adjacent_overlap"] == pytest.approx(statistics["adjacent_overlap_independent"], rel=0.01)
    assert statistics["run_length"] == pytest.approx(statistics["run_length_random_order"], rel=0.01)
    by_layer = spec.share_by_layer(spec.published_for, trace.header.n_layers)
    assert 1 - np.array(statistics["sparsity_by_layer"]) == pytest.approx(by_layer, rel=0.02)


@pytest.mark.parametrize("name", SPECS)
def test_the_header_says_what_it_is(name):
    header, spec = trace_of(name).header, spec_of(name)
    assert header.kind == "synthetic" and header.name == name and header.model == spec.published_for
    assert header.statistics["concentration"]["source"]
    assert header.weakest_kind in ("fitted", "estimated")
    if header.weakest_kind == "estimated":
        low, high = header.active_share_range
        assert low < spec.active_share.value < high and high / low >= 2


def test_statistics_lent_to_another_model_are_estimates():
    spec = spec_of("opt-published")
    lent = generate(spec, load_model("opt-1.3b"), 4).header
    assert lent.weakest_kind == "estimated" and lent.active_share_range is not None
    assert generate(spec, load_model("opt-6.7b"), 4).header.weakest_kind == "fitted"


def test_the_same_seed_gives_the_same_trace_and_more_tokens_change_none():
    spec, model = spec_of("opt-published"), tiny_model()
    long, short, again = generate(spec, model, 40), generate(spec, model, 13), generate(spec, model, 40)
    assert np.array_equal(long.active, again.active) and long.header == again.header
    assert np.array_equal(long.active[:13], short.active)
    other = generate(spec.model_copy(update={"seed": spec.seed + 1}), model, 40)
    assert not np.array_equal(long.active, other.active)


@pytest.mark.parametrize("most", [1, 203 * 5, 203 * 9])
def test_layers_drawn_a_few_at_a_time_are_those_drawn_at_once(most, monkeypatch):
    spec, model = spec_of("opt-published"), tiny_model(n_layers=11)
    at_once = generate(spec, model, 7)
    monkeypatch.setattr(synthetic, "_PART_UNITS", most)
    assert np.array_equal(generate(spec, model, 7).active, at_once.active)


def test_a_batch_is_the_union_of_independent_sequences():
    spec, model = spec_of("opt-published"), load_model("opt-125m")
    drawn = generate(spec, model, 48, batch=4).active_share
    assert drawn == pytest.approx(generate(spec, model, 192).batched(4).active_share, rel=0.01)


@pytest.mark.parametrize(("changes", "key"), [
    ({"layer_profile": [[0.5, 1.0], [0.2, 1.0]]}, "layer_profile"), ({"layer_profile": [[0.0, -1.0]]}, "layer_profile"),
    ({"layer_profile": [[0.0, 0.001], [0.9, 0.001], [1.0, 40.0]]}, None), ({"seed": -1}, "seed"),
    ({"concentration": {"value": 0.0, "kind": "estimated", "source": "none known"}}, None), ({"sedd": 1}, "sedd")])
def test_a_spec_that_cannot_be_is_one_clear_error(tmp_path, changes, key):
    from simmem.spec.base import validate

    data = {**spec_of("opt-published").model_dump(by_alias=True, mode="json", exclude_none=True), **changes}
    with pytest.raises(SpecError) as caught:
        validate(SyntheticSpec, data, file="x.toml")
    assert caught.value.file == "x.toml" and (key is None or caught.value.key.startswith(key))


def test_every_served_model_gets_its_trace_and_others_none():
    for name in SPECS:
        for served in spec_of(name).serves:
            assert default_trace_file(load_model(served)) == library.resolve("trace", name)
    assert open_trace(None, tiny_model()) is None
    trace = open_trace(None, load_model("opt-125m"), batch=2, n_tokens=5)
    assert trace is not None and trace.header.name == "opt-published" and trace.header.n_tokens == 5
    with pytest.raises(UnknownNameError, match="opt-published"):
        open_trace("opt-publshed", tiny_model())


def test_opening_a_captured_file(tmp_path):
    model = tiny_model()
    trace = generate(spec_of("opt-published"), model, 64)
    path = str(tmp_path / "mine.safetensors")
    save_trace(trace, path)
    assert open_trace(path, model).header == trace.header
    cut = open_trace(path, model, batch=2, n_tokens=10)
    assert np.array_equal(cut.active, trace.batched(2).active[:10])
    with pytest.raises(TraceError, match="too few for batch"):
        open_trace(path, model, batch=9)
    with pytest.raises(TraceError, match="3 layers of 203 units"):
        open_trace(path, load_model("opt-125m"))
    with pytest.raises(SpecError):
        open_trace(path, model, n_tokens=0)
