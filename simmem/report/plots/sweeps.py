"""What does a sweep say: how much does memory buy, and which device is faster?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from simmem.errors import SpecError
from simmem.planner.explain import rate_words
from simmem.report.plots.style import FAINT, GREY, INK, MARKERS, PALETTE, log_ticks, panel, plain, show_units
from simmem.units import format_quantity

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = ["by_budget", "devices"]

_SHOWN: Mapping[str, tuple[str, str, tuple[str, str] | None]] = {
    "token_latency_s": ("Time of a token", "s", ("token_latency_low_s", "token_latency_high_s")),
    "decode_tokens_per_s": ("Tokens a second while decoding", "tokens_per_s", None),
    "tokens_per_s": ("Tokens a second, prompt included", "tokens_per_s", None),
    "first_token_s": ("Time to the first token", "s", None),
    "storage_bytes_per_token": ("Read from storage a token", "bytes", None),
    "energy_j_per_token": ("Energy of a token", "joule", None),
    "held_bytes": ("Memory held", "bytes", None),
}
"""Column → words, dimension, columns of its 90 % interval; that of the decode rate follows from the latency's."""
_TELL_APART = ("device", "model", "asked_policy", "asked_knobs", "asked_weights", "prompt_tokens", "new_tokens",
               "asked_batch", "kv", "objective", "engine", "asked_trace", "max_quality_loss", "draft", "acceptance",
               "dram_bytes", "vram_bytes")
_LOG_FROM = 8.0
"""Values that are more times apart are drawn on a logarithmic axis."""


def by_budget(frame: pandas.DataFrame, value: str = "token_latency_s", *, budget: str = "dram_bytes",
              ax: Axes | None = None) -> Axes:
    """A figure of a `simmem.sweep` against the budget of memory, a line for each of what else differs.

    Bands are 90 % intervals, of the latency and the decode rate; a cross on the lower edge: nothing fits there.

    Parameters
    ----------
    value : a column: token_latency_s, decode_tokens_per_s, tokens_per_s, first_token_s, storage_bytes_per_token,
        energy_j_per_token or held_bytes.
    budget : dram_bytes or vram_bytes; rows of devices that have no such memory are left out.

    Raises
    ------
    SpecError
        The frame is of something else, or has no row with that figure and that budget.
    """
    words, dimension, rows = _read(frame, value, {budget})
    names = _names(rows, leave_out=(budget,))
    series: dict[str, list[dict[str, Any]]] = {}
    for row, name in zip(rows, names, strict=True):
        series.setdefault(name, []).append(row)
    memory = "DRAM" if budget == "dram_bytes" else "VRAM"
    with panel(ax, f"{words} by budget of {memory}{_common(rows)}",
               "band: 90 % interval · cross: nothing fits" if any(_interval(row, value) for row in rows) else
               "cross: nothing fits") as axes:
        drawn = [row[value] for row in rows if _known(row, value)]
        for number, (name, mine) in enumerate(series.items()):
            mine = sorted(mine, key=lambda row: row[budget])
            there, colour = [row for row in mine if _known(row, value)], PALETTE[number % len(PALETTE)]
            axes.plot([row[budget] for row in there], [row[value] for row in there],
                      marker=MARKERS[number % len(MARKERS)], color=colour, label=name or None,
                      linestyle=("-", "--", ":")[number // len(PALETTE) % 3])
            reach = [(row[budget], _interval(row, value)) for row in there]
            if reach and all(one for _, one in reach):
                axes.fill_between([at for at, _ in reach], [one[0] for _, one in reach if one],
                                  [one[1] for _, one in reach if one], color=colour, alpha=0.15, linewidth=0)
            nowhere = [row[budget] for row in mine if row["status"] != "ok"]
            axes.plot(nowhere, [0.02 + 0.035 * (number % 6)] * len(nowhere), "x", color=colour, markersize=7,
                      transform=axes.get_xaxis_transform(), clip_on=False)
        _scaled(axes, drawn)
        axes.set_xlim(0.0, 1.04 * max(row[budget] for row in rows))
        show_units(axes.xaxis, f"Budget of {memory}", "bytes", max(row[budget] for row in rows))
        _label(axes.yaxis, words, dimension, max(drawn))
        if len(series) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return axes


def devices(frame: pandas.DataFrame, value: str = "token_latency_s", *, ax: Axes | None = None) -> Axes:
    """A figure of a `simmem.sweep` for each device, fastest first, a colour for each of what else differs.

    Whiskers are 90 % intervals. `value` and errors as for `by_budget`.
    """
    words, dimension, rows = _read(frame, value, set())
    names = _names(rows, leave_out=("device",) if len({row["device"] for row in rows}) > 1 else ())
    kinds = list(dict.fromkeys(names))
    down = not value.endswith("per_s")
    best: dict[str, float] = {}
    for row in rows:
        found = row[value] if _known(row, value) else math.inf if down else 0.0
        best[row["device"]] = (min if down else max)(best.get(row["device"], found), found)
    order = sorted(best, key=lambda name: best[name] if down else -best[name])
    drawn = [row[value] for row in rows if _known(row, value)]
    thick = 0.8 / len(kinds)
    with panel(ax, f"{words} by device{_common(rows)}", "whiskers: 90 % intervals" if any(
            _interval(row, value) for row in rows) else "", height_in=1.5 + 0.34 * len(order) * max(1.0, len(kinds) / 2)
            ) as axes:
        _scaled(axes, drawn, across=True)
        for row, name in zip(rows, names, strict=True):
            kind = kinds.index(name)
            at = order.index(row["device"]) + (kind - (len(kinds) - 1) / 2) * thick
            if not _known(row, value):
                why = "nothing fits" if row["status"] != "ok" else "no sourced figure"
                axes.annotate(why, (0.0, at), xycoords=("axes fraction", "data"), xytext=(6, 0), fontsize=8.5,
                              textcoords="offset points", va="center", color=GREY)
                continue
            colour = PALETTE[kind % len(PALETTE)]
            if axes.get_xscale() == "log":  # where nothing starts at 0, the length of a bar says nothing
                axes.plot([row[value]], [at], MARKERS[kind % len(MARKERS)], color=colour, markersize=8, zorder=3)
                axes.axhline(at, color=FAINT, linewidth=0.8, zorder=0)
            else:
                axes.barh(at, row[value], height=0.92 * thick, color=colour, edgecolor="white", linewidth=0.4,
                          hatch=("", "//", "..")[kind // len(PALETTE) % 3])
            reach = _interval(row, value)
            end = row[value]
            if reach:
                axes.errorbar([row[value]], [at], xerr=[[max(row[value] - reach[0], 0.0)],
                                                        [max(reach[1] - row[value], 0.0)]],
                              color=INK, elinewidth=1.0, capsize=2.5, fmt="none")
                end = max(reach)
            axes.annotate(rate_words(row[value]) if dimension == "tokens_per_s" else format_quantity(
                row[value], dimension), (end, at), xytext=(6, 0), fontsize=8.5,
                          textcoords="offset points", va="center")
        axes.set_yticks(range(len(order)), [plain(name, 26) for name in order])
        axes.set_ylim(len(order) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        _label(axes.xaxis, words, dimension, max(drawn))
        if len(kinds) > 1:
            handles = [axes.plot([], [], MARKERS[n % len(MARKERS)] if axes.get_xscale() == "log" else "s",
                                 color=PALETTE[n % len(PALETTE)], label=name)[0] for n, name in enumerate(kinds)]
            axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return axes


def _read(frame: pandas.DataFrame, value: str, needed: set[str]) -> tuple[str, str, list[dict[str, Any]]]:
    """Words and dimension of a column, and the rows that have what is `needed`.

    Raises SpecError where there is nothing to draw.
    """
    if value not in _SHOWN:
        raise SpecError(f"found {value!r}, expected one of {', '.join(_SHOWN)}", key="value")
    missing = {value, "device", "status", *needed} - set(frame.columns)
    if missing:
        raise SpecError(f"has no column {min(missing)!r}; expected a frame of simmem.sweep", key="frame")
    rows: list[dict[str, Any]] = frame.dropna(subset=sorted(needed)).to_dict("records")
    if not any(_known(row, value) for row in rows):
        raise SpecError(f"no row has a figure in {' and '.join(map(repr, (value, *sorted(needed))))}", key="frame")
    words, dimension, _ = _SHOWN[value]
    return words, dimension, rows


def _known(row: Mapping[str, Any], value: str) -> bool:
    return row["status"] == "ok" and not math.isnan(row[value])


def _interval(row: Mapping[str, Any], value: str) -> tuple[float, float] | None:
    if not _known(row, value):
        return None
    low, high = row.get("token_latency_low_s", math.nan), row.get("token_latency_high_s", math.nan)
    if math.isnan(low) or math.isnan(high):
        return None
    if value == "decode_tokens_per_s":
        return row["batch"] / high, row["batch"] / low
    return (low, high) if value == "token_latency_s" else None


def _names(rows: list[dict[str, Any]], leave_out: tuple[str, ...]) -> list[str]:
    """Each row by what differs between rows, apart from what the axes show."""
    differ = [column for column in _TELL_APART if column not in leave_out and
              len({str(row.get(column)) for row in rows}) > 1]
    for column in {"dram_bytes", "vram_bytes"} & set(differ):
        if len({(row["device"], str(row[column])) for row in rows}) == len({row["device"] for row in rows}):
            differ.remove(column)  # a device's own memory, which its name stands for
    return [", ".join(_value(column, row[column]) for column in differ) for row in rows]


def _value(column: str, value: Any) -> str:
    if column == "asked_policy" and value == "any":
        return "best of all policies"
    if value is None or value != value or str(value) == "<NA>":
        return {"asked_weights": "searched weights", "asked_batch": "searched batch"}.get(column, f"no {column}")
    if column.endswith("_bytes"):
        return format_quantity(value, "bytes")
    units = {"prompt_tokens": "prompt", "new_tokens": "new", "asked_batch": "at once", "kv": "keys and values"}
    return f"{plain(str(value), 26)} {units[column]}" if column in units else plain(str(value), 30)


def _common(rows: list[dict[str, Any]]) -> str:
    """What all rows share and no legend says: the model, and the device where there is one."""
    models, places = {row["model"] for row in rows}, {row["device"] for row in rows}
    said = (f": {plain(models.pop(), 26)}" if len(models) == 1 else "")
    return said + (f"{' on' if said else ':'} {plain(places.pop(), 26)}" if len(places) == 1 else "")


def _label(axis: Axis, words: str, dimension: str, largest: float) -> None:
    """Words and unit; tokens are counted, without prefixes."""
    show_units(axis, words, dimension, 1.0 if dimension == "tokens_per_s" else largest)
    if dimension == "tokens_per_s":
        axis.set_label_text(f"{words} [tokens/s]")


def _scaled(axes: Axes, values: list[float], *, across: bool = False) -> None:
    """From 0, or logarithmic where values are far apart."""
    low, high = min(values), max(values)
    set_scale, set_limits, axis = ((axes.set_xscale, axes.set_xlim, axes.xaxis) if across else
                                   (axes.set_yscale, axes.set_ylim, axes.yaxis))
    if low > 0 and high > _LOG_FROM * low:
        set_scale("log")
        set_limits(low / 2.0, high * (4.0 if across else 2.0))
        log_ticks(axis, low, high)
    else:
        set_limits(0.0, (high or 1.0) * (1.35 if across else 1.25))
