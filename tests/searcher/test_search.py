"""A whole search by evolution, in memory: whatever interrupts it, the end is the same."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_study import (
    BASELINE_FACTORS,
    DOCUMENTS,
    EVOLUTION,
    PLAN,
    SEEDS,
    SPACE,
    STUDY_ATTENTION,
    AnalyticScorer,
    Failing,
    Interrupted,
    Life,
    MemoryStore,
    Watcher,
    drawn,
    everyone,
    finalists,
    never,
    run,
    snapped,
    sometimes,
    trace,
    unbroken,
)

from searcher.errors import LongRopeError
from searcher.operators import MUTATIONS
from searcher.rope import Factors
from searcher.search import individual_of, run_search
from searcher.space import Individual
from searcher.study import (
    AT_STUDY_ATTENTION,
    SHORT,
    UNCOMPUTED_IN_A_ROW,
    WITHOUT_N_HAT,
    Document,
    Outcome,
    evaluation_key,
)


def test_a_search_runs_to_its_end() -> None:
    store, scorer, result = unbroken()
    sizes = {place: len(written.candidates) for place, written in store.generations.items()}
    assert [sizes[0, "search", generation] for generation in range(4)] == [6, 3, 3, 3]
    assert {place for place in sizes if place[1] != "search"} == {
        (0, "selection", 0),
        (0, "selection", 1),
        (0, "test", 1),
        (0, SHORT, 1),
    }
    searched = [place for place in sizes if place[1] == "search" or place[2] == 0]  # the report is no cost
    assert result.forwards == sum(sizes[place] * len(DOCUMENTS[place[1]]) for place in searched)
    assert (result.gradients, result.dropped, result.pareto) == (0, 0, ())
    assert set(scorer.computed.values()) == {1}
    assert all(store.outcome(key) for written in store.generations.values() for row in written.keys for key in row)
    assert list(result.history) == sorted(result.history, reverse=True)
    assert len(result.history) == 4
    assert result.history[-1] < result.history[0]


def test_individuals_are_scored_under_the_studys_attention_factor_and_on_the_grid() -> None:
    store, _, _ = unbroken()
    for (_, part, generation), written in store.generations.items():
        if part == "search" or generation == 0:
            for candidate in written.candidates:
                assert candidate.factors.attention_factor == STUDY_ATTENTION
                assert individual_of(candidate) in SPACE
                assert individual_of(candidate).factors(STUDY_ATTENTION) == candidate.factors


@pytest.mark.parametrize("failing", [never, sometimes])
def test_a_search_that_dies_anywhere_ends_as_if_it_had_not(failing: Failing) -> None:
    """Before every write to the store and before every outcome, one after the other."""
    whole, scorer, expected = unbroken(failing)
    steps = scorer.life.lived
    assert steps > 60
    for left in range(0, steps, 1 if failing is sometimes else 7):
        store, first, second = MemoryStore(), AnalyticScorer(failing=failing), AnalyticScorer(failing=failing)
        with pytest.raises(Interrupted):
            run(store, first, life=Life(left))
        recorded = {**store.evaluations, **store.failures}
        assert run(store, second) == expected, f"died after {left} steps"
        assert trace(store) == trace(whole), f"died after {left} steps"
        assert not recorded.keys() & second.computed.keys()
        # One value may be lost between its computing and its recording; what had no value is tried again.
        again = [known for key in first.computed & second.computed if (known := whole.outcome(key))]
        assert sum(outcome.nll is not None for outcome in again) <= 1


@given(st.integers(0, 90), st.integers(0, 1000), st.sampled_from(MUTATIONS), st.integers(0, 3))
@settings(deadline=None, max_examples=15)
def test_any_plan_dies_and_goes_on(left: int, seed: int, mutation: str, stage: int) -> None:
    plan = replace(PLAN, evolution=replace(EVOLUTION, mutation=mutation), seed=seed, stage=stage)
    whole, scorer, expected = unbroken(sometimes, plan)
    store, broken = MemoryStore(), AnalyticScorer(failing=sometimes)
    try:
        run(store, broken, plan, Life(left))
    except Interrupted:
        assert left < scorer.life.lived
    else:
        assert left >= scorer.life.lived
    assert run(store, AnalyticScorer(failing=sometimes), plan) == expected
    assert trace(store) == trace(whole)


@pytest.mark.parametrize("left", [2, 3, 7, 20])
def test_a_search_that_dies_again_and_again_still_ends(left: int) -> None:
    whole, _, expected = unbroken(sometimes)
    store = MemoryStore()
    for attempt in range(200):
        try:
            result = run(store, AnalyticScorer(failing=sometimes, order=attempt), life=Life(left))
        except Interrupted:
            continue
        break
    assert attempt > 1
    assert result == expected
    assert trace(store) == trace(whole)


@pytest.mark.parametrize("left", range(0, 60, 3))
def test_no_key_is_computed_twice_where_the_scorer_dies(left: int) -> None:
    """Here the store takes every outcome that there is, so nothing is lost."""
    computed: Counter[str] = Counter()
    store, first = MemoryStore(), AnalyticScorer(computed=computed)
    first.life = Life(left)
    with pytest.raises(Interrupted):
        run_search(PLAN, DOCUMENTS, first, store)
    assert sum(computed.values()) == left
    assert run(store, AnalyticScorer(computed=computed)) == unbroken()[2]
    assert set(computed.values()) == {1}


@pytest.mark.parametrize("order", range(6))
def test_the_order_of_completion_changes_nothing(order: int) -> None:
    whole, _, expected = unbroken(sometimes)
    store = MemoryStore()
    assert run(store, AnalyticScorer(order=order, failing=sometimes)) == expected
    assert trace(store) == trace(whole)


def test_a_finished_search_computes_nothing_again() -> None:
    store, _, expected = unbroken(sometimes)
    again = AnalyticScorer(failing=sometimes)
    assert run(store, again) == expected
    assert not again.computed
    assert again.life.lived == 0


def test_what_is_in_the_store_is_not_asked_for_anew() -> None:
    """The store is the truth, not what ask would say today: here it would ask under another seed."""
    store = MemoryStore()
    with pytest.raises(Interrupted):
        run(store, AnalyticScorer(), life=Life(30))
    written = {place: list(generation.candidates) for place, generation in store.generations.items()}
    assert len(written) == 2
    run(store, AnalyticScorer(), replace(PLAN, seed=99))
    assert {place: store.generations[place].candidates for place in written} == written
    assert trace(store) != trace(unbroken()[0])
    for generation in store.generations.values():
        for candidate, row in zip(generation.candidates, generation.keys, strict=True):
            assert row == [evaluation_key("a", candidate.factors, on) for on in generation.documents]


def test_another_study_of_the_same_finds_all_in_the_store() -> None:
    first, _, expected = unbroken()
    second, scorer = MemoryStore(evaluations=first.evaluations), AnalyticScorer()
    assert run(second, scorer) == expected
    assert not scorer.computed


def test_seed_and_stage_change_the_path() -> None:
    paths = [trace(unbroken(plan=plan)[0]) for plan in (PLAN, replace(PLAN, seed=8), replace(PLAN, stage=1))]
    asked = [[candidate for rows in path.values() for candidate, _ in rows] for path in paths]
    assert asked[0] != asked[1] != asked[2] != asked[0]


def test_scores_are_token_weighted_and_summed_by_method() -> None:
    _, scorer, result = unbroken()
    assert set(result.scores) == {"selection", "test", SHORT}
    for part, table in result.scores.items():
        methods = dict(BASELINE_FACTORS)
        if part != SHORT:
            methods |= {
                name + AT_STUDY_ATTENTION: replace(factors, attention_factor=STUDY_ATTENTION)
                for name, factors in BASELINE_FACTORS.items()
            }
        methods["searched"] = result.winner.factors
        assert result.without_n_hat is not None
        methods[WITHOUT_N_HAT] = result.without_n_hat.factors
        assert set(table) == set(methods)
        for name, factors in methods.items():
            weights = [on.length - 1 for on in DOCUMENTS[part]]
            losses = [scorer.loss(factors, on) for on in DOCUMENTS[part]]
            assert table[name].tokens == sum(weights)
            assert table[name].loss == pytest.approx(np.average(losses, weights=weights), rel=1e-12)
            assert table[name].perplexity == pytest.approx(math.exp(table[name].loss))


def test_the_winner_is_the_best_finalist_on_the_selection_set() -> None:
    store, scorer, result = unbroken()
    losses = {c.factors: scorer.score(c.factors, "selection").loss for c in finalists(store)}
    assert losses[result.winner.factors] == min(losses.values())
    assert result.scores["selection"]["searched"].loss == min(losses.values())


@pytest.mark.parametrize("seed", range(12))
def test_the_winner_is_never_worse_on_selection_than_a_seed_or_a_baseline_on_the_grid(seed: int) -> None:
    _, scorer, result = unbroken(sometimes, replace(PLAN, seed=seed, finalists=1))
    searched = result.scores["selection"]["searched"].loss
    assert searched <= min(scorer.score(snapped(factors), "selection").loss for factors in BASELINE_FACTORS.values())


@pytest.mark.parametrize("name", ["pi", "none"])
def test_a_seed_or_baseline_that_the_search_set_dislikes_can_win(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Last on the search documents, best on the selection documents: it is among the finalists all the same."""
    target = snapped(BASELINE_FACTORS[name])
    plain = AnalyticScorer.loss

    def loss(self: AnalyticScorer, factors: Factors, on: Document) -> float:
        if factors.lambdas == target.lambdas:
            return 9.0 if on.name.startswith("search") else 1.0
        return plain(self, factors, on)

    monkeypatch.setattr(AnalyticScorer, "loss", loss)
    _, _, result = unbroken(plan=replace(PLAN, finalists=1))
    assert result.winner.factors == target


def test_without_n_hat_is_the_best_that_leaves_no_start_token_untouched() -> None:
    """n_hat 16 is worth 0.16 here; the one without is what a target that cannot hold n_hat gets."""
    store, scorer = MemoryStore(), AnalyticScorer(best_n_hat=16)
    scorer.loss = lambda factors, on: AnalyticScorer.loss(scorer, factors, on) - 0.01 * factors.n_hat  # type: ignore[method-assign]
    result = run(store, scorer)
    assert result.winner.factors.n_hat == 16
    assert result.without_n_hat is not None
    assert result.without_n_hat.factors.n_hat == 0
    losses = [scorer.score(c.factors, "selection").loss for c in finalists(store) if c.factors.n_hat == 0]
    assert len(losses) >= len(SEEDS)
    assert result.scores["selection"][WITHOUT_N_HAT].loss == min(losses)
    entered = [individual_of(candidate) for candidate in finalists(store)]
    best = [individual_of(candidate) for candidate in finalists(store) if candidate.origin == "finalist"]
    assert len(best) == PLAN.finalists
    assert any(individual.n_hat for individual in best)
    assert {Individual(individual.steps, 0) for individual in best} <= {*entered}


def test_a_space_without_n_hat_0_has_no_such_row() -> None:
    plan = replace(PLAN, space=replace(SPACE, n_hats=(4, 16)))
    store, _, result = unbroken(plan=plan)
    assert result.without_n_hat is None
    assert WITHOUT_N_HAT not in result.scores["test"]
    assert all(individual_of(candidate) in plan.space for candidate in finalists(store))


def test_finalists_come_each_once() -> None:
    store, _, _ = unbroken()
    individuals = [individual_of(candidate) for candidate in finalists(store)]
    assert len(set(individuals)) == len(individuals)


@pytest.mark.parametrize("seed", range(4))
def test_ties_on_the_selection_set_break_by_key(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = AnalyticScorer.loss
    monkeypatch.setattr(
        AnalyticScorer, "loss", lambda self, f, on: plain(self, f, on) if on.name.startswith("search") else 2.0
    )
    store, _, result = unbroken(plan=replace(PLAN, seed=seed))
    assert individual_of(result.winner).key == min(individual_of(c).key for c in finalists(store))


def test_failed_individuals_rank_last_and_stop_nothing() -> None:
    store, scorer, result = unbroken(sometimes)
    assert sum(scorer.failing(c.factors, DOCUMENTS["search"][1]) is not False for _, c in everyone(store)) > 3
    assert drawn(result.winner.factors) >= 85
    assert math.isfinite(result.scores["selection"]["searched"].loss)
    assert all(math.isfinite(loss) for loss in result.history)
    best = [c for c in finalists(store) if c.origin == "finalist"]
    assert best
    assert all(math.isfinite(scorer.score(c.factors, "search").loss) for c in best)


@pytest.mark.parametrize("value", [None, math.inf, -math.inf, math.nan])
def test_a_baseline_that_fails_is_a_row_with_a_reason(value: float | None) -> None:
    none = BASELINE_FACTORS["none"].lambdas
    _, _, result = unbroken(lambda factors, _: value if factors.lambdas == none else False)
    row = result.scores["test"]["none"]
    assert (row.loss, row.perplexity, row.failure) == (math.inf, math.inf, "test0 was too much")
    assert math.isfinite(result.scores["test"]["searched"].loss)


def test_a_later_generation_that_overflows_as_a_whole_stops_nothing() -> None:
    """One child a generation, and none of them has a finite loss: the first generation's scores stand."""
    first = {candidate.factors for generation, candidate in everyone(unbroken()[0]) if generation == 0}
    plan = replace(PLAN, evolution=replace(EVOLUTION, mutants=1, crosses=0))

    def failing(factors: Factors, on: Document) -> float | bool | None:
        return math.nan if on.name.startswith("search") and factors not in first else False

    store, scorer, result = unbroken(failing, plan)
    assert [generation for generation, _ in everyone(store)] == [0] * 6 + [1, 2, 3]
    assert len(set(result.history)) == 1
    assert math.isfinite(result.scores["selection"]["searched"].loss)
    assert run(store, scorer, plan) == result


@pytest.mark.parametrize("part", ["search", "selection"])
def test_where_all_overflow_the_first_reason_is_told(part: str) -> None:
    def failing(_factors: Factors, on: Document) -> float | bool | None:
        return math.nan if on.name.startswith(part) else False

    store = MemoryStore()
    for _ in range(2):  # a loss that is not finite is a value: it is not computed anew
        with pytest.raises(LongRopeError, match=f"No candidate of {part} generation 0 .*{part}0 was too much"):
            run(store, AnalyticScorer(failing=failing))


@pytest.mark.parametrize(("part", "generation"), [("search", 0), ("search", 2), ("selection", 0), ("test", 1)])
def test_where_nothing_can_be_computed_the_reason_is_told_and_mending_it_goes_on(part: str, generation: int) -> None:
    """It is the machine then, not the candidates: nothing of it stays."""
    whole, _, expected = unbroken()
    doomed = {c.factors for c in whole.generations[0, part, generation].candidates}

    def failing(factors: Factors, on: Document) -> float | bool | None:
        return None if on.name.startswith(part) and factors in doomed else False

    store = MemoryStore()
    for _ in range(2):
        with pytest.raises(LongRopeError, match=f"could not be computed.*{part}[01] was too much"):
            run(store, AnalyticScorer(failing=failing))
    assert not store.failures
    assert run(store, AnalyticScorer()) == expected
    assert trace(store) == trace(whole)


def test_a_machine_that_fails_is_not_asked_for_the_whole_generation() -> None:
    scorer = AnalyticScorer(failing=lambda _factors, _on: None)
    with pytest.raises(LongRopeError, match=f"{UNCOMPUTED_IN_A_ROW} evaluations in a row"):
        run(MemoryStore(), scorer, replace(PLAN, evolution=replace(EVOLUTION, population=40)))
    assert sum(scorer.computed.values()) == UNCOMPUTED_IN_A_ROW


def test_many_that_cannot_be_computed_between_others_that_can_stop_nothing() -> None:
    """Four in ten of forty candidates fail on every document, but never sixteen evaluations in a row."""

    def failing(factors: Factors, on: Document) -> float | bool | None:
        return None if on.name.startswith("search") and drawn(factors) < 110 else False

    plan = replace(PLAN, evolution=replace(EVOLUTION, population=40, generations=0), seed=2)
    store, scorer, result = unbroken(failing, plan)
    assert len(store.failures) > 2 * UNCOMPUTED_IN_A_ROW
    assert math.isfinite(result.history[0])
    again = AnalyticScorer(failing=failing)
    assert run(store, again, plan) == result
    assert not again.computed
    assert len(scorer.computed) == sum(scorer.computed.values()) == len(set(store.units()))


def test_what_could_not_be_computed_before_the_process_died_is_tried_again() -> None:
    """A failure is final with its generation only."""
    store = MemoryStore()
    with pytest.raises(Interrupted):
        run(store, AnalyticScorer(failing=lambda f, _: None if drawn(f) < 128 else False), life=Life(10))
    assert run(store, AnalyticScorer()) == unbroken()[2]


@pytest.mark.parametrize("left", [0, 1, 2, 9, 14, 30, 40, 50, 60])
def test_a_changed_fingerprint_goes_on_under_new_keys_and_keeps_what_is_known(left: int) -> None:
    whole, _, expected = unbroken(sometimes)
    store, before, after = MemoryStore(), AnalyticScorer(failing=sometimes), AnalyticScorer(failing=sometimes)
    with pytest.raises(Interrupted):
        run(store, before, life=Life(left))
    known = {**store.evaluations, **store.failures}
    after.fingerprint = "b"
    assert run(store, after) == expected
    assert trace(store) == trace(whole)
    assert not known.keys() & after.computed.keys()
    assert set(after.computed.values()) <= {1}
    for written in store.generations.values():
        for candidate, row in zip(written.candidates, written.keys, strict=True):
            for on, key in zip(written.documents, row, strict=True):
                old = evaluation_key("a", candidate.factors, on)
                new = evaluation_key("b", candidate.factors, on)
                assert key == new or (key == old and old in known)
    again = AnalyticScorer(failing=sometimes, fingerprint="c")
    assert run(store, again) == expected
    assert not again.computed


@pytest.mark.parametrize("left", [1, 9, 60])
def test_new_keys_that_another_study_computed_are_found(left: int) -> None:
    shared: dict[str, Outcome] = {}
    run(MemoryStore(evaluations=shared), AnalyticScorer(fingerprint="b"))
    store, after = MemoryStore(evaluations=shared), AnalyticScorer(fingerprint="b")
    with pytest.raises(Interrupted):
        run(store, AnalyticScorer(), life=Life(left))
    assert run(store, after) == unbroken()[2]
    assert not after.computed


def test_the_observer_is_told_all_and_changes_nothing() -> None:
    store, scorer, watcher = MemoryStore(), AnalyticScorer(failing=sometimes), Watcher()
    result = run_search(PLAN, DOCUMENTS, scorer, store, watcher)
    assert result == unbroken(sometimes)[2]
    assert watcher.started[0] == ("search", 0, 12, 12)
    cost = [units for part, number, units, _ in watcher.started if part == "search" or number == 0]
    assert sum(cost) == result.forwards
    assert sum(pending for *_, pending in watcher.started) == len(watcher.outcomes) == sum(scorer.computed.values())
    assert [entry[:2] for entry in watcher.finished] == [entry[:2] for entry in watcher.started]
    for part, generation, best, score in watcher.finished:
        candidates = store.generations[0, part, generation].candidates
        assert score == scorer.score(best.factors, part)
        assert score.loss == min(scorer.score(c.factors, part).loss for c in candidates)
