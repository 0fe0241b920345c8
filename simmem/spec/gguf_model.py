"""Which model does a GGUF file hold, and how many bytes does each of its parts take there?

Shapes come from the tensor table; the metadata add what no tensor shows (heads, experts per token, context). The
architecture so found must have exactly the parameters that the table has, group by group: a file that simmem does
not understand is refused, never guessed at. Names are those of llama.cpp (gguf-py, constants.py).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simmem.errors import SpecError
from simmem.spec.base import validate
from simmem.spec.gguf import GgufFile, GgufTensor, read_gguf
from simmem.spec.model import Model

__all__ = ["model_from_gguf"]

_TENSOR = re.compile(r"(?:blk\.\d{1,6}\.)?(?P<base>[a-z0-9_]+?)(?:\.(?P<expert>\d{1,5}))?"
                     r"(?:\.(?P<what>weight|bias))?")
_NORMS = ("attn_norm", "attn_norm_2", "ffn_norm", "post_attention_norm", "post_ffw_norm", "attn_output_norm",
          "layer_output_norm")
_CONSTANTS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
"""Tables that follow from the configuration: they are read, but are no parameters."""
_FULL_EVERY = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4}
"""Architectures whose every n-th layer attends to everything while the others have the window; llama.cpp has
these patterns in its code, not in its files."""


class _Table:
    """Tensors of a file by their place in the model."""

    def __init__(self, file: GgufFile, n_layers: int, path: Path) -> None:
        self.path = path
        self.tensors: dict[tuple[int | None, str, str], GgufTensor] = {}
        """(layer, name without it, "weight" or "bias"); of experts that are kept apart, the first."""
        self.matrix: dict[str, int] = defaultdict(int)
        self.vector: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, float] = defaultdict(float)
        for tensor in file.tensors:
            of_layer = re.match(r"blk\.(\d{1,6})\.", tensor.name)
            layer = int(of_layer[1]) if of_layer else None
            if layer is not None and layer >= n_layers:
                continue  # layers that guess further tokens are no part of decoding
            match = _TENSOR.fullmatch(tensor.name)
            group = _group(match, layer) if match else None
            if match is None or group is None:
                raise SpecError("is a tensor simmem has no place for: the model is not a decoder of a known kind",
                                file=str(path), key=tensor.name)
            self.bytes[group] += tensor.n_bytes
            if match["base"] in _CONSTANTS:
                continue
            what = match["what"] or "weight"
            flat = len(tensor.shape) == 1 or what == "bias"
            (self.vector if flat else self.matrix)[group] += tensor.n_params
            self.tensors.setdefault((layer, match["base"], what), tensor)

    def shape(self, layer: int | None, base: str) -> tuple[int, ...] | None:
        tensor = self.tensors.get((layer, base, "weight"))
        return tensor.shape if tensor else None

    def has(self, layer: int | None, base: str, what: str = "weight") -> bool:
        return (layer, base, what) in self.tensors

    def need(self, layer: int | None, base: str) -> tuple[int, ...]:
        """Shape of a matrix that must be there, inputs first."""
        shape = self.shape(layer, base)
        if shape is None or len(shape) < 2:
            name = f"blk.{layer}.{base}.weight" if layer is not None else f"{base}.weight"
            found = "nothing" if shape is None else f"a vector of {shape[0]}"
            raise SpecError(f"found {found}, expected a matrix", file=str(self.path), key=name)
        return shape


def _group(match: re.Match[str], layer: int | None) -> str | None:
    base = match["base"]
    if layer is None:
        return {"token_embd": "embedding", "position_embd": "positions", "output": "head", "output_norm": "norms",
                "token_embd_norm": "norms", **dict.fromkeys(_CONSTANTS, "norms")}.get(base)
    if base in _NORMS or base in _CONSTANTS:
        return "norms"
    if base in ("ffn_gate_inp", "exp_probs_b"):
        return "router"
    if base in ("ffn_up", "ffn_gate", "ffn_down"):
        return "experts" if match["expert"] else "ffn"
    if base in ("ffn_up_shexp", "ffn_gate_shexp", "ffn_down_shexp", "ffn_gate_inp_shexp"):
        return "ffn"
    if base in ("ffn_up_exps", "ffn_gate_exps", "ffn_gate_up_exps", "ffn_down_exps"):
        return "experts"
    if base.startswith("attn_"):
        return "attention"
    return "state-space" if base.startswith("ssm_") else None


def model_from_gguf(path: Path) -> Model:
    """The model in a GGUF file, with the bytes of each tensor group there (precision `file`).

    Raises
    ------
    SpecError
        The file is damaged, lacks what describes a decoder, or holds parameters that its description does not explain.
    """
    file = read_gguf(path)
    read = _Metadata(file.metadata, path)
    n_layers = read.count("block_count") - read.count("nextn_predict_layers", default=0)
    if n_layers < 1:
        raise SpecError(f"found {n_layers} layers, expected at least 1", file=str(path), key=read.key("block_count"))
    table = _Table(file, n_layers, path)
    d_model, vocab = table.need(None, "token_embd")[:2]
    norms = [base for base in _NORMS if table.has(0, base)]
    gated = any(table.has(layer, base) for layer in (0, n_layers - 1)
                for base in ("ffn_gate", "ffn_gate_exps", "ffn_gate_up_exps", "ffn_gate_shexp"))
    architecture: dict[str, Any] = {
        "d_model": d_model, "n_layers": n_layers, "vocab": vocab, "max_positions": read.count("context_length"),
        "activation": "not in the file", "norm": "layernorm" if table.has(None, "output_norm", "bias") or any(
            table.has(0, base, "bias") for base in norms) else "rmsnorm",
        "norms_per_layer": len(norms), "final_norm": table.has(None, "output_norm"),
        "embedding_norm": table.has(None, "token_embd_norm"), "tied_head": not table.has(None, "output"),
        "head_bias": table.has(None, "output", "bias"), "gated": gated,
        "ffn_bias": any(table.has(layer, "ffn_down", "bias") for layer in (0, n_layers - 1)),
    }
    if not any(table.has(None, base, "bias") or table.has(0, base, "bias") for base in ("output_norm", *norms)) \
            and read.has("attention.layer_norm_epsilon"):
        architecture.update(norm="layernorm", norm_bias=False)
    positions = table.shape(None, "position_embd")
    if positions:
        architecture["learned_position_rows"] = positions[-1]
    architecture.update(_state_space(table) if table.has(0, "ssm_in") else _attention(table, read, n_layers))
    architecture.update(_ffn(table, read, n_layers))
    title = file.metadata.get("general.name")
    printable = title if isinstance(title, str) and title.isprintable() and 0 < len(title) <= 100 else path.stem
    model = validate(Model, {
        "schema": "simmem.model/1", "name": path.stem, "title": printable, "family": read.architecture,
        "source": f"GGUF file {path.name}", "architecture": architecture}, file=str(path))
    _check_counts(model, table)
    return validate(Model, {**model.model_dump(by_alias=True), "file_bytes": {
        g.name: table.bytes[g.name] for g in model.groups()}}, file=str(path))


def _check_counts(model: Model, table: _Table) -> None:
    expected = {g.name: (g.matrix_params, g.vector_params) for g in model.groups()}
    names = set(expected) | {name for name in (*table.matrix, *table.vector) if table.matrix[name] + table.vector[name]}
    for name in sorted(names):
        found = table.matrix[name], table.vector[name]
        if found != expected.get(name, (0, 0)):
            want = expected.get(name, (0, 0))
            raise SpecError(f"holds {found[0]} + {found[1]} parameters (matrices + vectors) in {name}, its description "
                            f"explains {want[0]} + {want[1]}: a kind of model simmem does not know",
                            file=str(table.path), key=f"{model.family}.{name}")


def _state_space(table: _Table) -> dict[str, Any]:
    conv, inner = table.need(0, "ssm_conv1d")[:2]
    rank, state = table.need(0, "ssm_dt")[0], table.need(0, "ssm_a")[0]
    return {"n_heads": 0, "n_kv_heads": 0, "d_head": 0, "state_space": {
        "d_inner": inner, "d_state": state, "d_conv": conv, "dt_rank": rank,
        "conv_bias": table.has(0, "ssm_conv1d", "bias"), "projection_bias": table.has(0, "ssm_in", "bias")}}


def _attention(table: _Table, read: _Metadata, n_layers: int) -> dict[str, Any]:
    heads = read.count("attention.head_count")
    if heads < 1:
        raise SpecError(f"found {heads} heads, expected at least 1", file=str(table.path),
                        key=read.key("attention.head_count"))
    found: dict[str, Any] = {
        "n_heads": heads, "sinks": table.has(0, "attn_sinks"),
        "attention_output_bias": table.has(0, "attn_output", "bias"),
        "qkv_bias": any(table.has(0, base, "bias") for base in ("attn_q", "attn_qkv", "attn_q_a"))}
    if table.has(0, "attn_kv_a_mqa"):
        rope, q_a = read.count("rope.dimension_count"), table.shape(0, "attn_q_a")
        kv_rank = table.need(0, "attn_kv_a_mqa")[1] - rope
        query = table.need(0, "attn_q_b" if q_a else "attn_q")[1] // heads
        return {**found, "n_kv_heads": heads, "d_head": query, "latent_attention": {
            "q_rank": q_a[1] if q_a else None, "kv_rank": kv_rank, "d_rope": rope, "d_nope": query - rope,
            "d_value": table.need(0, "attn_output")[0] // heads}}
    head = read.count("attention.key_length", default=0) or table.need(0, "attn_output")[0] // heads
    norm = table.shape(0, "attn_q_norm")
    if norm:  # one for all heads, or one as wide as the projection
        found["qk_norm"] = True if norm == (head,) else "wide"
    found.update(n_kv_heads=read.count("attention.head_count_kv", default=heads), d_head=head)
    window = read.count("attention.sliding_window", default=0)
    every = _FULL_EVERY.get(read.architecture)
    if window and every and n_layers > n_layers // every:
        found.update(window=window, n_window_layers=n_layers - n_layers // every)
    return found


def _ffn(table: _Table, read: _Metadata, n_layers: int) -> dict[str, Any]:
    routed = [layer for layer in range(n_layers) if table.has(layer, "ffn_gate_inp")]
    plain = [layer for layer in range(n_layers) if layer not in set(routed) and table.has(layer, "ffn_up")]
    found: dict[str, Any] = {"d_ff": 0}
    if plain:
        fused, width = table.need(plain[0], "ffn_up")[1], table.need(plain[0], "ffn_down")[0]
        found["d_ff"] = width
        if fused == 2 * width and not table.has(plain[0], "ffn_gate"):  # gate and up in one matrix (Phi-3)
            found["gated"] = True
    if not routed:
        return found
    first = routed[0]
    every = routed[1] - first if len(routed) > 1 else 1
    if routed != list(range(first, n_layers, every)):
        raise SpecError(f"has experts in the layers {_some(routed)}, expected them at even distances",
                        file=str(table.path), key="ffn_gate_inp")
    apart = not table.has(first, "ffn_down_exps")  # an older way: a tensor for each expert
    down = table.need(first, "ffn_down" if apart else "ffn_down_exps")
    shared = table.shape(first, "ffn_down_shexp")
    return {**found, "experts": {
        "count": table.need(first, "ffn_gate_inp")[1], "per_token": read.count("expert_used_count"),
        "d_expert": down[0], "d_shared": shared[0] if shared else 0,
        "shared_gate": table.has(first, "ffn_gate_inp_shexp"), "first_layer": first, "every": every,
        "router_bias": table.has(first, "exp_probs_b", "bias") or table.has(first, "ffn_gate_inp", "bias"),
        "bias": table.has(first, "ffn_down_exps", "bias")}}


def _some(layers: list[int]) -> str:
    return ", ".join(map(str, layers[:5])) + (" …" if len(layers) > 5 else "")


class _Metadata:
    """Counts in the metadata, checked."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self.metadata, self.path = metadata, path
        name = metadata.get("general.architecture")
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_.-]{1,40}", name):
            raise SpecError(f"found {name!r}"[:80] + ", expected the name of an architecture", file=str(path),
                            key="general.architecture")
        self.architecture = name

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def has(self, name: str) -> bool:
        return self.key(name) in self.metadata

    def count(self, name: str, *, default: int | None = None) -> int:
        """A whole number; one for every layer is taken where all are equal."""
        key = self.key(name)
        value = self.metadata.get(key, default)
        if isinstance(value, (list, tuple)) and value and all(item == value[0] for item in value):
            value = value[0]
        if type(value) is not int or not 0 <= value <= 1_000_000_000:
            shown = "nothing" if value is None else f"{value!r}"[:60]
            raise SpecError(f"found {shown}, expected one whole number", file=str(self.path), key=key)
        return value
