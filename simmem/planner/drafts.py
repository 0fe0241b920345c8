"""How many tokens should a draft model propose for each step, if any?

A longer draft yields more tokens a step when it is accepted, and costs its passes, its memory and the arithmetic of
verifying it. `plan --draft` tries the lengths of a small grid unless one is set; 0 is the plan without a draft.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from simmem.errors import InfeasiblePlanError, TraceError
from simmem.planner.batches import at_batch
from simmem.planner.explain import rate_digits
from simmem.planner.question import DRAFT_LENGTH, DRAFT_LENGTHS, Question
from simmem.planner.ranking import objective_value, search
from simmem.planner.rates import most_tokens_per_s
from simmem.units import format_quantity

__all__ = ["at_draft", "searches_lengths", "tried_in_words"]

_SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "latency": ("time of a token", lambda value: format_quantity(value, "s")),
    "throughput": ("tokens a second", lambda value: rate_digits(1.0 / value)),
    "energy": ("energy of a token", lambda value: f"{value:.3g} J"),
    "memory": ("memory", lambda value: format_quantity(value, "bytes"))}
"""Objective → what is compared, and how a value of it reads."""


def searches_lengths(draft: str | None, knobs: Mapping[str, object] | None) -> bool:
    """Whether a draft model was named, and no length of its drafts."""
    return draft is not None and DRAFT_LENGTH.name not in (knobs or {})


def at_draft(at: Callable[[int, int | None], Question], batch: int | None, objective: str, *, searched: bool
             ) -> Question:
    """The question at the batch that was asked for, or the best one, and at the draft length that does best.

    A batch that is searched is that of the model alone: drafts pay where arithmetic is left over, and a batch that
    was searched leaves none but where memory ended it.

    Parameters
    ----------
    at : the question at a number of sequences and a draft length, None for what the knobs say.
    searched : whether lengths are tried; else they are what the knobs say.

    Raises
    ------
    InfeasiblePlanError, SpecError, TraceError
        As without a draft.
    """
    if not searched:
        return at_batch(lambda sequences: at(sequences, None), batch, objective)
    alone = at_batch(lambda sequences: at(sequences, 0), batch, objective)
    best, least, tried = alone, _value(alone), []
    if least is not None:
        tried.append((0, least))
    for length in DRAFT_LENGTHS[1:]:
        try:
            question = at(alone.workload.batch, length)
        except (InfeasiblePlanError, TraceError):
            continue
        value = _value(question)
        if value is None:
            continue
        tried.append((length, value))
        if least is None or value < least:
            best, least = question, value
    return replace(best, batches_tried=alone.batches_tried, drafts_tried=tuple(tried))


def _value(question: Question) -> float | None:
    """What the objective asks to be small, of the best candidate at any of the precisions; None where none fits."""
    if question.objective == "throughput":
        rate = most_tokens_per_s(question)
        return 1.0 / rate if rate else None
    ranked = [c for precision in question.precisions for c in search(question, precision).ranked]
    if question.objective == "latency":
        return min((c.score_s for c in ranked), default=None)
    return min((value[0] for c in ranked if (value := objective_value(c, question.objective))), default=None)


def tried_in_words(question: Question) -> list[str]:
    """What other draft lengths would bring, and whether any helps, where they were searched."""
    if not question.drafts_tried or question.workload.draft is None:
        return []
    name, (what, shown) = question.workload.draft.model.name, _SHOWN[question.objective]
    said = ", ".join(f"{length}: {shown(value)}" for length, value in question.drafts_tried)
    verdict = "" if question.workload.draft_length else f"; {name} does not help here"
    return [f"{what} by tokens that {name} drafts for a step, at an acceptance of "
            f"{format_quantity(question.workload.draft.acceptance, 'ratio')}: {said}{verdict}"]
