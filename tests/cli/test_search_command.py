"""Does the gate catch what makes a plan worse and say why, stay green where nothing changed, and lose nothing?"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from simmem import __version__
from simmem.planner.api import plan
from simmem.planner.grid.spec import load_search
from simmem.policy.base import policy_named
from simmem.spec.library import resolve
from tests.cli.running import Simmem, problems_of
from tests.cli.searching import FIRST, ROOT, SPEC, Project, command, environment, many_cells

EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture
def project(tmp_path: Path, simmem: Simmem) -> Project:
    return Project(tmp_path, simmem)


def causes(document: dict[str, Any], limit: str, figure: str | None = None) -> list[str]:
    return [one["cause"] for cell in document["cells"] for one in cell["violations"]
            if one["limit"] == limit and figure in (None, one["figure"])]


# --- the gate ------------------------------------------------------------------------------------------------------


def test_stays_green_where_nothing_changed(project: Project) -> None:
    project.save()
    first = project.run(code=0)
    assert [cell["status"] for cell in first["cells"]] == ["pass", "pass"]
    assert first["cells"][0]["id"] == FIRST
    assert {cell["compared_with"] for cell in first["cells"]} == {cell["id"] for cell in first["cells"]}
    alone = plan(str(project.device), "opt-125m", prompt=16, new_tokens=4, weights="fp16", dram="100 MB",
                 policy="stream", knobs={"agent": "gpu"})
    assert first["cells"][0]["plan"]["predicted"] == json.loads(alone.to_json())["predicted"]
    project.change(project.device, "[memory.flash]", "# a remark\n[memory.flash]")  # says nothing else
    again = project.run(code=0)
    assert again == first
    assert again["changed_inputs"] == [] and [cell["changes"] for cell in again["cells"]] == [[], []]


def test_catches_a_device_figure(project: Project) -> None:
    project.save()
    project.change(project.device, 'rate = { value = "1.53 GB/s", kind = "estimated", range = ["1.2 GB/s", "1.8 GB/s"]',
                   'rate = { value = "1.45 GB/s", kind = "estimated", range = ["1.2 GB/s", "1.8 GB/s"]')
    found = project.run(code=1)
    slower = causes(found, "max_regress", "token_latency_s")
    assert len(slower) == 2
    for cause in slower:
        assert "device phone.toml changed (link.flash.rate 1.53 GB/s → 1.45 GB/s" in cause
        assert "allowed +2.0 %" in cause
    assert [(one["what"], one["name"]) for one in found["changed_inputs"]] == [("device", "phone.toml")]
    project.change(project.spec, "[[grid]]", '[limits]\nmax_regress = "20 %"\n[[grid]]')
    small = project.run(code=0)  # within the limit, and said all the same
    assert [one["name"] for one in small["changed_inputs"]] == ["phone.toml"]
    assert "link.flash.rate" in small["cells"][0]["changes"][0]


def test_catches_a_policy_that_was_made_worse(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.save()
    policy = type(policy_named("stream"))
    decode = policy.decode

    def slower(self: Any, context: Any, block: Any, rows: Any) -> Any:
        halved = {**block.columns, "resident_ratio": block.columns["resident_ratio"] / 2}
        return decode(self, context, replace(block, columns=halved), rows)

    monkeypatch.setattr(policy, "decode", slower)
    found = project.run(code=1)
    for cause in causes(found, "max_regress", "token_latency_s"):
        assert "from the same inputs, simmem's own code or its environment answers otherwise" in cause
    assert found["changed_inputs"] == []


def test_names_the_policy_and_the_knob_that_moved(project: Project) -> None:
    stream = '{ policy = "stream", knobs = { agent = "gpu" } }'
    project.change(project.spec, stream, '{ name = "s", policy = "stream", knobs = { resident_ratio = 0.2 } }')
    project.change(project.spec, "100 MB", "200 MB")
    project.save()
    project.change(project.spec, "resident_ratio = 0.2", "resident_ratio = 0.1")
    causes_now = causes(project.run(code=1), "max_regress", "token_latency_s")
    assert len(causes_now) == 2 and all("knob resident_ratio 0.2 → 0.1" in cause for cause in causes_now)
    project.change(project.spec, "200 MB", "400 MB")
    project.change(project.spec, 'policy = "stream", knobs = { resident_ratio = 0.1 }', 'policy = "resident"')
    found = project.run("--junit", project.folder / "j.xml", code=1)  # faster, and larger
    assert all("policy stream → resident" in cell["changes"] for cell in found["cells"])
    assert causes(found, "max_regress", "token_latency_s") == []
    assert all("held knob resident_ratio 0.1" not in cause for cause in causes(found, "max_regress"))
    larger = causes(found, "max_regress", "held_bytes")
    assert len(larger) == 2 and all("bytes held outside storage" in cause for cause in larger)


def test_catches_a_budget_that_was_cut(project: Project) -> None:
    project.save()
    project.change(project.spec, '"100 MB"', '"80 MB"')
    found = project.run(code=1)
    assert found["cells"][0]["compared_with"] == FIRST  # by its place, as the budget is in its name
    assert all("dram 100 MB → 80 MB" in cause for cause in causes(found, "max_regress", "token_latency_s"))
    assert found["new_cells"] == [] and found["left_out"] == []


def test_an_infeasible_cell_breaks_unless_it_was_expected(project: Project, simmem: Simmem) -> None:
    project.save()
    project.change(project.spec, '"100 MB"', '"5 MB"')
    found = project.run(code=1)
    cell = found["cells"][0]
    assert cell["status"] == "infeasible" and cell["plan"] is None
    assert cell["tier"] == "dram" and cell["missing_bytes"] > 0
    cause = causes(found, "feasible")[0]
    assert "more bytes of dram" in cause and "stream no longer fits" in cause
    project.change(project.spec, "[[grid]]", '[[grid]]\nexpect = "infeasible"')
    found = project.run(code=0)
    assert [cell["status"] for cell in found["cells"]] == ["infeasible"] * 2 and found["summary"]["broken"] == 0
    project.change(project.spec, '"5 MB"', '"100 MB"')
    assert "nothing was expected to fit" in causes(project.run(code=1), "infeasible")[0]
    project.change(project.spec, '"infeasible"', '"any"')
    project.run(code=0)


@pytest.mark.parametrize(("limit", "says"), [
    ('max_latency = "1 ms"', "allowed at most 1 ms"),
    ('min_tokens_per_s = "900 tokens/s"', "allowed at least 900 tokens/s"),
    ('max_dram = "20 MB"', "allowed at most 20 MB"),
    ('max_energy = "1 J"', "cannot be judged: energy of this plan has no sourced figure"),  # true of this phone
])
def test_each_limit_gates(project: Project, limit: str, says: str) -> None:
    project.change(project.spec, "[[grid]]", f"[limits]\n{limit}\n[[grid]]")
    found = project.run(code=1)
    name = limit.partition(" ")[0]
    assert all(says in cause for cause in causes(found, name)) and len(causes(found, name)) == 2
    one = found["cells"][0]["violations"][0]
    assert one["value"] != one["allowed"] and found["cells"][0]["limits"][name] == one["allowed"]


def test_energy_gates_where_it_is_known(project: Project) -> None:
    project.spec.write_text(SPEC.partition("[[grid]]")[0] + """limits = { max_energy = "1 uJ" }
[[grid]]
devices = ["h100-sxm"]
models = ["opt-125m"]
workloads = [{ prompt_tokens = 16, new_tokens = 4, weights = "fp16" }]
policies = ["resident"]
""")
    [cause] = causes(project.run(code=1), "max_energy")
    assert "allowed at most 1 µJ" in cause


def test_a_changed_model_or_trace_is_always_reported(project: Project) -> None:
    model, law = project.folder / "small.toml", project.folder / "law.toml"
    shutil.copy(resolve("model", "opt-125m"), model)
    shutil.copy(resolve("trace", "opt-published"), law)
    project.change(project.spec, 'models = ["opt-125m"]', 'models = ["small.toml"]\ntrace = "law.toml"')
    project.change(project.spec, 'policies = [{ policy = "stream", knobs = { agent = "gpu" } }]',
                   'policies = ["flash-window"]\nlimits = { max_regress = "1000 %" }')
    project.change(project.spec, "100 MB", "300 MB")
    project.save()
    project.change(model, "OPT 125M", "OPT 125M, again")
    found = project.run(code=0)
    [changed] = found["changed_inputs"]
    assert changed["what"] == "model" and changed["changes"] == ["title OPT 125M → OPT 125M, again"]
    project.change(law, "value = 0.1074", "value = 0.15")
    found = project.run(code=0)
    assert {one["what"] for one in found["changed_inputs"]} == {"model", "trace"}
    assert all("trace opt-published changed" in " ".join(cell["changes"]) for cell in found["cells"])


def test_a_quality_limit_leaves_out_what_nobody_measured(project: Project) -> None:
    project.change(project.spec, "[[grid]]", '[limits]\nmax_quality_loss = "5 %"\n[[grid]]')
    found = project.run(code=1)
    fp16, int8 = found["cells"]
    assert fp16["status"] == "pass" and fp16["plan"]["quality"]["perplexity_ratio"] == 1.0
    assert int8["status"] == "infeasible" and "perplexity" in int8["violations"][0]["cause"]


def damaged_figure(text: str) -> str:
    return re.sub(r'"token_latency_s": ([0-9])', r'"token_latency_s": 9\1', text, count=1)


@pytest.mark.parametrize(("damage", "says"), [
    (lambda text: text[: len(text) // 2], "not valid JSON"),
    (lambda text: text.replace("simmem.search-baseline/1", "simmem.search-baseline/7"), "simmem.search-baseline/7"),
    (damaged_figure, "not as it was written"),
    (lambda text: "[]", "expected an object"),
])
def test_a_corrupted_baseline_is_refused(project: Project, damage: Callable[[str], str], says: str) -> None:
    project.save()
    text = project.baseline.read_text()
    assert damage(text) != text
    project.baseline.write_text(damage(text))
    error = project.fails()
    assert says in error["message"] and error["file"] == str(project.baseline)
    project.save()  # which replaces it
    project.run(code=0)


# --- the search file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new", "key", "says"), [
    ("[[grid]]", "[limits]\nmax_latency = 0.3\n[[grid]]", "limits.max_latency", "unit"),
    ("[[grid]]", '[limits]\nmax_latency = "300"\n[[grid]]', "limits.max_latency", "no unit"),
    ("[[grid]]", '[limits]\nmax_dram = "3 Gb"\n[[grid]]', "limits.max_dram", "bits"),
    ("[[grid]]", '[limits]\nmin_tokens_per_s = "5"\n[[grid]]', "limits.min_tokens_per_s", "5 token/s"),
    ("[[grid]]", "[limits]\nmax_regress = 2\n[[grid]]", "limits.max_regress", "200.0 %"),
    ("[[grid]]", '[limits]\nmax_latencies = "1 s"\n[[grid]]', "limits.max_latencies", "did you mean max_latency?"),
    ("[[grid]]", "[[grid]]\nbatches = 3", "grid.0.batches", "expected one of name, devices"),
    ('"100 MB"', '"200"', "grid.0.budgets.0.dram", "no unit"),
    ('"100 MB"', '"7 TB"', "grid", "dram): found '7 TB'"),
    ("spec/1", "spec/2", "schema", "simmem.search-spec/2"),
    ('"opt-125m"', '"opt-125"', "grid", "did you mean opt-125m"),
    ('"stream"', '"streem"', "grid", "did you mean stream"),
    ("prompt_tokens = 16", "prompt_tokens = 4096", "grid", "past the"),
    ('["fp16", "int8"]', '["fp16", "fp16"]', "grid.0", "stands twice"),
])
def test_a_wrong_search_file_is_one_clear_line(project: Project, old: str, new: str, key: str, says: str) -> None:
    project.change(project.spec, old, new)
    error = project.fails()
    assert error["file"] == str(project.spec) and error["key"] == key and says in error["message"]


def test_the_schema_allows_what_the_docs_show(tmp_path: Path) -> None:
    shown = (ROOT / "docs" / "search.md").read_text(encoding="utf-8").split("```toml\n")[1].partition("```")[0]
    (tmp_path / "shown.toml").write_text(shown, encoding="utf-8")
    assert len(load_search(tmp_path / "shown.toml")[1]) == 2 * 4 * 3 * 3
    for text in (shown, (EXAMPLES / "search.toml").read_text(encoding="utf-8"), SPEC):
        assert problems_of(tomllib.loads(text), "search-spec") == []
    assert problems_of(tomllib.loads(shown.replace('"300 ms"', "0.3")), "search-spec") != []


# --- what is written -----------------------------------------------------------------------------------------------


def test_junit_and_markdown_say_what_broke(project: Project, simmem: Simmem, tmp_path: Path) -> None:
    project.save()
    project.change(project.spec, '"100 MB"', '"80 MB"')
    junit, markdown = tmp_path / "j.xml", tmp_path / "m.md"
    ended = simmem("search", project.spec, "--baseline", project.baseline, "--junit", junit, "--markdown", markdown)
    assert ended.code == 1
    assert "2 of 2 cells broken" in ended.out and "max_regress" in ended.out
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert suite is not None and suite.get("tests") == "2" and suite.get("failures") == "2"
    assert len(suite.findall("testcase/failure")) == 2
    assert "dram 100 MB → 80 MB" in (suite.findall("testcase/failure")[0].get("message") or "")
    text = markdown.read_text(encoding="utf-8")
    assert "❌" in text.splitlines()[0] and "dram 100 MB → 80 MB" in text and "<details>" in text


def test_files_are_not_mixed_up(project: Project, tmp_path: Path) -> None:
    project.save()
    assert "also what is read" in project.fails("--junit", project.spec)["message"]
    assert "two files" in project.fails("--junit", tmp_path / "x", "--markdown", tmp_path / "x")["message"]
    assert "--results" in project.fails("--resume")["message"]


# --- results, one by one -------------------------------------------------------------------------------------------


def killed_at(project: Project, delay_s: float, results: Path, *arguments: object) -> None:
    process = subprocess.Popen(command(project, "--results", results, "--resume", *arguments), env=environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.wait()


def interrupted(project: Project, times: int) -> None:
    many_cells(project)
    began = time.monotonic()
    whole = subprocess.run(command(project, "--json"), env=environment(), capture_output=True, check=True).stdout
    took_s = time.monotonic() - began
    chance = random.Random(8)
    for index in range(times):
        results = project.folder / f"{index}.sqlite"
        killed_at(project, chance.uniform(0.0, took_s), results, "--jobs", 1 + index % 2)
        again = subprocess.run(command(project, "--results", results, "--resume", "--json"), env=environment(),
                               capture_output=True, check=True).stdout
        assert again == whole


def test_killed_and_resumed_is_the_same(project: Project) -> None:
    interrupted(project, 1)


@pytest.mark.slow
def test_killed_at_twenty_moments_and_resumed_is_the_same(project: Project) -> None:
    interrupted(project, 20)


def test_results_belong_to_one_search(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "r.sqlite"
    whole = project.run("--results", results, code=0)
    assert "--resume" in project.fails("--results", results)["message"]
    with monkeypatch.context() as patched:  # nothing is planned again, and limits may be others by now
        patched.setattr("simmem.planner.grid.fanout.answer_cell", None)
        assert project.run("--results", results, "--resume", code=0) == whole
        project.change(project.spec, "[[grid]]", '[limits]\nmax_latency = "1 ms"\n[[grid]]')
        project.run("--results", results, "--resume", code=1)
    with closing(sqlite3.connect(results)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert "another search is writing it" in project.run("--results", results, "--resume", code=4)["message"]
    project.change(project.device, '"1.53 GB/s"', '"1.45 GB/s"')
    assert "another inputs" in project.fails("--results", results, "--resume")["message"]
    project.change(project.spec, "prompt_tokens = 16", "prompt_tokens = 17")
    assert "another" in project.fails("--results", results, "--resume")["message"]
    results.write_bytes(b"no database" * 1000)
    error = project.fails("--results", results, "--resume")
    assert "not a file of results" in error["message"] and error["file"] == str(results)


def test_two_jobs_give_the_bytes_of_one(project: Project, simmem: Simmem) -> None:
    one, two = (simmem("search", project.spec, "--json", "--jobs", jobs) for jobs in (1, 2))
    assert one.code == two.code == 0
    assert one.out == two.out


def workers_of(pid: int) -> list[int]:
    """Processes below this one that run loky's workers."""
    lists = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    children = [int(child) for text in lists for child in text.split()]
    return [child for child in children if b"popen_loky" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds worker processes through /proc")
def test_a_dead_worker_is_one_clear_line_and_loses_nothing(project: Project) -> None:
    many_cells(project)
    results = project.folder / "r.sqlite"
    process = subprocess.Popen(command(project, "--jobs", "2", "--results", results, "--json"), env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()  # "2 of 12 cells": some are there
    assert "of 12 cells" in line
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 4, err
    assert json.loads(out)["kind"] == "MachineError" and "a worker process died" in json.loads(out)["message"]
    assert err.splitlines()[-1].startswith("simmem: ") and "Traceback" not in err
    whole = project.run(code=0)
    assert project.run("--results", results, "--resume", code=0) == whole


# loky's own thread may still hand out work when the first refusal has emptied its list.
@pytest.mark.filterwarnings("ignore:Exception in thread ExecutorManagerThread")
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_worker_of_another_version_is_refused(project: Project, monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    if jobs == 1:
        monkeypatch.setattr("simmem.planner.grid.cells.__version__", "9.9.9")
    else:
        monkeypatch.setattr("simmem.planner.grid.fanout.__version__", "9.9.9")
    document = project.run("--jobs", jobs, code=4)
    assert "a worker runs simmem" in document["message"] and "9.9.9" in document["message"]


def test_a_dask_cluster_gives_the_same(project: Project) -> None:
    pytest.importorskip("distributed")
    one = subprocess.run(command(project, "--json"), env=environment(), capture_output=True, check=True).stdout
    two = subprocess.run(command(project, "--json", "--backend", "dask", "--jobs", "2"), env=environment(),
                         capture_output=True, check=True).stdout
    assert two == one


# --- the example in the docs ---------------------------------------------------------------------------------------


def test_the_github_actions_example_works(tmp_path: Path) -> None:
    workflow = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text(encoding="utf-8"))
    assert set(workflow) == {"name", True, "permissions", "jobs"}  # YAML reads `on` as true
    [job] = workflow["jobs"].values()
    steps = {step["name"]: step for step in job["steps"] if "name" in step}
    assert f"simmem[search]=={__version__}" in steps["Install simmem"]["run"]
    shutil.copy(EXAMPLES / "search.toml", tmp_path)
    program = f'exec {sys.executable} -c "from simmem.cli import main; main()" "$@"'
    (tmp_path / "simmem").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "simmem").chmod(0o755)
    summary = tmp_path / "summary.md"
    run = {**environment(), "PATH": f"{tmp_path}:{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": str(summary)}
    for name in ("Search", "Summary"):
        done = subprocess.run(["bash", "-eo", "pipefail", "-c", steps[name]["run"]], cwd=tmp_path, env=run,
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing broken" in summary.read_text(encoding="utf-8")
    for kept in steps["Keep the results"]["with"]["path"].split():
        assert (tmp_path / kept).is_file()
