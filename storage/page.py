"""A study as one HTML page: no script, nothing from a network, light or dark as its reader is."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from searcher.extension import EVALUATE
from storage.markup import Content, Figure, Node, element, table, write_html, write_part
from storage.measured import of_extension
from storage.page_data import PageData, SearchView
from storage.page_extension import extension_figures
from storage.page_measured import measured_figures
from storage.page_search import method_name, search_figures
from storage.page_time import Clock, duration, time_figures
from storage.report import cost_line
from storage.results import perplexities
from storage.svg import short_length

# Even if a name could become markup, a browser would neither run nor fetch anything.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = Path(__file__).with_name("page.css")


def is_page(path: Path, study: str) -> bool:
    """Whether a file is what ``render`` made of a study of this name."""
    try:
        with path.open(encoding="utf-8") as file:
            return write_part(_title(study)) in file.read(4096)
    except (OSError, ValueError):
        return False


def _title(study: str) -> Node:
    return element("title", f"{study}: LongRoPE report")


def render(data: PageData) -> str:
    """The page as HTML."""
    name = data.record.name
    sections = [section for section in _sections(data) if section is not None]
    links = [element("li", element("a", element("bdi", title), href=f"#{anchor}")) for anchor, title, _ in sections]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        _title(name),
        element("style", STYLE.read_text(encoding="utf-8")),
    )
    main = element(
        "main",
        element(
            "header",
            element("h1", element("bdi", name), " ", element("span", data.record.status, class_=_status(data))),
            *_introduction(data),
            _cards(data),
        ),
        element("nav", element("ul", *links), aria_label="On this page"),
        *(
            element("section", element("h2", element("bdi", title)), *content, id=anchor)
            for anchor, title, content in sections
        ),
        element("footer", element("p", f"Made {data.made_at:%Y-%m-%d %H:%M} UTC by longrope report.", class_="muted")),
    )
    return write_html(element("html", head, element("body", main), lang="en"))


def _status(data: PageData) -> str:
    known = data.record.status in ("running", "stopped", "finished")
    return f"status {data.record.status if known else 'stopped'}"


Section = tuple[str, str, Sequence[Content]]


def _sections(data: PageData) -> list[Section | None]:
    found: list[Section | None] = []
    if data.plan is not None:
        found.append(_figures("extension", "The extension", extension_figures(data)))
        evaluated = next((row for row in data.stages if row.kind == EVALUATE and row.result is not None), None)
        if evaluated is not None and evaluated.result is not None:
            figures = measured_figures(of_extension(evaluated.result), 0)
            found.append(_figures("evaluation", "What it came to", figures))
    for view in data.searches:
        title = f"Stage {view.stage + 1}: {view.name}" if view.name else "The search"
        words = f"{view.kind}, {view.length:,} tokens, {view.scale:g} times the trained window. {cost_line(view.cost)}"
        found.append(_figures(f"search-{view.stage}", title, search_figures(view), words))
    for place, measured in enumerate(data.evaluations, 1):
        figures = measured_figures(measured, place)
        found.append(_figures(f"evaluation-{place}", f"Measured: {measured.source}", figures))
    found.append(_figures("time", "Time and workers", time_figures(data)))
    found.append(("failures", "Failures", _failures(data)))
    found.append(("again", "The same again", _again(data)))
    return found


def _figures(anchor: str, title: str, figures: Sequence[Figure], words: str = "") -> Section:
    shown = [figure.node() for figure in figures]
    body = element("div", *shown, class_="figures") if shown else element("p", "Nothing yet.", class_="muted")
    return f"part-{anchor}", title, [element("p", words, class_="muted") if words else None, body]


def _introduction(data: PageData) -> list[Node]:
    model, spec = data.identity, data.identity.spec
    kind = "Progressive extension" if data.plan is not None else "Search of rescale factors"
    first = element(
        "p",
        f"{kind} of ",
        element("strong", element("bdi", model.name)),
        f" ({model.family}), from {spec.original_length:,} to {data.length:,} tokens: "
        f"{spec.scale(data.length):g} times its window.",
    )
    begun = f"Begun {data.record.created_at:%Y-%m-%d %H:%M} UTC, last changed {data.record.updated_at:%Y-%m-%d %H:%M}."
    unfinished = " What follows is what there is so far." if data.record.status != "finished" else ""
    return [first, element("p", begun + unfinished, class_="muted")]


def _cards(data: PageData) -> Node:
    cards: list[tuple[str, str]] = []
    if data.plan is not None:
        done = sum(stage.status == "finished" for stage in data.stages)
        cards.append((f"{done} of {len(data.stages)}", "stages finished"))
        cards += _extension_cards(data)
    else:
        cards += _search_cards(data.searches[0])
    total = data.cost.total
    cost = data.cost.forwards + data.cost.gradients if total is None else total
    cards.append((f"{cost:,.0f}", "cost in document forwards"))
    time, unit = duration(Clock(data).length).split()
    cards.append((time, f"{unit} at work"))
    return element(
        "ul",
        *(element("li", element("strong", value), element("span", words)) for value, words in cards),
        class_="cards",
    )


def _search_cards(view: SearchView) -> list[tuple[str, str]]:
    if view.result is None:
        points = view.points()
        if not points:
            return []
        best = math.exp(min(points[-1].loss, 700.0))
        return [(f"{best:#.4g}", "best perplexity so far, search set"), (str(points[-1].factors.n_hat), "its n_hat")]
    part = "test" if "test" in view.result["scores"] else "selection"
    own = perplexities(view.result, part)
    under = perplexities(view.result, part, at_study_attention=True)
    better = {name: min(own[name], under.get(name, math.inf)) for name in own if not name.startswith("searched")}
    cards = [(f"{own['searched']:#.4g}", f"{part} perplexity, searched")]
    if better:
        rival = min(better, key=lambda name: better[name])
        cards.append((f"{better[rival]:#.4g}", f"the best other: {method_name(rival)}"))
        if math.isfinite(better[rival]):
            change = own["searched"] / better[rival] - 1
            cards.append((f"{change:+.1%}".replace("-", "\N{MINUS SIGN}"), "against that one"))
    cards.append((str(view.result["factors"]["searched"]["n_hat"]), "n_hat"))
    return cards


def _extension_cards(data: PageData) -> list[tuple[str, str]]:
    evaluated = next((row.result for row in data.stages if row.kind == EVALUATE and row.result is not None), None)
    if evaluated is None:
        return []
    table_of = of_extension(evaluated).perplexity
    longest = max((length for cells in table_of.values() for length in cells), default=0)
    at = {name: cells[longest] for name, cells in table_of.items() if longest in cells}
    if "longrope" not in at:
        return []
    cards = [(f"{at['longrope']:#.4g}", f"perplexity at {short_length(longest)}")]
    others = {name: value for name, value in at.items() if not name.startswith("longrope")}
    if others:
        rival = min(others, key=lambda name: others[name])
        cards.append((f"{others[rival]:#.4g}", f"the best other: {method_name(rival)}"))
    return cards


def _failures(data: PageData) -> list[Node]:
    reasons: Counter[tuple[str, str, str]] = Counter()
    examples: dict[tuple[str, str, str], str] = {}
    for row in data.rows:
        if row.failure is not None:
            key = (data.stage_name(row.stage), row.part, row.failure)
            reasons[key] += 1
            examples.setdefault(key, f"{row.origin}, generation {row.generation}")
    dropped = sum(row.dropped for row in data.rows)
    left = f"{dropped} candidates were raced out, which is no failure." if dropped else "No candidate was raced out."
    if not reasons:
        return [element("p", f"No candidate failed. {left}")]
    rows = [
        (stage or "-", part, reason, str(count), examples[stage, part, reason])
        for (stage, part, reason), count in reasons.most_common(200)
    ]
    columns = ("stage", "part", "reason", "candidates", "the first of them")
    shown = element("div", table(columns, rows, 99), class_="card wrap")
    return [element("p", f"{sum(reasons.values())} candidates failed. {left}"), shown]


def _again(data: PageData) -> list[Node]:
    found = []
    if data.plan_file is not None:
        found += [element("p", "The plan, as plan.toml:"), element("pre", data.plan_file)]
    if data.commands:
        found.append(element("pre", "\n".join(data.commands)))
    found += [element("p", remark, class_="muted") for remark in data.remarks]
    profile = data.record.profile or next((row.profile for row in data.stages if row.profile), None)
    rows = [("model", data.identity.name), ("weights and config, SHA-256", data.identity.weights_sha256)]
    rows += [(str(key), str(value)) for key, value in (profile or {}).items()]
    found.append(element("p", "What decides its last bits:"))
    found.append(element("div", table(("what", "value"), rows, 99), class_="card wrap"))
    stored = {key: value for key, value in data.record.settings.items() if key != "documents"}
    found.append(
        element("details", element("summary", "All settings, as stored"), element("pre", json.dumps(stored, indent=1)))
    )
    return found
