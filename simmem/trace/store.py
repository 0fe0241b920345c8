"""How is a trace kept in a file, and how is a file that cannot be trusted read?

A trace file is safetensors: one uint8 tensor `active`, those of `EXTRA_TENSORS` that its header
describes, and that header as JSON under `header` in the file's metadata. Nothing is unpickled or
evaluated. Every promise of the file (length of its header, type and shape of the tensors) is checked
against the size of the file before memory is taken, and the digests in the header must be those of the
bits.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.errors import MachineError, SpecError, TraceError
from simmem.spec.base import validate
from simmem.trace.trace import EXTRA_TENSORS, Trace, TraceHeader, digest_of

__all__ = ["MAX_FILE_BYTES", "MAX_METADATA_BYTES", "load_trace_file", "read_header", "save_trace"]

MAX_FILE_BYTES = 2 << 30
MAX_METADATA_BYTES = 1 << 20
_LENGTH_BYTES = 8
_TENSOR = "active"
_HEADER = "header"
_ITEM_BYTES = {"U8": 1, "F16": 2, "I32": 4}


def save_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write `trace` to `path`: a temporary file beside it, then a rename, so never half a file.

    Raises
    ------
    TraceError
        A digest in the header is not that of the bits, or the file could not be read back (bounds).
    MachineError
        The operating system refused: no such folder, no permission, disk full.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = Path(path)
    if trace.header.digest != digest_of(trace.active):
        raise _bad(path, "has a digest in its header that is not that of its bits", key="digest")
    if set(trace.extras) != set(trace.header.tensors):
        raise _bad(path, "has a header that describes other tensors than it holds", key="tensors")
    for name, array in trace.extras.items():
        _check_extra(trace.header, name, path)
        if trace.header.tensors[name].sha256 != digest_of(array):
            raise _bad(path, f"has a digest of {name} in its header that is not that of its values", key="tensors")
    text = trace.header.model_dump_json(by_alias=True)
    if len(json.dumps(text, ensure_ascii=False).encode()) > MAX_METADATA_BYTES - 4096:  # the rest: names and offsets
        raise _bad(path, f"has a header of more than {MAX_METADATA_BYTES - 4096} bytes")
    n_bytes = trace.active.nbytes + sum(array.nbytes for array in trace.extras.values())
    if n_bytes > MAX_FILE_BYTES - MAX_METADATA_BYTES:
        raise _bad(path, f"holds {n_bytes} bytes of activity; a trace file has at most {MAX_FILE_BYTES}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        tensors = {_TENSOR: trace.active, **trace.extras}
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, temporary,
                  metadata={_HEADER: text})
        temporary.chmod(0o644)  # safetensors writes for the owner alone; a trace is there to be shared
        temporary.replace(path)
    except OSError as error:
        raise MachineError(f"cannot be written: {error.strerror or error}", file=str(path)) from None
    except SafetensorError as error:  # wraps the errors of the operating system
        raise MachineError(f"cannot be written: {error}", file=str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_header(path: str | os.PathLike[str]) -> TraceHeader:
    """The header of a trace file alone: reads no bits and checks no digest.

    Raises TraceError when the file cannot be read, is no safetensors file or has no valid header.
    """
    return _parse_header(_read_metadata(Path(path)), Path(path))


def load_trace_file(path: str | os.PathLike[str]) -> Trace:
    """Read a trace from a file that may be damaged or hostile.

    Raises
    ------
    TraceError
        Naming the file: it cannot be read, is larger than `MAX_FILE_BYTES`, is not safetensors, has a
        header that is missing, longer than `MAX_METADATA_BYTES` or not a `TraceHeader`, promises another
        type or shape than a tensor has, marks units past the last one, or has another digest.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    header = _parse_header(_read_metadata(path), path)
    expected = (header.n_tokens, header.n_layers, -(-header.n_units // 8))
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {_TENSOR: ("U8", expected)}
    for name, extra in header.tensors.items():
        _check_extra(header, name, path)
        shapes[name] = (extra.dtype, extra.shape)
    extras: dict[str, NDArray[Any]] = {}
    try:
        file_bytes = path.stat().st_size
        promised_bytes = sum(math.prod(shape) * _ITEM_BYTES[dtype] for dtype, shape in shapes.values())
        if promised_bytes > file_bytes:
            raise _bad(path, f"promises {promised_bytes} bytes of activity in a file of {file_bytes}")
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            if sorted(names) != sorted(shapes):
                raise _bad(path, f"holds the tensors {_some(names)}, expected " + (
                    f"one named {_TENSOR!r}" if len(shapes) == 1 else _some(list(shapes))))
            for name, (promised, size) in shapes.items():
                view = file.get_slice(name)
                dtype, shape = view.get_dtype(), tuple(view.get_shape())
                if dtype != promised or shape != size:
                    raise _bad(path, f"holds a tensor of {dtype} {shape}, its header promises {promised} {size}")
                extras[name] = np.asarray(file.get_tensor(name))
            active = extras.pop(_TENSOR)
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise _bad(path, f"is truncated or not a safetensors file: {error}") from None
    if header.digest != digest_of(active):
        raise _bad(path, "is damaged: the digest in its header is not that of its bits", key="digest")
    for name, array in extras.items():
        if header.tensors[name].sha256 != digest_of(array):
            raise _bad(path, f"is damaged: the digest of {name} in its header is not that of its values", key="tensors")
    try:
        return Trace(header, active, extras)
    except TraceError as error:
        raise _bad(path, error.message, key=error.key) from None


def _check_extra(header: TraceHeader, name: str, path: Path) -> None:
    """Raise TraceError unless a header may describe this tensor as it does."""
    if name not in EXTRA_TENSORS:
        raise _bad(path, f"describes a tensor {_some([name])}, known are {', '.join(EXTRA_TENSORS)}", key="tensors")
    extra = header.tensors[name]
    tokens, layers, units = header.n_tokens, header.n_layers, header.n_units
    first, last = extra.shape[0], extra.shape[-1]
    fits = {
        "router_logits": extra.dtype == "F16" and extra.shape == (tokens, layers, units),
        "router_weights": extra.dtype == "F16" and extra.shape == (tokens, layers, last) and last <= units,
        "prefill": extra.dtype == "U8" and extra.shape == (first, layers, -(-units // 8)) and first <= tokens,
        "tokens": extra.dtype == "I32" and extra.shape == (tokens,),
        "asked": extra.dtype == "U8" and extra.shape[1:] == (tokens, layers, -(-units // 8)),
    }
    if not fits[name]:
        raise _bad(path, f"describes {name} as {extra.dtype} {extra.shape}, which does not go with {tokens} tokens, "
                         f"{layers} layers of {units} units", key="tensors")


def _read_metadata(path: Path) -> dict[str, object]:
    """The `__metadata__` of a safetensors file, bounded, without trusting anything in it."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _bad(path, "is not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise _bad(path, f"is {status.st_size} bytes long; a trace file has at most {MAX_FILE_BYTES}")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if status.st_size < _LENGTH_BYTES or length > status.st_size - _LENGTH_BYTES:
                raise _bad(path, "is truncated or not a safetensors file: the header it promises is longer than "
                                 "the file")
            if length > MAX_METADATA_BYTES:
                raise _bad(path, f"has a header of {length} bytes; at most {MAX_METADATA_BYTES} are read")
            raw = file.read(length)
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror or error}") from None
    metadata = _parse_json(raw, path).get("__metadata__")
    if not isinstance(metadata, dict):
        raise _bad(path, "is a safetensors file without the metadata of a trace")
    return metadata


def _parse_header(metadata: dict[str, object], path: Path) -> TraceHeader:
    text = metadata.get(_HEADER)
    if not isinstance(text, str):
        raise _bad(path, f"is a safetensors file without {_HEADER!r} in its metadata: not a trace")
    try:
        header = validate(TraceHeader, _parse_json(text, path), file=str(path))
    except SpecError as error:
        raise _bad(path, f"has a header that is not a trace's: {error.message}", key=error.key) from None
    for key, value in header:
        said = _texts(value.model_dump()) if key in ("imported", "captured") and value is not None else [value]
        if key == "predictors":
            said = [text for one in value for text in (one.asks, one.quality and one.quality.text)]
        if any(isinstance(one, str) and not one.isprintable() for one in said):  # it would reach the terminal
            raise _bad(path, "holds characters that cannot be printed", key=key)
    return header


def _texts(fields: dict[str, Any]) -> list[Any]:
    """The values of a part of the header, and the names and values of the tables in it."""
    tables = [part for part in fields.values() if isinstance(part, dict)]
    return [*fields.values(), *(text for table in tables for pair in table.items() for text in pair)]


def _parse_json(raw: bytes | str, path: Path) -> dict[str, object]:
    try:
        parsed = json.loads(raw)
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _bad(path, "is truncated or not a safetensors file: its header is not JSON") from None
    if not isinstance(parsed, dict):
        raise _bad(path, "is truncated or not a safetensors file: its header is not a JSON object")
    return parsed


def _bad(path: Path, message: str, *, key: str | None = None) -> TraceError:
    return TraceError(message, file=str(path), key=key)


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"
