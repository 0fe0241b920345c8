"""Which devices, models, traces and policies are there? Lists that are quick, and the way to the sheets of one.

A list reads TOML and the first bytes of trace files with the standard library alone: no numpy, no pydantic.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simmem.spec import library
from simmem.units import parse_quantity

if TYPE_CHECKING:
    from simmem.trace.trace import TraceHeader

__all__ = ["NO_LIMIT", "list_names", "print_trace", "show"]

NO_LIMIT = 1_000_000_000
"""Positions of a model whose context nothing limits (a state space). [tokens]"""

_PLURAL = {"device": "devices", "model": "models", "trace": "traces", "policy": "policies"}


def list_names(what: str, as_json: bool) -> None:
    """Print all built-in names of a kind: "device", "model", "trace" or "policy"."""
    plural = _PLURAL[what]
    entries = _policy_entries() if what == "policy" else _file_entries(what)
    if as_json:
        print(json.dumps({"schema": f"simmem.{plural}/1", plural: entries}, indent=2))
        return
    from simmem.report.format import console, new_table

    out = console()
    columns, row = _COLUMNS[what]
    table = new_table(*columns, left=len(columns))
    table.columns[0].no_wrap = True
    for entry in entries:
        table.add_row(*row(entry))
    out.print(table)
    out.print(f"\n`simmem {plural} NAME` shows one, with its other names and sources.", style="dim")


def show(what: str, name: str, as_json: bool) -> None:
    """Print one device, model, trace or policy, by name, alias or path.

    Raises UnknownNameError with close matches, SpecError and TraceError for a file that is wrong.
    """
    from simmem.report import sheets

    sheet = sheets.sheet_of(what, name)
    if as_json:
        print(sheet.model_dump_json(by_alias=True, indent=2))
    else:
        from simmem.report.sheetprint import print_sheet

        print_sheet(sheet)


def print_trace(header: TraceHeader, active_share: float) -> None:
    """Print what a trace that was just captured says of itself."""
    from simmem.report.sheetprint import print_sheet
    from simmem.report.sheets import captured_sheet

    print_sheet(captured_sheet(header, active_share))


# --- what the files say --------------------------------------------------------------------------------------------


def _file_entries(what: str) -> list[dict[str, Any]]:
    read = {"device": _device_entry, "model": _model_entry, "trace": _trace_entry}[what]
    return [read(library.resolve(what, name)) for name in library.names(what)]


def _toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _device_entry(path: Path) -> dict[str, Any]:
    data = _toml(path)
    kinds = [figure["kind"] for figure in _figures({k: v for k, v in data.items() if k != "engine"})]
    return {
        "name": data["name"], "title": data["title"], "aliases": data.get("aliases", []),
        "memory": {tier: parse_quantity(memory["capacity"]["value"], "bytes", file=str(path))
                   for tier, memory in data["memory"].items()},
        "agents": list(data["agent"]), "figures": len(kinds), "estimated_figures": kinds.count("estimated"),
    }


def _figures(part: Any) -> list[dict[str, Any]]:
    """Every table below `part` that is a figure: it has a value and a kind."""
    if isinstance(part, list):
        return [figure for item in part for figure in _figures(item)]
    if not isinstance(part, dict):
        return []
    if "value" in part and "kind" in part:
        return [part]
    return [figure for item in part.values() for figure in _figures(item)]


def _model_entry(path: Path) -> dict[str, Any]:
    data = _toml(path)
    shapes = data["architecture"]
    return {
        "name": data["name"], "title": data["title"], "aliases": data.get("aliases", []), "family": data["family"],
        "native_precision": "file" if "file_bytes" in data else data.get("native_precision", "fp16"),
        "parameters": data.get("parameters"), "active_parameters": data.get("active_parameters"),
        **{key: shapes[key] for key in ("n_layers", "d_model", "d_ff", "max_positions")},
        "experts": shapes.get("experts", {}).get("count", 0), "d_expert": shapes.get("experts", {}).get("d_expert", 0),
    }


def _trace_entry(path: Path) -> dict[str, Any]:
    if path.suffix == ".toml":
        data = _toml(path)
        return {"name": data["name"], "kind": "synthetic", "aliases": data.get("aliases", []), "models": data["serves"],
                "criterion": data["criterion"], "active_share": data["active_share"]["value"]}
    with path.open("rb") as file:  # of those that ship with simmem; `simmem.trace.store` reads those of others
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(json.loads(file.read(length))["__metadata__"]["header"])
    return {"name": path.stem, "kind": header["kind"], "aliases": [], "models": [header["model"]],
            "criterion": header["criterion"], "active_share": header.get("statistics", {}).get("active_share")}


def _policy_entries() -> list[dict[str, Any]]:
    from simmem.policy.catalogue import policy_entries

    return [{"name": p.name, "summary": p.summary, "uses_trace": p.uses_trace} for p in policy_entries()]


# --- how a list reads ----------------------------------------------------------------------------------------------


def _device_row(entry: dict[str, Any]) -> tuple[str, ...]:
    from simmem.report.format import quantity

    memory = "\n".join(f"{tier} {quantity(size, 'bytes', 3)}" for tier, size in entry["memory"].items())
    also = f"\nalso: {', '.join(entry['aliases'])}" if entry["aliases"] else ""
    return (entry["name"], f"{entry['title']}{also}", memory, "\n".join(entry["agents"]),
            f"{entry['figures']}\n({entry['estimated_figures']} estimated)")


def _model_row(entry: dict[str, Any]) -> tuple[str, ...]:
    from simmem.report.format import parameters

    total, active = entry["parameters"], entry["active_parameters"]
    return (entry["name"], parameters(total), "" if active in (None, total) else parameters(active),
            entry["native_precision"], str(entry["n_layers"]), _widths(entry),
            str(entry["max_positions"]) if entry["max_positions"] < NO_LIMIT else "any")


def _widths(entry: dict[str, Any]) -> str:
    """Hidden widths: of a plain FFN, of its experts, or of both."""
    plain = str(entry["d_ff"]) if entry["d_ff"] else ""
    experts = f"{entry['experts']}×{entry['d_expert']}" if entry["experts"] else ""
    return ", ".join(filter(None, (plain, experts))) or "-"


def _trace_row(entry: dict[str, Any]) -> tuple[str, ...]:
    from simmem.report.format import share

    active = "-" if entry["active_share"] is None else share(entry["active_share"])
    return entry["name"], entry["kind"], active, f"{', '.join(entry['models'])}\n{entry['criterion']}"


def _policy_row(entry: dict[str, Any]) -> tuple[str, ...]:
    return entry["name"], entry["summary"], "yes" if entry["uses_trace"] else "no"


_COLUMNS = {
    "device": (("device", "what it is", "memory", "agents", "figures"), _device_row),
    "model": (("model", "size", "used", "weights", "layers", "FFN width", "context"), _model_row),
    "trace": (("trace", "kind", "active", "models, and which units count as active"), _trace_row),
    "policy": (("policy", "what it does", "needs a trace"), _policy_row),
}
