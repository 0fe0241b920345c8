"""What is a trace? Which units every token of a run touched in every layer, and how that was found.

A unit is whatever is fetched as one: an FFN neuron, whose rows and columns (2·d_model parameters,
3· when gated) are stored side by side, or a whole expert of a mixture. Activity is kept as packed
bits, least significant bit first: bit u % 8 of byte u // 8 is unit u.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from simmem.errors import TraceError
from simmem.spec.base import Frozen
from simmem.spec.model import Model

__all__ = ["EXTRA_TENSORS", "Captured", "ExtraTensor", "Imported", "Predictor", "Quality", "QualityPoint", "TensorType",
           "Trace", "TraceHeader", "Unit", "digest_of"]

Unit = Literal["ffn-neuron", "expert", "kv-block"]
TensorType = Literal["F16", "U8", "I32"]
Share = Annotated[float, Field(ge=0, le=1)]


class QualityPoint(Frozen):
    """The same criterion at one level: what it leaves out of the evaluation text, and the perplexity then."""

    level: float = Field(gt=0, le=1)
    """What was asked for: the share of the units to leave out, or of the attention mass to keep."""
    sparsity: float = Field(ge=0, le=1)
    """Share of the units (of the pages in sight) that was left out, mean over tokens and layers."""
    perplexity: float = Field(gt=0)


class Quality(Frozen):
    """What dropping the inactive units costs, on text that the thresholds did not see."""

    text: str
    tokens: PositiveInt
    dense_perplexity: float = Field(gt=0)
    sparse_perplexity: float = Field(gt=0)
    levels: tuple[QualityPoint, ...] = Field(default=(), max_length=64)
    """The same text at several levels of the same criterion, the trace's own among them; empty: not measured."""

    @property
    def perplexity_ratio(self) -> float:
        return self.sparse_perplexity / self.dense_perplexity

    @property
    def curve(self) -> tuple[tuple[float, float], ...]:
        """(sparsity, sparse over dense perplexity) of every level, in ascending order of the sparsity."""
        return tuple(sorted((point.sparsity, point.perplexity / self.dense_perplexity) for point in self.levels))


class Predictor(Frozen):
    """Something that says which units will be needed before they are read, and how well it did on a trace.

    Units asked for in vain are read and computed like the others; needed units that it misses are left out.
    """

    name: Literal["previous-token", "frequency", "gate", "low-rank", "next-layer"]
    asks: str = Field(max_length=200)
    """How many units it asks for."""
    layers_ahead: int | None = Field(default=None, ge=0, le=8)
    """It is asked when the FFN input of this many layers before is known; None: before the token begins."""
    rank: PositiveInt | None = None
    target_recall: Share | None = None
    """Its threshold was chosen for this recall, on text that it is not judged on."""
    fitted_tokens: int = Field(default=0, ge=0)
    """Tokens that it was fitted on, those for the threshold included."""
    judged_tokens: PositiveInt
    """Tokens of the trace that the following figures are of."""
    recall: Share
    """Needed units that it asked for, of all needed ones."""
    precision: Share
    """Needed units that it asked for, of all it asked for."""
    recall_by_layer: tuple[Share | None, ...]
    """None where nothing was needed, or where it could not be asked (a first layer)."""
    precision_by_layer: tuple[Share | None, ...]
    asked_share: Share
    """Units that it asked for, of all."""
    unit_bytes: float = Field(gt=0)
    """What is read for one unit that it asks for, at the trace's `unit_precision`. [B]"""
    wasted_bytes_per_token: float = Field(ge=0)
    """Units asked for in vain, nothing being cached. [B]"""
    params: int = Field(default=0, ge=0, le=1 << 62)
    """Its own parameters, which stay in memory."""
    params_share: Share = 0.0
    """The same as a share of the model's."""
    flop_per_token: float = Field(default=0.0, ge=0)
    quality: Quality | None = None
    """The network that computes exactly the units asked for."""
    held: bool = False
    """The trace holds what it asked for, in the tensor `asked`."""


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
                                        "tokens": "I32", "asked": "U8"}
"""Name of an extra tensor -> its type.

router_logits (n_tokens, n_layers, n_units): of every expert, before the top k. router_weights (n_tokens, n_layers,
k): of the k experts a token uses, in ascending order of the expert. prefill (prompts, n_layers, ceil(n_units / 8)):
packed bits of the units that each whole prompt touched. tokens (n_tokens,): what a model
wrote that was decoded. asked (predictors, n_tokens, n_layers, ceil(n_units / 8)): packed bits of the units that each
predictor of the header asked for that is `held`, in that order.
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
    predictors: tuple[Predictor, ...] = Field(default=(), max_length=64)
    """How well each of several ways could have known these units."""
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
    """Tensors beside the activity, by the names in `EXTRA_TENSORS`; of them a part or a union keeps `asked` alone."""

    def __post_init__(self) -> None:
        h = self.header
        expected = (h.n_tokens, h.n_layers, -(-h.n_units // 8))
        asked, held = self.extras.get("asked"), sum(predictor.held for predictor in h.predictors)
        if held != (0 if asked is None else asked.shape[0]) or (held and asked is not None
                                                                and asked.shape[1:] != expected):
            raise TraceError(f"holds what {0 if asked is None else asked.shape[0]} predictors asked for, its header "
                             f"promises {held} of {expected}", key=h.name)
        if self.active.dtype != np.uint8 or self.active.shape != expected:
            raise TraceError(f"holds an array of {self.active.dtype} {self.active.shape}, its header "
                             f"promises uint8 {expected}", key=h.name)
        spare = expected[2] * 8 - h.n_units
        if spare and any(np.any(bits[..., -1] >> (8 - spare)) for bits in (self.active, asked) if bits is not None):
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

        def union(bits: NDArray[np.uint8]) -> NDArray[np.uint8]:  # tokens are the third axis from the end
            cut = bits[..., : steps * batch, :, :]
            stretches = cut.reshape(*cut.shape[:-3], batch, steps, *cut.shape[-2:])
            joined: NDArray[np.uint8] = np.bitwise_or.reduce(stretches, axis=-4)
            return joined

        return self._derived(steps, union)

    def first(self, n_tokens: int) -> Trace:
        """The first tokens of the trace."""
        return self._derived(n_tokens, lambda bits: bits[..., :n_tokens, :, :])

    def _derived(self, n_tokens: int, change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> Trace:
        """The activity, and what was asked for, changed alike along the tokens."""
        header = self.header.model_copy(update={"n_tokens": n_tokens, "tensors": {}})
        return Trace(header, change(self.active),
                     {name: change(bits) for name, bits in self.extras.items() if name == "asked"})

    def asked_by(self, name: str, layers_ahead: int | None = None) -> tuple[Predictor, NDArray[np.uint8]]:
        """A predictor whose questions the trace holds, and the packed bits of what it asked for.

        layers_ahead : that many, or the most below it that were recorded; the most of all when None.

        Raises
        ------
        TraceError
            The trace holds nothing that such a predictor asked for.
        """
        held = [predictor for predictor in self.header.predictors if predictor.held]
        found = [(p.layers_ahead or 0, i) for i, p in enumerate(held)
                 if p.name == name and (layers_ahead is None or (p.layers_ahead or 0) <= layers_ahead)]
        if not found:
            known = ", ".join(dict.fromkeys(p.name for p in held)) or "none"
            raise TraceError(f"does not hold what a {name} predictor asks for (held: {known}); `simmem capture "
                             f"--predictor` records it", key=self.header.name)
        index = max(found)[1]
        return held[index], self.extras["asked"][index]

    def asking(self, name: Literal["low-rank", "gate"], layers_ahead: int = 0) -> Trace:
        """The trace of what one of its predictors asked for: its units, their bytes, its costs and its quality.

        Raises TraceError as `asked_by` does.
        """
        predictor, asked = self.asked_by(name, layers_ahead)
        return Trace(self.header.model_copy(update={
            "records": "predicted", "predictor": name, "predictor_params_share": predictor.params_share,
            "unit_bytes": predictor.unit_bytes, "quality": predictor.quality, "predictors": (), "tensors": {}}), asked)


def digest_of(active: NDArray[Any]) -> str:
    """SHA-256 of an array's bytes and shape; of the packed bits it is the identity of a trace."""
    hasher = hashlib.sha256(repr(active.shape).encode())
    hasher.update(np.ascontiguousarray(active).data)
    return hasher.hexdigest()
