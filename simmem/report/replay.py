"""What would a cache of this size, run by that policy, have done on this trace? The answer of `simmem replay`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from simmem.errors import SpecError, UnknownNameError
from simmem.report.format import console, new_table, quantity, section, share
from simmem.report.sheets import model_of_trace
from simmem.spec import library
from simmem.spec.model import load_model
from simmem.spec.precision import PRECISIONS
from simmem.trace import Trace, load_trace_file, open_trace, replay_document
from simmem.trace.curves import REPLAY_POLICIES
from simmem.units import parse_quantity

__all__ = ["print_replay", "replay_answer"]

MAX_WINDOW = 1024
"""Longest window that is replayed: a window table grows with it. [tokens]"""
MAX_ENTRIES = 1000
"""Sizes or windows asked for at once."""


def replay_answer(
    trace: str,
    *,
    model: str | None = None,
    policies: Sequence[str] | None = None,
    sizes: Sequence[str] | None = None,
    windows: Sequence[int] | None = None,
    everywhere: bool = False,
    weights: str | None = None,
) -> dict[str, Any]:
    """The `replay --json` document (simmem.replay/1) for a trace by name or path.

    Parameters
    ----------
    model : whose shape a synthetic trace takes, the model it was fitted to when None; a captured trace must have it.
    policies : of "window" and "lru"; both when None.
    sizes : capacities with a unit for lru, per layer unless `everywhere`.
    windows : lengths in tokens for the window policy.
    everywhere : one lru cache for all layers.
    weights : precision that units are stored at; the trace's own when None.

    Raises
    ------
    SpecError (UnitError, UnknownNameError), TraceError
        A name, a size, or options that contradict each other; a damaged trace or one of another model.
    """
    chosen = tuple(dict.fromkeys(policies or REPLAY_POLICIES))
    for name in chosen:
        if name not in REPLAY_POLICIES:
            raise UnknownNameError("cache policy", name, REPLAY_POLICIES, key="--policy")
    if sizes and "lru" not in chosen:
        raise SpecError("is for lru: the size of a window follows from its tokens", key="--size")
    if windows and "window" not in chosen:
        raise SpecError("is for the window policy, which was not asked for", key="--window")
    if everywhere and "lru" not in chosen:
        raise SpecError("is for lru: a window is kept per layer", key="--global")
    if weights is not None and weights not in PRECISIONS:
        raise SpecError(f"found {weights!r}, expected one of {', '.join(PRECISIONS)}", key="--weights")
    if len(sizes or ()) > MAX_ENTRIES or len(windows or ()) > MAX_ENTRIES:
        raise SpecError(f"is given more than {MAX_ENTRIES} times", key="--size" if sizes else "--window")
    capacities = sorted({parse_quantity(size, "bytes", key="--size") for size in sizes}) if sizes else None
    opened, shape = _open(trace, model)
    lengths = _windows(windows, opened) if windows else None
    document = replay_document(opened, policies=chosen, sizes_bytes=capacities, windows=lengths,
                               scope="global" if everywhere else "layer", precision=weights)
    return {**document, "model": shape, "n_layers": opened.header.n_layers,
            "precision": weights or opened.header.unit_precision}


def _windows(given: Sequence[int], trace: Trace) -> list[int]:
    longest = min(MAX_WINDOW, trace.header.n_tokens - 1)
    for k in given:
        if not 0 <= k <= longest:
            raise SpecError(f"found {k}, expected a window of 0 to {longest} tokens (the trace has "
                            f"{trace.header.n_tokens})", key="--window")
    return sorted(set(given))


def _open(name: str, model: str | None) -> tuple[Trace, str]:
    """The trace, and the name of the model whose shape it has."""
    path = library.resolve("trace", name)
    if model is None and path.suffix == ".safetensors":  # it says itself what it is of, known here or not
        trace = load_trace_file(path)
        return trace, trace.header.model
    shape = load_model(model) if model is not None else model_of_trace(path)
    opened = open_trace(str(path), shape)
    assert opened is not None
    return opened, shape.name


def print_replay(document: dict[str, Any]) -> None:
    """Print a replay document on stdout: a table per policy, the cold start apart."""
    out = console()
    trace, unit = document["trace"], document["unit_bytes"]
    out.print(Text.assemble((trace["name"], "bold"), f"  {trace['kind']} trace, model {document['model']}; a unit has "
                            f"{quantity(unit, 'bytes')} at {document['precision']}\n"))
    for curve, cold in zip(document["curves"], document["cold"]["curves"], strict=True):
        windowed, one = curve["policy"] == "window", curve["scope"] == "global"
        columns = ["tokens", "held a layer"] if windowed else ["capacity"]
        columns += [] if one else ["all layers"]
        table = new_table(*columns, "hits", "read a token", "cold hits", "cold read", left=0)
        for i, size in enumerate(curve["sizes_bytes"]):
            cells = [f"{curve['parameter'][i]:.0f}"] if windowed else []
            cells += [quantity(size, "bytes", 3)] + ([] if one else [quantity(size * document["n_layers"], "bytes", 3)])
            table.add_row(*cells, share(curve["hit_ratio"][i]), quantity(curve["bytes_per_token"][i], "bytes", 3),
                          share(cold["hit_ratio"][i]), quantity(cold["bytes_per_token"][i], "bytes", 3))
        title = "Sliding window, mean of what it holds" if windowed else (
            "LRU, one cache for all layers" if one else "LRU, a cache for each layer")
        section(out, title, table)
    out.print(Text(f"Cold: the first {document['cold']['tokens']} tokens, counted apart "
                   f"({document['cold']['first_uses']} units are used for the first time in them); the rest is steady "
                   "state. Regret against Belady is not computed.", style="dim"))
