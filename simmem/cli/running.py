"""A plan, executed here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simmem.cli.options import Json
from simmem.errors import MachineError, SpecError, UnknownNameError

__all__ = ["run"]

MODES = ("replay", "exact")
STORAGE = ("real", "emulated")


def run(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan written by `simmem plan --out`.")],
    tokens: Annotated[int, typer.Option(help="Tokens to measure; a trace may hold fewer.", min=1, max=4096)] = 32,
    mode: Annotated[str, typer.Option(
        help="replay: random weights of the model's shapes; exact: its own, and logits compared.")] = "replay",
    storage: Annotated[str, typer.Option(help="real, or emulated: memory that is as slow as the plan's.")] = "real",
    scratch: Annotated[Path | None, typer.Option(help="Folder on the drive to read; what is put there goes again.")
                       ] = None,
    weights_file: Annotated[Path | None, typer.Option(help="Keep the weight file there and use it again.")] = None,
    timeline: Annotated[Path | None, typer.Option(help="Write both as a Chrome/Perfetto trace there.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads for torch.", min=1, max=1024)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: as the plan says.")] = None,
    text: Annotated[Path | None, typer.Option(help="exact: UTF-8 prose; default: the shipped excerpt.")] = None,
    repeat: Annotated[int, typer.Option(help="Passes over the tokens; one says nothing of the noise.", min=1, max=100)
                      ] = 3,
    check: Annotated[bool, typer.Option("--check", help="Compare a checksum of every block that is read.")] = False,
    as_json: Json = False,
) -> None:
    """Execute a plan with real bytes, threads and kernels: measured beside predicted; exit 1 where they disagree."""
    import re
    import sys

    import numpy as np

    from simmem.planner.replan import candidate_of, read_plan
    from simmem.report.files import check_writable, write_text
    from simmem.runtime.cores import keep_cores
    from simmem.runtime.execute.session import How, has_cuda, open_session
    from simmem.runtime.execute.task import task_of
    from simmem.validation.runs import Exactness, run_row

    keep_cores()
    for key, known, value in (("--mode", MODES, mode), ("--storage", STORAGE, storage)):
        if value not in known:
            raise UnknownNameError(key.removeprefix("--"), value, known, key=key)
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise SpecError(f"found {device!r}, expected cpu, cuda or cuda:N", key="--device")
    if text is not None and mode != "exact":
        raise SpecError("is what an exact run reads: it goes with --mode exact", key="--text")
    if timeline is not None:
        check_writable(timeline, inputs=(plan_file, weights_file, text))
    plan = read_plan(plan_file)
    candidate = candidate_of(plan, file=str(plan_file))
    task = task_of(candidate, tokens)
    if device is None:
        device = "cpu" if task.memory == candidate.context.device.host else "cuda"
        if device == "cuda" and not has_cuda():
            raise MachineError(f"the plan computes on {task.agent}, and there is no CUDA device here; --device cpu "
                               "runs it on the processor", key="--device")
    how = How(storage="real" if storage == "real" else "emulated", device=device, file=weights_file, scratch=scratch,
              threads=threads, check=check, say=lambda line: print(line, file=sys.stderr))
    exact = None
    if mode == "exact":
        from simmem.runtime.execute.exact import compare_with_network

        how, found = compare_with_network(candidate, plan.model, how, text=text, tokens=tokens)
        exact = Exactness(tokens=found.tokens, largest_difference=found.largest_difference,
                          same_choice=found.same_choice, tolerance=found.tolerance)
    predicted = task.predicted()
    with open_session(task, how) as session:
        runs = [session.run() for _ in range(repeat)]
        conditions = session.conditions()
    row = run_row(plan_file.stem, candidate, predicted, [r.timelines for r in runs],
                  np.array([r.counted.moved_bytes for r in runs], np.float64), how.storage, conditions=conditions,
                  exact=exact)
    if timeline is not None:
        from simmem.report.run import side_by_side

        write_text(timeline, side_by_side(predicted, runs[-1].timelines, f"{plan.model}, {plan.policy.name}"))
    if as_json:
        typer.echo(row.model_dump_json(by_alias=True, indent=2))
    else:
        from simmem.report.run import print_run

        print_run(row)
    if row.status == "fail":
        raise typer.Exit(1)

