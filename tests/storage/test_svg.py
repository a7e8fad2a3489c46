"""Charts: where a value lies, what an axis says, and colours that everyone can tell apart."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.page import STYLE
from storage.svg import SERIES, Plot, banded, doubling, fitting, legend, linear, logarithmic, quartiles, short_length

VALUES = st.floats(1e-6, 1e9)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")


@settings(deadline=None)
@given(VALUES, VALUES, st.sampled_from([linear, logarithmic, fitting]))
def test_an_axis_marks_round_values_within_its_ends(one: float, other: float, make: object) -> None:
    scale = make(min(one, other), max(one, other))  # type: ignore[operator]
    assert scale.at(scale.low) == pytest.approx(0)
    assert scale.at(scale.high) == pytest.approx(1)
    places = [scale.at(value) for value, _ in scale.ticks]
    assert places == sorted(set(places))
    assert all(-1e-6 <= place <= 1 + 1e-6 for place in places)
    assert len({label for _, label in scale.ticks}) == len(scale.ticks) <= 12
    for value, label in scale.ticks:
        assert float(label.replace(",", "")) == pytest.approx(value, rel=1e-6, abs=1e-9)


def test_round_values_are_one_two_and_a_half_or_five() -> None:
    assert [label for _, label in linear(33.7, 35.1).ticks] == ["33.75", "34.00", "34.25", "34.50", "34.75", "35.00"]
    assert [label for _, label in linear(0, 6900).ticks] == ["0", "2,000", "4,000", "6,000"]
    assert [label for _, label in logarithmic(1, 700).ticks] == ["1", "10", "100"]
    assert [label for _, label in logarithmic(8, 60).ticks] == ["10", "20", "30", "50"]
    assert [label for _, label in linear(0, 3, least=1).ticks] == ["0", "1", "2", "3"]
    assert linear(5, 5).low < 5 < linear(5, 5).high


def test_equal_ratios_take_equal_room_where_values_span_much() -> None:
    scale = fitting(1, 100)
    assert scale.logarithmic
    assert scale.at(10) == pytest.approx(0.5)
    assert not fitting(8, 9).logarithmic
    assert fitting(8, 9).at(8.5) == pytest.approx(0.5)


def test_lengths_are_marked_by_themselves() -> None:
    scale = doubling([128, 256, 2048, 2 * 1024 * 1024])
    assert [label for _, label in scale.ticks] == ["128", "2k", "2M"]  # 256 would lie on 128
    assert [short_length(n) for n in (64, 1536, 4096, 2097152)] == ["64", "1.5k", "4k", "2M"]


def test_many_bands_have_some_labels() -> None:
    scale = banded([str(n) for n in range(41)])
    assert [label for _, label in scale.ticks] == [str(n) for n in range(0, 41, 3)]
    assert scale.at(-0.5) == 0
    assert scale.at(40.5) == 1


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_quartiles_are_numpys(values: list[float]) -> None:
    ordered = sorted(values)
    expected = np.quantile(ordered, [0, 0.25, 0.5, 0.75, 1])
    assert quartiles(ordered) == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-6)


def coordinates(plot: Plot) -> list[tuple[str, str]]:
    return [(node.tag, node.get("d") or "") for node in plot.node().iter("path")]


def test_a_line_goes_through_its_points_and_a_step_keeps_each_value() -> None:
    plot = Plot("t", "d", linear(0, 10), linear(0, 10), "x", "", height=152, left=88, width=200)  # 100 by 100
    plot.line([(0, 0), (5, 10), (10, 5)], 0)
    plot.line([(0, 0), (5, 10), (10, 10)], 1, step=True)
    assert coordinates(plot) == [("path", "M0 100L50 0L100 50"), ("path", "M0 100H50V0H100")]


def test_rows_read_from_the_top() -> None:
    plot = Plot("t", "d", linear(0, 10), banded(["a", "b"]), "x", "", height=152, left=88, width=200, rows=True)
    plot.bar(0, 0, 5, 1, "first", half=0.5)
    (bar,) = plot.node().iter("rect")
    assert [float(bar.get(name) or "nan") for name in ("x", "y", "width", "height")] == [0, 0, 50, 50]


@settings(deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=9), VALUES)
def test_nothing_is_drawn_at_no_place(values: list[float], top: float) -> None:
    plot = Plot("t", "d", banded(["a"]), linear(0, top), "x", "y")
    plot.box(0.0, sorted(values), 1, "box")
    plot.dots([(0.0, value) for value in values], 2)
    plot.cell(0.0, top / 2, values[0], "", "cell")
    for node in plot.node().iter():
        for name in ("d", "x", "y", "width", "height", "x1", "x2", "y1", "y2"):
            text = node.get(name, "0")
            assert "nan" not in text
            assert "inf" not in text
            if name in ("width", "height"):
                assert float(text) >= 0
            assert NUMBER.search(text)


def test_the_legend_names_every_series_with_its_colour() -> None:
    found = legend([(0, "winner"), (3, "<b>")], "both")
    assert [node.text for node in found.iter("bdi")] == ["winner", "<b>"]
    assert [node.get("class") for node in found.iter("path")] == ["line s0", "dot s0", "line s3", "dot s3"]


# Machado, Oliveira and Fernandes (2009), at full severity.
BLINDNESS = {
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
Colours = npt.NDArray[np.float64]


def themes() -> list[dict[str, Colours]]:
    """The variables of page.css, light and dark, as linear light."""
    found = []
    for block in re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL):
        pairs = re.findall(r"--([\w-]+): #([0-9a-f]{6})", block)
        levels = {name: np.array([int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]) for name, code in pairs}
        found.append({k: np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4) for k, v in levels.items()})
    return found


def contrast(one: Colours, other: Colours) -> float:
    weights = np.array([0.2126, 0.7152, 0.0722])
    low, high = sorted((float(one @ weights), float(other @ weights)))
    return (high + 0.05) / (low + 0.05)


def lab(linear_light: Colours) -> Colours:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = to_xyz @ np.clip(linear_light, 0, 1) / np.array([0.95047, 1, 1.08883])
    root = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
class TestColours:
    def test_lines_and_words_stand_out_from_the_page(self, theme: int) -> None:
        colours = themes()[theme]
        for series in range(SERIES):
            assert contrast(colours[f"s{series}"], colours["card"]) >= 3, f"s{series}"  # WCAG 1.4.11
        for name in ("ink", "muted", "link", "good", "warn"):
            for ground in ("page", "card"):
                assert contrast(colours[name], colours[ground]) >= 4.5, f"{name} on {ground}"  # WCAG 1.4.3
        assert contrast(colours["on-hot"], colours["hot"]) >= 4.5

    @pytest.mark.parametrize("blindness", BLINDNESS)
    def test_the_first_four_series_differ_for_everyone(self, theme: int, blindness: str) -> None:
        """The winner, YaRN, NTK and PI; further ones are told apart by dashes and markers too."""
        seen = {n: lab(np.array(BLINDNESS[blindness]) @ themes()[theme][f"s{n}"]) for n in range(4)}
        for one, other in itertools.combinations(range(4), 2):
            assert math.dist(seen[one], seen[other]) >= 10, (one, other)

    def test_every_series_has_a_dash_pattern_of_its_own(self, theme: int) -> None:  # noqa: ARG002 - of the class
        dashes = re.findall(r"\.line\.s(\d) \{ stroke-dasharray: ([\d ]+);", STYLE.read_text())
        assert {int(series) for series, _ in dashes} == set(range(1, SERIES))
        assert len({pattern for _, pattern in dashes}) == SERIES - 1
