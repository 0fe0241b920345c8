"""What exactly does each document say? JSON schemas, made from the types that write or read the documents.

Two sorts: documents that simmem prints (every field present), and files that people write (fields with defaults may be
left out; a figure is a quoted quantity). A TOML file read as JSON validates against the second sort.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from simmem.errors import UnknownNameError
from simmem.planner.document import Plan
from simmem.planner.replan import Simulation
from simmem.report import documents
from simmem.spec.base import Figure
from simmem.spec.device import Device
from simmem.spec.model import Model
from simmem.trace import SyntheticSpec, TraceHeader

__all__ = ["all_schemas", "print_schema", "schema_of"]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


class _Whole(GenerateJsonSchema):
    """In a document that simmem prints every field is present, those with defaults too."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        del field, total
        return True


def _printed() -> dict[str, type[BaseModel]]:
    from simmem.planner.grid.document import Baseline, SearchDocument
    from simmem.report.calibration import CalibrationDocument
    from simmem.report.compare import DeviceComparison
    from simmem.report.fromruns import LearntDocument
    from simmem.validation.reference import Reproduction
    from simmem.validation.runs import RunRow
    from simmem.validation.scoreboard import Scoreboard
    from simmem.validation.verdict import Validation

    return {
        "plan": Plan, "error": documents.ErrorDocument, "simulation": Simulation, "run": RunRow,
        "reproduce": Reproduction, "scoreboard": Scoreboard, "validate": Validation,
        "search": SearchDocument, "search-baseline": Baseline,
        "replay": documents.ReplayDocument, "trace": TraceHeader, "devices": documents.DeviceList,
        "models": documents.ModelList, "traces": documents.TraceList, "policies": documents.PolicyList,
        "device-sheet": documents.DeviceSheet, "device-comparison": DeviceComparison,
        "calibration": CalibrationDocument, "calibration-runs": LearntDocument,
        "model-sheet": documents.ModelSheet,
        "trace-sheet": documents.TraceSheet, "policy-sheet": documents.PolicySheet,
    }


def _read() -> dict[str, type[BaseModel]]:
    from simmem.planner.grid.spec import SearchSpec
    from simmem.spec.measurement import Measurements
    from simmem.validation.reference import ReferenceRow

    return {"device": Device, "model": Model, "synthetic": SyntheticSpec, "reference": ReferenceRow,
            "measurements": Measurements, "search-spec": SearchSpec}


def schema_of(name: str) -> dict[str, Any]:
    """The JSON schema of a document by short name ("plan") or full one ("simmem.plan/1").

    Raises UnknownNameError.
    """
    short = name.removeprefix("simmem.").removesuffix("/1")
    printed, read = _printed(), _read()
    if short in printed:
        return _finish(short, printed[short].model_json_schema(mode="serialization", schema_generator=_Whole))
    if short in read:
        schema = read[short].model_json_schema(mode="validation")
        _quote_figures(schema)
        return _finish(short, _as_rows(schema) if short == "reference" else schema)
    raise UnknownNameError("schema", name, [*printed, *read])


def all_schemas() -> dict[str, dict[str, Any]]:
    """Every schema by full name."""
    return {f"simmem.{short}/1": schema_of(short) for short in sorted({**_printed(), **_read()})}


def print_schema(name: str | None) -> None:
    """Print one JSON schema, or all of them as one JSON document {full name: schema}."""
    print(json.dumps(all_schemas() if name is None else schema_of(name), indent=2))


def _finish(short: str, schema: dict[str, Any]) -> dict[str, Any]:
    # What the schema field must say is a constant of the type, so the type's own name would only confuse.
    return {"$schema": _DIALECT, **schema, "title": f"simmem.{short}/1"}


def _as_rows(row: dict[str, Any]) -> dict[str, Any]:
    """A reference file is a schema line and a list of rows."""
    definitions = row.pop("$defs", {})
    return {
        "$defs": {**definitions, "ReferenceRow": row}, "type": "object", "additionalProperties": False,
        "required": ["schema", "row"],
        "properties": {"schema": {"const": "simmem.reference/1"},
                       "row": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/ReferenceRow"}}},
    }


def _quote_figures(schema: dict[str, Any]) -> None:
    """In a file the value and range of a figure are quantities in quotes, unless they have no unit."""
    for kind in _figure_types():
        definition = schema.get("$defs", {}).get(kind.__name__)
        if definition is None:
            continue
        plain = kind.dimension in ("ratio", "count")
        entry: dict[str, Any] = {"type": ["number", "string"] if plain else "string"}
        definition["properties"]["value"] = entry
        definition["properties"]["range"] = {
            "anyOf": [{"type": "array", "items": entry, "minItems": 2, "maxItems": 2}, {"type": "null"}],
            "default": None}


def _figure_types(base: type[Figure] = Figure) -> Iterator[type[Figure]]:
    yield base
    for kind in base.__subclasses__():
        yield from _figure_types(kind)
