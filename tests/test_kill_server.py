"""Drivers that are killed or race on PostgreSQL, and PostgreSQL killed under a driver: the study stays the study."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kill_study import FACTORS, IN_PROCESS, NAME, Moment, Study
from postgres_server import PASSWORD, Server
from test_kill import Report, Undisturbed, check_finished, kill_once, publish, undisturbed, wait_until_stopped

__all__ = ["undisturbed"]

NewStudy = Callable[..., Study]

MOMENTS = [
    Moment("committing UPDATE longrope_studies SET lease_token*"),
    Moment("sql INSERT INTO longrope_units* @ search 0"),
    Moment("committing INSERT INTO longrope_evaluations* @ refine 0"),
    Moment("scoring search 1 *", 3),
    Moment(f"replaced {FACTORS}"),
]


@pytest.fixture
def server(postgres: Server) -> Iterator[Server]:
    """Runs again after the test, whatever that did to it."""
    yield postgres
    if not postgres.answers():
        postgres.start()


@pytest.fixture
def new_study(server: Server, tiny_llama_folder: Path, text_folder: Path, tmp_path: Path) -> NewStudy:
    """``new_study(backend)``: the study of test_kill.py, not begun, in a fresh database."""

    def new(backend: str = "postgresql") -> Study:
        url = server.new_database() if backend == "postgresql" else None
        return Study(tmp_path / backend, tiny_llama_folder, text_folder, IN_PROCESS, url=url)

    return new


def test_a_few_kills_of_the_driver(new_study: NewStudy, undisturbed: Undisturbed) -> None:
    """All kinds of moments, and random ones, are in test_kill.py, for ``make test-all``."""
    study, report, drivers = new_study(), Report(), []
    for moment in MOMENTS:
        drivers.append(kill_once(study, report, moment))
        assert drivers[-1].status == -signal.SIGKILL, drivers[-1].output
    drivers.append(kill_once(study, report))
    check_finished(study, undisturbed, drivers, report)
    assert report.kills == len(MOMENTS)
    assert study.lease() == (None, None)


@pytest.mark.parametrize(
    "where",
    [
        "sql INSERT INTO longrope_evaluations* @ search 1",
        pytest.param("committing UPDATE longrope_studies SET status*", marks=pytest.mark.slow),
    ],
)
def test_the_server_is_killed_and_comes_back(
    new_study: NewStudy, undisturbed: Undisturbed, server: Server, where: str
) -> None:
    study = new_study()
    holder, stem = study.start(Moment(where, signal=signal.SIGSTOP))
    wait_until_stopped(holder.pid)
    server.kill()
    os.kill(holder.pid, signal.SIGCONT)
    time.sleep(0.5)
    server.start()
    holder.join(200)
    output = stem.with_suffix(".out").read_text()
    assert holder.exitcode == 0, output
    assert output.count("trying again for up to 600 s") == output.count("The store answers again") == 1
    assert PASSWORD not in output
    assert study.trajectory() == undisturbed.study.trajectory()
    started = [line for line in stem.with_suffix(".log").read_text().splitlines() if line.startswith("scoring ")]
    assert len(started) == len(set(started)), "nothing is computed again"


def test_the_server_stays_away(new_study: NewStudy, undisturbed: Undisturbed, server: Server) -> None:
    """Beyond the limit: one error, and once the server is there again ``resume`` goes on at once."""
    study = new_study()
    study.environment["LONGROPE_STORAGE_TIMEOUT"] = "0.7"
    holder, stem = study.start(Moment("scored search 1 *", signal=signal.SIGSTOP))
    wait_until_stopped(holder.pid)
    server.kill()
    os.kill(holder.pid, signal.SIGCONT)
    holder.join(200)
    output = stem.with_suffix(".out").read_text()
    assert holder.exitcode == 1, output
    error = output.splitlines()[-1]
    assert error.startswith("Error: The store postgresql+psycopg://postgres:***@/")
    assert "did not come back within 0.7 s" in error
    assert error.endswith(f"then `longrope resume {NAME}`.")
    assert output.count("Error") == 1
    assert "Traceback" not in output
    assert PASSWORD not in output
    server.start()
    resumed = study.run()
    assert resumed.status == 0, resumed.output
    assert study.trajectory() == undisturbed.study.trajectory()


@pytest.mark.slow
def test_a_clean_stop_while_the_server_is_away(new_study: NewStudy, undisturbed: Undisturbed, server: Server) -> None:
    study = new_study()
    holder, stem = study.start(Moment("scored search 1 *", signal=signal.SIGSTOP))
    wait_until_stopped(holder.pid)
    server.kill()
    os.kill(holder.pid, signal.SIGCONT)
    deadline = time.monotonic() + 60
    while "trying again" not in stem.with_suffix(".out").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(holder.pid, signal.SIGINT)
    holder.join(60)
    output = stem.with_suffix(".out").read_text()
    assert holder.exitcode == 130, output
    assert f"Go on with: longrope resume {NAME}\n" in output
    server.start()
    resumed = study.run()
    assert resumed.status == 0, resumed.output
    assert study.trajectory() == undisturbed.study.trajectory()


@pytest.mark.parametrize("backend", [pytest.param("sqlite", marks=pytest.mark.slow), "postgresql"])
def test_two_at_the_same_instant(new_study: NewStudy, undisturbed: Undisturbed, backend: str) -> None:
    """Of two launches one makes the study; of two resumes after a kill one goes on at once. The others say why not."""
    study = new_study(backend)
    gate = Moment("loading", signal=signal.SIGSTOP)
    for ended_by, expected in ((Moment("scoring search 1 *", 2), "There is a study"), (None, "is held by process")):
        drivers = [study.start(gate, then=ended_by) for _ in range(2)]
        try:
            for process, _ in drivers:
                wait_until_stopped(process.pid)
            for process, _ in drivers:
                os.kill(process.pid, signal.SIGCONT)
            for process, _ in drivers:
                process.join(200)
        finally:
            for process, _ in drivers:
                process.kill()
        by_status = {process.exitcode: stem.with_suffix(".out").read_text() for process, stem in drivers}
        winner = -signal.SIGKILL if ended_by else 0
        assert by_status.keys() == {winner, 1}, by_status
        assert expected in by_status[1].splitlines()[-1]
        assert "Traceback" not in by_status[1]
    assert study.trajectory() == undisturbed.study.trajectory()


@pytest.mark.slow
def test_the_server_is_killed_at_random_instants(
    new_study: NewStudy,
    undisturbed: Undisturbed,
    server: Server,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Again and again under one driver, at whatever it is doing."""
    report, draw, began = Report(), random.Random(5), time.monotonic()
    study = new_study()
    holder, stem = study.start()
    while study.status() is None:
        time.sleep(0.02)
    while holder.is_alive():
        holder.join(draw.uniform(0.05, 0.3) * undisturbed.seconds)
        if holder.is_alive():
            server.kill()
            report.kills += 1
            time.sleep(draw.uniform(0.0, 1.0))
            server.start()
    assert holder.exitcode == 0, stem.with_suffix(".out").read_text()
    assert study.trajectory() == undisturbed.study.trajectory()
    started = [line for line in stem.with_suffix(".log").read_text().splitlines() if line.startswith("scoring ")]
    assert len(started) == len(set(started))
    assert report.kills > 2
    report.studies, report.evaluations, report.seconds = 1, len(started), time.monotonic() - began
    publish(report, "PostgreSQL killed at random instants:", tmp_path, record_property)
