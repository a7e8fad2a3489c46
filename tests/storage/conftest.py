"""The backends that the store's contract is tested on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine

from storage.repository import Repository

NewStore = Callable[[], str]


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest) -> str:
    """The kind of database."""
    return str(request.param)


@pytest.fixture
def new_store(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> NewStore:
    """``new_store()``: the URL of a fresh, empty database, up to three of them in one test."""
    if backend == "sqlite":
        numbers = count(1)
        return lambda: f"sqlite:///{tmp_path / f'store{next(numbers)}.db'}"
    postgres = request.getfixturevalue("postgres")
    names = iter(("first", "second", "third"))  # emptied between tests: to make one anew takes longer
    return lambda: str(postgres.empty(next(names)))


@pytest.fixture
def store_url(new_store: NewStore) -> str:
    """The URL of a fresh, empty database."""
    return new_store()


@pytest.fixture
def repository(store_url: str) -> Iterator[Repository]:
    repository = Repository(store_url)
    yield repository
    repository.close()


@pytest.fixture
def database(store_url: str, repository: Repository) -> Iterator[Engine]:  # noqa: ARG001 - it makes the tables
    """The repository's database, past the repository: to look at rows, and to play another process."""
    engine = create_engine(store_url)
    yield engine
    engine.dispose()
