"""What is a figure, and how is a TOML file turned into a frozen, checked object?

Every number in a device file is a `Figure`: a quoted quantity with a unit, where it comes from
(`source`) and how well it is known (`kind`). The kind gives the 90 % range of the figure, unless
the figure states one itself.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from simmem.errors import SimmemError, SpecError
from simmem.units import parse_quantity

__all__ = [
    "Bytes",
    "BytesPerSecond",
    "Count",
    "Exponent",
    "Figure",
    "FlopPerSecond",
    "Frozen",
    "JoulePerByte",
    "JoulePerFlop",
    "Kind",
    "NormExponent",
    "Ratio",
    "Seconds",
    "Watt",
    "check_texts",
    "kind_factors",
    "load_toml",
    "validate",
    "weakest",
]

MAX_SPEC_BYTES = 1 << 20
MAX_KEY_PARTS = 32
MAX_WORD = 100

# Comments and strings, unfinished ones too, and possessive: so that each character is looked at once.
_QUOTED = re.compile(r'''
    \#[^\n]*+
  | """(?:[^"\\]|\\.|"(?!""))*+(?:""")?  |  \'{3}(?:[^']|'(?!\'\'))*+(?:\'{3})?
  | "(?:[^"\\\n]|\\[^\n])*+"?         |  '[^'\n]*+'?
''', re.DOTALL | re.VERBOSE)
_LONG_KEY = re.compile(rf"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){{{MAX_KEY_PARTS}}}")
# What moves the cursor or turns the direction of writing: texts of a file are shown on terminals.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_LONG_WORD = re.compile(rf"(?<![\w-])[\w-]{{{MAX_WORD + 1}}}")

M = TypeVar("M", bound=BaseModel)


class Kind(StrEnum):
    """How well a figure is known, best first."""

    MEASURED = "measured"
    DATASHEET = "datasheet"
    DERIVED = "derived"
    FITTED = "fitted"
    ESTIMATED = "estimated"


_ORDER = list(Kind)


def kind_factors(kind: Kind, *, is_rate: bool) -> tuple[float, float]:
    """The 90 % range that a kind stands for, as factors (low ≤ 1, high ≥ 1)."""
    if kind is Kind.MEASURED:
        return 0.9, 1.1
    if kind is Kind.DATASHEET:
        return (0.8, 1.0) if is_rate else (1.0, 1.0)
    if kind in (Kind.DERIVED, Kind.FITTED):
        return 0.75, 1.25
    return 1 / 1.5, 1.5


def weakest(kinds: list[Kind]) -> Kind:
    """The least well known of some kinds (measured when there are none)."""
    return max(kinds, key=_ORDER.index, default=Kind.MEASURED)


class Frozen(BaseModel):
    """Base of everything read from a file: frozen, unknown keys rejected, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="null")


class Figure(Frozen):
    """One number of a device, in SI base units, with its provenance."""

    dimension: ClassVar[str] = "ratio"
    is_rate: ClassVar[bool] = False

    value: float
    kind: Kind
    source: str = Field(min_length=4)
    range: tuple[float, float] | None = None
    spent: tuple[str, ...] = ()
    """Reference rows this figure was fitted to; they are anchors and judge nothing."""

    @field_validator("value", mode="before")
    @classmethod
    def _read_value(cls, text: object) -> float:
        return _quantity(text, cls.dimension)

    @field_validator("range", mode="before")
    @classmethod
    def _read_range(cls, pair: object) -> object:
        if pair is None:
            return None
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError("expected a pair [low, high]")
        return tuple(_quantity(text, cls.dimension) for text in pair)

    @model_validator(mode="after")
    def _consistent(self) -> Figure:
        if self.range and not self.range[0] <= self.value <= self.range[1]:
            raise ValueError(f"the value {self.value:g} lies outside its own range {self.range}")
        if self.kind is Kind.FITTED and not self.spent:
            raise ValueError("a fitted figure names the rows or curves it was spent on in `spent`")
        return self

    @property
    def factors(self) -> tuple[float, float]:
        """The 90 % range as factors on the value, (low ≤ 1, high ≥ 1)."""
        if self.range and self.value > 0:
            return self.range[0] / self.value, self.range[1] / self.value
        return kind_factors(self.kind, is_rate=self.is_rate)


class Bytes(Figure):
    """A capacity or a size. [B]"""

    dimension = "bytes"


class BytesPerSecond(Figure):
    """A bandwidth. [B/s]"""

    dimension = "bytes_per_s"
    is_rate = True


class FlopPerSecond(Figure):
    """A compute rate; a multiply-add counts two. [FLOP/s]"""

    dimension = "flop_per_s"
    is_rate = True


class Seconds(Figure):
    """A latency or a constant per operation. [s]"""

    dimension = "s"


class Ratio(Figure):
    """A share between 0 and 1."""

    dimension = "ratio"

    @model_validator(mode="after")
    def _is_share(self) -> Ratio:
        if not 0 < self.value <= 1:
            raise ValueError(f"a share lies in (0, 1], found {self.value:g}")
        return self

    @property
    def factors(self) -> tuple[float, float]:
        low, high = super().factors
        return low, min(high, 1 / self.value)


class Exponent(Figure):
    """The power of a law, from 0 to 2."""

    dimension = "ratio"

    @model_validator(mode="after")
    def _is_mild(self) -> Exponent:
        if not 0 <= self.value <= 2:
            raise ValueError(f"an exponent lies in [0, 2], found {self.value:g}")
        return self


class NormExponent(Figure):
    """The p of a norm that joins two times, from 1 (they add up) to 64 (the longer one counts)."""

    dimension = "ratio"

    @model_validator(mode="after")
    def _is_a_norm(self) -> NormExponent:
        if not 1 <= self.value <= 64:
            raise ValueError(f"the exponent of a norm lies in [1, 64], found {self.value:g}")
        return self


class Count(Figure):
    """A whole number."""

    dimension = "count"


class JoulePerByte(Figure):
    """Energy to move a byte. [J/B]"""

    dimension = "joule_per_byte"


class JoulePerFlop(Figure):
    """Energy of one floating-point operation. [J/FLOP]"""

    dimension = "joule_per_flop"


class Watt(Figure):
    """Power drawn whatever happens. [W]"""

    dimension = "watt"


def _quantity(text: object, dimension: str) -> float:
    try:
        return parse_quantity(text, dimension)
    except SimmemError as error:  # pydantic reports ValueError with the key path
        raise ValueError(error.message) from None


def load_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file of at most 1 MiB; every failure is one clear `SpecError`."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise SpecError("is not a file", file=str(path))
        if size > MAX_SPEC_BYTES:
            raise SpecError(f"is {size} bytes long; a specification has at most {MAX_SPEC_BYTES}", file=str(path))
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror or error}", file=str(path)) from None
    except UnicodeDecodeError:
        raise SpecError("is not UTF-8 text", file=str(path)) from None
    # A dotted key of n parts takes tomllib n² time and memory, and an integer of thousands of digits cannot be shown.
    bare = _QUOTED.sub("s ", text)
    if _LONG_KEY.search(bare):
        raise SpecError(f"has a key of more than {MAX_KEY_PARTS} parts", file=str(path))
    if _LONG_WORD.search(bare):
        raise SpecError(f"has a number or an unquoted word of more than {MAX_WORD} characters", file=str(path))
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SpecError(f"is not valid TOML: {error}", file=str(path)) from None
    check_texts(data, file=str(path))
    return data


def check_texts(data: Any, *, file: str) -> None:
    """Raise SpecError where a key or text of a parsed file would do something to the terminal that it is shown on."""
    for word in _texts(data):
        if _CONTROL.search(word):
            raise SpecError(f"holds {word[:60]!r}, with characters that control a terminal", file=file)


def _texts(data: Any) -> Iterator[str]:
    """All keys and texts of a parsed file."""
    rest = [data]
    while rest:
        match rest.pop():
            case str(text):
                yield text
            case dict(table):
                rest += [*table, *table.values()]
            case list(items):
                rest += items


def validate(kind: type[M], data: Any, *, file: str) -> M:
    """Check `data` against a model; the first problem becomes one `SpecError` naming file and key."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        problems.sort(key=lambda p: p["type"] != "extra_forbidden")
        first = problems[0]
        key = ".".join(str(part) for part in first["loc"] if not str(part).startswith("[")) or None
        raise SpecError(_explain(kind, first), file=file, key=key) from None


def _explain(kind: type[BaseModel], problem: Any) -> str:
    import difflib

    if problem["type"] == "extra_forbidden":
        names = list(_fields_at(kind, problem["loc"][:-1]))
        close = difflib.get_close_matches(str(problem["loc"][-1]), names, n=1)
        hint = f"; did you mean {close[0]}?" if close else (f"; expected one of {', '.join(names)}" if names else "")
        return f"is not a key that is known here{hint}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "missing":
        return "is missing"
    found = problem.get("input")
    if isinstance(found, (str, int, float)) and not (isinstance(found, float) and math.isnan(found)):
        text = repr(found)
        if len(text) <= 80 and text not in message:
            message += f" (found {text})"
    return message


def _fields_at(kind: Any, path: tuple[Any, ...]) -> list[str]:
    """Field names of the model that the error path leads to, as far as it can be followed."""
    for part in path:
        field = getattr(kind, "model_fields", {}).get(part)
        annotation = field.annotation if field is not None else kind
        candidates = [a for a in (annotation, *getattr(annotation, "__args__", ())) if hasattr(a, "model_fields")]
        if not candidates:
            nested = [b for a in getattr(annotation, "__args__", ()) for b in getattr(a, "__args__", ())
                      if hasattr(b, "model_fields")]
            candidates = nested
        if candidates:
            kind = candidates[-1]
    return list(getattr(kind, "model_fields", {}))
