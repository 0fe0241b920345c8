"""Which FFN neurons does a layer hold, which must it read, and how are its rows kept dense?

The sliding window of LLM in a flash (arXiv 2312.11514, §3.1 and Appendix): what the last k tokens used is held as the
rows of one dense matrix, allocated once. After a token, rows that fell out of the window are overwritten by the last
rows of the matrix, then new ones are appended. Where the room binds, the window shrinks and grows again as
`simmem.trace.replay.shrink_to_capacity` says. Units are decided here from the tokens' own, not from the replay's
tables: that both count alike is a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

__all__ = ["GRAIN", "CacheStep", "NewRows", "WindowCache", "padded"]

Ints = NDArray[np.int64]

GRAIN = 16
"""Products run on a multiple of so many rows: a kernel that is made for each number of rows costs half the speed."""


def padded(n_rows: int) -> int:
    """Rows that a product over `n_rows` runs on."""
    return -(-n_rows // GRAIN) * GRAIN


@dataclass(frozen=True)
class CacheStep:
    """What a token does to the cache of one layer."""

    new: Ints
    """Units that are read, ascending."""
    hits: int
    kept: bool
    """Are the new ones cached? Else they are used where they were read, and nothing stays."""
    stay: int
    """Rows left once those that fell out are gone."""
    holes: Ints
    """Places below `stay` to be filled, ascending."""
    movers: Ints
    """Places from `stay` on whose rows fill them."""


@dataclass(frozen=True)
class NewRows:
    """Where the matrices of the new units lie: for each, columns of the cache's rows, and rows they come from."""

    columns: slice
    rows: torch.Tensor
    index: Ints | None
    """Which of the rows, where not all in order."""


class WindowCache:
    """The neurons of one layer that are held.

    Parameters
    ----------
    rows : (room, width) matrix to keep them in; None to count only.
    n_units : of the layer.
    window : tokens, at most.
    capacity : units held at most.
    """

    def __init__(self, rows: torch.Tensor | None, n_units: int, window: int, capacity: int) -> None:
        self.rows, self.window, self.capacity = rows, window, capacity
        self.n = 0
        self.span = 0
        """Tokens whose units are held: the window after the last token."""
        self._ids = np.zeros(n_units, np.int64)
        self._place = np.full(n_units, -1, np.int64)
        self._used = np.full(n_units, -(1 << 40), np.int64)
        self._whole: NDArray[np.void] | None = None
        """The rows of a processor's matrix, each one element: numpy moves those in half of torch's time."""
        if rows is not None and rows.device.type == "cpu":
            import torch

            self._whole = rows.view(torch.uint8).numpy().view(f"V{rows.shape[1] * rows.element_size()}")[:, 0]

    @property
    def ids(self) -> Ints:
        """Units held, row by row."""
        return self._ids[: self.n]

    def start(self, tokens: list[Ints], now: int) -> Ints:
        """Hold the units of the tokens before token `now`, the latest last; returns them in the order of their rows."""
        for back, units in enumerate(reversed(tokens)):
            self._used[units] = np.maximum(self._used[units], now - 1 - back)
        found = np.flatnonzero(self._used >= now - len(tokens)) if tokens else np.zeros(0, np.int64)
        self._append(found)
        self.span = len(tokens)
        return found

    def missing(self, active: Ints) -> Ints:
        """Those of the units `active` (ascending) that are not held: what has to be read."""
        return active[self._place[active] < 0]

    def step(self, now: int, active: Ints, new: Ints) -> CacheStep:
        """Decide what stays once token `now`, which uses the units `active` and reads those `missing`, is done."""
        self._used[active] = now
        held = self._ids[: self.n]
        age = now - self._used[held]
        longest = min(self.window, self.span + 1)
        counts = np.bincount(age[age < longest], minlength=max(longest, 1)).cumsum() + len(new)
        span = int(np.count_nonzero(counts[:longest] <= self.capacity)) if longest else 0
        gone = age >= max(span, 1)  # at a span of 0 only the token's own are left, while it runs
        stay = self.n - int(np.count_nonzero(gone))
        self.span = span
        return CacheStep(new, len(active) - len(new), span > 0, stay, np.flatnonzero(gone[:stay]),
                         stay + np.flatnonzero(~gone[stay:]))

    def settle(self, step: CacheStep) -> None:
        """Note which unit lies where after the step; its rows are not touched, which `fill` does."""
        self._place[self._ids[step.holes]] = -1
        self._place[self._ids[step.stay : self.n]] = -1
        if len(step.movers):
            moved = self._ids[step.movers]
            self._ids[step.holes] = moved
            self._place[moved] = step.holes
        self.n = step.stay
        if step.kept:
            self._append(step.new)

    def fill(self, step: CacheStep, found: Sequence[NewRows]) -> None:
        """Rearrange the rows as the step says: fill the holes, append what is new."""
        if self.rows is None:
            return
        if len(step.movers):
            # Holes lie below all movers: what is read and what is written do not meet.
            if self._whole is not None:
                self._whole[step.holes] = self._whole[step.movers]
            else:
                self.rows[_index(step.holes, self.rows)] = self.rows[_index(step.movers, self.rows)]
        if step.kept and len(step.new):
            import torch

            for part in found:
                into = self.rows[step.stay : step.stay + len(step.new), part.columns]
                if part.index is None:
                    into.copy_(part.rows)
                else:  # straight to where they go: by way of a copy in between it takes three times as long
                    torch.index_select(part.rows, 0, _index(part.index, part.rows), out=into)

    def forget(self) -> None:
        """Hold nothing, once a token whose units did not fit is done."""
        self._place[self.ids] = -1
        self.n = 0

    def _append(self, units: Ints) -> None:
        self._place[units] = np.arange(self.n, self.n + len(units))
        self._ids[self.n : self.n + len(units)] = units
        self.n += len(units)


def _index(values: Ints, like: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.from_numpy(values).to(like.device)
