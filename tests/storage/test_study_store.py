"""The driver's store: what is written is read back to the last bit, is shared by key, and stays what it was."""

from __future__ import annotations

import itertools
import math
import struct
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_study import (
    CANDIDATES,
    DOCUMENTS,
    KEYS,
    UNIT_COUNT,
    known,
    listening,
    rows,
    run_in_threads,
    statements,
    study,
)
from sqlalchemy import Engine, select

from searcher.rope import Factors
from searcher.study import Candidate, Document, Outcome
from storage.models import CandidateRow, UnitRow
from storage.repository import Repository, StudyStore


def same(outcome: Outcome | None, other: Outcome) -> bool:
    return outcome is not None and (repr(outcome) == repr(other))  # nan equals nan in repr, and a float64 itself


class TestGenerations:
    def test_read_back_in_ask_order(self, repository: Repository) -> None:
        with study(repository) as store:
            store.add_generation(0, "search", 1, CANDIDATES[:1], DOCUMENTS, KEYS[:1])
            store.add_generation(1, "search", 0, CANDIDATES[1:2], DOCUMENTS, KEYS[1:2])
            store.add_generation(0, "test", 0, CANDIDATES[2:], DOCUMENTS, KEYS[2:])
            assert store.candidates(0, "search", 0) == CANDIDATES
            assert store.candidates(0, "search", 1) == CANDIDATES[:1]
            assert store.candidates(1, "search", 0) == CANDIDATES[1:2]
            assert store.candidates(0, "test", 0) == CANDIDATES[2:]
            assert store.candidates(0, "selection", 0) is None
            assert store.candidates(2, "search", 0) is None
            assert known(store) == [[None, None]] * 3

    def test_studies_do_not_see_each_other(self, repository: Repository) -> None:
        with study(repository, "one"), study(repository, "two", generation=False) as two:
            assert two.candidates(0, "search", 0) is None
            assert two.outcomes(0, "search", 0) == []

    def test_no_candidates_need_no_row(self, repository: Repository) -> None:
        with study(repository, generation=False) as store:
            store.add_generation(0, "search", 0, [], DOCUMENTS, [])
            assert store.candidates(0, "search", 0) is None

    def test_written_in_one_transaction(self, repository: Repository, database: Engine) -> None:
        commits: list[Any] = []

        def commit(connection: Any) -> None:
            commits.append(connection)

        with study(repository, generation=False) as store, listening("commit", commit), statements() as sent:
            store.add_generation(0, "search", 0, CANDIDATES * 50, DOCUMENTS, KEYS * 50)
        assert len(commits) == 1
        assert len(sent) <= 6
        assert rows(database)["longrope_units"] == 50 * UNIT_COUNT

    def test_an_error_half_way_leaves_nothing(self, repository: Repository, database: Engine) -> None:
        with study(repository, generation=False) as store:
            with pytest.raises(ValueError, match="shorter"):
                store.add_generation(0, "search", 0, CANDIDATES, DOCUMENTS, [*KEYS[:2], KEYS[2][:1]])
            assert store.candidates(0, "search", 0) is None
        assert rows(database)["longrope_candidates"] == 0

    def test_units_name_their_documents(self, repository: Repository, database: Engine) -> None:
        with study(repository), database.connect() as connection:
            found = connection.execute(
                select(UnitRow.document_name, UnitRow.document_sha256, UnitRow.document_length, UnitRow.key)
                .join(CandidateRow)
                .order_by(CandidateRow.child, UnitRow.position)
            ).all()
        assert found == [
            (d.name, d.sha256, d.length, key) for row in KEYS for d, key in zip(DOCUMENTS, row, strict=True)
        ]

    def test_names_and_reasons_hold_any_text(self, repository: Repository) -> None:
        strange = Document("latin\udcff\x00.txt", "c" * 64, 8)
        with study(repository, generation=False) as store:
            store.add_generation(0, "search", 0, CANDIDATES[:1], [strange], [["k"]])
            store.record(Outcome("k", None, 0, failure="bad \x00 byte \udc80 \N{SNOWMAN}"))
            ((outcome,),) = known(store)
        assert outcome is not None
        assert outcome.failure == "bad \\0 byte \\udc80 \N{SNOWMAN}"


positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


class TestExactness:
    def test_every_float64_survives(self, repository: Repository) -> None:
        numbers = itertools.count()

        @settings(max_examples=60, deadline=None)
        @given(
            lambdas=st.lists(positive, min_size=1, max_size=6),
            layers=st.integers(0, 2),
            attention=positive,
            n_hat=st.integers(0, 2**31 - 1),
            nll=st.floats(allow_nan=False, allow_infinity=False),
            seconds=positive,
        )
        def check(lambdas: list[float], layers: int, attention: float, n_hat: int, nll: float, seconds: float) -> None:
            number = next(numbers)
            shape: Any = tuple(tuple(lambdas) for _ in range(layers)) if layers else tuple(lambdas)
            candidate = Candidate(Factors(shape, n_hat, attention), "any")
            nll += 0.0  # SQLite stores -0.0 as 0; a loss has no use for the sign
            outcome = Outcome(f"key {number}", nll, 7, seconds, "w")
            store.add_generation(0, "search", number, [candidate], DOCUMENTS[:1], [[outcome.key]])
            store.record(outcome)
            ((result,),) = known(store, number)
            assert store.candidates(0, "search", number) == [candidate]
            assert (store.candidates(0, "search", number) or [])[0].factors.to_bytes() == candidate.factors.to_bytes()
            assert result == outcome
            assert struct.pack("<d", result.nll) == struct.pack("<d", nll)

        with study(repository, generation=False) as store:
            check()

    def test_results_keep_what_json_has_no_word_for(self, repository: Repository) -> None:
        with study(repository) as store:
            store.finish({"perplexity": {"none": math.inf, "searched": 0.1 + 0.2}, "nested": [1, [None, True]]})
        assert repository.study("s").result == {
            "perplexity": {"none": math.inf, "searched": 0.1 + 0.2},
            "nested": [1, [None, True]],
        }


class TestOutcomes:
    def test_shared_by_key_across_studies(self, repository: Repository) -> None:
        outcome = Outcome(KEYS[1][0], 12.5, 63, 0.25, "worker-1")
        with study(repository, "one") as one, study(repository, "two") as two:
            one.record(outcome)
            assert known(one) == known(two) == [[None, None], [outcome, None], [None, None]]

    @pytest.mark.parametrize("nll", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize(("failure", "reason"), [("overflow", "overflow"), (None, "the loss is not finite")])
    def test_a_value_that_is_not_finite_is_shared_too(
        self, repository: Repository, nll: float, failure: str | None, reason: str
    ) -> None:
        with study(repository, "one") as one, study(repository, "two") as two:
            one.record(Outcome(KEYS[0][0], nll, 63, 1.0, "w", failure))
            for store in (one, two):
                assert same(known(store)[0][0], Outcome(KEYS[0][0], math.nan, 63, 1.0, "w", reason))

    def test_what_could_not_be_computed_is_final_here_and_open_elsewhere(self, repository: Repository) -> None:
        key = KEYS[0][0]
        lost = Outcome(key, None, 0, failure="the worker died 3 times")
        value = Outcome(key, 1.0, 63, 1.0, "w")
        with study(repository, "one") as one, study(repository, "two") as two:
            one.record(lost)
            one.record(Outcome(key, None, 0, failure="again"))
            assert known(one)[0][0] == lost
            assert known(two)[0][0] is None
            two.record(value)
            assert known(two)[0][0] == value
            assert known(one)[0][0] == lost, "another study's value must not change this one's trajectory"
            one.add_generation(0, "search", 1, CANDIDATES[:1], DOCUMENTS, KEYS[:1])
            assert known(one, 1) == [[lost, None]]

    def test_gradients_come_back_to_the_last_bit(self, repository: Repository) -> None:
        outcome = Outcome(KEYS[0][0], 12.5, 63, 0.25, "w", gradient=(0.1, -1 / 3, 5e-324, 1.7976931348623157e308, 0.0))
        with study(repository, "one") as one, study(repository, "two") as two:
            one.record(outcome)
            one.record(Outcome(KEYS[0][1], 1.0, 31))
            assert same(known(one)[0][0], outcome)
            assert same(known(two)[0][0], outcome)
            assert known(two)[0][1] == Outcome(KEYS[0][1], 1.0, 31)

    def test_any_sequence_of_numbers_is_a_gradient(self, repository: Repository) -> None:
        gradient: Any = np.array([0.1, 1 / 3], dtype=np.float32)
        with study(repository) as store:
            store.record(Outcome(KEYS[0][0], 1.0, 63, gradient=gradient))
            assert known(store)[0][0] == Outcome(KEYS[0][0], 1.0, 63, gradient=tuple(gradient.tolist()))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize(("failure", "reason"), [("overflow", "overflow"), (None, "the gradient is not finite")])
    def test_a_gradient_that_is_not_finite_is_a_failure_that_keeps_its_loss(
        self, repository: Repository, value: float, failure: str | None, reason: str
    ) -> None:
        with study(repository) as store:
            store.record(Outcome(KEYS[0][0], 12.5, 63, 1.0, "w", failure, (1.0, value)))
            store.record(Outcome(KEYS[0][1], math.inf, 31, 1.0, "w", failure, (1.0, 2.0)))
            first, second = known(store)[0]
        assert first == Outcome(KEYS[0][0], 12.5, 63, 1.0, "w", reason, None)
        assert same(second, Outcome(KEYS[0][1], math.nan, 31, 1.0, "w", failure or "the loss is not finite", None))

    def test_which_keys_need_no_computing(self, repository: Repository) -> None:
        lost, value, others, own = KEYS[0][0], KEYS[0][1], KEYS[1][0], KEYS[1][1]
        with study(repository, "one") as one, study(repository, "two") as two:
            one.record(Outcome(lost, None, 0, failure="lost"))
            one.record(Outcome(value, 1.0, 63))
            two.record(Outcome(others, math.inf, 63))
            many = [f"many {i}" for i in range(2000)]
            one.record(Outcome(many[-1], 1.0, 63))
            assert one.known([lost, value, others, own, *many]) == {lost, value, others, many[-1]}
            assert two.known([lost, value, others, own]) == {value, others}
            assert one.known([]) == set()

    def test_a_failure_has_a_reason(self, repository: Repository) -> None:
        with study(repository) as store:
            store.record(Outcome(KEYS[0][0], None, 0))
            outcome = known(store)[0][0]
        assert outcome is not None
        assert outcome.failure

    def test_the_first_value_stays(self, repository: Repository) -> None:
        first = Outcome(KEYS[0][0], 1.0, 63, 1.0, "w")
        with study(repository, "one") as one, study(repository, "two") as two:
            one.record(first)
            for store in (one, two):
                store.record(Outcome(KEYS[0][0], 2.0, 63, 2.0, "x"))
                assert known(store)[0][0] == first

    def test_a_value_that_was_wrong_is_replaced_for_every_study(self, repository: Repository) -> None:
        wrong = Outcome(KEYS[0][0], math.nan, 63, 1.0, "w", "the loss is nan")
        right = Outcome(KEYS[0][0], 2.5, 63, 2.0, "x", gradient=(0.1, math.nextafter(0.2, 1)))
        with study(repository, "one") as one, study(repository, "two") as two:
            one.record(wrong)
            one.correct(right)
            for store in (one, two):
                assert known(store)[0][0] == right
                assert known(store)[0][1] is None

    def test_two_studies_race_for_one_key(self, repository: Repository) -> None:
        barrier = threading.Barrier(2)
        with study(repository, "one") as one, study(repository, "two") as two:

            def work(store: StudyStore, worker: str) -> None:
                barrier.wait()
                for i in range(40):
                    store.record(Outcome(f"race {i}", float(i), 1, 0.0, worker))

            errors = run_in_threads([lambda: work(one, "one"), lambda: work(two, "two")])
            assert errors == []
            keys = [[f"race {i}"] for i in range(40)]
            one.add_generation(0, "search", 1, CANDIDATES[:1] * 40, DOCUMENTS[:1], keys)
            assert [row[0].nll for row in known(one, 1) if row[0]] == [float(i) for i in range(40)]

    def test_one_statement(self, repository: Repository) -> None:
        with study(repository) as store:
            store.record(Outcome(KEYS[0][0], 1.0, 63))
            with statements() as sent:
                known(store)
        assert len(sent) == 1


class TestSettle:
    def seen(self, database: Engine) -> list[int | None]:
        with database.connect() as connection:
            return list(connection.execute(select(CandidateRow.seen).order_by(CandidateRow.id)).scalars())

    def test_one_generation_in_ask_order(self, repository: Repository, database: Engine) -> None:
        with study(repository, "one") as one, study(repository, "two"):
            one.add_generation(0, "search", 1, CANDIDATES, DOCUMENTS, KEYS)
            one.add_generation(1, "search", 1, CANDIDATES[:1], DOCUMENTS, KEYS[:1])
            one.settle(0, "search", 1, [2, 1, 0])
        assert self.seen(database) == [None] * 6 + [2, 1, 0, None]

    def test_again_it_is_one_read(self, repository: Repository, database: Engine) -> None:
        with study(repository) as store:
            store.settle(0, "search", 0, [2, 1, 1])
            with statements() as sent:
                store.settle(0, "search", 0, [2, 1, 1])
        assert [statement.split()[0] for statement in sent] == ["SELECT"]
        assert self.seen(database) == [2, 1, 1]

    def test_a_wrong_number_of_them_writes_nothing(self, repository: Repository, database: Engine) -> None:
        with study(repository) as store, pytest.raises(ValueError, match="shorter"):
            store.settle(0, "search", 0, [1, 1])
        assert self.seen(database) == [None] * 3

    def test_the_driver_is_still_shown_all_that_is_known(self, repository: Repository) -> None:
        """It decides again by its rule; what it left is no reason to hide what others computed."""
        value = Outcome(KEYS[1][1], 1.0, 31)
        with study(repository) as store:
            store.settle(0, "search", 0, [2, 1, 1])
            store.record(value)
            assert known(store)[1] == [None, value]


NEW_KEYS = [[key.replace("0", "9") for key in row] for row in KEYS]


class TestRekey:
    def test_touches_only_units_without_an_outcome(self, repository: Repository) -> None:
        value = Outcome(KEYS[0][0], 1.0, 63, 1.0, "w")
        lost = Outcome(KEYS[0][1], None, 0, failure="lost")
        with study(repository, "other") as other, study(repository) as store:
            store.record(value)
            store.record(lost)
            store.rekey(0, "search", 0, NEW_KEYS)
            store.record(Outcome(NEW_KEYS[2][0], 2.0, 63))
            store.record(Outcome(KEYS[2][0], 3.0, 63))
            assert known(store)[0] == [value, lost]
            assert known(store)[2] == [Outcome(NEW_KEYS[2][0], 2.0, 63), None]
            assert known(other)[2] == [Outcome(KEYS[2][0], 3.0, 63), None], "another study keeps its keys"

    def test_one_cheap_read_where_nothing_changed(self, repository: Repository) -> None:
        with study(repository) as store:
            store.record(Outcome(KEYS[0][0], 1.0, 63))
            with statements() as sent:
                store.rekey(0, "search", 0, KEYS)
            assert [statement.split()[0] for statement in sent] == ["SELECT"]
            store.rekey(0, "search", 0, NEW_KEYS)
            with statements() as sent:  # the unit with a value keeps its old key and is no reason to write again
                store.rekey(0, "search", 0, NEW_KEYS)
            assert len(sent) == 1
