"""What would a cache of this size, run by that policy, have done on this trace? The answer of `simmem replay`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from simmem.errors import SpecError, UnknownNameError
from simmem.report.format import console, new_table, number, quantity, section, share
from simmem.report.sheets import model_of_trace
from simmem.spec import library
from simmem.spec.model import load_model
from simmem.spec.precision import PRECISIONS
from simmem.trace import Trace, load_trace_file, open_trace, replay_document
from simmem.trace.curves import REPLAY_POLICIES
from simmem.trace.prefetch import parse_predictor
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
    batch: int = 1,
    page_cache: str | None = None,
    prefetch: str | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """The `replay --json` document (simmem.replay/1) for a trace by name or path.

    Parameters
    ----------
    model : whose shape a synthetic trace takes, the model it was fitted to when None; a captured trace must have it.
    policies : of `REPLAY_POLICIES`; all of them when None.
    sizes : capacities with a unit, per layer unless `everywhere`; not for the window policy.
    windows : lengths in tokens for the window policy.
    everywhere : one cache for all layers; a window stays a layer's.
    batch : sequences that advance together; a captured trace is cut into as many stretches.
    page_cache : with a unit, what the operating system's page cache beneath holds.
    prefetch : `previous-token`, `frequent` or `RECALL:PRECISION`.
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
    sized = any(name != "window" for name in chosen)
    if sizes and not sized:
        raise SpecError("is for lru and the others that have a capacity: the size of a window follows from its tokens",
                        key="--size")
    if windows and "window" not in chosen:
        raise SpecError("is for the window policy, which was not asked for", key="--window")
    if everywhere and not sized:
        raise SpecError("is for lru and the others that have a capacity: a window is kept per layer", key="--global")
    if batch < 1:
        raise SpecError(f"found {batch}, expected at least 1 sequence", key="--batch")
    if weights is not None and weights not in PRECISIONS:
        raise SpecError(f"found {weights!r}, expected one of {', '.join(PRECISIONS)}", key="--weights")
    if len(sizes or ()) > MAX_ENTRIES or len(windows or ()) > MAX_ENTRIES:
        raise SpecError(f"is given more than {MAX_ENTRIES} times", key="--size" if sizes else "--window")
    capacities = sorted({parse_quantity(size, "bytes", key="--size") for size in sizes}) if sizes else None
    pages = parse_quantity(page_cache, "bytes", key="--page-cache") if page_cache is not None else None
    predictor = parse_predictor(prefetch) if prefetch is not None else None
    opened, shape = _open(trace, model, batch)
    lengths = _windows(windows, opened) if windows else None
    document = replay_document(opened, policies=chosen, sizes_bytes=capacities, windows=lengths,
                               scope="global" if everywhere else "layer", precision=weights,
                               page_cache_bytes=pages, predictor=predictor)
    return {**document, "batch": batch, "model": shape, "n_layers": opened.header.n_layers,
            "n_units": opened.header.n_units, "precision": weights or opened.header.unit_precision}


def _windows(given: Sequence[int], trace: Trace) -> list[int]:
    longest = min(MAX_WINDOW, trace.header.n_tokens - 1)
    for k in given:
        if not 0 <= k <= longest:
            raise SpecError(f"found {k}, expected a window of 0 to {longest} tokens (the trace has "
                            f"{trace.header.n_tokens})", key="--window")
    return sorted(set(given))


def _open(name: str, model: str | None, batch: int) -> tuple[Trace, str]:
    """The trace, and the name of the model whose shape it has."""
    path = library.resolve("trace", name)
    if model is None and path.suffix == ".safetensors":  # it says itself what it is of, known here or not
        trace = load_trace_file(path).batched(batch)
        return trace, trace.header.model
    shape = load_model(model) if model is not None else model_of_trace(path)
    opened = open_trace(str(path), shape, batch=batch)
    assert opened is not None
    return opened, shape.name


def print_replay(document: dict[str, Any]) -> None:
    """Print a replay document on stdout: a table per question, capacities down and policies across."""
    out = console()
    trace, unit = document["trace"], document["unit_bytes"]
    steps = "" if document["batch"] == 1 else f", {document['batch']} sequences at once"
    out.print(Text.assemble((trace["name"], "bold"), f"  {trace['kind']} trace, model {document['model']}{steps}; "
                            f"a unit has {quantity(unit, 'bytes')} at {document['precision']}\n"))
    paired = list(zip(document["curves"], document["cold"]["curves"], strict=True))
    sized = [pair for pair in paired if pair[0]["policy"] != "window"]
    if sized:
        _print_sized(out, document, sized)
    for curve, cold in paired:
        if curve["policy"] == "window":
            _print_window(out, document, curve, cold)
    if document["levels"] is not None:
        _print_levels(out, document)
    notes = [f"Cold: the first {document['cold']['tokens']} tokens, counted apart ({document['cold']['first_uses']} "
             "units are used for the first time in them); the rest is steady state."]
    if any(curve["policy"] == "pin-hot" for curve in document["curves"]):
        notes.append("pin-hot pins what the cold part used most often and holds nothing before.")
    notes.append("Regret: misses above the fewest that any cache of that size could have (Belady's, which knows the "
                 "future), as a share of those"
                 + (", a window's at the most it ever holds." if any(
                     curve["policy"] == "window" for curve in document["curves"]) else "."))
    out.print(Text(" ".join(notes), style="dim"))


def _print_sized(out: Console, document: dict[str, Any], pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Tables of the policies that have a capacity: all of them have the same ones."""
    first = pairs[0][0]
    one = first["scope"] == "global"
    where = "one cache for all layers" if one else "a cache for each layer"
    layers = 1 if one else document["n_layers"]
    total = _bytes([size * layers for size in first["sizes_bytes"]])
    lead = {"capacity": total} if one else {"capacity": _bytes(first["sizes_bytes"]), "all layers": total}

    def table(title: str, cells: dict[str, list[str]]) -> None:
        if cells:
            _columns(out, title, {**lead, **cells})

    table(f"Hits, {where}", {c["policy"]: [share(h) for h in c["hit_ratio"]] for c, _ in pairs})
    table("Read a token", {c["policy"]: _bytes(c["bytes_per_token"]) for c, _ in pairs})
    table("Regret", {c["policy"]: _regrets(c) for c, _ in pairs if c["policy"] != "belady"})
    table("Hits in the cold start", {c["policy"]: [share(h) for h in cold["hit_ratio"]] for c, cold in pairs})
    real = [c for c, _ in pairs if c["policy"] != "belady"]
    if len(real) > 1:
        out.print(Text(_verdict(real, total) + "\n"))


def _verdict(curves: list[dict[str, Any]], sizes: list[str]) -> str:
    """Which of the policies that need no future reads least, at which capacity."""
    best: list[str] = []
    for reads in zip(*(c["bytes_per_token"] for c in curves), strict=True):
        least = min(reads)
        best.append(" = ".join(c["policy"] for c, read in zip(curves, reads, strict=True) if read == least))
    runs: list[list[str]] = []
    for size, names in zip(sizes, best, strict=True):
        if runs and runs[-1][0] == names:
            runs[-1][2] = size
        else:
            runs.append([names, size, size])
    said = [f"{names} at {low}" + (f" to {high}" if high != low else "") for names, low, high in runs
            if len(names.split(" = ")) < len(curves)]
    return f"Reads least: {'; '.join(said)}." if said else "All of them read the same at these capacities."


def _print_window(out: Console, document: dict[str, Any], curve: dict[str, Any], cold: dict[str, Any]) -> None:
    held = curve["sizes_bytes"]
    _columns(out, "Sliding window, mean of what it holds", {
        "tokens": [f"{k:.0f}" for k in curve["parameter"]], "held a layer": _bytes(held),
        "all layers": _bytes([size * document["n_layers"] for size in held]),
        "hits": [share(h) for h in curve["hit_ratio"]], "read a token": _bytes(curve["bytes_per_token"]),
        "regret": _regrets(curve), "cold hits": [share(h) for h in cold["hit_ratio"]]})


def _print_levels(out: Console, document: dict[str, Any]) -> None:
    """One table a policy: what is waited for, what is read ahead, and what the page cache beneath spares."""
    levels = document["levels"]
    pages, predictor = levels["page_cache"], levels["prefetch"]
    for level, curve in zip(levels["curves"], document["curves"], strict=True):
        windowed = curve["policy"] == "window"
        sizes = [f"{k:.0f}" for k in curve["parameter"]] if windowed else _bytes(curve["sizes_bytes"])
        lead = {"tokens" if windowed else "capacity": sizes, "hits": [share(h) for h in curve["hit_ratio"]]}
        if predictor is not None:
            _columns(out, f"{curve['policy']}, with prefetch", {
                **lead, "read on demand": _bytes(level["demand_bytes_per_token"]),
                "read ahead": _bytes(level["ahead_bytes_per_token"]),
                "of it unused": _bytes(level["wasted_bytes_per_token"])})
        if pages is not None:
            _columns(out, f"{curve['policy']}, above the page cache", {
                **lead, "DRAM": _bytes(level["dram_bytes"]),
                "page hits": [share(h) for h in level["page_cache_hit_ratio"]],
                "from storage": _bytes(level["storage_bytes_per_token"]),
                "held twice": _bytes(level["held_twice_bytes"])})
    if pages is not None:
        out.print(Text(f"Page cache: {quantity(pages['size_bytes'], 'bytes')} beneath, LRU over all layers; a unit "
                       f"fills {quantity(pages['slot_bytes'], 'bytes')} of whole pages. DRAM is both together; what is "
                       "held twice is spent twice.", style="dim"))
    if predictor is not None:
        name = predictor if isinstance(predictor, str) else (
            f"recall {share(predictor['recall'])}, precision {share(predictor['precision'])}")
        out.print(Text(f"Prefetch ({name}): read ahead and dropped after the step unless used, so hits stay as they "
                       "are.", style="dim"))


def _columns(out: Console, title: str, cells: dict[str, list[str]]) -> None:
    table = new_table(*cells, left=0)
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    section(out, title, table)


def _bytes(values: Sequence[float]) -> list[str]:
    return [quantity(value, "bytes", 3) for value in values]


def _regrets(curve: dict[str, Any]) -> list[str]:
    """Misses above the optimum, in per cent up to ten times as many."""
    return ["–" if r is None else "0 %" if r == 0 else f"+{share(r)}" if r < 9 else f"{number(r + 1, 3)} times"
            for r in curve["regret"]]
