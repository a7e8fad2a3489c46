"""A study as Optuna trials: what the mirror holds is what the store says, however often and whenever it is synced."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from searcher.errors import LongRopeError
from searcher.rope import Factors
from searcher.study import Candidate, Document, Outcome
from storage.mirror import Mirror, Synced
from storage.repository import Repository, StudyStore

LONG = [Document(f"long {j}", f"{j}" * 64, 64) for j in range(3)]
SHORT = [Document("short", "9" * 64, 8)]
TWO = {"search": {"sampler": {"name": "nsga2", "population": 4, "batch": 4, "generations": 1}}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mirror.log"


def trials(path: Path, study: str = "s") -> list[FrozenTrial]:
    """What any reader of Optuna's finds in the file."""
    storage = JournalStorage(JournalFileBackend(str(path)))
    return optuna.load_study(study_name=study, storage=storage).get_trials()


def add(store: StudyStore, part: str, generation: int, count: int, stage: int = 0) -> list[list[str]]:
    """A generation of ``count`` candidates; the keys of its units."""
    documents = SHORT if part == "search_short" else LONG
    found = [Candidate(Factors((1.0, 1.5 + i, 8.0), i % 3, 1.25), f"{part} {generation} {i}") for i in range(count)]
    keys = [[f"{stage} {part} {generation} {i} {j}" for j in range(len(documents))] for i in range(count)]
    store.add_generation(stage, part, generation, found, documents, keys)
    return keys


def told(trial: FrozenTrial) -> tuple[Any, ...]:
    """All of a trial that does not depend on when it was looked at."""
    return trial.params, trial.state, trial.values, trial.intermediate_values, trial.user_attrs


def test_what_is_known_of_a_candidate_is_what_its_trial_says(repository: Repository, path: Path) -> None:
    repository.create_study("s", "search", {})
    with repository.open_study("s") as store:
        whole, failed, left, begun, waiting = add(store, "search", 0, 5)
        for j, key in enumerate(whole):
            store.record(Outcome(key, 10.0 * (j + 1), 10, 1.0, "w"))
        store.record(Outcome(failed[0], 5.0, 10))
        store.record(Outcome(failed[1], math.nan, 10, failure="the loss is nan"))
        store.record(Outcome(left[0], 40.0, 10))
        store.record(Outcome(begun[0], 30.0, 10))
        mirror = Mirror(repository, "s", path)
        assert (mirror.sync().trials, mirror.sync().written) == (4, 0)
        one, two, three, four = trials(path)
        assert one.params == {"lambda_0": 1.0, "lambda_1": 1.5, "lambda_2": 8.0, "n_hat": 0}
        assert (one.state, two.state, three.state, four.state) == (
            TrialState.COMPLETE,
            TrialState.FAIL,
            TrialState.RUNNING,
            TrialState.RUNNING,
        )
        assert one.value == pytest.approx(math.exp(60 / 30), rel=1e-15)
        assert one.intermediate_values == pytest.approx({1: math.exp(1), 2: math.exp(1.5), 3: math.exp(2)}, rel=1e-15)
        assert one.duration is not None
        assert 0.9 < one.duration.total_seconds() < 60
        assert two.user_attrs["failure"] == "the loss is nan"
        store.settle(0, "search", 0, [3, 2, 1, 3, 3])
        for key in begun[1:] + waiting:
            store.record(Outcome(key, 20.0, 10))
        assert mirror.sync() == Synced(5, 3, "running")
        assert [t.state.name for t in trials(path)] == ["COMPLETE", "FAIL", "PRUNED", "COMPLETE", "COMPLETE"]
        assert trials(path)[2].intermediate_values == {1: pytest.approx(math.exp(4))}
        assert [t.number for t in trials(path)] == list(range(5))


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(looks=st.lists(st.booleans(), min_size=1, max_size=40), order=st.randoms(use_true_random=False))
def test_a_mirror_that_followed_equals_one_that_came_late(
    tmp_path_factory: pytest.TempPathFactory, looks: list[bool], order: Any
) -> None:
    folder = tmp_path_factory.mktemp("mirror")
    repository = Repository(f"sqlite:///{folder / 'store.db'}")
    repository.create_study("s", "search", {})
    moment = iter(looks * 100)
    follower = [Mirror(repository, "s", folder / "early.log")]

    def look() -> None:
        if next(moment):
            if next(moment):  # another process goes on
                follower[0].close()
                follower[0] = Mirror(repository, "s", folder / "early.log")
            follower[0].sync()

    with repository.open_study("s") as store:
        for generation in range(3):
            keys = add(store, "search", generation, 3)
            look()
            seen = [order.choice([1, 3]) for _ in keys]
            for j in range(3):
                for key in [row[j] for row, until in zip(keys, seen, strict=True) if j < until]:
                    bad = order.random() < 0.2
                    store.record(
                        Outcome(key, math.nan if bad else order.random() * 9, 10, failure="bad" if bad else None)
                    )
                    look()
            store.settle(0, "search", generation, seen)
            look()
        store.finish({"origin": "mutant"})
    late = Mirror(repository, "s", folder / "late.log")
    assert follower[0].sync().trials == late.sync().trials == 9
    by_origin: Callable[[FrozenTrial], str] = lambda trial: trial.user_attrs["origin"]  # noqa: E731
    early = sorted(trials(folder / "early.log"), key=by_origin)
    assert [told(t) for t in early] == [told(t) for t in sorted(trials(folder / "late.log"), key=by_origin)]
    assert all(trial.state.is_finished() for trial in early)
    assert late.sync().written == follower[0].sync().written == 0
    follower[0].close()
    late.close()
    repository.close()


def test_a_correction_reaches_trials_that_have_ended(repository: Repository, path: Path) -> None:
    """As long as the generation is the newest one, also where another process goes on with the mirror."""
    repository.create_study("s", "search", {})
    with repository.open_study("s") as store:
        keys = add(store, "search", 0, 2)
        for row in keys:
            for key in row:
                store.record(Outcome(key, 20.0, 10))
        mirror = Mirror(repository, "s", path)
        mirror.sync()
        for value in (10.0, math.nan, 30.0):
            store.correct(Outcome(keys[0][1], value, 10, failure=None if math.isfinite(value) else "nan"))
            mirror.sync()
            first, second = trials(path)
            late = Mirror(repository, "s", path.with_name(f"{value}.log"))
            late.sync()
            assert [told(first), told(second)] == [told(trial) for trial in trials(late.path)]
            late.close()
            mirror.close()
            mirror = Mirror(repository, "s", path)
        assert first.value == pytest.approx(math.exp(7 / 3))
        add(store, "search", 1, 1)
        assert mirror.sync().written == 0
    mirror.close()


def test_two_objectives_are_two_values(repository: Repository, path: Path) -> None:
    repository.create_study("s", "search", TWO)
    with repository.open_study("s") as store:
        (short,) = add(store, "search_short", 0, 1)
        store.record(Outcome(short[0], 5.0, 10))
        mirror = Mirror(repository, "s", path)
        assert mirror.sync().trials == 0
        (long,) = add(store, "search", 0, 1)
        for key in long:
            store.record(Outcome(key, 20.0, 10))
            mirror.sync()
        (end,) = add(store, "refined", 0, 1)
        for key in end:
            store.record(Outcome(key, 20.0, 10))
        mirror.sync()
    (trial,) = trials(path)
    assert trial.values == [math.exp(2.0), math.exp(0.5)]


def test_every_search_stage_is_a_study(repository: Repository, path: Path) -> None:
    repository.create_study("s", "extension", {}, [("search", {"name": "eight"}), ("search", {"name": "more"})])
    with repository.open_study("s") as store:
        for stage in (0, 1):
            for key in add(store, "search", 0, 1, stage)[0]:
                store.record(Outcome(key, 20.0, 10))
    assert Mirror(repository, "s", path).sync().trials == 2
    assert len(trials(path, "s 1 eight")) == len(trials(path, "s 2 more")) == 1


def test_what_was_deleted_comes_back_and_an_earlier_study_of_the_name_goes(repository: Repository, path: Path) -> None:
    def fill(count: int) -> None:
        repository.create_study("s", "search", {})
        with repository.open_study("s") as store:
            for row in add(store, "search", 0, count):
                for key in row:
                    store.record(Outcome(key, 20.0, 10))

    fill(2)
    mirror = Mirror(repository, "s", path)
    mirror.sync()
    JournalStorage(JournalFileBackend(str(path))).delete_study(0)  # as the dashboard does when it is told to
    assert mirror.sync().written == 2
    assert len(trials(path)) == 2
    mirror.close()
    repository.delete_study("s")
    fill(3)
    assert Mirror(repository, "s", path).sync().trials == len(trials(path)) == 3


def test_a_study_that_is_gone_is_said_to_be(repository: Repository, path: Path) -> None:
    repository.create_study("s", "search", {})
    mirror = Mirror(repository, "s", path)
    repository.delete_study("s")
    with pytest.raises(LongRopeError, match="There is no study 's'"):
        mirror.sync()


def test_one_follower_a_file(repository: Repository, path: Path) -> None:
    repository.create_study("s", "search", {})
    first = Mirror(repository, "s", path)
    with pytest.raises(LongRopeError, match="Another process follows"):
        Mirror(repository, "s", path)
    first.close()
    Mirror(repository, "s", path)


@pytest.mark.parametrize(
    ("content", "message"), [(b"SQLite format 3\0...", "is no journal of Optuna's"), (b"{oops\n{}\n", "is damaged")]
)
def test_another_file_is_left_as_it_is(repository: Repository, path: Path, content: bytes, message: str) -> None:
    repository.create_study("s", "search", {})
    path.write_bytes(content)
    with pytest.raises(LongRopeError, match=message):
        Mirror(repository, "s", path)
    assert path.read_bytes() == content


def test_a_folder_that_is_missing_is_named(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(LongRopeError, match=r"The folder of the mirror .* does not exist"):
        Mirror(repository, "s", tmp_path / "none" / "mirror.log")
