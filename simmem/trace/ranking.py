"""What score must a unit have to be among the n highest as often as it is used, when n changes from token to token?

Each token gives every unit a score, its own offset and a standard normal, and uses the n highest. Given n, all units
whose score is above a cutoff c are used, and c is where the expected number of them is n. Both directions are solved on
tables of the normal distribution, which numpy does not have.
"""

from __future__ import annotations

from math import erf, sqrt

import numpy as np
from numpy.typing import NDArray

__all__ = ["LIMIT", "cutoffs", "normal_cdf", "normal_density", "normal_quantile", "offsets"]

Floats = NDArray[np.float64]
LIMIT = 8.0
"""Scores and cutoffs stay within it; a normal number is beyond it once in 10^15."""
_AT = np.linspace(-LIMIT, LIMIT, 8193)
_BELOW = np.array([0.5 * (1.0 + erf(x / sqrt(2.0))) for x in _AT.tolist()])
_CUTOFFS = np.linspace(-2.0 * LIMIT, 2.0 * LIMIT, 257)
_MOST_KNOTS = 128
_ROUNDS = 15


def normal_cdf(x: Floats) -> Floats:
    """P(z < x) of a standard normal z, to 2e-7."""
    below: Floats = np.interp(x, _AT, _BELOW)
    return below


def normal_quantile(p: Floats) -> Floats:
    """The inverse of `normal_cdf`, within -8 … 8."""
    return np.interp(p, _BELOW, _AT)


def normal_density(x: Floats) -> Floats:
    """exp(-x²/2) / √(2π)."""
    density: Floats = np.exp(-0.5 * x * x) / np.sqrt(2.0 * np.pi)
    return density


def cutoffs(offset: Floats, shares: Floats) -> Floats:
    """The c at which the mean over units of P(offset + z > c) is each of `shares`, of the same shape as they."""
    used = normal_cdf(offset[:, None] - _CUTOFFS).mean(axis=0)
    return np.interp(-shares, -used, _CUTOFFS)


def offsets(frequencies: Floats, shares: Floats) -> Floats:
    """Offsets with which units are used as often as `frequencies` say, one layer's.

    Parameters
    ----------
    frequencies : (U,) share of tokens that use each unit, ascending.
    shares : (Q,) shares of the units that tokens use, equally likely, with about the frequencies' mean.

    Returns
    -------
    (U,) offsets m with mean over q of P(m + z > c_q) = frequency, where c_q is the cutoff for share q. Solved at up to
    128 units; between them m less the normal quantile of the frequency is interpolated.
    """
    n = min(frequencies.size, _MOST_KNOTS)
    knots = np.interp((np.arange(n) + 0.5) / n, (np.arange(frequencies.size) + 0.5) / frequencies.size, frequencies)
    goal = normal_quantile(knots)
    shares = np.clip(shares * (knots.mean() / max(shares.mean(), 1e-12)), 0.0, 1.0)
    found = goal.copy()
    for _ in range(_ROUNDS):
        used = normal_cdf(found[:, None] - cutoffs(found, shares)).mean(axis=1)
        found += np.clip(goal - normal_quantile(used), -1.0, 1.0)
        np.clip(found, -LIMIT, LIMIT, out=found)
    return normal_quantile(frequencies) + np.interp(frequencies, knots, found - goal)
