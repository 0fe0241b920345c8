"""Which values may an axis of a grid take: those of a list, or any between two ends?

A range stands for more values than can be listed; a sample picks from it (`simmem.planner.grid.sample`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    Tag,
    WithJsonSchema,
    model_validator,
)

from simmem.errors import SimmemError
from simmem.spec.base import Frozen
from simmem.units import format_quantity, parse_quantity

__all__ = ["Axis", "CountRange", "Counts", "KnobValues", "Names", "NumberRange", "Precisions", "Range", "ShareRange",
           "Shares", "SizeRange", "Sizes", "magnitude", "one_or_more", "read_quantity"]

DIGITS = 4
"""Significant digits of a sampled value: it stands in the cell's name, and a file may repeat it."""


def read_quantity(given: object, dimension: str) -> float:
    """A quantity in SI units; what is wrong with it as a ValueError, which pydantic reports with the path of keys."""
    try:
        return parse_quantity(given, dimension)
    except SimmemError as error:
        raise ValueError(error.message) from None


class Range(Frozen):
    """Every value between two ends, both included, spread evenly along a scale."""

    from_: Any = Field(alias="from")
    to: Any
    scale: Literal["log", "linear"] = "linear"

    @model_validator(mode="after")
    def _rises(self) -> Range:
        low, high = self.ends
        if not low < high:
            raise ValueError(f"found {self.from_!r} to {self.to!r}, expected from a smaller value to a larger one")
        if self.scale == "log" and low <= 0:
            raise ValueError(f"found a logarithmic scale from {self.from_!r}, expected a value above 0 or "
                             "scale = \"linear\"")
        return self

    @property
    def ends(self) -> tuple[float, float]:
        """The ends as numbers, sizes in bytes."""
        return magnitude(self.from_), magnitude(self.to)

    def at(self, share: float) -> Any:
        """The value that lies a share (0 to 1) along the scale, written as a file would give it."""
        low, high = self.ends
        if self.scale == "log":
            return self.written(min(max(low * (high / low) ** share, low), high))
        return self.written(low + (high - low) * share)

    def written(self, value: float) -> Any:
        """A number of the range as a value of its axis."""
        return float(f"{value:.{DIGITS}g}")


class SizeRange(Range):
    """Sizes of memory. [B]"""

    from_: StrictStr = Field(alias="from")
    to: StrictStr
    scale: Literal["log", "linear"] = "log"

    def written(self, value: float) -> str:
        return format_quantity(value, "bytes", DIGITS)


class CountRange(Range):
    """Whole numbers of tokens or sequences."""

    from_: StrictInt = Field(alias="from", ge=1, le=10_000_000)
    to: StrictInt = Field(ge=1, le=10_000_000)
    scale: Literal["log", "linear"] = "log"

    def written(self, value: float) -> int:
        return round(value)


class ShareRange(Range):
    """Shares from 0 to 1."""

    from_: StrictFloat | StrictInt = Field(alias="from", ge=0, le=1)
    to: StrictFloat | StrictInt = Field(ge=0, le=1)


class NumberRange(Range):
    """Numbers of a knob: whole ones where both ends are, sizes where both are quoted."""

    from_: StrictInt | StrictFloat | StrictStr = Field(alias="from")
    to: StrictInt | StrictFloat | StrictStr

    @model_validator(mode="after")
    def _alike(self) -> NumberRange:
        if isinstance(self.from_, str) != isinstance(self.to, str):
            raise ValueError(f"found {self.from_!r} to {self.to!r}, expected two numbers or two quoted sizes")
        return self

    def written(self, value: float) -> int | float | str:
        if isinstance(self.from_, str):
            return format_quantity(value, "bytes", DIGITS)
        whole = isinstance(self.from_, int) and isinstance(self.to, int)
        return round(value) if whole else float(f"{value:.{DIGITS}g}")


def magnitude(value: object) -> float:
    """A number, or a quoted size in bytes. Raises ValueError for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return read_quantity(value, "bytes")


Axis = Range | Sequence[Any]
"""What values an axis has: any of a range, or those that are listed."""


def one_or_more(given: object) -> object:
    """A value by itself is a list of one."""
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)


def _written_as(*kinds: str, ends: str | None = None) -> WithJsonSchema:
    """In the schema of the file: one of these, or a list of them; a range where its ends are named."""
    each = [{"type": kind} for kind in kinds]
    found: list[dict[str, Any]] = [*each, {"type": "array", "minItems": 1, "items": {"anyOf": each}}]
    if ends is not None:
        found.append(_range_as(ends))
    return WithJsonSchema({"anyOf": found}, "validation")


def _range_as(*kinds: str) -> dict[str, Any]:
    end = {"type": list(kinds) if len(kinds) > 1 else kinds[0]}
    return {"type": "object", "required": ["from", "to"], "additionalProperties": False,
            "properties": {"from": end, "to": end, "scale": {"enum": ["log", "linear"]}}}


def _is_range(given: object) -> str:
    # In brackets, as pydantic's own: `simmem.spec.base.validate` leaves such parts out of the key that it names.
    return "[range]" if isinstance(given, (dict, Range)) else "[list]"


def _are_sizes(given: tuple[str, ...]) -> tuple[str, ...]:
    for size in given:
        read_quantity(size, "bytes")
    return given


Names = Annotated[tuple[StrictStr, ...], BeforeValidator(one_or_more), Field(min_length=1, max_length=10_000),
                  _written_as("string")]
Precisions = Annotated[tuple[StrictStr | dict[str, StrictStr], ...], BeforeValidator(one_or_more),
                       Field(min_length=1, max_length=100), _written_as("string", "object")]
_SizeList = Annotated[tuple[StrictStr, ...], BeforeValidator(one_or_more), Field(min_length=1, max_length=10_000),
                      AfterValidator(_are_sizes)]
_CountList = Annotated[tuple[Annotated[StrictInt, Field(ge=1, le=10_000_000)], ...], BeforeValidator(one_or_more),
                       Field(min_length=1, max_length=10_000)]
_ShareList = Annotated[tuple[Annotated[StrictFloat | StrictInt, Field(ge=0, le=1)], ...], BeforeValidator(one_or_more),
                       Field(min_length=1, max_length=10_000)]
Sizes = Annotated[Annotated[SizeRange, Tag("[range]")] | Annotated[_SizeList, Tag("[list]")],
                  Discriminator(_is_range), _written_as("string", ends="string")]
Counts = Annotated[Annotated[CountRange, Tag("[range]")] | Annotated[_CountList, Tag("[list]")],
                   Discriminator(_is_range), _written_as("integer", ends="integer")]
Shares = Annotated[Annotated[ShareRange, Tag("[range]")] | Annotated[_ShareList, Tag("[list]")],
                   Discriminator(_is_range), _written_as("number", ends="number")]
KnobValues = dict[str, Annotated[Annotated[NumberRange, Tag("[range]")] | Annotated[Any, Tag("[list]")],
                                 Discriminator(_is_range), WithJsonSchema({}, "validation")]]
