"""How wide must an interval be, so that nine in ten measurements nobody fitted lie in it?

Split by folds (CV+ and cross-conformal prediction: Barber, Candès, Ramdas and Tibshirani, Annals of Statistics 49,
2021; Vovk, Annals of Mathematics and Artificial Intelligence 74, 2015): each point's score is its error under the model
of the folds without its shape. Scores are divided by how hard such shapes are (Lei, G'Sell, Rinaldo, Tibshirani and
Wasserman, JASA 113, 2018), and each kind and precision has its own quantile (Mondrian groups; Vovk, Gammerman and
Shafer, Algorithmic Learning in a Random World, 2005), so that it holds for each and not only on average. That takes new
shapes to be drawn like those measured; outside their range nothing is promised, and `fitted.half_width` widens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from simmem.spec.costmodel import Axis, Interval

__all__ = ["COVERAGE", "conformal_quantile", "fit_interval"]

Array = NDArray[np.float64]

COVERAGE = 0.9
_PRIOR_POINTS = 20.0
"""Slopes of the difficulty are held towards none as if so many points said so."""
_SCALE_BOUNDS = 3.0
"""No shape counts as more than so many times as hard, or as easy, as the middle one."""
_LEAST_ERROR = 1e-9
_LUCK = 0.3
"""An error of less than this share of the middle one is luck; its logarithm would outweigh all others."""


def conformal_quantile(scores: Array, coverage: float = COVERAGE) -> float:
    """The ⌈(n + 1) · coverage⌉-th smallest of n scores; the largest where n is too small for that."""
    n = len(scores)
    return float(np.sort(scores)[min(math.ceil((n + 1) * coverage), n) - 1])


def fit_interval(errors: Array, axes: Mapping[Axis, Array], folds: NDArray[np.int64],
                 coverage: float = COVERAGE) -> Interval:
    """An interval of log(measured / predicted), from errors on points that their model was not fitted to.

    Parameters
    ----------
    errors : |log(measured / predicted)|, (n,).
    axes : rows, columns and batch of each point, (n,) each.
    folds : which fold each point was held out in; how hard a point is, is learnt from the other folds.
    """
    x = {axis: np.log2(at) for axis, at in axes.items() if np.ptp(at) > 0}
    scores = np.empty_like(errors)
    for fold in np.unique(folds):
        out = folds == fold
        some = ~out if (~out).any() else out
        scores[out] = errors[out] / _scale(_difficulty(errors[some], {a: v[some] for a, v in x.items()}),
                                           {a: v[out] for a, v in x.items()})
    intercept, slopes, bounds = _difficulty(errors, x)
    return Interval(quantile=conformal_quantile(scores, coverage), intercept=intercept, slopes=slopes, bounds=bounds,
                    n=len(errors))


_Difficulty = tuple[float, dict[Axis, float], tuple[float, float]]


def _difficulty(errors: Array, x: Mapping[Axis, Array]) -> _Difficulty:
    """Intercept, slopes and bounds of the usual size of an error: ridge regression of its logarithm."""
    middle = max(float(np.median(errors)), _LEAST_ERROR)
    y = np.log(np.maximum(errors, _LUCK * middle))
    means = {axis: float(v.mean()) for axis, v in x.items()}
    design = np.stack([v - means[axis] for axis, v in x.items()], axis=1) if x else np.zeros((len(y), 0))
    gram = design.T @ design
    held = _PRIOR_POINTS / len(y) * np.diag(np.diag(gram))
    slopes = np.linalg.solve(gram + held, design.T @ (y - y.mean())) if x else np.zeros(0)
    named = {axis: float(s) for axis, s in zip(x, slopes, strict=True)}
    intercept = float(y.mean()) - sum(s * means[axis] for axis, s in named.items())
    centre = math.exp(float(y.mean()))
    return intercept, named, (centre / _SCALE_BOUNDS, centre * _SCALE_BOUNDS)


def _scale(difficulty: _Difficulty, x: Mapping[Axis, Array]) -> Array:
    intercept, slopes, bounds = difficulty
    power: Array = np.asarray(intercept)
    for axis, slope in slopes.items():
        power = power + slope * x[axis]
    return np.clip(np.exp(power), *bounds)
