"""How far a study is: which candidates have a score, which failed, which were raced out."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import groupby, takewhile
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, and_, case, func, select
from sqlalchemy.orm import Session, aliased

from searcher.rope import Factors
from searcher.study import REFINE, SEARCH_SHORT, Outcome
from storage.models import CandidateRow, Evaluation, StageRow, Study, UnitRow
from storage.stages import FINISHED
from storage.study_store import factors_of, outcome_of, units

SELECTION = "selection"
RANKED = ("search", "refined")  # parts scored on the search documents, generations and ends of refinements
CHOSEN_FROM = (*RANKED, SEARCH_SHORT, REFINE)  # parts that are over once the finalists are written


@dataclass(frozen=True)
class CurrentStage:
    """Where an extension is: the first stage that is not finished, or the last one.

    Attributes
    ----------
    stage: its number, from 0.
    stages: how many there are.
    kind, status: as in ``StageRecord``.
    """

    stage: int
    stages: int
    kind: str
    status: str


@dataclass(frozen=True)
class StudySummary:
    """A study in figures, summed over its stages where it has some.

    There is no best: losses at different lengths do not compare.

    Attributes
    ----------
    status: ``running``, ``stopped`` (no live driver holds it) or ``finished``.
    candidates, units: how many were written.
    done: units with an outcome, whether of this study or of another that computed the same key; without what others
        computed beyond the document where a candidate was raced out.
    failed: those of them that failed.
    dropped: candidates that were raced out.
    skipped: units that will never have an outcome, since their candidate was raced out or failed on another document.
    stage: the current one of an extension; None in a plain search.
    """

    name: str
    kind: str
    status: str
    candidates: int
    units: int
    done: int
    failed: int
    dropped: int
    skipped: int
    created_at: datetime
    updated_at: datetime
    stage: CurrentStage | None = None


@dataclass(frozen=True)
class ScoredCandidate:
    """One candidate of a generation, with its score.

    Attributes
    ----------
    child: place in the generation, in ask order.
    nll, tokens: totals over all its documents, in nats; None and 0 where it failed, was raced out or is not finished.
        Never a sum over some of the documents.
    failure: why there is no such total; None where there is one, or none yet, or where it was raced out.
    documents: how many it was written for.
    scored: how many of them have an outcome; where racing left it, those before it did, whatever others computed.
    gradients: how many of those outcomes are gradient steps.
    dropped: raced out: it was scored on fewer than ``documents``, none of which failed.
    document: name of its document, where it has only one.
    number: grows in the order in which candidates were written.
    by_document: nats and tokens of each document, up to the first without a finite loss.
    started_at, finished_at: when the first of its documents was begun and the last one was kept, by the clocks of those
        who computed them, maybe for another study; None where none was.
    """

    stage: int
    part: str
    generation: int
    child: int
    origin: str
    factors: Factors
    nll: float | None
    tokens: int
    failure: str | None
    documents: int
    scored: int
    gradients: int
    dropped: bool
    document: str | None
    by_document: tuple[tuple[float, int], ...] = ()
    # What differs between equal runs is no part of what makes two of them equal.
    number: int = field(default=0, compare=False)
    started_at: datetime | None = field(default=None, compare=False)
    finished_at: datetime | None = field(default=None, compare=False)
    seconds: float = field(default=0.0, compare=False)


class Place(NamedTuple):
    """A generation of a study."""

    stage: int
    part: str
    generation: int


def is_report(part: str, generation: int) -> bool:
    """Whether a generation only reports: it came after everything was decided."""
    return part in ("test", "short") or (part == SELECTION and generation > 0)


def is_gradient(part: str, outcome: Outcome) -> bool:
    """Whether an outcome is of a gradient step; in a refinement, what failed was meant to be one."""
    return outcome.gradient is not None or (part == REFINE and outcome.failure is not None)


def over(first_ids: Iterable[tuple[Place, int]]) -> set[Place]:
    """Generations of an unfinished study that are over: a successor was written after them.

    A successor is a later generation of the same part and stage, the finalists of the stage, or anything of a later
    stage. (The generations of a stage that was finished are over in any case, which is not seen from them.)

    Parameters
    ----------
    first_ids: every generation with the lowest id of its candidates, which tells what was written after what.
    """
    known = list(first_ids)
    newest: dict[tuple[int, str], int] = {}
    finalists: dict[int, int] = {}
    last_stage = max((place.stage for place, _ in known), default=0)
    for place, first in known:
        line = (place.stage, place.part)
        newest[line] = max(newest.get(line, first), first)
        if place.part == SELECTION:
            finalists[place.stage] = min(finalists.get(place.stage, first), first)
    return {
        place
        for place, first in known
        if place.stage < last_stage
        or newest[place.stage, place.part] > first
        or (place.part in CHOSEN_FROM and finalists.get(place.stage, first) > first)
    }


def is_counted() -> ColumnElement[bool]:
    """Of a row of candidates and units: not beyond the document where the candidate was raced out."""
    return CandidateRow.seen.is_(None) | (UnitRow.position < CandidateRow.seen)


def counts() -> Select[Any]:
    """By generation: study and place, lowest candidate id, settled, candidates, units, done, failed, short, missing.

    ``settled`` counts candidates that know how many documents they were scored on, ``short`` those that have not
    failed and lack an outcome, ``missing`` all units without one.
    """
    failed = UnitRow.failure.is_not(None) | Evaluation.nll.is_(None) | Evaluation.reason.is_not(None)
    outcome = case((is_counted(), func.coalesce(UnitRow.failure, Evaluation.key)))
    place = (CandidateRow.study_id, CandidateRow.stage, CandidateRow.part, CandidateRow.generation)
    one = (
        select(
            *place,
            CandidateRow.id,
            CandidateRow.seen,
            func.count(UnitRow.key).label("units"),
            func.count(outcome).label("done"),
            func.count(case((and_(outcome.is_not(None), failed), 1))).label("failed"),
        )
        .outerjoin(UnitRow, UnitRow.candidate_id == CandidateRow.id)
        .outerjoin(Evaluation, Evaluation.key == UnitRow.key)
        .group_by(*place, CandidateRow.id, CandidateRow.seen)
        .subquery()
    )
    generation = (one.c.study_id, one.c.stage, one.c.part, one.c.generation)
    return select(
        *generation,
        func.min(one.c.id),
        func.count(one.c.seen),
        func.count(),
        func.sum(one.c.units),
        func.sum(one.c.done),
        func.sum(one.c.failed),
        func.count(case((and_(one.c.failed == 0, one.c.done < one.c.units), 1))),
        func.sum(one.c.units - one.c.done),
    ).group_by(*generation)


def figures(
    rows: Sequence[Sequence[Any]], finished: bool, finished_stages: Collection[int] = ()
) -> tuple[int, int, int, int, int, int]:
    """candidates, units, done, failed, dropped and skipped of one study, from its rows of counts()."""
    places = [Place(*row[1:4]) for row in rows]
    ended = set(places) if finished else over((place, row[4]) for place, row in zip(places, rows, strict=True))
    ended |= {place for place, row in zip(places, rows, strict=True) if row[5] or place.stage in finished_stages}
    totals = [0] * 6
    for place, row in zip(places, rows, strict=True):
        *plain, short, missing = (int(value) for value in row[6:])  # PostgreSQL's sums are Decimals
        never = (short, missing) if place in ended else (0, 0)
        totals = [total + value for total, value in zip(totals, (*plain, *never), strict=True)]
    candidates, written, known, failed, dropped, skipped = totals
    return candidates, written, known, failed, dropped, skipped


def current_stage(stages: Sequence[tuple[int, str, str]]) -> CurrentStage | None:
    """The current stage, from every stage's number, kind and status in order."""
    if not stages:
        return None
    number, kind, status = next((stage for stage in stages if stage[2] != FINISHED), stages[-1])
    return CurrentStage(number, len(stages), kind, status)


def scored_candidates(session: Session, study: Study, after: int = 0) -> list[ScoredCandidate]:
    """Every candidate of a study with its score, stage by stage, in the order in which they were asked for.

    Parameters
    ----------
    after: leave out those whose number is not above this one.
    """
    mine = CandidateRow.study_id == study.id
    query = units(CandidateRow.id, UnitRow.document_name, Evaluation.created_at)
    query = query.where(mine, CandidateRow.id > after).order_by(CandidateRow.id, UnitRow.position)
    names: dict[int, list[str]] = {}
    outcomes: dict[int, list[Outcome | None]] = {}
    kept_at: dict[int, list[datetime | None]] = {}
    for candidate, group in groupby(session.execute(query), lambda row: row[0]):
        members = list(group)
        names[candidate] = [row[1] for row in members]
        kept_at[candidate] = [row[2] for row in members]
        outcomes[candidate] = [outcome_of(*row[3:]) for row in members]
    new = aliased(CandidateRow)  # whole rows of those alone; of the others only their places
    of_its_stage = and_(StageRow.study_id == CandidateRow.study_id, StageRow.stage == CandidateRow.stage)
    place = (CandidateRow.stage, CandidateRow.part, CandidateRow.generation)
    everywhere = select(CandidateRow.id, CandidateRow.seen, StageRow.status, *place, new).where(mine)
    everywhere = everywhere.outerjoin(StageRow, of_its_stage)
    everywhere = everywhere.outerjoin(new, and_(new.id == CandidateRow.id, new.id > after))
    candidates: list[CandidateRow] = []
    first: dict[Place, int] = {}
    ended: set[Place] = set()
    for number, seen, status, stage, part, generation, row in session.execute(everywhere):
        here = Place(stage, part, generation)
        first[here] = min(first.get(here, number), number)
        if seen is not None or status == FINISHED:
            ended.add(here)
        if row is not None:
            candidates.append(row)
    ended |= set(first) if study.status == "finished" else over(first.items())
    scored = []
    for row in sorted(candidates, key=lambda row: (row.stage, first[_place(row)], row.child)):
        found = outcomes.get(row.id, [])
        seen = row.seen
        if seen is None and _place(row) in ended and None in found:  # it ends where its outcomes do
            seen = found.index(None)
        if seen is not None:  # what lies beyond was asked for by others, and not looked at here
            found = found[:seen] + [None] * (len(found) - seen)
        known = [outcome for outcome in found if outcome is not None]
        documents = names.get(row.id, [])
        nll, tokens, failure = _total(found)
        started_at, finished_at = _between(found, kept_at.get(row.id, []))
        scored.append(
            ScoredCandidate(
                stage=row.stage,
                part=row.part,
                generation=row.generation,
                child=row.child,
                origin=row.origin,
                factors=factors_of(row),
                nll=nll,
                tokens=tokens,
                failure=failure,
                documents=len(documents),
                scored=len(known),
                gradients=sum(is_gradient(row.part, outcome) for outcome in known),
                dropped=_place(row) in ended and failure is None and len(known) < len(documents),
                document=documents[0] if len(documents) == 1 else None,
                number=row.id,
                by_document=tuple((o.nll, o.tokens) for o in takewhile(_is_finite, found) if o and o.nll is not None),
                started_at=started_at,
                finished_at=finished_at,
                seconds=math.fsum(outcome.seconds for outcome in known),
            )
        )
    return scored


def _place(row: CandidateRow) -> Place:
    return Place(row.stage, row.part, row.generation)


def _is_finite(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.nll is not None and math.isfinite(outcome.nll)


def _between(
    outcomes: Sequence[Outcome | None], kept_at: Sequence[datetime | None]
) -> tuple[datetime | None, datetime | None]:
    """When the first of the outcomes was begun and the last was kept; None, None where none was computed."""
    pairs = zip(outcomes, kept_at, strict=True)
    known = [(moment - timedelta(seconds=o.seconds), moment) for o, moment in pairs if o and moment]
    return (min(begun for begun, _ in known), max(kept for _, kept in known)) if known else (None, None)


def _total(outcomes: Sequence[Outcome | None]) -> tuple[float | None, int, str | None]:
    """nll, tokens and failure, summed as the driver sums them."""
    failure = next((o.failure for o in outcomes if o is not None and o.failure is not None), None)
    known = [(o.nll, o.tokens) for o in outcomes if o is not None and o.nll is not None]
    if failure is not None or len(known) < len(outcomes):
        return None, 0, failure
    return math.fsum(nll for nll, _ in known), sum(tokens for _, tokens in known), None
