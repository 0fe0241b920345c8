"""How well does a cost model foretell products it was not fitted to, and do its intervals hold?

`judge_costs` keeps whole families of shapes aside (`simmem.cost.holdout`), fits to the rest and compares, beside a
plain roofline at the highest rates the same machine reached. Nothing is chosen on what was kept aside: features and
corrections are chosen by cross-validation within the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from simmem.cost.fitted import half_width, octaves_outside, product_s
from simmem.cost.holdout import held_out
from simmem.cost.regression import PRODUCTS, Points, fit_cost_model, points_of
from simmem.errors import CalibrationError
from simmem.spec.base import Frozen
from simmem.spec.costmodel import FittedCost, Group
from simmem.spec.measurement import Measurements

__all__ = ["CostReport", "CostRow", "judge_costs", "judge_model"]

Array = NDArray[np.float64]


class CostRow(Frozen):
    """Errors on held-out products of one kind and precision; all are shares of the measured time."""

    kind: str
    dtype: str
    level: str
    threads: int | None
    """None: all of them together."""
    n: int
    shapes: int
    median: float
    """Of |predicted / measured − 1|."""
    p90: float
    mape: float
    """Mean of |predicted / measured − 1|."""
    roofline_median: float
    roofline_p90: float
    roofline_mape: float
    coverage: float
    """Share of the points inside the 90 % interval."""
    half_width: float
    """Median half-width of the interval, as a share of the predicted time."""
    noise_floor: float
    """Median over the points."""
    n_extrapolated: int
    """Points outside the range of what was fitted."""
    corrected: bool | None
    """Whether the model has a correction beside its physical terms; None for several kinds together."""

    @property
    def half_width_over_median(self) -> float:
        """Median half-width over the median error; 2.44 where errors are normal and alike."""
        return self.half_width / self.median if self.median > 0 else float("inf")


class CostReport(Frozen):
    """Held-out errors by kind, then of all products together."""

    schema_: str = Field(default="simmem.costs/1", alias="schema")
    name: str
    rows: tuple[CostRow, ...]
    all_products: CostRow

    def table(self) -> list[str]:
        """The rows as lines of text."""
        head = (f"{'kind':<8}{'dtype':<7}{'level':<7}{'thr':>4}{'n':>6}{'shapes':>8}{'median':>8}{'p90':>8}{'MAPE':>8}"
                f"{'cover':>8}{'± half':>8}{'/median':>8}   roofline median, p90")
        return [head, *(_line(row) for row in (*self.rows, self.all_products))]


def _line(r: CostRow) -> str:
    shares = "".join(f"{100 * v:7.1f}%" for v in (r.median, r.p90, r.mape, r.coverage, r.half_width))
    threads = "-" if r.threads is None else str(r.threads)
    return (f"{r.kind:<8}{r.dtype:<7}{r.level:<7}{threads:>4}{r.n:>6}{r.shapes:>8}{shares}"
            f"{r.half_width_over_median:8.2f}   {100 * r.roofline_median:.1f}%, {100 * r.roofline_p90:.1f}%"
            + ("  corrected" if r.corrected else ""))


@dataclass(frozen=True)
class _Judged:
    points: Points
    predicted_s: Array
    roofline_s: Array
    half_width: Array
    outside: NDArray[np.bool_]


def judge_costs(measurements: Measurements, *, share: float = 0.5, salt: str = "", device_agent: str = "cpu"
                ) -> CostReport:
    """Fit to some families of shapes and judge on the others.

    Parameters
    ----------
    share : of the families that is kept aside.
    salt : another one is another split.

    Raises
    ------
    CalibrationError
        Too few measurements to fit, or none held out.
    """
    out = held_out(measurements.points, share=share, salt=salt)
    kept = tuple(p for p, o in zip(measurements.points, out, strict=True) if not o)
    aside = tuple(p for p, o in zip(measurements.points, out, strict=True) if o)
    model = fit_cost_model(measurements.model_copy(update={"points": kept}), device_agent=device_agent)
    return judge_model(model, measurements.model_copy(update={"points": aside}), device_agent=device_agent)


def judge_model(model: FittedCost, measurements: Measurements, *, device_agent: str = "cpu") -> CostReport:
    """Judge a cost model on products it was not fitted to; which those are is for the caller to know."""
    judged = [_judge(group, points) for points in points_of(measurements, device_agent=device_agent)
              if points.kind in PRODUCTS and (group := _group_of(model, points)) is not None]
    if not judged:
        raise CalibrationError("no measured product is of a kind that the cost model was fitted to")
    return CostReport(
        name=measurements.name,
        rows=tuple(_row([j], j.points.kind, j.points.dtype, j.points.level, j.points.threads,
                        corrected=_group_of(model, j.points).residual is not None)  # type: ignore[union-attr]
                   for j in judged),
        all_products=_row(judged, "all", "", "", None, corrected=None))


def _group_of(model: FittedCost, points: Points) -> Group | None:
    key = (points.kind, points.dtype, points.agent, points.level, points.threads, points.variant)
    return next((g for g in model.groups if (g.kind, g.dtype, g.agent, g.level, g.threads, g.variant) == key), None)


def _judge(group: Group, points: Points) -> _Judged:
    work = points.work
    roofline = np.asarray(work.weight_bytes) / group.bytes_per_s
    if group.flop_per_s is not None:
        roofline = np.maximum(roofline, np.asarray(work.flop) / group.flop_per_s)
    n = len(points)
    return _Judged(points, product_s(group, work), roofline, np.broadcast_to(half_width(group, work), (n,)),
                   np.broadcast_to(octaves_outside(group, work) > 0, (n,)))


def _row(judged: list[_Judged], kind: str, dtype: str, level: str, threads: int | None, *, corrected: bool | None
         ) -> CostRow:
    measured = np.concatenate([j.points.seconds for j in judged])
    predicted = np.concatenate([j.predicted_s for j in judged])
    half = np.concatenate([j.half_width for j in judged])
    error = np.abs(predicted / measured - 1.0)
    plain = np.abs(np.concatenate([j.roofline_s for j in judged]) / measured - 1.0)
    return CostRow(
        kind=kind, dtype=dtype, level=level, threads=threads, n=len(measured),
        shapes=len({f for j in judged for f in j.points.families}), median=float(np.median(error)),
        p90=float(np.quantile(error, 0.9)), mape=float(error.mean()), roofline_median=float(np.median(plain)),
        roofline_p90=float(np.quantile(plain, 0.9)), roofline_mape=float(plain.mean()),
        coverage=float((np.abs(np.log(measured / predicted)) <= half).mean()),
        half_width=float(np.median(np.sinh(half))),
        noise_floor=float(np.median(np.concatenate([j.points.noise for j in judged]))),
        n_extrapolated=int(sum(j.outside.sum() for j in judged)), corrected=corrected)
