"""Is docs/scoreboard.md what `simmem scoreboard` prints, and does it say what the records and the rows say?"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from simmem.errors import SpecError
from simmem.report.scoreboard import costs_table, markdown_page, recorded_tables
from simmem.spec import library
from simmem.validation.scoreboard import fitted_costs, read_record, records, scoreboard
from tests.cli.running import problems_of

PAGE = Path(__file__).parents[2] / "docs" / "scoreboard.md"
MEASURED = library.data_folder() / "validate" / "measured"
AGAIN = "run `make scoreboard` and look at what changed"
_NUMBER = re.compile(r"\d+\.\d+")


def alike(one: str, other: str) -> bool:
    """The same words and whole numbers; decimals may differ in the last digit, as processors round differently."""
    if _NUMBER.sub("#", one) != _NUMBER.sub("#", other):
        return False
    pairs = zip(_NUMBER.findall(one), _NUMBER.findall(other), strict=True)
    return all(abs(float(a) - float(b)) < 1.5 * 10.0 ** -len(a.split(".")[1]) for a, b in pairs)


def test_what_is_recorded_stands_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert recorded_tables(records()) in page, AGAIN
    assert costs_table(fitted_costs()) in page, AGAIN


def test_one_set_stands_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8").splitlines()
    found = scoreboard(["moe-infinity"])
    assert problems_of(json.loads(found.model_dump_json(by_alias=True)), "scoreboard") == []
    lines = [line for line in markdown_page(found).splitlines() if line.startswith("| moe-infinity |")]
    assert len(lines) == 4
    for line in lines:
        assert any(alike(line, other) for other in page), f"{line}\n{AGAIN}"


@pytest.mark.slow
def test_the_page_is_what_is_printed() -> None:  # a minute
    printed, page = markdown_page(scoreboard()).splitlines(), PAGE.read_text(encoding="utf-8").splitlines()
    assert len(printed) == len(page), AGAIN
    for line, other in zip(printed, page, strict=True):
        assert alike(line, other), f"{line}\n{other}\n{AGAIN}"


def test_summaries_are_those_that_were_recorded() -> None:
    judged = [r for r in records() if r.summaries]
    assert len(judged) >= 9
    for record in judged:
        recorded = json.loads((MEASURED / record.name / "validate.json").read_text(encoding="utf-8"))["by_storage"]
        assert set(recorded) == set(record.summaries)
        for storage, summary in record.summaries.items():
            found = summary.model_dump()
            for key, value in recorded[storage].items():
                assert found[key] == (None if value is None else pytest.approx(value, rel=1e-9)), (record.name, key)


def test_versions_are_those_of_the_raw_measurements_that_an_installed_package_has_not() -> None:
    compared = [r for r in records() if (MEASURED / r.name / "here.measurements.json").is_file()]
    assert len(compared) >= 9
    for record in compared:
        raw = json.loads((MEASURED / record.name / "here.measurements.json").read_text(encoding="utf-8"))["versions"]
        assert {k: v for k, v in record.versions.items() if k != "torch"} == {
            k: v for k, v in raw.items() if k != "torch"}, record.name


def test_what_a_record_lacks_is_said_to_lack() -> None:
    named = {r.name.split("/")[-1]: r for r in records()}
    again = named["opt-6.7b-again"]  # broken off: predictions and samples alone
    assert again.failed is None
    assert again.summaries == {}
    line = next(x for x in recorded_tables([again]).splitlines() if x.startswith("| `"))
    assert line.count("not recorded") == 11
    assert named["ladder"].summaries["real"].mape_beside is None  # no controls yet
    assert any("too noisy" in gate for gate in named["opt-6.7b-one-stretch"].failed or [])


def test_a_run_of_ones_own_is_read_from_its_document_alone(tmp_path: Path) -> None:
    copy = tmp_path / "mine.json"
    recorded = json.loads((MEASURED / "epyc-2core-vm-runs" / "quick" / "validate.json").read_text(encoding="utf-8"))
    copy.write_text(json.dumps(recorded | {"device": "mine | `x`\n"}), encoding="utf-8")
    mine = read_record(copy, str(copy))
    whole = read_record(MEASURED / "epyc-2core-vm-runs" / "quick", "quick")
    assert (mine.summaries, mine.written, mine.versions) == (whole.summaries, None, {"torch": "2.13.0+cpu"})
    assert all(line.startswith("|") for line in recorded_tables([mine]).splitlines() if line)
    copy.write_text('{"schema": "simmem.run/1"}', encoding="utf-8")
    with pytest.raises(SpecError, match=r"expected 'simmem\.validate/1'"):
        read_record(copy, str(copy))
