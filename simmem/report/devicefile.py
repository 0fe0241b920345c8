"""How do measured figures become a device file, and what changes in one that was there?

A device file is kept as the tables that TOML reads: what was not measured stays as it was written, to the letter, apart
from comments, which TOML does not hand over.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simmem.cost.derive import Derived
from simmem.cost.figures import MeasuredFigure
from simmem.errors import CalibrationError
from simmem.spec.base import load_toml, validate
from simmem.spec.device import Device, load_device
from simmem.spec.measurement import CALIBRATED, Measurements, measured_by
from simmem.units import format_quantity

__all__ = ["Change", "device_name", "new_tables", "tables_of", "to_device", "toml_text", "updated_tables"]

Tables = dict[str, Any]

# What figures may be had of, and what each part is, as in a device file.
_PARTS: dict[str, dict[str, str]] = {
    "memory.flash": {"kind": "storage"},
    "memory.dram": {"kind": "host"},
    "memory.vram": {"kind": "device"},
    "agent.cpu": {"memory": "dram"},
    "agent.gpu": {"memory": "vram"},
    "link.flash": {"kind": "storage", "source": "flash", "target": "dram"},
    "link.h2d": {"kind": "copy", "source": "dram", "target": "vram"},
    "link.d2h": {"kind": "copy", "source": "vram", "target": "dram"},
}
_NEEDED = {
    "memory": ("capacity",), "agent": ("flop_share", "rate", "rate_share", "op_overhead"), "link": ("rate", "latency"),
    "link.flash": ("rate", "latency", "request_time", "request_rate", "block"),
}
_PROBES = {"rate_share": "gemv", "flop_share": "gemm", "flop_per_s": "gemm", "op_overhead": "op-call",
           "link.flash": "storage-read", "rate": "memory-read"}
_DIMENSIONS = {"capacity": "bytes", "reserved": "bytes", "block": "bytes", "latency": "s", "request_time": "s",
               "batch_time": "s", "reader_time": "s",
               "op_overhead": "s", "step_overhead": "s", "wake_time": "s", "flop_share": "ratio",
               "rate_share": "ratio", "share": "ratio",
               "overload_exponent": "ratio", "saturation_exponent": "ratio", "best_depth": "count",
               "rate": "bytes_per_s"}
_PREFIXES = {"bytes": ("B", {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}),
             "bytes_per_s": ("B/s", {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}),
             "flop_per_s": ("FLOP/s", {"": 1.0, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}),
             "s": ("s", {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0})}
_DIGITS = 4
_BUSY = 0.1
_BARE = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Change:
    """A figure of a device file before and after."""

    key: str
    before: str | None
    after: str


def device_name(out: Path) -> str:
    """The name of a device by that of its file."""
    return re.sub(r"[^a-z0-9.-]+", "-", out.stem.lower()).strip("-.") or "machine"


def new_tables(derived: Derived, measured: Measurements) -> Tables:
    """A whole device file of what was measured.

    Raises CalibrationError where a figure that a device needs could not be had.
    """
    tables: Tables = {"schema": "simmem.device/1", "name": measured.name, "title": _title(measured),
                      "notes": _notes(derived, measured)}
    present = [part for part in _PARTS if any(key.startswith(f"{part}.") for key in derived.figures)]
    for part in dict.fromkeys([*(p for p in _PARTS if p in ("memory.flash", "memory.dram", "agent.cpu", "link.flash")),
                               *present]):
        _check_complete(part, derived, measured)
        _part(tables, part).update(_PARTS[part])
    for figure in derived.figures.values():
        _put(tables, figure, measured)
    return tables


def updated_tables(old: Tables, derived: Derived, measured: Measurements) -> tuple[Tables, list[Change]]:
    """A device file with the figures that were measured now in the place of its own, and the rest as it was.

    Figures of parts that the file has not are left out.
    """
    tables = copy.deepcopy(old)
    _drop_stale(tables, derived)
    changes = []
    for figure in derived.figures.values():
        part = ".".join(figure.key.split(".")[:2])
        if figure.key.startswith("interference."):
            pass
        elif part.split(".")[1] not in tables.get(part.split(".")[0], {}):
            continue
        before = _put(tables, figure, measured)
        after = _value_text(figure)
        if after != before:
            changes.append(Change(figure.key, before, after))
    return tables, changes


def _drop_stale(tables: Tables, derived: Derived) -> None:
    """Take out figures of an earlier calibration that were found together with what is replaced now."""
    together = {"link.flash.request_time": ("link", "flash", ("saturation_exponent", "single_rate", "best_depth",
                                                              "overload_exponent", "reader_time", "batch_time")),
                "agent.cpu.op_overhead": ("agent", "cpu", ("kernel_overhead", "wake_time"))}
    for known, (kind, name, fields) in together.items():
        part = tables.get(kind, {}).get(name, {})
        for field in fields if known in derived.figures else ():
            entry = part.get(field, {})
            one = next(iter(entry.values()), {}) if field == "kernel_overhead" else entry
            if isinstance(one, dict) and str(one.get("source", "")).startswith(CALIBRATED):
                del part[field]


def tables_of(path: Path) -> Tables:
    """A device file as its tables, checked to be one. Raises SpecError."""
    load_device(str(path.absolute()))
    return load_toml(path)


def to_device(tables: Tables, *, file: str) -> Device:
    """The device that the tables describe, without the cost model that it may name. Raises SpecError."""
    return validate(Device, {k: v for k, v in tables.items() if k != "cost_model"}, file=file)


# --- figures into tables --------------------------------------------------------------------------------------------


def _put(tables: Tables, figure: MeasuredFigure, measured: Measurements) -> str | None:
    """Put a figure in its place; the value that was there."""
    kind, name, field, *rest = figure.key.split(".")
    entry = {"value": _quantity(figure.value, _dimension(figure.key)), "kind": figure.kind.value,
             "range": [_quantity(figure.low, _dimension(figure.key), math.floor),
                       _quantity(figure.high, _dimension(figure.key), math.ceil)],
             "source": _source(figure, measured)}
    if kind == "interference":  # interference.VICTIM.AGGRESSOR.MEMORY
        rules = tables.setdefault("interference", [])
        same = [r for r in rules if (r["victim"], r["aggressor"], r["memory"]) == (name, field, rest[0])]
        before = same[0]["share"] if same else None
        if same:
            same[0]["share"] = entry
        else:
            rules.append({"victim": name, "aggressor": field, "memory": rest[0], "share": entry})
    else:
        place = _part(tables, f"{kind}.{name}")
        if rest:
            place = place.setdefault(field, {})
        before = place.get(rest[0] if rest else field)
        place[rest[0] if rest else field] = entry
    return None if before is None else str(before["value"])


def _part(tables: Tables, part: str) -> Tables:
    kind, name = part.split(".", 1)
    found: Tables = tables.setdefault(kind, {}).setdefault(name, {})
    return found


def _dimension(key: str) -> str:
    parts = key.split(".")
    if parts[0] == "interference":
        return "ratio"
    if len(parts) > 3:
        return "s" if parts[2] == "kernel_overhead" else "flop_per_s"
    name = parts[2]
    return _DIMENSIONS.get(name, "bytes_per_s" if name.endswith("rate") else "")


def _quantity(value: float, dimension: str, rounded: Any = round) -> str | float | int:
    """As a device file spells it, to four significant digits; sizes in full."""
    if dimension == "count":
        return int(rounded(value))
    if dimension == "bytes":
        return f"{round(value)} B"
    if dimension == "ratio":
        return float(f"{_significant(value, rounded):.{_DIGITS}g}")
    unit, prefixes = _PREFIXES[dimension]
    prefix, scale = next(((p, s) for p, s in sorted(prefixes.items(), key=lambda i: -i[1]) if value >= s),
                         min(prefixes.items(), key=lambda i: i[1]))
    return f"{_significant(value / scale, rounded):.{_DIGITS}g} {prefix}{unit}".replace("e+03", "000")


def _significant(value: float, rounded: Any) -> float:
    if value <= 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - _DIGITS + 1)
    return float(rounded(value / step) * step)


def _value_text(figure: MeasuredFigure) -> str:
    return str(_quantity(figure.value, _dimension(figure.key)))


def _source(figure: MeasuredFigure, measured: Measurements) -> str:
    parts = [f"{CALIBRATED}, {measured.date}: {figure.what}"]
    if figure.n:
        parts.append(f"{figure.n} samples")
    if figure.noise_floor is not None:
        parts.append(f"noise floor {format_quantity(figure.noise_floor, 'ratio')}")
    if figure.drift is not None:
        parts.append(f"drifted by {100 * figure.drift:+.0f} % of its time")
    return ", ".join(parts)


def _check_complete(part: str, derived: Derived, measured: Measurements) -> None:
    kind = part.split(".", maxsplit=1)[0]
    missing = [n for n in _NEEDED.get(part, _NEEDED[kind]) if f"{part}.{n}" not in derived.figures]
    if kind == "agent" and not any(k.startswith(f"{part}.flop_per_s.") for k in derived.figures):
        missing.append("flop_per_s")
    if not missing:
        return
    probe = _PROBES.get(part) or _PROBES.get(missing[0], "")
    why = Counter(r.why for r in derived.refused if r.probe == probe)
    reason = f"; {why.total()} measurements of {probe} were refused, most as {why.most_common(1)[0][0]}" if why else ""
    direct = measured.machine.get("direct_io")
    if part == "link.flash" and isinstance(direct, str) and direct != "yes":
        reason = f"; {direct}; --scratch DIR measures another drive" + reason
    others, cores = measured.machine.get("cores_used_by_others"), measured.machine.get("cores")
    if isinstance(others, float) and isinstance(cores, int) and others > _BUSY * cores:
        reason += f"; other programs kept {others:.1f} of {cores} cores busy meanwhile"
    raise CalibrationError(f"cannot be said: nothing measured{f' by {probe}' if probe else ''} can be trusted{reason}",
                           key=f"{part}.{missing[0]}")


def _title(measured: Measurements) -> str:
    said = measured.machine
    memory = said.get("memory_bytes")
    n = said.get("threads", "?")
    parts = [f"{said.get('processor', 'machine')}, {n} thread{'' if n == 1 else 's'}"]
    if isinstance(memory, (int, float)):
        parts.append(format_quantity(float(memory), "bytes"))
    if said.get("gpu"):
        parts.append(str(said["gpu"]))
    drive = said.get("drive_model") or said.get("drive")
    return ", ".join([*parts, *([str(drive)] if drive else [])])


def _notes(derived: Derived, measured: Measurements) -> list[str]:
    return [measured_by(measured), *derived.notes]


# --- tables into text -----------------------------------------------------------------------------------------------


def toml_text(tables: Tables) -> str:
    """TOML that reads back as these tables: plain keys, a heading for each part, a line for each figure."""
    lines: list[str] = []
    _write(tables, (), lines)
    return "\n".join(lines).strip() + "\n"


def _write(table: Tables, path: tuple[str, ...], lines: list[str]) -> None:
    inside = {k: v for k, v in table.items() if _is_section(v, len(path))}
    plain = {k: v for k, v in table.items() if k not in inside}
    if path and (plain or not inside):
        lines += ["", f"[{'.'.join(map(_key, path))}]"]
    lines += [f"{_key(k)} = {_text(v)}" for k, v in plain.items() if v is not None]
    for key, value in inside.items():
        if isinstance(value, list):
            for one in value:
                lines += ["", f"[[{'.'.join(map(_key, (*path, key)))}]]"]
                lines += [f"{_key(k)} = {_text(v)}" for k, v in one.items()]
        else:
            _write(value, (*path, key), lines)


def _is_section(value: Any, depth: int) -> bool:
    if isinstance(value, list):
        return depth == 0 and bool(value) and all(isinstance(v, dict) for v in value)
    return isinstance(value, dict) and not ("value" in value and "source" in value)


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _text(name)


def _text(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return repr(value)
        case str():
            return json.dumps("".join(c if c.isprintable() else " " for c in value), ensure_ascii=False)
        case list() | tuple():
            short = f"[{', '.join(map(_text, value))}]"
            return short if len(short) <= 100 else "[\n" + "".join(f"    {_text(v)},\n" for v in value) + "]"
        case dict():
            return "{ " + ", ".join(f"{_key(k)} = {_text(v)}" for k, v in value.items()) + " }"
    raise TypeError(f"{type(value).__name__} has no place in a device file")
