"""How is someone else's JSON file read: of a bounded size, each key once, no number that JSON has not?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simmem.errors import SpecError

__all__ = ["read_json", "shown"]

_DIGITS = 18
"""Longest whole number that is parsed; Python needs quadratic time for longer ones."""


def read_json(path: Path, *, what: str, max_bytes: int) -> dict[str, Any]:
    """The object that a JSON file holds; every failure is one clear `SpecError`.

    what : what the file should be, e.g. "a configuration".
    """
    try:
        if not path.is_file():
            raise SpecError("is not a file" if path.exists() else "no such file", file=str(path))
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror or error}", file=str(path)) from None
    if len(raw) > max_bytes:
        raise SpecError(f"is longer than the {max_bytes} bytes that {what} may have", file=str(path))
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_each_key_once, parse_constant=_no_constant,
                           parse_int=_short_int)
    except UnicodeDecodeError:
        raise SpecError("is not UTF-8 text", file=str(path)) from None
    except RecursionError:
        raise SpecError(f"is nested too deeply for {what}", file=str(path)) from None
    except ValueError as error:
        raise SpecError(f"is not valid JSON: {error}", file=str(path)) from None
    if not isinstance(found, dict):
        raise SpecError(f"holds {shown(found)}, expected an object with the keys of {what}", file=str(path))
    return found


def shown(value: object) -> str:
    """A value of JSON in a line for people."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} stands there twice")
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _short_int(text: str) -> int | float:
    return int(text) if len(text) <= _DIGITS else float(text)
