"""How fast does the storage of a device deliver, by request size and depth? The surface that every plan on it reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simmem.cost.roofline import storage_throughput
from simmem.report.plots.style import FAINT, INK, PALETTE, binary_size, heading, picture, plain, show_units
from simmem.spec.device import Device, Link
from simmem.units import format_quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_device"]

_DEPTHS = (1, 4, 16, 32, 64, 128)
"""Requests in flight of the curves."""
_SIZES = 2.0 ** np.linspace(12.0, 24.0, 385)
"""4 KiB to 16 MiB. [B]"""


def plot_device(path: Path, device: Device) -> None:
    """Write the throughput surface of the device's storage to `path`. Raises what `picture` raises."""
    links = {name: link for name, link in device.link.items() if link.kind == "storage"}
    with picture(path) as figure:
        heading(figure, f"{plain(device.title, 68, prose=True)}: reading from storage",
                f"{plain(device.name)} · random reads by request size and reads in flight · {_rests_on(device, links)}")
        for number, (name, link) in enumerate(links.items()):
            axes = figure.add_subplot(len(links), 1, number + 1)
            axes.set_title(f"link {plain(name)}: {plain(link.source)} → {plain(link.target)}")
            _surface(axes, link)


def _rests_on(device: Device, links: dict[str, Link]) -> str:
    """How well the figures of the surface are known, the worst of them by name."""
    figures = {key: figure.kind.value for key, figure in device.figures().items()
               if any(key.startswith(f"link.{name}.") for name in links) and not key.endswith("energy_per_byte")}
    estimated = dict.fromkeys(key.rsplit(".", 1)[1].replace("_", " ") for key, kind in figures.items()
                              if kind == "estimated")
    if estimated:
        return f"ESTIMATED figures: {', '.join(estimated)}"
    return f"figures: {', '.join(dict.fromkeys(sorted(figures.values())))}"


def _surface(axes: Axes, link: Link) -> None:
    import matplotlib
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    best = round(link.best_depth.value) if link.best_depth else None
    depths = sorted({*_DEPTHS, *([best] if best else [])}, reverse=True)
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.87, len(depths)))
    top = link.rate.value
    for depth, colour in zip(depths, colours, strict=True):
        rates = storage_throughput(link, _SIZES, float(depth))
        top = max(top, float(rates.max()))
        axes.plot(_SIZES, rates, color=colour, linewidth=3.5 if depth == best else 1.6,
                  label=f"{depth} in flight" + (", best depth" if depth == best else ""))
    axes.axhline(link.rate.value, color=INK, linestyle="--", linewidth=1.2,
                 label=f"sequential, {format_quantity(link.rate.value, 'bytes_per_s')}")
    if link.sustained_rate is not None:
        axes.axhline(link.sustained_rate.value, color=PALETTE[1], linestyle=":", linewidth=1.6,
                     label=f"sustained, {format_quantity(link.sustained_rate.value, 'bytes_per_s')}")
    if link.block is not None:
        block = link.block.value
        if block > _SIZES[0]:
            axes.axvspan(float(_SIZES[0]), block, color=FAINT, alpha=0.5, linewidth=0)
        axes.axvline(block, color=PALETTE[1], linewidth=1.6, linestyle="-.",
                     label=f"block, {binary_size(block)}:\nsmaller reads round up")
    axes.set_xscale("log", base=2)
    axes.set_xlim(float(_SIZES[0]) * 0.96, float(_SIZES[-1]) * 1.04)
    axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in range(12, 25, 2)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: binary_size(value)))
    axes.set_xlabel("Request size")
    axes.set_ylim(0.0, 1.05 * top)
    show_units(axes.yaxis, "Throughput", "bytes_per_s", max(top, 1e9))  # one unit, to lay devices side by side
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), title="Reads in flight and limits",
                alignment="left", labelspacing=0.7)
