"""How far may samples of one thing be trusted: how noisy are they, do they drift, have they two modes?

Pure functions of samples and of when each was taken, so that whoever reads a file of measurements judges it alike.

- **Noise floor**: half the p10–p90 range of the medians of repeated runs, over their median. A run is a visit to the
  probe, so what changes between visits counts and what scatters within one does not.
- **Drift**: the slope of Theil (1950) and Sen (1968) through the medians of the runs, and Kendall's test of whether
  they rise or fall, its distribution exact where no two are equal.
- **Two modes**: the share of the variance that the best split into two classes takes away (the separability η of Otsu
  1979). It is 0.64 for normal samples, 0.65 for exponential ones and 0.75 for uniform ones, whatever their scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simmem.spec.measurement import Measurement

__all__ = ["TOO_NOISY", "Judgement", "drift", "judge", "noise_floor", "run_medians", "two_modes"]

Array = NDArray[np.float64]

TOO_NOISY = 0.25
"""A figure with a larger noise floor is known no better than one derived from others, and is not called measured."""

_MIN_RUNS = 3
_MIN_SAMPLES = 3
_MIN_DRIFT_RUNS = 5
"""Three or four values in a row rise or fall by chance too often (1 in 3, 1 in 12) for any test."""
_SEPARABILITY, _FEW = 0.8, 2.5
"""0.8 + 2.5 / n is passed by one in a thousand or fewer of uniform, normal, exponential and log-normal series."""
_MIN_MODE_SHARE = 0.2
"""A mode of fewer samples is called outliers; quantiles see to those."""
_MIN_MODE_DISTANCE = 0.1
_MIN_MODE_SAMPLES = 15


@dataclass(frozen=True)
class Judgement:
    """What the samples of one measurement say, and how far they may be trusted. Times are of one sample. [s]"""

    n: int
    runs: int
    """Visits that the samples come from."""
    median_s: float
    p10_s: float
    p90_s: float
    low_s: float
    high_s: float
    """The 90 % range: p5 to p95 of the samples, and no narrower than the noise floor either side of the median."""
    noise_floor: float
    drift: float
    """Change over the whole time, as a share of the median; positive is slower."""
    drift_p: float
    """How often a series without drift would rise or fall as steadily; 1 with too few runs to tell."""
    modes_s: tuple[float, float] | None
    """Medians of two modes, where there are two."""
    refused: str | None
    """Why no figure may rest on it; None where one may."""

    @property
    def drifts(self) -> bool:
        """A change beyond the noise floor that chance hardly explains."""
        return self.drift_p < 0.05 and abs(self.drift) > 2 * self.noise_floor / 3


def judge(measurement: Measurement) -> Judgement:
    """Judge one measurement by its samples and their times. What its probe refused stays refused."""
    samples = np.asarray(measurement.samples_s, dtype=np.float64)
    at = measurement.at_s if len(measurement.at_s) == len(samples) else range(len(samples))
    medians, times = run_medians(samples, at, measurement.runs)
    floor = noise_floor(samples, measurement.runs)
    change, p = drift(medians, times)
    modes = two_modes(samples)
    p5, p10, median, p90, p95 = (float(q) for q in np.quantile(samples, (0.05, 0.1, 0.5, 0.9, 0.95)))
    why = measurement.refused
    if why is None and len(samples) < _MIN_SAMPLES:
        why = f"{len(samples)} samples are too few"
    if why is None and modes is not None:
        why = f"two modes, a factor of {modes[1] / modes[0]:.2f} apart"
    if why is None and floor > TOO_NOISY:
        why = f"too noisy: noise floor {100 * floor:.0f} %"
    return Judgement(n=len(samples), runs=len(medians), median_s=median, p10_s=p10, p90_s=p90,
                     low_s=min(p5, median * (1 - min(floor, 0.99))), high_s=max(p95, median * (1 + floor)),
                     noise_floor=floor, drift=change, drift_p=p, modes_s=modes, refused=why)


def run_medians(samples_s: ArrayLike, at_s: ArrayLike, runs: Sequence[int] = ()) -> tuple[Array, Array]:
    """Median of each run of samples, and its middle time. [s]

    runs : how many samples each took, in order; without, or where they do not add up, each sample is one.
    """
    samples, at = np.asarray(samples_s, dtype=np.float64), np.asarray(at_s, dtype=np.float64)
    if not runs or sum(runs) != len(samples) or min(runs) < 1:
        return samples, at
    ends = np.cumsum(runs)[:-1]
    return (np.array([np.median(part) for part in np.split(samples, ends)]),
            np.array([part.mean() for part in np.split(at, ends)]))


def noise_floor(samples_s: ArrayLike, runs: Sequence[int] = ()) -> float:
    """Half the p10–p90 range of the runs' medians over their median; of the samples where runs are fewer than three."""
    samples = np.asarray(samples_s, dtype=np.float64)
    medians, _ = run_medians(samples, np.arange(len(samples)), runs)
    p10, p50, p90 = np.quantile(medians if len(medians) >= _MIN_RUNS else samples, (0.1, 0.5, 0.9))
    return float((p90 - p10) / 2 / p50)


def drift(values: ArrayLike, at_s: ArrayLike) -> tuple[float, float]:
    """Change over the whole time as a share of the median, and the two-sided p-value of Kendall's test.

    (0, 1) for fewer than five values.
    """
    y, t = np.asarray(values, dtype=np.float64), np.asarray(at_s, dtype=np.float64)
    n = len(y)
    if n < _MIN_DRIFT_RUNS:
        return 0.0, 1.0
    i, j = np.triu_indices(n, 1)
    dy, dt = y[j] - y[i], t[j] - t[i]
    rising = int(np.sign(dy * np.sign(dt)).sum())
    slope = float(np.median((dy / dt)[dt != 0])) if np.any(dt != 0) else 0.0
    change = slope * float(np.ptp(t)) / float(np.median(y))
    ties = np.unique(y, return_counts=True)[1]
    if ties.max() == 1 and n <= 40:
        return change, _kendall_exact(n, rising)
    variance = (n * (n - 1) * (2 * n + 5) - float((ties * (ties - 1) * (2 * ties + 5)).sum())) / 18
    if variance <= 0:
        return change, 1.0
    z = max(abs(rising) - 1, 0) / math.sqrt(variance)
    return change, math.erfc(z / math.sqrt(2))


def _kendall_exact(n: int, rising: int) -> float:
    """Two-sided: the share of the orders of n values with as many more, or fewer, rising pairs than falling ones."""
    counts = np.ones(1)
    for k in range(2, n + 1):  # orders of k values by their falling pairs
        counts = np.convolve(counts, np.ones(k)) / k
    pairs = n * (n - 1) // 2
    return min(1.0, 2.0 * float(counts[:(pairs - abs(rising)) // 2 + 1].sum()))


def two_modes(samples_s: ArrayLike) -> tuple[float, float] | None:
    """Medians of the two modes, where there are two that matter: each a fifth of the samples, a tenth apart.

    None for fewer than fifteen samples.
    """
    x = np.sort(np.asarray(samples_s, dtype=np.float64))
    n = len(x)
    if n < _MIN_MODE_SAMPLES or x[0] == x[-1]:
        return None
    left = np.arange(1, n)
    sums = np.cumsum(x)
    mean_left, mean_right = sums[:-1] / left, (sums[-1] - sums[:-1]) / (n - left)
    between = left * (n - left) / n**2 * (mean_right - mean_left) ** 2
    cut = int(np.argmax(between)) + 1
    low, high = float(np.median(x[:cut])), float(np.median(x[cut:]))
    if min(cut, n - cut) < _MIN_MODE_SHARE * n or (high - low) < _MIN_MODE_DISTANCE * low:
        return None
    return (low, high) if between[cut - 1] > (_SEPARABILITY + _FEW / n) * float(x.var()) else None
