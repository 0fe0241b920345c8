"""Which shapes do families of decoders with a plain FFN build from the keys of their configurations?

One function a family, or one for several that differ in their defaults only.
"""

from __future__ import annotations

from simmem.spec.huggingface.keys import MAX_COUNT, Keys
from simmem.spec.huggingface.parts import Shapes, biases, decoder, even_heads, sizes, switched_windows, windows

__all__ = [
    "arcee",
    "attention_bias",
    "bloom",
    "cohere",
    "cohere2",
    "ernie",
    "falcon",
    "gemma2",
    "gemma3",
    "glm",
    "glm4",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gptj",
    "llama",
    "ministral",
    "mistral",
    "mpt",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "opt",
    "persimmon",
    "phi",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
]


def llama(c: Keys) -> Shapes:
    attention = c.flag("attention_bias")
    return decoder(c) | biases(qkv=attention, ffn=c.flag("mlp_bias"))


def attention_bias(c: Keys) -> Shapes:
    return decoder(c) | biases(qkv=c.flag("attention_bias"))


def mistral(c: Keys) -> Shapes:
    s = decoder(c)
    return s | windows(c, s["n_layers"])


def ministral(c: Keys) -> Shapes:
    s = decoder(c)
    return s | windows(c, s["n_layers"], lambda _: True)


def qwen2(c: Keys) -> Shapes:
    s = decoder(c)
    dense = c.integer("max_window_layers", least=0)
    return s | biases(qkv=True, output=False) | switched_windows(c, s["n_layers"], lambda i: i >= dense)


def qwen3(c: Keys) -> Shapes:
    s = decoder(c)
    dense = c.integer("max_window_layers", least=0)
    return (s | biases(qkv=c.flag("attention_bias")) | {"qk_norm": True}
            | switched_windows(c, s["n_layers"], lambda i: i >= dense))


def gemma2(c: Keys) -> Shapes:
    s = decoder(c, activation="hidden_activation")
    return (s | biases(qkv=c.flag("attention_bias")) | {"norms_per_layer": 4}
            | windows(c, s["n_layers"], lambda i: i % 2 == 0))


def gemma3(c: Keys) -> Shapes:
    s = decoder(c, activation="hidden_activation")
    pattern = c.integer("sliding_window_pattern")
    c.expect("use_bidirectional_attention", False, None)
    return (s | biases(qkv=c.flag("attention_bias")) | {"norms_per_layer": 4, "qk_norm": True}
            | windows(c, s["n_layers"], lambda i: (i + 1) % pattern != 0))


def phi(c: Keys) -> Shapes:
    return decoder(c) | biases(qkv=True, ffn=True) | {
        "gated": False, "norm": "layernorm", "norms_per_layer": 1, "head_bias": True, "qk_norm": c.flag("qk_layernorm")}


def opt(c: Keys) -> Shapes:
    s = decoder(c, ffn="ffn_dim", activation="activation_function", kv=False, own_head=False)
    c.expect("layer_norm_elementwise_affine", True)
    narrow = c.integer_or_none("word_embed_proj_dim")
    return s | biases(qkv=c.flag("enable_bias"), ffn=c.flag("enable_bias")) | {
        "gated": False, "norm": "layernorm", "learned_position_rows": s["max_positions"] + 2,
        "embedding_dim": None if narrow == s["d_model"] else narrow,
        "final_norm": c.flag("do_layer_norm_before") and not c.flag("_remove_final_layer_norm")}


def gpt2(c: Keys) -> Shapes:
    s = decoder(c, ffn="", activation="activation_function", kv=False, own_head=False)
    c.expect("add_cross_attention", False)
    return s | biases(qkv=True, ffn=True) | {
        "d_ff": c.integer_or_none("n_inner") or 4 * s["d_model"], "gated": False, "norm": "layernorm",
        "learned_position_rows": s["max_positions"]}


def gpt_bigcode(c: Keys) -> Shapes:
    s = gpt2(c)
    return s | ({"n_kv_heads": 1} if c.flag("multi_query") else {})


def gptj(c: Keys) -> Shapes:
    return gpt2(c) | biases(ffn=True) | {"learned_position_rows": 0, "norms_per_layer": 1, "head_bias": True}


def gpt_neox(c: Keys) -> Shapes:
    s = decoder(c, kv=False, own_head=False)
    return s | biases(qkv=c.flag("attention_bias"), ffn=True) | {"gated": False, "norm": "layernorm"}


def bloom(c: Keys) -> Shapes:
    """Without learned positions it has no limit of its own: `seq_length` is what it was trained with."""
    s = sizes(c)
    return s | even_heads(c, s["d_model"]) | biases(qkv=True, ffn=True) | {
        "d_ff": 4 * s["d_model"], "gated": False, "activation": "gelu",
        "max_positions": c.integer("seq_length", most=MAX_COUNT) if c.says("seq_length") else MAX_COUNT,
        "norm": "layernorm", "embedding_norm": True}


def mpt(c: Keys) -> Shapes:
    """Its class ignores `expansion_ratio`, `no_bias` and the kind of attention: those that differ are refused."""
    s = sizes(c)
    c.expect("expansion_ratio", 4)
    c.expect("no_bias", True)
    attention = c.nested("attn_config")
    attention.expect("attn_type", "multihead_attention")
    attention.expect("qk_ln", False)
    return s | even_heads(c, s["d_model"]) | {
        "d_ff": 4 * s["d_model"], "gated": False, "activation": "gelu",
        "max_positions": c.integer("max_seq_len", most=MAX_COUNT), "norm": "layernorm", "norm_bias": False}


def falcon(c: Keys) -> Shapes:
    s = decoder(c, ffn="", activation="activation", kv=False, own_head=False)
    new = c.flag("new_decoder_architecture")
    if new:
        kv = c.integer_or_none("num_kv_heads") or s["n_heads"]
        norms = c.integer_or_none("num_ln_in_parallel_attn") or 2
    else:
        kv = 1 if c.flag("multi_query") else s["n_heads"]
        norms = 1 if c.flag("parallel_attn") else 2
    if norms > 2:
        raise c.error("num_ln_in_parallel_attn", f"found {norms}, expected 1 or 2")
    return s | biases(qkv=c.flag("bias"), ffn=c.flag("bias")) | {
        "n_kv_heads": kv, "norms_per_layer": norms, "gated": False, "norm": "layernorm",
        "d_ff": c.integer_or_none("ffn_hidden_size") or 4 * s["d_model"]}


def persimmon(c: Keys) -> Shapes:
    return decoder(c, kv=False, own_head=False) | biases(qkv=True, ffn=True) | {
        "gated": False, "norm": "layernorm", "qk_norm": c.flag("qk_layernorm")}


def starcoder2(c: Keys) -> Shapes:
    return mistral(c) | biases(qkv=c.flag("use_bias"), ffn=c.flag("use_bias")) | {"gated": False, "norm": "layernorm"}


def stablelm(c: Keys) -> Shapes:
    """Norms on queries and keys (StableLM-2 12B) are one a head and without bias, which cannot be described."""
    c.expect("qk_layernorm", False)
    return decoder(c, own_head=False) | biases(qkv=c.flag("use_qkv_bias"), output=False) | {
        "norm": "layernorm", "norms_per_layer": 1 if c.flag("use_parallel_residual") else 2}


def olmo(c: Keys) -> Shapes:
    """Its norms have no parameters."""
    return attention_bias(c) | {"norm": "layernorm", "norms_per_layer": 0, "final_norm": False}


def olmo2(c: Keys) -> Shapes:
    return attention_bias(c) | {"qk_norm": "wide"}


def olmo3(c: Keys) -> Shapes:
    s = olmo2(c)
    return s | windows(c, s["n_layers"], lambda i: (i + 1) % 4 != 0)


def cohere(c: Keys) -> Shapes:
    return attention_bias(c) | {"norm": "layernorm", "norm_bias": False, "norms_per_layer": 1,
                                 "qk_norm": "wide" if c.flag("use_qk_norm") else False}


def cohere2(c: Keys) -> Shapes:
    s = attention_bias(c)
    pattern = c.integer("sliding_window_pattern")
    return s | {"norm": "layernorm", "norm_bias": False, "norms_per_layer": 1} | windows(
        c, s["n_layers"], lambda i: (i + 1) % pattern != 0)


def glm(c: Keys) -> Shapes:
    return decoder(c) | biases(qkv=c.flag("attention_bias"), output=False)


def glm4(c: Keys) -> Shapes:
    return glm(c) | {"norms_per_layer": 4}


def smollm3(c: Keys) -> Shapes:
    """Windows, where it has them, are in the layers without rotary positions, each k-th."""
    s = llama(c)
    rope = c.integers("no_rope_layers")
    step = c.integer("no_rope_layer_interval")
    if rope is not None and len(rope) != s["n_layers"]:
        raise c.error("no_rope_layers", f"names {len(rope)} layers, the model has {s['n_layers']}")
    return s | switched_windows(c, s["n_layers"], lambda i: not rope[i] if rope is not None else (i + 1) % step == 0)


def nemotron(c: Keys) -> Shapes:
    return llama(c) | {"gated": False, "norm": "layernorm"}


def arcee(c: Keys) -> Shapes:
    return llama(c) | {"gated": False}


def seed_oss(c: Keys) -> Shapes:
    return decoder(c) | biases(qkv=c.flag("attention_bias"), output=c.flag("attention_out_bias"),
                                 ffn=c.flag("mlp_bias"))


def ernie(c: Keys) -> Shapes:
    return decoder(c) | biases(qkv=c.flag("use_bias"), ffn=c.flag("use_bias"))
