"""Children never leave the space, every factor can move, and nothing loops where there is nothing to find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searcher.errors import LongRopeError
from searcher.operators import MUTATIONS, check_mutation, crossover, mutate, random_individual
from searcher.space import N_HATS, Individual, SearchSpace

kinds = pytest.mark.parametrize("kind", MUTATIONS)
WIDE = SearchSpace(8, 100, 10_000)
SPREAD = Individual(tuple(1000 * i + 500 for i in range(8)), 16)
PLATEAU = Individual((800,) * 8, 0)


@st.composite
def families(draw: st.DrawFn) -> tuple[SearchSpace, Individual, Individual]:
    """A space, narrow ones, single pairs and critical ones included, and two individuals in it."""
    pairs = draw(st.integers(1, 10))
    critical = draw(st.just(0) | st.integers(0, pairs - 1))
    lower = draw(st.integers(100 if critical else 1, 200))
    n_hats = tuple(sorted(draw(st.sets(st.sampled_from(N_HATS), min_size=1, max_size=4))))
    space = SearchSpace(pairs, lower, lower + draw(st.sampled_from([0, 1, 2, 30, 2000])), n_hats, critical)
    steps = st.lists(st.integers(space.lower, space.upper), min_size=space.free, max_size=space.free)
    first, second = (Individual(space.completed(sorted(draw(steps))), draw(st.sampled_from(n_hats))) for _ in range(2))
    return space, first, second


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@kinds
@given(families(), st.integers(0, 2**32), st.floats(0.001, 1.0))
@settings(deadline=None, max_examples=100)
def test_children_are_in_the_space(
    kind: str, family: tuple[SearchSpace, Individual, Individual], seed: int, probability: float
) -> None:
    space, first, second = family
    assert mutate(rng(seed), first, space, probability, kind) in space
    assert crossover(rng(seed), first, second, space, kind) in space
    assert random_individual(rng(seed), space) in space


@kinds
@given(families(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_the_same_draws_make_the_same_child(
    kind: str, family: tuple[SearchSpace, Individual, Individual], seed: int
) -> None:
    space, first, second = family
    assert mutate(rng(seed), first, space, 0.3, kind) == mutate(rng(seed), first, space, 0.3, kind)
    assert crossover(rng(seed), first, second, space, kind) == crossover(rng(seed), first, second, space, kind)
    assert random_individual(rng(seed), space) == random_individual(rng(seed), space)


@given(families(), st.integers(0, 2**32), st.floats(0.05, 1.0))
@settings(deadline=None, max_examples=100)
def test_neighbours_bound_every_factor_by_those_beside_it(
    family: tuple[SearchSpace, Individual, Individual], seed: int, probability: float
) -> None:
    """Below by the child's own, above by the parent's: so order holds without a repair."""
    space, parent, _ = family
    child = mutate(rng(seed), parent, space, probability, "neighbours")
    searched, before = child.steps[space.critical :], parent.steps[space.critical :]
    below = (space.lower, *searched[:-1])
    above = (*before[1:], space.upper)
    assert all(low <= step <= high for low, step, high in zip(below, searched, above, strict=True))


@kinds
def test_the_boundary_dimensions_move_both_ways(kind: str) -> None:
    children = [mutate(rng(seed), SPREAD, WIDE, 0.3, kind).steps for seed in range(200)]
    for place in (0, -1):
        moved = {np.sign(steps[place] - SPREAD.steps[place]) for steps in children}
        assert moved == {-1, 0, 1}


@kinds
def test_the_boundary_dimensions_reach_the_bounds(kind: str) -> None:
    space = SearchSpace(3, 100, 106)
    children = [mutate(rng(seed), Individual((102, 103, 104), 0), space, 0.5, kind).steps for seed in range(300)]
    assert min(steps[0] for steps in children) == space.lower
    assert max(steps[-1] for steps in children) == space.upper


@pytest.mark.parametrize("kind", ["range", "lognormal"])
def test_every_factor_of_a_plateau_moves(kind: str) -> None:
    children = np.asarray([mutate(rng(seed), PLATEAU, WIDE, 0.3, kind).steps for seed in range(200)])
    for direction in (children < 800, children > 800):
        assert direction.any(axis=0).all()


def test_between_neighbours_a_plateau_moves_at_its_ends() -> None:
    children = np.asarray([mutate(rng(seed), PLATEAU, WIDE, 0.3, "neighbours").steps for seed in range(200)])
    assert (children[:, 0] < 800).any()
    assert (children[:, -1] > 800).any()


@dataclass(frozen=True)
class Watched(SearchSpace):
    """A space that keeps what it was asked to repair: the mutated factors before the repair moves others."""

    asked: list[npt.NDArray[np.float64]] = field(default_factory=list, compare=False)

    def repair(self, steps: Sequence[float] | npt.NDArray[np.floating], n_hat: int) -> Individual:
        self.asked.append(np.asarray(steps, dtype=np.float64))
        return super().repair(steps, n_hat)


@kinds
@pytest.mark.parametrize("probability", [0.1, 0.3, 0.8])
def test_factors_and_n_hat_change_with_the_stated_probability(kind: str, probability: float) -> None:
    space = Watched(24, 100, 100_000)
    parent = Individual(tuple(4000 * i + 2000 for i in range(24)), 16)
    children = [mutate(rng(seed), parent, space, probability, kind) for seed in range(600)]
    drawn = space.asked if kind != "neighbours" else [np.asarray(child.steps) for child in children]
    changed = np.mean(np.asarray(drawn) != np.asarray(parent.steps))
    # 14 400 draws: four standard deviations are 0.017 at most; a redraw that hits the old value is rarer than 0.001.
    assert changed == pytest.approx(probability, abs=0.017)
    n_hat_changed = np.mean([child.n_hat != parent.n_hat for child in children])
    assert n_hat_changed == pytest.approx(probability * (1 - 1 / len(N_HATS)), abs=4 * 0.5 / 600**0.5)


@kinds
def test_something_is_redrawn_even_where_the_probability_is_tiny(kind: str) -> None:
    """One factor or n_hat, each as often: of 9 places, one is n_hat, and one redraw of it in 14 changes nothing."""
    space = Watched(WIDE.pairs, WIDE.lower, WIDE.upper)
    children = [mutate(rng(seed), SPREAD, space, 1e-9, kind) for seed in range(900)]
    drawn = np.asarray(space.asked if kind != "neighbours" else [child.steps for child in children])
    changed = np.column_stack([drawn != SPREAD.steps, [child.n_hat != SPREAD.n_hat for child in children]])
    assert changed.sum(axis=1).max() == 1
    np.testing.assert_allclose(changed.mean(axis=0), 1 / 9, atol=0.042)


def test_lognormal_steps_come_in_every_size() -> None:
    """From one hundredth of the range, in logarithms, to all of it."""
    space = SearchSpace(1, 100, 100_000, (0,))
    parent = Individual((3162,), 0)
    sizes = [abs(np.log(mutate(rng(s), parent, space, 1.0, "lognormal").steps[0] / 3162)) for s in range(1000)]
    counts, _ = np.histogram(sizes, bins=[0.0, 0.07, 0.7, 10.0])
    assert counts.min() > 100


INTERLEAVED = (Individual((100, 300, 500, 700), 0), Individual((200, 400, 600, 800), 8))


@kinds
def test_a_cross_takes_every_factor_from_either_parent_with_equal_chance(kind: str) -> None:
    first, second = INTERLEAVED
    space = SearchSpace(4, 100, 1000)
    children = [crossover(rng(seed), first, second, space, kind) for seed in range(800)]
    genes = np.asarray([(*child.steps, child.n_hat) for child in children])
    from_first = genes == (*first.steps, first.n_hat)
    from_second = genes == (*second.steps, second.n_hat)
    assert (from_first ^ from_second).all()
    np.testing.assert_allclose(from_first.mean(axis=0), 0.5, atol=4 * 0.5 / 800**0.5)
    assert len({(child.steps, child.n_hat) for child in children}) == 2**5


@kinds
@given(families(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_a_cross_without_a_conflict_needs_no_repair(
    kind: str, family: tuple[SearchSpace, Individual, Individual], seed: int
) -> None:
    space, first, second = family
    one, other = (parent.steps[space.critical :] for parent in (first, second))
    merged = sorted({*one, *other})
    # A second parent between the first one's factors and the next of them: any choice is in order.
    searched = [next((v for v in merged if a < v <= b), a) for a, b in zip(one, (*one[1:], space.upper), strict=True)]
    between = Individual(space.completed(searched), second.n_hat)
    child = crossover(rng(seed), first, between, space, kind)
    pairs = list(zip(child.steps, first.steps, between.steps, strict=True))
    assert all(c in pair for c, *pair in pairs[space.critical :])
    assert child.n_hat in (first.n_hat, between.n_hat)


def test_neighbours_draws_a_cross_again_until_it_is_in_order() -> None:
    """Five of the sixteen crosses are; the others would mix both parents in a repaired factor."""
    first, second = Individual((100, 110, 120, 130), 0), Individual((200, 210, 220, 230), 0)
    space = SearchSpace(4, 100, 1000, (0,))
    children = [crossover(rng(seed), first, second, space, "neighbours").steps for seed in range(300)]
    assert {*children} == {first.steps[:cut] + second.steps[cut:] for cut in range(5)}
    repaired = [crossover(rng(seed), first, second, space, "range").steps for seed in range(300)]
    assert any(step not in (*first.steps, *second.steps) for steps in repaired for step in steps)


def test_a_cross_that_is_hardly_ever_in_order_ends_in_a_repair() -> None:
    space = SearchSpace(64, 100, 1000)
    first, second = Individual((*range(100, 164),), 0), Individual((*range(800, 864),), 0)
    children = [crossover(rng(seed), first, second, space, "neighbours") for seed in range(20)]
    assert all(child in space for child in children)
    assert any(step not in {*first.steps, *second.steps} for child in children for step in child.steps)


@kinds
@pytest.mark.parametrize("pairs", [1, 2, 32])
def test_a_space_of_one_individual_gives_that_one(kind: str, pairs: int) -> None:
    space = SearchSpace(pairs, 100, 100, (4,))
    only = Individual((100,) * pairs, 4)
    for seed in range(20):
        assert mutate(rng(seed), only, space, 0.3, kind) == only
        assert crossover(rng(seed), only, only, space, kind) == only
        assert random_individual(rng(seed), space) == only


@kinds
def test_a_single_pair_moves_over_its_whole_range(kind: str) -> None:
    space = SearchSpace(1, 100, 104, (0,))
    children = {mutate(rng(seed), Individual((102,), 0), space, 0.3, kind).steps[0] for seed in range(400)}
    assert children == {100, 101, 102, 103, 104}


def test_random_individuals_reach_every_corner() -> None:
    space = SearchSpace(2, 100, 102, (0, 1))
    assert len({random_individual(rng(seed), space) for seed in range(400)}) == space.size == 12


def test_mutations_go_by_their_names() -> None:
    for kind in MUTATIONS:
        check_mutation(kind)
    with pytest.raises(LongRopeError, match="neighbours, range, lognormal, not 'Range'"):
        check_mutation("Range")
