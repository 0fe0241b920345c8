"""Which cost model do measurements give, and how far may it be trusted?

Per kind of op, precision and number of threads: non-negative least squares on physical features
(`simmem.cost.features`) of the relative error, so that a product of microseconds counts as much as one of milliseconds;
points with a high noise floor count less, and those that fit badly are held down (Huber). A smooth correction of the
residual is kept only where it foretells shapes that it has not seen clearly better, and stays monotone.
Cross-validation leaves out whole families of shapes (`simmem.cost.holdout`); its errors give the conformal interval
(`simmem.cost.conformal`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from simmem.cost.conformal import fit_interval
from simmem.cost.features import Work, feature
from simmem.cost.fitted import PARTS, joined, physical_s, product_s
from simmem.cost.holdout import family
from simmem.cost.noise import TOO_NOISY, judge
from simmem.cost.residual import fit_residual, is_monotone
from simmem.errors import CalibrationError, MachineError, SpecError
from simmem.spec.costmodel import Axis, Errors, FittedCost, Group, Interval, Residual, Term, load_cost_model
from simmem.spec.measurement import Measurement, Measurements
from simmem.spec.precision import PRECISIONS, matrix_bytes_per_param

__all__ = ["MIN_POINTS", "FittedCost", "Points", "fit_cost_model", "load_cost_model", "points_of"]

Array = NDArray[np.float64]

PRODUCTS = ("gemv", "gemm")
MOVES = ("gather", "scatter", "upkeep", "host-to-device", "device-to-host")
"""Ops that only move bytes."""
MIN_POINTS = 16
MIN_SHAPES = 8
_ENOUGH = 48
"""Trusted points of a kind, with which those of two modes are left out."""
MIN_CORRECTED = 64
"""Points that a correction needs."""
N_FOLDS = 10
STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""Of the ridge penalty of a correction, that are tried."""
WORTH = 0.95
"""A correction is kept where its mean error on held-out shapes is less than this share of the physical model's."""
_AXES: tuple[Axis, ...] = ("rows", "cols", "batch")
_NOISE = 0.03
"""Points quieter than this count alike: what limits the fit then is the model."""
_HUBER = 1.5
_HUBER_STEPS = 5
_OVERLAP_STEPS = 15
_HELD = 1e-2
"""Weight that holds a coefficient to its last value, so that hidden parts do not run away."""
_NOTHING = 1e-6
"""A term that is nowhere more than this share of the time is left out."""
OVERLAPS = (1.0, 2.0, 4.0, 16.0)
"""Exponents that are tried for a GEMM."""
_FAR = (1 << 21, 1 << 23, 1 << 25, 1 << 27)
"""What a matrix may hold before it is far: from the caches of a core to the reach of a second-level TLB. [B]"""
_BLOCKS = (4, 8, 16)
"""Tokens that kernels take at once, for `passes`."""
_CPU_TILES = ((4, 1), (6, 1), (8, 1), (12, 1), (16, 1), (24, 1), (32, 1), (48, 1), (64, 1))
_GPU_TILES = ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
_GPU_FIT_TILES = ((128, 64), (128, 128), (256, 128))
_VARIANT = ("pinned", "waited", "direction", "pattern", "how")
"""Conditions of moves that make them ops of another kind."""
_AGENT = {"cuda": "gpu"}
"""What torch calls an agent, and a device file."""
_MAX_NAME = 200
_MOST = 1e15
_OTHER_WIDTHS = {"tf32": 4.0, "fp8": 1.0}
"""Bytes of a parameter at precisions that no plan knows. [B]"""


@dataclass(frozen=True)
class Points:
    """Measurements of one kind of op, as arrays (n,)."""

    kind: str
    dtype: str
    agent: str
    level: str
    threads: int
    variant: str
    work: Work
    seconds: Array
    """Median of the samples. [s]"""
    noise: Array
    """Noise floor, as a share."""
    families: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.seconds)

    def only(self, which: NDArray[np.bool_] | NDArray[np.int64]) -> Points:
        """Some of the points."""
        w = self.work
        launches, count, batch, rows, cols, n_bytes, flop = (
            np.asarray(a)[which] for a in (w.launches, w.count, w.batch, w.rows, w.cols, w.weight_bytes, w.flop))
        cut = Work(launches, count, batch, rows, cols, n_bytes, flop, w.bytes_per_param, w.units, w.whole)
        return Points(self.kind, self.dtype, self.agent, self.level, self.threads, self.variant, cut,
                      self.seconds[which], self.noise[which], self.families[which])

    @property
    def axes(self) -> dict[Axis, Array]:
        return {axis: np.asarray(self.work.at(axis)) for axis in _AXES}

    @property
    def weights(self) -> Array:
        """Of least squares on relative errors."""
        return _NOISE / np.hypot(_NOISE, self.noise)


def fit_cost_model(measurements: Measurements, *, device_agent: str = "cpu") -> FittedCost:
    """Fit seconds of matrix products, gathers and copies to raw measurements.

    Points that a probe or their own scatter refuses are left out (`simmem.cost.noise`). Kinds with too few points stay
    with the roofline: `FittedCost.left_out` names them. `FittedCost.to_json()` is the file that a device names in
    `cost_model`; `load_cost_model(path)` reads it again.

    Parameters
    ----------
    measurements : of one device; conditions of products are rows, cols, batch, dtype, threads, level.
    device_agent : which agent of the device the points without the condition "agent" were run on.

    Raises
    ------
    CalibrationError
        No kind of op has enough points.
    MachineError
        scipy or scikit-learn is not installed.
    """
    groups, left_out = [], {}
    every = points_of(measurements, device_agent=device_agent)
    for points in every:
        shapes = len(np.unique(points.families))
        if len(points) < MIN_POINTS or shapes < MIN_SHAPES:
            left_out[_name(points)] = (f"{len(points)} points of {shapes} shapes; a fit needs {MIN_POINTS} and "
                                       f"{MIN_SHAPES}")
            continue
        found = _fit_or_why_not(points, _floors(points, every))
        if isinstance(found, str):
            left_out[_name(points)] = found
        else:
            groups.append(found)
    if not groups:
        raise CalibrationError("no kind of op has enough measurements for a cost model: "
                               + ("; ".join(f"{k}: {v}" for k, v in list(left_out.items())[:3]) or "found none"))
    try:
        return FittedCost(name=_plain(measurements.name)[:100], date=_plain(measurements.date)[:40],
                          groups=tuple(groups), left_out=left_out)
    except ValidationError as error:  # more kinds than a file may hold
        raise CalibrationError(f"no cost model holds this: {error.errors(include_url=False)[0]['msg']}") from None


def _name(points: Points) -> str:
    parts = (points.kind, points.dtype, points.agent, points.level, f"{points.threads} threads", points.variant)
    return _plain(" ".join(part for part in parts if part))[:_MAX_NAME]


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


# --- points ---------------------------------------------------------------------------------------------------------


def points_of(measurements: Measurements, *, device_agent: str = "cpu") -> list[Points]:
    """The measurements that a cost model is fitted to, one `Points` for each kind of op, precision and so on.

    Where few of a kind can be trusted because the machine has two speeds, as one has whose core others share, those
    with two modes not far apart count too, as noisy as the modes lie apart.
    """
    units = int(measurements.machine.get("gpu_sms", 1))
    found: dict[tuple[str, str, str, str, int, str], list[tuple[Measurement, float, float]]] = {}
    doubtful: dict[tuple[str, str, str, str, int, str], list[tuple[Measurement, float, float]]] = {}
    for point in measurements.points:
        c = point.conditions
        if point.probe not in (*PRODUCTS, *MOVES) or (point.probe in PRODUCTS and family(point) is None):
            continue
        judged = judge(point)
        noise = judged.noise_floor
        if judged.refused is not None:
            if point.refused is not None or judged.modes_s is None:
                continue
            noise = max(noise, (judged.modes_s[1] / judged.modes_s[0] - 1.0) / 2.0)
            if noise > TOO_NOISY:
                continue
        _check(point)
        variant = "" if point.probe in PRODUCTS else " ".join(f"{k}={c[k]}" for k in _VARIANT if k in c)
        agent = str(c.get("agent", device_agent))
        key = (point.probe, str(c.get("dtype", "")), _AGENT.get(agent, agent), str(c.get("level", "")),
               int(c.get("threads", 1)), variant)
        some = found if judged.refused is None else doubtful
        some.setdefault(key, []).append((point, judged.median_s, noise))
    for key, rows in doubtful.items():
        if len(found.get(key, ())) < _ENOUGH:
            found.setdefault(key, []).extend(rows)
    return [_points(key, rows, 1 if key[2] == "cpu" else units) for key, rows in sorted(found.items())]


def _check(point: Measurement) -> None:
    for name in (*(_AXES if point.probe in PRODUCTS else ("row_bytes",)), "threads"):
        value = point.conditions.get(name, 1)
        if isinstance(value, (bool, str)) or not 1 <= value <= _MOST:
            raise SpecError(f"a {point.probe} says its {name}, a number from 1 to {_MOST:.0e}", key="conditions")
    if point.probe == "gemm" and "batch" not in point.conditions:
        raise SpecError("a gemm says its batch, found none", key="conditions")


def _points(key: tuple[str, str, str, str, int, str], rows: Sequence[tuple[Measurement, float, float]], units: int
            ) -> Points:
    kind, dtype, agent, level, threads, variant = key
    points = [point for point, _, _ in rows]

    def of(name: str) -> Array:
        return np.array([float(p.conditions[name]) for p in points])

    launches = np.array([max(p.requests, 1.0) for p in points])
    one = np.ones(len(points))
    if kind in PRODUCTS:
        width = matrix_bytes_per_param(dtype) if dtype in PRECISIONS else _OTHER_WIDTHS.get(dtype)
        if width is None:
            raise CalibrationError(f"a product has the condition dtype {dtype!r}, expected one of "
                                   + ", ".join((*PRECISIONS, *_OTHER_WIDTHS)))
        shape = (of("batch") if kind == "gemm" else one, of("rows"), of("cols"))
        n_bytes = shape[1] * shape[2] * width
        families = [str(family(p)) for p in points]
    else:
        width = 1.0
        n_bytes = np.array([p.bytes for p in points])
        long = of("row_bytes") if all("row_bytes" in p.conditions for p in points) else n_bytes / launches
        shape = (one, n_bytes / long, long)
        families = [f"{rows:.0f}x{cols:.0f}" for rows, cols in zip(shape[1], shape[2], strict=True)]
    work = Work(launches, one, *shape, n_bytes, np.array([p.flop for p in points]), width, units)
    return Points(kind, dtype, agent, level, threads, variant, work, np.array([s for _, s, _ in rows]),
                  np.array([n for _, _, n in rows]), np.array(families))


def _floors(points: Points, every: Sequence[Points]) -> tuple[float, float | None]:
    """The highest rate at which anything left this level, and at which this precision was computed. [B/s], [FLOP/s]"""
    alike = [p for p in every if (p.agent, p.level, p.threads) == (points.agent, points.level, points.threads)
             and (p.kind in PRODUCTS) == (points.kind in PRODUCTS)]
    rate = max(float((np.asarray(p.work.weight_bytes) / p.seconds).max()) for p in alike)
    if points.kind not in PRODUCTS:
        return rate, None
    return rate, max(float((np.asarray(p.work.flop) / p.seconds).max()) for p in alike if p.dtype == points.dtype)


# --- fit ------------------------------------------------------------------------------------------------------------


def _candidates(points: Points) -> list[Term]:
    """Terms that least squares may choose from."""
    names = ["weights", "rows", "row_starts"]
    # What was copied row by row (upkeep, in older records) has a launch for each, which a plan does not count.
    if points.kind != "upkeep" or np.ptp(np.asarray(points.work.launches)) == 0.0:
        names.append("launches")
    terms = [Term.model_validate({"feature": n, "coefficient": 0.0}) for n in names]
    terms += [Term(feature="far_weights", coefficient=0.0, above_bytes=float(far)) for far in _FAR]
    if points.kind in PRODUCTS:
        terms += [Term(feature="activations", coefficient=0.0)]
    if points.kind == "gemm":
        tiles, fitting = (_CPU_TILES, ()) if points.work.units == 1 else (_GPU_TILES, _GPU_FIT_TILES)
        terms += [Term(feature="flop", coefficient=0.0),
                  *(Term(feature="far_flop", coefficient=0.0, above_bytes=float(far)) for far in _FAR),
                  *(Term(feature="passes", coefficient=0.0, tile=(block, 1)) for block in _BLOCKS),
                  *(Term(feature="tiles", coefficient=0.0, tile=tile) for tile in tiles),
                  *(Term(feature="fit_tiles", coefficient=0.0, tile=tile) for tile in fitting)]
    return terms


@dataclass(frozen=True)
class _Physical:
    terms: tuple[Term, ...]
    overlap: float


def _fit_terms(points: Points, overlap: float) -> _Physical:
    """Non-negative least squares on relative errors, iteratively reweighted (Huber).

    The join of memory and arithmetic is homogeneous, so its tangent passes through the origin (Euler): a step of Gauss
    and Newton is the same least squares with the columns of each part times (part / join)^(p − 1).
    """
    try:
        from scipy.optimize import nnls
    except ImportError:
        raise MachineError('fitting a cost model needs scipy; install with: pip install "simmem[fit]"') from None
    terms = _candidates(points)
    design = np.stack([np.broadcast_to(feature(t, points.work), points.seconds.shape) for t in terms], axis=1)
    design = design / points.seconds[:, None]
    size = np.linalg.norm(design, axis=0)
    used = size > 0
    scaled = design[:, used] / size[used]
    weights = points.weights
    part = np.array([PARTS[t.feature] for t in terms])[used]
    memory, arithmetic = part == "memory", part == "arithmetic"
    found = np.full(scaled.shape[1], 1.0 / scaled.shape[1])
    slope = np.ones((len(points), 2))
    for step in range(_HUBER_STEPS if overlap == 1.0 else _OVERLAP_STEPS):
        tangent = scaled * np.where(memory, slope[:, :1], np.where(arithmetic, slope[:, 1:], 1.0))
        rows, target = tangent * weights[:, None], weights
        if overlap > 1.0:  # a part that is hidden everywhere has no slope: it stays where it is
            rows = np.concatenate([rows, _HELD * np.eye(len(found))])
            target = np.concatenate([target, _HELD * found])
        last, found = found, nnls(rows, target)[0]
        if step and overlap > 1.0:  # halfway: full steps can go back and forth between two sets of terms
            found = 0.5 * (last + found)
        parts = np.stack([scaled[:, memory] @ found[memory], scaled[:, arithmetic] @ found[arithmetic]], axis=1)
        join = joined(parts[:, 0], parts[:, 1], overlap)
        slope = (parts / np.maximum(join, 1e-300)[:, None]) ** (overlap - 1.0)
        off = np.abs(scaled[:, ~(memory | arithmetic)] @ found[~(memory | arithmetic)] + join - 1.0)
        scatter = 1.4826 * float(np.median(off))
        weights = points.weights * np.sqrt(np.minimum(1.0, _HUBER * scatter / np.maximum(off, 1e-300)))
        if scatter < 1e-12:
            break
    found = np.where((scaled * found).max(axis=0) > _NOTHING, found, 0.0)
    coefficients = np.zeros(len(terms))
    coefficients[used] = found / size[used]
    kept = tuple(t.model_copy(update={"coefficient": float(c)})
                 for t, c in zip(terms, coefficients, strict=True) if c > 0)
    if not kept:
        raise CalibrationError(f"no feature explains the times of {_name(points)}")
    return _Physical(kept, overlap)


def _fit_or_why_not(points: Points, floors: tuple[float, float | None]) -> Group | str:
    """A group, or in words why its points allow none: one kind that defies a fit takes no other with it."""
    try:
        return _fit_group(points, floors)
    except CalibrationError as error:
        return _plain(error.message)[:_MAX_NAME]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        return _plain(f"too noisy: a fit gives {where} {first['input']!r}: {first['msg']}")[:_MAX_NAME]
    except RuntimeError as error:  # scipy where least squares does not converge
        return f"too noisy: {error}"[:_MAX_NAME]


def _fit_group(points: Points, floors: tuple[float, float | None]) -> Group | str:
    """One group: physical terms, a correction where it is worth it, and the interval of held-out errors.

    Or why there is none: a model that foretells held-out shapes no better than the roofline is not worth its name.
    """
    folds = _folds(points.families)
    roof = _group(points, floors, _Physical((Term(feature="weights", coefficient=0.0),), 1.0), None)

    def physical(overlap: float) -> tuple[Array, dict[int, _Physical]]:
        by_fold = {fold: _fit_terms(points.only(folds != fold), overlap) for fold in np.unique(folds)}
        return _held_out_errors(points, floors, folds, by_fold, None), by_fold

    tried = {p: physical(p) for p in (OVERLAPS if points.kind == "gemm" else OVERLAPS[:1])}
    overlap = min(tried, key=lambda p: float(tried[p][0].mean()))
    terms = _fit_terms(points, overlap)
    errors: dict[float | None, Array] = {None: tried[overlap][0]}
    corrections: dict[float | None, Residual | None] = {None: None}
    for strength in STRENGTHS if points.kind in PRODUCTS and len(points) >= MIN_CORRECTED else ():
        found = _correct(points, terms, strength)
        if found is not None and is_monotone(_group(points, floors, terms, found)):
            corrections[strength] = found
            errors[strength] = _held_out_errors(points, floors, folds, tried[overlap][1], strength)
    best = min(errors, key=lambda s: float(errors[s].mean()))
    if not (errors[best].mean() < WORTH * errors[None].mean()
            and np.quantile(errors[best], 0.9) <= np.quantile(errors[None], 0.9)):
        best = None
    plain = _log_error(roof, points)
    if not all(np.quantile(errors[best], q) < np.quantile(plain, q) for q in (0.5, 0.9)):
        return (f"held-out shapes are off by {np.median(errors[best]):.0%} in the median, "
                f"{np.quantile(errors[best], 0.9):.0%} at the 90th percentile; the roofline by {np.median(plain):.0%}, "
                f"{np.quantile(plain, 0.9):.0%}")
    return _group(
        points, floors, terms, corrections[best],
        interval=fit_interval(errors[best], points.axes, folds), roofline=plain,
        physical=errors[None], chosen=errors[best])


def _correct(points: Points, terms: _Physical, strength: float) -> Residual | None:
    physical = physical_s(_group(points, (1e16, None), terms, None), points.work)
    return fit_residual(np.log(points.seconds / physical), points.axes, points.weights, strength)


def _held_out_errors(points: Points, floors: tuple[float, float | None], folds: NDArray[np.int64],
                     by_fold: Mapping[int, _Physical], strength: float | None) -> Array:
    """|log(measured / predicted)| of each point by the model of the other folds."""
    found = np.empty(len(points))
    for fold, terms in by_fold.items():
        fitted, out = points.only(folds != fold), points.only(folds == fold)
        group = _group(fitted, floors, terms, None if strength is None else _correct(fitted, terms, strength))
        found[folds == fold] = _log_error(group, out)
    return found


def _log_error(group: Group, points: Points) -> Array:
    return np.abs(np.log(points.seconds / product_s(group, points.work)))


def _folds(families: NDArray[np.str_]) -> NDArray[np.int64]:
    """A fold for each point; points of a family share theirs."""
    names, member = np.unique(families, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(names))
    return np.asarray(order[member] % min(N_FOLDS, len(names)), dtype=np.int64)


def _group(points: Points, floors: tuple[float, float | None], fit: _Physical, residual: Residual | None, *,
           interval: Interval | None = None, roofline: Array | None = None, physical: Array | None = None,
           chosen: Array | None = None) -> Group:
    def errors(found: Array | None) -> Errors:
        return Errors(median=0.0, p90=0.0) if found is None else Errors(
            median=float(np.median(found)), p90=float(np.quantile(found, 0.9)))

    extent: Mapping[Axis, tuple[float, float]] = {a: (float(v.min()), float(v.max())) for a, v in points.axes.items()}
    return Group(
        kind=points.kind, dtype=points.dtype, agent=points.agent, level=points.level, threads=points.threads,
        variant=points.variant[:120], bytes_per_param=points.work.bytes_per_param, units=points.work.units,
        bytes_per_s=floors[0], flop_per_s=floors[1], terms=fit.terms, overlap=fit.overlap, residual=residual,
        range=dict(extent),
        interval=interval or Interval(quantile=0.0, intercept=0.0, slopes={}, bounds=(1.0, 1.0), n=1),
        n_points=len(points), n_shapes=len(np.unique(points.families)), roofline=errors(roofline),
        physical=errors(physical), chosen=errors(chosen))
