"""How does a plan that was run compare with what was predicted of it? One row of `run --json` and `validate --json`.

Like is set beside like: the same trace tokens, predicted by the event engine and measured, median against median,
phase against phase. Bytes have no tolerance: what was moved is what the plan says, or the row fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from simmem.cost.phases import phase_of
from simmem.planner.candidate import Candidate
from simmem.planner.predict import interval_factors
from simmem.policy.base import KnobValue
from simmem.schedule import Schedule
from simmem.sim.timeline import Timeline
from simmem.spec.device import Device

__all__ = [
    "ROW_TOLERANCE",
    "Exactness",
    "Measured",
    "Moved",
    "PhaseTime",
    "RunRow",
    "demanded_bytes",
    "error_by_repeat",
    "noise_floor",
    "phase_seconds",
    "run_row",
    "with_storage_of",
]

Array = NDArray[np.float64]
Condition = bool | int | float | str
Status = Literal["pass", "fail", "inconclusive"]
Storage = Literal["real", "emulated"]

ROW_TOLERANCE: dict[str, float] = {"emulated": 0.15, "real": 0.24}
"""Error of one row's time that passes: of nine rows in ten on emulated storage, twice the mean asked for on a real
drive, which other programs use too."""
NOISE_LIMIT = 0.10
"""Above this noise floor a row says nothing."""
STORED = ("weights", "head weights", "units", "embedding rows")
"""What classes of moves are called whose bytes lie in storage as they are moved."""
PHASES = ("flash", "copy", "upkeep", "predictor", "attention", "FFN", "head", "step", "wait")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Measured(_Part):
    """Token latencies. [s]"""

    median: float
    """Median over the repeats of each one's median over its tokens."""
    p10: float
    p90: float
    """Over all tokens of all repeats."""
    n: int
    """Tokens of all repeats."""


class Moved(_Part):
    """Bytes a token moves over all links, mean over the measured tokens. [B]"""

    predicted: float
    measured: float


class PhaseTime(_Part):
    """Seconds a token's ops of one phase hold their stream; `wait`: seconds in which nothing runs."""

    name: str
    predicted_s: float
    measured_s: float


class Exactness(_Part):
    """How the logits compare with those of the network itself."""

    tokens: int
    largest_difference: float
    """As a share of the largest logit."""
    same_choice: float
    """Share of tokens whose likeliest next token is the same."""
    tolerance: float


class RunRow(_Part):
    """A plan that was run: predicted and measured."""

    schema_: Literal["simmem.run/1"] = Field(default="simmem.run/1", alias="schema")
    id: str
    model: str
    device: str
    storage: Storage
    policy: str
    knobs: dict[str, KnobValue]
    predicted_s: float
    """Median over the measured tokens. [s]"""
    interval_s: tuple[float, float]
    """90 %, from the device's figures."""
    measured_s: Measured
    noise_floor: float | None
    """Half the p10-p90 range of the repeats' medians over their median; null with a single one."""
    error: float
    """predicted / measured - 1"""
    bytes: Moved
    phases: list[PhaseTime]
    status: Status
    why: str
    """What decided the status."""
    tokens: int
    repeats: int
    weights: str
    trace: str | None
    exact: Exactness | None
    conditions: dict[str, Condition]
    """Threads, versions and the like; for emulated storage its share of the processor."""


def with_storage_of(device: Device, other: Device) -> Device:
    """A machine with another's drive: what a run on emulated storage is predicted for."""
    mine = next(name for name, link in device.link.items() if link.source == device.storage)
    theirs = next(link for link in other.link.values() if link.source == other.storage)
    # What waking readers takes is of a machine, not of a drive, and nobody is woken by storage that is emulated.
    link = theirs.model_copy(update={"source": device.storage, "target": device.host, "batch_time": None,
                                     "reader_time": None})
    return device.model_copy(update={
        "name": f"{device.name}+{other.name}", "title": f"{device.title}, with the storage of {other.title}",
        "link": {**device.link, mine: link}})


def phase_seconds(timelines: Sequence[Timeline]) -> dict[str, float]:
    """Mean seconds per token of every phase that any of the timelines has. [s]

    Phases overlap where streams do, so they need not add up to the latency; `wait` overlaps nothing.
    """
    total = dict.fromkeys(PHASES, 0.0)
    for line in timelines:
        s = line.schedule
        held = line.free_s - line.start_s
        for op in np.flatnonzero(s.timed).tolist():
            what = s.classes[int(s.op_class[op])]
            total[phase_of(what)] += float(held[op])
        total["wait"] += _idle_seconds(line)
    return {name: seconds / len(timelines) for name, seconds in total.items()}


def _idle_seconds(line: Timeline) -> float:
    """Seconds of the timed token in which no stream is held."""
    ends = line.token_end_s
    begin, end = float(ends[-2]) if len(ends) > 1 else 0.0, float(ends[-1])
    busy = line.free_s > line.start_s
    start, free = np.clip(line.start_s[busy], begin, end), np.clip(line.free_s[busy], begin, end)
    order = np.argsort(start)
    reached = np.maximum.accumulate(np.r_[begin, free[order]])
    return float(np.maximum(np.r_[start[order], end] - reached, 0.0).sum())


def demanded_bytes(column: Schedule, block_bytes: float) -> float:
    """Bytes the timed token of a plan moves over all links, weights in whole blocks, as they lie in storage.

    The plan counts a streamed stage's bytes as they are: less than a block fewer for each. What two units tell each
    other lies in no storage. [B]
    """
    total = 0.0
    for op in np.flatnonzero(column.timed).tolist():
        k = int(column.op_class[op])
        link = column.classes[k].link
        if link is not None:
            moved = float(column.bytes[f"link.{link}"][k, 0])
            stored = column.classes[k].name.split(".")[0] in STORED
            total += math.ceil(moved / block_bytes - 1e-9) * block_bytes if stored else round(moved)
    return total


def error_by_repeat(expected_s: Sequence[float], token_s: Sequence[Array]) -> float:
    """Expected over measured less one, the median over repeats of which each has an expectation of its own.

    expected_s, token_s : of each repeat, the median token's and all tokens' times. [s]
    """
    return float(np.median([e / float(np.median(t)) for e, t in zip(expected_s, token_s, strict=True)])) - 1.0


def noise_floor(medians_s: Sequence[float]) -> float | None:
    """Half the p10-p90 range of the repeats' medians over their median; None for a single one."""
    if len(medians_s) < 2:
        return None
    low, middle, high = np.quantile(medians_s, [0.1, 0.5, 0.9])
    return float((high - low) / 2 / middle)


def run_row(name: str, candidate: Candidate, predicted: Sequence[Timeline], repeats: Sequence[Sequence[Timeline]],
            moved_bytes: Array, storage: Storage, *, conditions: dict[str, Condition] | None = None,
            exact: Exactness | None = None) -> RunRow:
    """Set what was measured beside what was predicted, and judge.

    Parameters
    ----------
    predicted : event runs of the measured tokens.
    repeats : of each pass over the same tokens, its measured timelines.
    moved_bytes : (repeats, tokens) over all links. [B]
    """
    context = candidate.context
    medians = [float(np.median([t.token_s for t in run])) for run in repeats]
    samples = [t.token_s for run in repeats for t in run]
    measured = Measured(median=float(np.median(medians)), p10=float(np.quantile(samples, 0.1)),
                        p90=float(np.quantile(samples, 0.9)), n=len(samples))
    expected_s = float(np.median([t.token_s for t in predicted]))
    rows = np.zeros(1, np.int64)
    if candidate.policy.uses_trace and context.trace is not None:
        rows = np.linspace(0, len(context.table.tokens) - 1, min(4, len(context.table.tokens))).astype(np.int64)
    low, high = interval_factors(candidate, rows)
    link = context.storage_link[1]
    block = link.block.value if link.block else 1.0
    demanded = np.array([demanded_bytes(t.schedule, block) for t in predicted])
    error, noise = expected_s / measured.median - 1.0, noise_floor(medians)
    status, why = _judge(error, noise, bool((moved_bytes == demanded).all()), storage, exact)
    before, after = phase_seconds(predicted), phase_seconds([t for run in repeats for t in run])
    return RunRow(
        id=name, model=context.model.name, device=context.device.name, storage=storage, policy=candidate.policy.name,
        knobs=candidate.knobs, predicted_s=expected_s, interval_s=(expected_s * low, expected_s * high),
        measured_s=measured, noise_floor=noise, error=error,
        bytes=Moved(predicted=float(demanded.mean()), measured=float(moved_bytes.mean())),
        phases=[PhaseTime(name=p, predicted_s=before[p], measured_s=after[p]) for p in PHASES
                if before[p] > 0 or after[p] > 0],
        status=status, why=why, tokens=len(predicted), repeats=len(repeats), weights=context.workload.weights,
        trace=context.trace.header.name if context.trace and candidate.policy.uses_trace else None, exact=exact,
        conditions=conditions or {})


def _judge(error: float, noise: float | None, same_bytes: bool, storage: Storage, exact: Exactness | None
           ) -> tuple[Status, str]:
    if not same_bytes:
        return "fail", "a token moved other bytes than the plan says"
    if exact is not None and exact.largest_difference > exact.tolerance:
        return "fail", "the logits are not those of the network"
    if noise is None:
        return "inconclusive", "a single repeat says nothing of the noise"
    if noise > NOISE_LIMIT:
        return "inconclusive", f"the noise floor is above {100 * NOISE_LIMIT:g} %"
    allowed = ROW_TOLERANCE[storage]
    inside = abs(error) <= allowed
    return ("pass" if inside else "fail"), f"the error is {'within' if inside else 'beyond'} {100 * allowed:g} %"
