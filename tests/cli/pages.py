"""What is in a page of `simmem report --html`: its elements, its data, the digests of what it may run?"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from simmem.cli import main

__all__ = ["HOSTILE", "PLAN", "Pages", "Parsed", "digest", "parsed"]

HOSTILE = "<img src=x onerror=window.hacked=1></script><script>window.hacked=1</script>'\"&"


@dataclass
class Parsed(HTMLParser):
    """Elements with their attributes, and the text inside of style and script."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("style", "script"):
            self.texts.append((self._inside, data))

    def text_of(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text_of("script")[0])
        return found

    @property
    def policy(self) -> dict[str, list[str]]:
        """The content security policy: directive → what it allows."""
        [content] = [at["content"] for tag, at in self.elements
                     if tag == "meta" and at.get("http-equiv") == "Content-Security-Policy"]
        assert content is not None
        return {words[0]: words[1:] for words in map(str.split, content.split(";"))}


def parsed(path: Path) -> Parsed:
    found = Parsed()
    found.feed(path.read_text(encoding="utf-8"))
    found.close()
    return found


def digest(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


PLAN = ("plan", "--device", "iphone15", "--model", "opt-1.3b", "--weights", "int4", "--dram", "600MB")
SPEC = """schema = "simmem.search-spec/1"
[[grid]]
devices = ["iphone15"]
models = ["opt-125m", "opt-350m"]
workloads = [{ prompt_tokens = 16, new_tokens = 4, weights = ["fp16", "int8"] }]
budgets = [{ dram = "150 MB" }, { dram = "600 MB" }]
policies = [{ policy = ["resident", "stream"] }]
limits = { max_latency = "12 ms" }
"""


class Pages:
    """Documents and their pages, each made once by the command and only where a test asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def plan(self) -> Path:
        """Part of the weights is read for each token; more memory would change that."""
        with ended(0):
            main([*PLAN, "--out", str(self.folder / "plan.json")])
        return self.folder / "plan.json"

    @cached_property
    def search(self) -> Path:
        """Eight cells, some of which break their limit."""
        (self.folder / "search.toml").write_text(SPEC)
        with ended(1) as out:
            main(["search", str(self.folder / "search.toml"), "--json"])
        path = self.folder / "search.json"
        path.write_text(out.getvalue(), encoding="utf-8")
        return path

    @cached_property
    def of_plan(self) -> Path:
        return self._page(self.plan, "plan.html")

    @cached_property
    def of_outgrown_plan(self) -> Path:
        """A plan that leaves neurons out; with half as much memory again all weights would fit."""
        document = self.folder / "outgrown.json"
        with ended(0):
            main(["plan", "--device", "rtx4090-pc", "--model", "opt-125m", "--weights", "fp16", "--vram", "200MB",
                  "--out", str(document)])
        return self._page(document, "outgrown.html")

    @cached_property
    def of_search(self) -> Path:
        return self._page(self.search, "search.html")

    @cached_property
    def of_hostile_plan(self) -> Path:
        return self._page(hostile_plan(self.plan, self.folder), "hostile-plan.html")

    @cached_property
    def of_hostile_search(self) -> Path:
        return self._page(hostile_search(self.search, self.folder), "hostile-search.html")

    def _page(self, document: Path, name: str) -> Path:
        with ended(0) as out:
            main(["report", str(document), "--html", str(self.folder / name)])
        assert out.getvalue() == ""
        return self.folder / name


@contextmanager
def ended(code: int) -> Iterator[StringIO]:
    """The command in it has to end so; what it prints on stdout."""
    with redirect_stdout(StringIO()) as out, pytest.raises(SystemExit) as stop:
        yield out
    assert stop.value.code == code


def hostile_plan(plan: Path, folder: Path) -> Path:
    """The same with names that would run, wherever a plan from others may say what it likes."""
    data = json.loads(plan.read_text(encoding="utf-8"))
    data["why"].append(HOSTILE)
    data["residency"][0]["tensors"] = data["quality"]["source"] = data["bound"]["resource"] = HOSTILE
    data["baselines"][0]["policy"] = data["alternatives"] = data["pareto"][0]["policy"] = HOSTILE
    data["alternatives"] = [{**data["pareto"][0], "weights": HOSTILE, "knobs": {HOSTILE: HOSTILE}}]
    data["sensitivity"][0]["figure"] = data["evidence"]["cost_model"] = data["evidence"]["weakest_kind"] = HOSTILE
    data["predicted"]["cache"] = {HOSTILE: {"hit_ratio": 0.5, "bytes_per_token": 1.0}}
    path = folder / "<img src=x onerror=window.hacked=1>.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def hostile_search(search: Path, folder: Path) -> Path:
    data = json.loads(search.read_text(encoding="utf-8"))
    for cell in data["cells"]:
        cell["id"] += HOSTILE
        cell["changes"] = [HOSTILE]
        cell["question"]["device"] = HOSTILE
        cell["infeasible"] = HOSTILE
        if cell["plan"]:
            cell["plan"]["policy"] = {"name": HOSTILE, "knobs": {HOSTILE: HOSTILE}}
            cell["plan"]["why"] = cell["plan"]["residency"][0]["tensors"] = HOSTILE
            cell["plan"]["why"] = [HOSTILE]
        for violation in cell["violations"]:
            violation["limit"] = violation["cause"] = HOSTILE
    data["spec"] = data["simmem"] = HOSTILE + "\ud800"
    data["left_out"] = [HOSTILE]
    path = folder / "hostile.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path
