"""Does a page of `simmem report --html` work in a real browser, on any width, and with nothing from a network?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simmem.units import format_quantity
from tests.cli.pages import Pages, Parsed, parsed

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed; `make test` installs it")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium here: apt-get install chromium chromium-driver")

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
         "--window-size=1280,1000")
LEFT, RIGHT, ENTER = "\ue012", "\ue014", "\ue007"
NOTHING_RAN = "return window.hacked === undefined && document.images.length === 0 && document.scripts.length === 2"
ACCESSIBLE = """
const bad = [], all = (what) => [...document.querySelectorAll(what)];
for (const one of all("input, select")) if (!one.labels.length) bad.push(`no label: ${one.id}`);
for (const one of all("label")) if (one.htmlFor && !document.getElementById(one.htmlFor)) bad.push(one.htmlFor);
for (const one of all("table")) if (!one.caption || !one.tHead) bad.push("a table without caption or headings");
for (const one of all("th")) if (!one.scope) bad.push(`no scope: ${one.textContent}`);
for (const one of all("[role=img]")) if (!one.ariaLabel) bad.push("a picture without words");
const ids = all("[id]").map((one) => one.id);
if (new Set(ids).size !== ids.length) bad.push(`twice: ${ids.filter((id, at) => ids.indexOf(id) !== at)}`);
const root = document.documentElement;
if (root.scrollWidth > root.clientWidth) bad.push(`${root.scrollWidth} px in ${root.clientWidth}`);
return bad;"""


class Browser:
    """A browser, what it was told on its console, and what it asked for."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, width: int = 1280) -> Parsed:
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600})
        self.driver.get(path.as_uri())
        return parsed(path)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def all_texts(self, selector: str) -> list[str]:
        return list(self.run(
            "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)", selector))

    def press(self, selector: str, *keys: str) -> None:
        self.driver.find_element("css selector", selector).send_keys(*keys)

    def choose(self, selector: str, value: str) -> None:
        from selenium.webdriver.support.select import Select

        Select(self.driver.find_element("css selector", selector)).select_by_value(value)

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def assert_quiet(self, *pages: Path) -> None:
        """Nothing on the console, and nothing asked for but the pages themselves."""
        assert self.driver.get_log("browser") == []
        said = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = {m["params"]["request"]["url"] for m in said if m["method"] == "Network.requestWillBeSent"}
        # The empty tab that a browser begins with is its own; what stands in an address is not asked for.
        assert {url for url in asked if not url.startswith(("chrome://", "data:"))} == {one.as_uri() for one in pages}

    def assert_accessible(self) -> None:
        """Controls have labels, tables captions and headings, pictures words; the page is no wider than the window."""
        assert self.run(ACCESSIBLE) == []


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def seconds(value: float) -> str:
    return format_quantity(value, "s")


def test_what_if_controls_show_what_was_computed(browser: Browser, pages: Pages) -> None:
    page = pages.of_plan
    data = browser.open(page).data
    what, plan = data["what_if"], data["plan"]
    assert browser.text("#answer .big").startswith(seconds(plan["predicted"]["token_latency_s"]))
    assert browser.all_texts("#where table:first-of-type tbody td:last-child")[:len(plan["residency"])] == [
        format_quantity(one["bytes"], "bytes") for one in plan["residency"]]
    assert len(browser.all_texts("#whole rect")) >= len(data["step"]["ops"]) // 5

    def shown() -> tuple[str, str, str]:
        pictures = browser.run("return [...document.querySelectorAll('#what-if svg')].map((s) => s.outerHTML).join()")
        return browser.text("#if-latency").split(" a ")[0], browser.text("#if-how"), pictures

    budgets = sorted(range(len(what["budgets"])), key=lambda i: what["budgets"][i]["budget_bytes"]["dram"])
    one = what["factors"].index(1.0)

    def expected(budget: int, knob: int, factor: int) -> str:
        return seconds(what["budgets"][budget]["points"][knob][factor]["token_latency_s"])

    begin = shown()
    assert begin[0] == expected(0, 0, one)
    browser.press("#memory", LEFT)
    less = budgets[budgets.index(0) - 1]
    assert shown()[0] == expected(less, 0, one) != begin[0]
    assert "Planned anew within" in shown()[1]
    assert "among every policy" in shown()[1]
    assert shown()[2] != begin[2]
    browser.press("#link", RIGHT)
    assert shown()[0] == expected(less, 0, one + 1)
    assert "plan held fixed" in shown()[1]
    assert browser.run("return document.querySelector('#link').ariaValueText") == f"× {what['factors'][one + 1]:g}"
    at = next(i for i in range(1, len(what["values"])) if what["budgets"][less]["points"][i][one + 1])
    before = shown()
    browser.choose("#knob", str(at))
    assert shown()[0] == expected(less, at, one + 1) != before[0]
    assert "window_tokens set to" in shown()[1]
    assert shown()[2] != before[2]
    browser.press("#memory", *[RIGHT] * len(budgets))  # to the most, where another policy has no such knob
    assert browser.text("#if-latency") == "—"
    assert f"{what['budgets'][budgets[-1]]['policy']} has no window_tokens" in browser.text("#what-if [aria-live]")
    browser.click("#reset")
    assert shown() == begin
    # a dot chooses what it stands for
    browser.run("document.querySelector('#what-if circle:not(.now)').dispatchEvent(new Event('click'))")
    assert shown()[0] == expected(budgets[0], 0, one)
    close = browser.run("return document.querySelector('#zoomed').innerHTML")
    browser.press("#zoom", RIGHT)
    assert browser.run("return document.querySelector('#zoomed').innerHTML") != close
    browser.assert_accessible()
    browser.assert_quiet(page)


def test_a_faster_plan_that_is_not_recommended_is_named_where_it_is_set_aside(browser: Browser, pages: Pages) -> None:
    data = browser.open(pages.of_outgrown_plan).data
    aside = next(b["aside"] for b in data["what_if"]["budgets"] if b["aside"])
    said = f"hot-cold would take {seconds(aside['token_latency_s'])} and leave neurons out"
    assert browser.text("#memory-beside").startswith("From 300 MB on all weights fit")
    assert said in browser.text("#memory-beside")
    assert len(browser.all_texts("#what-if circle.beside")) == 2
    assert browser.all_texts("#what-if .caveat") == []
    browser.press("#memory", RIGHT)
    [caveat] = browser.all_texts("#what-if .caveat")
    assert said in caveat
    assert "[object" not in browser.text("#what-if")
    browser.press("#link", RIGHT)  # it was run with every link as it is
    assert browser.all_texts("#what-if circle.beside") == []
    assert browser.text("#memory-beside") == ""
    browser.press("#link", LEFT)
    assert said in browser.text("#memory-beside")
    browser.choose("#tier", "dram")
    assert browser.text("#memory-beside") == ""
    browser.assert_accessible()
    browser.assert_quiet(pages.of_outgrown_plan)


def test_a_page_fits_a_phone_and_hostile_names_do_nothing(browser: Browser, pages: Pages) -> None:
    page = pages.of_hostile_plan
    browser.open(page, width=360)
    assert browser.text("#answer ul").count("<img src=x onerror=window.hacked=1>") == 1
    browser.press("#memory", LEFT)
    assert browser.run(NOTHING_RAN)
    browser.assert_accessible()
    # Nothing that would run: neither by a name nor by the page's own policy.
    browser.assert_quiet(page)
    tried = "try { document.body.innerHTML = '<p>'; return 'set'; } catch (e) { return e.name; }"
    assert browser.run(tried) == "TypeError"
    asked = "return fetch('data:,').then(() => 'fetched', (e) => e.name)"
    assert browser.run(asked) == "TypeError"
    browser.driver.get_log("browser")  # the policy says on the console what it kept from being done


def test_cells_are_filtered_sorted_and_opened(browser: Browser, pages: Pages) -> None:
    page = pages.of_search
    cells = browser.open(page).data["cells"]
    n, bad = len(cells), [cell for cell in cells if cell["violations"]]
    assert 0 < len(bad) < n == 8

    def ids() -> list[str]:
        return browser.all_texts("tr.cell th button")

    assert ids() == [cell["id"] for cell in cells]
    browser.choose("#filter-status", "broken")
    assert ids() == [cell["id"] for cell in bad]
    assert browser.text("#count") == f"{len(bad)} of {n} cells shown"
    assert bad[0]["violations"][0]["cause"] in browser.text("tr.cell th")
    browser.choose("#filter-status", "")
    browser.press("#filter-words", "350m INT8")
    assert ids() == [cell["id"] for cell in cells if "350m" in cell["id"] and "int8" in cell["id"]]
    browser.run("const w = document.querySelector('#filter-words'); w.value = ''; w.dispatchEvent(new Event('input'))")
    browser.click("thead th:nth-child(4) button")
    took = {cell["id"]: cell["plan"]["predicted"]["token_latency_s"] for cell in cells if cell["plan"]}
    assert ids()[:len(took)] == sorted(took, key=lambda one: took[one])
    assert browser.run("return document.querySelector('thead th:nth-child(4)').ariaSort") == "ascending"
    browser.click("thead th:nth-child(4) button")
    assert ids()[:len(took)] == sorted(took, key=lambda one: took[one], reverse=True)
    browser.press("tr.cell th button", ENTER)
    first = next(cell for cell in cells if cell["id"] == ids()[0])
    assert browser.run("return document.querySelector('tr.cell th button').ariaExpanded") == "true"
    assert browser.run("return document.activeElement.textContent") == ids()[0]
    details = browser.text("td.details")
    assert first["plan"]["why"][0] in details
    assert format_quantity(first["plan"]["residency"][0]["bytes"], "bytes") in details
    browser.assert_accessible()
    browser.assert_quiet(page)
    hostile = pages.of_hostile_search
    browser.open(hostile, width=360)
    browser.press("tr.cell th button", ENTER)
    assert browser.run(NOTHING_RAN)
    browser.assert_accessible()
    browser.assert_quiet(hostile)
