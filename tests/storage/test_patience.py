"""A database server that goes away: the driver waits, says so, writes nothing twice, and gives up at its limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from postgres_server import PASSWORD, Server
from small_study import CANDIDATES, DOCUMENTS, KEYS, known, listening
from sqlalchemy import Engine, select

from searcher.errors import LongRopeError
from searcher.study import Outcome
from storage import patience
from storage.models import Base
from storage.patience import Patience, StoreLost
from storage.repository import Repository, StudyStore
from storage.stages import StageStore

VALUES = [Outcome(key, 1.5, 63, 0.5, "w") for row in KEYS for key in row]


@pytest.fixture
def backend() -> str:
    """What waits for a server is tested on a server."""
    return "postgresql"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def repository(store_url: str, said: list[str]) -> Iterator[Repository]:
    repository = Repository(store_url, patience=Patience(60.0, said.append))
    yield repository
    repository.close()


@pytest.fixture(autouse=True)
def server(postgres: Server) -> Iterator[Server]:
    """Runs again after the test, whatever that did to it."""
    yield postgres
    if not postgres.answers():
        postgres.start()


def after(seconds: float, action: Callable[[], None]) -> threading.Thread:
    thread = threading.Timer(seconds, action)
    thread.start()
    return thread


def life(repository: Repository) -> None:
    """Every kind of write that a study makes, twice where the same again is fine."""
    repository.create_study("s", "extension", {"kept": 1}, [("search", {}), ("finetune", {"steps": 4})])
    with repository.open_study("s") as store:
        store.set_profile({"device": "cpu"})
        store.begin_stage(0, {"a": 1}, {"device": "cpu"})
        store.add_generation(0, "search", 0, CANDIDATES, DOCUMENTS, KEYS)
        for value in VALUES[:-1]:
            store.record(value)
        store.record(VALUES[0])
        store.record(Outcome(VALUES[-1].key, None, 0, failure="the worker died"))
        assert known(store)[0] == VALUES[:2]
        store.settle(0, "search", 0, [2, 1, 2])
        store.add_generation(0, "search", 1, CANDIDATES[:1], DOCUMENTS, [["x" * 64, "y" * 64]])
        store.rekey(0, "search", 1, [["v" * 64, "w" * 64]])
        store.finish_stage(0, {"winner": [1.0]})
        store.begin_stage(1)
        store.wait_outside(1)
        store.begin_stage(1)
        for step in (2, 4):
            store.log_training(1, step, {"loss": 1.0 / step})
            store.record_checkpoint(1, step, f"checkpoint-{step}", "c" * 64)
        store.forget_checkpoint(1, 2)
        store.finish_stage(1, {"model": "m"})
        store.finish({"found": True})
    assert repository.study("s").status == "finished"


def content(database: Engine) -> dict[str, list[tuple[Any, ...]]]:
    """All rows, but for moments, the lease, which is released without patience, and numbers that a try has used up."""
    found = {}
    with database.connect() as connection:
        for table in Base.metadata.sorted_tables:
            numbers = ("id", "study_id", "candidate_id")
            columns = [c for c in table.c if not c.name.startswith("lease_") and not c.name.endswith("_at")]
            columns = [c for c in columns if c.name not in numbers]
            rows = [tuple(row) for row in connection.execute(select(*columns))]
            found[table.name] = sorted(rows, key=repr)
    return found


@contextmanager
def cutting(server: Server, after_commit: bool) -> Iterator[list[str]]:
    """Cut the connection at the first commit of everything written: before it, or before its answer is heard."""
    cut: list[str] = []

    def writes(connection: psycopg.Connection[Any]) -> bool:
        return connection.execute("SELECT pg_current_xact_id_if_assigned()").fetchone() != (None,)

    commit, driver = psycopg.Connection.commit, threading.current_thread()
    turns = iter(range(10**6))

    def cut_off(self: psycopg.Connection[Any]) -> None:
        mine = threading.current_thread() is driver and writes(self)
        if not mine or (not after_commit and next(turns) % 2):
            return commit(self)
        if after_commit:
            commit(self)
        server.execute(f"SELECT pg_terminate_backend({self.info.backend_pid}, 5000)")
        cut.append("cut")
        self.execute("SELECT 1")  # what the driver meets in place of an answer
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psycopg.Connection, "commit", cut_off)
        yield cut


@pytest.mark.parametrize("after_commit", [False, True])
def test_every_write_is_done_once(
    repository: Repository,
    database: Engine,
    new_store: Callable[[], str],
    server: Server,
    after_commit: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether a commit that was cut off took place is found out, for every kind of write."""
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    untroubled = Repository(new_store())
    life(untroubled)
    with cutting(server, after_commit) as cut:
        life(repository)
    assert len(cut) > 20
    expected = content(untroubled._engine)
    untroubled.close()
    assert content(database) == expected


def test_the_server_is_killed_and_comes_back(repository: Repository, server: Server, said: list[str]) -> None:
    repository.create_study("s", "search", {})
    with repository.open_study("s") as store:
        store.add_generation(0, "search", 0, CANDIDATES, DOCUMENTS, KEYS)
        store.record(VALUES[0])
        server.kill()
        starting = after(0.5, server.start)
        store.record(VALUES[1])
        starting.join()
        assert known(store)[0] == VALUES[:2]
        first, last = said
        assert "trying again for up to 60 s" in first
        assert "answers again" in last
        said.clear()
        server.kill()
        starting = after(0.5, server.start)
        assert known(store)[0] == VALUES[:2]  # who reads waits too
        starting.join()
        assert len(said) == 2
    assert not any(PASSWORD in text for text in said)


def test_killed_inside_a_transaction(repository: Repository, database: Engine, server: Server, said: list[str]) -> None:
    """Half a generation is none, and the whole of it comes at the second try."""
    database.dispose()
    killed: list[threading.Thread] = []

    def kill(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("INSERT INTO longrope_units") and not killed:
            server.kill()
            killed.append(after(0.2, server.start))

    repository.create_study("s", "search", {})
    with repository.open_study("s") as store, listening("before_cursor_execute", kill):
        store.add_generation(0, "search", 0, CANDIDATES, DOCUMENTS, KEYS)
        killed[0].join()
        assert store.candidates(0, "search", 0) == CANDIDATES
        assert known(store) == [[None, None]] * 3
    assert len(said) == 2


def test_beyond_the_limit(
    repository: Repository, store_url: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "REMINDER", 0.2)
    said: list[str] = []
    impatient = Repository(store_url, patience=Patience(0.8, said.append))
    repository.create_study("s", "search", {})
    with impatient.open_study("s") as store:
        store.add_generation(0, "search", 0, CANDIDATES, DOCUMENTS, KEYS)
        store.record(VALUES[0])
        server.kill()
        began = time.monotonic()
        with pytest.raises(LongRopeError, match=r"did not come back within 0.8 s\..*longrope resume s") as info:
            store.record(VALUES[1])
        assert time.monotonic() - began >= 0.8
        assert "\n" not in str(info.value)
        assert PASSWORD not in str(info.value)
        assert "giving up in" in said[-1]
        server.start()
        assert known(store)[0] == [VALUES[0], None]
    impatient.close()


def test_without_patience_it_fails_at_once(repository: Repository, store_url: str, server: Server) -> None:
    """What only looks does not wait, and opening does not either: the address may be wrong."""
    repository.create_study("s", "search", {})
    reader = Repository(store_url)
    server.kill()
    with pytest.raises(StoreLost, match="failed"):
        reader.study("s")
    with pytest.raises(StoreLost):
        repository.studies()
    with pytest.raises(LongRopeError, match="cannot be opened") as info:
        Repository(store_url, patience=Patience(60.0, print))
    assert PASSWORD not in str(info.value)
    server.start()
    assert reader.study("s").name == "s"
    reader.close()


def test_a_transaction_that_falls_silent_lets_go(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """A driver whose machine is gone in the middle of a transaction must not hold the row for TCP's two hours."""
    from storage import database

    monkeypatch.setattr(database, "IDLE_SECONDS", 1)
    pauses = iter((1.5,))

    def pause(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("INSERT INTO longrope_evaluations"):
            time.sleep(next(pauses, 0.0))

    repository.create_study("s", "search", {})
    with repository.open_study("s") as store, listening("after_cursor_execute", pause):
        store.record(VALUES[0])
        assert store.known([VALUES[0].key]) == {VALUES[0].key}
    assert "idle-in-transaction" in said[0]
    assert "answers again" in said[-1]


@pytest.mark.parametrize("kind", [StudyStore, StageStore])
def test_no_method_is_left_out(kind: type) -> None:
    methods: Sequence[str] = [name for name in vars(kind) if not name.startswith("_")]
    assert len(methods) >= 7
    assert [name for name in methods if not hasattr(getattr(kind, name), "__wrapped__")] == []
