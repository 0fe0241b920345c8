"""Does every notebook run from its first cell to its last, and is every picture in it shown?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
for needed in ("IPython", "ipykernel", "matplotlib", "nbmake", "pandas"):
    pytest.importorskip(needed)
jupytext = pytest.importorskip("jupytext")


def test_each_is_in_the_list() -> None:
    listed = re.findall(r"\]\((\w+\.py)\)", (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_its_pictures(source: Path, tmp_path: Path) -> None:
    notebook = tmp_path / f"{source.stem}.ipynb"
    jupytext.write(jupytext.read(source), notebook)
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}  # not of this session
    run = {**own, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
           "JUPYTER_PREFER_ENV_PATH": "1", "JUPYTER_PLATFORM_DIRS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", "--nbmake", "--overwrite", "-q", "-p", "no:cacheprovider",
                           "--nbmake-timeout=300", str(notebook)], cwd=tmp_path, env=run, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [cell for cell in jupytext.read(notebook).cells if cell.cell_type == "code"]
    pictures = [cell for cell in cells if "simmem.pictures." in cell.source]
    assert pictures
    for cell in cells:
        kinds = {kind for output in cell.outputs for kind in output.get("data", ())}
        assert ("image/png" in kinds) == (cell in pictures), cell.source
        assert not any(output.get("name") == "stderr" for output in cell.outputs), cell.outputs
