"""The figures of an extension: its stages, what fine-tuning did, and which factors serve which length."""

from __future__ import annotations

import math
from collections.abc import Mapping

from searcher.extension import EVALUATE, FINETUNE, RECOVER, SEARCH
from storage.factor_file import from_json
from storage.markup import Figure
from storage.page_data import PageData
from storage.page_search import method_name
from storage.page_time import Clock, shortened, stage_span
from storage.svg import SERIES, Plot, banded, fitting, legend, linear

SERIES_OF_KIND = {SEARCH: 1, FINETUNE: 6, RECOVER: 2, EVALUATE: 3}


def extension_figures(data: PageData) -> list[Figure]:
    """Every figure that the extension has something for."""
    found = (
        stages(data),
        training(data, "held_out_perplexity", "Fine-tuning: perplexity on held-out text", "perplexity"),
        training(data, "loss", "Fine-tuning: training loss", "nats a token"),
        regimes(data),
    )
    return [figure for figure in found if figure is not None]


def stages(data: PageData) -> Figure | None:
    """When each stage ran, and what is known of it."""
    assert data.plan is not None
    clock = Clock(data)
    names = [shortened(stage.name, 20) for stage in data.plan.stages]
    title = "Stages"
    done = sum(stage.status == "finished" for stage in data.stages)
    text = f"{done} of {len(data.stages)} stages are finished."
    height = 62 + (26 if len(names) <= 8 else 18) * len(names)
    plot = Plot(title, text, clock.axis(), banded(names, 99), f"{clock.unit_name} of work", "", height, None, True)
    rows, kinds = [], []
    for record in data.stages:
        planned, span = data.plan.stages[record.stage], stage_span(data, record.stage)
        taken = "-"
        if span is not None:
            start, end = clock.at(span[0]), clock.at(span[1])
            taken = f"{end - start:,.0f}"
            kinds.append(planned.kind)
            tip = f"{planned.name}: {record.status}, {taken} s"
            plot.bar(record.stage, start / clock.unit, end / clock.unit, SERIES_OF_KIND.get(planned.kind, 7), tip)
        held_out = list(data.logs.get(record.stage, {}).get("held_out_perplexity", {}).values())
        outcome = f"held-out {held_out[0]:.3f} to {held_out[-1]:.3f}" if held_out else ""
        if record.result is not None and planned.kind == RECOVER:
            outcome = f"serves {method_name(record.result['served'])}"
        elif record.result is not None and planned.kind == SEARCH:
            outcome = f"from {record.result['origin']}"
        works = (f"{planned.length:,}", planned.model, method_name(planned.factors or "-"))
        rows.append((planned.name, planned.kind, *works, record.status, taken, outcome))
    columns = ("stage", "kind", "tokens", "model", "factors", "status", "seconds", "outcome")
    entries = [(SERIES_OF_KIND.get(kind, 7), kind) for kind in dict.fromkeys(kinds)]
    note = f"{text}{clock.broken()}"
    return Figure("stages", title, note, [("", plot.node())], legend(entries, "bar"), columns, rows, 99)


def training(data: PageData, what: str, title: str, unit: str) -> Figure | None:
    """A line a fine-tuning, by step."""
    lines: dict[str, Mapping[int, float]] = {
        data.stage_name(stage): {step: value for step, value in log[what].items() if math.isfinite(value)}
        for stage, log in data.logs.items()
        if what in log
    }
    values = [value for line in lines.values() for value in line.values()]
    if not values:
        return None
    last = max(step for line in lines.values() for step in line)
    y = fitting(min(values) * 0.99, max(values) * 1.01)
    plot = Plot(title, f"{len(lines)} fine-tunings.", linear(0.0, max(last, 1), least=1.0), y, "step", unit)
    entries, rows = [], []
    for place, (name, line) in enumerate(lines.items()):
        series = place % SERIES
        points = [(float(step), value) for step, value in line.items()]
        plot.line(points, series)
        if len(values) <= 60:
            plot.dots(points, series, [f"{name}, step {step:g}: {value:.4f}" for step, value in points], size=2.6)
        entries.append((series, name))
        rows += [(name, str(step), f"{value:.4f}") for step, value in line.items()]
    note = f"At fixed factors, from the weights of the stage before. {len(lines)} in all."
    anchor = f"training-{what.replace('_', '-')}"
    return Figure(anchor, title, note, [("", plot.node())], legend(entries, "both"), ("stage", "step", unit), rows)


def regimes(data: PageData) -> Figure | None:
    """The rescale factors of every regime of the finished extension."""
    if data.record.result is None:
        return None
    file = from_json(data.record.result["factors"])
    first = {f"{r.min_length:,} to {r.max_length:,}": r.factors.by_layer()[0] for r in file.regimes}
    values = [value for line in first.values() for value in line]
    pairs = len(next(iter(first.values())))
    title = "Which factors serve which length"
    y = fitting(min(1.0, *values), max(values) * 1.03)
    text = f"Rescale factors of {len(first)} regimes."
    plot = Plot(
        title, text, linear(0.0, max(1.0, pairs - 1.0), least=1.0), y, "rotary pair (0 turns fastest)", "lambda"
    )
    entries = []
    for place, (name, line) in enumerate(first.items()):
        series = (len(first) - 1 - place) % SERIES  # the longest in the winner's colour
        plot.line([(float(n), value) for n, value in enumerate(line)], series)
        entries.append((series, f"{name} tokens"))
    rows = []
    for name, regime in zip(first, file.regimes, strict=True):
        known = ", ".join(f"{part} {score.perplexity:.4f}" for part, score in regime.scores.items()) or "-"
        factors = regime.factors
        shown = (f"{factors.by_layer()[0][0]:.4f}", f"{factors.by_layer()[0][-1]:.4f}")
        rows.append((name, str(factors.n_hat), f"{factors.attention_factor:.4f}", *shown, known))
    columns = ("tokens", "n_hat", "attention factor", "first lambda", "last lambda", "perplexity")
    note = "The factor file holds them all; a sequence takes those of the regime its length falls in."
    return Figure("regimes", title, note, [("", plot.node())], legend(entries), columns, rows)
