"""What does the file of a fitted cost model hold?

For every kind of op and precision that was measured: seconds as a sum of physical features with coefficients that are
never negative, perhaps a smooth correction, the range that the measurements covered and how far they lay from it.
`simmem.cost.regression` writes it, `simmem.cost.fitted` evaluates it; nothing in it is code. Beside those, or instead
of them: factors on the time of whole phases, learnt from plans that were run (`simmem.cost.phases`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from simmem.spec.base import Frozen, validate
from simmem.spec.jsonfile import read_json

__all__ = [
    "Axis",
    "Errors",
    "FittedCost",
    "Group",
    "Interval",
    "PhaseFactor",
    "PhaseName",
    "Residual",
    "Spline",
    "SplinePair",
    "Term",
    "load_cost_model",
]

MAX_FILE_BYTES = 1 << 20
MAX_GROUPS = 64
MAX_TERMS = 64
MAX_PHASES = 64
MAX_SPENT = 4096
LARGEST_FACTOR = 64.0
"""A prediction that is further off is wrong, not in need of a correction."""

Axis = Literal["rows", "cols", "batch"]
Feature = Literal["launches", "weights", "activations", "rows", "row_starts", "far_weights", "passes", "flop",
                  "far_flop", "tiles", "fit_tiles"]
"""See `simmem.cost.features`."""

PhaseName = Literal["flash", "copy", "upkeep", "predictor", "attention", "FFN", "head", "step"]
"""What a run's time is split into; `wait` is not among them: nothing runs then, so nothing can be corrected."""

_Word = Annotated[str, Field(max_length=40, pattern=r"^[a-z0-9_-]*$")]
_Text = Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""Nothing that moves the cursor or turns the direction of writing."""
_Extent = Annotated[float, Field(gt=0, le=1e15)]
_Log2 = Annotated[float, Field(ge=-64, le=64)]
_Small = Annotated[float, Field(ge=-64, le=64)]


class Term(Frozen):
    """One physical feature and what a unit of it takes. [s per unit]"""

    feature: Feature
    coefficient: float = Field(ge=0, le=1e3)
    above_bytes: float = Field(default=0.0, ge=0, le=1e15)
    """far_weights, far_flop: only what a matrix holds beyond this. [B]"""
    tile: tuple[Annotated[int, Field(ge=1, le=4096)], Annotated[int, Field(ge=1, le=4096)]] = (1, 1)
    """tiles: (tokens, rows) of the result that are computed as one; passes: of the tokens alone."""


class Spline(Frozen):
    """A B-spline of the logarithm (base 2) of one axis, constant beyond its ends."""

    axis: Axis
    degree: int = Field(ge=1, le=3)
    knots: Annotated[tuple[_Log2, ...], Field(min_length=4, max_length=32)]
    """With those beyond the ends; ascending. [log2]"""
    coefficients: Annotated[tuple[_Small, ...], Field(max_length=32)]

    @model_validator(mode="after")
    def _is_a_spline(self) -> Spline:
        if any(b <= a for a, b in zip(self.knots, self.knots[1:], strict=False)):
            raise ValueError("the knots ascend")
        if len(self.knots) < 2 * self.degree + 2 or len(self.coefficients) != len(self.knots) - self.degree - 1:
            raise ValueError(f"{len(self.knots)} knots of degree {self.degree} need "
                             f"{max(len(self.knots) - self.degree - 1, 0)} coefficients, found "
                             f"{len(self.coefficients)}")
        return self


class SplinePair(Frozen):
    """How two axes act together: a coefficient for every pair of their basis functions."""

    first: int = Field(ge=0, le=2)
    second: int = Field(ge=0, le=2)
    coefficients: Annotated[tuple[Annotated[tuple[_Small, ...], Field(max_length=32)], ...], Field(max_length=32)]


class Residual(Frozen):
    """A smooth correction: logarithm of measured over physical, of the shape of a product."""

    intercept: _Small
    splines: Annotated[tuple[Spline, ...], Field(min_length=1, max_length=3)]
    pairs: Annotated[tuple[SplinePair, ...], Field(max_length=3)] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> Residual:
        axes = [s.axis for s in self.splines]
        if len(set(axes)) != len(axes):
            raise ValueError("each axis has one spline")
        for pair in self.pairs:
            if not pair.first < pair.second < len(self.splines):
                raise ValueError("a pair names two of the splines, the earlier first")
            shape = (len(self.splines[pair.first].coefficients), len(self.splines[pair.second].coefficients))
            if len(pair.coefficients) != shape[0] or any(len(row) != shape[1] for row in pair.coefficients):
                raise ValueError(f"the coefficients of this pair are {shape[0]} rows of {shape[1]}")
        return self


class Interval(Frozen):
    """Conformal: nine in ten held-out measurements lay within exp(±quantile · scale) of their prediction.

    scale = exp(intercept + Σ slope · log2(axis)), kept within `bounds`: how much harder some shapes are than others.
    """

    quantile: float = Field(ge=0, le=1e4)
    intercept: _Small
    slopes: dict[Axis, _Small]
    bounds: tuple[Annotated[float, Field(gt=0, le=16)], Annotated[float, Field(gt=0, le=16)]]
    n: int = Field(ge=1)
    """Held-out points the quantile is of."""

    @model_validator(mode="after")
    def _in_order(self) -> Interval:
        if self.bounds[0] > self.bounds[1]:
            raise ValueError("the lower bound comes first")
        return self


class Errors(Frozen):
    """Absolute error of log(measured / predicted) on shapes held out by cross-validation."""

    median: float = Field(ge=0)
    p90: float = Field(ge=0)


class Group(Frozen):
    """Ops of one kind and precision, out of one level of memory, on so many threads of one agent."""

    kind: _Word
    """gemv, gemm, gather, host-to-device, ...: the probe that measured it."""
    dtype: _Word
    agent: _Text
    level: _Word
    """Of memory, that the weights came from."""
    threads: int = Field(ge=1, le=1 << 20)
    variant: _Text = ""
    """Further conditions that set these ops apart."""
    bytes_per_param: float = Field(gt=0, le=16)
    units: int = Field(default=1, ge=1, le=1 << 16)
    """Multiprocessors that tiles are spread over; 1 on a CPU."""
    bytes_per_s: float = Field(gt=0, le=1e16)
    """Floor: no measurement moved weights faster out of this level. [B/s]"""
    flop_per_s: float | None = Field(gt=0, le=1e19)
    """Floor: no measurement computed faster; None for what computes nothing. [FLOP/s]"""
    terms: Annotated[tuple[Term, ...], Field(min_length=1, max_length=MAX_TERMS)]
    overlap: float = Field(ge=1, le=64)
    """Exponent that joins memory and arithmetic: 1 where one waits for the other, more the better they overlap."""
    residual: Residual | None
    range: dict[Axis, tuple[_Extent, _Extent]]
    """Smallest and largest of the shapes measured."""
    interval: Interval
    n_points: int = Field(ge=1)
    n_shapes: int = Field(ge=1)
    roofline: Errors
    physical: Errors
    chosen: Errors
    """The physical part with its correction, where there is one."""

    @model_validator(mode="after")
    def _ranges(self) -> Group:
        if set(self.range) != {"rows", "cols", "batch"}:
            raise ValueError("a range has rows, cols and batch")
        if any(low > high for low, high in self.range.values()):
            raise ValueError("the smaller end of a range comes first")
        return self


class PhaseFactor(Frozen):
    """What plans that were run say of the time of a phase: measured ≈ factor · what the device's figures predict."""

    phase: PhaseName
    dtype: _Word
    """Of the weights; empty for what does not multiply."""
    agent: _Text
    """That the ops run on; empty for reads and copies."""
    factor: float = Field(ge=1 / LARGEST_FACTOR, le=LARGEST_FACTOR)
    low: float = Field(gt=0, le=LARGEST_FACTOR**2)
    high: float = Field(gt=0, le=LARGEST_FACTOR**2)
    """Nine in ten held-out rows took between low and high times what the figures predict."""
    rows: int = Field(ge=1)
    """Of the last time it was learnt."""
    groups: int = Field(ge=2)
    """Held out in turn, to judge it."""
    error_before: float = Field(ge=0)
    error_after: float = Field(ge=0)
    """Mean |predicted / measured - 1| of held-out rows, without and with what was learnt last."""
    spent: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=MAX_SPENT)]
    """The rows it was learnt from, digest and name: they judge it no more."""

    @model_validator(mode="after")
    def _in_order(self) -> PhaseFactor:
        if not self.low <= self.factor <= self.high:
            raise ValueError(f"the factor {self.factor:g} lies outside its own range {self.low:g} to {self.high:g}")
        return self


class FittedCost(Frozen):
    """A cost model of one device: fitted to its measurements, corrected by runs, or both."""

    schema_: Literal["simmem.cost/1"] = Field(default="simmem.cost/1", alias="schema")
    name: _Text
    """Of the device that was measured. A factor on its reads holds for a device of this name alone: one that was given
    another's drive has another name."""
    date: _Text
    groups: Annotated[tuple[Group, ...], Field(max_length=MAX_GROUPS)]
    left_out: dict[_Text, _Text] = Field(default_factory=dict)
    """Kinds that were measured and not fitted, and why: those stay with the roofline."""
    phases: Annotated[tuple[PhaseFactor, ...], Field(max_length=MAX_PHASES)] = ()

    @model_validator(mode="after")
    def _each_once(self) -> FittedCost:
        if not self.groups and not self.phases:
            raise ValueError("a cost model has at least 1 group or factor")
        keys = [(g.kind, g.dtype, g.agent, g.level, g.threads, g.variant) for g in self.groups]
        if len(set(keys)) != len(keys):
            raise ValueError("two groups are of the same ops")
        if len({(p.phase, p.dtype, p.agent) for p in self.phases}) != len(self.phases):
            raise ValueError("two factors are of the same phase")
        return self

    def to_json(self) -> str:
        """The file's text; reading it gives the same model to the last bit."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"


def load_cost_model(path: Path) -> FittedCost:
    """Read a fitted cost model of at most 1 MiB; SpecError, naming file and key, where it is none."""
    data = read_json(path, what="a cost model", max_bytes=MAX_FILE_BYTES)
    return validate(FittedCost, data, file=str(path))
