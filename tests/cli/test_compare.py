"""Are two devices compared figure by figure, with what only one of them has shown as missing?"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from simmem.spec import library
from tests.cli.running import Ended, Simmem

GIB = 2.0**30


def keys_in_the_file(name: str) -> set[str]:
    """Key paths of everything in a device's TOML file that has a value and a kind."""
    found = set()

    def walk(part: Any, path: tuple[str, ...]) -> None:
        if isinstance(part, dict) and {"value", "kind"} <= part.keys():
            found.add(".".join(path))
        elif isinstance(part, dict):
            for key, inner in part.items():
                walk(inner, (*path, key))

    walk(tomllib.loads(library.resolve("device", name).read_text(encoding="utf-8")), ())
    return found


def refused(ended: Ended) -> str:
    """The one line of a command that found its arguments wrong."""
    assert (ended.code, ended.out) == (2, "")
    (line,) = ended.err.splitlines()
    return line


def test_what_flexgen_fitted_stands_beside_what_is_nominal(simmem: Simmem) -> None:
    found = simmem("devices", "--compare", "flexgen-t4", "t4-fitted", "--json").document
    assert (found["schema"], found["a"]["name"], found["b"]["name"]) == (
        "simmem.device-comparison/1", "flexgen-t4", "flexgen-t4-fitted")
    rows = {row["key"]: row for row in found["figures"]}
    disk = rows["link.flash.rate"]  # FlexGen: about 2 GB/s in the paper, 0.473 GiB/s in experimental/cost_model.py
    assert (disk["a"]["kind"], disk["b"]["kind"]) == ("datasheet", "fitted")
    assert disk["b"]["value"] == pytest.approx(0.473 * GIB)
    assert disk["ratio"] == pytest.approx(0.473 * GIB / 2e9)
    assert rows["link.h2d.rate"]["b"]["value"] == pytest.approx(12.89 * GIB)
    assert rows["agent.gpu.flop_share"]["b"]["value"] == pytest.approx(21.24 / 65.1, abs=5e-4)


@pytest.mark.parametrize(("a", "b"), [("m1-max", "rtx3090-pc"), ("flexgen-t4", "flexgen-t4-fitted"),
                                      ("nvme-gen4-pc", "gh200")])
def test_every_figure_of_both_is_there_and_missing_ones_say_so(a: str, b: str, simmem: Simmem) -> None:
    rows = {row["key"]: row for row in simmem("devices", "--compare", a, b, "--json").document["figures"]}
    back = {row["key"]: row for row in simmem("devices", "--compare", b, a, "--json").document["figures"]}
    of_a, of_b = keys_in_the_file(a), keys_in_the_file(b)
    assert {key for key, row in rows.items() if row["a"] is not None} == of_a
    assert {key for key, row in rows.items() if row["b"] is not None} == of_b
    assert rows.keys() == back.keys() == of_a | of_b
    for key, row in rows.items():
        assert (row["a"], row["b"]) == (back[key]["b"], back[key]["a"])
        assert (row["ratio"] is None) == (key not in of_a & of_b)
        if row["ratio"] is not None:
            assert row["ratio"] * row["a"]["value"] == pytest.approx(row["b"]["value"])
            assert row["ratio"] * back[key]["ratio"] == pytest.approx(1.0)

    ended = simmem("devices", "--compare", a, b)
    lines = ended.out.splitlines()
    assert (ended.code, ended.err) == (0, "")
    assert max(map(len, lines)) <= 80
    alone = sum(key not in of_a & of_b for key in rows)
    assert sum(line.rstrip().endswith("—") for line in lines) == alone, "no ratio where a figure is missing"
    assert f"{len(of_a & of_b)} figures of both" in ended.out


@pytest.mark.parametrize(("arguments", "says"), [
    (("t4", "flexgen-t4"), "'t4' and 'flexgen-t4', which are the same device"),
    (("t4", "h20x"), "no device named 'h20x'; did you mean h200"),
    (("t4",), "--compare: requires 2 arguments"),
    (("t4", "a100", "h200"), "two devices and nothing else, found 'h200' as well"),
    (("t4", "nowhere/h200.toml"), "nowhere/h200.toml: no such device file"),
])
def test_anything_but_two_devices_is_refused(arguments: tuple[str, ...], says: str, simmem: Simmem) -> None:
    assert says in refused(simmem("devices", "--compare", *arguments))


def test_a_path_to_a_built_in_device_is_that_device(simmem: Simmem, tmp_path: Path) -> None:
    path = library.resolve("device", "t4")
    assert "same device" in refused(simmem("devices", "--compare", "t4", path))
    mine = tmp_path / "mine.toml"
    mine.write_text(path.read_text(encoding="utf-8").replace('value = "1.5 TB"', 'value = "3 TB"'), encoding="utf-8")
    rows = simmem("devices", "--compare", "t4", mine, "--json").document["figures"]
    assert {row["key"]: row["ratio"] for row in rows if row["ratio"] != 1} == {"memory.flash.capacity": 2.0}


def test_a_sheet_shows_the_other_account_beside_its_own(simmem: Simmem) -> None:
    found = simmem("devices", "flexgen-t4", "--json").document
    own, other = ({row["key"]: row for row in found[what]} for what in ("figures", "other_figures"))
    assert found["compare_with"] == "flexgen-t4-fitted"
    assert other["link.flash.rate"]["value"] == pytest.approx(0.473 * GIB)
    assert all((row["value"], row["kind"]) != (own[key]["value"], own[key]["kind"]) for key, row in other.items())
    assert re.search(r"\n  rate +2 GB/s  datasheet.*\n +≠ +507\.9 MB/s  fitted\n", simmem("devices", "flexgen-t4").out)
    plain = simmem("devices", "m1-max", "--json").document
    assert (plain["compare_with"], plain["other_figures"]) == (None, [])


def test_another_account_that_does_not_exist_is_one_clear_error(simmem: Simmem, tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    text = library.resolve("device", "flexgen-t4").read_text(encoding="utf-8")
    mine.write_text(text.replace('compare_with = "flexgen-t4-fitted"', 'compare_with = "flexgen-t4-fited"'),
                    encoding="utf-8")
    assert f"{mine}: compare_with: no device named 'flexgen-t4-fited'" in refused(simmem("devices", mine))
