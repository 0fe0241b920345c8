"""Is the batch that is found worth its memory, and does it keep to what fits and to knobs that are set?"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import cast
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmem.errors import SpecError
from simmem.planner import batches
from simmem.planner.api import plan
from simmem.planner.batches import FINEST, MOST_SEQUENCES, STEP, TOLERANCE, at_batch, best_batch
from simmem.planner.question import Question, ask


@cache
def asked(batch: int, vram: str = "1 GB") -> Question:
    return ask("rtx4090-pc", "opt-125m", vram=vram, prompt=64, new_tokens=32, batch=batch, weights="fp16",
               policy="resident", objective="throughput")


def test_no_batch_nearby_brings_more() -> None:
    found = best_batch(asked)
    rates = dict(found.batches_tried)
    best = found.workload.batch
    assert rates[best] >= (1 - TOLERANCE) * max(rates.values()) > 10 * rates[1]
    assert all(rate < (1 - TOLERANCE) * max(rates.values()) for batch, rate in rates.items() if batch < best)
    answer = plan("rtx4090-pc", "opt-125m", vram="1 GB", prompt=64, new_tokens=32, weights="fp16", policy="resident",
                  objective="throughput", batch=best)
    assert answer.predicted.tokens_per_s == pytest.approx(rates[best], rel=0.02)


def test_memory_ends_the_search() -> None:
    found = best_batch(lambda batch: asked(batch, "0.5 GB"))
    assert max(dict(found.batches_tried)) < max(dict(best_batch(asked).batches_tried))


def test_only_throughput_without_a_batch_is_searched() -> None:
    assert at_batch(asked, None, "latency").workload.batch == 1
    assert at_batch(asked, 3, "throughput").workload.batch == 3
    assert at_batch(asked, None, "throughput").workload.batch > 1


@given(st.floats(1, 3000), st.integers(1, 6000))
def test_where_the_rate_levels_off_the_last_per_cent_is_not_bought(half: float, most: int) -> None:
    """Tokens a second b / (half + b), and none beyond what fits: the fewest within the tolerance, or near to it."""
    def rate(batch: int) -> float:
        return batch / (half + batch) if batch <= most else 0.0

    with patch.object(batches, "most_tokens_per_s", lambda question: rate(question.workload.batch)), \
            patch.object(batches, "_unit", lambda question: (1, False)), \
            patch.object(batches, "replace", lambda question, batches_tried: SimpleNamespace(
                workload=question.workload, batches_tried=batches_tried)):
        found = best_batch(cast(Callable[[int], Question], lambda batch: SimpleNamespace(
            workload=SimpleNamespace(batch=batch))))
    best, tried = found.workload.batch, dict(found.batches_tried)
    assert rate(best) >= (1 - TOLERANCE) * max(tried.values())
    # Up to an eighth short of where memory ends, or of what is searched.
    assert max(tried.values()) >= rate(min(most, MOST_SEQUENCES)) * FINEST / (FINEST + 1)
    smaller = int(best / STEP) - 1
    assert smaller < 1 or rate(smaller) < (1 - TOLERANCE) * max(tried.values())


# --- knobs that say something of the batch ------------------------------------------------------------------------


def with_knobs(**knobs: object) -> Callable[[int], Question]:
    return lambda batch: ask("flexgen-t4", "opt-1.3b", prompt=512, new_tokens=8, batch=batch, weights="fp16",
                             policy="tier-percent", objective="throughput", knobs=knobs)


def test_batches_are_those_that_a_gpu_batch_divides() -> None:
    split = {"weights_percent": "100,0", "kv_percent": "0,100", "activations_percent": "100,0"}
    found = best_batch(with_knobs(gpu_batch="6", **split))
    assert len(found.batches_tried) > 3
    assert all(batch % 6 == 0 for batch, _ in found.batches_tried)
    turns = best_batch(with_knobs(n_gpu_batches="5", **split))
    assert all(batch % 5 == 0 for batch, _ in turns.batches_tried)
    both = best_batch(with_knobs(gpu_batch="6", n_gpu_batches="5", **split))
    assert [batch for batch, _ in both.batches_tried] == [both.workload.batch] == [30]


@pytest.mark.parametrize(("batch", "objective", "knobs", "said"), [
    (None, "latency", {"gpu_batch": "6"}, "found 1, expected a multiple of 6, as --set gpu_batch=6 asks for; "
                                          "--objective throughput looks for one"),
    (10, "throughput", {"gpu_batch": "6", "cpu_attention": "false"}, "found 10, expected a multiple of 6, as --set "
                                                                     "gpu_batch=6 asks for"),
    (60, "latency", {"gpu_batch": "6", "n_gpu_batches": "5"}, "found 60, expected 30, as --set gpu_batch=6 --set "
                                                              "n_gpu_batches=5 asks for"),
    (None, "throughput", {"gpu_batch": "0"}, "found '0', expected a value from 1 to 10000000"),
    (None, "throughput", {"gpu_batch": "few"}, "found 'few', expected a number")])
def test_a_batch_that_cannot_be_is_one_line(batch: int | None, objective: str, knobs: dict[str, str], said: str
                                            ) -> None:
    with pytest.raises(SpecError) as caught:
        at_batch(with_knobs(**knobs), batch, objective)
    assert caught.value.message == said
