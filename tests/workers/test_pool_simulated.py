"""What a pool makes of coincidences and of workers that lie, in simulated time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError

from searcher.errors import LongRopeError
from searcher.rope import Factors
from searcher.study import Candidate, Document, Outcome, Score, Silent, Unit, evaluation_key, score_generation
from tests.searcher.memory_study import MemoryStore
from tests.workers.simulated import INFO, LENGTH, NEVER, Simulation, Work

TOKENS = LENGTH - 1
TEXT = Document("text", "0" * 64, LENGTH)
UNITS = [Unit(f"{100 + i}", Factors((1.0, 1.0 + i), 0, 1.0), TEXT) for i in range(12)]
RIGHT = {unit.key: float(unit.key) for unit in UNITS}


@pytest.fixture(autouse=True)
def _as_open_scorer_does() -> None:
    os.environ.setdefault("RAY_worker_niceness", "0")  # for the tests of this process that start a real Ray
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def right(unit: Unit, **other: Any) -> Outcome:
    return replace(Outcome(unit.key, float(unit.key), TOKENS, 1.0), **other)


def kept(pool: Any, units: list[Unit] = UNITS) -> dict[str, float | None]:
    """All units; what the study would hold in the end."""
    found: dict[str, float | None] = {}
    for outcome in pool.evaluate(units):
        assert outcome.corrects == (outcome.key in found)
        found[outcome.key] = outcome.nll
    return found


class TestCoincidence:
    """Of three workers in step the last gives NaN at first, and one look finds the word that proves it wrong and more.

    What they compute: 1st all a unit, 2nd the first of them that of the last, 3rd the second of them, too.
    """

    def crowd(self, third: Callable[[int, Unit], tuple[float, object]]) -> Work:
        times = [0, 0, 0]

        def work(process: int, unit: Unit) -> tuple[float, object]:
            if process > 2:
                return 1.0, right(unit)
            times[process] += 1
            if times[process] == 3:
                return third(process, unit)
            if (process, times[process]) == (2, 1):
                return 1.0, right(unit, nll=math.nan, failure="the loss on text is nan")
            return 1.0, right(unit)

        return work

    @pytest.mark.parametrize("garbage", [False, True])
    def test_its_next_result_is_there_already(self, monkeypatch: pytest.MonkeyPatch, garbage: bool) -> None:
        said: list[str] = []
        work = self.crowd(lambda process, unit: (1.0, None if garbage and process == 2 else right(unit)))
        pool = Simulation().pool(monkeypatch, 3, work, say=said.append)
        assert kept(pool) == RIGHT
        assert said == ["Worker ray-2 is replaced: it gave another value than two others on text."]

    def test_its_next_result_is_late_already(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The worker that has just begun in its place is not."""
        said: list[str] = []
        work = self.crowd(lambda process, unit: (NEVER if process == 2 else 124.0, right(unit)))
        pool = Simulation().pool(monkeypatch, 3, work, say=said.append)
        assert kept(pool) == RIGHT
        assert said == ["Worker ray-2 is replaced: it gave another value than two others on text."]


class TestWhatAWorkerSaysOfItself:
    @pytest.mark.parametrize("seconds", [math.nan, math.inf, -5.0, "x", 1e300])
    def test_a_time_that_it_did_not_take(self, monkeypatch: pytest.MonkeyPatch, seconds: Any) -> None:
        """It decides nothing: neither the order, nor when another counts as hanging."""
        hung: list[str] = []

        def work(process: int, unit: Unit) -> tuple[float, object]:
            if process == 1 and not hung and len(simulation.computed) > 4:
                hung.append(unit.key)
                return NEVER, None
            return 1.0, right(unit, seconds=seconds if process == 0 else 1.0)

        simulation = Simulation()
        units = [replace(unit, document=replace(TEXT, sha256=str(n % 2) * 64)) for n, unit in enumerate(UNITS)]
        outcomes = {outcome.key: outcome for outcome in simulation.pool(monkeypatch, 2, work).evaluate(units)}
        assert {key: outcome.nll for key, outcome in outcomes.items()} == RIGHT
        assert {outcome.seconds for outcome in outcomes.values()} == {1.0}
        assert hung
        assert simulation.now < 1000 + 10 * 120

    def test_a_correction_is_the_pool_s_to_make(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pool = Simulation().pool(monkeypatch, 2, lambda _process, unit: (1.0, right(unit, corrects=True)))
        assert kept(pool) == RIGHT

    def test_a_worker_that_describes_no_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """At the start it is an error; a replacement is replaced."""
        with pytest.raises(LongRopeError, match="described its model by an object of type str"):
            Simulation().pool(monkeypatch, 2, lambda _process, unit: (1.0, right(unit)), lambda _process: "model")
        said: list[str] = []

        def die(process: int, unit: Unit) -> tuple[float, object]:
            return (1.0, ActorDiedError()) if process == 0 else (10.0, right(unit))

        pool = Simulation().pool(monkeypatch, 2, die, lambda process: None if process == 2 else INFO, said.append)
        assert kept(pool) == RIGHT
        assert "described its model by an object of type NoneType" in said[1]


def nats(factors: Factors) -> float:
    return 100.0 - factors.by_layer()[0][1]


class TestNothingRepeats:
    """Kernels that add in another order each time: no two computations agree, and no worker is worse than another."""

    @pytest.mark.parametrize("doubtful", [False, True])
    def test_it_is_said_once_and_nobody_is_blamed(self, monkeypatch: pytest.MonkeyPatch, doubtful: bool) -> None:
        import workers.pool

        monkeypatch.setattr(workers.pool, "AUDIT_EVERY", 1)
        calls = iter(range(10**6))
        said: list[str] = []

        def work(_process: int, unit: Unit) -> tuple[float, object]:
            outcome = right(unit, nll=float(unit.key) + 1e-6 * next(calls))
            if doubtful and unit.key == "103":
                return 1.0, replace(outcome, failure=f"odd at {outcome.nll}")
            return 1.0, outcome

        pool = Simulation().pool(monkeypatch, 3, work, say=said.append)
        found = kept(pool, UNITS[:-1])  # one worker has nothing to do in the end, and looks at another's value
        if doubtful:
            assert found.pop("103") is None
        assert len(found) == len(UNITS) - 1 - doubtful
        assert found == {key: pytest.approx(RIGHT[key], abs=1e-2) for key in found}
        assert [sentence for sentence in said if "does not repeat" in sentence] == [
            "5 workers gave as many different values on text: what is computed here does not repeat, so neither will "
            "this search. Look for a broken device, or other software."
        ]
        assert not [sentence for sentence in said if "given up" in sentence or "than two others" in sentence]


class TestSpareValues:
    """The second worker computes candidates on the selection documents, looks right, and is found out some time."""

    selection = (replace(TEXT, name="one", sha256="1" * 64), replace(TEXT, name="two", sha256="2" * 64))
    candidates = tuple(Candidate(unit.factors, unit.key) for unit in UNITS)

    def study(self, monkeypatch: pytest.MonkeyPatch, found_out: str) -> tuple[list[Score], list[str]]:
        """Search, selection, test: found out by garbage when it computes the first unit on ``found_out``."""
        said: list[str] = []
        lied: list[str] = []
        test = [replace(TEXT, name="test", sha256="3" * 64)]

        def work(process: int, unit: Unit) -> tuple[float, object]:
            good = Outcome(unit.key, nats(unit.factors), TOKENS, 1.0)
            if process != 1 or unit.document == TEXT:
                return (10.0, replace(good, seconds=10.0)) if unit.document == TEXT else (1.0, good)
            if unit.document.name == found_out:
                return 1.0, None
            lied.append(unit.key)
            return 1.0, replace(good, nll=1.0)

        pool = Simulation().pool(monkeypatch, 3, work, say=said.append)
        store = MemoryStore()
        one = self.selection[0]
        spare = [Unit(evaluation_key(pool.fingerprint, c.factors, one), c.factors, one) for c in self.candidates[:3]]
        for generation in range(2):  # of four long units: while the last is computed, two workers have time to spare
            part = self.candidates[4 * generation : 4 * generation + 4]
            score_generation("search", generation, part, [TEXT], pool, store, Silent(), spare=spare)
        assert lied
        wrong = [key for key in lied if store.evaluations[key].nll == 1.0]
        assert wrong
        scores = score_generation("selection", 0, self.candidates[:6], self.selection, pool, store, Silent())
        score_generation("test", 0, self.candidates, test, pool, store, Silent())
        again = score_generation("selection", 0, self.candidates[:6], self.selection, pool, store, Silent())
        assert again == scores  # what a resumed driver would find
        self.wrong = [key for key in wrong if store.evaluations[key].nll == 1.0]
        return scores, said

    def test_found_out_in_the_selection_all_are_corrected(self, monkeypatch: pytest.MonkeyPatch) -> None:
        scores, _ = self.study(monkeypatch, "two")
        assert [score.nll for score in scores] == [2 * nats(c.factors) for c in self.candidates[:6]]
        assert not self.wrong

    def test_found_out_later_all_stay_and_it_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, said = self.study(monkeypatch, "test")
        assert self.wrong
        assert any("were built upon and stay" in sentence for sentence in said)

    def test_a_value_that_is_not_believed_and_not_computed_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It stays, and that is said."""
        said: list[str] = []
        seen: list[str] = []

        def work(process: int, unit: Unit) -> tuple[float, object]:
            seen.append(unit.key)
            if process == 1 and len(seen) > 6:
                return 1.0, None
            if unit.key in seen[:-1] and unit.key == first[0]:
                return 1.0, ActorDiedError()
            if process == 1 and not first:
                first.append(unit.key)
            return 1.0, right(unit)

        first: list[str] = []
        pool = Simulation().pool(monkeypatch, 3, work, say=said.append)
        assert kept(pool) == RIGHT
        assert any(
            "is not believed, and it could not be computed again: the worker died (3 attempts)" in s for s in said
        )


FAULTS: dict[str, Callable[[Unit], tuple[float, object]]] = {
    "none": lambda unit: (1.0, right(unit)),
    "slow": lambda unit: (1.0 + int(unit.key) % 7, right(unit)),
    "dies": lambda _unit: (0.5, ActorDiedError()),
    "hangs": lambda _unit: (NEVER, None),
    "garbage": lambda _unit: (1.0, None),
    "no time": lambda unit: (1.0, right(unit, seconds=math.nan)),
    "nan": lambda unit: (1.0, right(unit, nll=math.nan, failure="the loss on text is nan")),
}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    workers=st.integers(2, 4), faults=st.lists(st.sampled_from(sorted(FAULTS)), max_size=20), first=st.integers(1, 9)
)
def test_whatever_happens_when(monkeypatch: pytest.MonkeyPatch, workers: int, faults: list[str], first: int) -> None:
    """It comes to its end, every unit once; with the right value, or none where it was tried three times."""
    for number, fault in enumerate(faults):  # no place is given up, and no two workers find the same NaN
        before = faults[:number]
        if fault not in ("none", "slow") and (len(before) - before.count("none") - before.count("slow") >= 6):
            faults[number] = "none"
        if fault == "nan" and "nan" in before:
            faults[number] = "none"
    simulation = Simulation()

    def work(_process: int, unit: Unit) -> tuple[float, object]:
        number = len(simulation.computed) - 1 - first
        return FAULTS[faults[number] if 0 <= number < len(faults) else "none"](unit)

    found = kept(simulation.pool(monkeypatch, workers, work))
    assert found.keys() == RIGHT.keys()
    for key, value in found.items():
        assert value == RIGHT[key] or (value is None and [k for _, k in simulation.computed].count(key) >= 3)
