"""The front of long against short loss, against brute force."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searcher.evolution import State, tell
from searcher.pareto import Tradeoff, pareto, tradeoffs
from searcher.space import Individual

LOSSES = st.one_of(st.integers(0, 4).map(float), st.floats(-5, 5), st.sampled_from([math.inf, math.nan, -math.inf]))


def row(number: int, long: float, short: float) -> Tradeoff:
    return Tradeoff(Individual((100 + number,), 0), long, short)


ROWS = st.lists(st.tuples(LOSSES, LOSSES), max_size=12).map(
    lambda pairs: [row(number, *pair) for number, pair in enumerate(pairs)]
)


def dominates(one: Tradeoff, other: Tradeoff) -> bool:
    no_worse = one.long <= other.long and one.short <= other.short
    return no_worse and (one.long < other.long or one.short < other.short)


def finite(rows: list[Tradeoff]) -> list[Tradeoff]:
    return [each for each in rows if math.isfinite(each.long) and math.isfinite(each.short)]


@given(ROWS)
@settings(deadline=None, max_examples=300)
def test_the_front_is_exactly_what_no_other_dominates(rows: list[Tradeoff]) -> None:
    usable = finite(rows)
    wanted = [each for each in usable if not any(dominates(other, each) for other in usable)]
    front = pareto(rows)
    assert sorted(front, key=repr) == sorted(wanted, key=repr)


@given(ROWS, st.randoms())
@settings(deadline=None, max_examples=100)
def test_the_front_is_ordered_and_does_not_depend_on_the_order_of_the_rows(
    rows: list[Tradeoff], random: object
) -> None:
    front = pareto(rows)
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert pareto(shuffled) == front
    assert pareto(front) == front
    assert [each.long for each in front] == sorted(each.long for each in front)
    assert [each.short for each in front] == sorted((each.short for each in front), reverse=True)


def test_rows_with_the_same_losses_all_stay() -> None:
    rows = [row(0, 1.0, 2.0), row(1, 2.0, 1.0), row(2, 1.0, 2.0), row(3, 2.0, 2.0), row(4, 1.0, 3.0)]
    assert {each.individual.steps[0] for each in pareto(rows)} == {100, 101, 102}


def test_nothing_has_no_front() -> None:
    assert pareto([]) == pareto([row(0, math.inf, 1.0), row(1, 1.0, math.nan)]) == []


def test_a_state_gives_the_individuals_with_both_losses_in_ask_order() -> None:
    one, two, three = (Individual((step,), 0) for step in (300, 100, 200))
    state = tell(tell(State(), {one: 3.0}, {one: 1.0}), {two: 2.0, three: 1.0}, {three: 5.0})
    assert tradeoffs(state) == [Tradeoff(one, 3.0, 1.0), Tradeoff(three, 1.0, 5.0)]


def test_perplexities_are_exponentials_of_the_losses() -> None:
    assert row(0, math.log(8.0), 0.0).perplexities == pytest.approx((8.0, 1.0))
    assert row(0, math.inf, 800.0).perplexities == (math.inf, math.inf)
