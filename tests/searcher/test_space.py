"""The grid, the projection onto it against scipy and brute force, and the key that ties break by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from searcher.baselines import BASELINES
from searcher.errors import LongRopeError
from searcher.rope import Factors, RopeSpec
from searcher.space import GRID, N_HATS, Individual, SearchSpace, isotonic

N_HAT_CHOICES = st.lists(st.sampled_from(N_HATS), min_size=1, unique=True).map(lambda c: tuple(sorted(c)))
SPACES = st.builds(
    lambda pairs, lower, width, n_hats: SearchSpace(pairs, lower, lower + width, n_hats),
    st.integers(1, 8),
    st.integers(1, 300),
    st.integers(0, 900),
    N_HAT_CHOICES,
)
SMALL_SPACES = st.builds(
    lambda pairs, width: SearchSpace(pairs, 100, 100 + width, (0,)), st.integers(1, 4), st.integers(0, 5)
)


@st.composite
def critical_spaces(draw: st.DrawFn, most: int = 8, widest: int = 900) -> SearchSpace:
    """With pairs below the first that is searched, lower bounds of 1.0 among them."""
    pairs = draw(st.integers(2, most))
    lower = draw(st.integers(100, 3000))
    upper = lower + draw(st.integers(0, widest))
    return SearchSpace(pairs, lower, upper, draw(N_HAT_CHOICES), draw(st.integers(1, pairs - 1)))


def values_for(space: SearchSpace, low: float, high: float) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(low, high), min_size=space.pairs, max_size=space.pairs)


def everyone(space: SearchSpace) -> list[Individual]:
    grid = range(space.lower, space.upper + 1)
    searched = combinations_with_replacement(grid, space.pairs - space.critical)
    return [Individual((*below(s[0], space), *s), n) for s in searched for n in space.n_hats]


def below(step: int, space: SearchSpace) -> list[int]:
    """NTK up to the critical pair's factor, on the grid: 1.0 first, then in equal ratios."""
    return [round(GRID * (step / GRID) ** (i / space.critical)) for i in range(space.critical)]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
@example([3.0, 2.0, 1.0])
@example([1.0, 1.0, 1.0])
@example([1e6, 1e-9, -1e6, 0.1])
@settings(deadline=None, max_examples=200)
def test_isotonic_is_scipys(values: list[float]) -> None:
    result = isotonic(np.asarray(values))
    np.testing.assert_allclose(result, isotonic_regression(values).x, rtol=1e-9, atol=1e-9)
    assert np.all(np.diff(result) >= 0)


@given(st.data(), SPACES | critical_spaces())
@settings(deadline=None, max_examples=200)
def test_repair_ends_in_the_space_and_changes_nothing_a_second_time(data: st.DataObject, space: SearchSpace) -> None:
    n_hat = data.draw(st.integers(0, 400))
    repaired = space.repair(data.draw(values_for(space, -500, 3000)), n_hat)
    assert repaired in space
    assert all(type(step) is int for step in repaired.steps)
    assert sorted(repaired.steps) == list(repaired.steps)
    assert space.repair([float(step) for step in repaired.steps], repaired.n_hat) == repaired


@given(st.data(), SMALL_SPACES | critical_spaces(4, 5))
@settings(deadline=None, max_examples=200)
def test_no_individual_is_nearer_than_the_repaired_one(data: st.DataObject, space: SearchSpace) -> None:
    """Nearest on the searched pairs to the values after clipping to the bounds, against all there are."""
    values = data.draw(values_for(space, space.lower - 3, space.upper + 3))
    clipped = [min(max(value, space.lower), space.upper) for value in values]

    def distance(individual: Individual) -> float:
        pairs = list(zip(individual.steps, clipped, strict=True))
        return sum((step - value) ** 2 for step, value in pairs[space.critical :])

    assert distance(space.repair(values, 0)) <= min(map(distance, everyone(space))) + 1e-9


@pytest.mark.parametrize(("wanted", "nearest"), [(0, 0), (1, 0), (2, 0), (3, 4), (6, 4), (7, 8), (999, 8)])
def test_n_hat_moves_to_the_nearest_choice_and_down_at_a_tie(wanted: int, nearest: int) -> None:
    assert SearchSpace(2, 100, 200, (0, 4, 8)).repair([100, 150], wanted).n_hat == nearest


@given(SMALL_SPACES | critical_spaces(4, 5), N_HAT_CHOICES)
@settings(deadline=None, max_examples=60)
def test_size_counts_every_individual(space: SearchSpace, n_hats: tuple[int, ...]) -> None:
    space = replace(space, n_hats=n_hats)
    individuals = everyone(space)
    assert space.size == len(individuals) == len(set(individuals))
    assert all(individual in space for individual in individuals)


@pytest.mark.parametrize(
    "outside",
    [
        Individual((99, 120), 0),
        Individual((100, 201), 0),
        Individual((120, 119), 0),
        Individual((100, 120), 1),
        Individual((100,), 0),
        Individual((100, 110, 120), 0),
    ],
)
def test_what_breaks_a_rule_is_not_in_the_space(outside: Individual) -> None:
    space = SearchSpace(2, 100, 200, (0, 4))
    assert Individual((100, 200), 4) in space
    assert outside not in space


@given(st.data(), critical_spaces())
@settings(deadline=None, max_examples=100)
def test_a_pair_below_the_critical_one_has_no_other_factor_than_its_own(
    data: st.DataObject, space: SearchSpace
) -> None:
    individual = space.repair(data.draw(values_for(space, 0, 4000)), 0)
    i = data.draw(st.integers(0, space.critical - 1))
    moved = list(individual.steps)
    moved[i] += data.draw(st.sampled_from([-1, 1]))
    assert Individual(tuple(moved), individual.n_hat) not in space


@given(st.data(), SPACES | critical_spaces())
@settings(deadline=None, max_examples=150)
def test_the_projection_is_in_order_within_bounds_and_its_own(data: st.DataObject, space: SearchSpace) -> None:
    values = np.asarray(data.draw(values_for(space, -500, 5000)))
    projected = space.project(values)
    searched = projected[space.critical :]
    np.testing.assert_allclose(
        searched, isotonic_regression(np.clip(values[space.critical :], space.lower, space.upper)).x
    )
    assert np.all(np.diff(projected) >= -1e-9)
    for i, value in enumerate(projected[: space.critical]):
        assert math.log(value / GRID) == pytest.approx(math.log(searched[0] / GRID) * i / space.critical)
    np.testing.assert_array_equal(space.project(projected), projected)
    assert np.all(np.abs(np.asarray(space.repair(values, 0).steps) - projected)[space.critical :] <= 0.5)


@given(st.data(), critical_spaces())
@settings(deadline=None, max_examples=60)
def test_the_gradient_by_the_searched_pairs_is_that_of_a_finite_difference(
    data: st.DataObject, space: SearchSpace
) -> None:
    """Of a loss that is a weighted sum of squares of ln lambda, along the curve that the space's pairs move on."""
    weights = np.asarray(data.draw(values_for(space, -2, 2)))
    searched = np.linspace(1.0, 2.0, space.free)

    def all_pairs(logs: np.ndarray) -> np.ndarray:
        return np.concatenate([np.arange(space.critical) / space.critical * logs[0], logs])

    def loss(logs: np.ndarray) -> float:
        return float(weights @ all_pairs(logs) ** 2)

    gradient = space.free_gradient(2 * weights * all_pairs(searched))
    assert np.all(gradient[: space.critical] == 0)
    for j in range(space.free):
        step = 1e-4 * np.eye(space.free)[j]
        expected = (loss(searched + step) - loss(searched - step)) / 2e-4
        assert gradient[space.critical + j] == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_where_every_pair_is_searched_the_gradient_is_what_was_given() -> None:
    gradient = np.array([1.0, -2.0, 3.0])
    np.testing.assert_array_equal(SearchSpace(3, 100, 200).free_gradient(gradient), gradient)


@pytest.mark.parametrize(("scale", "lower", "upper"), [(8.0, 800, 1600), (7.3, 730, 1460), (1.001, 101, 201)])
def test_the_critical_space_lies_between_the_scale_and_twice_the_scale(scale: float, lower: int, upper: int) -> None:
    assert SearchSpace.for_critical(32, scale, 13) == SearchSpace(32, lower, upper, N_HATS, 13)
    assert SearchSpace.for_critical(32, scale, 0, (0, 4)) == SearchSpace(32, lower, upper, (0, 4))
    assert SearchSpace.for_critical(4, 4.0, 1, (0,), upper_ratio=1.25).upper == 500


def test_the_key_is_the_same_for_ever() -> None:
    """Ties break by it, so a change would change the path of studies that exist."""
    assert Individual((100, 150, 800), 4).key == "88e5538dbaf6bb7fb75ef03c27c50341"


@given(st.lists(st.tuples(st.lists(st.integers(1, 120), min_size=1, max_size=3).map(tuple), st.integers(0, 12))))
@settings(deadline=None, max_examples=60)
def test_different_individuals_have_different_keys(parts: list[tuple[tuple[int, ...], int]]) -> None:
    individuals = {Individual(steps, n_hat) for steps, n_hat in parts}
    assert len({individual.key for individual in individuals}) == len(individuals)


@pytest.mark.parametrize("scale", [1.5, 4.0, 8.0, 512.0])
@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("n_hats", [N_HATS, (4, 16)])
def test_every_baseline_snaps_into_the_space(name: str, scale: float, n_hats: tuple[int, ...]) -> None:
    for theta, dim, length in [(10_000.0, 64, 4096), (500_000.0, 128, 8192), (10_000.0, 16, 256)]:
        spec = RopeSpec(theta, dim, length, 1)
        space = SearchSpace.for_scale(spec.pairs, scale, n_hats=n_hats)
        factors = BASELINES[name](spec, scale)
        snapped = space.snap(factors)
        assert snapped in space
        wanted = np.clip(np.asarray(factors.lambdas), space.lower / GRID, space.upper / GRID)
        np.testing.assert_allclose(np.asarray(snapped.steps) / GRID, wanted, atol=0.5 / GRID + 1e-9)


def test_snap_finds_decreasing_factors_their_nearest() -> None:
    space = SearchSpace(4, 100, 1000, (0, 2))
    assert space.snap(Factors((1.004, 4.0, 2.0, 20.0), 3)) == Individual((100, 300, 300, 1000), 2)


def test_the_way_to_factors_and_back_is_exact_for_every_grid_point() -> None:
    steps = np.arange(1, 2_000_001)
    assert np.array_equal(np.rint(steps / GRID * GRID), steps)


@given(SPACES | critical_spaces(), st.data())
@settings(deadline=None, max_examples=100)
def test_individuals_are_their_own_nearest(space: SearchSpace, data: st.DataObject) -> None:
    count = space.pairs - space.critical
    steps = sorted(data.draw(st.lists(st.integers(space.lower, space.upper), min_size=count, max_size=count)))
    individual = Individual((*below(steps[0], space), *steps), data.draw(st.sampled_from(space.n_hats)))
    factors = individual.factors(1.25)
    assert factors.attention_factor == 1.25
    assert space.snap(factors) == individual


@pytest.mark.parametrize(
    ("scale", "ratio", "upper"),
    [(8.0, 1.25, 1000), (512.0, 1.25, 64_000), (7.3, 1.25, 913), (4.0, 1.1, 440), (3.0, 1.3, 390), (1.001, 1.0, 101)],
)
def test_the_upper_bound_is_on_the_grid_and_never_below_what_was_asked(scale: float, ratio: float, upper: int) -> None:
    """1.1 * 4 * 100 and 1.3 * 3 * 100 are a little above a whole number in float64: that is not the next step."""
    space = SearchSpace.for_scale(4, scale, ratio)
    assert (space.lower, space.upper, space.n_hats) == (100, upper, N_HATS)


def test_the_lower_bound_can_be_given() -> None:
    assert SearchSpace.for_scale(4, 2.0, lower=0.57).lower == 57


def test_the_papers_choices_of_n_hat() -> None:
    assert N_HATS == (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
    assert SearchSpace(32, 100, 1000).size == math.comb(932, 32) * 14


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SearchSpace(2, 0, 100), "0 < lower"),
        (lambda: SearchSpace(2, 200, 199), "lower <= upper"),
        (lambda: SearchSpace.for_scale(2, 0.5), "lower <= upper"),
        (lambda: SearchSpace(2, 100, 200, ()), "n_hat"),
        (lambda: SearchSpace(2, 100, 200, (-1, 0)), "n_hat"),
        (lambda: SearchSpace(2, 100, 200, (4, 0)), "ascending"),
        (lambda: SearchSpace(2, 100, 200, (0, 0)), "distinct"),
        (lambda: SearchSpace(2, 100, 200, (0,), 2), "critical pair lies between 0 and 1, not at 2"),
        (lambda: SearchSpace(2, 100, 200, (0,), -1), "critical pair lies between 0 and 1, not at -1"),
        (lambda: SearchSpace(2, 99, 200, (0,), 1), "from 1.0 or above, not from 0.99"),
        (lambda: SearchSpace.for_critical(4, 8.0, 2, upper_ratio=0.9), "lower <= upper"),
        (lambda: SearchSpace(2, 100, 200).repair([100.0], 0), "Expected 2 rescale factors, got 1"),
        (lambda: SearchSpace(2, 100, 200).snap(Factors(((1.0, 1.0), (1.0, 2.0)))), "differ by layer"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(make: Callable[[], object], message: str) -> None:
    with pytest.raises(LongRopeError, match=message):
        make()
