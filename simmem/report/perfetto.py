"""A timeline as a Chrome/Perfetto trace: one track a stream, counters of what each tier holds."""

from __future__ import annotations

import json
from collections.abc import Sequence

from simmem.sim.timeline import Timeline, occupancy

__all__ = ["chrome_trace"]

MICROSECONDS = 1e6


def chrome_trace(timelines: Sequence[Timeline], title: str) -> str:
    """JSON in the Chrome trace-event format, tokens one after another (times in µs).

    Opens in ui.perfetto.dev and chrome://tracing.
    """
    events: list[dict[str, object]] = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": title}}]
    offset_s = 0.0
    for number, timeline in enumerate(timelines):
        s = timeline.schedule
        if number == 0:
            for index, stream in enumerate(s.streams):
                events.append({"ph": "M", "pid": 1, "tid": index, "name": "thread_name", "args": {"name": stream}})
                events.append({"ph": "M", "pid": 1, "tid": index, "name": "thread_sort_index",
                               "args": {"sort_index": index}})
        ends = timeline.token_end_s
        begin_s = float(ends[-2]) if len(ends) > 1 else 0.0
        timed = s.timed
        for op in range(s.n_ops):
            length = timeline.free_s[op] - timeline.start_s[op]
            if length <= 0 or not timed[op]:
                continue
            what = s.classes[int(s.op_class[op])]
            k = int(s.op_class[op])
            events.append({
                "ph": "X", "pid": 1, "tid": int(s.op_stream[op]), "name": what.name, "cat": what.kind.value,
                "ts": (offset_s + timeline.start_s[op] - begin_s) * MICROSECONDS, "dur": length * MICROSECONDS,
                "args": {"token": number, "layer": int(s.op_layer[op]), "requests": float(s.requests[k, 0]),
                         **{f"bytes {r}": float(v[k, 0]) for r, v in s.bytes.items() if v[k, 0] > 0}},
            })
        for tier, (times_s, held) in occupancy(timeline).items():
            for t, v in zip(times_s, held, strict=True):
                if t >= begin_s:
                    events.append({"ph": "C", "pid": 1, "name": f"held in {tier}", "args": {"bytes": float(v)},
                                   "ts": (offset_s + float(t) - begin_s) * MICROSECONDS})
        offset_s += float(ends[-1]) - begin_s
    # Reads for the first token may have begun before the one it follows ended; times start at the first of them.
    early_us = min((float(e["ts"]) for e in events if e["ph"] == "X"), default=0.0)  # type: ignore[arg-type]
    for event in events:
        if "ts" in event and early_us < 0:
            event["ts"] = float(event["ts"]) - early_us  # type: ignore[arg-type]
    events.sort(key=lambda e: float(e.get("ts", -1.0)))  # type: ignore[arg-type]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events, "otherData": {"title": title}})
