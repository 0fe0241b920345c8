"""How busy was the machine with other things meanwhile? What the system counted, less what this process used."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["Load"]

_COUNTERS = 8
"""user, nice, system, idle, iowait, irq, softirq, steal"""


class Load:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._begun = time.monotonic(), _ticks(), _own_s()

    def others(self) -> dict[str, float]:
        """Cores that others kept busy on average, and cores that a host took away. Empty where nothing is counted."""
        begun_s, before, own_before = self._begun
        now, own = _ticks(), _own_s()
        wall = time.monotonic() - begun_s
        if before is None or now is None or wall <= 0:
            return {}
        tick = os.sysconf("SC_CLK_TCK")
        change = [(b - a) / tick for a, b in zip(before, now, strict=True)]
        busy = sum(change) - change[3] - change[4] - change[7]
        return {"cores_used_by_others": round(max(busy - (own - own_before), 0.0) / wall, 3),
                "cores_stolen": round(change[7] / wall, 3)}


def _ticks() -> list[int] | None:
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:_COUNTERS + 1]
    except OSError:
        return None
    return [int(f) for f in fields] if len(fields) == _COUNTERS else None


def _own_s() -> float:
    spent = os.times()
    return spent.user + spent.system
