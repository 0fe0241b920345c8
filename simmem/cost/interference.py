"""What share of its speed does one activity keep while another goes on, as measured alone and together?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from simmem.cost.noise import Judgement, judge
from simmem.spec.measurement import Condition, Measurement

__all__ = ["KeptShare", "kept_shares"]


@dataclass(frozen=True)
class KeptShare:
    """Speed beside an aggressor over speed alone."""

    victim: dict[str, Condition]
    """What it was: kind, shape, threads, request size."""
    aggressor: dict[str, Condition]
    share: float
    """A little over 1 where noise has it so."""
    low: float
    high: float
    """From the 90 % ranges of both."""
    noise_floor: float
    """The larger of the two."""
    n: int
    """Samples of both."""


def kept_shares(points: Iterable[Measurement]) -> list[KeptShare]:
    """Shares of every pair that was measured alone and together and that no probe refused, in the order given."""
    judged = [(*_sides(p), judge(p)) for p in points if p.probe == "interference"]
    alone = {_key(victim): j for victim, aggressor, j in judged
             if aggressor["aggressor"] == "none" and j.refused is None}
    return [_kept(victim, aggressor, alone[_key(victim)], j) for victim, aggressor, j in judged
            if aggressor["aggressor"] != "none" and _key(victim) in alone and j.refused is None]


def _sides(point: Measurement) -> tuple[dict[str, Condition], dict[str, Condition]]:
    victim = {k: v for k, v in point.conditions.items() if not k.startswith("aggressor")}
    return victim, {k: v for k, v in point.conditions.items() if k.startswith("aggressor")}


def _key(victim: dict[str, Condition]) -> tuple[tuple[str, Condition], ...]:
    return tuple(sorted(victim.items()))


def _kept(victim: dict[str, Condition], aggressor: dict[str, Condition], alone: Judgement,
          together: Judgement) -> KeptShare:
    return KeptShare(victim, aggressor, alone.median_s / together.median_s, alone.low_s / together.high_s,
                     alone.high_s / together.low_s, max(alone.noise_floor, together.noise_floor), alone.n + together.n)
