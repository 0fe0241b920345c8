"""Does `simmem calibrate` turn a machine, or raw samples, into a device file to plan with, and fail without a trace?"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from simmem.cost.regression import fit_cost_model
from simmem.errors import SpecError
from simmem.report.costfile import cost_path, write_device
from simmem.runtime.probe import calibrate as calibrating
from simmem.runtime.probe.machine import volume
from simmem.spec.device import load_device
from simmem.spec.measurement import Measurement, load_measurements
from tests.cli.running import Simmem, problems_of
from tests.measurements import SURFACE, measurements

pytest.importorskip("torch")

COMMAND = [sys.executable, "-c", "from simmem.cli import main; main()", "calibrate", "--quick"]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "raw.json"
    path.write_text(measurements().model_dump_json(by_alias=True), encoding="utf-8")
    return path


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    """A folder that is not in memory."""
    if volume(tmp_path).in_memory:
        pytest.skip("the folder for temporary files is in memory")
    return tmp_path


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_this_machine_is_measured(drive: Path, tmp_path: Path, simmem: Simmem) -> None:
    """On a machine that others use it may be too noisy for a device file, which is said; the samples are there."""
    out = tmp_path / "here.toml"
    ended = simmem("calibrate", "--quick", "--budget", "8 s", "--out", out, "--json")
    measured = load_measurements(tmp_path / "here.measurements.json")
    assert measured.bytes_written == 64 << 20
    assert len({p.probe for p in measured.points}) >= 3 and measured.points[0].probe == "storage-read"
    assert all(len(p.samples_s) == len(p.at_s) == sum(p.runs) for p in measured.points)
    assert problems_of(json.loads(measured.model_dump_json(by_alias=True)), "measurements") == []
    if ended.code == 0:
        assert ended.document["schema"] == "simmem.calibration/1"
        assert names(tmp_path) == {"here.toml", "here.measurements.json"}
        assert load_device(str(out)).link["flash"].rate.value > 1e6
    else:
        assert ended.code == 4 and "cannot be said" in ended.document["message"]
        assert names(tmp_path) == {"here.measurements.json"}


def test_raw_samples_make_a_device_that_plans_and_says_what_was_measured(tmp_path: Path, raw: Path, simmem: Simmem
                                                                         ) -> None:
    out = tmp_path / "mine.toml"
    found = simmem("calibrate", "--from", raw, "--out", out, "--json").document
    assert found["bytes_written"] == 2e9 and found["changes"] == [] and found["refused"] == []
    rate = next(f for f in found["figures"] if f["key"] == "link.flash.rate")
    assert rate["value"] == pytest.approx(SURFACE.rate, rel=0.15)
    assert rate["kind"] == "measured" and rate["n"] == 20 and 0 < rate["noise_floor"] < 0.1
    assert names(tmp_path) == {"raw.json", "mine.toml"}

    plan = simmem("plan", "--device", out, "--model", "opt-125m", "--dram", "100 MB", "--json").document
    here = plan["evidence"]["measured"]
    assert here["figures"] == here["of"] == len(found["figures"])
    assert 0 < here["spread"][0] < here["spread"][1]
    ended = simmem("plan", "--device", out, "--model", "opt-125m", "--out", tmp_path / "plan.json")
    assert f"Figures measured here: {here['of']} of {here['of']}, spread ±" in ended.out
    simulated = simmem("simulate", tmp_path / "plan.json", "--tokens", 1, "--json").document
    assert simulated["measured"] == here
    assert simmem("plan", "--device", "cloud-vm", "--model", "opt-125m", "--policy", "resident", "--json"
                  ).document["evidence"]["measured"] is None


def test_a_cost_model_is_fitted_judged_and_named(tmp_path: Path, raw: Path, simmem: Simmem) -> None:
    out = tmp_path / "mine.toml"
    few = simmem("calibrate", "--from", raw, "--out", out, "--json").document["cost_model"]
    assert few["written"] is None and "measurements for a cost model" in few["why_not"]
    assert "No cost model: no kind of op" in " ".join(simmem("calibrate", "--from", raw, "--out", out).out.split())
    assert names(tmp_path) == {"raw.json", "mine.toml"}

    enough = measurements()
    enough = enough.model_copy(update={"points": (*enough.points, *products(150))})
    raw.write_text(enough.model_dump_json(by_alias=True), encoding="utf-8")
    found = simmem("calibrate", "--from", raw, "--out", out, "--json").document["cost_model"]
    assert names(tmp_path) == {"raw.json", "mine.toml", "mine.cost.json"}
    assert found["written"] == str(tmp_path / "mine.cost.json") and found["why_not"] is None
    *_, every = found["held_out"]
    assert every["kind"] == "all" and 40 < every["n"] < 110
    assert every["median"] < 0.04 < every["roofline_median"] and 0.8 < every["coverage"] <= 1
    device = load_device(str(out))
    assert device.cost_model is not None and {g.kind for g in device.cost_model.groups} == {"gemv"}
    ended = simmem("calibrate", "--from", raw, "--out", out, "--update")
    assert ended.code == 0 and "gemv fp32 2 thr" in ended.out and max(map(len, ended.out.splitlines()[:-1])) <= 80
    ended = simmem("calibrate", "--from", raw, "--out", tmp_path / "none.toml", "--no-cost-model", "--json")
    assert ended.document["cost_model"] is None and not (tmp_path / "none.cost.json").exists()
    ended = simmem("calibrate", "--from", tmp_path / "mine.cost.json", "--out", out)
    assert ended.code == 2 and load_device(str(out)).cost_model == device.cost_model


def products(n: int) -> list[Measurement]:
    """Of one token: bytes at a rate, and 50 ns a row, 3 % of scatter from shape to shape."""
    rng = np.random.default_rng(4)
    found = []
    for rows, cols in 64 * rng.integers(4, 80, (n, 2)):
        seconds = (4.0 * rows * cols / 17e9 + 50e-9 * rows) * rng.lognormal(0, 0.03)
        found.append(Measurement(
            probe="gemv", conditions={"agent": "cpu", "level": "dram", "threads": 2, "dtype": "fp32", "rows": int(rows),
                                      "cols": int(cols), "batch": 1}, flop=2.0 * rows * cols, bytes=4.0 * rows * cols,
            requests=1, samples_s=tuple(seconds * rng.lognormal(0, 0.01, 9)), runs=(3, 3, 3)))
    return found


def test_a_device_file_and_its_cost_model_are_written_both_or_neither(tmp_path: Path) -> None:
    model = fit_cost_model(measurements().model_copy(update={"points": tuple(products(40))}))
    out = tmp_path / "mine.toml"
    out.mkdir()  # cannot be written to
    with pytest.raises(SpecError):
        write_device(out, {"name": "x"}, model)
    assert names(tmp_path) == {"mine.toml"}
    cost_path(out).write_text("as before", encoding="utf-8")
    with pytest.raises(SpecError):
        write_device(out, {"name": "x"}, model)
    assert cost_path(out).read_text(encoding="utf-8") == "as before" and len(names(tmp_path)) == 2


def test_compare_and_update(tmp_path: Path, raw: Path, simmem: Simmem) -> None:
    out = tmp_path / "mine.toml"
    ended = simmem("calibrate", "--from", raw, "--out", out, "--compare", "cloud-vm")
    assert ended.code == 0 and "B / A" in ended.out and max(map(len, ended.out.splitlines()[:-1])) <= 80
    other_file = simmem("calibrate", "--from", raw, "--out", tmp_path / "again.toml", "--compare", out, "--json")
    figures = other_file.document["comparison"]["figures"]
    assert figures and {f["ratio"] for f in figures} == {1.0}, "raw samples always give the same figures"
    assert simmem("calibrate", "--from", raw, "--out", tmp_path / "again.toml", "--compare", out).code == 0
    text = out.read_text(encoding="utf-8")
    rate = load_device(str(out)).link["flash"].rate.value
    out.write_text(text.replace("Paper 9000, 2 threads", "my own words").replace(
        'cached_rate = { value = "', 'energy_per_byte = { value = "9 pJ/B", kind = "estimated", source = "a guess" }\n'
        'cached_rate = { value = "'), encoding="utf-8")
    other = measurements(seed=7)
    raw.write_text(other.model_dump_json(by_alias=True), encoding="utf-8")
    found = simmem("calibrate", "--from", raw, "--out", out, "--update", "--json").document
    device = load_device(str(out))
    assert device.title.startswith("my own words")
    assert device.link["flash"].energy_per_byte is not None
    assert device.link["flash"].rate.value != rate
    changed = {c["key"] for c in found["changes"]}
    assert "link.flash.rate" in changed and "memory.flash.capacity" not in changed


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (["--out", "x.txt"], 2, "expected .toml"),
    (["--out", "absent/x.toml"], 2, "does not exist"),
    (["--out", "/proc/x.toml"], 4, "cannot be written"),
    (["--out", "x.toml", "--update"], 2, "no such device"),
    (["--out", "x.toml", "--compare", "h20x"], 2, "did you mean h200"),
    (["--out", "x.toml", "--from", "absent.json"], 2, "no such file"),
    (["--out", "x.toml", "--from", "raw.json", "--resume"], 2, "--resume means nothing"),
    (["--out", "x.toml", "--budget", "5"], 2, "with no unit"),
    (["--out", "x.toml", "--threads", "4096"], 2, "--threads: found 4096"),
    (["--out", "x.toml", "--device", "tpu"], 2, "expected cpu or cuda"),
    (["--out", "x.toml", "--scratch", "absent"], 2, "is no folder")])
def test_what_cannot_be_is_one_clear_line(arguments: list[str], code: int, says: str, tmp_path: Path, simmem: Simmem,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = simmem("calibrate", *arguments)
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (code, "", 1)
    assert says in ended.err
    assert names(tmp_path) == set()


def test_without_torch_it_says_what_to_install(tmp_path: Path, simmem: Simmem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating.importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    ended = simmem("calibrate", "--out", tmp_path / "x.toml")
    assert ended.code == 4 and 'pip install "simmem[capture]"' in ended.err
    assert names(tmp_path) == set()


def test_a_scratch_folder_in_memory_is_no_drive(tmp_path: Path, simmem: Simmem) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or not volume(shared).in_memory:
        pytest.skip("needs a folder in memory")
    ended = simmem("calibrate", "--quick", "--budget", "8 s", "--out", tmp_path / "x.toml", "--scratch", shared)
    assert ended.code == 4 and "there is no storage to measure" in ended.err
    assert names(tmp_path) == set()


def test_a_full_disk_ends_with_exit_4_and_nothing_left(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--out", tmp_path / "x.toml", "--json"], capture_output=True, text=True, check=False, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)))
    assert done.returncode == 4, done.stderr
    error = json.loads(done.stdout)
    assert error["kind"] == "MachineError" and "nothing was left there" in error["message"]
    assert names(tmp_path) == set()


def test_killed_and_stopped_it_leaves_its_journal_and_goes_on(drive: Path, tmp_path: Path) -> None:
    out, journal = tmp_path / "x.toml", tmp_path / "x.toml.partial"

    def stopped(with_signal: int, *more: str) -> subprocess.CompletedProcess[str]:
        before = journal.stat().st_size if journal.exists() else 0
        process = subprocess.Popen([*COMMAND, "--budget", "8 s", "--out", out, *more], stderr=subprocess.PIPE,
                                   text=True)
        until = time.monotonic() + 300
        while time.monotonic() < until and process.poll() is None and not (
                journal.exists() and journal.stat().st_size > before + 500):
            time.sleep(0.05)
        process.send_signal(with_signal)
        _, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess([], process.returncode, "", err)

    assert stopped(signal.SIGKILL).returncode == -signal.SIGKILL
    assert names(tmp_path) == {journal.name}
    refused = subprocess.run([*COMMAND, "--out", out], capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode == 2 and "--resume goes on" in refused.stderr
    ended = stopped(signal.SIGTERM, "--resume")
    assert ended.returncode == 130, ended.stderr
    assert "--resume goes on" in ended.stderr
    assert names(tmp_path) == {journal.name}
    lines = journal.read_text().splitlines()
    rows = [json.loads(line.partition(" ")[2]) for line in lines[1:]]
    assert [r["wrote"] for r in rows if "wrote" in r] == [64 << 20] * 2  # each run fills a file of its own
    visits = [r for r in rows if "case" in r]
    assert len({(v["case"], v["round"]) for v in visits}) == len(visits) >= 2
