"""The store: studies, generations, units and evaluations in an SQL database. The only place that opens a Session."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any

from sqlalchemy import case, delete, exists, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from searcher.errors import LongRopeError
from searcher.rope import Factors
from searcher.study import Outcome
from storage import lease
from storage.database import WRITES, connect, explained, parse
from storage.models import JSON, CandidateRow, Evaluation, Study, UnitRow, now
from storage.study_store import StudyStore, factors_of, outcome_of, units

__all__ = ["Repository", "ScoredCandidate", "StudyRecord", "StudyStore", "StudySummary"]


@dataclass(frozen=True)
class StudyRecord:
    """A study as it is stored.

    Attributes
    ----------
    kind: what sort of study, as its creator called it.
    settings: what it was started with.
    profile: the numerics profile; None until it is fixed.
    status: ``running`` (perhaps interrupted) or ``finished``.
    result: what it found; None until it is finished.
    created_at, updated_at: aware, in UTC.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    profile: dict[str, Any] | None
    status: str
    result: dict[str, Any] | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class StudySummary:
    """A study in figures.

    Attributes
    ----------
    candidates, units: how many were written.
    done: units with an outcome, whether of this study or of another that computed the same key.
    failed: those of them without a finite loss.
    """

    name: str
    kind: str
    status: str
    candidates: int
    units: int
    done: int
    failed: int
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class ScoredCandidate:
    """One candidate of a generation, with its score.

    Attributes
    ----------
    child: place in the generation, in ask order.
    nll, tokens: totals over all documents, in nats; None and 0 where it failed or is not finished.
    failure: why there is no finite loss; None where there is one, or none yet.
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


class Repository:
    """All studies of one database.

    Parameters
    ----------
    url: an SQLAlchemy URL. A SQLite file is made where there is none, its folder is not.

    Raises
    ------
    LongRopeError
        By the constructor: the database cannot be reached or written, is none, or was written by a newer version.
        By every method: the database failed. Passwords are never in the message.
    """

    def __init__(self, url: str) -> None:
        self._url = parse(url)
        self._engine = connect(self._url)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        with explained(self._url, "Check that it can be reached and read."), Session(self._engine) as session:
            yield session

    @contextmanager
    def _writing(self, then: str) -> Iterator[Session]:
        advice = f"What was kept before is safe: free space or mend the access, then {then}."
        engine = self._engine.execution_options(**{WRITES: True})
        with explained(self._url, advice), Session(engine) as session, session.begin():
            yield session

    def create_study(self, name: str, kind: str, settings: Mapping[str, JSON]) -> None:
        """Write a new study.

        Raises
        ------
        LongRopeError
            The name is in use.
        """
        moment = now()
        study = Study(
            name=name, kind=kind, settings=dict(settings), status="running", created_at=moment, updated_at=moment
        )
        try:
            with self._writing("try again") as session:
                session.add(study)
        except IntegrityError:
            raise LongRopeError(
                f"There is a study {name!r} already: go on with it by `longrope resume {name}`, or choose another "
                "name for the new one."
            ) from None

    def study(self, name: str) -> StudyRecord:
        """One study.

        Raises
        ------
        LongRopeError
            There is none of this name.
        """
        with self._reading() as session:
            row = _find(session, name)
            return StudyRecord(
                row.name, row.kind, row.settings, row.profile, row.status, row.result, row.created_at, row.updated_at
            )

    def studies(self) -> list[StudySummary]:
        """All studies, the oldest first."""
        loss_missing = UnitRow.failure.is_not(None) | (Evaluation.key.is_not(None) & Evaluation.nll.is_(None))
        counts = (
            select(
                CandidateRow.study_id,
                func.count(CandidateRow.id.distinct()),
                func.count(UnitRow.key),
                func.count(func.coalesce(UnitRow.failure, Evaluation.key)),
                func.count(case((loss_missing, 1))),
            )
            .outerjoin(UnitRow, UnitRow.candidate_id == CandidateRow.id)
            .outerjoin(Evaluation, Evaluation.key == UnitRow.key)
            .group_by(CandidateRow.study_id)
        )
        rows = select(Study.id, Study.name, Study.kind, Study.status, Study.created_at, Study.updated_at)
        with self._reading() as session:
            by_study = {study_id: (c, u, done, failed) for study_id, c, u, done, failed in session.execute(counts)}
            nothing = (0, 0, 0, 0)
            return [
                StudySummary(name, kind, status, *by_study.get(study_id, nothing), created, updated)
                for study_id, name, kind, status, created, updated in session.execute(rows.order_by(Study.id))
            ]

    def generations(self, name: str) -> list[ScoredCandidate]:
        """Every candidate of a study with its score, by stage, part, generation and child.

        Raises
        ------
        LongRopeError
            There is no study of this name.
        """
        order = (CandidateRow.stage, CandidateRow.part, CandidateRow.generation, CandidateRow.child)
        with self._reading() as session:
            study_id = _find(session, name).id
            mine = CandidateRow.study_id == study_id
            query = units(CandidateRow.id).where(mine).order_by(CandidateRow.id, UnitRow.position)
            by_candidate = groupby(session.execute(query), lambda row: row[0])
            totals = {key: _total([outcome_of(*row) for _, *row in rows]) for key, rows in by_candidate}
            return [
                ScoredCandidate(
                    row.stage, row.part, row.generation, row.child, row.origin, factors_of(row), *totals[row.id]
                )
                for row in session.scalars(select(CandidateRow).where(mine).order_by(*order))
            ]

    def delete_study(self, name: str) -> None:
        """Remove a study, and the evaluations that no other study refers to.

        Raises
        ------
        LongRopeError
            There is no study of this name, or a live driver holds it.
        """
        with self._writing("try again") as session:
            study_id = _find(session, name).id
            lease.acquire(session, study_id, name, lease.Owner.of(os.getpid()))
            keys = select(UnitRow.key).join(CandidateRow, CandidateRow.id == UnitRow.candidate_id)
            others = keys.where(CandidateRow.study_id != study_id, UnitRow.key == Evaluation.key)
            mine = Evaluation.key.in_(keys.where(CandidateRow.study_id == study_id))
            session.execute(delete(Evaluation).where(mine, ~exists(others.correlate(Evaluation))))
            session.execute(delete(Study).where(Study.id == study_id))  # candidates and units go with it

    @contextmanager
    def open_study(self, name: str) -> Iterator[StudyStore]:
        """Hold a study's lease, kept alive by a thread, and write to it.

        Raises
        ------
        LongRopeError
            There is no study of this name, or a live driver holds it.
        """
        resume = f"`longrope resume {name}`"
        with self._writing(resume) as session:
            study_id = _find(session, name).id
            token = lease.acquire(session, study_id, name, lease.Owner.of(os.getpid()))

        def beat() -> bool:
            with self._writing(resume) as session:
                return lease.beat(session, study_id, token)

        @contextmanager
        def writing() -> Iterator[Session]:
            with self._writing(resume) as session:
                lease.fence(session, study_id, name, token)
                yield session

        heartbeat = lease.Heartbeat(beat, lease.HEARTBEAT_SECONDS)
        try:
            yield StudyStore(study_id, self._reading, writing)
        finally:
            heartbeat.stop()
            # Where this fails the study's own error is the one to see, and the end of this process frees the study.
            with suppress(LongRopeError), self._writing(resume) as session:
                lease.release(session, study_id, token)


def _find(session: Session, name: str) -> Study:
    study = session.scalars(select(Study).where(Study.name == name)).first()
    if study is not None:
        return study
    names = session.scalars(select(Study.name).order_by(Study.id.desc())).all()
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
    known = f"those nearest by are {', '.join(map(repr, near))}" if near else "the store holds none yet"
    raise LongRopeError(f"There is no study {name!r}; {known}. `longrope studies` lists all.")


def _total(outcomes: Sequence[Outcome | None]) -> tuple[float | None, int, str | None]:
    """nll, tokens and failure, summed in document order as the driver sums them."""
    failure = next((o.failure for o in outcomes if o is not None and o.failure is not None), None)
    nll, tokens = 0.0, 0
    for outcome in outcomes:
        if failure is not None or outcome is None or outcome.nll is None:
            return None, 0, failure
        nll += outcome.nll  # not sum(), which compensates its rounding in newer Pythons
        tokens += outcome.tokens
    return nll, tokens, None
