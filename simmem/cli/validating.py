"""Do predictions hold on the machine in front of you?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simmem.cli.options import Json
from simmem.errors import MachineError, SpecError

__all__ = ["validate"]


def validate(
    quick: Annotated[bool, typer.Option("--quick", help="Within 5 minutes instead of 30: fewer plans, smaller models."
                                        )] = False,
    device: Annotated[str | None, typer.Option(help="Predict with this device; default: calibrate first.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Model to run; may be repeated.")] = None,
    share: Annotated[list[float] | None, typer.Option(
        help="Budget as a share of the weights, 1 for all resident; may be repeated.", min=0.01, max=1.0)] = None,
    weights: Annotated[str | None, typer.Option(help="fp32 or bf16; default: bf16 where it is known.")] = None,
    trace: Annotated[str | None, typer.Option(help="Trace to plan and run with; default: each model's own.")] = None,
    emulate: Annotated[str, typer.Option(help="Device whose storage is emulated beside the real one, or none.")
                       ] = "iphone15",
    scratch: Annotated[Path | None, typer.Option(help="Folder on the drive to read; what is put there goes again.")
                       ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads for torch.", min=1, max=1024)] = None,
    minutes: Annotated[float | None, typer.Option(help="For all of it; three rounds are run in any case.", min=0.01,
                                                  max=1440.0)] = None,
    baselines: Annotated[bool, typer.Option(help="Time what users run today as well.")] = True,
    record: Annotated[Path | None, typer.Option(help="Keep predictions, rows and raw samples in this new folder.")
                      ] = None,
    as_json: Json = False,
) -> None:
    """Run a ladder of plans here, measured against predicted, and judge; exit 1 where predictions do not hold."""
    from simmem.runtime.cores import keep_cores

    keep_cores()
    from simmem.report.validate import Ladder, validate_machine

    if weights not in (None, "fp32", "bf16"):
        raise SpecError(f"found {weights!r}, expected fp32 or bf16", key="--weights")
    found = validate_machine(Ladder(
        quick=quick, device=device, models=tuple(model or ()), shares=tuple(share or ()), weights=weights, trace=trace,
        emulate=None if emulate == "none" else emulate, scratch=scratch, threads=threads,
        total_s=None if minutes is None else 60 * minutes, record=record, baselines=baselines))
    if as_json and found.conclusive and (found.failed or not found.broken):
        typer.echo(found.model_dump_json(by_alias=True, indent=2))
    elif not as_json:
        from simmem.report.verdict import print_validation

        print_validation(found)
    if not found.conclusive:
        raise MachineError(f"too noisy to judge: {100 * found.summary.conclusive_share:.0f} % of the rows are "
                           "conclusive, at least 70 % are needed; run it again on a quiet machine")
    if found.failed:
        raise typer.Exit(1)
    if found.broken:
        raise MachineError("the machine failed under some plans, and those that were run hold: "
                           "without --json the last lines say which")
