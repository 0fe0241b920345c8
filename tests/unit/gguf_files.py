"""How is a GGUF file written byte by byte? For what the `gguf` package would refuse to write."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

__all__ = ["ALIGNMENT", "a_gguf", "a_gguf_model", "array", "assemble", "f32", "text", "texts", "u32"]

ALIGNMENT = 32
Typed = tuple[int, bytes]
"""The number of a value type, and the bytes of the value."""


def u32(value: int) -> Typed:
    return 4, struct.pack("<I", value)


def f32(value: float) -> Typed:
    return 6, struct.pack("<f", value)


def text(value: str | bytes, length: int | None = None) -> Typed:
    raw = value.encode() if isinstance(value, str) else value
    return 8, struct.pack("<Q", len(raw) if length is None else length) + raw


def array(code: int, items: Iterable[bytes], count: int | None = None) -> Typed:
    items = list(items)
    return 9, struct.pack("<IQ", code, len(items) if count is None else count) + b"".join(items)


def texts(values: Iterable[str], count: int | None = None) -> Typed:
    return array(8, (text(value)[1] for value in values), count)


def assemble(metadata: Sequence[tuple[str | bytes, Typed]] = (), tensors: Sequence[tuple] = (), *, version: int = 3,
             n_keys: int | None = None, n_tensors: int | None = None, data: int | None = None) -> bytes:
    """A file.

    tensors : (name, shape, number of the type, bytes[, offset]); one after the other where no offset is given.
    n_keys, n_tensors : what it promises; data : bytes of data, all that the tensors need when not given.
    """
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors) if n_tensors is None else n_tensors,
                                len(metadata) if n_keys is None else n_keys)
    for key, (code, raw) in metadata:
        out += text(key)[1] + struct.pack("<I", code) + raw
    end = 0
    for name, shape, number, n_bytes, *offset in tensors:
        at = offset[0] if offset else end
        out += text(name)[1] + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, at)
        end = max(end, -(-(at + n_bytes) // ALIGNMENT) * ALIGNMENT)
    return out + b"\0" * (-len(out) % ALIGNMENT) + b"\0" * (end if data is None else data)


def a_gguf() -> bytes:
    """A small sound file with a value of every kind and tensors of several types."""
    return assemble(
        [("general.architecture", text("llama")), ("llama.block_count", u32(1)), ("llama.embedding_length", u32(64)),
         ("llama.attention.layer_norm_rms_epsilon", f32(1e-5)), ("general.quantized", (7, b"\1")),
         ("llama.attention.head_count_kv", array(5, [struct.pack("<i", 2)] * 2)),
         ("general.big", (10, struct.pack("<Q", 2**40))), ("general.exact", (12, struct.pack("<d", 0.1))),
         ("tokenizer.ggml.tokens", texts(f"tök{i}" for i in range(50))), ("general.alignment", u32(ALIGNMENT)),
         ("nested", array(9, [array(0, [b"\1", b"\2"])[1], array(8, [text("a")[1]])[1]]))],
        [("token_embd.weight", (64, 50), 1, 6400), ("blk.0.attn_q.weight", (64, 64), 8, 64 * 64 // 32 * 34),
         ("blk.0.attn_norm.weight", (64,), 0, 256),
         ("blk.0.ffn_gate_exps.weight", (64, 32, 4), 2, 64 * 32 * 4 // 32 * 18)])


def a_gguf_model(data: int | None = None) -> bytes:
    """A whole small model, a plain layer and one with experts; its header alone with data = 0."""
    tensors = [("token_embd.weight", (64, 50), 1, 6400), ("output_norm.weight", (64,), 0, 256)]
    for layer in (0, 1):
        tensors += [(f"blk.{layer}.{name}.weight", (64, 64), 1, 8192) for name in ("attn_q", "attn_output")]
        tensors += [(f"blk.{layer}.{name}.weight", (64, 32), 1, 4096) for name in ("attn_k", "attn_v")]
        tensors += [(f"blk.{layer}.{name}.weight", (64,), 0, 256) for name in ("attn_norm", "ffn_norm")]
    tensors += [("blk.0.ffn_gate.weight", (64, 96), 1, 12288), ("blk.0.ffn_up.weight", (64, 96), 1, 12288),
                ("blk.0.ffn_down.weight", (96, 64), 1, 12288), ("blk.1.ffn_gate_inp.weight", (64, 4), 0, 1024)]
    tensors += [(f"blk.1.ffn_{name}_exps.weight", (64, 32, 4) if name != "down" else (32, 64, 4), 2, 64 * 4 * 18)
                for name in ("gate", "up", "down")]
    return assemble(
        [("general.architecture", text("qwen3moe")), ("general.name", text("small")),
         ("qwen3moe.block_count", u32(2)), ("qwen3moe.context_length", u32(512)),
         ("qwen3moe.attention.head_count", u32(4)), ("qwen3moe.attention.head_count_kv", u32(2)),
         ("qwen3moe.expert_used_count", u32(2))], tensors, data=data)
