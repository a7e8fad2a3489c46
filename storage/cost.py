"""What a study is made of, in document forwards and gradient steps, and what it had found by then.

Every unit with an outcome counts, also where the outcome was found in the store, and none beyond the document where a
candidate was raced out: the cost of a study does not depend on what others compute. The report rows, which come after
everything was decided, are counted apart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from searcher.rope import Factors
from storage.models import CandidateRow, Evaluation, Study, UnitRow
from storage.progress import RANKED, ScoredCandidate, is_counted, is_report, scored_candidates


@dataclass(frozen=True)
class PartCost:
    """Units with an outcome: document forwards, and gradient steps, each of one document."""

    forwards: int
    gradients: int


@dataclass(frozen=True)
class Cost:
    """What a study, or one stage of it, is made of so far.

    Attributes
    ----------
    forwards: units with an outcome that is no gradient step, failures among them, without the report rows.
    gradients: gradient steps likewise.
    multiple: what a gradient step costs in forwards of the same length: mean seconds over mean seconds, from this
        study's own units, weighted by how many gradient steps a length has; None where either was not timed. Over
        several stages, the mean by their gradient steps, so that the totals of the stages add up to the study's.
    by_part: the same by part of the study; adds up to ``forwards`` and ``gradients``.
    report: document forwards of the report rows: test, short, and the methods' rows on the selection documents.
    """

    forwards: int
    gradients: int
    multiple: float | None
    by_part: Mapping[str, PartCost]
    report: int

    @property
    def total(self) -> float | None:
        """In document forwards; None where there are gradient steps of unknown multiple."""
        if not self.gradients:
            return float(self.forwards)
        return None if self.multiple is None else self.forwards + self.gradients * self.multiple


@dataclass(frozen=True)
class TrajectoryPoint:
    """What a search had found, and what it had cost by then.

    Attributes
    ----------
    forwards, gradients: of its stage so far, this candidate's among them; see ``Cost``.
    factors, origin: the best individual so far, by its loss on all search documents of its stage.
    loss: of that one, in nats a token.
    """

    stage: int
    forwards: int
    gradients: int
    factors: Factors
    origin: str
    loss: float


def cost(session: Session, study: Study, stage: int | None = None) -> Cost:
    """The cost of a study, or of one of its stages."""
    by_part: dict[str, PartCost] = {}
    steps: Counter[int] = Counter()
    report = 0
    for row in scored_candidates(session, study):
        if stage is not None and row.stage != stage:
            continue
        if is_report(row.part, row.generation):
            report += row.scored
        elif row.scored:
            before = by_part.get(row.part, PartCost(0, 0))
            forwards = before.forwards + row.scored - row.gradients
            steps[row.stage] += row.gradients
            by_part[row.part] = PartCost(forwards, before.gradients + row.gradients)
    return Cost(
        forwards=sum(part.forwards for part in by_part.values()),
        gradients=sum(part.gradients for part in by_part.values()),
        multiple=_multiple({number: _stage_multiple(session, study, number) for number in +steps}, steps),
        by_part=by_part,
        report=report,
    )


def _multiple(multiples: Mapping[int, float | None], steps: Mapping[int, int]) -> float | None:
    """The mean of the stages' multiples by their gradient steps."""
    known = [(multiple, steps[stage]) for stage, multiple in multiples.items() if multiple is not None]
    if not known or len(known) < len(multiples):
        return None
    if len(known) == 1:
        return known[0][0]
    return math.fsum(multiple * count for multiple, count in known) / sum(count for _, count in known)


def _stage_multiple(session: Session, study: Study, stage: int) -> float | None:
    """Mean seconds of a gradient step over mean seconds of a plain forward of the same length."""
    timed = (
        select(
            UnitRow.document_length.label("length"),
            case((Evaluation.gradient.is_not(None), 1), else_=0).label("is_step"),
            Evaluation.seconds.label("seconds"),
        )
        .select_from(CandidateRow)
        .join(UnitRow, UnitRow.candidate_id == CandidateRow.id)
        .join(Evaluation, Evaluation.key == UnitRow.key)
        # What failed says nothing: it may have ended early, and a gradient that is not finite reads as none.
        .where(CandidateRow.study_id == study.id, CandidateRow.stage == stage, is_counted())
        .where(UnitRow.failure.is_(None), Evaluation.reason.is_(None))
        .subquery()
    )
    group = (timed.c.length, timed.c.is_step)
    query = select(*group, func.count(), func.sum(timed.c.seconds)).group_by(*group)
    times = {(length, is_step): (count, seconds) for length, is_step, count, seconds in session.execute(query)}
    spent = alike = 0.0
    for (length, is_step), (count, seconds) in sorted(times.items()):
        if is_step and (length, 0) in times:
            plain, plain_seconds = times[length, 0]
            spent += seconds
            alike += count * plain_seconds / plain
    return spent / alike if alike and spent else None


def trajectory(rows: Sequence[ScoredCandidate]) -> list[TrajectoryPoint]:
    """Cost against quality, from the candidates of one stage in the order in which they were asked for.

    A point for every candidate that cost something, from the first one on that has a loss on all search documents; a
    candidate that was raced out or failed costs and is never the best. The report rows are no points. One stage, since
    losses at different lengths do not compare.
    """
    return list(_points(rows))


def _points(rows: Sequence[ScoredCandidate]) -> Iterator[TrajectoryPoint]:
    forwards = gradients = 0
    best: tuple[float, ScoredCandidate] | None = None
    for row in rows:
        if is_report(row.part, row.generation) or not row.scored:
            continue
        forwards += row.scored - row.gradients
        gradients += row.gradients
        if row.part in RANKED and row.nll is not None and row.tokens:
            loss = row.nll / row.tokens
            if best is None or loss < best[0]:  # of equals the first, as the search ranks
                best = (loss, row)
        if best is not None:
            yield TrajectoryPoint(row.stage, forwards, gradients, best[1].factors, best[1].origin, best[0])
