"""When a study's evaluations were computed, by whom, and how long each took.

An evaluation is kept with its worker, its seconds and the moment the driver recorded it, so it began that many seconds
before. One that is older than the study was found in the store, and took none of its time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage.models import CandidateRow, Evaluation, Study, UnitRow
from storage.progress import is_counted

IDLE_SECONDS = 300.0  # what counts as an interruption, at least; see breaks()


@dataclass(frozen=True)
class Timing:
    """One evaluation that a study asked for.

    Attributes
    ----------
    ended: seconds after the study was made; negative where it was computed before that.
    is_gradient: a gradient step.
    """

    stage: int
    part: str
    generation: int
    worker: str
    seconds: float
    ended: float
    is_gradient: bool

    @property
    def began(self) -> float:
        return self.ended - self.seconds


def timings(session: Session, study: Study) -> list[Timing]:
    """Every evaluation of a study once, where it was first asked for, in the order in which they ended."""
    place: tuple[Any, ...] = (CandidateRow.stage, CandidateRow.part, CandidateRow.generation)
    value: tuple[Any, ...] = (
        Evaluation.worker,
        Evaluation.seconds,
        Evaluation.created_at,
        Evaluation.gradient.is_not(None),
    )
    query = (
        select(UnitRow.key, *place, *value)
        .select_from(CandidateRow)
        .join(UnitRow, UnitRow.candidate_id == CandidateRow.id)
        .join(Evaluation, Evaluation.key == UnitRow.key)
        .where(CandidateRow.study_id == study.id, UnitRow.failure.is_(None), is_counted())
        .order_by(CandidateRow.id, UnitRow.position)
    )
    found: dict[str, Timing] = {}
    for key, stage, part, generation, worker, seconds, recorded, is_step in session.execute(query):
        if key not in found:
            ended = seconds_between(study.created_at, recorded)
            found[key] = Timing(stage, part, generation, worker, seconds, ended, bool(is_step))
    return sorted(found.values(), key=lambda timing: timing.ended)


def seconds_between(start: datetime, moment: datetime) -> float:
    """From one moment to another."""
    return (moment - start).total_seconds()


def covered(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans of time as the disjoint, ascending ones that they cover together."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def breaks(spans: Sequence[tuple[float, float]], longest: float) -> list[tuple[float, float]]:
    """Where nothing was at work for so long that the study must have been interrupted, or held up.

    Parameters
    ----------
    spans: when something was.
    longest: seconds of the longest evaluation; a gap counts from five of them on, and from IDLE_SECONDS.
    """
    known = covered(spans)
    least = max(IDLE_SECONDS, 5 * longest)
    gaps = ((before[1], after[0]) for before, after in pairwise(known))
    return [(start, end) for start, end in gaps if end - start >= least]


def without(moment: float, gaps: Sequence[tuple[float, float]]) -> float:
    """A moment on a clock that stands still in the gaps."""
    return moment - sum(min(moment, end) - start for start, end in gaps if start < moment)
