"""HTML and SVG as a tree of elements, so that whatever a name holds is text and never markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

Node = ElementTree.Element
Content = Node | str | None


def visible(text: str) -> str:
    """Text with what cannot be seen, or turns the reading direction, written as an escape; line breaks stay."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )


def element(tag: str, *children: Content, **attributes: object) -> Node:
    """An element with its children; texts among them are escaped when the tree is written.

    Parameters
    ----------
    attributes: a trailing underscore goes, others become hyphens; None leaves the attribute out.
    """
    node = ElementTree.Element(tag)
    for name, value in attributes.items():
        if value is not None:
            shown = f"{value:.6g}" if isinstance(value, float) else str(value)
            node.set(name.rstrip("_").replace("_", "-"), visible(shown))
    return extend(node, children)


def extend(node: Node, children: Iterable[Content]) -> Node:
    """Append children to an element, texts in their place among them."""
    for child in children:
        if child is None:
            continue
        if not isinstance(child, str):
            node.append(child)
        elif len(node):
            node[-1].tail = (node[-1].tail or "") + visible(child)
        else:
            node.text = (node.text or "") + visible(child)
    return node


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 1) -> Node:
    """A table whose columns hold numbers from one on, in a box of its own that scrolls where it is too wide."""

    def cells(tag: str, values: Sequence[str]) -> Node:
        return element(
            "tr",
            *(
                element(
                    "th" if tag == "th" or place == 0 else "td",
                    value,
                    scope="col" if tag == "th" else "row" if place == 0 else None,
                    class_="number" if place >= numbers_from else None,
                )
                for place, value in enumerate(values)
            ),
        )

    head = element("thead", cells("th", columns))
    body = element("tbody", *(cells("td", row) for row in rows))
    return element("div", element("table", head, body), class_="scroll", tabindex=0)


@dataclass(frozen=True)
class Figure:
    """A chart with its words, and the same figures as a table.

    Attributes
    ----------
    name: unique on the page; its anchor.
    note: what to know to read it, a sentence or two.
    drawings: one chart, or several small ones with a heading each.
    """

    name: str
    title: str
    note: str
    drawings: Sequence[tuple[str, Node]]
    legend: Node | None
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers_from: int = 1

    def node(self) -> Node:
        """The figure as an element of the page."""
        charts = [
            element("div", element("h5", element("bdi", heading)) if heading else None, drawing, class_="chart")
            for heading, drawing in self.drawings
        ]
        values = element(
            "details", element("summary", "The same as a table"), table(self.columns, self.rows, self.numbers_from)
        )
        return element(
            "figure",
            element("h4", self.title),
            element("div", *charts, class_="charts" if len(charts) > 1 else "single"),
            self.legend,
            element("figcaption", self.note),
            values,
            id=self.name,
            class_="wide" if len(charts) > 1 else None,
        )


def write_html(root: Node) -> str:
    """The document as text."""
    return f"<!DOCTYPE html>\n{write_part(root)}\n"


def write_part(node: Node) -> str:
    """An element as text."""
    return ElementTree.tostring(node, encoding="unicode", method="html")
