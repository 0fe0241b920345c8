"""Which shares of weights, keys and values, and activations belong on GPU, host and storage? A linear programme.

After FlexGen, arXiv 2303.06865, §4.3: with the GPU batches given, the time of a block of tokens is the prompt's plus
that of its decode steps, each the longest of what its streams are busy, and all of it linear in the shares; so is what
the tiers hold. Given the rows, this finds the shares of least time, and with them a bound for the others.

The programme has eight unknowns and about twenty rows, and a plan solves one or two hundred of them. The simplex method
below takes 0.2 ms for one, `scipy.optimize.linprog` 1.4 ms and 0.45 s of processor time to be imported: together a
third of the 2 s that a whole plan may take (tests hold the answers to scipy's).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Affine", "TierProblem", "TierShares", "maximise", "tier_corners", "tier_shares"]

Array = NDArray[np.float64]

TOLERANCE = 1e-9
"""Of numbers of a tableau whose rows are scaled to 1."""
TIE_BREAK = 1e-6
"""Weight of the prompt's time where only a step's is asked for, and of being nearer to the GPU at no cost in time."""


@dataclass(frozen=True)
class Affine:
    """base + slopes · x; x are the shares on (GPU, host) of weights, of keys and values, and of activations, (6,)."""

    base: float
    slopes: Array


@dataclass(frozen=True)
class TierProblem:
    """The rows of one way to cut a batch into GPU batches."""

    prompt_s: tuple[Affine, ...]
    """What each stream is busy during the prompt; the longest counts. [s]"""
    decode_s: tuple[Affine, ...]
    """And during all decode steps together. [s]"""
    tiers: tuple[tuple[Affine, float], ...]
    """What each tier holds, and its budget. [B]"""
    spills: tuple[bool, bool, bool]
    """Whether storage may take a share of each kind of tensor."""


@dataclass(frozen=True)
class TierShares:
    """A solution."""

    shares: Array
    """On (GPU, host) of weights, of keys and values, of activations, (3, 2); storage has the rest."""
    seconds: float
    """Of prompt and decode together ("total"), or of the decode steps alone ("step"). [s]"""


def tier_shares(problem: TierProblem, objective: Literal["total", "step"] | str = "total",
                fixed: Mapping[int, Array] | None = None) -> TierShares | None:
    """Shares of least time under every tier's budget; None where nothing fits.

    fixed : kind of tensor (0 weights, 1 keys and values, 2 activations) → its given shares on (GPU, host).
    """
    known = np.full(6, np.nan)
    for kind, shares in (fixed or {}).items():
        known[2 * kind: 2 * kind + 2] = shares
    free = np.isnan(known)
    given = np.where(free, 0.0, known)

    def split(row: Affine) -> tuple[float, Array]:
        return row.base + float(row.slopes @ given), row.slopes[free]

    n = int(free.sum())
    rows: list[Array] = []  # over the free shares, then how far prompt and decode stay below their ceilings
    limits: list[float] = []
    ceilings = []
    for phase, times in enumerate((problem.prompt_s, problem.decode_s)):
        parts = [split(row) for row in times]
        ceilings.append(max(base + float(np.maximum(slopes, 0.0).sum()) for base, slopes in parts))
        for base, slopes in parts:
            rows.append(np.concatenate([slopes, np.eye(2)[phase]]))
            limits.append(ceilings[phase] - base)
    for row, budget in problem.tiers:
        base, slopes = split(row)
        rows.append(np.concatenate([slopes, np.zeros(2)]))
        limits.append(budget - base)
    for kind, spills in enumerate(problem.spills):
        if free[2 * kind]:
            whole = np.zeros(6)
            whole[2 * kind: 2 * kind + 2] = 1.0
            for sign in (1.0,) if spills else (1.0, -1.0):
                rows.append(np.concatenate([sign * whole[free], np.zeros(2)]))
                limits.append(sign)
    nearer = TIE_BREAK * sum(ceilings) * np.tile([2.0, 1.0], 3)[free]
    gain = np.concatenate([nearer, [TIE_BREAK if objective == "step" else 1.0, 1.0]])
    found = maximise(gain, np.array(rows), np.array(limits))
    if found is None:
        return None
    shares = given.copy()
    shares[free] = np.clip(found[:n], 0.0, 1.0)
    return TierShares(shares.reshape(3, 2), float(_seconds(problem, objective, shares[None])[0]))


def tier_corners(problem: TierProblem, objective: Literal["total", "step"] | str = "total",
                 fixed: Mapping[int, Array] | None = None) -> list[TierShares]:
    """Every placement within the budgets that leaves each kind of tensor in one tier, or where `fixed` has it."""
    one_tier = {False: np.array([[1.0, 0.0], [0.0, 1.0]]), True: np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])}
    kinds = [np.reshape((fixed or {})[kind], (1, 2)) if kind in (fixed or {}) else one_tier[spills]
             for kind, spills in enumerate(problem.spills)]
    every = np.array([np.concatenate(parts) for parts in itertools.product(*kinds)])
    fits = np.all([row.base + every @ row.slopes <= budget for row, budget in problem.tiers], axis=0)
    seconds = _seconds(problem, objective, every)
    return [TierShares(every[i].reshape(3, 2), float(seconds[i])) for i in np.flatnonzero(fits)]


def _seconds(problem: TierProblem, objective: str, shares: Array) -> Array:
    """Of placements (n, 6). [s]"""
    prompt, decode = (np.max([row.base + shares @ row.slopes for row in times], axis=0)
                      for times in (problem.prompt_s, problem.decode_s))
    return np.asarray(decode if objective == "step" else prompt + decode)


def maximise(gain: Array, rows: Array, limits: Array) -> Array | None:
    """x ≥ 0 of the largest gain · x with rows · x ≤ limits, by the two-phase simplex method with Bland's rule.

    gain : (n,); rows : (m, n); limits : (m,). None where no x keeps all rows. The optimum must be finite.
    """
    scale = np.maximum(np.abs(rows).max(axis=1), 1e-300)
    a, b = rows / scale[:, None], limits / scale
    m, n = a.shape
    # Columns: x, a slack for each row, one artificial unknown, the right-hand side.
    table = np.hstack([a, np.eye(m), np.full((m, 1), -1.0), b[:, None]])
    basis = list(range(n, n + m))
    artificial = n + m
    if b.min() < 0:
        _pivot(table, basis, int(np.argmin(b)), artificial)
        _climb(table, basis, -np.eye(artificial + 1)[artificial], range(artificial + 1))
        if artificial in basis:
            row = basis.index(artificial)
            if table[row, -1] > TOLERANCE * max(1.0, float(np.abs(b).max())):
                return None
            _pivot(table, basis, row, int(np.argmax(np.abs(table[row, :artificial]))))
    _climb(table, basis, np.concatenate([gain, np.zeros(m + 1)]), range(artificial))
    x = np.zeros(artificial + 1)
    x[basis] = table[:, -1]
    return x[:n]


def _climb(table: Array, basis: list[int], gain: Array, allowed: Sequence[int]) -> None:
    """Pivot until no allowed column gains; the lowest index enters and leaves, so that it ends."""
    while True:
        reduced = gain - gain[basis] @ table[:, :-1]
        entering = next((j for j in allowed if reduced[j] > TOLERANCE), None)
        if entering is None:
            return
        column = table[:, entering]
        steps = np.full(len(column), np.inf)
        np.divide(np.maximum(table[:, -1], 0.0), column, out=steps, where=column > TOLERANCE)
        least = steps.min()
        if not np.isfinite(least):
            return  # unbounded: excluded by the caller's rows
        ties = [i for i in range(len(basis)) if steps[i] <= least * (1 + TOLERANCE) + 1e-300]
        _pivot(table, basis, min(ties, key=lambda i: basis[i]), entering)


def _pivot(table: Array, basis: list[int], row: int, column: int) -> None:
    table[row] /= table[row, column]
    others = np.arange(len(table)) != row
    table[others] -= np.outer(table[others, column], table[row])
    basis[row] = column
