"""How far off are predicted phases in plans that were run, and does a factor help on plans it was not learnt from?

The factor of a phase is the exponential of the median of log(measured / predicted) over rows, each weighted by the
phase's share of its row: a phase that hardly counts is hardly measured either. It is judged with whole groups held out
in turn, cells (model, budget and storage) where there are three, else policies, and kept only where the held-out error
falls by more than chance (a one-sided paired t test over the groups at 95 %) and by a tenth of itself. Its range is
that of the held-out residuals: nine rows in ten, weighted alike, the row that is still to come counting as one more
(weighted conformal prediction: Tibshirani, Barber, Candès and Ramdas, NeurIPS 2019).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from simmem.errors import CalibrationError, MachineError
from simmem.spec.base import Frozen
from simmem.spec.costmodel import LARGEST_FACTOR, PhaseFactor, PhaseName

__all__ = ["Learnt", "PhaseKind", "PhaseTook", "PhaseVerdict", "RunPhases", "TotalError", "composed", "learn_phases"]

Array = NDArray[np.float64]
PhaseKind = tuple[PhaseName, str, str]
"""Phase, precision and agent; see `simmem.cost.phases.phase_kind`."""

COVERAGE = 0.9
LEAST_CELLS = 3
"""Of fewer, policies are held out instead."""
LEAST_GAIN = 0.1
"""A correction that takes away less than this share of the error is not worth a constant."""
_ENOUGH = 1e-9


@dataclass(frozen=True)
class PhaseTook:
    """One phase of a row, or what is left of the row: seconds a token."""

    kind: PhaseKind | None
    """None: counts towards the sum, and is not learnt from."""
    predicted_s: float
    measured_s: float


@dataclass(frozen=True)
class RunPhases:
    """A plan that was run: its phases, without what it waited."""

    name: str
    """Digest and name, as it will stand in the ledger."""
    cell: str
    """Model, budget and storage."""
    policy: str
    phases: tuple[PhaseTook, ...]


class PhaseVerdict(Frozen):
    """What the rows say of one phase, and whether it helps on held-out rows. Errors are |predicted / measured - 1|."""

    phase: PhaseName
    dtype: str
    agent: str
    rows: int
    groups: int
    learnt: float
    """measured ≈ learnt · predicted"""
    range_90: tuple[float, float] | None
    """Of measured / predicted on held-out rows; None where there were none."""
    error_before: float | None
    """Mean over held-out rows, weighted by the phase's share of each; None where there were none."""
    error_after: float | None
    kept: bool
    why: str


class TotalError(Frozen):
    """Mean |predicted / measured - 1| of the sum of a row's phases, over held-out rows."""

    rows: int
    before: float
    after: float
    """With the phases that are kept corrected."""


@dataclass(frozen=True)
class Learnt:
    """Factors that are worth keeping, and the judgement of all."""

    held_out_by: Literal["cell", "policy"]
    groups: tuple[str, ...]
    verdicts: tuple[PhaseVerdict, ...]
    total: TotalError
    factors: tuple[PhaseFactor, ...]


@dataclass(frozen=True)
class _Rows:
    """All rows of one phase; arrays (n,)."""

    row: NDArray[np.int64]
    log: Array
    """log(measured / predicted)"""
    weight: Array
    group: NDArray[np.int64]
    held: Array
    """log of the factor learnt from the other groups; nan where there are none."""


def learn_phases(runs: Sequence[RunPhases]) -> Learnt:
    """Learn and judge a factor for every phase of some runs.

    Raises CalibrationError where there is nothing to learn from, or no second group to judge by; MachineError without
    scipy.
    """
    by, groups, of_row = _groups(runs)
    judged = {kind: _judge(kind, rows, runs) for kind, rows in _by_kind(runs, of_row).items()}
    if not judged:
        raise CalibrationError("no row has a phase to learn from: time that was both predicted and measured")
    kept = {kind: rows for kind, (verdict, rows, _) in judged.items() if verdict.kept}
    return Learnt(by, groups, tuple(verdict for verdict, _, _ in judged.values()), _total(runs, kept),
                  tuple(factor for _, _, factor in judged.values() if factor is not None))


def composed(old: Iterable[PhaseFactor], learnt: Iterable[PhaseFactor]) -> tuple[PhaseFactor, ...]:
    """Factors that the runs were predicted with, times what those runs say is left.

    Raises CalibrationError where a product is too far off to be a correction.
    """
    found = {(p.phase, p.dtype, p.agent): p for p in old}
    for new in learnt:
        kind = (new.phase, new.dtype, new.agent)
        before = found.get(kind)
        if before is None:
            found[kind] = new
            continue
        factor = before.factor * new.factor
        if not 1 / LARGEST_FACTOR <= factor <= LARGEST_FACTOR:
            raise CalibrationError(f"the factor on {new.phase} would be {factor:.3g} by now: its prediction is wrong, "
                                   "not in need of a correction")
        found[kind] = new.model_copy(update={
            "factor": factor, "low": before.factor * new.low, "high": before.factor * new.high,
            "spent": (*before.spent, *new.spent)})
    return tuple(found.values())


def _t_95(freedom: int) -> float:
    """95 % quantile of Student's t."""
    try:
        from scipy.stats import t
    except ImportError:
        raise MachineError('learning from runs needs scipy; install with: pip install "simmem[fit]"') from None
    return float(t.ppf(0.95, freedom))


# --- rows -----------------------------------------------------------------------------------------------------------


def _groups(runs: Sequence[RunPhases]) -> tuple[Literal["cell", "policy"], tuple[str, ...], NDArray[np.int64]]:
    """What is held out in turn, its names, and which of them each row belongs to, (n_rows,)."""
    cells, policies = (tuple(dict.fromkeys(names)) for names in ([r.cell for r in runs], [r.policy for r in runs]))
    by: Literal["cell", "policy"] = "cell" if len(cells) >= LEAST_CELLS or len(policies) < 2 else "policy"
    groups = cells if by == "cell" else policies
    if len(groups) < 2:
        raise CalibrationError(
            f"nothing is kept: all {len(runs)} rows that can be learnt from are of one cell and one policy, and a "
            "correction is judged on other plans than those it came from; run plans of another budget, model or policy"
            if runs else "nothing is kept: there is no row to learn from")
    return by, groups, np.array([groups.index(r.cell if by == "cell" else r.policy) for r in runs], np.int64)


def _by_kind(runs: Sequence[RunPhases], of_row: NDArray[np.int64]) -> dict[PhaseKind, _Rows]:
    found: dict[PhaseKind, list[tuple[int, float, float]]] = {}
    for index, run in enumerate(runs):
        whole = sum(p.measured_s for p in run.phases)
        for took in run.phases:
            if took.kind is not None and took.predicted_s > 0 and took.measured_s > 0:
                found.setdefault(took.kind, []).append(
                    (index, math.log(took.measured_s) - math.log(took.predicted_s), took.measured_s / whole))
    return {kind: _rows(entries, of_row) for kind, entries in found.items()}


def _rows(entries: Sequence[tuple[int, float, float]], of_row: NDArray[np.int64]) -> _Rows:
    row = np.array([e[0] for e in entries], np.int64)
    log, weight = (np.array([e[i] for e in entries], np.float64) for i in (1, 2))
    group = of_row[row]
    held = np.full(len(row), np.nan)
    for one in np.unique(group):
        out = group == one
        if not out.all():
            held[out] = _middle(log[~out], weight[~out])
    return _Rows(row, log, weight, group, held)


def _middle(values: Array, weights: Array) -> float:
    """The weighted median: half of the weight lies on either side; between two values, their mean."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    first = int(np.searchsorted(reached, 0.5 - _ENOUGH))
    last = int(np.searchsorted(reached, 0.5 + _ENOUGH))
    return float((values[order[first]] + values[order[min(last, len(values) - 1)]]) / 2)


def _half_width(residuals: Array, weights: Array) -> float:
    """The |residual| that nine tenths of the weight do not exceed, a row of the largest weight still to come.

    The largest there is where there are too few.
    """
    size = np.abs(residuals)
    order = np.argsort(size)
    reached = np.cumsum(weights[order]) / (weights.sum() + weights.max())
    return float(size[order[min(int(np.searchsorted(reached, COVERAGE - _ENOUGH)), len(size) - 1)]])


# --- judgement ------------------------------------------------------------------------------------------------------


def _judge(kind: PhaseKind, rows: _Rows, runs: Sequence[RunPhases]
           ) -> tuple[PhaseVerdict, _Rows, PhaseFactor | None]:
    phase, dtype, agent = kind
    middle = _middle(rows.log, rows.weight)
    groups = np.unique(rows.group)

    def verdict(why: str, *, kept: bool = False, before: float | None = None, after: float | None = None,
                wide: float | None = None) -> PhaseVerdict:
        return PhaseVerdict(
            phase=phase, dtype=dtype, agent=agent, rows=len(rows.row), groups=len(groups), learnt=_exp(middle),
            range_90=None if wide is None else (_exp(middle - wide), _exp(middle + wide)), error_before=before,
            error_after=after, kept=kept, why=why)

    if len(groups) < 2:
        return verdict("there are no other plans to judge it on"), rows, None
    before, after = _errors(rows.log), _errors(rows.log - rows.held)
    mean_before, mean_after = (float(np.average(e, weights=rows.weight)) for e in (before, after))
    gains = np.array([np.average((before - after)[rows.group == g], weights=rows.weight[rows.group == g])
                      for g in groups])
    wide = _half_width(rows.log - rows.held, rows.weight)
    chance = _t_95(len(groups) - 1) * float(gains.std(ddof=1)) / math.sqrt(len(groups))
    why = "the error of held-out plans falls by more than chance"
    kept = False
    if not abs(middle) <= math.log(LARGEST_FACTOR):
        why = "so far off that the prediction is wrong, not in need of a correction"
    elif mean_after >= mean_before:
        why = "held-out plans are no nearer with it"
    elif gains.mean() <= chance:
        why = "the error of held-out plans falls by no more than chance"
    elif mean_after > (1 - LEAST_GAIN) * mean_before:
        why = f"it takes away less than {100 * LEAST_GAIN:.0f} % of the error"
    elif wide > math.log(LARGEST_FACTOR):
        why = "held-out plans scatter too widely around it"
    else:
        kept = True
    found = verdict(why, kept=kept, before=mean_before, after=mean_after, wide=wide)
    if not kept or found.range_90 is None:
        return found, rows, None
    return found, rows, PhaseFactor(
        phase=phase, dtype=dtype, agent=agent, factor=found.learnt, low=found.range_90[0], high=found.range_90[1],
        rows=found.rows, groups=found.groups, error_before=mean_before, error_after=mean_after,
        spent=tuple(runs[i].name for i in rows.row.tolist()))


def _exp(log: float) -> float:
    return math.exp(min(max(log, -700.0), 700.0))


def _errors(log: Array) -> Array:
    """|predicted / measured - 1| of log(measured / predicted)."""
    return np.asarray(np.abs(np.exp(np.clip(-log, None, 700.0)) - 1.0))


def _total(runs: Sequence[RunPhases], kept: dict[PhaseKind, _Rows]) -> TotalError:
    """The sum of the phases, each held-out row predicted by what the other groups say."""
    factor = {(int(row), kind): _exp(float(held)) for kind, rows in kept.items()
              for row, held in zip(rows.row, rows.held, strict=True)}
    errors = []
    for index, run in enumerate(runs):
        measured = sum(p.measured_s for p in run.phases)
        if measured <= 0:
            continue
        before = sum(p.predicted_s for p in run.phases)
        after = sum(p.predicted_s * (1.0 if p.kind is None else factor.get((index, p.kind), 1.0)) for p in run.phases)
        errors.append((abs(before / measured - 1), abs(after / measured - 1)))
    means = np.mean(errors, axis=0)
    return TotalError(rows=len(errors), before=float(means[0]), after=float(means[1]))
