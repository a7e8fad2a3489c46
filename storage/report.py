"""Tables for people: what a search found, which studies there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from searcher.study import Score
from storage.repository import ScoredCandidate, StudySummary
from storage.results import Result, factors_of, perplexities

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
    tokens = count * (length - 1)
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
    """One row a study."""
    table = Table()
    for column in ("study", "kind", "status", "candidates", "evaluations", "failed", "changed (UTC)"):
        table.add_column(column, justify="left" if column in ("study", "kind", "status") else "right")
    for s in summaries:
        table.add_row(
            s.name,
            s.kind,
            s.status,
            str(s.candidates),
            f"{s.done}/{s.units}",
            str(s.failed),
            f"{s.updated_at:%Y-%m-%d %H:%M}",
        )
    return table


def progress_table(rows: Sequence[ScoredCandidate]) -> Table:
    """One row a generation: candidates, failures, and the best perplexity so far on the search documents."""
    table = Table(title="Generations", title_justify="left")
    for column in ("part", "generation", "candidates", "failed", "best", "median", "best n_hat", "origin"):
        table.add_column(column, justify="left" if column in ("part", "origin") else "right")
    groups: dict[tuple[str, int], list[ScoredCandidate]] = {}
    for row in rows:
        groups.setdefault((row.part, row.generation), []).append(row)
    for (part, generation), members in groups.items():
        scored = sorted((m.nll / m.tokens, m.child, m) for m in members if m.nll is not None and m.tokens)
        failed = sum(m.failure is not None for m in members)
        cells = ["-"] * 4
        if scored:
            best, middle = scored[0], scored[len(scored) // 2]
            figures = [Score(m.nll or 0.0, m.tokens).perplexity for _, _, m in (best, middle)]
            cells = [*(f"{value:.4f}" for value in figures), str(best[2].factors.n_hat), best[2].origin]
        table.add_row(part, str(generation), str(len(members)), str(failed), *cells)
    return table
