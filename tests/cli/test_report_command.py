"""Is a report one page that asks for nothing, runs nothing but itself, and says what the planner says?"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from simmem.planner.api import plan
from simmem.planner.document import Plan
from simmem.planner.whatif import what_if
from simmem.report.html import reading
from simmem.spec.library import resolve
from tests.cli.pages import HOSTILE, PLAN, Pages, digest, parsed
from tests.cli.running import Simmem


@pytest.mark.parametrize("what", ["plan", "search"])
def test_a_page_is_one_file_that_asks_for_nothing_and_names_from_others_stay_text(what: str, pages: Pages) -> None:
    path = pages.of_hostile_plan if what == "plan" else pages.of_hostile_search
    found = parsed(path)
    tags = [tag for tag, _ in found.elements]
    assert set(tags) == {"html", "head", "meta", "link", "title", "style", "body", "main", "h1", "noscript", "p",
                         "script"}
    assert tags.count("script") == 2  # the data and the code, whatever the document says
    addresses = [value for _, at in found.elements for key, value in at.items() if key in ("src", "href", "action")]
    assert addresses == ["data:,"]  # the icon: an empty one
    [style], [_, script] = found.text_of("style"), found.text_of("script")
    assert found.policy["default-src"] == found.policy["connect-src"] == found.policy["form-action"] == ["'none'"]
    assert found.policy["style-src"] == [digest(style)]
    assert found.policy["script-src"] == [digest(script)]
    assert not re.search(r"url\(|@import|innerHTML|eval\(|fetch\(|XMLHttpRequest|WebSocket", style + script)
    assert re.findall(r"https?://\S+?(?=\")", style + script) == ["http://www.w3.org/2000/svg"]  # no address: a name
    assert HOSTILE in json.dumps(found.data, ensure_ascii=False).replace('\\"', '"')


def test_the_same_document_gives_the_same_page(simmem: Simmem, pages: Pages, tmp_path: Path) -> None:
    for document, page in ((pages.plan, pages.of_plan), (pages.search, pages.of_search)):
        ended = simmem("report", document, "--html", tmp_path / "again.html")
        assert (ended.code, ended.out, ended.err) == (0, "", "")
        assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_what_ifs_are_what_the_planner_and_the_simulator_say(simmem: Simmem, pages: Pages, tmp_path: Path) -> None:
    written = json.loads(pages.plan.read_text())
    found = parsed(pages.of_plan).data["what_if"]
    assert found["replans"] == "among every policy"
    assert found["base_s"] == pytest.approx(written["predicted"]["token_latency_s"], rel=1e-12)
    assert (found["link"], found["knob"]) == ("flash", "window_tokens")
    base, *others = found["budgets"]
    assert base["knobs"] == written["policy"]["knobs"]

    # A budget: what `plan` answers within it.
    half = next(b for b in others if b["budget_bytes"]["dram"] < 0.6 * base["budget_bytes"]["dram"] and b["policy"])
    again = simmem(*PLAN[:-1], f"{half['budget_bytes']['dram']:.0f}B", "--json").document
    assert (half["policy"], half["knobs"]) == (again["policy"]["name"], again["policy"]["knobs"])
    point = half["points"][0][found["factors"].index(1.0)]
    # over 8 tokens, not 64
    assert point["token_latency_s"] == pytest.approx(again["predicted"]["token_latency_s"], rel=0.02)
    assert point["first_token_s"] == pytest.approx(again["predicted"]["first_token_s"], rel=1e-9)
    assert sum(point["breakdown_s"].values()) == pytest.approx(point["token_latency_s"], rel=1e-9)

    # A bandwidth: what `simulate` says on a device file with twice of it.
    text = resolve("device", "iphone15").read_text(encoding="utf-8")
    head, flash = text.split("[link.flash]")
    doubled, n = re.subn(r'(?m)^(\w*rate|latency|request_time) = \{ value = "([\d.]+) ([^"]+)"(.*?)\}', twice, flash)
    assert n >= 2
    (tmp_path / "fast.toml").write_text(f"{head}[link.flash]{doubled}", encoding="utf-8")
    fast = tmp_path / "fast.json"
    fast.write_text(json.dumps({**written, "device": str(tmp_path / "fast.toml")}), encoding="utf-8")
    simulated = simmem("simulate", fast, "--tokens", 8, "--json").document
    twice_as_fast = base["points"][0][found["factors"].index(2.0)]
    assert twice_as_fast["token_latency_s"] == pytest.approx(simulated["token_latency_s"], rel=1e-6)

    # A knob: what `simulate` says of the plan with it.
    own = written["policy"]["knobs"]["window_tokens"]
    at = next(i for i, value in enumerate(found["values"]) if value not in (None, own) and base["points"][i][0])
    other = tmp_path / "other.json"
    knobs = {**written["policy"]["knobs"], "window_tokens": int(found["values"][at])}
    other.write_text(json.dumps({**written, "policy": {"name": "flash-window", "knobs": knobs}}), encoding="utf-8")
    simulated = simmem("simulate", other, "--tokens", 8, "--json").document
    windowed = base["points"][at][found["factors"].index(1.0)]
    assert windowed["token_latency_s"] == pytest.approx(simulated["token_latency_s"], rel=1e-9)


def twice(match: re.Match[str]) -> str:
    field, value, unit, rest = match.groups()
    factor = 0.5 if field in ("latency", "request_time") else 2.0
    rest = re.sub(r"range = \[[^\]]*\],?", "", rest)
    return f'{field} = {{ value = "{float(value) * factor:.12g} {unit}"{rest}}}'


def test_a_plan_that_was_not_the_best_is_not_replanned_as_if_it_were(small_plan: str) -> None:
    held = Plan.model_validate_json(small_plan)
    _, alone = what_if(plan("iphone15", "opt-125m", weights="int4", dram="100MB", policy="stream"))
    assert alone.replans.startswith("with stream alone, as")
    assert {b.policy for b in alone.budgets} <= {"stream", None}
    assert "whereas this plan holds some" in what_if(held)[1].replans


def test_where_all_weights_fit_the_faster_plan_that_drops_work_stands_beside(simmem: Simmem, pages: Pages) -> None:
    found = parsed(pages.of_outgrown_plan).data
    budgets = {b["budget_bytes"]["vram"]: b for b in found["what_if"]["budgets"] if b["tier"] != "dram"}
    assert found["plan"]["policy"]["name"] == "hot-cold"
    assert {size: b["aside"] and b["aside"]["policy"] for size, b in budgets.items()} == {
        1e8: None, 1.5e8: None, 2e8: None, 3e8: "hot-cold", 4e8: "hot-cold"}
    more = budgets[3e8]
    assert more["policy"] == "resident"
    asked = simmem("plan", "--device", "rtx4090-pc", "--model", "opt-125m", "--weights", "fp16", "--vram", "300MB",
                   "--policy", "hot-cold", "--json").document
    took = more["points"][0][found["what_if"]["factors"].index(1.0)]["token_latency_s"]
    assert more["aside"]["token_latency_s"] < took
    assert more["aside"]["token_latency_s"] == pytest.approx(asked["predicted"]["token_latency_s"], rel=0.02)


def test_the_timeline_is_the_one_that_simulate_writes(simmem: Simmem, pages: Pages, tmp_path: Path) -> None:
    found, trace = parsed(pages.of_plan).data, tmp_path / "t.json"
    assert simmem("simulate", pages.plan, "--tokens", 1, "--timeline", trace).code == 0
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    ops = [found["step"]["ops"][at:at + 5] for at in range(0, len(found["step"]["ops"]), 5)]
    assert len(ops) == len(events) > 100
    early_us = min(0.0, min(op[3] for op in ops) / 1e3)
    drawn = sorted((op[3] / 1e3 - early_us, op[4] / 1e3, *found["kinds"][op[1]]) for op in ops)
    written = sorted((e["ts"], e["dur"], e["name"].split(".")[0], e["cat"]) for e in events)
    for one, other in zip(drawn, written, strict=True):
        assert one[2:] == other[2:]
        assert one[:2] == pytest.approx(other[:2], abs=2e-3)  # to the nanosecond


def test_without_a_page_the_text_is_shown_again(simmem: Simmem, pages: Pages, tmp_path: Path, small_plan: str) -> None:
    (tmp_path / "plan.json").write_text(small_plan)
    ended = simmem("report", tmp_path / "plan.json")
    assert (ended.code, ended.err) == (0, "")
    assert "flash-window, int4 weights" in ended.out
    spec = pages.search.with_suffix(".toml")
    ended = simmem("report", pages.search)
    assert (ended.code, ended.err) == (0, "")  # the gate is `search`
    assert ended.out == simmem("search", spec).out


WRONG: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "is not valid JSON"),
    "a list": ([], "expected an object"),
    "another schema": ({"schema": "simmem.trace/1"}, "schema: found \"simmem.trace/1\", expected a plan"),
    "no schema": ({}, "schema: found null"),
    "a field missing": (lambda p: p.pop("policy"), "policy: is missing"),
    "an unknown field": (lambda p: p.update(colour=1), "colour: is not a key"),
    "an unknown knob": (lambda p: p["policy"]["knobs"].update(wheels=4), "wheels"),
    "an unknown device": (lambda p: p.update(device="abacus"), "abacus"),
    "an unknown part": (lambda p: p["predicted"]["breakdown_s"].update(tea=1.0), "found 'tea'"),
    "an unknown link": (lambda p: p["predicted"]["bytes_per_token"].update(tube=1.0), "found 'tube'"),
    "an unknown tier": (lambda p: p["memory"].update(attic={"used_bytes": 1, "budget_bytes": 2}), "found 'attic'"),
    "no time": (lambda p: p["predicted"].update(token_latency_s=0.0), "predicted.token_latency_s: found 0.0"),
    "not a number": (lambda p: p["bound"].update(token_latency_s=float("nan")), "NaN is not a number of JSON"),
    "another trace": (lambda p: p["trace"].update(digest="0" * 64), "its digest differs"),
    "an unknown objective": (lambda p: p.update(objective="glory"), "glory"),
}


@pytest.fixture(scope="module")
def small_plan(tmp_path_factory: pytest.TempPathFactory) -> str:
    return plan("iphone15", "opt-125m", weights="int4", dram="100MB", policy="flash-window",
                knobs={"predictor": "low-rank", "prefetch_layers": 0, "window_tokens": 1}).to_json()


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_document_is_one_clear_line(name: str, simmem: Simmem, tmp_path: Path, small_plan: str) -> None:
    change, says = WRONG[name]
    path, out = tmp_path / "p.json", tmp_path / "p.html"
    if callable(change):
        data = json.loads(small_plan)
        change(data)
        path.write_text(json.dumps(data))
    else:
        path.write_text(change if isinstance(change, str) else json.dumps(change))
    ended = simmem("report", path, "--html", out)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1), ended
    assert str(path) in ended.err or name in ("an unknown device", "an unknown objective")
    assert says in ended.err
    assert not out.exists()


def test_where_a_page_cannot_go_and_what_is_too_large(
        simmem: Simmem, tmp_path: Path, small_plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = tmp_path / "p.json", tmp_path / "p.html"
    path.write_text(small_plan)
    for target, says in ((path, "is also what is read"), (tmp_path, "is a folder"),
                         (tmp_path / "no" / "p.html", "does not exist")):
        ended = simmem("report", path, "--html", target)
        assert (ended.code, ended.out) == (2, "")
        assert says in ended.err
    assert path.read_text() == small_plan
    for document, says in ((tmp_path / "none.json", "no such file"), (tmp_path, "is not a file")):
        ended = simmem("report", document, "--html", out)
        assert (ended.code, ended.err.count("\n")) == (2, 1)
        assert says in ended.err
    with monkeypatch.context() as patch:
        patch.setattr(reading, "MAX_BYTES", 100)
        ended = simmem("report", path, "--html", out)
        assert ended.code == 2
        assert "longer than the 100 bytes" in ended.err

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    out.write_text("what was there before")
    monkeypatch.setattr(os, "fsync", full)
    ended = simmem("report", path, "--html", out)
    assert (ended.code, ended.out) == (4, "")
    assert "No space left on device" in ended.err
    assert out.read_text() == "what was there before"
    assert {one.name for one in tmp_path.iterdir()} == {"p.json", "p.html"}


def test_text_of_a_stranger_is_neither_markup_nor_does_it_move_the_cursor(simmem: Simmem, pages: Pages, tmp_path: Path
                                                                          ) -> None:
    document = json.loads(pages.search.read_text(encoding="utf-8"))
    document["cells"][0]["id"] = "[/x][bold]phone"
    path = tmp_path / "search.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    ended = simmem("report", path)
    assert ended.code == 0 and "[/x][bold]phone" in ended.out.replace("\n", "")
    document["cells"][0]["id"] = "\x1b[2Jphone"
    path.write_text(json.dumps(document), encoding="utf-8")
    ended = simmem("report", path)
    assert (ended.code, ended.out) == (2, "") and "characters that control a terminal" in ended.err
