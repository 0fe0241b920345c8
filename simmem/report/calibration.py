"""What did a calibration find, how well does it know it, and what did it refuse to say?"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table
from rich.text import Text

from simmem.cost.derive import Derived, derive
from simmem.errors import CalibrationError, SpecError
from simmem.report.compare import DeviceComparison, compare_devices, print_comparison
from simmem.report.costfile import (
    CostModelQuality,
    FittedCosts,
    cost_path,
    cost_table,
    cost_words,
    fitted_costs,
    without_phases,
    write_device,
)
from simmem.report.devicefile import (
    Change,
    device_name,
    new_tables,
    tables_of,
    to_device,
    updated_tables,
)
from simmem.report.files import check_writable, write_text
from simmem.report.format import console, new_table, number, quantity, section, share
from simmem.runtime.probe.calibrate import Asked, Told, calibrate
from simmem.runtime.probe.journal import Journal, journal_path
from simmem.spec.base import Kind
from simmem.spec.device import Device, load_device
from simmem.spec.measurement import Condition, Measurements, load_measurements

__all__ = ["CalibratedFigure", "CalibrationDocument", "FigureChange", "RefusedMeasurement", "StorageQuality",
           "calibrate_device", "raw_path", "show_calibration"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, ser_json_inf_nan="null")


class CalibratedFigure(_Part):
    """A figure in SI base units."""

    key: str
    dimension: str
    value: float
    range_90: tuple[float, float]
    spread: float
    """Half the range over the value."""
    kind: Kind
    what: str
    n: int
    """Samples behind it; 0 for what the system says."""
    noise_floor: float | None
    drift: float | None
    """Change over the run where it is more than chance and noise; positive is slower."""


class RefusedMeasurement(_Part):
    probe: str
    conditions: str
    why: str


class StorageQuality(_Part):
    points: int
    quiet_points: int
    """Of which the noise floor is under 10 %."""
    held_out_median_error: float | None
    """Of the quiet ones, each predicted by a surface that was not fitted to it."""
    undetermined: list[str]


class FigureChange(_Part):
    key: str
    before: str | None
    after: str


class CalibrationDocument(_Part):
    """`simmem calibrate --json`."""

    schema_: Literal["simmem.calibration/1"] = Field(default="simmem.calibration/1", alias="schema")
    device: str
    title: str
    out: str
    raw: str
    mode: str
    date: str
    took_s: float
    machine: dict[str, Condition]
    versions: dict[str, str]
    measurements: int
    bytes_written: float
    figures: list[CalibratedFigure]
    refused: list[RefusedMeasurement]
    storage: StorageQuality | None
    cost_model: CostModelQuality | None
    """None where none was asked for."""
    notes: list[str]
    changes: list[FigureChange]
    """With --update: what the file said before."""
    comparison: DeviceComparison | None


def raw_path(out: Path) -> Path:
    """Where raw samples go when nothing else is said: OUT without its ending, `.measurements.json`."""
    return out.with_name(f"{out.stem}.measurements.json")


def calibrate_device(out: Path, asked: Asked, *, raw: Path | None = None, source: Path | None = None,
                     compare: str | None = None, update: bool = False, resume: bool = False,
                     cost_model: bool = True) -> CalibrationDocument:
    """Measure, or read from `source` what was measured, and write the device file and the cost model that it names.

    Raw samples are written first, whatever figures they support; the journal goes when both files are there.

    Raises
    ------
    SpecError
        Something asked for cannot be.
    CalibrationError
        A figure that a device needs could not be had; the raw samples are kept.
    MachineError
        The machine failed.
    """
    begun = time.monotonic()
    kept = raw or source or raw_path(out)
    check_writable(out, inputs=(source, raw), suffix=".toml")
    check_writable(kept)
    if cost_model:
        if kept.absolute() == cost_path(out).absolute():
            raise SpecError(f"is where the cost model of {out} goes", file=str(kept), key="--raw")
        check_writable(cost_path(out))
    old = tables_of(out) if update else None
    before = load_device(str(out.absolute())).cost_model if update else None
    if compare is not None:
        load_device(compare)
    journal: Journal | None = None
    if source is not None:
        measured = load_measurements(source)
    else:
        def open_journal(request: dict[str, Any]) -> Journal:
            nonlocal journal
            journal = Journal(journal_path(out), request, resume=resume)
            return journal

        with _told(journal_path(out)) as told:
            measured = calibrate(asked, name=device_name(out), journal=open_journal, told=told)
        write_text(kept, measured.model_dump_json(by_alias=True) + "\n")
    if journal is not None:
        journal.discard()
    try:
        derived = derive(measured)
        costs = None if not cost_model else fitted_costs(measured.model_copy(update={"name": device_name(out)}))
    except SpecError as error:
        error.file = error.file or str(kept)
        raise
    named = measured.model_copy(update={"name": device_name(out)})
    changes: list[Change] = []
    if old is None:
        try:
            tables = new_tables(derived, named)
        except CalibrationError as error:
            error.message += f" (raw samples are in {kept})"
            raise
    else:
        tables, changes = updated_tables(old, derived, named)
    device = to_device(tables, file=str(out))
    if costs is not None:
        costs = costs.of_agents(set(tables["agent"]))
    model, notes = None if costs is None else costs.model, list(derived.notes)
    if before is not None and before.phases:
        notes.append("What was learnt from runs held for the figures that they were predicted with, and is dropped: "
                     "learn it again from new runs.")
        if model is None:
            tables.pop("cost_model", None)
            model = without_phases(before)
    write_device(out, tables, model)
    return _document(out, kept, named, derived, device, changes, costs, time.monotonic() - begun, notes,
                     None if compare is None else compare_devices(str(out.absolute()), compare))


def _document(out: Path, raw: Path, measured: Measurements, derived: Derived, device: Device, changes: list[Change],
              costs: FittedCosts | None, took_s: float, notes: list[str], comparison: DeviceComparison | None
              ) -> CalibrationDocument:
    dimensions = {key: figure.dimension for key, figure in device.figures().items()}
    figures = sorted((CalibratedFigure(
        key=f.key, dimension=dimensions.get(f.key, "ratio"), value=f.value, range_90=(f.low, f.high), spread=f.spread,
        kind=f.kind, what=f.what, n=f.n, noise_floor=f.noise_floor, drift=f.drift) for f in derived.figures.values()),
        key=lambda f: f.key.split(".")[:2])
    fit = derived.storage
    return CalibrationDocument(
        device=device.name, title=device.title, out=str(out), raw=str(raw), mode=measured.mode, date=measured.date,
        took_s=took_s, machine=measured.machine, versions=measured.versions, measurements=len(measured.points),
        bytes_written=measured.bytes_written, figures=figures,
        refused=[RefusedMeasurement(probe=r.probe, conditions=r.conditions, why=r.why) for r in derived.refused],
        storage=None if fit is None else StorageQuality(
            points=fit.points, quiet_points=fit.quiet, held_out_median_error=fit.median_error,
            undetermined=list(fit.undetermined)),
        cost_model=None if costs is None else costs.said(cost_path(out)),
        notes=notes, comparison=comparison,
        changes=[FigureChange(key=c.key, before=c.before, after=c.after) for c in changes])


@contextmanager
def _told(partial: Path) -> Iterator[Told]:
    """Progress on stderr; a request to stop ends like Ctrl-C, and says what is kept."""
    live = sys.stderr.isatty()
    shown = [-1]

    def words(text: str) -> None:
        print(("\r\x1b[K" if live else "") + text, file=sys.stderr, flush=True)

    def visits(done: int, total: int, key: str) -> None:
        percent = 100 * done // max(total, 1)
        if live:
            print(f"\r\x1b[K{percent:3d} %  {key[:70]}", end="", file=sys.stderr, flush=True)
        elif percent // 10 != shown[0]:
            shown[0] = percent // 10
            print(f"{percent:3d} %", file=sys.stderr, flush=True)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield Told(words, visits)
        if live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        words(f"what was measured is kept in {partial}; --resume goes on")
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


# --- as it is shown -------------------------------------------------------------------------------------------------


def show_calibration(found: CalibrationDocument, *, as_json: bool) -> None:
    """Print one JSON document, or what a person wants to know."""
    if as_json:
        print(found.model_dump_json(by_alias=True, indent=2))
        return
    out = console()
    out.print(Text.assemble((found.device, "bold"), f"  {found.title}"))
    out.print(Text(f"{found.mode}, {found.measurements} measurements, {len(found.refused)} refused, "
                   f"{quantity(found.bytes_written, 'bytes', 3)} written to storage, {found.took_s:.0f} s\n",
                   style="dim"))
    out.print(_figures(found))
    out.print()
    if found.storage is not None:
        out.print(_storage(found.storage))
    if found.cost_model is not None:
        out.print(cost_words(found.cost_model))
    for note in found.notes:
        out.print(Text(note))
    if found.cost_model is not None and found.cost_model.held_out:
        out.print()
        out.print(cost_table(found.cost_model))
    if found.refused:
        out.print()
        section(out, "Refused", _refused(found.refused))
    if found.changes:
        table = new_table("figure", "before", "now")
        for change in found.changes:
            table.add_row(change.key, change.before or "—", change.after)
        section(out, "Changed", table)
    if found.comparison is not None:
        print_comparison(found.comparison)
    out.print(Text(f"device file {found.out}, raw samples {found.raw}", style="dim"), soft_wrap=True)


def _figures(found: CalibrationDocument) -> Table:
    table = new_table("figure", "value", "90 % range", "noise", "samples")
    part = ""
    for f in found.figures:
        here = ".".join(f.key.split(".")[:2])
        if here != part:
            part = here
            table.add_row(Text(part, style="bold"))
        low, high = (100 * (edge / f.value - 1) for edge in f.range_90)
        drift = "" if f.drift is None else f", drifts {100 * f.drift:+.0f} %"
        table.add_row(f"  {f.key.removeprefix(f'{part}.')}{drift}", quantity(f.value, f.dimension, 3),
                      f"{low:+.0f} to {high:+.0f} %" if f.n else "",
                      "" if f.noise_floor is None else share(f.noise_floor), number(f.n) if f.n else "",
                      style=None if f.kind is Kind.MEASURED else "yellow")
    return table


def _storage(fit: StorageQuality) -> Text:
    words = f"Storage surface: {fit.points} reads, {fit.quiet_points} with a noise floor under 10 %"
    if fit.held_out_median_error is not None:
        words += f"; these it predicts within {share(fit.held_out_median_error)} (median) when not fitted to them"
    if fit.undetermined:
        words += f"; not determined: {', '.join(fit.undetermined)}"
    return Text(words + ".")


def _refused(refused: list[RefusedMeasurement]) -> Text:
    counts = Counter((r.probe, r.why.split(":")[0].split(",")[0]) for r in refused)
    return Text("\n".join(f"{n} × {probe}: {why}" for (probe, why), n in counts.most_common(12)))
