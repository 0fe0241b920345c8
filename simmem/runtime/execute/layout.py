"""Where in the weight file is what, so that everything a plan reads is whole blocks in the order it is used?

Every layer is a stage: its attention, norms, biases and whatever of its FFN is not fetched neuron by neuron, packed.
What a plan streams of a stage is its end, so one file serves every resident share. FFN neurons that are fetched one by
one lie in slots of whole blocks: all rows and columns of a neuron in one slot (bundled), or a slot for each. The output
projection is one more stage; an input embedding of its own has a slot for each row.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from simmem.errors import SpecError
from simmem.policy.context import Context
from simmem.spec.model import Architecture, Model

__all__ = ["BYTES_OF", "Layout", "Slots", "Stage", "Tensor", "check_runnable", "ffn_parts", "layout_of", "whole_blocks"]

BYTES_OF = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Precision the executor computes in -> bytes of an element. [B]"""

SECTOR_BYTES = 512
"""Nothing smaller can be read past the page cache. [B]"""

ACTIVATIONS = ("relu", "silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class Tensor:
    """A vector or a row-major matrix (outputs, inputs), at `offset` behind the start of its stage. [B]"""

    name: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def row_bytes(self) -> int:
        """The smallest part of it that is of use: a row, or the whole vector. [B]"""
        return self.n_bytes // self.shape[0] if len(self.shape) > 1 else self.n_bytes


@dataclass(frozen=True)
class Stage:
    """Tensors packed one behind the other, filled up to whole blocks. [B]"""

    offset: int
    n_bytes: int
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Slots:
    """One slot of `slot_bytes` for each of `rows` and each of `areas`, area after area. [B]"""

    offset: int
    rows: int
    areas: int
    slot_bytes: int

    @property
    def area_bytes(self) -> int:
        return self.rows * self.slot_bytes

    def area_offset(self, area: int) -> int:
        return self.offset + area * self.area_bytes


@dataclass(frozen=True)
class Layout:
    """The weight file of a model at a precision."""

    architecture: Architecture = field(repr=False)
    model: str
    precision: str
    block_bytes: int
    parts: tuple[str, ...]
    """Matrices that a neuron's slot holds a row (or column, of "down") of, in order; () where none is fetched alone."""
    bundled: bool
    fixed: Stage
    """What is never streamed: positions and the last norm."""
    layers: tuple[Stage, ...]
    head: Stage
    units: Slots | None
    """Area l·p + m holds part m of layer l's neurons, p being 1 where they are bundled."""
    embedding: Slots | None
    """Rows of an input embedding that is not the head's."""
    n_bytes: int

    @property
    def element_bytes(self) -> int:
        return BYTES_OF[self.precision]

    @property
    def unit_row_bytes(self) -> int:
        """One row or column of a neuron. [B]"""
        return self.architecture.d_model * self.element_bytes

    @property
    def areas_per_layer(self) -> int:
        return 1 if self.bundled else len(self.parts)

    @property
    def n_blocks(self) -> int:
        return self.n_bytes // self.block_bytes

    def digest(self, source: str) -> str:
        """Names a file of this layout filled from `source`."""
        shape = {"architecture": self.architecture.model_dump(mode="json"), "precision": self.precision,
                 "block": self.block_bytes, "parts": self.parts, "bundled": self.bundled, "bytes": self.n_bytes,
                 "layer": [asdict(s) for s in self.layers[:2]], "source": source}
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()

    def stages(self) -> Iterator[tuple[int | None, Stage]]:
        """(layer or None, stage) in the order of the file."""
        yield None, self.fixed
        yield from enumerate(self.layers)
        yield None, self.head


def whole_blocks(n_bytes: float, block_bytes: int) -> int:
    """The next multiple of a block. [B]"""
    return math.ceil(n_bytes / block_bytes - 1e-9) * block_bytes


def check_runnable(model: Model, precision: str) -> None:
    """Raise SpecError where the executor has no kernels for this model or precision."""
    a = model.architecture
    if precision not in BYTES_OF:
        raise SpecError(f"found {precision!r}, but only {', '.join(BYTES_OF)} weights can be run",
                        key="workload.weights")
    for there, what in ((a.experts, "mixtures of experts"), (a.latent_attention, "latent attention"),
                        (a.state_space, "a state space"), (a.embedding_dim, "embeddings of their own width"),
                        (a.window, "sliding-window attention"), (a.sinks, "attention sinks"),
                        (a.embedding_norm, "a norm behind the embedding"), (a.qk_norm, "norms of queries and keys"),
                        (a.norms_per_layer != 2, f"{a.norms_per_layer} norms a layer")):
        if there:
            raise SpecError(f"has {what}, which the executor cannot run yet", key=model.name)
    if a.activation not in ACTIVATIONS:
        raise SpecError(f"has the activation {a.activation!r}, expected one of {', '.join(ACTIVATIONS)}",
                        key=model.name)


def ffn_parts(architecture: Architecture) -> tuple[str, ...]:
    """Matrices of an FFN in the order they are used."""
    return ("gate", "up", "down") if architecture.gated else ("up", "down")


def layout_of(context: Context, *, by_neuron: bool, bundled: bool = True) -> Layout:
    """The file for a model and precision on the plan's device.

    Parameters
    ----------
    by_neuron : FFN neurons are fetched one by one, as the trace's units say; else the FFN is part of its layer's stage.
    bundled : a neuron is one slot rather than one for each of its rows and columns.
    """
    model, a, precision = context.model, context.model.architecture, context.workload.weights
    check_runnable(model, precision)
    link = context.storage_link[1]
    block = int(link.block.value) if link.block else 1
    if block % SECTOR_BYTES:
        raise SpecError(f"has storage blocks of {block} bytes, expected a multiple of {SECTOR_BYTES}",
                        key=context.device.name)
    every = ffn_parts(a)
    parts = every[len(every) - context.unit_matrices:] if by_neuron else ()
    packer = _Packer(block, BYTES_OF[precision])
    d = a.d_model
    fixed = [*_norm("final_norm", a)] if a.final_norm else []
    if a.learned_position_rows:
        fixed.append(("positions", (a.learned_position_rows, d)))
    first = packer.stage(fixed, 0.0)
    beside = tuple(name for name in every if name not in parts)
    stored = context.layers.stored_bytes[0]
    if by_neuron:
        stored -= context.unit_bytes * a.d_ff
    layers = tuple(packer.stage(_layer(a, beside), stored) for _ in range(a.n_layers))
    matrix = ("head.weight", (a.vocab, d))
    head = packer.stage([matrix, ("head.bias", (a.vocab,))] if a.head_bias else [matrix], context.head_bytes)
    units = embedding = None
    if parts:
        per_slot = len(parts) if bundled else 1
        units = packer.slots(a.d_ff, a.n_layers * len(parts) // per_slot, per_slot * d)
    if not a.tied_head:
        embedding = packer.slots(a.vocab, 1, d)
    return Layout(a, model.name, precision, block, parts, bundled, first, layers, head, units, embedding, packer.end)


def _norm(name: str, a: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (a.d_model,)
    if a.norm == "layernorm" and a.norm_bias:
        yield f"{name}.bias", (a.d_model,)


def _layer(a: Architecture, beside: tuple[str, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one layer, matrices of the FFN last: they are what is streamed first."""
    d, queries, keys = a.d_model, a.n_heads * a.d_head, a.n_kv_heads * a.d_head
    found = list(_norm("attention_norm", a))
    for name, outputs in (("q", queries), ("k", keys), ("v", keys)):
        found.append((f"{name}.weight", (outputs, d)))
        if a.qkv_bias:
            found.append((f"{name}.bias", (outputs,)))
    found.append(("o.weight", (d, queries)))
    if a.attention_output_bias:
        found.append(("o.bias", (d,)))
    found.extend(_norm("ffn_norm", a))
    widths = {"gate": (a.d_ff, d), "up": (a.d_ff, d), "down": (d, a.d_ff)}
    if a.ffn_bias:
        found.extend((f"{name}.bias", widths[name][:1]) for name in ffn_parts(a))
    found.extend((f"{name}.weight", widths[name]) for name in beside)
    return found


class _Packer:
    """Hands out the file from its start."""

    def __init__(self, block_bytes: int, element_bytes: int) -> None:
        self.block, self.element, self.end = block_bytes, element_bytes, 0

    def stage(self, tensors: list[tuple[str, tuple[int, ...]]], at_least: float) -> Stage:
        placed, used = [], 0
        for name, shape in tensors:
            placed.append(Tensor(name, shape, used, math.prod(shape) * self.element))
            used += placed[-1].n_bytes
        stage = Stage(self.end, whole_blocks(max(used, at_least), self.block), tuple(placed))
        self.end += stage.n_bytes
        return stage

    def slots(self, rows: int, areas: int, elements: int) -> Slots:
        found = Slots(self.end, rows, areas, whole_blocks(elements * self.element, self.block))
        self.end += areas * found.area_bytes
        return found
