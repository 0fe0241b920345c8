"""What does `simmem search --json` say, and what a baseline? Types that change only by adding."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from simmem.planner.document import Bound, Plan
from simmem.planner.grid.spec import CellQuestion, Expected
from simmem.policy.base import Setting

__all__ = ["Baseline", "BaselineCell", "BaselineRef", "BoundaryPair", "ChangedInput", "InputFile", "SearchCell",
           "SearchDocument", "SearchSummary", "Violation"]

Status = Literal["pass", "fail", "infeasible"]
What = Literal["device", "model", "trace"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, ser_json_inf_nan="null")


class InputFile(_Part):
    """Something that cells rest on, by what it says rather than by its bytes: a comment changes no digest."""

    what: What
    name: str
    digest: str


class ChangedInput(_Part):
    """An input that is not what it was when the baseline was written."""

    what: What
    name: str
    before: str | None
    after: str
    changes: list[str]
    """What it says now and said then, figure by figure."""


class Violation(_Part):
    limit: str
    """The limit's name; "feasible" and "infeasible" where that is not what was expected."""
    figure: str | None
    """What was judged."""
    value: float | None
    """In SI units; null where there is none."""
    allowed: float | None
    cause: str


class SearchCell(_Part):
    id: str
    status: Status
    question: CellQuestion
    expect: Expected
    limits: dict[str, float]
    plan: Plan | None
    figures: dict[str, float]
    """What limits and the baseline are about: seconds, rates, joules, bytes held outside storage."""
    infeasible: str | None
    """Why there is no plan."""
    tier: str | None
    missing_bytes: float | None
    violations: list[Violation]
    changes: list[str]
    """What moved since the baseline, within limits or not."""
    compared_with: str | None
    """The baseline's cell: of the same name, or of the same but for its budget."""
    refined: bool = False
    """Added to a sample where the outcomes of others asked for it."""


class BaselineRef(_Part):
    file: str
    simmem: str
    digest: str


class SearchSummary(_Part):
    n: int
    passed: int
    failed: int
    infeasible: int
    broken: int
    """Cells with a violation; any makes the exit code 1."""


class BoundaryPair(_Part):
    """Two cells of a sample that differ only along ranges and rising lists, with none between them."""

    passes: str
    """The one that keeps its limits."""
    breaks: str
    """The one that does not, or is infeasible."""


class SearchDocument(_Part):
    """`simmem search --json`. Nothing in it depends on when, how fast or on how many cores it was made."""

    schema_: Literal["simmem.search/1"] = Field(default="simmem.search/1", alias="schema")
    simmem: str
    spec: str
    baseline: BaselineRef | None
    inputs: list[InputFile]
    changed_inputs: list[ChangedInput]
    cells: list[SearchCell]
    new_cells: list[str]
    """Cells that the baseline does not have."""
    left_out: list[str]
    """Cells of the baseline that the search no longer has."""
    summary: SearchSummary
    boundary: list[BoundaryPair] = []
    """Of samples that were refined around their boundary, the nearest to each other first."""

    @property
    def broken(self) -> list[SearchCell]:
        return [cell for cell in self.cells if cell.violations]


class BaselineCell(_Part):
    id: str
    place: str
    question: CellQuestion
    feasible: bool
    policy: str | None
    knobs: dict[str, Setting]
    weights: str | None
    bound: Bound | None
    trace: str | None
    """Its digest."""
    figures: dict[str, float]


class Baseline(_Part):
    """What `--save-baseline` writes and a later search is compared with."""

    schema_: Literal["simmem.search-baseline/1"] = Field(default="simmem.search-baseline/1", alias="schema")
    simmem: str
    inputs: list[InputFile]
    contents: dict[str, dict[str, Any]]
    """What devices and models said ("device iphone15" → key → value), so that what changed can be named."""
    cells: list[BaselineCell]
    digest: str = ""
    """Of everything else here: a file that was edited or damaged is refused."""
