"""How does a trace reach other tools? A long table of what was touched: token, layer, unit, counted from 0.

Parquet and CSV have a row for each unit touched, JSON lines one record for each token and layer with a list of units.
A token that touches nothing in a layer has one row without a unit (null, an empty cell, an empty list), so that a
table says everything the trace does: importing CSV or JSON lines gives the same bits.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.errors import MachineError, SpecError
from simmem.trace.trace import Trace

__all__ = ["EXPORT_FORMATS", "export_trace"]

EXPORT_FORMATS = (".parquet", ".csv", ".jsonl")
_BLOCK_CELLS = 1 << 22
"""Bits of the trace that are unpacked, and rows that are held, at once."""

Ids = NDArray[np.int32]


def export_trace(trace: Trace, path: Path) -> int:
    """Write a trace as a table in the format that the name ends in, and return how many rows or records it has.

    Parquet keeps the header as JSON under `simmem.trace` in the metadata of its schema; CSV and JSON lines have
    no place for it. A temporary file beside `path` is renamed into place.

    Raises
    ------
    SpecError
        Another ending than `EXPORT_FORMATS`.
    MachineError
        The file cannot be written, or pyarrow is not installed.
    """
    if path.suffix not in EXPORT_FORMATS:
        raise SpecError(f"found a name that ends in {path.suffix!r}, expected one of {', '.join(EXPORT_FORMATS)}",
                        file=str(path), key="--out")
    write = {".parquet": _write_parquet, ".csv": _write_csv, ".jsonl": _write_jsonl}[path.suffix]
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        os.close(handle)
        rows = write(trace, temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise MachineError(f"cannot be written: {error.strerror or error}", file=str(path)) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    return rows


def _blocks(trace: Trace) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """First token and unpacked bits (tokens, layers, units) of stretches of at most `_BLOCK_CELLS` bits."""
    h = trace.header
    step = max(_BLOCK_CELLS // (h.n_layers * h.n_units), 1)
    for start in range(0, h.n_tokens, step):
        bits = np.unpackbits(trace.active[start : start + step], axis=2, count=h.n_units, bitorder="little")
        yield start, bits.view(np.bool_)


def _rows(trace: Trace) -> Iterator[tuple[Ids, Ids, Ids]]:
    """token, layer and unit of every row in order, in stretches; unit -1 where a token touches nothing in a layer."""
    for start, bits in _blocks(trace):
        nothing = np.logical_not(np.any(bits, axis=2, keepdims=True))
        # one more unit in front, touched where nothing else is
        token, layer, unit = np.nonzero(np.concatenate((nothing, bits), axis=2))
        for first in range(0, token.size, _BLOCK_CELLS):
            part = slice(first, first + _BLOCK_CELLS)
            yield ((token[part] + start).astype(np.int32), layer[part].astype(np.int32),
                   (unit[part] - 1).astype(np.int32))


def _write_csv(trace: Trace, path: Path) -> int:
    rows = 0
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("token", "layer", "unit"))
        for token, layer, unit in _rows(trace):
            writer.writerows(zip(token.tolist(), layer.tolist(), ("" if u < 0 else u for u in unit.tolist()),
                                 strict=True))
            rows += token.size
    return rows


def _write_jsonl(trace: Trace, path: Path) -> int:
    with path.open("w", encoding="utf-8") as stream:
        for start, bits in _blocks(trace):
            for token, layers in enumerate(bits, start):
                stream.writelines(json.dumps({"token": token, "layer": layer, "unit": np.flatnonzero(used).tolist()})
                                  + "\n" for layer, used in enumerate(layers))
    return trace.header.n_tokens * trace.header.n_layers


def _write_parquet(trace: Trace, path: Path) -> int:
    arrow, parquet = _pyarrow()
    header = trace.header.model_dump_json(by_alias=True)
    schema = arrow.schema([("token", arrow.int32()), ("layer", arrow.int32()), ("unit", arrow.int32())],
                          metadata={"simmem.trace": header})
    rows = 0
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for token, layer, unit in _rows(trace):
            columns = [arrow.array(token), arrow.array(layer), arrow.array(unit, mask=unit < 0)]
            writer.write_table(arrow.table(columns, schema=schema))  # a row group of its own
            rows += token.size
    return rows


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MachineError(f"parquet needs pyarrow ({error}); install with: pip install 'simmem[export]'") from None
    return pyarrow, pyarrow.parquet
