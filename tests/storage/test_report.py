"""The tables that people read: what they claim, and what they do not."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from searcher.rope import Factors
from storage.cost import Cost, PartCost
from storage.progress import CurrentStage, ScoredCandidate, StudySummary
from storage.report import cost_line, pareto_table, progress_table, studies_table


def cells(table: Table) -> list[list[str]]:
    """What is in the rows of a table, as printed."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    lines = [line for line in capture.get().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def row(part: str, generation: int, child: int = 0, loss: float | None = None, **values: Any) -> ScoredCandidate:
    given: dict[str, Any] = {
        "stage": 0,
        "origin": f"child {child}",
        "factors": Factors((1.0, 2.0), child),
        "nll": None if loss is None else 10 * loss,
        "tokens": 0 if loss is None else 10,
        "failure": None,
        "documents": 5,
        "scored": 0 if loss is None else 5,
        "gradients": 0,
        "dropped": False,
        "document": None,
    }
    return ScoredCandidate(part=part, generation=generation, child=child, **(given | values))


def step(number: int, loss: float | None, document: str = "a", **values: Any) -> ScoredCandidate:
    return row("refine", number, loss=loss, **({"documents": 1, "document": document, "origin": "refine:pi"} | values))


class TestProgress:
    def test_best_and_median_are_of_whole_candidates(self) -> None:
        members = [row("search", 3, 0, 2.0), row("search", 3, 1, 1.0), row("search", 3, 2, 3.0)]
        members.append(row("search", 3, 3, failure="overflow"))
        members += [row("search", 3, 4 + i, dropped=True, scored=2) for i in range(2)]
        members.append(row("search", 3, 6, dropped=True, scored=1))
        (found,) = cells(progress_table(members))
        figures = [f"{math.exp(value):.4f}" for value in (1.0, 2.0)]
        assert found == ["search", "3", "7", "1", "1 after 1 of 5, 2 after 2 of 5", *figures, "1", "child 1"]

    def test_nothing_whole_shows_no_perplexity(self) -> None:
        (found,) = cells(progress_table([row("search", 0, dropped=True, scored=4), row("search", 0, 1)]))
        assert found == ["search", "0", "2", "0", "1 after 4 of 5", "-", "-", "-", "-"]

    def test_a_refinement_is_one_line(self) -> None:
        steps = [step(i, 3.0 - i / 10, "ab"[i % 2]) for i in range(7)]  # the last step on a is 6
        (found,) = cells(progress_table(steps))
        first, last = (f"{math.exp(value):.4f}" for value in (3.0, 2.4))
        assert found == ["refine", "0-6", "7 steps", "0", "", last, "-", "0", f"refine:pi: from {first} on a"]

    def test_losses_on_different_documents_are_not_compared(self) -> None:
        (found,) = cells(progress_table([step(0, 3.0, "a"), step(1, 1.0, "b")]))
        assert found[5] == f"{math.exp(3.0):.4f}"

    def test_refinements_side_by_side_are_a_line_each(self) -> None:
        rows = [step(i, 3.0, child=c, origin=f"refine:{'same' if c < 2 else 'c'}") for i in range(4) for c in range(3)]
        rows.append(row("refined", 0, loss=1.0))
        rows += [step(i, None, failure="lost") for i in range(4, 6)]
        found = cells(progress_table(rows))
        assert [line[:4] for line in found] == [
            *[["refine", "0-3", "4 steps", "0"]] * 3,
            ["refined", "0", "1", "0"],
            ["refine", "4-5", "2 steps", "2"],
        ]
        assert found[-1][5:] == ["-"] * 4

    def test_the_cost_is_below(self) -> None:
        cost = Cost(100, 20, 2.5, {"search": PartCost(100, 0), "refine": PartCost(0, 20)}, 30)
        expected = (
            "Cost so far: 100 document forwards and 20 gradient steps (2.50 forwards each), 150 forwards in all; "
            "30 forwards more for the reported rows."
        )
        assert cost_line(cost) == expected
        assert progress_table([], cost).caption == expected

    def test_a_cost_that_is_not_known_is_not_claimed(self) -> None:
        assert "in all" not in cost_line(Cost(100, 20, None, {}, 30))
        assert "gradient" not in cost_line(Cost(100, 0, None, {}, 30))


class TestStudies:
    def test_evaluations_that_racing_saved_are_not_awaited(self) -> None:
        moment = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
        summary = StudySummary("s", "search", "stopped", 9, 45, 30, 2, 4, 15, moment, moment)
        (found,) = cells(studies_table([summary]))
        assert found == ["s", "search", "stopped", "", "9", "30/30", "2", "4", "2026-01-02 03:04"]

    def test_an_extension_shows_its_stage(self) -> None:
        moment = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
        stage = CurrentStage(1, 5, "finetune", "running")
        summary = StudySummary("s", "extension", "running", 9, 45, 30, 0, 0, 0, moment, moment, stage)
        (found,) = cells(studies_table([summary]))
        assert found[:4] == ["s", "extension", "running", "2 of 5: finetune, running"]


class TestPareto:
    def test_best_at_the_target_first(self) -> None:
        front = [(2.0, 0.5, (1.0, 4.0)), (1.0, 800.0, (1.25, 8.0))]
        result = {
            "pareto": [
                {"factors": {"lambdas": list(lambdas), "n_hat": 4, "attention_factor": 1.1}, "long": a, "short": b}
                for a, b, lambdas in front
            ]
        }
        assert cells(pareto_table(result)) == [
            [f"{math.exp(1.0):.4f}", "inf", "4", "1.25", "8.00"],
            [f"{math.exp(2.0):.4f}", f"{math.exp(0.5):.4f}", "4", "1.00", "4.00"],
        ]

    def test_a_study_of_one_objective_has_none(self) -> None:
        assert cells(pareto_table({})) == []
