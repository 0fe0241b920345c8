"""Which plans are run to see whether predictions hold? The steps of LLM in a flash, and what lies around them.

A cell is one model, budget and storage: within it plans are ranked, and the one simmem would choose is run beside the
others. A rung names a policy and knobs; what of it has to fit takes the largest value that does. Every plan is of one
machine, either with its own storage or with another device's in its place (emulated).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from simmem.errors import SpecError
from simmem.planner.candidate import Candidate, blocks, capacity_cut
from simmem.planner.question import Question, ask
from simmem.planner.ranking import event_seconds, prove, search
from simmem.policy.base import KnobValue, policy_named
from simmem.spec.device import Device
from simmem.validation.runs import Storage, with_storage_of

__all__ = ["POLICIES", "Cell", "Climbed", "Rung", "Step", "cells", "climb", "fit_rung", "rungs"]

POLICIES = ("resident", "stream", "flash-window")
"""What the choice of a cell is made from."""
_READERS = 32
_WINDOW = 4
"""Of LLM in a flash. [tokens]"""
CHOSEN = "chosen"
SCORING = 4
"""Trace tokens that a choice is made on."""


@dataclass(frozen=True)
class Rung:
    """A way to run a model: policy, knobs, and which knob takes the largest value that fits."""

    name: str
    policy: str
    knobs: Mapping[str, KnobValue] = field(default_factory=dict)
    largest: str | None = None
    extra: bool = False
    """Left out first where time is short."""
    quick: bool = True
    """Part of a short ladder."""
    emulated: bool = True
    """Run on emulated storage too, in a short ladder."""


@dataclass(frozen=True)
class Cell:
    """Plans that compete: one model within one budget on one storage."""

    question: Question
    """Its budgets and device are the cell's."""
    weights: str
    storage: Storage
    share: float
    """Of the weights, that the budget holds beside keys, values and activations."""

    @property
    def name(self) -> str:
        return f"{self.question.model.name}/{self.storage}/{100 * self.share:g}%"


@dataclass(frozen=True)
class Step:
    """A rung within a cell: the plan that is run."""

    cell: Cell
    names: tuple[str, ...]
    """The rung's, and `chosen` where simmem would choose it."""
    candidate: Candidate
    expected_s: float
    """Of a token, by the event engine. [s]"""
    extra: bool

    @property
    def id(self) -> str:
        return f"{self.cell.name}/{self.names[0]}"

    @property
    def chosen(self) -> bool:
        return CHOSEN in self.names


@dataclass(frozen=True)
class Climbed:
    """The plans of a cell, and why rungs are missing."""

    steps: tuple[Step, ...]
    left_out: Mapping[str, str]


def rungs(*, quick: bool, emulated: bool) -> tuple[Rung, ...]:
    """The ladder, its five published steps first."""
    def stream(name: str, depth: int = _READERS, ahead: int = 0, **how: object) -> Rung:
        return Rung(name, "stream", {"reader_threads": depth, "prefetch_layers": ahead}, "resident_ratio",
                    **how)  # type: ignore[arg-type]

    def window(name: str, depth: int = _READERS, *, tokens: int = _WINDOW, bundled: bool = True, coalesce: bool = False,
               **how: object) -> Rung:
        return Rung(name, "flash-window",
                    {"reader_threads": depth, "prefetch_layers": 0, "window_tokens": tokens, "bundled": bundled,
                     "coalesce": coalesce}, "attention_resident", **how)  # type: ignore[arg-type]

    nothing: dict[str, KnobValue] = {"reader_threads": _READERS, "resident_ratio": 0.0}
    more = {"extra": True, "emulated": False}
    full = {"extra": True, "quick": False}
    every = (
        Rung("naive", "stream", {**nothing, "prefetch_layers": 0}),
        stream("hybrid"),
        window("predicted", tokens=0, bundled=False),
        window("windowed", bundled=False),
        window("bundled"),
        window("windowed-4-readers", 4, bundled=False, **more),
        window("bundled-4-readers", 4, **more),
        Rung("layer-stream", "stream", {**nothing, "prefetch_layers": 1}, **more),  # type: ignore[arg-type]
        stream("hybrid-ahead", ahead=1, **more),
        stream("hybrid-1-reader", 1, **more),
        window("no-window", tokens=0, **more),
        window("window-12", tokens=12, **more),
        window("merged", coalesce=True, **more),
        window("merged-split", coalesce=True, bundled=False, **full),
        window("window-1", tokens=1, **full),
        window("window-8", tokens=8, **full),
        window("window-24", tokens=24, **full),
        window("bundled-1-reader", 1, **full),
        window("bundled-8-readers", 8, **full),
        window("bundled-64-readers", 64, **full),
        stream("hybrid-ahead-2", ahead=2, **full),
        stream("hybrid-8-readers", 8, **full),
        Rung("quarter", "stream", {"reader_threads": _READERS, "resident_ratio": 0.25, "prefetch_layers": 0},
             **full))  # type: ignore[arg-type]
    return tuple(r for r in every if not quick or (r.quick and (r.emulated or not emulated)))


def cells(device: str, model: str, shares: Iterable[float], *, weights: str, prompt: int, new_tokens: int,
          trace: str | None = None, emulate: Device | None = None) -> list[Cell]:
    """One cell for each budget and storage; a share of 1 means that everything is resident.

    Parameters
    ----------
    device : the machine at hand; a name or file.
    emulate : whose storage is emulated; None for none.

    Raises SpecError where the question cannot be asked.
    """
    asked = ask(device, model, prompt=prompt, new_tokens=new_tokens, weights=weights, kv=weights, trace=trace,
                policy=POLICIES)
    here = asked.device
    if not here.is_unified and asked.context(weights).host_agent is None:
        raise SpecError("has no processor that computes out of its main memory", key=device)
    both: list[tuple[Storage, Device]] = [("real", here)]
    if emulate is not None:
        both.append(("emulated", with_storage_of(here, emulate)))
    found = []
    for storage, machine in both:
        for share in shares:
            if share >= 1 and storage == "emulated":
                continue  # nothing is read there
            question = replace(asked, device=machine)
            context = question.context(weights)
            budget = dict(question.budget_bytes)
            if share < 1:
                budget[machine.host] = share * context.total_bytes + context.kv_bytes + context.working_bytes
            found.append(Cell(replace(question, budget_bytes=budget), weights, storage, share))
    return found


def climb(cell: Cell, ladder: Sequence[Rung]) -> Climbed:
    """The plans of a cell: every rung that fits, and what simmem would choose itself."""
    context = cell.question.context(cell.weights)
    agent = str(context.host_agent)
    if cell.share >= 1:
        ladder = (Rung("resident", "resident"),)
    steps: list[Step] = []
    left_out: dict[str, str] = {}
    for rung in ladder:
        try:
            candidate = fit_rung(cell, rung)
        except SpecError as error:
            left_out[f"{cell.name}/{rung.name}"] = str(error)
            continue
        if candidate is None:
            left_out[f"{cell.name}/{rung.name}"] = "does not fit the budget, or there is no trace to plan it with"
        else:
            steps.append(Step(cell, (rung.name,), candidate, event_seconds(candidate, SCORING), rung.extra))
    if cell.share < 1:
        best = _choice(cell, agent)
        same = [i for i, s in enumerate(steps) if (s.candidate.policy, s.candidate.knobs) == (best.policy, best.knobs)]
        if same:
            steps[same[0]] = replace(steps[same[0]], names=(*steps[same[0]].names, CHOSEN), extra=False)
        else:
            steps.append(Step(cell, (CHOSEN,), best, event_seconds(best, SCORING), extra=False))
    return Climbed(tuple(steps), left_out)


def fit_rung(cell: Cell, rung: Rung) -> Candidate | None:
    """The plan of a rung with the largest value of its knob that fits; None where none does.

    What the rung does not name: the processor computes, from storage, and other knobs take their default.
    """
    policy, context = policy_named(rung.policy), cell.question.context(cell.weights)
    fixed: dict[str, object] = {"agent": str(context.host_agent), **rung.knobs}
    if rung.policy == "stream":
        fixed.setdefault("source_tier", "storage")
    found: list[tuple[float, Candidate]] = []
    for block in blocks(policy, context, fixed, defaults=True):
        for index in np.flatnonzero(capacity_cut(policy, context, block).fits).tolist():
            one = block.only(np.array([index]))
            size = float(one.columns[rung.largest][0]) if rung.largest is not None else 0.0
            found.append((size, Candidate(context, policy, one)))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _choice(cell: Cell, agent: str) -> Candidate:
    """What the planner's own search answers within the cell, on the processor and from storage."""
    asked = cell.question
    found: list[Candidate] = []
    for name in POLICIES:
        fixed: dict[str, object] = {"agent": agent}
        if name == "stream":
            fixed["source_tier"] = "storage"
        found += search(replace(asked, policy_names=(name,), fixed=fixed), cell.weights).ranked
    if not found:
        raise SpecError(f"nothing fits {cell.name}", key="--model")
    return prove(sorted(found, key=lambda c: c.score_s))[0]
