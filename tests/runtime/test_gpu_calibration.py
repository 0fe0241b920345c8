"""Does the script that waits for a GPU run from end to end, with the CPU in its place?"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from simmem.cost.regression import load_cost_model
from simmem.spec.device import load_device
from simmem.spec.measurement import Measurement, load_measurements

SCRIPT = Path(__file__).resolve().parents[2] / "validate" / "gpu_calibration.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_calibration", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_transfers_are_judged_on_sizes_between(script: ModuleType) -> None:
    def copies(seconds: list[float], **conditions: object) -> list[Measurement]:
        return [Measurement(probe="host-to-device", conditions={"waited": False, **conditions}, bytes=1000.0 * 2**k,
                            samples_s=(s, s)) for k, s in enumerate(seconds)]

    exact = [1e-5 + 1000.0 * 2**k / 5e10 for k in range(9)]
    off = [s * (1.2 if k == 3 else 1.0) for k, s in enumerate(exact)]
    found = {row["pinned"]: row for row in
             script.transfer_errors(copies(exact, pinned=True) + copies(off, pinned=False))}
    assert (found[True]["latency_s"], found[True]["bytes_per_s"]) == pytest.approx((1e-5, 5e10))
    assert found[True]["max"] < 1e-9
    assert found[True]["n"] == 4
    assert found[False]["max"] == pytest.approx(1 - 1 / 1.2)
    assert found[False]["median"] < 1e-9


@pytest.mark.slow
def test_everything_but_the_gpu_works(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--device", "cpu", "--quick", "--name", "stand-in", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    # Too noisy to fit, on a busy machine, is an answer; anything else is a bug.
    assert all(why.startswith("CalibrationError") for why in report["failed"].values()), report["failed"]
    assert (done.returncode == 1) == bool(report["failed"])
    measured = load_measurements(tmp_path / "measurements.json")
    by_agent = {(p.probe, p.conditions.get("agent")) for p in measured.points}
    assert {(probe, "gpu") for probe in ("memory-read", "memory-copy", "host-to-device", "device-to-host", "both-ways",
                                         "launch", "overlap", "gemv", "gemm")} <= by_agent
    assert {"storage-read", "memory-read", "op-call"} <= {probe for probe, agent in by_agent if agent != "gpu"}
    assert measured.machine["gpu"] == "none: the CPU stood in for it"
    assert not list(tmp_path.glob("*.partial"))
    if "device file" not in report["failed"]:
        assert {"cpu", "gpu"} == set(load_device(str(tmp_path / "device.toml")).agent)
    if "cost model" not in report["failed"]:
        assert any(g.agent == "gpu" for g in load_cost_model(tmp_path / "cost.json").groups)


def test_no_gpu_is_said_and_nothing_is_made_up(tmp_path: Path, script: ModuleType,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(script, "host_points", lambda *_: None)
    assert script.main(["--device", "cuda", "--quick", "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert "no CUDA GPU" in report["failed"]["GPU"]
    assert report["n_points"] == 0
    assert not (tmp_path / "device.toml").exists()
    assert not (tmp_path / "cost.json").exists()
