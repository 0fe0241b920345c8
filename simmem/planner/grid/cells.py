"""What is the answer in one cell of a grid? Asked in any process, the same bytes everywhere.

What cells share is kept: device, model and trace are read once a process for all budgets and policies, and what was
worked out on a trace serves every device. Nothing that is kept changes an answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from simmem import __version__
from simmem.errors import InfeasiblePlanError, SimmemError, SpecError
from simmem.planner.api import answer
from simmem.planner.document import Plan
from simmem.planner.drafts import at_draft, searches_lengths
from simmem.planner.grid.spec import CellQuestion, in_cell
from simmem.planner.question import DRAFT_LENGTH, Question, ask, budgets_of
from simmem.policy.base import policies, policy_named
from simmem.policy.context import Replayed
from simmem.spec import library
from simmem.spec.device import Device, load_device
from simmem.spec.model import Model, load_model
from simmem.spec.workload import Workload, mixed_precisions
from simmem.trace import default_trace_file

__all__ = ["CellError", "CellOutcome", "answer_cell", "check_question", "content_of", "contents_of",
           "digest_of_content", "forget", "inputs_of"]


class CellError(BaseModel):
    """Why a question is no question: what the error of the command line says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    message: str
    exit_code: int


class CellOutcome(BaseModel):
    """What came of a cell: a plan, or why there is none."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")

    simmem: str
    """The version that planned."""
    device_digest: str
    model_digest: str
    host: str = ""
    """The tier that `max_dram` speaks of."""
    plan: Plan | None = None
    figures: dict[str, float] = {}
    """What is judged and compared with a baseline: seconds, rates, joules, bytes held outside storage."""
    infeasible: str | None = None
    """Why nothing fits, or why the policies that are named cannot plan this."""
    tier: str | None = None
    missing_bytes: float | None = None
    error: CellError | None = None


@lru_cache(maxsize=64)
def _device(name: str, folder: str) -> Device:
    return load_device(name, relative_to=Path(folder))


@lru_cache(maxsize=64)
def _model(name: str, folder: str) -> Model:
    return load_model(name, relative_to=Path(folder))


@lru_cache(maxsize=256)
def _digest(what: str, name: str, folder: str) -> str:
    return digest_of_content(content_of(_device(name, folder) if what == "device" else _model(name, folder)))


def forget() -> None:
    """Read devices, models and traces again: their files may have been changed."""
    for kept in (_device, _model, _digest, _trace_file, _file_digest, _replayed, _asked):
        kept.cache_clear()


@lru_cache(maxsize=1)
def _begin(stamp: str) -> None:
    del stamp
    forget()


def content_of(spec: BaseModel) -> dict[str, str | float | bool | None]:
    """Everything a checked device or model says, flat: "link.flash.rate.value" → 6.1e9.

    A fitted cost model, which is thousands of numbers, is in it as one digest.
    """
    data = spec.model_dump(mode="json")
    fitted = data.pop("cost_model", None)
    if fitted is not None:
        data["cost_model"] = digest_of_content({"": json.dumps(fitted, sort_keys=True)})
    found: dict[str, str | float | bool | None] = {}
    rest: list[tuple[str, Any]] = [("", data)]
    while rest:
        path, value = rest.pop()
        if isinstance(value, Mapping):
            rest += [(f"{path}.{key}" if path else str(key), part) for key, part in value.items()]
        elif isinstance(value, list):
            rest += [(f"{path}.{index}", part) for index, part in enumerate(value)]
        else:
            found[path] = value
    return dict(sorted(found.items()))


def contents_of(what: str, name: str, folder: str) -> dict[str, str | float | bool | None]:
    """`content_of` a device or a model by name."""
    return content_of(_device(name, folder) if what == "device" else _model(name, folder))


def digest_of_content(content: Mapping[str, Any]) -> str:
    """SHA-256 of a flat content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def inputs_of(question: CellQuestion, folder: str) -> dict[str, str]:
    """Digests of what a question rests on: device, model and the trace that is named or the model's own."""
    found = {"device": _digest("device", question.device, folder), "model": _digest("model", question.model, folder)}
    trace = _trace_file(question.trace, question.model, folder)
    if trace is not None:
        found["trace"] = _file_digest(str(trace))
    return found


@lru_cache(maxsize=64)
def _trace_file(name: str | None, model: str, folder: str) -> Path | None:
    if name is None:
        return default_trace_file(_model(model, folder))
    return library.resolve("trace", name, relative_to=Path(folder))


@lru_cache(maxsize=64)
def _file_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def check_question(question: CellQuestion, folder: str) -> None:
    """Raise, before anything is planned, where names, sizes or tokens of a question cannot be."""
    q = question
    device, model = _device(q.device, folder), _model(q.model, folder)
    budgets_of(device, q.dram, q.vram)
    mixed = () if q.weights is None or (isinstance(q.weights, str) and "=" not in q.weights) \
        else mixed_precisions(q.weights)
    plain = q.weights if isinstance(q.weights, str) and not mixed else model.own_precision
    Workload(q.prompt_tokens, q.new_tokens, q.batch or 1, plain, q.kv, mixed).check(model)
    for name in q.policies or ():
        policy_named(name)
    if q.engine is not None:
        device.check_engine(q.engine)
    _trace_file(q.trace, q.model, folder)


@lru_cache(maxsize=8)
def _replayed(key: str) -> list[Replayed]:
    """What was opened for a trace, model and batch: nothing yet, or one."""
    del key
    return []


@lru_cache(maxsize=16)
def _asked(text: str, folder: str, batch: int, length: int | None) -> Question:
    """A question without budgets and policies, as those that share device, model and workload have it in common."""
    q = CellQuestion.model_validate_json(text)
    opened = _replayed(json.dumps([q.model, folder, q.trace, batch, q.max_quality_loss, length]))
    trace = None if q.trace is None else str(_trace_file(q.trace, q.model, folder))
    question = ask(
        q.device, q.model, prompt=q.prompt_tokens, new_tokens=q.new_tokens, batch=batch, weights=q.weights, kv=q.kv,
        trace=trace, objective=q.objective, engine=q.engine, max_quality_loss=q.max_quality_loss,
        draft=q.draft, acceptance=q.acceptance, draft_length=length, relative_to=Path(folder),
        opened=opened[0] if opened else None)
    found = question.replayed or question.routing
    if found is not None and not opened:
        opened.append(found)
    return question


def _question(q: CellQuestion, folder: str, batch: int, length: int | None) -> Question:
    shared = q.model_copy(update={"dram": None, "vram": None, "policies": None, "knobs": {}, "batch": None})
    knobs = dict(q.knobs)
    question = _asked(shared.model_dump_json(), folder, batch, knobs.pop(DRAFT_LENGTH.name, length))
    return replace(question, budget_bytes=budgets_of(question.device, q.dram, q.vram),
                   policy_names=q.policies or tuple(policies()), fixed=knobs, open_choice=q.policies is None)


def answer_cell(question_json: str, folder: str, cell: str, file: str, stamp: str) -> str:
    """The outcome of one cell as JSON; what the user got wrong comes back as data, so that any process can send it.

    question_json : a `CellQuestion`.
    folder : what paths in it are relative to.
    cell, file : its name and the search file, for errors.
    stamp : of the search; a process that outlives one reads its files again for the next.
    """
    _begin(stamp)
    q = CellQuestion.model_validate_json(question_json)
    try:
        outcome = CellOutcome(simmem=__version__, device_digest=_digest("device", q.device, folder),
                              model_digest=_digest("model", q.model, folder))
        outcome = outcome.model_copy(update=_found(q, folder))
    except SimmemError as error:
        told = in_cell(error, cell, file)
        outcome = CellOutcome(simmem=__version__, device_digest="", model_digest="", error=CellError(
            kind=type(told).__name__, message=str(told), exit_code=told.exit_code))
    return outcome.model_dump_json(by_alias=True)


def _found(q: CellQuestion, folder: str) -> dict[str, Any]:
    try:
        question = at_draft(lambda batch, length: _question(q, folder, batch, length), q.batch, q.objective,
                            searched=searches_lengths(q.draft, q.knobs))
        plan = answer(question, brief=True)
    except InfeasiblePlanError as error:
        return {"infeasible": error.message, "tier": error.tier, "missing_bytes": error.missing_bytes}
    except SpecError as error:
        if error.key != "--policy":  # the only one that is no mistake of the file: of many models some are not for it
            raise
        return {"infeasible": error.message}
    return {"plan": plan, "figures": _figures(plan, question.device), "host": question.device.host}


def _figures(plan: Plan, device: Device) -> dict[str, float]:
    p = plan.predicted
    held = {f"memory.{tier}": use.used_bytes for tier, use in sorted(plan.memory.items())
            if device.memory[tier].kind != "storage"}
    found = {"token_latency_s": p.token_latency_s, "first_token_s": p.first_token_s, "tokens_per_s": p.tokens_per_s,
             "energy_j_per_token": p.energy_j_per_token, "perplexity_ratio": plan.quality.perplexity_ratio,
             "held_bytes": sum(held.values()), **held}
    return {name: value for name, value in found.items() if value is not None}
