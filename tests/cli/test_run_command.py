"""Does `simmem run` keep the contract: one row, the right exit codes, one clear line for what cannot be run?"""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from simmem.runtime.execute import session
from tests.cli.running import Simmem
from tests.runtime import tiny
from tests.runtime.executing import spec_of

SMALL = ("--prompt", "10", "--new-tokens", "20", "--weights", "fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: configuration, tokenizer and weights of a tiny network."""
    here = tmp_path_factory.mktemp("tiny")
    network = tiny.make("llama")
    tiny.save(network, here)
    spec_of(network, here)
    return here


@pytest.fixture
def plan(simmem: Simmem, folder: Path, tmp_path: Path) -> Path:
    out = tmp_path / "streamed.json"
    ended = simmem("plan", "--device", "cloud-vm", "--model", folder / "config.json", *SMALL, "--policy", "stream",
                   "--set", "resident_ratio=0.5", "--set", "prefetch_layers=1", "--set", "reader_threads=4",
                   "--out", out)
    assert ended.code == 0
    return out


def test_one_row(simmem: Simmem, plan: Path, tmp_path: Path) -> None:
    line, threads = tmp_path / "both.json", threading.active_count()
    for storage in ("real", "emulated"):
        ended = simmem("run", plan, "--json", "--tokens", 5, "--repeat", 2, "--threads", 1, "--scratch", tmp_path,
                       "--storage", storage, "--timeline", line)
        row = ended.document
        assert ended.code == (1 if row["status"] == "fail" else 0), "a cloud machine's figures are not this one's"
        assert row["bytes"]["predicted"] == row["bytes"]["measured"] > 0
        assert (row["id"], row["storage"], row["policy"], row["measured_s"]["n"]) == ("streamed", storage, "stream", 10)
        assert row["error"] == pytest.approx(row["predicted_s"] / row["measured_s"]["median"] - 1)
        assert ("emulation_cpu_share" in row["conditions"]) is (storage == "emulated")
        assert threading.active_count() == threads
    events = json.loads(line.read_text())["traceEvents"]
    names = {e["args"]["name"].split(":")[0] for e in events if e["name"] == "process_name"}
    assert names == {"predicted", "measured"}
    assert {e["name"] for e in events if e["ph"] == "X" and e["pid"] == 2} >= {"attention", "ffn", "head"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["both.json", "streamed.json"]


def test_for_people(simmem: Simmem, plan: Path, tmp_path: Path) -> None:
    ended = simmem("run", plan, "--tokens", 4, "--repeat", 2, "--threads", 1, "--storage", "emulated")
    assert ended.code in (0, 1)
    for said in ("EMULATED storage of cloud-vm", "predicted", "measured", "noise floor", "flash", "attention",
                 "exactly as planned"):
        assert said in " ".join(ended.out.split())


def test_exact(simmem: Simmem, plan: Path, folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("It was the best of units, it was the worst of units. " * 8)
    ended = simmem("run", plan, "--mode", "exact", "--text", text, "--scratch", tmp_path)
    assert ended.code == 2
    assert "tokens of text, expected 200 to 64" in ended.err, "the tiny network has 64 positions"


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (("--mode", "relpay"), 2, "did you mean replay"),
    (("--storage", "cloud"), 2, "no storage named 'cloud'"),
    (("--device", "tpu"), 2, "expected cpu, cuda or cuda:N"),
    (("--device", "cuda:99"), 4, "no such device here"),
    (("--text", "there"), 2, "goes with --mode exact"),
    (("--scratch", "/nowhere"), 2, "is not a folder"),
    (("--weights-file", "/nowhere/weights"), 2, "the folder it should be written to does not exist"),
    (("--timeline", "/nowhere/line.json"), 2, "does not exist"),
    (("--tokens", "0"), 2, "--tokens"),
])
def test_bad_input(simmem: Simmem, plan: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    ended = simmem("run", plan, *arguments)
    assert (ended.code, ended.out) == (code, "")
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_interrupted(simmem: Simmem, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session.Session, "run", stop)
    before, threads = sorted(tmp_path.iterdir()), threading.active_count()
    ended = simmem("run", plan, "--scratch", tmp_path)
    assert (ended.code, ended.out) == (130, "")
    assert sorted(tmp_path.iterdir()) == before
    assert threading.active_count() == threads


def test_a_plan_for_a_gpu_is_not_run_on_something_else(simmem: Simmem, folder: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    simmem("plan", "--device", "rtx4090-pc", "--model", folder / "config.json", *SMALL, "--policy", "resident", "--set",
           "agent=gpu", "--out", out)
    monkeypatch.setattr(session, "has_cuda", lambda: False)
    ended = simmem("run", out)
    assert ended.code == 4
    assert "--device cpu runs it on the processor" in ended.err
