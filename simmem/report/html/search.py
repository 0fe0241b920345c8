"""What does the page of a search know? Its cells, with what is needed to show the plan of one that is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simmem import __version__
from simmem.planner.explain import LIMITS
from simmem.planner.grid.document import SearchCell, SearchDocument
from simmem.report.html.page import page
from simmem.report.plan import quality_words, step_words, weights_words
from simmem.report.search import notes_of, verdict_of

__all__ = ["search_page"]


def search_page(found: SearchDocument, path: Path) -> str:
    """One page about a search that was read from `path`."""
    title = f"simmem search: {found.spec}"
    data = {"about": "search", "simmem": __version__, "title": title, "file": path.name, "made_by": found.simmem,
            "verdict": verdict_of(found), "notes": notes_of(found),
            "against": found.baseline.file if found.baseline else None,
            "parts": LIMITS, "cells": [_cell(one) for one in found.cells]}
    return page(title, data, ("search.js",), f"{verdict_of(found)}. The cells need JavaScript to be shown.")


def _cell(cell: SearchCell) -> dict[str, Any]:
    plan, said = cell.plan, None
    if plan is not None:
        said = {**plan.model_dump(mode="json", include={
            "policy", "residency", "memory", "predicted", "bound", "baselines", "evidence", "why"}),
            "weights": plan.workload.label, "trace": f"{plan.trace.kind} {plan.trace.name}" if plan.trace else None,
            "words": {"weights": weights_words(plan), "step": step_words(plan), "quality": quality_words(plan)}}
    return {**cell.model_dump(mode="json", include={"id", "status", "limits", "figures", "infeasible", "violations",
                                                    "changes", "expect"}),
            "device": cell.question.device, "model": cell.question.model, "plan": said}
