"""Racing against a plain restatement of its rule, and what must hold of it whatever the losses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from searcher.errors import LongRopeError
from searcher.racing import LEAST_SCORED, Cut, Race, Racing

DOCUMENTS = 5
nats = st.floats(10, 1000)
rows = st.lists(st.tuples(*[nats] * DOCUMENTS), min_size=LEAST_SCORED, max_size=24)


def ranked(scored: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    return sorted(scored, key=math.fsum)


def restated(caution: float, best: list[Sequence[float]], k: int, child: Sequence[float]) -> float:
    """The rule as its module states it, in plain loops: a child is left where this is above 0."""
    if len(best) < k or len(best) < 8:
        return -math.inf
    seen, edge = len(child), best[k - 1]
    heads, rests = [], []
    for row in best[: max(2 * k, 8)]:
        heads.append(sum(row[j] - edge[j] for j in range(seen)))
        rests.append(sum(row[j] - edge[j] for j in range(seen, len(edge))))
    below = sum(h * h for h in heads)
    slope = sum(h * r for h, r in zip(heads, rests, strict=True)) / below if below > 0 else 0.0
    slope = max(slope, -1.0)
    variance = sum((r - slope * h) ** 2 for h, r in zip(heads, rests, strict=True)) / max(len(heads) - 2, 1)
    head = sum(child[j] - edge[j] for j in range(seen))
    return head + slope * head - caution * math.sqrt(variance)


@given(rows, st.lists(st.tuples(*[nats] * DOCUMENTS), min_size=1, max_size=6), st.integers(1, 12), st.integers(1, 4))
@settings(deadline=None)
def test_the_rule_is_what_it_says(
    scored: list[tuple[float, ...]], children: list[tuple[float, ...]], k: int, seen: int
) -> None:
    best = ranked(scored)
    losses = [child[:seen] for child in children]
    for caution in (0.0, 0.5, 3.0):
        kept = Race(Racing(caution=caution), best, k).kept(losses)
        for found, child in zip(kept, losses, strict=True):
            excess = restated(caution, best, k, child)
            assert found == (excess <= 0) or abs(excess) < 1e-4, "sums of thousands, and a slope of tiny differences"


@pytest.mark.parametrize(("count", "k"), [(LEAST_SCORED - 1, 2), (11, 12), (0, 1)])
def test_none_is_left_while_too_few_are_scored(count: int, k: int) -> None:
    best = ranked([(10.0 + i, 10.0, 10.0) for i in range(count)])
    assert Race(Racing(caution=0.0), best, k).kept([(1e6,), (5.0,)]) == [True, True]
    full = ranked([(10.0 + i, 10.0, 10.0) for i in range(max(LEAST_SCORED, k))])
    assert Race(Racing(caution=0.0), full, k).kept([(1e6,), (5.0,)]) == [False, True]


@pytest.mark.parametrize("scored", [[], [(10.0 + i, 10.0, 10.0) for i in range(20)]])
@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf])
def test_one_that_failed_does_not_go_on(scored: list[tuple[float, ...]], value: float) -> None:
    race = Race(Racing(caution=1e9), scored, 4)
    assert race.kept([(5.0, 5.0), (5.0, value), (value, 5.0)]) == [True, False, False]
    assert race.kept([(value,), (value,)]) == [False, False]
    assert race.kept([]) == []


@given(rows, st.lists(st.tuples(nats, nats), min_size=1, max_size=6), st.integers(1, 8))
@settings(deadline=None)
def test_with_caution_enough_none_is_left(
    scored: list[tuple[float, ...]], children: list[tuple[float, float]], k: int
) -> None:
    best = ranked(scored)
    heads = np.array([math.fsum(row[:2]) - math.fsum(best[k - 1][:2]) for row in best[: max(2 * k, LEAST_SCORED)]])
    assume(float(np.abs(heads).sum()) > 1)
    rests = np.array([math.fsum(row[2:]) - math.fsum(best[k - 1][2:]) for row in best[: max(2 * k, LEAST_SCORED)]])
    slope = max(float(heads @ rests / (heads @ heads)), -1.0)
    assume(float(np.abs(rests - slope * heads).max()) > 1e-3)  # else the rest follows from the head, and caution is 0
    assert all(Race(Racing(caution=1e9), best, k).kept(children))


@given(rows, st.integers(1, 12), st.integers(1, DOCUMENTS - 1), st.floats(0, 3), st.lists(st.floats(0, 50), min_size=4))
@settings(deadline=None)
def test_one_that_leads_on_every_document_seen_goes_on(
    scored: list[tuple[float, ...]], k: int, seen: int, caution: float, margins: list[float]
) -> None:
    """Also where the best in all did the worse on the rest the better they did here."""
    assume(len(scored) >= k)
    best = ranked(scored)
    child = tuple(value - margin for value, margin in zip(best[k - 1][:seen], margins, strict=False))
    assert Race(Racing(caution=caution), best, k).kept([child]) == [True]


def test_one_that_leads_goes_on_where_the_best_trade_one_half_for_the_other() -> None:
    """Selection by the sum makes halves fall together: what one leads by here it more than loses there."""
    best = ranked([(100.0 + i, 200.0 - 1.3 * i) for i in range(16)])
    race = Race(Racing(after=(1,), caution=0.0), best, 8)
    edge = best[7][0]
    assert race.kept([(edge - 5,), (edge,), (edge - 50,)]) == [True, True, True]


@given(rows, st.lists(st.tuples(nats, nats), min_size=2, max_size=6), st.randoms())
@settings(deadline=None)
def test_what_becomes_of_a_child_does_not_depend_on_the_others(
    scored: list[tuple[float, ...]], children: list[tuple[float, float]], chance: object
) -> None:
    race = Race(Racing(caution=0.5), ranked(scored), 4)
    together = race.kept(children)
    assert together == [race.kept([child])[0] for child in children]
    order = list(range(len(children)))
    chance.shuffle(order)  # type: ignore[attr-defined]
    assert race.kept([children[i] for i in order]) == [together[i] for i in order]


@given(rows, st.tuples(nats, nats), st.floats(0, 100), st.floats(0, 3), st.floats(0, 3))
@settings(deadline=None)
def test_a_worse_child_never_goes_on_where_a_better_one_is_left_and_caution_keeps_more(
    scored: list[tuple[float, ...]], child: tuple[float, float], worse: float, caution: float, more: float
) -> None:
    best = ranked(scored)
    race = Race(Racing(caution=caution), best, 4)
    (better,), (other,) = race.kept([child]), race.kept([(child[0] + worse, child[1])])
    assert better >= other
    assert Race(Racing(caution=caution + more), best, 4).kept([child])[0] >= better


def test_it_keeps_nearly_all_that_would_be_parents_and_leaves_most_others() -> None:
    """Documents that differ a lot, individuals that do well or badly on all of them together, and noise."""
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(500, 2000, DOCUMENTS)

    def scored(count: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        quality = rng.exponential(0.05, (count, 1))
        return difficulty * (1 + quality + rng.normal(0, 0.003, (count, DOCUMENTS)))

    missed = left = 0
    for _ in range(50):
        best = ranked(scored(40).tolist())
        children = scored(20)
        kept = Race(Racing(), best, 10).kept(children[:, :2].tolist())
        parents = children.sum(axis=1) < math.fsum(best[9])
        missed += int(np.sum(parents & ~np.array(kept)))
        left += int(np.sum(~np.array(kept)))
    assert missed == 0
    assert left > 500


@pytest.mark.parametrize(("documents", "points"), [(5, [1, 3]), (3, [1]), (4, [1, 3]), (1, [])])
def test_it_decides_before_the_last_document_only(documents: int, points: list[int]) -> None:
    assert Race(Racing(after=(1, 3)), [], 2).points(documents) == points


@pytest.mark.parametrize("after", [(0,), (2, 1), (1, 1), (-1, 2)])
def test_points_that_do_not_ascend_from_1_are_refused(after: tuple[int, ...]) -> None:
    with pytest.raises(LongRopeError, match="ascending"):
        Racing(after=after)


@pytest.mark.parametrize("caution", [-0.1, math.nan, math.inf])
def test_caution_is_a_number_of_deviations(caution: float) -> None:
    with pytest.raises(LongRopeError, match="caution"):
        Racing(caution=caution)


class TestCut:
    @given(st.lists(st.sampled_from([1.0, 2.0, 2.5, 3.0, math.inf]), max_size=9), st.integers(1, 10))
    def test_the_best_on_one_document_go_on_and_of_equals_the_first(self, values: list[float], survivors: int) -> None:
        order = sorted((value, i) for i, value in enumerate(values) if math.isfinite(value))
        best = {i for _, i in order[:survivors]}
        assert Cut(survivors).kept([(value,) for value in values]) == [i in best for i in range(len(values))]

    @pytest.mark.parametrize(("documents", "points"), [(1, []), (2, [1]), (5, [1])])
    def test_it_decides_after_one_document_where_there_are_more(self, documents: int, points: list[int]) -> None:
        assert Cut(3).points(documents) == points
