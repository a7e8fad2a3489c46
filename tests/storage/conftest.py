"""The backends that the store's contract is tested on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine

from storage.repository import Repository


@pytest.fixture(params=["sqlite"])
def store_url(tmp_path: Path) -> str:
    """The URL of a fresh, empty database."""
    return f"sqlite:///{tmp_path / 'store.db'}"


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
