"""What a person sees while a search runs."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from searcher.rope import Factors
from searcher.study import Candidate, Observer, Outcome, Score
from storage.live import Watcher

BEST = Candidate(Factors((1.0, 2.0), 4), "mutant")


def watcher(terminal: bool = False, evaluations: int = 100) -> Watcher:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)
    return Watcher(console, evaluations, 4)


def output(of: Watcher) -> str:
    file = of._console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def run(observer: Observer, part: str, generation: int, units: int, computed: int, loss: float = 1.0) -> None:
    observer.generation_started(part, generation, units, units)
    for i in range(computed):
        observer.evaluated(Outcome(f"{i}", 1.0, 10))
    observer.generation_finished(part, generation, BEST, Score(10 * loss, 10))


class TestOnAPipe:
    def test_a_refinement_says_something_every_ten_steps(self) -> None:
        quiet = watcher()
        for step in range(25):
            run(quiet, "refine", step, 1, 1, 3.0 - step / 100)
        lines = output(quiet).splitlines()
        assert [line.partition(":")[0] for line in lines] == [f"refinement step {n}" for n in (0, 10, 20)]
        assert f"perplexity {math.exp(2.9):.4f} on the step's own windows" in lines[1]

    def test_a_generation_says_how_many_were_raced_out(self) -> None:
        quiet = watcher()
        quiet.generation_started("search", 0, 10, 10)
        quiet.generation_finished("search", 0, BEST, Score(10.0, 10))
        quiet.generation_started("search", 1, 10, 10)
        quiet.candidates_dropped("search", 1, 3)
        quiet.generation_finished("search", 1, BEST, Score(9.0, 10))
        first, second = output(quiet).splitlines()
        assert "raced out" not in first
        assert f"generation 1/4: best perplexity {math.exp(0.9):.4f}" in second
        assert "mutant; 3 raced out" in second
        assert ", 3 candidates raced out" in quiet.summary()

    def test_the_end_of_a_leg_counts_as_best_and_a_step_does_not(self) -> None:
        quiet = watcher()
        run(quiet, "search", 0, 5, 5, 1.0)
        run(quiet, "refine", 0, 1, 1, 0.1)
        run(quiet, "refined", 0, 5, 5, 0.9)
        run(quiet, "selection", 0, 5, 5, 0.2)
        run(quiet, "search", 1, 5, 5, 0.95)
        *_, leg, last = output(quiet).splitlines()
        assert leg.startswith(f"refinement: best perplexity {math.exp(0.9):.4f}")
        assert f"best perplexity {math.exp(0.9):.4f}" in last
        assert "raced out" not in quiet.summary()


class TestInATerminal:
    @pytest.mark.parametrize(
        ("part", "expected"),
        [
            ("search", "generation 3/4"),
            ("search_short", "generation 3/4, short windows"),
            ("refine", "refinement step 3"),
            ("refined", "refinement, end of leg 3"),
            ("test", "test documents"),
        ],
    )
    def test_what_goes_on(self, part: str, expected: str) -> None:
        shown = watcher(terminal=True)
        shown.generation_started(part, 3, 10, 10)
        assert shown._progress.tasks[0].description == expected

    def test_steps_print_no_lines(self) -> None:
        shown = watcher(terminal=True)
        for step in range(25):
            run(shown, "refine", step, 1, 1)
        assert output(shown) == ""

    def test_the_bar_reaches_its_end_in_spite_of_racing(self) -> None:
        shown = watcher(terminal=True, evaluations=30)
        run(shown, "search", 0, 10, 10)
        run(shown, "search", 1, 10, 4)
        shown.generation_started("search", 2, 10, 3)  # seven were found
        shown.generation_finished("search", 2, BEST, Score(10.0, 10))
        assert shown._progress.tasks[0].completed == 30
