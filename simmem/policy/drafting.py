"""Room for a draft model beside any policy, and what is said of it.

What the draft computes is part of every decode step and prompt (`Ops.draft`), whatever the policy. Here the memory of
the unit that computes gets its weights and its keys and values, and the policy what they leave of the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.policy.base import Block, Knob, Placement, Policy
from simmem.policy.context import Context
from simmem.schedule import Schedule
from simmem.units import format_quantity

__all__ = ["Drafted", "drafted"]

Array = NDArray[np.float64]


def drafted(policy: Policy, context: Context) -> Policy:
    """The policy, with a draft model beside it where the context has one."""
    return policy if context.drafting is None else Drafted(policy)


class Drafted:
    """A policy whose agent keeps a draft model in its memory; only for contexts with one."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.name, self.summary, self.uses_trace = policy.name, policy.summary, policy.uses_trace

    def __getattr__(self, name: str) -> Any:  # what only some policies have
        if name == "_policy":
            raise AttributeError(name)
        return getattr(self._policy, name)

    def knobs(self, context: Context) -> tuple[Knob, ...]:
        return self._policy.knobs(context)

    def refine(self, context: Context, block: Block, fixed: Mapping[str, object]) -> Block:
        own = getattr(self._policy, "refine", None)
        return block if own is None else own(self._beside(context, block), block, fixed)

    def footprint(self, context: Context, block: Block) -> dict[str, Array]:
        used = dict(self._policy.footprint(self._beside(context, block), block))
        for tier, n_bytes in _room(context, block).items():
            used[tier] = used.get(tier, np.zeros(block.n_candidates)) + n_bytes
        return used

    def decode(self, context: Context, block: Block, rows: NDArray[np.int64]) -> Schedule:
        return _holding(self._policy.decode(self._beside(context, block), block, rows), context, block)

    def prefill(self, context: Context, block: Block) -> Schedule:
        return _holding(self._policy.prefill(self._beside(context, block), block), context, block)

    def placements(self, context: Context, block: Block) -> list[Placement]:
        drafting, fast = _drafting(context), _fast(context, block)
        return [*self._policy.placements(self._beside(context, block), block),
                Placement("draft model", fast, drafting.total_bytes, loaded=True),
                Placement("draft model's keys and values", fast, drafting.kv_bytes),
                Placement("copy of the draft model", context.device.storage, drafting.total_bytes)]

    def report(self, context: Context, block: Block, rows: NDArray[np.int64]) -> dict[str, Any]:
        said, draft = self._policy.report(self._beside(context, block), block, rows), context.workload.draft
        assert draft is not None
        note = (f"{draft.model.name} drafts {draft.length} token{'s' if draft.length > 1 else ''} for each step to "
                f"verify; if {format_quantity(draft.acceptance, 'ratio')} of them are accepted, each independent of "
                f"the others, a step yields {draft.tokens_per_step:.3g} tokens, distributed as without a draft")
        return {**said, "notes": [note, *said["notes"]]}

    def _beside(self, context: Context, block: Block) -> Context:
        """The context with what the draft model leaves of the budgets."""
        key = "beside a draft model", _fast(context, block)
        if key not in context.memo:
            room = _room(context, block)
            context.memo[key] = replace(context, budget_bytes={
                tier: n_bytes - room.get(tier, 0.0) for tier, n_bytes in context.budget_bytes.items()})
        found: Context = context.memo[key]
        return found


def _drafting(context: Context) -> Context:
    found = context.drafting
    assert found is not None
    return found


def _fast(context: Context, block: Block) -> str:
    return context.memory_of(str(block.structural["agent"]))


def _room(context: Context, block: Block) -> dict[str, float]:
    """What the draft model takes of each tier. [B]"""
    drafting = _drafting(context)
    return {_fast(context, block): drafting.total_bytes + drafting.kv_bytes,
            context.device.storage: drafting.total_bytes}


def _holding(schedule: Schedule, context: Context, block: Block) -> Schedule:
    """The schedule with the draft model held throughout."""
    tier, held = _fast(context, block), dict(schedule.held_bytes)
    held[tier] = held.get(tier, np.zeros(schedule.n_candidates)) + _room(context, block)[tier]
    return replace(schedule, held_bytes=held)
