"""Which shapes do families with experts, or with a state space, build from the keys of their configurations?

One function a family, or one for several that differ in their defaults only.
"""

from __future__ import annotations

from typing import Any

from simmem.spec.huggingface.dense import attention_bias, ernie, glm, mistral, olmo2
from simmem.spec.huggingface.keys import MAX_COUNT, MAX_LAYERS, Keys
from simmem.spec.huggingface.parts import (
    Shapes,
    all_experts,
    biases,
    chosen,
    decoder,
    even_heads,
    mixture,
    sizes,
    switched_windows,
    windows,
)

__all__ = [
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "llama4",
    "mamba",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
]


def mixtral(c: Keys) -> Shapes:
    s = mistral(c)
    return s | all_experts(c, s["n_layers"], d_expert=s["d_ff"])


def _qwen_experts(c: Keys, n_layers: int, **shared: Any) -> Shapes:
    step, plain = c.integer("decoder_sparse_step"), set(c.integers("mlp_only_layers") or ())
    return mixture(c, (i for i in range(n_layers) if (i + 1) % step == 0 and i not in plain), n_layers,
                   key="mlp_only_layers", d_expert=c.integer("moe_intermediate_size"), **chosen(c), **shared)


def qwen2_moe(c: Keys) -> Shapes:
    s = decoder(c)
    dense = c.integer("max_window_layers", least=0)
    return (s | biases(qkv=c.flag("qkv_bias"), output=False)
            | switched_windows(c, s["n_layers"], lambda i: i % 2 == 0 and i < dense)
            | _qwen_experts(c, s["n_layers"], d_shared=c.integer("shared_expert_intermediate_size"),
                            shared_gate=True))


def qwen3_moe(c: Keys) -> Shapes:
    s = decoder(c)
    return (s | biases(qkv=c.flag("attention_bias")) | {"qk_norm": True} | switched_windows(c, s["n_layers"], None)
            | _qwen_experts(c, s["n_layers"]))


def phimoe(c: Keys) -> Shapes:
    s = mistral(c)
    return (s | biases(qkv=c.flag("attention_bias")) | {"norm": "layernorm", "head_bias": c.flag("lm_head_bias")}
            | all_experts(c, s["n_layers"], d_expert=s["d_ff"]))


def olmoe(c: Keys) -> Shapes:
    s = olmo2(c)
    return s | all_experts(c, s["n_layers"], d_expert=s["d_ff"])


def granitemoe(c: Keys) -> Shapes:
    s = attention_bias(c)
    return s | all_experts(c, s["n_layers"], d_expert=s["d_ff"])


def _deepseek_experts(c: Keys, n_layers: int, **different: Any) -> Shapes:
    """Plain layers first, then experts with shared ones beside them; the layers that predict further tokens
    (`num_nextn_predict_layers`) take no part in plain decoding and are left out, as transformers does."""
    c.expect("moe_layer_freq", 1)
    d_expert = c.integer("moe_intermediate_size")
    shared = c.integer_or_none("n_shared_experts", least=0) or 0
    first = c.integer("first_k_dense_replace", least=0, most=MAX_LAYERS)
    return mixture(c, range(first, n_layers), n_layers, d_expert=d_expert, d_shared=shared * d_expert, **chosen(c),
                   **different)


def _latent(c: Keys) -> Shapes:
    rope, nope = c.integer("qk_rope_head_dim"), c.integer("qk_nope_head_dim")
    s = decoder(c, kv=False, d_head=nope + rope)
    return s | biases(qkv=c.flag("attention_bias")) | {
        "latent_attention": {"q_rank": c.integer_or_none("q_lora_rank"), "kv_rank": c.integer("kv_lora_rank"),
                             "d_rope": rope, "d_nope": nope, "d_value": c.integer("v_head_dim")}}


def deepseek_v2(c: Keys) -> Shapes:
    s = _latent(c)
    return s | {"ffn_bias": c.flag("mlp_bias")} | _deepseek_experts(c, s["n_layers"])


def deepseek_v3(c: Keys) -> Shapes:
    s = _latent(c)
    return s | _deepseek_experts(c, s["n_layers"], router_bias=True)


def glm4_moe(c: Keys) -> Shapes:
    s = glm(c)
    return s | {"qk_norm": c.flag("use_qk_norm")} | _deepseek_experts(c, s["n_layers"], router_bias=True)


def dots1(c: Keys) -> Shapes:
    s = attention_bias(c)
    dense = c.integer("max_window_layers", least=0)
    return (s | {"qk_norm": True} | windows(c, s["n_layers"], lambda i: i >= dense)
            | _deepseek_experts(c, s["n_layers"], router_bias=True))


def gpt_oss(c: Keys) -> Shapes:
    s = attention_bias(c)
    return (s | {"sinks": True} | windows(c, s["n_layers"], lambda i: i % 2 == 0)
            | all_experts(c, s["n_layers"], d_expert=s["d_ff"], router_bias=True, bias=True))


def ernie_moe(c: Keys) -> Shapes:
    s = ernie(c)
    n, step, d_expert = s["n_layers"], c.integer("moe_layer_interval"), c.integer("moe_intermediate_size")
    first, last = c.integer("moe_layer_start_index", least=0), c.integer("moe_layer_end_index", least=-1)
    where = [i for i in range(n) if (i + 1) % step == 0 and first <= i <= (n - 1 if last == -1 else last)]
    return s | {"head_bias": c.flag("use_bias")} | mixture(
        c, where, n, key="moe_layer_end_index", d_expert=d_expert, router_bias=True,
        d_shared=d_expert * c.integer("moe_num_shared_experts", least=0), **chosen(c))


def minimax_m2(c: Keys) -> Shapes:
    s = decoder(c)
    return s | {"qk_norm": "wide"} | all_experts(c, s["n_layers"], d_expert=s["d_ff"], router_bias=True)


def dbrx(c: Keys) -> Shapes:
    s = sizes(c)
    attention = c.nested("attn_config", defaults={"kv_n_heads": 1})
    ffn = c.nested("ffn_config", defaults={"ffn_hidden_size": 3584, "moe_num_experts": 4, "moe_top_k": 1})
    activation = ffn.nested("ffn_act_fn", defaults={"name": "silu"}).word("name")
    return s | even_heads(c, s["d_model"]) | {
        "n_kv_heads": attention.integer("kv_n_heads"), "d_ff": 0, "gated": True, "activation": activation,
        "max_positions": c.integer("max_position_embeddings", most=MAX_COUNT), "norm": "layernorm",
        "norm_bias": False} | mixture(
        c, range(s["n_layers"]), s["n_layers"], count=ffn.integer("moe_num_experts", most=100_000),
        per_token=ffn.integer("moe_top_k"), d_expert=ffn.integer("ffn_hidden_size"))


def llama4(c: Keys) -> Shapes:
    """Layers with rotary positions attend within chunks, taken as windows of a chunk's length: what the cache of
    such a layer holds at most. Norms on queries and keys have no parameters."""
    s = decoder(c) | biases(qkv=c.flag("attention_bias"))
    n, step, rope = s["n_layers"], c.integer("no_rope_layer_interval"), c.integers("no_rope_layers")
    if rope and len(rope) != n:
        raise c.error("no_rope_layers", f"names {len(rope)} layers, the model has {n}")
    every, layers = c.integer("interleave_moe_layer_step"), c.integers("moe_layers")
    d_expert = s["d_ff"]
    return (s | {"d_ff": c.integer("intermediate_size_mlp")}
            | windows(c, n, lambda i: bool(rope[i]) if rope else (i + 1) % step != 0, key="attention_chunk_size",
                      kinds=("chunked_attention",))
            | mixture(c, sorted(set(range(every - 1, n, every) if layers is None else layers)), n, key="moe_layers",
                      d_expert=d_expert, d_shared=d_expert, **chosen(c)))


def mamba(c: Keys) -> Shapes:
    s = sizes(c)
    d_inner = c.integer("expand", most=1000) * s["d_model"]
    return s | {"n_heads": 0, "n_kv_heads": 0, "d_head": 0, "d_ff": 0, "gated": False, "norm": "rmsnorm",
                "norms_per_layer": 1, "activation": c.word("hidden_act"), "max_positions": MAX_COUNT,
                "state_space": {"d_inner": d_inner, "d_state": c.integer("state_size"),
                                "d_conv": c.integer("conv_kernel"),
                                "dt_rank": c.integer_or_word("time_step_rank", "auto") or -(-s["d_model"] // 16),
                                "conv_bias": c.flag("use_conv_bias"), "projection_bias": c.flag("use_bias")}}
