"""The stages of an extension: begun in order, finished once, with all they leave on their way; every write whole."""

from __future__ import annotations

import math
import os
import string
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_study import CANDIDATES, DOCUMENTS, KEYS, listening, rows, statements, study
from sqlalchemy import Engine, select, update
from sqlalchemy.exc import IntegrityError
from test_progress import LONG, RACED, SHORT, candidate, states, whole_study, write

from searcher.errors import LongRopeError
from searcher.study import Outcome
from storage.models import CheckpointRow, StageRow, Study, TrainingLogRow
from storage.repository import Checkpoint, CurrentStage, Repository, StageRecord, StudyStore
from storage.stages import OUTSIDE

PLAN: list[tuple[str, dict[str, Any]]] = [
    ("search", {"length": 2048}),
    ("finetune", {"length": 2048, "steps": 400}),
    ("search", {"length": 8192, "seed": None}),
    ("evaluate", {"lengths": (256, 8192)}),
]
SHA = "5a" * 32
OF_STAGES = (StageRow, CheckpointRow, TrainingLogRow)


@contextmanager
def extension(repository: Repository, name: str = "e", running: int | None = 0) -> Iterator[StudyStore]:
    """A study of four stages, with those before ``running`` finished and that one begun."""
    repository.create_study(name, "extension", {"plan": "small"}, PLAN)
    with repository.open_study(name) as store:
        for stage in range(-1 if running is None else running):
            store.begin_stage(stage)
            store.finish_stage(stage, {})
        if running is not None:
            store.begin_stage(running)
        yield store


def contents(database: Engine) -> list[Any]:
    """All that is stored of stages."""
    with database.connect() as connection:
        queries = [select(row.__table__).order_by(*row.__table__.primary_key) for row in OF_STAGES]
        return [connection.execute(query).all() for query in queries]


class TestPlan:
    def test_is_written_with_its_study(self, repository: Repository) -> None:
        commits: list[Any] = []
        with listening("commit", commits.append):
            repository.create_study("e", "extension", {"plan": "small"}, PLAN)
        assert len(commits) == 1
        found = repository.stages("e")
        assert found[0] == StageRecord(0, "search", {"length": 2048}, None, "waiting", None, None, None)
        assert [(row.stage, row.kind, row.status) for row in found] == [
            (0, "search", "waiting"),
            (1, "finetune", "waiting"),
            (2, "search", "waiting"),
            (3, "evaluate", "waiting"),
        ]
        assert found[2].settings == {"length": 8192, "seed": None}
        assert found[3].settings == {"lengths": [256, 8192]}
        with repository.open_study("e") as store:
            assert store.stages() == found
            assert [store.stage(stage) for stage in range(4)] == found

    def test_all_or_nothing(self, repository: Repository, database: Engine) -> None:
        unwritable: Any = [*PLAN, ("evaluate", {"lengths": {1, 2}})]
        with pytest.raises(TypeError):
            repository.create_study("e", "extension", {}, unwritable)
        assert set(rows(database).values()) == {0}
        repository.create_study("e", "extension", {}, PLAN)
        before = contents(database)
        with pytest.raises(LongRopeError, match="'e' already"):
            repository.create_study("e", "extension", {}, PLAN[:1])
        assert contents(database) == before

    def test_a_plain_search_has_none(self, repository: Repository) -> None:
        with study(repository) as store:
            assert store.stages() == repository.stages("s") == []
            with pytest.raises(LongRopeError, match=r"'s' has no stage 0: it has 0"):
                store.begin_stage(0)

    def test_studies_do_not_see_each_other(self, repository: Repository) -> None:
        with extension(repository, "one") as one, extension(repository, "two", running=None) as two:
            one.record_checkpoint(0, 5, "here", SHA)
            one.log_training(0, 5, {"loss": 1.0})
            assert two.stage(0).status == "waiting"
            assert two.checkpoints(0) == []
            assert repository.training_log("two", 0) == {}

    def test_an_unknown_study(self, repository: Repository) -> None:
        calls: list[Callable[[str], object]] = [
            repository.stages,
            lambda name: repository.training_log(name, 0),
            lambda name: repository.trajectory(name, 1),
            lambda name: repository.cost(name, 1),
        ]
        for call in calls:
            with pytest.raises(LongRopeError, match="no study 'x'"):
                call("x")


class TestBeginning:
    def test_settings_and_profile_are_fixed_by_it(self, repository: Repository) -> None:
        begun: Any = {"length": 2048, "documents": ("a", "b")}
        profile: Any = {"device": "cpu", "chunks": (1, 2)}
        before = datetime.now(UTC)
        with extension(repository, running=None) as store:
            store.begin_stage(0, begun, profile)
            first = store.stage(0)
            store.begin_stage(0, begun, profile)
            store.begin_stage(0)
            assert store.stage(0) == first
            assert first.settings == {"length": 2048, "documents": ["a", "b"]}
            assert first.profile == {"device": "cpu", "chunks": [1, 2]}
            assert (first.status, first.result, first.finished_at) == ("running", None, None)
            assert first.started_at is not None
            assert before <= first.started_at <= datetime.now(UTC)
            assert first.started_at.utcoffset() == timedelta(0)
            with pytest.raises(LongRopeError, match=r"Stage 0 of the study 'e'.*other settings.*documents, seed;"):
                store.begin_stage(0, {"length": 2048, "seed": None}, profile)
            with pytest.raises(LongRopeError, match=r"Stage 0 of the study 'e'.*numerics profile.*differs in device;"):
                store.begin_stage(0, begun, {"device": "H200", "chunks": [1, 2]})
            assert store.stage(0) == first
        assert repository.study("e").profile is None

    def test_what_is_not_given_is_as_planned(self, repository: Repository) -> None:
        with extension(repository) as store:
            assert (store.stage(0).settings, store.stage(0).profile) == (PLAN[0][1], None)
            store.begin_stage(0, PLAN[0][1], {"device": "cpu"})
            assert store.stage(0).profile == {"device": "cpu"}

    def test_every_stage_has_a_profile_of_its_own(self, repository: Repository) -> None:
        with extension(repository, running=None) as store:
            for stage in range(2):
                store.begin_stage(stage, None, {"chunk": 1024 * (stage + 1)})
                store.finish_stage(stage, {})
            assert [row.profile for row in store.stages()[:2]] == [{"chunk": 1024}, {"chunk": 2048}]

    def test_a_profile_comes_before_the_first_candidate_of_its_stage(self, repository: Repository) -> None:
        with extension(repository, running=2) as store:
            store.add_generation(0, "search", 0, CANDIDATES, DOCUMENTS, KEYS)
            store.begin_stage(2, None, {"chunk": 1})
        with extension(repository, "late", running=2) as store:
            store.add_generation(2, "search", 0, CANDIDATES, DOCUMENTS, KEYS)
            with pytest.raises(LongRopeError, match=r"Stage 2 of the study 'late' has candidates.*too late"):
                store.begin_stage(2, None, {"chunk": 1})

    def test_one_after_the_other(self, repository: Repository) -> None:
        with extension(repository) as store:
            with pytest.raises(LongRopeError, match=r"Stage 2 .*stage 0 \(search\) is running, and comes first"):
                store.begin_stage(2, {"length": 1})
            store.finish_stage(0, {})
            with pytest.raises(LongRopeError, match=r"Stage 2 .*stage 1 \(finetune\) is waiting, and comes first"):
                store.begin_stage(2, {"length": 1})
            assert store.stage(2) == StageRecord(2, "search", PLAN[2][1], None, "waiting", None, None, None)
            store.begin_stage(1)

    @pytest.mark.parametrize("stage", [4, -1])
    def test_there_is_no_such_stage(self, repository: Repository, stage: int) -> None:
        with extension(repository) as store:
            for call in (store.stage, store.begin_stage, store.wait_outside, lambda k: store.finish_stage(k, {})):
                with pytest.raises(LongRopeError, match=rf"'e' has no stage {stage}: it has 4, counted from 0"):
                    call(stage)


class TestWaitingOutside:
    def test_goes_on_when_begun_again(self, repository: Repository) -> None:
        with extension(repository, running=1) as store:
            started = store.stage(1).started_at
            store.wait_outside(1)
            store.wait_outside(1)
            assert store.stage(1).status == OUTSIDE == "waiting for an outside checkpoint"
        assert repository.studies()[0].stage == CurrentStage(1, 4, "finetune", OUTSIDE)
        with repository.open_study("e") as store:
            store.begin_stage(1)
            store.record_checkpoint(1, 400, "/outside", SHA)
            store.finish_stage(1, {"checkpoint": "/outside"})
            assert (store.stage(1).status, store.stage(1).started_at) == ("finished", started)

    def test_only_what_was_begun_and_is_not_finished(self, repository: Repository) -> None:
        with extension(repository, running=1) as store:
            for stage, status in ((0, "finished"), (2, "waiting")):
                with pytest.raises(LongRopeError, match=rf"Stage {stage} of the study 'e' is {status}; only"):
                    store.wait_outside(stage)


class TestFinishing:
    RESULT: Mapping[str, Any] = {"scores": {"none": math.inf, "pi": math.nan}, "lengths": (1, 2), "loss": 0.1 + 0.2}

    def test_twice_with_the_same_result_changes_nothing(self, repository: Repository) -> None:
        with extension(repository) as store:
            store.finish_stage(0, self.RESULT)
            first = store.stage(0)
            store.finish_stage(0, self.RESULT)
            assert repr(store.stage(0)) == repr(first)  # nan equals nan in repr
            assert first.status == "finished"
            assert first.started_at is not None
            assert first.finished_at is not None
            assert first.finished_at >= first.started_at
            assert repr(first.result) == "{'scores': {'none': inf, 'pi': nan}, 'lengths': [1, 2], 'loss': " + (
                f"{0.1 + 0.2!r}" + "}"
            )
            store.finish_stage(0, dict(reversed(self.RESULT.items())))

    def test_another_result_is_refused(self, repository: Repository) -> None:
        with extension(repository) as store:
            store.finish_stage(0, self.RESULT)
            first = store.stage(0)
            changed: list[tuple[dict[str, Any], str]] = [
                ({**self.RESULT, "loss": 0.3}, "loss"),
                ({**self.RESULT, "more": None}, "more"),
                ({key: value for key, value in self.RESULT.items() if key != "scores"}, "scores"),
            ]
            for other, where in changed:
                with pytest.raises(LongRopeError, match=rf"Stage 0 .*another result, which differs in {where}; that"):
                    store.finish_stage(0, other)
            assert repr(store.stage(0)) == repr(first)

    def test_a_stage_that_was_not_begun(self, repository: Repository) -> None:
        with extension(repository) as store:
            with pytest.raises(LongRopeError, match="Stage 1 of the study 'e' was not begun"):
                store.finish_stage(1, {})
            store.finish_stage(0, {})
            with pytest.raises(LongRopeError, match="Stage 0 of the study 'e' is finished already"):
                store.begin_stage(0)
            assert [row.status for row in store.stages()] == ["finished", "waiting", "waiting", "waiting"]


steps = st.integers(0, 4)
values = st.floats()  # NaN and infinity among them
names = st.sampled_from(["loss", "perplexity"]) | st.text(string.printable, max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


class TestWhatAStageLeaves:
    def test_checkpoints_are_what_was_recorded_last_and_not_forgotten(self, repository: Repository) -> None:
        """Also where a step is run again after a resume, or forgotten twice."""
        paths = st.sampled_from(["a", "/b/checkpoint-7", "latin\udcff", "\N{SNOWMAN} \\"])
        moves = st.lists(st.tuples(st.integers(0, 1), steps, st.none() | paths), max_size=8)

        @settings(max_examples=25, deadline=None)
        @given(moves)
        def check(moves: list[tuple[int, int, str | None]]) -> None:
            model: dict[tuple[int, int], tuple[str, str]] = {}
            for stage, step in [(stage, step) for stage in range(2) for step in range(5)]:
                store.forget_checkpoint(stage, step)
            for number, (stage, step, path) in enumerate(moves):
                if path is None:
                    store.forget_checkpoint(stage, step)
                    model.pop((stage, step), None)
                else:
                    store.record_checkpoint(stage, step, path, f"{number:064x}")
                    model[stage, step] = (path, f"{number:064x}")
            for stage in range(2):
                found = [(row.stage, row.step, os.fspath(row.path), row.sha256) for row in store.checkpoints(stage)]
                assert found == [(*place, *model[place]) for place in sorted(model) if place[0] == stage]

        with extension(repository, running=1) as store:
            check()

    def test_a_checkpoint_says_when_it_was_recorded(self, repository: Repository) -> None:
        before = datetime.now(UTC)
        with extension(repository, running=1) as store:
            store.record_checkpoint(1, 5, Path("/out/checkpoint-5"), SHA)
            (first,) = store.checkpoints(1)
            store.record_checkpoint(1, 5, Path("/out/checkpoint-5"), SHA)
            (again,) = store.checkpoints(1)
        assert first == Checkpoint(1, 5, Path("/out/checkpoint-5"), SHA, first.created_at)
        assert before <= first.created_at <= again.created_at <= datetime.now(UTC)

    def test_steps_that_are_run_again_overwrite_their_log(self, repository: Repository) -> None:
        logs = st.lists(st.tuples(steps, st.dictionaries(names, values, max_size=3)), max_size=6)
        count = iter(range(10**6))

        @settings(max_examples=15, deadline=None)
        @given(logs)
        def check(logs: list[tuple[int, dict[str, float]]]) -> None:
            name = f"e {next(count)}"
            model: dict[str, dict[int, float]] = {}
            with extension(repository, name, running=1) as store:
                for step, found in logs:
                    store.log_training(1, step, found)
                    for key, value in found.items():
                        model.setdefault(key, {})[step] = value + 0.0  # SQLite stores -0.0 as 0
                store.log_training(0, 0, {"loss": 9.0})  # another stage's
            expected = {key: dict(sorted(model[key].items())) for key in sorted(model)}
            assert repr(repository.training_log(name, 1)) == repr(expected)  # order, NaN and every bit

        check()

    def test_numbers_of_any_kind_are_logged(self, repository: Repository) -> None:
        import numpy as np

        found: Any = {"loss": np.float32(0.1), "tokens": 7}
        with extension(repository, running=1) as store:
            store.log_training(1, 1, found)
            store.log_training(1, 2, {})
        assert repository.training_log("e", 1) == {"loss": {1: float(np.float32(0.1))}, "tokens": {1: 7.0}}

    def test_nothing_is_left_by_a_stage_that_is_not_there(self, repository: Repository, database: Engine) -> None:
        with extension(repository) as store:
            before = contents(database)
            calls: list[Callable[[], None]] = [
                lambda: store.record_checkpoint(4, 1, "a", SHA),
                lambda: store.log_training(4, 1, {"loss": 1.0}),
            ]
            for call in calls:
                with pytest.raises(IntegrityError):
                    call()
            assert contents(database) == before


WRITES: dict[str, Callable[[StudyStore], None]] = {
    "begin": lambda store: store.begin_stage(2, {"length": 1}, {"device": "cpu"}),
    "begin again": lambda store: store.begin_stage(1, None, {"device": "cpu"}),
    "wait": lambda store: store.wait_outside(1),
    "finish": lambda store: store.finish_stage(1, {"a": 1}),
    "checkpoint": lambda store: store.record_checkpoint(1, 9, "new", SHA),
    "the same checkpoint": lambda store: store.record_checkpoint(1, 5, "new", SHA),
    "forget": lambda store: store.forget_checkpoint(1, 5),
    "log": lambda store: store.log_training(1, 5, {"loss": 2.0, "grad_norm": 3.0}),
}


@pytest.fixture(params=WRITES)
def work(request: pytest.FixtureRequest) -> Callable[[StudyStore], None]:
    return WRITES[request.param]


@pytest.fixture
def begun(repository: Repository, work: Callable[[StudyStore], None]) -> Iterator[StudyStore]:
    with extension(repository, running=1) as store:
        store.record_checkpoint(1, 5, "old", SHA)
        store.log_training(1, 5, {"loss": 1.0})
        if work is WRITES["begin"]:
            store.finish_stage(1, {})
        yield store


class TestEveryWrite:
    def test_is_one_transaction(self, begun: StudyStore, work: Callable[[StudyStore], None], database: Engine) -> None:
        before, commits = contents(database), []

        def note(connection: Any) -> None:
            commits.append(connection)

        with listening("commit", note):
            work(begun)
        assert len(commits) == 1
        assert contents(database) != before

    def test_that_is_cut_off_anywhere_leaves_nothing(
        self, begun: StudyStore, work: Callable[[StudyStore], None], database: Engine
    ) -> None:
        before = contents(database)
        for survived in range(100):
            left = iter(range(survived))

            def cut(*_rest: Any, left: Iterator[int] = left) -> None:
                if next(left, None) is None:
                    raise KeyboardInterrupt

            try:
                with listening("before_cursor_execute", cut):
                    work(begun)
            except KeyboardInterrupt:
                assert contents(database) == before
            else:
                break
        assert survived >= 2, "a fence and a change, at least"
        assert contents(database) != before

    def test_is_refused_once_another_driver_has_the_study(
        self, begun: StudyStore, work: Callable[[StudyStore], None], database: Engine
    ) -> None:
        before = contents(database)
        with database.begin() as connection:
            connection.execute(update(Study).values(lease_token="another"))
        with pytest.raises(LongRopeError, match="taken over"):
            work(begun)
        assert contents(database) == before


class TestDeletion:
    def test_takes_all_of_an_extension_along(self, repository: Repository, database: Engine) -> None:
        for name in ("one", "two"):
            with extension(repository, name, running=1) as store:
                store.record_checkpoint(1, 5, "a", SHA)
                store.log_training(1, 5, {"loss": 1.0})
                write(store, "search", 0, SHORT, [[1.0, 1.0]])
        repository.delete_study("one")
        assert rows(database) == {
            "longrope_studies": 1,
            "longrope_stages": 4,
            "longrope_checkpoints": 1,
            "longrope_training_logs": 1,
            "longrope_candidates": 1,
            "longrope_units": 2,
            "longrope_evaluations": 2,
        }
        assert repository.training_log("two", 1) == {"loss": {5: 1.0}}
        repository.delete_study("two")
        assert set(rows(database).values()) == {0}


def whole_extension(store: StudyStore) -> None:
    """Two searches and a fine-tuning between them; the second search is the slower, and its steps cost six forwards."""
    whole_study(store)
    store.finish_stage(0, {})
    store.begin_stage(1)
    store.finish_stage(1, {})
    store.begin_stage(2)
    write(store, "refine", 0, LONG[:1], [[5.0]], 60.0, (0.1, 0.2), stage=2)
    write(store, "search", 0, LONG, [[9.0, 9.0, 9.0], [8.0, 8.0, 8.0]], 10.0, stage=2)
    write(store, "selection", 1, LONG, [[9.0, 9.0, 9.0]], 10.0, stage=2)


class TestFigures:
    def test_summaries_show_the_current_stage(self, repository: Repository) -> None:
        with study(repository, "plain"), extension(repository, "new", running=None):
            pass
        with extension(repository, "on its way", running=2), extension(repository, "between", running=0) as between:
            between.finish_stage(0, {})
        with extension(repository, "done", running=3) as done:
            done.finish_stage(3, {})
            done.finish({})
        with statements() as sent:
            found = {s.name: (s.kind, s.status, s.stage) for s in repository.studies()}
        assert len(sent) <= 2, "no query for each study"
        assert found == {
            "plain": ("search", "stopped", None),
            "new": ("extension", "stopped", CurrentStage(0, 4, "search", "waiting")),
            "on its way": ("extension", "stopped", CurrentStage(2, 4, "search", "running")),
            "between": ("extension", "stopped", CurrentStage(1, 4, "finetune", "waiting")),
            "done": ("extension", "finished", CurrentStage(3, 4, "evaluate", "finished")),
        }

    def test_a_stage_without_candidates_multiplies_nothing(self, repository: Repository) -> None:
        with extension(repository) as store:
            whole_extension(store)
            (summary,) = repository.studies()
            found = repository.generations("e")
        assert summary.candidates == len(found)
        assert summary.units == sum(row.documents for row in found)
        assert summary.done == sum(row.scored for row in found)
        assert {row.stage for row in found} == {0, 2}

    def test_what_a_finished_stage_raced_out_is_over(self, repository: Repository) -> None:
        """Though nothing was written after it: the next stage writes no candidates."""
        with extension(repository) as store:
            write(store, "search", 0, LONG, RACED)
            assert states(repository.generations("e"))[1] == "pending at 1"
            store.finish_stage(0, {})
            expected = ["whole", "dropped after 1 of 3", "dropped after 2 of 3", "failed"]
            assert states(repository.generations("e")) == expected
            with statements() as sent:
                repository.generations("e")
            assert len(sent) <= 3
            (summary,) = repository.studies()
        assert (summary.units, summary.done, summary.dropped, summary.skipped) == (12, 7, 2, 5)

    def test_stages_cost_what_their_searches_alone_would(self, repository: Repository) -> None:
        with study(repository, "s", generation=False) as store:
            whole_study(store)
        with extension(repository) as store:
            whole_extension(store)
        assert repository.cost("e", 0) == repository.cost("s")
        assert repository.trajectory("e") == repository.trajectory("e", 0) == repository.trajectory("s")
        second = repository.cost("e", 2)
        assert (second.forwards, second.gradients, second.report, second.multiple) == (6, 1, 3, 6.0)
        points = repository.trajectory("e", 2)
        assert [(p.stage, p.forwards, p.gradients, p.loss) for p in points] == [(2, 3, 1, 0.9), (2, 6, 1, 0.8)]
        assert repository.trajectory("e", 1) == []

    def test_the_stages_costs_add_up(self, repository: Repository) -> None:
        with extension(repository) as store:
            whole_extension(store)
        whole = repository.cost("e")
        parts = [repository.cost("e", stage) for stage in range(4)]
        assert (parts[1].forwards, parts[1].gradients, parts[1].multiple, parts[1].by_part) == (0, 0, None, {})
        for figure in ("forwards", "gradients", "report", "total"):
            assert getattr(whole, figure) == pytest.approx(sum(getattr(part, figure) for part in parts))
        assert {part: (c.forwards, c.gradients) for part, c in whole.by_part.items()} == {
            "refine": (0, 4),
            "search": (22, 0),
            "search_short": (4, 0),
            "selection": (3, 0),
        }

    def test_a_stage_is_timed_by_its_own_forwards(self, repository: Repository) -> None:
        """Another stage scores the same length with another model or another chunk."""
        with extension(repository, running=2) as store:
            write(store, "search", 0, LONG, [[1.0, 1.0, 1.0]], 1.0)
            write(store, "refine", 0, LONG[:1], [[1.0]], 4.0, (0.1,))
            write(store, "refine", 0, LONG[:1], [[1.0]], 60.0, (0.1,), stage=2)
            assert (repository.cost("e", 0).multiple, repository.cost("e", 2).multiple) == (4.0, None)
            assert (repository.cost("e").multiple, repository.cost("e").total) == (None, None)
            write(store, "search", 0, LONG, [[1.0, 1.0, 1.0]], 10.0, stage=2)
            assert repository.cost("e").multiple == (4.0 + 6.0) / 2

    def test_stages_share_what_was_computed(self, repository: Repository) -> None:
        with extension(repository, running=2) as store:
            for stage in (0, 2):
                store.add_generation(stage, "search", 0, [candidate(2.0)], LONG[:1], [["shared"]])
            store.record(Outcome("shared", 1.0, 10))
            assert store.outcomes(0, "search", 0) == store.outcomes(2, "search", 0) == [[Outcome("shared", 1.0, 10)]]
            assert store.known(["shared"]) == {"shared"}
        assert repository.cost("e").forwards == 2
