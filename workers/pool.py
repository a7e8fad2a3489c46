"""A pool of Ray workers: one call in flight per place, work of the lost done again, retries with a limit.

The unit of scheduling is (candidate, document), the longest first (workers/schedule.py), so that no worker idles while
a unit is left; one that finds none takes spare work. What a worker held when it died goes to the front of the queue; a
unit that has failed ATTEMPTS times is given up with the reason. A lost worker is replaced; a place whose replacements
die REPLACEMENTS times in a row without a result is given up. Before anything has succeeded, what failed goes behind the
other candidates, and all is given up once HOPELESS of them have failed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from searcher.errors import LongRopeError
from searcher.rope import Factors
from searcher.study import Outcome, Unit
from workers import reaper
from workers.actor import create_worker, join_cluster, settle, start_cluster
from workers.model import ModelInfo, ModelRequest, one_line
from workers.schedule import Durations, Kind, Queue, kind_of, take_spare
from workers.scorer import PoolRequest, Tokens

ATTEMPTS = 3
REPLACEMENTS = 3
HOPELESS = 4  # candidates; one that always fails must not look like a machine on which nothing works
PATIENCE = 30.0  # seconds between looks at the deadlines of replacements
START_TIMEOUT = 1800.0  # seconds; reading the weights of a large model from a slow disk
STORE_SHARE = 0.8  # of a node's object store that shared weights may fill


@dataclass
class _Place:
    """One worker's place in the pool: who is there, its one call, how often it was lost without a result.

    ``spare``: nobody waits for the unit in flight. ``last``: the kind of the unit before.
    """

    number: int
    actor: Any = None
    call: Any = None
    unit: Unit | None = None
    spare: bool = False
    sent: float = 0.0
    last: Kind | None = None
    losses: int = 0
    lost: bool = False
    deadline: float = 0.0


class RayScorer:
    """A ``searcher.study.Scorer`` over Ray workers.

    Parameters
    ----------
    create: the actor of a place, by its number; several places may share an actor that takes several calls at once.
        It has the methods of ``workers.actor.Worker`` but for ``pid``; None makes a worker a place.

    Raises
    ------
    LongRopeError
        The cluster lacks what was asked for, a model cannot be loaded, workers differ in numerics, or all are lost.
    """

    def __init__(
        self, request: ModelRequest, tokens: Tokens, pool: PoolRequest, create: Callable[[int], Any] | None = None
    ) -> None:
        terminated = signal.getsignal(signal.SIGTERM)
        self._reaper: subprocess.Popen[bytes] | None = None
        self._places: list[_Place] = []
        self._attempts: dict[str, int] = {}
        self._failing: set[Factors | None] | None = set()  # candidates that failed; None after the first success
        self._last_loss = ""
        self._durations = Durations()
        self._done: set[str] = set()
        self._weights: dict[str, Any] = {}
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            if pool.ray_address is None:
                self._reaper = _start_reaper(start_cluster((pool.workers or 1) * request.threads))
            else:
                join_cluster(pool.ray_address)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, terminated)  # Ray puts a handler of its own in its place
            gpus, count = settle(pool, request.threads)
            self._on_gpus = gpus > 0
            self._create = create or (lambda _number: create_worker(request.threads, gpus))
            self._request = replace(request, device="cuda" if gpus else "cpu")
            self._shared = ray.put(dict(tokens))
            self._places = [_Place(number) for number in range(count)]
            self.info = self._start_all()
        except BaseException:
            self.close()
            raise

    @property
    def fingerprint(self) -> str:
        return self.info.fingerprint

    def worker_pids(self) -> list[int]:
        """Process ids of the workers alive."""
        pids: list[int] = ray.get([place.actor.pid.remote() for place in self._places if place.actor is not None])
        return pids

    def close(self) -> None:
        """Stop the workers, and the cluster where this pool started it; else leave the cluster."""
        if ray.is_initialized():
            for place in self._places:
                if place.actor is not None:
                    ray.kill(place.actor)
            ray.shutdown()
        if self._reaper is not None:
            self._reaper.communicate()

    def evaluate(self, units: Sequence[Unit], spare: Sequence[Unit] = ()) -> Iterator[Outcome]:
        """Outcomes as they finish. It ends with the last unit; a replacement that still starts is left to the next.

        Parameters
        ----------
        units: every one's outcome comes once.
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
                outcomes += filter(None, [self._collect(place, queue) for place in self._ready(timeout)])
                # What has come back and is not stored yet would be lost with the driver: no more of it than of places.
                if len(outcomes) <= len(self._places):
                    self._dispatch(queue, extra)
                if outcomes:  # one at a time: while it is stored other workers become free
                    yield outcomes.popleft()
                    timeout = 0.0
                    continue
                if not queue and all(place.unit is None or place.spare for place in self._places):
                    return
                timeout = PATIENCE
        finally:  # closed midway: what is in flight belongs to nobody
            for place in self._places:
                if place.unit is not None and not place.spare:
                    place.unit = None
                    self._replace(place, "its call was given up")

    def drain(self) -> Iterator[Outcome]:
        """Wait for the spare units that are in flight."""
        yield from self.evaluate([place.unit for place in self._places if place.unit is not None])

    def _dispatch(self, queue: Queue, spare: list[Unit]) -> None:
        idle = [place for place in self._places if place.actor is not None and place.call is None]
        while queue and idle:
            place = idle.pop(0)
            self._send(place, queue.take(place.last), False)
        remaining = self._remaining() if spare and idle else 0.0
        for place in idle:
            unit = take_spare(spare, self._durations, remaining)
            if unit is None:
                return
            self._send(place, unit, True)

    def _remaining(self) -> float:
        """Seconds until the last unit in flight is expected back."""
        ends = [
            place.sent + self._durations.expected(place.unit)
            for place in self._places
            if place.unit is not None and not place.spare
        ]
        return max(ends, default=0.0) - time.monotonic()

    def _send(self, place: _Place, unit: Unit, spare: bool) -> None:
        place.unit, place.spare, place.last, place.sent = unit, spare, kind_of(unit), time.monotonic()
        place.call = place.actor.score.remote(unit)

    def _ready(self, timeout: float) -> list[_Place]:
        """The places whose calls have finished, at least one unless the timeout is 0; late starts count as losses."""
        while True:
            in_flight = {place.call: place for place in self._places if place.call is not None}
            if not in_flight and not timeout:
                return []
            if not in_flight:
                raise LongRopeError(
                    f"All {len(self._places)} workers were lost, and so were {REPLACEMENTS} replacements of each in a "
                    f"row, the last because: {self._last_loss}; mend that, then go on with longrope resume."
                )
            calls = list(in_flight)
            if timeout:
                ray.wait(calls, num_returns=1, timeout=timeout)
            ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
            if ready or not timeout:
                return [in_flight[call] for call in ready]
            for place in in_flight.values():
                if place.unit is None and time.monotonic() > place.deadline:
                    self._replace(place, f"it did not start within {START_TIMEOUT:.0f} s")

    def _collect(self, place: _Place, queue: Queue) -> Outcome | None:
        """What a finished call gave, if anything: a failed unit goes back to the queue, a replacement reports in.

        A worker whose call raised is replaced as one that died: a device may be broken for good after an error.
        """
        call, unit, place.call, place.unit = place.call, place.unit, None, None
        reason = "the worker died"
        try:
            value = ray.get(call)
            if unit is None:
                self._check_profile(value)
                return None
        except RayTaskError as error:
            reason = one_line(error.cause or error)
        except LongRopeError as error:  # a replacement on other hardware
            reason = one_line(error)
        except RayError:
            pass
        else:
            place.losses = 0
            self._failing = None
            outcome: Outcome = replace(value, worker=f"ray-{place.number}")
            self._done.add(unit.key)
            self._durations.observe(unit, outcome.seconds)
            return outcome
        if unit is not None and self._failing is not None:
            place.losses = 0  # nothing has worked yet, so nothing tells a bad place from a bad unit
        self._replace(place, reason)
        return None if unit is None else self._failed(unit, place, reason, queue)

    def _failed(self, unit: Unit, place: _Place, reason: str, queue: Queue) -> Outcome | None:
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
            return None
        if self._attempts[unit.key] < ATTEMPTS:
            if self._failing is None:
                queue.put_first(unit)
            else:  # try others before: does anything work?
                queue.put_last(unit)
            return None
        place.losses = 0  # the unit is to blame, not the place
        return Outcome(unit.key, None, 0, failure=f"{reason} ({ATTEMPTS} attempts)")

    def _replace(self, place: _Place, reason: str) -> None:
        """A new worker in a lost one's place; its start is in flight like a unit."""
        self._last_loss = reason
        if place.actor is not None:
            ray.kill(place.actor)
        place.lost = True
        place.losses += 1
        place.actor = place.call = None
        if place.losses <= REPLACEMENTS:
            self._start(place)

    def _start(self, place: _Place) -> None:
        place.actor = place.actor or self._create(place.number)
        place.call = place.actor.start.remote(self._request, self._shared, self._weights)
        place.deadline = time.monotonic() + START_TIMEOUT

    def _start_all(self) -> ModelInfo:
        """On every node one worker reads and hashes the weights; the others get them from it, by shared memory."""
        for place in self._places:
            place.actor = self._create(place.number)
        nodes: dict[str, list[_Place]] = {}
        for place, node in zip(self._places, self._gather([p.actor.node.remote() for p in self._places]), strict=True):
            nodes.setdefault(node, []).append(place)
        readers = [places[0] for places in nodes.values()]
        described = dict(zip((p.number for p in readers), self._started(readers), strict=True))
        room = {node["NodeID"]: STORE_SHARE * node["Resources"].get("object_store_memory", 0) for node in ray.nodes()}
        self._weights = {
            node: places[0].actor.share.remote(room[node]) for node, places in nodes.items() if len(places) > 1
        }
        # On CPUs the readers, too: then the shared memory is the only copy on the node.
        again = [place for places in nodes.values() if len(places) > 1 for place in places[self._on_gpus :]]
        described.update(zip((place.number for place in again), self._started(again), strict=True))
        return self._agree(described)

    def _agree(self, described: dict[int, ModelInfo]) -> ModelInfo:
        """What all workers describe, after those that chose a larger chunk were told the smallest."""
        chunks = {number: info.profile.get("chunk") for number, info in described.items()}
        smallest = min((chunk for chunk in chunks.values() if isinstance(chunk, int)), default=None)
        self.info = next(info for number, info in described.items() if chunks[number] == smallest)
        larger = [place for place in self._places if chunks[place.number] != smallest]
        for info in described.values():  # before anything is loaded once more
            self._check_profile(replace(info, profile={**info.profile, **({"chunk": smallest} if larger else {})}))
        if smallest is not None:
            self._request = replace(self._request, chunk=smallest)
        for place in larger:
            ray.kill(place.actor)
            place.actor = None
        for info in self._started(larger):
            self._check_profile(info)
        return self.info

    def _started(self, places: Sequence[_Place]) -> list[ModelInfo]:
        for place in places:
            self._start(place)
        described: list[ModelInfo] = self._gather([place.call for place in places])
        for place in places:
            place.call = None
        return described

    def _gather(self, calls: list[Any]) -> list[Any]:
        """Values of calls that the pool cannot do without."""
        try:
            values: list[Any] = ray.get(calls, timeout=START_TIMEOUT)
        except RayTaskError as error:
            if isinstance(error.cause, LongRopeError):
                raise error.cause from error
            reason = one_line(error.cause or error)
            raise LongRopeError(f"A worker could not load {self._request.path}: {reason}") from error
        except GetTimeoutError as error:
            raise LongRopeError(
                f"The {len(self._places)} workers did not start within {START_TIMEOUT:.0f} s; look at the cluster "
                "with `ray status`."
            ) from error
        except RayError as error:
            raise LongRopeError(f"A worker died while it loaded {self._request.path}: {one_line(error)}") from error
        return values

    def _check_profile(self, other: ModelInfo) -> None:
        if other.fingerprint != self.info.fingerprint:
            theirs = {"weights": other.weights_sha256, **other.profile}
            ours = {"weights": self.info.weights_sha256, **self.info.profile}
            unequal = sorted(name for name in ours if ours[name] != theirs.get(name))
            raise LongRopeError(
                f"A worker differs from the first in {', '.join(unequal)}, so its scores would too; all workers of a "
                "study need the same model, device kind and software."
            )


def _start_reaper(session: str) -> subprocess.Popen[bytes]:
    """See workers/reaper.py. In a session of its own: what is sent to the driver's, such as Ctrl-C, does not end it."""
    command = [sys.executable, "-SE", reaper.__file__, session]
    silent = subprocess.DEVNULL  # who reads the driver's output need not wait for this one's end
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=silent, stderr=silent, start_new_session=True)
