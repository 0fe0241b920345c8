"""Which commands are there? The contract's, each a function that calls one other and renders what it gives."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from simmem.cli import judging, listing, machine, planning, reporting, running, searching, tracing, validating

__all__ = ["app", "command"]

app = typer.Typer(
    name="simmem", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Plan inference with models that do not fit in fast memory: what lives where, what moves when, how fast.")


def command() -> Any:
    """The command behind the app; its type is click's, or that of the copy of click which newer typers carry."""
    return typer.main.get_command(app)


def _version(asked: bool) -> None:
    if asked:
        from simmem import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show version.")] = False,
) -> None:
    del version


app.command()(planning.plan)
app.command()(planning.simulate)
app.command()(tracing.capture)
app.command()(tracing.replay)
app.command("import")(tracing.import_log)
app.command()(tracing.export)
app.command()(machine.calibrate)
app.command()(running.run)
app.command()(validating.validate)
app.command()(judging.reproduce)
app.command()(judging.scoreboard)
app.command()(searching.search)
app.command()(reporting.report)
app.command()(listing.devices)
app.command()(listing.models)
app.command()(listing.traces)
app.command()(listing.policies)
app.command()(listing.schema)
