"""Which trace does a routing log of another program hold, when its columns are stated and never guessed?

A record is an access (token, layer, one id), a token in a layer (token, layer, list of ids), a token (token, a list
for each layer) or a whole sequence (a list of those). Which one follows from the fields that are there: token and
layer, token alone, or neither. What the log calls layers and tokens is put in order and counted from 0; the header
keeps the names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError, TraceError
from simmem.spec.model import Model
from simmem.spec.precision import matrix_bytes_per_param
from simmem.trace.logfile import field_names, lookup, numbered_fields, read_records, sha256_of_file
from simmem.trace.trace import Imported, Trace, TraceHeader, digest_of

__all__ = ["MAX_TOKENS", "MAX_TRACE_BYTES", "LogLayout", "LogShape", "import_log", "layout_of", "shape_of_model",
           "stated_shape"]

MAX_TRACE_BYTES = 1 << 29
"""Of packed bits: tokens × layers × units / 8."""
MAX_TOKENS = 1 << 20
MAX_LAYERS = 10_000
MAX_UNITS = 1_000_000
MAX_ID = 1 << 53
_UNIT_NAMES = ("expert", "experts", "unit", "units", "neuron", "neurons")
_MAX_NAME = 200
_MAX_NOTE = 1000
_MAX_DIGITS = 15
_WHOLE = re.compile(r"(-?[0-9]{1,15})(?:\.0{1,15})?")
_APART = re.compile(r"[\s,;|]+")

LogUnit = Literal["expert", "ffn-neuron"]


@dataclass(frozen=True)
class LogShape:
    """What the trace will have: layers, units a layer, and the bytes of one. [B]"""

    model: str
    unit: LogUnit
    n_layers: int
    n_units: int
    unit_bytes: float
    precision: str
    most: int | None = None
    """Units that a token uses in a layer at most, where the model says so."""


@dataclass(frozen=True)
class LogLayout:
    """What the log calls things: fields by "token", "layer", "unit" and "sequence"."""

    columns: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, str] = field(default_factory=dict)
    first_unit: int = 0
    allow_missing: bool = False


def shape_of_model(model: Model, unit: LogUnit = "expert", precision: str | None = None) -> LogShape:
    """The units of a model at a precision, its own when None. Raises SpecError where it has none of them."""
    shape, experts = model.units_of(unit), model.architecture.experts
    if shape is None:
        raise SpecError(f"{model.name} has no {unit}s that a trace could be of", key="--model")
    at = precision or model.own_precision
    if unit == "expert":
        assert experts is not None
        return LogShape(model.name, unit, *shape, model.group_bytes(at)["experts"] / (shape[0] * shape[1]), at,
                        experts.per_token)
    return LogShape(model.name, unit, *shape, model.unit_bytes(at), at)


def stated_shape(unit: LogUnit, n_layers: int, n_units: int, unit_bytes: float, precision: str) -> LogShape:
    """The units of a model that is not known here. Raises SpecError for what no model has."""
    for key, found, most in (("--n-layers", n_layers, MAX_LAYERS), ("--n-experts", n_units, MAX_UNITS)):
        if not 1 <= found <= most:
            raise SpecError(f"found {found}, expected 1 to {most}", key=key)
    matrix_bytes_per_param(precision)
    return LogShape("unknown", unit, n_layers, n_units, unit_bytes, precision)


def layout_of(columns: Sequence[str] = (), where: Sequence[str] = (), *, sequence: str | None = None,
              first_unit: int = 0, allow_missing: bool = False) -> LogLayout:
    """A layout from texts such as "token=tok_idx,layer=layer_id,expert=topk_ids" and "phase=decode".

    Raises SpecError for a text without `=`, a thing that is not token, layer, expert or sequence, or one named twice.
    """
    found: dict[str, str] = {} if sequence is None else {"sequence": sequence}
    for what, name in (_pair(part, "--columns") for text in columns for part in text.split(",")):
        what = "unit" if what in _UNIT_NAMES else what
        if what not in ("token", "layer", "unit", "sequence"):
            raise SpecError(f"found {what!r}, expected token, layer, expert or sequence = its name in the log",
                            key="--columns")
        if what in found:
            raise SpecError(f"names the field of the {what} twice", key="--columns")
        found[what] = name
    wanted: dict[str, str] = {}
    for name, value in (_pair(text, "--where") for text in where):
        if name in wanted:
            raise SpecError(f"names {name!r} twice", key="--where")
        wanted[name] = value
    if not 0 <= first_unit <= MAX_UNITS:
        raise SpecError(f"found {first_unit}, expected 0 or more", key="--first-expert")
    return LogLayout(found, wanted, first_unit, allow_missing)


def import_log(path: Path, shape: LogShape, layout: LogLayout | None = None, *, name: str,
               text: str = "unknown") -> Trace:
    """Read a routing log as a captured trace.

    Parameters
    ----------
    path : JSON lines or CSV (see `read_records`).
    shape, layout : what the trace has, and what the log calls it.
    name, text : of the trace, and of what was read when the log was written.

    Raises
    ------
    TraceError
        Naming file, line and field: whatever `read_records` refuses; a field that is missing; an id that is no whole
        number or out of range; a unit or record that comes twice; more layers, tokens or units a token than there
        are; and, unless `layout.allow_missing`, a token or layer without a record.
    SpecError
        A text that cannot be printed.
    """
    layout = layout or LogLayout()
    for said in (name, text, path.name, *layout.columns.values(), *layout.where, *layout.where.values()):
        if not said.isprintable() or len(said) > _MAX_NOTE:
            raise SpecError(f"found {said[:_MAX_NAME]!r}, expected at most {_MAX_NOTE} signs that can be printed")
    digest = sha256_of_file(path)
    marks, reader = _Marks(path, shape), None
    for line, record in read_records(path):
        reader = reader or _Reader(path, shape, layout, line, record)
        reader.read(marks, line, record)
    if not marks.rows:
        raise TraceError("holds no record" if reader is None else f"holds no record with {reader.wanted}",
                         file=str(path))
    assert reader is not None
    active, layer_ids, missing = marks.collect(layout.allow_missing)
    origin = Imported(file=path.name, sha256=digest, columns=reader.columns, where=dict(layout.where),
                      layer_ids=layer_ids, first_unit=layout.first_unit, sequences=len(marks.sequences),
                      missing=missing)
    expert = shape.unit == "expert"
    header = TraceHeader(
        name=name, kind="captured", model=shape.model, n_tokens=active.shape[0], n_layers=shape.n_layers,
        n_units=shape.n_units, unit=shape.unit, unit_bytes=shape.unit_bytes, unit_precision=shape.precision,
        criterion="the router's choice, as the log has it" if expert else "not stated in the log",
        threshold="none" if expert else "not stated in the log", records="active",
        # a router runs before its experts are read; how an engine would know neurons, no log of them says
        predictor="none" if expert else "oracle", text=text, imported=origin,
        created=datetime.now(UTC).date().isoformat(), digest=digest_of(active))
    return Trace(header, active)


def _pair(text: str, key: str) -> tuple[str, str]:
    name, sign, value = (part.strip() for part in text.partition("="))
    if not sign or not name or not value:
        raise SpecError(f"found {text[:_MAX_NAME]!r}, expected NAME=VALUE", key=key)
    return name, value


class _Reader:
    """One way to read every record, settled by the first."""

    def __init__(self, path: Path, shape: LogShape, layout: LogLayout, line: int, record: Mapping[str, Any]) -> None:
        self.path, self.shape, self.layout = path, shape, layout
        self.wanted = " and ".join(f"{name} = {value}" for name, value in layout.where.items())
        named = layout.columns
        units = [n for n in _UNIT_NAMES if n in record]
        if "unit" not in named and len(units) != 1:
            what = "expert" if shape.unit == "expert" else "neuron"
            raise self._no_field(line, record, what, units)
        self.unit = named.get("unit") or units[0]
        self.numbered = numbered_fields(record, self.unit) if "*" in self.unit and self.unit not in record else []
        self.token = named.get("token") or ("token" if "token" in record else None)
        self.layer = named.get("layer") or ("layer" if "layer" in record else None)
        self.sequence = named.get("sequence")
        nested = self._is_list(line, record)
        if self.token is None and not (nested and self.layer is None):
            raise self._no_field(line, record, "token", [])
        if self.layer is None and not nested:
            raise self._no_field(line, record, "layer", [])
        taken = {"token": self.token, "layer": self.layer, "unit": self.unit, "sequence": self.sequence}
        self.columns = {what: name for what, name in taken.items() if name is not None}

    def read(self, marks: _Marks, line: int, record: Mapping[str, Any]) -> None:
        for name, value in self.layout.where.items():
            found = self._get(line, record, name)
            if (found if isinstance(found, str) else _shown(found)) != value:
                return
        sequence: object = None
        if self.sequence is not None:
            sequence = self._get(line, record, self.sequence)
            if not isinstance(sequence, (str, int)) or len(str(sequence)) > _MAX_NAME:
                raise self._bad(line, self.sequence, sequence, f"text or a whole number of at most {_MAX_NAME} signs")
        elif self.token is None:
            sequence = line  # a record is a sequence
        if self.numbered:
            chosen: Any = [cell for n in self.numbered if (cell := self._get(line, record, n)) not in ("", None)]
        else:
            chosen = self._get(line, record, self.unit)
        if self.token is None:
            for token, layers in enumerate(self._list(line, chosen, "a list of tokens, each a list of layers")):
                self._read_token(marks, line, sequence, token, layers)
            return
        token = self._whole(line, self.token, self._get(line, record, self.token), 0, MAX_ID)
        if self.layer is None:
            self._read_token(marks, line, sequence, token, chosen)
            return
        layer = self._whole(line, self.layer, self._get(line, record, self.layer), 0, MAX_ID)
        ids, whole = self._ids(line, chosen)
        marks.add(line, sequence, token, layer, ids, whole)

    def _read_token(self, marks: _Marks, line: int, sequence: object, token: int, value: Any) -> None:
        for layer, inner in enumerate(self._list(line, value, "a list for each layer")):
            if inner is not None:  # a layer that routes nothing
                ids = self._list(line, inner, "a list of ids for each layer")
                marks.add(line, sequence, token, layer, self._ids(line, ids)[0], True)

    def _ids(self, line: int, value: Any) -> tuple[list[int], bool]:
        """Units of a record, and whether that is all there is of this token and layer."""
        whole, first, n_units = True, self.layout.first_unit, self.shape.n_units
        if isinstance(value, str) and value.isdigit():  # most of a long log
            return [self._whole(line, self.unit, value, first, first + n_units - 1) - first], False
        if isinstance(value, str):
            inner = value.strip()
            whole = inner.startswith("[") and inner.endswith("]")
            value = [part for part in _APART.split(inner[1:-1] if whole else inner) if part]
            whole = whole or len(value) > 1
        elif not isinstance(value, list):
            value, whole = [value], False
        ids = [self._whole(line, self.unit, one, first, first + n_units - 1) - first for one in value]
        if len(set(ids)) < len(ids):
            twice = next(one for i, one in enumerate(ids) if one in ids[:i])
            raise self._bad(line, self.unit, twice + first, "every id once", "twice")
        return ids, whole

    def _is_list(self, line: int, record: Mapping[str, Any]) -> bool:
        return not self.numbered and isinstance(self._get(line, record, self.unit), list)

    def _list(self, line: int, value: Any, expected: str) -> list[Any]:
        if not isinstance(value, list):
            raise self._bad(line, self.unit, value, expected)
        return value

    def _get(self, line: int, record: Mapping[str, Any], name: str) -> Any:
        try:
            return record[name] if name in record else lookup(record, name)
        except KeyError:
            raise self._no_field(line, record, name, []) from None

    def _whole(self, line: int, name: str, value: Any, low: int, high: int) -> int:
        number: int | None = None
        if type(value) is int:
            number = value
        elif isinstance(value, str) and value.isdigit() and value.isascii() and len(value) <= _MAX_DIGITS:
            number = int(value)
        elif isinstance(value, str) and (match := _WHOLE.fullmatch(value.strip())):
            number = int(match[1])
        elif isinstance(value, float) and value.is_integer() and abs(value) < MAX_ID:
            number = int(value)
        if number is None or not low <= number <= high:
            raise self._bad(line, name, value, f"a whole number from {low} to {high}")
        return number

    def _no_field(self, line: int, record: Mapping[str, Any], name: str, among: list[str]) -> TraceError:
        fields = ", ".join(one[:_MAX_NAME] for one in field_names(record)) or "none"
        wanted = f"only one of {' and '.join(among)}" if among else f"one named {name[:_MAX_NAME]!r}"
        stated = name in (*self.layout.columns.values(), *self.layout.where)
        hint = "" if stated else "; --columns token=NAME,layer=NAME,expert=NAME says what is what"
        return TraceError(f"found the fields {fields}, expected {wanted}{hint}", file=str(self.path),
                          key=f"line {line}")

    def _bad(self, line: int, name: str, found: Any, expected: str, how: str = "") -> TraceError:
        return TraceError(f"found {_shown(found)}{' ' if how else ''}{how}, expected {expected}", file=str(self.path),
                          key=f"line {line}, {name[:_MAX_NAME]}")


def _shown(value: Any) -> str:
    """A value from a log as it may be shown: never a whole list, which may be deep and long."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return (repr(value) if isinstance(value, (str, float)) else str(value))[:80]


class _Marks:
    """Bits as they arrive: a row for each (sequence, token), a column for each layer, both in order of arrival."""

    def __init__(self, path: Path, shape: LogShape) -> None:
        self.path, self.shape = path, shape
        self.sequences: dict[object, int] = {}
        self.rows: dict[tuple[int, int], int] = {}
        self.layers: dict[int, int] = {}
        self.width = -(-shape.n_units // 8)
        self.bits = bytearray()
        self.state = bytearray()
        """Per cell: 0 nothing yet, 1 single accesses, 2 a record that is all there is of it."""

    def add(self, line: int, sequence: object, token: int, layer: int, ids: list[int], whole: bool) -> None:
        number = self.sequences.setdefault(sequence, len(self.sequences))
        row = self.rows.get((number, token))
        if row is None:
            row = self._new_row(line, (number, token))
        column = self.layers.get(layer)
        if column is None:
            column = self._new_layer(line, layer)
        cell = row * self.shape.n_layers + column
        if self.state[cell] and (whole or self.state[cell] == 2):
            raise self._bad(line, f"is a second record of token {token} in layer {layer}{self._of(number)}; where "
                                  "several sequences share a log, --sequence names what tells them apart")
        self.state[cell] = 2 if whole else 1
        start = cell * self.width
        for unit in ids:
            place, bit = start + (unit >> 3), 1 << (unit & 7)
            if self.bits[place] & bit:
                raise self._bad(line, f"is the second access of token {token} in layer {layer} to {unit}"
                                      f"{self._of(number)}; where several sequences share a log, --sequence names "
                                      "what tells them apart")
            self.bits[place] |= bit

    def _new_row(self, line: int, key: tuple[int, int]) -> int:
        row, n_layers = len(self.rows), self.shape.n_layers
        if row >= MAX_TOKENS or (row + 1) * n_layers * self.width > MAX_TRACE_BYTES:
            raise self._bad(line, f"is of token {row + 1}; a trace of {n_layers} layers of {self.shape.n_units} units "
                                  f"has at most {min(MAX_TOKENS, MAX_TRACE_BYTES // (n_layers * self.width))}")
        self.bits.extend(bytes(n_layers * self.width))
        self.state.extend(bytes(n_layers))
        self.rows[key] = row
        return row

    def _new_layer(self, line: int, layer: int) -> int:
        if len(self.layers) >= self.shape.n_layers:
            raise self._bad(line, f"is of layer {layer}, beside {_some(sorted(self.layers))}; "
                                  f"{self._whose()} has {self.shape.n_layers} layers with {self.shape.unit}s")
        self.layers[layer] = len(self.layers)
        return self.layers[layer]

    def collect(self, allow_missing: bool) -> tuple[NDArray[np.uint8], tuple[int, ...], int]:
        """The bits in order of sequence, token and layer; what the log calls the layers; how many cells it lacks."""
        shape = self.shape
        if len(self.layers) < shape.n_layers:
            raise TraceError(f"holds the layers {_some(sorted(self.layers))}: {len(self.layers)}, but {self._whose()} "
                             f"has {shape.n_layers} with {shape.unit}s", file=str(self.path))
        keys = np.array(list(self.rows), np.int64)
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        keys = keys[order]
        columns = np.argsort(np.array(list(self.layers), np.int64))
        layer_ids = tuple(sorted(self.layers))
        state = np.frombuffer(self.state, np.uint8).reshape(-1, shape.n_layers)[order][:, columns]
        if not allow_missing:
            self._refuse_gaps(keys, state, layer_ids)
        active = np.frombuffer(self.bits, np.uint8).reshape(-1, shape.n_layers, self.width)
        active = active[order[:, None], columns[None, :]]
        counts = np.bitwise_count(active).sum(axis=2, dtype=np.int64)
        if shape.most is not None and counts.max() > shape.most:
            (number, token), column = keys[counts.argmax() // shape.n_layers], counts.argmax() % shape.n_layers
            raise TraceError(f"token {token} uses {counts.max()} {shape.unit}s in layer {layer_ids[column]}"
                             f"{self._of(number)}, but {shape.model} routes to {shape.most}; where several sequences "
                             "share a log, --sequence names what tells them apart", file=str(self.path))
        return active, layer_ids, int(np.count_nonzero(state == 0))

    def _refuse_gaps(self, keys: NDArray[np.int64], state: NDArray[np.uint8], layer_ids: tuple[int, ...]) -> None:
        jumps = np.flatnonzero((np.diff(keys[:, 0]) == 0) & (np.diff(keys[:, 1]) != 1))
        absent = np.flatnonzero(state == 0)
        if jumps.size and (not absent.size or jumps[0] < absent[0] // state.shape[1]):
            number, token = keys[jumps[0]] + (0, 1)
            missing = f"token {token}{self._of(number)}"
        elif absent.size:
            number, token = keys[absent[0] // state.shape[1]]
            missing = f"token {token} in layer {layer_ids[absent[0] % state.shape[1]]}{self._of(number)}"
        else:
            return
        raise TraceError(f"has no record of {missing}, the first of those missing; with --allow-missing a layer "
                         "without a record touches nothing and a token without any is left out", file=str(self.path))

    def _of(self, number: int) -> str:
        if len(self.sequences) == 1:
            return ""
        return f" of sequence {_shown(list(self.sequences)[number])}"

    def _whose(self) -> str:
        return "--n-layers" if self.shape.model == "unknown" else self.shape.model

    def _bad(self, line: int, message: str) -> TraceError:
        return TraceError(message, file=str(self.path), key=f"line {line}")


def _some(layers: list[int]) -> str:
    return f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else str(layers[0])
