"""What stands in the header of a GGUF file, read with nothing in it trusted?

Arrays and texts too long to describe a model (the tokens of a tokenizer, above all) are counted, not
kept. Every length and count is checked against what is left of the file, and against the bounds below,
before anything is read or made for it.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

from simmem.errors import SpecError

__all__ = ["MAX_HEADER_BYTES", "MAX_TENSORS", "GgufHeader", "Row", "Skipped", "Value", "read_header"]

MAX_HEADER_BYTES = 128 << 20
"""Real ones take up to some 30 MB, nearly all of it tokenizer."""
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_NAME_BYTES = 256
"""Of a key or tensor; ggml itself allows tensors 63."""
MAX_DIMS = 4
MAX_ARRAY_DEPTH = 4
MAX_TEXTS = 1 << 22
"""Stepped over in long arrays; the largest vocabularies have some 300 000 tokens and 500 000 merges."""
KEPT_ITEMS = 4096
"""A longer array is counted only; the longest that describe a model have an item a layer."""
KEPT_TEXT_BYTES = 1 << 16
MAX_KEPT_BYTES = 16 << 20
"""Of all metadata that is kept, as they stand in memory."""

_BLOCK_BYTES = 1 << 18
_ITEM_BYTES = 32  # of one Python number in a tuple

Value: TypeAlias = "bool | int | float | str | tuple[Value, ...] | Skipped"
"""A value of the metadata."""


@dataclass(frozen=True)
class Skipped:
    """Metadata that is there but was not kept: the length of an array in items, or of a text in bytes."""

    what: str
    length: int

    def __len__(self) -> int:
        return self.length


class Row(NamedTuple):
    """One row of the tensor table as it stands, unchecked."""

    shape: tuple[int, ...]
    type_number: int
    offset: int
    """Into the data, which begin after the header. [B]"""


@dataclass(frozen=True)
class GgufHeader:
    """A header as it stands; `n_bytes` is its length, without the padding after it. [B]"""

    version: int
    metadata: dict[str, Value]
    rows: dict[str, Row]
    n_bytes: int


def read_header(file: BinaryIO, file_bytes: int, path: Path) -> GgufHeader:
    """Read the header at the front of an open `file` of `file_bytes` bytes; `path` is for errors, all SpecError."""
    return _Reader(file, file_bytes, path).header()


_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}
_NAMES = {0: "uint8", 1: "int8", 2: "uint16", 3: "int16", 4: "uint32", 5: "int32", 6: "float32", _BOOL: "bool",
          _STRING: "string", _ARRAY: "array", 10: "uint64", 11: "int64", 12: "float64"}
_SMALLEST = {code: struct.calcsize("<" + letter) for code, letter in _SCALARS.items()} | {_STRING: 8, _ARRAY: 12}
"""Bytes that an item of an array takes at least."""


class _Reader:
    """Reads a header front to back, a block at a time. Nothing is taken that is not known to be there."""

    def __init__(self, file: BinaryIO, file_bytes: int, path: Path) -> None:
        self.file, self.path, self.file_bytes = file, path, file_bytes
        self.block, self.at = b"", 0
        self.left = min(file_bytes, MAX_HEADER_BYTES)
        """Bytes of the file, or of the bound, after `at`."""
        self.order = "<"
        self.kept_bytes = 0
        self.texts = 0

    def header(self) -> GgufHeader:
        if self.left < 4 or self.take(4, None) != b"GGUF":
            raise self.bad("is not a GGUF file: it does not begin with the letters GGUF")
        version = self.version()
        n_tensors, n_keys = self.number("Q", "tensor_count"), self.number("Q", "metadata_kv_count")
        self.check_count(n_tensors, MAX_TENSORS, 8 + 4 + 4 + 8, "tensor_count")
        self.check_count(n_keys, MAX_KEYS, 8 + 4 + 1, "metadata_kv_count")
        metadata: dict[str, Value] = {}
        for index in range(n_keys):
            key = self.name(f"metadata key {index}")
            if key in metadata:
                raise self.bad("stands twice in the metadata", key)
            metadata[key] = self.value(self.number("I", key), key, 0)
        rows = self.table(n_tensors)
        return GgufHeader(version, metadata, rows, min(self.file_bytes, MAX_HEADER_BYTES) - self.left)

    def version(self) -> int:
        version = self.number("I", "version")
        if version and version & 0xFFFF == 0:  # the small number at the other end: the other byte order
            version, self.order = int.from_bytes(version.to_bytes(4, "big"), "little"), ">"
        if version == 1:
            raise self.bad("is GGUF version 1, which nothing writes since 2023; convert it anew", "version")
        if version not in (2, 3):
            raise self.bad(f"found GGUF version {version}, expected 2 or 3", "version")
        return version

    def table(self, count: int) -> dict[str, Row]:
        rows = {}
        for index in range(count):
            name = self.name(f"tensor {index}")
            if name in rows:
                raise self.bad("stands twice in the tensor table", name)
            n_dims = self.number("I", name)
            if n_dims > MAX_DIMS:
                raise self.bad(f"has {n_dims} dimensions; at most {MAX_DIMS} are read", name)
            shape: tuple[int, ...] = struct.unpack(f"{self.order}{n_dims}Q", self.take(8 * n_dims, name))
            rows[name] = Row(shape, self.number("I", name), self.number("Q", name))
        return rows

    # --- values ----------------------------------------------------------------------------------------------

    def value(self, code: int, key: str, depth: int) -> Value:
        if code == _STRING:
            return self.text(key)
        if code == _ARRAY:
            return self.array(key, depth)
        if code not in _SCALARS:
            raise self.bad(f"is of the value type {code}, which GGUF does not have", key)
        return self.scalars(code, 1, key)[0]

    def scalars(self, code: int, count: int, key: str) -> tuple[bool | int | float, ...]:
        self.keep(_ITEM_BYTES * count, key)
        found = struct.unpack(f"{self.order}{count}{_SCALARS[code]}", self.take(count * _SMALLEST[code], key))
        if code == _BOOL:
            if not set(found) <= {0, 1}:
                raise self.bad(f"found a bool of {max(found)}, expected 0 or 1", key)
            return tuple(map(bool, found))
        if _SCALARS[code] in "fd" and not all(map(math.isfinite, found)):
            raise self.bad("holds a number that is not finite", key)
        return found

    def text(self, key: str) -> str | Skipped:
        length = self.number("Q", key)
        if length > KEPT_TEXT_BYTES:
            self.skip(length, key)
            return Skipped("text", length)
        self.keep(4 * length + _ITEM_BYTES, key)
        return self.decode(self.take(length, key), key)

    def array(self, key: str, depth: int) -> tuple[Value, ...] | Skipped:
        if depth == MAX_ARRAY_DEPTH:
            raise self.bad(f"holds arrays nested more than {MAX_ARRAY_DEPTH} deep", key)
        code, count = self.number("I", key), self.number("Q", key)
        if code not in _SMALLEST:
            raise self.bad(f"is an array of the value type {code}, which GGUF does not have", key)
        if count * _SMALLEST[code] > self.left:
            raise self.too_long(count * _SMALLEST[code], key)
        if count <= KEPT_ITEMS:
            if code in _SCALARS:
                return self.scalars(code, count, key)
            self.keep(_ITEM_BYTES * count, key)
            return tuple(self.value(code, key, depth + 1) for _ in range(count))
        if code == _ARRAY:
            raise self.bad(f"is an array of {count} arrays; at most {KEPT_ITEMS} are read", key)
        if code == _STRING:
            self.skip_texts(count, key)
        else:
            self.skip(count * _SMALLEST[code], key)
        return Skipped(f"array of {_NAMES[code]}", count)

    def skip_texts(self, count: int, key: str) -> None:
        """Step over `count` texts: half a million of them in a tokenizer, so by the lengths alone."""
        self.texts += count
        if self.texts > MAX_TEXTS:
            raise self.bad(f"brings the header to more than the {MAX_TEXTS} texts that are read of one", key)
        length_at = struct.Struct(self.order + "Q").unpack_from
        at, last = self.at, len(self.block) - 8
        for _ in range(count):
            if at > last:
                self.skip(at - self.at, key)
                self.fill(8, key)
                at, last = self.at, len(self.block) - 8
            at += 8 + length_at(self.block, at)[0]
        self.skip(at - self.at, key)

    def name(self, where: str) -> str:
        length = self.number("Q", where)
        if not 0 < length <= MAX_NAME_BYTES:
            raise self.bad(f"has a name of {length} bytes, expected 1 to {MAX_NAME_BYTES}", where)
        self.keep(length + 4 * _ITEM_BYTES, where)
        name = self.decode(self.take(length, where), where)
        if not name.isprintable():  # it would reach the terminal
            raise self.bad("has a name with characters that cannot be printed", where)
        return name

    def check_count(self, count: int, most: int, least_bytes: int, key: str) -> None:
        if count > most:
            raise self.bad(f"found {count}; at most {most} are read", key)
        if count * least_bytes > self.left:
            raise self.too_long(count * least_bytes, key)

    # --- bytes -----------------------------------------------------------------------------------------------

    def number(self, letter: str, key: str) -> int:
        code = self.order + letter
        found: int = struct.unpack(code, self.take(struct.calcsize(code), key))[0]
        return found

    def take(self, length: int, key: str | None) -> bytes:
        self.fill(length, key)
        self.at += length
        self.left -= length
        return self.block[self.at - length:self.at]

    def fill(self, length: int, key: str | None) -> None:
        """Have at least `length` bytes in the block after `at`."""
        if length > self.left:
            raise self.too_long(length, key)
        there = len(self.block) - self.at
        if there < length:
            self.block, self.at = self.block[self.at:] + self.file.read(max(length - there, _BLOCK_BYTES)), 0
            if len(self.block) < length:  # shorter than the file system said
                raise self.too_long(length, key)

    def skip(self, length: int, key: str) -> None:
        if length > self.left:
            raise self.too_long(length, key)
        beyond = self.at + length - len(self.block)
        if beyond > 0:
            self.file.seek(beyond, os.SEEK_CUR)
            self.block, self.at = b"", 0
        else:
            self.at += length
        self.left -= length

    def keep(self, n_bytes: int, key: str) -> None:
        self.kept_bytes += n_bytes
        if self.kept_bytes > MAX_KEPT_BYTES:
            raise self.bad(f"brings the header to more than the {MAX_KEPT_BYTES} bytes that are kept of one", key)

    def decode(self, raw: bytes, key: str) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.bad("is not UTF-8 text", key) from None

    def too_long(self, length: int, key: str | None) -> SpecError:
        if self.file_bytes > MAX_HEADER_BYTES:
            return self.bad(f"needs {length} bytes where {self.left} are left of the {MAX_HEADER_BYTES} that are read "
                            f"of a header", key)
        return self.bad(f"needs {length} bytes where the file has {self.left} left: it is truncated, or a length in "
                        f"it is wrong", key)

    def bad(self, message: str, key: str | None = None) -> SpecError:
        return SpecError(message, file=str(self.path), key=key)
