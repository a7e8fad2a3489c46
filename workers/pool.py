"""A pool of Ray workers: one call in flight per place, work of the lost done again, retries with a limit.

The unit of scheduling is (candidate, document), the longest first (workers/schedule.py), so that no worker idles while
a unit is left; one that finds none takes spare work. What a worker held when it died goes to the front of the queue; a
unit that has failed ATTEMPTS times is given up with the reason. Before anything has succeeded, what failed goes behind
the other candidates, and all is given up once HOPELESS of them have failed.

A worker whose evaluation takes far longer than others did is ended. One that returns what cannot be right, or what two
others do not (workers/verdicts.py), is set aside: a new process takes its place, and values of it that the study has
and has not built upon are computed again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import ray
from ray.exceptions import RayError, RayTaskError

from searcher.errors import LongRopeError
from searcher.rope import Factors
from searcher.study import Outcome, Unit
from workers.actor import cause_of_death
from workers.crew import FORGIVEN, LOOK, REPLACEMENTS, START_TIMEOUT, Crew, Place
from workers.model import ModelRequest, one_line
from workers.schedule import Durations, Queue, kind_of, take_spare
from workers.scorer import PoolRequest, Tokens
from workers.verdicts import AUDIT_EVERY, Audits, Opinions, agree, doubtful, fault

ATTEMPTS = 3
HOPELESS = 4  # candidates; one that always fails must not look like a machine on which nothing works
GRACE = 1.0  # seconds; a driver that was stopped itself takes in what has come before it calls anybody late

Flight: TypeAlias = "tuple[Place, Any]"  # a call, and where it was sent


class RayScorer(Crew):
    """A ``searcher.study.Scorer`` over Ray workers; see ``Crew`` for what it is made of."""

    def __init__(
        self,
        request: ModelRequest,
        tokens: Tokens,
        pool: PoolRequest,
        create: Callable[[int], Any] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._attempts: dict[str, int] = {}
        self._failing: set[Factors | None] | None = set()  # candidates that failed; None after the first success
        self._durations = Durations()
        self._done: set[str] = set()
        self._past: set[str] = set()  # the study has built upon them
        self._opinions: dict[str, Opinions] = {}  # of units that more than one worker computes
        self._disbelieved: set[int] = set()
        self._said_split = False
        self._audits = Audits(AUDIT_EVERY)
        super().__init__(request, tokens, pool, create, say)

    def evaluate(self, units: Sequence[Unit], spare: Sequence[Unit] = ()) -> Iterator[Outcome]:
        """Outcomes as they finish. It ends with the last unit; a replacement that still starts is left to the next.

        Parameters
        ----------
        units: every one's outcome comes once, and again with ``corrects`` where it turns out that the first was wrong.
        spare: units nobody waits for, the most useful first. A worker without a unit takes one that is expected to be
            done before the last unit. Its outcome comes if it succeeds: from this call, or where that has ended by
            then from the next, which may not have asked for it; one that did gets it without a second computation.
        """
        flying = {place.unit.key: place for place in self._places if place.unit is not None}
        asked = {unit.key for unit in units}
        for key in asked & flying.keys():
            flying[key].spare = False
        queue = Queue([unit for unit in units if unit.key not in flying], self._durations)
        seen = asked | flying.keys() | self._attempts.keys() | self._done
        extra = [unit for unit in spare if unit.key not in seen]
        outcomes: deque[Outcome] = deque()
        timeout = 0.0  # spare work of an earlier call may be done
        try:
            while True:
                ready, late = self._ready(timeout)
                # What one of them gives may end the worker of another, whose place then holds a call that is not ready.
                for place, call in ready:
                    if place.call == call:
                        outcomes += self._collect(place, queue)
                for place, call in late:
                    if place.call == call and self._is_late(place):
                        outcomes += self._end_late(place, queue)
                # What has come back and is not stored yet would be lost with the driver: no more of it than of places.
                if len(outcomes) <= len(self._places):
                    self._dispatch(queue, extra)
                if outcomes:  # one at a time: while it is stored other workers become free
                    yield outcomes.popleft()
                    timeout = 0.0
                    continue
                if not queue and not self._undecided() and not any(map(self._is_waited_for, self._places)):
                    self._past |= asked
                    return
                timeout = LOOK
        except GeneratorExit:  # closed midway: what is in flight belongs to nobody
            for opinions in self._undecided():
                del self._opinions[opinions.unit.key]
            for place in self._places:
                if place.unit is not None and not place.spare:
                    self._opinions.pop(place.unit.key, None)
                    place.unit = None
                    self._replace(place, "its call was given up", quiet=True)
            raise

    def built_upon(self, keys: Collection[str]) -> None:
        """The study has decided by values that it did not ask for again; those it asked for are known here."""
        self._past.update(keys)

    def drain(self) -> Iterator[Outcome]:
        """Wait for the spare units that are in flight."""
        yield from self.evaluate([place.unit for place in self._places if place.unit is not None])

    def _undecided(self) -> list[Opinions]:
        """Units that need another worker's word and are with none."""
        flying = {place.unit.key for place in self._places if place.unit is not None}
        return [opinions for key, opinions in self._opinions.items() if key not in flying]

    def _is_waited_for(self, place: Place) -> bool:
        """Whether a call does not end before this worker's: after it, nothing of it can be corrected."""
        return place.unit is not None and (not place.spare or place.unit.key in self._opinions)

    def _dispatch(self, queue: Queue, spare: list[Unit]) -> None:
        idle = [place for place in self._places if place.actor is not None and place.call is None]
        for opinions in self._undecided():
            place = self._who_else(opinions, idle)
            if place is not None:
                idle.remove(place)
                opinions.audit = False
                self._send(place, opinions.unit, False)
        while queue and idle:
            place = idle.pop(0)
            self._send(place, queue.take(place.last), False)
        remaining = self._remaining() if idle else 0.0
        for place in idle:
            unit = take_spare(spare, self._durations, remaining)
            if unit is None and (audit := self._audits.due(place.process)) is not None:
                if audit.unit.key not in self._past and audit.unit.key not in self._opinions:
                    unit = take_spare([audit.unit], self._durations, remaining)
                if unit is not None:
                    self._opinions[unit.key] = audit
            if unit is not None:
                self._send(place, unit, True)

    def _who_else(self, opinions: Opinions, idle: list[Place]) -> Place | None:
        """An idle worker that has not computed this unit yet; a new process where all that there are have."""
        heard = {process for process, _ in opinions.given}
        other = next((place for place in idle if place.process not in heard), None)
        if other is not None or not idle:
            return other
        if any(place.process not in heard for place in self._places if place.actor is not None):
            return None  # busy, or on its way
        if len(opinions.given) == 1 and len(self._places) == 1:
            return idle[0]  # at least it shows whether the worker agrees with itself
        idle[0].losses -= 1  # this is none
        self._replace(idle.pop(0), "a third worker was needed")
        return None

    def _remaining(self) -> float:
        """Seconds until the last unit in flight is expected back."""
        ends = [
            place.sent + self._durations.expected(place.unit)
            for place in self._places
            if place.unit is not None and not place.spare
        ]
        return max(ends, default=0.0) - time.monotonic()

    def _send(self, place: Place, unit: Unit, spare: bool) -> None:
        place.unit, place.spare, place.last, place.sent = unit, spare, kind_of(unit), time.monotonic()
        place.call = place.actor.score.remote(unit)
        place.late_since = None

    def _ready(self, timeout: float) -> tuple[list[Flight], list[Flight]]:
        """The calls that have finished, and those that are late; at least one unless the timeout is 0."""
        while True:
            self._look_around()
            in_flight = {place.call: place for place in self._places if place.call is not None}
            if not in_flight and not timeout:
                return [], []
            if not in_flight:
                raise LongRopeError(
                    f"All {len(self._places)} workers were lost, and so were {REPLACEMENTS} replacements of each in a "
                    f"row, the last because: {self._last_loss}; mend that, then go on with longrope resume."
                )
            calls = list(in_flight)
            if timeout:
                ray.wait(calls, num_returns=1, timeout=timeout)
            ready, waiting = ray.wait(calls, num_returns=len(calls), timeout=0)
            late = [(in_flight[call], call) for call in waiting if self._is_late(in_flight[call])]
            if ready or late or not timeout:
                return [(in_flight[call], call) for call in ready], late

    def _limit(self, place: Place) -> float:
        return START_TIMEOUT if place.unit is None else self._durations.limit(place.unit, self._pool.time_limit)

    def _is_late(self, place: Place) -> bool:
        now = time.monotonic()
        if now - place.sent <= self._limit(place):
            return False
        place.late_since = now if place.late_since is None else place.late_since
        return now - place.late_since > GRACE

    def _end_late(self, place: Place, queue: Queue) -> Iterator[Outcome]:
        """End a worker whose call takes too long; its unit is done again."""
        unit, limit, place.unit = place.unit, self._limit(place), None
        if unit is None:
            self._replace(place, f"it did not start within {limit:.3g} s")
            return
        self._give_back(unit)
        self._replace(place, f"it had not ended after {limit:.3g} s")
        yield from self._failed(unit, place, f"it had not ended after {limit:.3g} s", queue)

    def _collect(self, place: Place, queue: Queue) -> Iterator[Outcome]:
        """What a finished call gave, if anything: a failed unit goes back to the queue, a replacement reports in.

        A worker whose call raised is replaced as one that died: a device may be broken for good after an error.
        """
        call, unit, place.call, place.unit = place.call, place.unit, None, None
        try:
            value = ray.get(call)
            if unit is None:
                self._check_profile(value)
                return
        except RayTaskError as error:
            reason = one_line(error.cause or error) or type(error.cause or error).__name__
        except LongRopeError as error:  # a replacement on other hardware
            reason = one_line(error)
        except RayError as error:
            reason = cause_of_death(error)
        else:
            wrong = fault(value, unit)
            if wrong is None:
                yield from self._keep(place, unit, value, queue)
                return
            reason = f"it returned {wrong}"
            place.set_aside += 1
            self._doubt(place.process, unit)
        if unit is not None and self._failing is not None:
            place.losses = 0  # nothing has worked yet, so nothing tells a bad place from a bad unit
        self._replace(place, reason)
        if unit is not None:
            self._give_back(unit)
            yield from self._failed(unit, place, reason, queue)

    def _give_back(self, unit: Unit) -> None:
        """An audit that came to nothing is forgotten; other opinions are still waited for."""
        opinions = self._opinions.get(unit.key)
        if opinions is not None and opinions.audit and len(opinions.given) == 1:
            del self._opinions[unit.key]

    def _keep(self, place: Place, unit: Unit, value: Outcome, queue: Queue) -> Iterator[Outcome]:
        """A value that can be right: handed over, unless other workers are to say the same first."""
        # What it says of itself must not pass for more: a time beyond the call's would make hanging look right.
        seconds = min(value.seconds, time.monotonic() - place.sent)
        outcome = replace(value, worker=f"ray-{place.number}", seconds=seconds, corrects=False)
        place.good += 1
        if place.good == FORGIVEN:
            place.set_aside = 0
        self._durations.observe(unit, outcome.seconds)
        opinions = self._opinions.get(unit.key)
        if opinions is None and not doubtful(outcome):
            place.losses = 0
            yield self._hand_over(place.process, unit, outcome)
            return
        opinions = self._opinions.setdefault(unit.key, Opinions(unit))
        opinions.given.append((place.process, outcome))
        verdict = opinions.verdict()
        if verdict is None:
            return
        del self._opinions[unit.key]
        if opinions.majority() is None:
            yield from self._split(opinions, verdict)
            return
        for process in opinions.against(verdict):
            self._doubt(process, unit)
            self._set_aside(process, unit, queue)
        place.losses = 0 if agree(outcome, verdict) else place.losses
        first = opinions.handed_over
        if first is None:
            yield self._hand_over(opinions.given[0][0], unit, verdict)
        elif agree(first, verdict):
            self._audits.passed(opinions.given[0][0])
        elif unit.key in self._past:
            self._say(
                f"{first.worker} gave a wrong value on {unit.document.name} that the search has built upon: it stays. "
                "For a result that is sure, launch the study anew in a new store."
            )
        else:
            yield replace(verdict, corrects=True)

    def _split(self, opinions: Opinions, verdict: Outcome) -> Iterator[Outcome]:
        """No two values were the same: nobody in particular is to blame, and no other worker would help."""
        self._audits.passed(opinions.given[0][0])
        if not self._said_split:
            self._say(
                f"{len(opinions.given)} workers gave as many different values on {opinions.unit.document.name}: what "
                "is computed here does not repeat, so neither will this search. Look for a broken device, or other "
                "software."
            )
            self._said_split = True
        if opinions.handed_over is None:
            yield self._hand_over(opinions.given[0][0], opinions.unit, verdict)

    def _hand_over(self, process: int, unit: Unit, outcome: Outcome) -> Outcome:
        self._failing = None
        self._done.add(unit.key)
        if outcome.nll is not None:
            self._audits.note(process, unit, outcome)
        return outcome

    def _doubt(self, process: int, unit: Unit) -> None:
        """What else a worker gave that nothing was built upon is computed again: it was wrong on ``unit``."""
        late = 0
        for given, outcome in self._audits.failed(process):
            if given.key in self._past:
                late += 1
            elif given.key != unit.key:
                self._opinions.setdefault(given.key, Opinions(given, [(process, outcome)], outcome)).audit = False
        if late:
            self._say(
                f"{late} evaluations that the same worker gave before were built upon and stay, right or wrong; a run "
                "with another --study in a new store shows whether it matters."
            )

    def _set_aside(self, process: int, unit: Unit, queue: Queue) -> None:
        """End a worker that gave what two others did not."""
        place = next((place for place in self._places if place.process == process), None)
        reason = f"it gave another value than two others on {unit.document.name}"
        if place is None:
            if process not in self._disbelieved:
                self._say(f"A worker that was replaced already is not believed: {reason}.")
            self._disbelieved.add(process)
            return
        self._disbelieved.add(process)
        held, place.unit = place.unit, None
        place.set_aside += 1
        self._replace(place, reason)
        if held is not None and held.key not in self._opinions and not place.spare:
            queue.put_first(held)

    def _failed(self, unit: Unit, place: Place, reason: str, queue: Queue) -> Iterator[Outcome]:
        """Count a failed attempt: the unit waits again, or its outcome to store where that was the last one."""
        self._attempts[unit.key] = self._attempts.get(unit.key, 0) + 1
        if self._failing is not None:
            self._failing.add(unit.factors)
            if len(self._failing) >= HOPELESS and all(place.lost for place in self._places):
                raise LongRopeError(
                    f"None of the first evaluations succeeded: {len(self._failing)} candidates failed on "
                    f"{len(self._places)} workers, the last because: {reason}; mend that, then go on with longrope "
                    "resume."
                )
        if place.spare:
            return
        opinions = self._opinions.get(unit.key)
        if self._attempts[unit.key] < ATTEMPTS:
            if opinions is not None:  # waits there
                return
            if self._failing is None:
                queue.put_first(unit)
            else:  # try others before: does anything work?
                queue.put_last(unit)
            return
        place.losses = 0  # the unit is to blame, not the place
        if opinions is not None:
            del self._opinions[unit.key]
            if opinions.handed_over is not None:
                self._say(
                    f"{opinions.handed_over.worker} gave a value on {unit.document.name} that is not believed, and it "
                    f"could not be computed again: {reason} ({ATTEMPTS} attempts). It stays. For a result that is "
                    "sure, launch the study anew in a new store."
                )
                return
        yield Outcome(unit.key, None, 0, failure=f"{reason} ({ATTEMPTS} attempts)")
