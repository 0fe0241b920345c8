"""Many questions at once, held to limits: `search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simmem.cli.options import Json
from simmem.errors import SpecError, UnknownNameError

__all__ = ["search"]


def search(
    spec_file: Annotated[Path, typer.Argument(metavar="SPEC", help="A search file (TOML): grids and limits.")],
    results: Annotated[Path | None, typer.Option(help="Results land there cell by cell (SQLite).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what --results holds.")] = False,
    baseline: Annotated[Path | None, typer.Option(help="Compare with it; default: what the search file names.")] = None,
    save_baseline: Annotated[Path | None, typer.Option(
        help="Write a baseline there; where it is the one to compare with, it is replaced instead.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML there.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a summary for a pull request there.")] = None,
    jobs: Annotated[int, typer.Option(help="Worker processes; more than one needs joblib.", min=1, max=1024)] = 1,
    backend: Annotated[str, typer.Option(help="loky: processes here; dask, ray: a cluster, through joblib.")] = "loky",
    block: Annotated[int, typer.Option(help="Cells that a worker is sent at a time.", min=1, max=10_000)] = 1,
    scheduler: Annotated[str | None, typer.Option(
        help="dask: address of a scheduler; default: --jobs processes on this machine.")] = None,
    as_json: Json = False,
) -> None:
    """Plan every cell of a grid and hold it to its limits and a baseline; exit 1 with the cells that broke."""
    from simmem.planner.grid.baseline import baseline_of, read_baseline
    from simmem.planner.grid.fanout import BACKENDS, check_backend
    from simmem.planner.grid.gate import judge
    from simmem.planner.grid.refine import Refinement
    from simmem.planner.grid.spec import load_search
    from simmem.planner.grid.sweep import answer_all
    from simmem.report.files import check_writable, write_text

    if backend not in BACKENDS:
        raise UnknownNameError("backend", backend, BACKENDS, key="--backend")
    if resume and results is None:
        raise SpecError("goes on with the results of a file: name it with --results", key="--resume")
    check_backend(jobs, backend, scheduler)
    spec, cells = load_search(spec_file)
    if baseline is None and spec.baseline is not None:
        baseline = spec_file.parent / spec.baseline
    if baseline is not None and save_baseline is not None and baseline.resolve() == save_baseline.resolve():
        baseline = None
    written = [one for one in (results, save_baseline, junit, markdown) if one is not None]
    for index, one in enumerate(written):
        inputs: list[str | Path] = [spec_file, *([baseline] if baseline else []), *spec.files(spec_file.parent)]
        if one is not results:
            check_writable(one, inputs=inputs)
        if one.resolve() in [other.resolve() for other in (*written[:index], spec_file)]:
            raise SpecError("is named for two files; write to another one", file=str(one))
    before = None if baseline is None else read_baseline(baseline)
    refine = Refinement(spec)
    answered = answer_all(cells, spec_file, results=results, resume=resume, jobs=jobs, backend=backend,
                          scheduler=scheduler, block=block, refine=refine, progress=_progress)
    found = judge(answered, spec_file, before, str(baseline) if baseline else None, refine.boundary(answered))
    if save_baseline is not None:
        write_text(save_baseline, baseline_of(answered, spec_file.parent).model_dump_json(by_alias=True, indent=1)
                   + "\n")
    from simmem.report.search import junit_of, markdown_of, print_search

    if junit is not None:
        write_text(junit, junit_of(found))
    if markdown is not None:
        write_text(markdown, markdown_of(found))
    if as_json:
        typer.echo(found.model_dump_json(by_alias=True, indent=2))
    else:
        print_search(found)
    if found.broken:
        raise typer.Exit(1)


def _progress(done: int, of: int) -> None:
    """A line at every tenth, so that a log stays short."""
    import sys

    if done * 10 // of != (done - 1) * 10 // of and of >= 10:
        print(f"simmem: {done} of {of} cells", file=sys.stderr)
