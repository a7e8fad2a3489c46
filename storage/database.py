"""Opening a database: the engine, SQLite's settings, the schema, and errors in words that help.

All that is particular to one kind of database is here; the rest of the room is plain SQLAlchemy.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

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
    InterfaceError,
    NotSupportedError,
    ProgrammingError,
)

from searcher.errors import LongRopeError
from storage.models import VERSION_TABLE, Study
from storage.patience import StoreLost

MIGRATIONS = Path(__file__).with_name("migrations")
BUSY_SECONDS = 30  # how long SQLite waits for another process's transaction; `?timeout=` in the URL says otherwise
# A server whose machine is gone must be noticed sooner than after the hours that TCP takes. All of these may be set in
# the URL; they say nothing on a socket of this host.
KEEPALIVE = {
    "connect_timeout": 10,  # seconds, like the next two
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,  # milliseconds
}
# After which PostgreSQL undoes a transaction whose driver is silent: one on a machine that is gone must not hold its
# study's row.
IDLE_SECONDS = 60
# PostgreSQL's own codes of what another try may mend: the connection failed, the server stops or starts, it has too
# many connections, it undid the transaction for another's sake or since it was idle, it only reads after a failover.
TRANSIENT = ("08", "57P", "53300", "40001", "40P01", "25P03", "25006")
SECRETS = ("password", "secret", "conninfo", "dsn")  # in the names of a URL's parameters
# The environment's variable for an address that the command line has without its secrets.
WHOLE_ADDRESS = "LONGROPE_WHOLE_STORAGE"
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
        whole = os.environ.get(WHOLE_ADDRESS)
        parsed = _address(whole if whole and without_password(whole) == url else url)
    except (ArgumentError, ValueError):
        raise LongRopeError(
            "Expected a database URL such as sqlite:///longrope.db or postgresql://user@host/database; this one "
            "cannot be read."
        ) from None
    if parsed.drivername == "postgresql":  # SQLAlchemy 2.0 would look for psycopg2, 2.1 looks for psycopg
        parsed = parsed.set(drivername="postgresql+psycopg")
    stated = parsed.password is not None or not {"password", "service"}.isdisjoint(parsed.query)
    if _is_postgresql(parsed) and not stated and "PGSERVICE" not in os.environ:
        # As libpq would at every connection; but a driver takes it out of its environment, which its workers inherit.
        parsed = parsed.set(password=os.environ.get("PGPASSWORD"))
    if parsed.get_backend_name() == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise LongRopeError("A store outlives its process: name a file, such as sqlite:///longrope.db.")
        folder = Path(str(parsed.database)).absolute().parent
        if "uri" not in parsed.query and not folder.is_dir():
            raise LongRopeError(f"The folder {folder} of the store {shown(parsed)} does not exist; create it first.")
    return parsed


def _address(url: str) -> URL:
    """An address in its parts.

    Raises
    ------
    LongRopeError
        An @ stands where it belongs to a password, so that the rest of that would pass for a host or a database.
    """
    parsed = make_url(url)
    names = [item.partition("=")[0] for item in url.partition("@")[2].partition("?")[2].split("&")]
    places = (parsed.host or "", parsed.database or "", *names)
    if parsed.get_backend_name() != "sqlite" and any("@" in place for place in places):
        raise LongRopeError(
            "The address of the store has an @ after the one before its host; in a user's name, a password or a "
            "database's name write @ as %40, / as %2F and ? as %3F."
        )
    return parsed


def shown(url: URL) -> str:
    """The address for people: without the password, and without the query, which may hold another."""
    return url.set(query={}).render_as_string(hide_password=True)


def without_password(url: str) -> str:
    """An address that leads to the same database once the password comes another way; as it was where it has none.

    Raises
    ------
    LongRopeError
        It cannot be told what of it is the password.
    """
    parsed = _address(url)
    query = {name: value for name, value in parsed.query.items() if not any(word in name for word in SECRETS)}
    if parsed.password is None and len(query) == len(parsed.query):
        return url
    bare = URL.create(parsed.drivername, parsed.username, None, parsed.host, parsed.port, parsed.database, query)
    return bare.render_as_string(hide_password=False)


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
        libpq = url.drivername.startswith("postgresql+psycopg")
        given: dict[str, Any] = {"timeout": BUSY_SECONDS} if sqlite else KEEPALIVE if libpq else {}
        arguments = {name: value for name, value in given.items() if name not in url.query}
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
    elif _is_postgresql(url):
        _tune_postgresql(engine)
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


def _is_postgresql(url: URL) -> bool:
    return url.get_backend_name() == "postgresql"


def _tune_postgresql(engine: Engine) -> None:
    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # For this transaction alone: a setting of the session would stay behind in a pool like PgBouncer's.
        if connection.get_execution_options().get(WRITES):
            connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'")


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
    """Turn what a database or its disk can do to us into a LongRopeError; what only a bug can do passes through.

    Raises
    ------
    StoreLost
        Where another try may succeed.
    """
    try:
        yield
    except (IntegrityError, ProgrammingError, DataError, NotSupportedError):
        raise
    except (DatabaseError, InterfaceError) as error:
        what = f"The store {shown(url)} failed: {_plain(error, url)}"
        if _is_lost(error):
            raise StoreLost(what, advice) from error
        if isinstance(error, InterfaceError):
            raise
        raise LongRopeError(f"{what}. {advice}") from error


def _is_lost(error: DBAPIError) -> bool:
    """Whether the server, or the way to it, is gone for now. Never so for SQLite, which has waited for locks itself."""
    if error.connection_invalidated:
        return True
    # psycopg has it on every error, and None where no server said anything.
    state = getattr(error.orig, "sqlstate", "none")
    return isinstance(error, DatabaseError) and (state is None or state.startswith(TRANSIENT))


def _plain(error: Exception, url: URL) -> str:
    """The driver's own words on one line, without SQL and without passwords."""
    text = " ".join(str(error.orig if isinstance(error, DBAPIError) else error).split()).rstrip(".")
    hidden = [value for name, value in url.query.items() if any(word in name for word in SECRETS)]
    for secret in filter(None, map(str, (url.password, *hidden))):
        for spelt in (secret, quote(secret), quote(secret, safe=""), quote_plus(secret), repr(secret)[1:-1]):
            text = text.replace(spelt, "***")
    return text
