"""The machine in front of you: what can it do?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simmem.cli.options import Json
from simmem.errors import SpecError

__all__ = ["calibrate"]


def calibrate(
    out: Annotated[Path, typer.Option(help="Write the device file there (.toml).")],
    quick: Annotated[bool, typer.Option("--quick", help="A minute instead of ten: fewer sizes and shapes.")] = False,
    scratch: Annotated[Path | None, typer.Option(
        help="Folder on the drive to measure; default: that of --out. Holds a file of 0.5 to 2 GiB meanwhile.")] = None,
    budget: Annotated[str | None, typer.Option(help="Time for all of it: default '600 s', --quick '60 s'.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    raw: Annotated[Path | None, typer.Option(help="Raw samples; default: beside --out, .measurements.json.")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="Fit these raw samples; measure nothing.")] = None,
    compare: Annotated[str | None, typer.Option(help="Show a device's figures beside those found.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Refresh what is measured of --out; keep the rest.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads to measure with; default: all cores.")] = None,
    device: Annotated[str | None, typer.Option(
        help="cpu or cuda; default: cuda where there is one. With --from-runs: what the runs were predicted with.")
                      ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another draws other random shapes for products.")] = 0,
    from_runs: Annotated[list[Path] | None, typer.Option(
        "--from-runs", help="Learn what to multiply the costs of --device by from what validate or run printed with "
                            "--json, or from a folder of validate --record; may be repeated. Measure nothing.")] = None,
    cost_model: Annotated[bool, typer.Option("--cost-model/--no-cost-model",
                                             help="Fit a cost model too, beside --out.")] = True,
    as_json: Json = False,
) -> None:
    """Measure this machine and write a device file to plan with; or learn from runs what such a file gets wrong."""
    given: dict[str, object] = {"--quick": quick, "--scratch": scratch, "--budget": budget, "--resume": resume,
                                "--raw": raw, "--threads": threads, "--device": device, "--seed": seed}
    if from_runs:
        given |= {"--device": None, "--from": source, "--compare": compare, "--update": update,
                  "--no-cost-model": not cost_model}
        _learn(from_runs, device, out, [name for name, value in given.items() if value], as_json=as_json)
        return
    from simmem.report.calibration import calibrate_device, show_calibration
    from simmem.runtime.cores import keep_cores
    from simmem.runtime.probe.calibrate import Asked
    from simmem.units import parse_quantity

    keep_cores()
    if source is not None and (both := [name for name, value in given.items() if value]):
        raise SpecError(f"measures nothing, so that {both[0]} means nothing", key="--from")
    seconds = None if budget is None else parse_quantity(budget, "s", key="--budget")
    asked = Asked(quick=quick, budget_s=seconds, scratch=out.parent if scratch is None else scratch, threads=threads,
                  device=device, needs_storage=not update, seed=seed)
    found = calibrate_device(out, asked, raw=raw, source=source, compare=compare, update=update, resume=resume,
                             cost_model=cost_model)
    show_calibration(found, as_json=as_json)


def _learn(runs: list[Path], device: str | None, out: Path, others: list[str], *, as_json: bool) -> None:
    """`--from-runs`. others : options that were given beside it and mean nothing then."""
    from simmem.report.fromruns import learn_from_runs, show_learnt

    if others:
        raise SpecError(f"learns from runs and measures nothing, so that {others[0]} means nothing", key="--from-runs")
    if device is None:
        raise SpecError("is needed with --from-runs: the device, by name or file, that the runs were predicted with",
                        key="--device")
    show_learnt(learn_from_runs(runs, device, out), as_json=as_json)
