"""Do pictures for notebooks come of real plans, frames and records alone, with units, legible, whatever the names?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import simmem
from simmem import pictures
from simmem.errors import SpecError
from simmem.planner.document import Plan
from simmem.report.replay import replay_answer
from simmem.spec.library import data_folder, resolve
from simmem.validation.reference import reproduce
from tests.cli.test_plots import assert_legible

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")
RECORD = data_folder() / "validate" / "measured" / "epyc-2core-vm-runs" / "ladder" / "validate.json"
SMALL: dict[str, Any] = {"prompt": 16, "new_tokens": 4}
ROW = """[[row]]
id = "{}"
system = "S"
device = "iphone15"
model = "opt-125m"
policy = "resident"
workload = {{ prompt_tokens = 16, new_tokens = 4, weights = "int8" }}
budget = {{ dram = "{}" }}
quantity = "predicted.token_latency_s"
published = {}
unit = "s"
tolerance = 0.3
source = "made up for a test"
{}
"""
ROWS = 'schema = "simmem.reference/1"\n' + "".join(ROW.format(*row) for row in (
    ("near", "300 MB", 0.01, ""), ("an-anchor", "300 MB", 0.006, 'expect = "anchor"\nreason = "a test"'),
    ("nowhere", "1 MB", 0.01, ""), ("inside", "300 MB", 0.0055, 'interval = "predicted.token_latency_interval_s"')))
UNITS = {"s": {"s", "ms", "µs"}, "bytes": {"kB", "MB", "GB"}, "ratio": {"%"}, "rate": {"tokens/s"}, "times": {"×"},
         "flop": {"GFLOP/s", "TFLOP/s"}, "intensity": {"FLOP/B"}}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan on a device whose name is as awkward as may be."""
    folder = tmp_path_factory.mktemp("a $strange$ _name_ of a folder that goes on and on")
    shutil.copy(resolve("device", "iphone15"), folder / "d.toml")
    return simmem.plan(str(folder / "d.toml"), "opt-125m", dram="100 MB", weights="int4", policy="flash-window",
                       **SMALL)


@pytest.fixture(scope="module")
def frame() -> Any:
    return simmem.sweep(["iphone15", "rtx4090-pc"], "opt-125m", dram=["1 MB", "80 MB", "300 MB"],
                        weights=["int8", "int4"], policy="stream", **SMALL)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    from matplotlib import pyplot

    yield
    pyplot.close("all")


def units(axes: Any) -> tuple[str, str]:
    """What stands in the brackets of the labels of x and y; "" where there is no label, for rows with names."""
    return tuple(label.partition("[")[2].partition("]")[0] for label in  # type: ignore[return-value]
                 (axes.get_xlabel(), axes.get_ylabel()))


@pytest.mark.parametrize(("draw", "across", "up"), [
    (pictures.timeline, "s", None), (lambda plan: pictures.timeline(plan, close_up=True), "s", None),
    (pictures.pareto_front, "bytes", "s"), (pictures.roofline, "intensity", "flop"),
    (pictures.sensitivity, "ratio", None), (pictures.residency, "bytes", None),
    (lambda plan: pictures.residency({"one": plan, "another": plan}), "bytes", None)])
def test_a_plan_is_drawn_with_units_and_legible(planned: Plan, draw: Callable[[Plan], Any], across: str,
                                                up: str | None) -> None:
    axes = draw(planned)
    x, y = units(axes)
    assert x in UNITS[across] and (y in UNITS[up] if up else y == "" and len(axes.get_yticklabels()) > 0)
    assert axes.get_title(loc="left")
    assert_legible(axes.get_figure())


@pytest.mark.parametrize(("value", "unit"), [("token_latency_s", "s"), ("decode_tokens_per_s", "rate"),
                                             ("storage_bytes_per_token", "bytes")])
def test_a_frame_is_drawn_with_units_and_legible(frame: Any, value: str, unit: str) -> None:
    assert set(frame.status) == {"ok", "infeasible"}
    axes = pictures.by_budget(frame, value)
    x, y = units(axes)
    assert x in UNITS["bytes"] and y in UNITS[unit]
    series = {"iphone15, int8", "iphone15, int4", "rtx4090-pc, int8", "rtx4090-pc, int4"}
    assert {text.get_text() for text in axes.get_legend().get_texts()} == series
    assert_legible(axes.get_figure())
    axes = pictures.devices(frame[frame.dram_bytes == 1e6 if unit == "rate" else frame.dram_bytes == 80e6], value)
    assert units(axes)[0] in UNITS[unit]
    assert {label.get_text() for label in axes.get_yticklabels()} == {"iphone15", "rtx4090-pc"}
    assert_legible(axes.get_figure())


def test_devices_without_that_memory_are_left_out(frame: Any) -> None:
    assert frame.device[0] == "iphone15" and frame.vram_bytes.isna()[0]  # its memory is shared
    axes = pictures.by_budget(frame, budget="vram_bytes")
    (budget,) = frame.vram_bytes.dropna().unique()
    assert axes.get_xlim() == (0.0, pytest.approx(1.04 * budget)) and "rtx4090-pc" in axes.get_title(loc="left")


def test_curves_rows_and_runs_are_drawn_with_units_and_legible(tmp_path: Path) -> None:
    axes = pictures.miss_ratio(replay_answer("moe-8x3m-router", policies=["lru", "window", "belady"]))
    assert units(axes) == ("MB", "%")
    assert_legible(axes.get_figure())
    axes = pictures.predicted_and_measured(RECORD)
    assert units(axes) == ("s", "s") and axes.get_xscale() == axes.get_yscale() == "log"
    rows = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    assert len(axes.containers) == len(rows)  # every row is there, the ones that miss too
    assert_legible(axes.get_figure())
    (tmp_path / "rows.toml").write_text(ROWS, encoding="utf-8")
    document = reproduce(files=[tmp_path / "rows.toml"])
    axes = pictures.published(document)
    assert units(axes)[0] in UNITS["times"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["near", "an-anchor", "inside"]  # one fits nowhere
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        "passes", "fails", "anchor: a figure was taken from it"}
    assert_legible(axes.get_figure())


def test_axes_that_are_given_are_drawn_into(planned: Plan) -> None:
    from matplotlib import pyplot

    before = dict(pyplot.rcParams)
    _, (left, _) = pyplot.subplots(1, 2)
    assert pictures.sensitivity(planned, ax=left) is left
    assert len(pyplot.get_fignums()) == 1 and dict(pyplot.rcParams) == before


def test_what_cannot_be_drawn_is_one_clear_line(planned: Plan, frame: Any, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("{}")
    for draw, says in (
            (lambda: pictures.sensitivity(planned.model_copy(update={"sensitivity": []})), "no sensitivities"),
            (lambda: pictures.by_budget(frame, "latency"), "expected one of token_latency_s"),
            (lambda: pictures.by_budget(frame.drop(columns="dram_bytes")), "no column 'dram_bytes'"),
            (lambda: pictures.by_budget(frame[frame.device == "iphone15"], budget="vram_bytes"), "and 'vram_bytes'"),
            (lambda: pictures.devices(frame[frame.status == "infeasible"]), "no row has a figure"),
            (lambda: pictures.predicted_and_measured(tmp_path / "r.json"), "no rows of plans that were run"),
            (lambda: pictures.residency({}), "found no plan")):
        with pytest.raises(SpecError) as raised:
            draw()
        assert says in str(raised.value) and "\n" not in str(raised.value)
