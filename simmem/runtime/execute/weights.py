"""Which bytes go into the weight file, and is the file that lies there still the one that was written?

Random weights stand in for any model whose own cannot be had: incompressible, small enough that nothing overflows. A
network's own weights make a run exact. A file is written beside its place and renamed into it, together with a checksum
of every block; an index says what is in it, and it is used again while size, time and content's name are those.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from simmem.errors import MachineError, SpecError
from simmem.runtime.execute.layout import Layout, Slots, Stage
from simmem.runtime.reader import open_direct
from simmem.units import format_quantity

if TYPE_CHECKING:
    import torch

__all__ = ["NetworkWeights", "RandomWeights", "Source", "WeightCheck", "WeightFile", "block_sums", "is_written",
           "random_weights", "weight_file"]

Bytes = NDArray[np.uint8]
Sums = NDArray[np.uint64]
Say = Callable[[str], None]
WeightCheck = Callable[[int, Bytes], None]
"""Told (offset, bytes) that were read; raises where they are not what was written."""

CHUNK_BYTES = 64 << 20
INDEX_BYTES = 1 << 16
_BITS = {"fp32": (np.uint32, 0x81FFFFFF, 0x3A000000), "bf16": (np.uint16, 0x81FF, 0x3A00),
         "fp16": (np.uint16, 0x8FFF, 0x1000)}
"""Precision -> word, random bits (sign, mantissa, two of the exponent), fixed bits: values from 2^-11 to 2^-7."""


class Source(Protocol):
    """Where the bytes of the weight file come from."""

    @property
    def name(self) -> str:
        """Says whose bytes these are; the same name means the same bytes."""

    def digest(self, layout: Layout) -> str:
        """Names a file that holds these bytes where this layout looks for them."""

    def size_bytes(self, layout: Layout) -> int:
        """Of the file without its checksums, whole blocks. [B]"""

    def contents(self, layout: Layout) -> Iterator[tuple[int, Bytes]]:
        """(offset, bytes) of all that the file holds, in order."""


def random_weights(n_bytes: int, precision: str, seed: int) -> Bytes:
    """Random small weights of a precision. [B]"""
    word, free, fixed = _BITS[precision]
    drawn = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, -(-n_bytes // 8), dtype=np.uint64)
    words = drawn.view(word)
    words &= word(free)
    words |= word(fixed)
    return drawn.view(np.uint8)[:n_bytes]


@dataclass(frozen=True)
class RandomWeights:
    """Weights that no model has, in the place of any: one file serves every layout of a precision that fits into it."""

    precision: str
    seed: int = 0
    at_least_bytes: int = 0
    """Of the file, so that later layouts find room in it."""

    @property
    def name(self) -> str:
        return f"random weights, seed {self.seed}"

    def digest(self, layout: Layout) -> str:
        said = f"{self.name}, {self.precision}, blocks of {layout.block_bytes}"
        return hashlib.sha256(said.encode()).hexdigest()

    def size_bytes(self, layout: Layout) -> int:
        return -(-max(layout.n_bytes, self.at_least_bytes) // layout.block_bytes) * layout.block_bytes

    def contents(self, layout: Layout) -> Iterator[tuple[int, Bytes]]:
        size = self.size_bytes(layout)
        for offset in range(0, size, CHUNK_BYTES):
            yield offset, random_weights(min(CHUNK_BYTES, size - offset), self.precision, self.seed + offset)


class NetworkWeights:
    """The weights of a network, by the names of `simmem.runtime.execute.layout`.

    Parameters
    ----------
    layers : for each layer, name -> tensor.
    others : "final_norm.weight", "positions", "head.weight", "embedding" and the like -> tensor.
    """

    def __init__(self, layers: tuple[Mapping[str, torch.Tensor], ...], others: Mapping[str, torch.Tensor],
                 precision: str) -> None:
        self._layers, self._others, self._precision = layers, others, precision
        hasher = hashlib.sha256()
        for group in (*layers, others):
            for key in sorted(group):
                hasher.update(key.encode())
                hasher.update(_bytes_of(group[key], precision).data)
        self.name = f"network {hasher.hexdigest()}"

    def digest(self, layout: Layout) -> str:
        return layout.digest(self.name)

    def size_bytes(self, layout: Layout) -> int:
        return layout.n_bytes

    def contents(self, layout: Layout) -> Iterator[tuple[int, Bytes]]:
        for layer, stage in layout.stages():
            yield stage.offset, self._stage(stage, layer)
        for slots in (layout.units, layout.embedding):
            for area in range(slots.areas if slots else 0):
                assert slots is not None
                yield slots.area_offset(area), self._area(layout, slots, area)

    def _stage(self, stage: Stage, layer: int | None) -> Bytes:
        group = self._others if layer is None else self._layers[layer]
        found = np.zeros(stage.n_bytes, np.uint8)
        for tensor in stage.tensors:
            given = group.get(tensor.name)
            if given is None or tuple(given.shape) != tensor.shape:
                raise SpecError(f"expected a tensor {tensor.shape}, found "
                                f"{None if given is None else tuple(given.shape)}", key=tensor.name)
            found[tensor.offset:tensor.offset + tensor.n_bytes] = _bytes_of(given, self._precision)
        return found

    def _area(self, layout: Layout, slots: Slots, area: int) -> Bytes:
        found = np.zeros((slots.rows, slots.slot_bytes), np.uint8)
        width = layout.unit_row_bytes
        if slots is layout.embedding:
            found[:, :width] = _bytes_of(self._others["embedding"], self._precision).reshape(slots.rows, width)
            return found.reshape(-1)
        layer, part = divmod(area, layout.areas_per_layer)
        for place, name in enumerate(layout.parts if layout.bundled else layout.parts[part:part + 1]):
            matrix = self._layers[layer][f"{name}.weight"]
            rows = matrix.t() if name == "down" else matrix
            found[:, place * width:(place + 1) * width] = _bytes_of(rows, self._precision).reshape(slots.rows, width)
        return found.reshape(-1)


def _bytes_of(tensor: torch.Tensor, precision: str) -> Bytes:
    import torch

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    found: Bytes = tensor.detach().to("cpu", kind).contiguous().reshape(-1).view(torch.uint8).numpy()
    return found


def block_sums(data: Bytes, block_bytes: int) -> Sums:
    """A checksum of every block: words times odd numbers, summed modulo 2^64, so that no changed word goes unseen."""
    words = data.view(np.uint64).reshape(-1, block_bytes // 8)
    weights = np.arange(words.shape[1], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C16) + np.uint64(1)
    return np.asarray((words * weights).sum(axis=1, dtype=np.uint64))


@dataclass(frozen=True)
class WeightFile:
    """An open weight file."""

    layout: Layout
    fd: int
    name: str
    sums: Sums | None
    """Checksum of every block, where they are to be looked at."""
    _state: tuple[int, int, int]

    def check_unchanged(self) -> None:
        """Raise MachineError where somebody wrote to the file since it was opened."""
        if _state_of(self.fd) != self._state:
            raise MachineError("was changed while it was read: nothing measured on it counts", file=self.name)

    def check(self, offset: int, data: Bytes) -> None:
        """Raise MachineError unless `data`, whole blocks from `offset` on, is what was written there."""
        if self.sums is None:
            return
        block = self.layout.block_bytes
        wrong = np.flatnonzero(block_sums(data, block) != self.sums[offset // block:(offset + len(data)) // block])
        if len(wrong):
            raise MachineError(f"the block at offset {offset + int(wrong[0]) * block} is not what was written there",
                               file=self.name)


def _state_of(fd: int) -> tuple[int, int, int]:
    status = os.fstat(fd)
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def weight_file(layout: Layout, source: Source, *, file: Path | None = None, scratch: Path | None = None,
                check: bool = False, say: Say = lambda _: None) -> Iterator[WeightFile]:
    """The weight file, opened for direct reads; written first unless it is there.

    Parameters
    ----------
    file : where it is kept; None: in a folder of its own in `scratch`, and gone afterwards, however that comes about.
    scratch : an existing folder on the drive to be read; None: the system's for temporary files.
    check : have `WeightFile.check` compare checksums.
    say : is told before anything large is written.

    Raises
    ------
    MachineError
        No room, or the drive cannot be written or read.
    SpecError
        `file` or `scratch` cannot be what they should.
    """
    if file is not None:
        if not is_written(file, layout, source):
            _write(file, layout, source, say)
        with _opened(file, layout, source, check) as found:
            yield found
        return
    if scratch is not None and not scratch.is_dir():
        raise SpecError("is not a folder", file=str(scratch), key="--scratch")
    with tempfile.TemporaryDirectory(prefix="simmem-", dir=scratch) as folder:
        path = Path(folder) / "weights"
        _write(path, layout, source, say)
        with _opened(path, layout, source, check) as found:
            yield found


@contextlib.contextmanager
def _opened(path: Path, layout: Layout, source: Source, check: bool) -> Iterator[WeightFile]:
    sums = None
    if check:
        known = _index(path)
        size = known["data_bytes"] if known else source.size_bytes(layout)
        sums = np.fromfile(path, np.uint64, layout.n_blocks, offset=size)
    with open_direct(path) as fd:
        yield WeightFile(layout, fd, str(path), sums, _state_of(fd))


def _index_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _index(path: Path) -> dict[str, Any] | None:
    """What the file beside a weight file says of it; None where it says nothing of use."""
    try:
        with _index_of(path).open("rb") as stream:
            found: Any = json.loads(stream.read(INDEX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(found, dict) and found.get("schema") == "simmem.weights/2" \
        and isinstance(found.get("data_bytes"), int) and found["data_bytes"] >= 0
    # What is looked up behind the data has to lie inside the file.
    return found if whole and found["data_bytes"] <= path.stat().st_size else None


def is_written(path: Path, layout: Layout, source: Source) -> bool:
    """Is it a file that was written for this layout and source? Raises SpecError where it is some other file."""
    if not path.exists():
        return False
    index = _index(path)
    if not path.is_file() or index is None:
        raise SpecError("is not a weight file of this version of simmem and is not overwritten", file=str(path),
                        key="--weights-file")
    status = path.stat()
    return bool(index.get("digest") == source.digest(layout) and index["data_bytes"] >= source.size_bytes(layout)
                and index.get("bytes") == status.st_size and index.get("mtime_ns") == status.st_mtime_ns)


def _write(path: Path, layout: Layout, source: Source, say: Say) -> None:
    size = source.size_bytes(layout)
    n_blocks = size // layout.block_bytes
    total = size + 8 * n_blocks
    if not path.parent.is_dir():
        raise SpecError("the folder it should be written to does not exist", file=str(path))
    free = shutil.disk_usage(path.parent).free
    if total > free:
        raise MachineError(f"the weight file takes {format_quantity(total, 'bytes')}, "
                           f"{format_quantity(free, 'bytes')} are free", file=str(path.parent), tier="storage",
                           missing_bytes=float(total - free))
    say(f"writing {format_quantity(total, 'bytes')} of weights ({source.name.split(',')[0].split(' ')[0]}) to {path}")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        try:
            with contextlib.suppress(AttributeError):  # not on macOS
                os.posix_fallocate(handle, 0, total)  # a disk that is too small says so now
            sums = np.empty(n_blocks, np.uint64)
            for offset, data in source.contents(layout):
                for start in range(0, len(data), CHUNK_BYTES):
                    piece = data[start:start + CHUNK_BYTES]
                    first = (offset + start) // layout.block_bytes
                    found = block_sums(piece, layout.block_bytes)
                    sums[first:first + len(found)] = found
                    _write_all(handle, piece, offset + start)
            _write_all(handle, sums.view(np.uint8), size)
            os.fsync(handle)
            if hasattr(os, "posix_fadvise"):  # nothing reads it through the page cache
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            status = os.fstat(handle)
        finally:
            os.close(handle)
        index = {"schema": "simmem.weights/2", "digest": source.digest(layout), "model": layout.model,
                 "precision": layout.precision, "source": source.name, "data_bytes": size, "bytes": status.st_size,
                 "mtime_ns": status.st_mtime_ns}
        # First the index: beside an older file it fits nothing, and a file without one would not be taken for ours.
        _index_of(path).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        Path(temporary).replace(path)
    except BaseException as error:
        if not path.exists():
            _index_of(path).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise MachineError(f"cannot be written: {error.strerror or error}", file=str(path),
                               tier="storage") from None
        raise
    finally:
        Path(temporary).unlink(missing_ok=True)


def _write_all(handle: int, data: Bytes, offset: int) -> None:
    view = data.data
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written
