"""Are noise, drift and two modes told apart on series of which the truth is known?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from simmem.cost.noise import TOO_NOISY, drift, judge, noise_floor, run_medians, two_modes
from simmem.spec.measurement import Measurement

Draw = Callable[[np.random.Generator, int], np.ndarray]


def measurement(samples: np.ndarray, runs: tuple[int, ...] = (), refused: str | None = None) -> Measurement:
    return Measurement(probe="p", conditions={}, bytes=1.0, samples_s=tuple(samples.tolist()), runs=runs,
                       at_s=tuple(np.arange(len(samples), dtype=float).tolist()), refused=refused)


def test_the_noise_floor_is_of_the_runs_and_not_of_their_samples() -> None:
    # Runs scatter by 20 % inside and not at all between: medians 10, 10, 10.
    assert noise_floor([8, 10, 12, 10, 8, 12, 12, 8, 10], runs=(3, 3, 3)) == 0.0
    # Medians 9, 10, 11: p10 and p90 are 9.2 and 10.8.
    assert noise_floor([9, 9, 10, 10, 11, 11], runs=(2, 2, 2)) == pytest.approx(0.8 / 10)
    # Fewer than three runs: the samples stand for themselves.
    assert noise_floor([9, 10, 11], runs=(1, 2)) == pytest.approx(0.8 / 10)
    medians, times = run_medians([1, 2, 3, 9], [0, 1, 2, 7], runs=(3, 1))
    assert (medians.tolist(), times.tolist()) == ([2, 9], [1, 7])


@given(st.integers(5, 30), st.integers(0, 2**32 - 1))
def test_the_test_for_drift_is_kendalls_and_the_slope_theil_sens(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    t, y = np.sort(rng.uniform(0, 100, n)), rng.uniform(1, 2, n)
    change, p = drift(y, t)
    assert p == pytest.approx(stats.kendalltau(t, y, method="exact").pvalue, rel=1e-6)
    assert change == pytest.approx(stats.theilslopes(y, t).slope * np.ptp(t) / np.median(y), rel=1e-9, abs=1e-12)


def test_drift_with_equal_values_is_scipys_too() -> None:
    y, t = np.array([1, 1, 2, 2, 3, 3, 3, 4, 4, 5.0]), np.arange(10.0)
    rising = sum(np.sign(b - a) for i, a in enumerate(y) for b in y[i + 1:])
    z = stats.norm.isf(stats.kendalltau(t, y, method="asymptotic").pvalue / 2)
    ours = stats.norm.isf(drift(y, t)[1] / 2)
    assert ours == pytest.approx(z * (rising - 1) / rising)  # Kendall's correction for continuity


def test_drift_is_found_where_it_is_and_hardly_elsewhere() -> None:
    rng = np.random.default_rng(1)
    runs = (10,) * 8
    trend = np.repeat(np.linspace(1.0, 1.3, 8), 10)
    found = [judge(measurement(trend * rng.normal(1, 0.02, 80), runs)).drifts for _ in range(100)]
    chance = [judge(measurement(rng.normal(1, 0.02, 80), runs)).drifts for _ in range(400)]
    assert np.mean(found) > 0.98
    assert np.mean(chance) < 0.08  # the test is one of 5 %


@pytest.mark.parametrize("draw", [
    lambda rng, n: rng.normal(1, 0.05, n), lambda rng, n: rng.uniform(0.5, 1.5, n),
    lambda rng, n: 1 + rng.exponential(0.3, n), lambda rng, n: rng.lognormal(0, 0.4, n),
    lambda rng, n: np.append(rng.normal(1, 0.02, n - 1), 5.0)],
    ids=["normal", "uniform", "exponential", "log-normal", "outlier"])
def test_one_mode_is_not_taken_for_two(draw: Draw) -> None:
    rng = np.random.default_rng(2)
    for n in (20, 60, 200):
        assert np.mean([two_modes(draw(rng, n)) is not None for _ in range(200)]) < 0.02, n


def test_two_modes_are_found_and_refuse_a_figure() -> None:
    rng = np.random.default_rng(3)
    for share in (0.3, 0.5, 0.7):
        slow = rng.random(80) < share
        samples = np.where(slow, 2.0, 1.0) * rng.normal(1, 0.03, 80)
        found = judge(measurement(samples, (10,) * 8))
        assert found.modes_s == pytest.approx((1.0, 2.0), rel=0.03)
        assert found.refused is not None and "two modes" in found.refused


def test_noise_and_probes_refuse() -> None:
    rng = np.random.default_rng(4)
    noisy = judge(measurement(rng.lognormal(0, 0.6, 60)))
    assert noisy.noise_floor > TOO_NOISY
    assert noisy.refused is not None and "too noisy" in noisy.refused
    assert judge(measurement(np.ones(9), refused="a page-cache hit")).refused == "a page-cache hit"
    assert judge(measurement(np.array([1.0, 1.0]))).refused == "2 samples are too few"
    quiet = judge(measurement(rng.normal(1, 0.02, 100), (20,) * 5))
    assert quiet.refused is None
    assert quiet.low_s < 0.98 < quiet.median_s < 1.02 < quiet.high_s
