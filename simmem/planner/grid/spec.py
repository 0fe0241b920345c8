"""What may a search file say, and which cells does its grid open up?

A search file is TOML (`simmem.search-spec/1`): one or more grids of devices × models × workloads × budgets × policies,
and the limits that every cell has to keep. Nothing is planned here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictInt, StrictStr, WithJsonSchema, field_validator, model_validator

from simmem.errors import SimmemError, SpecError
from simmem.spec.base import Frozen, load_toml, validate
from simmem.spec.library import looks_like_path
from simmem.units import format_quantity, parse_quantity

__all__ = ["LIMITS", "BudgetAxis", "Cell", "CellQuestion", "Expected", "Grid", "Limits", "PolicyAxis", "SearchSpec",
           "WorkloadAxis", "in_cell", "load_search", "said"]

MAX_CELLS = 100_000
LIMITS = {"max_latency": "s", "min_tokens_per_s": "tokens_per_s", "max_dram": "bytes", "max_energy": "joule",
          "max_quality_loss": "share", "max_regress": "share"}
"""Limit → dimension of its quantity."""
REGRESS = 0.02
"""By how much a cell may be worse than in the baseline, where nothing else is said."""


def _one_or_more(given: object) -> object:
    """A value by itself is a list of one."""
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)


def _written_as(*kinds: str) -> WithJsonSchema:
    """In the schema of the file: one of these, or a list of them."""
    each = [{"type": kind} for kind in kinds]
    return WithJsonSchema({"anyOf": [*each, {"type": "array", "minItems": 1, "items": {"anyOf": each}}]}, "validation")


Names = Annotated[tuple[StrictStr, ...], BeforeValidator(_one_or_more), Field(min_length=1, max_length=10_000),
                  _written_as("string")]
Counts = Annotated[tuple[Annotated[StrictInt, Field(ge=1, le=10_000_000)], ...], BeforeValidator(_one_or_more),
                   Field(min_length=1, max_length=10_000), _written_as("integer")]
Precisions = Annotated[tuple[StrictStr | dict[str, StrictStr], ...], BeforeValidator(_one_or_more),
                       Field(min_length=1, max_length=100), _written_as("string", "object")]
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
        value = _read_quantity(given, dimension)
        if dimension == "share" and value > 1 and "%" not in str(given):
            raise ValueError(f"found {given!r}, which is {format_quantity(value, 'share')}; write it so if it is meant")
        return value

    def over(self, general: Limits) -> Limits:
        """These limits, and the general ones where these say nothing."""
        return Limits.model_construct(**{name: getattr(general, name) if getattr(self, name) is None
                                         else getattr(self, name) for name in LIMITS})


def _read_quantity(given: object, dimension: str) -> float:
    try:
        return parse_quantity(given, dimension)
    except SimmemError as error:  # pydantic reports ValueError with the path of keys
        raise ValueError(error.message) from None


class WorkloadAxis(Frozen):
    """Workloads; a list in place of a value opens one for each."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._=,-]*$", max_length=60)
    prompt_tokens: Counts = (128,)
    new_tokens: Counts = (256,)
    batch: Counts | None = None
    weights: Precisions | None = None
    kv: Names = ("fp16",)

    def each(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(label, what `ask` is told) of each workload."""
        found = list(itertools.product(self.prompt_tokens, self.new_tokens, self.batch or (None,),
                                       self.weights or (None,), self.kv))
        for prompt, new, batch, weights, kv in found:
            mixed = ",".join(f"{k}={v}" for k, v in weights.items()) if isinstance(weights, dict) else weights
            label = "-".join([f"p{prompt}", f"n{new}", *([f"b{batch}"] if batch else []), *([mixed] if mixed else []),
                              *([f"kv={kv}"] if kv != "fp16" else [])])
            if self.name:
                label = self.name if len(found) == 1 else f"{self.name}:{label}"
            yield label, {"prompt_tokens": prompt, "new_tokens": new, "batch": batch, "weights": weights, "kv": kv}


class BudgetAxis(Frozen):
    """Budgets of memory; a list in place of a size opens one for each."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._=,-]*$", max_length=60)
    dram: Names | None = None
    vram: Names | None = None

    @field_validator("dram", "vram", mode="before")
    @classmethod
    def _are_sizes(cls, given: object) -> object:
        sizes = _one_or_more(given)
        assert isinstance(sizes, tuple)
        for size in sizes:
            _read_quantity(size, "bytes")
        return sizes

    def each(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(label, what `ask` is told) of each budget."""
        found = list(itertools.product(self.dram or (None,), self.vram or (None,)))
        for dram, vram in found:
            sizes = [f"{name}={''.join(size.split())}" for name, size in (("dram", dram), ("vram", vram)) if size]
            label = ",".join(sizes) or "own-memory"
            if self.name:
                label = self.name if len(found) == 1 else f"{self.name}:{label}"
            yield label, {"dram": dram, "vram": vram}


class PolicyAxis(Frozen):
    """Policies to choose from, and knobs that are held; from a name alone, that one policy; "any": every one."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._=,+-]*$", max_length=60)
    policy: Names
    knobs: dict[str, Any] = Field(default_factory=dict)

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

    def label_and_question(self) -> tuple[str, dict[str, Any]]:
        """A label, and what `ask` is told."""
        knobs = ",".join(f"{k}={_shown(v)}" for k, v in self.knobs.items())
        label = self.name or "+".join(self.policy) + (f"({knobs})" if knobs else "")
        return label, {"policies": None if self.policy == ("any",) else self.policy, "knobs": self.knobs}


def _shown(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


class Grid(Frozen):
    """Every combination of these is a cell."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)
    devices: Names
    models: Names
    workloads: tuple[WorkloadAxis, ...] = Field(default=(WorkloadAxis(),), min_length=1)
    budgets: tuple[BudgetAxis, ...] = Field(default=(BudgetAxis(),), min_length=1)
    policies: tuple[PolicyAxis, ...] = Field(default=(PolicyAxis(policy=("any",)),), min_length=1)
    trace: str | None = None
    objective: Objective | None = None
    engine: str | None = None
    limits: Limits = Limits()
    expect: Expected = "feasible"


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
        names = {name for one in self.grid for name in (*one.devices, *one.models, one.trace) if name}
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
    cells: dict[str, Cell] = {}
    for index, grid in enumerate(spec.grid):
        if _size(grid) + len(cells) > MAX_CELLS:
            raise SpecError(f"opens up more than {MAX_CELLS} cells", file=str(path), key=f"grid.{index}")
        for cell in _cells(grid, spec):
            if cell.id in cells:
                raise SpecError(f"the cell {cell.id!r} stands twice; give its grids (or the entries of its axes) a "
                                "name", file=str(path), key=f"grid.{index}")
            cells[cell.id] = cell
    return spec, list(cells.values())


def _size(grid: Grid) -> int:
    workloads = sum(len(w.prompt_tokens) * len(w.new_tokens) * len(w.batch or "1") * len(w.weights or "1") * len(w.kv)
                    for w in grid.workloads)
    budgets = sum(len(b.dram or "1") * len(b.vram or "1") for b in grid.budgets)
    return len(grid.devices) * len(grid.models) * workloads * budgets * len(grid.policies)


def _cells(grid: Grid, spec: SearchSpec) -> Iterator[Cell]:
    limits = grid.limits.over(spec.limits)
    if limits.max_regress is None:
        limits = limits.model_copy(update={"max_regress": REGRESS})
    fixed = {"trace": grid.trace, "objective": grid.objective or spec.objective, "engine": grid.engine,
             "max_quality_loss": limits.max_quality_loss}
    workloads = [one for axis in grid.workloads for one in axis.each()]
    budgets = [one for axis in grid.budgets for one in axis.each()]
    policies = [axis.label_and_question() for axis in grid.policies]
    for device, model, (load, w), (budget, b), (policy, p) in itertools.product(
            grid.devices, grid.models, workloads, budgets, policies):
        before, after = [*([grid.name] if grid.name else []), device, model, load], [policy]
        yield Cell(id="/".join([*before, budget, *after]), place="/".join([*before, *after]),
                   question=CellQuestion(device=device, model=model, **w, **b, **p, **fixed), limits=limits,
                   expect=grid.expect)


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
