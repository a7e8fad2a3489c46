"""Who gets which unit: the longest first, documents kept together, spare work only where it fits; no Ray in here."""

from __future__ import annotations

import heapq
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searcher.rope import Factors
from searcher.study import Document, Unit
from workers.schedule import Durations, Kind, Queue, kind_of, take_spare

UNTOUCHED = Factors((1.0,))


def unit(document: int, length: int, candidate: int = 0, gradient: bool = False) -> Unit:
    return Unit(
        f"{document} {candidate} {gradient}", UNTOUCHED, Document(str(document), str(document), length), gradient
    )


def taken(units: list[Unit], durations: Durations | None = None) -> list[Unit]:
    """In the order in which one worker gets them."""
    queue, last, order = Queue(units, durations or Durations()), None, []
    while queue:
        order.append(queue.take(last))
        last = kind_of(order[-1])
    return order


def known(*measured: tuple[Unit, float]) -> Durations:
    durations = Durations()
    for one, seconds in measured:
        durations.observe(one, seconds)
    return durations


LENGTHS = (100, 101, 200, 900)
UNITS = st.lists(
    st.builds(lambda i, *rest: unit(i, LENGTHS[i], *rest), st.integers(0, 3), st.integers(0, 5), st.booleans())
)


@given(UNITS)
def test_every_unit_is_taken_once(units: list[Unit]) -> None:
    assert Counter(taken(units)) == Counter(units)


@given(UNITS)
def test_no_unit_waits_for_one_that_is_clearly_shorter(units: list[Unit]) -> None:
    weights = [one.document.length * (3 if one.gradient else 1) for one in taken(units)]
    assert all(weight >= 0.9 * max(weights[i:]) for i, weight in enumerate(weights))


def test_one_worker_takes_candidates_of_one_document_in_a_row() -> None:
    units = [unit(document, 100 + document, candidate) for candidate in range(4) for document in range(3)]
    documents = [one.document.name for one in taken(units)]
    assert sum(a != b for a, b in pairwise(documents)) == 2


def test_workers_spread_over_documents_of_one_length() -> None:
    queue = Queue([unit(document, 100, candidate) for document in range(3) for candidate in range(4)], Durations())
    last: dict[int, Kind | None] = dict.fromkeys(range(3))
    by_worker: dict[int, set[Kind]] = {worker: set() for worker in last}
    for turn in range(12):
        last[turn % 3] = kind_of(queue.take(last[turn % 3]))
        by_worker[turn % 3].add(last[turn % 3])  # type: ignore[arg-type]
    assert [len(kinds) for kinds in by_worker.values()] == [1, 1, 1]


def test_what_was_lost_with_a_worker_is_next() -> None:
    queue = Queue([unit(0, 900), unit(1, 900)], Durations())
    first = queue.take(None)
    queue.put_first(first)
    assert queue.take(("1", False)) == first


def test_what_failed_waits_behind_the_others_of_its_document() -> None:
    units = [unit(0, 900, candidate) for candidate in range(3)]
    queue = Queue([*units, unit(1, 100)], Durations())
    queue.put_last(queue.take(None))
    assert [queue.take(None) for _ in range(3)] == [units[1], units[2], units[0]]


def test_a_gradient_counts_as_three_forwards() -> None:
    units = [unit(0, 250), unit(1, 100, gradient=True), unit(2, 350)]
    assert [one.document.name for one in taken(units)] == ["2", "1", "0"]


def test_what_was_measured_goes_before_the_length() -> None:
    """A short document that turned out slow comes first."""
    units = [unit(0, 900), unit(1, 100)]
    assert taken(units, known((units[0], 1.0), (units[1], 5.0)))[0] == units[1]


def test_expected_seconds() -> None:
    durations = known((unit(0, 100), 1.0), (unit(0, 100), 2.0), (unit(1, 1000), 20.0))
    assert durations.expected(unit(0, 100, 7)) == 1.5  # its own mean
    assert durations.expected(unit(2, 200)) == 3.0  # in proportion to the nearest length
    assert durations.expected(unit(2, 500)) == 10.0
    assert durations.expected(unit(2, 200, gradient=True)) == 9.0
    durations.observe(unit(3, 1000, gradient=True), 100.0)
    assert durations.expected(unit(2, 200, gradient=True)) == 20.0  # of gradients, once one is known
    assert durations.expected(unit(2, 200)) == 3.0


def test_a_gradient_alone_tells_of_forwards() -> None:
    assert known((unit(0, 100, gradient=True), 6.0)).expected(unit(1, 100)) == pytest.approx(2.0)


def test_no_spare_work_while_nothing_is_known() -> None:
    assert take_spare([unit(0, 1)], Durations(), 1e9) is None


def test_the_first_spare_unit_that_fits() -> None:
    durations = known((unit(0, 100), 1.0))
    spare = [unit(1, 900), unit(2, 300), unit(3, 100)]
    assert take_spare(spare, durations, 0.5) is None
    assert take_spare(spare, durations, 4.0) == unit(2, 300)
    assert spare == [unit(1, 900), unit(3, 100)]
    assert take_spare(spare, durations, 0.95) == unit(3, 100)  # as good as done in that time
    assert take_spare(spare, durations, 0.0) is None


@given(st.lists(st.integers(10, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_the_last_worker_ends_within_graham_s_bound(lengths: list[int], workers: int) -> None:
    """Longest first ends within 4/3 of the best, itself no less than these two; a tenth more where units are alike."""
    queue = Queue([unit(i, length) for i, length in enumerate(lengths)], Durations())
    free = [(0.0, worker) for worker in range(workers)]
    ends = []
    while queue:
        start, worker = heapq.heappop(free)
        ends.append(start + queue.take(None).document.length)
        heapq.heappush(free, (ends[-1], worker))
    pairs = sorted(lengths, reverse=True)[workers - 1 : workers + 1]
    lower = max(sum(lengths) / workers, max(lengths), sum(pairs) if len(pairs) == 2 else 0)
    assert max(ends) <= (4 / 3 + 0.15) * lower


class TestLimit:
    """How long a unit may take before it has hung."""

    @given(UNITS, st.floats(0.01, 1e4))
    def test_never_below_the_floor(self, units: list[Unit], least: float) -> None:
        durations = known(*((one, 0.001) for one in units))
        assert all(durations.limit(one, least) >= least for one in units)

    def test_ten_times_what_was_measured(self) -> None:
        durations = known((unit(0, 100), 2.0), (unit(0, 100), 4.0))
        assert durations.limit(unit(0, 100), 1.0) == pytest.approx(30.0)
        assert durations.limit(unit(1, 50), 1.0) == pytest.approx(15.0)

    def test_a_longer_window_may_take_the_square_of_its_length(self) -> None:
        durations = known((unit(0, 100), 3.0))
        assert durations.limit(unit(1, 1000), 1.0) == pytest.approx(10 * 3.0 * 10 * 10)

    def test_generous_before_anything_is_known(self) -> None:
        """A large model at 2M tokens on a slow machine: half a day, not two minutes."""
        assert Durations().limit(unit(0, 2**21), 120.0) == pytest.approx(3600 + 0.02 * 2**21)
