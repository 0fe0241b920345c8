"""Which engines can a plan be given to, and how is the answer shown?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.text import Text

from simmem.errors import SpecError
from simmem.planner.document import Emission, Plan
from simmem.planner.question import Question
from simmem.report.emit import accelerate, llama_cpp
from simmem.report.emit.asked import Asked
from simmem.report.format import console as new_console

__all__ = ["ENGINES", "check_engine_name", "emission", "print_emission"]

ENGINES: Mapping[str, Callable[[Asked], Emission]] = {llama_cpp.NAME: llama_cpp.emit, accelerate.NAME: accelerate.emit}
"""Name → what it makes of a plan."""

_VERDICTS = {"exact": "does this plan as it is", "nearest": "comes near this plan, with the differences below",
             "no": "cannot do this plan"}


def check_engine_name(name: str) -> None:
    """Raise SpecError for an engine that is not known."""
    if name not in ENGINES:
        raise SpecError(f"found {name!r}, expected one of {', '.join(ENGINES)}", key="--emit")


def emission(plan: Plan, question: Question, engine: str) -> Plan:
    """The plan with what makes an engine do it."""
    check_engine_name(engine)
    asked = Asked(plan, question.context(plan.workload.weights))
    found = ENGINES[engine](asked)
    if plan.workload.draft_length:
        found = found.model_copy(update={
            "realises": "no" if found.realises == "no" else "nearest",
            "cannot": [*found.cannot, f"draft with {plan.workload.draft}: simmem knows no settings for that, so a step "
                                      "yields one token"]})
    return plan.model_copy(update={"emit": found})


def print_emission(emit: Emission) -> None:
    """Print the verdict, what the engine cannot do, what to copy, and what it does differently."""
    console = new_console()
    console.print()
    console.print(Text(f"{emit.engine} {_VERDICTS[emit.realises]}", style="bold"))
    _list("It cannot", emit.cannot)
    if emit.text is not None:
        console.print()
        print(emit.text)  # as it is: a wrapped line would no longer be what a shell or Python reads
        console.print()
    _list("It does differently", emit.differs)
    if emit.instead is not None:
        _list("Instead", [emit.instead])


def _list(title: str, lines: list[str]) -> None:
    if lines:
        console = new_console()
        console.print(Text.assemble(f"{title}:", *(f"\n· {line}." for line in lines)))
