"""The figures of a study's time: what it went into, and how busy the workers were."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from searcher.extension import FINETUNE
from searcher.study import PARTS, REFINE, SHORT
from storage.markup import Figure
from storage.page_data import PageData
from storage.report import RETRIEVAL
from storage.svg import Plot, Scale, banded, legend, linear
from storage.timings import Timing, breaks, covered, seconds_between, without

GRADIENTS, SEARCHING, SELECTING, REPORTING, TUNING, REST = 0, 1, 2, 3, 6, 7
WORDS = {
    GRADIENTS: "gradient steps",
    SEARCHING: "search forwards",
    SELECTING: "selection",
    REPORTING: "test, short, retrieval",
    TUNING: "fine-tuning",
    REST: "loading, waiting",
}
BINS = 66  # of the time axis of the workers' use
LANES = 32
Span = tuple[float, float]


class Clock:
    """A study's time without the breaks in which nothing was at work.

    Attributes
    ----------
    timings: what was computed since the study was made.
    tunings: stage -> when it fine-tuned, in seconds since the study was made.
    gaps: the breaks, likewise.
    length: seconds of work, from the study's beginning to the last thing known of it.
    unit, unit_name: seconds of what the axes count in.
    """

    def __init__(self, data: PageData) -> None:
        self.timings = [timing for timing in data.timings if timing.ended > 0]
        self.tunings = {
            stage.stage: span
            for stage in data.stages
            if stage.kind == FINETUNE and (span := stage_span(data, stage.stage)) is not None
        }
        spans = [(0.0, 0.0), *((max(0.0, t.began), t.ended) for t in self.timings), *self.tunings.values()]
        if data.record.status == "finished":
            end = seconds_between(data.record.created_at, data.record.updated_at)
            spans.append((end, end))
        self.gaps = breaks(spans, max((t.seconds for t in self.timings), default=0.0))
        self.length = self.at(max(end for _, end in spans))
        sizes = ((1.0, "seconds"), (60.0, "minutes"), (3600.0, "hours"), (86400.0, "days"))
        self.unit, self.unit_name = (
            [size for size in sizes if self.length >= 2 * size[0]][-1:][0] if (self.length >= 2) else sizes[0]
        )

    def at(self, moment: float) -> float:
        """A moment in seconds of work."""
        return without(moment, self.gaps)

    def axis(self) -> Scale:
        return linear(0.0, max(self.length, 1e-3) / self.unit)

    def broken(self) -> str:
        """The breaks in a sentence; empty where there were none."""
        if not self.gaps:
            return ""
        total = duration(sum(end - start for start, end in self.gaps))
        breaks_shown = f"one break of {total}" if len(self.gaps) == 1 else f"{len(self.gaps)} breaks of {total} in all"
        return f" Left out: {breaks_shown} with nothing at work."


def duration(seconds: float) -> str:
    """A time in words, in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def stage_span(data: PageData, stage: int) -> Span | None:
    """When a stage ran, in seconds after the study was made, up to the last that is known of it."""
    record = next(row for row in data.stages if row.stage == stage)
    if record.started_at is None:
        return None
    start = seconds_between(data.record.created_at, record.started_at)
    if record.finished_at is not None:
        return start, seconds_between(data.record.created_at, record.finished_at)
    last = max((t.ended for t in data.timings if t.stage == stage), default=start)
    if record.status == "running":
        known = data.made_at if data.record.status == "running" else data.record.updated_at
        last = max(last, seconds_between(data.record.created_at, known))
    return start, max(start, last)


def kind_of(timing: Timing) -> int:
    """What an evaluation was for."""
    if timing.is_gradient or timing.part == REFINE:
        return GRADIENTS
    if timing.part == PARTS[1] and timing.generation == 0:
        return SELECTING
    return REPORTING if timing.part in (*PARTS[1:], SHORT, *RETRIEVAL) else SEARCHING


def time_figures(data: PageData) -> list[Figure]:
    """Every figure that the study has something for."""
    clock = Clock(data)
    if not clock.timings and not clock.tunings:
        return []
    found = [spent_by_stage(data, clock) if data.stages else spent(data, clock), workers_use(clock)]
    return [figure for figure in found if figure is not None]


def spent(data: PageData, clock: Clock) -> Figure | None:
    """A search: the workers' time by what it went into."""
    busy: dict[int, float] = defaultdict(float)
    count: dict[int, int] = defaultdict(int)
    for timing in clock.timings:
        busy[kind_of(timing)] += timing.seconds
        count[kind_of(timing)] += 1
    workers = len({timing.worker for timing in clock.timings})
    busy[REST] = max(0.0, workers * clock.length - sum(busy.values()))
    total = sum(busy.values())
    kinds = sorted(busy)
    title = "Where the time went"
    text = f"{clock.length:,.0f} seconds on {workers} workers."
    names = [WORDS[kind] for kind in kinds]
    x = linear(0.0, max(busy.values()) * 1.02 / clock.unit)
    plot = Plot(
        title, text, x, banded(names), f"{clock.unit_name} of worker time", "", 62 + 32 * len(kinds), None, True
    )
    rows = []
    for place, kind in enumerate(kinds):
        share = f"{busy[kind] / total:.1%}" if total else "-"
        plot.bar(float(place), 0.0, busy[kind] / clock.unit, kind, f"{WORDS[kind]}: {busy[kind]:,.1f} s, {share}")
        rows.append((WORDS[kind], str(count[kind]) if kind != REST else "-", f"{busy[kind]:,.1f}", share))
    found = len(data.timings) - len(clock.timings)
    of_workers = "one worker" if workers == 1 else f"{workers} workers"
    note = f"{clock.length:,.0f} seconds on {of_workers}.{clock.broken()}"
    if found:
        note += f" {found:,} evaluations were found in the store and took no time."
    columns = ("what", "evaluations", "seconds", "share")
    return Figure("time", title, note, [("", plot.node())], None, columns, rows)


def spent_by_stage(data: PageData, clock: Clock) -> Figure | None:
    """An extension: every stage's time by what it went into."""
    shown: list[tuple[str, dict[int, float]]] = []
    for record in data.stages:
        span = stage_span(data, record.stage)
        if span is None:
            continue
        wall = clock.at(span[1]) - clock.at(span[0])
        parts: dict[int, float] = defaultdict(float)
        if record.kind == FINETUNE:
            parts[TUNING] = wall
        else:
            mine = [timing for timing in clock.timings if timing.stage == record.stage]
            workers = max(1, len({timing.worker for timing in mine}))
            for timing in mine:
                parts[kind_of(timing)] += timing.seconds / workers
            parts[REST] = max(0.0, wall - sum(parts.values()))
        shown.append((data.stage_name(record.stage), parts))
    if not shown:
        return None
    title = "Where the time went"
    text = f"{len(shown)} stages, {clock.length:,.0f} seconds in all."
    longest = max(sum(parts.values()) for _, parts in shown)
    names = [shortened(name, 20) for name, _ in shown]
    height = 62 + 26 * len(shown)
    x = linear(0.0, max(longest, 1e-3) * 1.02 / clock.unit)
    plot = Plot(title, text, x, banded(names, 99), clock.unit_name, "", height, None, True)
    for place, (name, parts) in enumerate(shown):
        start = 0.0
        for kind in sorted(parts):
            end = start + parts[kind] / clock.unit
            plot.bar(float(place), start, end, kind, f"{name}, {WORDS[kind]}: {parts[kind]:,.1f} s")
            start = end
    used = sorted({kind for _, parts in shown for kind in parts})
    rows = [
        (name, *(f"{parts[k]:,.1f}" if k in parts else "-" for k in used), f"{sum(parts.values()):,.1f}")
        for name, parts in shown
    ]
    note = f"Time by the clock; where workers compute side by side, the mean of their times.{clock.broken()}"
    columns = ("stage", *(f"{WORDS[kind]}, s" for kind in used), "in all, s")
    entries = [(kind, WORDS[kind]) for kind in used]
    return Figure("time", title, note, [("", plot.node())], legend(entries, "bar"), columns, rows)


def workers_use(clock: Clock) -> Figure | None:
    """How busy each worker was, over the time of work."""
    by_worker: dict[str, list[Timing]] = defaultdict(list)
    for timing in clock.timings:
        by_worker[timing.worker].append(timing)
    if not by_worker:
        return None
    names = sorted(by_worker, key=_natural)
    lanes = names[:LANES]
    width = max(clock.length, 1e-3) / BINS
    tuning = covered((clock.at(start), clock.at(end)) for start, end in clock.tunings.values())
    labels = [shortened(name, 12) for name in lanes] + (["fine-tuning"] if tuning else [])
    title = "Workers' use"
    text = f"{len(names)} workers; each lane is a worker, darker where it was busier."
    height = 62 + (24 if len(labels) < 12 else 15) * len(labels)
    plot = Plot(title, text, clock.axis(), banded(labels, 99), clock.unit_name, "", height, None, True)
    for lane, name in enumerate(lanes):
        spans = [(clock.at(max(0.0, t.began)), clock.at(t.ended)) for t in by_worker[name]]
        _lane(plot, float(lane), _shares(spans, width), width / clock.unit, name)
    if tuning:
        _lane(plot, float(len(lanes)), _shares(tuning, width), width / clock.unit, "fine-tuning")
    for start, end in clock.gaps:
        plot.rule(clock.at(start) / clock.unit, f"a break of {duration(end - start)}, left out")
    open_for = max(clock.length - sum(end - start for start, end in tuning), 1e-3)
    rows, busy_in_all = [], 0.0
    for name in names:
        mine = by_worker[name]
        busy = sum(timing.seconds for timing in mine)
        busy_in_all += busy
        steps = sum(timing.is_gradient for timing in mine)
        rows.append((name, str(len(mine) - steps), str(steps), f"{busy:,.1f}", f"{min(1.0, busy / open_for):.0%}"))
    share = min(1.0, busy_in_all / (open_for * len(names)))
    note = f"Busy {share:.0%} of the time{' outside fine-tuning' if tuning else ''}, loading included.{clock.broken()}"
    if len(names) > LANES:
        note += f" The first {LANES} of {len(names)} are drawn."
    columns = ("worker", "forwards", "gradient steps", "busy, s", "share of the time")
    return Figure("workers", title, note, [("", plot.node())], None, columns, rows)


def _lane(plot: Plot, row: float, shares: Sequence[float], width: float, name: str) -> None:
    for place, share in enumerate(shares):
        tip = f"{name}: {share:.0%} busy"
        plot.cell((place + 0.5) * width, row, share, "", tip, width=width, gap=0.3)


def _shares(spans: Sequence[Span], width: float) -> list[float]:
    """By bin, which share of it the spans cover together."""
    shares = [0.0] * BINS
    for start, end in covered(spans):
        for place in range(max(0, int(start / width)), min(BINS, int(end / width) + 1)):
            shares[place] += max(0.0, min(end, (place + 1) * width) - max(start, place * width)) / width
    return [min(1.0, share) for share in shares]


def _natural(name: str) -> tuple[str, int]:
    """ray-2 before ray-10."""
    digits = name[len(name.rstrip("0123456789")) :]
    return name[: len(name) - len(digits)], int(digits[:15] or 0)


def shortened(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
