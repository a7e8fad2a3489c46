"""One generation against a store in memory and an analytic scorer: what is computed, what is kept, what is counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from memory_study import AnalyticScorer, Interrupted, Life, MemoryStore, Watcher, document, run

from searcher.errors import LongRopeError
from searcher.racing import Cut, Race, Racing
from searcher.rope import Factors
from searcher.study import (
    REFINE,
    REFINED,
    SEARCH_SHORT,
    UNCOMPUTED_IN_A_ROW,
    Candidate,
    Document,
    Outcome,
    Score,
    Unit,
    evaluation_key,
    score_generation,
    score_gradients,
    total,
)

DOCUMENTS = [document("search", i, length) for i, length in enumerate((2048, 1024, 700))]
CANDIDATES = [Candidate(Factors((1.0, 1.0 + i / 4, 2.0 + i, 8.0 - i / 8), i % 3, 1.25), f"c{i}") for i in range(12)]


def units_of(candidates: Sequence[Candidate], documents: Sequence[Document], gradient: bool = False) -> list[Unit]:
    return [
        Unit(evaluation_key("a", c.factors, on, gradient), c.factors, on, gradient)
        for c in candidates
        for on in documents
    ]


@dataclass(frozen=True)
class Leave(Race):
    """After each point, leave the candidates whose numbers are given; notes what it was shown."""

    leaving: tuple[tuple[int, ...], ...] = ((1, 4), (2,))
    shown: Any = None

    def kept(self, losses: Sequence[Sequence[float]]) -> list[bool]:
        point = len(self.shown)
        self.shown.append([tuple(child) for child in losses])
        alive = [all(math.isfinite(value) for value in child) for child in losses]
        return [ok and i not in self.leaving[point] for i, ok in enumerate(alive)]


def leaving(*points: tuple[int, ...], after: tuple[int, ...] = (1, 2)) -> Leave:
    return Leave(Racing(after), (), 1, points, [])


def generation(
    store: MemoryStore, scorer: AnalyticScorer, part: str = "search", number: int = 0, **how: Any
) -> list[Score]:
    store.life = scorer.life
    watcher = how.pop("watcher", Watcher())
    return score_generation(part, number, CANDIDATES, DOCUMENTS, scorer, store, watcher, **how)


def expected(scorer: AnalyticScorer, candidate: Candidate, seen: int = 3) -> Score:
    outcomes = [scorer.outcome(candidate.factors, on) for on in DOCUMENTS[:seen]]
    return total(outcomes, 3)


class TestScores:
    def test_come_in_ask_order_whatever_finishes_first(self) -> None:
        for order in (None, 0, 1):
            scorer = AnalyticScorer(order=order)
            assert generation(MemoryStore(), scorer) == [expected(scorer, c) for c in CANDIDATES]

    def test_every_unit_is_asked_for_once_and_kept(self) -> None:
        store, scorer = MemoryStore(), AnalyticScorer()
        generation(store, scorer)
        assert set(scorer.computed.values()) == {1}
        assert sum(scorer.computed.values()) == len(CANDIDATES) * len(DOCUMENTS)
        assert store.evaluations.keys() == scorer.computed.keys()
        again = AnalyticScorer()
        assert generation(store, again) == generation(MemoryStore(), AnalyticScorer())
        assert not again.computed

    def test_candidates_that_are_alike_share_their_units(self) -> None:
        store, scorer = MemoryStore(), AnalyticScorer()
        twins = [CANDIDATES[0], replace(CANDIDATES[0], origin="again"), CANDIDATES[1]]
        scores = score_generation("search", 0, twins, DOCUMENTS, scorer, store, Watcher())
        assert scores[0] == scores[1] == expected(scorer, CANDIDATES[0])
        assert sum(scorer.computed.values()) == 2 * len(DOCUMENTS)

    @pytest.mark.parametrize(
        ("part", "number", "needed"),
        [
            ("search", 0, True),
            ("search", 3, False),
            (SEARCH_SHORT, 0, True),
            (SEARCH_SHORT, 3, False),
            (REFINED, 0, False),
            (REFINED, 2, False),
            ("selection", 0, True),
            ("test", 1, True),
        ],
    )
    def test_a_generation_of_failures_stops_what_nothing_else_can_stand_for(
        self, part: str, number: int, needed: bool
    ) -> None:
        scorer = AnalyticScorer(failing=lambda _factors, _on: math.nan)
        if needed:
            with pytest.raises(LongRopeError, match=f"No candidate of {part} generation {number} .* too much"):
                generation(MemoryStore(), scorer, part, number)
        else:
            assert {score.loss for score in generation(MemoryStore(), scorer, part, number)} == {math.inf}

    def test_a_scorer_that_leaves_a_unit_out_is_a_bug_and_not_a_score(self) -> None:
        class Forgetful(AnalyticScorer):
            def evaluate(self, units: Sequence[Unit], spare: Sequence[Unit] = ()) -> Iterator[Outcome]:
                return super().evaluate(units[1:], spare)

        with pytest.raises(RuntimeError, match="without an outcome"):
            run(MemoryStore(), Forgetful())


class TestRaces:
    def test_a_candidate_is_scored_up_to_the_point_where_it_was_left(self) -> None:
        store, scorer, watcher = MemoryStore(), AnalyticScorer(), Watcher()
        race = leaving((1, 4), (0, 2))  # the second time of the ten that are left: numbers 0 and 3
        scores = generation(store, scorer, race=race, watcher=watcher)
        left = {1: 1, 4: 1, 0: 2, 3: 2}
        for i, (candidate, score) in enumerate(zip(CANDIDATES, scores, strict=True)):
            assert score == expected(scorer, candidate, left.get(i, 3))
            assert score.raced_out == (i in left)
            assert score.documents == len(score.by_document) == left.get(i, 3)
            assert math.isfinite(score.loss) == (i not in left)
            assert (score.failure is None) == (i not in left)
        assert scores[1].failure == "raced out after 1 of 3 documents"
        assert sum(scorer.computed.values()) == sum(score.documents for score in scores) == 3 * 12 - 2 * 2 - 2
        assert watcher.dropped == [("search", 0, 4)]
        assert watcher.started == [("search", 0, 36, 36)]

    def test_the_rule_is_shown_losses_in_ask_order_of_those_still_in(self) -> None:
        for order in (None, 3):
            scorer = AnalyticScorer(order=order)
            race = leaving((1, 4), ())
            generation(MemoryStore(), scorer, race=race)
            first, second = race.shown
            assert first == [expected(scorer, c, 1).by_document for c in CANDIDATES]
            assert second == [expected(scorer, c, 2).by_document for i, c in enumerate(CANDIDATES) if i not in (1, 4)]

    def test_points_beyond_the_documents_decide_nothing(self) -> None:
        race = leaving((0,), after=(1, 3, 4))
        generation(MemoryStore(), AnalyticScorer(), race=race)
        assert len(race.shown) == 1
        assert leaving(after=(2, 3)).points(2) == []

    def test_what_the_store_knows_of_one_that_is_left_does_not_count(self) -> None:
        """Another study may have scored it on all documents; the path must not depend on that."""
        store = MemoryStore()
        whole, raced = AnalyticScorer(), AnalyticScorer()
        generation(store, whole)
        second = MemoryStore(evaluations=store.evaluations)
        scores = generation(second, raced, race=leaving((1, 4), ()))
        assert not raced.computed
        assert scores == generation(MemoryStore(), AnalyticScorer(), race=leaving((1, 4), ()))
        assert scores[4].documents == 1

    @pytest.mark.parametrize("value", [None, math.nan, math.inf])
    def test_one_that_failed_is_not_scored_on_and_not_called_raced_out(self, value: float | None) -> None:
        bad = CANDIDATES[5].factors
        scorer = AnalyticScorer(failing=lambda f, on: value if f == bad and on == DOCUMENTS[0] else False)
        watcher = Watcher()
        scores = generation(MemoryStore(), scorer, race=leaving((), ()), watcher=watcher)
        assert scores[5] == Score(math.inf, 0, "search0 was too much", (), 1)
        assert watcher.dropped == []
        assert sum(scorer.computed.values()) == 36 - 2

    @pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
    def test_a_rule_is_shown_infinity_for_one_that_failed(self, value: float | None) -> None:
        """NaN compares with nothing, and the best of a list with it are anybody."""
        bad = {CANDIDATES[i].factors for i in (0, 3, 5)}
        scorer = AnalyticScorer(failing=lambda f, on: value if f in bad and on == DOCUMENTS[0] else False)
        race = leaving((), ())
        generation(MemoryStore(), scorer, race=race)
        assert [i for i, losses in enumerate(race.shown[0]) if losses == (math.inf,)] == [0, 3, 5]
        scores = generation(MemoryStore(), scorer, race=Cut(4))
        assert sum(math.isfinite(score.loss) for score in scores) == 4
        heads = sorted(expected(scorer, c, 1).by_document[0] for c in CANDIDATES if c.factors not in bad)
        assert {score.by_document[0] for score in scores if math.isfinite(score.loss)} == {*heads[:4]}

    def test_interrupted_between_decisions_it_decides_the_same(self) -> None:
        whole = MemoryStore()
        scores = generation(whole, AnalyticScorer(), race=leaving((1, 4), (0, 2)))
        for left in range(0, 60, 2):
            store, first, second = MemoryStore(), AnalyticScorer(life=Life(left), order=left), AnalyticScorer()
            with pytest.raises(Interrupted):
                generation(store, first, race=leaving((1, 4), (0, 2)))
            assert generation(store, second, race=leaving((1, 4), (0, 2))) == scores
            assert store.evaluations == whole.evaluations
            assert sum((first.computed & second.computed).values()) <= 1


SELECTION = [document("selection", 0, 500), document("selection", 1, 300)]


class TestSpareUnits:
    spare = units_of(CANDIDATES[:3], SELECTION)

    def test_what_comes_of_them_is_kept_for_later(self) -> None:
        store, scorer = MemoryStore(), AnalyticScorer(eager=4)
        assert generation(store, scorer, spare=self.spare) == generation(MemoryStore(), AnalyticScorer())
        assert {unit.key for unit in self.spare} & store.evaluations.keys() == {self.spare[i].key for i in (0, 2)}
        later = score_generation("selection", 0, CANDIDATES[:3], SELECTION, scorer, store, Watcher())
        assert later == [total([scorer.outcome(c.factors, on) for on in SELECTION]) for c in CANDIDATES[:3]]
        assert set(scorer.computed.values()) == {1}

    def test_they_are_offered_again_at_the_next_point_but_for_those_that_came(self) -> None:
        offered: list[list[str]] = []

        class Noting(AnalyticScorer):
            def evaluate(self, units: Sequence[Unit], spare: Sequence[Unit] = ()) -> Iterator[Outcome]:
                offered.append([unit.key for unit in spare])
                return super().evaluate(units, spare)

        generation(MemoryStore(), Noting(eager=2), race=leaving((), ()), spare=self.spare)
        keys = [unit.key for unit in self.spare]
        assert offered[0] == keys
        assert offered[1] == keys[1:]
        assert keys[1] not in offered[2]

    def test_none_is_asked_for_where_nothing_else_is_to_do(self) -> None:
        store = MemoryStore()
        generation(store, AnalyticScorer())
        scorer = AnalyticScorer(eager=4)
        generation(store, scorer, spare=self.spare)
        assert not scorer.computed

    def test_one_that_fails_is_nobodys_failure(self) -> None:
        """Neither kept, nor counted towards a machine that computes nothing, nor told to the observer."""
        store, watcher = MemoryStore(), Watcher()
        scorer = AnalyticScorer(eager=99, failing=lambda _, on: None if on in SELECTION else False)
        spare = units_of(CANDIDATES, [document("selection", i, 100) for i in range(4)])
        scorer.failing = lambda _, on: None if on.name.startswith("selection") else False
        scores = generation(store, scorer, spare=spare, watcher=watcher)
        assert scores == generation(MemoryStore(), AnalyticScorer())
        assert not store.failures
        assert len(watcher.outcomes) == 36
        assert sum(scorer.computed.values()) > 36 + UNCOMPUTED_IN_A_ROW

    def test_one_of_an_earlier_generation_may_come_with_units_that_ask_for_it(self) -> None:
        store, scorer = MemoryStore(), AnalyticScorer(eager=99)
        generation(store, scorer, spare=self.spare)
        assert scorer.late
        late = dict(scorer.late)
        watcher = Watcher()
        score_generation("selection", 0, CANDIDATES[:3], SELECTION, scorer, store, watcher)
        assert {outcome.key for outcome in watcher.outcomes} == late.keys()
        assert set(scorer.computed.values()) == {1}


class TestGradients:
    def gradients(
        self, store: MemoryStore, scorer: AnalyticScorer, number: int = 0, watcher: Watcher | None = None
    ) -> list[list[Outcome]]:
        store.life = scorer.life
        documents, who = DOCUMENTS[:1], watcher or Watcher()
        return score_gradients(REFINE, number, CANDIDATES[:2], documents, scorer, store, who)

    def test_come_by_candidate_and_document_and_are_kept_under_keys_of_their_own(self) -> None:
        store, scorer = MemoryStore(), AnalyticScorer()
        rows = self.gradients(store, scorer)
        for (outcome,), candidate in zip(rows, CANDIDATES, strict=False):
            assert outcome.gradient == scorer.gradient(candidate.factors, DOCUMENTS[0])
            assert outcome.key == evaluation_key("a", candidate.factors, DOCUMENTS[0], gradient=True)
        assert self.gradients(store, AnalyticScorer(failing=lambda *_: None)) == rows
        plain = score_generation("search", 0, CANDIDATES[:2], DOCUMENTS[:1], scorer, store, Watcher())
        assert [score.nll for score in plain] == [outcome.nll for (outcome,) in rows]
        assert set(scorer.computed.values()) == {1}
        assert len(scorer.computed) == 4

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_one_that_is_not_finite_is_an_outcome_without(self, value: float) -> None:
        scorer = AnalyticScorer(failing=lambda _, __: value)
        store = MemoryStore()
        assert all(outcome.gradient is None for (outcome,) in self.gradients(store, scorer))
        assert len(store.evaluations) == 2

    def test_one_that_cannot_be_computed_beside_one_that_can_is_final_with_its_step(self) -> None:
        bad = CANDIDATES[1].factors
        store, scorer = MemoryStore(), AnalyticScorer(failing=lambda f, _: None if f == bad else False)
        (first,), (second,) = self.gradients(store, scorer)
        assert first.gradient is not None
        assert (second.nll, second.gradient, second.failure) == (None, None, "search0 was too much")
        assert self.gradients(store, AnalyticScorer()) == [[first], [second]]

    def test_where_none_can_be_computed_the_reason_is_told_and_mending_it_goes_on(self) -> None:
        store = MemoryStore()
        with pytest.raises(LongRopeError, match=r"could not be computed.*search0 was too much"):
            self.gradients(store, AnalyticScorer(failing=lambda *_: None))
        assert not store.failures
        assert self.gradients(store, AnalyticScorer()) == self.gradients(MemoryStore(), AnalyticScorer())

    def test_the_observer_is_told(self) -> None:
        watcher = Watcher()
        rows = self.gradients(MemoryStore(), AnalyticScorer(), 7, watcher)
        assert watcher.started == [(REFINE, 7, 2, 2)]
        assert watcher.outcomes == [outcome for (outcome,) in rows]
        assert [entry[:3] for entry in watcher.finished] == [(REFINE, 7, CANDIDATES[0])]


class TestCorrections:
    """A worker's values turn out to be wrong while its generation is under way."""

    spare = units_of(CANDIDATES[:3], SELECTION)

    def test_scores_and_store_are_those_of_an_untroubled_run(self) -> None:
        class Erring(AnalyticScorer):
            def evaluate(self, units: Sequence[Unit], spare: Sequence[Unit] = ()) -> Iterator[Outcome]:
                wrong = []
                for number, outcome in enumerate(super().evaluate(units, spare)):
                    if number % 3 == 0 and outcome.nll is not None:
                        wrong.append(outcome)
                        yield replace(outcome, nll=outcome.nll - 1000)
                    else:
                        yield outcome
                yield from (replace(outcome, corrects=True) for outcome in wrong)

        troubled, untroubled = MemoryStore(), MemoryStore()
        race = leaving((1, 4), (2,)), leaving((1, 4), (2,))
        scores = generation(troubled, Erring(eager=4), race=race[0], spare=self.spare)
        assert scores == generation(untroubled, AnalyticScorer(eager=4), race=race[1], spare=self.spare)
        assert race[0].shown == race[1].shown
        assert {key: outcome.nll for key, outcome in troubled.evaluations.items()} == {
            key: outcome.nll for key, outcome in untroubled.evaluations.items()
        }

    def test_a_spare_value_is_corrected_while_it_is_asked_for(self) -> None:
        """The selection finds it in the store, and it is corrected while the others are computed."""
        bad = CANDIDATES[0].factors
        keys = [unit.key for unit in units_of(CANDIDATES[:3], SELECTION)]

        class Correcting(AnalyticScorer):
            def evaluate(self, units: Sequence[Unit], spare: Sequence[Unit] = ()) -> Iterator[Outcome]:
                yield from super().evaluate(units, spare)
                yield replace(self.outcome(bad, SELECTION[0], keys[0]), corrects=True)

        store, scorer, untroubled = MemoryStore(), Correcting(), AnalyticScorer()
        store.record(replace(scorer.outcome(bad, SELECTION[0], keys[0]), nll=1.0))
        scores = score_generation("selection", 0, CANDIDATES[:3], SELECTION, scorer, store, Watcher())
        assert scores == score_generation(
            "selection", 0, CANDIDATES[:3], SELECTION, untroubled, MemoryStore(), Watcher()
        )
        assert scores == score_generation("selection", 0, CANDIDATES[:3], SELECTION, untroubled, store, Watcher())

    def test_the_scorer_is_told_which_values_that_it_was_not_asked_for_decide(self) -> None:
        """Up to the point of a race that they count for, each time before the decision."""
        told: list[tuple[int, set[str]]] = []
        race = leaving((1, 4), (2,))

        class Noting(AnalyticScorer):
            def built_upon(self, keys: Collection[str]) -> None:
                told.append((len(race.shown), set(keys)))

        store = MemoryStore()
        known = [unit.key for unit in units_of(CANDIDATES[:2], DOCUMENTS)]
        generation(store, AnalyticScorer())
        kept = {key: outcome for key, outcome in store.evaluations.items() if key in known}
        generation(MemoryStore(evaluations=kept), Noting(), race=race)
        asked = [{unit.key for unit in units_of(CANDIDATES, DOCUMENTS[:n])} for n in (1, 2)]
        assert told[0] == (0, {known[0], known[3]})
        assert told[1] == (1, {known[0], known[1]} | {key for key in asked[0] - {known[3]} if key in told[1][1]})
        assert {known[0], known[1], known[2]} <= told[2][1]
        assert {known[4], known[5]}.isdisjoint(told[1][1] | told[2][1])  # of the one that was left


@pytest.mark.parametrize("work", [generation, TestGradients().gradients])
def test_after_a_change_of_fingerprint_the_rest_goes_on_under_new_keys(
    work: Callable[[MemoryStore, AnalyticScorer], Any],
) -> None:
    store, before, after = MemoryStore(), AnalyticScorer(life=Life(4)), AnalyticScorer(fingerprint="b")
    with pytest.raises(Interrupted):
        work(store, before)
    known = set(store.evaluations)
    assert len(known) == 1
    work(store, after)
    assert len(after.computed) == len(store.units()) - 1
    assert set(store.units()) == known | after.computed.keys()


def test_a_total_is_over_tokens() -> None:
    score = total([Outcome("a", 30.0, 10), Outcome("b", 10.0, 30)])
    assert score == Score(40.0, 40, None, (30.0, 10.0), 2)
    assert (score.loss, score.perplexity) == (1.0, math.e)
    assert total([Outcome("a", 800.0, 1)]).perplexity == math.inf


def test_a_total_of_fewer_documents_is_one_that_was_raced_out() -> None:
    score = total([Outcome("a", 30.0, 10)], documents=2)
    assert score == Score(math.inf, 0, "raced out after 1 of 2 documents", (30.0,), 1, raced_out=True)
    assert (score.loss, score.perplexity) == (math.inf, math.inf)
    assert total([Outcome("a", 30.0, 10), Outcome("b", 10.0, 30)], documents=2).failure is None


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (Outcome("b", None, 0, failure="out of memory"), "out of memory"),
        (Outcome("b", math.nan, 9), "the loss is not finite"),
        (Outcome("b", math.inf, 9, failure="overflow"), "overflow"),
        (Outcome("b", -math.inf, 9), "the loss is not finite"),
    ],
)
def test_one_failure_fails_the_candidate(broken: Outcome, reason: str) -> None:
    score = total([Outcome("a", 1.0, 9), broken, Outcome("c", 1.0, 9)])
    assert (score.loss, score.perplexity, score.failure) == (math.inf, math.inf, reason)
    assert (score.by_document, score.documents, score.raced_out) == ((1.0,), 3, False)
    assert not total([broken], documents=3).raced_out


def test_a_key_names_fingerprint_document_and_factors_and_their_borders() -> None:
    on = Document("a", "ab", 8)
    factors = Factors((1.0, 2.0), 4, 1.25)
    spans = ((1, 3), (5, 6))
    keys: Mapping[str, str] = {
        "itself": evaluation_key("f", factors, on),
        "fingerprint": evaluation_key("g", factors, on),
        "document": evaluation_key("f", factors, replace(on, sha256="ac")),
        "border": evaluation_key("fa", factors, replace(on, sha256="b")),
        "lambdas": evaluation_key("f", replace(factors, lambdas=(1.0, math.nextafter(2.0, 3.0))), on),
        "n_hat": evaluation_key("f", replace(factors, n_hat=5), on),
        "attention factor": evaluation_key("f", replace(factors, attention_factor=1.2500001), on),
        "gradient": evaluation_key("f", factors, on, gradient=True),
        "spans": evaluation_key("f", factors, replace(on, spans=spans)),
        "other spans": evaluation_key("f", factors, replace(on, spans=((1, 3), (5, 7)))),
        "greedy": evaluation_key("f", factors, replace(on, greedy=True)),
        "greedy spans": evaluation_key("f", factors, replace(on, spans=spans, greedy=True)),
        "both": evaluation_key("f", factors, replace(on, spans=spans), gradient=True),
    }
    assert len(set(keys.values())) == len(keys)
    assert evaluation_key("f", factors, replace(on, name="another name")) == keys["itself"]
