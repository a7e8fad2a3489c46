"""Tables for people: what a search found, which studies there are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.table import Table

from searcher.study import REFINE, Score
from storage.cost import Cost
from storage.progress import ScoredCandidate, StudySummary
from storage.results import Result, factors_of, pareto_front, perplexities, scores

METHOD_NAMES = {
    "none": "none (extrapolate)",
    "pi": "PI",
    "ntk": "NTK-aware",
    "ntk_base": "NTK-aware, base x s",
    "dynamic_ntk": "dynamic NTK",
    "abf": "ABF, base x 50",
    "yarn": "YaRN",
    "searched": "searched",
    "searched_n_hat_0": "searched, n_hat = 0",
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


def studies_table(summaries: Sequence[StudySummary]) -> Table:
    """One row a study; evaluations out of those that are still wanted, which those of candidates raced out are not."""
    table = Table()
    names = ("study", "kind", "status", "candidates", "evaluations", "failed", "raced out", "changed (UTC)")
    for column in names:
        table.add_column(column, justify="left" if column in ("study", "kind", "status") else "right")
    for s in summaries:
        table.add_row(
            s.name,
            s.kind,
            s.status,
            str(s.candidates),
            f"{s.done}/{s.units - s.skipped}",
            str(s.failed),
            str(s.dropped),
            f"{s.updated_at:%Y-%m-%d %H:%M}",
        )
    return table


def progress_table(rows: Sequence[ScoredCandidate], cost: Cost | None = None) -> Table:
    """One row a generation, one a whole refinement; below them the cost so far.

    Best and median are of the candidates that were scored on all their documents. A refinement shows what its first
    step and its last one on the same window had there.
    """
    caption = None if cost is None else cost_line(cost)
    table = Table(title="Generations", title_justify="left", caption=caption, caption_justify="left")
    for column in ("part", "generation", "candidates", "failed", "raced out", "best", "median", "best n_hat", "origin"):
        table.add_column(column, justify="left" if column in ("part", "origin") else "right")
    groups: dict[tuple[int, str, int | tuple[int, str]], list[ScoredCandidate]] = {}
    for row in rows:
        line = (row.child, row.origin) if row.part == REFINE else row.generation
        groups.setdefault((row.stage, row.part, line), []).append(row)
    for (_, part, _), members in groups.items():
        failed = str(sum(m.failure is not None for m in members))
        first, last = members[0], members[-1]
        if part == REFINE:
            steps = f"{first.generation}-{last.generation}"
            table.add_row(part, steps, f"{len(members)} steps", failed, "", *_descent(members))
            continue
        table.add_row(part, str(first.generation), str(len(members)), failed, _raced_out(members), *_best(members))
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
