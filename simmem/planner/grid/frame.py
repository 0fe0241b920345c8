"""How do many plans become one table? `simmem.sweep`: a list in place of an argument of `plan` opens a row for each.

The cells are those of `simmem search`, answered by the same code; what is added here is how arguments open them and
which columns a row has.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simmem.errors import MachineError, SpecError
from simmem.planner.document import Plan
from simmem.planner.grid.cells import CellOutcome
from simmem.planner.grid.fanout import check_backend
from simmem.planner.grid.spec import MAX_CELLS, Cell, CellQuestion, Limits, PolicyAxis
from simmem.planner.grid.sweep import answer_all
from simmem.planner.question import DRAFT_LENGTH, MAX_LOSS, OBJECTIVES, budgets_of
from simmem.spec.base import validate
from simmem.spec.device import Device, load_device
from simmem.spec.workload import mixed_text, weights_label

if TYPE_CHECKING:
    import pandas

__all__ = ["COLUMNS", "sweep"]

_NAME = "simmem.sweep"
"""What errors name in place of a search file; names that are paths are relative to the folder at hand."""

COLUMNS: dict[str, str] = {
    # what was asked
    "device": "string", "model": "string", "prompt_tokens": "Int64", "new_tokens": "Int64", "kv": "string",
    "dram_bytes": "float64", "vram_bytes": "float64", "objective": "string", "engine": "string",
    "asked_policy": "string", "asked_knobs": "string", "asked_weights": "string", "asked_batch": "Int64",
    "asked_trace": "string", "max_quality_loss": "float64", "draft": "string", "acceptance": "float64",
    # what came of it
    "status": "string", "reason": "string", "missing_tier": "string", "missing_bytes": "float64",
    # the plan
    "policy": "string", "knobs": "string", "weights": "string", "batch": "Int64", "draft_length": "Int64",
    "dram_used_bytes": "float64", "vram_used_bytes": "float64", "held_bytes": "float64",
    "token_latency_s": "float64", "token_latency_low_s": "float64", "token_latency_high_s": "float64",
    "token_latency_p50_s": "float64", "token_latency_p95_s": "float64", "token_latency_p99_s": "float64",
    "first_token_s": "float64", "load_s": "float64", "tokens_per_s": "float64", "decode_tokens_per_s": "float64",
    "io_s": "float64", "transfer_s": "float64", "memory_s": "float64", "compute_s": "float64",
    "predictor_s": "float64", "sync_s": "float64", "draft_s": "float64", "wait_s": "float64",
    "storage_bytes_per_token": "float64", "copied_bytes_per_token": "float64", "cache_hit_ratio": "float64",
    "energy_j_per_token": "float64", "perplexity_ratio": "float64", "bound_s": "float64", "bound_resource": "string",
    "trace": "string", "trace_kind": "string", "weakest_kind": "string", "search_gap": "float64",
}
"""Column → pandas type, in the order of the frame. Seconds, bytes and joules are SI, and the name ends in the unit."""
_PARTS = ("io", "transfer", "memory", "compute", "predictor", "sync", "draft", "wait")


def sweep(
    device: str | Iterable[str],
    model: str | Iterable[str],
    *,
    dram: object = None,
    vram: object = None,
    prompt: int | Iterable[int] = 128,
    new_tokens: int | Iterable[int] = 256,
    batch: int | Iterable[int | None] | None = None,
    weights: object = None,
    kv: str | Iterable[str] = "fp16",
    trace: str | Iterable[str | None] | None = None,
    policy: object = None,
    knobs: Mapping[str, object] | Iterable[Mapping[str, object] | None] | None = None,
    objective: str | Iterable[str] = "latency",
    engine: str | Iterable[str | None] | None = None,
    max_quality_loss: float | Iterable[float | None] | None = None,
    draft: str | Iterable[str | None] | None = None,
    acceptance: float | Iterable[float | None] | None = None,
    jobs: int = 1,
) -> pandas.DataFrame:
    """One plan for every combination, as a tidy frame: a row for each, whether anything fits there or not.

    Every argument is as in `plan`, or a list (tuple, range, array) of such: each entry opens its own rows.

    Parameters
    ----------
    dram, vram : sizes such as "3 GB", or numbers of bytes. [B]
    policy : a list opens a row for each of its entries, and an entry may be a list itself, the best of which is taken;
        "any" or None: the best of all; or `{"policy": …, "knobs": {…}}`, as in a search file.
    knobs : held in every policy that is named beside it and says nothing of its own.
    jobs : worker processes; more than one needs the extra `search`.

    Returns
    -------
    pandas.DataFrame
        `COLUMNS`, rows in the order of the arguments, the first changing slowest. A row has status "ok", or
        "infeasible" with the reason, the tier that is short and by how many bytes, and its figures missing.
        `knobs` is JSON: `simmem.plan(…, policy=row.policy, knobs=json.loads(row.knobs))` is that plan again.

    Raises
    ------
    SpecError, TraceError
        A question is wrong; names the row.
    MachineError
        pandas or joblib is missing (extras `notebook`, `search`), or a worker died.
    """
    try:
        import pandas
    except ImportError as error:
        raise MachineError(f"a frame needs pandas ({error}); install with: pip install 'simmem[notebook]'",
                           key=_NAME) from None
    if not isinstance(jobs, int) or jobs < 1:
        raise SpecError(f"found {jobs!r}, expected a whole number of worker processes from 1", key="jobs")
    check_backend(jobs, "loky", None)
    axes = {"device": device, "model": model, "prompt": prompt, "new_tokens": new_tokens, "kv": kv, "dram": dram,
            "vram": vram, "objective": objective, "engine": engine, "policy": policy, "knobs": knobs,
            "weights": weights, "batch": batch, "trace": trace, "max_quality_loss": max_quality_loss, "draft": draft,
            "acceptance": acceptance}
    cells = _cells({name: _each(name, given) for name, given in axes.items()})
    answered = answer_all(cells, Path(_NAME), jobs=jobs)
    devices = {name: load_device(name) for name in {cell.question.device for cell in cells}}
    rows = [_row(cell.question, outcome, devices[cell.question.device]) for cell, outcome in answered]
    return pandas.DataFrame({name: pandas.Series([row[name] for row in rows], dtype=kind)
                             for name, kind in COLUMNS.items()})


# --- arguments open cells ------------------------------------------------------------------------------------------


def _each(name: str, given: object) -> list[Any]:
    """The values of one argument: itself, or the entries of a list of them."""
    if given is None or isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        values = [given]
    else:
        values = list(given)
        if not values:
            raise SpecError("is an empty list, expected at least one value", file=_NAME, key=name)
    return [value.item() if hasattr(value, "item") else value for value in values]  # numpy's numbers as Python's


def _cells(axes: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """Every combination as a cell, named by what differs between them."""
    size = 1
    for values in axes.values():
        size *= len(values)
    if size > MAX_CELLS:
        raise SpecError(f"opens up {size} rows, at most {MAX_CELLS} are planned at once", file=_NAME)
    named = {name for name, values in axes.items() if len(values) > 1}
    cells: dict[str, Cell] = {}
    for values in itertools.product(*axes.values()):
        asked = dict(zip(axes, values, strict=True))
        label = "/".join([str(asked["device"]), str(asked["model"]),
                          *(f"{name}={asked[name]}" for name in axes
                            if name in named - {"device", "model"})])
        if label in cells:
            raise SpecError(f"the row {label!r} stands twice", file=_NAME)
        question = validate(CellQuestion, dict(_questioned(asked, label)), file=_NAME)
        cells[label] = Cell(id=label, place=label, question=question, limits=Limits(), expect="any")
    return list(cells.values())


def _questioned(asked: Mapping[str, Any], label: str) -> Iterator[tuple[str, Any]]:
    """Key and value of what the planner is asked for one combination."""
    policies, knobs = _policies(asked["policy"], asked["knobs"], label)
    if asked["objective"] not in OBJECTIVES:
        raise SpecError(f"found {asked['objective']!r}, expected one of {', '.join(OBJECTIVES)}", file=_NAME,
                        key="objective")
    loss = asked["max_quality_loss"]
    if loss is not None and not 0 <= loss <= MAX_LOSS:  # also false for NaN
        raise SpecError(f"found {loss}, expected a share from 0 to {MAX_LOSS}, e.g. 0.05", file=_NAME,
                        key="max_quality_loss")
    yield from (("policies", policies), ("knobs", knobs), ("prompt_tokens", asked["prompt"]))
    for name in ("dram", "vram"):
        size = asked[name]
        yield name, f"{size!r} B" if isinstance(size, (int, float)) and not isinstance(size, bool) else size
    for name in ("device", "model", "new_tokens", "kv", "objective", "engine", "weights", "batch", "trace",
                 "max_quality_loss", "draft", "acceptance"):
        yield name, asked[name]


def _policies(policy: object, knobs: object, label: str) -> tuple[tuple[str, ...] | None, dict[str, Any]]:
    """Policies to choose from (None: every one) and knobs that are held."""
    held = dict(knobs) if isinstance(knobs, Mapping) else {}
    if knobs is not None and not isinstance(knobs, Mapping):
        raise SpecError(f"found {knobs!r}, expected a table of knobs", file=_NAME, key="knobs")
    given = dict(policy) if isinstance(policy, Mapping) else {"policy": "any" if policy is None else policy}
    axis = validate(PolicyAxis, given, file=_NAME)
    if axis.policy != ("any",):
        return axis.policy, {**held, **axis.knobs}
    if held.keys() - {DRAFT_LENGTH.name}:
        raise SpecError(f"the row {label!r}: knobs belong to a policy: name it", file=_NAME, key="knobs")
    return None, held


# --- answers become rows -------------------------------------------------------------------------------------------


def _row(q: CellQuestion, outcome: CellOutcome, device: Device) -> dict[str, Any]:
    """One row; what a plan would say is None where there is none."""
    budget, special = budgets_of(device, q.dram, q.vram), _special(device)
    mixed = q.weights if isinstance(q.weights, dict) else {}
    row: dict[str, Any] = {
        **dict.fromkeys(COLUMNS), "device": q.device, "model": q.model, "prompt_tokens": q.prompt_tokens,
        "new_tokens": q.new_tokens, "kv": q.kv, "dram_bytes": budget[device.host],
        "vram_bytes": None if special is None else budget[special], "objective": q.objective, "engine": q.engine,
        "asked_policy": "any" if q.policies is None else "+".join(q.policies),
        "asked_knobs": json.dumps(q.knobs, sort_keys=True),
        "asked_weights": mixed_text(mixed) or q.weights, "asked_batch": q.batch,
        "asked_trace": q.trace, "max_quality_loss": q.max_quality_loss, "draft": q.draft,
        "acceptance": q.acceptance, "status": "infeasible" if outcome.plan is None else "ok",
        "reason": outcome.infeasible, "missing_tier": outcome.tier, "missing_bytes": outcome.missing_bytes}
    if outcome.plan is not None:
        row.update(_planned(outcome.plan, device, special, outcome.figures))
    return row


def _special(device: Device) -> str | None:
    """The memory that `vram` speaks of."""
    return next((name for name, memory in device.memory.items() if memory.kind == "device"), None)


def _planned(plan: Plan, device: Device, special: str | None, figures: Mapping[str, float]) -> dict[str, Any]:
    p, w = plan.predicted, plan.workload
    low, high = p.token_latency_interval_s
    moved = {kind: sum(amount for link, amount in p.bytes_per_token.items() if device.link[link].kind == kind)
             for kind in ("storage", "copy")}
    caches = list(p.cache.values())
    return {
        "policy": plan.policy.name, "knobs": json.dumps(plan.policy.knobs, sort_keys=True),
        "weights": weights_label(w.weights, w.mixed), "batch": w.batch, "draft_length": w.draft_length,
        "dram_used_bytes": plan.memory[device.host].used_bytes,
        "vram_used_bytes": None if special is None else plan.memory[special].used_bytes,
        "held_bytes": figures["held_bytes"], "token_latency_s": p.token_latency_s, "token_latency_low_s": low,
        "token_latency_high_s": high, **{f"token_latency_{k}_s": v for k, v in
                                         p.token_latency_percentiles_s.model_dump().items()},
        "first_token_s": p.first_token_s, "load_s": p.load_s, "tokens_per_s": p.tokens_per_s,
        "decode_tokens_per_s": p.decode_tokens_per_s, **{f"{k}_s": p.breakdown_s.get(k, 0.0) for k in _PARTS},
        "storage_bytes_per_token": moved["storage"], "copied_bytes_per_token": moved["copy"],
        "cache_hit_ratio": caches[0].hit_ratio if len(caches) == 1 else None,
        "energy_j_per_token": p.energy_j_per_token, "perplexity_ratio": plan.quality.perplexity_ratio,
        "bound_s": plan.bound.token_latency_s, "bound_resource": plan.bound.resource,
        "trace": plan.trace.name if plan.trace else None, "trace_kind": plan.trace.kind if plan.trace else None,
        "weakest_kind": plan.evidence.weakest_kind, "search_gap": plan.evidence.search_gap}
