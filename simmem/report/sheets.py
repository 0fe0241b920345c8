"""What is there to know about one device, model, trace or policy? What its file says, and what follows from it."""

from __future__ import annotations

from pathlib import Path

from simmem.errors import SpecError, UnknownNameError
from simmem.policy.base import policy_named
from simmem.policy.context import Context, Replayed
from simmem.report.documents import (
    DeviceSheet,
    FigureRow,
    GroupRow,
    KnobRow,
    LawRow,
    ModelSheet,
    PolicySheet,
    TraceSheet,
)
from simmem.spec import library
from simmem.spec.base import Figure, Frozen
from simmem.spec.device import Device, load_device
from simmem.spec.model import Model, load_model
from simmem.spec.precision import FILE, PRECISIONS
from simmem.spec.workload import Workload
from simmem.trace import (
    Trace,
    TraceHeader,
    default_trace_file,
    generate,
    load_synthetic,
    load_trace_file,
    open_trace,
    trace_statistics,
)
from simmem.trace.predictors import simple_predictors
from simmem.trace.synthetic import law_statistic

__all__ = ["Sheet", "captured_sheet", "figure_rows", "model_of_trace", "sheet_of"]

Sheet = DeviceSheet | ModelSheet | TraceSheet | PolicySheet

KNOBS_SHOWN_FOR = (("rtx4090-pc", "opt-6.7b"), ("rtx4090-pc", "mixtral-8x7b"))
"""A device with its own GPU memory, and a model with a trace or else one with experts: on the first that a policy can
plan, its knobs have all their values."""


def sheet_of(what: str, name: str) -> Sheet:
    """Everything about one "device", "model", "trace" or "policy", by name, alias or path.

    Raises UnknownNameError, SpecError or TraceError.
    """
    if what == "device":
        return _device_sheet(load_device(name), library.resolve("device", name))
    if what == "model":
        return _model_sheet(load_model(name))
    if what == "trace":
        return _trace_sheet(library.resolve("trace", name))
    return _policy_sheet(name)


# --- devices ------------------------------------------------------------------------------------------------------


def _device_sheet(device: Device, path: Path) -> DeviceSheet:
    parts: dict[str, dict[str, str | float]] = {}
    for what, members in (("memory", device.memory), ("agent", device.agent), ("link", device.link),
                          ("engine", device.engine)):
        parts.update({f"{what}.{name}": _plain(part) for name, part in members.items()})
    rows = figure_rows(device)
    other = _other_account(device, path)
    others = [] if other is None else [
        row for key, row in figure_rows(other).items()
        if key not in rows or (row.value, row.kind) != (rows[key].value, rows[key].kind)]
    return DeviceSheet(
        name=device.name, title=device.title, aliases=list(device.aliases), notes=list(device.notes), parts=parts,
        figures=list(rows.values()), compare_with=other and other.name, other_figures=others)


def _other_account(device: Device, path: Path) -> Device | None:
    """The device that a file names in `compare_with`; `path` is that file."""
    if device.compare_with is None:
        return None
    try:
        return load_device(device.compare_with, relative_to=path.parent)
    except UnknownNameError as error:
        raise SpecError(error.message, file=str(path), key="compare_with") from None


def figure_rows(device: Device) -> dict[str, FigureRow]:
    """Every figure of a device by its key path, and those that are known of one software stack only."""
    figures = dict(device.figures())
    for name, part in device.engine.items():
        figures.update({f"engine.{name}.{field}": value for field, value in part if isinstance(value, Figure)})
    return {key: _figure_row(key, figure) for key, figure in figures.items()}


def _plain(part: Frozen) -> dict[str, str | float]:
    """The fields of a part that are no figures."""
    return {field: value for field, value in part if isinstance(value, (str, float))}


def _figure_row(key: str, figure: Figure) -> FigureRow:
    low, high = figure.factors
    return FigureRow(key=key, value=figure.value, dimension=figure.dimension, kind=figure.kind,
                     range_90=(figure.value * low, figure.value * high), source=figure.source, spent=list(figure.spent))


# --- models -------------------------------------------------------------------------------------------------------


def _model_sheet(model: Model) -> ModelSheet:
    trace, state = default_trace_file(model), model.architecture.state_space is not None
    held = {p: model.group_bytes(p) for p in (*PRECISIONS, *((FILE,) if model.file_bytes else ()))}
    return ModelSheet(
        name=model.name, title=model.title, family=model.family, source=model.source, aliases=list(model.aliases),
        native_precision=model.own_precision, architecture=model.architecture, params=model.params,
        active_params=model.active_params,
        groups=[GroupRow(name=g.name, params=g.params, matrix_params=g.matrix_params, vector_params=g.vector_params,
                         bytes={p: groups[g.name] for p, groups in held.items()}) for g in model.groups()],
        bytes={p: sum(groups.values()) for p, groups in held.items()}, unit_params=model.unit_params,
        expert_params=model.expert_params,
        kv_bytes_per_token={p: 0.0 if state else model.kv_bytes(p, 1) for p in PRECISIONS},
        state_bytes={p: model.kv_bytes(p, 1) if state else 0.0 for p in PRECISIONS},
        default_trace=None if trace is None else trace.stem)


# --- traces -------------------------------------------------------------------------------------------------------


def model_of_trace(path: Path) -> Model:
    """The model whose shape a synthetic trace is shown and replayed with: the one it was fitted to."""
    name = load_synthetic(path).published_for
    try:
        return load_model(name)
    except SpecError as error:
        raise SpecError(error.message, file=str(path), key="published_for") from None


def _trace_sheet(path: Path) -> TraceSheet:
    if path.suffix != ".toml":
        trace = load_trace_file(path)
        return captured_sheet(trace.header, trace.active_share, trace=trace)
    spec, model = load_synthetic(path), model_of_trace(path)
    trace = generate(spec, model)
    law = [LawRow(quantity=s.quantity, window=s.window, published=s.value, tolerance=s.tolerance, source=s.source,
                  law=law_statistic(spec, s, spec.published_for, model.architecture.n_layers)) for s in spec.statistics]
    return TraceSheet(header=trace.header, active_share=trace.active_share, statistics=trace_statistics(trace),
                      fitted_to=law, serves=list(spec.serves))


def captured_sheet(header: TraceHeader, active_share: float, *, trace: Trace | None = None) -> TraceSheet:
    """A captured trace; its statistics and predictors are those in its header; what it lacks is counted where
    `trace` is given."""
    lacks = trace is not None and header.n_tokens > 1 and "co_activation" not in header.statistics
    counted = trace_statistics(trace) if trace is not None and lacks else {}
    if trace is not None and not header.predictors:
        header = header.model_copy(update={"predictors": simple_predictors(trace)})
    return TraceSheet(header=header, active_share=active_share, statistics={**counted, **header.statistics},
                      fitted_to=[], serves=[])


# --- policies -----------------------------------------------------------------------------------------------------


def _policy_sheet(name: str) -> PolicySheet:
    policy = policy_named(name)
    for device_name, model_name in KNOBS_SHOWN_FOR:
        device, model = load_device(device_name), load_model(model_name)
        trace = open_trace(None, model)
        budget = {tier: memory.budget_bytes for tier, memory in device.memory.items()}
        context = Context(device, model, Workload(), Replayed(trace) if trace else None, budget)
        knobs = policy.knobs(context)
        if knobs:
            break
    return PolicySheet(
        name=policy.name, summary=policy.summary, uses_trace=policy.uses_trace,
        shown_for={"device": device.name, "model": model.name},
        knobs=[KnobRow(name=k.name, kind=k.kind, values=list(k.values), unsearched=list(k.unsearched),
                       default=k.default, low=k.low, high=k.high,
                       help=k.help) for k in knobs])
