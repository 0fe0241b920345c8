"""What does the physical model leave, that depends smoothly on the shape? A correction that scikit-learn fits.

The logarithm of measured over physical, as a ridge regression on B-splines of log2(rows), log2(cols) and log2(batch)
and on their products in pairs. It is kept only where it is monotone and foretells held-out shapes better, which
`simmem.cost.regression` decides. What is kept are knots and coefficients: a plan evaluates them without scikit-learn.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from simmem.cost.features import Work
from simmem.cost.fitted import product_s
from simmem.errors import MachineError
from simmem.spec.costmodel import Axis, Group, Residual, Spline, SplinePair

__all__ = ["fit_residual", "is_monotone"]

Array = NDArray[np.float64]

DEGREE = 2
KNOTS = 4
LARGEST = 0.7
"""A physical model that is a factor of two off is wrong, not in need of correction: larger residuals count as this."""
_GRID = 24
_BEYOND = 2.0
"""Monotone so many times outside the range too, where the correction stays constant."""


def fit_residual(log_ratio: Array, axes: Mapping[Axis, Array], weights: Array, strength: float) -> Residual | None:
    """Fit log(measured / physical) of some points; None where no axis varies.

    Parameters
    ----------
    log_ratio, weights : (n,).
    axes : rows, columns and batch of each point, (n,) each.
    strength : of the ridge penalty.
    """
    try:
        from sklearn.linear_model import Ridge
        from sklearn.preprocessing import SplineTransformer
    except ImportError:
        raise MachineError('fitting a correction needs scikit-learn; install with: pip install "simmem[fit]"') from None
    varying = [axis for axis, at in axes.items() if len(np.unique(at)) >= 2 * KNOTS]
    if not varying:
        return None
    columns, knots = [], []
    for axis in varying:
        x = np.log2(axes[axis])[:, None]
        spline = SplineTransformer(n_knots=KNOTS, degree=DEGREE, extrapolation="constant").fit(x)
        columns.append(np.asarray(spline.transform(x)))
        knots.append(tuple(float(t) for t in spline.bsplines_[0].t))
    pairs = [(i, j) for i in range(len(varying)) for j in range(i + 1, len(varying))]
    design = np.concatenate(columns + [(columns[i][:, :, None] * columns[j][:, None, :]).reshape(len(log_ratio), -1)
                                       for i, j in pairs], axis=1)
    found = Ridge(alpha=strength).fit(design, np.clip(log_ratio, -LARGEST, LARGEST), sample_weight=weights)
    parts = np.split(found.coef_, np.cumsum([c.shape[1] for c in columns]
                                            + [columns[i].shape[1] * columns[j].shape[1] for i, j in pairs])[:-1])
    return Residual(
        intercept=float(found.intercept_),
        splines=tuple(Spline(axis=axis, degree=DEGREE, knots=t, coefficients=tuple(map(float, part)))
                      for axis, t, part in zip(varying, knots, parts, strict=False)),
        pairs=tuple(SplinePair(first=i, second=j, coefficients=tuple(
            tuple(map(float, row)) for row in part.reshape(columns[i].shape[1], -1)))
            for (i, j), part in zip(pairs, parts[len(varying):], strict=True)))


def is_monotone(group: Group) -> bool:
    """Whether more rows or columns never take less time, on a grid of shapes somewhat beyond the range.

    More tokens may: real kernels for three can be slower than for four, and no search chooses the batch.
    """
    sides = [np.geomspace(low / _BEYOND, high * _BEYOND, _GRID * (2 if high > low else 1))
             for low, high in (group.range["rows"], group.range["cols"])]
    low, high = group.range["batch"]
    tokens = np.unique(np.round(np.geomspace(low, high, _GRID)))
    rows, cols, batch = np.meshgrid(*sides, tokens, indexing="ij")
    n_bytes = rows * cols * group.bytes_per_param
    flop = 2.0 * batch * rows * cols if group.flop_per_s else 0.0
    took = product_s(group, Work(1.0, 1.0, batch, rows, cols, n_bytes, flop, group.bytes_per_param, group.units,
                                 whole=False))
    rising = (np.diff(np.log(took), axis=axis) >= -1e-9 for axis in (0, 1))
    return all(bool(one.all()) for one in rising)
