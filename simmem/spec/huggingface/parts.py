"""Which parts do the configurations of many families have in common: sizes, biases, windows, experts?

Each function turns checked keys into some fields of an `Architecture`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from simmem.spec.huggingface.keys import MAX_COUNT, MAX_LAYERS, Keys

__all__ = [
    "Shapes",
    "all_experts",
    "biases",
    "chosen",
    "decoder",
    "even_heads",
    "mixture",
    "sizes",
    "switched_windows",
    "windows",
]

Shapes = dict[str, Any]
"""Fields of an `Architecture`."""


def sizes(c: Keys) -> Shapes:
    """Width, depth, vocabulary, and whether the head is the embedding's matrix."""
    return {"d_model": c.integer("hidden_size"),
            "n_layers": c.integer("num_hidden_layers", most=MAX_LAYERS),
            "vocab": c.integer("vocab_size", most=100_000_000),
            "tied_head": c.flag("tie_word_embeddings")}


def even_heads(c: Keys, d_model: int) -> Shapes:
    """As many keys and values as queries, which share the width among them."""
    heads = c.integer("num_attention_heads")
    if d_model % heads:
        raise c.error("num_attention_heads", f"found {heads}, expected a divisor of the hidden size {d_model}")
    return {"n_heads": heads, "n_kv_heads": heads, "d_head": d_model // heads}


def decoder(c: Keys, *, ffn: str = "intermediate_size", activation: str = "hidden_act", kv: bool = True,
            own_head: bool = True, d_head: int | None = None) -> Shapes:
    """A gated decoder with RMS norms and no biases, as Llama, which families then change.

    `ffn`, `activation`: their keys (none: the caller knows); `kv`: the class reads `num_key_value_heads`; `own_head`:
    it reads `head_dim`; `d_head`: known already.
    """
    s = sizes(c)
    d_head = d_head or (c.integer_or_none("head_dim") if own_head else None)
    if d_head is None:
        s |= even_heads(c, s["d_model"])
    else:
        s |= {"n_heads": c.integer("num_attention_heads"), "d_head": d_head}
    return s | {"n_kv_heads": (c.integer_or_none("num_key_value_heads") if kv else None) or s["n_heads"],
                "d_ff": c.integer(ffn) if ffn else 0,
                "max_positions": c.integer("max_position_embeddings", most=MAX_COUNT), "gated": True,
                "activation": c.word(activation), "norm": "rmsnorm"}


def biases(*, qkv: bool = False, output: bool | None = None, ffn: bool = False) -> Shapes:
    """Which matrices have biases; the output of attention as its inputs where not said."""
    return {"qkv_bias": qkv, "attention_output_bias": qkv if output is None else output, "ffn_bias": ffn}


def windows(c: Keys, n_layers: int, sliding: Callable[[int], bool] | None = None, *, key: str = "sliding_window",
            kinds: tuple[str, ...] = ("sliding_attention",)) -> Shapes:
    """Layers with a window: all, or those of `layer_types`, or (where the file has none) those `sliding` picks."""
    window = c.integer_or_none(key, most=MAX_COUNT)
    count = n_layers
    if sliding is not None:
        types = c.words("layer_types")
        if types is None:
            count = sum(map(sliding, range(n_layers)))
        else:
            if len(types) != n_layers:
                raise c.error("layer_types", f"names {len(types)} layers, the model has {n_layers}")
            other = sorted(set(types) - {"full_attention", *kinds})
            if other:
                raise c.error("layer_types",
                              f"found {other[0][:40]!r}, expected full_attention or {' or '.join(kinds)}")
            count = n_layers - types.count("full_attention")
    return {"window": window, "n_window_layers": count} if window and count else {}


def mixture(c: Keys, layers: Iterable[int], n_layers: int, *, key: str = "num_hidden_layers", **shape: Any) -> Shapes:
    """A mixture of experts in these layers, which have to be every k-th from a first one on; `key` chose them."""
    where = list(layers)
    if not where:
        return {}
    first = where[0]
    every = where[1] - first if len(where) > 1 else max(n_layers - first, 1)
    if where != list(range(first, n_layers, every)):
        raise c.error(key, f"{len(where)} of {n_layers} layers have experts, and not each k-th from a first one on: "
                           "that cannot be described")
    found: Shapes = {"experts": {"first_layer": first, "every": every, **shape}}
    return found | ({"d_ff": 0} if len(where) == n_layers else {})  # then no layer has a plain FFN


def all_experts(c: Keys, n_layers: int, **different: Any) -> Shapes:
    """Experts in every layer, as Mixtral; `intermediate_size` is theirs."""
    return mixture(c, range(n_layers), n_layers, **chosen(c), **different)


def chosen(c: Keys) -> Shapes:
    """How many experts a layer has, and how many of them a token uses."""
    return {"count": c.integer("num_local_experts", most=100_000), "per_token": c.integer("num_experts_per_tok")}


def switched_windows(c: Keys, n_layers: int, sliding: Callable[[int], bool] | None) -> Shapes:
    """Windows that have a switch of their own, as Qwen's."""
    return windows(c, n_layers, sliding) if c.flag("use_sliding_window") else {}
