"""Which parameters does the torch module of a configuration have, by tensor group? transformers counts, not simmem.

Modules are built on the meta device: shapes without memory.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import pytest

from simmem.spec.model import Model

# (part of a parameter's name, tensor group it belongs to); the first match counts.
_PLACES: tuple[tuple[str, str], ...] = (
    (r"vision_tower|vision_model|multi_modal_projector", ""),  # of models that see: no part of the decoder
    (r"embed_positions\.|\bwpe\.", "positions"),
    (r"embeddings_layernorm|layernorm_embedding", "norms"),
    (r"(embed_tokens|word_embeddings|project_in|project_out|embed_in|embeddings|\bwte)\.", "embedding"),
    (r"lm_head\.|embed_out\.", "head"),
    (r"\.mixer\.", "state-space"),
    (r"attn\.norm\.|norm_attn_norm\.norm_|\.norm_[12]\.", "norms"),
    (r"self_attn\.|self_attention\.|\.attn\.|\.attention\.", "attention"),
    (r"mlp\.router\.|router\.layer\.|mlp\.gate\.|\.gate\.(weight|e_score|wg)|router\.(weight|bias|classifier)"
     r"|block_sparse_moe\.router|feed_forward\.router|e_score_correction_bias", "router"),
    (r"shared_expert", "ffn"),
    (r"\.experts\.", "experts"),
    (r"\.mlp\.|\.ffn\.|\.fc[12]\.|feed_forward\.", "ffn"),
    (r"(norm|ln_f|layernorm|ln_[12]|ln_attn|ln_mlp|norm_f|norm_[12])\.|layer_norm\.", "norms"),
)
# Vectors by what they are: one parameter an output, or a head, or an expert.
_VECTOR = re.compile(r"bias$|(norm|layernorm|norm_\w|ln_\w+)\.weight$|\.D$|sinks$")
# Kept with the weights and added to scores, though transformers registers some as buffers.
_BUFFERS = re.compile(r"e_score_correction_bias$")


def meta_module(config: Any) -> Any:
    """The module of a transformers configuration that generates text, on the meta device."""
    torch = pytest.importorskip("torch", reason="counts are compared with torch modules, and torch is not installed")
    transformers = pytest.importorskip("transformers",
                                       reason="counts are compared with transformers, which is not installed")
    auto = transformers.AutoModelForCausalLM
    if config.model_type in ("gemma3", "llama4"):
        auto = transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        return auto.from_config(config)


def meta_config(values: dict[str, Any]) -> Any:
    """The transformers configuration with these values of a config.json."""
    transformers = pytest.importorskip("transformers",
                                       reason="counts are compared with transformers, which is not installed")
    values = dict(values)
    values.pop("quantization_config", None)
    kind = values.pop("model_type")
    return transformers.AutoConfig.for_model({"kimi_k2": "deepseek_v3"}.get(kind, kind), **values)


def place(name: str) -> str:
    """Tensor group of a parameter; empty for what is no part of the decoder."""
    group = next((g for pattern, g in _PLACES if re.search(pattern, name)), None)
    assert group is not None, f"the parameter {name} belongs to no tensor group"
    return group


def tensors(module: Any) -> dict[str, Any]:
    """Parameters, tied ones once, and the buffers that a checkpoint keeps as weights; those of the decoder alone."""
    found = dict(module.named_parameters())
    found |= {name: buffer for name, buffer in module.named_buffers() if _BUFFERS.search(name)}
    return {name: tensor for name, tensor in found.items() if place(name)}


def counts(module: Any) -> dict[str, tuple[int, int]]:
    """Group -> (matrix parameters, vector parameters)."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, tensor in tensors(module).items():
        vector = tensor.ndim < 2 or _VECTOR.search(name) is not None
        found[place(name)][1 if vector else 0] += tensor.numel()
    return {group: (matrix, vector) for group, (matrix, vector) in found.items()}


def groups_of(model: Model) -> dict[str, tuple[int, int]]:
    """What simmem says, in the same form."""
    return {g.name: (g.matrix_params, g.vector_params) for g in model.groups()}
