"""Are the plans of the ladder those it names, and do they fit what they are given?"""

from __future__ import annotations

from dataclasses import replace

import pytest

from simmem.errors import SpecError
from simmem.spec.device import load_device
from simmem.validation.ladder import Cell, cells, climb, rungs

QUICK = rungs(quick=True, emulated=False)


def some_cells(share: float) -> list[Cell]:
    return cells("cloud-vm", "smollm2-135m", (share,), weights="fp32", prompt=64, new_tokens=32,
                 emulate=load_device("pi5-nvme"))


def test_every_step_fits_and_could_not_hold_a_block_more() -> None:
    for cell in some_cells(0.75):
        steps = climb(cell, QUICK).steps
        for step in steps:
            budget, used = step.candidate.context.budget_bytes, step.candidate.used_bytes()
            assert all(used[tier] <= budget[tier] for tier in used)
        hybrid = next(s for s in steps if "hybrid" in s.names)
        assert used["dram"] > 0
        held = hybrid.candidate.used_bytes()["dram"]
        assert held == pytest.approx(cell.question.budget_bytes["dram"], rel=1e-6), "the largest share that fits"
        assert sum(s.chosen for s in steps) == 1
        assert len({s.id for s in steps}) == len(steps)


def test_the_published_steps_differ_by_one_thing_each() -> None:
    steps = {n: s.candidate for s in climb(some_cells(0.75)[0], QUICK).steps for n in s.names}
    asked, split, many, few = (steps[n].knobs for n in ("predicted", "windowed", "bundled", "bundled-4-readers"))
    assert {k for k in asked if asked[k] != split[k]} == {"window_tokens"}
    assert {k for k in split if split[k] != many[k]} == {"bundled"}
    assert {k for k in few if few[k] != many[k]} == {"reader_threads"}
    assert (steps["naive"].policy.name, steps["naive"].knobs["resident_ratio"]) == ("stream", 0.0)


def test_cells_have_the_storage_they_name() -> None:
    real, emulated = some_cells(0.5)
    assert (real.storage, emulated.storage) == ("real", "emulated")
    assert real.name == "smollm2-135m/real/50%"
    ours, theirs = (c.question.context("fp32").storage_link[1].rate for c in (real, emulated))
    assert ours == load_device("cloud-vm").link["flash"].rate
    assert theirs == load_device("pi5-nvme").link["flash"].rate
    whole = some_cells(1.0)
    assert [c.storage for c in whole] == ["real"], "nothing is read, so nothing is emulated"
    assert [s.names for s in climb(whole[0], QUICK).steps] == [("resident",)]


def test_what_does_not_fit_is_said() -> None:
    cell = some_cells(0.5)[0]
    budget = {**cell.question.budget_bytes, "dram": 1e6}
    with pytest.raises(SpecError, match="nothing fits"):
        climb(replace(cell, question=replace(cell.question, budget_bytes=budget)), QUICK)
    small = cells("cloud-vm", "opt-125m", (0.5,), weights="fp32", prompt=64, new_tokens=32)[0]
    found = climb(small, QUICK)
    assert "opt-125m/real/50%/bundled" in found.left_out
    assert {n for s in found.steps for n in s.names} >= {"naive", "hybrid", "chosen"}


def test_a_short_ladder_is_part_of_a_full_one() -> None:
    for emulated in (False, True):
        quick, full = ({r.name for r in rungs(quick=q, emulated=emulated)} for q in (True, False))
        assert quick < full
    assert [r.name for r in QUICK[:5]] == ["naive", "hybrid", "predicted", "windowed", "bundled"]
