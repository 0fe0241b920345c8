"""How sparse, how local and how skewed is a trace, and what does its sparsity cost?

Three panels, locality and skew beside what chance alone would give; a fourth where quality was measured at levels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simmem.report.plots.style import (
    FAINT,
    GREY,
    INK,
    MARKERS,
    PALETTE,
    heading,
    log_ticks,
    picture,
    plain,
    show_units,
)
from simmem.report.sheets import model_of_trace
from simmem.spec import library
from simmem.trace import Trace, generate, load_synthetic, load_trace_file, trace_statistics
from simmem.trace.statistics import unit_frequencies
from simmem.trace.trace import Quality

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_trace"]

Array = NDArray[np.float64]

_LONGEST_WINDOW = 64


def plot_trace(path: Path, name: str) -> None:
    """Write sparsity by layer, union against window, and skew of a trace (by name or path) to `path`.

    A synthetic trace is drawn with the shape of the model it was fitted to. Raises UnknownNameError, SpecError or
    TraceError for the trace, and what `picture` raises.
    """
    found = library.resolve("trace", name)
    trace = generate(load_synthetic(found), model_of_trace(found)) if found.suffix == ".toml" \
        else load_trace_file(found)
    h = trace.header
    frequencies = unit_frequencies(trace)
    kind = "captured from a real run" if h.kind == "captured" else "SYNTHETIC trace, drawn from published statistics"
    sure = "" if h.weakest_kind == "measured" else f" ({h.weakest_kind.upper()})"
    with picture(path) as figure:
        heading(figure, f"{plain(h.name, 50)}: sparsity, locality and skew",
                f"{plain(h.model)} · {kind}{sure} · {h.n_tokens} tokens, {h.n_layers} "
                f"layer{'s'[:h.n_layers > 1]} of {h.n_units} units ({plain(h.unit)}) that were {h.records}")
        grid = figure.add_gridspec(2, 2, height_ratios=(0.85, 1.0))
        if h.quality is not None and len(h.quality.levels) > 1:
            top = grid[0, :].subgridspec(1, 2, width_ratios=(1.9, 1.0))
            _sparsity(figure.add_subplot(top[0, 0]), trace)
            _quality(figure.add_subplot(top[0, 1]), h.quality)
        else:
            _sparsity(figure.add_subplot(grid[0, :]), trace)
        _unions(figure.add_subplot(grid[1, 0]), trace, frequencies)
        _skew(figure.add_subplot(grid[1, 1]), frequencies)


def _sparsity(axes: Axes, trace: Trace) -> None:
    from matplotlib.ticker import MaxNLocator

    share = trace.active_counts / trace.header.n_units
    layers = np.arange(share.shape[1])
    mean, (low, high) = share.mean(axis=0), np.quantile(share, [0.05, 0.95], axis=0)
    axes.set_title("Activity by layer")
    axes.bar(layers, mean, width=0.72, color=PALETTE[5], label="mean over tokens")
    axes.errorbar(layers, mean, yerr=[np.maximum(mean - low, 0.0), np.maximum(high - mean, 0.0)], fmt="none",
                  ecolor=INK, elinewidth=1.0, capsize=2.0, label="90 % of tokens")
    axes.axhline(float(mean.mean()), color=PALETTE[1], linestyle="--", linewidth=1.4,
                 label=f"all layers: {100 * mean.mean():.3g} %")
    axes.grid(axis="x", visible=False)
    axes.set_xlim(-0.6, share.shape[1] - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(20, integer=True, min_n_ticks=1))
    axes.set_xlabel("Layer")
    axes.set_ylim(0.0, max(float(high.max()), float(mean.max()), 1e-6) * 1.05)
    show_units(axes.yaxis, "Active units", "ratio", 1.0)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderaxespad=0.2)


def _quality(axes: Axes, quality: Quality) -> None:
    from matplotlib.ticker import FuncFormatter

    left_out, ratio = zip(*quality.curve, strict=True)
    own = next((p for p in quality.levels if p.perplexity == quality.sparse_perplexity), None)
    axes.set_title("Quality: what leaving units out costs")
    axes.plot(left_out, ratio, color=PALETTE[0], marker=MARKERS[0], markersize=4, label="this criterion")
    if own is not None:
        axes.plot([own.sparsity], [quality.perplexity_ratio], color=PALETTE[1], marker=MARKERS[1], markersize=9,
                  markerfacecolor="none", linestyle="none", label=f"this trace: × {quality.perplexity_ratio:.3f}")
    axes.set_yscale("log")
    axes.set_ylim(min(1.0, *ratio) / 1.05, max(*ratio, 1.2) * 1.1)
    log_ticks(axes.yaxis, 1.0, max(ratio))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("Perplexity over dense")
    show_units(axes.xaxis, "Units left out", "ratio", 1.0)
    axes.legend(loc="upper left")


def _unions(axes: Axes, trace: Trace, frequencies: Array) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    most = min(_LONGEST_WINDOW, trace.header.n_tokens // 4)  # all windows are judged on the tokens after the longest
    windows = [2**power for power in range(most.bit_length())]
    axes.set_title("Locality: the units that a window of tokens uses")
    if len(windows) > 1:
        rows = trace_statistics(trace, windows)["windows"]
        held, own = ([float(row[key]) for row in rows] for key in ("union", "union_independent"))
        by_layer = frequencies.mean(axis=1)
        equal = [float((1.0 - (1.0 - by_layer) ** k).mean()) for k in windows]
        axes.plot(windows, equal, color=GREY, marker=MARKERS[2], markersize=5, linestyle=":",
                  label="tokens independent, all units of a layer equally frequent")
        axes.plot(windows, own, color=PALETTE[1], marker=MARKERS[1], markersize=9, markerfacecolor="none",
                  linestyle="--", label="tokens independent, each unit as frequent as it is")
        axes.plot(windows, held, color=PALETTE[0], marker=MARKERS[0], markersize=4, label="this trace")
        axes.fill_between(windows, held, own, color=PALETTE[1], alpha=0.12, linewidth=0,
                          label="what locality in time saves")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(windows))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_ylim(0.0, 1.05 * max(*equal, *own, *held, 1e-6))
        axes.legend(loc="upper left", bbox_to_anchor=(0.0, -0.17))
    else:
        axes.text(0.5, 0.5, "too few tokens for a window", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_xticks([])
    axes.set_xlabel("Window [tokens]")
    show_units(axes.yaxis, "Units used", "ratio", 1.0)


def _skew(axes: Axes, frequencies: Array) -> None:
    n_layers, n_units = frequencies.shape
    hottest = np.arange(n_units + 1) / n_units
    covered = np.zeros((n_layers, n_units + 1))
    np.cumsum(-np.sort(-frequencies, axis=1), axis=1, out=covered[:, 1:])
    used = covered[:, -1] > 0.0
    covered = covered[used] / covered[used, -1:]
    axes.set_title("Skew: how much of the activity the hottest units take")
    axes.plot([0.0, 1.0], [0.0, 1.0], color=GREY, linestyle=":", linewidth=1.2, label="all equally hot")
    if len(covered):
        bands = np.array_split(np.flatnonzero(used), min(3, int(used.sum())))
        rows = np.array_split(np.arange(len(covered)), len(bands))
        for layers, row, colour, line in zip(bands, rows, PALETTE[:3], ("-.", "--", (0, (3, 1))), strict=False):
            name = f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
            axes.plot(hottest, covered[row].mean(axis=0), color=colour, linestyle=line, linewidth=1.3, label=name)
        axes.fill_between(hottest, covered.min(axis=0), covered.max(axis=0), color=FAINT, linewidth=0, zorder=0,
                          label="range over layers")
        axes.plot(hottest, covered.mean(axis=0), color=INK, linewidth=3.0, zorder=1.9, label="mean of layers")
    axes.set_xlim(0.0, 1.0)
    axes.set_ylim(0.0, 1.02)
    show_units(axes.xaxis, "Hottest units of a layer", "ratio", 1.0)
    show_units(axes.yaxis, "Activations they take", "ratio", 1.0)
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, -0.17), ncols=2)
