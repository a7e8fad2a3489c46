"""What a person sees while a study runs: a picture that moves in a terminal, lines of text on a pipe.

Observers alone: nothing that is computed, asked for or stored depends on them.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from searcher.study import REFINE, SEARCH_SHORT, SHORT, Candidate, Outcome, Score
from storage.picture import Picture, TuningPicture, search_view, tuning_view
from storage.progress import RANKED

STEPS_A_LINE = 10  # of a refinement, on a pipe
REFRESH_SECONDS = 0.5
RATE_SECONDS = 60.0  # what the rate is of
SEARCHING = (*RANKED, REFINE, SEARCH_SHORT)
Label = Callable[[str, int], str]


class _Screen:
    """Shows what ``draw`` makes, over and over, below whatever is printed; nothing where nobody's terminal is there.

    A thread of its own, so that time goes on between two evaluations. It gives up where drawing fails: a picture is
    never worth a study.
    """

    def __init__(self, console: Console, draw: Callable[[], Sequence[Text]]) -> None:
        self.is_on = console.is_interactive
        self._console, self._draw = console, draw
        self._ended = threading.Event()
        self._live = Live(Text(""), console=console, auto_refresh=False, transient=True)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self.is_on:
            self._ended.clear()
            self._thread = threading.Thread(target=self._run, name="longrope-view", daemon=True)
            self._live.start()
            self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join(timeout=5 * REFRESH_SECONDS)
            self._thread = None
            self._live.stop()

    def _run(self) -> None:
        size = self._console.size
        try:
            while not self._ended.wait(REFRESH_SECONDS):
                if self._console.size != size:  # lines that were folded or cut are not where they were drawn
                    size = self._console.size
                    self._console.clear()
                self._live.update(Text("\n").join([Text(), *self._draw()]), refresh=True)
        except Exception:
            return


class _OnScreen:
    """A block while which a screen shows."""

    _screen: _Screen

    def __enter__(self) -> Self:
        self._screen.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._screen.stop()


class Watcher(_OnScreen):
    """A ``searcher.study.Observer`` for a console.

    Parameters
    ----------
    evaluations: how many the search is expected to need in all; more or fewer only bends the bar.
    generations: the last generation's number.
    gradients: how many of the evaluations are gradient steps.
    afterwards: how many evaluations follow the search.
    title: what is searched.
    label: what a part and a generation are called, where it is no search.
    """

    def __init__(
        self,
        console: Console,
        evaluations: int,
        generations: int,
        gradients: int = 0,
        afterwards: int = 0,
        title: str = "",
        label: Label | None = None,
    ) -> None:
        self._console = console
        self._generations = generations
        self._label = label or self._search_label
        self._started = time.monotonic()
        self._best = math.inf
        self._computed = 0
        self._found = 0
        self._failed = 0
        self._dropped = 0
        self._dropped_here = 0
        self._open = 0  # units of this generation that are neither found nor computed
        self._part = ""
        self._searched = evaluations  # units of the search itself
        self._gradients_left = gradients
        self._spent = {False: (0, 0.0), True: (0, 0.0)}  # forwards and gradient steps: how many, and seconds
        self._recent: deque[float] = deque()
        self._lock = threading.Lock()  # never held while anything is printed
        self._picture = Picture(title, evaluations + afterwards)
        self._screen = _Screen(console, self._draw)

    def generation_started(self, part: str, generation: int, units: int, pending: int) -> None:
        with self._lock:
            picture = self._picture
            picture.phase = self._label(part, generation)
            if part not in SEARCHING and self._part in SEARCHING:  # the search is over, however much it took
                picture.done = max(picture.done, self._searched)
            self._part = part
            self._found += units - pending
            self._open = pending
            self._dropped_here = 0
            self._advance(units - pending)
            picture.found = self._found
            self._gradients_left -= (units - pending) * (part == REFINE)
        if part in ("selection", "test") and pending and self._label == self._search_label and not self._screen.is_on:
            self._console.print(f"scoring on the {part} documents: {pending} evaluations", highlight=False)

    def evaluated(self, outcome: Outcome) -> None:
        with self._lock:
            self._computed += 1
            self._open -= 1
            self._failed += outcome.failure is not None
            self._advance(1)
            self._picture.failed = self._failed
            self._gradients_left -= self._part == REFINE
            if outcome.failure is None:
                times, spent = self._spent[self._part == REFINE]
                self._spent[self._part == REFINE] = (times + 1, spent + outcome.seconds)
            if outcome.worker:
                count, seconds = self._picture.workers.get(outcome.worker, (0, 0.0))
                self._picture.workers[outcome.worker] = (count + 1, seconds + outcome.seconds)
            self._recent.append(time.monotonic())

    def candidates_dropped(self, part: str, generation: int, count: int) -> None:  # noqa: ARG002 - an Observer's
        with self._lock:
            self._dropped += count
            self._dropped_here += count
            self._picture.dropped = self._dropped

    def generation_scored(
        self, part: str, generation: int, candidates: Sequence[Candidate], scores: Sequence[Score]
    ) -> None:
        if part not in RANKED:
            return
        with self._lock:
            self._picture.take(f"{part} {generation}", candidates, scores)

    def generation_finished(self, part: str, generation: int, best: Candidate, score: Score) -> None:
        with self._lock:
            self._advance(max(0, self._open))  # what racing left out, and keys that come twice
            self._open = 0
        if part == REFINE and generation % STEPS_A_LINE == 0 and not self._screen.is_on:
            self._console.print(
                f"refinement step {generation}: perplexity {score.perplexity:.4f} on the step's own windows; "
                f"{self._rate()}",
                highlight=False,
            )
        if part not in RANKED:
            return
        better = score.perplexity < self._best
        self._best = min(self._best, score.perplexity)
        if not self._screen.is_on or better:
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

    def _advance(self, count: int) -> None:
        if self._part != SHORT:  # windows so short that they take no time; they are not in the total
            self._picture.done += count

    def _search_label(self, part: str, generation: int) -> str:
        return {
            "search": f"generation {generation}/{self._generations}",
            SEARCH_SHORT: f"generation {generation}/{self._generations}, short windows",
            REFINE: f"refinement step {generation}",
            "refined": f"refinement, end of leg {generation}",
        }.get(part, f"{part} documents")

    def _rate(self) -> str:
        minutes = (time.monotonic() - self._started) / 60
        return f"{self._computed / minutes:.0f} evaluations/min" if minutes > 0 else ""

    def _draw(self) -> list[Text]:
        now = time.monotonic()
        with self._lock:
            picture = self._picture
            picture.elapsed = now - self._started
            while self._recent and self._recent[0] < now - RATE_SECONDS:
                self._recent.popleft()
            picture.rate = 60 * len(self._recent) / max(1.0, min(RATE_SECONDS, picture.elapsed))
            picture.left = self._left()
            return search_view(picture, self._console.width, self._console.height - 1, self._console.options.ascii_only)

    def _left(self) -> float:
        """Seconds until the end: what is left of each kind by its mean time, at as many at a time as so far."""
        busy = self._spent[False][1] + self._spent[True][1]
        if not busy or not self._picture.elapsed:
            return math.inf
        forward, gradient = (seconds / count if count else 0.0 for count, seconds in self._spent.values())
        forward = forward or gradient / 3
        steps = max(0, self._gradients_left)
        rest = max(self._picture.total - self._picture.done - steps, self._open * (self._part != REFINE), 0)
        return (rest * forward + steps * (gradient or 3 * forward)) * self._picture.elapsed / busy


class TuningWatcher(_OnScreen):
    """Shows a fine-tuning: a line a step on a pipe, as a picture in a terminal.

    Parameters
    ----------
    steps: how many there are.
    title: what is tuned.
    """

    def __init__(self, console: Console, steps: int, title: str = "") -> None:
        self._console, self._steps = console, steps
        self._started = time.monotonic()
        self._first: tuple[int, float] | None = None  # step and moment of the first one of this run
        self._lock = threading.Lock()  # never held while anything is printed
        self._picture = TuningPicture(title, steps)
        self._screen = _Screen(console, self._draw)

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        """What was measured at a step; see ``workers.finetune.tune``."""
        with self._lock:
            self._first = self._first or (step, time.monotonic())
            self._picture.step = max(self._picture.step, step)
            if "loss" in values:
                self._picture.losses.append((step, values["loss"]))
            if "held_out_perplexity" in values:
                self._picture.held_out.append((step, values["held_out_perplexity"]))
        if not self._screen.is_on or "held_out_perplexity" in values:
            shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
            self._console.print(f"step {step}/{self._steps}: {shown}", highlight=False)

    def _draw(self) -> list[Text]:
        now = time.monotonic()
        with self._lock:
            picture = self._picture
            picture.elapsed = now - self._started
            if self._first is not None and picture.step > self._first[0]:
                each = (now - self._first[1]) / (picture.step - self._first[0])
                picture.rate, picture.left = 60 / each, each * (self._steps - picture.step)
            return tuning_view(picture, self._console.width, self._console.height - 1, self._console.options.ascii_only)
