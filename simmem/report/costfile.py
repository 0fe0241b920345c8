"""Do the measurements of a calibration support a cost model, how well does it tell shapes it has not seen, and where
is it written?

The model that is written is fitted to every shape. What is said of it comes from another one, fitted to half of the
families of shapes and judged on the other half (`simmem.validation.costs`): the nearest there is to a test on shapes
that nobody has measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from simmem.cost.regression import fit_cost_model
from simmem.errors import CalibrationError, MachineError
from simmem.report.devicefile import toml_text
from simmem.report.files import write_bytes, write_text
from simmem.report.format import new_table, number, share
from simmem.spec.base import Frozen
from simmem.spec.costmodel import FittedCost
from simmem.spec.measurement import Measurements
from simmem.validation.costs import CostRow, judge_costs

__all__ = ["MIN_JUDGED", "CostModelQuality", "FittedCosts", "cost_path", "cost_table", "cost_words",
           "fitted_costs", "without_phases", "write_device"]


MIN_JUDGED = 40
"""Of fewer the coverage of a 90 % interval is not known to 5 points (one deviation)."""


class CostModelQuality(Frozen):
    """The cost model of a calibration, or why there is none."""

    written: str | None
    """The file, beside the device file; None where there is none."""
    why_not: str | None
    groups: int
    held_out: tuple[CostRow, ...]
    """By kind, then of all products together."""
    left_out: dict[str, str]
    """Kinds that stay with the roofline, and why."""


@dataclass(frozen=True)
class FittedCosts:
    """A model that is worth writing, if any."""

    model: FittedCost | None
    why_not: str | None
    held_out: tuple[CostRow, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()

    def of_agents(self, agents: set[str]) -> FittedCosts:
        """Without the groups of agents that the device file has not, which could not be read back."""
        groups = tuple(g for g in self.model.groups if g.agent in agents) if self.model is not None else ()
        if self.model is None or len(groups) == len(self.model.groups):
            return self
        if not groups:
            return FittedCosts(None, "what was fitted is of agents that the device file has not")
        return replace(self, model=self.model.model_copy(update={"groups": groups}))

    def said(self, path: Path) -> CostModelQuality:
        return CostModelQuality(
            written=None if self.model is None else str(path), why_not=self.why_not,
            groups=0 if self.model is None else len(self.model.groups), held_out=self.held_out,
            left_out=dict(self.left_out))


def cost_path(out: Path) -> Path:
    """Where the cost model of a device file goes: OUT without its ending, `.cost.json`, in the same folder."""
    return out.with_name(f"{out.stem}.cost.json")


def fitted_costs(measured: Measurements) -> FittedCosts:
    """Fit a cost model, and judge one like it on shapes kept aside.

    There is none where too little can be trusted to judge one: a model that nothing is known of is worse than a
    roofline. Raises SpecError where a measurement does not say its shape.
    """
    try:
        report = judge_costs(measured)
        model = fit_cost_model(measured)
    except (CalibrationError, MachineError) as error:
        return FittedCosts(None, error.message)
    if report.all_products.n < MIN_JUDGED:
        return FittedCosts(None, f"{report.all_products.n} products of unseen shapes can be trusted, and judging takes "
                                 f"{MIN_JUDGED}")
    return FittedCosts(model, None,
                       (*report.rows, report.all_products),
                       tuple(sorted(model.left_out.items())))


def without_phases(model: FittedCost | None) -> FittedCost | None:
    """A cost model without what was learnt from runs, which holds for the figures they were predicted with alone."""
    return model.model_copy(update={"phases": ()}) if model is not None and model.groups else None


def write_device(out: Path, tables: dict[str, Any], model: FittedCost | None) -> None:
    """Write a device file, and first the cost model that it names: both, or neither of them.

    Raises MachineError where one cannot be written; what was there before is there again then.
    """
    if model is None:
        write_text(out, toml_text(tables))
        return
    beside = cost_path(out)
    before = beside.read_bytes() if beside.is_file() else None
    write_text(beside, model.to_json())
    try:
        write_text(out, toml_text({**tables, "cost_model": beside.name}))
    except BaseException:
        if before is None:
            beside.unlink(missing_ok=True)
        else:
            write_bytes(beside, before)
        raise


# --- as it is shown -------------------------------------------------------------------------------------------------


def cost_words(found: CostModelQuality) -> Text:
    """One line: the model, or why there is none."""
    if found.written is None:
        why = (found.why_not or "").partition(":")[0]
        return Text(f"No cost model: {why}. Products are timed by the roofline of the figures above.")
    every = found.held_out[-1]
    return Text(f"Cost model of {found.groups} kinds of op; {every.n} products of {every.shapes} shapes that it was "
                f"not fitted to are off by {share(every.median)} (median), {share(every.p90)} (p90), "
                f"{share(every.coverage)} of them inside the 90 % interval"
                + (f"; {len(found.left_out)} kinds stay with the roofline" if found.left_out else "") + ".")


def cost_table(found: CostModelQuality) -> Table:
    """The held-out errors by kind."""
    table = new_table("held-out products", "n", "median", "p90", "inside 90 %", "± half / median", "roofline")
    for row in found.held_out:
        ratio = f"{row.half_width_over_median:.1f}"
        threads = "" if row.threads is None else f" {row.threads} thr"
        level = "" if row.level in ("", "dram") else f" {row.level}"
        name = f"{row.kind} {row.dtype}{level}{threads}".strip() + (" *" if row.corrected else "")
        table.add_row(name, number(row.n), share(row.median), share(row.p90), share(row.coverage), ratio,
                      share(row.roofline_median), style="bold" if row.threads is None else None)
    table.caption = "* with a correction beside the physical terms; roofline: its median error"
    return table
