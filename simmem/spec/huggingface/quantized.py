"""How many bytes do a quantised checkpoint's tensors take, where its configuration says that exactly?

Three layouts follow from a configuration alone, each for the families that are published in it; their
sizes are checked against published ones. Of any other only the architecture is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from simmem.spec.huggingface.keys import Keys
from simmem.spec.model import Model
from simmem.spec.precision import vector_bytes_per_param

__all__ = ["file_bytes"]

_MX_BLOCK = 32
"""Values that share a scale in MXFP4 (OCP Microscaling Formats 1.0, §5.2)."""
_MX_BLOCK_BYTES = _MX_BLOCK // 2 + 1
_AWQ_BITS = 4
_FP32_BYTES = 4
_FP16_BYTES = 2

Matrix = tuple[int, int, int]
"""(how many of them, outputs, inputs)"""
Layout = tuple[tuple[str, ...], Callable[[int, int], float]]
"""(groups whose matrices are quantised, (outputs, inputs) -> bytes of such a matrix)"""


def file_bytes(model: Model, found: Keys) -> tuple[dict[str, float] | None, str]:
    """(bytes of every tensor group in the checkpoint's files, or None; a note that says how). [B]

    Raises SpecError where the quantisation is stated in a way that makes no sense.
    """
    if not found.says("quant_method"):
        return None, "its quantization_config names no method and is left out"
    method = found.word("quant_method")
    layout = {"mxfp4": _mxfp4, "fp8": _fp8_blocks, "awq": _awq}.get(method)
    quantised = None if layout is None else layout(model, found)
    if quantised is None:
        return None, f"quantised with {method} in a layout that is not known: its file_bytes are left out"
    names, size = quantised
    own, matrices = vector_bytes_per_param(model.native_precision), _matrices(model)
    held = {}
    for group in model.groups():
        if group.name in names:
            held[group.name] = group.vector_params * own + sum(n * size(out, width)
                                                               for n, out, width in matrices[group.name])
        else:
            held[group.name] = group.params * own
    if method == "fp8" and "router" in held:  # the scores' correction is fp32 (safetensors headers of DeepSeek-V3)
        held["router"] += model.group("router").vector_params * (_FP32_BYTES - own)
    return held, f"quantised with {method}"


def _matrices(model: Model) -> dict[str, list[Matrix]]:
    """The separate matrices of the groups that quantisers touch."""
    a, x, latent = model.architecture, model.architecture.experts, model.architecture.latent_attention
    d, heads = a.d_model, a.n_heads
    if latent is not None:
        query = heads * (latent.d_nope + latent.d_rope)
        attention = [(1, query, d)] if latent.q_rank is None else [(1, latent.q_rank, d), (1, query, latent.q_rank)]
        attention += [(1, latent.kv_rank + latent.d_rope, d),
                      (1, heads * (latent.d_nope + latent.d_value), latent.kv_rank), (1, d, heads * latent.d_value)]
    else:
        attention = [(1, heads * a.d_head, d), (2, a.n_kv_heads * a.d_head, d), (1, d, heads * a.d_head)]
    found = {"attention": _times(a.n_layers, attention), "ffn": _times(a.n_dense_layers, _ffn(model, a.d_ff))}
    if x is not None:
        found["ffn"] += _times(a.n_expert_layers, _ffn(model, x.d_shared)) if x.d_shared else []
        found["experts"] = _times(a.n_expert_layers * x.count, _ffn(model, x.d_expert))
    return found


def _ffn(model: Model, width: int) -> list[Matrix]:
    d = model.architecture.d_model
    return [(model.unit_matrices - 1, width, d), (1, d, width)]


def _times(n: int, matrices: Iterable[Matrix]) -> list[Matrix]:
    return [(n * count, out, width) for count, out, width in matrices]


def _mxfp4(model: Model, found: Keys) -> Layout | None:
    """gpt-oss: the experts' matrices in blocks along their inputs, 4 bits a value and a byte a block; nothing else."""
    kept = found.words("modules_to_not_convert") if found.says("modules_to_not_convert") else []
    x = model.architecture.experts
    if model.family != "gpt_oss" or x is None or any("expert" in name for name in kept or ()):
        return None
    if model.architecture.d_model % _MX_BLOCK or x.d_expert % _MX_BLOCK:
        return None
    return ("experts",), lambda out, width: out * width // _MX_BLOCK * _MX_BLOCK_BYTES


def _fp8_blocks(model: Model, found: Keys) -> Layout | None:
    """DeepSeek-V3: a byte a value and an fp32 scale a block, for all but embeddings, head, router and vectors."""
    if model.family not in ("deepseek_v3", "kimi_k2") or not found.says("weight_block_size"):
        return None
    if found.says("modules_to_not_convert") and found.words("modules_to_not_convert"):
        return None
    block = found.integers("weight_block_size") or []
    if len(block) != 2 or not all(block):
        raise found.error("weight_block_size", "expected two whole numbers from 1")
    rows, columns = block
    return (("attention", "ffn", "experts"),
            lambda out, width: out * width + _FP32_BYTES * -(-out // rows) * -(-width // columns))


def _awq(model: Model, found: Keys) -> Layout | None:
    """AWQ's gemm layout: 4 bits a value; along the inputs each group has an fp16 scale and a 4-bit zero an output."""
    if model.family not in ("llama", "mistral", "qwen2", "qwen3") or model.architecture.attention_output_bias:
        return None
    words = {"version": "gemm", "bits": _AWQ_BITS, "zero_point": True}
    if model.native_precision == "fp32" or not all(found.is_value(key, value) for key, value in words.items()):
        return None
    if found.says("modules_to_not_convert") and found.words("modules_to_not_convert"):
        return None
    if not found.says("group_size") or found.is_value("group_size", -1):  # -1: one group along all of the inputs
        return None
    size = found.integer("group_size")
    if any(width % size or out % 8 for group in _matrices(model).values() for _, out, width in group):
        return None
    return (("attention", "ffn"), lambda out, width: (out * width * _AWQ_BITS / 8
                                                      + width // size * out * (_AWQ_BITS / 8 + _FP16_BYTES)))
