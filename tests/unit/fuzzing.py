"""How does a file from a stranger go wrong? Mutations of bytes and of JSON-like values, repeatable from a seed.

`mutate_bytes` knows nothing of a format: flipped bits, lying lengths, cuts and splices. `mutate_json` keeps the
syntax and breaks the meaning: what it returns can be written as JSON (`json.dumps`) or TOML (`to_toml`) and gets past
the parser. Use both; one `random.Random(seed)` for each mutated file, so that a failing file is made again from its
seed alone.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from typing import Any

__all__ = ["LYING_INTEGERS", "mutate_bytes", "mutate_json", "to_toml"]

LYING_INTEGERS = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**48, 2**53 + 1,
                  2**62, 2**63 - 1, 2**63, 2**64 - 1)
"""Counts and lengths that overflow, promise terabytes, or turn negative."""

_SCALARS: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30,
    0.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf,
    "", " ", "0", "1e999 GB", "-5 GB/s", "nan", "../../../etc/passwd", "/dev/zero", "a\x00b", "\x1b[2J\x1b[31m",
    "line\nbreak", "\u202egnp.exe", "\ud800", "é" * 3, "x" * 5000, "${HOME}", "__import__('os').abort()",
)


def mutate_bytes(data: bytes, rng: random.Random, *, within: int | None = None) -> bytes:
    """One to three mutations of `data`, at places before `within` (its header, where the rest is only weights)."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_MUTATIONS)(data, rng, min(len(data), within or len(data)))
    return data


def _flip(data: bytes, rng: random.Random, end: int) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 8)) if end else 0):
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _lie(data: bytes, rng: random.Random, end: int) -> bytes:
    """An integer of 2, 4 or 8 bytes, in either order, somewhere: lengths and counts are such."""
    size = rng.choice((2, 4, 8, 8))
    at = rng.randrange(max(end - size, 0) + 1)
    order: Any = rng.choice(("little", "little", "big"))
    return data[:at] + (rng.choice(LYING_INTEGERS) % 2 ** (8 * size)).to_bytes(size, order) + data[at + size:]


def _inflate(data: bytes, rng: random.Random, end: int) -> bytes:
    """A little-endian length that is there already (small, seven zero bytes after it) made a larger one."""
    there = [at for at in range(max(end - 8, 0)) if data[at] and not any(data[at + 1:at + 8])]
    if not there:
        return _lie(data, rng, end)
    at = rng.choice(there)
    return data[:at] + (data[at] + rng.choice(LYING_INTEGERS[1:-1])).to_bytes(8, "little") + data[at + 8:]


def _truncate(data: bytes, rng: random.Random, end: int) -> bytes:
    return data[: rng.randrange(end + 1)]


def _delete(data: bytes, rng: random.Random, end: int) -> bytes:
    at = rng.randrange(end + 1)
    return data[:at] + data[at + rng.randint(1, 16):]


def _insert(data: bytes, rng: random.Random, end: int) -> bytes:
    at, n = rng.randrange(end + 1), rng.randint(1, 16)
    new = rng.choice((rng.randbytes(n), b"\xff" * n, b"\0" * n, b"[" * n, b'"', b"\xed\xa0\x80"))
    return data[:at] + new + data[at:]


def _splice(data: bytes, rng: random.Random, end: int) -> bytes:
    """A stretch of it put at another place, over what is there or between."""
    start, at, n = rng.randrange(end + 1), rng.randrange(end + 1), rng.randint(1, 64)
    piece = data[start:start + n]
    return data[:at] + piece + data[at + rng.choice((0, len(piece))):]


def _fill(data: bytes, rng: random.Random, end: int) -> bytes:
    at, n = rng.randrange(end + 1), rng.randint(1, 32)
    return data[:at] + (rng.choice((b"\0", b"\xff", b"\x80")) * n)[: len(data) - at] + data[at + n:]


_MUTATIONS = (_flip, _lie, _inflate, _truncate, _delete, _insert, _splice, _fill)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """A deep copy of `value` (dicts, lists, scalars) with one to three of its places made wrong."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        parent, key = rng.choice(list(_places(root)))
        _mutate_place(parent, key, rng)
    return root[0]


def _places(parent: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(parent) if isinstance(parent, dict) else range(len(parent))
    for key in keys:
        yield parent, key
        if isinstance(parent[key], (dict, list)):
            yield from _places(parent[key])


def _mutate_place(parent: Any, key: Any, rng: random.Random) -> None:
    value = parent[key]
    wrong = ["replace", "replace", "wrap", "nest"]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        wrong += ["scale", "scale"]
    if isinstance(value, (dict, list)):
        wrong += ["empty", "grow"]
    if isinstance(value, str):
        wrong += ["edit", "edit"]
    if isinstance(parent, dict):
        wrong += ["drop", "rename", "surplus"]
    match rng.choice(wrong):
        case "replace":
            parent[key] = rng.choice(_SCALARS)
        case "wrap":
            parent[key] = rng.choice(([value], [value, value], {"value": value}, {}, []))
        case "nest":
            for _ in range(rng.choice((3, 60))):
                value = rng.choice(([value], {"a": value}))
            parent[key] = value
        case "scale":
            parent[key] = rng.choice((-value, value * 10**6, value + 0.5, value / 7, str(value), value * 10**20))
        case "empty":
            parent[key] = type(value)()
        case "grow":
            parent[key] = value * 50 if isinstance(value, list) else {**value, **{f"k{i}": i for i in range(200)}}
        case "edit":
            at = rng.randrange(len(value) + 1)
            parent[key] = value[:at] + str(rng.choice(_SCALARS)) + value[at + rng.choice((0, 1)):]
        case "drop":
            del parent[key]
        case "rename":
            parent[rng.choice((f"{key}x", key.upper(), "", "a.b", "\x1b[2J", "line\nbreak"))] = parent.pop(key)
        case "surplus":
            parent[rng.choice(("surplus", "__class__", "\x07", "k" * 2000))] = rng.choice(_SCALARS)


def to_toml(value: Any) -> str:
    """A dict as TOML, one key a line and all below it inline; what TOML has no word for (null) is left out."""
    if not isinstance(value, dict):  # a mutation of the whole
        value = {"value": value}
    return "".join(f"{json.dumps(key)} = {_inline(item)}\n" for key, item in value.items() if item is not None)


def _inline(value: Any) -> str:
    match value:
        case dict():
            return "{" + ", ".join(f"{json.dumps(k)} = {_inline(v)}" for k, v in value.items() if v is not None) + "}"
        case list() | tuple():
            return "[" + ", ".join(_inline(v) for v in value if v is not None) + "]"
        case bool() | int() | str():
            return json.dumps(value)
        case float():
            return repr(value)  # nan and inf are TOML; JSON's NaN is not
        case _:
            return json.dumps(str(value))  # a date
