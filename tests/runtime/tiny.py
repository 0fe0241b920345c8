"""A tiny member, with random weights, of every family that can be captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from simmem.runtime.models import LoadedModel, find_blocks, find_experts
from simmem.runtime.text import SourceText

D_MODEL, N_UNITS, N_LAYERS, VOCAB, POSITIONS, N_EXPERTS = 16, 50, 2, 97, 64, 5
PROSE = SourceText("It was the best of units, it was the worst of units. " * 40, "two cities of neurons", None)
SMALL: dict[str, Any] = {"tokens": 40, "context": 24, "calibration_tokens": 200, "evaluation_tokens": 100}

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 4}
_FFN = {"intermediate_size": N_UNITS}
_MOE = {**_FFN, "moe_intermediate_size": 12, "num_experts_per_tok": 2}
_LATENT = {**_SHAPE, **_MOE, "num_key_value_heads": 4, "n_routed_experts": N_EXPERTS, "n_shared_experts": 1,
           "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4,
           "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1}

GATED = (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")

# Name -> (transformers prefix, configuration, (projections to the units, projection back) inside a layer).
DENSE: dict[str, tuple[str, dict[str, Any], tuple[tuple[str, ...], str]]] = {
    "opt": ("OPT", {**_SHAPE, "ffn_dim": N_UNITS, "word_embed_proj_dim": D_MODEL, "init_std": 0.3},
            (("fc1",), "fc2")),
    "llama": ("Llama", {**_GROUPED, **_FFN}, GATED),
    "mistral": ("Mistral", {**_GROUPED, **_FFN, "sliding_window": 16}, GATED),
    "falcon": ("Falcon", {**_SHAPE, "ffn_hidden_size": N_UNITS},
               (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")),
    "phi": ("Phi", {**_SHAPE, **_FFN}, (("mlp.fc1",), "mlp.fc2")),
    "phi3": ("Phi3", {**_GROUPED, **_FFN}, (("mlp.gate_up_proj",), "mlp.down_proj")),
    "qwen2": ("Qwen2", {**_GROUPED, **_FFN}, GATED),
    "qwen3": ("Qwen3", {**_HEADS, **_FFN}, GATED),
    "gemma": ("Gemma", {**_HEADS, **_FFN}, GATED),
    "gemma3": ("Gemma3", {**_HEADS, **_FFN, "sliding_window": 16}, GATED),
    "persimmon": ("Persimmon", {**_SHAPE, **_FFN}, (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")),
}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**_GROUPED, "intermediate_size": 12, "num_local_experts": N_EXPERTS}),
    "qwen2-moe": ("Qwen2Moe", {**_GROUPED, **_MOE, "num_experts": N_EXPERTS, "shared_expert_intermediate_size": 12}),
    "qwen3-moe": ("Qwen3Moe", {**_HEADS, **_MOE, "num_experts": N_EXPERTS}),
    "olmoe": ("Olmoe", {**_GROUPED, "intermediate_size": 12, "num_experts": N_EXPERTS, "num_experts_per_tok": 2}),
    "gpt-oss": ("GptOss", {**_HEADS, "intermediate_size": 12, "num_local_experts": N_EXPERTS, "num_experts_per_tok": 2,
                           "sliding_window": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "deepseek-v2": ("DeepseekV2", _LATENT),
    "deepseek-v3": ("DeepseekV3", {**_LATENT, "q_lora_rank": 8}),
}


def tokenizer(text: str, **_: object) -> dict[str, list[int]]:
    """Bytes as tokens."""
    return {"input_ids": [byte % VOCAB for byte in text.encode()]}


def make(family: str, *, seed: int = 7, **changes: Any) -> LoadedModel:
    """A loaded tiny model of a family."""
    import torch
    import transformers

    prefix, shape = (DENSE.get(family) or MIXTURES[family])[:2]
    config_class = getattr(transformers, "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
    torch.manual_seed(seed)
    network = getattr(transformers, f"{prefix}ForCausalLM")(config_class(**{**shape, **changes})).eval()
    for name, parameter in network.named_parameters():  # some families initialise these to zero whatever one asks
        if parameter.dim() > 1 and float(parameter.detach().abs().max()) == 0.0:
            torch.nn.init.normal_(parameter, std=0.3)
        assert "weight" not in name or bool(torch.isfinite(parameter).all())
    experts = find_experts(network, family)
    return LoadedModel(family, network, tokenizer, () if experts else find_blocks(network, family), experts)


def layers_of(model: LoadedModel) -> Any:
    """The decoder layers, by the paths that transformers gives them."""
    base = model.network.base_model
    for path in ("layers", "decoder.layers", "h"):
        try:
            return base.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError(path)


def each(names: Any) -> Callable[..., Any]:
    """Parametrize a test over families."""
    import pytest

    return pytest.mark.parametrize("family", sorted(names))


def save(model: LoadedModel, folder: Any) -> None:
    """Write a tiny model as a Hugging Face folder, with a tokenizer that does what `tokenizer` does to ASCII."""
    import tokenizers
    import transformers

    vocabulary = {chr(c): c % VOCAB for c in range(32, 32 + VOCAB - 2)} | {"[UNK]": VOCAB - 1}
    by_id = {n: c for c, n in vocabulary.items()}
    splitter = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: n for n, c in by_id.items()}, unk_token="[UNK]"))
    splitter.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=splitter, unk_token="[UNK]").save_pretrained(folder)
    model.network.save_pretrained(folder)
