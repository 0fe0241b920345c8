"""What is there? Lists of devices, models, traces, policies and schemas, and sheets of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simmem.cli.options import Json, Plot

__all__ = ["devices", "models", "policies", "schema", "traces"]


def _list(what: str, name: str | None, as_json: bool, plot: Path | None = None) -> None:
    from simmem.report.listing import list_names, show

    if plot is not None:
        from simmem.report.plots import draw

        draw(what, name, plot)
    if name is None:
        list_names(what, as_json)
    else:
        show(what, name, as_json)


Name = Annotated[str | None, typer.Argument(help="Show this one, with its sources.")]


def devices(
    name: Name = None,
    compare: Annotated[tuple[str, str] | None, typer.Option(
        metavar="A B", help="Show every figure of two devices side by side, and the ratio B/A.")] = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """List devices, or show one with every figure, its kind and its source, or compare two."""
    if compare is not None:
        from simmem.report.compare import show_comparison

        show_comparison(*compare, beside=name or plot, as_json=as_json)
        return
    _list("device", name, as_json, plot)


def models(name: Name = None, as_json: Json = False) -> None:
    """List models, or show one with its parameters and bytes per tensor group."""
    _list("model", name, as_json)


def traces(name: Name = None, plot: Plot = None, as_json: Json = False) -> None:
    """List traces, or show one with its provenance and statistics."""
    _list("trace", name, as_json, plot)


def policies(name: Name = None, as_json: Json = False) -> None:
    """List policies, or show one with its knobs."""
    _list("policy", name, as_json)


def schema(name: Annotated[str | None, typer.Argument(help="plan, error, replay, reproduce, ...")] = None,
           as_json: Json = False) -> None:
    """Print the JSON schemas of every document, or of one."""
    del as_json  # it is JSON in any case
    from simmem.report.schema import print_schema

    print_schema(name)
