"""Is a row of `simmem.sweep` the plan that its arguments ask for, and is a wrong argument one clear line?"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import simmem
from simmem.errors import MachineError, SimmemError, SpecError
from simmem.planner.grid.frame import COLUMNS
from simmem.spec.library import resolve

pandas = pytest.importorskip("pandas")
SMALL: dict[str, Any] = {"prompt": 16, "new_tokens": 4}


def test_each_row_is_the_plan_of_its_arguments() -> None:
    frame = simmem.sweep(["iphone15", "rtx4090-pc"], "opt-125m", dram=["100 MB", np.int64(10)],
                         weights=["int8", None], policy=["any", {"policy": "stream", "knobs": {"agent": "gpu"}}],
                         **SMALL)
    assert list(frame.columns) == list(COLUMNS)
    assert {name: str(kind) for name, kind in frame.dtypes.items()} == COLUMNS
    assert len(frame) == 2 * 2 * 2 * 2
    # the order of the arguments, the first changing slowest
    assert frame.device.tolist() == ["iphone15"] * 8 + ["rtx4090-pc"] * 8
    assert frame.dram_bytes.tolist() == 2 * [size for size in (100e6, 10.0) for _ in range(4)]
    assert set(frame.status) == {"ok", "infeasible"}
    for row in frame.itertuples():
        asked = {"dram": row.dram_bytes, "weights": None if pandas.isna(row.asked_weights) else row.asked_weights,
                 "policy": None if row.asked_policy == "any" else row.asked_policy,
                 "knobs": json.loads(row.asked_knobs), **SMALL}
        if row.status == "infeasible":
            assert row.dram_bytes == 10 and pandas.isna(row.policy) and math.isnan(row.token_latency_s)
            with pytest.raises(SimmemError) as raised:
                simmem.plan(row.device, row.model, **asked)
            assert (row.reason, row.missing_tier, row.missing_bytes) == (
                raised.value.message, raised.value.tier, raised.value.missing_bytes)
            continue
        plan = simmem.plan(row.device, row.model, **asked)
        p = plan.predicted
        assert (row.policy, json.loads(row.knobs), row.weights, row.batch) == (
            plan.policy.name, plan.policy.knobs, plan.workload.label, plan.workload.batch)
        assert (row.token_latency_s, (row.token_latency_low_s, row.token_latency_high_s), row.first_token_s,
                row.tokens_per_s, row.bound_s, row.bound_resource, row.weakest_kind) == (
            p.token_latency_s, p.token_latency_interval_s, p.first_token_s, p.tokens_per_s,
            plan.bound.token_latency_s, plan.bound.resource, plan.evidence.weakest_kind)
        assert row.storage_bytes_per_token + row.copied_bytes_per_token == pytest.approx(
            sum(p.bytes_per_token.values()), rel=1e-12)
        parts = [getattr(row, f"{part}_s") for part in ("io", "transfer", "memory", "compute", "predictor", "sync",
                                                        "draft", "wait")]
        assert sum(parts) == pytest.approx(row.token_latency_s, rel=1e-9)
        assert math.isnan(row.vram_bytes) == (row.device == "iphone15")


def test_drafts_are_planned_as_plan_does() -> None:
    asked: dict[str, Any] = {"weights": "fp16", "draft": "opt-125m", "acceptance": 0.7, "policy": "resident", **SMALL}
    held, searched = simmem.sweep("h100-sxm", "opt-350m", knobs=[{"draft_length": 2}, {}], **asked).itertuples()
    for row, knobs in ((held, {"draft_length": 2}), (searched, None)):
        plan = simmem.plan("h100-sxm", "opt-350m", knobs=knobs, **asked)
        assert (row.token_latency_s, row.draft_length, row.acceptance) == (
            plan.predicted.token_latency_s, plan.workload.draft_length, 0.7)


def test_files_are_read_again_and_found_from_the_folder_at_hand(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = Path("phone.toml")
    shutil.copy(resolve("device", "iphone15"), mine)
    asked: dict[str, Any] = {"weights": "int8", "policy": "stream", "dram": "100 MB", **SMALL}
    before = simmem.sweep("phone.toml", "opt-125m", **asked).token_latency_s[0]
    mine.write_text(mine.read_text(encoding="utf-8").replace('"1.53 GB/s"', '"1.3 GB/s"'), encoding="utf-8")
    assert simmem.sweep("phone.toml", "opt-125m", **asked).token_latency_s[0] > before


@pytest.mark.parametrize(("asked", "kind", "says"), [
    ({"model": ["opt-125m", "opt-125"]}, SpecError, "did you mean opt-125m"),
    ({"dram": ["100 MB", "7"]}, SpecError, "no unit"),
    ({"weights": []}, SpecError, "weights: is an empty list"),
    ({"weights": ["int8", "int8"]}, SpecError, "stands twice"),
    ({"policy": "streem"}, SpecError, "did you mean stream"),
    ({"policy": {"policy": "stream", "knob": {}}}, SpecError, "did you mean knobs"),
    *(({"knobs": {"agent": "gpu"}, "policy": every}, SpecError, "knobs belong to a policy")
      for every in (None, "any", [["any"]], {"policy": "any"}, {"policy": ["any"], "name": "all"})),
    ({"prompt": range(1, 200_000)}, SpecError, "at most 100000"),
    ({"objective": "speed"}, SpecError, "expected one of latency"),
    ({"max_quality_loss": float("nan")}, SpecError, "expected a share"),
    ({"acceptance": 0.5}, SpecError, "without a draft model"),
    ({"jobs": 0}, SpecError, "worker processes"),
])
def test_a_wrong_argument_is_one_clear_line(asked: dict[str, Any], kind: type[SimmemError], says: str) -> None:
    with pytest.raises(kind) as raised:
        simmem.sweep(**{"device": "iphone15", "model": "opt-125m", **asked})
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_the_line_says_which_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda _: None)
        with pytest.raises(MachineError, match=r"pip install 'simmem\[search\]'"):
            simmem.sweep("iphone15", "opt-125m", jobs=2)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MachineError, match=r"pip install 'simmem\[notebook\]'"):
        simmem.sweep("iphone15", "opt-125m")


def test_a_plan_in_a_notebook_is_a_table_that_runs_no_code_of_others(tmp_path: Path) -> None:
    hostile = tmp_path / "<script>alert(1)</script>&"
    hostile.mkdir(parents=True)
    device = hostile / "d.toml"
    shutil.copy(resolve("device", "iphone15"), device)
    plan = simmem.plan(str(device), "opt-125m", weights="int8", dram="100 MB", policy="stream", **SMALL)
    shown = plan._repr_html_()
    assert shown is not None and shown.startswith("<table") and shown.endswith("</table>")
    assert "<script" not in shown and "&lt;script&gt;" in shown
    assert "90 % interval" in shown and "ESTIMATED" in shown and "dram" in shown
    assert "http" not in shown  # nothing is fetched
    drafted = plan.model_copy(update={"workload": plan.workload.model_copy(update={
        "batch": 8, "draft_length": 2, "weights": "file"})})
    shown = drafted._repr_html_()
    assert shown is not None and "a token of each of 8 sequences" in shown and "weights as in the file" in shown
