"""What a person sees while a search runs: a progress bar in a terminal, a line a generation on a pipe."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from searcher.study import REFINE, SEARCH_SHORT, Candidate, Outcome, Score
from storage.progress import RANKED

STEPS_A_LINE = 10  # of a refinement, on a pipe


class Watcher:
    """A ``searcher.study.Observer`` for a console.

    Parameters
    ----------
    evaluations: how many the study is expected to need in all; more or fewer only bends the bar.
    generations: the last generation's number.
    """

    def __init__(self, console: Console, evaluations: int, generations: int) -> None:
        self._console = console
        self._generations = generations
        self._started = time.monotonic()
        self._best = math.inf
        self._computed = 0
        self._found = 0
        self._failed = 0
        self._dropped = 0
        self._dropped_here = 0
        self._open = 0  # units of this generation that are neither found nor computed
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[best]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=evaluations, best="", rate="")

    def __enter__(self) -> Watcher:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def generation_started(self, part: str, generation: int, units: int, pending: int) -> None:
        where = {
            "search": f"generation {generation}/{self._generations}",
            SEARCH_SHORT: f"generation {generation}/{self._generations}, short windows",
            REFINE: f"refinement step {generation}",
            "refined": f"refinement, end of leg {generation}",
        }.get(part, f"{part} documents")
        self._found += units - pending
        self._open = pending
        self._dropped_here = 0
        self._progress.update(self._task, description=where, advance=units - pending)

    def evaluated(self, outcome: Outcome) -> None:
        self._computed += 1
        self._open -= 1
        self._failed += outcome.failure is not None
        self._progress.update(self._task, advance=1, rate=self._rate())

    def candidates_dropped(self, part: str, generation: int, count: int) -> None:  # noqa: ARG002 - an Observer's
        self._dropped += count
        self._dropped_here += count

    def generation_finished(self, part: str, generation: int, best: Candidate, score: Score) -> None:
        self._progress.update(self._task, advance=max(0, self._open))  # what racing left out, and keys that come twice
        self._open = 0
        if part == REFINE and generation % STEPS_A_LINE == 0 and not self._console.is_terminal:
            self._console.print(
                f"refinement step {generation}: perplexity {score.perplexity:.4f} on the step's own windows; "
                f"{self._rate()}",
                highlight=False,
            )
        if part not in RANKED:
            return
        better = score.perplexity < self._best
        self._best = min(self._best, score.perplexity)
        self._progress.update(self._task, best=f"best {self._best:.4f}")
        if not self._console.is_terminal or better:
            note = f", n_hat {best.factors.n_hat}, {best.origin}" if better else ""
            note += f"; {self._dropped_here} raced out" if self._dropped_here else ""
            where = f"generation {generation}/{self._generations}" if part == "search" else "refinement"
            self._console.print(
                f"{where}: best perplexity {self._best:.4f} on the search documents{note}; {self._rate()}",
                highlight=False,
            )

    def summary(self) -> str:
        """How many evaluations there were, and what became of them."""
        seconds = time.monotonic() - self._started
        text = f"{self._computed} evaluations computed in {seconds:.0f} s, {self._found} found in the store"
        text += f", {self._dropped} candidates raced out" if self._dropped else ""
        return text + (f", {self._failed} failed" if self._failed else "")

    def _rate(self) -> str:
        minutes = (time.monotonic() - self._started) / 60
        return f"{self._computed / minutes:.0f} evaluations/min" if minutes > 0 else ""
