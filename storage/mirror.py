"""A study as Optuna trials, for optuna-dashboard and Optuna's own plots.

The mirror is a journal file of Optuna's, apart from the store. It is written by whoever wants to look, never by the
driver, and can be thrown away at any time. Bringing it up to date reads what is new and writes what is new: a trial is
a candidate of the search documents that has an outcome, and does not change once its fate is known; where a value of
the newest generation is corrected after that, the whole study is mirrored anew.

Not Optuna's SQL tables: with 65 parameters a trial takes them seconds of work, and a line of the journal a millisecond.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from searcher.errors import LongRopeError
from searcher.samplers import Sampler
from searcher.study import SEARCH_SHORT, Score
from storage.progress import RANKED, ScoredCandidate
from storage.repository import Repository, StudyRecord

MARK = "longrope"  # system attribute: of a study, which of the store's it mirrors; of a trial, which candidate
HIGHEST_N_HAT = 256
ROOM = 2.0  # a factor's axis ends at this multiple of the largest factor in the stage's first generation
FINAL = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class Synced:
    """What bringing a mirror up to date came to.

    Attributes
    ----------
    trials: how many the mirror holds of the study.
    written: how many of them are new or changed.
    status: of the study, as in ``StudyRecord``.
    """

    trials: int
    written: int
    status: str


class _Journal(JournalFileBackend):
    """A journal that does not wait for the disk at every line: the driver's commits do, on the same disk.

    What a power cut takes is made anew.
    """

    def __init__(self, path: Path) -> None:
        self._own_path, self._own_lock = path, JournalFileSymlinkLock(str(path))  # others may write notes
        super().__init__(str(path), self._own_lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        self._own_lock.acquire()
        try:
            with self._own_path.open("ab") as file:
                file.write(lines.encode())
        finally:
            self._own_lock.release()


class Mirror:
    """One study's mirror. For one thread; others may read ``storage`` at the same time.

    Parameters
    ----------
    repository: the store.
    name: of the study.
    path: the journal file, made where there is none.

    Raises
    ------
    LongRopeError
        The file is none of Optuna's journals or cannot be written.
    """

    def __init__(self, repository: Repository, name: str, path: Path) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._repository, self._name, self.path = repository, name, path
        self._lock = _lock(path)
        self.storage = _open(path)
        self._seen: datetime | None = None  # updated_at of what is mirrored
        self._status = ""
        self._after = 0  # candidates up to this number cannot change any more
        self._stages: dict[int, _Stage] = {}

    def close(self) -> None:
        """Let others follow the study in this file."""
        if self._lock is not None:
            self._lock.close()

    def sync(self) -> Synced:
        """Bring the mirror up to date.

        Raises
        ------
        LongRopeError
            The store failed, or holds the study no more.
        """
        record = self._repository.study(self._name)
        if (record.updated_at, record.status) != (self._seen, self._status) or self._lost():
            written = self._take(record)
            self._seen, self._status = record.updated_at, record.status
        else:
            written = 0
        return Synced(sum(len(stage.trials) for stage in self._stages.values()), written, record.status)

    def _lost(self) -> bool:
        """Whether a study of the mirror was deleted, as a user of the dashboard can."""
        known = {study._study_id for study in self.storage.get_all_studies()}
        return any(stage.id not in known for stage in self._stages.values())

    def _take(self, record: StudyRecord) -> int:
        if self._lost() or not self._stages:
            self._stages, self._after = {s.stage: s for s in _mirrored(self.storage, record)}, 0
        rows = self._repository.generations(self._name, self._after)
        short = {(r.stage, r.generation, r.child): r for r in rows if r.part == SEARCH_SHORT}
        two = _two_objectives(record)
        names = {stage.stage: str(stage.settings.get("name", "")) for stage in self._repository.stages(self._name)}
        written, still_open = 0, []
        for row in sorted((r for r in rows if r.part in RANKED), key=lambda row: row.number):
            other = short.get((row.stage, row.generation, row.child)) if row.part == "search" else None
            if two and other is None:  # the end of a refinement: it was not scored on short documents
                continue
            if _fate(row, other)[0] not in FINAL:
                still_open.append(row.number)
            if not row.scored:
                continue
            if row.stage not in self._stages:
                title = f"{self._name} {row.stage + 1} {names[row.stage]}" if names else self._name
                self._stages[row.stage] = _Stage.create(self.storage, record, row, title, two)
            stage = self._stages[row.stage]
            if stage.contradicts(row, other):  # Optuna changes no trial that has ended
                self.storage.delete_study(stage.id)
                return self._take(record)
            written += stage.put(row, other)
        for stage in self._stages.values():
            stage.describe(record)
        if not two:
            newest = max(rows, key=lambda r: r.number, default=None)  # what it is made of may still be corrected
            open_too = [r.number for r in rows if newest is not None and _place(r) == _place(newest)]
            self._after = min([*still_open, *open_too], default=self._after + 1) - 1
        return written


class _Stage:
    """A search stage in the mirror: a study of Optuna's."""

    def __init__(self, storage: JournalStorage, id: int, mark: Mapping[str, Any]) -> None:
        self.storage, self.id = storage, id
        self.stage, self.bound = int(mark["stage"]), float(mark["bound"])
        self.trials: dict[int, tuple[int, TrialState]] = {}  # candidate's number -> trial
        self.told: dict[int, tuple[list[float] | None, dict[int, float]]] = {}  # and its values, also on the way
        for trial in storage.get_all_trials(id, deepcopy=False):
            if MARK in trial.system_attrs:
                number = int(trial.system_attrs[MARK])
                self.trials[number] = (trial._trial_id, trial.state)
                self.told[number] = (trial.values, trial.intermediate_values)

    @classmethod
    def create(
        cls, storage: JournalStorage, record: StudyRecord, first: ScoredCandidate, title: str, two: bool
    ) -> _Stage:
        id = storage.create_new_study([StudyDirection.MINIMIZE] * (1 + two), study_name=title)
        names = ["perplexity", "perplexity on short documents"][: 1 + two]
        storage.set_study_system_attr(id, "study:metric_names", names)
        mark: dict[str, Any] = {
            **_identity(record),
            "stage": first.stage,
            "bound": ROOM * max(first.factors.by_layer()[0]),
        }
        storage.set_study_system_attr(id, MARK, mark)
        return cls(storage, id, mark)

    def contradicts(self, row: ScoredCandidate, short: ScoredCandidate | None) -> bool:
        """Whether a trial that has ended says something else than the store."""
        state = self.trials.get(row.number, (0, TrialState.RUNNING))[1]
        if state not in FINAL:
            return False
        trial = _trial(row, short, self.bound)
        told = (trial.values, trial.intermediate_values)
        # What comes of a failed candidate's other documents after its failure is left out.
        return trial.state != state or (state != TrialState.FAIL and told != self.told[row.number])

    def put(self, row: ScoredCandidate, short: ScoredCandidate | None) -> bool:
        """Write a candidate where the mirror does not have it as it is; whether that was so."""
        trial = _trial(row, short, self.bound)
        if row.number not in self.trials:
            self.trials[row.number] = (self.storage.create_new_trial(self.id, trial), trial.state)
            self.told[row.number] = (trial.values, trial.intermediate_values)
            return True
        id, state = self.trials[row.number]
        told = (trial.values, trial.intermediate_values)
        if state in FINAL or (state == trial.state and self.told[row.number] == told):
            return False
        for step, value in trial.intermediate_values.items():
            self.storage.set_trial_intermediate_value(id, step, value)
        self.told[row.number] = told
        if trial.state != state:
            if "failure" in trial.user_attrs:
                self.storage.set_trial_user_attr(id, "failure", trial.user_attrs["failure"])
            self.storage.set_trial_state_values(id, trial.state, trial.values)
            self.trials[row.number] = (id, trial.state)
        return True

    def describe(self, record: StudyRecord) -> None:
        """Status, and the result once there is one."""
        shown: dict[str, Any] = {"status": record.status, "mirror of": f"{record.name} (longrope)"}
        if record.result is not None and "origin" in record.result:
            shown["chosen on the selection documents"] = record.result["origin"]
        known = self.storage.get_study_user_attrs(self.id)
        for name, value in shown.items():
            if known.get(name) != value:
                self.storage.set_study_user_attr(self.id, name, value)


def _lock(path: Path) -> IO[bytes] | None:
    """Hold the file: two that follow would write every trial twice. Free once the file that is returned is closed."""
    if not path.absolute().parent.is_dir():
        raise LongRopeError(f"The folder of the mirror {path} does not exist; create it, or name another --mirror.")
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        file = path.open("ab")
    except OSError as error:
        raise LongRopeError(f"The mirror {path} cannot be written: {error.strerror}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise LongRopeError(
            f"Another process follows the study in {path} already; look at that one's page, or name another --mirror."
        ) from None
    return file


def _open(path: Path) -> JournalStorage:
    try:
        if path.exists() and path.stat().st_size and not path.read_bytes()[:1] == b"{":
            raise LongRopeError(f"{path} is no journal of Optuna's; name another file with --mirror.")
        return JournalStorage(_Journal(path))
    except OSError as error:
        raise LongRopeError(f"The mirror {path} cannot be written: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LongRopeError(f"The mirror {path} is damaged; delete it, and it is made anew.") from error


def _identity(record: StudyRecord) -> dict[str, str]:
    """Which study of the store it is: a name may be given again after a deletion."""
    return {"study": record.name, "created": record.created_at.isoformat()}


def _mirrored(storage: JournalStorage, record: StudyRecord) -> list[_Stage]:
    """What the mirror has of this study; what it has of an earlier one of the same name goes."""
    found = []
    for study in storage.get_all_studies():
        mark = study.system_attrs.get(MARK)
        if mark is None or mark["study"] != record.name:
            continue
        if mark["created"] == _identity(record)["created"]:
            found.append(_Stage(storage, study._study_id, mark))
        else:
            storage.delete_study(study._study_id)
    return found


def _place(row: ScoredCandidate) -> tuple[int, str, int]:
    return row.stage, row.part, row.generation


def _two_objectives(record: StudyRecord) -> bool:
    search = record.settings.get("search", {})
    return search.get("sampler") is not None and Sampler(**search["sampler"]).two_objectives


def _trial(row: ScoredCandidate, short: ScoredCandidate | None, bound: float) -> FrozenTrial:
    """A candidate as a trial: rescale factors on log axes, and after every document the perplexity so far."""
    lambdas = row.factors.by_layer()[0]
    width = len(str(len(lambdas) - 1))
    params: dict[str, Any] = {f"lambda_{i:0{width}d}": value for i, value in enumerate(lambdas)}
    distributions: dict[str, BaseDistribution] = {
        name: FloatDistribution(min(1.0, value), max(bound, value), log=True) for name, value in params.items()
    }
    params["n_hat"] = row.factors.n_hat
    distributions["n_hat"] = IntDistribution(0, max(HIGHEST_N_HAT, row.factors.n_hat))
    state, values = _fate(row, short)
    attributes: dict[str, Any] = {
        "origin": row.origin,
        "generation": f"{row.part} {row.generation}",
        "attention factor": row.factors.attention_factor,
    }
    if row.failure is not None:
        attributes["failure"] = row.failure
    return FrozenTrial(
        number=-1,  # Optuna's storage gives it, and the id
        trial_id=-1,
        state=state,
        value=None,
        values=values,
        datetime_start=_local(row.started_at),
        datetime_complete=_local(row.finished_at) if state in FINAL else None,
        params=params,
        distributions=distributions,
        user_attrs=attributes,
        system_attrs={MARK: row.number},
        intermediate_values={k + 1: value for k, value in enumerate(_so_far(row))},
    )


def _fate(row: ScoredCandidate, short: ScoredCandidate | None) -> tuple[TrialState, list[float] | None]:
    """State, and values of a trial that is complete."""
    for scored in (row, short):
        if scored is not None and scored.failure is not None:
            return TrialState.FAIL, None
    if row.dropped:
        return TrialState.PRUNED, None
    scores = [Score(r.nll, r.tokens) for r in (row, short) if r is not None and r.nll is not None]
    if len(scores) < 1 + (short is not None):
        return TrialState.RUNNING, None
    return TrialState.COMPLETE, [score.perplexity for score in scores]


def _so_far(row: ScoredCandidate) -> list[float]:
    """After every document, the perplexity on the documents until then: what racing compares."""
    nlls, counts = zip(*row.by_document, strict=True) if row.by_document else ((), ())
    totals = zip(accumulate(nlls), accumulate(counts), strict=True)
    return [Score(nll, tokens).perplexity for nll, tokens in totals]


def _local(moment: datetime | None) -> datetime:
    """As Optuna keeps it: this machine's clock, naive. What was never timed is of now."""
    return (moment or datetime.now(UTC)).astimezone().replace(tzinfo=None)
