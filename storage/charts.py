"""Small charts for a terminal: lines of text, eight dots a character, or plain ASCII."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from rich.text import Text

# Dots of a braille character by row and column; the block starts at U+2800.
BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
EIGHTHS = " ▁▂▃▄▅▆▇█"
# Told apart by people who see few colours, on a light and on a dark ground.
BEST, OTHERS, MARK = "bold bright_blue", "bright_black", "yellow"

Points = Sequence[tuple[float, float]]


def scatter(
    points: Points, line: Points, marks: Mapping[str, float], width: int, height: int, ascii_only: bool = False
) -> list[Text]:
    """Points, a step line, and levels with names.

    The vertical axis is logarithmic and ends at the line's highest, or at the median of the points; what lies beyond is
    left out, so that bad ones do not flatten the rest.

    Parameters
    ----------
    points, line: x and y > 0, the line's finite, in the order of x and at least one.
    marks: name -> y; drawn where it is within the axis.
    width, height: characters, without the numbers at the left.
    """
    low = min(y for _, y in line)
    ordered = sorted(y for _, y in points) or [low]
    high = max(max(y for _, y in line), ordered[(len(ordered) - 1) // 2], low * 1.01)
    if math.isinf(high):
        high = max((y for y in ordered if math.isfinite(y)), default=low * 1.01)
    last = max(x for x, _ in [*points, *line]) or 1.0
    across, down = 2 * width - 1, 4 * height - 1

    def place(x: float, y: float) -> tuple[int, int]:
        share = math.log(y / low) / math.log(high / low) if high > low else 0.0
        return round(across * x / last), down - round(down * share)

    dots = {place(x, y) for x, y in points if low <= y <= high}
    drawn: set[tuple[int, int]] = set()
    for (x0, y0), (x1, y1) in zip(line, [*line[1:], (last, line[-1][1])], strict=True):
        (left, row), (right, next_row) = place(x0, y0), place(x1, y1)
        drawn |= {(x, row) for x in range(left, right + 1)}
        drawn |= {(right, y) for y in range(min(row, next_row), max(row, next_row) + 1)}
    levels = {name: place(0, y)[1] // 4 for name, y in marks.items() if low <= y <= high}
    rows = []
    for row in range(height):
        number = high * (low / high) ** (row / max(1, height - 1))
        names = ", ".join(name for name, level in levels.items() if level == row)
        empty = ("-" if ascii_only else "┄") if names else " "
        text = Text(f"{number:>8.4g} ", style=OTHERS)
        for column in range(width):
            best, rest = (_cell(found, row, column) for found in (drawn, dots))
            style = BEST if best else OTHERS if rest else MARK
            shown = ("*" if best else ".") if ascii_only else chr(0x2800 + (best or rest))
            text.append(shown if best or rest else empty, style)
        if names:
            names = f" {names}"[: width // 2]
            text = text[: len(text) - len(names)] + Text(names, style=MARK)
        rows.append(text)
    return rows


def _cell(dots: set[tuple[int, int]], row: int, column: int) -> int:
    """The bits of one character."""
    return sum(BRAILLE[y][x] for y in range(4) for x in range(2) if (2 * column + x, 4 * row + y) in dots)


def bars(values: Sequence[float], top: float, width: int, height: int, ascii_only: bool = False) -> list[Text]:
    """A bar a value, from 1 to ``top`` on a logarithmic axis; neighbours are averaged where not all have room."""
    group = math.ceil(len(values) / width)
    means = [math.exp(math.fsum(math.log(max(1.0, v)) for v in part) / len(part)) for part in _groups(values, group)]
    each = max(1, min(3, width // len(means)))
    heights = [height * math.log(mean) / math.log(top) if top > 1 else 0.0 for mean in means]
    rows = []
    for row in range(height):
        level = height - 1 - row
        number = top ** ((level + 1) / height)
        text = Text(f"{number:>7.3g} ", style=OTHERS)
        for full in heights:
            filled = min(8, max(0, round(8 * (full - level))))
            if level == 0:
                filled = max(1, filled)  # a factor of 1 is one, too
            text.append((" #"[filled > 3] if ascii_only else EIGHTHS[filled]) * each, BEST)
        rows.append(text)
    return rows


def _groups(values: Sequence[float], size: int) -> Iterable[Sequence[float]]:
    return (values[i : i + size] for i in range(0, len(values), size))


def span(seconds: float) -> str:
    """A time for people: ``45 s``, ``3:05``, ``2:03:05``, ``3 d 4 h``."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole >= 48 * 3600:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
