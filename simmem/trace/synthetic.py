"""What would a trace of a model that cannot run here look like, as far as its published statistics say?

The window law: unit i is used by each token independently with probability p_i, and over the units of a
layer p follows a Beta(m·s, (1-m)·s) distribution: m is the mean active share, s how alike the units are
(s → 0: some always, some never; s → ∞: all equally often). Tokens have no memory; on captured traces
frequency carries most of the structure (`simmem.trace.statistics` shows how much). Two published window
statistics fix m and s; every spec says which figures it was fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from simmem.errors import SpecError
from simmem.spec.base import Figure, Frozen, Kind, Ratio, load_toml, validate, weakest
from simmem.spec.model import Model
from simmem.trace.trace import Quality, Trace, TraceHeader, digest_of

__all__ = [
    "Statistic",
    "SyntheticSpec",
    "beta_quantiles",
    "expected_new",
    "expected_union",
    "fit_concentration",
    "fit_law",
    "generate",
    "generate_varied",
    "law_statistic",
    "load_synthetic",
]

Floats = NDArray[np.float64]
_GRID = 4096
_LEVELS = 1 << 16
_PART_UNITS = 1 << 18
"""Units whose random bits are drawn at once."""
_TRANSFER = 1.5
"""Statistics carried over to another model of the family are estimates: the 90 % range of that kind."""


class Statistic(Frozen):
    """One published figure of a trace that cannot be had, and where it stands."""

    quantity: Literal["active_share", "union_share", "new_share"]
    """Share of all FFN units: used by a token, by the last `window` tokens, by a token and not the last `window`."""
    window: int = Field(default=0, ge=0)
    value: float = Field(gt=0, le=1)
    tolerance: float = Field(gt=0, le=0.5)
    """How far the law is from it at most, as a fraction of it; a test holds every spec to this."""
    source: str = Field(min_length=4)


class SyntheticSpec(Frozen):
    """A synthetic trace for one model or family, from published statistics."""

    schema_: Literal["simmem.synthetic/1"] = Field(alias="schema")
    name: str
    aliases: tuple[str, ...] = ()
    serves: tuple[str, ...]
    """Models that get this trace when none is asked for."""
    published_for: str
    """The model whose statistics these are; for any other the same law is an estimate."""
    criterion: str
    threshold: str
    records: Literal["active", "predicted"]
    predictor: Literal["none", "low-rank", "gate", "oracle"]
    predictor_params_share: Ratio
    """Parameters of the predictor as a share of the model's."""
    active_share: Ratio
    """Mean share of the units that a token touches (as `records` says)."""
    active_share_of: dict[str, Ratio] = Field(default_factory=dict)
    """The same for other models of the family, where something about them is known."""
    concentration: Figure
    """The s of the window law."""
    attention_active_share: Ratio | None = None
    """Share of the attention heads that a token uses; all of them where nothing was published."""
    layer_profile: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    """Activity by depth: knots (0 = first layer … 1 = last, relative to the mean), linear between."""
    layer_profile_source: str = Field(default="not published: the same in every layer", min_length=4)
    statistics: tuple[Statistic, ...] = ()
    seed: int = Field(ge=0)
    n_tokens: int = Field(default=96, gt=0, le=100_000)
    quality: Quality | None = None

    @field_validator("layer_profile")
    @classmethod
    def _knots(cls, knots: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        depths = [depth for depth, _ in knots]
        if not knots or depths != sorted(set(depths)) or min(depths) < 0 or max(depths) > 1:
            raise ValueError("expected knots [depth, ratio] with depths rising from 0 to 1")
        if min(ratio for _, ratio in knots) <= 0:
            raise ValueError("a layer's activity relative to the mean is above 0")
        return knots

    @model_validator(mode="after")
    def _shares_stay_below_one(self) -> SyntheticSpec:
        if self.concentration.value <= 0:
            raise ValueError("a concentration is above 0")
        for model in (self.published_for, *self.active_share_of):
            if self.share_by_layer(model, 64).max() >= 1:
                raise ValueError(f"layer_profile makes a layer of {model} more than wholly active")
        return self

    def share_for(self, model_name: str) -> tuple[float, tuple[float, float] | None, Kind]:
        """Mean active share for a model, its 90 % range where it is an estimate, and how well it is known."""
        figure = self.active_share_of.get(model_name, self.active_share)
        known = model_name == self.published_for or model_name in self.active_share_of
        kind = weakest([figure.kind, self.concentration.kind]) if model_name == self.published_for else Kind.ESTIMATED
        if known and figure.kind is not Kind.ESTIMATED:
            return figure.value, None, kind
        low, high = figure.factors if known else (1 / _TRANSFER, _TRANSFER)
        return figure.value, (figure.value * low, min(figure.value * high, 1.0)), kind

    def share_by_layer(self, model_name: str, n_layers: int) -> Floats:
        """(n_layers,) active share of each layer; their mean is the model's."""
        depths, ratios = np.array(self.layer_profile).T
        profile = np.interp(np.linspace(0.0, 1.0, n_layers), depths, ratios)
        return np.asarray(self.share_for(model_name)[0] * profile / profile.mean(), np.float64)


def expected_union(m: float, s: float, k: float) -> float:
    """Share of the units that k independent tokens use: 1 - E(1-p)^k, p ~ Beta(m·s, (1-m)·s); k may be fractional."""
    b = (1.0 - m) * s
    return 1.0 - math.exp(math.lgamma(b + k) - math.lgamma(b) - math.lgamma(s + k) + math.lgamma(s))


def expected_new(m: float, s: float, k: float) -> float:
    """Share of the units that a token uses and none of the k before did: E[p (1-p)^k] = union(k+1) - union(k)."""
    return (1.0 - expected_union(m, s, k)) * m * s / (s + k)


def fit_concentration(m: float, k: float, union: float) -> float:
    """The s at which k tokens use the share `union` of the units, given the mean share m.

    Raises SpecError when no s does: a union is at least m and at most 1 - (1-m)^k.
    """
    if not m < union < 1.0 - (1.0 - m) ** k:
        raise SpecError(f"no law has a mean share of {m:g} and uses {union:g} of the units in {k:g} tokens; possible "
                        f"is more than {m:g} and less than {1.0 - (1.0 - m) ** k:g}", key="concentration")
    return _bisect(lambda s: expected_union(m, s, k) - union, 1e-6, 1e7)


def fit_law(k: float, union: float, new: float) -> tuple[float, float]:
    """The (m, s) at which k tokens use the share `union` and the next one adds the share `new`.

    `expected_new` gives m = r (s + k) / s with r = new / (1 - union), which leaves one unknown. Raises SpecError when
    no law has both.
    """
    r = new / (1.0 - union)
    least = r * k / (1.0 - r) * (1.0 + 1e-9)  # m = 1 there
    if not 0 < r < 1 or not 1.0 - (1.0 - r) ** k < union < 1:
        raise SpecError(f"no law uses {union:g} of the units in {k:g} tokens and {new:g} more in the next",
                        key="concentration")
    s = _bisect(lambda s: union - expected_union(r * (s + k) / s, s, k), least, 1e7)
    return r * (s + k) / s, s


def _bisect(rising: Callable[[float], float], low: float, high: float) -> float:
    """Root of a rising function between two positive numbers, to the last bit or so."""
    for _ in range(200):
        middle = math.sqrt(low * high)
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def law_statistic(spec: SyntheticSpec, statistic: Statistic, model_name: str, n_layers: int) -> float:
    """What the law of `spec` gives for a published statistic, averaged over the layers of a model."""
    s = spec.concentration.value
    shares = spec.share_by_layer(model_name, n_layers)
    if statistic.quantity == "active_share":
        return float(shares.mean())
    law = expected_union if statistic.quantity == "union_share" else expected_new
    return float(np.mean([law(m, s, statistic.window) for m in shares]))


def beta_quantiles(a: float, b: float, n: int) -> Floats:
    """Values of Beta(a, b) at the n probabilities (i + ½)/n, ascending.

    The distribution function is summed over a grid on which it is smooth even where the density is not: in t^a up
    to ½ (in t when a ≥ 1), in (1-t)^b above. Absolute error below 1e-4 for a, b ≥ 0.01 and a + b ≤ 1000, and of 1e-6
    for the laws shipped; 16-bit draws resolve 1.5e-5.
    (scipy's `beta.ppf` gives the same; importing it would cost more than all the rest.)
    """
    low, below = _distribution_to_half(a, b)
    from_top, above = _distribution_to_half(b, a)
    total = below[-1] + above[-1]
    probabilities = np.concatenate((below, (total - above)[-2::-1])) / total
    values = np.concatenate((low, 1.0 - from_top[-2::-1]))
    return np.interp((np.arange(n) + 0.5) / n, probabilities, values)


def _distribution_to_half(a: float, b: float) -> tuple[Floats, Floats]:
    """Points t in [0, ½] and the integral of t^(a-1) (1-t)^(b-1) up to each."""
    power = min(a, 1.0)
    y = np.linspace(0.0, 0.5**power, _GRID)
    t = y ** (1.0 / power)
    density = t ** (a - power) * (1.0 - t) ** (b - 1.0) / power  # of y: dt = t^(1-power) / power dy
    steps = np.diff(y) * (density[1:] + density[:-1]) / 2.0
    return t, np.concatenate((np.zeros(1), np.cumsum(steps)))


_MOST_ACTIVE = 0.999
"""A layer's mean active share stays below 1, where the law has no spread left."""


def generate(spec: SyntheticSpec, model: Model, n_tokens: int | None = None, *, batch: int = 1,
             activity: float = 1.0, concentration: float = 1.0) -> Trace:
    """A synthetic trace with the shape of `model`'s FFN.

    The same spec, model and batch give the same trace, and the first n tokens do not depend on how many are
    drawn. Each token draws 16 random bits a unit and compares them with the unit's probability, so memory does
    not grow with the trace but for its packed bits.

    Parameters
    ----------
    n_tokens : decode steps; the spec's own number when None.
    batch : sequences decoded together; a step touches the union of what they use. Under the law that is one draw
        with 1 - (1-p)^batch, so it costs no more than a batch of 1.
    activity, concentration : factors on the mean active share and on s, to ask what others in their range do.
    """
    return generate_varied(spec, model, [(activity, concentration)], n_tokens, batch=batch)[0]


def generate_varied(spec: SyntheticSpec, model: Model, factors: Sequence[tuple[float, float]],
                    n_tokens: int | None = None, *, batch: int = 1) -> list[Trace]:
    """`generate` for several (activity, concentration): their random bits are the same, and are drawn once."""
    n_tokens = spec.n_tokens if n_tokens is None else n_tokens
    if n_tokens < 1 or batch < 1:
        raise SpecError(f"found {n_tokens} tokens and a batch of {batch}, expected at least 1", key=spec.name)
    a = model.architecture
    _, tokens_seed = np.random.SeedSequence(spec.seed).spawn(2)
    laws = [_thresholds(spec, model, batch, activity, concentration) for activity, concentration in factors]
    draw = np.random.PCG64(tokens_seed)
    found = np.empty((len(laws), n_tokens, a.n_layers, -(-a.d_ff // 8)), np.uint8)
    parts = _parts(a.n_layers, a.d_ff)
    for token in range(n_tokens):
        for part, size in parts:
            words = draw.random_raw(-(-size // 4)).astype("<u8", copy=False).view("<u2")[:size].reshape(-1, a.d_ff)
            for active, thresholds in zip(found, laws, strict=True):
                active[token, part] = np.packbits(words < thresholds[part], axis=1, bitorder="little")
    return [Trace(_header(spec, model, active, batch), active) for active in found]


def _parts(n_layers: int, n_units: int) -> list[tuple[slice, int]]:
    """Layers that are drawn at once, and their units: few, so that their random bits stay in the processor's cache.

    In fours, as one random number is for four units: then parts draw the same as all layers at once.
    """
    step = max(_PART_UNITS // n_units // 4 * 4, 4)
    return [(slice(first, first + step), (min(first + step, n_layers) - first) * n_units)
            for first in range(0, n_layers, step)]


def _header(spec: SyntheticSpec, model: Model, active: NDArray[np.uint8], batch: int) -> TraceHeader:
    a, (share, share_range, kind) = model.architecture, spec.share_for(model.name)
    return TraceHeader(
        name=spec.name, kind="synthetic", model=model.name, n_tokens=len(active), n_layers=a.n_layers, n_units=a.d_ff,
        unit_bytes=model.unit_bytes("fp16"), unit_precision="fp16", criterion=spec.criterion,
        threshold=spec.threshold, records=spec.records, predictor=spec.predictor,
        predictor_params_share=spec.predictor_params_share.value, quality=spec.quality,
        text="none: drawn from the law fitted to published statistics",
        statistics=_provenance(spec, share, share_range, batch), weakest_kind=kind.value,
        active_share_range=share_range,
        digest=digest_of(active))


def _thresholds(spec: SyntheticSpec, model: Model, batch: int, activity: float, concentration: float
                ) -> NDArray[np.uint16]:
    """(n_layers, n_units) of 65536ths: a unit is used when 16 random bits are below. Frequent units lie anywhere."""
    a, s = model.architecture, spec.concentration.value * concentration
    order, found = _order(spec.seed, a.n_layers, a.d_ff), np.empty((a.n_layers, a.d_ff), np.uint16)
    known: dict[float, NDArray[np.uint16]] = {}  # layers that are equally active are alike but for their order
    shares = np.minimum(spec.share_by_layer(model.name, a.n_layers) * activity, _MOST_ACTIVE)
    for row, places, m in zip(found, order, shares.tolist(), strict=True):
        if m not in known:
            p = beta_quantiles(m * s, (1.0 - m) * s, a.d_ff)
            if batch > 1:
                p = -np.expm1(batch * np.log1p(-np.minimum(p, 1.0 - 1e-12)))
            known[m] = np.minimum(np.rint(p * _LEVELS), _LEVELS - 1).astype(np.uint16)
        known[m].take(places, out=row)
    return found


@lru_cache(maxsize=1)
def _order(seed: int, n_layers: int, n_units: int) -> NDArray[np.unsignedinteger]:
    """(n_layers, n_units) which of the units, by their frequency, stands at each place: the same under every law."""
    seeds = np.random.SeedSequence(seed).spawn(2)
    kind = np.uint16 if n_units <= 1 << 16 else np.uint32
    rising = np.broadcast_to(np.arange(n_units, dtype=kind), (n_layers, n_units))
    return np.random.Generator(np.random.PCG64(seeds[0])).permuted(rising, axis=1)


def _provenance(spec: SyntheticSpec, share: float, share_range: tuple[float, float] | None, batch: int
                ) -> dict[str, Any]:
    low, high = spec.active_share.factors if share_range is None else (end / share for end in share_range)
    heads = spec.attention_active_share
    return {
        "law": "unit i used by each token independently with p_i ~ Beta(m s, (1-m) s)",
        "published_for": spec.published_for,
        "active_share": {"value": share, "kind": spec.active_share.kind.value, "source": spec.active_share.source,
                         "factors": [low, high]},
        "concentration": {"value": spec.concentration.value, "kind": spec.concentration.kind.value,
                          "source": spec.concentration.source, "factors": list(spec.concentration.factors)},
        "predictor_params_share": {"value": spec.predictor_params_share.value,
                                   "kind": spec.predictor_params_share.kind.value,
                                   "source": spec.predictor_params_share.source},
        **({} if heads is None else {"attention_active_share": {
            "value": heads.value, "kind": heads.kind.value, "source": heads.source, "factors": list(heads.factors)}}),
        "layer_profile": [list(knot) for knot in spec.layer_profile],
        "layer_profile_source": spec.layer_profile_source,
        "fitted_to": [statistic.model_dump() for statistic in spec.statistics],
        "batch": batch,
    }


def load_synthetic(path: Path) -> SyntheticSpec:
    """The synthetic trace spec in a TOML file; every failure is one clear SpecError naming file and key."""
    return validate(SyntheticSpec, load_toml(path), file=str(path))
