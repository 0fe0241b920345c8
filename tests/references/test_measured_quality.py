"""Do simmem's perplexities of SmolLM2-135M without its inactive neurons agree with those of another program?

The record is of `benchmarks/quality_by_criterion.py`. The other program took one passage of 2048 tokens of each of the
same four texts, and did not note which, so that what remains is the difference between passages.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from simmem.spec import library

# Sparse / dense perplexity, geometric mean over the King James Bible, Austen, the Debian Handbook and An Anarchist FAQ.
PUBLISHED = {
    "gate": {0.5: 1.321, 0.7: 3.03, 0.8: 20.0, 0.9: 190.0},
    "magnitude": {0.5: 1.029, 0.7: 1.162, 0.8: 1.429, 0.9: 3.43},
    "wina": {0.5: 1.030, 0.7: 1.169, 0.8: 1.460, 0.9: 3.45},
    "top-k": {0.5: 1.036, 0.7: 1.203, 0.9: 4.94},
}
TOLERANCE = 0.05
MISSES = {
    ("gate", 0.8): "8.6 % less; there a point of sparsity more costs 20 % more perplexity, and thresholds of other "
                   "calibration tokens leave out half a point more or less",
    ("top-k", 0.9): "12.8 % less; single passages cost from 3.2 (Debian Handbook) to 7.8 (King James Bible)",
}


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    path = library.data_folder() / "validate" / "measured" / "smollm2-135m-quality" / "quality.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def log_ratios(record: dict[str, Any], criterion: str, level: float) -> Any:
    """Log of sparse over dense perplexity, shape (texts, passages); all passages are equally long."""
    texts = sorted({row["text"] for row in record["rows"]})
    found = [[np.log(next(p["perplexity"] for p in row["sparse"][criterion] if p["level"] == level)
                     / row["dense_perplexity"]) for row in record["rows"] if row["text"] == text] for text in texts]
    return np.array(found)


def test_the_record_says_where_it_comes_from(record: dict[str, Any]) -> None:
    assert {"torch", "transformers", "python"} <= set(record["versions"])
    assert len(record["texts"]) == 4
    assert all(len(text["evaluation_sha256"]) == 64 for text in record["texts"].values())
    assert len(record["rows"]) == 4 * record["passages"]
    assert len({(row["text"], row["passage"]) for row in record["rows"]}) == len(record["rows"])
    assert all(row["predicted_tokens"] == 2046 for row in record["rows"])


@pytest.mark.parametrize(("criterion", "level"), [(c, level) for c, levels in PUBLISHED.items() for level in levels])
def test_ratios_agree_with_another_program(record: dict[str, Any], criterion: str, level: float) -> None:
    ratio = float(np.exp(log_ratios(record, criterion, level).mean()))
    error = ratio / PUBLISHED[criterion][level] - 1
    if (criterion, level) in MISSES:
        assert abs(error) > TOLERANCE, "it agrees now: take it out of the misses"
    else:
        assert abs(error) <= TOLERANCE, f"{ratio:.4g} is {error:+.1%} off"


@pytest.mark.parametrize(("criterion", "level"), list(MISSES))
def test_a_miss_is_within_what_passages_differ_by(record: dict[str, Any], criterion: str, level: float) -> None:
    ratios = np.exp(log_ratios(record, criterion, level))
    assert ratios.min() < PUBLISHED[criterion][level] < ratios.max()


def test_the_share_left_out_is_near_the_one_asked_for(record: dict[str, Any]) -> None:
    for row in record["rows"]:
        for criterion, points in row["sparse"].items():
            for point in points:
                assert point["sparsity"] == pytest.approx(point["level"], abs=0.04), (row["text"], criterion)
