"""Which options do several commands share?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Json", "Plot"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Plot = Annotated[Path | None, typer.Option(help="Draw it there: .png, .svg or .pdf (needs matplotlib).")]
