"""Does a fitted cost model find what made the times, know how far it is off, and say when it is asked too much?"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simmem.cost.check import check_cost_model
from simmem.cost.conformal import conformal_quantile, fit_interval
from simmem.cost.features import Work, feature
from simmem.cost.fitted import correction, half_width, octaves_outside, product_s
from simmem.cost.regression import fit_cost_model, load_cost_model
from simmem.cost.residual import fit_residual, is_monotone
from simmem.cost.roofline import durations
from simmem.errors import CalibrationError, SpecError
from simmem.spec.costmodel import FittedCost, Group, Term
from simmem.spec.device import load_device
from simmem.spec.measurement import Measurement, Measurements
from simmem.validation.costs import judge_costs
from tests.unit.fuzzing import mutate_bytes, mutate_json

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}


def measured(points: list[Measurement], **machine: Any) -> Measurements:
    return Measurements(name="made-up", date="2026-01-01", machine=machine, versions={}, mode="full",
                        points=tuple(points))


def point(rows: int, cols: int, batch: int, seconds: float, *, dtype: str = "fp32", agent: str = "cpu",
          samples: int = 5, noise: float = 0.0, rng: np.random.Generator | None = None, **more: Any) -> Measurement:
    width = WIDTH[dtype]
    scatter = np.exp(rng.normal(0, noise, samples)) if rng is not None else np.ones(samples)
    return Measurement(
        probe="gemv" if batch == 1 else "gemm",
        conditions={"agent": agent, "rows": rows, "cols": cols, "batch": batch, "dtype": dtype, "threads": 1,
                    "level": "dram"},
        flop=2.0 * rows * cols * batch, bytes=float(width * (rows * cols + batch * (rows + cols))), requests=1.0,
        samples_s=tuple(seconds * scatter), **more)


def shapes(n: int, seed: int = 0) -> list[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    sides = 64 * np.round(np.exp(rng.uniform(math.log(256), math.log(12_000), (4 * n, 2))) / 64).astype(int)
    return [(int(r), int(c)) for r, c in sides if r * c < 3e7][:n]


def gemv_s(rows: int, cols: int) -> float:
    return 5e-6 + rows * cols * 4 / 20e9 + 80e-9 * rows


def gemm_s(rows: int, cols: int, batch: int) -> float:
    """Waits for its weights and then computes in blocks of eight tokens."""
    return 4e-6 + rows * cols * 4 / 10e9 + 2 * rows * cols * 8 * math.ceil(batch / 8) / 90e9


def gpu_s(rows: int, cols: int, batch: int, units: int = 100) -> float:
    """Reads while it computes 128 × 128 tiles, wave by wave."""
    waves = math.ceil(math.ceil(batch / 128) * math.ceil(rows / 128) / units)
    arithmetic = waves * units * 2 * 128 * 128 * cols / 600e12
    return 3e-6 + (arithmetic**4 + (rows * cols * 2 / 3e12) ** 4) ** 0.25


def group_of(model: FittedCost, kind: str) -> Group:
    return next(g for g in model.groups if g.kind == kind)


def work_of(rows: Any, cols: Any, batch: Any, group: Group) -> Work:
    rows, cols, batch = (np.asarray(a, dtype=float) for a in (rows, cols, batch))
    return Work(1.0, 1.0, batch, rows, cols, rows * cols * group.bytes_per_param, 2 * batch * rows * cols,
                group.bytes_per_param, group.units)


@pytest.fixture(scope="module")
def noisy() -> Measurements:
    """Products with a dependence on their shape that no feature has, and 3 % of scatter from shape to shape."""
    rng = np.random.default_rng(1)
    found = []
    for rows, cols in shapes(240):
        for batch in (1, int(2 ** rng.uniform(1, 9))):
            seconds = gemv_s(rows, cols) if batch == 1 else gemm_s(rows, cols, batch)
            bump = 0.15 * math.sin(math.log2(rows)) + 0.1 * math.cos(math.log2(cols))
            found.append(point(rows, cols, batch, seconds * math.exp(bump + rng.normal(0, 0.03)), noise=0.01, rng=rng))
    return measured(found)


@pytest.fixture(scope="module")
def fitted(noisy: Measurements) -> FittedCost:
    return fit_cost_model(noisy)


# --------------------------------------------------------------------------------------------------------- recovery


def test_coefficients_that_made_the_times_are_found() -> None:
    group = group_of(fit_cost_model(measured([point(r, c, 1, gemv_s(r, c)) for r, c in shapes(60)])), "gemv")
    found = {t.feature: t.coefficient for t in group.terms}
    assert group.residual is None  # nothing left to correct
    assert found == pytest.approx({"launches": 5e-6, "weights": 1 / 20e9, "rows": 80e-9}, rel=1e-6)
    assert product_s(group, work_of(3000, 5000, 1, group)) == pytest.approx(gemv_s(3000, 5000), rel=1e-6)


def test_blocks_of_tokens_are_found() -> None:
    rng = np.random.default_rng(2)
    points = [point(r, c, b, gemm_s(r, c, b)) for r, c in shapes(120) for b in [int(2 ** rng.uniform(1, 8))]]
    group = group_of(fit_cost_model(measured(points)), "gemm")
    for batch in (2, 8, 9, 63, 65):
        assert product_s(group, work_of(3000, 2000, batch, group)) == pytest.approx(gemm_s(3000, 2000, batch), rel=0.01)


def test_a_gpu_overlaps_memory_with_waves_of_tiles() -> None:
    rng = np.random.default_rng(3)
    points = [point(r, c, b, gpu_s(r, c, b) * math.exp(rng.normal(0, 0.02)), dtype="fp16", agent="cuda")
              for r, c in shapes(300, seed=4) for b in [int(2 ** rng.uniform(1, 10))]]
    data = measured(points, gpu_sms=100)
    group = group_of(fit_cost_model(data), "gemm")
    assert (group.agent, group.units) == ("gpu", 100)
    assert group.overlap > 1
    report = judge_costs(data).all_products
    assert report.n > 100
    assert report.mape < 0.08 < report.roofline_mape / 3


def test_features_by_hand() -> None:
    one = Work(launches=6.0, count=2.0, batch=5.0, rows=300.0, cols=64.0, weight_bytes=2 * 300 * 64 * 4.0,
               flop=2 * 2 * 5 * 300 * 64.0, bytes_per_param=4.0)
    on_gpu = Work(6.0, 2.0, 5.0, 300.0, 64.0, 2 * 300 * 64 * 4.0, 2 * 2 * 5 * 300 * 64.0, 4.0, units=7)

    def amount(name: str, work: Work = one, **of: Any) -> float:
        return float(feature(Term.model_validate({"feature": name, "coefficient": 0, **of}), work))

    assert amount("launches") == 6
    assert amount("weights") == 153_600
    assert amount("activations") == 2 * 5 * 364 * 4
    assert amount("rows") == 600
    assert amount("row_starts") == 600 * 16
    assert amount("far_weights", above_bytes=70_000.0) == 2 * (76_800 - 70_000)
    assert amount("far_flop", above_bytes=70_000.0) == 2 * 5 * 6800 / 2
    assert amount("passes", tile=(4, 1)) == 2 * 153_600  # 4 and 1
    assert amount("tiles", tile=(4, 1)) == 2 * 2 * 64 * 300 * 8
    # Ten tiles of 8 by 32 are two waves of seven.
    assert amount("tiles", on_gpu, tile=(8, 32)) == 2 * 2 * 64 * 8 * 32 * 14
    assert amount("fit_tiles", on_gpu, tile=(128, 32)) == 2 * 2 * 64 * 16 * 32 * 14


def test_what_is_refused_or_too_little_is_not_fitted() -> None:
    sound = [point(r, c, 1, gemv_s(r, c)) for r, c in shapes(40)]
    wrong = [point(r, c, 1, 9.0, refused="a page-cache hit") for r, c in shapes(20, seed=8)]
    few = [point(r, c, 4, gemm_s(r, c, 4)) for r, c in shapes(5)]
    model = fit_cost_model(measured(sound + wrong + few))
    assert [(g.kind, g.n_points) for g in model.groups] == [("gemv", 40)]
    assert model.left_out == {"gemm fp32 cpu dram 1 threads": "5 points of 5 shapes; a fit needs 16 and 8"}
    with pytest.raises(CalibrationError, match="no kind of op has enough measurements"):
        fit_cost_model(measured(few))


def test_a_kind_too_noisy_to_fit_takes_no_other_with_it() -> None:
    rng = np.random.default_rng(9)
    sound = [point(r, c, 1, gemv_s(r, c)) for r, c in shapes(40)]
    wild = [point(r, c, 1, gemv_s(r, c) * math.exp(rng.normal(0, 12))) for r, c in shapes(40)]
    wild = [p.model_copy(update={"conditions": {**p.conditions, "threads": 2}}) for p in wild]
    data = measured(sound + wild).model_copy(update={"date": "today\x1b[2J"})
    model = fit_cost_model(data)
    assert [(g.kind, g.threads) for g in model.groups] == [("gemv", 1)]
    (why,) = model.left_out.values()
    assert "too noisy" in why
    assert FittedCost.model_validate_json(model.to_json()) == model
    with pytest.raises(CalibrationError, match="too noisy"):
        fit_cost_model(measured(wild))


@pytest.mark.parametrize(("change", "says"), [
    ({"threads": "two"}, "threads"), ({"batch": 0}, "batch"), ({"rows": 10**30}, "rows"), ({"batch": None}, "batch")])
def test_products_that_do_not_say_what_they_are_are_refused(change: dict[str, Any], says: str) -> None:
    one = point(64, 64, 4, 1e-3)
    conditions = {k: v for k, v in {**one.conditions, **change}.items() if v is not None}
    with pytest.raises(SpecError, match=says):
        fit_cost_model(measured([one.model_copy(update={"conditions": conditions})]))


# ------------------------------------------------------------------------------------------------------- correction


def test_a_correction_is_kept_where_it_foretells_held_out_shapes(fitted: FittedCost) -> None:
    for group in fitted.groups:
        assert group.residual is not None
        assert group.chosen.median < 0.95 * group.physical.median < group.roofline.median


def test_numpy_evaluates_what_scikit_learn_fitted() -> None:
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import SplineTransformer

    rng = np.random.default_rng(5)
    axes = {"rows": 2 ** rng.uniform(6, 14, 200), "cols": 2 ** rng.uniform(6, 14, 200),
            "batch": 2 ** rng.uniform(1, 10, 200)}
    y = 0.1 * np.sin(np.log2(axes["rows"])) + 0.002 * np.log2(axes["batch"]) * np.log2(axes["cols"])
    found = fit_residual(y, axes, np.ones(200), 0.1)
    assert found is not None
    x = [np.log2(a)[:, None] for a in axes.values()]
    splines = [SplineTransformer(n_knots=4, degree=2, extrapolation="constant").fit(a) for a in x]

    def design(columns: list[np.ndarray]) -> np.ndarray:
        b = [np.asarray(s.transform(c)) for s, c in zip(splines, columns, strict=True)]
        pairs = [np.einsum("ni,nj->nij", b[i], b[j]).reshape(len(b[0]), -1) for i, j in ((0, 1), (0, 2), (1, 2))]
        return np.concatenate(b + pairs, axis=1)

    ridge = Ridge(alpha=0.1).fit(design(x), y)
    inside, outside = (2 ** np.linspace(low, high, 50) for low, high in ((2, 12), (8, 18)))
    for rows in (inside, outside):
        at = Work(1.0, 1.0, np.full(50, 37.0), rows, np.full(50, 900.0), 1.0, 1.0, 4.0)
        expected = ridge.predict(design([np.log2(v)[:, None] for v in (rows, np.full(50, 900.0), np.full(50, 37.0))]))
        assert correction(found, at) == pytest.approx(expected, abs=1e-12)


def test_a_correction_under_which_more_takes_less_time_is_refused(fitted: FittedCost) -> None:
    group = group_of(fitted, "gemv")
    assert is_monotone(group)
    assert group.residual is not None
    spline = group.residual.splines[0]
    falling = spline.model_copy(update={"coefficients": tuple(np.linspace(5, -5, len(spline.coefficients)))})
    steep = group.residual.model_copy(update={"splines": (falling,), "pairs": ()})
    assert not is_monotone(group.model_copy(update={"residual": steep}))


# -------------------------------------------------------------------------------------------------------- intervals


def test_the_quantile_counts_the_point_to_come() -> None:
    assert conformal_quantile(np.arange(1.0, 20.0)) == 18  # ⌈20 · 0.9⌉
    assert conformal_quantile(np.arange(1.0, 10.0)) == 9
    assert conformal_quantile(np.array([3.0, 1.0])) == 3  # too few for 90 %: the largest


def test_intervals_hold_and_are_wider_where_it_is_harder() -> None:
    """Coverage of a conformal interval is Beta(k, n + 1 − k): for 400 points, 0.9 with a deviation of 0.015."""
    rng = np.random.default_rng(6)
    covered, widths = [], []
    for _ in range(10):
        n = 400
        axes = {"rows": 2 ** rng.uniform(8, 14, n), "cols": 2 ** rng.uniform(8, 14, n), "batch": np.ones(n)}
        interval = fit_interval(np.abs(rng.normal(0, 160 / axes["rows"] ** 0.9)), axes, rng.integers(0, 10, n))
        rows = 2 ** rng.uniform(8, 14, 4000)
        group = _bare(interval=interval, range={"rows": (256, 16384), "cols": (256, 16384), "batch": (1, 1)})
        half = half_width(group, work_of(rows, np.full(4000, 1024.0), 1, group))
        error = np.abs(rng.normal(0, 160 / rows**0.9))
        covered.append((error <= half).mean())
        widths.append(half[rows < 1000].mean() / half[rows > 8000].mean())
        assert abs(covered[-1] - 0.9) < 4 * 0.016
    assert abs(np.mean(covered) - 0.9) < 0.02
    assert min(widths) > 2


def _bare(**changed: Any) -> Group:
    errors = {"median": 0.1, "p90": 0.2}
    return Group.model_validate({
        "kind": "gemv", "dtype": "fp32", "agent": "cpu", "level": "dram", "threads": 1, "bytes_per_param": 4.0,
        "bytes_per_s": 30e9, "flop_per_s": 1e12, "terms": [{"feature": "weights", "coefficient": 1e-10}],
        "overlap": 1.0, "residual": None, "range": {"rows": (100, 1000), "cols": (100, 1000), "batch": (1, 1)},
        "interval": {"quantile": 2.0, "intercept": math.log(0.05), "slopes": {}, "bounds": (0.01, 1.0), "n": 9},
        "n_points": 9, "n_shapes": 9, "roofline": errors, "physical": errors, "chosen": errors, **changed})


@pytest.mark.parametrize(("rows", "cols", "batch", "octaves"), [
    (1000, 100, 1, 0), (4000, 500, 1, 2), (50, 2000, 1, 2), (500, 500, 8, 3)])
def test_outside_the_range_the_interval_grows_with_every_doubling(rows: int, cols: int, batch: int, octaves: int
                                                                  ) -> None:
    group = _bare()
    work = work_of(rows, cols, batch, group)
    assert octaves_outside(group, work) == pytest.approx(octaves)
    assert half_width(group, work) == pytest.approx(0.1 * (1 + octaves))


def test_the_judge_on_shapes_it_kept_aside(noisy: Measurements) -> None:
    report = judge_costs(noisy)
    assert report == judge_costs(noisy)
    every = report.all_products
    assert every.n == sum(r.n for r in report.rows) > 100
    assert every.median < 0.04 < every.roofline_median  # 2 % is the median of 3 % of scatter
    # A model that was fitted once covers 90 % give or take its own sample and the judge's.
    assert 0.8 < every.coverage < 0.98
    assert json.loads(report.model_dump_json(by_alias=True))["schema"] == "simmem.costs/1"
    assert len(report.table()) == len(report.rows) + 2


# -------------------------------------------------------------------------------------------------------- contracts


def test_it_behaves_like_physics(fitted: FittedCost) -> None:
    check_cost_model(durations, load_device("cloud-vm").model_copy(update={"cost_model": fitted}))


def test_reading_gives_back_every_bit(fitted: FittedCost, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(fitted.to_json())
    assert load_cost_model(path) == fitted


HOSTILE = {
    "not JSON": ("{", "not valid JSON"),
    "not a number": ('{"schema": NaN}', "NaN is not a number"),
    "a key twice": ('{"schema": 1, "schema": 1}', "twice"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "long": (" " * (1 << 20) + "{}", "longer than"),
    "a list": ("[]", "expected an object"),
    "no text": (b"\xff\xfe{}", "not UTF-8"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_model_is_refused(what: str, tmp_path: Path) -> None:
    text, says = HOSTILE[what]
    path = tmp_path / "model.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpecError, match=says):
        load_cost_model(path)


CHANGES: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "a negative coefficient": (("groups", 0, "terms", 0, "coefficient"), -1e-9, "greater than or equal to 0"),
    "an unknown key": (("groups", 0, "code"), "print()", "not a key that is known"),
    "an infinite rate": (("groups", 0, "bytes_per_s"), 1e400, "Infinity is not|finite"),
    "an unknown feature": (("groups", 0, "terms", 0, "feature"), "eval", "Input should be"),
    "escapes": (("groups", 0, "kind"), "\x1b[2J", "pattern"),
    "too many groups": (("groups",), [], "at least 1"),
    "knots out of order": (("groups", 0, "residual", "splines", 0, "knots"), [4.0] * 9, "ascend"),
    "a pair of one spline": (("groups", 0, "residual", "pairs", 0, "second"), 0, "two of the splines"),
    "an upside-down range": (("groups", 0, "range", "rows"), [9.0, 1.0], "smaller end"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_model_that_cannot_be_is_refused(what: str, fitted: FittedCost, tmp_path: Path) -> None:
    place, value, says = CHANGES[what]
    data = json.loads(fitted.to_json())
    here = data
    for key in place[:-1]:
        here = here[key]
    here[place[-1]] = value
    path = tmp_path / "model.json"
    path.write_text(json.dumps(data))
    with pytest.raises(SpecError, match=says):
        load_cost_model(path)


def test_mangled_models_end_in_one_error(fitted: FittedCost, tmp_path: Path) -> None:
    text, path = fitted.to_json(), tmp_path / "model.json"
    refused = 0
    for seed in range(300):
        rng = random.Random(seed)
        path.write_bytes(mutate_bytes(text.encode(), rng) if seed % 2 else
                         json.dumps(mutate_json(json.loads(text), rng)).encode())
        try:
            load_cost_model(path)
        except SpecError:
            refused += 1
    assert refused > 100
