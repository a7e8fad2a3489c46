"""One step of a refinement is Adam's, by a plain loop, and the projection back to the space is the nearest point."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from searcher.descent import FIRST_MOMENT, SECOND_MOMENT, TINY, Descent, Refinement, descend
from searcher.errors import LongRopeError
from searcher.rope import Factors, RopeSpec
from searcher.space import SearchSpace, isotonic

Array = npt.NDArray[np.float64]
PAIRS = 6
FREQUENCIES = tuple(RopeSpec(10_000.0, 2 * PAIRS, 256, 2).inverse_frequencies().tolist())
SPACE = SearchSpace.for_scale(PAIRS, 8.0)
WIDE = SearchSpace(PAIRS, 1, 10**9)  # no bound is met
START = Factors((1.0, 1.3, 2.0, 3.1, 5.0, 8.0), 4, 1.2)

numbers = st.floats(-5, 5, allow_nan=False)
gradients = st.lists(st.tuples(*[numbers] * (PAIRS + 1)), min_size=1, max_size=5)
rising = st.lists(st.floats(1.0, 10.0), min_size=PAIRS, max_size=PAIRS).map(sorted)


def descended(
    space: SearchSpace, found: list[Any], how: Refinement, start: Factors = START, share: float = 1
) -> Descent:
    descent = Descent.start(start)
    for gradient in found:
        descent = descend(descent, gradient, how, share, space, FREQUENCIES)
    return descent


def by_hand(found: list[tuple[float, ...]], how: Refinement, share: float = 1) -> list[float]:
    """Adam as in its paper (arXiv 1412.6980), number by number: where no bound and no order is in the way."""
    point = [*np.log(START.by_layer()[0]).tolist(), math.log(START.attention_factor)]
    m, v = [0.0] * (PAIRS + 1), [0.0] * (PAIRS + 1)
    for t, gradient in enumerate(found, start=1):
        for i, g in enumerate(gradient):
            m[i] = FIRST_MOMENT * m[i] + (1 - FIRST_MOMENT) * g
            v[i] = SECOND_MOMENT * v[i] + (1 - SECOND_MOMENT) * g * g
            size = how.rate if i == PAIRS else min(how.rate, how.phase / FREQUENCIES[i])
            size *= share * (how.steps - t + 1) / how.steps
            slope, root = m[i] / (1 - FIRST_MOMENT**t), math.sqrt(v[i] / (1 - SECOND_MOMENT**t))
            if i < PAIRS or how.attention:
                point[i] -= size * slope / (root + TINY)
    return point


@given(gradients, st.booleans(), st.floats(0.1, 1.0))
@settings(deadline=None)
def test_steps_are_adams(found: list[tuple[float, ...]], attention: bool, share: float) -> None:
    """By so little at a time that nothing comes near its neighbour."""
    how = Refinement(steps=7, rate=0.01, phase=0.005, attention=attention)
    descent = descended(WIDE, list(found), how, share=share)
    expected = by_hand(found, how, share)
    np.testing.assert_allclose([*descent.logs, descent.log_attention], expected, rtol=0, atol=1e-13)
    assert descent.step == len(found)


def test_the_first_step_goes_as_far_as_stated_whatever_the_gradients_size() -> None:
    how = Refinement(steps=10, rate=0.15, phase=0.06, attention=True)
    sizes = [0.06 / f if 0.06 / f < 0.15 else 0.15 for f in FREQUENCIES]
    for factor in (1e-6, 1.0, 1e6):
        descent = descended(WIDE, [(-factor,) * 7], how, Factors((1.0, 2.0, 4.0, 8.0, 16.0, 32.0)), share=0.5)
        np.testing.assert_allclose(descent.logs - np.log([1, 2, 4, 8, 16, 32]), 0.5 * np.array(sizes), rtol=1e-5)
        assert descent.log_attention == pytest.approx(0.5 * 0.15, rel=1e-5)
    assert sizes[0] == 0.06
    assert sizes[-1] == 0.15


def test_without_frequencies_all_pairs_go_by_the_rate() -> None:
    descent = descend(Descent.start(START), (-1.0,) * 7, Refinement(rate=0.1), 1.0, WIDE, ())
    np.testing.assert_allclose(descent.logs - np.log(START.by_layer()[0]), 0.1)


def nearest(values: Array, weights: Array, lower: float, upper: float) -> Array:
    """The nearest non-decreasing sequence within bounds, by a solver of quadratic programmes."""
    result = minimize(
        lambda x: float(weights @ (x - values) ** 2),
        np.full(len(values), (lower + upper) / 2),
        jac=lambda x: 2 * weights * (x - values),
        bounds=[(lower, upper)] * len(values),
        constraints={"type": "ineq", "fun": np.diff, "jac": lambda x: np.diff(np.eye(len(x)), axis=0)},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    return np.asarray(result.x)


def blocks(values: Array, weights: Array) -> Array:
    """The nearest non-decreasing sequence by trying all ways to cut it into blocks of one weighted mean each."""
    best, least = values, math.inf
    for cuts in range(2 ** (len(values) - 1)):
        ends = [i + 1 for i in range(len(values)) if i == len(values) - 1 or cuts >> i & 1]
        pieces, start = [], 0
        for end in ends:
            mean = float(np.average(values[start:end], weights=weights[start:end]))
            pieces.append(np.full(end - start, mean))
            start = end
        tried = np.concatenate(pieces)
        off = float(weights @ (tried - values) ** 2)
        if off < least and np.all(np.diff(tried) >= 0):
            best, least = tried, off
    return best


@given(st.lists(st.tuples(numbers, st.floats(1e-3, 1e3)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_isotonic_is_the_nearest_by_weighted_squares(rows: list[tuple[float, float]]) -> None:
    values, weights = (np.array(column) for column in zip(*rows, strict=True))
    found = isotonic(values, weights)
    assert np.all(np.diff(found) >= 0)
    np.testing.assert_allclose(found, blocks(values, weights), atol=1e-9)
    np.testing.assert_allclose(isotonic(values), blocks(values, np.ones(len(values))), atol=1e-9)
    np.testing.assert_array_equal(isotonic(values), isotonic(values, np.ones(len(values))))
    np.testing.assert_array_equal(isotonic(values, 2 * weights), found)
    np.testing.assert_allclose(isotonic(found, weights), found, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("seed", range(8))
def test_a_step_ends_at_the_nearest_point_of_the_space_in_its_own_metric(seed: int) -> None:
    """The one that a solver finds, bounds and order together; slopes differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    how = Refinement(steps=5, rate=1.5, phase=0.3)
    start = Factors(tuple(np.sort(rng.uniform(1, 10, PAIRS)).tolist()))
    found = [tuple((rng.normal(size=PAIRS + 1) * 10 ** rng.uniform(-1, 1, PAIRS + 1)).tolist()) for _ in range(2)]
    before = descended(SPACE, found[:1], how, start)
    after = descend(before, found[1], how, 1.0, SPACE, FREQUENCIES)
    first = FIRST_MOMENT * before.first + (1 - FIRST_MOMENT) * np.array(found[1])
    second = SECOND_MOMENT * before.second + (1 - SECOND_MOMENT) * np.array(found[1]) ** 2
    sizes = np.minimum(how.rate, how.phase / np.array(FREQUENCIES))
    root = np.sqrt(second / (1 - SECOND_MOMENT**2))[:-1]
    aimed = before.logs - 4 / 5 * sizes * first[:-1] / (1 - FIRST_MOMENT**2) / root
    weights = root / sizes
    expected = nearest(aimed, weights / weights.max(), 0.0, math.log(10.0))
    np.testing.assert_allclose(after.logs, expected, atol=2e-5)
    assert np.any(np.diff(after.logs) == 0) or np.any(after.logs != aimed)


def test_where_neighbours_are_pooled_those_that_matter_decide() -> None:
    start = Factors((2.0,) * PAIRS)
    slopes = (
        5.0,
        *(-1e-3,) * (PAIRS - 2),
        -5.0,
        0.0,
    )  # the first would go down, the last up, and those between as well
    down = descended(WIDE, [slopes], Refinement(rate=0.1, phase=10.0), start).logs - math.log(2)
    assert down[0] == pytest.approx(-0.1, rel=1e-6)
    assert down[-1] == pytest.approx(0.1, rel=1e-6)
    slopes = (-5.0, *(1e-3,) * (PAIRS - 1), 0.0)  # the first would go up, all others down and hardly matter
    up = descended(WIDE, [slopes], Refinement(rate=0.1, phase=10.0), start).logs - math.log(2)
    assert np.all(up > 0.09)


@pytest.mark.parametrize("critical", [0, 1, 3, PAIRS - 1])
@given(found=gradients, start=rising, rate=st.floats(0.01, 3.0), n_hat=st.sampled_from([0, 4, 256]))
@settings(deadline=None, max_examples=30)
def test_every_point_is_in_the_space(
    critical: int, found: list[tuple[float, ...]], start: list[float], rate: float, n_hat: int
) -> None:
    space = SearchSpace.for_critical(PAIRS, 2.0, critical, upper_ratio=3.0) if critical else SPACE
    begun = space.snap(Factors(tuple(start), n_hat)).factors(1.2)
    how = Refinement(steps=5, rate=rate, phase=rate, attention=True)
    descent = Descent.start(begun)
    for gradient in found:
        descent = descend(descent, gradient, how, 1.0, space, FREQUENCIES)
        lambdas = np.array(descent.factors.by_layer()[0])
        assert descent.factors.n_hat == n_hat
        assert np.all(np.diff(descent.logs) >= 0)
        assert np.all(lambdas[critical:] >= space.lower / 100 * (1 - 1e-12))
        assert np.all(lambdas[critical:] <= space.upper / 100 * (1 + 1e-12))
        np.testing.assert_allclose(space.project(lambdas * 100) / 100, lambdas, rtol=1e-12)
        assert space.repair(lambdas * 100, n_hat) in space


def test_a_point_at_rest_stays_and_keeps_every_bit_it_has() -> None:
    descent = Descent.start(START)
    assert descent.factors.n_hat == START.n_hat
    np.testing.assert_allclose(descent.factors.by_layer()[0], START.by_layer()[0], rtol=1e-15)
    still = descended(SPACE, [(0.0,) * 7] * 3, Refinement(attention=True))
    np.testing.assert_array_equal(still.logs, descent.logs)
    assert still.log_attention == descent.log_attention


@pytest.mark.parametrize("broken", [None, (math.nan,) * 7, (1.0,) * 6 + (math.inf,)])
def test_a_step_without_a_gradient_is_left_out_and_counts(broken: tuple[float, ...] | None) -> None:
    before = descended(SPACE, [(1.0,) * 7], Refinement())
    after = descend(before, broken, Refinement(), 1.0, SPACE, FREQUENCIES)
    assert after == replace(before, step=2)


def test_it_converges_where_the_best_point_is_monotone() -> None:
    """A bowl with curvatures a thousand apart, and a little noise on its slopes."""
    target = np.log([1.05, 1.2, 1.9, 4.0, 6.5, 9.0])
    curvature = np.array([30.0, 3.0, 1.0, 0.3, 10.0, 0.03])
    rng = np.random.default_rng(0)
    how = Refinement(steps=200, rate=0.15, phase=0.15, attention=True)
    descent = Descent.start(Factors((8.0,) * PAIRS, 0, 1.5))
    for _ in range(how.steps):
        slope = curvature * (descent.logs - target) * (1 + 0.05 * rng.normal(size=PAIRS))
        attention = descent.log_attention - math.log(1.1)
        descent = descend(descent, (*slope.tolist(), attention), how, 1.0, SPACE, FREQUENCIES)
    np.testing.assert_allclose(descent.logs, target, atol=5e-3)
    assert descent.factors.attention_factor == pytest.approx(1.1, rel=5e-3)


def test_where_the_best_point_is_not_monotone_it_ends_at_the_best_that_is() -> None:
    target = np.log([1.2, 4.0, 1.9, 4.0, 20.0, 5.0])
    curvature = np.array([3.0, 2.0, 1.0, 1.0, 1.0, 2.0])
    how = Refinement(steps=400, rate=0.1, phase=0.1)
    descent = Descent.start(Factors((8.0,) * PAIRS))
    for _ in range(how.steps):
        slope = curvature * (descent.logs - target)
        descent = descend(descent, (*slope.tolist(), 0.0), how, 1.0, SPACE, FREQUENCIES)
    expected = nearest(target, curvature, 0.0, math.log(10.0))
    loss, least = (float(curvature @ (x - target) ** 2) for x in (descent.logs, expected))
    assert loss <= least * 1.02 + 1e-3
    assert np.all(np.diff(descent.logs) >= 0)


def test_a_gradient_in_a_critical_space_is_that_by_its_own_coordinates() -> None:
    """Below the critical pair ln lambda follows: the chain rule, against differences of a function."""
    space = SearchSpace.for_critical(PAIRS, 2.0, 3)
    target = np.linspace(0.1, 1.4, PAIRS)

    def point(searched: Array) -> Array:
        return np.concatenate([np.arange(3) / 3 * searched[0], searched])

    def loss(searched: Array) -> float:
        return float(np.sum(np.arange(1, PAIRS + 1) * (point(searched) - target) ** 2))

    searched = np.array([0.8, 1.0, 1.2])
    alone = 2 * np.arange(1, PAIRS + 1) * (point(searched) - target)
    steps = 1e-6 * np.eye(3)
    expected = [(loss(searched + step) - loss(searched - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(space.free_gradient(alone), [0.0] * 3 + expected, rtol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"legs": -1},
        {"final_legs": -1},
        {"starts": 0},
        {"rate": 0.0},
        {"rate": math.nan},
        {"phase": -1.0},
        {"phase": math.inf},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(LongRopeError, match=name):
        Refinement(**wrong)


def test_gradients_are_counted() -> None:
    assert Refinement(steps=5, legs=2, final_legs=3, starts=4).gradients == 5 * (2 * 4 + 3)
