"""How many parameters does each part of a model hold, and how many bytes at a precision?

Counts are exact: the tests compare every group with the torch module's own parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from simmem.spec import library
from simmem.spec.base import Frozen, load_toml, validate
from simmem.spec.precision import matrix_bytes_per_param, vector_bytes_per_param

__all__ = ["Architecture", "Model", "TensorGroup", "load_model"]


Width = Annotated[int, Field(gt=0, le=1_000_000)]
"""Wider than any model there is; what is absurd should fail as a specification, not as memory running out."""


class Architecture(Frozen):
    """The shapes of a decoder, in the words of its configuration file."""

    d_model: Width
    n_layers: int = Field(gt=0, le=1000)
    n_heads: Width
    n_kv_heads: Width
    d_head: Width
    d_ff: Width
    vocab: int = Field(gt=0, le=100_000_000)
    max_positions: int = Field(gt=0, le=1_000_000_000)
    gated: bool
    """Gated FFN (gate, up, down) rather than (up, down)."""
    activation: str
    learned_position_rows: int = Field(default=0, ge=0, le=1_000_000_000)
    embedding_dim: Width | None = None
    """Narrower embeddings, projected to d_model and back (OPT-350M)."""
    tied_head: bool = True
    head_bias: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    ffn_bias: bool = False
    norm: Literal["layernorm", "rmsnorm"]
    norms_per_layer: PositiveInt = 2
    final_norm: bool = True
    qk_norm: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> Architecture:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) is not a multiple of n_kv_heads ({self.n_kv_heads})")
        return self


@dataclass(frozen=True)
class TensorGroup:
    """A set of tensors placed together: matrix and vector parameters of all its layers."""

    name: str
    matrix_params: int
    vector_params: int
    n_layers: int
    """How many layers share these parameters equally (1: not per layer)."""

    @property
    def params(self) -> int:
        return self.matrix_params + self.vector_params

    def bytes_at(self, precision: str) -> float:
        """Bytes of the whole group. [B]"""
        return (self.matrix_params * matrix_bytes_per_param(precision)
                + self.vector_params * vector_bytes_per_param(precision))


class Model(Frozen):
    """A model: its architecture and where that was read."""

    schema_: Literal["simmem.model/1"] = Field(alias="schema")
    name: str
    title: str
    family: str
    source: str = Field(min_length=4)
    aliases: tuple[str, ...] = ()
    native_precision: Literal["fp32", "fp16", "bf16"] = "fp16"
    architecture: Architecture

    def groups(self) -> tuple[TensorGroup, ...]:
        """Tensor groups in the order they are used: embedding, positions, attention, ffn, norms, head."""
        a = self.architecture
        d, wide, kv = a.d_model, a.n_heads * a.d_head, a.n_kv_heads * a.d_head
        e = a.embedding_dim or d
        norm_vectors = 2 if a.norm == "layernorm" else 1
        layers = a.n_layers

        embedding = a.vocab * e + (2 * e * d if e != d else 0)
        attention_matrices = d * (wide + 2 * kv) + wide * d
        attention_vectors = ((wide + 2 * kv) if a.qkv_bias else 0) + (d if a.attention_output_bias else 0)
        attention_vectors += 2 * a.d_head * norm_vectors if a.qk_norm else 0
        ffn_vectors = (a.d_ff * (2 if a.gated else 1) + d) if a.ffn_bias else 0
        norms = norm_vectors * d * (a.norms_per_layer * layers + (1 if a.final_norm else 0))
        groups = [
            TensorGroup("embedding", embedding, 0, 1),
            TensorGroup("positions", a.learned_position_rows * d, 0, 1),
            TensorGroup("attention", layers * attention_matrices, layers * attention_vectors, layers),
            TensorGroup("ffn", layers * self.unit_params * a.d_ff, layers * ffn_vectors, layers),
            TensorGroup("norms", 0, norms, 1),
            TensorGroup("head", 0 if a.tied_head else a.vocab * e, a.vocab if a.head_bias else 0, 1),
        ]
        return tuple(g for g in groups if g.params)

    def group(self, name: str) -> TensorGroup:
        """One group by name; empty where the model has no such tensors."""
        return next((g for g in self.groups() if g.name == name), TensorGroup(name, 0, 0, 1))

    @property
    def params(self) -> int:
        """All parameters, tied ones once."""
        return sum(g.params for g in self.groups())

    def bytes_at(self, precision: str) -> float:
        """All weights at one precision. [B]"""
        return sum(g.bytes_at(precision) for g in self.groups())

    @property
    def unit_matrices(self) -> int:
        """Matrices an FFN neuron has a row or column in: 2, or 3 when gated."""
        return 3 if self.architecture.gated else 2

    @property
    def unit_params(self) -> int:
        """Matrix parameters of one FFN neuron (LLM in a flash, §3.2: a bundle is 2·d_model, 3· gated)."""
        return self.unit_matrices * self.architecture.d_model

    def unit_bytes(self, precision: str) -> float:
        """Bytes of one FFN neuron's rows and columns. [B]"""
        return self.unit_params * matrix_bytes_per_param(precision)

    def kv_bytes_per_token(self, precision: str) -> float:
        """Keys and values that one token of context holds over all layers. [B]"""
        a = self.architecture
        return 2 * a.n_layers * a.n_kv_heads * a.d_head * matrix_bytes_per_param(precision)

    @property
    def head_params(self) -> int:
        """Matrix parameters a token multiplies outside the layers: the output projection (the embedding's own when
        tied), and the projections to and from narrower embeddings."""
        a = self.architecture
        e = a.embedding_dim or a.d_model
        return a.vocab * e + (2 * e * a.d_model if e != a.d_model else 0)


def load_model(name: str, *, relative_to: Path | None = None) -> Model:
    """A built-in model by name or alias, or the model in a TOML file."""
    path = library.resolve("model", name, relative_to=relative_to)
    return validate(Model, load_toml(path), file=str(path))
