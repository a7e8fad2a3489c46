"""The tables: studies with their stages, candidates and units, and the evaluations that all studies share.

The names carry a prefix because Optuna, too, has a table `studies`, and both may live in one PostgreSQL database.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias

from sqlalchemy import (
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    func,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

JSON: TypeAlias = "Mapping[str, JSON] | Sequence[JSON] | str | int | float | bool | None"

VERSION_TABLE = "longrope_version"


class Json(TypeDecorator[Any]):
    """JSON as text. Floats are written as their repr, which reads back to the same float64.

    Not the database's own JSON type: PostgreSQL's refuses infinity, and the perplexity of a method that failed is one.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:  # noqa: ARG002
        return None if value is None else json.loads(value)


class FreeText(TypeDecorator[str]):
    """Text from outside, such as file names and error messages; what UTF-8 or PostgreSQL cannot hold is escaped."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else value.encode(errors="backslashreplace").decode().replace("\0", "\\0")


class UtcDateTime(TypeDecorator[datetime]):
    """A moment, always aware and in UTC; SQLite keeps no time zone and PostgreSQL answers in the session's."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Study(Base):
    """One search or one whole extension, and the lease of the driver that runs it (see storage/lease.py)."""

    __tablename__ = "longrope_studies"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(Text, unique=True)
    kind: Mapped[str] = mapped_column(Text)
    settings: Mapped[dict[str, Any]] = mapped_column(Json)
    profile: Mapped[dict[str, Any] | None] = mapped_column(Json)
    status: Mapped[str] = mapped_column(String(16))  # running or finished
    result: Mapped[dict[str, Any] | None] = mapped_column(Json)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)
    lease_token: Mapped[str | None] = mapped_column(String(32))  # of the driver that holds the study; NULL: nobody
    lease_owner: Mapped[dict[str, Any] | None] = mapped_column(Json)
    lease_version: Mapped[int] = mapped_column(default=0)  # grows with every change of the lease, heartbeats included
    # The database's clock, not the driver's: hosts that share a database need not agree on the time.
    lease_heartbeat_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class StageRow(Base):
    """A stage of an extension; a plain search has none."""

    __tablename__ = "longrope_stages"

    study_id: Mapped[int] = mapped_column(ForeignKey("longrope_studies.id", ondelete="CASCADE"), primary_key=True)
    stage: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(Text)
    settings: Mapped[dict[str, Any]] = mapped_column(Json)
    profile: Mapped[dict[str, Any] | None] = mapped_column(Json)  # its own: another length has another chunk
    status: Mapped[str] = mapped_column(Text)  # see storage/stages.py
    result: Mapped[dict[str, Any] | None] = mapped_column(Json)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


def _of_a_stage() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(
        ["study_id", "stage"], ["longrope_stages.study_id", "longrope_stages.stage"], ondelete="CASCADE"
    )


class CheckpointRow(Base):
    """A checkpoint of a fine-tuning that is whole on disk."""

    __tablename__ = "longrope_checkpoints"
    __table_args__ = (_of_a_stage(),)

    study_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    stage: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    path: Mapped[str] = mapped_column(Json)  # reads back exactly, also where a name in it is not UTF-8
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class TrainingLogRow(Base):
    """What a step of a fine-tuning measured."""

    __tablename__ = "longrope_training_logs"
    __table_args__ = (_of_a_stage(),)

    study_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    stage: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(Text, primary_key=True)
    value: Mapped[float | None] = mapped_column(Double)  # NULL: what SQLite makes of NaN


class CandidateRow(Base):
    """Factors to be scored, as a member of a generation."""

    __tablename__ = "longrope_candidates"
    __table_args__ = (UniqueConstraint("study_id", "stage", "part", "generation", "child"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("longrope_studies.id", ondelete="CASCADE"))
    stage: Mapped[int]
    part: Mapped[str] = mapped_column(String(16))
    generation: Mapped[int]
    child: Mapped[int]  # place in the generation, in ask order
    origin: Mapped[str] = mapped_column(FreeText)
    lambdas: Mapped[list[Any]] = mapped_column(Json)  # one list for all layers, or a list of lists
    n_hat: Mapped[int]
    attention_factor: Mapped[float] = mapped_column(Double)
    seen: Mapped[int | None]  # documents it was scored on; NULL: all, or its generation is not complete


class UnitRow(Base):
    """One candidate on one document. What is known of it is its failure, else the evaluation of its key."""

    __tablename__ = "longrope_units"

    candidate_id: Mapped[int] = mapped_column(
        ForeignKey("longrope_candidates.id", ondelete="CASCADE"), primary_key=True
    )
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # index of the document
    document_name: Mapped[str] = mapped_column(FreeText)
    document_sha256: Mapped[str] = mapped_column(String(64))
    document_length: Mapped[int]
    key: Mapped[str] = mapped_column(String(64), index=True)
    # Why it could not be computed at all: final in this study, tried again by others.
    failure: Mapped[str | None] = mapped_column(FreeText)


class Evaluation(Base):
    """The value of a key, for every study that ever asks for it.

    It failed where it has a reason: the loss is not finite, or the gradient that was asked for is not.
    """

    __tablename__ = "longrope_evaluations"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    nll: Mapped[float | None] = mapped_column(Double)  # nats; NULL where it is not finite
    reason: Mapped[str | None] = mapped_column(FreeText)  # why the loss or the gradient is not finite
    tokens: Mapped[int]
    seconds: Mapped[float] = mapped_column(Double)
    worker: Mapped[str] = mapped_column(FreeText)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    gradient: Mapped[list[float] | None] = mapped_column(Json)  # NULL where none was asked for, or it is not finite


def now() -> datetime:
    """This moment, aware, in UTC."""
    return datetime.now(UTC)


def database_now() -> Any:
    """The database's own clock as an SQL expression; SQLite's has whole seconds."""
    return func.current_timestamp(type_=UtcDateTime)
