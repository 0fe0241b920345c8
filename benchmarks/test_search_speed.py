"""How many cells of a grid are planned in a second, every family searched, on one core and on two?

60 cells: five devices × four models × three budgets. Jobs give the same bytes, which is asserted; time is not.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

SPEC = """schema = "simmem.search-spec/1"
[[grid]]
devices = ["iphone15", "m1-max", "rtx3060-pc", "rtx4090-pc", "orin-nano"]
models = ["opt-1.3b", "opt-6.7b", "llama-3.1-8b", "qwen3-30b-a3b"]
workloads = [{ prompt_tokens = 64, new_tokens = 32 }]
budgets = [{ dram = ["2 GB", "3 GB", "5 GB"] }]
expect = "any"
"""
CELLS = 60


def searched(spec: Path, jobs: int) -> tuple[float, bytes]:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", "from simmem.cli import main; main()", "search", str(spec), "--json",
                           "--jobs", str(jobs)], capture_output=True, check=True)
    return time.perf_counter() - started, done.stdout


@pytest.mark.slow
def test_cells_a_second(figures, tmp_path: Path) -> None:
    spec = tmp_path / "search.toml"
    spec.write_text(SPEC, encoding="utf-8")
    (one_s, one), (two_s, two) = searched(spec, 1), searched(spec, 2)
    assert one == two
    figures.benchmark.pedantic(lambda: None, rounds=1)
    figures.line(f"simmem search, {CELLS} cells, every family, one job", "", f"{one_s:.0f} s",
                 f"{one_s / CELLS:.2f} s a cell")
    figures.line(f"simmem search, {CELLS} cells, every family, two jobs", "1,000 in 300 s", f"{two_s:.0f} s",
                 f"{two_s / CELLS:.2f} s a cell, {one_s / two_s:.2f} times as fast")
