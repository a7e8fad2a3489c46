"""The workers of a pool: started, found to agree, replaced when lost, more of them when nodes join.

On every node one worker reads the weights, the others have them from it. A lost worker is replaced; a place whose
replacements die REPLACEMENTS times in a row without a result, or are set aside that often, is given up.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from searcher.errors import LongRopeError
from searcher.study import Unit
from workers import reaper
from workers.actor import Head, create_worker, join_cluster, nodes_alive, room_for, settle, start_cluster
from workers.model import ModelInfo, ModelRequest, one_line
from workers.schedule import Kind
from workers.scorer import PoolRequest, Tokens

REPLACEMENTS = 3
FORGIVEN = 100  # evaluations after which a place is as good as any: memory does flip a bit once in a while
START_TIMEOUT = 1800.0  # seconds; reading the weights of a large model from a slow disk
NOTICED = 45.0  # seconds; after five health checks that fail, three seconds apart, Ray counts a node as lost
GOING_DOWN = 10.0  # seconds; a machine that shuts down may end its workers before it leaves the cluster
LOOK = 2.0  # seconds between looks at the cluster, and at who is late
STORE_SHARE = 0.8  # of a node's object store that shared weights may fill


@dataclass
class Place:
    """One worker's place in the pool: who is there, its one call, how often it was lost without a result.

    ``process``: the number of the process there. ``spare``: nobody waits for the unit in flight. ``last``: the kind of
    the unit before. ``set_aside``: how often its worker was.
    """

    number: int
    process: int = 0
    actor: Any = None
    call: Any = None
    unit: Unit | None = None
    spare: bool = False
    sent: float = 0.0
    last: Kind | None = None
    losses: int = 0
    lost: bool = False
    late_since: float | None = None
    set_aside: int = 0
    good: int = 0  # evaluations since then


class _NodeLostError(Exception):
    """A node is gone while workers start; its address."""


def _check_info(given: object) -> ModelInfo:
    if not isinstance(given, ModelInfo):
        raise LongRopeError(
            f"A worker described its model by an object of type {type(given).__name__}; look for a broken device, or "
            "other software."
        )
    return given


class Crew:
    """Places with a worker each.

    Parameters
    ----------
    create: the actor of a place, by its number; several places may share an actor that takes several calls at once.
        It has the methods of ``workers.actor.Worker`` but for ``pid``; None makes a worker a place.
    say: see ``workers.scorer.open_scorer``.

    Raises
    ------
    LongRopeError
        The cluster lacks what was asked for, a model cannot be loaded, workers differ in numerics, or all are lost.
    """

    def __init__(
        self,
        request: ModelRequest,
        tokens: Tokens,
        pool: PoolRequest,
        create: Callable[[int], Any] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        terminated = signal.getsignal(signal.SIGTERM)
        self._reaper: subprocess.Popen[bytes] | None = None
        self._places: list[Place] = []
        self._last_loss = ""
        self._weights: dict[str, Any] = {}
        self._say = say or (lambda _sentence: None)
        self._pool = pool
        self._processes = 0
        self._nodes: dict[str, str] = {}
        self._hosts: Set[str] | None = None  # nodes with a worker; not known until all have a process
        self._looked, self._gpus = 0.0, 0.0
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            if pool.ray_address is None:
                self._reaper = _start_reaper(start_cluster((pool.workers or 1) * request.threads))
            else:
                join_cluster(pool.ray_address)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, terminated)  # Ray puts a handler of its own in its place
            self._head, self._request, self._shared = Head(), request, ray.put(dict(tokens))
            self._create = create or (lambda _number: create_worker(request.threads, self._gpus))
            self.info = self._start_all()
        except BaseException:
            self.close()
            raise

    @property
    def fingerprint(self) -> str:
        return self.info.fingerprint

    def worker_pids(self) -> list[int]:
        """Process ids of the workers alive; waits for those that start."""
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

    def _look_around(self) -> None:
        """Every LOOK seconds: is the cluster there, and who has left or joined it?"""
        if time.monotonic() - self._looked < LOOK or not self._head.look():
            return
        nodes, before = nodes_alive(), self._nodes
        self._nodes, self._looked = nodes, time.monotonic()
        for node in before.keys() - nodes.keys():
            self._weights.pop(node, None)
            self._say(f"The node {before[node]} ({node[:8]}) was lost; what its workers held is done again.")
        joined = nodes.keys() - before.keys()
        if not joined:
            return
        room = room_for(self._gpus, self._request.threads)
        free = room - sum(place.actor is not None for place in self._places)
        revived = [place for place in self._places if place.actor is None][: max(free, 0)]
        for place in revived:
            place.losses = place.set_aside = 0
        missing = (self._pool.workers or room) - len(self._places)
        added = [Place(len(self._places) + n) for n in range(min(missing, free - len(revived)))]
        self._places += added
        for place in [*revived, *added]:
            self._start(place)
        names = ", ".join(f"{nodes[node]} ({node[:8]})" for node in sorted(joined))
        self._say(f"Joined the cluster: {names}; {len(revived) + len(added)} workers more.")

    def _replace(self, place: Place, reason: str, quiet: bool = False) -> None:
        """A new worker in a lost one's place; its start is in flight like a unit."""
        self._last_loss = reason
        if place.actor is not None:
            ray.kill(place.actor)
        place.lost, place.good = True, 0
        place.losses += 1
        place.actor = place.call = None
        given_up = max(place.losses, place.set_aside) > REPLACEMENTS
        if not given_up:
            self._start(place)
        if not quiet:
            became = f"given up after {REPLACEMENTS} replacements" if given_up else "replaced"
            self._say(f"Worker ray-{place.number} is {became}: {reason}.")

    def _start(self, place: Place) -> None:
        if place.actor is None:
            place.actor = self._create(place.number)
        self._processes += 1
        place.process = self._processes
        place.call = place.actor.start.remote(self._request, self._shared, self._weights)
        place.sent, place.late_since = time.monotonic(), None

    def _start_all(self) -> ModelInfo:
        """As many workers as there shall be; where a node is lost meanwhile, anew with what is left."""
        began, asked, threads = time.monotonic(), self._pool, self._request.threads
        while True:
            # Looked at before the count: a node that is lost but not known to be counts, and is missed later.
            self._nodes, self._hosts, self._looked = nodes_alive(), None, time.monotonic()
            self._gpus, count = settle(asked, threads)
            self._request = replace(self._request, device="cuda" if self._gpus else "cpu")
            self._places = [Place(number) for number in range(count)]
            try:
                return self._start_here()
            except _NodeLostError as lost:
                if time.monotonic() - began > START_TIMEOUT:
                    raise LongRopeError(
                        f"Nodes were lost again and again while workers started, {lost} at last, for "
                        f"{START_TIMEOUT:.0f} s; look at the cluster with `ray status`."
                    ) from lost
                self._say(f"The node {lost} was lost while the workers started; they start anew without it.")
            for place in self._places:
                if place.actor is not None:
                    ray.kill(place.actor)
            self._weights = {}
            # What is left may have no GPU, and no room for as many; without any room, settle says so.
            room = max(room_for(self._gpus, threads), 1)
            workers = None if self._pool.workers is None else min(self._pool.workers, room)
            asked = replace(self._pool, gpus_per_worker=self._gpus, workers=workers)

    def _start_here(self) -> ModelInfo:
        """On every node one worker reads and hashes the weights; the others get them from it, by shared memory."""
        for place in self._places:
            place.actor = self._create(place.number)
        nodes: dict[str, list[Place]] = {}
        for place, node in zip(self._places, self._gather([p.actor.node.remote() for p in self._places]), strict=True):
            nodes.setdefault(node, []).append(place)
        self._hosts = nodes.keys()
        readers = [places[0] for places in nodes.values()]
        described = dict(zip((p.number for p in readers), self._started(readers), strict=True))
        room = {node["NodeID"]: STORE_SHARE * node["Resources"].get("object_store_memory", 0) for node in ray.nodes()}
        self._weights = {
            node: places[0].actor.share.remote(room[node]) for node, places in nodes.items() if len(places) > 1
        }
        # On CPUs the readers, too: then the shared memory is the only copy on the node.
        again = [place for places in nodes.values() if len(places) > 1 for place in places[self._gpus > 0 :]]
        described.update(zip((place.number for place in again), self._started(again), strict=True))
        return self._agree(described)

    def _agree(self, described: dict[int, ModelInfo]) -> ModelInfo:
        """What all workers describe, after those that chose a larger chunk were told the smallest."""
        chunks = {number: info.profile.get("chunk") for number, info in described.items()}
        smallest = min((chunk for chunk in chunks.values() if isinstance(chunk, int)), default=None)
        self.info = next(info for number, info in described.items() if chunks[number] == smallest)
        larger = [place for place in self._places if chunks[place.number] != smallest]
        for info in described.values():  # before anything is loaded once more
            profile = {**info.profile, **({"chunk": smallest} if larger else {})}
            self._check_profile(replace(info, profile=profile, probe=None))
        if smallest is not None:
            self._request = replace(self._request, chunk=smallest)
        for place in larger:
            ray.kill(place.actor)
            place.actor = None
        again = dict(zip((place.number for place in larger), self._started(larger), strict=True))
        for info in again.values():
            self._check_profile(replace(info, probe=None))
        self._compare({**described, **again})
        return self.info

    def _compare(self, described: Mapping[int, ModelInfo]) -> None:
        """Workers that give another value of the probe than most do are set aside."""
        (right, times), *others = Counter(info.probe for info in described.values()).most_common()
        if others and 2 * times <= len(described):
            raise LongRopeError(
                f"{len(described)} workers of one profile gave {1 + len(others)} different losses of the same short "
                "text, and no value most of them, so none can be trusted; look for a broken device, or other software."
            )
        self.info = replace(self.info, probe=right)
        for place in self._places:
            if described[place.number].probe != right:
                place.set_aside += 1
                self._replace(place, "it gave another loss of a known text than the others")

    def _started(self, places: Sequence[Place]) -> list[ModelInfo]:
        for place in places:
            self._start(place)
        described: list[ModelInfo] = self._gather([place.call for place in places])
        for place, info in zip(places, described, strict=True):
            place.call = None
            _check_info(info)
        return described

    def _gather(self, calls: list[Any]) -> list[Any]:
        """Values of calls that the pool cannot do without."""
        began, waiting = time.monotonic(), calls
        try:
            while waiting:
                done, waiting = ray.wait(waiting, num_returns=1, timeout=LOOK)
                ray.get(done)  # what failed is said before the others are there
                if not waiting:
                    break
                self._miss_no_node()
                if time.monotonic() - began > START_TIMEOUT:
                    raise LongRopeError(
                        f"The {len(self._places)} workers did not start within {START_TIMEOUT:.0f} s; look at the "
                        "cluster with `ray status`."
                    )
            values: list[Any] = ray.get(calls)
        except RayTaskError as error:
            if isinstance(error.cause, LongRopeError):
                raise error.cause from error
            reason = one_line(error.cause or error)
            raise LongRopeError(f"A worker could not load {self._request.path}: {reason}") from error
        except RayError as error:
            self._miss_no_node()
            patience = NOTICED if isinstance(error, ActorUnavailableError) else GOING_DOWN
            noticed = time.monotonic() + (0.0 if self._pool.ray_address is None else patience)
            while time.monotonic() < noticed:
                time.sleep(LOOK)
                self._miss_no_node()
            raise LongRopeError(f"A worker died while it loaded {self._request.path}: {one_line(error)}") from error
        return values

    def _miss_no_node(self) -> None:
        """While workers start: those that were to run on a node that is lost will never answer."""
        needed = self._nodes.keys() if self._hosts is None else self._hosts
        if self._head.look() and (lost := needed - nodes_alive().keys()):
            raise _NodeLostError(", ".join(f"{self._nodes.get(node, '')} ({node[:8]})" for node in sorted(lost)))

    def _check_profile(self, other: object) -> None:
        other = _check_info(other)
        if other.fingerprint == self.info.fingerprint and other.probe not in (None, self.info.probe):
            raise LongRopeError("it gave another loss of a known text than the others")
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
