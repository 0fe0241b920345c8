"""How does the sheet of one device, model, trace or policy read on a terminal?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from simmem.policy.base import Setting
from simmem.report.documents import DeviceSheet, FigureRow, ModelSheet, PolicySheet, TraceSheet
from simmem.report.format import console, new_table, number, parameters, quantity, section, share
from simmem.report.predictors import predictor_table
from simmem.report.sheets import Sheet
from simmem.spec.base import Frozen
from simmem.trace import TraceHeader

__all__ = ["print_sheet"]

SHOWN_VALUES = 14
"""A knob with more values than these is shown by its ends and its step."""
_SMALL = 0.002
"""Shares of units below it are not worth a line."""


def print_sheet(sheet: Sheet) -> None:
    """Print a sheet on stdout."""
    out = console()
    if isinstance(sheet, DeviceSheet):
        _print_device(out, sheet)
    elif isinstance(sheet, ModelSheet):
        _print_model(out, sheet)
    elif isinstance(sheet, TraceSheet):
        _print_trace(out, sheet)
    else:
        _print_policy(out, sheet)


def _heading(out: Console, name: str, title: str, aliases: Iterable[str] = ()) -> None:
    also = ", ".join(aliases)
    out.print(Text.assemble((name, "bold"), f"  {title}", f"\nalso: {also}" if also else ""))
    out.print()


def _pairs(rows: Iterable[tuple[str, str | None]]) -> Table:
    """Names and values in two columns; rows without a value are left out."""
    table = new_table("", "", left=2)
    table.show_header = False
    table.columns[0].no_wrap, table.columns[0].style = True, "dim"
    for name, value in rows:
        if value:
            table.add_row(name, Text(value))
    return table


# --- devices ------------------------------------------------------------------------------------------------------


def _print_device(out: Console, sheet: DeviceSheet) -> None:
    _heading(out, sheet.name, sheet.title, sheet.aliases)
    for note in sheet.notes:
        out.print(Padding(Text(f"· {note}"), (0, 0, 0, 2)))
    out.print()
    if sheet.compare_with is not None:
        out.print(Text(f"  ≠ what {sheet.compare_with} says of the same, where it differs\n", style="dim"))
    others = {row.key: row for row in sheet.other_figures}
    shown: set[str] = set()
    for part, plain in sheet.parts.items():
        figures = [f for f in sheet.figures if f.key.startswith(f"{part}.")]
        shown |= {f.key for f in figures}
        out.print(Text.assemble((part, "bold"), f"  {_plain(plain)}"))
        for figure in figures:
            _print_figure(out, figure.key.removeprefix(f"{part}."), figure, others.get(figure.key))
        out.print()
    rest = [f for f in sheet.figures if f.key not in shown]
    for figure in rest:
        _print_figure(out, figure.key, figure, others.get(figure.key))
    for key in sorted(others.keys() - {f.key for f in sheet.figures}):
        out.print(Text(f"  {'≠':>18}  {key} {quantity(others[key].value, others[key].dimension)}, which is not here"))
    kinds = [f.kind.value for f in sheet.figures]
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(sorted(kinds)))
    out.print(Text(f"{'' if not rest else chr(10)}{len(kinds)} figures: {counted}.", style="dim"))


def _plain(fields: Mapping[str, str | float]) -> str:
    rest = dict(fields)
    text = []
    if "target" in rest:
        text.append(f"{rest.pop('kind')}, {rest.pop('source')} → {rest.pop('target')}")
    elif "kind" in rest:
        text.append(str(rest.pop("kind")))
    if "agent" in rest:
        text.append(f"on {rest.pop('agent')}")
    if "memory" in rest:
        text.append(f"computes out of {rest.pop('memory')}")
    text += [f"{key} {value}" for key, value in rest.items() if value and key != "source"]
    if "source" in rest:
        text.append(str(rest["source"]))
    return ", ".join(text)


def _print_figure(out: Console, name: str, figure: FigureRow, other: FigureRow | None) -> None:
    low, high = (quantity(edge, figure.dimension, 3) for edge in figure.range_90)
    spread = "" if low == high else f"  90 %: {low} to {high}"
    out.print(Text.assemble(f"  {name:<18}", (f"{quantity(figure.value, figure.dimension):>12}", "bold"),
                            f"  {figure.kind.value}{spread}"))
    if other is not None:
        out.print(Text(f"  {'≠':>18}{quantity(other.value, other.dimension):>12}  {other.kind.value}"))
    out.print(Padding(Text(figure.source, style="dim"), (0, 0, 0, 6)))
    if figure.spent:
        out.print(Padding(Text(f"spent on: {', '.join(figure.spent)}", style="dim"), (0, 0, 0, 6)))


# --- models -------------------------------------------------------------------------------------------------------

# bf16 takes what fp16 takes.
_PRECISIONS = {"fp32": "fp32", "fp16": "fp16/bf16", "int8": "int8", "int4": "int4", "int3": "int3", "int2": "int2"}


def _print_model(out: Console, sheet: ModelSheet) -> None:
    _heading(out, sheet.name, sheet.title, sheet.aliases)
    out.print(_pairs([("source", sheet.source), ("family", sheet.family), ("published in", sheet.native_precision),
                      ("parameters", _count(sheet.params)),
                      ("used by a token", _count(sheet.active_params) if sheet.active_params < sheet.params else None),
                      ("planned with trace", sheet.default_trace or "none")]))
    out.print()
    a = sheet.architecture
    section(out, "Architecture", _pairs((field, value) for field, value in _fields(a)
                                        if field != "norm_bias" or a.norm == "layernorm"))
    shown = {**_PRECISIONS, **({"file": "the file"} if "file" in sheet.bytes else {})}
    if "file" in shown:  # seven columns are as many as a terminal shows
        del shown["int3"]
    table = new_table("tensors", "size", *shown.values())
    table.columns[0].no_wrap = True
    for group in sheet.groups:
        table.add_row(group.name, parameters(group.params), *(quantity(group.bytes[p], "bytes", 3) for p in shown))
    table.add_row("all", parameters(sheet.params), *(quantity(sheet.bytes[p], "bytes", 3) for p in shown), style="bold")
    section(out, "Weights", table)
    what, held = (("State of a sequence", sheet.state_bytes) if a.state_space else
                  ("Keys and values of one token", sheet.kv_bytes_per_token))
    kv = ", ".join(f"{quantity(held[p], 'bytes', 3)} at {label}" for p, label in list(_PRECISIONS.items())[:4])
    lines = [f"{what}: {kv}."]
    if a.window:
        lines.append(f"{a.n_window_layers} of the {a.n_layers} layers look back {a.window} tokens and keep no more.")
    if a.n_dense_layers:
        lines.append(f"One FFN neuron: {sheet.unit_params} parameters in {3 if a.gated else 2} matrices.")
    if a.experts:
        lines.append(f"One expert: {parameters(sheet.expert_params)} parameters; a token uses {a.experts.per_token} of "
                     f"{a.experts.count} in each of {a.n_expert_layers} layers.")
    out.print(Text("\n".join(lines)))


def _count(n: int) -> str:
    return f"{n:,}".replace(",", " ")


def _fields(part: Frozen, prefix: str = "") -> Iterator[tuple[str, str]]:
    for field, value in part:
        if isinstance(value, Frozen):
            yield from _fields(value, f"{field}.")
        elif value is not None and (value is not False or field in ("gated", "tied_head")) and value != 0:
            yield prefix + field, ("yes" if value else "no") if isinstance(value, bool) else str(value)


# --- traces -------------------------------------------------------------------------------------------------------


def _print_trace(out: Console, sheet: TraceSheet) -> None:
    h = sheet.header
    origin = "captured from a real run" if h.kind == "captured" else (
        "synthetic: drawn from the statistics of a captured trace" if "like" in h.statistics
        else "synthetic: drawn from published statistics")
    _heading(out, h.name, origin)
    drawn = "" if h.kind == "captured" or "like" in h.statistics else " (shown with the shape of this model)"
    quality = "unknown" if h.quality is None else (
        f"perplexity {h.quality.dense_perplexity:.2f} → {h.quality.sparse_perplexity:.2f} "
        f"(× {h.quality.perplexity_ratio:.3f}) on {h.quality.tokens} tokens of {h.quality.text}")
    predictors = {"none": "none: the router says it" if h.unit == "expert" else "none",
                  "oracle": "oracle: no engine can know these units before reading them",
                  "gate": "a projection that is read whole (the gate, or up before a ReLU)", "low-rank": "low-rank"}
    out.print(_pairs([
        ("model", f"{h.model}{drawn}"), ("serves", ", ".join(sheet.serves)),
        ("size", f"{h.n_tokens} tokens, {h.n_layers} layers of {h.n_units} units ({h.unit}s of "
                 f"{quantity(h.unit_bytes, 'bytes')} at {h.unit_precision})"),
        ("active", f"{share(sheet.active_share)} of the units a token" + (
            "" if h.active_share_range is None
            else f", 90 %: {share(h.active_share_range[0])} to {share(h.active_share_range[1])}")),
        ("records", f"units that were {h.records}"), ("criterion", h.criterion), ("threshold", h.threshold),
        ("predictor", predictors[h.predictor] + (
            f", {share(h.predictor_params_share)} of the parameters" if h.predictor_params_share else "")),
        ("quality", quality), ("weakest figure", h.weakest_kind), ("text", h.text), ("licence", h.text_licence),
        ("read from", _imported(h)),
        ("host", h.host), ("versions", ", ".join(f"{k} {v}" for k, v in h.versions.items())), ("created", h.created),
        ("digest", h.digest),
    ]))
    out.print()
    if h.op_timings_s:
        section(out, "Measured, per decode step", _pairs((k, quantity(v, "s")) for k, v in h.op_timings_s.items()))
    _print_quality(out, h)
    if h.predictors:
        section(out, "Who could have known them? (in vain: bytes that a token asks for and does not need)",
                predictor_table(h))
    _print_law(out, sheet)
    _print_statistics(out, sheet.statistics)


def _print_quality(out: Console, header: TraceHeader) -> None:
    quality = header.quality
    if quality is None or len(quality.levels) < 2:
        return
    table = new_table("attention mass kept" if header.unit == "kv-block" else "asked for", "left out", "perplexity",
                      "over dense")
    for point in quality.levels:
        table.add_row(f"{100 * point.level:g} %", share(point.sparsity), number(point.perplexity),
                      f"× {number(point.perplexity / quality.dense_perplexity)}")
    section(out, "Quality by what is left out", table)


def _imported(header: TraceHeader) -> str | None:
    """How a routing log was read; None for a trace that simmem made."""
    log = header.imported
    if log is None:
        return None
    said = [f"{log.file} (SHA-256 {log.sha256[:12]}…)", ", ".join(f"{what} = {n}" for what, n in log.columns.items()),
            f"layers {log.layer_ids[0]} to {log.layer_ids[-1]}"]
    said += [f"only {' and '.join(f'{name} = {value}' for name, value in log.where.items())}"] if log.where else []
    said += [f"the first {header.unit} is {log.first_unit}"] if log.first_unit else []
    said += [f"{log.sequences} sequences"] if log.sequences > 1 else []
    said += [f"{log.missing} pairs of token and layer missing"] if log.missing else []
    return "; ".join(said)


def _print_law(out: Console, sheet: TraceSheet) -> None:
    if sheet.header.kind != "synthetic":
        return
    said = sheet.header.statistics
    rows = []
    for key in ("active_share", "concentration"):
        figure = said.get(key)
        if isinstance(figure, dict):
            rows.append((key, f"{number(figure['value'])} ({figure['kind']}; {figure['source']})"))
    section(out, "The law", _pairs([("", str(said.get("law", ""))), *rows]))
    if sheet.fitted_to:
        table = new_table("published statistic", "window", "published", "law gives", "tolerance")
        for row in sheet.fitted_to:
            table.add_row(f"{row.quantity}\n{row.source}", str(row.window) if row.window else "", number(row.published),
                          number(row.law), f"{100 * row.tolerance:g} %")
        section(out, "Fitted to", table)


def _print_statistics(out: Console, statistics: Mapping[str, Any]) -> None:
    if "windows" not in statistics:
        return
    table = new_table("window, tokens", "units used", "if independent", "new units", "if independent")
    for row in statistics["windows"]:
        table.add_row(str(row["tokens"]), *(share(row[k]) for k in ("union", "union_independent", "new",
                                                                    "new_independent")))
    section(out, "Locality (units used: of all; new units: of those a token uses)", table)
    layers = statistics["sparsity_by_layer"]
    section(out, "Statistics", _pairs([
        ("sparsity", f"{share(statistics['sparsity'])}, by layer {share(min(layers))} to {share(max(layers))}"),
        ("shared with the token before", f"{share(statistics['adjacent_overlap'])} of the active units; "
                                         f"{share(statistics['adjacent_overlap_independent'])} if independent"),
        ("80 % of the activity", f"in {share(statistics['units_covering_80_percent'])} of the units"),
        ("adjacent active units", f"{number(statistics['run_length'], 3)} in a run; "
                                  f"{number(statistics['run_length_random_order'], 3)} in random order"),
        *_more_statistics(statistics),
    ]))
    pairs = statistics.get("co_activation")
    if pairs:
        section(out, "Co-activation (used with a unit: its best partner that at most half of the tokens use)", _pairs([
            ("where it was chosen", f"{share(pairs['best_partner'])} of the unit's tokens, the luckiest of many"),
            ("on other tokens", f"{share(pairs['best_partner_held_out'])}; "
                                f"{share(pairs['partner_frequency'])} if independent"),
            ("counted on", f"{pairs['units']} units of layers {', '.join(map(str, pairs['layers']))}, "
                           f"{pairs['tokens']} tokens, half of them to choose"),
        ]))


def _more_statistics(statistics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What traces made before these were counted do not have in their headers."""
    if "token_run_length" in statistics:
        yield ("stays active for", f"{number(statistics['token_run_length'], 3)} tokens; "
                                   f"{number(statistics['token_run_length_independent'], 3)} if independent")
        if statistics["busiest_unit_load_even"] > _SMALL:
            yield ("busiest unit of a layer", f"{share(statistics['busiest_unit_load'])} of its uses; "
                                              f"{share(statistics['busiest_unit_load_even'])} if all were alike")
        if statistics["dead_units"] > _SMALL:
            by_layer = statistics["dead_units_by_layer"]
            yield ("never used", f"{share(statistics['dead_units'])} of the units, by layer {share(min(by_layer))} to "
                                 f"{share(max(by_layer))}")


# --- policies -----------------------------------------------------------------------------------------------------


def _print_policy(out: Console, sheet: PolicySheet) -> None:
    _heading(out, sheet.name, sheet.summary)
    if sheet.uses_trace:
        out.print(Text("Plans with a trace of the model's activity.\n"))
    table = new_table("knob", "what it is", "values searched", "default", left=4)
    table.columns[0].no_wrap = True
    for knob in sheet.knobs:
        also = f"\nor {_values(knob.unsearched)}" if knob.unsearched else ""
        limits = also if knob.low is None or knob.high is None else f"\nany from {knob.low:g} to {knob.high:g}"
        table.add_row(knob.name, f"{knob.help} ({knob.kind})", f"{_values(knob.values)}{limits}",
                      "searched" if knob.default is None else _value(knob.default))
    out.print(table)
    where = sheet.shown_for
    out.print(Text(f"\nValues as for {where['model']} on {where['device']}; `simmem plan --policy {sheet.name} "
                   "--set KNOB=VALUE` holds one.\nDefaults stand for knobs that a reference row does not name.",
                   style="dim"))


def _values(values: list[Setting]) -> str:
    if len(values) > SHOWN_VALUES:
        return f"{_value(values[0])}, {_value(values[1])} … {_value(values[-1])} ({len(values)} values)"
    return ("; " if isinstance(values[0], tuple) else ", ").join(map(_value, values))


def _value(value: Setting) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
