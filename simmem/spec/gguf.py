"""What does a GGUF file say about its model, and in which format is each of its tensors kept?

Only the header is read: metadata and tensor table. The weights are never touched, and arrays and
texts too long to describe a model (the tokens of a tokenizer, above all) are counted, not kept.
The layout is that of the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, in either byte
order; the sizes of blocks are those of ggml-common.h.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from simmem.errors import SpecError
from simmem.spec.ggml_types import GGML_TYPES
from simmem.spec.gguf_header import MAX_TENSORS, GgufHeader, Skipped, Value, read_header

__all__ = ["GgufFile", "GgufTensor", "Skipped", "Value", "read_gguf"]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One row of the tensor table."""

    name: str
    shape: tuple[int, ...]
    """In ggml's order, the reverse of torch's: inputs first, then outputs, then experts."""
    ggml_type: str
    n_params: int
    n_bytes: int
    offset: int
    """Of its first byte in its file. [B]"""
    part: int = 0
    """Which of `GgufFile.parts` holds it."""


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file, or of all the parts of one that was split."""

    parts: tuple[Path, ...]
    version: int
    metadata: Mapping[str, Value]
    """Of the first part. Texts may hold any character: show them with repr."""
    tensors: tuple[GgufTensor, ...]

    @property
    def n_params(self) -> int:
        return sum(tensor.n_params for tensor in self.tensors)

    @property
    def n_bytes(self) -> int:
        """Of all tensors, without the padding between them. [B]"""
        return sum(tensor.n_bytes for tensor in self.tensors)


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Read the header of a GGUF file, and of all its parts where it was split.

    Parameters
    ----------
    path : the file; of a split one any part, the others beside it.

    Raises
    ------
    SpecError
        Naming the file and the key or tensor: it cannot be read, is no GGUF file or one of version 1,
        ends too early, holds lengths or counts past its own end or past the bounds of this module,
        text that is not UTF-8, floats that are not finite, a type that ggml does not know, tensors that
        overlap or end past the file, or was split and a part is missing or belongs to another file.
    """
    path = Path(path)
    asked = _read_part(path, 0)
    count = _split(asked, "split.count", path, default=1)
    if count <= 1:
        return asked
    paths = _split_paths(path, count)
    tensors: list[GgufTensor] = []
    seen: dict[str, Path] = {}
    first = asked
    for part, one in enumerate(paths):
        if not one.exists():
            raise SpecError(f"is part {part + 1} of {count} of a split model and is missing beside {path.name}",
                            file=str(one))
        read = asked if one == path and part == 0 else _read_part(one, part)
        if part == 0:
            first = read
        found = _split(read, "split.count", one, default=1), _split(read, "split.no", one, default=0)
        if found != (count, part):
            raise SpecError(f"says it is part {found[1] + 1} of {found[0]}, its name says {part + 1} of {count}",
                            file=str(one), key="split.no")
        for tensor in read.tensors:
            if tensor.name in seen:
                raise SpecError(f"is in {seen[tensor.name].name} as well", file=str(one), key=tensor.name)
            seen[tensor.name] = one
        tensors += read.tensors
        if len(tensors) > MAX_TENSORS:
            raise SpecError(f"holds tensors past the {MAX_TENSORS} that are read of one model", file=str(one))
    promised = _split(first, "split.tensors.count", paths[0], default=len(tensors))
    if promised != len(tensors):
        raise SpecError(f"promises {promised} tensors, its {count} parts hold {len(tensors)}", file=str(paths[0]),
                        key="split.tensors.count")
    return GgufFile(tuple(paths), first.version, first.metadata, tuple(tensors))


def _split(read: GgufFile, key: str, path: Path, *, default: int) -> int:
    value = read.metadata.get(key, default)
    if type(value) is not int or value < 0:
        raise SpecError(f"found {_shown(value)}, expected a count", file=str(path), key=key)
    return value


def _split_paths(path: Path, count: int) -> list[Path]:
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name, re.DOTALL)
    if match is None or int(match[2]) != count:
        raise SpecError(f"is one of {count} parts of a split model; parts are found by their names, which end in "
                        f"-00001-of-{count:05}.gguf", file=str(path), key="split.count")
    return [path.with_name(f"{match[1]}-{part + 1:05}-of-{count:05}.gguf") for part in range(count)]


def _read_part(path: Path, part: int) -> GgufFile:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise SpecError("is not a file", file=str(path))
        with path.open("rb") as file:
            header = read_header(file, status.st_size, path)
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror or error}", file=str(path)) from None
    return GgufFile((path,), header.version, header.metadata, _tensors(header, status.st_size, path, part))


def _tensors(header: GgufHeader, file_bytes: int, path: Path, part: int) -> tuple[GgufTensor, ...]:
    """The tensor table with sizes, each checked against the file."""

    def bad(message: str, key: str) -> SpecError:
        return SpecError(message, file=str(path), key=key)

    alignment = header.metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise bad(f"found {_shown(alignment)}, expected a power of two", "general.alignment")
    start = -(-header.n_bytes // alignment) * alignment  # of the data
    tensors = []
    for name, (shape, number, offset) in header.rows.items():
        kind = GGML_TYPES.get(number)
        if kind is None:
            raise bad(f"is kept in the ggml type {number}, which is not known", name)
        if not all(shape):
            raise bad(f"has the shape {list(shape)}, which holds nothing", name)
        row = shape[0] if shape else 1
        if row % kind.block:
            raise bad(f"has rows of {row} parameters, which do not divide into blocks of {kind.block} "
                      f"({kind.name})", name)
        n_params = math.prod(shape)
        n_bytes = n_params // kind.block * kind.block_bytes
        if offset % alignment:
            raise bad(f"begins at byte {offset} of the data, which is not a multiple of {alignment}", name)
        if start + offset + n_bytes > file_bytes:
            raise bad(f"ends at byte {start + offset + n_bytes} of a file of {file_bytes}: the file is "
                      f"truncated, or its header is wrong", name)
        tensors.append(GgufTensor(name, shape, kind.name, n_params, n_bytes, start + offset, part))
    in_order = sorted(tensors, key=lambda tensor: tensor.offset)
    for before, after in itertools.pairwise(in_order):
        if before.offset + before.n_bytes > after.offset:
            raise bad(f"begins inside {before.name}", after.name)
    return tuple(tensors)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
