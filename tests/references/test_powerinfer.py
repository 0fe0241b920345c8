"""Are PowerInfer's own figures within the stated tolerance, and would its machine be told to do as it does?"""

from __future__ import annotations

import pytest

from simmem.planner.api import answer
from simmem.planner.question import ask
from simmem.validation.reference import Reproduction, reproduce


@pytest.fixture(scope="module")
def rows() -> Reproduction:
    return reproduce(["powerinfer"])


def test_every_judged_row_is_within_its_tolerance(rows: Reproduction) -> None:
    assert [(r.id, r.error, r.message) for r in rows.failed] == []
    assert {r.id for r in rows.rows if r.expect == "judged"} == {
        "powerinfer/opt-30b", "powerinfer/opt-30b-llama.cpp", "powerinfer/opt-30b-gpu-load",
        "powerinfer/mean-gpu-load-llama.cpp"}


def test_a_gpu_too_small_for_a_sparse_model_is_told_to_share_its_neurons() -> None:
    """The CPU could hold all of it, at a fifteenth of the speed."""
    plan = answer(ask("powerinfer-pc-high", "opt-30b", weights="fp16"), brief=True)
    assert plan.policy.name == "hot-cold"
    assert max(b.speedup for b in plan.baselines if b.policy == "layer-split") > 5
