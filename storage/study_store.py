"""What one study keeps: the driver's store, and the queries that read it back."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from sqlalchemy import ColumnElement, Select, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from searcher.errors import LongRopeError
from searcher.rope import Factors
from searcher.study import Candidate, Document, Outcome
from storage.models import JSON, CandidateRow, Evaluation, Study, UnitRow, now
from storage.patience import repeated
from storage.stages import StageStore, refuse_other_profile, stored

NOT_FINITE = "the loss is not finite"
GRADIENT_NOT_FINITE = "the gradient is not finite"
NOT_COMPUTED = "it could not be computed"
KEYS_A_QUERY = 500  # databases limit the parameters of a statement


class StudyStore(StageStore):
    """What one study keeps: ``searcher.study.Store`` for the driver that holds the study's lease, and its stages.

    Raises
    ------
    LongRopeError
        By every method: the database failed, and what to do. By those that write: another driver took the study over.
    """

    @repeated
    def set_profile(self, profile: Mapping[str, JSON]) -> None:
        """Fix the study's numerics profile, before the first evaluation; the same one again is fine.

        An extension's stages have a profile each: see ``begin_stage``.

        Raises
        ------
        LongRopeError
            The study has another profile, or outcomes that were computed without one.
        """
        with self._writing() as session:
            study = session.get_one(Study, self._study_id)
            if study.profile is None:
                mine = CandidateRow.study_id == self._study_id
                if session.execute(units().where(mine, has_outcome()).limit(1)).first():
                    raise LongRopeError(f"The study {study.name!r} has evaluations already; a profile comes too late.")
                study.profile = stored(profile)
            else:
                refuse_other_profile(f"The study {study.name!r}", study.profile, profile)

    @repeated
    def finish(self, result: Mapping[str, JSON]) -> None:
        """Mark the study finished, with what it found."""
        with self._writing() as session:
            values = {"status": "finished", "result": dict(result)}
            session.execute(update(Study).where(Study.id == self._study_id).values(values))

    @repeated
    def candidates(self, stage: int, part: str, generation: int) -> list[Candidate] | None:
        """A generation in ask order; None where it was never written."""
        query = select(CandidateRow).where(*self._generation(stage, part, generation)).order_by(CandidateRow.child)
        with self._reading() as session:
            return [Candidate(factors_of(row), row.origin) for row in session.scalars(query)] or None

    @repeated
    def add_generation(
        self,
        stage: int,
        part: str,
        generation: int,
        candidates: Sequence[Candidate],
        documents: Sequence[Document],
        keys: Sequence[Sequence[str]],
    ) -> None:
        """Write a generation and its units: ``keys[i][j]`` is candidate i on document j. All or nothing.

        A key that could not be computed in this study before is not tried again: its failure is copied.
        """
        if not candidates:
            return
        place = {"study_id": self._study_id, "stage": stage, "part": part, "generation": generation}
        rows = [
            {
                **place,
                "child": child,
                "origin": candidate.origin,
                "lambdas": candidate.factors.lambdas,
                "n_hat": candidate.factors.n_hat,
                "attention_factor": candidate.factors.attention_factor,
            }
            for child, candidate in enumerate(candidates)
        ]
        with self._writing() as session:
            failed = self._failures(session, {key for row in keys for key in row})
            written = session.execute(insert(CandidateRow).returning(CandidateRow.child, CandidateRow.id), rows)
            in_ask_order = sorted((row.child, row.id) for row in written)  # a RETURNING comes in any order
            rows_of_units = [
                {
                    "candidate_id": candidate_id,
                    "position": position,
                    "document_name": document.name,
                    "document_sha256": document.sha256,
                    "document_length": document.length,
                    "key": key,
                    "failure": failed.get(key),
                }
                for (_, candidate_id), row in zip(in_ask_order, keys, strict=True)
                for position, (document, key) in enumerate(zip(documents, row, strict=True))
            ]
            session.execute(insert(UnitRow), rows_of_units)

    @repeated
    def outcomes(self, stage: int, part: str, generation: int) -> list[list[Outcome | None]]:
        """By candidate and document: what is known, from this study or from any other that computed the same key."""
        query = units(CandidateRow.child).where(*self._generation(stage, part, generation))
        with self._reading() as session:
            rows = session.execute(query.order_by(CandidateRow.child, UnitRow.position))
            return [[outcome_of(*row) for _, *row in group] for _, group in groupby(rows, lambda row: row[0])]

    @repeated
    def known(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys that have a value already, from any study, or that this one failed to compute for good."""
        with self._reading() as session:
            found = set(self._failures(session, keys))
            for chunk in _chunks(keys):
                found.update(session.scalars(select(Evaluation.key).where(Evaluation.key.in_(chunk))))
            return found

    @repeated
    def rekey(self, stage: int, part: str, generation: int, keys: Sequence[Sequence[str]]) -> None:
        """Give units without an outcome new keys, after a change of the numerics profile that the user accepted."""
        query = units(CandidateRow.child, UnitRow.candidate_id, UnitRow.position).where(
            *self._generation(stage, part, generation), ~has_outcome()
        )
        with self._reading() as session:
            changed = [
                {"candidate_id": candidate_id, "position": position, "key": keys[child][position]}
                for child, candidate_id, position, key, *_ in session.execute(query)
                if key != keys[child][position]
            ]
        if changed:
            with self._writing() as session:
                session.execute(update(UnitRow), changed)

    @repeated
    def record(self, outcome: Outcome) -> None:
        """Keep what a worker returned: a value for every study, what has none for this one. The first value stays.

        A gradient with a value that is not finite is kept as none, with a reason beside the loss: the outcome reads
        back as ``gradient`` None and ``failure`` set, with its ``nll`` where that is finite.
        """
        if outcome.nll is None:
            self._record_failure(outcome.key, outcome.failure or NOT_COMPUTED)
            return
        values = _values(outcome)
        try:
            with self._writing() as session:
                session.execute(insert(Evaluation).values(values))
        except IntegrityError:
            with self._reading() as session:
                if session.get(Evaluation, outcome.key) is None:
                    raise

    @repeated
    def correct(self, outcome: Outcome) -> None:
        """Keep a value in place of the one that was recorded: its worker turned out to be wrong."""
        with self._writing() as session:
            session.execute(update(Evaluation).where(Evaluation.key == outcome.key).values(_values(outcome)))

    @repeated
    def settle(self, stage: int, part: str, generation: int, seen_by: Sequence[int]) -> None:
        """How many documents each candidate was scored on: written when its generation is complete.

        A resumed study comes by again; it writes only what is not there.
        """
        query = select(CandidateRow.id, CandidateRow.seen).where(*self._generation(stage, part, generation))
        with self._reading() as session:
            written = session.execute(query.order_by(CandidateRow.child)).all()
        changed = [
            {"id": candidate_id, "seen": seen}
            for (candidate_id, before), seen in zip(written, seen_by, strict=True)
            if seen != before
        ]
        if changed:
            with self._writing() as session:
                session.execute(update(CandidateRow), changed)

    def _record_failure(self, key: str, failure: str) -> None:
        mine = select(CandidateRow.id).where(CandidateRow.study_id == self._study_id)
        first = UnitRow.failure.is_(None)
        with self._writing() as session:
            session.execute(
                update(UnitRow)
                .where(UnitRow.key == key, first, UnitRow.candidate_id.in_(mine))
                .values(failure=failure)
                .execution_options(synchronize_session=False)
            )

    def _failures(self, session: Session, keys: Collection[str]) -> dict[str, str]:
        """Those of the keys that this study failed to compute, with why."""
        query = select(UnitRow.key, UnitRow.failure).join(CandidateRow, CandidateRow.id == UnitRow.candidate_id)
        mine = query.where(CandidateRow.study_id == self._study_id, UnitRow.failure.is_not(None))
        return {
            key: failure
            for chunk in _chunks(keys)
            for key, failure in session.execute(mine.where(UnitRow.key.in_(chunk)))
            if failure is not None
        }

    def _generation(self, stage: int, part: str, generation: int) -> tuple[Any, ...]:
        return (
            CandidateRow.study_id == self._study_id,
            CandidateRow.stage == stage,
            CandidateRow.part == part,
            CandidateRow.generation == generation,
        )


def _values(outcome: Outcome) -> dict[str, Any]:
    """The row of an outcome that has a value."""
    assert outcome.nll is not None
    finite = math.isfinite(outcome.nll)
    gradient = None if outcome.gradient is None else [float(value) for value in outcome.gradient]
    usable = gradient is None or all(map(math.isfinite, gradient))
    reason = (None if usable else GRADIENT_NOT_FINITE) if finite else NOT_FINITE
    return {
        "key": outcome.key,
        "nll": outcome.nll if finite else None,
        "reason": outcome.failure or reason,
        "gradient": gradient if finite and usable else None,
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "worker": outcome.worker,
        "created_at": now(),
    }


def _chunks(keys: Collection[str]) -> Iterator[list[str]]:
    every = list(keys)
    return (every[start : start + KEYS_A_QUERY] for start in range(0, len(every), KEYS_A_QUERY))


def units(*columns: Any) -> Select[Any]:
    """Units with what is known of them: the given columns, then the parameters of outcome_of."""
    value = (Evaluation.nll, Evaluation.reason, Evaluation.tokens, Evaluation.seconds, Evaluation.worker)
    return (
        select(*columns, UnitRow.key, UnitRow.failure, Evaluation.key, *value, Evaluation.gradient)
        .select_from(CandidateRow)
        .join(UnitRow, UnitRow.candidate_id == CandidateRow.id)
        .outerjoin(Evaluation, Evaluation.key == UnitRow.key)
    )


def has_outcome() -> ColumnElement[bool]:
    """Of a row of units(): whether anything is known of it."""
    return UnitRow.failure.is_not(None) | Evaluation.key.is_not(None)


def outcome_of(
    key: str,
    failure: str | None,
    evaluated: str | None,
    nll: float | None,
    reason: str | None,
    tokens: int,
    seconds: float,
    worker: str,
    gradient: Sequence[float] | None,
) -> Outcome | None:
    """What is known of a unit, from a row of units(); None: nothing yet.

    A failure of this study goes first: another study's later value must not change this one's trajectory.
    """
    if failure is not None:
        return Outcome(key, None, 0, failure=failure)
    if evaluated is None:
        return None
    slopes = None if gradient is None else tuple(gradient)
    return Outcome(key, math.nan if nll is None else nll, tokens, seconds, worker, reason, slopes)


def factors_of(row: CandidateRow) -> Factors:
    """A candidate's factors, to the last bit."""
    lambdas = tuple(tuple(value) if isinstance(value, list) else value for value in row.lambdas)
    return Factors(lambdas, row.n_hat, row.attention_factor)
