"""Does the script of runs on a GPU go from end to end, with the CPU in its place?"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "validate" / "gpu_runs.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_runs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_runs", script)  # its dataclass looks there
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "PASS_S", 0.01)
    return script


def test_the_script_on_a_cpu(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    asked = ["--out", str(out), "--device", "cpu", "--with", "cloud-vm", "--model", "opt-350m", "--model",
             "relu-decoder-4m", "--scratch", str(scratch), "--budget", "1"]
    assert script.main(asked) == 1
    assert "FAILED opt-350m/resident: opt-350m: has embeddings of their own width" in capsys.readouterr().out
    assert list(scratch.iterdir()) == []
    report, rows = (json.loads((out / name).read_text()) for name in ("report.json", "rows.json"))
    assert report["groups"]["bytes_exact"]
    assert {r["policy"] for r in rows} == {"resident", "stream", "flash-window"}
    written, samples = (json.loads((out / name).read_text()) for name in ("predictions.json", "samples.json"))
    assert written.keys() == {r["id"] for r in rows}
    assert all(len(samples[r["id"]]) == r["repeats"] == 3 for r in rows)


def test_two_units_with_the_processor_as_both(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                              ) -> None:
    """Of a machine with a GPU: what it would multiply beside its processor, multiplied here."""
    out = tmp_path / "out"
    monkeypatch.setattr(script, "TOKENS", (3, 3))
    monkeypatch.setattr(script, "NEAR", ((0.5, "with-heads"),))
    asked = ["--out", str(out), "--device", "cpu", "--with", "t4-cloud", "--model", "opt-125m", "--group", "hot-cold",
             "--scratch", str(tmp_path), "--budget", "1"]
    assert script.main(asked) == 0
    report, rows = (json.loads((out / name).read_text()) for name in ("report.json", "rows.json"))
    assert report["groups"]["bytes_exact"]
    assert [(r["policy"], r["knobs"]["kv_cache"]) for r in rows] == [("hot-cold", "with-heads")]
    assert all(r["bytes"]["measured"] > 0 for r in rows)
