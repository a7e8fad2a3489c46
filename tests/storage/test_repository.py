"""Studies: made, described, summed up, deleted, and searched from beginning to end over any interruption."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from small_study import (
    CANDIDATES,
    DOCUMENTS,
    KEYS,
    UNIT_COUNT,
    known,
    rows,
    statements,
    study,
)
from sqlalchemy import Engine

from searcher.baselines import ntk, pi
from searcher.descent import Refinement
from searcher.errors import LongRopeError
from searcher.evolution import Evolution
from searcher.racing import Racing
from searcher.rope import RopeSpec
from searcher.search import SearchPlan, SearchResult, run_search
from searcher.space import SearchSpace
from searcher.study import PARTS, Document, Outcome, Unit
from storage.repository import Repository


class TestStudies:
    def test_a_study_from_beginning_to_end(self, repository: Repository) -> None:
        before = datetime.now(UTC)
        options: dict[str, Any] = {
            "target": 2048,
            "seed": 7,
            "model": "caf\N{LATIN SMALL LETTER E WITH ACUTE}",
            "deep": {"p": [0.3]},
        }
        repository.create_study("s", "search", options)
        record = repository.study("s")
        assert (record.name, record.kind, record.settings) == ("s", "search", options)
        assert (record.profile, record.status, record.result) == (None, "stopped", None)
        assert record.created_at == record.updated_at
        assert record.created_at.utcoffset() == timedelta(0)
        assert before <= record.created_at <= datetime.now(UTC)
        with repository.open_study("s") as store:
            store.set_profile({"device": "cpu"})
            store.finish({"winner": [1.0]})
        record = repository.study("s")
        assert (record.profile, record.status, record.result) == ({"device": "cpu"}, "finished", {"winner": [1.0]})
        assert record.updated_at > record.created_at

    def test_finish_is_one_transaction(self, repository: Repository) -> None:
        with study(repository) as store, statements() as sent:
            store.finish({})
        assert len([s for s in sent if s.startswith("UPDATE") and "status" in s and "result" in s]) == 1

    def test_a_name_in_use(self, repository: Repository) -> None:
        repository.create_study("s", "search", {"kept": 1})
        with pytest.raises(LongRopeError, match=r"'s' already.*longrope resume s.*another name"):
            repository.create_study("s", "extend", {})
        assert repository.study("s").settings == {"kept": 1}

    def test_a_name_in_use_by_another_process_since_the_same_microsecond(
        self, repository: Repository, store_url: str
    ) -> None:
        """The moment of its creation tells an earlier try of one process from a rival only with the process itself."""
        repository.create_study("s", "search", {})
        rival = f"""if True:
            import datetime, sys
            import storage.repository
            storage.repository.now = lambda: {repository.study("s").created_at!r}
            storage.repository.Repository({store_url!r}).create_study("s", "search", {{}})
        """
        ended = subprocess.run([sys.executable, "-c", rival], capture_output=True, text=True, check=False)
        assert ended.returncode == 1
        assert "LongRopeError: There is a study 's' already" in ended.stderr

    def test_an_unknown_name(self, repository: Repository) -> None:
        with pytest.raises(LongRopeError, match="holds none"):
            repository.study("llama-128k")
        for name in ("llama-256k", "zzz"):
            repository.create_study(name, "search", {})
        for call in (
            repository.study,
            repository.generations,
            repository.delete_study,
            lambda name: repository.open_study(name).__enter__(),
        ):
            with pytest.raises(LongRopeError, match=r"no study 'llama-128k'.*'llama-256k'") as info:
                call("llama-128k")
            assert "zzz" not in str(info.value)

    def test_the_profile_is_fixed_once(self, repository: Repository) -> None:
        with study(repository, generation=False) as store:
            store.set_profile({"device": "cpu", "chunks": (1, 2)})
            store.set_profile({"device": "cpu", "chunks": (1, 2)})
            with pytest.raises(LongRopeError, match="differs in device"):
                store.set_profile({"device": "H200", "chunks": [1, 2]})
        assert repository.study("s").profile == {"device": "cpu", "chunks": [1, 2]}

    def test_the_profile_comes_before_the_first_evaluation(self, repository: Repository) -> None:
        with study(repository) as store:
            store.record(Outcome(KEYS[0][0], None, 0))
            with pytest.raises(LongRopeError, match="too late"):
                store.set_profile({"device": "cpu"})

    def test_summaries(self, repository: Repository) -> None:
        repository.create_study("empty", "extend", {})
        with study(repository, "one") as one, study(repository, "two"):
            one.record(Outcome(KEYS[0][0], 1.0, 63))
            one.record(Outcome(KEYS[0][1], math.nan, 63))
            one.record(Outcome(KEYS[1][0], None, 0))
            one.finish({})
        with statements() as sent:
            empty, first, second = repository.studies()
        assert len(sent) <= 2, "no query for each study"
        assert (empty.name, empty.kind, empty.status) == ("empty", "extend", "stopped")
        assert (empty.candidates, empty.units, empty.done, empty.failed, empty.dropped, empty.skipped) == (0,) * 6
        assert (first.name, first.status) == ("one", "finished")
        assert (first.candidates, first.units, first.done, first.failed) == (3, UNIT_COUNT, 3, 2)
        assert (second.candidates, second.units, second.done, second.failed) == (3, UNIT_COUNT, 2, 1)
        assert (first.dropped, first.skipped) == (1, 3), "of a candidate that has not failed, and of one that has"
        assert (second.dropped, second.skipped) == (0, 0)
        assert first.updated_at > first.created_at
        assert first.created_at.utcoffset() == timedelta(0)

    def test_scores_of_all_generations(self, repository: Repository) -> None:
        with study(repository) as store:
            store.add_generation(0, "test", 0, CANDIDATES[:1], DOCUMENTS, [["x", "y"]])
            store.record(Outcome(KEYS[0][0], 0.1, 63))
            store.record(Outcome(KEYS[0][1], 0.2, 31))
            store.record(Outcome(KEYS[1][0], 1.0, 63))
            store.record(Outcome(KEYS[2][0], 1.0, 63))
            store.record(Outcome(KEYS[2][1], math.inf, 31, failure="overflow"))
        with statements() as sent:
            found = repository.generations("s")
        assert len(sent) <= 4, "no query for each candidate"
        assert [(r.stage, r.part, r.generation, r.child, r.origin, r.factors) for r in found] == [
            *[(0, "search", 0, i, c.origin, c.factors) for i, c in enumerate(CANDIDATES)],
            (0, "test", 0, 0, CANDIDATES[0].origin, CANDIDATES[0].factors),
        ]
        assert [(r.nll, r.tokens, r.failure) for r in found] == [
            (0.1 + 0.2, 94, None),
            (None, 0, None),
            (None, 0, "overflow"),
            (None, 0, None),
        ]


class TestDelete:
    def test_leaves_no_orphans(self, repository: Repository, database: Engine) -> None:
        shared, own = Outcome(KEYS[0][0], 1.0, 63), Outcome(KEYS[0][1], 2.0, 31)
        with study(repository, "one") as one, study(repository, "two", generation=False) as two:
            two.add_generation(0, "search", 0, CANDIDATES[:1], DOCUMENTS[:1], [[shared.key]])
            alone = rows(database) | {"longrope_studies": 1, "longrope_candidates": 1, "longrope_units": 1}
            one.record(shared)
            one.record(own)
        repository.delete_study("one")
        assert rows(database) == alone | {"longrope_evaluations": 1}
        with repository.open_study("two") as two:
            assert known(two) == [[shared]]
        repository.delete_study("two")
        assert set(rows(database).values()) == {0}
        repository.create_study("one", "search", {})  # the name is free again

    def test_takes_what_nobody_asked_for_with_it(self, repository: Repository, database: Engine) -> None:
        """Idle workers compute what the search may ask for next, and may not."""
        asked, spare = Outcome(KEYS[0][0], 1.0, 63), Outcome("spare", 1.0, 63)
        with study(repository, "one", generation=False) as one, study(repository, "two") as two:
            one.record(spare)
            two.record(asked)
        repository.delete_study("one")
        assert rows(database)["longrope_evaluations"] == 1
        with repository.open_study("two") as two:
            assert known(two)[0][0] == asked
            two.record(spare)
        repository.delete_study("two")
        assert set(rows(database).values()) == {0}

    def test_leaves_what_nobody_asked_for_to_a_driver_that_lives(
        self, repository: Repository, database: Engine
    ) -> None:
        repository.create_study("one", "search", {})
        repository.create_study("other", "search", {})
        with study(repository, "two") as two:
            two.record(Outcome("spare", 1.0, 63))
            repository.delete_study("one")
            assert two.known(["spare"]) == {"spare"}
        repository.delete_study("other")
        assert rows(database)["longrope_evaluations"] == 0

    def test_refused_while_a_driver_lives(self, repository: Repository, database: Engine) -> None:
        with study(repository):
            before = rows(database)
            with pytest.raises(LongRopeError, match="held by process"):
                repository.delete_study("s")
            assert rows(database) == before
        repository.delete_study("s")


class CountingScorer:
    """A smooth stand-in for a model, with failures, that is stopped after a number of units."""

    fingerprint = "f"

    def __init__(self, stop_after: int = 10**9, odds: int = 13) -> None:
        self.left = stop_after
        self.odds = odds
        self.seen: Counter[str] = Counter()

    def evaluate(self, units: Sequence[Unit], spare: Sequence[Unit] = ()) -> Iterator[Outcome]:
        chance = random.Random(self.left)
        order = chance.sample(list(units), len(units))  # workers finish in any order
        fresh = [unit for unit in spare if unit.key not in self.seen]
        order[1:1] = chance.sample(fresh, min(2, len(fresh)))
        for unit in order:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            self.seen[unit.key] += 1
            yield self.outcome(unit)

    def built_upon(self, keys: Collection[str]) -> None: ...

    def outcome(self, unit: Unit) -> Outcome:
        fate = int(unit.key[:4], 16) % self.odds
        if fate == 0 and not unit.gradient:  # a step that cannot be computed ends a run
            return Outcome(unit.key, None, 0, failure="the worker died")
        if fate == 1:
            return Outcome(unit.key, math.nan, 10, failure="overflow")
        gaps = [math.log(v) - 0.3 * i for i, v in enumerate(unit.factors.by_layer()[0])]
        steep = 1 + len(unit.document.name)
        nll = steep * sum(gap * gap for gap in gaps) + unit.factors.n_hat / 7
        if not unit.gradient:
            return Outcome(unit.key, nll, 10, 1.0)
        slopes = (*(2 * steep * gap for gap in gaps), math.nan if fate == 2 else 0.0)
        return Outcome(unit.key, nll, 10, 3.0, gradient=slopes)


SPEC = RopeSpec(10000.0, 12, 64, 2)
SEEDS = {"pi": pi(SPEC, 8.0), "ntk": ntk(SPEC, 8.0)}
PLAIN = SearchPlan(
    evolution=Evolution(population=6, mutants=3, crosses=3, parents=3, generations=3),
    space=SearchSpace.for_scale(6, 8.0),
    attention_factor=1.1,
    seeds=SEEDS,
    baselines=SEEDS,
    seed=5,
    finalists=2,
)
REFINED = replace(
    PLAIN,
    evolution=Evolution(population=16, mutants=8, crosses=8, parents=3, generations=3),
    refinement=Refinement(steps=6, legs=2, final_legs=1, starts=2),
    racing=Racing(after=(1, 2), caution=0.5),
    frequencies=SPEC.inverse_frequencies().tolist(),
)


class TestWholeSearch:
    def run(self, url: str, plan: SearchPlan, scorer: CountingScorer, name: str = "s") -> SearchResult:
        parts = {part: [Document(part * (i + 1), f"{part} {i}", 11) for i in range(3)] for part in PARTS}
        repository = Repository(url)
        try:
            with repository.open_study(name) as store:
                result = run_search(plan, parts, scorer, store)
                store.finish({})
                return result
        finally:
            repository.close()

    @pytest.mark.parametrize(
        ("plan", "cut", "odds"), [(PLAIN, 17, 13), (REFINED, 61, 41)], ids=["evolution", "refined and raced"]
    )
    def test_interrupted_anywhere_it_takes_the_same_path(
        self, new_store: Callable[[], str], plan: SearchPlan, cut: int, odds: int
    ) -> None:
        results, tables, paths = [], [], []
        for stop_after in (10**9, cut):
            url = new_store()
            repository = Repository(url)
            repository.create_study("s", "search", {})
            computed: Counter[str] = Counter()
            while True:
                scorer = CountingScorer(stop_after, odds)
                try:
                    results.append(self.run(url, plan, scorer))
                    break
                except KeyboardInterrupt:
                    pass
                finally:
                    computed += scorer.seen
            tables.append(repository.generations("s"))
            paths.append((repository.cost("s"), repository.trajectory("s")))
            repository.close()
            again = {key for key, times in computed.items() if times > 1}  # tried again while its generation lasts
            assert all(int(key[:4], 16) % odds == 0 for key in again), "no value is computed twice"
        assert results[0] == results[1]
        assert tables[0] == tables[1]
        assert paths[0] == paths[1]
        assert {row.failure for row in tables[0]} >= {None, "the worker died", "overflow"}

    def test_the_store_counts_as_the_driver_does(self, repository: Repository, store_url: str) -> None:
        repository.create_study("s", "search", {})
        result = self.run(store_url, REFINED, CountingScorer(odds=2**16))
        found, cost, path = repository.generations("s"), repository.cost("s"), repository.trajectory("s")
        assert result.gradients == cost.gradients == (2 * 2 + 1) * 6
        assert result.dropped == sum(row.dropped for row in found) > 0
        assert result.forwards == cost.forwards
        assert cost.multiple == pytest.approx(3.0)
        assert (path[-1].forwards, path[-1].gradients) == (cost.forwards, cost.gradients)
        assert path[-1].loss == min(result.history)
        assert [point.loss for point in path] == sorted((point.loss for point in path), reverse=True)
        (summary,) = repository.studies()
        assert summary.dropped == result.dropped
        assert summary.done + summary.skipped == summary.units

    def test_a_raced_study_counts_the_same_beside_one_that_computed_all_of_it(
        self, new_store: Callable[[], str]
    ) -> None:
        """The same search without racing has scored on all documents what racing leaves after one or two."""
        evolution = Evolution(population=10, mutants=5, crosses=5, parents=3, generations=2)
        small = replace(REFINED, evolution=evolution, refinement=Refinement(steps=2, legs=1, final_legs=1))
        results, found, odds = [], [], 23
        for others in ((), (replace(small, racing=None),)):
            url = new_store()
            repository = Repository(url)
            for plan in others:
                repository.create_study("whole", "search", {})
                whole = self.run(url, plan, CountingScorer(odds=odds), "whole")
                assert whole.forwards == repository.cost("whole").forwards
            repository.create_study("s", "search", {})
            result = self.run(url, small, CountingScorer(odds=odds))
            rows, cost, summary = repository.generations("s"), repository.cost("s"), repository.studies()[-1]
            assert (cost.forwards, cost.gradients) == (result.forwards, result.gradients)
            assert sum(row.dropped for row in rows) == summary.dropped == result.dropped > 0
            assert summary.done == sum(row.scored for row in rows)
            assert summary.done + summary.skipped == summary.units
            assert any(row.failure for row in rows if row.part == "search" and row.scored < row.documents)
            if others:
                assert whole.dropped == repository.studies()[0].dropped == 0
                outcomes = [(row.scored, row.documents) for row in repository.generations("whole")]
                assert all(scored == documents for scored, documents in outcomes)
            results.append(result)
            figures = (summary.units, summary.done, summary.failed, summary.dropped, summary.skipped)
            found.append((rows, cost, repository.trajectory("s"), figures))
            repository.close()
        assert results[0] == results[1]
        assert found[0] == found[1]
