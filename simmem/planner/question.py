"""What is `plan` asked? The arguments, checked, with every name resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from simmem.errors import SpecError, TraceError
from simmem.policy.base import Knob, policies, policy_named
from simmem.policy.context import MAX_WINDOW, Context, Replayed
from simmem.spec import library
from simmem.spec.device import Device, load_device
from simmem.spec.model import Model, load_model
from simmem.spec.precision import FILE, PRECISIONS
from simmem.spec.workload import MOST_DRAFTED, Draft, Workload, mixed_precisions
from simmem.trace import Trace, open_trace, sparsest_trace_within, varied_traces
from simmem.units import format_quantity, parse_quantity

__all__ = ["DRAFT_LENGTH", "DRAFT_LENGTHS", "FINAL_ROWS", "MAX_LOSS", "OBJECTIVES", "Question", "ask", "budgets_of"]

OBJECTIVES = ("latency", "throughput", "energy", "memory")
MAX_LOSS = 10
"""A perplexity eleven times the dense model's is no model any more."""
DRAFT_LENGTHS = (0, 1, 2, 3, 4, 6, 8)
"""Tokens drafted for a step that are tried; any number up to MOST_DRAFTED may be set."""
DRAFT_LENGTH = Knob("draft_length", "structural", DRAFT_LENGTHS, "tokens drafted for a step to verify", low=0,
                    high=MOST_DRAFTED)
"""Of a draft model beside any policy."""
FINAL_ROWS = 64
"""Trace tokens that the answer is run on."""
ROUTING_TOKENS = 256
"""Tokens of a routing trace that are replayed; a quarter of them fill the caches."""
VARIED_ROWS = 8
"""Trace tokens of a trace with another law, for intervals."""


@dataclass(frozen=True)
class Question:
    """What `plan` is asked, with names resolved."""

    device_name: str
    model_name: str
    device: Device
    model: Model
    replayed: Replayed | None
    workload: Workload
    precisions: tuple[str, ...]
    budget_bytes: Mapping[str, float]
    policy_names: tuple[str, ...]
    fixed: Mapping[str, object]
    objective: str = "latency"
    engine: str | None = None
    open_choice: bool = True
    """No policy was named: then work is only dropped where the dense model does not fit, and never by an oracle."""
    defaults: bool = False
    """Knobs that are not named take their default (published configurations)."""
    max_quality_loss: float | None = None
    """Perplexity may rise by this share over the dense model's; what was not measured is then left out."""
    routing: Replayed | None = None
    """A trace of which experts tokens chose; then there is none of neurons."""
    batches_tried: tuple[tuple[int, float], ...] = ()
    """(sequences, tokens a second) where the batch was searched."""
    draft_name: str | None = None
    """As it was given."""
    drafts_tried: tuple[tuple[int, float], ...] = ()
    """(tokens drafted for a step, what the objective asks for) where that was searched."""
    scores: dict[tuple[object, ...], dict[tuple[object, ...], float]] = field(default_factory=dict, compare=False,
                                                                              repr=False)
    """Steps that a search found, for the same question at other budgets: see `ranking.search`. [s]"""

    def context(self, weights: str) -> Context:
        """Everything a policy needs at one precision."""
        return Context(self.device, self.model, self.workload.at(weights), self.replayed, self.budget_bytes,
                       self.routing)


def ask(
    device: str,
    model: str,
    *,
    dram: str | float | None = None,
    vram: str | float | None = None,
    prompt: int = 128,
    new_tokens: int = 256,
    batch: int = 1,
    weights: str | Mapping[str, str] | None = None,
    kv: str = "fp16",
    trace: str | None = None,
    policy: str | Sequence[str] | None = None,
    knobs: Mapping[str, object] | None = None,
    objective: str = "latency",
    engine: str | None = None,
    defaults: bool = False,
    max_quality_loss: float | None = None,
    draft: str | None = None,
    acceptance: float | None = None,
    draft_length: int | None = None,
    relative_to: Path | None = None,
    opened: Replayed | None = None,
) -> Question:
    """Check the arguments of `plan` and resolve every name. Raises SpecError.

    weights : one precision; or by tensor group, as a table or "attention=int4,experts=int2": the groups that are not
        named keep the model's own.
    draft_length : tokens that `draft` proposes for each step; else the knob of that name, which belongs to no policy.
    opened : what an earlier question found for the same trace, model and batch, with what was worked out on it.
    """
    knobs = dict(knobs or {})
    length = knobs.pop(DRAFT_LENGTH.name, draft_length)
    spec_device = load_device(device, relative_to=relative_to)
    spec_model = load_model(model, relative_to=relative_to)
    if objective not in OBJECTIVES:
        raise SpecError(f"found {objective!r}, expected one of {', '.join(OBJECTIVES)}", key="--objective")
    if max_quality_loss is not None and not 0 <= max_quality_loss <= MAX_LOSS:  # also false for NaN
        raise SpecError(f"found {max_quality_loss}, expected a share from 0 to {MAX_LOSS}, e.g. 0.05",
                        key="--max-quality-loss")
    names = (policy,) if isinstance(policy, str) else tuple(policy or policies())
    for name in names:
        policy_named(name)
    if knobs and policy is None:
        raise SpecError("knobs belong to a policy: name it with --policy", key="--set")
    mixed: tuple[tuple[str, str], ...] = ()
    if weights is not None and (not isinstance(weights, str) or "=" in weights):
        mixed, weights = mixed_precisions(weights), None
    if weights is not None and weights not in (*PRECISIONS, FILE):
        raise SpecError(f"found {weights!r}, expected one of {', '.join((*PRECISIONS, FILE))}", key="--weights")
    if weights == FILE:
        spec_model.group_bytes(FILE)  # refuses where no file says
    own = spec_model.own_precision
    precisions = (weights or own,) if weights or mixed or own == FILE else tuple(dict.fromkeys((own, "int8", "int4")))
    precisions = tuple(p for p in precisions if any(a.computes_as(p) for a in spec_device.agent.values()))
    if not precisions:
        raise SpecError(f"no unit of {spec_device.name} has an arithmetic rate for {weights or own} weights",
                        key="--weights")
    workload = Workload(prompt, new_tokens, batch, precisions[0], kv, mixed,
                        _draft(draft, acceptance, length, relative_to))
    workload.check(spec_model)
    for needed, flag in ((workload.precisions, "--weights"),
                         ((*workload.precisions, *_draft_precision(workload)), "--draft")):
        if not any(all(map(agent.computes_as, needed)) for agent in spec_device.agent.values()):
            raise SpecError(f"no unit of {spec_device.name} has arithmetic rates for {' and '.join(needed)} weights",
                            key=flag)
    fixed = dict(knobs or {})
    if engine:
        runs = [e.agent for key, e in spec_device.engine.items()
                if key.split("/")[0] == engine and e.compute_precision == weights]
        if runs and defaults:  # the stack is known to run this precision on one unit
            fixed.setdefault("agent", runs[0])
        spec_device = spec_device.with_engine(engine)
    if trace is None and max_quality_loss is not None:
        trace = sparsest_trace_within(spec_model, 1.0 + max_quality_loss)
    replayed = _replay(trace, spec_model, workload.step_tokens) if opened is None else opened
    routes = replayed is not None and replayed.trace.header.unit == "expert"
    return Question(device, model, spec_device, spec_model, None if routes else replayed, workload, precisions,
                    budgets_of(spec_device, dram, vram), names, fixed, objective, engine, policy is None, defaults,
                    max_quality_loss, replayed if routes else None, draft_name=draft)


def _draft(name: str | None, acceptance: float | None, length: object, relative_to: Path | None) -> Draft | None:
    """The draft model with its length and acceptance: all three or none of them."""
    if name is None:
        for value, key in ((acceptance, "--acceptance"), (length, DRAFT_LENGTH.name)):
            if value is not None:
                raise SpecError(f"found {value} without a draft model, expected --draft MODEL beside it", key=key)
        return None
    if acceptance is None:
        raise SpecError(f"found none for {name}, expected the share of its tokens that are accepted, from 0 to 1: it "
                        "depends on both models and the text, so there is no default", key="--acceptance")
    if length is None:
        raise SpecError(f"found none for {name}, expected the tokens that it drafts for a step", key=DRAFT_LENGTH.name)
    return Draft(load_model(name, relative_to=relative_to), int(str(DRAFT_LENGTH.parse(length))), acceptance)


def _draft_precision(workload: Workload) -> tuple[str, ...]:
    return (workload.draft.model.own_precision,) if workload.draft and workload.draft.length else ()


def _replay(name: str | None, model: Model, batch: int) -> Replayed | None:
    """The trace to plan with, `batch` tokens a step; a synthetic one can be varied within what is known of its law."""
    neurons = model.units_of("ffn-neuron")
    if neurons is None and name is not None and library.resolve("trace", name).suffix == ".toml":
        raise TraceError(f"is a synthetic trace of FFN neurons, which {model.name} does not have in every layer",
                         file=name)
    opened = open_trace(name, model, batch=batch,
                        n_tokens=ROUTING_TOKENS if neurons is None else MAX_WINDOW + FINAL_ROWS)
    if opened is not None and opened.header.unit == "kv-block":
        raise TraceError("is a trace of KV blocks, which `simmem replay` uses; no policy plans with it yet", file=name)
    if opened is None or opened.header.kind == "captured" or "concentration" not in opened.header.statistics:
        return Replayed(opened) if opened else None  # no law: captured, or like a captured one

    def vary(factors: Sequence[tuple[float, float]]) -> list[Trace]:
        return varied_traces(name, model, factors, batch=batch, n_tokens=MAX_WINDOW + VARIED_ROWS)

    return Replayed(opened, vary)


def budgets_of(device: Device, dram: str | float | None, vram: str | float | None) -> dict[str, float]:
    """Tier → what may be held there: what is given, else what the device leaves for one program. [B]"""
    budget = {name: memory.budget_bytes for name, memory in device.memory.items()}
    special = [n for n, m in device.memory.items() if m.kind == "device"]
    for given, tiers, flag in ((dram, [device.host], "--dram"), (vram, special, "--vram")):
        if given is None:
            continue
        if not tiers:
            raise SpecError(f"{device.name} has unified memory and no VRAM of its own; use --dram", key=flag)
        amount = float(given) if isinstance(given, (int, float)) else parse_quantity(given, "bytes", key=flag)
        if not amount >= 1:  # also false for NaN
            raise SpecError(f"found {given!r}, expected at least a byte", key=flag)
        capacity = device.memory[tiers[0]].capacity.value
        if amount > capacity:
            raise SpecError(f"found {given!r}, but {device.name} has {format_quantity(capacity, 'bytes')} of it",
                            key=flag)
        budget[tiers[0]] = amount
    return budget
