"""What a worker returned, judged: garbage by itself, doubtful values by what others say."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searcher.rope import Factors
from searcher.study import Document, Outcome, Unit
from workers.verdicts import MOST_OPINIONS, Audits, Opinions, agree, doubtful, fault

FACTORS = Factors((1.0, 2.0, 3.0), 0, 1.0)
PLAIN = Unit("plain", FACTORS, Document("text", "0" * 64, 64))
SPANS = Unit("spans", FACTORS, Document("text", "0" * 64, 64, ((10, 14), (12, 20))))
GREEDY = Unit("greedy", FACTORS, Document("text", "0" * 64, 64, ((10, 20),), greedy=True))
GRADIENT = Unit("gradient", FACTORS, PLAIN.document, gradient=True)
GOOD = {
    "plain": Outcome("plain", 100.0, 63, 0.1),
    "spans": Outcome("spans", 20.0, 10),
    "greedy": Outcome("greedy", 3, 10),
    "gradient": Outcome("gradient", 100.0, 63, gradient=(0.1, -0.2, 0.3, 0.0)),
}
BAD_TIMES: tuple[Any, ...] = (math.nan, math.inf, -math.inf, -0.1, "1", None, True)
UNITS = {unit.key: unit for unit in (PLAIN, SPANS, GREEDY, GRADIENT)}


@pytest.mark.parametrize("key", UNITS)
def test_what_is_right(key: str) -> None:
    assert fault(GOOD[key], UNITS[key]) is None
    assert not doubtful(GOOD[key])


@pytest.mark.parametrize("nll", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_doubtful_and_no_garbage(nll: float) -> None:
    overflowed = replace(GOOD["plain"], nll=nll, failure="the loss on text is not finite")
    assert fault(overflowed, PLAIN) is None
    assert doubtful(overflowed)


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("plain", None, "an object of type NoneType"),
        ("plain", 100.0, "an object of type float"),
        ("plain", GOOD["spans"], "the outcome of another evaluation"),
        ("plain", replace(GOOD["plain"], nll=None), "a loss of type NoneType"),
        ("plain", replace(GOOD["plain"], nll="100"), "a loss of type str"),
        ("plain", replace(GOOD["plain"], nll=True), "a loss of type bool"),
        ("plain", replace(GOOD["plain"], nll=-100.0), "a loss of -100 nats"),
        ("plain", replace(GOOD["plain"], tokens=64), "a loss over 64 tokens where 63 are scored"),
        ("spans", replace(GOOD["spans"], tokens=63), "a loss over 63 tokens where 10 are scored"),
        ("plain", replace(GOOD["plain"], gradient=(1.0,)), "a gradient that nobody asked for"),
        ("plain", replace(GOOD["plain"], tokens=63.0), "a loss over 63.0 tokens where 63 are scored"),
        ("plain", replace(GOOD["plain"], failure=7), "a reason of type int"),
        *(("plain", replace(GOOD["plain"], seconds=bad), f"a time of {bad!r} s") for bad in BAD_TIMES),
        ("gradient", replace(GOOD["gradient"], gradient=5.0), "a gradient of type float"),
        ("gradient", replace(GOOD["gradient"], gradient=None), "no gradient"),
        ("gradient", replace(GOOD["gradient"], gradient=(1.0,) * 3), "a gradient of 3 values where there are 4"),
    ],
)
def test_garbage(key: str, value: Any, what: str) -> None:
    assert fault(value, UNITS[key]) == what


numbers = st.floats(allow_nan=True, allow_infinity=True)
outcomes = st.builds(
    Outcome, st.just("k"), numbers, st.integers(1, 3), gradient=st.none() | st.tuples(numbers, numbers)
)


@given(one=outcomes, other=outcomes)
def test_agreement_is_of_bits_and_of_nothing_else(one: Outcome, other: Outcome) -> None:
    assert agree(one, replace(one, seconds=7.0, worker="ray-9", failure="in other words"))
    assert agree(one, other) == agree(other, one)
    same = [repr((o.nll, o.tokens, o.gradient)) for o in (one, other)]  # repr tells 0.0 from -0.0, and no NaN apart
    assert agree(one, other) == (same[0] == same[1])


@pytest.mark.parametrize("order", sorted(set(permutations("aab"))))
def test_two_against_one(order: tuple[str, ...]) -> None:
    """Whoever comes first: what two say, as soon as they have said it."""
    values = {"a": GOOD["plain"], "b": replace(GOOD["plain"], nll=math.nextafter(100.0, 101))}
    opinions = Opinions(PLAIN)
    verdict = None
    for worker, which in enumerate(order):
        assert verdict is None or worker == 2
        opinions.given.append((worker, values[which]))
        verdict = opinions.verdict()
    assert verdict is not None
    assert agree(verdict, values["a"])
    assert opinions.against(verdict) == [order.index("b")]


def test_a_loss_that_two_workers_find_not_finite_is_the_candidate_s() -> None:
    first, second = (replace(GOOD["plain"], nll=math.nan, worker=f"ray-{n}", failure="nan") for n in range(2))
    assert Opinions(PLAIN, [(1, first), (2, second)]).verdict() is first


def test_workers_that_all_differ() -> None:
    """Asked up to a limit; then the evaluation has failed, or stays as the study has it."""
    values = [(n, replace(GOOD["plain"], nll=float(n))) for n in range(MOST_OPINIONS)]
    assert Opinions(PLAIN, values[:-1]).verdict() is None
    verdict = Opinions(PLAIN, values).verdict()
    assert verdict is not None
    assert verdict.nll is None
    assert verdict.failure == "5 workers gave as many different values"
    assert Opinions(PLAIN, values, values[0][1]).verdict() is values[0][1]


def test_audits_come_once_in_a_while_and_from_others() -> None:
    audits = Audits(3)
    for number in range(3):
        assert audits.due(2) is None
        audits.note(1, replace(PLAIN, key=str(number)), replace(GOOD["plain"], key=str(number)))
    assert audits.due(1) is None
    found = audits.due(2)
    assert found is not None
    assert (found.unit.key, found.given[0][0], found.audit) == ("2", 1, True)
    audits.passed(1)
    assert audits.due(2) is None
    audits.note(1, PLAIN, GOOD["plain"])
    assert audits.failed(1) == [(PLAIN, GOOD["plain"])]
    assert audits.failed(1) == []
