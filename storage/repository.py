"""The store: studies, generations, units and evaluations in an SQL database. The only place that opens a Session."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import groupby
from typing import Any
from uuid import uuid4

from sqlalchemy import delete, exists, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from searcher.errors import LongRopeError
from storage import cost, lease, progress, stages, timings
from storage.cost import Cost, TrajectoryPoint
from storage.database import WRITES, connect, explained, parse
from storage.models import JSON, CandidateRow, Evaluation, StageRow, Study, UnitRow, now
from storage.patience import IMPATIENT, Patience, repeated
from storage.progress import CurrentStage, ScoredCandidate, StudySummary
from storage.stages import FINISHED, RUNNING, WAITING, Checkpoint, StageRecord
from storage.study_store import StudyStore
from storage.timings import Timing

STOPPED = "stopped"  # which the store itself does not know

__all__ = [
    "Checkpoint",
    "Cost",
    "CurrentStage",
    "Repository",
    "ScoredCandidate",
    "StageRecord",
    "StudyRecord",
    "StudyStore",
    "StudySummary",
    "Timing",
    "TrajectoryPoint",
]


@dataclass(frozen=True)
class StudyRecord:
    """A study as it is stored.

    Attributes
    ----------
    kind: what sort of study, as its creator called it.
    settings: what it was started with.
    profile: the numerics profile; None until it is fixed.
    status: ``running``, ``stopped`` (no live driver holds it) or ``finished``.
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


class Repository:
    """All studies of one database.

    Parameters
    ----------
    url: an SQLAlchemy URL. A SQLite file is made where there is none, its folder is not.
    create: make the store where there is none; without it that is an error, and nothing is made.
    patience: with a server that goes away, for all that a driver asks between beginning and end. The constructor has
        none, nor have ``studies`` and ``delete_study``.

    Raises
    ------
    LongRopeError
        By the constructor: the database cannot be reached or written, is none, was written by a newer version, or is
        not there and not to be made.
        By every method: the database failed. Passwords are never in the message.
    """

    def __init__(self, url: str, create: bool = True, patience: Patience = IMPATIENT) -> None:
        self._url = parse(url)
        self._patience = patience
        self._engine = connect(self._url, create)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def _repeat(self, attempt: Callable[[], Any]) -> Any:
        return self._patience.over(attempt)

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

    def create_study(
        self,
        name: str,
        kind: str,
        settings: Mapping[str, JSON],
        planned: Sequence[tuple[str, Mapping[str, JSON]]] = (),
    ) -> None:
        """Write a new study, in one transaction.

        Parameters
        ----------
        planned: kind and settings of each stage of an extension, in order; none for a plain search.

        Raises
        ------
        LongRopeError
            The name is in use.
        """
        moment, maker = now(), asdict(lease.Owner.of(os.getpid()))
        self._repeat(lambda: self._create_study(moment, maker, name, kind, settings, planned))

    def _create_study(
        self,
        moment: datetime,
        maker: dict[str, Any],
        name: str,
        kind: str,
        settings: Mapping[str, JSON],
        planned: Sequence[tuple[str, Mapping[str, JSON]]],
    ) -> None:
        study = Study(
            name=name,
            kind=kind,
            settings=dict(settings),
            status=RUNNING,
            created_at=moment,
            updated_at=moment,
            lease_owner=maker,  # who holds no lease yet, but can be told from a rival of the same moment
        )
        try:
            with self._writing("try again") as session:
                session.add(study)
                session.flush()  # gives the study its id
                session.add_all(
                    StageRow(study_id=study.id, stage=number, kind=stage, settings=stages.stored(asked), status=WAITING)
                    for number, (stage, asked) in enumerate(planned)
                )
        except IntegrityError:
            with self._reading() as session:
                made = select(Study.created_at, Study.lease_owner).where(Study.name == name)
                if session.execute(made).first() == (moment, maker):
                    return  # by an earlier try, whose answer was lost
            raise LongRopeError(
                f"There is a study {name!r} already: go on with it by `longrope resume {name}`, or choose another "
                "name for the new one."
            ) from None

    @repeated
    def study(self, name: str) -> StudyRecord:
        """One study.

        Raises
        ------
        LongRopeError
            There is none of this name.
        """
        with self._reading() as session:
            row = _find(session, name)
            owner, heartbeat_at, clock = session.execute(select(*lease.SEEN).where(Study.id == row.id)).one()
            status = row.status
            if status == RUNNING and not lease.is_held(owner, heartbeat_at, clock, lease.Owner.of(os.getpid())):
                status = STOPPED
            return StudyRecord(
                row.name, row.kind, row.settings, row.profile, status, row.result, row.created_at, row.updated_at
            )

    def studies(self) -> list[StudySummary]:
        """All studies, the oldest first."""
        columns = (Study.id, Study.name, Study.kind, Study.status, Study.created_at, Study.updated_at)
        here = lease.Owner.of(os.getpid())
        by_study: dict[int, list[Any]] = {}
        summaries = []
        each_stage = (StageRow.stage, StageRow.kind, StageRow.status)
        query = select(*each_stage, *columns, *lease.SEEN).outerjoin(StageRow, StageRow.study_id == Study.id)
        with self._reading() as session:
            for counted in session.execute(progress.counts()):
                by_study.setdefault(counted[0], []).append(counted)
            rows = session.execute(query.order_by(Study.id, StageRow.stage))
            for study_id, group in groupby(rows, key=lambda row: row[3]):
                members = list(group)
                plan = [(number, kind, status) for number, kind, status, *_ in members if number is not None]
                name, kind, status, created, updated, owner, heartbeat_at, clock = members[0][4:]
                done = {number for number, _, stage_status in plan if stage_status == FINISHED}
                figures = progress.figures(by_study.get(study_id, []), status == FINISHED, done)
                if status == RUNNING and not lease.is_held(owner, heartbeat_at, clock, here):
                    status = STOPPED
                stage = progress.current_stage(plan)
                summaries.append(StudySummary(name, kind, status, *figures, created, updated, stage))
        return summaries

    @repeated
    def stages(self, name: str) -> list[StageRecord]:
        """The stages of an extension in order; none where the study is a plain search.

        Raises
        ------
        LongRopeError
            There is no study of this name.
        """
        with self._reading() as session:
            return stages.stages(session, _find(session, name).id)

    @repeated
    def training_log(self, name: str, stage: int) -> dict[str, dict[int, float]]:
        """What a fine-tuning logged so far: by name, then by step, ascending.

        Raises
        ------
        LongRopeError
            There is no study of this name.
        """
        with self._reading() as session:
            return stages.training_log(session, _find(session, name).id, stage)

    @repeated
    def generations(self, name: str, after: int = 0) -> list[ScoredCandidate]:
        """Every candidate of a study with its score, stage by stage, in the order in which they were asked for.

        Parameters
        ----------
        after: leave out those whose number is not above this one, for who has seen them.

        Raises
        ------
        LongRopeError
            There is no study of this name.
        """
        with self._reading() as session:
            return progress.scored_candidates(session, _find(session, name), after)

    @repeated
    def cost(self, name: str, stage: int | None = None) -> Cost:
        """What a study, or one stage of it, is made of so far, in document forwards and gradient steps.

        Raises
        ------
        LongRopeError
            There is no study of this name.
        """
        with self._reading() as session:
            return cost.cost(session, _find(session, name), stage)

    def trajectory(self, name: str, stage: int = 0) -> list[TrajectoryPoint]:
        """Cost against quality: after every candidate what the stage had cost, and its best individual so far.

        Raises
        ------
        LongRopeError
            There is no study of this name.
        """
        return cost.trajectory([row for row in self.generations(name) if row.stage == stage])

    def timings(self, name: str) -> list[Timing]:
        """When each evaluation of a study was computed, by whom, and how long it took.

        Raises
        ------
        LongRopeError
            There is no study of this name.
        """
        with self._reading() as session:
            return timings.timings(session, _find(session, name))

    def delete_study(self, name: str) -> None:
        """Remove a study, and the evaluations that no other study refers to.

        Results of idle workers that no study has asked for go too, unless a live driver holds another study: they may
        be what it asks for next.

        Raises
        ------
        LongRopeError
            There is no study of this name, or a live driver holds it.
        """
        with self._writing("try again") as session:
            study_id = _find(session, name).id
            lease.acquire(session, study_id, name, lease.Owner.of(os.getpid()), uuid4().hex)
            keys = select(UnitRow.key).join(CandidateRow, CandidateRow.id == UnitRow.candidate_id)
            others = keys.where(CandidateRow.study_id != study_id, UnitRow.key == Evaluation.key)
            mine = Evaluation.key.in_(keys.where(CandidateRow.study_id == study_id))
            session.execute(delete(Evaluation).where(mine, ~exists(others.correlate(Evaluation))))
            session.execute(delete(Study).where(Study.id == study_id))  # all that is the study's own goes with it
            here = lease.Owner.of(os.getpid())
            drivers = session.execute(select(*lease.SEEN))
            if not any(lease.is_held(owner, beat_at, clock, here) for owner, beat_at, clock in drivers):
                asked_for = select(UnitRow.key).where(UnitRow.key == Evaluation.key).correlate(Evaluation)
                session.execute(delete(Evaluation).where(~exists(asked_for)))

    @contextmanager
    def open_study(self, name: str) -> Iterator[StudyStore]:
        """Hold a study's lease, kept alive by a thread, and write to it.

        Raises
        ------
        LongRopeError
            There is no study of this name, or a live driver holds it.
        """
        resume = f"`longrope resume {name}`"
        token = uuid4().hex

        def take() -> int:
            with self._writing(resume) as session:
                study_id = _find(session, name).id
                lease.acquire(session, study_id, name, lease.Owner.of(os.getpid()), token)
                return study_id

        study_id: int = self._repeat(take)
        unsure: datetime | None = None  # the moment of a write that may or may not have been committed

        def beat() -> bool:
            with self._writing(resume) as session:
                return lease.beat(session, study_id, token)

        @contextmanager
        def writing() -> Iterator[Session]:
            nonlocal unsure
            with self._writing(resume) as session:
                moment = lease.fence(session, study_id, name, token, unsure)
                yield session
                unsure = moment
            unsure = None

        def repeat(attempt: Callable[[], Any]) -> Any:
            nonlocal unsure
            unsure = None
            try:
                return self._repeat(attempt)
            except lease.AlreadyWritten:
                return None  # as every method that writes

        heartbeat = lease.Heartbeat(beat, lease.HEARTBEAT_SECONDS)
        try:
            yield StudyStore(study_id, self._reading, writing, repeat)
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
