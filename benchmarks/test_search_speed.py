"""How many cells of a grid are planned in a second, on how many workers, and sent how many at a time?

Every family is searched, at three precisions. Answers are the same bytes however they were worked out, which is
asserted; time is not. Where other work runs on the machine, processor seconds say more than those on the wall.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

GRID = """schema = "simmem.search-spec/1"
[[grid]]
devices = {devices}
models = {models}
workloads = [{{ prompt_tokens = 64, new_tokens = 32 }}]
budgets = [{{ dram = {budgets} }}]
expect = "any"
"""
SMALL = GRID.format(
    devices=json.dumps(["iphone15", "m1-max", "rtx3060-pc", "rtx4090-pc", "orin-nano"]),
    models=json.dumps(["opt-1.3b", "opt-6.7b", "llama-3.1-8b", "qwen3-30b-a3b"]),
    budgets=json.dumps(["2 GB", "3 GB", "5 GB"]))
THOUSAND = GRID.format(
    devices=json.dumps(["iphone15", "pixel8", "m1-max", "macbook-m4-max", "orin-nano", "rtx3060-pc", "rtx4090-pc",
                        "rtx5090-pc", "t4-cloud", "strix-halo"]),
    models=json.dumps(["opt-1.3b", "opt-6.7b", "opt-30b", "relullama-7b", "llama-3.1-8b", "llama-2-13b", "gemma-3-4b",
                       "mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite"]),
    budgets=json.dumps([f"{i / 2:g} GB" for i in range(2, 12)]))


class Took(NamedTuple):
    wall_s: float
    cpu_s: float
    """Of the command and its workers."""
    out: bytes


def searched(spec: Path, *arguments: object) -> Took:
    """A search in a process of its own."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-c", "from simmem.cli import main; main()", "search", str(spec), "--json",
                           *map(str, arguments)], capture_output=True, check=True)
    took, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Took(took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout)


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "search.toml").write_text(text, encoding="utf-8")
    return tmp_path / "search.toml"


@pytest.mark.slow
def test_cells_a_second(figures, tmp_path: Path) -> None:
    """60 cells (five devices, four models, three budgets) on one and two workers, in blocks of 1, 4 and 16."""
    spec = written(tmp_path, SMALL)
    ways = [("one job", ("--jobs", 1))]
    ways += [(f"two jobs, {block} at a time", ("--jobs", 2, "--block", block)) for block in (1, 4, 16)]
    ways += [(f"dask, two workers, {block} at a time", ("--backend", "dask", "--jobs", 2, "--block", block))
             for block in (1, 4, 16)]
    took = {name: searched(spec, *arguments) for name, arguments in ways}
    one = took["one job"]
    figures.benchmark.pedantic(lambda: None, rounds=1)
    for name, found in took.items():
        assert found.out == one.out
        figures.line(f"simmem search, 60 cells, every family, {name}", "", f"{found.wall_s:.1f} s",
                     f"{one.wall_s / found.wall_s:.2f} times as fast as one job, {found.cpu_s / one.cpu_s:.2f} of its "
                     "processor time")


@pytest.mark.slow
def test_the_cost_of_a_task(figures, tmp_path: Path) -> None:
    """400 cells that are answered in a few milliseconds each, so that what is left is the sending."""
    sizes = json.dumps([f"{100 + i} kB" for i in range(400)])
    text = GRID.format(devices='["iphone15"]', models='["opt-125m"]', budgets=sizes)
    spec = written(tmp_path, text.replace("64, new", '64, weights = "fp16", new') + 'policies = ["resident"]\n')
    one = searched(spec, "--jobs", 1)
    figures.benchmark.pedantic(lambda: None, rounds=1)
    for backend in ("loky", "dask"):
        for block in (1, 4, 16):
            found = searched(spec, "--jobs", 2, "--backend", backend, "--block", block)
            assert found.out == one.out
            figures.line(f"simmem search, 400 cells of next to nothing, {backend}, two workers, {block} at a time", "",
                         f"{found.wall_s:.1f} s", f"{found.cpu_s:.1f} s of processor time; one job {one.wall_s:.1f} "
                         f"and {one.cpu_s:.1f} s")


@pytest.mark.slow
def test_a_thousand_cells(figures, tmp_path: Path) -> None:
    """Ten devices, ten models, ten budgets, on two workers."""
    found = searched(written(tmp_path, THOUSAND), "--jobs", 2)
    assert json.loads(found.out)["summary"]["n"] == 1000
    figures.benchmark.pedantic(lambda: None, rounds=1)
    figures.line("simmem search, 1,000 cells, every family, two jobs", "300 s", f"{found.wall_s:.0f} s",
                 f"{found.cpu_s:.0f} s of processor time")
