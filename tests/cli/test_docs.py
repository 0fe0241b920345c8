"""Do the examples in the documentation run, end as they say, and print what they show?

Fenced blocks of sh, console, python and toml are run page by page, in order, in one empty folder each; `simmem` runs in
this process. HTML comments right before a block, which no reader sees, say what is special:

    <!-- not run: REASON -->  nothing of the block is run (a GPU, minutes, a download)
    <!-- exit: 3 -->          the code that its last command ends with, where that is not 0
    <!-- file: my.toml -->    the block is the text of that file; toml blocks always are

console has commands after `$ ` and what they print; there `…` stands for anything within a line, or for any lines.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from simmem.cli.app import command
from simmem.policy import base
from tests.cli.running import Simmem

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
_BLOCK = re.compile(r"(?P<marks>(?:^<!--[^\n]*-->\n)*)^```(?P<language>\w+)\n(?P<body>.*?)^```$",
                    re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- (not run|exit|file): (.+?) -->")
_COMMAND = re.compile(r"(^|^ {4}|^\$ |`)(simmem [a-z][^`\n]*)", re.MULTILINE)
RUN = ("sh", "console", "python", "toml")


@dataclass(frozen=True)
class Block:
    """A fenced block, what its marks say, and where it stands."""

    language: str
    body: str
    marks: dict[str, str]
    where: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(found["language"], found["body"], dict(_MARK.findall(found["marks"])),
                  f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, found.start('body'))}")
            for found in _BLOCK.finditer(text) if found["language"] in RUN or "<!-- file:" in found["marks"]]


def to_run(page: Path) -> list[Block]:
    return [b for b in blocks(page) if "not run" not in b.marks]


def commands(body: str) -> Iterator[tuple[str, str]]:
    """(command, what is shown below it) of a block of sh (nothing is shown) or of console."""
    lines = iter(re.sub(r"\\\n\s*", "", body).splitlines())
    asked, shown = "", list[str]()
    console = body.startswith("$ ")
    for line in lines:
        if console and not line.startswith("$ "):
            shown.append(line)
            continue
        if asked:
            yield asked, "\n".join(shown)
        asked, shown = line.removeprefix("$ ").strip(), []
    if asked:
        yield asked, "\n".join(shown)


def matches(shown: str, printed: str) -> bool:
    """Is that what is printed? How many blanks stand between words does not matter."""
    lines = [" ".join(line.split()) for line in shown.rstrip().splitlines()]
    pattern = "".join(r"(?:.*\n)*?" if line == "…" else ".*".join(map(re.escape, line.split("…"))) + r"\n"
                      for line in lines)
    return re.fullmatch(pattern, "".join(" ".join(x.split()) + "\n" for x in printed.rstrip().splitlines())) is not None


def run_line(line: str, simmem: Simmem, where: str) -> tuple[int, str]:
    """Exit code and stdout; a redirection with > is understood for simmem."""
    words = shlex.split(line, comments=True)
    if not words:
        return 0, ""
    if words[0] != "simmem":
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{where}: {line}\n{done.stderr}"
        return done.returncode, done.stdout
    target = words[words.index(">") + 1] if ">" in words else None
    ended = simmem(*words[1:words.index(">") if target else None])
    if target:
        Path(target).write_text(ended.out, encoding="utf-8")
    print(ended.err)  # shown where the test fails
    return ended.code, "" if target else ended.out


@pytest.mark.parametrize("page", [p for p in PAGES if to_run(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_run(page: Path, simmem: Simmem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    base.policies()
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))  # a policy of an example stays in its page
    names: dict[str, Any] = {"__name__": "example"}
    for block in to_run(page):
        if "file" in block.marks:
            target = tmp_path / block.marks["file"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.body, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.body, block.where, "exec"), names)
        else:
            steps = list(commands(block.body))
            for index, (line, shown) in enumerate(steps):
                wanted = int(block.marks.get("exit", 0)) if index == len(steps) - 1 else 0
                code, printed = run_line(line, simmem, block.where)
                assert code == wanted, f"{block.where}: {line}\nended with {code}, not {wanted}\n{printed}"
                if shown:
                    assert matches(shown, printed), f"{block.where}: {line}\nprinted\n{printed}\nbut shown is\n{shown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") % 2 == 0, "a block that does not end"
    for block in blocks(page):
        assert len(block.marks.get("not run", "a reason")) > 5, f"{block.where}: say why it is not run"
        if block.language == "toml" and "not run" not in block.marks:
            assert "file" in block.marks, f"{block.where}: name the file"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path) -> None:
    known = command().commands
    for before, line in _COMMAND.findall(re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))):
        words = line.split("#")[0].split()
        if not before and words[1] not in known:  # a sentence that begins a line
            continue
        assert words[1] in known, f"{page.name}: {line}"
        options = {name for one in known[words[1]].params for name in (*one.opts, *one.secondary_opts)}
        asked = {w.split("=")[0].strip(".,;:)") for w in words[2:] if w.startswith("--")}
        assert asked <= options | {"--help"}, f"{page.name}: {line}: {asked - options}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"
