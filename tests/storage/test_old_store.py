"""A store that an earlier version left: it is brought up to date, and what was in it shows as it did."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from rich.console import Console
from small_study import rows
from sqlalchemy import Engine, create_engine, inspect, text

from searcher.plan import SearchSettings
from searcher.study import Candidate, Document, Outcome
from storage.database import MIGRATIONS
from storage.factor_file import ModelIdentity
from storage.models import VERSION_TABLE
from storage.report import pareto_table, perplexity_table, progress_table, studies_table
from storage.repository import Repository
from storage.results import factor_file
from storage.results import factors_of as result_factors

LAMBDAS = [[1.0, 1.07, 3.33], [1.0, 2.0, 8.0]]
FACTORS = {"lambdas": LAMBDAS[0], "n_hat": 4, "attention_factor": 1.25}
ROW = {"nll": 6.5, "tokens": 62, "failure": None}
RESULT: dict[str, Any] = {
    "factors": {"pi": FACTORS | {"lambdas": [8.0, 8.0, 8.0]}, "searched": FACTORS},
    "scores": {part: {"pi": ROW, "searched": ROW | {"nll": 6.25}} for part in ("selection", "test")},
    "windows": {"search": [2, 32], "selection": [2, 32], "test": [2, 32], "short": [2, 4]},
    "origin": "finalist",
    "scale": 8.0,
    "attention_factor": 1.25,
    "forwards": 9,
    "computed_by": {"software": {"torch": "2.9"}, "numerics": {"dtype": "float32"}},
    "history": [0.11, 0.1],
}
NEW_TABLES = ("longrope_stages", "longrope_checkpoints", "longrope_training_logs")
STUDIES = [("done", "finished", RESULT), ("left", "running", None)]


@pytest.fixture(params=["0001", "0002"])
def revision(request: pytest.FixtureRequest) -> str:
    """The schema of the version that left the store."""
    return str(request.param)


@pytest.fixture
def old(store_url: str, revision: str) -> Iterator[Engine]:
    """Two studies, one of them finished, with the tables of an earlier revision."""
    engine = create_engine(store_url)
    with engine.begin() as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(MIGRATIONS))
        command.upgrade(config, "0001")
        moment = "2026-01-02 03:04:05.000000"
        for study, (name, status, result) in enumerate(STUDIES, start=1):
            connection.execute(
                text(
                    "INSERT INTO longrope_studies (id, name, kind, settings, profile, status, result, created_at, "
                    "updated_at, lease_version) "
                    "VALUES (:id, :name, 'search', :settings, '{}', :status, :result, :moment, :moment, 2)"
                ),
                {
                    "id": study,
                    "name": name,
                    "settings": json.dumps({"model": {"path": "m"}}),
                    "status": status,
                    "result": None if result is None else json.dumps(result),
                    "moment": moment,
                },
            )
            for child, lambdas in enumerate(LAMBDAS):
                place = {"id": 2 * study + child, "study": study, "child": child, "lambdas": json.dumps(lambdas)}
                connection.execute(
                    text(
                        "INSERT INTO longrope_candidates VALUES "
                        "(:id, :study, 0, 'search', 0, :child, 'seed:pi', :lambdas, 4, 1.25)"
                    ),
                    place,
                )
                for position in range(2):
                    # The second study lacks the last evaluation; the first of all is shared, and the next has no value.
                    last = study == 2 and child == position == 1
                    key = "missing" if last else "shared" if child == position == 0 else f"{child}{position}"
                    connection.execute(
                        text("INSERT INTO longrope_units VALUES (:id, :position, 'a.txt', 'sha', 32, :key, NULL)"),
                        {"id": place["id"], "position": position, "key": key},
                    )
        for key, nll, reason in (("shared", 0.1, None), ("01", 0.2, None), ("10", None, "overflow"), ("11", 1.0, None)):
            connection.execute(
                text("INSERT INTO longrope_evaluations VALUES (:key, :nll, :reason, 31, 0.5, 'w', :moment)"),
                {"key": key, "nll": nll, "reason": reason, "moment": moment},
            )
        command.upgrade(config, revision)
    yield engine
    engine.dispose()


def printed(table: Any) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.mark.parametrize("create", [True, False])
def test_every_row_is_kept(old: Engine, store_url: str, revision: str, create: bool) -> None:
    tables = ("longrope_studies", "longrope_candidates", "longrope_units", "longrope_evaluations")
    with_gradients = {column["name"] for column in inspect(old).get_columns("longrope_evaluations")} >= {"gradient"}
    assert with_gradients == (revision != "0001")
    with old.begin() as connection:
        if with_gradients:
            connection.execute(text("UPDATE longrope_candidates SET seen = 1 WHERE id = 3"))
            connection.execute(text("UPDATE longrope_evaluations SET gradient = '[0.5, -0.25]' WHERE key = '11'"))
        before = {table: connection.execute(text(f"SELECT * FROM {table}")).all() for table in tables}
    assert not [table for table in inspect(old).get_table_names() if table in NEW_TABLES]
    Repository(store_url, create).close()
    with old.connect() as connection:
        for table in tables:
            after = connection.execute(text(f"SELECT * FROM {table}")).all()
            widened = not with_gradients and table in ("longrope_candidates", "longrope_evaluations")
            assert [tuple(row) for row in after] == [(*row, None) if widened else tuple(row) for row in before[table]]
        assert connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).all() == [("0003",)]
    found = rows(old)
    assert [found[table] for table in NEW_TABLES] == [0] * len(NEW_TABLES)


@pytest.mark.usefixtures("old")
def test_studies_are_listed(store_url: str) -> None:
    repository = Repository(store_url)
    done, left = repository.studies()
    assert (done.name, done.status, done.units, done.done, done.failed) == ("done", "finished", 4, 4, 1)
    assert (left.name, left.status, left.units, left.done, left.failed) == ("left", "stopped", 4, 3, 1)
    assert (done.dropped, done.skipped, left.dropped, left.skipped) == (0, 0, 0, 0)
    assert (done.stage, left.stage) == (None, None)
    assert repository.stages("done") == repository.stages("left") == []
    listed = printed(studies_table([done, left]))
    assert "4/4" in listed
    assert "3/4" in listed
    assert "raced out" in listed
    narrow = printed(studies_table([done, left], 80))
    assert "raced out" not in narrow
    assert all(shown in narrow for shown in ("done", "finished", "stopped", "4/4", "changed (UTC)"))
    repository.close()


@pytest.mark.usefixtures("old")
def test_a_finished_study_shows_and_exports(store_url: str) -> None:
    repository = Repository(store_url)
    record = repository.study("done")
    found = repository.generations("done")
    assert [(row.nll, row.failure) for row in found] == [(0.1 + 0.2, None), (None, "overflow")]
    cost = repository.cost("done")
    assert (cost.forwards, cost.gradients, cost.multiple, cost.total) == (4, 0, None, 4.0)
    assert [point.loss for point in repository.trajectory("done")] == [(0.1 + 0.2) / 62] * 2
    shown = printed(progress_table(found, cost))
    assert "seed:pi" in shown
    assert "4 document forwards" in shown
    assert record.result == RESULT
    assert f"{math.exp(6.25 / 62):.4f}" in printed(perplexity_table(record.result, "test"))
    assert pareto_table(record.result).row_count == 0
    model = ModelIdentity(
        name="m",
        weights_sha256="0" * 64,
        family="llama",
        theta=10000.0,
        rotary_dim=6,
        original_length=4,
        layers=2,
        pairing="half",
        shipped_scaling=None,
    )
    file = factor_file(model, SearchSettings(target_length=32), record.result, {})
    assert file.regimes[0].factors == result_factors(RESULT, "searched")
    repository.close()


def test_an_unfinished_study_goes_on(old: Engine, store_url: str) -> None:
    repository = Repository(store_url)
    with repository.open_study("left") as store:
        ((first, second), (third, fourth)) = store.outcomes(0, "search", 0)
        assert (first, second) == (Outcome("shared", 0.1, 31, 0.5, "w"), Outcome("01", 0.2, 31, 0.5, "w"))
        assert third is not None
        assert third.failure == "overflow"
        assert fourth is None
        store.record(Outcome("missing", 2.0, 31, 0.5, "w"))
        candidate = store.candidates(0, "search", 0)
        assert candidate is not None
        step = Candidate(candidate[0].factors, "refine:pi")
        store.add_generation(0, "refine", 0, [step], [Document("a.txt", "sha", 32)], [["step"]])
        store.record(Outcome("step", 2.0, 31, 1.5, "w", gradient=(0.1, 0.2)))
        assert store.outcomes(0, "refine", 0) == [[Outcome("step", 2.0, 31, 1.5, "w", gradient=(0.1, 0.2))]]
        store.finish(RESULT)
    assert repository.cost("left").multiple == 3.0
    repository.delete_study("done")
    repository.delete_study("left")
    repository.close()
    assert set(rows(old).values()) == {0}
