"""A folder with a search file, a device file of its own and a baseline, for tests of `simmem search`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from simmem.spec.library import resolve
from tests.cli.running import Simmem

__all__ = ["FIRST", "ROOT", "SPEC", "Project", "command", "environment", "many_cells"]

ROOT = Path(__file__).parents[2]
SPEC = """schema = "simmem.search-spec/1"
[[grid]]
devices = ["phone.toml"]
models = ["opt-125m"]
workloads = [{ prompt_tokens = 16, new_tokens = 4, weights = ["fp16", "int8"] }]
budgets = [{ dram = "100 MB" }]
policies = [{ policy = "stream", knobs = { agent = "gpu" } }]
"""
FIRST = "phone.toml/opt-125m/p16-n4-fp16/dram=100MB/stream(agent=gpu)"


class Project:
    """A folder with a search file, a device file of its own and, once it is saved, a baseline."""

    def __init__(self, folder: Path, simmem: Simmem) -> None:
        self.folder, self._simmem = folder, simmem
        self.spec, self.device = folder / "search.toml", folder / "phone.toml"
        self.baseline = folder / "baseline.json"
        self.spec.write_text(SPEC)
        shutil.copy(resolve("device", "iphone15"), self.device)

    def change(self, path: Path, old: str, new: str) -> None:
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    def save(self) -> None:
        ended = self._simmem("search", self.spec, "--save-baseline", self.baseline)
        assert ended.code == 0, ended.err

    def run(self, *arguments: object, code: int) -> dict[str, Any]:
        against = ("--baseline", self.baseline) if self.baseline.exists() else ()
        ended = self._simmem("search", self.spec, *against, *arguments, "--json")
        assert ended.code == code, ended.err + ended.out[:2000]
        return ended.document

    def fails(self, *arguments: object) -> dict[str, Any]:
        """The one clear line of a search whose input is wrong, as JSON."""
        error = self.run(*arguments, code=2)
        assert error["schema"] == "simmem.error/1" and "\n" not in error["message"]
        return error


def command(project: Project, *arguments: object) -> list[str]:
    """A search of the project in a process of its own."""
    return [sys.executable, "-c", "from simmem.cli import main; main()", "search", str(project.spec),
            *map(str, arguments)]


def many_cells(project: Project) -> None:
    """Twelve cells, so that there is something to interrupt."""
    project.change(project.spec, "prompt_tokens = 16", "prompt_tokens = [8, 16, 24, 32, 40, 48]")


def environment() -> dict[str, str]:
    """Of a process that is to find this checkout."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
