"""What do all pictures have in common: file, size, colours, headings, units on the axes, labels that keep apart?

Nothing of matplotlib is imported before a picture is asked for, and its settings are put back afterwards. The same
figures give the same bytes: no dates, no random ids, nobody's own matplotlibrc.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simmem.errors import MachineError, SpecError
from simmem.report.files import check_writable, write_bytes
from simmem.units import format_quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = ["FAINT", "GREY", "INK", "MARKERS", "PALETTE", "SUFFIXES", "binary_size", "check_plot", "heading",
           "label_lines", "legend_below", "log_ticks", "panel", "picture", "plain", "said", "show_units"]

# What a file that names no date, and no version of the program, says of itself.
SUFFIXES: dict[str, dict[str, None]] = {
    ".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None},
}

# Okabe and Ito, "Color Universal Design", 2008: told apart with every common kind of colour blindness. Yellow is left
# out, which no one sees as a line on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, GREY, FAINT = "#222222", "#6F6F6F", "#D9D9D9"

_WIDTH_IN, _HEIGHT_IN, _DPI = 12.0, 8.0, 100
_PANEL_IN = 9.5
_SETTINGS: dict[str, Any] = {
    "figure.dpi": _DPI, "savefig.dpi": _DPI, "font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "legend.fontsize": 9, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": GREY, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.8,
    "text.parse_math": False,  # a $ in the name of a model is a $
    "svg.fonttype": "none", "svg.hashsalt": "simmem", "pdf.fonttype": 42,
}


def check_plot(path: Path, *, inputs: Iterable[str | Path | None] = ()) -> None:
    """Raise now rather than after the work if the picture could not be drawn or written.

    Raises SpecError where the name does not end in one of `SUFFIXES` or must not be written to, MachineError where it
    cannot be, or where matplotlib is missing.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise SpecError(f"found a name that ends in {path.suffix!r}, expected {', '.join(SUFFIXES)}", file=str(path),
                        key="--plot")
    check_writable(path, inputs=inputs)
    try:
        import matplotlib.figure  # noqa: F401 - is it there?
    except ImportError as error:
        raise MachineError(f"a picture needs matplotlib ({error}); install with: pip install 'simmem[plot]'",
                           key="--plot") from None


@contextmanager
def picture(path: Path) -> Iterator[Figure]:
    """An empty figure of 1200 × 800 pixels, which is written to `path` when the block ends without an error.

    The suffix of `path` decides the format (png, svg, pdf). Raises what `write_bytes` raises.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = path.suffix.lower()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN))
        FigureCanvasAgg(figure)  # no window, and it can measure text
        yield figure
        _settle(figure)
        drawn = BytesIO()
        figure.savefig(drawn, format=kind[1:], metadata=SUFFIXES[kind])
    write_bytes(path, drawn.getvalue())


@contextmanager
def panel(ax: Axes | None, title: str, subtitle: str = "", *, height_in: float = 4.6, letters: int = 104
          ) -> Iterator[Axes]:
    """The axes that are given, or those of a new figure that a notebook shows by itself, under a title.

    letters : of a line of the subtitle; fewer where long names of ticks leave the axes less room.

    Raises MachineError where matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib import pyplot
    except ImportError as error:
        raise MachineError(f"a picture needs matplotlib ({error}); install with: pip install 'simmem[notebook]'"
                           ) from None
    interactive = pyplot.isinteractive()
    try:
        with matplotlib.rc_context(_SETTINGS):
            if ax is None:
                _, ax = pyplot.subplots(figsize=(_PANEL_IN, height_in), layout="constrained")
            interactive = pyplot.isinteractive()  # the first figure of a notebook switches it on
            said(ax, title, subtitle, letters)
            yield ax
    finally:
        matplotlib.interactive(interactive)


def said(axes: Axes, title: str, subtitle: str = "", letters: int = 104) -> None:
    """What a panel shows, in bold, and on the line below what it rests on, in grey."""
    from textwrap import wrap

    lines = wrap(plain(subtitle, 240, prose=True), letters)
    axes.set_title(plain(title, 80, prose=True), pad=8 + 12 * len(lines))
    if lines:
        axes.annotate("\n".join(lines), (0.0, 1.0), xytext=(0.0, 5.0), xycoords="axes fraction",
                      textcoords="offset points", fontsize=9, color=GREY, annotation_clip=False, linespacing=1.25)


def legend_below(axes: Axes, columns: int, **options: Any) -> None:
    """A legend under the label of the x axis, as far below whatever the height of the panel."""
    from matplotlib.transforms import ScaledTranslation

    figure = axes.get_figure(root=True)
    assert figure is not None
    below = axes.transAxes + ScaledTranslation(0.0, -0.5, figure.dpi_scale_trans)
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, 0.0), bbox_transform=below, ncols=columns, **options)


def heading(figure: Figure, title: str, subtitle: str) -> None:
    """Title and subtitle at the top left; the panels share what is left below them."""
    figure.set_layout_engine("constrained", rect=(0.005, 0.005, 0.99, 0.905), h_pad=0.08, w_pad=0.08)
    figure.text(0.012, 0.985, plain(title, 92, prose=True), fontsize=14, fontweight="bold", va="top")
    figure.text(0.012, 0.945, plain(subtitle, 160, prose=True), fontsize=10, color=GREY, va="top")


def plain(text: str, limit: int = 40, *, prose: bool = False) -> str:
    """Text of any origin as it can be drawn: printable, and where too long cut in the middle; `prose` at its end."""
    clean = "".join(c if c.isprintable() else "·" for c in text)
    if len(clean) <= limit:
        return clean
    tail = 0 if prose else (limit - 1) // 3
    return f"{clean[: limit - 1 - tail]}…{clean[len(clean) - tail:]}"


def show_units(axis: Axis, label: str, dimension: str, largest: float) -> None:
    """Label an axis whose values are SI with the one prefix that suits its largest value, e.g. "… [GB]"."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    if dimension == "ratio":
        unit, scale = "%", 0.01
    else:
        unit = format_quantity(largest, dimension).split(" ")[1]
        powers = (10.0**power for power in range(-12, 18, 3))
        scale = next(power for power in powers if format_quantity(power, dimension) == f"1 {unit}")
    axis.set_label_text(f"{label} [{unit}]")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value / scale, 9):g}"))
    axis.set_minor_formatter(NullFormatter())


def log_ticks(axis: Axis, low: float, high: float) -> None:
    """Ticks at 1, 2 and 5 times powers of ten on a logarithmic axis, at powers alone where that would crowd."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < low * 2e3 else (1.0,), numticks=24))
    axis.set_minor_locator(NullLocator())


def binary_size(n_bytes: float) -> str:
    """A power of two in the words of storage: 4 KiB, 1 MiB. [B]"""
    for unit, scale in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:g} {unit}"
    return f"{n_bytes:g} B"


def label_lines(figure: Figure, axes: Axes, lines: Sequence[tuple[float, str, str]]) -> None:
    """Write (y, text, colour) beside the right edge, each at its height or, where texts would overlap, near it."""
    points, line = 8.5, 1.4
    here, (floor, roof) = axes.get_xlim()[1], (axes.transAxes.transform((0.0, y))[1] for y in (0.0, 1.0))
    wanted = sorted(((float((axes.transData.transform((here, y))[1] - floor) / (roof - floor)), text, colour)
                     for y, text, colour in lines), key=lambda line: line[0])
    notes = [axes.annotate(text, xy=(1.0, at), xytext=(1.03, at), xycoords="axes fraction",
                           textcoords="axes fraction", fontsize=points, color=colour, va="center",
                           annotation_clip=False,
                           arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1,
                                       "shrinkB": 0, "relpos": (0.0, 0.5)})
             for at, text, colour in wanted]
    figure.draw_without_rendering()  # now the axes have made room, and it is known how high they are
    gap = line * points / 72 * figure.dpi / float(axes.get_window_extent().height)
    heights: list[float] = []
    for at, _, _ in wanted:
        heights.append(max(at, heights[-1] + gap) if heights else max(at, 0.0))
    ceiling = max(1.0, gap * (len(heights) - 1))
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    for note, height in zip(notes, heights, strict=True):
        note.set_position((1.03, height))


def _settle(figure: Figure) -> None:
    """Lay the panels out and leave them there, to a tenth of a pixel.

    The solver behind the layout goes through its constraints in no fixed order, so that its last digits differ from
    run to run.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        left, bottom, width, height = (round(edge, 4) for edge in axes.get_position().bounds)
        axes.set_position((left, bottom, width, height))
