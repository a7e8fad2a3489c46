"""Drivers with Ray workers, killed: the study goes on to the same factor file, and no process outlives it for long."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from kill_study import IN_PROCESS, NAME, Ended, Moment, Study

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

WORKERS = 2
ON_RAY = (f"--workers={WORKERS}", "--gpus-per-worker=0", "--threads=1")
ALL_GONE = 20.0  # seconds from a driver's death to that of the last process it had started

NewStudy = Callable[..., Study]


@pytest.fixture(scope="module")
def new_study(tiny_llama_folder: Path, text_folder: Path) -> NewStudy:
    """``new_study(folder, *options)``: the same study, not begun, in a fresh database."""
    return lambda folder, *options: Study(folder, tiny_llama_folder, text_folder, *(options or ON_RAY))


@pytest.fixture(scope="module")
def in_process(new_study: NewStudy, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The yardstick: one process, one thread, nothing happens to it."""
    study = new_study(tmp_path_factory.mktemp("in-process") / "study", IN_PROCESS, "--threads=1")
    driver = study.run()
    assert driver.status == 0, driver.output
    return study


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def segments() -> set[str]:
    """Shared memory of Ray's object store."""
    return {path.name for path in Path("/dev/shm").glob("plasma*")}


def check_nothing_left(study: Study, before: set[str]) -> None:
    wait_for(lambda: study.processes() == [], ALL_GONE)
    assert segments() <= before
    assert not (study.folder / ".ray").exists()  # Ray's token for all clusters of this user: none was made


def run_to_end(study: Study, before: set[str], moments: list[Moment]) -> list[Ended]:
    """A driver killed at each of the moments, and one that ends; whatever was stored is never computed again."""
    drivers = []
    for moment in [*moments, None]:
        stored = study.stored()
        driver = study.run(moment)
        drivers.append(driver)
        assert driver.status == (0 if moment is None else -signal.SIGKILL), driver.output
        assert stored.isdisjoint(driver.started)
        in_flight = set(driver.started) - study.stored()
        # With the workers, or come back from them while the outcome before was being stored.
        assert len(in_flight) <= (0 if moment is None else 2 * WORKERS)
        assert study.orphans() == []
        check_nothing_left(study, before)
    return drivers


def test_a_killed_driver(new_study: NewStudy, in_process: Study, tmp_path: Path) -> None:
    """With workers at work, inside transactions, in a refinement, between rounds of a race, in the final re-scoring."""
    study = new_study(tmp_path / "study")
    moments = [
        Moment("sql INSERT INTO longrope_studies*"),
        Moment("scored search 0 *", 3),
        Moment("sql INSERT INTO longrope_evaluations* @ refine 1"),
        Moment("sql INSERT INTO longrope_candidates* @ search 1"),
        Moment("raced search 1: *"),
        Moment("scored selection 0 *", 2),
        Moment("sql INSERT INTO longrope_evaluations* @ test 1", 4),
        Moment(f"replacing {NAME}-factors.json"),
    ]
    drivers = run_to_end(study, segments(), moments)
    assert study.trajectory() == in_process.trajectory()
    started = [key for driver in drivers for key in driver.started]
    recomputed = len(started) - len(set(started))
    assert recomputed <= 2 * WORKERS * len(moments)
    print(f"\n{len(moments)} kills, {len(moments)} resumes, {recomputed} evaluations recomputed, files identical")


def test_killed_while_ray_starts(new_study: NewStudy, in_process: Study, tmp_path: Path) -> None:
    """There is no study yet: the next launch begins it."""
    study = new_study(tmp_path / "study")
    began = segments()
    driver, _ = study.start()
    wait_for(lambda: any(process.name() == "raylet" for process in study.processes()), 60)
    driver.kill()
    driver.join()
    # Ray's agents give up after a minute where our reaper had not begun.
    wait_for(lambda: study.processes() == [], 100)
    run_to_end(study, began, [])
    assert study.trajectory() == in_process.trajectory()


def test_a_killed_worker(new_study: NewStudy, in_process: Study, tmp_path: Path) -> None:
    """The driver goes on by itself: the unit is done again, a new worker takes the place."""
    study = new_study(tmp_path / "study")
    before = segments()
    driver, stem = study.start(Moment("scored search 1 *", signal=signal.SIGSTOP))
    wait_for(lambda: is_stopped(driver.pid), 120)
    workers = [process for process in study.processes() if process.name().startswith("ray::Worker")]
    assert len(workers) == WORKERS
    before_it = len(study.stored())
    workers[0].suspend()
    os.kill(driver.pid, signal.SIGCONT)
    # The other goes on; at the end of the round all wait for the one that is suspended.
    wait_for(lambda: len(study.stored()) >= before_it + 2, 60)
    workers[0].kill()
    driver.join(240)
    assert driver.exitcode == 0, stem.with_suffix(".out").read_text()
    assert study.trajectory() == in_process.trajectory()
    check_nothing_left(study, before)


def is_stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def test_ctrl_c(new_study: NewStudy, in_process: Study, tmp_path: Path) -> None:
    """In a terminal it reaches every process of the group, Ray's among them."""
    study = new_study(tmp_path / "study")
    before = segments()
    driver, stem = study.start(Moment("scored search 1 *", signal=signal.SIGSTOP))
    wait_for(lambda: is_stopped(driver.pid), 120)
    for stop in (signal.SIGINT, signal.SIGCONT):
        os.killpg(driver.pid, stop)
    driver.join(60)
    output = stem.with_suffix(".out").read_text()
    assert driver.exitcode == 130, output
    assert f"longrope resume {NAME}" in output
    assert "Traceback" not in output
    assert study.lease() == (None, None)
    check_nothing_left(study, before)
    run_to_end(study, before, [])
    assert study.trajectory() == in_process.trajectory()


def test_nobody_else_can_reach_it(new_study: NewStudy, tmp_path: Path) -> None:
    """Every process of a cluster of our own listens on the loopback interface only."""
    study = new_study(tmp_path / "study")
    driver, _ = study.start(Moment("scored search 0 *", signal=signal.SIGSTOP))
    wait_for(lambda: is_stopped(driver.pid), 120)
    try:
        listening = {
            (process.name(), connection.laddr.ip)
            for process in study.processes()
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
    finally:
        driver.kill()
        driver.join()
    assert {"gcs_server", "raylet"} <= {name for name, _ in listening}
    assert {address.removeprefix("::ffff:") for _, address in listening} <= {"127.0.0.1", "::1"}
    check_nothing_left(study, segments())


@pytest.fixture
def foreign_cluster(tmp_path: Path) -> Iterator[str]:
    """The address of a cluster that somebody else has started, with ``ray start``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = tempfile.mkdtemp(prefix="ray")  # not tmp_path: the names of its sockets would be too long
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={temporary}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "HOME": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parent),  # its workers meet kill_study's documents
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on the loopback interface only
    }
    with (tmp_path / "cluster.log").open("wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    family = [psutil.Process(head.pid)]
    try:
        wait_for(lambda: "Ray runtime started" in (tmp_path / "cluster.log").read_text(), 120)
        family += family[0].children(recursive=True)
        yield f"127.0.0.1:{port}"
        assert head.poll() is None
    finally:
        for process in family:
            if process.is_running():
                process.kill()
        head.wait()
        psutil.wait_procs(family[1:], 10)
        shutil.rmtree(temporary, ignore_errors=True)


def test_on_the_cluster_of_others(foreign_cluster: str, new_study: NewStudy, in_process: Study, tmp_path: Path) -> None:
    """A killed driver's workers leave it, or the next driver's would find no CPU; the cluster itself stays."""
    study = new_study(tmp_path / "study", *ON_RAY, f"--ray-address={foreign_cluster}")
    study.environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    killed = study.run(Moment("scored search 1 *", 2))
    assert killed.status == -signal.SIGKILL, killed.output
    stored = study.stored()
    resumed = study.run()
    assert resumed.status == 0, resumed.output
    assert stored.isdisjoint(resumed.started)
    assert study.trajectory() == in_process.trajectory()
