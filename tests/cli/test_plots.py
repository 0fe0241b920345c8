"""Does `--plot` leave a picture that can be read, the same each time, or one clear line and no file?"""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from simmem.report.plots import draw
from simmem.report.plots.replay import plot_replay
from simmem.report.replay import replay_answer
from simmem.spec.library import resolve
from simmem.trace import Trace, TraceHeader, digest_of, save_trace
from tests.cli.running import Simmem

pytest.importorskip("matplotlib")

PLAN = ("plan", "--device", "iphone15", "--model", "opt-125m", "--dram", "100MB", "--weights", "int4", "--policy",
        "flash-window", "--set", "prefetch_layers=0", "--set", "reader_threads=32")
COMMANDS = {
    "plan": (PLAN, ("Time in the step [ms]", "Time of a token [ms]", "Memory held in dram [MB]", "int4 flash-window",
                    "this plan", "reading from storage")),
    "replay": (("replay", "TRACE", "--policy", "lru", "--policy", "window"), (
        "Accesses that miss [%]", "Cache, all layers together [kB]", "Share of all units [%]", "Read a token [kB]",
        "lru", "window")),
    "traces": (("traces", "phi-2-published"), ("Active units [%]", "Window [tokens]", "Units used [%]", "this trace",
                                               "Hottest units of a layer [%]", "Activations they take [%]")),
    "devices": (("devices", "m1-max"), ("Request size", "Throughput [GB/s]", "4 KiB", "16 MiB", "128 in flight",
                                        "48 in flight, best depth", "sequential, 6.1 GB/s", "block, 4 KiB:")),
}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of 48 tokens, 2 layers and 64 units, the low ones the hotter."""
    active = np.packbits(np.random.default_rng(7).random((48, 2, 64)) < 0.5 / np.arange(1, 65) ** 0.3, axis=2,
                         bitorder="little")
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    save_trace(trace_of(active, 64, "small"), path)
    return path


def trace_of(active: Any, n_units: int, name: str) -> Trace:
    n_tokens, n_layers = active.shape[:2]
    return Trace(TraceHeader(
        name=name, kind="captured", model=name, n_tokens=n_tokens, n_layers=n_layers, n_units=n_units, unit_bytes=960.0,
        criterion=name, threshold="", records="active", predictor="none", text="", digest=digest_of(active)), active)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that are saved during a test."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save: Callable[..., None] = Figure.savefig

    def saved(figure: Any, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    yield figures
    assert figures


def boxes(figure: Any) -> dict[str, Any]:
    """Where each text stands, in pixels, under its place and words."""
    from matplotlib.text import Text

    found: list[Any] = list(figure.texts)
    for axes in [*figure.axes, *(child for parent in figure.axes for child in parent.child_axes)]:
        found += [*axes.texts, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        found += axes.get_legend().get_texts() if axes.get_legend() else []
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if low <= tick.get_loc() <= high:
                    found += [label for label in (tick.label1, tick.label2) if label.get_visible()]
    renderer = figure.canvas.get_renderer()
    # of an annotation the text alone, without the line that leads to it
    return {f"{number} {text.get_text()!r}": Text.get_window_extent(text, renderer) for number, text in enumerate(found)
            if text.get_visible() and text.get_text().strip()}


def assert_legible(figure: Any) -> None:
    """All text inside the picture, none over another, none smaller than 8 points."""
    figure.draw_without_rendering()  # at its own resolution, whatever format it was saved in
    placed = boxes(figure)
    assert len(placed) > 10
    width, height = figure.canvas.get_width_height()
    outside = {name: box.extents for name, box in placed.items()
               if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height}
    assert outside == {}
    # a pixel on each side: boxes are as high as the tallest letter there could be
    over = [(a, b) for (a, one), (b, other) in combinations(placed.items(), 2)
            if min(one.x1, other.x1) - max(one.x0, other.x0) > 2 and min(one.y1, other.y1) - max(one.y0, other.y0) > 2]
    assert over == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_picture_is_legible_says_its_units_and_is_the_same_twice(
        name: str, simmem: Simmem, drawn: list[Any], small: Path, tmp_path: Path) -> None:
    command, words = COMMANDS[name]
    command = tuple(str(small) if word == "TRACE" else word for word in command)
    first, second, pixels = tmp_path / "first.svg", tmp_path / "second.svg", tmp_path / "p.png"
    ended = simmem(*command, "--json", "--plot", first)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    assert ended.document  # and nothing else on stdout
    assert simmem(*command, "--plot", second).code == 0
    assert simmem(*command, "--plot", pixels).code == 0
    assert first.read_bytes() == second.read_bytes()
    root = ElementTree.parse(first).getroot()
    texts = ["".join(text.itertext()).strip() for text in root.iter(f"{SVG}text")]
    assert [word for word in words if word not in texts] == []
    style = re.compile(r"font-size: ([\d.]+)px|font: [^'\"]*?([\d.]+)px")
    sizes = {float(a or b) for a, b in style.findall(first.read_text(encoding="utf-8"))}
    assert sizes
    assert min(sizes) >= 8.0
    data = pixels.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1200, 800)
    assert data[-8:-4] == b"IEND"
    assert b"tIME" not in data
    assert {path.name for path in tmp_path.iterdir()} == {"first.svg", "second.svg", "p.png"}
    assert_legible(drawn[-1])


def test_what_is_not_measured_is_said_in_the_heading(drawn: list[Any], tmp_path: Path) -> None:
    draw("trace", "opt-published", tmp_path / "t.svg")
    draw("trace", "smollm2-135m-wina-70", tmp_path / "c.svg")
    draw("device", "iphone15", tmp_path / "d.svg")
    plot_replay(tmp_path / "r.svg", replay_answer("opt-published", policies=["lru"], sizes=["1MB", "20MB"]))
    synthetic, captured, estimated, replayed = (" ".join(text.get_text() for text in figure.texts) for figure in drawn)
    assert "SYNTHETIC" in synthetic
    assert "SYNTHETIC" in replayed
    assert "SYNTHETIC" not in captured
    assert "captured" in captured
    assert "ESTIMATED" in estimated
    for figure in drawn:
        assert_legible(figure)


def test_awkward_subjects_are_legible_too(drawn: list[Any], small: Path, tmp_path: Path) -> None:
    active = np.array([[[0b101]], [[0b001]], [[0b000]]], np.uint8)  # three tokens, one layer, three units
    name = "a $name$ of_something_very_" + 40 * "long"
    save_trace(trace_of(active, 3, name), tmp_path / "t.safetensors")
    draw("trace", str(tmp_path / "t.safetensors"), tmp_path / "t.pdf")
    text = resolve("device", "rtx4090-pc").read_text(encoding="utf-8")
    (tmp_path / "d.toml").write_text(re.sub(r'(?m)^title = ".*"', f'title = "{100 * "wide "}"', text), encoding="utf-8")
    draw("device", str(tmp_path / "d.toml"), tmp_path / "d.pdf")
    assert (tmp_path / "d.pdf").read_bytes()[:5] == b"%PDF-"
    curves = replay_answer(str(small), policies=["lru"])
    lru = curves["curves"][0]
    better = {**lru, "hit_ratio": [1 - 0.7 * (1 - h) for h in lru["hit_ratio"]]}
    curves["curves"] = [{**better, "policy": policy, "scope": scope, "regret": [0.1] * len(lru["hit_ratio"])}
                        for policy in ("lru", "lfu", "slru", "pin-hot", "belady", "two-level")
                        for scope in ("layer", "global")]
    plot_replay(tmp_path / "r.pdf", curves)
    for figure in drawn:
        assert_legible(figure)


def test_a_lone_candidate_on_a_device_with_every_stream_is_legible(
        simmem: Simmem, drawn: list[Any], tmp_path: Path) -> None:
    assert simmem("plan", "--device", "rtx4090-pc", "--model", "opt-30b", "--weights", "fp16", "--policy", "stream",
                  "--set", "resident_ratio=0.2", "--set", "source_tier=storage", "--set", "reader_threads=4", "--set",
                  "prefetch_layers=2", "--batch", 3, "--plot", tmp_path / "p.svg").code == 0
    assert_legible(drawn[-1])
    assert "for the next step" in (tmp_path / "p.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(("file", "says"), [
    ("p.jpeg", "'.jpeg', expected .png, .svg, .pdf"), ("p", "'', expected .png"), ("nowhere/p.png", "does not exist"),
])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_that_cannot_be_drawn_to_is_a_wrong_input(
        name: str, file: str, says: str, simmem: Simmem, tmp_path: Path) -> None:
    ended = simmem(*COMMANDS[name][0], "--plot", tmp_path / file)
    assert (ended.code, ended.out) == (2, "")
    assert says in ended.err
    assert ended.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_list_is_not_drawn(simmem: Simmem, tmp_path: Path) -> None:
    for what in ("devices", "traces"):
        ended = simmem(what, "--plot", tmp_path / "p.png")
        assert (ended.code, ended.out) == (2, "")
        assert "--plot: draws one" in ended.err


def test_without_matplotlib_the_line_says_what_to_install(
        simmem: Simmem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command, _ in COMMANDS.values():
        ended = simmem(*command, "--plot", tmp_path / "p.png", "--json")
        assert ended.code == 4
        assert "pip install 'simmem[plot]'" in ended.err
        assert json.loads(ended.out)["kind"] == "MachineError"
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_where_nothing_fits_or_the_disk_is_full(
        simmem: Simmem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.png"
    assert simmem("plan", "--device", "iphone15", "--model", "opt-66b", "--policy", "resident",
                  "--plot", path).code == 3
    assert list(tmp_path.iterdir()) == []

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    path.write_bytes(b"what was there before")
    monkeypatch.setattr(os, "fsync", full)
    ended = simmem("devices", "m1-max", "--plot", path)
    assert (ended.code, ended.out) == (4, "")
    assert "No space left on device" in ended.err
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("p.png", b"what was there before")]
