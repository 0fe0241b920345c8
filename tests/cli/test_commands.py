"""Does each command do what it says: one JSON document that its schema allows, or a report that a terminal can show?"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import simmem as package
from simmem.planner.document import Plan
from simmem.policy.base import policies
from simmem.policy.catalogue import policy_entries
from simmem.spec import library, load_device, load_model
from simmem.trace import Trace, TraceHeader, digest_of, load_trace_file, save_trace
from tests.cli.running import Ended, Simmem, problems_of

QUESTION = {"device": "m1-max", "model": "opt-6.7b", "dram": "6.7GB", "weights": "fp16"}
OPTIONS = tuple(text for key, value in QUESTION.items() for text in (f"--{key}", value))


def flat(text: str) -> str:
    """Text without the line breaks a terminal's width put into it."""
    return re.sub(r"\s+", " ", text)


def well_set(ended: Ended, columns: int = 80) -> str:
    """A report that ended well, fits the terminal and sends nothing but text through a pipe."""
    assert ended.code == 0, ended.err
    assert ended.err == ""
    assert "\x1b" not in ended.out
    assert max(map(len, ended.out.splitlines())) <= columns
    assert "…" not in re.sub(r" … ", "", ended.out), "something was cut off"
    return ended.out


def document(ended: Ended, schema: str) -> dict[str, Any]:
    assert ended.code == 0, ended.err
    assert ended.err == ""
    found = ended.document
    assert found["schema"] == schema
    return found


@pytest.fixture(scope="module")
def planned() -> Plan:
    """The answer to `QUESTION`, from Python."""
    return package.plan(**QUESTION)


@pytest.fixture
def plan_file(planned: Plan, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(planned.to_json())
    return path


# --- plan and simulate ---------------------------------------------------------------------------------------------


def test_plan_says_in_python_in_json_and_in_a_file_the_same(simmem: Simmem, planned: Plan, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    ended = simmem("plan", *OPTIONS, "--out", out, "--json")
    assert document(ended, "simmem.plan/1") == json.loads(planned.to_json())
    assert json.loads(out.read_text()) == json.loads(ended.out)
    assert list(tmp_path.iterdir()) == [out]
    assert planned.policy.name == "flash-window"
    assert planned.policy.knobs["bundled"] is True


@pytest.mark.parametrize("columns", [80, 120])
def test_plan_reads_on_a_terminal(columns: int, simmem: Simmem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    ended = simmem("plan", "--device", "iphone15", "--model", "opt-6.7b")
    text = well_set(ended, columns)
    assert "ESTIMATED" in flat(text)[:120]  # the first thing it says
    assert "does not fit" in flat(text)
    assert "10.4 GB more than the budget" in flat(text)
    assert "link.flash.throughput " in text  # in one piece


def test_simulate_gives_the_latency_that_was_planned(simmem: Simmem, planned: Plan, plan_file: Path) -> None:
    found = document(simmem("simulate", plan_file, "--tokens", 64, "--json"), "simmem.simulation/1")
    assert found["planned_token_latency_s"] == planned.predicted.token_latency_s
    assert found["token_latency_s"] == pytest.approx(planned.predicted.token_latency_s, rel=1e-12)
    assert found["breakdown_s"] == pytest.approx(planned.predicted.breakdown_s, rel=1e-9, abs=1e-12)
    assert math.fsum(found["breakdown_s"].values()) == pytest.approx(found["token_latency_s"], rel=1e-9)
    assert found["bytes_per_token"] == pytest.approx(planned.predicted.bytes_per_token)
    for tier, held in found["peak_bytes"].items():
        assert held <= planned.memory[tier].budget_bytes
    assert "flash-window" in well_set(simmem("simulate", plan_file))


def test_other_programs_slow_a_plan_down(simmem: Simmem, plan_file: Path) -> None:
    alone = document(simmem("simulate", plan_file, "--json"), "simmem.simulation/1")
    loaded = document(simmem("simulate", plan_file, "--background", "link.flash=0.9", "--json"), "simmem.simulation/1")
    assert loaded["background"] == {"link.flash": 0.9}
    assert loaded["token_latency_s"] > alone["token_latency_s"]


@pytest.mark.parametrize("knobs", [{}, {"policy": "stream", "knobs": {"prefetch_layers": 2}}],
                         ids=["its own", "reads that begin before the token"])
def test_a_timeline_is_a_trace_that_perfetto_opens(knobs: dict[str, Any], simmem: Simmem, tmp_path: Path) -> None:
    written, timeline = tmp_path / "plan.json", tmp_path / "timeline.json"
    written.write_text(package.plan(**QUESTION, **knobs).to_json())
    ended = simmem("simulate", written, "--tokens", 3, "--timeline", timeline, "--json")
    result = document(ended, "simmem.simulation/1")
    events = json.loads(timeline.read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = defaultdict(list)
    for event in events:
        assert {"ph", "pid", "name"} <= set(event)
        assert event["ph"] in "MXC"
        if event["ph"] == "X":
            assert event["dur"] > 0
            assert event["ts"] >= 0
            spans[names[event["tid"]]].append((event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6))
        elif event["ph"] == "C":
            assert event["args"]["bytes"] >= 0
    last = max(end for track in spans.values() for _, end in track)
    tokens = result["tokens"]  # one where the policy does not look at the trace: all tokens are alike
    head_start = last - tokens * result["token_latency_s"]
    assert -1e-9 <= head_start <= result["token_latency_s"]
    assert (head_start > 1e-9) == bool(knobs)
    for stream, busy_s in result["busy_s"].items():
        track = sorted(spans[stream])
        assert sum(end - start for start, end in track) == pytest.approx(tokens * busy_s, rel=1e-9, abs=1e-12)
        for (_, end), (start, _) in pairwise(track):
            assert start >= end - 1e-9


# --- lists and sheets ----------------------------------------------------------------------------------------------

LISTS = {"devices": "device", "models": "model", "traces": "trace"}


@pytest.mark.parametrize("command", [*LISTS, "policies"])
def test_a_list_names_everything(command: str, simmem: Simmem) -> None:
    names = library.names(LISTS[command]) if command in LISTS else sorted(policies())
    found = document(simmem(command, "--json"), f"simmem.{command}/1")
    assert [entry["name"] for entry in found[command]] == names
    text = well_set(simmem(command))
    assert all(name in text for name in names)


@pytest.mark.parametrize("command", [*LISTS, "policies"])
def test_a_list_imports_nothing_heavy(command: str) -> None:
    code = ("import sys\nfrom simmem.cli import main\n"
            f"try:\n    main([{command!r}])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
            "print([m for m in ('numpy', 'networkx', 'safetensors', 'simpy', 'simmem.spec.base') if m in sys.modules],"
            " file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_the_catalogue_says_what_the_registry_says() -> None:
    stated = {entry.name: (entry.summary, entry.uses_trace) for entry in policy_entries()}
    assert stated == {name: (policy.summary, policy.uses_trace) for name, policy in policies().items()}


def test_a_list_counts_the_figures_of_a_device(simmem: Simmem) -> None:
    for entry in simmem("devices", "--json").document["devices"]:
        device = load_device(entry["name"])
        kinds = [figure.kind for figure in device.figures().values()]
        assert (entry["figures"], entry["estimated_figures"]) == (len(kinds), kinds.count("estimated"))
        assert entry["memory"] == {tier: memory.capacity.value for tier, memory in device.memory.items()}


@pytest.mark.parametrize("name", library.names("device"))
def test_the_sheet_of_a_device_has_every_figure_with_its_source(name: str, simmem: Simmem) -> None:
    device, text = load_device(name), flat(well_set(simmem("devices", name)))
    rows = {row["key"]: row for row in document(simmem("devices", name, "--json"), "simmem.device-sheet/1")["figures"]}
    for key, figure in device.figures().items():
        assert rows[key]["value"] == figure.value
        low, high = rows[key]["range_90"]
        assert low <= figure.value <= high
        assert flat(figure.source) in text
        assert all(row in text for row in figure.spent)
    data = tomllib.loads(library.resolve("device", name).read_text())
    assert len(rows) == len(device.figures()) + sum("value" in v for e in data.get("engine", {}).values()
                                                    for v in e.values() if isinstance(v, dict))


@pytest.mark.parametrize("name", library.names("model"))
def test_the_sheet_of_a_model_adds_up(name: str, simmem: Simmem) -> None:
    found = document(simmem("models", name, "--json"), "simmem.model-sheet/1")
    assert found["params"] == sum(group["params"] for group in found["groups"]) == load_model(name).params
    for precision, size in found["bytes"].items():
        assert size == pytest.approx(sum(group["bytes"][precision] for group in found["groups"]))
    text = well_set(simmem("models", name))
    assert f"{found['params']:,}".replace(",", " ") in text
    assert all(group["name"] in text for group in found["groups"])


@pytest.mark.parametrize("name", library.names("trace"))
def test_the_sheet_of_a_trace_says_where_it_comes_from(name: str, simmem: Simmem) -> None:
    found = document(simmem("traces", name, "--json"), "simmem.trace-sheet/1")
    header = found["header"]
    text = flat(well_set(simmem("traces", name)))
    assert ("captured from a real run" if header["kind"] == "captured" else "synthetic: drawn from") in text
    assert flat(header["criterion"]) in text
    assert header["digest"] in text
    for law in found["fitted_to"]:
        assert law["law"] == pytest.approx(law["published"], rel=law["tolerance"])
    assert 0 < found["active_share"] < 1
    windows = {1, 2, 4, 8} if header["unit"] == "expert" else {1, 2, 5, 10}
    assert {w["tokens"] for w in found["statistics"]["windows"]} == windows


@pytest.mark.parametrize("name", sorted(policies()))
def test_the_sheet_of_a_policy_has_every_knob(name: str, simmem: Simmem) -> None:
    found = document(simmem("policies", name, "--json"), "simmem.policy-sheet/1")
    text = flat(well_set(simmem("policies", name)))
    assert found["knobs"]
    for knob in found["knobs"]:
        assert knob["name"] in text
        assert knob["values"]


@pytest.mark.parametrize(("command", "other", "name"), [
    ("devices", "M1Max", "m1-max"), ("models", "facebook/opt-6.7b", "opt-6.7b"),
    ("devices", str(library.resolve("device", "m1-max")), "m1-max"),
    ("traces", str(library.resolve("trace", "opt-published")), "opt-published")])
def test_an_alias_and_a_path_show_the_same(command: str, other: str, name: str, simmem: Simmem) -> None:
    assert simmem(command, other, "--json").document == simmem(command, name, "--json").document


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch, simmem: Simmem) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in simmem("models", "phi-2").out
    monkeypatch.setenv("NO_COLOR", "1")
    coloured = re.findall(r"\x1b\[([0-9;]*)m", simmem("models", "phi-2").out)
    assert not any(re.match(r"(3|4|9)\d", code) for codes in coloured for code in codes.split(";"))


# --- traces: replay and capture ------------------------------------------------------------------------------------


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    """A captured trace of a model that simmem does not know: 40 tokens, 2 layers of 20 units."""
    active = np.packbits(np.random.default_rng(7).random((40, 2, 20)) < 0.3, axis=2, bitorder="little")
    header = TraceHeader(
        name="tiny", kind="captured", model="nobody-knows", n_tokens=40, n_layers=2, n_units=20, unit_bytes=1000.0,
        criterion="gate", threshold="above 0", records="active", predictor="gate", text="none",
        digest=digest_of(active))
    save_trace(Trace(header, active), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_replay_counts_what_a_cache_would(simmem: Simmem, trace_file: Path) -> None:
    found = document(simmem("replay", trace_file, "--policy", "lru", "--size", "15kB", "--json"), "simmem.replay/1")
    (curve,), (cold,) = found["curves"], found["cold"]["curves"]
    used = np.unpackbits(load_trace_file(trace_file).active, axis=2, count=20, bitorder="little").astype(bool)
    hits = {True: 0, False: 0}
    misses = {True: 0, False: 0}
    for layer in range(2):
        recent: list[int] = []  # least recent first
        for token in range(40):
            early = token < found["cold"]["tokens"]
            units = np.flatnonzero(used[token, layer]).tolist()
            hits[early] += len(set(units) & set(recent))
            misses[early] += len(set(units) - set(recent))
            recent = [*(u for u in recent if u not in units), *units][-15:]  # a token's own units are pinned
    assert curve["hit_ratio"] == pytest.approx([hits[False] / (hits[False] + misses[False])])
    assert curve["bytes_per_token"] == pytest.approx([1000 * misses[False] / (40 - found["cold"]["tokens"])])
    assert cold["hit_ratio"] == pytest.approx([hits[True] / (hits[True] + misses[True])])
    assert (curve["sizes_bytes"], curve["scope"], found["model"]) == ([15000.0], "layer", "nobody-knows")


def test_replay_of_a_synthetic_trace_takes_a_shape(simmem: Simmem) -> None:
    own = document(simmem("replay", "opt-published", "--policy", "window", "--window", 4, "--json"), "simmem.replay/1")
    assert own["model"] == "opt-6.7b"
    assert own["unit_bytes"] == load_model("opt-6.7b").unit_bytes("fp16")
    other = document(simmem("replay", "opt-published", "--model", "opt-125m", "--policy", "window", "--window", 4,
                            "--weights", "int8", "--json"), "simmem.replay/1")
    assert other["unit_bytes"] == load_model("opt-125m").unit_bytes("int8")
    assert other["n_layers"] == 12


def test_replay_reads_on_a_terminal(simmem: Simmem, trace_file: Path) -> None:
    text = well_set(simmem("replay", trace_file, "--global", "--size", "8kB", "--size", "30kB"))
    assert "captured trace" in text
    assert "one cache for all layers" in text
    assert "Cold: the first" in text


def test_capture_writes_a_trace_and_reports_progress_apart(simmem: Simmem, trace_file: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")

    def quick(model: str, text: Path, *, progress: Any, **asked: Any) -> Trace:
        progress("looking at the model", 0.5)
        assert (model, asked["criterion"], asked["sparsity"], asked["tokens"]) == ("smollm2-135m", "gate", 0.7, 40)
        return load_trace_file(trace_file)

    monkeypatch.setattr("simmem.runtime.capture.capture", quick)
    out = tmp_path / "new.safetensors"
    arguments = ("capture", "--model", "smollm2-135m", "--out", out, "--criterion", "gate", "--sparsity", 0.7,
                 "--tokens", 40)
    ended = simmem(*arguments, "--json")
    assert ended.code == 0
    assert ended.document["schema"] == "simmem.trace/1"
    assert "looking at the model" in ended.err
    assert ended.err.endswith("\n")
    assert load_trace_file(out).header.digest == ended.document["digest"]
    text = simmem(*arguments).out
    assert "captured from a real run" in text
    assert "nobody-knows" in text


# --- reproduce and schema ------------------------------------------------------------------------------------------


def test_reproduce_takes_anyones_rows(simmem: Simmem, tmp_path: Path) -> None:
    # transformers counts 125 239 296 parameters in facebook/opt-125m; in fp16 each is two bytes.
    rows = tmp_path / "rows.toml"
    row = """
[[row]]
id = "{id}"
system = "mine"
device = "m1-max"
model = "opt-125m"
policy = "resident"
knobs = {{ agent = "gpu" }}
workload = {{ weights = "fp16" }}
quantity = "residency.0.bytes"
published = {published}
unit = "B"
tolerance = 0.001
source = "counted by transformers, times two"
"""
    rows.write_text('schema = "simmem.reference/1"\n' + row.format(id="right", published=2 * 125_239_296))
    ended = simmem("reproduce", "--reference", rows, "--json")
    found = document(ended, "simmem.reproduce/1")
    assert [r["status"] for r in found["rows"]] == ["pass"]
    assert found["summary"]["n"] == 1
    assert "right" in well_set(simmem("reproduce", "--reference", rows))
    assert problems_of(tomllib.loads(rows.read_text()), "reference") == []

    rows.write_text(rows.read_text() + row.format(id="wrong", published=1.0))
    ended = simmem("reproduce", "--reference", rows, "--json")
    assert ended.code == 1
    assert [r["status"] for r in ended.document["rows"]] == ["pass", "fail"]


def test_schemas_are_one_document_and_each_by_name(simmem: Simmem) -> None:
    ended = simmem("schema")
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert {"simmem.plan/1", "simmem.error/1", "simmem.replay/1", "simmem.reproduce/1", "simmem.simulation/1",
            "simmem.device/1", "simmem.model/1", "simmem.trace/1", "simmem.reference/1"} <= set(found)
    for name, schema in found.items():
        assert json.loads(simmem("schema", name.split(".")[1].split("/")[0]).out) == schema
        assert problems_of({}, name), "an empty document is no document"


@pytest.mark.parametrize("what", ["device", "model", "trace", "reference"])
def test_every_shipped_file_is_what_its_schema_allows(what: str) -> None:
    for name in library.names(what):
        path = library.resolve(what, name)
        if path.suffix == ".toml":
            data = tomllib.loads(path.read_text(encoding="utf-8"))
            assert problems_of(data, data["schema"]) == []


def test_a_schema_refuses_what_the_loader_refuses() -> None:
    data = tomllib.loads(library.resolve("device", "m1-max").read_text(encoding="utf-8"))
    data["link"]["flash"]["rate"]["value"] = 6.1
    data["memory"]["dram"]["colour"] = "green"
    assert len(problems_of(data, "device")) == 2


def test_version_and_help(simmem: Simmem) -> None:
    assert simmem("--version").out == f"{package.__version__}\n"
    assert simmem().out == simmem("--help").out
    for command in ("plan", "simulate", "capture", "replay", "reproduce", "devices", "models", "traces", "policies",
                    "schema"):
        assert command in simmem("--help").out
        assert "Usage" in simmem(command, "--help").out
