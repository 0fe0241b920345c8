"""What is a trace? Which units every token of a run touched in every layer, and how that was found.

A unit is whatever is fetched as one: an FFN neuron, whose rows and columns (2·d_model parameters,
3· when gated) are stored side by side, or a whole expert of a mixture. Activity is kept as packed
bits, least significant bit first: bit u % 8 of byte u // 8 is unit u.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from simmem.errors import TraceError
from simmem.spec.base import Frozen
from simmem.spec.model import Model

__all__ = ["Imported", "Quality", "Trace", "TraceHeader", "Unit", "digest_of"]

Unit = Literal["ffn-neuron", "expert", "kv-block"]


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

    def __post_init__(self) -> None:
        h = self.header
        expected = (h.n_tokens, h.n_layers, -(-h.n_units // 8))
        if self.active.dtype != np.uint8 or self.active.shape != expected:
            raise TraceError(f"holds an array of {self.active.dtype} {self.active.shape}, its header "
                             f"promises uint8 {expected}", key=h.name)
        spare = expected[2] * 8 - h.n_units
        if spare and np.any(self.active[:, :, -1] >> (8 - spare)):
            raise TraceError(f"marks units past its {h.n_units} as active", key=h.name)

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
        header = self.header.model_copy(update={"n_tokens": steps})
        return Trace(header, union)


def digest_of(active: NDArray[np.uint8]) -> str:
    """SHA-256 of the packed bits and their shape, the identity of a trace."""
    hasher = hashlib.sha256(repr(active.shape).encode())
    hasher.update(np.ascontiguousarray(active).data)
    return hasher.hexdigest()
