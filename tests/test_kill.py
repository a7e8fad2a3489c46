"""Whatever instant the driver is killed at, the study that is resumed is the study that was never killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from kill_study import FACTORS, IN_PROCESS, NAME, Ended, Moment, Study

NewStudy = Callable[[Path], Study]

RANDOM_KILLS = 20
# In the order of one study's life; each is reached by the driver that the kill before it made necessary.
MOMENTS = [
    # The tables, in one transaction; the tokens of the documents, in a file each.
    Moment("sql CREATE TABLE longrope_units*"),
    Moment("committing UPDATE longrope_studies SET lease_version*"),
    Moment("replacing *", 2),
    Moment("replaced *", 2),
    # The study's first rows.
    Moment("sql INSERT INTO longrope_studies*"),
    Moment("committing UPDATE longrope_studies SET lease_token*"),
    Moment("sql UPDATE longrope_studies SET profile*"),
    # A generation, written before any of it is computed; then its evaluations.
    Moment("sql INSERT INTO longrope_candidates* @ search 0"),
    Moment("sql INSERT INTO longrope_units* @ search 0"),
    Moment("committing INSERT INTO longrope_units* @ search 0"),
    Moment("scoring search 0 *", 3),
    Moment("scored search 0 *", 2),
    Moment("sql INSERT INTO longrope_evaluations* @ search 0", 4),
    Moment("committing INSERT INTO longrope_evaluations* @ search 0", 2),
    # A refinement: within a step, within the transaction that records a gradient, between steps, at the leg's end.
    Moment("scoring refine 0 *"),
    Moment("sql INSERT INTO longrope_evaluations* @ refine 0"),
    Moment("committing INSERT INTO longrope_evaluations* @ refine 0"),
    Moment("sql INSERT INTO longrope_candidates* @ refine 1"),
    Moment("scored refine 2 *"),
    Moment("sql INSERT INTO longrope_candidates* @ refined *"),
    Moment("scored refined *"),
    # Children that race: in a round, before and after the decision between two rounds, at the writing of the next.
    Moment("scoring search 1 *", 3),
    Moment("racing search 1"),
    Moment("raced search 1: *"),
    Moment("sql INSERT INTO longrope_units* @ search 2"),
    Moment("raced search 2: *"),
    # The winner's own refinement.
    Moment("sql INSERT INTO longrope_evaluations* @ refine 4"),
    Moment("committing INSERT INTO longrope_units* @ refined *"),
    # The finalists on the selection set, and every row on every set.
    Moment("sql INSERT INTO longrope_candidates* @ selection 0"),
    Moment("scored selection 0 *", 2),
    Moment("scoring selection 1 *", 3),
    Moment("committing INSERT INTO longrope_units* @ test 1"),
    Moment("sql INSERT INTO longrope_evaluations* @ test 1", 5),
    Moment("scoring short 1 *", 4),
    # The end: first the file, then the mark that the study is finished, then the lease.
    Moment(f"replacing {FACTORS}"),
    Moment(f"replaced {FACTORS}"),
    Moment("sql UPDATE longrope_studies SET status*"),
    Moment("committing UPDATE longrope_studies SET status*"),
    Moment("sql UPDATE longrope_studies SET lease_token*", 2),
]


@dataclass
class Report:
    """What the kills did, for people."""

    studies: int = 0
    kills: int = 0
    resumes: int = 0
    evaluations: int = 0
    recomputed: int = 0
    seconds: float = 0.0
    where: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """A table of a few lines."""
        return [
            f"{self.kills} kills with SIGKILL in {self.studies} studies, {self.resumes} resumes, {self.seconds:.0f} s",
            f"{self.evaluations} evaluations started, {self.recomputed} of them again: each was in flight at a kill",
            "individuals, scores, gradients, results and factor files: as the undisturbed run's, byte for byte",
            *(f"  {times} killed at: {label}" for label, times in sorted(self.where.items())),
        ]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def new_study(request: pytest.FixtureRequest, tiny_llama_folder: Path, text_folder: Path) -> NewStudy:
    """``new_study(folder)``: the same study, not begun, in a fresh database.

    On PostgreSQL a few kills that take less time are in test_kill_server.py.
    """
    server = request.getfixturevalue("postgres") if request.param == "postgresql" else None

    def new(folder: Path) -> Study:
        url = server.new_database() if server else None
        return Study(folder, tiny_llama_folder, text_folder, IN_PROCESS, url=url)

    return new


@dataclass(frozen=True)
class Undisturbed:
    """The run that nothing happened to."""

    study: Study
    driver: Ended
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(tiny_llama_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """On SQLite; on PostgreSQL it is to be the same."""
    folder = tmp_path_factory.mktemp("undisturbed")
    there = (tiny_llama_folder, text_folder, IN_PROCESS)
    study = Study(folder / "first", *there)  # starts the server that drivers are forked from: its time says nothing
    driver = study.run()
    assert driver.status == 0, driver.output
    second = Study(folder / "second", *there)
    again = second.run()
    assert second.trajectory() == study.trajectory()
    return Undisturbed(study, driver, again.seconds)


class TestUndisturbed:
    """The yardstick itself: were the study empty or constant, the comparisons below would show nothing."""

    def test_the_study_is_a_search(self, undisturbed: Undisturbed) -> None:
        trajectory = undisturbed.study.trajectory()
        places = {(part, generation) for _, part, generation, *_ in trajectory["candidates"]}
        assert {(part, generation) for part, generation in places if part != "refined"} == {
            *(("search", generation) for generation in range(3)),
            *(("refine", step) for step in range(6)),
            *((part, 1) for part in ("selection", "test", "short")),
            ("selection", 0),
        }
        values = [nll for _, nll, *_ in trajectory["evaluations"]]
        assert len(set(values)) > 0.9 * len(values) > 80
        assert trajectory["study"][0][3] == "finished"

    def test_it_descends_and_leaves_children_behind(self, undisturbed: Undisturbed) -> None:
        trajectory = undisturbed.study.trajectory()
        gradients = [json.loads(gradient) for *_, gradient in trajectory["evaluations"] if gradient is not None]
        assert len(gradients) == 6
        assert all(len(gradient) == 9 and any(gradient) for gradient in gradients)
        ends = {row[5] for row in trajectory["candidates"] if row[1] == "refined" and row[4].startswith("refined:")}
        assert ends
        assert ends.isdisjoint(row[5] for row in trajectory["candidates"] if row[1:3] == ("search", 0))
        raced = [label for label in undisturbed.driver.labels if label.startswith("raced search ")]
        assert len(raced) == 2
        assert any(int(label.split()[3]) < int(label.split()[5]) for label in raced)

    def test_no_key_is_computed_twice(self, undisturbed: Undisturbed) -> None:
        started = undisturbed.driver.started
        assert len(started) == len(set(started)) == len(undisturbed.study.stored())
        assert undisturbed.study.orphans() == []


def kill_once(study: Study, report: Report, moment: Moment | None = None, after: float | None = None) -> Ended:
    """One driver, killed at a moment or after some seconds; checks what must hold after any kill."""
    stored_before = study.stored()
    resuming = study.status() is not None
    driver = study.run(moment, after)
    assert driver.status in (0, -signal.SIGKILL), driver.output
    stored = study.stored()
    assert stored_before <= stored
    assert stored_before.isdisjoint(driver.started), "a stored evaluation was computed again"
    in_flight = [key for key in driver.started if key not in stored]
    assert len(driver.started) == len(set(driver.started))
    assert len(in_flight) <= (driver.status != 0)
    assert study.orphans() == []
    report.resumes += resuming
    report.evaluations += len(driver.started)
    report.recomputed += len(in_flight)
    if driver.status != 0:
        report.kills += 1
        words = (driver.labels or ["the start"])[-1].split()
        kept = 3 if words[0] in ("scoring", "scored", "racing", "raced") else 4
        label = " ".join(word[:24] for word in words[:kept])
        report.where[label] = report.where.get(label, 0) + 1
    return driver


def check_finished(study: Study, undisturbed: Undisturbed, drivers: list[Ended], report: Report) -> None:
    """The study that was killed is the one that was not, and nothing was computed for nothing."""
    assert study.trajectory() == undisturbed.study.trajectory()
    started = [key for driver in drivers for key in driver.started]
    assert set(started) == set(undisturbed.driver.started)
    kills = sum(driver.status != 0 for driver in drivers)
    assert len(started) - len(set(started)) <= kills
    report.studies += 1


def publish(report: Report, title: str, folder: Path, record_property: Callable[[str, object], None]) -> None:
    text = "\n".join([title, *report.lines()])
    (folder / "kill-report.txt").write_text(text + "\n")
    print(f"\n{text}")
    record_property("kills", text)


def test_killed_at_random_instants(
    new_study: NewStudy, undisturbed: Undisturbed, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    report, draw, began = Report(), random.Random(20), time.monotonic()
    while report.kills < RANDOM_KILLS:
        study = new_study(tmp_path / str(report.studies))
        drivers: list[Ended] = []
        while study.status() != "finished":
            # A third of the time goes by before the first evaluation. Ever later, in case this machine has become
            # so slow that no driver gets beyond that.
            latest = 0.6 * undisturbed.seconds * 1.05 ** len(drivers)
            drivers.append(kill_once(study, report, after=draw.uniform(0.2 * undisturbed.seconds, latest)))
        check_finished(study, undisturbed, drivers, report)
    report.seconds = time.monotonic() - began
    assert report.recomputed <= report.kills
    publish(report, "Killed at random instants:", tmp_path, record_property)


def test_killed_at_every_kind_of_moment(
    new_study: NewStudy, undisturbed: Undisturbed, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Inside every transaction, at the ends of generations, in the final re-scoring, around the factor file."""
    report, began = Report(), time.monotonic()
    study = new_study(tmp_path / "study")
    drivers: list[Ended] = []
    for moment in MOMENTS:
        assert study.status() != "finished", f"{moment} was never reached"
        drivers.append(kill_once(study, report, moment))
        assert drivers[-1].status == -signal.SIGKILL, f"{moment} was never reached:\n{drivers[-1].output}"
    # The last kill came between the mark and the release of the lease.
    assert study.status() == "finished"
    check_finished(study, undisturbed, drivers, report)
    refused = study.run()
    assert refused.status == 1
    assert refused.output.count("\n") == 1
    assert "nothing to resume" in refused.output
    report.seconds = time.monotonic() - began
    publish(report, "Killed at chosen moments:", tmp_path, record_property)


@pytest.mark.parametrize(
    ("stop", "where"),
    [
        (signal.SIGINT, "scoring search 1 *"),
        (signal.SIGINT, "sql INSERT INTO longrope_candidates*"),  # inside a transaction, its cursor still in use
        (signal.SIGTERM, "scored test 1 *"),
    ],
)
def test_a_clean_stop(new_study: NewStudy, undisturbed: Undisturbed, tmp_path: Path, stop: int, where: str) -> None:
    """Ctrl-C, and what schedulers send first: the lease is free at once and the command says how to go on."""
    study = new_study(tmp_path / "study")
    driver = study.run(Moment(where, signal=stop))
    assert driver.status == 130, driver.output
    assert driver.seconds < 20  # did not wait for a lock of its own
    assert f"Go on with: longrope resume {NAME}" in driver.output
    assert "Traceback" not in driver.output
    assert study.lease() == (None, None)
    assert study.orphans() == []
    resumed = study.run()
    assert resumed.status == 0, resumed.output
    check_finished(study, undisturbed, [driver, resumed], Report())


def test_a_live_driver_is_left_alone(new_study: NewStudy, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """One that is merely stopped still lives: a second driver is refused in one line, and harms nothing."""
    study = new_study(tmp_path / "study")
    holder, stem = study.start(Moment("scoring search 1 *", signal=signal.SIGSTOP))
    try:
        wait_until_stopped(holder.pid)
        before = (study.lease(), study.trajectory())
        second = study.run()
        assert second.status == 1
        (line,) = second.output.splitlines()[-1:]
        assert f"held by process {holder.pid}" in line
        assert "Traceback" not in second.output
        assert second.started == []
        assert (study.lease(), study.trajectory()) == before
    finally:
        os.kill(holder.pid, signal.SIGCONT)
        holder.join(60)
    assert holder.exitcode == 0, stem.with_suffix(".out").read_text()
    assert study.trajectory() == undisturbed.study.trajectory()


def wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)
