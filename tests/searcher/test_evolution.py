"""Ask and tell: never the same twice, always the same again, the best are parents, and it finds what it looks for."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searcher import evolution
from searcher.baselines import BASELINES
from searcher.errors import LongRopeError
from searcher.evolution import Child, Evolution, State, ask, generator, tell
from searcher.operators import MUTATIONS, crossover, random_individual
from searcher.plan import PRESETS
from searcher.rope import RopeSpec
from searcher.space import Individual, SearchSpace

kinds = pytest.mark.parametrize("kind", MUTATIONS)
SPEC = RopeSpec(10_000.0, 32, 256, 1)
SCALE = 8.0
SPACE = SearchSpace.for_scale(SPEC.pairs, SCALE)
SEEDS = {name: SPACE.snap(BASELINES[name](SPEC, SCALE)) for name in ("pi", "ntk", "yarn")}
SMALL = Evolution(population=8, parents=4, mutants=4, crosses=3, generations=4)

# Between the seeds and off all of them: what a search is to find.
HIDDEN = np.log([1, 1, 1, 1.02, 1.1, 1.3, 1.7, 2.4, 3.3, 4.4, 5.2, 5.2, 6.8, 7.5, 8.3, 9.4])


def distance(individual: Individual) -> float:
    """Mean squared distance to HIDDEN in logarithms, and a little for n_hat: convex, lowest at n_hat 16."""
    logarithms = np.log(np.asarray(individual.steps) / 100)
    return float(np.mean((logarithms - HIDDEN) ** 2)) + 0.001 * abs(individual.n_hat - 16)


def generations(
    plan: Evolution,
    space: SearchSpace,
    seeds: Mapping[str, Individual],
    score: Callable[[Individual], float],
    seed: int = 0,
) -> tuple[list[list[Child]], State]:
    """A search to its end: every generation's children, and what is known then."""
    state, asked = State(), []
    while children := ask(plan, space, state, seeds, seed):
        asked.append(children)
        state = tell(state, {child.individual: score(child.individual) for child in children})
    return asked, state


def shuffled(state: State, seed: int = 0) -> State:
    """The same knowledge, learnt in another order."""
    items = list(state.scores.items())
    random.Random(seed).shuffle(items)
    return State(state.generation, dict(items))


@kinds
@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_is_asked_for_twice(kind: str, seed: int) -> None:
    asked, state = generations(replace(SMALL, mutation=kind, generations=12), SPACE, SEEDS, distance, seed)
    individuals = [child.individual for children in asked for child in children]
    assert len(set(individuals)) == len(individuals) == len(state.scores)
    assert all(individual in SPACE for individual in individuals)


@kinds
@given(
    seed=st.integers(0, 2**40),
    stage=st.integers(0, 5),
    generation=st.integers(0, SMALL.generations),
    scored=st.lists(st.one_of(st.floats(0, 10), st.just(math.inf)), max_size=12),
)
@settings(deadline=None, max_examples=15)
def test_ask_depends_on_its_arguments_alone(
    kind: str, seed: int, stage: int, generation: int, scored: list[float]
) -> None:
    """Nor on the order in which scores were learnt, numpy's global generator, or what was asked before."""
    rng = np.random.default_rng(3)
    state = State(generation, {random_individual(rng, SPACE): score for score in scored})
    plan = replace(SMALL, mutation=kind)
    first = ask(plan, SPACE, state, SEEDS, seed, stage)
    np.random.default_rng().random()
    ask(plan, SPACE, state, SEEDS, seed + 1, stage)
    assert ask(plan, SPACE, state, SEEDS, seed, stage) == first
    assert ask(plan, SPACE, shuffled(state), SEEDS, seed, stage) == first
    assert len(state.scores) == len({*state.scores})


def test_seed_stage_and_generation_all_change_what_is_asked() -> None:
    _, state = generations(replace(SMALL, generations=0), SPACE, SEEDS, distance)
    asked = [
        ask(SMALL, SPACE, replace(state, generation=generation), SEEDS, seed, stage)
        for seed, stage, generation in itertools.product([0, 1], [0, 1], [1, 2])
    ]
    assert all(first != second for first, second in itertools.combinations(asked, 2))


def test_every_place_has_draws_of_its_own() -> None:
    places = list(itertools.product(range(3), repeat=4))
    assert len({generator(*place).random() for place in places}) == len(places)
    assert generator(1, 2, 3, 4).random() == generator(1, 2, 3, 4).random()


def test_a_child_is_the_same_in_a_shorter_generation() -> None:
    """A child depends on the children before it, not on how many come after."""
    _, state = generations(replace(SMALL, generations=0), SPACE, SEEDS, distance)
    long = ask(replace(SMALL, mutants=6, crosses=0), SPACE, state, SEEDS, 0)
    assert ask(replace(SMALL, mutants=2, crosses=0), SPACE, state, SEEDS, 0) == long[:2]


def test_generation_0_holds_all_seeds_first_and_then_mutants() -> None:
    children = ask(SMALL, SPACE, State(), SEEDS, 0)
    assert [child.origin for child in children] == ["seed:pi", "seed:ntk", "seed:yarn"] + ["mutant"] * 5
    assert [child.individual for child in children[:3]] == list(SEEDS.values())


def test_seeds_that_are_one_individual_share_a_child() -> None:
    children = ask(SMALL, SPACE, State(), {**SEEDS, "again": SEEDS["pi"]}, 0)
    assert [child.origin for child in children[:4]] == ["seed:pi+again", "seed:ntk", "seed:yarn", "mutant"]
    assert len(children) == SMALL.population


def test_more_seeds_than_places_are_all_scored() -> None:
    children = ask(replace(SMALL, population=2), SPACE, State(), SEEDS, 0)
    assert [child.origin for child in children] == ["seed:pi", "seed:ntk", "seed:yarn"]


def test_without_seeds_the_population_is_random() -> None:
    children = ask(SMALL, SPACE, State(), {}, 0)
    assert [child.origin for child in children] == ["random"] * SMALL.population


def test_later_generations_are_mutants_then_crosses() -> None:
    asked, _ = generations(SMALL, SPACE, SEEDS, distance)
    assert len(asked) == 1 + SMALL.generations
    for children in asked[1:]:
        assert [child.origin for child in children] == ["mutant"] * 4 + ["cross"] * 3


def test_nothing_is_asked_for_after_the_last_generation() -> None:
    _, state = generations(SMALL, SPACE, SEEDS, distance)
    assert state.generation == SMALL.generations + 1
    assert ask(SMALL, SPACE, state, SEEDS, 0) == []


@pytest.fixture
def parents(monkeypatch: pytest.MonkeyPatch) -> set[Individual]:
    """The individuals that children are made of, as the operators are given them; the operators run as ever."""
    seen: set[Individual] = set()

    def watch(name: str, count: int) -> None:
        operator: Callable[..., Individual] = getattr(evolution, name)

        def watched(rng: np.random.Generator, *arguments: Any) -> Individual:
            seen.update(arguments[:count])
            return operator(rng, *arguments)

        monkeypatch.setattr(evolution, name, watched)

    watch("mutate", 1)
    watch("crossover", 2)
    return seen


def population(scores: list[float]) -> dict[Individual, float]:
    rng = np.random.default_rng(5)
    return {random_individual(rng, SPACE): score for score in scores}


def test_the_best_of_all_scored_so_far_are_the_parents(parents: set[Individual]) -> None:
    scores = population([float(value) for value in np.random.default_rng(0).permutation(30)])
    plan = replace(SMALL, parents=5, mutants=40, crosses=40)
    ask(plan, SPACE, State(3, scores), SEEDS, 0)
    assert parents == {individual for individual, score in scores.items() if score < 5}


def test_failed_individuals_are_no_parents(parents: set[Individual]) -> None:
    scores = population([math.inf, 1.0, math.inf, 2.0, 3.0, math.inf])
    ask(replace(SMALL, parents=6, mutants=40, crosses=40), SPACE, State(1, scores), SEEDS, 0)
    assert parents == {individual for individual, score in scores.items() if math.isfinite(score)}


def test_the_two_parents_of_a_cross_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = []
    real = crossover

    def watched(rng: np.random.Generator, first: Individual, second: Individual, *rest: Any) -> Individual:
        pairs.append((first, second))
        return real(rng, first, second, *rest)

    monkeypatch.setattr(evolution, "crossover", watched)
    ask(replace(SMALL, mutants=0, crosses=20), SPACE, State(1, population([1.0, 2.0, 3.0])), SEEDS, 0)
    assert len(pairs) >= 20
    assert all(first != second for first, second in pairs)


def test_a_single_parent_has_mutants_only() -> None:
    state = State(1, population([1.0, math.inf]))
    children = ask(SMALL, SPACE, state, SEEDS, 0)
    assert [child.origin for child in children] == ["mutant"] * 7


def test_where_all_failed_the_children_are_random() -> None:
    state = State(1, population([math.inf] * 5))
    children = ask(SMALL, SPACE, state, SEEDS, 0)
    assert [child.origin for child in children] == ["random"] * 7
    assert not {child.individual for child in children} & state.scores.keys()


def test_equal_scores_rank_by_key(parents: set[Individual]) -> None:
    state = State(1, population([2.0] * 20))
    ranked = [individual for individual, _ in state.ranked()]
    assert ranked == sorted(state.scores, key=lambda individual: individual.key)
    assert ranked == [individual for individual, _ in shuffled(state).ranked()]
    ask(replace(SMALL, parents=4, mutants=40), SPACE, state, SEEDS, 0)
    assert parents == set(ranked[:4])


def test_failed_individuals_rank_last() -> None:
    scores = population([5.0, math.nan, 1.0, math.inf, -math.inf, 3.0])
    state = tell(State(), scores)
    assert [score for _, score in state.ranked()] == [1.0, 3.0, 5.0, math.inf, math.inf, math.inf]


def test_tell_adds_to_what_is_known_and_leaves_the_old_state_alone() -> None:
    first, second = population([1.0, 2.0]), {SEEDS["pi"]: 3.0}
    before = tell(State(), first)
    after = tell(before, second)
    assert (before.generation, dict(before.scores)) == (1, first)
    assert (after.generation, dict(after.scores)) == (2, {**first, **second})


@kinds
@pytest.mark.parametrize(
    "space",
    [
        SearchSpace(1, 100, 100, (0,)),
        SearchSpace(1, 100, 103, (0, 1)),
        SearchSpace(2, 100, 100, (4,)),
        SearchSpace(2, 100, 102, (0,)),
        SearchSpace(3, 100, 102, (0,)),
        SearchSpace(32, 100, 100),
    ],
)
def test_small_spaces_are_searched_to_the_last_individual_and_no_further(kind: str, space: SearchSpace) -> None:
    seeds = {"ones": Individual((100,) * space.pairs, space.n_hats[0])}
    asked, state = generations(replace(SMALL, mutation=kind), space, seeds, lambda i: float(sum(i.steps) + i.n_hat))
    assert sum(map(len, asked)) == len(state.scores) == space.size
    assert state.ranked()[0][0] == seeds["ones"]


@kinds
def test_a_space_that_is_almost_used_up_ends_no_ask_in_a_hang(kind: str) -> None:
    """The two last of 1 540 individuals are hardly ever drawn: fewer come back, or none."""
    space = SearchSpace(3, 100, 119, (0,))
    asked: list[Individual] = []
    every = [Individual(steps, 0) for steps in itertools.combinations_with_replacement(range(100, 120), 3)]
    state = State(1, dict.fromkeys(every[:-2], 1.0))
    for seed in range(5):
        asked += [child.individual for child in ask(replace(SMALL, mutation=kind), space, state, {}, seed)]
    assert set(asked) <= set(every[-2:])


def test_the_papers_budget() -> None:
    plan = PRESETS["paper"].evolution
    assert plan == Evolution(64, 32, 16, 16, 40, 0.3, "neighbours")
    assert plan.individuals == 64 + 40 * 32 == 1344
    asked, state = generations(plan, SPACE, SEEDS, distance)
    assert len(state.scores) == 1344
    assert [len(children) for children in asked] == [64] + [32] * 40


def test_above_512k_population_mutants_and_crosses_halve() -> None:
    paper, large = PRESETS["paper"].evolution, PRESETS["paper-xl"].evolution
    assert (large.population, large.mutants, large.crosses) == (paper.population // 2, 8, 8)
    assert (large.generations, large.probability, large.mutation) == (40, 0.3, "neighbours")


# How far below random search's distance the mean of five searches must end. ``range`` only just beats random search.
GAIN = {"neighbours": 0.1, "lognormal": 0.05, "range": 1.0}


@kinds
def test_the_search_beats_random_search_at_equal_budget(kind: str) -> None:
    """The best of the seeds and as many random individuals, against the evolution; five seeds each, none chosen."""
    plan = replace(PRESETS["quick"].evolution, generations=40, mutation=kind)
    evolved, drawn = [], []
    for seed in range(5):
        asked, state = generations(plan, SPACE, SEEDS, distance, seed)
        assert sum(map(len, asked)) == plan.individuals
        evolved.append(state.ranked()[0][1])
        rng = np.random.default_rng(seed)
        rest = [random_individual(rng, SPACE) for _ in range(plan.individuals - len(SEEDS))]
        drawn.append(min(map(distance, [*SEEDS.values(), *rest])))
    assert np.mean(evolved) < GAIN[kind] * np.mean(drawn)
    assert max(evolved) < min(map(distance, SEEDS.values()))


@kinds
def test_the_best_never_gets_worse(kind: str) -> None:
    best, state = math.inf, State()
    while children := ask(replace(SMALL, mutation=kind), SPACE, state, SEEDS, 0):
        state = tell(state, {child.individual: distance(child.individual) for child in children})
        assert state.ranked()[0][1] <= best
        best = state.ranked()[0][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"population": 0}, "at least 1 in population, not 0"),
        ({"parents": 0}, "at least 1 in parents"),
        ({"mutants": -1}, "mutants cannot be negative"),
        ({"crosses": -1}, "crosses cannot be negative"),
        ({"generations": -1}, "generations cannot be negative"),
        ({"probability": 0.0}, "probability"),
        ({"probability": 1.01}, "probability"),
        ({"probability": math.nan}, "probability"),
        ({"mutation": "gaussian"}, "not 'gaussian'"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LongRopeError, match=message):
        Evolution(**change)
