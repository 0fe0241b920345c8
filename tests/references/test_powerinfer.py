"""Are PowerInfer's own figures within the stated tolerance, and what was averaged over models, as an average?"""

from __future__ import annotations

import numpy as np
import pytest

from simmem.validation.reference import Reproduction, reproduce


@pytest.fixture(scope="module")
def rows() -> Reproduction:
    return reproduce(["powerinfer"])


def test_every_judged_row_is_within_its_tolerance(rows: Reproduction) -> None:
    assert [(r.id, r.error, r.message) for r in rows.failed] == []
    assert {r.id for r in rows.rows if r.expect == "judged"} == {
        "powerinfer/opt-30b", "powerinfer/opt-30b-llama.cpp", "powerinfer/opt-30b-gpu-load"}


def test_the_gpus_share_of_four_models_under_llama_cpp_is_near_the_published_average(rows: Reproduction) -> None:
    shares = [r.predicted for r in rows.rows if r.id.endswith("-gpu-load-llama.cpp")]
    assert len(shares) == 4 and all(s is not None for s in shares)
    assert float(np.mean([s for s in shares if s is not None])) == pytest.approx(0.20, abs=0.10)
