"""A share of every layer is resident, the rest is read again for every token ("hybrid" in LLM in a flash)."""

from __future__ import annotations

from collections.abc import Mapping
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
    depths,
)
from simmem.policy.layers import decode_schedule, prefill_schedule
from simmem.schedule import Schedule

__all__ = ["Stream"]

RATIO_STEP = 1 / 64
"""Grid of the resident share; the largest share that fits the budget is added to it."""


@register
class Stream:
    """Dense streaming with part of the weights resident."""

    name = "stream"
    summary = "a share of every layer resident, the rest read again for every token"
    uses_trace = False
    same_at_every_budget = True

    def knobs(self, context: Context) -> tuple[Knob, ...]:
        tiers: tuple[str, ...] = ("storage",) if context.device.is_unified else ("storage", "host")
        return (
            agent_knob(context),
            Knob("source_tier", "structural", tiers, "where streamed weights come from", default="storage"),
            Knob("prefetch_layers", "structural", (0, 1, 2), "stages read ahead of the compute", default=0,
                 low=0, high=8),
            Knob("resident_ratio", "demand", tuple(np.arange(0, 1, RATIO_STEP).tolist()),
                 "share of the weights that stays resident", low=0.0, high=1.0),
            Knob("reader_threads", "demand", depths(context), "reads in flight", default=32, low=1, high=1024),
        )

    def refine(self, context: Context, block: Block, fixed: Mapping[str, object]) -> Block:
        """Add the largest resident share that fits, which a grid would round down.

        Memory grows linearly in the share between its ends, so two footprints give the answer.
        """
        if "resident_ratio" in fixed:
            return block
        threads = np.unique(block.columns["reader_threads"])
        ends = Block(block.structural, {"resident_ratio": np.array([0.0, 1.0]),
                                        "reader_threads": threads[:1].repeat(2)})
        share = 1.0
        for tier, used in dense_footprint(context, ends).items():
            empty, full = float(used[0]), float(used[1])
            room = context.budget_bytes[tier] - empty
            if full > empty and room < full - empty:
                share = min(share, room / (full - empty) * (1 - 1e-9))
        if not 0 < share < 1:
            return block
        return Block(block.structural, {
            "resident_ratio": np.concatenate([block.columns["resident_ratio"], np.full(len(threads), share)]),
            "reader_threads": np.concatenate([block.columns["reader_threads"], threads])})

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
