"""Is the batch that is found the most productive one, and is it found where memory ends?"""

from __future__ import annotations

from functools import cache

import pytest

from simmem.planner.api import plan
from simmem.planner.batches import at_batch, best_batch
from simmem.planner.question import Question, ask


@cache
def asked(batch: int, vram: str = "1 GB") -> Question:
    return ask("rtx4090-pc", "opt-125m", vram=vram, prompt=64, new_tokens=32, batch=batch, weights="fp16",
               policy="resident", objective="throughput")


def test_no_batch_nearby_brings_more() -> None:
    found = best_batch(asked)
    rates = dict(found.batches_tried)
    best = found.workload.batch
    assert rates[best] == max(rates.values()) > 10 * rates[1]
    assert plan("rtx4090-pc", "opt-125m", vram="1 GB", prompt=64, new_tokens=32, weights="fp16", policy="resident",
                objective="throughput", batch=best).predicted.tokens_per_s == pytest.approx(rates[best], rel=0.02)


def test_memory_ends_the_search() -> None:
    found = best_batch(lambda batch: asked(batch, "0.5 GB"))
    assert max(dict(found.batches_tried)) < max(dict(best_batch(asked).batches_tried))


def test_only_throughput_without_a_batch_is_searched() -> None:
    assert at_batch(asked, None, "latency").workload.batch == 1
    assert at_batch(asked, 3, "throughput").workload.batch == 3
    assert at_batch(asked, None, "throughput").workload.batch > 1
