"""In which of llama.cpp's formats are weights and keys nearest to a precision, and what does a model take in it?"""

from __future__ import annotations

from dataclasses import dataclass

from simmem.spec.ggml_types import GGML_TYPES, GgmlType
from simmem.spec.model import Model
from simmem.spec.precision import FILE, matrix_bytes_per_param

__all__ = ["CACHE_TYPES", "CacheType", "converts_as_is", "gguf_bytes", "is_plain", "nearest_type"]

_BY_NAME = {t.name: t for t in GGML_TYPES.values()}
_PLAIN = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_QUANTISED = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K")
"""What llama-quantize writes without an importance matrix; of two equally near the first is taken."""
_ALWAYS_F32 = ("positions", "router")
"""Matrices that the converter leaves in F32 (convert_hf_to_gguf, prepare_tensors), as it does all vectors."""
_F32_BYTES = 4.0


@dataclass(frozen=True)
class CacheType:
    """A value of --cache-type-k and -v, and the bytes a value takes in it."""

    name: str
    bytes_per_value: float
    exact: bool
    """Kept as simmem counts it."""


def _cache(name: str, exact: bool) -> CacheType:
    found = _BY_NAME[name.upper()]
    return CacheType(name, found.block_bytes / found.block, exact)


CACHE_TYPES = {"fp32": _cache("f32", True), "fp16": _cache("f16", True), "bf16": _cache("bf16", True),
               "int8": _cache("q8_0", False), "int4": _cache("q4_0", False),
               "int3": _cache("q4_0", False), "int2": _cache("q4_0", False)}
"""simmem's precision -> the nearest type that llama.cpp keeps keys and values in; none is below 4 bits."""


def is_plain(precision: str) -> bool:
    """Whether llama.cpp has the same number format."""
    return precision in _PLAIN


def nearest_type(model: Model, precision: str) -> GgmlType:
    """The type with the nearest number of bits a weight whose blocks divide every row of the model's matrices."""
    if precision in _PLAIN:
        return _BY_NAME[_PLAIN[precision]]
    held = matrix_bytes_per_param(precision) if precision != FILE else model.bytes_at(FILE) / model.params
    fitting = [_BY_NAME[name] for name in _QUANTISED if all(row % _BY_NAME[name].block == 0 for row in _rows(model))]
    return min(fitting or [_BY_NAME["F16"]], key=lambda t: abs(t.block_bytes / t.block - held))


def converts_as_is(model: Model) -> bool:
    """Whether convert_hf_to_gguf.py keeps the quantised matrices of a checkpoint, whatever --outtype it is given.

    It does so with gpt-oss in MXFP4 (ggml-org/llama.cpp PR 16756); FP8 is expanded.
    """
    return model.family == "gpt_oss" and model.file_bytes is not None


def gguf_bytes(model: Model, kind: GgmlType | None) -> dict[str, float]:
    """Bytes of every tensor group in a file whose matrices are all of one type (llama-quantize --pure). [B]

    kind : None for a checkpoint that is converted as it is, at 16 bits where it is not quantised.
    """
    if kind is None:
        assert model.file_bytes is not None
        half = _F32_BYTES / 2
        return {g.name: model.file_bytes[g.name]
                + half * (g.vector_params + (g.matrix_params if g.name in _ALWAYS_F32 else 0)) for g in model.groups()}
    each = kind.block_bytes / kind.block
    return {g.name: g.matrix_params * (_F32_BYTES if g.name in _ALWAYS_F32 else each) + g.vector_params * _F32_BYTES
            for g in model.groups()}


def _rows(model: Model) -> set[int]:
    """Lengths of the rows of all matrices: blocks run along the inputs."""
    a = model.architecture
    found = {a.d_model, a.embedding_dim or a.d_model, a.d_ff, a.n_heads * a.d_head}
    if a.experts:
        found |= {a.experts.d_expert, a.experts.d_shared}
    if a.latent_attention:
        latent = a.latent_attention
        found = found - {a.n_heads * a.d_head} | {latent.q_rank or a.d_model, latent.kv_rank,
                                                  a.n_heads * latent.d_value}
    if a.state_space:
        found |= {a.state_space.d_inner, a.state_space.dt_rank}
    return found - {0}
