"""In which figures do two devices differ, and by how much? Every figure of both, side by side."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from rich.text import Text

from simmem.errors import SpecError
from simmem.report.documents import FigureRow
from simmem.report.format import console, new_table, number, quantity
from simmem.report.sheets import figure_rows
from simmem.spec import library
from simmem.spec.base import Kind
from simmem.spec.device import load_device

__all__ = ["ComparedDevice", "ComparedFigure", "ComparedValue", "DeviceComparison", "compare_devices",
           "print_comparison", "show_comparison"]

MISSING = "—"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, ser_json_inf_nan="null")


class ComparedDevice(_Part):
    name: str
    title: str


class ComparedValue(_Part):
    """What one of the two devices says, in SI base units."""

    value: float
    kind: Kind
    range_90: tuple[float, float]
    source: str


class ComparedFigure(_Part):
    """One figure of two devices; null where a device has none under that key."""

    key: str
    dimension: str
    a: ComparedValue | None
    b: ComparedValue | None
    ratio: float | None
    """b / a; null where one of them is missing or a is 0."""


class DeviceComparison(_Part):
    """`simmem devices --compare A B --json`: every figure of two devices, matched by key path."""

    schema_: Literal["simmem.device-comparison/1"] = Field(default="simmem.device-comparison/1", alias="schema")
    a: ComparedDevice
    b: ComparedDevice
    figures: list[ComparedFigure]


def compare_devices(a: str, b: str) -> DeviceComparison:
    """Every figure of two devices, by name, alias or path, in the order of A's file and then what only B has.

    Tiers, agents and links of different names are different figures. Raises UnknownNameError, or SpecError where both
    names lead to one file or a file is wrong.
    """
    if library.resolve("device", a).resolve() == library.resolve("device", b).resolve():
        raise SpecError(f"found {a!r} and {b!r}, which are the same device; expected two", key="--compare")
    devices = load_device(a), load_device(b)
    rows = [figure_rows(device) for device in devices]
    figures = [_compared(key, rows[0].get(key), rows[1].get(key)) for key in _in_order(*rows)]
    first, second = (ComparedDevice(name=d.name, title=d.title) for d in devices)
    return DeviceComparison(a=first, b=second, figures=figures)


def _in_order(a: dict[str, FigureRow], b: dict[str, FigureRow]) -> list[str]:
    """All keys, part by part, so that what only B has of a part stands with what A has of it."""
    keys = list(dict.fromkeys([*a, *b]))
    parts = list(dict.fromkeys(map(_part, keys)))
    return sorted(keys, key=lambda key: parts.index(_part(key)))


def _part(key: str) -> str:
    """The part a figure belongs to: "link.flash" of "link.flash.rate"; "" of "idle"."""
    what, _, rest = key.partition(".")
    name = rest.rpartition(".")[0] if what in ("engine", "interference") else rest.partition(".")[0]
    return f"{what}.{name}" if name else ""


def _compared(key: str, a: FigureRow | None, b: FigureRow | None) -> ComparedFigure:
    one = a or b
    assert one is not None
    ratio = b.value / a.value if a is not None and b is not None and a.value else None
    return ComparedFigure(key=key, dimension=one.dimension, a=_value(a), b=_value(b), ratio=ratio)


def _value(row: FigureRow | None) -> ComparedValue | None:
    if row is None:
        return None
    return ComparedValue(value=row.value, kind=row.kind, range_90=row.range_90, source=row.source)


# --- as it is shown -----------------------------------------------------------------------------------------------


def show_comparison(a: str, b: str, *, beside: object = None, as_json: bool) -> None:
    """Print the comparison of two devices; `beside` is what was asked for besides, which is an error."""
    if beside is not None:
        raise SpecError(f"takes two devices and nothing else, found {str(beside)!r} as well", key="--compare")
    found = compare_devices(a, b)
    if as_json:
        print(found.model_dump_json(by_alias=True, indent=2))
    else:
        print_comparison(found)


def print_comparison(found: DeviceComparison) -> None:
    """Print a table of every figure of both."""
    out = console()
    for letter, device in (("A", found.a), ("B", found.b)):
        out.print(Text.assemble((f"{letter}  {device.name}", "bold"), f"  {device.title}"))
    out.print()
    table = new_table("figure", "A", "", "B", "", "B / A")
    for column in (2, 4):
        table.columns[column].justify = "left"
    part = None
    for figure in found.figures:
        if _part(figure.key) != part:
            part = _part(figure.key)
            table.add_row(Text(part, style="bold"))
        short = figure.key.removeprefix(f"{part}.")
        table.add_row(f"  {short}" if part else short, *_cells(figure, figure.a), *_cells(figure, figure.b),
                      MISSING if figure.ratio is None else number(figure.ratio, 3),
                      style="dim" if figure.ratio == 1 else None)
    out.print(table)
    both = sum(f.a is not None and f.b is not None for f in found.figures)
    only = [sum(f.b is None for f in found.figures), sum(f.a is None for f in found.figures)]
    out.print(Text(f"\n{both} figures of both, {only[0]} of A alone, {only[1]} of B alone. "
                   "`simmem devices NAME` shows where each comes from.", style="dim"))


def _cells(figure: ComparedFigure, side: ComparedValue | None) -> tuple[str, str]:
    return (MISSING, "") if side is None else (quantity(side.value, figure.dimension, 3), side.kind.value)
