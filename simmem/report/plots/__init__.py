"""Pictures: one module a command; `style` says what they have in common. Nothing here shows on a screen."""

from __future__ import annotations

from pathlib import Path

from simmem.errors import SpecError

__all__ = ["draw"]


def draw(what: str, name: str | None, path: Path) -> None:
    """Draw the "device" or "trace" of a name, alias or path.

    Raises SpecError where no name is given, and what the module of that picture raises.
    """
    from simmem.report.plots.style import check_plot

    if name is None:
        raise SpecError(f"draws one {what}: name it", key="--plot")
    check_plot(path, inputs=(name,))
    if what == "device":
        from simmem.report.plots.devices import plot_device
        from simmem.spec.device import load_device

        plot_device(path, load_device(name))
    else:
        from simmem.report.plots.traces import plot_trace

        plot_trace(path, name)
