"""How far off are predictions, all in one place: beside published results, recorded runs, and runs of one's own?

Nothing is typed. Published rows are predicted anew by the code of `simmem reproduce`; of recorded runs the rows are
read from `validate.json` and judged by the code of `simmem validate`. What a record does not hold stays None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from simmem.errors import SpecError
from simmem.spec import library
from simmem.spec.base import validate
from simmem.spec.costmodel import load_cost_model
from simmem.spec.device import load_device
from simmem.spec.jsonfile import read_json, shown
from simmem.spec.measurement import versions_said
from simmem.validation.reference import FAILING, RowResult, Summary, reproduce, summary_of
from simmem.validation.verdict import LEAST_CONCLUSIVE, Validation
from simmem.validation.verdict import Summary as RunSummary
from simmem.validation.verdict import summary_of as summary_of_runs

__all__ = ["FittedCosts", "KnownMiss", "Record", "Scoreboard", "System", "fitted_costs", "published", "read_record",
           "records", "scoreboard"]

MAX_DOCUMENT_BYTES = 16 << 20
VERDICT, PREDICTIONS, DEVICE = "validate.json", "predictions.json", "here.toml"
"""What `simmem validate --record` names its files."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class System(_Part):
    """The rows of one published system in one reference set."""

    reference_set: str
    system: str
    counts: dict[str, int]
    """Rows by status, as `simmem reproduce` says it."""
    summary: Summary
    """Over the judged rows."""
    furthest: str | None
    """The judged row with the largest error."""


class KnownMiss(_Part):
    """A row that is expected to miss, or one that fails."""

    reference_set: str
    id: str
    status: str
    published: float | None
    predicted: float | None
    unit: str
    error: float | None
    why: str


class Record(_Part):
    """One ladder of plans that was run."""

    name: str
    """Folder of the record, or the file that was given."""
    device: str | None
    date: str | None
    written: str | None
    """When the predictions were written down, before anything was run."""
    mode: Literal["quick", "full"] | None
    rounds: int | None
    took_s: float | None
    versions: dict[str, str]
    rows: dict[str, int]
    """Plans that were run, by storage."""
    summaries: dict[str, RunSummary]
    """By storage, over conclusive rows."""
    step_ratio_error: float | None
    """Largest |error| of a published step's share of naive loading's reading time, over conclusive rows."""
    failed: list[str] | None
    """What did not hold, by the rules of the day on which it was recorded; None without a verdict."""


class FittedCosts(_Part):
    """What a recorded cost model says of its own error, on products held out by cross-validation."""

    name: str
    device: str
    date: str
    kinds: int
    products: int
    median: float | None
    """|log(measured / predicted)|: median of each kind, the mean of these weighted by products."""
    roofline_median: float | None
    """The same of the roofline."""


class Scoreboard(_Part):
    """`scoreboard --json`."""

    schema_: Literal["simmem.scoreboard/1"] = Field(default="simmem.scoreboard/1", alias="schema")
    published: list[System]
    summary: Summary
    """Over the judged rows of all systems."""
    misses: list[KnownMiss]
    recorded: list[Record]
    costs: list[FittedCosts]
    here: list[Record]

    @property
    def failed(self) -> bool:
        """Is a published row outside its tolerance?"""
        return any(s.counts.get(status) for s in self.published for status in FAILING)


def scoreboard(names: Iterable[str] = (), files: Iterable[Path] = (), here: Iterable[Path] = ()) -> Scoreboard:
    """Everything that is known of the error of predictions.

    names, files : reference sets, and rows of the user's own; all built-in sets where there are neither.
    here : documents of `validate --json`, or folders of `validate --record`.
    Raises SpecError for a file that is none of these.
    """
    own = [read_record(path, str(path)) for path in here]  # first: a wrong name is said before a minute of planning
    systems, misses, total = published(names, files)
    return Scoreboard(published=systems, summary=total, misses=misses, recorded=records(), costs=fitted_costs(),
                      here=own)


def published(names: Iterable[str] = (), files: Iterable[Path] = ()) -> tuple[list[System], list[KnownMiss], Summary]:
    """Each system of each reference set, the rows that miss, and the summary of all."""
    names, files = list(names), list(files)
    if not names and not files:
        names = library.names("reference")
    systems, misses, rows = [], [], []
    for label, found in ([(n, reproduce([n])) for n in names] + [(f.stem, reproduce(files=[f])) for f in files]):
        systems += [_system(label, system, [r for r in found.rows if r.system == system])
                    for system in dict.fromkeys(r.system for r in found.rows)]
        misses += [KnownMiss(reference_set=label, id=r.id, status=r.status, published=r.published,
                             predicted=r.predicted, unit=r.unit, error=r.error, why=r.message or r.reason or "")
                   for r in found.rows if r.status in ("xfail", *FAILING)]
        rows += found.rows
    return systems, misses, summary_of(rows)


def _system(label: str, system: str, rows: list[RowResult]) -> System:
    counted = [r for r in rows if r.expect == "judged" and r.error is not None and r.interval is None]
    furthest = max(counted, key=lambda r: abs(r.error or 0.0), default=None)
    return System(reference_set=label, system=system, counts=dict(Counter(r.status for r in rows)),
                  summary=summary_of(rows), furthest=furthest.id if furthest else None)


def records() -> list[Record]:
    """The recorded runs that come with simmem, in the order in which their predictions were written."""
    root = library.data_folder() / "validate" / "measured"
    folders = {p.parent for name in (VERDICT, PREDICTIONS) for p in root.rglob(name)}
    found = [read_record(folder, folder.relative_to(root).as_posix()) for folder in folders]
    return sorted(found, key=lambda r: (r.written or r.date or "", r.name))


def read_record(path: Path, name: str) -> Record:
    """A folder of `validate --record`, or a document of `validate --json`; SpecError where it is neither."""
    folder = path if path.is_dir() else path.parent
    file = path / VERDICT if path.is_dir() else path
    recorded = path.is_dir() or path.name == VERDICT
    beside = {what: folder / what for what in (PREDICTIONS, DEVICE) if recorded and (folder / what).is_file()}
    written = None
    if PREDICTIONS in beside:
        written = read_json(beside[PREDICTIONS], what="predictions", max_bytes=MAX_DOCUMENT_BYTES).get("written")
        if not isinstance(written, str | None):
            raise SpecError(f"found {shown(written)}, expected a date", file=str(beside[PREDICTIONS]), key="written")
    device = load_device(str(beside[DEVICE])) if DEVICE in beside else None
    title = device.title if device else None
    if not file.exists() and PREDICTIONS in beside:  # it was begun, and no verdict was recorded
        return Record(name=name, device=title, date=None, written=written, mode=None, rounds=None, took_s=None,
                      versions={}, rows={}, summaries={}, step_ratio_error=None, failed=None)
    data = read_json(file, what="a document of `simmem validate --json`", max_bytes=MAX_DOCUMENT_BYTES)
    if data.get("schema") != "simmem.validate/1":
        raise SpecError(f"found {data.get('schema')!r}, expected 'simmem.validate/1'", file=str(file), key="schema")
    ran = validate(Validation, data, file=str(file))
    # Of the device file: an installed package has no raw measurements, and is to say the same as a checkout.
    versions = versions_said(device.notes) if device else {}
    torch = {str(r.conditions["torch"]) for r in ran.rows if "torch" in r.conditions}
    if torch:
        versions["torch"] = ", ".join(sorted(torch))
    ratios = [abs(s.error) for s in ran.steps if s.published is not None and s.conclusive]
    rounds = ran.conditions.get("rounds")
    failed = [g.name for g in ran.gates if g.status == "fail"]
    if not ran.conclusive:
        failed.append(f"too noisy to judge: under {100 * LEAST_CONCLUSIVE:.0f} % of the rows are conclusive")
    return Record(
        name=name, device=title or ran.device, date=ran.date, written=written, mode=ran.mode,
        rounds=rounds if isinstance(rounds, int) else None, took_s=ran.took_s, versions=versions,
        rows=dict(Counter(r.storage for r in ran.rows)),
        summaries={storage: summary_of_runs([r for r in ran.rows if r.storage == storage])
                   for storage in dict.fromkeys(r.storage for r in ran.rows)},
        step_ratio_error=max(ratios, default=None), failed=failed)


def fitted_costs() -> list[FittedCosts]:
    """What the recorded cost models say of their own error, by name."""
    root = library.data_folder() / "validate" / "measured"
    found = []
    for path in sorted(root.rglob("*.cost.json")):
        model = load_cost_model(path)
        points = sum(g.n_points for g in model.groups)
        found.append(FittedCosts(
            name=path.relative_to(root).as_posix(), device=model.name, date=model.date, kinds=len(model.groups),
            products=points,
            median=sum(g.n_points * g.chosen.median for g in model.groups) / points if points else None,
            roofline_median=sum(g.n_points * g.roofline.median for g in model.groups) / points if points else None))
    return found
