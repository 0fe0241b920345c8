"""How do tables, sizes and headings look on a terminal? The same in every report, legible from 80 columns on."""

from __future__ import annotations

import math

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from simmem.units import format_quantity

__all__ = ["console", "markdown", "new_table", "number", "parameters", "quantity", "section", "share"]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave a reader that went away to the command line, which has an exit code for it."""
        raise BrokenPipeError


def console() -> Console:
    """Standard output as rich sees it: NO_COLOR, pipes and COLUMNS are respected, numbers are not coloured, and names
    of files from others are no markup."""
    return _Console(highlight=False, soft_wrap=False, markup=False)


def new_table(*columns: str, left: int = 1) -> Table:
    """A table without lines; the first `left` columns are text and may wrap, the others are figures and do not."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", overflow="fold", no_wrap=index >= left)
    return table


def section(out: Console, title: str, body: RenderableType) -> None:
    """A bold heading and an indented body."""
    out.print(Text(title, style="bold"))
    out.print(Padding(body, (0, 0, 1, 2), expand=False))


def quantity(value: float, dimension: str, digits: int = 4) -> str:
    """A figure in SI units as a person reads it; ratios and counts as plain numbers, for they are not all shares."""
    if dimension in ("ratio", "count"):
        return number(value, digits)
    return format_quantity(value, dimension, digits)


def number(value: float, digits: int = 4) -> str:
    """A plain number to `digits` significant ones; whole numbers in full."""
    return f"{value:.0f}" if math.isfinite(value) and value == int(value) else f"{value:.{digits}g}"


def parameters(n: int | None) -> str:
    """Parameters in thousands to trillions, as models are named."""
    if n is None:
        return "-"
    size, letter = next(((s, x) for s, x in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if n >= s * 0.9995), (1e3, "K"))
    return f"{n / size:.3g} {letter}"


def share(value: float) -> str:
    """A share as per cent with one digit behind the point."""
    return format_quantity(value, "ratio")


def markdown(text: str) -> str:
    """Text in a table of Markdown: it ends no cell, opens no tag, is no link and moves no cursor."""
    for mark, instead in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "'"), ("\n", " ")):
        text = text.replace(mark, instead)
    return "".join(c if c.isprintable() else " " for c in text)
