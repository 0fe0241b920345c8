"""Samples, drafts and backends on the command line; and what a full disk, Ctrl-C or a missing package end in."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import Simmem
from tests.cli.searching import Project, command, environment, many_cells


@pytest.fixture
def project(tmp_path: Path, simmem: Simmem) -> Project:
    return Project(tmp_path, simmem)


# --- samples and drafts --------------------------------------------------------------------------------------------


def sampled(project: Project) -> None:
    """A sample over sizes, knobs and prompts whose boundary is searched: what fits, and is fast enough."""
    project.change(project.spec, '"100 MB"', '{ from = "20 MB", to = "400 MB" }')
    project.change(project.spec, "agent = \"gpu\"", 'agent = "gpu", resident_ratio = { from = 0.0, to = 0.9 }')
    project.change(project.spec, "[[grid]]", '[[grid]]\nsample = { cells = 6, refine = 6 }\nexpect = "any"')


def test_a_refined_sample_is_the_same_for_any_jobs_and_when_resumed(project: Project, simmem: Simmem,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simmem.planner.grid.refine.ROUND", 2)
    sampled(project)
    results = project.folder / "r.sqlite"
    whole = simmem("search", project.spec, "--json", "--results", results)
    document = whole.document
    assert whole.code == 0
    cells, boundary = {c["id"]: c for c in document["cells"]}, document["boundary"]
    assert [c["refined"] for c in document["cells"]] == [False] * 6 + [True] * 6 and boundary
    for pair in boundary:
        inside, outside = cells[pair["passes"]], cells[pair["breaks"]]
        assert (inside["status"], outside["status"]) == ("pass", "infeasible")
        assert inside["question"]["weights"] == outside["question"]["weights"]
    two = simmem("search", project.spec, "--json", "--jobs", 2, "--block", 3)
    assert two.out == whole.out
    # Half of it refined, stopped there, and gone on with to the end.
    half = project.folder / "half.sqlite"
    project.change(project.spec, "refine = 6", "refine = 2")
    assert len(simmem("search", project.spec, "--json", "--results", half).document["cells"]) == 8
    project.change(project.spec, "refine = 2", "refine = 6")
    assert simmem("search", project.spec, "--json", "--results", half, "--resume").out == whole.out
    text = simmem("search", project.spec, "--results", results, "--resume").out
    assert "6 of the cells were added" in text and "turns between" in text


def test_a_draft_is_an_axis(project: Project) -> None:
    """Held to what `plan` says of the same; a changed draft model is an input like any other."""
    from simmem.planner.api import plan

    draft = 'draft = ["none", "small.toml"], acceptance = [0.5, 0.9], draft_length = 2'
    project.change(project.spec, 'weights = ["fp16", "int8"]', f'weights = "fp16", {draft}')
    project.change(project.spec, '"opt-125m"', '"opt-1.3b"')
    project.change(project.spec, '"100 MB"', '"3 GB"')
    small = project.folder / "small.toml"
    from simmem.spec.library import resolve

    small.write_text(resolve("model", "opt-125m").read_text(encoding="utf-8"), encoding="utf-8")
    project.save()
    found = project.run(code=0)
    assert [cell["id"].split("/")[2] for cell in found["cells"]] == [
        "p16-n4-fp16", "p16-n4-fp16-draft=small.toml@0.5,length=2", "p16-n4-fp16-draft=small.toml@0.9,length=2"]
    alone = plan(str(project.device), "opt-1.3b", prompt=16, new_tokens=4, weights="fp16", dram="3 GB",
                 policy="stream", knobs={"agent": "gpu", "draft_length": 2}, draft=str(small), acceptance=0.9)
    assert found["cells"][2]["plan"]["predicted"] == json.loads(alone.to_json())["predicted"]
    assert found["cells"][0]["plan"]["workload"]["draft"] is None
    project.change(small, "OPT 125M", "OPT 125M, again")
    [changed] = project.run(code=0)["changed_inputs"]
    assert (changed["what"], changed["name"]) == ("model", "small.toml")
    project.change(project.spec, "acceptance = [0.5, 0.9], ", "")
    assert "acceptance" in project.fails()["message"]


# --- backends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_a_backend_that_is_not_installed(project: Project, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec",
                        lambda name, *rest: None if name in ("distributed", "ray") else found(name, *rest))
    error = project.run("--backend", backend, code=4)
    assert error["kind"] == "MachineError" and f"pip install 'simmem[{backend}]'" in error["message"]


# --- what may end a search -----------------------------------------------------------------------------------------


def started(project: Project, results: Path, *arguments: object, **how: Any) -> subprocess.Popen[str]:
    """A search that has kept its first cells."""
    process = subprocess.Popen(command(project, "--results", results, *arguments), env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "of 12 cells" in line, line + process.stderr.read()
    return process


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_is_one_line_and_loses_nothing(project: Project, jobs: int) -> None:
    """As a terminal sends it: to the workers too."""
    many_cells(project)
    results = project.folder / "r.sqlite"
    process = started(project, results, "--jobs", jobs, start_new_session=True)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    said = [line for line in err.splitlines() if " cells" not in line]
    assert len(said) == 1 and said[0].startswith("simmem: ") and "interrupted" in said[0], err
    whole = project.run(code=0)
    assert project.run("--results", results, "--resume", code=0) == whole


def test_a_full_disk_is_one_line_and_loses_nothing(project: Project) -> None:
    """A file that may not grow, so that SQLite fails as it does where the disk is full."""
    many_cells(project)
    results = project.folder / "r.sqlite"
    ended = subprocess.run(
        command(project, "--results", results, "--jobs", 2, "--json"), env=environment(), capture_output=True,
        text=True, check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)))
    assert ended.returncode == 4, ended.stderr
    error = json.loads(ended.stdout)
    assert error["kind"] == "MachineError" and error["file"] == str(results) and "\n" not in error["message"]
    assert "Traceback" not in ended.stderr and ended.stderr.splitlines()[-1].startswith("simmem: ")
    whole = project.run(code=0)
    assert project.run("--results", results, "--resume", code=0) == whole
