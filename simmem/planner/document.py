"""What does `simmem plan --json` say? The types of simmem.plan/1, a contract that changes only by adding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from simmem.policy.base import Setting
from simmem.spec.base import Kind
from simmem.spec.device import Device
from simmem.spec.measurement import CALIBRATED
from simmem.spec.workload import weights_label

__all__ = [
    "Alternative",
    "Baseline",
    "Bound",
    "CacheUse",
    "Emission",
    "Evidence",
    "Fit",
    "MeasuredHere",
    "MemoryUse",
    "Percentiles",
    "Plan",
    "PolicyChoice",
    "Predicted",
    "QualityCost",
    "Residency",
    "Sensitivity",
    "TraceRef",
    "WorkloadRef",
    "measured_here",
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null", defer_build=True)


class WorkloadRef(_Part):
    prompt_tokens: int
    new_tokens: int
    batch: int
    weights: str
    kv: str
    mixed: dict[str, str] = {}
    """Tensor groups that are kept at another precision than `weights`."""
    draft: str | None = None
    """The model that drafts, or could: with a `draft_length` of 0 it does not help."""
    acceptance: float | None = None
    draft_length: int = 0
    tokens_per_step: float = 1.0
    """Expected tokens of a sequence in a decode step."""

    @property
    def label(self) -> str:
        """The precision of the weights in words, as `Workload.label`."""
        return weights_label(self.weights, self.mixed)


class TraceRef(_Part):
    name: str
    kind: Literal["captured", "synthetic"]
    digest: str


class PolicyChoice(_Part):
    name: str
    knobs: dict[str, Setting]


class Residency(_Part):
    tensors: str
    tier: str
    bytes: float


class MemoryUse(_Part):
    used_bytes: float
    budget_bytes: float


class Percentiles(_Part):
    p50: float
    p95: float
    p99: float


class CacheUse(_Part):
    hit_ratio: float
    bytes_per_token: float


class Predicted(_Part):
    """Seconds, bytes and rates of one candidate; null where a figure has no source."""

    token_latency_s: float
    token_latency_interval_s: tuple[float, float]
    token_latency_percentiles_s: Percentiles
    first_token_s: float
    load_s: float
    tokens_per_s: float
    decode_tokens_per_s: float
    breakdown_s: dict[str, float]
    busy_s: dict[str, float]
    bytes_per_token: dict[str, float]
    requests_per_token: dict[str, float]
    """Reads or copies a token issues on each link; bytes over requests is the chunk."""
    requested_bytes_per_token: float
    bytes_written_per_token: float
    cache: dict[str, CacheUse]
    active_share: dict[str, float]
    energy_j_per_token: float | None


class QualityCost(_Part):
    perplexity_ratio: float | None
    source: str | None


class Bound(_Part):
    token_latency_s: float
    resource: str


class Baseline(_Part):
    policy: str
    token_latency_s: float
    speedup: float
    tokens_per_s: float | None = None
    """Of the whole answer, prompt included, as in `Predicted`."""
    set_aside: bool = False
    """It drops work where the dense model fits, or by an oracle: faster or not, it is no rival of the plan."""


class Sensitivity(_Part):
    figure: str
    change: float
    token_latency_change: float
    replanned: bool
    tokens_per_s_change: float | None = None
    """The same of the tokens a second, prompt included, where they are the objective."""


class Alternative(_Part):
    weights: str
    policy: str
    knobs: dict[str, Setting]
    predicted: Predicted
    memory: dict[str, MemoryUse]
    quality: QualityCost


class MeasuredHere(_Part):
    """Which of the device's figures `simmem calibrate` measured on it, and how well."""

    figures: int
    of: int
    spread: tuple[float, float]
    """Least and largest half width of their 90 % ranges over their values."""


class Evidence(_Part):
    engine: str
    weakest_kind: str
    cost_model: str
    search_gap: float | None
    extrapolating: bool
    placement_gap: float | None = None
    """By which share another placement of the same kind could at most be faster. `tier-percent`: the simulated time
    over a bound that no shares on the tiers beat; `hot-cold`: the expected load over that of the relaxed programme.
    Null where it places by no choice."""
    measured: MeasuredHere | None = None


class Fit(_Part):
    """Would the model simply stay in fast memory, at the precision that was asked for or else its own?"""

    weights: str
    tier: str
    needed_bytes: float
    budget_bytes: float
    missing_bytes: float
    stream_token_latency_s: float | None
    """A token if the whole model is read for each, nothing resident. [s]"""


class Emission(_Part):
    """What makes an engine do a plan, and what it cannot do of it."""

    engine: str
    realises: Literal["exact", "nearest", "no"]
    prepare: list[str]
    """Commands to run once before, such as converting the checkpoint."""
    arguments: list[str] | None
    """llama.cpp: the program and its arguments."""
    device_map: dict[str, int | str] | None
    """accelerate: module → device, every parameter once."""
    load: dict[str, Any] | None
    """accelerate: the other arguments of `from_pretrained`; `max_memory` says what the map was made for."""
    text: str | None
    """What a person copies; null where the engine cannot do the plan."""
    cannot: list[str]
    differs: list[str]
    instead: str | None
    """The nearest thing the engine has, where it cannot do the plan."""


class Plan(_Part):
    """A plan and what to expect of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, ser_json_inf_nan="null",
                              defer_build=True)

    schema_: Literal["simmem.plan/1"] = Field(default="simmem.plan/1", alias="schema")
    device: str
    model: str
    workload: WorkloadRef
    trace: TraceRef | None
    feasible: bool
    policy: PolicyChoice
    residency: list[Residency]
    memory: dict[str, MemoryUse]
    predicted: Predicted
    quality: QualityCost
    bound: Bound
    baselines: list[Baseline]
    sensitivity: list[Sensitivity]
    alternatives: list[Alternative]
    pareto: list[Alternative]
    evidence: Evidence
    fit: Fit
    objective: str
    engine: str | None
    """The software stack whose achieved shares were used, if one was named."""
    why: list[str]
    """The choice and its conditions, in sentences with numbers."""
    emit: Emission | None = None
    """How an engine is told to do it, where that was asked."""

    as_html: ClassVar[Callable[[Plan], str] | None] = None
    """How a notebook shows a plan: `simmem.plan` sets what the report layer makes, which this layer cannot import."""

    def to_json(self) -> str:
        """The document as `plan --json` prints it."""
        return self.model_dump_json(by_alias=True, indent=2)

    def _repr_html_(self) -> str | None:
        made_by = type(self).as_html
        return None if made_by is None else made_by(self)


def measured_here(device: Device) -> MeasuredHere | None:
    """What a device file says of its own calibration; None where nothing was measured by `simmem calibrate`."""
    figures = device.figures().values()
    ours = [f for f in figures if f.kind is Kind.MEASURED and f.source.startswith(CALIBRATED)]
    spreads = [(f.range[1] - f.range[0]) / 2 / f.value for f in ours
               if f.range and f.value > 0 and f.range[0] < f.range[1]]
    if not spreads:
        return None
    return MeasuredHere(figures=len(ours), of=len(figures), spread=(min(spreads), max(spreads)))
