"""Is it true? Predictions beside what was published or measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simmem.cli.options import Json

__all__ = ["reproduce", "scoreboard"]


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


def scoreboard(
    name: Annotated[list[str] | None, typer.Argument(help="Built-in reference sets; default: all.")] = None,
    reference: Annotated[list[Path] | None, typer.Option(help="Your own rows (TOML); may be repeated.")] = None,
    here: Annotated[list[Path] | None, typer.Option(
        help="What `validate --json` printed here, or a folder of `validate --record`; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the page (Markdown) there; default: print it.")] = None,
    as_json: Json = False,
) -> None:
    """All errors of predictions on one page: published, recorded, here; exit 1 where a published row fails."""
    from simmem.errors import SpecError
    from simmem.report.files import check_writable, write_text
    from simmem.validation.scoreboard import scoreboard as collect

    if out is not None:
        if as_json:
            raise SpecError("is the page; --json prints the document instead", key="--out")
        check_writable(out, inputs=[*(reference or []), *(here or [])])
    found = collect(name or [], reference or [], here or [])
    if as_json:
        typer.echo(found.model_dump_json(by_alias=True, indent=2))
    else:
        from simmem.report.scoreboard import markdown_page

        page = markdown_page(found)
        if out is None:
            typer.echo(page, nl=False)
        else:
            write_text(out, page)
    if found.failed:
        raise typer.Exit(1)
