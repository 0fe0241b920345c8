"""Does `simmem validate` keep the contract: predictions first, one document, the right exit codes, nothing left?"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from simmem.planner.predict import timelines
from simmem.report import validate
from simmem.runtime.execute.engine import Counted
from simmem.runtime.execute.rounds import Repeats, Rounds
from simmem.runtime.execute.session import How, Run, Session
from simmem.runtime.execute.task import Task
from simmem.sim.timeline import Timeline
from simmem.validation.runs import demanded_bytes
from tests.cli.running import Simmem

SMALL = ("validate", "--quick", "--device", "cloud-vm", "--model", "relu-decoder-4m", "--threads", 1, "--minutes", 0.03)
IN_CONTRACT = {"id", "model", "device", "storage", "policy", "knobs", "predicted_s", "interval_s", "measured_s",
               "noise_floor", "error", "bytes", "phases", "status"}


def test_a_ladder_that_is_really_run(simmem: Simmem, tmp_path: Path) -> None:
    record, scratch = tmp_path / "record", tmp_path / "scratch"
    scratch.mkdir()
    threads = threading.active_count()
    ended = simmem(*SMALL, "--share", 0.75, "--share", 1, "--no-baselines", "--scratch", scratch, "--emulate",
                   "pi5-nvme", "--record", record, "--json")
    assert threading.active_count() == threads
    assert list(scratch.iterdir()) == []
    found = json.loads((record / "validate.json").read_text())
    too_noisy = found["summary"]["conclusive_share"] < 0.7
    if too_noisy:
        assert ended.code == 4
        assert ended.document["schema"] == "simmem.error/1"
    else:
        assert ended.code == (1 if any(g["status"] == "fail" for g in found["gates"]) else 0)
        assert ended.document == found
    assert {r["storage"] for r in found["rows"]} == {"real", "emulated"}
    for row in found["rows"]:
        assert row.keys() >= IN_CONTRACT
        assert row["bytes"]["predicted"] == row["bytes"]["measured"]
        assert row["repeats"] == found["conditions"]["rounds"] == 3
    assert found["summary"].keys() >= {"n", "mape", "p90_error", "kendall_tau", "regret", "coverage",
                                       "conclusive_share"}
    written = (record / "predictions.json").read_bytes()
    assert hashlib.sha256(written).hexdigest() == found["predictions_sha256"]
    expected = {r["id"]: r["predicted_s"] for r in json.loads(written)["rows"]}
    assert expected == {r["id"]: r["predicted_s"] for r in found["rows"]}, "what was written first is what is judged"
    samples = json.loads((record / "samples.json").read_text())
    for row in found["rows"]:
        medians = [np.median(run) for run in samples[row["id"]]]
        assert np.median(medians) == pytest.approx(row["measured_s"]["median"])
    again = simmem(*SMALL, "--record", record)
    assert (again.code, "not overwritten" in again.err) == (2, True)


RunRounds = Callable[[list[tuple[Task, How]], Rounds], list[Repeats]]


def rounds_of(factors: tuple[float, ...], extra_bytes: int = 0) -> RunRounds:
    """Rounds in which every plan takes `factors` times as long as predicted."""
    def stretched(line: Timeline, factor: float) -> Timeline:
        return Timeline(line.schedule, *(np.asarray(t * factor) for t in (line.start_s, line.free_s, line.end_s)),
                        "by hand")

    def run(tasks: list[tuple[Task, How]], _: Rounds) -> list[Repeats]:
        found = []
        for task, _how in tasks:
            lines = timelines(task.candidate, task.rows)
            moved = np.array([demanded_bytes(t.schedule, task.layout.block_bytes) for t in lines], np.int64)
            none = np.zeros((len(lines), 1), np.int64)
            runs = [Run(tuple(stretched(t, f) for t in lines), Counted(none, none, none, none, moved + extra_bytes))
                    for f in factors]
            found.append(Repeats(runs))
        return found

    return run


@pytest.mark.parametrize(("rounds", "code", "said"), [
    (rounds_of((1.02, 1.0, 1.01)), 0, ""),
    (rounds_of((1.5, 1.51, 1.52)), 1, ""),
    (rounds_of((1.0, 1.0, 1.0), extra_bytes=1), 1, ""),
    (rounds_of((1.0, 1.3, 1.6)), 4, "too noisy to judge"),
], ids=["as predicted", "slower", "other bytes", "noisy"])
def test_exit_codes(simmem: Simmem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: RunRounds, code: int,
                    said: str) -> None:
    monkeypatch.setattr(validate, "run_rounds", rounds)
    ended = simmem(*SMALL, "--share", 0.75, "--emulate", "none", "--no-baselines", "--scratch", tmp_path)
    assert ended.code == code
    assert said in ended.err
    for words in ("what must hold", "Kendall tau-b", "chosen", "relu-decoder-4m/real/75%"):
        assert words in " ".join(ended.out.split())
    assert list(tmp_path.iterdir()) == []


def test_interrupted(simmem: Simmem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: object, between: object = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "run", stop)
    threads = threading.active_count()
    ended = simmem(*SMALL, "--share", 0.75, "--scratch", tmp_path)
    assert (ended.code, ended.out) == (130, "")
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (("--weights", "int4"), 2, "expected fp32 or bf16"),
    (("--emulate", "iphnoe15"), 2, "did you mean iphone15"),
    (("--scratch", "/nowhere"), 2, "is not a folder"),
    (("--share", "2"), 2, "--share"),
    (("--minutes", "0"), 2, "--minutes"),
    (("--model", "mixtral-8x7b"), 2, "mixtures of experts"),
])
def test_bad_input(simmem: Simmem, arguments: tuple[str, ...], code: int, said: str) -> None:
    ended = simmem(*SMALL, "--share", "0.75", *arguments)
    assert (ended.code, ended.out) == (code, "")
    assert said in ended.err
