"""How did a command end, and is the document it printed what its schema promises?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jsonschema

from simmem.report.schema import schema_of

__all__ = ["Ended", "Simmem", "problems_of"]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout, which must be valid under the schema that it names."""
        found: dict[str, Any] = json.loads(self.out)  # fails where anything else stands beside it
        assert problems_of(found, found["schema"]) == []
        return found


Simmem = Callable[..., Ended]


def problems_of(document: Any, schema: str) -> list[str]:
    """What is wrong with a document under `simmem schema NAME`."""
    return [f"{'.'.join(map(str, p.absolute_path))}: {p.message}" for p in _validator(schema).iter_errors(document)]


@cache
def _validator(schema: str) -> jsonschema.Draft202012Validator:
    found = schema_of(schema)
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)
