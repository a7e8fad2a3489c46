"""Tables for people: what a search found, which studies there are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from searcher.extension import ExtensionPlan
from searcher.regimes import StageCost
from searcher.study import REFINE, Score
from storage.cost import Cost
from storage.progress import ScoredCandidate, StudySummary
from storage.results import Result, factors_of, pareto_front, perplexities, scores
from storage.stages import StageRecord

METHOD_NAMES = {
    "none": "none (extrapolate)",
    "pi": "PI",
    "ntk": "NTK-aware",
    "ntk_base": "NTK-aware, base x s",
    "dynamic_ntk": "dynamic NTK",
    "abf": "ABF, base x 50",
    "yarn": "YaRN",
    "attention_sinks": "attention sinks (StreamingLLM)",
    "searched": "searched",
    "searched_n_hat_0": "searched, n_hat = 0",
}
TrainingLog = Mapping[str, Mapping[int, float]]  # name -> step -> value
# Part of an evaluation -> the title of its table.
RETRIEVAL = {
    "passkey": "Passkey: right of all trials",
    "key_value": "Key-value retrieval: right of all trials",
    "key_value_json": "Key-value retrieval from a JSON object: right of all trials",
}


def perplexity_table(result: Result, part: str) -> Table:
    """Every method's perplexity on one part, under its own attention factor and under the study's."""
    count, length = result["windows"][part]
    tokens = max((score.tokens for score in scores(result, part).values()), default=0)
    table = Table(
        title=f"Perplexity on the {part} documents: {count} windows of {length} tokens, {tokens} tokens scored",
        title_justify="left",
    )
    table.add_column("method")
    table.add_column("n_hat", justify="right")
    table.add_column("own attention factor", justify="right")
    table.add_column(f"study's attention factor ({result['attention_factor']:.4f})", justify="right")
    own = perplexities(result, part)
    at_study = perplexities(result, part, at_study_attention=True)
    for method in own:
        factors = factors_of(result, method)
        style = "bold" if method == "searched" else None
        table.add_row(
            METHOD_NAMES.get(method, method),
            str(factors.n_hat),
            f"{own[method]:.4f}  (at {factors.attention_factor:.4f})",
            f"{at_study[method]:.4f}" if method in at_study else "-",
            style=style,
        )
    return table


def length_table(lengths: Sequence[int], rows: Mapping[str, Mapping[int, float]]) -> Table:
    """Perplexity by length: one row a method, one column a length; a dash where a method has nothing to say."""
    table = Table(title="Perplexity by length", title_justify="left")
    table.add_column("method")
    for length in lengths:
        table.add_column(str(length), justify="right")
    for method, by_length in rows.items():
        cells = [f"{by_length[length]:.4f}" if length in by_length else "-" for length in lengths]
        table.add_row(METHOD_NAMES.get(method, method), *cells)
    return table


def plan_table(plan: ExtensionPlan, costs: Sequence[StageCost]) -> Table:
    """One row a stage of an extension: what it works on, and about what it costs."""
    title = f"{plan.name}: about what each stage costs (a gradient step as 3 forwards, a tuned chunk as 4)"
    table = Table(title=title, title_justify="left")
    for column in ("stage", "kind", "tokens", "model", "factors", "forwards", "tokens in all"):
        table.add_column(column, justify="right" if "tokens" in column or column == "forwards" else "left")
    for stage, cost in zip(plan.stages, costs, strict=True):
        factors = stage.factors or ""
        table.add_row(
            *(stage.name, stage.kind + (", outside" if stage.outside else ""), f"{cost.length:,}", stage.model),
            *(METHOD_NAMES.get(factors, factors), f"{cost.forwards:,}", f"{cost.tokens:.2e}"),
        )
    return table


def stages_table(stages: Sequence[StageRecord], logs: Mapping[int, TrainingLog]) -> Table:
    """One row a stage of an extension: how far it is, when it ran, and what a fine-tuning did to held-out text."""
    table = Table(title="Stages", title_justify="left")
    for column in ("stage", "name", "kind", "status", "begun (UTC)", "finished (UTC)", "held-out perplexity"):
        table.add_column(column)
    for s in stages:
        held_out = list(logs.get(s.stage, {}).get("held_out_perplexity", {}).values())
        tuned = f"{held_out[0]:.3f} to {held_out[-1]:.3f}" if held_out else ""
        moments = [f"{moment:%Y-%m-%d %H:%M}" if moment else "" for moment in (s.started_at, s.finished_at)]
        table.add_row(str(s.stage + 1), str(s.settings.get("name", "")), s.kind, s.status, *moments, tuned)
    return table


def extension_table(result: Mapping[str, Any]) -> list[Table]:
    """The papers' tables of an extension: perplexity by length, and what retrieval got right of its trials."""
    lengths = [str(length) for length in result["lengths"]]
    tables = []
    for part, title in {"test": "Perplexity on the test documents", **RETRIEVAL}.items():
        rows = {
            name: {length: cells[length][part] for length in lengths if part in cells.get(length, {})}
            for name, cells in result["rows"].items()
        }
        if any(rows.values()):
            show = _test_perplexity if part == "test" else _right
            tables.append(_by_length(title, lengths, rows, show))
            if part != "test":
                tables.append(_by_length(_interval_title(title, rows), lengths, rows, _interval))
    return tables


def evaluation_tables(found: Mapping[str, Any]) -> list[Table | str]:
    """The tables of ``longrope evaluate``, in the order of what can be asked for, and what they were measured on."""
    lengths = found["lengths"]
    shown: list[Table | str] = []
    if "perplexity" in found:
        shown.append(length_table(lengths, found["perplexity"]))
        shown.append("Every window begins with BOS where the tokenizer has one, which counts into its length.")
        for length, size in found["documents"].items():
            shown.append(f"{length}: {size['windows']} windows, {size['tokens_scored']} tokens scored")
    rows = found.get("sliding", [])
    for attention in dict.fromkeys(row["attention"] for row in rows):
        for kind in ("single", "sliding"):
            shown.append(_window_table([row for row in rows if row["attention"] == attention], kind, lengths))
        shown += _position_tables([row for row in rows if row["attention"] == attention], lengths)
    for kind, title in RETRIEVAL.items():
        if kind in found:
            shown.append(_by_length(title, lengths, found[kind], _right))
            shown.append(_by_length(_interval_title(title, found[kind]), lengths, found[kind], _interval))
        if f"{kind}_with_sinks" in found:
            row = {"attention_sinks": found[f"{kind}_with_sinks"]}
            shown.append(_by_length(f"{title}, window attention with sinks", lengths, row, _right))
    titles = {
        "title": ("Titles that were named", lambda cell: f"{cell['right']}/{cell['trials']}"),
        "reports": ("ROUGE-L of summaries", lambda cell: f"{cell['rouge']['rougeL']:.2f}"),
        "questions": ("Questions answered", lambda cell: f"{cell['right']}/{cell['asked']}"),
        "harness": ("lm-evaluation-harness", lambda cell: str(cell["results"])),
    }
    shown += [_by_length(title, lengths, found[k], show) for k, (title, show) in titles.items() if k in found]
    return shown


def _by_length(
    title: str,
    lengths: Sequence[Any],
    rows: Mapping[str, Mapping[Any, Any]],
    show: Callable[[Mapping[str, Any]], str],
) -> Table:
    """A row a method, a column a length."""
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for length in lengths:
        table.add_column(f"{int(length):,}", justify="right")
    for name, cells in rows.items():
        shown = [show(cells[length]) if length in cells else "-" for length in lengths]
        table.add_row(METHOD_NAMES.get(name, name), *shown, style="bold" if name == "longrope" else None)
    return table


def _window_table(rows: Sequence[Mapping[str, Any]], kind: str, lengths: Sequence[int]) -> Table:
    """Perplexity by single or by sliding window, of rows under one attention factor."""
    attention = rows[0]["attention"]
    under = "its own attention factor" if attention == "own" else f"attention factor {attention}"
    cells: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault(row["method"], {})[row["length"]] = row
    strides = ", ".join(str(row["stride"]) for row in {row["length"]: row for row in rows}.values())
    how = "single windows" if kind == "single" else f"sliding windows, stride {strides}"
    return _by_length(
        f"Perplexity, {how}, each method under {under}", lengths, cells, lambda row: _window_cell(row, kind)
    )


def _window_cell(row: Mapping[str, Any], kind: str) -> str:
    if row["failure"] or row[kind] is None:
        return "failed" if row["failure"] else "-"
    value = row[kind]["perplexity"]
    return "inf" if value is None else f"{value:.4f}"


def _position_tables(rows: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> list[Table]:
    """By length: perplexity by position in the window."""
    tables = []
    for length in lengths:
        here = [row for row in rows if row["length"] == length and row["positions"]]
        if not here:
            continue
        table = Table(title=f"Perplexity by position in windows of {length:,} tokens", title_justify="left")
        table.add_column("method")
        for bucket in here[0]["positions"]:
            table.add_column(f"{bucket['start']}-{bucket['end'] - 1}", justify="right")
        for row in here:
            table.add_row(METHOD_NAMES.get(row["method"], row["method"]), *map(_test_perplexity, row["positions"]))
        tables.append(table)
    return tables


def _test_perplexity(cell: Mapping[str, Any]) -> str:
    loss = math.inf if cell["nll"] is None or not cell["tokens"] else cell["nll"] / cell["tokens"]
    return f"{math.exp(loss):.3f}" if loss < 700 else "inf"


def _whole(cell: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row of all depths together."""
    return next((row for row in cell["by_depth"] if row["depth"] is None), None)


def _right(cell: Mapping[str, Any]) -> str:
    whole = _whole(cell)
    return "-" if whole is None else f"{whole['right']}/{whole['trials']}"


def _interval_title(title: str, rows: Mapping[str, Mapping[Any, Mapping[str, Any]]]) -> str:
    chances = [whole["chance"] for cells in rows.values() for cell in cells.values() if (whole := _whole(cell))]
    chance = f"; by chance {max(chances):.1g}" if chances else ""
    return f"{title.split(':')[0]}: 95% interval, k_max{chance}"


def _interval(cell: Mapping[str, Any]) -> str:
    whole = _whole(cell)
    return "-" if whole is None else f"{whole['low']:.0%}-{whole['high']:.0%}, {cell['k_max']}"


def studies_table(summaries: Sequence[StudySummary], width: int = 120) -> Table:
    """One row a study; evaluations out of those that are still wanted, which those of candidates raced out are not.

    Parameters
    ----------
    width: of the terminal, in characters; where they are fewer than 100, the columns that matter least are left out.
    """
    table = Table()
    words = ("study", "kind", "status", "stage")
    left_out = ("kind", "candidates", "failed", "raced out") if width < 100 else ()
    columns = (*words, "candidates", "evaluations", "failed", "raced out", "changed (UTC)")
    for column in columns:
        if column not in left_out:
            # Nobody can resume a study whose name is cut.
            table.add_column(column, justify="left" if column in words else "right", no_wrap=column == "study")
    for s in summaries:
        cells = (
            s.name,
            s.kind,
            s.status,
            "" if s.stage is None else f"{s.stage.stage + 1} of {s.stage.stages}: {s.stage.kind}, {s.stage.status}",
            str(s.candidates),
            f"{s.done}/{s.units - s.skipped}",
            str(s.failed),
            str(s.dropped),
            f"{s.updated_at:%Y-%m-%d %H:%M}",
        )
        table.add_row(*(cell for column, cell in zip(columns, cells, strict=True) if column not in left_out))
    return table


def progress_table(rows: Sequence[ScoredCandidate], cost: Cost | None = None) -> Table:
    """One row a generation, one a whole refinement; below them the cost so far.

    Best and median are of the candidates that were scored on all their documents. A refinement shows what its first
    step and its last one on the same window had there.
    """
    caption = None if cost is None else cost_line(cost)
    table = Table(title="Generations", title_justify="left", caption=caption, caption_justify="left")
    staged = any(row.stage for row in rows)
    columns = ("part", "generation", "candidates", "failed", "raced out", "best", "median", "best n_hat", "origin")
    for column in ("stage", *columns) if staged else columns:
        table.add_column(column, justify="left" if column in ("part", "origin") else "right")
    groups: dict[tuple[int, str, int | tuple[int, str]], list[ScoredCandidate]] = {}
    for row in rows:
        line = (row.child, row.origin) if row.part == REFINE else row.generation
        groups.setdefault((row.stage, row.part, line), []).append(row)
    for (stage, part, _), members in groups.items():
        place = [str(stage + 1)] if staged else []
        failed = str(sum(m.failure is not None for m in members))
        first, last = members[0], members[-1]
        if part == REFINE:
            steps = f"{first.generation}-{last.generation}"
            table.add_row(*place, part, steps, f"{len(members)} steps", failed, "", *_descent(members))
            continue
        table.add_row(
            *place, part, str(first.generation), str(len(members)), failed, _raced_out(members), *_best(members)
        )
    return table


def _best(members: Sequence[ScoredCandidate]) -> list[str]:
    """Best and median perplexity, and n_hat and origin of the best."""
    scored = sorted((m.nll / m.tokens, m.child, m) for m in members if m.nll is not None and m.tokens)
    if not scored:
        return ["-"] * 4
    best, middle = scored[0][2], scored[len(scored) // 2][2]
    return [_perplexity(best), _perplexity(middle), str(best.factors.n_hat), best.origin]


def _descent(steps: Sequence[ScoredCandidate]) -> list[str]:
    """The perplexity of the last step on the window of the first, no median, n_hat, and where it came from."""
    scored = [step for step in steps if step.nll is not None and step.tokens]
    if not scored:
        return ["-"] * 4
    first = scored[0]
    last = [step for step in scored if (step.document, step.tokens) == (first.document, first.tokens)][-1]
    where = "its windows" if first.document is None else first.document
    origin = f"{first.origin}: from {_perplexity(first)} on {where}"
    return [_perplexity(last), "-", str(first.factors.n_hat), origin]


def _perplexity(row: ScoredCandidate) -> str:
    return f"{Score(row.nll or 0.0, row.tokens).perplexity:.4f}"


def _raced_out(members: Sequence[ScoredCandidate]) -> str:
    """How many, and after how many documents: ``7 after 2 of 5``."""
    by_point = Counter((m.scored, m.documents) for m in members if m.dropped)
    return ", ".join(f"{count} after {seen} of {documents}" for (seen, documents), count in sorted(by_point.items()))


def cost_line(cost: Cost) -> str:
    """The cost of a study in a sentence."""
    text = f"Cost so far: {cost.forwards} document forwards"
    if cost.gradients:
        multiple = "not timed against a forward" if cost.multiple is None else f"{cost.multiple:.2f} forwards each"
        text += f" and {cost.gradients} gradient steps ({multiple})"
        if cost.total is not None:
            text += f", {cost.total:.0f} forwards in all"
    return text + f"; {cost.report} forwards more for the reported rows."


def pareto_table(result: Result) -> Table:
    """The candidates that no other one beats at both lengths, the best at the target length first."""
    table = Table(title="Long against short context: no other candidate is better at both", title_justify="left")
    for column in ("perplexity, long", "perplexity, short", "n_hat", "first lambda", "last lambda"):
        table.add_column(column, justify="right")
    for long, short, factors in pareto_front(result):
        lambdas = [value for layer in factors.by_layer() for value in layer]
        figures = (f"{math.exp(loss):.4f}" if loss < 700 else "inf" for loss in (long, short))
        table.add_row(*figures, str(factors.n_hat), f"{lambdas[0]:.2f}", f"{lambdas[-1]:.2f}")
    return table
