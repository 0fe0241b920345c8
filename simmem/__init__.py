"""simmem: where the parts of a model live on a device, what moves when, how fast, and is that true?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simmem.planner.api import plan
    from simmem.planner.grid.frame import sweep
    from simmem.report import pictures

__all__ = ["pictures", "plan", "sweep"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:  # lazily, so that `simmem --help` imports no numpy
        raise AttributeError(f"module 'simmem' has no attribute {name!r}")
    from simmem.planner.document import Plan
    from simmem.report.notebook import html_of

    Plan.as_html = html_of
    if name == "plan":
        from simmem.planner.api import plan

        return plan
    if name == "sweep":
        from simmem.planner.grid.frame import sweep

        return sweep
    from simmem.report import pictures

    return pictures
