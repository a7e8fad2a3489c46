"""The figures of an evaluation: perplexity by length and by position, and what retrieval got right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from storage.markup import Figure
from storage.measured import ByLength, Measured, Trials
from storage.page_search import SERIES_OF, WINNER, method_name
from storage.report import RETRIEVAL
from storage.svg import SERIES, Plot, banded, doubling, fitting, legend, short_length

MAP = 300.0  # width of a heat map, of which several stand side by side
OWN_ROWS = ("longrope", "searched")  # what the page is about, in the winner's colour


def measured_figures(measured: Measured, place: int) -> list[Figure]:
    """Every figure that an evaluation has something for; ``place`` keeps their anchors apart."""
    found = [
        by_length(measured.perplexity, f"length-{place}", "Perplexity by length", "disjoint windows"),
        by_length(measured.sliding, f"sliding-{place}", "Perplexity by length, sliding windows", "sliding windows"),
        *by_position(measured, place),
        *(heat_maps(kind, rows, place) for kind, rows in measured.retrieval.items()),
    ]
    return [figure for figure in found if figure is not None]


def coloured(names: Sequence[str]) -> dict[str, int]:
    """A series for each method: the same on every figure, as far as the colours go."""
    taken: dict[str, int] = {}
    for name in names:
        if name in SERIES_OF:
            taken[name] = SERIES_OF[name]
    own = next((name for own in OWN_ROWS for name in names if name == own), None)
    if own is not None:
        taken[own] = WINNER
    free = [series for series in range(1, SERIES) if series not in taken.values()] or [*range(1, SERIES)]
    for place, name in enumerate(name for name in names if name not in taken):
        taken[name] = free[place % len(free)]
    return taken


def by_length(rows: ByLength[float], anchor: str, title: str, how: str) -> Figure | None:
    """A line a method."""
    lengths = sorted({length for cells in rows.values() for length in cells})
    values = [value for cells in rows.values() for value in cells.values()]
    if not values:
        return None
    series = coloured(list(rows))
    text = f"{len(rows)} methods at {', '.join(map(short_length, lengths))} tokens."
    y = fitting(min(values) * 0.96, max(values) * 1.04, 3.0)
    plot = Plot(title, text, doubling([float(n) for n in lengths]), y, "length in tokens", "perplexity")
    for name in sorted(rows, key=lambda name: series[name] == WINNER):  # what the page is about lies on top
        points = [(float(length), rows[name][length]) for length in lengths if length in rows[name]]
        plot.line(points, series[name])
        plot.dots(points, series[name], [f"{method_name(name)}: {value:.4f}" for _, value in points])
    shown = [
        (method_name(name), *(f"{cells[n]:.4f}" if n in cells else "-" for n in lengths))
        for name, cells in rows.items()
    ]
    entries = [(series[name], method_name(name)) for name in rows]
    columns = ("method", *(f"{length:,}" for length in lengths))
    note = f"Lower is better. Exact, on {how} of documents that nothing was chosen on."
    return Figure(anchor, title, note, [("", plot.node())], legend(entries, "both"), columns, shown)


def by_position(measured: Measured, place: int) -> list[Figure]:
    """A figure a length: perplexity by where in the window a token stands."""
    lengths = sorted({length for cells in measured.positions.values() for length in cells})
    figures = []
    for length in lengths:
        rows = {name: cells[length] for name, cells in measured.positions.items() if length in cells}
        series = coloured(list(rows))
        values = [bucket.perplexity for buckets in rows.values() for bucket in buckets]
        starts = [float(max(1, bucket.start)) for buckets in rows.values() for bucket in buckets]
        title = f"Perplexity by position in windows of {length:,} tokens"
        powers = [float(2**power) for power in range(1, 40) if min(starts) < 2**power < length]
        x = doubling([min(starts), *powers, float(length)])
        y = fitting(min(values) * 0.96, max(values) * 1.04, 3.0)
        plot = Plot(title, f"{len(rows)} methods.", x, y, "position in the window", "perplexity")
        for name in sorted(rows, key=lambda name: series[name] == WINNER):
            points = []
            for bucket in rows[name]:
                points += [(float(max(1, bucket.start)), bucket.perplexity), (float(bucket.end), bucket.perplexity)]
            plot.line(points, series[name])
        buckets = sorted({(b.start, b.end) for each in rows.values() for b in each})
        shown = []
        for name, each in rows.items():
            known = {(bucket.start, bucket.end): f"{bucket.perplexity:.4f}" for bucket in each}
            shown.append((method_name(name), *(known.get(bucket, "-") for bucket in buckets)))
        columns = ("method", *(f"{start}-{end - 1}" for start, end in buckets))
        entries = [(series[name], method_name(name)) for name in rows]
        note = "What falls towards the right makes use of the length; what rises does not hold it."
        anchor = f"position-{place}-{length}"
        figures.append(Figure(anchor, title, note, [("", plot.node())], legend(entries), columns, shown))
    return figures


def heat_maps(kind: str, rows: Mapping[str, Mapping[int, Sequence[Trials]]], place: int) -> Figure | None:
    """A small map a method: right of all trials, by length and depth."""
    lengths = sorted({length for cells in rows.values() for length in cells})
    depths = sorted({round(t.depth, 4) for cells in rows.values() for found in cells.values() for t in found})
    if not lengths or not depths:
        return None
    name_of_task = RETRIEVAL[kind].split(":")[0]
    title = f"{name_of_task} by length and depth"
    drawings, shown = [], []
    names = sorted(rows, key=lambda name: name not in OWN_ROWS)
    roomy = len(lengths) <= 8
    for name in names:
        x, y = banded([short_length(n) for n in lengths]), banded([f"{depth:.0%}" for depth in depths], 10)
        text = f"{method_name(name)}: shares of right answers at {len(lengths)} lengths and {len(depths)} depths."
        tall = 52 + min(36.0, 420 / len(depths)) * len(depths)
        plot = Plot(title, text, x, y, "length in tokens", "depth", max(150.0, tall), rows=True, width=MAP)
        for column, length in enumerate(lengths):
            for found in rows[name].get(length, ()):
                share = found.right / found.trials
                row = depths.index(round(found.depth, 4))
                tip = f"{length:,} tokens, depth {found.depth:.0%}: {found.right} of {found.trials}"
                label = f"{share:.0%}" if roomy and len(depths) <= 12 else ""
                plot.cell(float(column), float(row), share, label, tip)
        drawings.append((method_name(name), plot.node()))
        cells = []
        for length in lengths:
            found_here = rows[name].get(length, ())
            cells.append(
                f"{sum(t.right for t in found_here)}/{sum(t.trials for t in found_here)}" if found_here else "-"
            )
        shown.append((method_name(name), *cells))
    trials = {t.trials for cells in rows.values() for found in cells.values() for t in found}
    chance = max((t.chance for cells in rows.values() for found in cells.values() for t in found), default=0.0)
    each = f"{min(trials)}" if len(trials) == 1 else f"{min(trials)} to {max(trials)}"
    guessing = f"{chance:.2%}" if chance >= 0.0001 else "less than 0.01%"
    note = (
        f"Share of right answers, {each} trials a cell; depth 0% is the beginning. Guessing is right {guessing} of the "
        "time. The table has all depths together."
    )
    columns = ("method", *(f"{length:,}" for length in lengths))
    return Figure(f"{kind.replace('_', '-')}-{place}", title, note, drawings, None, columns, shown)
