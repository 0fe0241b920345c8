"""Traces: which units every token touched, captured or synthetic, and what caches make of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simmem.errors import SpecError, TraceError
from simmem.spec import library
from simmem.spec.base import load_toml
from simmem.spec.model import Model, load_model
from simmem.trace.curves import replay_document
from simmem.trace.replay import lru_curve, run_table, shrink_to_capacity, window_curve, window_table
from simmem.trace.statistics import trace_statistics
from simmem.trace.store import load_trace_file, read_header, save_trace
from simmem.trace.synthetic import SyntheticSpec, generate, generate_varied, load_synthetic
from simmem.trace.trace import Quality, Trace, TraceHeader, digest_of

__all__ = [
    "SAME_SHARE",
    "Quality",
    "SyntheticSpec",
    "Trace",
    "TraceHeader",
    "default_trace_file",
    "digest_of",
    "generate",
    "load_synthetic",
    "load_trace_file",
    "lru_curve",
    "open_trace",
    "read_header",
    "replay_document",
    "run_table",
    "save_trace",
    "shrink_to_capacity",
    "sparsest_trace_within",
    "trace_statistics",
    "varied_traces",
    "window_curve",
    "window_table",
]


SAME_SHARE = 0.02
"""Active shares that differ by no more are of one level on different texts."""


def open_trace(name_or_path: str | None, model: Model, *, batch: int = 1, n_tokens: int | None = None
               ) -> Trace | None:
    """The trace to plan a model with.

    Parameters
    ----------
    name_or_path : a built-in trace, a synthetic spec (.toml) or a trace file (.safetensors); the model's default
        when None (see `default_trace_file`).
    batch : sequences decoded together; a step touches the union of what they use.
    n_tokens : decode steps: what a synthetic trace draws, and at most what is taken of a captured one.

    Returns
    -------
    The trace, or None when none is named and the model has no default.

    Raises
    ------
    UnknownNameError, SpecError, TraceError
        No such trace; a damaged one; one with other layers or units than the model; too few tokens for the batch.
    """
    if batch < 1 or (n_tokens is not None and n_tokens < 1):
        raise SpecError(f"found a batch of {batch} and {n_tokens} tokens, expected at least 1", key="trace")
    path = default_trace_file(model) if name_or_path is None else library.resolve("trace", name_or_path)
    if path is None:
        return None
    if path.suffix == ".toml":
        return generate(load_synthetic(path), model, n_tokens, batch=batch)
    if path.suffix != ".safetensors":
        raise TraceError("is not a trace: expected a .safetensors file or the .toml file of a synthetic trace",
                         file=str(path))
    trace = load_trace_file(path)
    trace.check_model(model)
    trace = trace.batched(batch)
    if n_tokens is not None and n_tokens < trace.header.n_tokens:
        trace = trace.first(n_tokens)
    return trace


def varied_traces(name_or_path: str | None, model: Model, factors: Sequence[tuple[float, float]], *, batch: int = 1,
                  n_tokens: int | None = None) -> list[Trace]:
    """A synthetic trace as `open_trace` finds it, with factors on its (active share, concentration)."""
    path = default_trace_file(model) if name_or_path is None else library.resolve("trace", name_or_path)
    if path is None or path.suffix != ".toml":
        raise TraceError("has no law that could be varied", file=str(path))
    return generate_varied(load_synthetic(path), model, factors, n_tokens, batch=batch)


def default_trace_file(model: Model) -> Path | None:
    """The built-in trace a model is planned with when none is named.

    A captured trace of this very model before a synthetic one. Captured files are named
    `<model>-<criterion>-<sparsity>`, so the first by name is the least sparse and costs the least quality.
    """
    if not _is_built_in(model):
        return None
    paths = [library.resolve("trace", name) for name in library.names("trace")]
    for path in paths:
        if path.suffix == ".safetensors" and path.stem.startswith(f"{model.name}-"):
            header = read_header(path)
            if header.model == model.name and header.unit == "ffn-neuron":  # no policy plans with others yet
                return path
    for path in paths:
        if path.suffix == ".toml" and model.name in load_toml(path).get("serves", ()):
            return path
    return None


def sparsest_trace_within(model: Model, perplexity_ratio: float) -> str | None:
    """Name of the built-in captured trace of a model that drops most while it costs no more than this ratio.

    Texts differ by a point or two at one level, which is no reason to prefer one: of those as sparse as the sparsest to
    `SAME_SHARE`, the first by name.
    """
    found: list[tuple[float, str]] = []
    for name in library.names("trace") if _is_built_in(model) else ():
        path = library.resolve("trace", name)
        if path.suffix != ".safetensors" or not name.startswith(f"{model.name}-"):
            continue
        header = read_header(path)
        share = header.statistics.get("active_share")
        if header.model == model.name and header.quality is not None and share is not None \
                and header.quality.perplexity_ratio <= perplexity_ratio:
            found.append((float(share), name))
    return next((name for share, name in found if share <= min(found)[0] + SAME_SHARE), None)  # in order of the names


def _is_built_in(model: Model) -> bool:
    """Whether the built-in traces that bear a model's name are of this very one: a file may be called as another."""
    neurons = model.units_of("ffn-neuron")
    return neurons is not None and model.name in library.names("model") \
        and load_model(model.name).units_of("ffn-neuron") == neurons
