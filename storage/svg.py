"""Charts as SVG that takes its colours from the page around it: light, dark and print are one drawing.

Drawn here rather than by a plotting library because a report must open without scripts, follow the reader's colour
scheme, and stay readable on a phone: text is text, lines keep their width, and colours are names of CSS variables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from storage.markup import Node, element

WIDTH = 400.0  # of the drawing: about what a phone shows, so that text is never made small
RIGHT, TOP, BOTTOM = 12.0, 10.0, 42.0
SERIES = 9  # colours with dash patterns in page.css
SAME = 1e-9  # values that differ by no more than this of themselves need an axis made for one value
Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """An axis: where a value lies, from 0 to 1, and which values are marked.

    Attributes
    ----------
    ticks: value and label.
    logarithmic: equal ratios take equal room.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    logarithmic: bool = False

    def at(self, value: float) -> float:
        if self.logarithmic:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def linear(low: float, high: float, most: int = 6, least: float = 0.0) -> Scale:
    """An axis of equal steps, marked at round values that lie ``least`` apart or more."""
    if not high - low > SAME * max(abs(low), abs(high)):
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    if step < least:
        step = power = least
    digits = max(0, -math.floor(math.log10(step) + 1e-9) + (step / power == 2.5))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Scale(low, high, tuple((n * step, f"{n * step:,.{digits}f}") for n in range(first, last + 1)))


def logarithmic(low: float, high: float) -> Scale:
    """An axis of equal ratios, marked at few multiples of powers of ten, or at powers of ten alone."""
    if not high > low * (1 + SAME):
        low, high = low / 1.1, high * 1.1
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for factors in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1,)):
        ticks = [f * 10.0**p for p in powers for f in factors if low * (1 - 1e-9) <= f * 10.0**p <= high * (1 + 1e-9)]
        if len(ticks) <= 7:
            break
    ticks = ticks[:: max(1, math.ceil(len(ticks) / 8))]
    if len(ticks) < 2:
        ticks = [value for value, _ in linear(low, high).ticks if value > 0]
    return Scale(low, high, tuple((v, f"{v:,.10g}" if v < 1e6 else f"{v:.4g}") for v in ticks), True)


def fitting(low: float, high: float, ratio: float = 12.0) -> Scale:
    """A logarithmic axis where the values span more than a ratio, a linear one where they do not."""
    return logarithmic(low, high) if low > 0 and high / low > ratio else linear(low, high)


def banded(labels: Sequence[str], most: int = 14) -> Scale:
    """An axis of equal bands, the n-th around n; where there are many, not every one has its label."""
    every = max(1, math.ceil(len(labels) / most))
    ticks = tuple((float(n), label) for n, label in enumerate(labels) if n % every == 0)
    return Scale(-0.5, len(labels) - 0.5, ticks)


def doubling(values: Sequence[float]) -> Scale:
    """A logarithmic axis that is marked at these values alone, such as lengths."""
    low, high = min(values), max(values)
    margin = 1.05 if high > low else 1.2
    ticks: list[tuple[float, str]] = []
    for value in sorted(set(values)):
        if not ticks or value / ticks[-1][0] > (high / low) ** 0.08:
            ticks.append((value, short_length(value)))
    return Scale(low / margin, high * margin, tuple(ticks), True)


def short_length(tokens: float) -> str:
    """2048 as 2k, 2097152 as 2M; 768 as it is."""
    for size, unit in ((1024 * 1024, "M"), (1024, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:g}"


class Plot:
    """One chart on its way. Every mark takes values of the axes; what lies outside them is cut off or left out.

    Parameters
    ----------
    title, text: what it shows, for those who do not see it.
    left: room for the labels of the y axis; what its ticks need if not given.
    rows: the y axis is of bands, whose labels read from the top.
    """

    def __init__(
        self,
        title: str,
        text: str,
        x: Scale,
        y: Scale,
        x_label: str,
        y_label: str,
        height: float = 250.0,
        left: float | None = None,
        rows: bool = False,
        width: float = WIDTH,
    ) -> None:
        self.x, self.y, self.rows = x, y, rows
        longest = max((len(label) for _, label in y.ticks), default=0)
        self.left = 24.0 * bool(y_label) + 8.0 + 7.0 * longest if left is None else left
        self.wide = width - self.left - RIGHT
        self.tall = height - TOP - BOTTOM
        words = element("title", title), element("desc", text)
        self._root = element("svg", *words, viewBox=f"0 0 {width:g} {height:g}", class_="plot")
        self._root.set("role", "img")
        self._axes(x_label, y_label)
        size = {"x": self.left, "y": TOP, "width": self.wide, "height": self.tall}
        self._area = element("svg", **size, class_="area")
        self._markers = element("svg", **size, class_="area markers")  # which are whole at the edge, too

    def node(self) -> Node:
        """The finished drawing."""
        if self._area not in list(self._root):
            self._root.extend([self._area, self._markers])
        return self._root

    def _at(self, x: float, y: float) -> Point:
        down = self.y.at(y) if self.rows else 1 - self.y.at(y)
        return round(self.x.at(x) * self.wide, 2), round(down * self.tall, 2)

    def _axes(self, x_label: str, y_label: str) -> None:
        bottom, end = TOP + self.tall, self.left + self.wide
        for value, label in self.y.ticks:
            y = TOP + self._at(self.x.low, value)[1]
            if not self.rows:
                self._root.append(element("line", x1=self.left, x2=end, y1=y, y2=y, class_="grid"))
            self._root.append(element("text", label, x=self.left - 6, y=y + 4, class_="tick end"))
        for value, label in self.x.ticks:
            x = self.left + self._at(value, self.y.low)[0]
            self._root.append(element("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
            self._root.append(element("text", label, x=x, y=bottom + 17, class_="tick middle"))
        self._root.append(element("line", x1=self.left, x2=end, y1=bottom, y2=bottom, class_="axis"))
        self._root.append(element("text", x_label, x=self.left + self.wide / 2, y=bottom + 35, class_="label middle"))
        if y_label:
            middle = TOP + self.tall / 2
            turned = f"rotate(-90 11 {middle:g})"
            self._root.append(element("text", y_label, x=11, y=middle, transform=turned, class_="label middle"))

    def line(self, points: Sequence[Point], series: int, step: bool = False) -> None:
        """A line from point to point; ``step`` keeps each value until the next."""
        path, last = "", 0.0
        for x, y in (self._at(*point) for point in points):
            if not path:
                path = f"M{x:g} {y:g}"
            else:
                path += f"H{x:g}V{y:g}" if step and y != last else f"H{x:g}" if step else f"L{x:g} {y:g}"
            last = y
        if path:
            self._area.append(element("path", d=path, class_=f"line s{series}"))

    def level(self, value: float, series: int) -> None:
        """A line across at one value."""
        self.line([(self.x.low, value), (self.x.high, value)], series)

    def rule(self, value: float, tip: str) -> None:
        """A line down at one value."""
        x = self._at(value, self.y.low)[0]
        self._area.append(element("line", element("title", tip), x1=x, x2=x, y1=0, y2=self.tall, class_="cut"))

    def dots(self, points: Sequence[Point], series: int, tips: Sequence[str] = (), size: float = 3.2) -> None:
        """A marker a point, of the series' shape; none where it lies outside the axes."""
        for place, point in enumerate(points):
            if self.x.holds(point[0]) and self.y.holds(point[1]):
                tip = element("title", tips[place]) if tips else None
                outline = shape(series, *self._at(*point), size)
                self._markers.append(element("path", tip, d=outline, class_=f"dot s{series}"))

    def box(self, x: float, values: Sequence[float], series: int, tip: str) -> None:
        """Lowest, quartiles and highest of ascending values around x; what is above the axis is a mark at its top."""
        low, first, middle, third, high = quartiles(values)
        top = self.y.high
        half = max(0.8, min(9.0, 0.32 * self.wide / (self.x.high - self.x.low)))
        centre = self._at(x, low)[0]
        down = [self._at(x, min(value, top))[1] for value in (low, first, middle, third, high)]
        group = element("g", element("title", tip), class_=f"box s{series}")
        group.append(element("line", x1=centre, x2=centre, y1=down[0], y2=down[4], class_="whisker"))
        if first <= top:
            tall = max(down[1] - down[3], 1.0)
            group.append(element("rect", x=centre - half, y=down[3], width=2 * half, height=tall, class_="quartiles"))
        if middle <= top:
            group.append(element("line", x1=centre - half, x2=centre + half, y1=down[2], y2=down[2], class_="median"))
        if high > top:
            group.append(element("path", d=f"M{centre - 3:g} 6L{centre:g} 1L{centre + 3:g} 6Z", class_="beyond"))
        self._area.append(group)

    def cross(self, x: float, tip: str) -> None:
        """A cross at the top of the chart, for what has no value."""
        at = self._at(x, self.y.low)[0]
        outline = f"M{at - 4:g} 4l8 8m0 -8l-8 8"
        self._area.append(element("path", element("title", tip), d=outline, class_="cross"))

    def bar(self, row: float, start: float, end: float, series: int, tip: str, half: float = 0.32) -> None:
        """A bar along the x axis in a band of the y axis."""
        (x1, y1), (x2, y2) = self._at(start, row - half), self._at(end, row + half)
        size = {"width": max(x2 - x1, 0.6), "height": abs(y2 - y1)}
        self._area.append(element("rect", element("title", tip), x=x1, y=min(y1, y2), **size, class_=f"bar s{series}"))

    def cell(self, x: float, y: float, share: float, text: str, tip: str, width: float = 1.0, gap: float = 1.0) -> None:
        """One cell of a heat map around x and y, its shade by a share from 0 to 1."""
        (x1, y1), (x2, y2) = self._at(x - width / 2, y - 0.5), self._at(x + width / 2, y + 0.5)
        shade = round(min(1.0, max(0.0, share)) * 10)
        size = {"width": max(x2 - x1 - gap, 0.5), "height": max(abs(y2 - y1) - 1.0, 0.5)}
        group = element("g", element("title", tip), class_=f"cell h{shade}")
        group.append(element("rect", x=x1, y=min(y1, y2), **size))
        if text:
            group.append(element("text", text, x=(x1 + x2 - gap) / 2, y=(y1 + y2) / 2 + 4, class_="middle"))
        self._area.append(group)


def quartiles(values: Sequence[float]) -> tuple[float, float, float, float, float]:
    """Lowest, quartiles and highest of ascending values, between neighbours where they fall between."""

    def at(share: float) -> float:
        place = share * (len(values) - 1)
        low = math.floor(place)
        high = min(low + 1, len(values) - 1)
        return values[low] + (values[high] - values[low]) * (place - low)

    return at(0.0), at(0.25), at(0.5), at(0.75), at(1.0)


def shape(series: int, x: float, y: float, size: float) -> str:
    """The outline of a marker: circle, square, diamond or triangle, by series."""
    s = size
    outlines = (
        f"M{x - s:g} {y:g}a{s:g} {s:g} 0 1 0 {2 * s:g} 0a{s:g} {s:g} 0 1 0 {-2 * s:g} 0Z",
        f"M{x - s:g} {y - s:g}h{2 * s:g}v{2 * s:g}h{-2 * s:g}Z",
        f"M{x:g} {y - 1.3 * s:g}l{1.3 * s:g} {1.3 * s:g}l{-1.3 * s:g} {1.3 * s:g}l{-1.3 * s:g} {-1.3 * s:g}Z",
        f"M{x:g} {y - 1.2 * s:g}l{1.2 * s:g} {2.2 * s:g}h{-2.4 * s:g}Z",
    )
    return outlines[(series + series // len(outlines)) % len(outlines)]


def legend(entries: Sequence[tuple[int, str]], kind: str = "line") -> Node:
    """Which series is which, below a chart; ``kind`` is line, dots, both or bar."""
    items = []
    for series, name in entries:
        swatch = element("svg", viewBox="0 0 30 12", class_="swatch", aria_hidden="true")
        if kind == "bar":
            swatch.append(element("rect", x=2, y=1, width=26, height=10, class_=f"bar s{series}"))
        if kind in ("line", "both"):
            swatch.append(element("path", d="M1 6H29", class_=f"line s{series}"))
        if kind in ("dots", "both"):
            swatch.append(element("path", d=shape(series, 15.0, 6.0, 3.2), class_=f"dot s{series}"))
        items.append(element("li", swatch, element("bdi", name)))
    return element("ul", *items, class_="legend")
