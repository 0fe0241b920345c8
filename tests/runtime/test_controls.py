"""Controls beside runs tell a slower machine from a wrong prediction."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from simmem.cost.roofline import storage_seconds_per_request
from simmem.planner.predict import timelines
from simmem.planner.uncertainty import curve_factors
from simmem.report import controls
from simmem.report.controls import Controls, main_read, product_seconds
from simmem.runtime.execute.product import ProductControl
from simmem.runtime.execute.rounds import Repeats
from simmem.runtime.execute.task import Task, task_of
from simmem.spec.model import load_model
from tests.runtime.executing import STREAM, candidate

pytest.importorskip("torch")
PRODUCTS, DRIVE = (0.5, 0.8, 1.0), (0.7, 0.4, 1.0)
"""How fast a machine is in each of three rounds, beside its calibration."""


def run_at(task: Task, products: float, drive: float) -> Any:
    """What a run brings on a machine that is so fast."""
    factors: dict[str, Any] = {"agent.cpu.rate": products} | curve_factors("link.flash.throughput", drive)
    lines = timelines(task.candidate, task.rows, factors)
    moved = np.full(task.n_tokens, float(sum(task.streamed)))
    return SimpleNamespace(timelines=lines, token_s=np.array([t.token_s for t in lines]),
                           counted=SimpleNamespace(moved_bytes=moved))


def test_a_slower_machine_is_no_wrong_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(32 << 20))
    task = task_of(candidate(load_model("opt-125m"), "stream", STREAM), 3)
    read = main_read(task)
    assert read is not None
    plain = float(storage_seconds_per_request(task.candidate.context.storage_link[1], *read))
    found = Controls([(task, True)], file, threads=1)
    expected = product_seconds(task, ProductControl.rows, ProductControl.cols)
    looks = [(p, d) for p, d in zip(PRODUCTS, DRIVE, strict=True) for _ in range(2)]
    now = [1.0, 1.0]
    monkeypatch.setattr(ProductControl, "seconds", lambda _: expected / now[0])
    monkeypatch.setattr(controls, "plain_reads", lambda _file, _read, samples=5: [plain / now[1]] * samples)
    monkeypatch.setattr(controls, "batch_reads",
                        lambda _file, amounts, _chunk, _depth: sum(amounts) / read[0] * plain / now[1])
    for number, look in enumerate(looks):
        now[:] = look
        found.look(0)
        between = found.between(0)
        for _ in range((task.lead + task.n_tokens) * (number % 2 == 0)):
            assert between is not None
            between()
    repeats = Repeats(runs=[run_at(task, p, d) for p, d in zip(PRODUCTS, DRIVE, strict=True)])
    predicted = float(np.median([t.token_s for t in timelines(task.candidate, task.rows)]))
    measured = np.median([np.median(run.token_s) for run in repeats.runs])
    assert predicted / measured - 1 < -0.2
    assert found.error(0, predicted, repeats) == pytest.approx(0.0, abs=1e-3)
    said = found.conditions(0, repeats)
    assert said["products_over_calibrated"] == pytest.approx(np.median(PRODUCTS))
    assert said["drive_over_calibrated"] == pytest.approx(np.median(DRIVE))
    assert said["rate_over_plain_batches"] == pytest.approx(said["rate_over_plain_reads"])
    assert said["rate_over_plain_reads"] == pytest.approx(1.0, abs=0.01)
    assert found.raw(0)["between_s"] == [[pytest.approx(plain / d)] * (task.lead + task.n_tokens) for d in DRIVE]
    assert found.raw(0)["read_s"] == [[plain / d] * 5 for _, d in looks]


def test_a_wrong_prediction_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(32 << 20))
    task = task_of(candidate(load_model("opt-125m"), "stream", STREAM), 3)
    found = Controls([(task, False)], file, threads=1)  # emulated: only products are looked at
    expected = product_seconds(task, ProductControl.rows, ProductControl.cols)
    monkeypatch.setattr(ProductControl, "seconds", lambda _: expected)
    for _ in range(2):
        found.look(0)
    assert found.error(0, 2.0, Repeats(runs=[SimpleNamespace(token_s=np.array([1.0, 1.0]))])) == pytest.approx(1.0)
    assert "drive_over_calibrated" not in found.conditions(0, Repeats(runs=[run_at(task, 1.0, 1.0)]))


def test_a_product_is_timed() -> None:
    assert 1e-5 < ProductControl("bf16", 1).seconds() < 1.0
