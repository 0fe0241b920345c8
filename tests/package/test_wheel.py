"""Is the wheel complete, and nothing but simmem? (`make wheel-test` installs it and compares its plan.)"""

from __future__ import annotations

import email
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ("devices", "workloads", "validate")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def tracked_or_new(*folders: str) -> set[str]:
    """Files in the checkout that git does not ignore."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders],
                            cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


def test_its_top_level_is_simmem_alone(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0] for name in wheel.namelist()} == {"simmem", "simmem-0.1.0.dist-info"}


def test_it_holds_every_file_that_git_knows_and_no_other(wheel: zipfile.ZipFile) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong")
    # Raw samples of measured machines are megabytes, and of use in a checkout alone.
    expected = tracked_or_new("simmem") | {f"simmem/_data/{name}" for name in tracked_or_new(*DATA)
                                           if not name.endswith("measurements.json")}
    found = {name for name in wheel.namelist() if not name.startswith("simmem-0.1.0.dist-info/")}
    assert found == expected
    assert "simmem/py.typed" in found


def test_nothing_optional_is_required(wheel: zipfile.ZipFile) -> None:
    metadata = email.message_from_bytes(wheel.read("simmem-0.1.0.dist-info/METADATA"))
    requirements = metadata.get_all("Requires-Dist")
    assert requirements
    plain = {text.split(">")[0] for text in requirements if "extra ==" not in text}
    assert plain == {"networkx", "numpy", "pydantic", "rich", "safetensors", "typer"}
    assert {"capture", "dask", "dev", "export", "fit", "notebook", "plot", "ray", "search", "test"} == set(
        metadata.get_all("Provides-Extra") or ())
    assert metadata["License-Expression"] == "Apache-2.0"


def test_it_finds_its_own_data_from_any_folder(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    wheel.extractall(site)
    empty.mkdir()
    code = (
        "import simmem\n"
        "from simmem.spec import library, load_device, load_model\n"
        "print(library.data_folder())\n"
        "print(*[load_device(name).name for name in library.names('device')])\n"
        "print(*[load_model(name).name for name in library.names('model')])\n"
        "print(*library.names('trace'))\n"
        "print(*library.names('reference'))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=empty, env={**os.environ, "PYTHONPATH": str(site)},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder, *lists = done.stdout.splitlines()
    assert Path(folder) == site / "simmem" / "_data"
    assert all(lists)
    assert list(empty.iterdir()) == []
