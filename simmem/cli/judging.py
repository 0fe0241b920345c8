"""Is it true? Predictions beside what was published or measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simmem.cli.options import Json

__all__ = ["reproduce"]


def reproduce(
    name: Annotated[list[str] | None, typer.Argument(help="Built-in reference sets; default: all.")] = None,
    reference: Annotated[list[Path] | None, typer.Option(help="Your own rows (TOML); may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Compare published results with predictions; exit 1 where one is outside its tolerance."""
    from simmem.validation.reference import reproduce as run

    document = run(name or [], reference or [])
    if as_json:
        typer.echo(document.model_dump_json(by_alias=True, indent=2))
    else:
        from simmem.report.reference import print_reproduction

        print_reproduction(document)
    if document.failed:
        raise typer.Exit(1)
