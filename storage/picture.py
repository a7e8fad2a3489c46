"""The pictures of a running search and of a running fine-tuning, as lines of text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.text import Text

from searcher.study import Candidate, Score
from storage.charts import BEST, MARK, OTHERS, bars, scatter, span

WIDEST = 108  # columns; wider lines are no easier to read
CHART_WIDTH, CHART_ROWS, FULL_ROWS = 64, 8, 18  # what a chart needs, and what the terminal must have for one
# Seeds that people know, in the order in which they are named.
KNOWN_SEEDS = {"yarn": "YaRN", "dynamic_ntk": "dynamic NTK", "abf": "ABF", "ntk": "NTK", "pi": "PI", "none": "none"}


@dataclass
class Picture:
    """What is shown of a search.

    Attributes
    ----------
    title: what is searched.
    total: evaluations expected in all.
    phase: what goes on.
    done, found, failed, dropped: evaluations over; of them found in the store, failed; candidates raced out.
    elapsed, left: seconds; infinity where nothing is known.
    rate: evaluations a minute, lately.
    workers: name -> evaluations and seconds spent on them.
    points: evaluations done and perplexity of every candidate with a score.
    line: the same of every generation's best that was the best of all then.
    seeds: name -> perplexity.
    spread: best, median and worst perplexity of the last generation, and how many were scored, failed, raced out.
    where: which generation that was.
    best: the best candidate.
    """

    title: str
    total: int
    phase: str = "starting"
    done: int = 0
    found: int = 0
    failed: int = 0
    dropped: int = 0
    elapsed: float = 0.0
    left: float = math.inf
    rate: float = 0.0
    workers: dict[str, tuple[int, float]] = field(default_factory=dict)
    points: list[tuple[float, float]] = field(default_factory=list)
    line: list[tuple[float, float]] = field(default_factory=list)
    seeds: dict[str, float] = field(default_factory=dict)
    spread: tuple[float, float, float, int, int, int] | None = None
    where: str = ""
    best: Candidate | None = None

    def take(self, where: str, candidates: Sequence[Candidate], scores: Sequence[Score]) -> None:
        """A generation that was scored."""
        whole = sorted(score.perplexity for score in scores if score.failure is None)
        raced = sum(score.raced_out for score in scores)
        if whole:
            middle = whole[len(whole) // 2]
            self.spread = (whole[0], middle, whole[-1], len(whole), len(scores) - len(whole) - raced, raced)
            self.where = where
        begun = self.points[-1][0] if self.points else 0.0
        found: list[tuple[float, float, Candidate]] = []
        for i, (candidate, score) in enumerate(zip(candidates, scores, strict=True)):
            if score.failure is not None or not math.isfinite(score.perplexity):
                continue
            x = begun + (self.done - begun) * (i + 1) / len(candidates)  # about when it was scored
            found.append((x, score.perplexity, candidate))
            name = candidate.origin.removeprefix("seed:")
            if name in KNOWN_SEEDS and name != candidate.origin:
                self.seeds[KNOWN_SEEDS[name]] = score.perplexity
        self.points += [(x, perplexity) for x, perplexity, _ in found]
        x, perplexity, best = min(found, key=lambda one: one[1], default=(0.0, math.inf, None))
        if best is not None and (not self.line or perplexity < self.line[-1][1]):
            self.line.append((x, perplexity))
            self.best = best


@dataclass
class TuningPicture:
    """What is shown of a fine-tuning.

    Attributes
    ----------
    title: what is tuned.
    steps, step: how many there are, and the last one done.
    losses, held_out: step and loss of its batch; step and perplexity on held-out text.
    elapsed, left, rate: seconds, seconds, steps a minute.
    """

    title: str
    steps: int
    step: int = 0
    losses: list[tuple[float, float]] = field(default_factory=list)
    held_out: list[tuple[float, float]] = field(default_factory=list)
    elapsed: float = 0.0
    left: float = math.inf
    rate: float = 0.0


def search_view(p: Picture, width: int, height: int, ascii_only: bool = False) -> list[Text]:
    """The picture of a search, cut to a terminal's width and height; charts only where there is room for them."""
    width = min(width, WIDEST) - 1  # a full last column makes some terminals fold
    lines = [*_title(p.title), _bar(p.phase, p.done, p.total, width, ascii_only), _times(p.elapsed, p.left)]
    lines[-1].append(f"   {p.rate:.0f} evaluations/min")
    if p.workers:
        count, seconds = (sum(values) for values in zip(*p.workers.values(), strict=True))
        busy = min(1.0, seconds / (p.elapsed * len(p.workers))) if p.elapsed else 0.0
        lines[-1].append(f"   {len(p.workers)} worker{'s' if len(p.workers) > 1 else ''}, {busy:.0%} busy")
        lines[-1].append(f", {seconds / count:.2g} s each" if count else "")
    if p.best is not None:
        best = Text.assemble(("best ", "bold"), (f"{p.line[-1][1]:.4f}", BEST))
        best.append(f"   n_hat {p.best.factors.n_hat}, {p.best.origin}")
        lines += [Text(), best]
    if p.spread is not None:
        lowest, middle, highest, scored, failed, raced = p.spread
        text = f"{p.where:<11} {lowest:.4f} best, {middle:.4f} median, {_short(highest)} worst of {scored}"
        lines.append(Text(text, style=OTHERS))
        lines[-1].append(f", {raced} raced out" if raced else "")
        lines[-1].append(f", {failed} failed" if failed else "")
    if p.seeds:
        lines.append(Text("seeds       ", style=OTHERS))
        names = [name for name in KNOWN_SEEDS.values() if name in p.seeds]
        lines[-1].append(", ".join(f"{name} {_short(p.seeds[name])}" for name in names), OTHERS)
    if p.best is not None and width >= CHART_WIDTH and height >= FULL_ROWS:
        lambdas = p.best.factors.by_layer()[0]
        side = min(len(lambdas) * (2 if len(lambdas) <= 16 else 1), width // 2 - 10)
        wide = width - side - 22
        left = [Text("perplexity by evaluations", style="bold")]
        left += scatter(p.points, p.line, p.seeds, wide, CHART_ROWS, ascii_only)
        right = [Text("rescale factors by rotary pair", style="bold")]
        right += bars(lambdas, max(1.01, *lambdas), side, CHART_ROWS, ascii_only)
        lines += [Text(), *_beside(left, right, wide + 12)]
    return _cut(lines, width, height)


def tuning_view(p: TuningPicture, width: int, height: int, ascii_only: bool = False) -> list[Text]:
    """The picture of a fine-tuning, cut like that of a search."""
    width = min(width, WIDEST) - 1
    lines = [*_title(p.title), _bar("fine-tuning", p.step, p.steps, width, ascii_only), _times(p.elapsed, p.left)]
    lines[-1].append(f"   {p.rate:.3g} steps/min")
    if p.losses:
        recent = p.losses[-10:]
        mean = math.fsum(loss for _, loss in recent) / len(recent)
        lines += [Text(), Text.assemble(("loss ", "bold"), (f"{mean:.4f}", BEST), f"   mean of the last {len(recent)}")]
    if p.held_out:
        shown = [f"{value:.3f} at {step:.0f}" for step, value in [p.held_out[0], *p.held_out[1:][-3:]]]
        lines.append(Text(f"held-out perplexity {', '.join(shown)}", style=OTHERS))
    plotted = [(step, loss) for step, loss in p.losses if loss > 0 and math.isfinite(loss)]
    if len(plotted) > 1 and width >= CHART_WIDTH and height >= FULL_ROWS:
        lines += [Text(), Text("loss by step", style="bold")]
        lines += scatter(plotted, _smooth(plotted), {}, width - 10, CHART_ROWS, ascii_only)
    return _cut(lines, width, height)


def _title(title: str) -> list[Text]:
    return [Text(title, style="bold")] if title else []


def _bar(what: str, done: int, total: int, width: int, ascii_only: bool) -> Text:
    share = min(1.0, done / total) if total else 0.0
    numbers = f" {done}/{max(total, done)}"
    room = max(4, width - len(numbers) - 32)
    full = round(room * share)
    line, rest = ("#", "-") if ascii_only else ("━", "━")
    return Text.assemble((f"{what:<31.31} ", "bold"), (line * full, BEST), (rest * (room - full), OTHERS), numbers)


def _times(elapsed: float, left: float) -> Text:
    rest = "" if math.isinf(left) else f", about {span(left)} left"
    return Text.assemble(f"{span(elapsed)} gone", (rest, MARK))


def _short(perplexity: float) -> str:
    return f"{perplexity:.4g}" if perplexity < 1e4 else f"{perplexity:.1e}"


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A mean over the last tenth of the points, at each of them."""
    size = max(1, len(points) // 10)
    means = []
    for i, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, i + 1 - size) : i + 1]]
        means.append((x, math.fsum(window) / len(window)))
    return means


def _beside(left: Sequence[Text], right: Sequence[Text], width: int) -> list[Text]:
    """Two blocks of lines next to each other, the second from a column on."""
    rows = []
    for a, b in zip(left, right, strict=True):
        row = a.copy()
        row.pad_right(max(0, width - row.cell_len))
        rows.append(row + b)
    return rows


def _cut(lines: Sequence[Text], width: int, height: int) -> list[Text]:
    """No line folds and none scrolls."""
    kept = list(lines[: max(1, height - 1)])
    for line in kept:
        line.truncate(max(1, width), overflow="crop")
        line.no_wrap = True
    return kept
