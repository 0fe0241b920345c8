"""Do predictions stay within the stated tolerance of what was published, and are anchors kept apart?"""

from __future__ import annotations

from pathlib import Path

import pytest

from simmem.spec import library, load_device
from simmem.validation.reference import Reproduction, reproduce


@pytest.fixture(scope="module")
def flash() -> Reproduction:
    return reproduce(["llm-in-a-flash"])


def test_every_judged_row_is_within_its_tolerance(flash: Reproduction) -> None:
    assert [(r.id, r.error, r.message) for r in flash.failed] == []
    assert flash.summary.n >= 20
    assert flash.summary.mape is not None and flash.summary.mape < 0.05


def test_anchors_are_consistent_and_do_not_count(flash: Reproduction) -> None:
    anchors = [r for r in flash.rows if r.status == "anchor"]
    steps = ("naive", "hybrid", "predictor", "windowing", "bundling")
    assert {r.id for r in anchors} >= {f"table2-{step}-io" for step in steps}
    for row in anchors:
        assert row.error is not None and row.tolerance is not None
        assert abs(row.error) <= row.tolerance, row.id
    assert flash.summary.n == sum(r.expect == "judged" and r.interval is None for r in flash.rows)


def test_ladder_is_in_the_published_order(flash: Reproduction) -> None:
    ladder = [r.predicted for r in flash.rows if r.id.startswith("table2-") and r.id.endswith("-io")]
    assert ladder == sorted(ladder, reverse=True)


def test_every_fitted_figure_was_spent_on_anchors_only(flash: Reproduction) -> None:
    """A figure fitted to a row that also judges would be marking its own work."""
    rows = {r.id: r for r in flash.rows}
    for name in library.names("device"):
        device = load_device(name)
        figures = [*device.figures().values(),
                   *(f for e in device.engine.values() for f in (e.rate_share, e.flop_share) if f is not None)]
        for figure in figures:
            for spent in figure.spent:
                if not spent.startswith("llm-in-a-flash/"):
                    continue
                prefix = spent.removeprefix("llm-in-a-flash/")
                matching = [r for r in rows.values() if r.id == prefix or r.id.startswith(f"{prefix}-")]
                assert matching, f"{name}: {spent} names no row"
                assert all(r.expect == "anchor" for r in matching), f"{name}: {spent} is also judged"


ROW = """
[[row]]
id = "{id}"
system = "nobody"
device = "{device}"
model = "opt-125m"
policy = "{policy}"
knobs = {{ agent = "cpu" }}
workload = {{ weights = "fp16" }}
quantity = "{quantity}"
published = {published}
unit = "s"
tolerance = 0.1
expect = "{expect}"
reason = "a test"
source = "made up by a test"
"""
GOOD = {"id": "good", "device": "m1-max", "policy": "resident", "quantity": "predicted.token_latency_s",
        "published": 1.0, "expect": "anchor"}


def _file(folder: Path, *rows: dict[str, object]) -> Path:
    path = folder / "rows.toml"
    path.write_text('schema = "simmem.reference/1"\n' + "".join(ROW.format(**{**GOOD, **r}) for r in rows))
    return path


def test_statuses(tmp_path: Path) -> None:
    true = reproduce(files=[_file(tmp_path, {})]).rows[0].predicted
    assert true is not None
    document = reproduce(files=[_file(
        tmp_path, {"id": "pass", "published": true * 1.05, "expect": "judged"},
        {"id": "fail", "published": true * 2, "expect": "judged"},
        {"id": "xfail", "published": true * 2, "expect": "xfail"},
        {"id": "xpass", "published": true, "expect": "xfail"},
        {"id": "excluded", "expect": "excluded"},
        {"id": "unknown-device", "device": "nothing", "expect": "judged"},
        {"id": "unknown-quantity", "quantity": "predicted.nothing", "expect": "judged"},
        {"id": "Bad Id"},
    )])
    assert [r.status for r in document.rows] == [
        "pass", "fail", "xfail", "xpass", "excluded", "error", "error", "error"]
    assert len(document.failed) == 5
    assert document.summary.n == 2 and document.summary.max == pytest.approx(0.5)


OF_ROWS = """
[[row]]
id = "{id}"
system = "nobody"
quantity = {quantity}
published = 1.0
unit = "1"
tolerance = 10
source = "made up by a test"
"""


def test_ratio_and_mean_of_rows(tmp_path: Path) -> None:
    path = _file(tmp_path, {"id": "a"}, {"id": "b", "quantity": "predicted.first_token_s"})
    asked = {"c": '{ ratio = ["b", "a"] }', "d": '{ mean = ["a", "b"] }', "e": '{ mean = ["a", "z"] }',
             "f": '{ ratio = ["a", "b", "a"] }', "g": '{ mean = ["a", "b"], ratio = ["a", "b"] }'}
    path.write_text(path.read_text() + "".join(OF_ROWS.format(id=i, quantity=q) for i, q in asked.items()))
    a, b, c, d, *wrong = reproduce(files=[path]).rows
    assert a.predicted and b.predicted and c.predicted == pytest.approx(b.predicted / a.predicted)
    assert d.predicted == pytest.approx((a.predicted + b.predicted) / 2)
    form = "expected a path into the plan, { ratio = [two rows] } or { mean = [two or more] }"
    for row, message in zip(wrong, ("names the row 'z', which stands nowhere before it", form, form), strict=True):
        assert row.status == "error" and row.message is not None and message in row.message, row.message
