"""Does `calibrate --from-runs` learn what runs say, judge it on other plans, and refuse what it cannot learn from?"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simmem.errors import CalibrationError, SpecError
from simmem.planner.candidate import Candidate
from simmem.planner.predict import timelines
from simmem.report.fromruns import MAX_DOCUMENT_BYTES, learn_from_runs
from simmem.spec.costmodel import FittedCost, PhaseFactor, PhaseName
from simmem.spec.device import Device, load_device
from simmem.spec.library import resolve
from simmem.validation.ladder import Cell, Rung, cells, fit_rung, rungs
from simmem.validation.runs import demanded_bytes, run_row
from tests.cli.running import Simmem
from tests.unit.fuzzing import mutate_bytes, mutate_json

STEP_S = 200e-6
TRUE = {"FFN": 1.6, "flash": 1.3}
"""What the machine that is run on takes of each phase, times what the device file says."""
SHARES = (0.5, 0.75, 1.0)
LADDER = {r.name: r for r in rungs(quick=True, emulated=False)}


def write_base(folder: Path, *, step_s: float = STEP_S) -> Path:
    text = resolve("device", "cloud-vm").read_text(encoding="utf-8")
    text = text.replace('name = "cloud-vm"', 'name = "base"', 1).replace(
        "op_overhead = {", f'step_overhead = {{ value = "{step_s!r} s", kind = "measured", source = "made up" }}\n'
        "op_overhead = {", 1)
    (folder / "base.toml").write_text(text, encoding="utf-8")
    return folder / "base.toml"


def machine(device: Device) -> Device:
    """The device as it really is."""
    def takes(phase: PhaseName, dtype: str, agent: str) -> PhaseFactor:
        times = TRUE[phase]
        return PhaseFactor(phase=phase, dtype=dtype, agent=agent, factor=times, low=times, high=times, rows=1, groups=2,
                           error_before=0.0, error_after=0.0, spent=("the truth",))

    return device.model_copy(update={"cost_model": FittedCost(
        name="base", date="2026-01-01", groups=(), phases=(takes("FFN", "fp32", "cpu"), takes("flash", "", "")))})


def candidates(device: Path) -> Iterator[tuple[Cell, str, Candidate]]:
    for share in SHARES:
        for cell in cells(str(device), "smollm2-135m", (share,), weights="fp32", prompt=64, new_tokens=32,
                          emulate=load_device("pi5-nvme")):
            for name in ("naive", "hybrid", "windowed") if share < 1 else ("resident",):
                found = fit_rung(cell, LADDER.get(name, Rung("resident", "resident")))
                if found is not None:
                    yield cell, name, found


def rows_of(device: Path) -> list[dict[str, Any]]:
    """A ladder predicted with a device file, and run by the machine as it really is."""
    found = []
    for cell, name, candidate in candidates(device):
        rows = np.arange(2) if candidate.policy.uses_trace else np.zeros(1, np.int64)
        context = candidate.context
        predicted = timelines(candidate, rows)
        measured = timelines(replace(candidate, context=replace(context, device=machine(context.device))), rows)
        block = context.storage_link[1].block
        assert block is not None
        moved = np.array([[demanded_bytes(t.schedule, block.value) for t in predicted]] * 3)
        row = json.loads(run_row(f"{cell.name}/{name}", candidate, predicted, [measured] * 3, moved,
                                 cell.storage).model_dump_json(by_alias=True))
        for phase in row["phases"]:
            if phase["name"] == "flash" and cell.storage == "emulated":
                phase["measured_s"] *= 3.0
            if phase["name"] == "wait":
                phase["measured_s"] += 0.01
        found.append(row | {"cell": cell.name, "budget_share": cell.share, "chosen": False})
    return found


@cache
def _ladder() -> str:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return json.dumps({"schema": "simmem.validate/1", "mode": "quick", "device": "base",
                           "rows": rows_of(write_base(Path(folder)))})


@pytest.fixture
def ladder(tmp_path: Path) -> Path:
    """A folder of `validate --record`, beside the device file."""
    write_base(tmp_path)
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "validate.json").write_text(_ladder(), encoding="utf-8")
    return tmp_path / "record"


def learn(simmem: Simmem, ladder: Path, *more: object, out: str = "learnt.toml") -> Any:
    folder = ladder.parent
    return simmem("calibrate", "--from-runs", ladder, "--device", folder / "base.toml", "--out", folder / out, *more)


def changed(ladder: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Change the rows that are recorded."""
    path = ladder / "validate.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    change(found["rows"])
    path.write_text(json.dumps(found), encoding="utf-8")


def test_what_runs_say_is_learnt_and_the_next_predictions_hold(ladder: Path, simmem: Simmem) -> None:
    ended = learn(simmem, ladder, "--json")
    assert ended.code == 0, ended.err
    found = ended.document
    assert (found["schema"], found["device"], found["name"]) == ("simmem.calibration-runs/1", "base", "learnt")
    assert found["held_out_by"] == "cell" and len(found["groups"]) == 5 and found["left_out"] == {}
    phases = {p["verdict"]["phase"]: p for p in found["phases"]}
    assert "wait" not in phases
    assert {name for name, p in phases.items() if p["verdict"]["kept"]} == set(TRUE)
    for name, times in TRUE.items():
        verdict = phases[name]["verdict"]
        assert verdict["learnt"] == pytest.approx(times, rel=0.02) and phases[name]["factor"] == verdict["learnt"]
        assert verdict["error_before"] == pytest.approx(1 - 1 / times, abs=0.02)
        assert verdict["error_after"] < 0.02
    real = [r for r in json.loads(_ladder())["rows"] if r["storage"] == "real"]
    reading = sum(any(p["name"] == "flash" for p in r["phases"]) for r in real)
    assert phases["flash"]["verdict"]["rows"] == reading < len(real) < phases["FFN"]["verdict"]["rows"], \
        "emulated reads say nothing of the drive, their products do"
    assert found["total"]["after"] < found["total"]["before"]

    device = load_device(found["out"])
    assert device.name == "learnt" and device.cost_model is not None and device.aliases == ()
    assert device.figures() == load_device(str(ladder.parent / "base.toml")).figures()
    spent = {p.phase: {s.split(" ", 1)[1] for s in p.spent} for p in device.cost_model.phases}
    assert spent["FFN"] == {r["id"] for r in json.loads(_ladder())["rows"]}
    assert all("/real/" in s for s in spent["flash"])

    # The device that learnt predicts what the same machine does.
    for row, again in zip(real, [r for r in rows_of(Path(found["out"])) if r["storage"] == "real"], strict=True):
        measured = {p["name"]: p["measured_s"] for p in row["phases"]}
        for phase in again["phases"]:
            if phase["name"] in TRUE:
                assert phase["predicted_s"] == pytest.approx(measured[phase["name"]], rel=0.03), row["id"]


def test_a_row_is_learnt_from_once(ladder: Path, simmem: Simmem) -> None:
    assert learn(simmem, ladder).code == 0
    folder = ladder.parent
    again = ("calibrate", "--from-runs", ladder, "--device", folder / "learnt.toml", "--out", folder / "more.toml")
    ended = simmem(*again)
    assert ended.code == 2 and "was predicted with 'base', expected 'learnt'" in ended.err
    changed(ladder, lambda rows: [r.update(device=r["device"].replace("base", "learnt")) for r in rows])
    ended = simmem(*again, "--json")
    found = {p["verdict"]["phase"]: p for p in ended.document["phases"]}["FFN"]
    assert found["factor"] == pytest.approx(1.6**2, rel=0.05), "of runs that were predicted with it, what is left"
    assert found["factor_before"] == pytest.approx(1.6, rel=0.03)
    assert any("× " in note for note in ended.document["notes"])
    (ladder.parent / "copy.json").write_bytes((ladder / "validate.json").read_bytes())
    ended = simmem(*again, "--from-runs", folder / "copy.json")
    assert ended.code == 2 and "learnt from once" in ended.err


def test_the_report_says_of_each_phase_whether_it_is_kept(ladder: Path, simmem: Simmem) -> None:
    ended = learn(simmem, ladder)
    text = " ".join(ended.out.split())
    assert "rows, predicted with base" in text and "Each cell of 5 held out in turn" in text
    assert "FFN fp32 cpu" in text and "head fp32 cpu is not kept: held-out plans are no nearer with it." in text
    assert max(map(len, ended.out.splitlines()[:-1])) <= 80
    plan = simmem("plan", "--device", ladder.parent / "learnt.toml", "--model", "smollm2-135m", "--weights", "fp32",
                  "--policy", "resident", "--json").document
    assert plan["evidence"]["cost_model"] == "roofline; corrected by runs: FFN fp32"
    assert any("FFN fp32 × 1.6" in why for why in plan["why"])


def test_rows_that_say_nothing_are_left_out(ladder: Path, simmem: Simmem) -> None:
    def spoil(rows: list[dict[str, Any]]) -> None:
        rows[0]["status"] = "inconclusive"
        rows[1]["bytes"]["measured"] += 1.0
        rows[2] |= {"status": "fail", "why": "a token moved other bytes than the plan says"}
        rows[3]["exact"] = {"tokens": 9, "largest_difference": 0.5, "same_choice": 0.5, "tolerance": 1e-4}
        for row in rows[:4]:
            for phase in row["phases"]:
                phase["measured_s"] *= 9

    changed(ladder, spoil)
    found = learn(simmem, ladder, "--json").document
    assert sorted(found["left_out"].values()) == [
        "inconclusive", *["it moved other bytes than the plan says"] * 2, "its logits are not those of the network"]
    assert found["runs"][0]["used"] == found["runs"][0]["rows"] - 4
    assert {p["verdict"]["phase"]: p for p in found["phases"]}["FFN"]["factor"] == pytest.approx(1.6, rel=0.02)


def test_without_other_plans_it_ends_in_exit_4_and_writes_nothing(ladder: Path, simmem: Simmem) -> None:
    row = next(r for r in json.loads(_ladder())["rows"] if r["policy"] == "resident")
    one = ladder.parent / "run.json"
    one.write_text(json.dumps({k: v for k, v in row.items() if k not in ("cell", "budget_share", "chosen")}))
    before = {p.name for p in ladder.parent.iterdir()}
    ended = learn(simmem, one, "--json")
    assert ended.code == 4 and ended.document["kind"] == "CalibrationError"
    assert "nothing is kept" in ended.document["message"]
    changed(ladder, lambda rows: [r.update(status="inconclusive") for r in rows])
    ended = learn(simmem, ladder)
    assert ended.code == 4 and "× inconclusive" in ended.err and len(ended.err.splitlines()) == 1
    assert {p.name for p in ladder.parent.iterdir()} == before


def test_where_nothing_helps_nothing_is_written(ladder: Path, simmem: Simmem) -> None:
    def hold(rows: list[dict[str, Any]]) -> None:
        for phase in (p for r in rows for p in r["phases"]):
            phase["measured_s"] = phase["predicted_s"]

    changed(ladder, hold)
    found = learn(simmem, ladder, "--json").document
    assert found["out"] is None and not any(p["verdict"]["kept"] for p in found["phases"])
    assert not (ladder.parent / "learnt.toml").exists()


def _row(ladder: Path, **update: Any) -> None:
    changed(ladder, lambda rows: rows[0].update(update))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no JSON": (lambda p: (p / "validate.json").write_text("{"), "is not valid JSON"),
    "deep": (lambda p: (p / "validate.json").write_text("[" * 100_000), "nested too deeply"),
    "long": (lambda p: (p / "validate.json").write_text(" " * MAX_DOCUMENT_BYTES + "{}"), "is longer than"),
    "another document": (lambda p: (p / "validate.json").write_text('{"schema": "simmem.plan/1"}'),
                         "found \"simmem.plan/1\", expected 'simmem.validate/1' or 'simmem.run/1'"),
    "no rows": (lambda p: (p / "validate.json").write_text('{"schema": "simmem.validate/1"}'), "rows: is missing"),
    "a folder without": (lambda p: (p / "validate.json").unlink(), "validate.json: no such file"),
    "another machine": (lambda p: _row(p, device="iphone15"), "predicted with 'iphone15', expected 'base'"),
    "other figures": (lambda p: write_base(p.parent, step_s=2 * STEP_S), "its figures were others then"),
    "negative": (lambda p: _row(p, phases=[{"name": "FFN", "predicted_s": -1.0, "measured_s": 1.0}]),
                 "greater than or equal to 0"),
    "infinite": (lambda p: (p / "validate.json").write_text(
        _ladder().replace('"measured_s": 0.', '"measured_s": 1e999')), "finite"),
    "an unknown phase": (lambda p: _row(p, phases=[{"name": "x", "predicted_s": 1.0, "measured_s": 1.0}]),
                         "Input should be"),
    "escapes": (lambda p: _row(p, id="\x1b[2J"), "pattern"),
    "writing backwards": (lambda p: _row(p, model="\u202egnp.exe"), "pattern"),
    "many rows": (lambda p: changed(p, lambda rows: rows.extend(rows[:1] * 2000)), "at most 1024"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_one_clear_line(what: str, ladder: Path, simmem: Simmem) -> None:
    spoil, says = BAD[what]
    spoil(ladder)
    before = {p.name for p in ladder.parent.iterdir()}
    ended = learn(simmem, ladder)
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (2, "", 1), ended.err
    assert says in ended.err
    assert {p.name for p in ladder.parent.iterdir()} == before


@pytest.mark.parametrize(("more", "says"), [
    (("--quick",), "--quick means nothing"), (("--update",), "--update means nothing"),
    (("--no-cost-model",), "--no-cost-model means nothing"), (("--from", "x.json"), "--from means nothing"),
    (("--out", "absent/x.toml"), "does not exist"), (("--out", "base.toml"), "is also what is read"),
    (("--out", "sub/base.toml"), "would be another device of the name 'base'"), (("--out", "x.txt"), "expected .toml"),
    (("--device", "h20x"), "did you mean h200"), (("--device", ""), "no device named")])
def test_what_cannot_be_asked_is_one_clear_line(more: tuple[str, ...], says: str, ladder: Path, simmem: Simmem,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ladder.parent)
    (ladder.parent / "sub").mkdir()
    ended = simmem("calibrate", "--from-runs", "record", "--device", "base.toml", "--out", "x.toml", *more)
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (2, "", 1), ended.err
    assert says in ended.err
    missing = simmem("calibrate", "--from-runs", "record", "--out", "x.toml")
    assert missing.code == 2 and "--device: is needed with --from-runs" in missing.err


def test_measuring_again_drops_what_runs_said_of_the_figures_before(ladder: Path, simmem: Simmem) -> None:
    for name in ("torch", "scipy"):
        pytest.importorskip(name)
    from tests.measurements import measurements

    assert learn(simmem, ladder).code == 0
    out, raw = ladder.parent / "learnt.toml", ladder.parent / "raw.json"
    raw.write_text(measurements().model_dump_json(by_alias=True), encoding="utf-8")
    found = simmem("calibrate", "--from", raw, "--out", out, "--update", "--json").document
    assert any("learnt from runs" in note for note in found["notes"])
    assert load_device(str(out)).cost_model is None


def test_mangled_documents_end_in_one_error_or_in_an_answer(ladder: Path) -> None:
    path, text = ladder / "validate.json", _ladder()
    refused = 0
    for seed in range(150):
        rng = random.Random(seed)
        path.write_bytes(mutate_bytes(text.encode(), rng) if seed % 2 else
                         json.dumps(mutate_json(json.loads(text), rng)).encode())
        try:
            learn_from_runs([path], str(ladder.parent / "base.toml"), ladder.parent / "learnt.toml")
        except (SpecError, CalibrationError):
            refused += 1
        else:
            load_device(str(ladder.parent / "learnt.toml"))
    assert refused > 30
