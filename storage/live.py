"""What a person sees while a search runs: a progress bar in a terminal, a line a generation on a pipe."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from searcher.study import Candidate, Outcome, Score


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
        where = f"generation {generation}/{self._generations}" if part == "search" else f"{part} documents"
        self._found += units - pending
        self._progress.update(self._task, description=where, advance=units - pending)

    def evaluated(self, outcome: Outcome) -> None:
        self._computed += 1
        self._failed += outcome.failure is not None
        self._progress.update(self._task, advance=1, rate=self._rate())

    def generation_finished(self, part: str, generation: int, best: Candidate, score: Score) -> None:
        if part != "search":
            return
        better = score.perplexity < self._best
        self._best = min(self._best, score.perplexity)
        self._progress.update(self._task, best=f"best {self._best:.4f}")
        if not self._console.is_terminal or better:
            note = f", n_hat {best.factors.n_hat}, {best.origin}" if better else ""
            self._console.print(
                f"generation {generation}/{self._generations}: best perplexity {self._best:.4f} on the search documents"
                f"{note}; {self._rate()}",
                highlight=False,
            )

    def summary(self) -> str:
        """How many evaluations there were, and what became of them."""
        seconds = time.monotonic() - self._started
        text = f"{self._computed} evaluations computed in {seconds:.0f} s, {self._found} found in the store"
        return text + (f", {self._failed} failed" if self._failed else "")

    def _rate(self) -> str:
        minutes = (time.monotonic() - self._started) / 60
        return f"{self._computed / minutes:.0f} evaluations/min" if minutes > 0 else ""
