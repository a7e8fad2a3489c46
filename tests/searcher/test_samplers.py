"""Samplers: never the same twice, the same again from a cold start, seeds kept, and better than drawing at random."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searcher import samplers
from searcher.baselines import BASELINES
from searcher.errors import LongRopeError
from searcher.evolution import Child, State, learn, tell
from searcher.operators import random_individual
from searcher.pareto import pareto, tradeoffs
from searcher.rope import RopeSpec
from searcher.samplers import SAMPLERS, Sampler, propose
from searcher.space import Individual, SearchSpace

ENGINES = ("cmaes", "tpe", "nsga2")
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
every_engine = pytest.mark.parametrize("name", ENGINES)
SPEC = RopeSpec(10_000.0, 16, 256, 1)
SCALE = 8.0
SPACE = SearchSpace.for_scale(SPEC.pairs, SCALE)
SEEDS = {name: SPACE.snap(BASELINES[name](SPEC, SCALE)) for name in ("pi", "ntk", "yarn")}

# Between the seeds and off all of them: what a search is to find.
HIDDEN = np.log([1, 1.02, 1.3, 2.4, 4.4, 5.2, 7.5, 9.4])


def distance(individual: Individual) -> float:
    """Mean squared distance to HIDDEN in logarithms, and a little for n_hat: convex, lowest at n_hat 16."""
    logarithms = np.log(np.asarray(individual.steps) / 100)
    return float(np.mean((logarithms - HIDDEN) ** 2)) + 0.001 * abs(individual.n_hat - 16)


def stretch(individual: Individual) -> float:
    """What factors cost in short context, the more the larger they are; lowest at ones."""
    return float(np.mean(np.log(np.asarray(individual.steps) / 100) ** 2)) + 0.001 * individual.n_hat


def told(state: State, children: list[Child], score: Callable[[Individual], float]) -> State:
    individuals = [child.individual for child in children]
    return tell(state, {i: score(i) for i in individuals}, {i: stretch(i) for i in individuals})


def search(
    plan: Sampler,
    space: SearchSpace = SPACE,
    seeds: Mapping[str, Individual] = SEEDS,
    score: Callable[[Individual], float] = distance,
    seed: int = 0,
    cold: bool = False,
) -> tuple[list[list[Child]], State]:
    """A search to its end: every generation's children, and what is known then. Cold: killed after every one."""
    state, asked = State(), []
    while True:
        if cold:
            samplers._LATEST.clear()
        children = propose(plan, space, state, seeds, seed)
        if not children:
            return asked, state
        asked.append(children)
        state = told(state, children, score)


def drawn(count: int, seed: int = 3, space: SearchSpace = SPACE) -> list[Individual]:
    rng = np.random.default_rng(seed)
    return [random_individual(rng, space) for _ in range(count)]


@every_sampler
@pytest.mark.parametrize("space", [SPACE, SearchSpace.for_critical(8, SCALE, 3), SearchSpace(8, 57, 300, (0, 4))])
def test_all_children_lie_in_the_space_and_none_is_asked_for_twice(name: str, space: SearchSpace) -> None:
    seeds = {name: space.snap(BASELINES[name](SPEC, SCALE)) for name in ("pi", "ntk")}
    asked, state = search(Sampler(name, 8, 6, 4), space, seeds)
    individuals = [child.individual for children in asked for child in children]
    assert len(set(individuals)) == len(individuals) == len(state.scores) == 8 + 4 * 6
    assert all(individual in space for individual in individuals)
    assert [len(children) for children in asked] == [8, 6, 6, 6, 6]


@every_sampler
def test_generation_0_holds_all_seeds_first(name: str) -> None:
    for population in (1, 8):
        children = propose(Sampler(name, population), SPACE, State(), {**SEEDS, "again": SEEDS["pi"]}, 0)
        assert [child.origin for child in children[:3]] == ["seed:pi+again", "seed:ntk", "seed:yarn"]
        assert [child.individual for child in children[:3]] == list(SEEDS.values())
        assert {child.origin for child in children[3:]} <= {"mutant", name}
        assert len(children) == max(3, population)


@every_sampler
def test_without_seeds_a_search_starts_all_the_same(name: str) -> None:
    asked, _ = search(Sampler(name, 5, 4, 2), seeds={})
    assert [len(children) for children in asked] == [5, 4, 4]


@every_engine
def test_children_are_the_engines_own_where_the_space_is_wide(name: str) -> None:
    asked, _ = search(Sampler(name, 8, 6, 4))
    assert {child.origin for children in asked[1:] for child in children} == {name}


@every_sampler
@pytest.mark.parametrize("seed", [0, 1])
def test_a_search_killed_after_every_generation_takes_the_same_path(name: str, seed: int) -> None:
    """The replay is built anew each time, against one that goes on."""
    plan = Sampler(name, 8, 6, 6)
    assert search(plan, seed=seed, cold=True) == search(plan, seed=seed)


SCRIPT = """
import json, sys
from searcher.evolution import State, tell
from searcher.samplers import Sampler, propose
from searcher.space import Individual, SearchSpace
data = json.load(sys.stdin)
state = State()
for rows in data["generations"]:
    told = [(Individual(tuple(steps), n_hat), long, short) for steps, n_hat, long, short in rows]
    state = tell(state, {i: long for i, long, _ in told}, {i: short for i, _, short in told})
children = propose(Sampler(data["name"], 8, 6, 6), SearchSpace(*data["space"]), state, {}, data["seed"])
print(json.dumps([[list(c.individual.steps), c.individual.n_hat] for c in children]))
"""


@every_engine
def test_another_process_proposes_the_same(name: str) -> None:
    """With other hash seeds, so that no order of a set or of a string's hash plays a part."""
    asked, state = search(Sampler(name, 8, 6, 3))
    wanted = propose(Sampler(name, 8, 6, 6), SPACE, state, {}, 0)
    rows = [
        [[c.individual.steps, c.individual.n_hat, distance(c.individual), stretch(c.individual)] for c in children]
        for children in asked
    ]
    space = [SPACE.pairs, SPACE.lower, SPACE.upper]
    data = json.dumps({"generations": rows, "name": name, "space": space, "seed": 0})
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=data,
        cwd=Path(__file__).resolve().parents[2],
        env={"PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [[list(c.individual.steps), c.individual.n_hat] for c in wanted]
    assert done.stderr == ""


@every_sampler
@given(seed=st.integers(0, 2**40), stage=st.integers(0, 5), scored=st.lists(st.floats(0, 9), min_size=1, max_size=9))
@settings(deadline=None, max_examples=8)
def test_a_proposal_depends_on_its_arguments_alone(name: str, seed: int, stage: int, scored: list[float]) -> None:
    """Nor on numpy's global generator, or on what was asked before; for individuals that no sampler proposed, too."""
    individuals = dict(zip(drawn(len(scored)), scored, strict=True))
    state = tell(State(), individuals, dict.fromkeys(individuals, 1.0))
    plan = Sampler(name, 4, 3, 2)
    first = propose(plan, SPACE, state, SEEDS, seed, stage)
    np.random.default_rng().random()
    np.random.seed(1)
    propose(plan, SPACE, state, SEEDS, seed + 1, stage)
    propose(plan, SPACE, told(state, first, distance), SEEDS, seed, stage)
    assert propose(plan, SPACE, state, SEEDS, seed, stage) == first
    assert not {child.individual for child in first} & individuals.keys()


@every_sampler
def test_seed_stage_and_generation_all_change_what_is_asked(name: str) -> None:
    plan = Sampler(name, 8, 6, 4)
    _, first = search(replace(plan, generations=1))
    _, second = search(replace(plan, generations=2))
    asked = [
        [child.individual for child in propose(plan, SPACE, state, SEEDS, seed, stage)]
        for state, seed, stage in itertools.product([first, second], [0, 1], [0, 1])
    ]
    assert all(one != other for one, other in itertools.combinations(asked, 2))


@every_engine
def test_a_replay_of_another_history_is_not_gone_on_with(name: str) -> None:
    """The same children with other scores: what is told counts, not what is remembered."""
    plan = Sampler(name, 8, 6, 6)
    _, state = search(replace(plan, generations=2))
    children = propose(plan, SPACE, state, SEEDS, 0)
    worse = told(state, children, lambda individual: -distance(individual))
    warm = propose(plan, SPACE, worse, SEEDS, 0)
    propose(plan, SPACE, told(state, children, distance), SEEDS, 0)
    samplers._LATEST.clear()
    assert propose(plan, SPACE, worse, SEEDS, 0) == warm
    assert propose(plan, SPACE, told(state, children, distance), SEEDS, 0) != warm


@every_sampler
def test_a_child_is_the_same_in_a_shorter_generation(name: str) -> None:
    """CMA-ES and NSGA-II know their population, the others only the children before."""
    _, state = search(Sampler(name, 12, 6, 0))
    long = propose(Sampler(name, 12, 6, 3), SPACE, state, SEEDS, 0)
    short = propose(Sampler(name, 12, 4, 3), SPACE, state, SEEDS, 0)
    if name == "nsga2":
        assert long[:4] != short
    else:
        assert long[:4] == short


def mean_best(name: str, plan: Sampler, runs: int = 3) -> float:
    return float(np.mean([search(replace(plan, name=name), seed=seed)[1].ranked()[0][1] for seed in range(runs)]))


def test_cmaes_and_tpe_beat_random_search_at_equal_budget() -> None:
    """On a smooth loss, against both floors; three seeds each, none chosen."""
    plan = Sampler(population=12, batch=12, generations=8)
    floor = min(mean_best("random", plan), mean_best("random-log", plan))
    assert mean_best("cmaes", plan) < 0.5 * floor
    assert mean_best("tpe", plan) < 0.8 * floor


def test_log_uniform_draws_are_the_harder_floor() -> None:
    plan = Sampler(population=12, batch=12, generations=14)
    assert mean_best("random-log", plan) < mean_best("random", plan)


def volume(state: State) -> float:
    """The area below (2, 2) that the front dominates."""
    area, above = 0.0, 2.0
    for row in pareto(tradeoffs(state)):
        if row.long < 2 and row.short < above:
            area += (2 - row.long) * (above - row.short)
            above = row.short
    return area


def test_nsga2_beats_random_search_on_both_losses_together() -> None:
    plan = Sampler("nsga2", population=20, batch=20, generations=12)
    floor = replace(plan, name="random-log")
    found = [volume(search(plan, seed=seed)[1]) for seed in range(3)]
    by_chance = [volume(search(floor, seed=seed)[1]) for seed in range(3)]
    assert min(found) > max(by_chance)


def test_cmaes_starts_at_the_best_of_generation_0() -> None:
    """Its draws lie around it: their middle is nearer to it than to any seed that scored worse."""
    start = Individual((100, 110, 140, 190, 250, 330, 600, 640), 16)
    others = dict.fromkeys([*SEEDS.values(), *drawn(5)], 2.0)
    state = tell(State(), {**others, start: 1.0})
    children = propose(Sampler("cmaes", 4, 200, 2), SPACE, state, {}, 0)
    middle = np.mean([np.log(child.individual.steps) for child in children], axis=0)
    away = {i: float(np.linalg.norm(middle - np.log(i.steps))) for i in state.scores}
    assert min(away, key=away.__getitem__) == start
    assert abs(np.mean([SPACE.n_hats.index(child.individual.n_hat) for child in children]) - 6) < 1


def test_cmaes_walks_as_the_algorithm_itself_does() -> None:
    """Against the package that Optuna calls, told the same grid points by hand: the next generation's mean is its."""
    from cmaes import SepCMA

    plan = Sampler("cmaes", 6, 10, 3)
    asked, state = search(replace(plan, generations=1))
    start = min((c.individual for c in asked[0]), key=distance)
    chart = samplers._Chart(SPACE, start)
    points = [(np.array(list(chart.coordinates(c.individual).values())) + 0.5, c.individual) for c in asked[1]]
    oracle = SepCMA(mean=np.full(9, 0.5), sigma=1 / 6, population_size=10, seed=1)
    for _ in points:
        oracle.ask()
    oracle.tell([(point, distance(individual)) for point, individual in points])
    propose(plan, SPACE, state, SEEDS, 0)
    replay = samplers._LATEST[plan, SPACE]
    (trial,) = [t for t in replay.study.trials if t.number == len(state.scores)]
    parts = {k: v for k, v in trial.system_attrs.items() if k.startswith("sepcma:optimizer")}
    stored = pickle.loads(bytes.fromhex("".join(parts[f"sepcma:optimizer:{i}"] for i in range(len(parts)))))
    np.testing.assert_allclose(stored.mean, oracle.mean, rtol=1e-12)
    assert stored._sigma == pytest.approx(oracle._sigma)


@every_engine
def test_the_grid_points_that_were_scored_are_what_an_engine_is_told(name: str) -> None:
    """Every trial decodes to its individual, under its score, in ask order.

    But for individuals of generation 0 that lie outside of CMA-ES's box: it does not look at them.
    """
    plan = Sampler(name, 8, 6, 6)
    _, state = search(replace(plan, generations=3))
    propose(plan, SPACE, state, SEEDS, 0)
    replay = samplers._LATEST[plan, SPACE]
    trials = replay.study.trials[: len(state.scores)]
    first = 8 if name == "cmaes" else 0
    assert [replay.chart.individual(trial.params) for trial in trials][first:] == list(state.scores)[first:]
    assert [trial.values[0] for trial in trials] == list(state.scores.values())
    if name == "nsga2":
        assert [trial.values[1] for trial in trials] == list(state.short.values())


@every_sampler
def test_every_n_hat_can_be_reached(name: str) -> None:
    """Where the score asks for the last choice, a search from 0 gets there."""
    space = SearchSpace(2, 100, 300)
    start = tell(State(), {Individual((120, 200), 0): 0.0}, {Individual((120, 200), 0): 0.0})
    asked: list[Individual] = []
    for _ in range(6):
        children = propose(Sampler(name, 4, 24, 6), space, start, {}, 0)
        asked += [child.individual for child in children if child.origin == name]
        start = told(start, children, lambda i: -space.n_hats.index(i.n_hat))
    assert max(individual.n_hat for individual in asked) == space.n_hats[-1]


@every_engine
def test_failed_individuals_harm_nobody(name: str) -> None:
    def failing(individual: Individual) -> float:
        return math.inf if individual.key < "8" else distance(individual)

    plan = Sampler(name, 8, 6, 6)
    warm, state = search(plan, score=failing)
    assert any(math.isinf(score) for score in state.scores.values())
    assert sum(map(len, warm)) == plan.individuals
    assert search(plan, score=failing, cold=True)[0] == warm


@every_engine
def test_where_all_failed_the_search_goes_on(name: str) -> None:
    asked, _ = search(Sampler(name, 6, 4, 3), score=lambda _: math.inf)
    assert [len(children) for children in asked] == [6, 4, 4, 4]


@every_engine
def test_individuals_that_no_generation_asked_for_are_learnt_from(name: str) -> None:
    refined, other = Individual((100, 102, 130, 240, 440, 520, 750, 940), 16), drawn(1)[0]
    plan = Sampler(name, 8, 6, 4)
    states = []
    for extra in (refined, other):
        first = tell(learn(State(), {extra: distance(extra)}), {i: distance(i) for i in SEEDS.values()})
        states.append(replace(first, short={i: stretch(i) for i in first.scores}))
    children, others = (propose(plan, SPACE, state, SEEDS, 0) for state in states)
    assert children != others
    assert refined not in {child.individual for child in children}


@every_sampler
@pytest.mark.parametrize(
    "space",
    [
        SearchSpace(1, 100, 100, (0,)),
        SearchSpace(1, 100, 103, (0, 1)),
        SearchSpace(2, 100, 100, (0, 4)),
        SearchSpace(2, 100, 102, (0,)),
        SearchSpace(3, 100, 102, (0,)),
        SearchSpace(8, 100, 100),
    ],
)
def test_small_spaces_are_searched_to_the_last_individual_and_no_further(name: str, space: SearchSpace) -> None:
    seeds = {"ones": Individual((100,) * space.pairs, space.n_hats[0])}
    asked, state = search(Sampler(name, 3, 3, 8), space, seeds, lambda i: float(sum(i.steps) + i.n_hat))
    assert sum(map(len, asked)) == len(state.scores) == space.size
    assert state.ranked()[0][0] == seeds["ones"]


@every_sampler
def test_a_space_that_is_almost_used_up_ends_no_proposal_in_a_hang(name: str) -> None:
    space = SearchSpace(3, 100, 111, (0,))
    every = [Individual(steps, 0) for steps in itertools.combinations_with_replacement(range(100, 112), 3)]
    state = tell(State(), dict.fromkeys(every[:-2], 1.0), dict.fromkeys(every[:-2], 1.0))
    asked = [child.individual for seed in range(2) for child in propose(Sampler(name, 4, 3, 2), space, state, {}, seed)]
    assert set(asked) <= set(every[-2:])


@every_sampler
def test_nothing_is_asked_for_after_the_last_generation(name: str) -> None:
    plan = Sampler(name, 5, 4, 2)
    asked, state = search(plan)
    assert sum(map(len, asked)) == plan.individuals == 13
    assert propose(plan, SPACE, state, SEEDS, 0) == []


@every_engine
def test_optuna_says_nothing_and_is_left_as_it_was(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    import optuna

    level = optuna.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(Sampler(name, 6, 4, 2))
    assert optuna.logging.get_verbosity() == level
    assert capfd.readouterr() == ("", "")


def test_two_objectives_need_short_documents() -> None:
    state = tell(State(), {i: distance(i) for i in SEEDS.values()})
    with pytest.raises(LongRopeError, match="nothing was scored on short documents"):
        propose(Sampler("nsga2"), SPACE, state, SEEDS, 0)
    assert [name for name in SAMPLERS if Sampler(name).two_objectives] == ["nsga2"]


def test_batches_that_hold_more_than_was_scored_are_a_bug_and_not_a_proposal() -> None:
    with pytest.raises(RuntimeError, match="batches"):
        propose(Sampler("tpe"), SPACE, State(1, {SEEDS["pi"]: 1.0}, (2,)), SEEDS, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "annealing"}, "one of random, random-log, cmaes, tpe, nsga2, not 'annealing'"),
        ({"population": 0}, "at least 1 in population, not 0"),
        ({"batch": 1}, "cmaes needs at least 2 in batch, not 1"),
        ({"name": "nsga2", "batch": 2}, "nsga2 needs at least 3 in batch, not 2"),
        ({"name": "tpe", "batch": 0}, "tpe needs at least 1 in batch"),
        ({"generations": -1}, "generations cannot be negative"),
        ({"generations": 10**7}, "more than 10000000 individuals"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LongRopeError, match=message):
        Sampler(**change)
