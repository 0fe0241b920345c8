"""What do the lists, the sheets that `simmem devices NAME` prints, `replay` and errors say in JSON?

The types behind `simmem schema`; like every document they change only by adding. Lists and errors are printed without
importing this module (they have to be quick); the tests hold them to it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from simmem.policy.base import Setting
from simmem.spec.base import Kind
from simmem.spec.model import Architecture
from simmem.trace.trace import TraceHeader

__all__ = [
    "DeviceEntry",
    "DeviceList",
    "DeviceSheet",
    "ErrorDocument",
    "FigureRow",
    "GroupRow",
    "KnobRow",
    "LawRow",
    "ModelEntry",
    "ModelList",
    "ModelSheet",
    "PolicyEntry",
    "PolicyList",
    "PolicySheet",
    "ReplayDocument",
    "TraceEntry",
    "TraceList",
    "TraceSheet",
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, ser_json_inf_nan="null")


# --- lists --------------------------------------------------------------------------------------------------------


class DeviceEntry(_Part):
    name: str
    title: str
    aliases: list[str]
    memory: dict[str, float]
    """tier → capacity [B]"""
    agents: list[str]
    figures: int
    estimated_figures: int


class DeviceList(_Part):
    """`simmem devices --json`."""

    schema_: Literal["simmem.devices/1"] = Field(default="simmem.devices/1", alias="schema")
    devices: list[DeviceEntry]


class ModelEntry(_Part):
    name: str
    title: str
    aliases: list[str]
    family: str
    native_precision: str
    """`file` where the published weights hold several precisions."""
    parameters: int | None
    active_parameters: int | None
    """What one token uses; fewer than all with experts."""
    n_layers: int
    d_model: int
    d_ff: int
    max_positions: int
    experts: int
    """Routed experts of a layer; 0 without."""
    d_expert: int


class ModelList(_Part):
    """`simmem models --json`."""

    schema_: Literal["simmem.models/1"] = Field(default="simmem.models/1", alias="schema")
    models: list[ModelEntry]


class TraceEntry(_Part):
    name: str
    kind: Literal["captured", "synthetic"]
    aliases: list[str]
    models: list[str]
    criterion: str
    active_share: float | None


class TraceList(_Part):
    """`simmem traces --json`."""

    schema_: Literal["simmem.traces/1"] = Field(default="simmem.traces/1", alias="schema")
    traces: list[TraceEntry]


class PolicyEntry(_Part):
    name: str
    summary: str
    uses_trace: bool


class PolicyList(_Part):
    """`simmem policies --json`."""

    schema_: Literal["simmem.policies/1"] = Field(default="simmem.policies/1", alias="schema")
    policies: list[PolicyEntry]


# --- sheets -------------------------------------------------------------------------------------------------------


class FigureRow(_Part):
    """One figure of a device in SI base units."""

    key: str
    value: float
    dimension: str
    kind: Kind
    range_90: tuple[float, float]
    source: str
    spent: list[str]
    """Reference rows it was fitted to, which judge nothing."""


class DeviceSheet(_Part):
    """`simmem devices NAME --json`: every figure of a device."""

    schema_: Literal["simmem.device-sheet/1"] = Field(default="simmem.device-sheet/1", alias="schema")
    name: str
    title: str
    aliases: list[str]
    notes: list[str]
    parts: dict[str, dict[str, str | float]]
    """What is not a figure, by part: "link.flash" → its kind, source and target."""
    figures: list[FigureRow]
    compare_with: str | None
    """Another account of the same machine, where the file names one."""
    other_figures: list[FigureRow]
    """Figures of that other account that differ from this one's in value or kind."""


class GroupRow(_Part):
    name: str
    params: int
    matrix_params: int
    vector_params: int
    bytes: dict[str, float]
    """precision → bytes [B]"""


class ModelSheet(_Part):
    """`simmem models NAME --json`: architecture, parameters and bytes per tensor group."""

    schema_: Literal["simmem.model-sheet/1"] = Field(default="simmem.model-sheet/1", alias="schema")
    name: str
    title: str
    family: str
    source: str
    aliases: list[str]
    native_precision: str
    architecture: Architecture
    params: int
    active_params: int
    """Parameters one token uses: all but the experts its router leaves out."""
    groups: list[GroupRow]
    bytes: dict[str, float]
    unit_params: int
    """Parameters of one FFN neuron."""
    expert_params: int
    """Matrix parameters of one routed expert; 0 without experts."""
    kv_bytes_per_token: dict[str, float]
    """All layers; those with a sliding window stop growing at its length. [B]"""
    state_bytes: dict[str, float]
    """State of a sequence that does not grow with the context; 0 where there is attention instead. [B]"""
    default_trace: str | None


class LawRow(_Part):
    """A published statistic, and what the law of a synthetic trace gives for it."""

    quantity: str
    window: int
    published: float
    law: float
    tolerance: float
    source: str


class TraceSheet(_Part):
    """`simmem traces NAME --json`: provenance and statistics of a trace."""

    schema_: Literal["simmem.trace-sheet/1"] = Field(default="simmem.trace-sheet/1", alias="schema")
    header: TraceHeader
    active_share: float
    statistics: dict[str, Any]
    """Measured on the bits of the trace; for a synthetic one, on a draw with the shape of `header.model`."""
    fitted_to: list[LawRow]
    serves: list[str]
    """Models that are planned with it when no trace is named."""


class KnobRow(_Part):
    name: str
    kind: Literal["structural", "demand"]
    values: list[Setting]
    """What the planner searches."""
    unsearched: list[Setting]
    """Values that may be set but are not searched."""
    default: Setting | None
    low: float | None
    high: float | None
    help: str


class PolicySheet(_Part):
    """`simmem policies NAME --json`: the knobs of a policy."""

    schema_: Literal["simmem.policy-sheet/1"] = Field(default="simmem.policy-sheet/1", alias="schema")
    name: str
    summary: str
    uses_trace: bool
    shown_for: dict[Literal["device", "model"], str]
    """The values searched depend on the device and the model."""
    knobs: list[KnobRow]


# --- replay and errors --------------------------------------------------------------------------------------------


class _TraceName(_Part):
    name: str
    kind: Literal["captured", "synthetic"]
    digest: str


class _Curve(_Part):
    policy: str
    scope: Literal["layer", "global"]
    parameter: list[float]
    """Window in tokens, or capacity in units."""
    sizes_bytes: list[float]
    peak_bytes: list[float]
    hit_ratio: list[float]
    bytes_per_token: list[float]
    regret: list[float | None] | None
    """Misses above the fewest possible (Belady's) at the same capacity and scope, as a fraction of them, in steady
    state; null where the fewest possible are none and these are more."""


class _ColdCurve(_Part):
    policy: str
    hit_ratio: list[float]
    bytes_per_token: list[float]


class _Cold(_Part):
    tokens: int
    first_uses: int
    curves: list[_ColdCurve]


class _PageCache(_Part):
    size_bytes: float
    page_bytes: int
    slot_bytes: float
    """What a unit takes: whole pages of its own."""
    units: int


class _PredictorQuality(_Part):
    recall: float
    precision: float


class _LevelCurve(_Part):
    policy: str
    scope: Literal["layer", "global"]
    dram_bytes: list[float]
    """Of the private cache (a window's peak) and the page cache together."""
    demand_bytes_per_token: list[float]
    ahead_bytes_per_token: list[float]
    """Read before the step by the predictor, what it did not use included."""
    wasted_bytes_per_token: list[float]
    page_cache_hit_ratio: list[float] | None
    """Of what the private cache or the predictor read."""
    storage_bytes_per_token: list[float] | None
    held_twice_bytes: list[float] | None
    """Of the page cache, what the private cache holds too; mean over tokens."""


class _Levels(_Part):
    page_cache: _PageCache | None
    prefetch: Literal["previous-token", "frequent", "gate", "low-rank", "next-layer"] | _PredictorQuality | None
    curves: list[_LevelCurve]


class ReplayDocument(_Part):
    """`simmem replay --json`: cache policies against a trace, the cold start apart."""

    schema_: Literal["simmem.replay/1"] = Field(default="simmem.replay/1", alias="schema")
    trace: _TraceName
    model: str
    """The model whose shape the trace has."""
    n_layers: int
    n_units: int
    """Units of a layer."""
    batch: int
    """Sequences that advance together; a token is a step of all of them."""
    unit_bytes: float
    precision: str
    curves: list[_Curve]
    cold: _Cold
    levels: _Levels | None
    """With a page cache or a predictor: what they make of each curve in steady state."""


class ErrorDocument(_Part):
    """What a command prints with `--json` when it exits 2, 3, 4 or 70."""

    schema_: Literal["simmem.error/1"] = Field(default="simmem.error/1", alias="schema")
    kind: Literal["SpecError", "UnitError", "UnknownNameError", "TraceError", "InfeasiblePlanError", "CalibrationError",
                  "MachineError", "InternalError"]
    message: str
    file: str | None
    key: str | None
    tier: str | None
    missing_bytes: float | None
