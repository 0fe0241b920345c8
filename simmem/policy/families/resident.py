"""Everything stays in the memory that the computing unit reads: nothing moves per token."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.policy.base import Block, Knob, Placement, register
from simmem.policy.context import Context
from simmem.policy.families._dense import (
    agent_knob,
    dense_demands,
    dense_footprint,
    dense_placements,
    dense_report,
)
from simmem.policy.layers import decode_schedule, prefill_schedule
from simmem.schedule import Schedule

__all__ = ["Resident"]


@register
class Resident:
    """All weights resident."""

    name = "resident"
    summary = "all weights in the computing unit's memory"
    uses_trace = False
    same_at_every_budget = True

    def knobs(self, context: Context) -> tuple[Knob, ...]:
        return (agent_knob(context),)

    def footprint(self, context: Context, block: Block) -> dict[str, NDArray[np.float64]]:
        return dense_footprint(context, block)

    def decode(self, context: Context, block: Block, rows: NDArray[np.int64]) -> Schedule:
        return decode_schedule(context, dense_demands(context, block, len(rows)))

    def prefill(self, context: Context, block: Block) -> Schedule:
        return prefill_schedule(context, dense_demands(context, block))

    def placements(self, context: Context, block: Block) -> list[Placement]:
        return dense_placements(context, block)

    def report(self, context: Context, block: Block, rows: NDArray[np.int64]) -> dict[str, Any]:
        return dense_report(context, block)
