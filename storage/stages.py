"""The stages of an extension: what each was asked for, how far it is, and what it leaves behind on its way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from searcher.errors import LongRopeError
from storage.models import JSON, CandidateRow, CheckpointRow, StageRow, Study, TrainingLogRow, now
from storage.patience import repeated

Transactions: TypeAlias = "Callable[[], AbstractContextManager[Session]]"
Repeat: TypeAlias = "Callable[[Callable[[], Any]], Any]"

WAITING, RUNNING, FINISHED = "waiting", "running", "finished"
OUTSIDE = "waiting for an outside checkpoint"


@dataclass(frozen=True)
class StageRecord:
    """A stage as it is stored.

    Attributes
    ----------
    stage: its number, from 0, in the order of the plan.
    kind: search, finetune, recover or evaluate, as the study's creator called it.
    settings: as planned; from its beginning on, as it was begun.
    profile: the numerics profile, a stage's own; None until it is fixed.
    status: ``waiting``, ``running``, ``waiting for an outside checkpoint`` or ``finished``.
    result: what it found; None until it is finished.
    started_at, finished_at: aware, in UTC; when it was first begun, and finished.
    """

    stage: int
    kind: str
    settings: dict[str, Any]
    profile: dict[str, Any] | None
    status: str
    result: dict[str, Any] | None
    started_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was whole on disk when it was recorded.

    Attributes
    ----------
    step: optimiser steps taken in its stage.
    sha256: of its content, as its writer defines it.
    """

    stage: int
    step: int
    path: Path
    sha256: str
    created_at: datetime


class StageStore:
    """What one study keeps of its stages. Every method is one transaction, done again while the store is lost.

    Writing to a stage that the study does not have is an IntegrityError.
    """

    def __init__(self, study_id: int, reading: Transactions, writing: Transactions, repeat: Repeat) -> None:
        self._study_id = study_id
        self._reading = reading
        self._writing = writing
        self._repeat = repeat

    @repeated
    def stages(self) -> list[StageRecord]:
        """All stages in order; none where the study is a plain search."""
        with self._reading() as session:
            return stages(session, self._study_id)

    @repeated
    def stage(self, stage: int) -> StageRecord:
        """One stage.

        Raises
        ------
        LongRopeError
            The study has no such stage.
        """
        with self._reading() as session:
            return _record(self._row(session, stage))

    @repeated
    def begin_stage(
        self, stage: int, settings: Mapping[str, JSON] | None = None, profile: Mapping[str, JSON] | None = None
    ) -> None:
        """Mark a stage running, whether for the first time, after an interruption or after a wait.

        Parameters
        ----------
        settings: what the stage is begun with, in place of what was planned; the same again is fine. None: as stored.
        profile: the numerics profile, fixed before the stage's first candidate; the same again is fine. None: as
            stored.

        Raises
        ------
        LongRopeError
            The study has no such stage, it is finished, one before it is not, or it was begun with other settings or
            under another profile.
        """
        with self._writing() as session:
            row = self._row(session, stage)
            if row.status == FINISHED:
                raise LongRopeError(f"Stage {stage} of the study {self._name(session)!r} is finished already.")
            if row.status == WAITING:
                self._refuse_too_early(session, stage)
                row.started_at = now()
                row.settings = row.settings if settings is None else stored(settings)
            elif settings is not None and not _same(row.settings, settings):
                raise LongRopeError(
                    f"Stage {stage} of the study {self._name(session)!r} was begun with other settings, which differ "
                    f"in {unlike(row.settings, settings)}; put those back, or start a new study."
                )
            if profile is not None:
                self._fix_profile(session, row, profile)
            row.status = RUNNING

    @repeated
    def wait_outside(self, stage: int) -> None:
        """Mark a running stage as waiting for a checkpoint from an outside trainer; ``begin_stage`` goes on.

        Raises
        ------
        LongRopeError
            The study has no such stage, it was not begun, or it is finished.
        """
        with self._writing() as session:
            row = self._row(session, stage)
            if row.status in (WAITING, FINISHED):
                raise LongRopeError(
                    f"Stage {stage} of the study {self._name(session)!r} is {row.status}; only one that was begun and "
                    "is not finished can wait for an outside checkpoint."
                )
            row.status = OUTSIDE

    @repeated
    def finish_stage(self, stage: int, result: Mapping[str, JSON]) -> None:
        """Mark a stage finished, with what it found; the same result again is fine, and changes nothing.

        Raises
        ------
        LongRopeError
            The study has no such stage, it was not begun, or it was finished with another result.
        """
        with self._writing() as session:
            row = self._row(session, stage)
            if row.status == WAITING:
                raise LongRopeError(f"Stage {stage} of the study {self._name(session)!r} was not begun.")
            if row.status != FINISHED:
                row.status, row.result, row.finished_at = FINISHED, stored(result), now()
            elif row.result is None or not _same(row.result, result):
                raise LongRopeError(
                    f"Stage {stage} of the study {self._name(session)!r} was finished with another result, which "
                    f"differs in {unlike(row.result or {}, result)}; that one stays."
                )

    @repeated
    def record_checkpoint(self, stage: int, step: int, path: str | Path, sha256: str) -> None:
        """Record a checkpoint that is whole and synced on disk; one of the same step is replaced.

        A resume uses only what is recorded. So: write aside, sync, rename, then record.
        """
        place = {"study_id": self._study_id, "stage": stage, "step": step}
        with self._writing() as session:
            session.merge(CheckpointRow(**place, path=str(path), sha256=sha256, created_at=now()))

    @repeated
    def checkpoints(self, stage: int) -> list[Checkpoint]:
        """The recorded checkpoints of a stage, the latest step last."""
        mine = (CheckpointRow.study_id == self._study_id, CheckpointRow.stage == stage)
        with self._reading() as session:
            return [
                Checkpoint(row.stage, row.step, Path(row.path), row.sha256, row.created_at)
                for row in session.scalars(select(CheckpointRow).where(*mine).order_by(CheckpointRow.step))
            ]

    @repeated
    def forget_checkpoint(self, stage: int, step: int) -> None:
        """Strike a checkpoint out, before its files go; nothing happens where there is none."""
        place = (CheckpointRow.study_id == self._study_id, CheckpointRow.stage == stage, CheckpointRow.step == step)
        with self._writing() as session:
            session.execute(delete(CheckpointRow).where(*place))

    @repeated
    def log_training(self, stage: int, step: int, values: Mapping[str, float]) -> None:
        """Keep what a step of a fine-tuning measured, by name; of a step that is run again, the new values stay."""
        if not values:
            return
        place = {"study_id": self._study_id, "stage": stage, "step": step}
        rows = [{**place, "name": name, "value": float(value)} for name, value in values.items()]
        here = (TrainingLogRow.study_id == self._study_id, TrainingLogRow.stage == stage, TrainingLogRow.step == step)
        with self._writing() as session:
            session.execute(delete(TrainingLogRow).where(*here, TrainingLogRow.name.in_(list(values))))
            session.execute(insert(TrainingLogRow), rows)

    def _row(self, session: Session, stage: int) -> StageRow:
        row = session.get(StageRow, (self._study_id, stage))
        if row is None:
            count = len(stages(session, self._study_id))
            raise LongRopeError(
                f"The study {self._name(session)!r} has no stage {stage}: it has {count}, counted from 0."
            )
        return row

    def _name(self, session: Session) -> str:
        return session.get_one(Study, self._study_id).name

    def _refuse_too_early(self, session: Session, stage: int) -> None:
        for before in stages(session, self._study_id)[:stage]:
            if before.status != FINISHED:
                raise LongRopeError(
                    f"Stage {stage} of the study {self._name(session)!r} cannot begin: stage {before.stage} "
                    f"({before.kind}) is {before.status}, and comes first."
                )

    def _fix_profile(self, session: Session, row: StageRow, profile: Mapping[str, JSON]) -> None:
        whose = f"Stage {row.stage} of the study {self._name(session)!r}"
        if row.profile is None:
            mine = (CandidateRow.study_id == self._study_id, CandidateRow.stage == row.stage)
            if session.execute(select(CandidateRow.id).where(*mine).limit(1)).first():
                raise LongRopeError(f"{whose} has candidates already; a profile comes too late.")
            row.profile = stored(profile)
        else:
            refuse_other_profile(whose, row.profile, profile)


def refuse_other_profile(whose: str, before: Mapping[str, Any], profile: Mapping[str, JSON]) -> None:
    """Hold what is stored of a study or a stage against the profile it goes on under.

    Raises
    ------
    LongRopeError
        They differ.
    """
    if not _same(before, profile):
        raise LongRopeError(
            f"{whose} was begun under another numerics profile, which differs in {unlike(before, profile)}; go on "
            "where that one can be met, or start a new study."
        )


def stored(value: Any) -> Any:
    """A JSON value as it reads back: tuples are lists there, and all keys texts."""
    return json.loads(json.dumps(value))


def unlike(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The fields that differ, for people."""
    one, other = stored(before), stored(after)
    shared = one.keys() & other.keys()
    return ", ".join(sorted((one.keys() ^ other.keys()) | {key for key in shared if not _same(one[key], other[key])}))


def _same(one: Any, other: Any) -> bool:
    """Whether two values are stored alike; NaN is like itself."""
    return json.dumps(stored(one), sort_keys=True) == json.dumps(stored(other), sort_keys=True)


def stages(session: Session, study_id: int) -> list[StageRecord]:
    """The stages of a study in order."""
    query = select(StageRow).where(StageRow.study_id == study_id).order_by(StageRow.stage)
    return [_record(row) for row in session.scalars(query)]


def _record(row: StageRow) -> StageRecord:
    return StageRecord(
        row.stage, row.kind, row.settings, row.profile, row.status, row.result, row.started_at, row.finished_at
    )


def training_log(session: Session, study_id: int, stage: int) -> dict[str, dict[int, float]]:
    """What a fine-tuning logged: by name, in alphabetical order, then by step, ascending."""
    query = select(TrainingLogRow).where(TrainingLogRow.study_id == study_id, TrainingLogRow.stage == stage)
    found: dict[str, dict[int, float]] = {}
    for row in sorted(session.scalars(query), key=lambda row: (row.name, row.step)):
        found.setdefault(row.name, {})[row.step] = math.nan if row.value is None else row.value
    return found
