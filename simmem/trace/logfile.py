"""What does a log that somebody else's program wrote say, record by record, without trusting its size or its text?

JSON lines or CSV, plain or gzip, read one line at a time. Every bound is checked before memory is taken, and every
refusal names file and line.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from simmem.errors import TraceError

__all__ = ["MAX_LINE_BYTES", "MAX_LOG_BYTES", "field_names", "lookup", "numbered_fields", "read_records",
           "sha256_of_file"]

MAX_LOG_BYTES = 4 << 30
"""Of text: a compressed log is counted as it expands."""
MAX_LINE_BYTES = 8 << 20
MAX_EXPANSION = 250
"""Times its own size that a compressed log may expand to; logs of small numbers reach some tens."""
MAX_COLUMNS = 4096
MAX_COMMENTS = 1000
"""Lines that are empty, or comments above a CSV file's column names."""
_SHOWN_FIELDS = 20
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON = (".jsonl", ".ndjson", ".json")


def read_records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The records of a log with the number of the line each ends on, by the name of the file.

    `.jsonl`, `.ndjson`, `.json`: one JSON object a line. `.csv`, `.tsv`: one row a line below the column names (lines
    that begin with # may stand above them), every value as text. A `.gz` behind it: the same, compressed.

    Raises
    ------
    TraceError
        Naming file and line: no regular file, another kind of file, not UTF-8, too long a line or file, a line that is
        no JSON object, nested too deeply, a row with more or fewer cells than there are columns, a damaged archive.
    """
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in _DELIMITERS and kind not in _JSON:
        raise _bad(path, f"found a name that ends in {kind!r}, expected one of {', '.join((*_JSON, *_DELIMITERS))}, "
                         "each also with .gz")
    lines = _lines(path)
    return _json_records(path, lines) if kind in _JSON else _csv_records(path, lines, _DELIMITERS[kind])


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file as it lies on the disk, compressed or not. Raises TraceError when it cannot be read."""
    _check_size(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror or error}") from None


def lookup(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field, `a.b` being field b of the object a; KeyError where there is none."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, dict):
            raise KeyError(name)
        value = value[part]
    return value


def field_names(record: Mapping[str, Any]) -> list[str]:
    """The names by which the fields of a record can be asked for, those of nested objects with a dot; at most 20."""
    found: list[str] = []
    for name, value in record.items():
        found += [f"{name}.{inner}" for inner in list(value)[:_SHOWN_FIELDS]] if isinstance(value, dict) else [name]
        if len(found) > _SHOWN_FIELDS:
            return [*found[:_SHOWN_FIELDS], "…"]
    return found


def numbered_fields(record: Mapping[str, Any], pattern: str) -> list[str]:
    """The fields that a pattern such as `expert_*` stands for, the * being a whole number, in the order of that."""
    before, _, after = pattern.partition("*")
    numbered = re.compile(re.escape(before) + r"([0-9]{1,9})" + re.escape(after))
    found = [(int(match[1]), name) for name in record if (match := numbered.fullmatch(name))]
    return [name for _, name in sorted(found)]


# --- lines ---------------------------------------------------------------------------------------------------------


def _check_size(path: Path) -> int:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null in the name
        raise _bad(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise _bad(path, "is not a file")
    if status.st_size > MAX_LOG_BYTES:
        raise _bad(path, f"is {status.st_size} bytes long; a log has at most {MAX_LOG_BYTES}")
    return status.st_size


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends, from 1; empty ones are left out."""
    size = _check_size(path)
    packed = path.suffix == ".gz"
    limit = min(MAX_LOG_BYTES, MAX_EXPANSION * size + MAX_LINE_BYTES) if packed else MAX_LOG_BYTES
    total = number = empty = 0
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                total += len(raw)
                if len(raw) > MAX_LINE_BYTES:
                    raise _bad(path, f"is longer than {MAX_LINE_BYTES} bytes", number)
                if total > limit:
                    raise _bad(path, f"expands to more than {limit} bytes from {size}" if packed else
                               f"is past the {limit} bytes that a log has at most", number)
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text and not text.isspace():
                    yield number, text
                    continue
                empty += 1
                if empty > MAX_COMMENTS:
                    raise _bad(path, f"is one of more than {MAX_COMMENTS} empty ones", number)
    except UnicodeDecodeError:
        raise _bad(path, "is not UTF-8 text", number) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _bad(path, f"is damaged or not a gzip file ({error})", number + 1) from None
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror or error}") from None


# --- records -------------------------------------------------------------------------------------------------------


def _json_records(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, text in lines:
        try:
            record = json.loads(text)
        except RecursionError:
            raise _bad(path, "is nested too deeply", number) from None
        except ValueError as error:  # also a number of more digits than Python reads
            raise _bad(path, f"is not JSON ({_reason(error)}); expected one object a line", number) from None
        if not isinstance(record, dict):
            raise _bad(path, f"found a JSON {_JSON_NAMES[type(record)]}, expected one object a line", number)
        yield number, record


_JSON_NAMES = {list: "list", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


def _reason(error: ValueError) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else "a number that is too long"


def _csv_records(path: Path, lines: Iterator[tuple[int, str]],
                 delimiter: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    names: list[str] | None = None
    for number, text in lines:
        if names is None and text.startswith("#"):
            if number > MAX_COMMENTS:
                raise _bad(path, f"is one of more than {MAX_COMMENTS} above the names of the columns", number)
            continue
        cells = _cells(path, number, text, delimiter)
        if names is None:
            names = _column_names(path, number, cells)
            continue
        if len(cells) != len(names):
            raise _bad(path, f"found {len(cells)} cells, expected {len(names)} as there are columns", number)
        yield number, dict(zip(names, cells, strict=True))


def _cells(path: Path, number: int, text: str, delimiter: str) -> list[str]:
    if '"' not in text:
        return text.split(delimiter)
    try:  # a line at a time: a quote that is never closed would otherwise swallow the rest of the file
        return next(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise _bad(path, f"is not a row of CSV ({error})", number) from None


def _column_names(path: Path, number: int, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(names) > MAX_COLUMNS:
        raise _bad(path, f"found {len(names)} columns, expected at most {MAX_COLUMNS}", number)
    seen: set[str] = set()
    for name in names:
        if name and name in seen:
            raise _bad(path, f"names the column {name[:80]!r} twice", number)
        seen.add(name)
    return names


def _bad(path: str | os.PathLike[str], message: str, line: int | None = None) -> TraceError:
    return TraceError(message, file=str(path), key=None if line is None else f"line {line}")
