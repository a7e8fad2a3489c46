"""Studies: made, described, summed up, deleted, and searched from beginning to end over any interruption."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
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
from searcher.errors import LongRopeError
from searcher.evolution import Evolution
from searcher.rope import RopeSpec
from searcher.space import SearchSpace
from searcher.study import PARTS, Document, Outcome, SearchPlan, SearchResult, Unit, run_search
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
        assert (record.profile, record.status, record.result) == (None, "running", None)
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
        assert (empty.name, empty.kind, empty.status) == ("empty", "extend", "running")
        assert (empty.candidates, empty.units, empty.done, empty.failed) == (0, 0, 0, 0)
        assert (first.name, first.status) == ("one", "finished")
        assert (first.candidates, first.units, first.done, first.failed) == (3, UNIT_COUNT, 3, 2)
        assert (second.candidates, second.units, second.done, second.failed) == (3, UNIT_COUNT, 2, 1)
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
        assert len(sent) <= 3
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

    def __init__(self, stop_after: int = 10**9) -> None:
        self.left = stop_after
        self.seen: Counter[str] = Counter()

    def evaluate(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        order = random.Random(self.left).sample(list(units), len(units))  # workers finish in any order
        for unit in order:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            self.seen[unit.key] += 1
            yield self.outcome(unit)

    @staticmethod
    def outcome(unit: Unit) -> Outcome:
        fate = int(unit.key[:4], 16) % 13
        if fate == 0:
            return Outcome(unit.key, None, 0, failure="the worker died")
        if fate == 1:
            return Outcome(unit.key, math.nan, 10, failure="overflow")
        size = sum(abs(math.log(v) - 0.3 * i) for i, v in enumerate(unit.factors.by_layer()[0]))
        return Outcome(unit.key, size * (1 + len(unit.document.name)) + unit.factors.n_hat / 7, 10)


class TestWholeSearch:
    def plan(self) -> SearchPlan:
        spec = RopeSpec(10000.0, 12, 64, 2)
        seeds = {"pi": pi(spec, 8.0), "ntk": ntk(spec, 8.0)}
        evolution = Evolution(population=6, mutants=3, crosses=3, parents=3, generations=3)
        return SearchPlan(evolution, SearchSpace.for_scale(6, 8.0), 1.1, seeds, seeds, seed=5, finalists=2)

    def run(self, url: str, scorer: CountingScorer) -> SearchResult:
        parts = {part: [Document(part * (i + 1), f"{part} {i}", 11) for i in range(2)] for part in PARTS}
        repository = Repository(url)
        try:
            with repository.open_study("s") as store:
                return run_search(self.plan(), parts, scorer, store)
        finally:
            repository.close()

    def test_interrupted_anywhere_it_takes_the_same_path(self, tmp_path: Path) -> None:
        results, tables, seen = [], [], []
        for name, stop_after in (("whole", 10**9), ("cut", 7)):
            url = f"sqlite:///{tmp_path}/{name}.db"
            repository = Repository(url)
            repository.create_study("s", "search", {})
            computed: Counter[str] = Counter()
            while True:
                scorer = CountingScorer(stop_after)
                try:
                    results.append(self.run(url, scorer))
                    break
                except KeyboardInterrupt:
                    pass
                finally:
                    computed += scorer.seen
            seen.append(computed)
            tables.append(repository.generations("s"))
            repository.close()
        assert results[0] == results[1]
        assert tables[0] == tables[1]
        assert set(seen[0].values()) == {1}
        uncomputable = {key for key, times in seen[1].items() if times > 1}  # tried again while its generation lasts
        assert seen[0].keys() == seen[1].keys()
        assert uncomputable <= {key for key in seen[0] if int(key[:4], 16) % 13 == 0}, "no value is computed twice"
        assert {row.failure for row in tables[0]} == {None, "the worker died", "overflow"}
