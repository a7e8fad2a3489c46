"""When evaluations were computed: once each, by whom, and what an interruption is."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_study import CANDIDATES, DOCUMENTS, KEYS, study
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session

from searcher.study import Outcome
from storage.models import Evaluation, Study
from storage.repository import Repository
from storage.timings import breaks, covered, without

SPANS = st.lists(
    st.tuples(st.integers(0, 1200), st.integers(0, 60)).map(lambda pair: (float(pair[0]), float(sum(pair)))), max_size=8
)


@settings(deadline=None)
@given(SPANS)
def test_covered_is_the_same_time_without_overlap(spans: list[tuple[float, float]]) -> None:
    found = covered(spans)
    assert all(one[1] < other[0] for one, other in pairwise(found))
    for moment in range(1270):  # the middle of every second
        at = moment + 0.5
        assert any(a < at < b for a, b in spans) == any(a < at < b for a, b in found)


@settings(deadline=None)
@given(SPANS, st.integers(0, 30))
def test_a_clock_stands_still_in_breaks_alone(spans: list[tuple[float, float]], longest: int) -> None:
    gaps = breaks(spans, float(longest))
    assert all(end - start >= max(300, 5 * longest) for start, end in gaps)
    assert not any(start < gap[0] + 0.5 < end for gap in gaps for start, end in spans)
    clock = [without(float(moment), gaps) for moment in range(1270)]
    for moment in range(1269):
        stands = any(start <= moment and moment + 1 <= end for start, end in gaps)
        assert clock[moment + 1] - clock[moment] == pytest.approx(0 if stands else 1)


def test_an_evaluation_counts_once_and_from_its_seconds_before(repository: Repository, database: Engine) -> None:
    with study(repository) as store:
        for place, key in enumerate(key for row in KEYS for key in row):
            gradient = (0.1, 0.2, 0.3, 0.4) if place == 5 else None
            store.record(Outcome(key, 1.0, 10, 2.0 + place, f"ray-{place % 2}", gradient=gradient))
        store.add_generation(0, "selection", 0, CANDIDATES[:1], DOCUMENTS, KEYS[:1])  # the same keys again
    with Session(database) as session, session.begin():
        made = session.query(Study).one().created_at
        for place, key in enumerate(key for row in KEYS for key in row):
            moment = made + timedelta(seconds=10.0 * place - 5)
            session.execute(update(Evaluation).where(Evaluation.key == key).values(created_at=moment))
    found = repository.timings("s")
    assert [timing.ended for timing in found] == pytest.approx([-5, 5, 15, 25, 35, 45], abs=1e-3)
    assert [timing.began for timing in found] == pytest.approx([-7, 2, 11, 20, 29, 38], abs=1e-3)
    assert [timing.worker for timing in found] == ["ray-0", "ray-1"] * 3
    assert {timing.part for timing in found} == {"search"}
    assert [timing.is_gradient for timing in found] == [False] * 5 + [True]


def test_what_failed_to_be_computed_took_no_time(repository: Repository) -> None:
    with study(repository) as store:
        store.record(Outcome(KEYS[0][0], None, 0, failure="out of memory"))
        store.record(Outcome(KEYS[0][1], float("nan"), 10, 3.0, "local"))
    assert [(timing.seconds, timing.worker) for timing in repository.timings("s")] == [(3.0, "local")]
