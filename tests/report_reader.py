"""A report as a reader of HTML sees it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

AWAY = re.compile(r"https?:|url\(|@import|javascript:|data:", re.IGNORECASE)
TAGS = (
    "html head meta title style body main header footer nav section div p span strong bdi a pre ul li h1 h2 h3 h4 h5 "
    "figure figcaption details summary table thead tbody tr th td svg desc g path line rect text"
)
ATTRIBUTES = (
    "aria-hidden aria-label charset class content d height href http-equiv id lang name role scope tabindex transform "
    "viewbox width x x1 x2 y y1 y2"
)


@dataclass
class Page(HTMLParser):
    """What a reader of HTML makes of a report: figures with their tables, and the text."""

    figures: list[str] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    plots: dict[str, int] = field(default_factory=dict)
    targets: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    blocks: list[str] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.figure = ""

    @classmethod
    def read(cls, path: Path) -> Page:
        page = cls()
        page.feed(path.read_text(encoding="utf-8"))
        page.close()
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.attributes |= given.keys()
        self.open.append(tag)
        if given.get("id"):
            self.targets.add(str(given["id"]))
        if tag == "a":
            self.links.append(str(given["href"]))
        if tag == "figure":
            self.figure = str(given["id"])
            self.figures.append(self.figure)
            self.tables[self.figure] = []
        if tag == "svg" and given.get("class") == "plot":
            self.plots[self.figure] = self.plots.get(self.figure, 0) + 1
        if tag == "tr" and self.figure:
            self.tables[self.figure].append([])
        if tag in ("td", "th") and self.figure:
            self.tables[self.figure][-1].append("")
        if tag == "pre":
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass
        if tag == "figure":
            self.figure = ""

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open[-1:] and self.open[-1] in ("td", "th") and self.figure:
            self.tables[self.figure][-1][-1] += data
        if "pre" in self.open:
            self.blocks[-1] += data

    def column(self, figure: str, name: str) -> list[str]:
        head, *rows = self.tables[figure]
        return [row[head.index(name)] for row in rows]


def assert_inert(page: Page) -> None:
    """Nothing of it runs or leads out of it."""
    assert page.tags <= {*TAGS.split()}
    assert page.attributes <= {*ATTRIBUTES.split()}
    assert all(link.startswith("#") for link in page.links)
