"""A small study for the store's tests, and ways to look at what the store does."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, event, func, select

from searcher.rope import Factors
from searcher.study import Candidate, Document, Outcome, Store
from storage.models import Base
from storage.repository import Repository, StudyStore

DOCUMENTS = [Document("a.txt", "a" * 64, 64), Document("b.txt", "b" * 64, 32)]
CANDIDATES = [
    Candidate(Factors((1.0, 2.5, 4.0), 4, 1.25), "seed:pi"),
    Candidate(Factors((1.0, 1.07, 3.33)), "mutant"),
    Candidate(Factors(((1.0, 2.0, 3.0), (1.0, 1.5, 2.0)), 0, 1.0), "by layer"),
]
KEYS = [[f"{i}{j}" * 32 for j in range(2)] for i in range(3)]
UNIT_COUNT = 6


@contextmanager
def study(repository: Repository, name: str = "s", generation: bool = True) -> Iterator[StudyStore]:
    repository.create_study(name, "search", {})
    with repository.open_study(name) as store:
        if generation:
            store.add_generation(0, "search", 0, CANDIDATES, DOCUMENTS, KEYS)
        yield store


def known(store: Store, generation: int = 0) -> list[list[Outcome | None]]:
    return store.outcomes(0, "search", generation)


def rows(database: Engine) -> dict[str, int]:
    """How many rows each table holds."""
    with database.connect() as connection:
        return {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in Base.metadata.sorted_tables
        }


@contextmanager
def listening(moment: str, listener: Any) -> Iterator[None]:
    """Have every engine of this process call a function."""
    event.listen(Engine, moment, listener)
    try:
        yield
    finally:
        event.remove(Engine, moment, listener)


@contextmanager
def statements() -> Iterator[list[str]]:
    """The SQL that this process sends meanwhile, but for BEGIN, which SQLAlchemy sends on SQLite only."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if not statement.startswith("BEGIN"):
            seen.append(statement)

    with listening("before_cursor_execute", note):
        yield seen


def run_in_threads(works: Sequence[Any]) -> list[BaseException]:
    errors: list[BaseException] = []

    def guarded(work: Any) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors
