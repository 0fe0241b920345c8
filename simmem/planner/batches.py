"""How many sequences at once are worth their memory?

A batch shares what is read of the weights, and pays with memory for keys and values and with arithmetic: tokens a
second rise, and level off, fall or stop fitting at some size. `plan --objective throughput` looks for it when no batch
is named, and takes the fewest sequences that come within TOLERANCE of the most tokens a second: where they level off,
the last per cent costs many times the memory, and is less than what any prediction is sure of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from simmem.errors import InfeasiblePlanError, SpecError, TraceError
from simmem.planner.question import Question
from simmem.planner.rates import most_tokens_per_s
from simmem.policy.base import policy_named

__all__ = ["MOST_SEQUENCES", "TOLERANCE", "at_batch", "best_batch"]

TOLERANCE = 0.03
"""Share of the tokens a second that fewer sequences may cost."""
MOST_SEQUENCES = 4096
"""Batches beyond are not searched."""
PATIENCE = 2
"""Doublings in a row that bring less before it is given up."""
FINEST = 8
"""Around the best doubling, numbers are tried that are an eighth of it apart."""
STEP = 1.25
"""And below the fewest within the tolerance, until the next smaller number that was tried is nearer than this."""


def at_batch(at: Callable[[int], Question], batch: int | None, objective: str) -> Question:
    """The question at the batch that was asked for; else at one sequence, or for throughput at the number to take.

    Raises
    ------
    SpecError
        Where a knob that was set asks for another number of sequences.
    """
    if batch is None and objective == "throughput":
        return best_batch(at)
    question = at(1 if batch is None else batch)
    unit, exactly = _unit(question)
    given = question.workload.batch
    if given % unit or (exactly and given != unit):
        knobs = " ".join(f"--set {name}={value}" for name, value in question.fixed.items() if _unit(replace(
            question, fixed={k: v for k, v in question.fixed.items() if k != name})) != (unit, exactly))
        wanted = f"{unit}" if exactly else f"a multiple of {unit}"
        hint = "; --objective throughput looks for one" if batch is None and not exactly else ""
        raise SpecError(f"found {given}, expected {wanted}, as {knobs} asks for{hint}", key="--batch")
    return question


def best_batch(at: Callable[[int], Question]) -> Question:
    """The question at the fewest sequences within TOLERANCE of the most tokens a second, with what was tried.

    Only numbers that the knobs allow are tried: multiples of a GPU batch that was set, say.

    Parameters
    ----------
    at : the question at a number of sequences; may raise InfeasiblePlanError or TraceError where there is none.

    Raises
    ------
    InfeasiblePlanError, SpecError
        As for the smallest number.
    """
    first = at(1)
    unit, exactly = _unit(first)
    if unit > 1:
        first = at(unit)
    tried = {unit: most_tokens_per_s(first)}

    def rate(batch: int) -> float:
        if batch not in tried:
            question = _asked(at, batch)
            tried[batch] = 0.0 if question is None else most_tokens_per_s(question)
        return tried[batch]

    if tried[unit] and not exactly:
        for batch in _doublings(unit, tried):
            if not rate(batch):
                break
        centre = max(tried, key=tried.__getitem__)
        step = finest = centre // unit
        while (step := step // 2) >= max(finest // FINEST, 1):  # uphill, in steps that halve
            around = (centre + step * unit, centre - step * unit)
            centre = next((batch for batch in around if batch > 0 and rate(batch) > rate(centre)), centre)
        while (between := _between(tried, unit)) is not None:
            rate(between)
    best = _fewest(tried)
    return replace(first if best == unit else at(best),
                   batches_tried=tuple(sorted((b, found) for b, found in tried.items() if found)))


def _fewest(tried: dict[int, float]) -> int:
    """The smallest number of sequences within the tolerance of the most tokens a second."""
    most = max(tried.values())
    return min(batch for batch, found in tried.items() if found >= most * (1.0 - TOLERANCE))


def _between(tried: dict[int, float], unit: int) -> int | None:
    """A multiple of the unit halfway down to what was tried below the fewest; None where that is near enough."""
    fewest = _fewest(tried)
    below = max((batch for batch in tried if batch < fewest), default=fewest)
    middle = (below + fewest) // 2 // unit * unit
    return middle if fewest > STEP * below and below < middle < fewest else None


def _doublings(unit: int, tried: dict[int, float]) -> Iterator[int]:
    """Powers of two times the unit, until several in a row bring less than the best before."""
    batch, worse = 2 * unit, 0
    while batch <= MOST_SEQUENCES and worse < PATIENCE:
        best = max(tried.values())
        yield batch
        worse = worse + 1 if tried[batch] <= best else 0
        batch *= 2


def _unit(question: Question) -> tuple[int, bool]:
    """What the number of sequences must be a multiple of by the knobs that are set, and whether it must be just that.

    Raises SpecError where knobs contradict each other.
    """
    unit, exact = 1, set()
    for name in question.policy_names:
        asks = getattr(policy_named(name), "sequences", None)
        if asks is not None:
            its, exactly = asks(question.fixed)
            unit = math.lcm(unit, its)
            exact |= {its} if exactly else set()
    if exact and exact != {unit}:
        raise SpecError("the policies that are named ask for different numbers of sequences", key="--set")
    return unit, bool(exact)


def _asked(at: Callable[[int], Question], batch: int) -> Question | None:
    try:
        return at(batch)
    except (InfeasiblePlanError, TraceError):
        return None
