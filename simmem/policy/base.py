"""What is a policy? A rule for what lives where and what moves when, with knobs.

A policy turns (model, device, workload, trace, a block of knob values) into a Schedule, and says
what it keeps in each tier. It is written once, in numpy, over a block of candidates. Knobs are
*structural* (they change the ops or who runs them: one block per value) or *demand* (they only
change amounts: columns of one block).

To add one: a module in this folder (or another distribution's entry point in the group
`simmem.policies`) with a class and `@register`; `check_policy` must pass.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError, UnknownNameError
from simmem.policy.context import Context
from simmem.schedule import Schedule
from simmem.units import format_quantity, parse_quantity

__all__ = [
    "Block",
    "Knob",
    "KnobValue",
    "Placement",
    "Policy",
    "Setting",
    "agents_of",
    "one_value",
    "policies",
    "policy_named",
    "register",
    "why_not_plan",
    "with_largest_that_fits",
]

Array = NDArray[np.float64]
KnobValue = bool | int | float | str
Setting = KnobValue | tuple[float, ...]
"""A knob's value, or the numbers of one that takes several."""


@dataclass(frozen=True)
class Knob:
    """One thing a policy lets the planner choose.

    `values` is the grid that is searched for a given context; `default` is what a published
    configuration that does not mention the knob means, None where it has to be searched. A value
    may be a tuple of numbers, such as the shares of two tiers: then all values are, of one length.
    """

    name: str
    kind: Literal["structural", "demand"]
    values: tuple[Setting, ...]
    help: str
    default: Setting | None = None
    low: float | None = None
    high: float | None = None
    unsearched: tuple[Setting, ...] = ()
    """Values that may be set but are not worth searching."""
    hint: str = ""
    """What a user can do about a value that is missing."""
    dimension: Literal["", "bytes"] = ""
    """What its numbers count; a text may then carry a unit, such as "10 GB", and a bare number is in the SI unit."""

    def parse(self, given: object) -> Setting:
        """A value from the command line or a file, checked against the knob's type and range."""
        wanted = self.values[0]
        value: Setting
        if isinstance(wanted, bool):
            table = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
            key = str(given).lower()
            if key not in table:
                raise SpecError(f"found {given!r}, expected true or false", key=self.name)
            value = table[key]
        elif isinstance(wanted, tuple):
            parts = given if isinstance(given, (list, tuple)) else str(given).strip("[]() ").split(",")
            if len(parts) != len(wanted):
                raise SpecError(f"found {given!r}, expected {len(wanted)} numbers, as in "
                                f"{','.join(f'{v:g}' for v in wanted)}", key=self.name)
            value = tuple(self._number(part) for part in parts)
        elif isinstance(wanted, (int, float)):
            number = self._number(given)
            if isinstance(wanted, int) and number != int(number):
                raise SpecError(f"found {given!r}, expected a whole number", key=self.name)
            value = int(number) if isinstance(wanted, int) else number
        else:
            allowed = (*self.values, *self.unsearched)
            if given not in allowed:
                hint = f"; {self.hint}" if self.hint else ""
                raise SpecError(f"found {given!r}, expected one of {', '.join(map(str, allowed))}{hint}", key=self.name)
            value = str(given)
        return value

    def _number(self, given: object) -> float:
        try:
            number = float(str(given))
        except ValueError:
            if not self.dimension:
                raise SpecError(f"found {given!r}, expected a number", key=self.name) from None
            number = parse_quantity(given, self.dimension, key=self.name)
        if not math.isfinite(number):
            raise SpecError(f"found {given!r}, expected a finite number", key=self.name)
        low, high = (end if v is None else v for v, end in ((self.low, -math.inf), (self.high, math.inf)))
        if not low <= number <= high:
            ends = [format_quantity(end, self.dimension, 6) if self.dimension else f"{end:.10g}" for end in (low, high)]
            raise SpecError(f"found {given!r}, expected a value from {ends[0]} to {ends[1]}", key=self.name)
        return number


@dataclass(frozen=True)
class Placement:
    """Some tensors of the model and the tier they live in. [B]"""

    tensors: str
    tier: str
    bytes: float
    loaded: bool = False
    """Weights that have to be read from storage once, before the first token."""


@dataclass(frozen=True)
class Block:
    """Candidates that share their structure: structural values, and a column per demand knob.

    A column is (n_candidates,), or (n_candidates, n) for a knob whose values are tuples of n numbers.
    """

    structural: Mapping[str, KnobValue]
    columns: Mapping[str, NDArray[Any]]

    @property
    def n_candidates(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 1

    def knobs(self, index: int) -> dict[str, Setting]:
        """All knob values of one candidate as plain Python values."""
        picked = {k: v[index] for k, v in self.columns.items()}
        return {**self.structural, **{k: tuple(v.tolist()) if np.ndim(v) else v.item() if hasattr(v, "item") else v
                                      for k, v in picked.items()}}

    def only(self, which: NDArray[np.int64]) -> Block:
        """Some of the candidates."""
        return Block(self.structural, {k: v[which] for k, v in self.columns.items()})


@runtime_checkable
class Policy(Protocol):
    """What the planner asks of a policy. All arrays have the candidate axis last.

    A policy may also have
    why_not(context)               why it cannot plan a context, in words; None where it can. Asked through
                                   `why_not_plan`, which knows already of a trace that is missing
    agents(context, block)         who computes in a block, the structural `agent` first; that one alone where absent
    rows(context, n)               up to n trace tokens that stand for all of them
    refine(context, block, fixed)  a block with candidates that the grid misses
    sequences(fixed)               what the batch must be a multiple of by knobs that are set, and whether just that
    unmeasured(context, structural, fixed)  whether nobody measured what a combination costs, so it is not searched
    passes(context, block)         how often a step reads a weight, (n_candidates,); once where absent
    same_at_every_budget           whether `decode` looks at no budget, so that a candidate is scored once for all
    """

    name: str
    summary: str
    uses_trace: bool
    """Whether it needs a trace of which neurons tokens use, and leaves the others out."""

    def knobs(self, context: Context) -> tuple[Knob, ...]:
        """Its knobs for this context; () where it cannot plan it (`why_not_plan`)."""

    def footprint(self, context: Context, block: Block) -> dict[str, Array]:
        """Bytes each tier holds at its fullest, tier → (n_candidates,). [B]"""

    def decode(self, context: Context, block: Block, rows: NDArray[np.int64]) -> Schedule:
        """The schedule of a decode step; columns are candidates × trace rows, rows fastest."""

    def prefill(self, context: Context, block: Block) -> Schedule:
        """The schedule of the prompt; one column per candidate."""

    def placements(self, context: Context, block: Block) -> list[Placement]:
        """What lives where, for a block of one candidate."""

    def report(self, context: Context, block: Block, rows: NDArray[np.int64]) -> dict[str, Any]:
        """For a block of one candidate: `requested_bytes`, `cache`, `active_share`, `notes`, `perplexity_ratio`,
        `quality_source`; with a placement that may not be the best one, `gap`: the share by which the best could be
        faster, or `least_s`: what no other placement beats, of a "step" for each token
        that it yields, and of the prompt with all steps ("total")."""


def one_value(value: Setting) -> KnobValue:
    """The value of a knob that takes one at a time, as structural ones do. SpecError for several."""
    if isinstance(value, tuple):
        raise SpecError(f"found {value!r}, expected one value")
    return value


def agents_of(policy: Policy, context: Context, block: Block) -> tuple[str, ...]:
    """Who computes in a block, the main agent first."""
    named = getattr(policy, "agents", None)
    return (str(block.structural["agent"]),) if named is None else tuple(named(context, block))


def why_not_plan(policy: Policy, context: Context) -> str | None:
    """Why a policy cannot plan a context, in words; None where it can."""
    if policy.uses_trace and context.trace is None:
        return f"it needs a trace of which neurons {context.model.name} uses; name one with --trace"
    own = getattr(policy, "why_not", None)
    return None if own is None else own(context)


def with_largest_that_fits(policy: Policy, context: Context, block: Block, knob: str, sizes: NDArray[np.int64]
                           ) -> Block:
    """A block with the largest of `sizes` that fits every tier, which a coarse grid of its one demand knob may leave
    out; the block itself where that holds all sizes, or none fits."""
    if len(block.columns[knob]) >= len(sizes):
        return block
    every = Block(block.structural, {knob: sizes})
    fits = np.ones(len(sizes), dtype=np.bool_)
    for tier, used in policy.footprint(context, every).items():
        fits &= used <= context.budget_bytes[tier]
    if not fits.any():
        return block
    return Block(block.structural, {knob: np.union1d(block.columns[knob], sizes[fits].max())})


_REGISTRY: dict[str, Policy] = {}


def register(kind: type[Any]) -> type[Any]:
    """Class decorator: make a policy known under its name."""
    one = kind()
    if one.name in _REGISTRY:
        raise SpecError(f"two policies are named {one.name!r}")
    _REGISTRY[one.name] = one
    return kind


@cache
def _load_all() -> None:
    package = importlib.import_module("simmem.policy.families")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("_"):
            continue
        found = importlib.import_module(f"{package.__name__}.{module.name}")
        if not any(type(one).__module__ == found.__name__ for one in _REGISTRY.values()):
            raise SpecError(f"the policy module {module.name} registers nothing")
    from importlib.metadata import entry_points

    for point in entry_points(group="simmem.policies"):
        point.load()


def policies() -> dict[str, Policy]:
    """Every known policy by name."""
    _load_all()
    return dict(_REGISTRY)


def policy_named(name: str) -> Policy:
    """One policy by name; UnknownNameError with close matches otherwise."""
    known = policies()
    if name not in known:
        raise UnknownNameError("policy", name, known)
    return known[name]
