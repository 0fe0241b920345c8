"""In what does an interrupted run differ from the one that wants to go on with it?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["first_difference"]


def first_difference(before: object, now: Mapping[str, Any]) -> str:
    """The first key, in order of the names, that two requests do not share, with both values."""
    if not isinstance(before, Mapping):
        return "what it says of itself is damaged"
    key = next((k for k in sorted({*before, *now}) if before.get(k) != now.get(k)), "schema")
    return f"{key} was {_shown(before.get(key))}, now {_shown(now.get(key))}"


def _shown(value: Any) -> str:
    return "".join(c if c.isprintable() else "?" for c in repr(value))[:60]
