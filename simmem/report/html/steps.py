"""How are timelines written down so that a page can draw many of them? Whole nanoseconds, names once for all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simmem.report.closeup import begin_s, close_up, worked
from simmem.sim.timeline import Timeline

__all__ = ["Steps"]

NANOSECONDS = 1e9


@dataclass
class Steps:
    """Timelines of decode steps, with the names of streams and of kinds of ops that they share."""

    streams: list[str] = field(default_factory=list)
    kinds: list[tuple[str, str]] = field(default_factory=list)
    """(what, kind of op)"""

    def whole(self, timeline: Timeline) -> dict[str, Any]:
        """Every op of the timed step."""
        return self._written(timeline, worked(timeline), 0.0, timeline.token_s)

    def close_up(self, timeline: Timeline) -> dict[str, Any]:
        """What happens from the begin to the end of the arithmetic of some layers in the middle."""
        found, begin = close_up(timeline), begin_s(timeline)
        if found is None:
            return self.whole(timeline)
        seen = (worked(timeline) & (timeline.free_s - begin > found.low_s)
                & (timeline.start_s - begin < found.high_s))
        return self._written(timeline, seen, found.low_s, found.high_s)

    def _written(self, timeline: Timeline, which: Any, low_s: float, high_s: float) -> dict[str, Any]:
        """`ops`: stream, kind, layer, start and length of each, one after the other; times are of the step. [ns]"""
        s, begin = timeline.schedule, begin_s(timeline)
        flat: list[int] = []
        for op in np.flatnonzero(which).tolist():
            what = s.classes[int(s.op_class[op])]
            flat += [_place(self.streams, s.streams[int(s.op_stream[op])].removeprefix("link.")),
                     _place(self.kinds, (what.name.split(".")[0], what.kind.value)), int(s.op_layer[op]),
                     round((float(timeline.start_s[op]) - begin) * NANOSECONDS),
                     max(round(float(timeline.free_s[op] - timeline.start_s[op]) * NANOSECONDS), 1)]
        return {"token_s": timeline.token_s, "from_s": low_s, "to_s": high_s, "engine": timeline.engine, "ops": flat,
                "busy_s": {name.removeprefix("link."): held for name, held in timeline.busy_s.items() if held > 0}}


def _place(known: list[Any], one: Any) -> int:
    """Where it stands among those known, as the last of them from now on where it is new."""
    if one not in known:
        known.append(one)
    return known.index(one)
