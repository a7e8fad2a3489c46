"""Candidates that were raced out, the cost of a study, and its path: from the store alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from small_study import CANDIDATES, DOCUMENTS, KEYS, UNIT_COUNT, rows, statements, study
from sqlalchemy import Engine

from searcher.errors import LongRopeError
from searcher.rope import Factors
from searcher.study import Candidate, Document, Outcome
from storage.progress import ScoredCandidate
from storage.repository import Cost, Repository, StudyStore

LONG = [Document(f"long {j}", f"{j}" * 64, 64) for j in range(3)]
SHORT = [Document(f"short {j}", f"{j + 5}" * 64, 8) for j in range(2)]


def candidate(value: float, origin: str = "mutant", n_hat: int = 0) -> Candidate:
    return Candidate(Factors((1.0, value), n_hat, 1.25), origin)


def write(
    store: StudyStore,
    part: str,
    generation: int,
    documents: Sequence[Document],
    losses: Sequence[Sequence[float | None]],
    seconds: float = 1.0,
    gradient: tuple[float, ...] | None = None,
    stage: int = 0,
) -> None:
    """A generation of candidates with a loss a document; None where there is none."""
    name = f"{stage} {part} {generation}"
    found = [candidate(1.0 + i, f"{name} {i}") for i in range(len(losses))]
    keys = [[f"{name} {i} {j}" for j in range(len(documents))] for i in range(len(losses))]
    store.add_generation(stage, part, generation, found, documents, keys)
    for row, line in zip(keys, losses, strict=True):
        for key, loss in zip(row, line, strict=True):
            if loss is not None:
                store.record(Outcome(key, loss, 10, seconds, "w", gradient=gradient))


def states(found: Sequence[ScoredCandidate], part: str = "search", generation: int = 0) -> list[str]:
    """A word a candidate."""

    def state(row: ScoredCandidate) -> str:
        if row.failure is not None:
            assert not row.dropped
            assert row.nll is None
            return "failed"
        if row.nll is not None:
            assert not row.dropped
            assert row.scored == row.documents
            return "whole"
        return f"dropped after {row.scored} of {row.documents}" if row.dropped else f"pending at {row.scored}"

    return [state(row) for row in found if (row.part, row.generation) == (part, generation)]


RACED = [[1.0, 2.0, 3.0], [9.0, None, None], [8.0, 8.0, None], [math.nan, None, None]]
PENDING = ["whole", "pending at 1", "pending at 2", "failed"]
OVER = ["whole", "dropped after 1 of 3", "dropped after 2 of 3", "failed"]


class TestRacedOut:
    def test_pending_until_a_successor_is_there(self, repository: Repository) -> None:
        with study(repository, generation=False) as store:
            write(store, "search", 0, LONG, RACED)
            assert states(repository.generations("s")) == PENDING
            write(store, "search", 1, LONG, RACED)
            assert states(repository.generations("s")) == OVER
            assert states(repository.generations("s"), generation=1) == PENDING

    @pytest.mark.parametrize(
        ("part", "generation", "stage", "expected"),
        [
            ("selection", 0, 0, OVER),
            ("search", 0, 1, OVER),
            ("refine", 0, 0, PENDING),  # a part of its own, which may run beside
            ("search_short", 0, 0, PENDING),
        ],
    )
    def test_what_succeeds_a_generation(
        self, repository: Repository, part: str, generation: int, stage: int, expected: list[str]
    ) -> None:
        with study(repository, generation=False) as store:
            write(store, "search", 0, LONG, RACED)
            write(store, part, generation, LONG, [[None] * 3], stage=stage)
        found = [row for row in repository.generations("s") if row.stage == 0]
        assert states(found) == expected

    def test_a_refinement_after_the_selection_is_not_over(self, repository: Repository) -> None:
        with study(repository, generation=False) as store:
            write(store, "selection", 0, LONG, [[1.0] * 3])
            write(store, "refine", 0, LONG[:1], [[None]])
        assert states(repository.generations("s"), "refine") == ["pending at 0"]

    def test_a_finished_study_has_nothing_pending(self, repository: Repository) -> None:
        with study(repository, generation=False) as store:
            write(store, "search", 0, LONG, RACED)
            store.finish({})
        assert states(repository.generations("s")) == OVER

    def test_a_sum_over_some_documents_is_never_shown(self, repository: Repository) -> None:
        with study(repository, generation=False) as store:
            write(store, "search", 0, LONG, RACED)
            store.finish({})
        assert [(row.nll, row.tokens) for row in repository.generations("s")] == [(6.0, 30)] + [(None, 0)] * 3

    def test_what_another_study_computed_beyond_the_race_is_no_part_of_it(self, repository: Repository) -> None:
        with study(repository, "one") as one, study(repository, "two") as two:
            one.record(Outcome(KEYS[0][0], 1.0, 63))
            two.record(Outcome(KEYS[1][1], 1.0, 63))
            two.record(Outcome(KEYS[2][1], math.inf, 63))
            assert states(repository.generations("one")) == ["pending at 1", "pending at 1", "failed"]
            one.finish({})
        assert states(repository.generations("one")) == [f"dropped after {j} of 2" for j in (1, 0, 0)]

    def test_what_was_settled_is_over_at_once(self, repository: Repository) -> None:
        with study(repository, generation=False) as store:
            write(store, "search", 0, LONG, RACED)
            store.settle(0, "search", 0, [3, 1, 2, 1])
            assert states(repository.generations("s")) == OVER
            (summary,) = repository.studies()
            assert (summary.done, summary.failed, summary.dropped, summary.skipped) == (7, 1, 2, 5)

    @pytest.mark.parametrize("finish", [False, True])
    def test_what_was_settled_does_not_depend_on_what_others_compute(
        self, repository: Repository, finish: bool
    ) -> None:
        """Here all the rest, as if nothing had been raced out: better, slower, and failing where it was not looked."""
        with study(repository, generation=False) as store:
            write(store, "search", 0, LONG, [[8.0] * 3])
            write(store, "refine", 0, LONG[:1], [[1.0]], 3.0, (0.1,))
            write(store, "search", 1, LONG, RACED)
            store.settle(0, "search", 1, [3, 1, 2, 1])
            if finish:
                store.finish({})
            before = (repository.generations("s"), repository.cost("s"), repository.trajectory("s"))
            (summary,) = repository.studies()
            for key, loss in (("1 1", -99.0), ("1 2", -99.0), ("2 2", math.inf), ("3 1", 1.0), ("3 2", 1.0)):
                store.record(Outcome(f"0 search 1 {key}", loss, 10, 50.0))
            assert states(repository.generations("s"), generation=1) == OVER
            assert (repository.generations("s"), repository.cost("s"), repository.trajectory("s")) == before
            assert repository.cost("s").forwards == 10
            assert repository.cost("s").multiple == 3.0
            (again,) = repository.studies()
            assert replace(again, updated_at=summary.updated_at) == summary
            assert again.done + again.skipped == again.units

    def test_one_that_failed_beyond_the_race_was_raced_out(self, repository: Repository) -> None:
        """A later generation may ask for the same key, and fail to compute it."""
        with study(repository) as store:
            for row in KEYS:
                store.record(Outcome(row[0], 1.0, 63))
            store.settle(0, "search", 0, [1, 1, 1])
            store.record(Outcome(KEYS[1][1], None, 0, failure="the worker died"))
            assert states(repository.generations("s")) == ["dropped after 1 of 2"] * 3
            assert [(s.failed, s.dropped) for s in repository.studies()] == [(0, 3)]

    def test_in_the_list_of_studies(self, repository: Repository) -> None:
        with study(repository, "open", generation=False) as store:
            write(store, "search", 0, LONG, RACED)
        with study(repository, "over", generation=False) as store:
            write(store, "search", 0, LONG, RACED)
            write(store, "search", 1, LONG, RACED[:2])
        with study(repository, "done", generation=False) as store:
            write(store, "search", 0, LONG, RACED)
            store.finish({})
        with statements() as sent:
            figures = {s.name: (s.units, s.done, s.failed, s.dropped, s.skipped) for s in repository.studies()}
        assert len(sent) <= 2
        assert figures == {"open": (12, 7, 1, 0, 0), "over": (18, 11, 1, 2, 5), "done": (12, 7, 1, 2, 5)}

    def test_deleted_with_their_study(self, repository: Repository, database: Engine) -> None:
        with study(repository, generation=False) as store:
            write(store, "search", 0, LONG, RACED)
            write(store, "refine", 0, LONG[:1], [[1.0]], gradient=(0.1, 0.2))
            store.finish({})
        repository.delete_study("s")
        assert set(rows(database).values()) == {0}

    def test_candidates_come_in_the_order_in_which_they_were_asked_for(self, repository: Repository) -> None:
        order = [("refine", 0), ("search", 0), ("refine", 1), ("search", 1), ("selection", 0), ("refine", 2)]
        with study(repository, generation=False) as store:
            for part, generation in order:
                write(store, part, generation, LONG[:1], [[1.0], [2.0]])
        found = [(row.part, row.generation, row.child) for row in repository.generations("s")]
        assert found == [(*place, child) for place in order for child in range(2)]


def whole_study(store: StudyStore) -> None:
    """A second a forward, four a gradient step, on long documents; a tenth and a half on short ones."""
    write(store, "refine", 0, LONG[:1], [[5.0]], 4.0, (0.1, 0.2))
    write(store, "refine", 1, LONG[1:2], [[4.0]], 4.0, (0.1, 0.2))
    write(store, "refine", 2, SHORT[:1], [[3.0]], 0.5, (0.1, 0.2))
    write(store, "search", 0, LONG, [[5.0, 5.0, 5.0], [2.0, 4.0, 4.0], [9.0, None, None], [math.inf, None, None]])
    write(store, "search_short", 0, SHORT, [[1.0, 1.0], [1.0, 1.0]], 0.1)
    write(store, "search", 1, LONG, [[1.0, 1.0, 4.0], [2.0, 2.0, 2.0], [1.0, 1.0, None]])
    write(store, "selection", 0, LONG, [[1.0, 1.0, 1.0]])
    write(store, "selection", 1, LONG, [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    write(store, "test", 1, LONG[:2], [[1.0, 1.0]])
    write(store, "short", 1, SHORT, [[1.0, 1.0]], 0.1)


class TestCost:
    def test_of_a_whole_study(self, repository: Repository) -> None:
        with study(repository, generation=False) as store:
            whole_study(store)
            store.finish({})
        cost = repository.cost("s")
        assert (cost.forwards, cost.gradients, cost.report) == (8 + 4 + 8 + 3, 3, 6 + 2 + 2)
        assert {part: (c.forwards, c.gradients) for part, c in cost.by_part.items()} == {
            "refine": (0, 3),
            "search": (16, 0),
            "search_short": (4, 0),
            "selection": (3, 0),
        }
        # 8.5 seconds of steps, whose forwards would have taken 1 + 1 + 0.1
        assert cost.multiple == pytest.approx(8.5 / 2.1)
        assert cost.total == pytest.approx(23 + 3 * 8.5 / 2.1)

    def test_of_an_empty_study(self, repository: Repository) -> None:
        repository.create_study("s", "search", {})
        assert repository.cost("s") == Cost(0, 0, None, {}, 0)
        assert repository.cost("s").total == 0.0
        assert repository.trajectory("s") == []
        with pytest.raises(LongRopeError, match="no study 'x'"):
            repository.cost("x")

    def test_what_was_found_counts_like_what_was_computed(self, repository: Repository) -> None:
        with study(repository, "one") as one, study(repository, "two") as two:
            for row in KEYS:
                for key in row:
                    one.record(Outcome(key, 1.0, 63, 1.0))
            two.add_generation(0, "search", 1, CANDIDATES, DOCUMENTS, KEYS)  # and twice in one study
        assert repository.cost("one").forwards == UNIT_COUNT
        assert repository.cost("two").forwards == 2 * UNIT_COUNT

    def test_a_multiple_needs_forwards_of_the_same_length(self, repository: Repository) -> None:
        with study(repository, generation=False) as store:
            write(store, "search", 0, SHORT, [[1.0, 1.0]])
            assert (repository.cost("s").multiple, repository.cost("s").total) == (None, 2.0)
            write(store, "refine", 0, LONG[:1], [[1.0]], 6.0, (0.1,))
            assert (repository.cost("s").multiple, repository.cost("s").total) == (None, None)
            write(store, "test", 1, LONG[:1], [[1.0]], 2.0)
        assert (repository.cost("s").multiple, repository.cost("s").total) == (3.0, 5.0)

    def test_failed_steps_count_and_are_not_timed(self, repository: Repository) -> None:
        with study(repository, generation=False) as store:
            write(store, "search", 0, LONG, [[1.0, 1.0, 1.0]], 2.0)
            write(store, "refine", 0, LONG[:1], [[1.0]], 6.0, (0.1,))
            write(store, "refine", 1, LONG[:1], [[1.0]], 99.0, (math.nan,))
            write(store, "refine", 2, LONG[:1], [[math.inf]], 0.01, (0.1,))
            write(store, "refine", 3, LONG[:1], [[None]])
            store.record(Outcome("0 refine 3 0 0", None, 0, failure="the worker died"))
        cost = repository.cost("s")
        assert (cost.forwards, cost.gradients, cost.multiple) == (3, 4, 3.0)

    def test_nobody_timed_them(self, repository: Repository) -> None:
        with study(repository, generation=False) as store:
            write(store, "search", 0, LONG, [[1.0, 1.0, 1.0]], 0.0)
            write(store, "refine", 0, LONG[:1], [[1.0]], 0.0, (0.1,))
        assert repository.cost("s").multiple is None


class TestTrajectory:
    def test_of_a_whole_study(self, repository: Repository) -> None:
        with study(repository, generation=False) as store:
            whole_study(store)
            store.finish({})
        points = [(p.forwards, p.gradients, p.loss, p.origin) for p in repository.trajectory("s")]
        first, second, third = (0.5, "0 search 0 0"), (10 / 30, "0 search 0 1"), (0.2, "0 search 1 0")
        assert points == [
            (3, 3, *first),
            (6, 3, *second),
            (7, 3, *second),  # raced out
            (8, 3, *second),  # failed
            (10, 3, *second),  # short documents
            (12, 3, *second),
            (15, 3, *third),
            (18, 3, *third),  # an equal comes too late
            (20, 3, *third),
            (23, 3, *third),  # the finalist
        ]
        last, cost = repository.trajectory("s")[-1], repository.cost("s")
        assert (last.forwards, last.gradients) == (cost.forwards, cost.gradients)
        assert last.factors == candidate(1.0).factors

    def test_each_stage_has_its_own_best(self, repository: Repository) -> None:
        with study(repository, generation=False) as store:
            write(store, "search", 0, LONG, [[1.0, 1.0, 1.0]])
            write(store, "search", 0, LONG, [[7.0, 7.0, 7.0], [8.0, 8.0, 8.0]], stage=1)
        points = [[(p.stage, p.forwards, p.loss) for p in repository.trajectory("s", stage)] for stage in range(3)]
        assert points == [[(0, 3, 0.1)], [(1, 3, 0.7), (1, 6, 0.7)], []]
        assert repository.trajectory("s") == repository.trajectory("s", 0)

    def test_a_prefix_of_a_study_has_a_prefix_of_its_path(self, repository: Repository) -> None:
        with study(repository, generation=False) as store:
            whole_study(store)
            before = repository.trajectory("s")
            write(store, "search", 2, LONG, [[1.0, 1.0, 1.0]])
        assert repository.trajectory("s")[: len(before)] == before


def test_figures_agree_with_the_candidates(repository: Repository) -> None:
    """The list of studies counts in SQL, one study's own page in Python."""
    with study(repository, generation=False) as store:
        whole_study(store)
        for finish in (False, True):
            if finish:
                store.finish({})
            (summary,) = repository.studies()
            found = repository.generations("s")
            assert summary.candidates == len(found)
            assert summary.units == sum(row.documents for row in found)
            assert summary.done == sum(row.scored for row in found)
            assert summary.dropped == sum(row.dropped for row in found)
            assert summary.units - summary.done >= summary.skipped
    assert summary.units - summary.done == summary.skipped
