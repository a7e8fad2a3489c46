"""The database under the store: its schema, its address, and its disk."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from small_study import (
    CANDIDATES,
    DOCUMENTS,
    KEYS,
    known,
    listening,
    run_in_threads,
    statements,
    study,
)
from sqlalchemy import Engine, inspect, text

from searcher.errors import LongRopeError
from searcher.study import Outcome
from storage.models import VERSION_TABLE, Base
from storage.repository import Repository, StudyStore


class TestSchema:
    def test_the_newest_revision_is_the_models(self, database: Engine) -> None:
        with database.connect() as connection:
            context = MigrationContext.configure(
                connection, opts={"version_table": VERSION_TABLE, "compare_type": True}
            )
            assert compare_metadata(context, Base.metadata) == []
        assert VERSION_TABLE in inspect(database).get_table_names()
        assert "alembic_version" not in inspect(database).get_table_names()

    def test_opening_again_changes_nothing(self, repository: Repository, store_url: str) -> None:
        repository.create_study("s", "search", {})
        with statements() as sent:
            again = Repository(store_url)
        assert again.study("s") == repository.study("s")
        again.close()
        assert not [s for s in sent if s.split()[0] in ("CREATE", "INSERT", "DROP")]

    def test_a_newer_schema_is_refused(self, database: Engine, store_url: str) -> None:
        with database.begin() as connection:
            connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
        with pytest.raises(LongRopeError, match=r"schema 9999.*upgrade longrope-search"):
            Repository(store_url)

    def test_a_migration_that_fails_leaves_nothing(self, tmp_path: Path) -> None:
        with sqlite3.connect(tmp_path / "store.db") as connection:
            connection.execute("CREATE TABLE longrope_units (id)")
        with pytest.raises(LongRopeError, match="longrope_units already exists"):
            Repository(f"sqlite:///{tmp_path / 'store.db'}")
        tables = sqlite3.connect(tmp_path / "store.db").execute("SELECT name FROM sqlite_master").fetchall()
        assert tables == [("longrope_units",)]

    def test_many_open_a_fresh_database_at_once(self, store_url: str) -> None:
        barrier = threading.Barrier(4)

        def work() -> None:
            barrier.wait()
            repository = Repository(store_url)
            repository.studies()
            repository.close()

        assert run_in_threads([work] * 4) == []


class TestAddresses:
    def refusal(self, url: str) -> str:
        with pytest.raises(LongRopeError) as info:
            Repository(url)
        assert "hunter2" not in str(info.value)
        assert "\n" not in str(info.value)
        return str(info.value)

    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        folder = tmp_path / "none"
        assert f"folder {folder} " in self.refusal(f"sqlite:///{folder}/store.db")
        assert not folder.exists()

    def test_relative_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        repository = Repository("sqlite:///store.db")
        monkeypatch.chdir("/")
        repository.create_study("s", "search", {})  # in the folder where it was opened
        repository.close()
        assert (tmp_path / "store.db").exists()

    def test_a_file_that_is_no_database(self, tmp_path: Path) -> None:
        (tmp_path / "store.db").write_text("This is a letter, and a rather long one. " * 100)
        assert "file is not a database" in self.refusal(f"sqlite:///{tmp_path}/store.db")
        assert "unable to open" in self.refusal(f"sqlite:///{tmp_path}")

    def test_a_database_that_is_read_only(self, tmp_path: Path) -> None:
        Repository(f"sqlite:///{tmp_path}/store.db").close()
        message = self.refusal(f"sqlite:///file:{tmp_path}/store.db?mode=ro&uri=true")
        assert "readonly" in message
        assert "permissions" in message

    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("longrope.db", "sqlite:///longrope.db"),
            ("", "sqlite:///longrope.db"),
            ("postgresql://u:hunter2@h:port/d", "sqlite:///longrope.db"),
            ("sqlite://", "outlives"),
            ("sqlite:///:memory:", "outlives"),
            ("pigeon://u:hunter2@h/d", "pigeon://u:***@h/d"),
            ("postgresql://u:hunter2@127.0.0.1:1/d?password=hunter2", "postgresql+psycopg://u:***@127.0.0.1:1/d"),
            ("sqlite://u:hunter2@h/d", "Invalid SQLite URL"),
            ("sqlite:///store.db?timeout=soon", "could not convert"),
        ],
    )
    def test_addresses_that_lead_nowhere(self, url: str, expected: str) -> None:
        assert expected in self.refusal(url)


class TestReading:
    """What only reads makes no store."""

    @pytest.mark.parametrize("content", [None, b""])
    def test_there_is_none(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "store.db"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(LongRopeError) as info:
            Repository(f"sqlite:///{path}", create=False)
        assert str(info.value) == f"There is no store at sqlite:///{path}; `longrope launch` makes one."
        assert path.exists() is (content is not None)

    def test_a_database_of_something_else(self, tmp_path: Path) -> None:
        with sqlite3.connect(tmp_path / "store.db") as connection:
            connection.execute("CREATE TABLE letters (id)")
        with pytest.raises(LongRopeError, match="There is no store"):
            Repository(f"sqlite:///{tmp_path / 'store.db'}", create=False)
        tables = sqlite3.connect(tmp_path / "store.db").execute("SELECT name FROM sqlite_master").fetchall()
        assert tables == [("letters",)]

    def test_there_is_one(self, repository: Repository, store_url: str) -> None:
        repository.create_study("s", "search", {"kept": 1})
        reader = Repository(store_url, create=False)
        assert reader.study("s").settings == {"kept": 1}
        reader.close()


def fill(store: StudyStore) -> None:
    for i in range(2000):
        store.record(Outcome(f"more {i}", 1.0, 63))


class TestDisk:
    """SQLite's files, under the real errors of a full disk."""

    @pytest.fixture
    def limit(self) -> Iterator[dict[str, int]]:
        """Pages that the database may have, for connections made from now on."""
        pages: dict[str, int] = {}

        def shrink(connection: Any, _record: object) -> None:
            if "pages" in pages:
                connection.execute(f"PRAGMA max_page_count={pages['pages']}")

        with listening("connect", shrink):
            yield pages

    def test_a_full_disk_says_what_to_do_and_loses_nothing(self, tmp_path: Path, limit: dict[str, int]) -> None:
        url = f"sqlite:///{tmp_path}/store.db"
        repository = Repository(url)
        value = Outcome(KEYS[0][0], 1.0, 63, 0.5, "w")
        repository.create_study("s", "search", {})
        repository.close()
        with sqlite3.connect(tmp_path / "store.db") as connection:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
        limit["pages"] = pages + 4
        with repository.open_study("s") as store:
            store.add_generation(0, "search", 0, CANDIDATES, DOCUMENTS, KEYS)
            store.record(value)
            with pytest.raises(LongRopeError, match=r"disk is full.*free space.*longrope resume s") as info:
                store.add_generation(0, "search", 1, CANDIDATES * 50, DOCUMENTS, KEYS * 50)
            assert "INSERT" not in str(info.value)
            assert store.candidates(0, "search", 1) is None
            with pytest.raises(LongRopeError, match=r"disk is full.*longrope resume s"):
                fill(store)
            assert known(store)[0] == [value, None]
        with pytest.raises(LongRopeError, match="disk is full"):
            repository.create_study("t", "search", {"padding": "x" * 50_000})
        repository.close()
        limit.clear()
        with repository.open_study("s") as store:
            assert known(store)[0] == [value, None]
            store.add_generation(0, "search", 1, CANDIDATES * 50, DOCUMENTS, KEYS * 50)

    def test_a_database_that_is_locked_for_too_long(self, tmp_path: Path) -> None:
        repository = Repository(f"sqlite:///{tmp_path}/store.db?timeout=0.05")
        with study(repository) as store:
            other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            assert known(store) == [[None, None]] * 3, "a reader does not wait"
            with pytest.raises(LongRopeError, match=r"locked.*longrope resume s"):
                store.record(Outcome(KEYS[0][0], 1.0, 63))
            other.execute("ROLLBACK")
            store.record(Outcome(KEYS[0][0], 1.0, 63))
        repository.close()

    def test_commits_survive_a_power_cut(self, tmp_path: Path) -> None:
        found: list[tuple[Any, ...]] = []

        def look(connection: Any) -> None:
            raw = connection.connection.dbapi_connection
            found.append(tuple(raw.execute(f"PRAGMA {p}").fetchone()[0] for p in ("journal_mode", "synchronous")))

        with listening("commit", look):
            repository = Repository(f"sqlite:///{tmp_path}/store.db")
            repository.create_study("s", "search", {})
        repository.close()
        assert set(found) == {("wal", 2)}  # 2 is FULL: the log reaches the disk before a commit returns


def test_import_is_cheap() -> None:
    """The heavy packages stay out of what only reads the store."""
    code = "import sys, storage.repository; print(*{m.split('.')[0] for m in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "ray", "workers"} & set(out)
