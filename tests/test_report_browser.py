"""A report in a real Chromium: every figure drawn, nothing said on the console, nothing fetched, no sideways scroll."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.screenshots import Browser, find_browser
from tests.conftest import Longrope

pytestmark = pytest.mark.slow
CHROMIUM = find_browser()
COUNT = """(() => [...document.querySelectorAll('figure')].map(figure => {
  const marks = [...figure.querySelectorAll('svg.plot .area *')].filter(mark => mark.getBBox);
  const drawn = marks.filter(mark => { const box = mark.getBBox(); return box.width > 0 || box.height > 0; });
  const plots = [...figure.querySelectorAll('svg.plot')].map(plot => plot.getBoundingClientRect());
  const words = [...figure.querySelectorAll('svg.plot text')].map(word => word.getBoundingClientRect());
  const inside = words.every(word => plots.some(plot => word.left >= plot.left - 1 && word.right <= plot.right + 1));
  const small = Math.min(...words.map(word => word.height));
  const mark = drawn.find(each => each.matches('.line, .bar, .dot, .box, .cell rect'));
  const style = mark && getComputedStyle(mark);
  return {name: figure.id, drawn: drawn.length, width: Math.min(...plots.map(plot => plot.width)), inside, small,
          colour: style && [style.fill, style.stroke].join()};
}))()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine: `apt-get install chromium` brings one")
    with Browser(CHROMIUM) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(small_study: list[str], longrope_in: Longrope, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    assert longrope_in(folder, "launch", *small_study, "--study=s").status == 0
    trials = [{"depth": n / 4, "trials": 4, "right": n, "chance": 0.01} for n in range(5)]
    buckets = [{"start": 2**n, "end": 2 ** (n + 1), "nll": 10.0 + n, "tokens": 8} for n in range(5)]
    window = {"length": 64, "attention": "own", "failure": None, "single": {"perplexity": 7.5}, "positions": buckets}
    measured = {
        "model": "m",
        "lengths": [64, 256],
        "perplexity": {name: {"64": 8.0, "256": 9.0} for name in ("none", "yarn", "searched")},
        "sliding": [{"method": name, **window} for name in ("none", "searched")],
        "passkey": {name: {n: {"by_depth": trials} for n in ("64", "256")} for name in ("none", "searched")},
    }
    (folder / "measured.json").write_text(json.dumps(measured))
    assert longrope_in(folder, "report", "s", "--evaluation=measured.json").status == 0
    return folder / "s-report.html"


def trouble(browser: Browser) -> list[dict[str, Any]]:
    """What the page said or asked for, but for itself."""
    said = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed")
    found = [event for event in browser.events if event["method"] in said]
    asked = [event for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    assert asked, "the browser tells what is fetched"
    return found + [event for event in asked if not event["params"]["request"]["url"].endswith("/s-report.html")]


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False), (390, True), (320, False)])
def test_every_figure_is_drawn_in_its_place(browser: Browser, report: Path, width: int, dark: bool) -> None:
    browser.open(report, width, 900, dark)
    figures = browser.evaluate(COUNT)
    assert len(figures) == report.read_text().count("<figure") == 11
    for figure in figures:
        assert figure["drawn"] > 0, figure
        assert figure["inside"], figure
        assert figure["width"] >= min(width * 0.75, 250), figure
        assert figure["small"] >= 9, figure
    assert trouble(browser) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


def test_light_and_dark_are_two_pages_in_one(browser: Browser, report: Path) -> None:
    looks = []
    for dark in (False, True):
        browser.open(report, 1200, 900, dark)
        ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        looks.append((ground, *(figure["colour"] for figure in browser.evaluate(COUNT))))
    assert all(light != dark for light, dark in zip(*looks, strict=True))


def test_a_page_that_is_no_report_is_seen_as_such(browser: Browser, tmp_path: Path) -> None:
    """The checks above can fail: of a page with a script, something to fetch, and an empty figure."""
    page = tmp_path / "page.html"
    page.write_text(
        "<body style='width: 2000px'><figure id=empty><svg class=plot><svg class=area></svg></svg></figure>"
        "<script>console.error('said')</script><img src=/nowhere.png></body>"
    )
    browser.open(page, 390, 900)
    assert [figure["drawn"] for figure in browser.evaluate(COUNT)] == [0]
    assert {event["method"] for event in trouble(browser)} >= {"Runtime.consoleAPICalled", "Network.requestWillBeSent"}
    assert browser.evaluate("document.documentElement.scrollWidth") > 390
