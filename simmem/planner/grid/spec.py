"""What may a search file say, and which cells does its grid open up?

A search file is TOML (`simmem.search-spec/1`): one or more grids of devices × models × workloads × budgets × policies,
and the limits that every cell has to keep. Nothing is planned here.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt, WithJsonSchema, field_validator, model_validator

from simmem.errors import MachineError, SimmemError, SpecError
from simmem.planner.grid.ranges import (
    Axis,
    Counts,
    KnobValues,
    Names,
    Precisions,
    Range,
    Shares,
    Sizes,
    read_quantity,
)
from simmem.planner.grid.sample import Point, Space, enumerated, has_range, is_ordered, sobol_points
from simmem.planner.question import DRAFT_LENGTH
from simmem.spec.base import Frozen, load_toml, validate
from simmem.spec.library import looks_like_path
from simmem.spec.workload import mixed_text
from simmem.units import format_quantity

__all__ = ["LIMITS", "BudgetAxis", "Cell", "CellQuestion", "Expected", "Grid", "Limits", "PolicyAxis", "Sample",
           "SearchSpec", "WorkloadAxis", "cell_at", "in_cell", "load_search", "said"]

MAX_CELLS = 100_000
NO_DRAFT = "none"
LIMITS = {"max_latency": "s", "min_tokens_per_s": "tokens_per_s", "max_dram": "bytes", "max_energy": "joule",
          "max_quality_loss": "share", "max_regress": "share"}
"""Limit → dimension of its quantity."""
REGRESS = 0.02
"""By how much a cell may be worse than in the baseline, where nothing else is said."""


Quoted = Annotated[float, WithJsonSchema({"type": "string"}, "validation")]
Share = Annotated[float, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number"}]}, "validation")]
Objective = Literal["latency", "throughput", "energy", "memory"]
Expected = Literal["feasible", "infeasible", "any"]


class Limits(Frozen):
    """What a cell has to keep, in SI units; None: no limit."""

    max_latency: Quoted | None = None
    """A token, as `predicted.token_latency_s`. [s]"""
    min_tokens_per_s: Quoted | None = None
    """Of the whole answer, prompt included, as `predicted.tokens_per_s`. [token/s]"""
    max_dram: Quoted | None = None
    """What the plan holds in the host's (or the unified) memory. [B]"""
    max_energy: Quoted | None = None
    """A token. [J]"""
    max_quality_loss: Share | None = None
    """Rise of perplexity over the dense model's, as a share; what costs more, or nobody measured, is not planned."""
    max_regress: Share | None = None
    """By which share a figure may be worse than in the baseline."""

    @field_validator(*LIMITS, mode="before")
    @classmethod
    def _read(cls, given: object, info: Any) -> float:
        dimension = LIMITS[info.field_name]
        if dimension == "tokens_per_s" and isinstance(given, str):
            given = given.replace("tokens/s", "token/s")
        value = read_quantity(given, dimension)
        if dimension == "share" and value > 1 and "%" not in str(given):
            raise ValueError(f"found {given!r}, which is {format_quantity(value, 'share')}; write it so if it is meant")
        return value

    def over(self, general: Limits) -> Limits:
        """These limits, and the general ones where these say nothing."""
        return Limits.model_construct(**{name: getattr(general, name) if getattr(self, name) is None
                                         else getattr(self, name) for name in LIMITS})


class _Entry(Frozen):
    """An entry of a part of the grid: values of some axes, and the name of those that are not listed alone."""

    @abstractmethod
    def axes(self) -> dict[str, Axis]:
        """Its axes; one that has nothing to choose has one value."""

    @abstractmethod
    def told(self, values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """(label, what the question says) of one value of each axis."""

    def labelled(self, label: str) -> str:
        """A label under the name of the entry, which stands alone where there is one combination."""
        name: str | None = getattr(self, "name", None)
        alone = all(not isinstance(axis, Range) and len(axis) == 1 for axis in self.axes().values())
        return label if name is None else name if alone else f"{name}:{label}"


class WorkloadAxis(_Entry):
    """Workloads; a list in place of a value opens one for each."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._=,-]*$", max_length=60)
    prompt_tokens: Counts = (128,)
    new_tokens: Counts = (256,)
    batch: Counts | None = None
    weights: Precisions | None = None
    kv: Names = ("fp16",)
    draft: Names | None = None
    """Models that propose tokens; "none": nothing is drafted."""
    acceptance: Shares | None = None
    draft_length: Counts | None = None

    @model_validator(mode="after")
    def _drafts_whole(self) -> WorkloadAxis:
        drafts = self.draft is not None and any(name != NO_DRAFT for name in self.draft)
        if drafts and self.acceptance is None:
            raise ValueError("found a draft model without acceptance, expected the share of its tokens that are "
                             "accepted, e.g. acceptance = 0.8")
        if not drafts and (self.acceptance or self.draft_length):
            raise ValueError(f"found {'acceptance' if self.acceptance else 'draft_length'} without a draft model")
        return self

    def axes(self) -> dict[str, Axis]:
        nothing = (None,)
        return {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens, "batch": self.batch or nothing,
                "weights": self.weights or nothing, "kv": self.kv, "draft": self.draft or nothing,
                "acceptance": self.acceptance or nothing, DRAFT_LENGTH.name: self.draft_length or nothing}

    def told(self, values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if values["draft"] in (None, NO_DRAFT):
            values = {**values, "draft": None, "acceptance": None, DRAFT_LENGTH.name: None}
        prompt, new, batch, weights, kv, draft, acceptance, length = values.values()
        mixed = mixed_text(weights) if isinstance(weights, dict) else weights
        proposed = f"draft={draft}@{acceptance:g}" + (f",length={length}" if length else "") if draft else None
        return self.labelled("-".join([
            f"p{prompt}", f"n{new}", *([f"b{batch}"] if batch else []), *([mixed] if mixed else []),
            *([f"kv={kv}"] if kv != "fp16" else []), *([proposed] if proposed else [])])), values


class BudgetAxis(_Entry):
    """Budgets of memory; a list in place of a size opens one for each."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._=,-]*$", max_length=60)
    dram: Sizes | None = None
    vram: Sizes | None = None

    def axes(self) -> dict[str, Axis]:
        return {"dram": self.dram or (None,), "vram": self.vram or (None,)}

    def told(self, values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        sizes = [f"{name}={''.join(size.split())}" for name, size in values.items() if size]
        return self.labelled(",".join(sizes) or "own-memory"), values


class PolicyAxis(_Entry):
    """Policies to choose from, and knobs that are held; from a name alone, that one policy; "any": every one."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._=,+-]*$", max_length=60)
    policy: Names
    knobs: KnobValues = Field(default_factory=dict)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> Any:
        """A name alone is a policy too."""
        return {"anyOf": [{"type": "string"}, handler(core_schema)]}

    @model_validator(mode="before")
    @classmethod
    def _from_a_name(cls, given: object) -> object:
        return {"policy": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _belongs(self) -> PolicyAxis:
        if "any" in self.policy and (self.knobs or len(self.policy) > 1):
            raise ValueError("knobs belong to a policy: name it, and not \"any\"" if self.knobs
                             else "\"any\" is every policy: name no others beside it")
        return self

    def axes(self) -> dict[str, Axis]:
        return {f"knobs.{name}": value if isinstance(value, Range) else (value,) for name, value in self.knobs.items()}

    def told(self, values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        held = {name.removeprefix("knobs."): value for name, value in values.items()}
        knobs = ",".join(f"{k}={_shown(v)}" for k, v in held.items())
        unnamed = "+".join(self.policy) + (f"({knobs})" if knobs else "")
        label = unnamed if self.name is None else self.labelled(knobs)
        return label, {"policies": None if self.policy == ("any",) else self.policy, "knobs": held}


def _shown(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


class Sample(Frozen):
    """How much of a grid is looked at."""

    cells: Annotated[StrictInt, Field(ge=1, le=MAX_CELLS)]
    """Of a scrambled Sobol sequence."""
    seed: Annotated[StrictInt, Field(ge=0, lt=2**32)] = 0
    refine: Annotated[StrictInt, Field(ge=0, le=MAX_CELLS)] = 0
    """Cells that are added where the outcomes say so."""
    around: Literal["boundary", "best"] = "boundary"
    """Between cells of which one passes and another fails or is infeasible; or beside those that do best."""


class Grid(Frozen):
    """Every combination of these is a cell, or a sample of them is."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)
    devices: Names
    models: Names
    workloads: tuple[WorkloadAxis, ...] = Field(default=(WorkloadAxis(),), min_length=1)
    budgets: tuple[BudgetAxis, ...] = Field(default=(BudgetAxis(),), min_length=1)
    policies: tuple[PolicyAxis, ...] = Field(default=(PolicyAxis(policy=("any",)),), min_length=1)
    sample: Sample | None = None
    trace: str | None = None
    objective: Objective | None = None
    engine: str | None = None
    limits: Limits = Limits()
    expect: Expected = "feasible"

    @model_validator(mode="after")
    def _can_be_opened(self) -> Grid:
        if self.sample is None and has_range(self.space):
            raise ValueError("holds a range, which has no end of values: say how many cells to take of it, as in "
                             "sample = { cells = 64 }")
        if self.sample is not None and self.sample.refine and not any(map(is_ordered, self.space.every_axis())):
            raise ValueError("refines between values, and has neither a range nor a rising list of numbers or sizes")
        return self

    @cached_property
    def space(self) -> Space:
        """What can be chosen, in the order in which it stands in the names of cells."""
        return Space({"devices": [{}] * len(self.devices), "models": [{}] * len(self.models),
                      "workloads": [one.axes() for one in self.workloads],
                      "budgets": [one.axes() for one in self.budgets],
                      "policies": [one.axes() for one in self.policies]})

    @cached_property
    def is_sampled(self) -> bool:
        """Whether there is more of it than is looked at."""
        return self.sample is not None and (has_range(self.space) or self.space.size() > self.sample.cells)

    def points(self) -> list[Point]:
        """The places of its cells, all of them or a sample."""
        if self.sample is None or not self.is_sampled:
            return enumerated(self.space)
        return sobol_points(self.space, self.sample.cells, self.sample.seed)


class SearchSpec(Frozen):
    """A search file."""

    schema_: Literal["simmem.search-spec/1"] = Field(alias="schema")
    baseline: str | None = None
    """A file that `--save-baseline` wrote, relative to this one."""
    objective: Objective = "latency"
    limits: Limits = Limits()
    grid: tuple[Grid, ...] = Field(min_length=1)

    def files(self, folder: Path) -> list[Path]:
        """Paths among the names of devices, models and traces."""
        drafts = {name for one in self.grid for load in one.workloads for name in load.draft or ()}
        names = drafts | {name for one in self.grid for name in (*one.devices, *one.models, one.trace) if name}
        return [folder / name for name in sorted(names) if looks_like_path(name)]


class CellQuestion(Frozen):
    """What the planner is asked in one cell, names as they stand in the file."""

    device: str
    model: str
    prompt_tokens: int
    new_tokens: int
    batch: int | None
    weights: str | dict[str, str] | None
    kv: str
    dram: str | None
    vram: str | None
    policies: tuple[str, ...] | None
    knobs: dict[str, Any]
    trace: str | None
    objective: str
    engine: str | None
    max_quality_loss: float | None
    draft: str | None = None
    acceptance: float | None = None


class Cell(Frozen):
    """One combination: its name, the question, and what is demanded of the answer."""

    id: str
    place: str
    """The name without the budget: where budgets were changed, a cell is found again in the baseline by it."""
    question: CellQuestion
    limits: Limits
    expect: Expected
    refined: bool = False
    """Added where outcomes of others asked for it."""


def load_search(path: Path) -> tuple[SearchSpec, list[Cell]]:
    """Read a search file and open up its grids, in the order of the file.

    Raises
    ------
    SpecError
        One line with file and key: unknown keys, limits without a unit, cells of the same name, too many of them.
    """
    data = load_toml(path)
    found = data.get("schema")
    if found != "simmem.search-spec/1":
        raise SpecError(f"found {found!r}, expected 'simmem.search-spec/1'" if "schema" in data else
                        "is missing; expected schema = 'simmem.search-spec/1'", file=str(path), key="schema")
    spec = validate(SearchSpec, data, file=str(path))
    names = {grid.name for grid in spec.grid} - {None}
    if len(names) < len(spec.grid) and len(spec.grid) > 1 and any(map(_is_refined, spec.grid)):
        raise SpecError("one of several grids is refined, and what is added could be a cell of another: give each grid "
                        "a name of its own", file=str(path), key="grid")
    cells: dict[str, Cell] = {}
    added = 0
    for index, grid in enumerate(spec.grid):
        key = f"grid.{index}"
        n = grid.sample.cells + grid.sample.refine if grid.sample and grid.is_sampled else grid.space.size()
        if n + len(cells) + added > MAX_CELLS:
            raise SpecError(f"opens up more than {MAX_CELLS} cells", file=str(path), key=key)
        try:
            points = grid.points()
        except MachineError as error:
            raise MachineError(error.message, file=str(path), key=f"{key}.{error.key}") from None
        mine: dict[str, Cell] = {}
        for point in points:
            cell = cell_at(grid, spec, point)
            if cell.id in cells or (cell.id in mine and not _may_repeat(grid, cell)):
                raise SpecError(f"the cell {cell.id!r} stands twice; give its grids (or the entries of its axes) a "
                                "name", file=str(path), key=key)
            mine.setdefault(cell.id, cell)
        cells |= mine
        added += grid.sample.refine if grid.sample and grid.is_sampled else 0
    return spec, list(cells.values())


def _is_refined(grid: Grid) -> bool:
    """Whether cells may be added to it."""
    return grid.is_sampled and grid.sample is not None and grid.sample.refine > 0


def _may_repeat(grid: Grid, cell: Cell) -> bool:
    """Whether the same cell is met twice by right: drawn twice, or without a draft for each acceptance."""
    return grid.is_sampled or (cell.question.draft is None and any(one.draft for one in grid.workloads))


def cell_at(grid: Grid, spec: SearchSpec, point: Point, *, refined: bool = False) -> Cell:
    """The cell at a place of a grid."""
    limits = grid.limits.over(spec.limits)
    if limits.max_regress is None:
        limits = limits.model_copy(update={"max_regress": REGRESS})
    (device, _), (model, _), (load, w), (budget, b), (policy, p) = point.values(grid.space)
    load_label, w = grid.workloads[load].told(w)
    budget_label, b = grid.budgets[budget].told(b)
    policy_label, p = grid.policies[policy].told(p)
    length = w.pop(DRAFT_LENGTH.name)
    knobs = {**p.pop("knobs"), **({DRAFT_LENGTH.name: length} if length else {})}
    before = [*([grid.name] if grid.name else []), grid.devices[device], grid.models[model], load_label]
    name = "/".join([*before, budget_label, policy_label])
    question = CellQuestion(device=grid.devices[device], model=grid.models[model], **w, **b, **p, knobs=knobs,
                            trace=grid.trace, objective=grid.objective or spec.objective, engine=grid.engine,
                            max_quality_loss=limits.max_quality_loss)
    # What was drawn has no place of its own: another draw is no change of a budget.
    return Cell(id=name, place=name if grid.is_sampled else "/".join([*before, policy_label]), question=question,
                limits=limits, expect=grid.expect, refined=refined)


def in_cell(error: SimmemError, cell: str, file: str) -> SimmemError:
    """An error as one of a cell of the search file, unless another file is to blame."""
    if error.file is not None:
        return error
    key = f" ({error.key.lstrip('-')})" if error.key else ""
    kind = type(error) if type(error).__init__ is SimmemError.__init__ else SpecError
    return kind(f"cell {cell}{key}: {error.message}", file=file, key="grid", tier=error.tier,
                missing_bytes=error.missing_bytes)


def said(value: float, limit: str) -> str:
    """A value in the unit of a limit."""
    text = format_quantity(value, LIMITS[limit], 4)
    return text.replace("token/s", "tokens/s")
