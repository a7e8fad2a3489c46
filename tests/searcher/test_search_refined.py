"""A whole search with refinement, racing, spare units and samplers, in memory: exact, resumable, never worse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_study import (
    BASELINE_FACTORS,
    BEST_ATTENTION,
    DOCUMENTS,
    PLAN,
    SPACE,
    STUDY_ATTENTION,
    AnalyticScorer,
    Interrupted,
    Life,
    MemoryStore,
    Place,
    Watcher,
    document,
    drawn,
    everyone,
    finalists,
    run,
    snapped,
    sometimes,
    trace,
    unbroken,
)

from searcher.descent import Descent, Refinement, descend
from searcher.errors import LongRopeError
from searcher.evolution import Evolution
from searcher.racing import Racing
from searcher.rope import Factors
from searcher.samplers import SAMPLERS, Sampler
from searcher.search import (
    AFTER_FAILURE,
    AFTER_SUCCESS,
    RAMPS_KEPT,
    SearchPlan,
    SearchResult,
    individual_of,
    run_search,
)
from searcher.space import SearchSpace
from searcher.study import AT_STUDY_ATTENTION, REFINE, REFINED, SEARCH_SHORT, Candidate, Document, Outcome, Unit

MORE = {
    **DOCUMENTS,
    "search": [document("search", i, length) for i, length in enumerate((2048, 1024, 1500))],
    REFINE: [document(REFINE, i, length) for i, length in enumerate((2048, 600))],
}
REFINEMENT = Refinement(steps=3, legs=2, final_legs=1, starts=2, rate=0.2, attention=True)
RACED = replace(
    PLAN,
    evolution=Evolution(population=8, parents=3, mutants=4, crosses=2, generations=2, mutation="lognormal"),
    refinement=REFINEMENT,
    racing=Racing((1, 2), 0.3),
    finalists=2,
    all_seeds_final=False,
    ramps={f"ramp:{i}": Factors((1.0, 1 + i / 9, 1.7 + i * i / 7, 8.0)) for i in range(8)},
)
RAMPS = len(RACED.ramps)


def shaky(factors: Factors, on: Document) -> float | bool | None:
    """A third of the candidates fail somewhere; gradients among them, though never beyond computing."""
    if on.name.startswith(REFINE):
        return math.nan if drawn(factors) < 60 else False
    return sometimes(factors, on)


def cost(store: MemoryStore) -> list[tuple[Place, Any]]:
    """What a search is charged for: everything but the rows of the report."""
    parts = ("search", SEARCH_SHORT, REFINED)
    return [(p, w) for p, w in store.generations.items() if p[1] in parts or p[1:] == ("selection", 0)]


def test_it_costs_what_was_asked_of_the_scorer() -> None:
    store, scorer, result = unbroken(plan=RACED, documents=MORE)
    steps = [written for (_, part, _), written in store.generations.items() if part == REFINE]
    assert [len(written.candidates) for written in steps] == [2] * 6 + [1] * 3
    assert result.gradients == sum(len(written.candidates) for written in steps) == REFINEMENT.gradients == 15
    assert scorer.asked["gradient refine"] == len({key for written in steps for row in written.keys for key in row})
    assert [len(store.generations[0, REFINED, number].candidates) for number in range(4)] == [RAMPS, 2, 2, 1]
    scored = [[[store.outcome(key) for key in row] for row in written.keys] for _, written in cost(store)]
    assert result.forwards == sum(outcome is not None for rows in scored for row in rows for outcome in row)
    ranked = {key for place, w in cost(store) if place[1] != "selection" for row in w.keys for key in row}
    assert scorer.asked["search"] == sum(store.outcome(key) is not None for key in ranked)
    assert result.dropped == sum(row[-1] is None for rows in scored for row in rows) > 0
    assert set(scorer.computed.values()) == {1}
    assert len(result.history) == 1 + 1 + 2 + 2 + 1


def test_the_observer_is_told_of_all_of_it() -> None:
    store, scorer, watcher = MemoryStore(), AnalyticScorer(), Watcher()
    result = run_search(RACED, MORE, scorer, store, watcher)
    assert result == unbroken(plan=RACED, documents=MORE)[2]
    assert sum(count for _, _, count in watcher.dropped) == result.dropped
    assert {part for part, _, _ in watcher.dropped} == {"search", REFINED}
    assert all(count > 0 for _, _, count in watcher.dropped)
    assert [(0, *entry[:2]) for entry in watcher.finished] == list(store.generations)
    assert len(watcher.outcomes) == sum(scorer.computed.values())


def test_refinement_descends_on_its_own_windows_where_there_are_any() -> None:
    store, _, _ = unbroken(plan=RACED, documents=MORE)
    used = [written.documents for (_, part, _), written in store.generations.items() if part == REFINE]
    assert used == [used[step % 2] for step in range(9)]
    assert {on for (on,) in used} == {*MORE[REFINE]}
    without = {part: found for part, found in MORE.items() if part != REFINE}
    store, scorer, _ = unbroken(plan=RACED, documents=without)
    used = [written.documents for (_, part, _), written in store.generations.items() if part == REFINE]
    assert used == [used[step % 3] for step in range(9)]
    assert {on for (on,) in used} == {*MORE["search"]}
    assert scorer.asked["gradient search"] > 0


def test_the_order_of_those_windows_is_the_seeds() -> None:
    orders = set()
    for seed in range(8):
        store, _, _ = unbroken(plan=replace(RACED, seed=seed), documents=MORE)
        orders.add(store.generations[0, REFINE, 0].documents[0].name)
    assert orders == {on.name for on in MORE[REFINE]}


@pytest.mark.parametrize("eager", [0, 3])
def test_it_dies_anywhere_and_ends_as_if_it_had_not(eager: int) -> None:
    whole, scorer, expected = unbroken(shaky, RACED, MORE)
    assert any(not math.isfinite(o.nll or 0) for o in whole.evaluations.values() if o.key in whole.units())
    for left in range(eager, scorer.life.lived, 4 if eager else 3):
        store, broken = MemoryStore(), AnalyticScorer(failing=shaky, order=left, eager=eager)
        with pytest.raises(Interrupted):
            run(store, broken, RACED, Life(left), MORE)
        after = AnalyticScorer(failing=shaky, eager=eager)
        recorded = {**store.evaluations, **store.failures}
        assert run(store, after, RACED, documents=MORE) == expected, f"died after {left} steps"
        assert trace(store) == trace(whole), f"died after {left} steps"
        assert not recorded.keys() & after.computed.keys()


@given(
    st.integers(0, 200),
    st.integers(0, 1000),
    st.builds(
        Refinement,
        steps=st.integers(1, 3),
        legs=st.integers(0, 2),
        final_legs=st.integers(0, 2),
        starts=st.integers(1, 4),
        rate=st.floats(0.01, 2.0),
        phase=st.floats(0.01, 1.0),
        attention=st.booleans(),
    ),
    st.builds(Racing, st.sampled_from([(), (1,), (2,), (1, 2)]), st.floats(0.0, 3.0)),
    st.integers(0, 4),
)
@settings(deadline=None, max_examples=12)
def test_any_plan_dies_and_goes_on(left: int, seed: int, refinement: Refinement, racing: Racing, eager: int) -> None:
    plan = replace(RACED, seed=seed, refinement=refinement, racing=racing)
    whole, _, expected = unbroken(shaky, plan, MORE, eager=eager)
    assert list(expected.history) == sorted(expected.history, reverse=True)
    store = MemoryStore()
    with suppress(Interrupted):
        run(store, AnalyticScorer(failing=shaky, order=seed, eager=eager), plan, Life(left), MORE)
    assert run(store, AnalyticScorer(failing=shaky), plan, documents=MORE) == expected
    assert trace(store) == trace(whole)


class TestSpareUnits:
    @pytest.mark.parametrize("order", [None, 0, 1, 2])
    def test_they_change_nothing_and_are_never_computed_twice(self, order: int | None) -> None:
        whole, alone, expected = unbroken(plan=RACED, documents=MORE)
        store, scorer, result = unbroken(plan=RACED, documents=MORE, order=order, eager=3)
        assert result == expected
        assert trace(store) == trace(whole)
        assert scorer.spared
        assert set(scorer.computed.values()) == {1}
        assert scorer.asked["selection"] < alone.asked["selection"]
        store, scorer, result = MemoryStore(store.evaluations), AnalyticScorer(eager=3), result
        assert run(store, scorer, RACED, documents=MORE) == expected
        assert not scorer.computed

    def test_they_are_the_best_so_far_on_the_selection_documents(self) -> None:
        spare: list[list[Unit]] = []

        class Noting(AnalyticScorer):
            def evaluate(self, units: Sequence[Unit], spare_units: Sequence[Unit] = ()) -> Any:
                spare.append(list(spare_units))
                return super().evaluate(units)

        store = MemoryStore()
        run(store, Noting(), RACED, documents=MORE)
        assert spare[0] == [], "nothing is known yet"
        assert all(unit.document in MORE["selection"] and not unit.gradient for units in spare for unit in units)
        last = [units for units in spare if units][-1]
        assert len(last) == RACED.finalists * len(MORE["selection"])
        assert {unit.factors for unit in last} & {candidate.factors for candidate in finalists(store)}

    def test_failures_among_them_do_not_matter(self) -> None:
        class Clumsy(AnalyticScorer):
            clumsy = False

            def evaluate(self, units: Sequence[Unit], spare: Sequence[Unit] = ()) -> Any:
                for unit in spare:
                    yield Outcome(unit.key, None, 0, failure="no room for two")
                yield from super().evaluate(units)

        whole, _, expected = unbroken(sometimes, RACED, MORE)
        store = MemoryStore()
        assert run(store, Clumsy(failing=sometimes), RACED, documents=MORE) == expected
        assert trace(store) == trace(whole)


def whole_ramps(store: MemoryStore) -> list[Candidate]:
    """The ramps that were scored on all documents."""
    written = store.generations[0, REFINED, 0]
    return [c for c, row in zip(written.candidates, written.keys, strict=True) if all(map(store.outcome, row))]


def replayed(store: MemoryStore, plan: SearchPlan, scorer: AnalyticScorer) -> list[list[Factors]]:
    """Where every step of the first refinement's gradients must have been taken, by its lines."""
    refinement = plan.refinement
    assert refinement is not None
    scored = store.generations[0, "search", 0].candidates + whole_ramps(store)
    losses = {c.factors: scorer.score(c.factors, "search", MORE).loss for c in scored}
    ranked = sorted(losses, key=lambda f: (losses[f], plan.space.snap(f).key))
    steps: list[list[Factors]] = [[] for _ in range(refinement.steps * refinement.legs)]
    for start in ranked[: refinement.starts]:
        best, loss, share = start, losses[start], 1.0
        for leg in range(refinement.legs):
            descent = Descent.start(best)
            for step in range(leg * refinement.steps, (leg + 1) * refinement.steps):
                steps[step].append(descent.factors)
                (on,) = store.generations[0, REFINE, step].documents
                slope = [value / (on.length - 1) for value in scorer.gradient(descent.factors, on)]
                descent = descend(descent, tuple(slope), refinement, share, plan.space, plan.frequencies)
            end = plan.space.snap(descent.factors).factors(descent.factors.attention_factor)
            reached = scorer.score(end, "search", MORE).loss
            share *= AFTER_SUCCESS if reached < loss else AFTER_FAILURE
            if reached < loss:
                best, loss = end, reached
    return steps


class TestRefinement:
    @pytest.mark.parametrize(("starts", "rate"), [(1, 0.2), (3, 0.2), (4, 3.0)])
    def test_starts_descend_side_by_side_leg_after_leg(self, starts: int, rate: float) -> None:
        """At the high rate some legs are taken back, and the line goes on from its best at a quarter of the rate."""
        plan = replace(RACED, refinement=replace(REFINEMENT, starts=starts, rate=rate, legs=3, final_legs=0))
        store, scorer, _ = unbroken(plan=plan, documents=MORE)
        expected = replayed(store, plan, scorer)
        for step, factors in enumerate(expected):
            assert [candidate.factors for candidate in store.generations[0, REFINE, step].candidates] == factors
        ends = [store.generations[0, REFINED, 1 + leg].candidates for leg in range(3)]
        assert all(individual_of(end) in SPACE for leg in ends for end in leg)
        assert {end.origin.split(":")[0] for leg in ends for end in leg} == {"refined"}

    def test_it_finds_what_the_documents_like_and_the_final_one_goes_on_from_the_winner(self) -> None:
        refinement = Refinement(steps=30, legs=2, final_legs=1, rate=0.1)
        plan = replace(PLAN, refinement=refinement, evolution=replace(PLAN.evolution, generations=1))
        _, _, plain = unbroken(plan=replace(plan, refinement=None), noise=0.0)
        store, _, result = unbroken(plan=plan, noise=0.0)
        assert min(result.history) < min(plain.history) - 0.01
        (lambdas,) = store.generations[0, REFINED, 1].candidates[0].factors.by_layer()
        np.testing.assert_allclose(np.log(lambdas), np.log([1.0, 1.4, 3.7, 7.9]), atol=0.02)
        assert store.generations[0, REFINED, 2].candidates[0].origin.startswith("refined:")
        assert result.scores["test"]["searched"].loss < plain.scores["test"]["searched"].loss

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("attention", [True, False])
    def test_it_never_ends_worse_than_it_began(self, seed: int, attention: bool) -> None:
        """With steps so long and noise so loud that many a leg leads astray."""
        refinement = Refinement(steps=2, legs=3, final_legs=2, starts=3, rate=1.5, attention=attention)
        plan = replace(RACED, refinement=refinement, seed=seed)
        _, _, result = unbroken(plan=plan, documents=MORE, noise=2.0)
        assert list(result.history) == sorted(result.history, reverse=True)

    @pytest.mark.parametrize("seed", range(6))
    def test_an_individual_that_comes_back_worse_keeps_its_better_score(self, seed: int) -> None:
        """One point in the space: all that a refinement can change is the attention factor, and noise decides."""
        space = SearchSpace(SPACE.pairs, 800, 800, (0, 4))
        refinement = Refinement(steps=1, legs=4, final_legs=1, attention=True)
        plan = replace(PLAN, space=space, refinement=refinement, seed=seed, attention_factor=1.3 + seed / 10)
        plan = replace(plan, all_seeds_final=False)
        store, scorer, result = unbroken(plan=plan, noise=3.0)
        assert list(result.history) == sorted(result.history, reverse=True)
        seeds = [c for c in store.generations[0, "search", 0].candidates if c.origin.startswith("seed:")]
        best = min((scorer.score(c.factors, "search").loss, c.factors) for c in seeds)[1]
        assert best in {candidate.factors for candidate in finalists(store)}
        searched = result.scores["selection"]["searched"].loss
        assert searched <= scorer.score(best, "selection").loss

    def test_the_attention_factor_is_learnt_and_children_inherit_it(self) -> None:
        refinement = Refinement(steps=40, legs=2, final_legs=1, rate=0.1, attention=True)
        store, _, result = unbroken(plan=replace(PLAN, refinement=refinement), noise=0.0)
        assert result.winner.factors.attention_factor == pytest.approx(BEST_ATTENTION, rel=5e-3)
        learnt = store.generations[0, REFINED, 1].candidates[0].factors.attention_factor
        later = [c.factors.attention_factor for generation, c in everyone(store) if generation]
        assert set(later) == {learnt} != {STUDY_ATTENTION}
        assert result.without_n_hat is not None
        rows = store.generations[0, "test", 1].candidates
        at_study = [c.factors.attention_factor for c in rows if c.origin.endswith(AT_STUDY_ATTENTION)]
        assert set(at_study) == {STUDY_ATTENTION}

    def test_the_attention_factor_stays_where_it_is_not_to_be_learnt(self) -> None:
        plan = replace(RACED, refinement=replace(REFINEMENT, attention=False))
        store, _, result = unbroken(plan=plan, documents=MORE)
        used = {c.factors.attention_factor for _, written in cost(store) for c in written.candidates}
        assert used == {STUDY_ATTENTION} == {result.winner.factors.attention_factor}

    def test_where_no_gradient_is_finite_it_stays_where_it_was(self) -> None:
        plan = replace(RACED, racing=None, refinement=replace(REFINEMENT, attention=False))
        _, scorer, expected = unbroken(plan=replace(plan, refinement=None), documents=MORE)
        store, _, result = unbroken(lambda _, on: math.nan if on.name.startswith(REFINE) else False, plan, MORE)
        assert (result.winner.factors, result.scores) == (expected.winner.factors, expected.scores)
        assert min(result.history) == min(expected.history)
        starts = store.generations[0, REFINE, 0].candidates
        assert [c.factors for c in store.generations[0, REFINE, 5].candidates] == [c.factors for c in starts]
        assert sum(scorer.computed.values()) > 0

    def test_a_gradient_that_is_missing_beside_its_loss_is_left_out(self) -> None:
        """As a store gives back one that was not finite."""

        class Broken(AnalyticScorer):
            def gradient(self, factors: Factors, on: Document) -> Any:
                return None if drawn(factors) < 100 else super().gradient(factors, on)

        store = MemoryStore()
        result = run(store, Broken(), RACED, documents=MORE)
        missing = [o for o in store.evaluations.values() if o.gradient is None]
        assert len(missing) > 0
        assert list(result.history) == sorted(result.history, reverse=True)
        assert run(store, Broken(failing=lambda *_: None), RACED, documents=MORE) == result

    def test_a_step_that_cannot_be_computed_says_why_and_goes_on_after_mending(self) -> None:
        whole, _, expected = unbroken(plan=RACED, documents=MORE)
        store = MemoryStore()
        doomed = {c.factors for c in whole.generations[0, REFINE, 7].candidates}
        for _ in range(2):
            with pytest.raises(LongRopeError, match=r"could not be computed.*refine[01] was too much"):
                run(
                    store,
                    AnalyticScorer(failing=lambda f, on: None if f in doomed and on in MORE[REFINE] else False),
                    RACED,
                    documents=MORE,
                )
        assert run(store, AnalyticScorer(), RACED, documents=MORE) == expected
        assert trace(store) == trace(whole)

    def test_in_a_critical_space_every_point_follows_ntk_below_the_critical_pair(self) -> None:
        space = SearchSpace.for_critical(SPACE.pairs, 8.0, 2, SPACE.n_hats)
        store, _, result = unbroken(plan=replace(RACED, space=space), documents=MORE)
        for (_, part, _), written in store.generations.items():
            for candidate in written.candidates if part == REFINE else []:
                logs = np.log(candidate.factors.by_layer()[0])
                np.testing.assert_allclose(logs[:3], [0.0, logs[2] / 2, logs[2]], atol=6e-3)  # a start is on the grid
        assert individual_of(result.winner) in space
        assert min(result.history) <= result.history[0]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("all_seeds", [True, False])
def test_the_winner_is_never_worse_on_selection_than_the_best_seed(seed: int, all_seeds: bool) -> None:
    plan = replace(RACED, seed=seed, all_seeds_final=all_seeds, finalists=1)
    store, scorer, result = unbroken(shaky, plan, MORE, noise=0.6)
    seeds = [c.factors for c in store.generations[0, "search", 0].candidates if c.origin.startswith("seed:")]
    best = min(seeds, key=lambda f: (scorer.score(f, "search", MORE).loss, plan.space.snap(f).key))
    searched = result.scores["selection"]["searched"].loss
    assert searched <= scorer.score(best, "selection").loss
    if all_seeds:
        every = [*seeds, *(snapped(factors) for factors in BASELINE_FACTORS.values())]
        assert searched <= min(scorer.score(f, "selection").loss for f in every)
    else:
        assert sum(c.origin.startswith("seed:") for c in finalists(store)) <= 1


def test_a_search_without_seeds_draws_its_own() -> None:
    _, _, result = unbroken(plan=replace(RACED, seeds={}), documents=MORE)
    assert math.isfinite(result.scores["selection"]["searched"].loss)


class TestRamps:
    def test_all_are_scored_on_one_document_and_the_best_on_all(self) -> None:
        store, scorer, result = unbroken(plan=RACED, documents=MORE)
        written = store.generations[0, REFINED, 0]
        assert [c.origin for c in written.candidates] == list(RACED.ramps)
        first = [scorer.outcome(c.factors, MORE["search"][0]).nll for c in written.candidates]
        cut = sorted(value for value in first if value is not None)[RAMPS_KEPT - 1]
        for candidate, row, value in zip(written.candidates, written.keys, first, strict=True):
            assert value is not None
            assert candidate.factors == SPACE.snap(RACED.ramps[candidate.origin]).factors(STUDY_ATTENTION)
            assert candidate.factors.n_hat == 0
            assert all(map(store.outcome, row)) == (value <= cut)
            assert store.outcome(row[0])
        assert len(whole_ramps(store)) == RAMPS_KEPT < RAMPS
        assert result.dropped >= RAMPS - RAMPS_KEPT

    def test_a_refinement_starts_from_the_best_of_them_where_it_beats_the_seeds(self) -> None:
        better = {"ramp:mine": Factors((1.0, 1.4, 3.7, 7.9), 4)}
        store, _, result = unbroken(plan=replace(RACED, ramps={**RACED.ramps, **better}), documents=MORE, noise=0.0)
        (lambdas,) = store.generations[0, REFINE, 0].candidates[0].factors.by_layer()
        assert lambdas == pytest.approx((1.0, 1.4, 3.7, 7.9))
        assert store.generations[0, REFINE, 0].candidates[0].origin == "refine:ramp:mine"
        assert result.history[1] < result.history[0]

    def test_those_that_are_seeds_already_or_alike_are_scored_once(self) -> None:
        seeds = {f"ramp:{name}": factors for name, factors in BASELINE_FACTORS.items() if name in RACED.seeds}
        twins = {"ramp:a": Factors((1.0, 2.0, 3.0, 4.0), 9), "ramp:b": Factors((1.0, 2.0, 3.001, 4.0))}
        store, scorer, _ = unbroken(plan=replace(RACED, ramps={**seeds, **twins}), documents=MORE)
        assert [c.origin for c in store.generations[0, REFINED, 0].candidates] == ["ramp:a"]
        assert set(scorer.computed.values()) == {1}
        store, _, _ = unbroken(plan=replace(RACED, ramps=seeds), documents=MORE)
        assert len(store.generations[0, REFINED, 0].candidates) == REFINEMENT.starts, "the first leg's ends"

    def test_where_all_of_them_fail_the_seeds_are_left(self) -> None:
        doomed = {SPACE.snap(factors).steps for factors in RACED.ramps.values()}
        doomed -= {SPACE.snap(factors).steps for factors in RACED.seeds.values()}

        def failing(factors: Factors, on: Document) -> float | bool | None:
            return math.nan if on.name.startswith("search") and SPACE.snap(factors).steps in doomed else False

        store, _, result = unbroken(failing, RACED, MORE)
        assert not whole_ramps(store) or result.dropped
        assert math.isfinite(result.scores["selection"]["searched"].loss)
        assert result.history[1] == result.history[0]


class TestRacing:
    def test_with_caution_enough_it_is_as_if_there_were_none(self) -> None:
        _, _, free = unbroken(shaky, replace(RACED, racing=None), MORE)
        _, _, careful = unbroken(shaky, replace(RACED, racing=Racing((1, 2), 1e9)), MORE)
        assert careful.dropped == free.dropped, "the ramps"
        assert replace(careful, forwards=0) == replace(free, forwards=0)
        assert careful.forwards <= free.forwards  # one that failed is not scored on

    def test_it_saves_forwards_and_drops_no_parent(self) -> None:
        """On documents that agree but for a little noise."""
        free, _, whole = unbroken(plan=replace(RACED, racing=None), documents=MORE, noise=0.01)
        store, _, raced = unbroken(plan=replace(RACED, racing=Racing((1, 2), 3.0)), documents=MORE, noise=0.01)
        saved = raced.dropped - whole.dropped
        assert saved > 2
        assert raced.forwards <= whole.forwards - saved
        assert (raced.winner, raced.history, raced.scores) == (whole.winner, whole.history, whole.scores)
        assert everyone(store) == everyone(free)

    def test_seeds_are_never_raced(self) -> None:
        store, _, _ = unbroken(plan=replace(RACED, racing=Racing((1, 2), 0.0)), documents=MORE)
        for row in store.generations[0, "search", 0].keys:
            assert all(store.outcome(key) for key in row)


def sampled(name: str, **changes: Any) -> SearchPlan:
    sampler = Sampler(name, population=6, batch=4, generations=3)
    plan = replace(RACED, sampler=sampler, refinement=Refinement(steps=2, legs=0, final_legs=1))
    return replace(plan, **changes)


SHORT_TOO = {**MORE, SEARCH_SHORT: [document(SEARCH_SHORT, i, 256) for i in range(3)]}


class TestSamplers:
    @pytest.mark.parametrize("name", SAMPLERS)
    def test_a_search_by_one_dies_and_goes_on_exactly(self, name: str) -> None:
        plan = sampled(name)
        whole, scorer, expected = unbroken(shaky, plan, SHORT_TOO)
        origins = {c.origin for generation, c in everyone(whole) if generation}
        assert name in origins
        assert [len(whole.generations[0, "search", g].candidates) for g in range(4)] == [6, 4, 4, 4]
        assert scorer.life.lived > 60
        for left in range(9, scorer.life.lived, 29):
            store = MemoryStore()
            with pytest.raises(Interrupted):
                run(store, AnalyticScorer(failing=shaky, order=left), plan, Life(left), SHORT_TOO)
            assert run(store, AnalyticScorer(failing=shaky, eager=2), plan, documents=SHORT_TOO) == expected
            assert trace(store) == trace(whole), f"died after {left} steps"

    @pytest.mark.parametrize("name", SAMPLERS)
    def test_short_documents_are_scored_for_two_objectives_only(self, name: str) -> None:
        store, scorer, result = unbroken(plan=sampled(name), documents=SHORT_TOO)
        assert (scorer.asked[SEARCH_SHORT] > 0) == (name == "nsga2") == bool(result.pareto)
        scored = [[store.outcome(key) for key in row] for _, written in cost(store) for row in written.keys]
        assert result.forwards == sum(outcome is not None for row in scored for outcome in row)

    def test_the_front_is_what_no_other_beats_on_both(self) -> None:
        store, scorer, result = unbroken(sometimes, sampled("nsga2", refinement=None, racing=None), SHORT_TOO)
        rows = []
        for _, candidate in everyone(store):
            long, short = (scorer.score(candidate.factors, p, SHORT_TOO).loss for p in ("search", SEARCH_SHORT))
            if math.isfinite(long) and math.isfinite(short):
                rows.append((candidate.factors, long, short))
        front = {
            (f, long, short)
            for f, long, short in rows
            if not any(a <= long and b <= short and (a, b) != (long, short) for _, a, b in rows)
        }
        assert {(candidate.factors, long, short) for candidate, long, short in result.pareto} == front
        assert [long for _, long, _ in result.pareto] == sorted(long for _, long, _ in front)

    def test_a_later_generation_that_fails_on_all_short_documents_stops_nothing(self) -> None:
        plan = sampled("nsga2")
        first = {c.factors for generation, c in everyone(unbroken(plan=plan, documents=SHORT_TOO)[0]) if not generation}
        _, _, result = unbroken(
            lambda f, on: math.nan if on.name.startswith(SEARCH_SHORT) and f not in first else False, plan, SHORT_TOO
        )
        assert {candidate.factors for candidate, _, _ in result.pareto} <= first


def test_two_results_of_two_seeds_differ() -> None:
    results: list[SearchResult] = [unbroken(plan=replace(RACED, seed=s), documents=MORE)[2] for s in (1, 2)]
    assert results[0].history != results[1].history
