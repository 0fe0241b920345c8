"""How many sequences at once bring the most tokens a second?

A batch shares what is read of the weights, and pays with memory for keys and values and with arithmetic: tokens a
second rise, and fall or stop fitting at some size. `plan --objective throughput` looks for it when no batch is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from simmem.errors import InfeasiblePlanError, TraceError
from simmem.planner.question import Question
from simmem.planner.rates import most_tokens_per_s

__all__ = ["MOST_SEQUENCES", "at_batch", "best_batch"]

MOST_SEQUENCES = 4096
"""Batches beyond are not searched."""
PATIENCE = 2
"""Doublings in a row that bring less before it is given up."""
BETWEEN = (3 / 4, 7 / 8, 9 / 8, 5 / 4, 3 / 2)
"""Sizes around the best power of two that are tried too."""


def at_batch(at: Callable[[int], Question], batch: int | None, objective: str) -> Question:
    """The question at the batch that was asked for; else at one sequence, or at the best number for throughput."""
    return best_batch(at) if batch is None and objective == "throughput" else at(1 if batch is None else batch)


def best_batch(at: Callable[[int], Question]) -> Question:
    """The question at the batch that brings the most tokens a second, with what was tried.

    Parameters
    ----------
    at : the question at a number of sequences; may raise InfeasiblePlanError or TraceError where there is none.

    Raises
    ------
    InfeasiblePlanError, SpecError
        As for one sequence.
    """
    first = at(1)
    best, tried = first, {1: most_tokens_per_s(first)}
    for batch in _doublings(tried):
        question = _asked(at, batch)
        tried[batch] = 0.0 if question is None else most_tokens_per_s(question)
        if question is not None and tried[batch] > tried[best.workload.batch]:
            best = question
        if not tried[batch]:
            break
    near = best.workload.batch
    for batch in sorted({round(near * factor) for factor in BETWEEN} - set(tried)):
        question = _asked(at, batch)
        if question is not None:
            tried[batch] = most_tokens_per_s(question)
            if tried[batch] > tried[best.workload.batch]:
                best = question
    return replace(best, batches_tried=tuple(sorted((b, rate) for b, rate in tried.items() if rate)))


def _doublings(tried: dict[int, float]) -> Iterator[int]:
    """Powers of two, until several in a row bring less than the best before."""
    batch, worse = 2, 0
    while batch <= MOST_SEQUENCES and worse < PATIENCE:
        best = max(tried.values())
        yield batch
        worse = worse + 1 if tried[batch] <= best else 0
        batch *= 2


def _asked(at: Callable[[int], Question], batch: int) -> Question | None:
    try:
        return at(batch)
    except (InfeasiblePlanError, TraceError):
        return None
