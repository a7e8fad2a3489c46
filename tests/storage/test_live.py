"""What a person sees while a search runs."""

from __future__ import annotations

import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from searcher.rope import Factors
from searcher.study import Candidate, Observer, Outcome, Score
from storage.charts import bars, scatter, span
from storage.live import TuningWatcher, Watcher
from storage.picture import Picture, search_view

BEST = Candidate(Factors((1.0, 2.0), 4), "mutant")


def console(terminal: bool) -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    return Console(
        file=file, force_terminal=terminal, force_interactive=terminal, width=200, height=50, color_system=None
    )


def written(to: Console) -> str:
    assert isinstance(to.file, io.TextIOWrapper)
    assert isinstance(to.file.buffer, io.BytesIO)
    return to.file.buffer.getvalue().decode()


def watcher(terminal: bool = False, evaluations: int = 100) -> Watcher:
    return Watcher(console(terminal), evaluations, 4, title="name")


def output(of: Watcher) -> str:
    return written(of._console)


def picture(of: Watcher) -> list[str]:
    return [line.plain.rstrip() for line in of._draw()]


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
        *_, leg, ahead, last = output(quiet).splitlines()
        assert ahead == "scoring on the selection documents: 5 evaluations"
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
        assert picture(shown)[1].split("━")[0].strip() == expected

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
        assert picture(shown)[1].endswith(" 30/30")

    def test_the_search_counts_as_done_once_the_finalists_are_scored(self) -> None:
        shown = watcher(terminal=True, evaluations=30)
        run(shown, "search", 0, 10, 10)
        run(shown, "selection", 0, 5, 2)
        assert picture(shown)[1].endswith(" 35/35")

    def test_best_spread_seeds_and_workers(self) -> None:
        shown = watcher(terminal=True)
        shown.generation_started("search", 0, 4, 4)
        for i in range(4):
            shown.evaluated(Outcome(f"{i}", 1.0, 10, 0.5, f"ray-{i % 2}"))
        losses = {"seed:pi": 4.0, "seed:yarn": 2.0, "seed:shipped_x": 3.0, "mutant": 2.5}
        candidates = [Candidate(Factors((1.0, 2.0), 4), origin) for origin in losses]
        scores = [Score(10 * loss, 10) for loss in losses.values()]
        failed, raced = Score(math.inf, 0, "nan"), Score(math.inf, 0, "raced out", (1.0,), 1, True)
        shown.generation_scored("search", 0, [*candidates, BEST, BEST], [*scores, failed, raced])
        lines = "\n".join(picture(shown))
        assert f"best {math.exp(2):.4f}   n_hat 4, seed:yarn" in lines
        assert (
            f"search 0    {math.exp(2):.4f} best, {math.exp(3):.4f} median, {math.exp(4):.4g} worst of 4, 1 raced out, "
            "1 failed"
        ) in lines
        assert f"YaRN {math.exp(2):.4g}, PI {math.exp(4):.4g}" in lines
        assert "2 workers, " in lines
        assert "0.5 s each" in lines

    def test_the_time_left_counts_gradient_steps_apart(self) -> None:
        shown = Watcher(console(True), 20, 4, gradients=10, afterwards=5)
        run(shown, "search", 0, 5, 0)
        shown.generation_started("search", 1, 5, 5)
        for i in range(5):
            shown.evaluated(Outcome(f"{i}", 1.0, 10, 2.0, "w"))
        shown._started -= 10.0  # ten seconds for ten seconds of work: one at a time
        shown._draw()
        # Of 25 ten are gone, ten are steps of thrice a forward's two seconds, five are forwards.
        assert shown._picture.left == pytest.approx(10 * 6 + 5 * 2, rel=1e-3)

    def test_nothing_is_known_before_the_first_evaluation(self) -> None:
        lines = picture(watcher(terminal=True))
        assert len(lines) == 3
        assert "left" not in lines[2]

    @given(
        width=st.integers(1, 250),
        height=st.integers(1, 60),
        pairs=st.integers(2, 130),
        losses=st.lists(st.one_of(st.floats(0.1, 800), st.just(math.inf)), min_size=1, max_size=12),
        ascii_only=st.booleans(),
    )
    def test_it_fits_every_terminal(
        self, width: int, height: int, pairs: int, losses: list[float], ascii_only: bool
    ) -> None:
        shown = Picture("name", 10, done=3, rate=1e5, workers={"a": (1, 2.0)}, elapsed=3.0, left=1e7)
        found = [Candidate(Factors(tuple(1.0 + i for i in range(pairs))), f"seed:{i}") for i in range(len(losses))]
        scores = [Score(loss, 1) if math.isfinite(loss) else Score(math.inf, 0, "nan") for loss in losses]
        shown.take("search 0", found, scores)
        shown.take("search 1", found, scores)
        lines = search_view(shown, width, height, ascii_only)
        assert len(lines) <= max(1, height - 1)
        assert all(line.cell_len <= max(1, width - 1) for line in lines)
        assert not ascii_only or all(line.plain.isascii() for line in lines)


class TestATuning:
    def test_a_line_a_step_on_a_pipe(self) -> None:
        quiet = TuningWatcher(console(False), 5)
        with quiet:
            quiet.logged(0, {"held_out_perplexity": 9.5})
            quiet.logged(1, {"loss": 2.25, "learning_rate": 1e-4})
        assert written(quiet._console).splitlines() == [
            "step 0/5: held out perplexity 9.5",
            "step 1/5: loss 2.25, learning rate 0.0001",
        ]

    def test_the_loss_in_a_terminal(self) -> None:
        shown = TuningWatcher(console(True), 50, "stage 2 of 4")
        for step in range(1, 21):
            shown.logged(step, {"loss": 3.0 - step / 20})
        shown.logged(20, {"held_out_perplexity": 7.125})
        assert written(shown._console) == "step 20/50: held out perplexity 7.125\n"
        lines = [line.plain.rstrip() for line in shown._draw()]
        assert lines[0] == "stage 2 of 4"
        assert lines[1].endswith(" 20/50")
        assert "loss 2.2250   mean of the last 10" in lines
        assert "held-out perplexity 7.125 at 20" in lines
        assert sum(line.split()[0].replace(".", "").isdigit() for line in lines if line) >= 8  # the chart's axis


def test_the_chart_puts_the_best_at_the_bottom_and_a_level_where_it_belongs() -> None:
    rows = scatter([(0, 16.0), (10, 1.0)], [(0, 16.0), (5, 4.0), (10, 1.0)], {"four": 4.0, "beyond": 99.0}, 20, 5, True)
    plain = [row.plain for row in rows]
    assert [float(row.split()[0]) for row in plain] == pytest.approx([16, 8, 4, 2, 1], rel=1e-3)
    assert "*" in plain[0]
    assert plain[4].endswith("*")
    assert [row.endswith(" four") for row in plain] == [False, False, True, False, False]
    assert "beyond" not in "".join(plain)


def test_a_line_that_rises_is_drawn_to_its_highest() -> None:
    plain = [row.plain[9:] for row in scatter([], [(0, 1.0), (5, 4.0), (10, 2.0)], {}, 20, 5, True)]
    assert [row.find("*") for row in plain] == [10, 10, 10, 10, 0]
    assert [row.rfind("*") for row in plain] == [19, 19, 19, 10, 10]


def test_bars_are_as_high_as_the_logarithm() -> None:
    rows = [row.plain[8:] for row in bars([1.0, 10.0, 100.0, 1000.0, 10000.0], 10000.0, 5, 4, True)]
    assert [sum(row[i] == "#" for row in rows) for i in range(5)] == [0, 1, 2, 3, 4]
    assert len(bars([2.0] * 100, 4.0, 30, 4)[0].plain) <= 8 + 30


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (3725, "1:02:05"), (200000, "2 d 7 h"), (math.inf, "?")],
)
def test_a_span_of_time(seconds: float, expected: str) -> None:
    assert span(seconds) == expected
