"""Which candidates are there, and how fast is one of them? Grids, capacity, analytic scores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmem.cost.roofline import Factors, capacity_bytes_per_s, durations
from simmem.errors import SpecError
from simmem.policy.base import Block, Policy, Setting, one_value
from simmem.policy.context import Context
from simmem.sim.analytic import analytic
from simmem.sim.events import Contention

__all__ = [
    "BLOCK_COLUMNS",
    "Candidate",
    "Capacity",
    "blocks",
    "capacity_cut",
    "contention_of",
    "front",
    "score",
    "stratified_rows",
]

Array = NDArray[np.float64]

BLOCK_COLUMNS = 4096
"""Columns evaluated at once: a 64-layer block of this many stays near 64 MB an array set."""


@dataclass(frozen=True)
class Candidate:
    """One setting of every knob of one policy at one precision."""

    context: Context
    policy: Policy
    block: Block
    """A block of exactly one candidate."""
    score_s: float = float("nan")
    """Analytic mean token latency over the scoring tokens. [s]"""
    fast_bytes: float = float("nan")
    """Held outside storage. [B]"""
    first_token_s: float = float("nan")
    """Time to the first token, where the objective asked for it. [s]"""

    @property
    def knobs(self) -> dict[str, Setting]:
        return self.block.knobs(0)

    def used_bytes(self) -> dict[str, float]:
        """Bytes each tier holds at its fullest. [B]"""
        return {k: float(v[0]) for k, v in self.policy.footprint(self.context, self.block).items()}


def blocks(policy: Policy, context: Context, fixed: Mapping[str, object], *, defaults: bool = False
           ) -> Iterator[Block]:
    """Every block of a policy's grid, knobs in `fixed` held at their value.

    With `defaults`, knobs that are not named take their default instead of being searched.
    Raises SpecError for a knob the policy has not.
    """
    knobs = policy.knobs(context)
    values: dict[str, tuple[Setting, ...]] = {}
    for knob in knobs:
        if knob.name in fixed:
            values[knob.name] = (knob.parse(fixed[knob.name]),)
        elif defaults and knob.default is not None:
            values[knob.name] = (knob.default,)
        else:
            values[knob.name] = knob.values
    unknown = set(fixed) - set(values)
    if knobs and unknown:
        raise SpecError(f"{policy.name} has no knob {min(unknown)!r}; it has {', '.join(values)}", key="--set")
    structural = [k.name for k in knobs if k.kind == "structural"]
    demand = [k.name for k in knobs if k.kind == "demand"]
    if not knobs:
        return
    unmeasured = getattr(policy, "unmeasured", None)
    for values_of in itertools.product(*(values[n] for n in structural)):
        chosen = dict(zip(structural, map(one_value, values_of), strict=True))
        if unmeasured is not None and unmeasured(context, chosen, fixed):
            continue
        # Over places in the grid, not over values: a value may be a tuple.
        grid = np.meshgrid(*(np.arange(len(values[n])) for n in demand), indexing="ij")
        columns = {n: np.array(values[n])[g.reshape(-1)] for n, g in zip(demand, grid, strict=True)}
        block = Block(chosen, columns)
        refine = getattr(policy, "refine", None)
        yield block if refine is None else refine(context, block, fixed)


@dataclass(frozen=True)
class Capacity:
    """Which candidates of a block fit, what they hold, and by how much the nearest one misses."""

    fits: NDArray[np.bool_]
    fast_bytes: Array
    """Held outside storage. [B]"""
    binding_tier: str
    missing_bytes: float


def capacity_cut(policy: Policy, context: Context, block: Block) -> Capacity:
    """Compare the footprint of every candidate with the budgets."""
    used = policy.footprint(context, block)
    fits = np.ones(block.n_candidates, dtype=np.bool_)
    worst = np.zeros(block.n_candidates)
    tier_of = np.zeros(block.n_candidates, dtype=np.int64)
    names = list(used)
    for index, tier in enumerate(names):
        over = used[tier] - context.budget_bytes[tier]
        fits &= over <= 0
        tier_of = np.where(over > worst, index, tier_of)
        worst = np.maximum(worst, over)
    nearest = int(np.argmin(worst))
    fast = sum((v for k, v in used.items() if k != context.device.storage), np.zeros(block.n_candidates))
    return Capacity(fits, fast, names[int(tier_of[nearest])], float(worst[nearest]))


def front(seconds: Array, held_bytes: Array) -> NDArray[np.int64]:
    """Indices that nothing beats in both latency and memory, fastest first."""
    order = np.lexsort((held_bytes, seconds))
    least = np.minimum.accumulate(held_bytes[order])
    better = np.concatenate([[True], held_bytes[order][1:] < least[:-1] * (1 - 1e-9)])
    return np.asarray(order[better])


def score(policy: Policy, context: Context, block: Block, rows: NDArray[np.int64], *,
          factors: Factors | None = None) -> Array:
    """Analytic mean token latency over table rows, (n_candidates,). [s]"""
    per = max(BLOCK_COLUMNS // len(rows), 1)
    found = []
    for first in range(0, block.n_candidates, per):
        part = block.only(np.arange(first, min(first + per, block.n_candidates)))
        schedule = policy.decode(context, part, rows)
        result = analytic(schedule, durations(schedule, context.device, factors))
        found.append(result.token_s.reshape(part.n_candidates, len(rows)).mean(axis=1))
    return np.concatenate(found) / context.workload.tokens_per_step


def stratified_rows(context: Context, policy: Policy, n: int) -> NDArray[np.int64]:
    """Rows of the window table that stand for all of them: quantiles of units newly needed.

    One row (0) where the policy does not look at the trace; the median row for n = 1. A policy that looks at a trace
    in its own way says itself which tokens stand for all of them.
    """
    own = getattr(policy, "rows", None)
    if own is not None:
        return np.asarray(own(context, n), dtype=np.int64)
    if not policy.uses_trace or context.trace is None:
        return np.zeros(1, dtype=np.int64)
    middle = min(4, context.table.max_window)
    order = np.argsort(context.table.new_units[:, :, middle].sum(axis=1), kind="stable")
    n = min(n, len(order))
    return np.sort(order[((np.arange(n) + 0.5) / n * len(order)).astype(np.int64)])


def contention_of(context: Context, factors: Factors | None = None) -> Contention:
    """What the ops of a device share: its memories and links, and measured interference."""
    device = context.device
    names = [*(f"memory.{m}" for m in device.memory if m != device.storage), *(f"link.{k}" for k in device.link),
             *(f"bus.{b}" for b in device.bus)]
    return Contention(
        capacity_bytes_per_s={n: float(np.max(capacity_bytes_per_s(device, n, factors))) for n in names},
        interference={(i.victim, i.aggressor, f"memory.{i.memory}"): i.share.value for i in device.interference})
