"""Which document is to be reported on: a plan, or a search? Files from others, so checked before anything is shown."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from simmem.errors import SpecError
from simmem.planner.document import Plan
from simmem.planner.grid.document import SearchDocument
from simmem.planner.replan import read_plan
from simmem.sim.timeline import BREAKDOWN
from simmem.spec.base import check_texts, validate
from simmem.spec.device import Device
from simmem.spec.jsonfile import read_json, shown

__all__ = ["check_plan", "read_document"]

MAX_BYTES = 256 << 20
"""Of a search; a plan may have what `read_plan` allows."""
PLAN, SEARCH = "simmem.plan/1", "simmem.search/1"


def read_document(path: Path) -> Plan | SearchDocument:
    """What `plan --out` or `search --json` wrote. Raises SpecError."""
    data = read_json(path, what="a plan or a search", max_bytes=MAX_BYTES)
    check_texts(data, file=str(path))
    if data.get("schema") == PLAN:
        return read_plan(path)
    if data.get("schema") != SEARCH:
        raise SpecError(f"found {shown(data.get('schema'))}, expected a plan ({PLAN!r}, of `simmem plan --out`) or a "
                        f"search ({SEARCH!r}, of `simmem search --json`)", file=str(path), key="schema")
    return validate(SearchDocument, data, file=str(path))


def check_plan(plan: Plan, device: Device, *, file: str) -> None:
    """Raise SpecError where what a plan predicts cannot be shown: of an unknown part, link or tier, or no time."""
    p = plan.predicted
    _only(p.breakdown_s, BREAKDOWN, file, "predicted.breakdown_s")
    _only(p.bytes_per_token, device.link, file, "predicted.bytes_per_token")
    _only(p.bytes_per_token, p.requests_per_token, file, "predicted.bytes_per_token")
    memories = [("memory", plan.memory), *((f"pareto.{n}.memory", a.memory) for n, a in enumerate(plan.pareto))]
    for key, memory in memories:
        _only(memory, device.memory, file, key)
    _only({one.tier for one in plan.residency}, device.memory, file, "residency")
    times = {"predicted.token_latency_s": p.token_latency_s, "bound.token_latency_s": plan.bound.token_latency_s,
             "predicted.first_token_s": p.first_token_s, "predicted.tokens_per_s": p.tokens_per_s,
             "predicted.decode_tokens_per_s": p.decode_tokens_per_s,
             **{f"memory.{tier}.budget_bytes": use.budget_bytes for tier, use in plan.memory.items()},
             **{f"baselines.{n}.token_latency_s": b.token_latency_s for n, b in enumerate(plan.baselines)},
             **{f"alternatives.{n}.predicted.token_latency_s": a.predicted.token_latency_s
                for n, a in enumerate(plan.alternatives)}}
    for key, value in times.items():
        if not (math.isfinite(value) and value > 0):
            raise SpecError(f"found {value!r}, expected a number above 0", file=file, key=key)


def _only(names: Iterable[str], known: Iterable[str], file: str, key: str) -> None:
    allowed = list(known)
    for name in names:
        if name not in allowed:
            raise SpecError(f"found {name!r}, expected one of {', '.join(allowed)}", file=file, key=key)
