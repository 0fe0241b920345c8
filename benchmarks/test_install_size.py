"""How much does `pip install simmem` put on the disk, numpy and scipy apart, without extras?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
APART = ("numpy", "scipy", "pip", "setuptools")


def size_bytes(folder: Path) -> dict[str, int]:
    """Bytes of files by top-level name of a site-packages, the shared libraries of a wheel with the wheel."""
    found: dict[str, int] = {}
    for top in folder.iterdir():
        files = [top] if top.is_file() else [p for p in top.rglob("*") if p.is_file()]
        name = top.name.split("-")[0].split(".")[0]
        found[name] = found.get(name, 0) + sum(p.stat().st_size for p in files)
    return found


@pytest.mark.slow
def test_install_without_extras(figures, tmp_path):
    def install() -> dict[str, int]:
        subprocess.run([sys.executable, "-m", "venv", str(tmp_path)], check=True)
        python = tmp_path / "bin" / "python"
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        done = subprocess.run([*pip, "--constraint", str(ROOT / "constraints.txt"), str(ROOT)], check=False,
                              capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip could not install: {done.stderr.strip().splitlines()[-1]}")
        where = subprocess.run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                               check=True, capture_output=True, text=True).stdout.strip()
        return size_bytes(Path(where))

    sizes = figures.benchmark.pedantic(install, rounds=1)
    ours = {name: n for name, n in sizes.items() if not name.startswith(APART)}
    largest = ", ".join(f"{k} {v / 1e6:.0f}" for k, v in sorted(ours.items(), key=lambda kv: -kv[1])[:4])
    apart = sum(v for k, v in sizes.items() if k.startswith(("numpy", "scipy")))
    figures.line("install without extras, numpy and scipy apart", "<= 100 MB", f"{sum(ours.values()) / 1e6:.0f} MB",
                 f"numpy and scipy {apart / 1e6:.0f} MB; largest: {largest}")
