"""Does the verdict say what its docstring says? Rows made by hand, whose ranking, regret and coverage are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import kendalltau

from simmem.validation.runs import Measured, Moved, PhaseTime
from simmem.validation.verdict import LadderRow, judge, kendall_tau, regret, step_ratios, summary_of


def row(predicted: float, measured: float, *, noise: float = 0.01, cell: str = "a", chosen: bool = False,
        status: str = "pass", storage: str = "real", why: str = "", half_width: float = 0.1,
        moved: tuple[float, float] = (4096.0, 4096.0)) -> LadderRow:
    return LadderRow.model_validate({
        "id": f"{cell}/{predicted:g}-{measured:g}", "model": "m", "device": "d", "storage": storage, "policy": "stream",
        "knobs": {}, "predicted_s": predicted,
        "interval_s": (predicted * (1 - half_width), predicted * (1 + half_width)),
        "measured_s": Measured(median=measured, p10=measured, p90=measured, n=9), "noise_floor": noise,
        "error": predicted / measured - 1, "bytes": Moved(predicted=moved[0], measured=moved[1]), "phases": [],
        "status": status, "why": why, "tokens": 3, "repeats": 3, "weights": "fp32", "trace": None, "exact": None,
        "conditions": {}, "cell": cell, "budget_share": 0.5, "chosen": chosen})


def test_tau_is_scipys_where_no_pair_is_within_the_noise() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        measured = rng.permutation(9) + 1.0
        predicted = rng.integers(1, 6, 9).astype(float)  # with ties
        expected = kendalltau(predicted, measured).statistic
        found = kendall_tau([[row(p, m, noise=0.0) for p, m in zip(predicted, measured, strict=True)]])
        assert found == pytest.approx(expected, abs=1e-12)


def test_tau_leaves_out_what_the_noise_cannot_tell_apart() -> None:
    apart = [row(1.0, 1.0), row(2.0, 2.0)]
    near = [row(4.0, 3.0, noise=0.05), row(3.0, 3.2, noise=0.02)]  # 0.2 apart, 0.214 of noise, in the wrong order
    assert kendall_tau([apart + near]) == 1.0
    assert kendall_tau([near]) is None
    wrong = [row(4.0, 3.0, noise=0.04), row(3.0, 3.2, noise=0.02)]  # 0.184 of noise
    assert kendall_tau([wrong]) == -1.0
    assert kendall_tau([apart, wrong]) == 0.0, "pairs are within cells: one right, one wrong"
    assert kendall_tau([apart + wrong]) == pytest.approx(4 / 6), "five of six pairs right"
    assert kendall_tau([[row(1.0, 1.0), row(1.0, 2.0)]]) == 0.0, "all predicted alike: nothing ranked"


def test_regret() -> None:
    cell = [row(1.0, 1.1, chosen=True), row(1.2, 1.0), row(0.5, 0.5, status="inconclusive")]
    assert regret(cell) == pytest.approx(0.1)
    assert regret(cell[1:]) is None, "nothing was chosen"
    assert regret([row(1.0, 1.0, chosen=True, status="inconclusive"), row(1.0, 2.0)]) is None
    other = [row(1.0, 1.25, cell="b", chosen=True), row(2.0, 1.0, cell="b")]
    assert summary_of(cell + other).regret == pytest.approx(0.25), "the largest counts"


def test_summary() -> None:
    rows = [row(1.0, 1.0), row(1.0, 1.25), row(3.0, 2.0, half_width=0.4), row(9.0, 1.0, status="inconclusive")]
    found = summary_of(rows)
    assert (found.n, found.conclusive_share) == (3, 0.75)
    assert found.mape == pytest.approx((0.0 + 0.2 + 0.5) / 3)
    assert found.p90_error == pytest.approx(0.2 + 0.8 * 0.3)
    assert found.coverage == pytest.approx(2 / 3)
    empty = summary_of([])
    assert (empty.n, empty.mape, empty.kendall_tau, empty.regret, empty.coverage) == (0, None, None, None, None)


def gates(rows: list[LadderRow]) -> dict[str, str]:
    return {g.name: g.status for g in judge(rows)[3]}


def test_gates() -> None:
    good = [row(float(n), float(n) * 1.02, chosen=n == 1) for n in range(1, 11)]
    assert set(gates(good).values()) == {"pass"}
    assert gates([*good, row(1.0, 9.0)])["Kendall tau-b"] == "fail"
    assert gates([*good, row(1.0, 0.9)])["regret"] == "fail"
    assert gates([row(1.13, 1.0)])["MAPE, real storage"] == "fail"
    found = gates([row(1.09, 1.0, storage="emulated")])
    assert (found["MAPE, emulated storage"], found["p90 of |error|, emulated storage"]) == ("fail", "pass")
    assert found["regret"] == found["Kendall tau-b"] == "unknown", "one row ranks nothing and was not chosen"
    assert gates([row(1.0, 1.3) for _ in range(3)])["coverage of 90 % intervals, real storage"] == "fail"


def test_intervals_that_hold_everything_fail_only_where_chance_would_not_do_it() -> None:
    few, many = [row(1.0, 1.0)] * 33, [row(1.0, 1.0)] * 34
    assert gates(few)["coverage of 90 % intervals, real storage"] == "pass"
    assert gates(many)["coverage of 90 % intervals, real storage"] == "fail"
    assert math.ceil(1 / (1 - 0.97)) == len(many)


def test_bytes_have_no_tolerance() -> None:
    name = "rows that moved exactly the planned bytes"
    assert gates([row(1.0, 1.0), row(1.0, 1.0, moved=(4096.0, 4097.0))])[name] == "fail"
    same_mean = row(1.0, 1.0, status="fail", why="a token moved other bytes than the plan says")
    assert gates([same_mean])[name] == "fail"


def test_steps_are_told_as_shares_of_naive_loading() -> None:
    def step(name: str, predicted: float, measured: float, model: str, status: str = "pass") -> LadderRow:
        reading = PhaseTime(name="flash", predicted_s=predicted, measured_s=measured)
        return row(1.0, 1.0, status=status).model_copy(
            update={"id": f"a/{name}", "phases": [reading], "model": model})

    for model, published in (("opt-6.7b", 0.087 / 2.196), ("opt-1.3b", None)):
        naive = step("naive", 2.0, 4.0, model).model_copy(update={"conditions": {"rate_over_plain_batches": 0.5}})
        rows = [naive, step("bundled", 0.5, 0.8, model), step("merged", 0.1, 0.1, model)]
        (found,) = step_ratios(rows)
        assert (found.step, found.predicted, found.published, found.conclusive) == ("bundled", 0.25, published, True)
        assert (found.measured, found.error) == (pytest.approx(0.2), pytest.approx(0.25))
        assert gates(rows)["storage rate of naive loading over that of plain batches"] == "fail", "half of it"
        gate = gates(rows).get("largest error of a published step's I/O ratio")
        assert gate == (None if published is None else "fail")
    noisy = [step("naive", 2.0, 4.0, "opt-6.7b", "inconclusive"), step("bundled", 0.5, 0.8, "opt-6.7b")]
    assert not step_ratios(noisy)[0].conclusive
    assert "largest error of a published step's I/O ratio" not in gates(noisy)
