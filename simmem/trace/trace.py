"""What is a trace? Which units every token of a run touched in every layer, and how that was found.

A unit is whatever is fetched as one: an FFN neuron, whose rows and columns (2·d_model parameters,
3· when gated) are stored side by side, or a whole expert of a mixture. Activity is kept as packed
bits, least significant bit first: bit u % 8 of byte u // 8 is unit u.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from simmem.errors import TraceError
from simmem.spec.base import Frozen
from simmem.spec.model import Model

__all__ = ["EXTRA_TENSORS", "Captured", "ExtraTensor", "Imported", "Quality", "TensorType", "Trace", "TraceHeader",
           "Unit", "digest_of"]

Unit = Literal["ffn-neuron", "expert", "kv-block"]
TensorType = Literal["F16", "U8", "I32"]


class Quality(Frozen):
    """What dropping the inactive units costs, on text that the thresholds did not see."""

    text: str
    tokens: PositiveInt
    dense_perplexity: float = Field(gt=0)
    sparse_perplexity: float = Field(gt=0)

    @property
    def perplexity_ratio(self) -> float:
        return self.sparse_perplexity / self.dense_perplexity


class Imported(Frozen):
    """Which log of another program a trace was read from, and how that was read."""

    file: str
    sha256: str
    columns: dict[str, str]
    """The fields that were taken: token, layer, unit and sequence → name in the log."""
    where: dict[str, str] = Field(default_factory=dict)
    """Records were taken only where these fields had these values."""
    layer_ids: tuple[int, ...]
    """What the log calls each layer of the trace, in order."""
    first_unit: int = 0
    """What the log calls unit 0."""
    sequences: PositiveInt = 1
    """Requests that follow one another in the trace, in the order in which the log first names them."""
    missing: int = Field(default=0, ge=0)
    """Pairs of token and layer that the log does not have; they touch nothing."""


class Captured(Frozen):
    """How the run went that a trace was captured from."""

    mode: Literal["teacher-forced", "decoded"]
    """The text was given, or the model wrote it itself."""
    applied: bool = True
    """The network ran without its inactive units; False: it was dense, and they were only noted."""
    sequences: PositiveInt = 1
    """Stretches of equal length that were run side by side and follow one another in the trace."""
    context_tokens: int = Field(ge=0)
    """Tokens that precede the first recorded one of a pass at least."""
    pass_tokens: PositiveInt
    """Tokens that a pass records at most."""
    dtype: str
    device: str
    layers: tuple[int, ...] = ()
    """Which of the model's layers these are, where not all."""
    thresholds: tuple[float, ...] = ()
    """Score that a unit of each layer has to exceed, where there is one."""
    page_tokens: PositiveInt | None = None
    """KV blocks: tokens of one."""
    temperature: float | None = Field(default=None, ge=0)
    seed: int | None = None


class ExtraTensor(Frozen):
    """What else a trace file holds beside the activity, by name: its type, shape and digest."""

    dtype: TensorType
    shape: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=4)]
    sha256: str


EXTRA_TENSORS: dict[str, TensorType] = {"router_logits": "F16", "router_weights": "F16", "prefill": "U8",
                                        "tokens": "I32"}
"""Name of an extra tensor -> its type.

router_logits (n_tokens, n_layers, n_units): of every expert, before the top k. router_weights (n_tokens, n_layers,
k): of the k experts a token uses, in ascending order of the expert. prefill (prompts, n_layers, ceil(n_units / 8)):
packed bits of the units that each whole prompt touched. tokens (n_tokens,): what a model wrote that was decoded.
"""


class TraceHeader(Frozen):
    """Where a trace comes from and what it may be used for."""

    schema_: Literal["simmem.trace/1"] = Field(default="simmem.trace/1", alias="schema")
    name: str
    kind: Literal["captured", "synthetic"]
    model: str
    n_tokens: PositiveInt
    n_layers: PositiveInt
    n_units: PositiveInt
    unit: Unit = "ffn-neuron"
    unit_bytes: float = Field(gt=0)
    """Bytes of one unit at `unit_precision`; planning at another precision scales it. [B]"""
    unit_precision: str = "fp16"
    criterion: str
    threshold: str
    records: Literal["active", "predicted"]
    """Units that were active, or those a predictor asked for (its false positives included)."""
    predictor: Literal["none", "low-rank", "gate", "oracle"]
    """How an engine could have known these units before reading them; `oracle`: it could not."""
    predictor_params_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Parameters of that predictor as a share of the model's."""
    quality: Quality | None = None
    text: str
    text_licence: str | None = None
    imported: Imported | None = None
    captured: Captured | None = None
    tensors: dict[str, ExtraTensor] = Field(default_factory=dict)
    """What the file holds beside the activity; `digest` is of the activity alone."""
    host: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    created: str | None = None
    op_timings_s: dict[str, float] = Field(default_factory=dict)
    """Median seconds per decode step by kind of op, where the run was timed. [s]"""
    statistics: dict[str, Any] = Field(default_factory=dict)
    """Synthetic: the published statistics it was fitted to, with sources. Captured: measured ones."""
    curves: tuple[dict[str, Any], ...] = ()
    """Replay curves computed when the trace was made; the tests recompute them."""
    weakest_kind: Literal["measured", "datasheet", "derived", "fitted", "estimated"] = "measured"
    active_share_range: tuple[float, float] | None = None
    """Synthetic with an estimated activity: the 90 % range of its mean active share."""
    digest: str

    @property
    def is_oracle(self) -> bool:
        return self.predictor == "oracle"


@dataclass(frozen=True)
class Trace:
    """A header and packed bits of shape (n_tokens, n_layers, ceil(n_units / 8)), dtype uint8."""

    header: TraceHeader
    active: NDArray[np.uint8]
    extras: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Tensors beside the activity, by the names in `EXTRA_TENSORS`; a part or a union of a trace has none."""

    def __post_init__(self) -> None:
        h = self.header
        expected = (h.n_tokens, h.n_layers, -(-h.n_units // 8))
        if self.active.dtype != np.uint8 or self.active.shape != expected:
            raise TraceError(f"holds an array of {self.active.dtype} {self.active.shape}, its header "
                             f"promises uint8 {expected}", key=h.name)
        spare = expected[2] * 8 - h.n_units
        if spare and np.any(self.active[:, :, -1] >> (8 - spare)):
            raise TraceError(f"marks units past its {h.n_units} as active", key=h.name)

    @classmethod
    def with_extras(cls, header: TraceHeader, active: NDArray[np.uint8], extras: Mapping[str, NDArray[Any]]) -> Trace:
        """A trace whose header describes the extra tensors it is given."""
        described = {name: ExtraTensor(dtype=EXTRA_TENSORS[name], shape=array.shape, sha256=digest_of(array))
                     for name, array in extras.items()}
        return cls(header.model_copy(update={"tensors": described}), active, dict(extras))

    @property
    def active_counts(self) -> NDArray[np.int64]:
        """Active units per token and layer, shape (n_tokens, n_layers)."""
        counts: NDArray[np.int64] = np.bitwise_count(self.active).sum(axis=2, dtype=np.int64)
        return counts

    @property
    def active_share(self) -> float:
        """Mean share of units that a token touches."""
        return float(self.active_counts.mean() / self.header.n_units)

    def check_model(self, model: Model) -> None:
        """Raise TraceError unless this trace has as many layers and units as `model` has of its kind of unit."""
        h = self.header
        shape = model.units_of(h.unit)
        if (h.n_layers, h.n_units) != shape:
            kind = "unit" if h.unit == "ffn-neuron" else h.unit
            has = f"{shape[0]} of {shape[1]}" if shape else "none"
            raise TraceError(f"has {h.n_layers} layers of {h.n_units} {kind}s, {model.name} has {has}", key=h.name)

    def batched(self, batch: int, *, min_tokens: int = 8) -> Trace:
        """The same activity as `batch` sequences decoded together: a step touches the union.

        The trace is cut into `batch` consecutive stretches that advance in step.
        """
        if batch == 1:
            return self
        steps = self.header.n_tokens // batch
        if steps < min_tokens:
            raise TraceError(f"has {self.header.n_tokens} tokens, too few for batch {batch}: at least "
                             f"{batch * min_tokens} are needed", key=self.header.name)
        stretches = self.active[: steps * batch].reshape(batch, steps, *self.active.shape[1:])
        union = np.bitwise_or.reduce(stretches, axis=0)
        header = self.header.model_copy(update={"n_tokens": steps, "tensors": {}})
        return Trace(header, union)


def digest_of(active: NDArray[Any]) -> str:
    """SHA-256 of an array's bytes and shape; of the packed bits it is the identity of a trace."""
    hasher = hashlib.sha256(repr(active.shape).encode())
    hasher.update(np.ascontiguousarray(active).data)
    return hasher.hexdigest()
