"""The figures of one search: how it converged, what it found, and what it tried."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from searcher.study import REFINE
from storage.markup import Figure
from storage.page_data import SearchView, perplexity
from storage.progress import RANKED, ScoredCandidate
from storage.report import METHOD_NAMES
from storage.results import pareto_front, perplexities
from storage.svg import SERIES, Plot, Scale, banded, fitting, legend, linear, quartiles

WINNER, YARN, NTK, PI = 0, 1, 2, 3
SERIES_OF = {"yarn": YARN, "ntk": NTK, "pi": PI, "none": 7, "dynamic_ntk": 5, "abf": 6, "ntk_base": 4, "tuned": 4}


def method_name(method: str) -> str:
    """A method's name for people."""
    return METHOD_NAMES.get(method, method)


def search_figures(view: SearchView) -> list[Figure]:
    """Every figure that the search has something for."""
    makers = (convergence, rescale_factors, spread, n_hats, refinement, methods, pareto)
    return [figure for make in makers if (figure := make(view)) is not None]


def _anchor(view: SearchView, name: str) -> str:
    return f"{name}-{view.stage}"


def convergence(view: SearchView) -> Figure | None:
    """The best perplexity so far by cost, with the baselines among the seeds as lines."""
    points = view.points()
    if not points:
        return None
    track = [(view.paid(point), math.exp(min(point.loss, 700.0))) for point in points]
    seeds = dict(sorted(view.seeds().items(), key=lambda item: item[1]))
    best = track[-1][1]
    # The window is about what the search made of its best start: what starts far above would flatten it all.
    start = min([value for value in seeds.values() if value > best * 1.0005], default=track[0][1])
    top = max(start + 0.4 * (start - best), best * 1.02)
    shown = {name: value for name, value in seeds.items() if best * 0.5 < value <= top}
    low = min([best, *shown.values()])
    y = linear(low - 0.06 * (top - low), top)
    title = "Convergence: perplexity by cost"
    text = (
        f"The best individual goes from {track[0][1]:.4g} to {best:.4g} within {track[-1][0]:,.0f} document forwards."
    )
    plot = Plot(title, text, linear(0.0, track[-1][0] * 1.02), y, "cost, document forwards", "perplexity, search set")
    entries = [(WINNER, f"best so far, {best:.4g} at last")]
    for name, value in shown.items():
        plot.level(value, SERIES_OF.get(name, 7))
        entries.append((SERIES_OF.get(name, 7), f"{method_name(name)} {value:.4g}"))
    plot.line(track, WINNER, step=True)
    beyond = [f"{method_name(name)} {value:.4g}" for name, value in seeds.items() if name not in shown]
    note = "Lower is better. The baselines are the search's own seeds: on its documents, under its attention factor."
    if beyond:
        note += f" Above the chart: {', '.join(beyond)}."
    if view.cost.gradients:
        price = f"{view.cost.multiple:.2f}" if view.cost.multiple is not None else "1, as it was not timed,"
        note += f" A gradient step counts as {price} forwards."
    better = [0, *(n for n in range(1, len(track)) if track[n][1] < track[n - 1][1])]
    rows = [
        (f"{track[n][0]:,.0f}", f"{track[n][1]:.4f}", str(points[n].factors.n_hat), points[n].origin) for n in better
    ]
    columns = ("cost", "best perplexity", "n_hat", "origin")
    return Figure(_anchor(view, "convergence"), title, note, [("", plot.node())], legend(entries), columns, rows, 0)


def rescale_factors(view: SearchView) -> Figure | None:
    """Lambda by rotary pair: the winner beside what other methods choose."""
    best = view.best()
    if best is None:
        return None
    factors, name = best
    shown = {other: found.by_layer()[0] for other, found in view.compared().items()}
    layers = factors.by_layer()
    values = [value for line in (*shown.values(), *layers) for value in line]
    y = fitting(min(1.0, *values), max(values) * 1.03)
    title = "Rescale factors by rotary pair"
    text = (
        f"Lambda of {len(layers[0])} pairs, from {layers[0][0]:.4g} for the first to {layers[0][-1]:.4g} for the last."
    )
    plot = Plot(
        title,
        text,
        linear(0.0, max(1.0, len(layers[0]) - 0.9), least=1.0),
        y,
        "rotary pair (0 turns fastest)",
        "lambda",
    )
    entries = []
    for other, line in shown.items():
        plot.line([(float(n), value) for n, value in enumerate(line)], SERIES_OF[other])
        entries.append((SERIES_OF[other], method_name(other)))
    for line in layers:
        plot.line([(float(n), value) for n, value in enumerate(line)], WINNER)
    entries.insert(0, (WINNER, f"{method_name(name)} (n_hat {factors.n_hat})"))
    note = (
        f"1 leaves a pair as it was trained, {view.scale:g} is position interpolation. The attention factor of the "
        f"{method_name(name)} ones is {factors.attention_factor:.4f}."
    )
    if len(layers) > 1:
        note += f" The factors differ by layer: a line for each of {len(layers)}; the table has the first."
    rows = [
        (str(n), f"{layers[0][n]:.4f}", *(f"{line[n]:.4f}" for line in shown.values())) for n in range(len(layers[0]))
    ]
    columns = ("pair", method_name(name), *(method_name(other) for other in shown))
    return Figure(_anchor(view, "factors"), title, note, [("", plot.node())], legend(entries), columns, rows)


def spread(view: SearchView) -> Figure | None:
    """The population by generation."""
    groups: dict[tuple[str, int], list[ScoredCandidate]] = {}
    for row in view.rows:
        if row.part in ("search", "refined"):
            groups.setdefault((row.part, row.generation), []).append(row)
    scored = {key: sorted(perplexity(row) for row in members if row.nll is not None) for key, members in groups.items()}
    kept = {key: [value for value in values if math.isfinite(value)] for key, values in scored.items()}
    if not any(kept.values()):
        return None
    labels = [str(generation) if part == "search" else f"r{generation}" for part, generation in groups]
    title = "The population's spread by generation"
    text = f"{len(labels)} generations; lowest, quartiles and highest perplexity of each."
    y = _window([values for values in kept.values() if values])
    plot = Plot(title, text, banded(labels), y, "generation", "perplexity, search set")
    best, line = math.inf, []
    for place, values in enumerate(kept.values()):
        if values:
            best = min(best, values[0])
            plot.box(float(place), values, 1, f"{labels[place]}: {len(values)} scored, best {values[0]:.4f}")
            line.append((float(place), best))
    plot.line(line, WINNER)
    plot.dots(line, WINNER, size=2.4)
    rows = []
    for label, (key, members) in zip(labels, groups.items(), strict=True):
        values = kept[key]
        figures = [f"{values[0]:.4f}", f"{values[len(values) // 2]:.4f}", f"{values[-1]:.4f}"] if values else ["-"] * 3
        failed = sum(row.failure is not None for row in members)
        rows.append((label, str(len(members)), *figures, str(sum(row.dropped for row in members)), str(failed)))
    note = (
        "Boxes reach from the first quartile to the third, with the median; whiskers to best and worst; a triangle at "
        "the top marks some above the chart. Only candidates that were scored on all search documents are in it."
    )
    if any(part == "refined" for part, _ in groups):
        note += " r0 is what refinement chooses its start from, r1 and on the ends of its legs."
    columns = ("generation", "candidates", "best", "median", "worst", "raced out", "failed")
    entries = [(WINNER, "best so far"), (1, "the generation")]
    drawings = [("", plot.node())]
    return Figure(_anchor(view, "spread"), title, note, drawings, legend(entries, "both"), columns, rows)


def _window(groups: Sequence[Sequence[float]]) -> Scale:
    """An axis for boxes that shows the best of every group, unless it is far out, and the bulk of a usual one."""
    highest = max(group[-1] for group in groups)
    lows, thirds = sorted(group[0] for group in groups), sorted(quartiles(group)[3] for group in groups)
    best, usual = lows[0], thirds[len(thirds) // 2]
    reach = max(lows[-1] - best, usual - best)
    far = 8 * max(lows[len(lows) // 2] - best, usual - best) or reach
    top = min(highest, best + 1.2 * min(reach, far))
    top = max(top, best * 1.0005)
    return linear(best - 0.06 * (top - best), top + 0.04 * (top - best))


def n_hats(view: SearchView) -> Figure | None:
    """What every n_hat that was tried came to."""
    tried: dict[int, list[ScoredCandidate]] = {}
    for row in view.rows:
        if row.part in RANKED and row.scored:
            tried.setdefault(row.factors.n_hat, []).append(row)
    groups = {
        n_hat: sorted(filter(math.isfinite, (perplexity(row) for row in tried[n_hat] if row.nll is not None)))
        for n_hat in sorted(tried)
    }
    if not any(groups.values()):
        return None
    title = "Start tokens left untouched: n_hat"
    best = min((n_hat for n_hat in groups if groups[n_hat]), key=lambda n_hat: groups[n_hat][0])
    text = f"{len(groups)} choices were tried; the best individual has n_hat {best}."
    y = _window([values for values in groups.values() if values])
    plot = Plot(title, text, banded([str(n) for n in groups]), y, "n_hat", "perplexity, search set")
    rows = []
    for place, (n_hat, values) in enumerate(groups.items()):
        dropped = sum(row.dropped for row in tried[n_hat])
        figures = ("-", "-")
        if values:
            plot.box(float(place), values, 1, f"n_hat {n_hat}: {len(values)} scored, best {values[0]:.4f}")
            figures = (f"{values[0]:.4f}", f"{values[len(values) // 2]:.4f}")
        else:
            plot.cross(float(place), f"n_hat {n_hat}: none of {len(tried[n_hat])} was scored on all documents")
        rows.append((str(n_hat), str(len(tried[n_hat])), str(dropped), *figures))
    plot.dots([(float(place), values[0]) for place, values in enumerate(groups.values()) if values], WINNER)
    note = "Candidates by their n_hat. A cross marks a choice whose candidates all failed or were raced out early."
    entries = [(WINNER, "best"), (1, "all candidates")]
    drawings = [("", plot.node())]
    columns = ("n_hat", "candidates", "raced out", "best", "median")
    return Figure(_anchor(view, "n-hat"), title, note, drawings, legend(entries, "dots"), columns, rows, 0)


def refinement(view: SearchView) -> Figure | None:
    """Perplexity by gradient step, each on the window of that step."""
    steps = [row for row in view.rows if row.part == REFINE and row.nll is not None and row.tokens]
    by_document: dict[str, list[tuple[float, float]]] = {}
    for row in steps:
        value = perplexity(row)
        if math.isfinite(value):
            by_document.setdefault(row.document or "several windows", []).append((float(row.generation), value))
    if not by_document:
        return None
    values = [value for line in by_document.values() for _, value in line]
    last = max(float(row.generation) for row in steps)
    y = fitting(min(values) * 0.98, max(values) * 1.02)
    title = "Gradient refinement: perplexity by step"
    text = f"{len(steps)} steps on {len(by_document)} documents; every step is on one of them."
    plot = Plot(title, text, linear(0.0, last, least=1.0), y, "gradient step", "perplexity")
    entries = []
    for place, (document, line) in enumerate(by_document.items()):
        series = place % SERIES
        plot.line(line, series)
        plot.dots(line, series, [f"{document}, step {step:g}: {value:.4f}" for step, value in line], size=2.2)
        if place < SERIES:
            entries.append((series, document))
    note = "A line goes down where the descent helps on that document. Where it jumps up, a new leg began elsewhere."
    rows = [(str(row.generation), row.document or "-", f"{perplexity(row):.4f}", row.origin) for row in steps]
    columns = ("step", "document", "perplexity", "from")
    drawings = [("", plot.node())]
    return Figure(_anchor(view, "refinement"), title, note, drawings, legend(entries, "both"), columns, rows, 0)


def methods(view: SearchView) -> Figure | None:
    """Every method's perplexity on the text that nothing was chosen on, under both attention factors."""
    result = view.result
    if result is None:
        return None
    parts = [part for part in ("test", "selection", "short") if part in result["scores"]]
    own = {part: perplexities(result, part) for part in parts}
    under = {part: perplexities(result, part, at_study_attention=True) for part in parts}
    first = own[parts[0]]
    names = sorted(first, key=lambda name: first[name])
    values = [value for table in (first, under[parts[0]]) for value in table.values() if math.isfinite(value)]
    if not values:
        return None
    title = f"Perplexity on the {parts[0]} documents by method"
    text = f"The lowest is {method_name(names[0])} with {first[names[0]]:.4g}."
    x = fitting(min(values) * 0.94, max(values) * 1.1, 3.0)
    y = banded([method_name(name) for name in names], 99)
    plot = Plot(title, text, x, y, "perplexity", "", height=62 + 24 * len(names), rows=True)
    for series, found in ((1, under[parts[0]]), (WINNER, first)):
        pairs = [(found[name], float(place)) for place, name in enumerate(names) if name in found]
        pairs = [pair for pair in pairs if math.isfinite(pair[0])]
        plot.dots(pairs, series, [f"{value:.4f}" for value, _ in pairs], size=4.0)
    columns = ["method", "n_hat"]
    for part in parts:
        columns += [f"{part}, own attention", f"{part}, study's attention"]
    rows = []
    for name in names:
        cells = [f"{t[name]:.4f}" if name in t else "-" for part in parts for t in (own[part], under[part])]
        rows.append((method_name(name), str(result["factors"][name]["n_hat"]), *cells))
    note = f"Lower is better. {_measured_on(result, parts)} Nothing was chosen on the test documents."
    entries = [(WINNER, "own attention factor"), (1, f"the study's, {result['attention_factor']:.4f}")]
    drawings = [("", plot.node())]
    return Figure(_anchor(view, "methods"), title, note, drawings, legend(entries, "dots"), columns, rows)


def _measured_on(result: Mapping[str, object], parts: Sequence[str]) -> str:
    windows = result["windows"]
    assert isinstance(windows, Mapping)
    sizes = (f"{part}: {windows[part][0]} windows of {windows[part][1]:,} tokens" for part in parts)
    return f"{'; '.join(sizes)}."


def pareto(view: SearchView) -> Figure | None:
    """Long against short context, where the search had both in mind."""
    front = [] if view.result is None else pareto_front(view.result)
    points = [(math.exp(short), math.exp(long)) for long, short, _ in front if max(long, short) < 700]
    if not points:
        return None
    title = "Long against short context"
    text = f"{len(points)} candidates that no other one beats at both."
    across, up = [x for x, _ in points], [y for _, y in points]
    plot = Plot(
        title,
        text,
        fitting(min(across) * 0.99, max(across) * 1.01),
        fitting(min(up) * 0.99, max(up) * 1.01),
        "perplexity within the trained window",
        "perplexity at the target",
    )
    plot.dots(points, WINNER, [f"short {x:.4f}, long {y:.4f}" for x, y in points])
    rows = [(f"{y:.4f}", f"{x:.4f}", str(f.n_hat)) for (x, y), (_, _, f) in zip(points, front, strict=False)]
    note = "Each is the best at some price in short text; the factor file holds the one that is best at the target."
    columns = ("long", "short", "n_hat")
    return Figure(_anchor(view, "pareto"), title, note, [("", plot.node())], None, columns, rows, 0)
