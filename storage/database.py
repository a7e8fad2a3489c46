"""Opening a database: the engine, SQLite's settings, the schema, and errors in words that help.

All that is particular to one kind of database is here; the rest of the room is plain SQLAlchemy.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, false, make_url, update
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DataError,
    DBAPIError,
    IntegrityError,
    NotSupportedError,
    ProgrammingError,
)

from searcher.errors import LongRopeError
from storage.models import VERSION_TABLE, Study

MIGRATIONS = Path(__file__).with_name("migrations")
BUSY_SECONDS = 30  # how long SQLite waits for another process's transaction; `?timeout=` in the URL says otherwise
WRITES = "longrope_writes"  # execution option: this connection's transactions write

_migrating = threading.Lock()  # Alembic's `op` and `context` are globals of its modules


def parse(url: str) -> URL:
    """The database's address.

    Raises
    ------
    LongRopeError
        Not a database URL, an in-memory database, or a SQLite file in a folder that does not exist.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise LongRopeError(
            "Expected a database URL such as sqlite:///longrope.db or postgresql://user@host/database; this one "
            "cannot be read."
        ) from None
    if parsed.drivername == "postgresql":  # SQLAlchemy 2.0 would look for psycopg2, 2.1 looks for psycopg
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise LongRopeError("A store outlives its process: name a file, such as sqlite:///longrope.db.")
        folder = Path(str(parsed.database)).absolute().parent
        if "uri" not in parsed.query and not folder.is_dir():
            raise LongRopeError(f"The folder {folder} of the store {shown(parsed)} does not exist; create it first.")
    return parsed


def shown(url: URL) -> str:
    """The address for people: without the password, and without the query, which may hold another."""
    return url.set(query={}).render_as_string(hide_password=True)


def connect(url: URL, create: bool = True) -> Engine:
    """An engine whose database is reachable and has the newest schema.

    Parameters
    ----------
    create: make the tables, and SQLite's file, where there are none; without it that is an error.

    Raises
    ------
    LongRopeError
        The database cannot be reached, read or written, is none, or was written by a newer version.
    """
    sqlite = url.get_backend_name() == "sqlite"
    if sqlite and not create and "uri" not in url.query and not Path(str(url.database)).exists():
        raise _no_store(url)
    try:
        arguments: dict[str, Any] = {"timeout": BUSY_SECONDS} if sqlite and "timeout" not in url.query else {}
        # Pre-ping: a connection that a restart of the server cut is replaced, not reported.
        engine = create_engine(url, connect_args=arguments, pool_pre_ping=True)
    except ImportError as error:
        raise LongRopeError(
            f"The store {shown(url)} needs the Python package {error.name}; for PostgreSQL, "
            "`pip install longrope-search[postgresql]` brings it."
        ) from None
    except (ArgumentError, ValueError) as error:
        raise LongRopeError(f"The store {shown(url)} cannot be opened: {_plain(error, url)}") from None
    if sqlite:
        _tune_sqlite(engine)
    try:
        try:
            _migrate(engine, url, create)
        except (IntegrityError, ProgrammingError):  # another process may have made the tables in between: look again
            _migrate(engine, url, create)
    except (DBAPIError, LongRopeError) as error:
        engine.dispose()
        if isinstance(error, LongRopeError):
            raise
        raise LongRopeError(
            f"The store {shown(url)} cannot be opened: {_plain(error, url)}. Expected a database that can be reached "
            "and written; check the address and its permissions."
        ) from error
    return engine


def _tune_sqlite(engine: Engine) -> None:
    """WAL, so that readers and the driver do not wait for each other, and commits that survive a power cut."""

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later fails at once, whatever the timeout, where another wrote
        # in between; one that is immediate waits for its turn.
        writes = connection.get_execution_options().get(WRITES)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    @event.listens_for(engine, "invalidate")
    def give_up(connection: Any, _record: object, _error: object) -> None:
        # Ctrl-C inside a statement makes SQLAlchemy close the connection. With a cursor still in use SQLite only does
        # so once that is gone, and until then keeps the lock that the release of the lease waits for.
        with suppress(sqlite3.Error):
            connection.rollback()


def _no_store(url: URL) -> LongRopeError:
    return LongRopeError(f"There is no store at {shown(url)}; `longrope launch` makes one.")


def _migrate(engine: Engine, url: URL, create: bool) -> None:
    """Bring the schema to the newest revision, in one transaction."""
    with engine.execution_options(**{WRITES: True}).begin() as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        script = ScriptDirectory.from_config(config)
        current = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()
        if current is None and not create:
            raise _no_store(url)
        if current is not None and current not in {known.revision for known in script.walk_revisions()}:
            raise LongRopeError(
                f"The store {shown(url)} has schema {current}, and this version of longrope knows none newer than "
                f"{script.get_current_head()}; upgrade longrope-search, or choose another store."
            )
        if current != script.get_current_head():
            with _migrating:
                command.upgrade(config, "head")
        # Writes nothing, and is refused where nothing can be written.
        connection.execute(update(Study).where(false()).values(lease_version=0))


@contextmanager
def explained(url: URL, advice: str) -> Iterator[None]:
    """Turn what a database or its disk can do to us into a LongRopeError; what only a bug can do passes through."""
    try:
        yield
    except (IntegrityError, ProgrammingError, DataError, NotSupportedError):
        raise
    except DatabaseError as error:
        raise LongRopeError(f"The store {shown(url)} failed: {_plain(error, url)}. {advice}") from error


def _plain(error: Exception, url: URL) -> str:
    """The driver's own words on one line, without SQL and without passwords."""
    text = " ".join(str(error.orig if isinstance(error, DBAPIError) else error).split()).rstrip(".")
    for secret in (url.password, url.query.get("password")):
        if secret:
            text = text.replace(str(secret), "***")
    return text
