"""One driver a study: taken once, kept by heartbeats, taken over from the dead, lost without harm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from small_study import statements
from sqlalchemy import Engine, create_engine, event, select, update
from sqlalchemy.orm import Session

from searcher.errors import LongRopeError
from searcher.rope import Factors
from searcher.study import Candidate, Document, Outcome
from storage import lease
from storage.lease import Owner, process_start
from storage.models import Study
from storage.repository import Repository

HERE = Owner.of(os.getpid())
CANDIDATES = [Candidate(Factors((1.0, 2.0)), "seed")]
DOCUMENTS = [Document("a", "a" * 64, 8)]


@pytest.fixture(autouse=True)
def study(repository: Repository) -> None:
    repository.create_study("s", "search", {})


@contextmanager
def process(code: str) -> Iterator[subprocess.Popen[str]]:
    """Another Python, which has printed a line; killed at the end, at the latest."""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


SLEEP = "import time; print('ready', flush=True); time.sleep(60)"


def seize(database: Engine, owner: Owner, silence: float = 0.0) -> None:
    """Play another driver that took the study, and was last heard of some seconds ago."""
    moment = datetime.now(UTC) - timedelta(seconds=silence)
    values = {"lease_token": "another", "lease_owner": asdict(owner), "lease_heartbeat_at": moment}
    with database.begin() as connection:
        connection.execute(update(Study).values(lease_version=Study.lease_version + 1, **values))


def column(database: Engine, which: Any) -> Any:
    with database.connect() as connection:
        return connection.execute(select(which)).scalar()


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestProcesses:
    def test_a_process_keeps_its_start(self) -> None:
        with process(SLEEP) as child:
            assert process_start(child.pid)
            assert process_start(child.pid) == process_start(child.pid)
            assert process_start(os.getpid()) not in (None, "", process_start(child.pid))
            child.kill()
            child.wait()
            assert process_start(child.pid) is None

    def test_a_zombie_is_dead(self) -> None:
        with process(SLEEP) as child:
            child.kill()  # not waited for: the system still knows the pid
            wait_until(lambda: process_start(child.pid) is None)
            os.kill(child.pid, 0)

    def test_without_proc(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On other systems `ps` tells; where there is none, nothing is known."""
        monkeypatch.setattr(lease, "PROC", Path("/nowhere"))
        with process(SLEEP) as child:
            before = process_start(child.pid)
            assert before
            assert process_start(child.pid) == before
            monkeypatch.setenv("PATH", "/nowhere")
            assert process_start(child.pid) == ""
            monkeypatch.undo()
            monkeypatch.setattr(lease, "PROC", Path("/nowhere"))
            child.kill()
            wait_until(lambda: process_start(child.pid) is None)

    @pytest.mark.parametrize(
        ("change", "silence", "dead"),
        [
            ({}, 1e9, False),  # it lives, however long it was silent: suspended, or the clock jumped
            ({"started": "1"}, 0, True),  # its pid is another process's by now
            ({"pid": 2**22 + 1}, 0, True),  # beyond Linux's largest
            ({"boot_id": "an earlier boot"}, 31, True),  # the machine was started anew
            ({"boot_id": "of a namesake"}, 29, False),  # perhaps another machine of this name: its heart beats
            ({"host": "elsewhere", "pid": 2**22 + 1}, 59, False),
            ({"host": "elsewhere", "boot_id": "another"}, 59, False),
            ({"host": "elsewhere"}, 61, True),
            ({"namespace": "a container", "pid": 2**22 + 1}, 59, False),  # the pid says nothing here
            ({"namespace": "a container"}, 61, True),
            ({"started": ""}, 59, False),  # a system that does not say when a process started
            ({"started": ""}, 61, True),
        ],
    )
    def test_who_is_dead(self, change: dict[str, Any], silence: float, dead: bool) -> None:
        assert replace(HERE, **change).is_dead(HERE, silence) is dead


class TestTaking:
    def test_a_live_driver_keeps_others_out(self, repository: Repository, store_url: str) -> None:
        second = Repository(store_url)
        with repository.open_study("s"):
            for other in (repository, second):
                with (
                    pytest.raises(LongRopeError, match=f"process {os.getpid()} on host {HERE.host}"),
                    other.open_study("s"),
                ):
                    pass
        with second.open_study("s"), pytest.raises(LongRopeError), repository.open_study("s"):
            pass
        second.close()

    def test_released_after_an_error_too(self, repository: Repository, database: Engine) -> None:
        with pytest.raises(ZeroDivisionError), repository.open_study("s"):
            raise ZeroDivisionError
        assert column(database, Study.lease_token) is None
        assert column(database, Study.lease_owner) is None
        with repository.open_study("s"):
            pass

    def test_studies_are_held_one_by_one(self, repository: Repository) -> None:
        repository.create_study("t", "search", {})
        with repository.open_study("s"), repository.open_study("t"), pytest.raises(LongRopeError, match="'t'"):
            repository.open_study("t").__enter__()

    @pytest.mark.parametrize("dead_owner", [False, True])
    def test_a_race_has_one_winner(self, repository: Repository, database: Engine, dead_owner: bool) -> None:
        if dead_owner:
            seize(database, replace(HERE, started="1"))
        count = 6
        start, end = threading.Barrier(count), threading.Barrier(count)
        results: list[str] = []

        def contend() -> None:
            start.wait()
            try:
                with repository.open_study("s"):
                    results.append("won")
                    end.wait()
            except LongRopeError as error:
                results.append(str(error))
                end.wait()

        threads = [threading.Thread(target=contend) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        results.remove("won")
        assert len(results) == count - 1
        assert all(f"held by process {os.getpid()}" in result for result in results)

    def test_what_changes_between_the_look_and_the_grasp(self, database: Engine) -> None:
        """The window is a few microseconds; here a rival is let in just then."""
        rival = replace(HERE, pid=os.getppid(), started=process_start(os.getppid()) or "")

        def let_in(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
            if statement.startswith("SELECT") and column(database, Study.lease_token) is None:
                seize(database, rival)

        contender = create_engine(database.url)
        event.listen(contender, "after_cursor_execute", let_in)
        with Session(contender) as session, pytest.raises(LongRopeError, match=f"process {rival.pid} "):
            lease.acquire(session, 1, "s", HERE, "mine")
        contender.dispose()
        assert column(database, Study.lease_token) == "another"

    def test_a_killed_driver_is_taken_over_at_once(self, repository: Repository, store_url: str) -> None:
        code = f"""
import time
from storage.repository import Repository
with Repository({store_url!r}).open_study("s") as store:
    print("ready", flush=True)
    time.sleep(60)
"""
        with process(code) as child:
            with pytest.raises(LongRopeError, match=f"process {child.pid} on host"), repository.open_study("s"):
                pass
            with pytest.raises(LongRopeError, match=f"process {child.pid} on host"):
                repository.delete_study("s")
            child.send_signal(signal.SIGKILL)  # and not waited for: a zombie must not hold the study
            wait_until(lambda: process_start(child.pid) is None)
            begun = time.monotonic()
            with repository.open_study("s") as store:
                store.add_generation(0, "search", 0, CANDIDATES, DOCUMENTS, [["k"]])
            assert time.monotonic() - begun < 5

    def test_a_driver_elsewhere_is_waited_for(self, repository: Repository, database: Engine) -> None:
        elsewhere = Owner("node-7", "other boot", "other pids", 4321, "99")
        seize(database, elsewhere, silence=50)
        with pytest.raises(
            LongRopeError, match=r"process 4321 on host node-7, last heard of [45]\d s ago.*60 s of silence"
        ):
            repository.open_study("s").__enter__()
        seize(database, elsewhere, silence=62)
        with repository.open_study("s"):
            assert column(database, Study.lease_owner) == asdict(HERE)


class TestStatus:
    """A study that nobody finished runs while a live driver holds it, and else is stopped."""

    def statuses(self, repository: Repository) -> set[str]:
        return {repository.study("s").status, *(summary.status for summary in repository.studies())}

    def test_held_and_released(self, repository: Repository) -> None:
        assert self.statuses(repository) == {"stopped"}
        with repository.open_study("s") as store:
            assert self.statuses(repository) == {"running"}
            store.finish({})
            assert self.statuses(repository) == {"finished"}
        assert self.statuses(repository) == {"finished"}

    @pytest.mark.parametrize(
        ("change", "silence", "expected"),
        [
            ({}, 1e6, "running"),
            ({"started": "1"}, 0, "stopped"),
            ({"host": "elsewhere"}, 50, "running"),
            ({"host": "elsewhere"}, 70, "stopped"),
        ],
    )
    def test_by_its_owner(
        self, repository: Repository, database: Engine, change: dict[str, Any], silence: float, expected: str
    ) -> None:
        seize(database, replace(HERE, **change), silence)
        assert self.statuses(repository) == {expected}

    def test_looking_writes_nothing(self, repository: Repository, database: Engine) -> None:
        seize(database, replace(HERE, started="1"))
        with database.connect() as connection:
            before = connection.execute(select(Study.__table__)).all()
        with statements() as sent:
            assert self.statuses(repository) == {"stopped"}
        assert {statement.split()[0] for statement in sent} == {"SELECT"}
        with database.connect() as connection:
            assert connection.execute(select(Study.__table__)).all() == before


class TestHolding:
    def test_heartbeats(self, repository: Repository, database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.01)
        seen = column(database, Study.lease_version)
        with repository.open_study("s"):
            wait_until(lambda: column(database, Study.lease_version) > seen + 3)
            assert datetime.now(UTC) - column(database, Study.lease_heartbeat_at) < timedelta(seconds=3)
        seen = column(database, Study.lease_version)
        time.sleep(0.05)
        assert column(database, Study.lease_version) == seen, "no heartbeat after the end"

    def test_ends_quickly(self, repository: Repository) -> None:
        before = threading.active_count()
        with repository.open_study("s"):
            assert threading.active_count() == before + 1
            begun = time.monotonic()
        assert time.monotonic() - begun < 1
        assert threading.active_count() == before

    def test_survives_a_busy_database(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        url = f"sqlite:///{tmp_path / 'busy.db'}"
        monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.01)
        failures: list[Any] = []
        monkeypatch.setattr(threading, "excepthook", failures.append)
        repository = Repository(f"{url}?timeout=0.01")
        repository.create_study("s", "search", {})
        database = create_engine(url)
        with repository.open_study("s"):
            with database.connect() as connection:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                locked_at = column(database, Study.lease_version)
                time.sleep(0.2)
                assert column(database, Study.lease_version) == locked_at
                connection.rollback()
            wait_until(lambda: column(database, Study.lease_version) > locked_at + 1)
        assert failures == []
        database.dispose()
        repository.close()

    def test_a_lost_lease_refuses_every_write(self, repository: Repository, database: Engine) -> None:
        other = Owner("node-7", "b", "n", 4321, "99")
        with repository.open_study("s") as store:
            store.add_generation(0, "search", 0, CANDIDATES, DOCUMENTS, [["k"]])
            seize(database, other)
            writes: list[Callable[[], None]] = [
                lambda: store.add_generation(0, "search", 1, CANDIDATES, DOCUMENTS, [["l"]]),
                lambda: store.record(Outcome("k", 1.0, 7)),
                lambda: store.record(Outcome("k", None, 0, failure="lost")),
                lambda: store.rekey(0, "search", 0, [["m"]]),
                lambda: store.set_profile({}),
                lambda: store.finish({}),
            ]
            for write in writes:
                with pytest.raises(LongRopeError, match="taken over by process 4321 on host node-7"):
                    write()
            assert store.candidates(0, "search", 1) is None
            assert store.outcomes(0, "search", 0) == [[None]]
        assert column(database, Study.status) == "running"
        assert column(database, Study.lease_token) == "another", "the end of the loser does not free the winner's lease"

    def test_a_deleted_study_refuses_writes(self, repository: Repository, database: Engine) -> None:
        with repository.open_study("s") as store:
            seize(database, replace(HERE, started="1"))
            repository.delete_study("s")
            with pytest.raises(LongRopeError, match="is gone"):
                store.record(Outcome("k", 1.0, 7))

    def test_the_thread_ends_when_the_lease_is_lost(
        self, repository: Repository, database: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.01)
        before = threading.active_count()
        with repository.open_study("s"):
            seize(database, Owner("node-7", "b", "n", 4321, "99"))
            wait_until(lambda: threading.active_count() == before)
