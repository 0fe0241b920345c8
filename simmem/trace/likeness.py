"""Which few statistics of a captured trace make a synthetic one that caches cannot tell from it?

Per layer: how often its units are used (the distribution, not which unit), how many units a token uses (the
distribution), whether that number is high or low for each of a few kinds of token, and how much a unit remembers of the
tokens before. For all layers: which kind of token follows which. Not in the law, so drawn at random: which units are
frequent, and which go together beyond the kind of token.

`simmem.trace.resample` draws from the law; docs/synthetic-traces.md shows how close its replay comes to the captured
trace's, and what each part is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator

from simmem.errors import TraceError
from simmem.spec.base import Frozen
from simmem.trace.ranking import cutoffs, normal_cdf, normal_density, normal_quantile, offsets
from simmem.trace.statistics import unit_frequencies
from simmem.trace.trace import Quality, Trace, Unit

__all__ = ["DECAYS", "FREQUENCY_RANKS", "LEVEL_RANKS", "TraceLaw", "frequencies_of", "statistics_of"]

Floats = NDArray[np.float64]
Row = tuple[float, ...]
FREQUENCY_RANKS = np.array([0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999,
                            1])
"""Units of a layer that are used at all, in ascending order of use: the frequency is stated at these shares of them,
linear between."""
LEVEL_RANKS = np.array([0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
"""Tokens in ascending order of the units they use in a layer: the number is stated at these shares of them."""
DECAYS = np.array([0.25, 0.5, 0.8, 0.98])
"""What is left after a token of each memory that a unit may have: of the last token or two, the phrase, the topic."""
_KINDS = 8
_TOKENS_OF_A_KIND = 32
"""There are fewer kinds where a trace has not so many tokens of each on average."""
_STARTS, _ROUNDS = 8, 40
_LAGS = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])
_LEAST_TOKENS = 128
_MOST_TOKENS = 4096
_MOST_UNITS = 512
_MOST_MEMORY = 0.95
_BORDER = 1e4
_MIDDLES = (np.arange(2048) + 0.5) / 2048
_LAYERS = 4096
_UNITS = 1 << 20


class TraceLaw(Frozen):
    """The statistics of one trace, in so many numbers as `n_numbers` says, and what kind of trace it was."""

    schema_: Literal["simmem.law/1"] = Field(default="simmem.law/1", alias="schema")
    fitted_to: str
    """Name of the captured trace."""
    digest: str
    """Digest of the captured trace."""
    tokens_seen: PositiveInt
    model: str
    unit: Unit
    n_layers: int = Field(gt=0, le=_LAYERS)
    n_units: int = Field(gt=0, le=_UNITS)
    unit_bytes: float = Field(gt=0)
    unit_precision: str
    criterion: str
    threshold: str
    records: Literal["active", "predicted"]
    predictor: Literal["none", "low-rank", "gate", "oracle"]
    predictor_params_share: float = Field(ge=0, le=1)
    quality: Quality | None
    """What leaving units out cost the captured run."""
    frequency: tuple[tuple[Annotated[float, Field(ge=0, le=1)], ...], ...]
    """(n_layers, 18) share of tokens that use the unit at each of `FREQUENCY_RANKS`."""
    dead_units: tuple[Annotated[int, Field(ge=0)], ...]
    """(n_layers,) units that no token uses."""
    active_units: tuple[tuple[Annotated[float, Field(ge=0)], ...], ...]
    """(n_layers, 7) units that the token at each of `LEVEL_RANKS` uses."""
    level: tuple[tuple[Annotated[float, Field(ge=-8, le=8)], ...], ...]
    """(n_layers, k) normal score of the number of units that a layer uses for each kind of token, on average."""
    level_spread: tuple[Annotated[float, Field(ge=0, le=8)], ...]
    """(n_layers,) standard deviation of that score within a kind."""
    follows: tuple[tuple[Annotated[float, Field(ge=0, le=1)], ...], ...]
    """(k, k) probability that a kind of token (row) is followed by another (column)."""
    unit_memory: tuple[tuple[Annotated[float, Field(ge=0, le=1)], ...], ...]
    """(n_layers, 4) share of the variance of a unit's score that decays by each of `DECAYS` a token."""

    @model_validator(mode="after")
    def _rows_fit(self) -> TraceLaw:
        for name, width in (("frequency", FREQUENCY_RANKS.size), ("active_units", LEVEL_RANKS.size),
                            ("level", len(self.follows)), ("unit_memory", DECAYS.size)):
            rows: tuple[Row, ...] = getattr(self, name)
            if len(rows) != self.n_layers or any(len(row) != width for row in rows):
                raise ValueError(f"{name}: expected {self.n_layers} rows of {width} numbers")
        for name in ("frequency", "active_units"):
            if np.any(np.diff(np.array(getattr(self, name)), axis=1) < 0):
                raise ValueError(f"{name}: expected numbers that do not fall")
        if max(row[-1] for row in self.active_units) > self.n_units:
            raise ValueError(f"active_units: expected at most {self.n_units}")
        if max(map(sum, self.unit_memory)) > 1.0:
            raise ValueError("unit_memory: expected shares that add up to at most 1")
        if len(self.level_spread) != self.n_layers or len(self.dead_units) != self.n_layers:
            raise ValueError(f"level_spread, dead_units: expected {self.n_layers} numbers")
        if max(self.dead_units) > self.n_units:
            raise ValueError(f"dead_units: expected at most {self.n_units}")
        k = len(self.follows)
        if not 1 <= k <= _KINDS or any(len(row) != k or abs(sum(row) - 1.0) > 0.01 for row in self.follows):
            raise ValueError(f"follows: expected 1 to {_KINDS} rows of as many probabilities that add up to 1")
        return self

    @property
    def n_numbers(self) -> int:
        """How many numbers the statistics are."""
        rows = (*self.frequency, *self.active_units, *self.level, *self.follows, *self.unit_memory, self.level_spread,
                self.dead_units)
        return sum(len(row) for row in rows)


def statistics_of(trace: Trace) -> TraceLaw:
    """The law of a trace: 39 numbers a layer and 64 for all, whatever its length and width.

    Frequencies and numbers of units are counted on all tokens. A trace of T tokens scatters its units' frequencies by
    their sampling noise, and one drawn from them would scatter them again: they are drawn together by that much, on the
    arcsine scale, where the noise is the same for all. Memory is estimated on up to 512 units a layer, at equal
    distances by frequency, and the first 4096 tokens.

    Raises TraceError for a trace of fewer than 128 tokens, which says too little about memory.
    """
    h = trace.header
    if h.n_tokens < _LEAST_TOKENS:
        raise TraceError(f"has {h.n_tokens} tokens, too few for its statistics: at least {_LEAST_TOKENS} are needed",
                         key=h.name)
    seen = unit_frequencies(trace)
    counts = trace.active_counts.astype(np.float64)
    level, spread, follows = _kinds(counts[:_MOST_TOKENS])
    return TraceLaw(
        fitted_to=h.name, digest=h.digest, tokens_seen=h.n_tokens, model=h.model, unit=h.unit, n_layers=h.n_layers,
        n_units=h.n_units, unit_bytes=h.unit_bytes, unit_precision=h.unit_precision, criterion=h.criterion,
        threshold=h.threshold, records=h.records, predictor=h.predictor,
        predictor_params_share=h.predictor_params_share, quality=h.quality,
        frequency=_rows(np.array([np.quantile(_without_noise(row, h.n_tokens), FREQUENCY_RANKS, method="hazen")
                                  for row in seen]), 4),
        dead_units=tuple((seen == 0.0).sum(axis=1).tolist()),
        active_units=_rows(_numbers_of_units(counts, h.n_units), 2),
        level=_rows(level, 3), level_spread=tuple(np.round(spread, 3).tolist()), follows=_rows(follows, 4),
        unit_memory=_rows(np.array([_memory(trace, layer, seen[layer], counts[:, layer])
                                    for layer in range(h.n_layers)]), 4))


def frequencies_of(law: TraceLaw) -> Floats:
    """(n_layers, n_units) frequencies in ascending order, with as many uses as the numbers of units say."""
    found = np.zeros((law.n_layers, law.n_units))
    for row, dead, stated in zip(found, law.dead_units, law.frequency, strict=True):
        alive = law.n_units - dead
        row[dead:] = np.interp((np.arange(alive) + 0.5) / max(alive, 1), FREQUENCY_RANKS, stated)
    used = np.array([np.interp(_MIDDLES, LEVEL_RANKS, row).mean() for row in law.active_units]) / law.n_units
    scale: Floats = np.minimum(found * (used / np.maximum(found.mean(axis=1), 1e-12))[:, None], 1.0)
    return scale


def _rows(values: Floats, digits: int) -> tuple[Row, ...]:
    return tuple(tuple(row) for row in np.round(values, digits).tolist())


def _without_noise(frequencies: Floats, n_tokens: int) -> Floats:
    """The frequencies above 0 of one layer, drawn together by their sampling noise; one 0 where there are none."""
    used = frequencies[frequencies > 0.0]
    if not used.size:
        return np.zeros(1)
    angle = np.arcsin(np.sqrt(used))
    kept = np.sqrt(max(1.0 - 0.25 / (n_tokens * max(float(angle.var()), 1e-12)), 0.0))
    drawn: Floats = np.sin(angle.mean() + (angle - angle.mean()) * kept) ** 2
    return drawn


def _numbers_of_units(counts: Floats, n_units: int) -> Floats:
    """(L, 7) numbers of units at `LEVEL_RANKS`; straight lines between them have the mean of the numbers, (T, L)."""
    stated = np.quantile(counts, LEVEL_RANKS, axis=0).T
    mean = np.array([np.interp(_MIDDLES, LEVEL_RANKS, row).mean() for row in stated])
    scaled: Floats = stated * (counts.mean(axis=0) / np.maximum(mean, 1e-12))[:, None]
    return np.minimum(scaled, n_units)


def _kinds(counts: Floats) -> tuple[Floats, Floats, Floats]:
    """(L, k) levels, (L,) spread and (k, k) transitions of the kinds of token behind numbers of units, (T, L): k-means.

    Of the numbers only the order counts: each layer's are taken as normal scores, so their distribution is free.
    """
    n_tokens = len(counts)
    scores = np.zeros_like(counts)
    for layer, column in enumerate(counts.T):
        values, at, repeats = np.unique(column, return_inverse=True, return_counts=True)
        if values.size > 1:
            scores[:, layer] = normal_quantile((np.cumsum(repeats) - repeats / 2.0) / n_tokens)[at]
    k = max(1, min(_KINDS, n_tokens // _TOKENS_OF_A_KIND))
    rng = np.random.Generator(np.random.PCG64(0))
    kind, centre = min((_cluster(scores, scores[rng.choice(n_tokens, k, replace=False)]) for _ in range(_STARTS)),
                       key=lambda found: float(((scores - found[1][found[0]]) ** 2).sum()))
    follows = np.zeros((k, k))
    np.add.at(follows, (kind[:-1], kind[1:]), 1.0)
    share = np.bincount(kind, minlength=k) / n_tokens
    follows += share  # one token's worth of what comes when nothing is known
    return centre.T, (scores - centre[kind]).std(axis=0), follows / follows.sum(axis=1, keepdims=True)


def _cluster(points: Floats, centre: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Lloyd's algorithm: (T,) the nearest centre of each point, and the (k, L) centres."""
    for _ in range(_ROUNDS):
        nearest = ((centre * centre).sum(axis=1) - 2.0 * points @ centre.T).argmin(axis=1)
        size = np.bincount(nearest, minlength=len(centre))
        sums = np.zeros_like(centre)
        np.add.at(sums, nearest, points)
        centre = np.where(size[:, None] > 0, sums / np.maximum(size, 1)[:, None], centre)
    return nearest, centre


def _memory(trace: Trace, layer: int, frequencies: Floats, counts: Floats) -> Floats:
    """(4,) share of each of `DECAYS` in a layer's scores.

    What the number of units of a token does not explain of a use, d = use - P(use | number), has the covariance
    Σ φ φ' (r + h h' r²/2 + (h² - 1)(h'² - 1) r³/6 + …) where scores have the correlation r; h is what the unit's offset
    is above the cutoff, φ the normal density there, and a prime the later token (the tetrachoric series). r is solved
    for, all units together. The correlations at a dozen lags are then split into the decays by least squares, none
    negative; short lags count for more, since most uses are of units that were used a few tokens before. Means are of
    the trace itself, which lowers all correlations: by 1/T where there is no memory.
    """
    h = trace.header
    tokens = min(h.n_tokens, _MOST_TOKENS)
    order = np.argsort(frequencies, kind="stable")
    offset = np.empty(h.n_units)
    offset[order] = offsets(frequencies[order], counts / h.n_units if h.n_tokens <= _MOST_UNITS else np.quantile(
        counts, (np.arange(_MOST_UNITS) + 0.5) / _MOST_UNITS) / h.n_units)
    cut = cutoffs(offset, counts[:tokens] / h.n_units)
    units = order[np.linspace(0, h.n_units - 1, min(h.n_units, _MOST_UNITS)).round().astype(int)]
    uses = np.unpackbits(trace.active[:tokens, layer], axis=1, count=h.n_units, bitorder="little")[:, units]
    short = offset[units] - cut[:, None]
    rest, density = uses - normal_cdf(short), normal_density(short)
    rest -= rest.mean(axis=0)
    series = density, density * short / np.sqrt(2.0), density * (short * short - 1.0) / np.sqrt(6.0)
    lags = _LAGS[: np.searchsorted(_LAGS, tokens // 4, side="right")]
    correlation = np.array([_correlation(float((rest[lag:] * rest[:-lag]).sum()),
                                         [float((term[lag:] * term[:-lag]).sum()) for term in series])
                            for lag in lags.tolist()])
    apart = np.arange(1, tokens)
    of_mean = np.array([1.0 + 2.0 * ((1.0 - apart / tokens) * decay**apart).sum() for decay in DECAYS]) / tokens
    model = DECAYS ** lags[:, None] - of_mean + 1.0 / tokens
    weight = 1.0 / np.sqrt(lags)
    return _least_squares(model * weight[:, None], (correlation + 1.0 / tokens) * weight)


def _correlation(covariance: float, terms: Sequence[float]) -> float:
    """The r with Σ terms[i] r^(i+1) = covariance, within ±0.95; the series is taken as far as it rises."""
    r = np.linspace(-_MOST_MEMORY, _MOST_MEMORY, 381)
    series = np.array([term * r ** (i + 1) for i, term in enumerate(terms)]).sum(axis=0)
    middle = r.size // 2
    rising = np.concatenate((np.minimum.accumulate(series[middle::-1])[::-1],
                             np.maximum.accumulate(series[middle + 1:])))
    return float(np.interp(covariance, rising, r)) if terms[0] > 0.0 else 0.0


def _least_squares(model: Floats, goal: Floats) -> Floats:
    """The x ≥ 0 with a sum of at most 0.95 and the least |model x - goal|: the best of all sets of columns, a few."""
    n = model.shape[1]
    best, least = np.zeros(n), float((goal * goal).sum())
    for size in range(1, n + 1):
        for columns in map(list, combinations(range(n), size)):
            part = model[:, columns]
            x = np.linalg.lstsq(part, goal, rcond=None)[0]
            if x.sum() > _MOST_MEMORY:  # then the best is on that border
                onto = np.vstack((part, np.full((1, size), _BORDER)))
                x = np.linalg.lstsq(onto, np.append(goal, _BORDER * _MOST_MEMORY), rcond=None)[0]
            error = float(((part @ x - goal) ** 2).sum())
            if x.min() >= 0.0 and error < least:
                best, least = np.zeros(n), error
                best[columns] = x * min(1.0, _MOST_MEMORY / float(x.sum()))
    return best
