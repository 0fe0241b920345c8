"""How far is the storage surface from published curves, on points it was not fitted to?

Each curve of `validate/curves/storage.toml` (or of a file of your own) says which of its points are fitted; the others
judge the surface, at `TARGET`. Points that are expected to be missed say why, and fail when they no longer are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from simmem.cost.surface import ReadPoint, Regime, Surface, SurfaceFit, fit_surface
from simmem.errors import SimmemError
from simmem.spec import library
from simmem.spec.base import Frozen, load_toml, validate
from simmem.units import parse_quantity

__all__ = ["TARGET", "Curve", "CurvePoint", "CurveResult", "PointResult", "judge_curves"]

TARGET = 0.15
"""|predicted / published − 1| that a judged point may have."""

Status = Literal["fitted", "shown", "pass", "fail", "xfail", "xpass"]


def _reader(dimension: str) -> BeforeValidator:
    def read(text: object) -> float:
        try:
            return parse_quantity(text, dimension)
        except SimmemError as error:  # pydantic reports ValueError with the key path
            raise ValueError(error.message) from None
    return BeforeValidator(read)


_Bytes = Annotated[float, _reader("bytes")]
_Rate = Annotated[float, _reader("bytes_per_s")]
_Seconds = Annotated[float, _reader("s")]


class CurvePoint(Frozen):
    """One published throughput; as bytes a second, reads a second, or the time of each of `depth` reads."""

    size: _Bytes
    depth: float = Field(ge=1, le=1 << 20)
    throughput: _Rate | None = None
    reads_per_s: PositiveFloat | None = None
    time: _Seconds | None = None
    regime: Regime = "random"
    use: Literal["fit", "judge", "show"] = "judge"
    miss: str | None = Field(default=None, min_length=4)
    """Why this judged point is expected to be missed."""
    why: str | None = Field(default=None, min_length=4)
    """Why this point is only shown."""

    @model_validator(mode="after")
    def _complete(self) -> CurvePoint:
        if sum(v is not None for v in (self.throughput, self.reads_per_s, self.time)) != 1:
            raise ValueError("a point has one of throughput, reads_per_s and time")
        if (self.use == "show") != (self.why is not None):
            raise ValueError('a point with use = "show" says why, and no other does')
        if self.miss and self.use != "judge":
            raise ValueError("only a judged point can miss")
        return self

    @property
    def read(self) -> ReadPoint:
        """In SI units, as a throughput."""
        if self.throughput is not None:
            rate = self.throughput
        elif self.reads_per_s is not None:
            rate = self.size * self.reads_per_s
        else:
            assert self.time is not None
            rate = self.depth * self.size / self.time
        return ReadPoint(self.size, self.depth, rate, self.regime)


class _Known(Frozen):
    latency: _Seconds | None = None
    single_rate: _Rate | None = None
    request_time: _Seconds | None = None
    request_rate: _Rate | None = None
    rate: _Rate | None = None


class Curve(Frozen):
    """Points of one device under one set of conditions."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=80)
    title: str = Field(min_length=4)
    source: str = Field(min_length=4)
    conditions: str = Field(min_length=4)
    known: _Known = _Known()
    known_source: str | None = Field(default=None, min_length=4)
    """Where the known figures come from; they are held fixed."""
    points: tuple[CurvePoint, ...] = Field(min_length=1, max_length=10_000)

    @model_validator(mode="after")
    def _sourced(self) -> Curve:
        if bool(self.known.model_dump(exclude_none=True)) != (self.known_source is not None):
            raise ValueError("known figures and known_source come together")
        return self


class _Curves(Frozen):
    schema_: Literal["simmem.curves/1"] = Field(alias="schema")
    curve: tuple[Curve, ...] = Field(min_length=1, max_length=1000)

    @model_validator(mode="after")
    def _distinct(self) -> _Curves:
        names = [c.id for c in self.curve]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"two curves are called {twice[0]!r}")
        return self


@dataclass(frozen=True)
class PointResult:
    """A point and what the surface says of it."""

    point: CurvePoint
    predicted_bytes_per_s: float | None
    """None where no rate of the page cache is known."""
    error: float | None
    """Predicted / published − 1."""
    status: Status


@dataclass(frozen=True)
class CurveResult:
    """A curve, its surface, and every point."""

    curve: Curve
    fit: SurfaceFit
    points: tuple[PointResult, ...]

    @property
    def judged(self) -> tuple[PointResult, ...]:
        return tuple(p for p in self.points if p.status not in ("fitted", "shown"))

    @property
    def mean(self) -> float | None:
        """Mean |error| of the judged points; None where there is none."""
        errors = [abs(p.error) for p in self.judged if p.error is not None]
        return float(np.mean(errors)) if errors else None

    @property
    def worst(self) -> float | None:
        """Largest |error| of the judged points; None where there is none."""
        return max((abs(p.error) for p in self.judged if p.error is not None), default=None)


def judge_curves(path: Path | None = None) -> tuple[CurveResult, ...]:
    """Fit each curve to its points for fitting and judge it on the others.

    Parameters
    ----------
    path : a file of curves; the built-in one when None.

    Raises
    ------
    SpecError
        The file is not one of curves.
    MachineError
        scipy is not installed.
    """
    path = library.data_folder() / "validate" / "curves" / "storage.toml" if path is None else path
    return tuple(_judge(curve) for curve in validate(_Curves, load_toml(path), file=str(path)).curve)


def _judge(curve: Curve) -> CurveResult:
    known = curve.known.model_dump(exclude_none=True)
    fit = fit_surface([p.read for p in curve.points if p.use == "fit"], known=known)
    return CurveResult(curve, fit, tuple(_point(p, fit.surface) for p in curve.points))


def _point(point: CurvePoint, surface: Surface) -> PointResult:
    read = point.read
    if point.regime == "cached" and surface.cached_rate is None:
        return PointResult(point, None, None, "shown")
    predicted = float(surface.throughput(read.size_bytes, read.depth, read.regime))
    error = predicted / read.bytes_per_s - 1.0
    inside = abs(error) <= TARGET
    status: Status = {"fit": "fitted", "show": "shown"}.get(point.use) or (  # type: ignore[assignment]
        ("xpass" if inside else "xfail") if point.miss else ("pass" if inside else "fail"))
    return PointResult(point, predicted, error, status)
