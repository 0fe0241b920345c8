"""How does a log of another program become a trace file, and a trace file a table? `simmem import` and `export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simmem.errors import SpecError
from simmem.report.files import check_writable
from simmem.report.format import console, quantity
from simmem.report.sheets import model_of_trace
from simmem.spec import library
from simmem.spec.model import load_model
from simmem.spec.precision import PRECISIONS
from simmem.trace import Trace, load_trace_file, open_trace
from simmem.trace.export import export_trace
from simmem.trace.logs import LogLayout, LogShape, LogUnit, import_log, shape_of_model, stated_shape
from simmem.trace.store import save_trace
from simmem.units import parse_quantity

__all__ = ["export_answer", "import_answer", "log_shape", "print_export"]


def log_shape(*, model: str | None, unit: str, unit_bytes: str | None, n_units: int | None, n_layers: int | None,
              weights: str | None) -> LogShape:
    """The shape of a log's trace from a model, or from sizes that are stated. Raises SpecError where it is neither."""
    found: LogUnit
    if unit == "expert":
        found = "expert"
    elif unit == "ffn-neuron":
        found = "ffn-neuron"
    else:
        raise SpecError(f"found {unit!r}, expected expert or ffn-neuron", key="--unit")
    if weights is not None and weights not in PRECISIONS:
        raise SpecError(f"found {weights!r}, expected one of {', '.join(PRECISIONS)}", key="--weights")
    sizes = {"--unit-bytes": unit_bytes, "--n-experts": n_units, "--n-layers": n_layers}
    if model is not None:
        for key, value in sizes.items():
            if value is not None:
                raise SpecError("is known from the model; give one or the other", key=key)
        return shape_of_model(load_model(model), found, weights)
    if unit_bytes is None or n_units is None or n_layers is None:
        raise SpecError("say what the log is of: --model, or --unit-bytes, --n-experts and --n-layers",
                        key=next(key for key, value in sizes.items() if value is None))
    if weights is None:
        raise SpecError("say at which precision a unit has these bytes", key="--weights")
    return stated_shape(found, n_layers, n_units, parse_quantity(unit_bytes, "bytes", key="--unit-bytes"), weights)


def import_answer(log: Path, out: Path, shape: LogShape, layout: LogLayout, *, text: str,
                  inputs: Sequence[str | Path | None] = ()) -> Trace:
    """Read a log and write the trace beside saying so; nothing is written where anything is wrong."""
    check_writable(out, inputs=(log, *inputs), suffix=".safetensors")
    trace = import_log(log, shape, layout, name=out.stem, text=text)
    save_trace(trace, out)
    return trace


def export_answer(name: str, out: Path, model: str | None = None) -> tuple[Trace, int]:
    """Write a trace, by name or path, as a table, and say how many rows it has."""
    path = library.resolve("trace", name)
    check_writable(out, inputs=(path,))
    if path.suffix == ".safetensors" and model is None:
        trace = load_trace_file(path)
    else:
        opened = open_trace(str(path), load_model(model) if model is not None else model_of_trace(path))
        assert opened is not None
        trace = opened
    return trace, export_trace(trace, out)


def print_export(trace: Trace, rows: int, out: Path) -> None:
    """Print what a table holds and where it is."""
    h = trace.header
    console().print(f"{out}: {rows} rows, {quantity(out.stat().st_size, 'bytes')}\n{h.name}: {h.kind}, {h.n_tokens} "
                    f"tokens, {h.n_layers} layers of {h.n_units} {h.unit}s", markup=False)
