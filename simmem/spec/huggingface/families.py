"""Which keys does each family's configuration have, under which names and with which defaults?

One entry per `model_type`. The defaults are those of the family's configuration class in transformers,
because a file may leave out what equals them. A family is here only if every tensor group has exactly
the parameters of the torch module, which the tests check with several configurations of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from simmem.spec.huggingface import dense, mixtures
from simmem.spec.huggingface.keys import Keys

__all__ = ["FAMILIES", "WRAPPERS", "Family"]


@dataclass(frozen=True)
class Family:
    """How the configurations of one `model_type` are read."""

    shapes: Callable[[Keys], dict[str, Any]]
    """From checked keys to the fields of an `Architecture`."""
    defaults: Mapping[str, Any]
    """What the configuration class takes for a key that a file leaves out, by common names."""
    spellings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """common name of a key -> this family's own words for it."""


def _sizes(vocab: int, width: int, layers: int, heads: int, ffn: int, positions: int, *, tied: bool = False,
           act: str = "silu", kv: int | None = None, head: int | None = None, **more: Any) -> dict[str, Any]:
    """The defaults that nearly all classes have, by the names that most of them use."""
    return {"vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "intermediate_size": ffn, "max_position_embeddings": positions, "tie_word_embeddings": tied,
            "hidden_act": act, "num_key_value_heads": kv, "head_dim": head, **more}


_NO_BIAS = {"attention_bias": False, "mlp_bias": False}
_GPT2_WORDS = {"hidden_size": ("n_embd",), "num_hidden_layers": ("n_layer",), "num_attention_heads": ("n_head",),
               "max_position_embeddings": ("n_positions",)}
_ROUTED = {"num_local_experts": ("n_routed_experts",)}
_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096}
_BY_LAYER = {"layer_types": None}


def _gpt2_sizes(vocab: int, width: int, layers: int, heads: int, positions: int, *, tied: bool,
                act: str = "gelu_new") -> dict[str, Any]:
    return {"vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "max_position_embeddings": positions, "n_inner": None, "activation_function": act,
            "tie_word_embeddings": tied}


def _gemma_sizes(vocab: int, width: int, layers: int, heads: int, ffn: int, positions: int, *, kv: int,
                 **more: Any) -> dict[str, Any]:
    sizes = _sizes(vocab, width, layers, heads, ffn, positions, kv=kv, head=256, tied=True, attention_bias=False,
                   sliding_window=4096, hidden_activation="gelu_pytorch_tanh", **more) | _BY_LAYER
    del sizes["hidden_act"]
    return sizes


FAMILIES: Mapping[str, Family] = {
    # Plain FFN, biases and LayerNorm: the line of GPT.
    "opt": Family(dense.opt, {
        "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072,
        "max_position_embeddings": 2048, "tie_word_embeddings": True, "activation_function": "relu",
        "word_embed_proj_dim": None, "enable_bias": True, "do_layer_norm_before": True,
        "_remove_final_layer_norm": False}),
    "gpt2": Family(dense.gpt2, _gpt2_sizes(50257, 768, 12, 12, 1024, tied=True), _GPT2_WORDS),
    "gpt_bigcode": Family(dense.gpt_bigcode, _gpt2_sizes(50257, 768, 12, 12, 1024, tied=True, act="gelu_pytorch_tanh")
                          | {"multi_query": True}, _GPT2_WORDS),
    "gptj": Family(dense.gptj, _gpt2_sizes(50400, 4096, 28, 16, 2048, tied=False), _GPT2_WORDS),
    "codegen": Family(dense.gptj, _gpt2_sizes(50400, 4096, 28, 16, 2048, tied=False), _GPT2_WORDS),
    "gpt_neox": Family(dense.gpt_neox, _sizes(50432, 6144, 44, 64, 24576, 2048, act="gelu", attention_bias=True)),
    "bloom": Family(dense.bloom, {
        "vocab_size": 250880, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
        "tie_word_embeddings": True},
        {"hidden_size": ("n_embed",), "num_hidden_layers": ("n_layer",), "num_attention_heads": ("n_head",)}),
    "mpt": Family(dense.mpt, {
        "vocab_size": 50368, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
        "max_seq_len": 2048, "tie_word_embeddings": True},
        {"hidden_size": ("d_model",), "num_hidden_layers": ("n_layers",), "num_attention_heads": ("n_heads",)}),
    "falcon": Family(dense.falcon, {
        "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
        "num_kv_heads": None, "max_position_embeddings": 2048, "ffn_hidden_size": None, "activation": "gelu",
        "tie_word_embeddings": True, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True,
        "num_ln_in_parallel_attn": None, "bias": False}, {"hidden_size": ("n_embed",)}),
    "persimmon": Family(dense.persimmon, _sizes(262144, 4096, 36, 64, 16384, 16384, act="relu2", qk_layernorm=True)),
    "phi": Family(dense.phi, _sizes(51200, 2048, 24, 32, 8192, 2048, act="gelu_new", qk_layernorm=False)),
    "starcoder2": Family(dense.starcoder2, _sizes(
        49152, 3072, 30, 24, 12288, 4096, act="gelu_pytorch_tanh", kv=2, tied=True, use_bias=True,
        sliding_window=None)),
    "stablelm": Family(dense.stablelm, _sizes(50304, 2560, 32, 32, 6912, 4096, kv=32, use_qkv_bias=False,
                                              use_parallel_residual=False)),
    "nemotron": Family(dense.nemotron, _sizes(256000, 6144, 32, 48, 24576, 4096, act="relu2") | _NO_BIAS),

    # Gated FFN and RMS norms: the line of Llama.
    "llama": Family(dense.llama, _sizes(32000, 4096, 32, 32, 11008, 2048) | _NO_BIAS),
    "arcee": Family(dense.arcee, _sizes(32000, 2560, 32, 32, 18432, 4096, act="relu2") | _NO_BIAS),
    "mistral": Family(dense.mistral, _sizes(32000, 4096, 32, 32, 14336, 131072, kv=8, sliding_window=4096)),
    "ministral": Family(dense.ministral, _sizes(32000, 4096, 32, 32, 14336, 131072, kv=8, sliding_window=4096)
                        | _BY_LAYER),
    "qwen2": Family(dense.qwen2, _sizes(151936, 4096, 32, 32, 22016, 32768, kv=32, max_window_layers=28)
                    | _QWEN_WINDOW | _BY_LAYER),
    "qwen3": Family(dense.qwen3, _sizes(151936, 4096, 32, 32, 22016, 32768, kv=32, head=128, max_window_layers=28,
                                        attention_bias=False) | _QWEN_WINDOW | _BY_LAYER),
    "gemma": Family(dense.attention_bias, _sizes(256000, 3072, 28, 16, 24576, 8192, kv=16, head=256, tied=True,
                                                 act="gelu_pytorch_tanh", attention_bias=False)),
    "gemma2": Family(dense.gemma2, _gemma_sizes(256000, 2304, 26, 8, 9216, 8192, kv=4)),
    "gemma3_text": Family(dense.gemma3, _gemma_sizes(262208, 2304, 26, 8, 9216, 131072, kv=4,
                                                     sliding_window_pattern=6)),
    "phi3": Family(dense.mistral, _sizes(32064, 3072, 32, 32, 8192, 4096, sliding_window=None)),
    "olmo": Family(dense.olmo, _sizes(50304, 4096, 32, 32, 11008, 2048, attention_bias=False)),
    "olmo2": Family(dense.olmo2, _sizes(50304, 4096, 32, 32, 11008, 2048, attention_bias=False)),
    "olmo3": Family(dense.olmo3, _sizes(50304, 4096, 32, 32, 11008, 2048, attention_bias=False, sliding_window=4096)
                    | _BY_LAYER),
    "cohere": Family(dense.cohere, _sizes(256000, 8192, 40, 64, 22528, 8192, tied=True, attention_bias=False,
                                          use_qk_norm=False)),
    "cohere2": Family(dense.cohere2, _sizes(256000, 8192, 40, 64, 22528, 8192, tied=True, attention_bias=False,
                                            sliding_window=4096, sliding_window_pattern=4) | _BY_LAYER),
    "granite": Family(dense.llama, _sizes(32000, 4096, 32, 32, 11008, 2048) | _NO_BIAS),
    "glm": Family(dense.glm, _sizes(151552, 4096, 40, 32, 13696, 131072, kv=2, head=128, attention_bias=True)),
    "glm4": Family(dense.glm4, _sizes(151552, 4096, 40, 32, 13696, 131072, kv=2, head=128, attention_bias=True)),
    "smollm3": Family(dense.smollm3, _sizes(
        128256, 2048, 36, 16, 11008, 32768, kv=4, tied=True, use_sliding_window=False, sliding_window=None,
        no_rope_layers=None, no_rope_layer_interval=4) | _NO_BIAS | _BY_LAYER),
    "seed_oss": Family(dense.seed_oss, _sizes(155136, 4096, 64, 80, 27648, 524288, kv=8, head=128, attention_bias=True,
                                              attention_out_bias=False, mlp_bias=False)),
    "ernie4_5": Family(dense.ernie, _sizes(103424, 1024, 18, 16, 3072, 131072, kv=2, head=128, tied=True,
                                           use_bias=False)),

    # Experts.
    "mixtral": Family(mixtures.mixtral, _sizes(32000, 4096, 32, 32, 14336, 131072, kv=8, sliding_window=None,
                                               num_local_experts=8, num_experts_per_tok=2),
                      {"num_local_experts": ("num_experts",)}),
    "phimoe": Family(mixtures.phimoe, _sizes(32064, 4096, 32, 32, 6400, 131072, kv=8, sliding_window=None,
                                             num_local_experts=16, num_experts_per_tok=2, attention_bias=False,
                                             lm_head_bias=False)),
    "qwen2_moe": Family(mixtures.qwen2_moe, _sizes(
        151936, 2048, 24, 16, 5632, 32768, kv=16, max_window_layers=28, num_local_experts=60, num_experts_per_tok=4,
        moe_intermediate_size=1408, shared_expert_intermediate_size=5632, decoder_sparse_step=1, mlp_only_layers=None,
        qkv_bias=True) | _QWEN_WINDOW | _BY_LAYER, {"num_local_experts": ("num_experts",)}),
    "qwen3_moe": Family(mixtures.qwen3_moe, _sizes(
        151936, 2048, 24, 32, 6144, 32768, kv=4, num_local_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, decoder_sparse_step=1, mlp_only_layers=None, attention_bias=False) | _QWEN_WINDOW,
        {"num_local_experts": ("num_experts",)}),
    "olmoe": Family(mixtures.olmoe, _sizes(50304, 2048, 16, 16, 2048, 4096, attention_bias=False, num_local_experts=64,
                                           num_experts_per_tok=8), {"num_local_experts": ("num_experts",)}),
    "granitemoe": Family(mixtures.granitemoe, _sizes(32000, 4096, 32, 32, 11008, 2048, attention_bias=False,
                                                     num_local_experts=8, num_experts_per_tok=2)),
    "minimax_m2": Family(mixtures.minimax_m2, _sizes(200064, 3072, 62, 48, 1536, 196608, kv=8, head=128,
                                                     num_local_experts=256, num_experts_per_tok=8),
                         {"num_local_experts": ("num_experts",)}),
    "gpt_oss": Family(mixtures.gpt_oss, _sizes(201088, 2880, 36, 64, 2880, 131072, kv=8, head=64, sliding_window=128,
                                               attention_bias=True, num_local_experts=128, num_experts_per_tok=4)
                      | _BY_LAYER, {"num_local_experts": ("num_experts",)}),
    "dbrx": Family(mixtures.dbrx, {
        "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
        "max_position_embeddings": 2048, "tie_word_embeddings": False},
        {"hidden_size": ("d_model",), "num_hidden_layers": ("n_layers",), "num_attention_heads": ("n_heads",),
         "max_position_embeddings": ("max_seq_len",)}),
    "llama4_text": Family(mixtures.llama4, _sizes(
        202048, 5120, 48, 40, 8192, 131072, kv=8, head=128, intermediate_size_mlp=16384, num_local_experts=16,
        num_experts_per_tok=1, interleave_moe_layer_step=1, moe_layers=None, no_rope_layers=None,
        no_rope_layer_interval=4, attention_chunk_size=8192, attention_bias=False) | _BY_LAYER),
    "ernie4_5_moe": Family(mixtures.ernie_moe, _sizes(
        103424, 2560, 28, 20, 12288, 131072, kv=4, tied=True, use_bias=False, moe_intermediate_size=1536,
        num_local_experts=64, num_experts_per_tok=6, moe_num_shared_experts=2, moe_layer_start_index=1,
        moe_layer_end_index=-1, moe_layer_interval=1),
        {"num_local_experts": ("moe_num_experts",), "num_experts_per_tok": ("moe_k",)}),
    "glm4_moe": Family(mixtures.glm4_moe, _sizes(
        151552, 4096, 46, 96, 10944, 131072, kv=8, attention_bias=False, use_qk_norm=False, num_local_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=1408, n_shared_experts=1, first_k_dense_replace=1), _ROUTED),
    "dots1": Family(mixtures.dots1, _sizes(
        152064, 4608, 62, 32, 10944, 2048, kv=32, attention_bias=False, sliding_window=4096, max_window_layers=62,
        num_local_experts=None, num_experts_per_tok=None, moe_intermediate_size=1408, n_shared_experts=None,
        first_k_dense_replace=0) | _BY_LAYER, _ROUTED),
    "deepseek_v2": Family(mixtures.deepseek_v2, _sizes(
        102400, 4096, 32, 32, 11008, 2048, q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64,
        qk_nope_head_dim=128, v_head_dim=128, num_local_experts=64, num_experts_per_tok=None,
        moe_intermediate_size=1407, n_shared_experts=2, first_k_dense_replace=0) | _NO_BIAS, _ROUTED),
    "deepseek_v3": Family(mixtures.deepseek_v3, _sizes(
        129280, 7168, 61, 128, 18432, 4096, kv=128, attention_bias=False, q_lora_rank=1536, kv_lora_rank=512,
        qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, num_local_experts=256, num_experts_per_tok=8,
        moe_intermediate_size=2048, n_shared_experts=1, first_k_dense_replace=3), _ROUTED),
    # The same shapes under another name, with a class outside transformers: its files say everything.
    "kimi_k2": Family(mixtures.deepseek_v3, {}, _ROUTED),

    # State spaces.
    "mamba": Family(mixtures.mamba, {
        "vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32, "state_size": 16, "expand": 2,
        "conv_kernel": 4, "time_step_rank": "auto", "use_conv_bias": True, "use_bias": False, "hidden_act": "silu",
        "tie_word_embeddings": True}),
    "falcon_mamba": Family(mixtures.mamba, {
        "vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32, "state_size": 16, "expand": 2,
        "conv_kernel": 4, "time_step_rank": "auto", "use_conv_bias": True, "use_bias": False, "hidden_act": "silu",
        "tie_word_embeddings": True}),
}

WRAPPERS: Mapping[str, str] = {"gemma3": "gemma3_text", "llama4": "llama4_text"}
"""Models that see as well as read: model_type -> that of the decoder under `text_config`."""
