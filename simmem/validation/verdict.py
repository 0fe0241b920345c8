"""Do predictions hold on this machine? Error, ranking, regret and coverage over rows that were run.

Only conclusive rows count, those whose noise floor allows a judgement. Ranking is within a cell, over pairs whose
times differ by more than the noise of both: which of two equally fast plans is predicted to be faster says nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from simmem.validation.runs import Condition, Measured, RunRow

__all__ = ["BaselineRow", "CellVerdict", "Gate", "LadderRow", "StepRatio", "Summary", "Validation", "judge",
           "kendall_tau", "regret", "step_ratios", "summary_of"]

LEAST_CONCLUSIVE = 0.7
"""A smaller share of conclusive rows is no basis for a judgement."""
FEW_ROWS = 34
"""Of fewer rows, all may lie inside their intervals by chance: 1 / (1 - 97 %)."""


PUBLISHED_MODEL = "opt-6.7b"
PUBLISHED_IO_S = {"naive": 2.196, "hybrid": 1.090, "predicted": 0.738, "windowed": 0.164, "bundled": 0.087}
"""Seconds of reading per token, OPT-6.7B in 16 bits on an M1 Max: LLM in a flash, arXiv 2312.11514v3, Table 2. [s]"""


RUN_TO_THE_END = "plans that could be run to the end"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class LadderRow(RunRow):
    """A plan of the ladder that was run."""

    cell: str
    """Model, storage and budget: what it is ranked within."""
    budget_share: float
    """Of the weights, that the budget holds beside keys, values and activations."""
    error_beside: float | None = None
    """The error for the machine that controls beside the runs found, instead of the calibrated one; null without."""
    chosen: bool
    """Is it what simmem's own search answers within the cell?"""


class BaselineRow(_Part):
    """What users run today, which is no plan of simmem: timed, its bytes not judged."""

    id: str
    model: str
    weights: str
    what: str
    page_cache: Literal["kept", "dropped"]
    """dropped: emptied before each token, as it is for a model larger than memory."""
    measured_s: Measured
    noise_floor: float | None
    times_fastest: float | None
    """Its median over that of the fastest plan run for this model within half of the memory."""


class CellVerdict(_Part):
    """Ranking and choice within one cell."""

    cell: str
    n: int
    """Conclusive rows."""
    kendall_tau: float | None
    """null where no pair differs by more than the noise."""
    regret: float | None
    """null where the chosen plan was not run conclusively."""
    chosen: str | None
    fastest: str | None


class StepRatio(_Part):
    """How much of the reading time of naive loading is left after a published step, within one cell."""

    cell: str
    step: str
    predicted: float
    measured: float
    error: float
    """predicted / measured - 1"""
    published: float | None
    """On another machine; null for other models than the published one."""
    conclusive: bool


class Summary(_Part):
    """Over conclusive rows."""

    n: int
    mape: float | None
    p90_error: float | None
    mape_beside: float | None = None
    """Of the errors beside controls."""
    kendall_tau: float | None
    """Over the pairs within all cells together."""
    regret: float | None
    """The largest of any cell."""
    coverage: float | None
    """Share of rows whose median lies inside the predicted interval."""
    coverage_beside: float | None = None
    """The same of intervals around what is expected of the machine that controls found."""
    conclusive_share: float


class Gate(_Part):
    """Something that must hold."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    status: Literal["pass", "fail", "unknown"]
    """unknown: there was nothing to judge by."""


class Validation(_Part):
    """`validate --json`."""

    schema_: Literal["simmem.validate/1"] = Field(default="simmem.validate/1", alias="schema")
    mode: Literal["quick", "full"]
    device: str
    date: str
    took_s: float
    predictions_sha256: str
    """Of the file of predictions, written before anything was run."""
    rows: list[LadderRow]
    summary: Summary
    by_storage: dict[str, Summary]
    cells: list[CellVerdict]
    steps: list[StepRatio]
    gates: list[Gate]
    baselines: list[BaselineRow]
    left_out: dict[str, str]
    """What of the ladder was not run, and why."""
    conditions: dict[str, Condition]

    @property
    def failed(self) -> bool:
        """Did anything that must hold of predictions not hold?"""
        return any(g.status == "fail" for g in self.gates if g.name != RUN_TO_THE_END)

    @property
    def broken(self) -> bool:
        """Did the machine fail under some plan?"""
        return any(g.status == "fail" for g in self.gates if g.name == RUN_TO_THE_END)

    @property
    def conclusive(self) -> bool:
        """Were enough rows quiet enough to judge by?"""
        return self.summary.conclusive_share >= LEAST_CONCLUSIVE


def summary_of(rows: Sequence[LadderRow]) -> Summary:
    """Error, ranking, regret and coverage of rows."""
    good = _conclusive(rows)
    errors = np.abs([r.error for r in good])
    beside = [abs(r.error_beside) for r in good if r.error_beside is not None]
    verdicts = _cells(rows)
    regrets = [v.regret for v in verdicts if v.regret is not None]
    inside = [r.interval_s[0] <= r.measured_s.median <= r.interval_s[1] for r in good]
    found = [r.interval_s[0] * (1 + r.error_beside) <= r.predicted_s <= r.interval_s[1] * (1 + r.error_beside)
             for r in good if r.error_beside is not None]
    return Summary(
        n=len(good), mape=float(errors.mean()) if good else None,
        p90_error=float(np.quantile(errors, 0.9)) if good else None,
        mape_beside=float(np.mean(beside)) if beside else None,
        kendall_tau=kendall_tau([[r for r in good if r.cell == v.cell] for v in verdicts]),
        regret=max(regrets, default=None), coverage=float(np.mean(inside)) if good else None,
        coverage_beside=float(np.mean(found)) if found else None,
        conclusive_share=len(good) / len(rows) if rows else 0.0)


def kendall_tau(groups: Sequence[Sequence[LadderRow]]) -> float | None:
    """Kendall's tau-b of predicted and measured times, over the pairs within groups that differ beyond their noise.

    (C - D) / √((C + D)(C + D + T)) with C pairs in the same order, D in the other and T tied in prediction; pairs that
    the noise cannot tell apart are left out. None where no pair is left.
    """
    same = other = tied = 0
    for rows in groups:
        for a, b in itertools.combinations(rows, 2):
            apart = a.measured_s.median - b.measured_s.median
            noise = (a.noise_floor or 0.0) * a.measured_s.median + (b.noise_floor or 0.0) * b.measured_s.median
            if abs(apart) <= noise:
                continue
            order = np.sign(apart) * np.sign(a.predicted_s - b.predicted_s)
            same, other, tied = same + (order > 0), other + (order < 0), tied + (order == 0)
    if same + other + tied == 0:
        return None
    if same + other == 0:
        return 0.0
    return float((same - other) / np.sqrt((same + other) * (same + other + tied)))


def regret(rows: Sequence[LadderRow]) -> float | None:
    """How much slower the chosen plan of one cell ran than the fastest that was run, as a share."""
    good = _conclusive(rows)
    chosen = [r.measured_s.median for r in good if r.chosen]
    return chosen[0] / min(r.measured_s.median for r in good) - 1.0 if chosen else None


def step_ratios(rows: Sequence[LadderRow]) -> list[StepRatio]:
    """Reading time of the published steps over that of naive loading, predicted and measured."""
    found = []
    for verdict in _cells(rows):
        named = {r.id.rsplit("/", 1)[1]: r for r in rows if r.cell == verdict.cell}
        times = {step: next(((p.predicted_s, p.measured_s) for p in named[step].phases if p.name == "flash"), None)
                 for step in PUBLISHED_IO_S if step in named}
        naive = times.get("naive")
        for step, took in times.items():
            if step == "naive" or naive is None or took is None:
                continue
            predicted, measured = took[0] / naive[0], took[1] / naive[1]
            is_published = named[step].model == PUBLISHED_MODEL
            found.append(StepRatio(
                cell=verdict.cell, step=step, predicted=predicted, measured=measured, error=predicted / measured - 1,
                published=PUBLISHED_IO_S[step] / PUBLISHED_IO_S["naive"] if is_published else None,
                conclusive="inconclusive" not in (named[step].status, named["naive"].status)))
    return found


def judge(rows: Sequence[LadderRow], *, broken: int = 0
          ) -> tuple[Summary, dict[str, Summary], list[CellVerdict], list[Gate]]:
    """Summary of all rows and of each storage, every cell's verdict, and what must hold.

    broken : plans that something went wrong with, so that they have no row.
    """
    whole = summary_of(rows)
    by_storage: dict[str, Summary] = {name: summary_of([r for r in rows if r.storage == name])
                  for name in dict.fromkeys(r.storage for r in rows)}
    moved = [r.bytes.predicted == r.bytes.measured and "bytes" not in r.why for r in rows]
    real, emulated = by_storage.get("real"), by_storage.get("emulated")
    gates = [_gate("rows that moved exactly the planned bytes", float(np.mean(moved)) if rows else None, low=1.0)]
    if broken:
        gates.append(_gate(RUN_TO_THE_END, len(rows) / (len(rows) + broken), low=1.0))
    if real is not None:
        # A drive that others share is judged beside what controls found of it in the same minutes.
        gates.append(_gate("MAPE, real storage", real.mape, high=0.12) if real.mape_beside is None else
                     _gate("MAPE beside controls, real storage", real.mape_beside, high=0.12))
    if emulated is not None:
        gates += [_gate("MAPE, emulated storage", emulated.mape, high=0.08),
                  _gate("p90 of |error|, emulated storage", emulated.p90_error, high=0.15)]
    gates += [_gate("Kendall tau-b", whole.kendall_tau, low=0.85), _gate("regret", whole.regret, high=0.05)]
    judged, inside = real or whole, "coverage of 90 % intervals"
    if judged.coverage_beside is not None:
        inside += " beside controls"
    gates.append(_gate(inside if real is None else f"{inside}, real storage",
                       judged.coverage if judged.coverage_beside is None else judged.coverage_beside, low=0.80,
                       high=0.97 if judged.n >= FEW_ROWS else None))
    if any(r.storage == "real" and r.id.endswith("/naive") for r in _conclusive(rows)):
        gates.append(_gate("storage rate of naive loading over that of plain batches",
                           min(_naive_rates(rows), default=None), low=0.9))
    published = [abs(s.error) for s in step_ratios(rows) if s.published is not None and s.conclusive]
    if published:
        gates.append(_gate("largest error of a published step's I/O ratio", max(published), high=0.15))
    return whole, by_storage, _cells(rows), gates


def _naive_rates(rows: Sequence[LadderRow]) -> list[float]:
    """Of each model: naive loading is one plan under every budget, so that its rows are repeats."""
    found: dict[str, list[float]] = {}
    for row in _conclusive(rows):
        if row.id.endswith("/naive") and "rate_over_plain_batches" in row.conditions:
            found.setdefault(row.model, []).append(float(row.conditions["rate_over_plain_batches"]))
    return [float(np.median(rates)) for rates in found.values()]


def _conclusive(rows: Sequence[LadderRow]) -> list[LadderRow]:
    return [r for r in rows if r.status != "inconclusive"]


def _cells(rows: Sequence[LadderRow]) -> list[CellVerdict]:
    found = []
    for name in dict.fromkeys(r.cell for r in rows):
        mine = [r for r in rows if r.cell == name]
        good = _conclusive(mine)
        fastest = min(good, key=lambda r: r.measured_s.median, default=None)
        found.append(CellVerdict(
            cell=name, n=len(good), kendall_tau=kendall_tau([good]), regret=regret(mine),
            chosen=next((r.id for r in mine if r.chosen), None), fastest=None if fastest is None else fastest.id))
    return found


def _gate(name: str, value: float | None, *, low: float | None = None, high: float | None = None) -> Gate:
    if value is None:
        return Gate(name=name, value=None, low=low, high=high, status="unknown")
    inside = (low is None or value >= low) and (high is None or value <= high)
    return Gate(name=name, value=value, low=low, high=high, status="pass" if inside else "fail")
