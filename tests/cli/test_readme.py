"""Is the plan that the README shows the one that the command prints?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.running import Simmem

README = Path(__file__).parents[2] / "README.md"


def test_the_plan_in_the_readme_is_what_is_printed(simmem: Simmem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    _, shown, _ = re.split("<!-- plan-output: (?:begin|end) -->", README.read_text(encoding="utf-8"))
    command, *lines = shown.strip().removeprefix("```console\n").removesuffix("```").splitlines()
    assert command.startswith("$ simmem ")
    printed = simmem(*command.removeprefix("$ simmem ").split()).out
    assert [line.rstrip() for line in printed.rstrip().splitlines()] == [line.rstrip() for line in lines]
