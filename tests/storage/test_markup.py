"""Elements as text: whatever a name holds is text in the page, and cannot be seen as anything else."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from storage.markup import element, table, visible, write_html


class Seen(HTMLParser):
    """What a reader of HTML makes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def seen(page: str) -> Seen:
    parser = Seen()
    parser.feed(page)
    parser.close()
    return parser


HOSTILE = st.text(st.sampled_from("<>&\"'/=;!- \n\x00\x1b\u202e\ud800abscript")) | st.text()


@settings(deadline=None)
@given(HOSTILE, HOSTILE)
def test_text_and_attributes_come_back_as_they_are_shown(text: str, value: str) -> None:
    found = seen(write_html(element("p", element("b", text, title=value), text)).split("\n", 1)[1])
    assert found.tags == ["p", "b"]
    assert found.attributes == [("title", visible(value))]
    assert found.text.removesuffix("\n") == visible(text) * 2


@settings(deadline=None)
@given(HOSTILE)
def test_what_is_shown_can_be_seen_and_encoded(text: str) -> None:
    shown = visible(text)
    assert all(char.isprintable() or char == "\n" for char in shown)
    shown.encode()
    if text.isprintable():
        assert shown == text


def test_cells_of_a_table_are_text() -> None:
    found = seen(write_html(table(["a", "<b>"], [["<script>", "2"]])))
    assert found.tags == ["div", "table", "thead", "tr", "th", "th", "tbody", "tr", "th", "td"]
    assert "<script>" in found.text
