"""A pool of Ray workers: one call in flight per worker, work of the lost done again, retries with a limit.

The unit of scheduling is (candidate, document), so no worker idles while a unit is left. What a worker held when it
died goes to the front of the queue; a unit that has failed ATTEMPTS times is given up with the reason. A lost worker
is replaced; a place whose replacements die REPLACEMENTS times in a row without a result is given up.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from searcher.errors import LongRopeError
from searcher.study import Outcome, Unit
from workers import reaper
from workers.actor import create_worker
from workers.model import ModelInfo, ModelRequest, one_line
from workers.scorer import PoolRequest, Tokens

ATTEMPTS = 3
REPLACEMENTS = 3
PATIENCE = 30.0  # seconds between looks at the deadlines of replacements
START_TIMEOUT = 1800.0  # seconds; reading the weights of a large model from a slow disk


@dataclass
class _Place:
    """One worker's place in the pool: who is there, its one call, how often it was lost without a result."""

    number: int
    actor: Any = None
    call: Any = None
    unit: Unit | None = None
    losses: int = 0
    deadline: float = 0.0


class RayScorer:
    """A ``searcher.study.Scorer`` over Ray workers.

    Raises
    ------
    LongRopeError
        The cluster lacks what was asked for, a model cannot be loaded, workers differ in numerics, or all are lost.
    """

    def __init__(self, request: ModelRequest, tokens: Tokens, pool: PoolRequest) -> None:
        terminated = signal.getsignal(signal.SIGTERM)
        self._reaper: subprocess.Popen[bytes] | None = None
        self._places: list[_Place] = []
        self._attempts: dict[str, int] = {}
        self._last_loss = ""
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            if pool.ray_address is None:
                self._reaper = _start_reaper(_start_cluster((pool.workers or 1) * request.threads))
            else:
                _join_cluster(pool.ray_address)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, terminated)  # Ray puts a handler of its own in its place
            self._gpus, count = _settle(pool, request.threads)
            self._request = replace(request, device="cuda" if self._gpus else "cpu")
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

    def evaluate(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        """Outcomes as they finish. It ends with the last unit; a replacement that still starts is left to the next."""
        queue = deque(units)
        try:
            while True:
                for place in self._places:
                    if queue and place.actor is not None and place.call is None:
                        place.unit = queue.popleft()
                        call = place.actor.score.remote(place.unit.key, place.unit.factors, place.unit.document)
                        place.call = call
                if not queue and all(place.unit is None for place in self._places):
                    return
                place = self._next_ready()
                unit, call, place.unit, place.call = place.unit, place.call, None, None
                result = self._collect(call, place, unit)
                if isinstance(result, Outcome):
                    yield result
                elif result is not None:
                    queue.appendleft(result)
        finally:  # closed midway: what is in flight belongs to nobody
            for place in self._places:
                if place.unit is not None:
                    place.unit = None
                    self._replace(place, "its call was given up")

    def _next_ready(self) -> _Place:
        """The place whose call finished first; a start that takes too long counts as a loss."""
        while True:
            in_flight = {place.call: place for place in self._places if place.call is not None}
            if not in_flight:
                raise LongRopeError(
                    f"All {len(self._places)} workers were lost, and so were {REPLACEMENTS} replacements of each in a "
                    f"row, the last because: {self._last_loss}; mend that, then go on with longrope resume."
                )
            ready, _ = ray.wait(list(in_flight), num_returns=1, timeout=PATIENCE)
            if ready:
                return in_flight[ready[0]]
            for place in in_flight.values():
                if place.unit is None and time.monotonic() > place.deadline:
                    self._replace(place, f"it did not start within {START_TIMEOUT:.0f} s")

    def _collect(self, call: Any, place: _Place, unit: Unit | None) -> Outcome | Unit | None:
        """What a finished call gave: an outcome, the unit to be done again, or nothing (a replacement reported in).

        A worker whose call raised is replaced as one that died: a device may be broken for good after an error.
        """
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
            outcome: Outcome = replace(value, worker=f"ray-{place.number}")
            return outcome
        self._replace(place, reason)
        return None if unit is None else self._failed(unit, place, reason)

    def _failed(self, unit: Unit, place: _Place, reason: str) -> Outcome | Unit:
        """Count a failed attempt: the unit again, or the outcome to store where it was the last."""
        self._attempts[unit.key] = self._attempts.get(unit.key, 0) + 1
        if self._attempts[unit.key] < ATTEMPTS:
            return unit
        place.losses = 0  # the unit is to blame, not the place
        return Outcome(unit.key, None, 0, failure=f"{reason} ({ATTEMPTS} attempts)")

    def _replace(self, place: _Place, reason: str) -> None:
        """A new worker in a lost one's place; its start is in flight like a unit."""
        self._last_loss = reason
        if place.actor is not None:
            ray.kill(place.actor)
        place.losses += 1
        place.actor = place.call = None
        if place.losses <= REPLACEMENTS:
            self._start(place)

    def _start(self, place: _Place) -> None:
        place.actor = create_worker(self._request.threads, self._gpus)
        place.call = place.actor.start.remote(self._request, self._shared)
        place.deadline = time.monotonic() + START_TIMEOUT

    def _start_all(self) -> ModelInfo:
        for place in self._places:
            self._start(place)
        try:
            described = ray.get([place.call for place in self._places], timeout=START_TIMEOUT)
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
        for place in self._places:
            place.call = None
        self.info = described[0]
        for other in described[1:]:
            self._check_profile(other)
        return self.info

    def _check_profile(self, other: ModelInfo) -> None:
        if other.fingerprint != self.info.fingerprint:
            theirs = {"weights": other.weights_sha256, **other.profile}
            ours = {"weights": self.info.weights_sha256, **self.info.profile}
            unequal = sorted(name for name in ours if ours[name] != theirs.get(name))
            raise LongRopeError(
                f"A worker differs from the first in {', '.join(unequal)}, so its scores would too; all workers of a "
                "study need the same model, device kind and software."
            )


def _join_cluster(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    # Left alone, Ray tries twenty times, for forty seconds each, before it says that nobody is there.
    tries = os.environ.get("RAY_gcs_server_port_wait_time_s")  # noqa: SIM112 - Ray spells it so
    try:
        if port.isdigit():
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        os.environ["RAY_gcs_server_port_wait_time_s"] = tries or "1"  # noqa: SIM112
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (OSError, OverflowError, ValueError, RuntimeError, RayError) as error:
        raise LongRopeError(f"No Ray cluster could be joined at {address}: {one_line(error)}") from error
    finally:
        if tries is None:
            os.environ.pop("RAY_gcs_server_port_wait_time_s", None)


def _start_cluster(cpus: int) -> str:
    """A cluster on this machine for this process alone; returns the folder of its session."""
    try:
        context = ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, cpus),  # more workers than cores share them
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    except Exception as error:  # a node that does not start in time is a plain Exception
        reason = one_line(error)
        raise LongRopeError(f"Ray could not be started here: {reason} Try again, or use --in-process.") from error
    return str(context.address_info["session_dir"])


def _start_reaper(session: str) -> subprocess.Popen[bytes]:
    """See workers/reaper.py. In a session of its own: what is sent to the driver's, such as Ctrl-C, does not end it."""
    command = [sys.executable, "-SE", reaper.__file__, session]
    silent = subprocess.DEVNULL  # who reads the driver's output need not wait for this one's end
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=silent, stderr=silent, start_new_session=True)


def _settle(pool: PoolRequest, threads: int) -> tuple[float, int]:
    """GPUs a worker, and the number of workers: what was asked for, or what the cluster has room for.

    Ray waits silently for resources that a cluster does not have; this says so at once.
    """
    total = ray.cluster_resources()
    gpus = pool.gpus_per_worker if pool.gpus_per_worker is not None else float(total.get("GPU", 0) >= 1)
    needs = {"GPU": gpus, "CPU": float(threads)}
    if gpus > 1:
        raise LongRopeError(f"A worker holds its model on one GPU, so --gpus-per-worker is at most 1, not {gpus:g}.")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(node.get(kind, 0) / need) for kind, need in needs.items() if need) for node in nodes)
    workers = pool.workers or room
    if workers < 1 or workers > room:
        have = ", ".join(f"{total.get(kind, 0):g} {kind}s" for kind, need in needs.items() if need)
        want = ", ".join(f"{need:g} {kind}s" for kind, need in needs.items() if need)
        raise LongRopeError(
            f"{max(workers, 1)} workers of {want} each were asked for, but the Ray cluster has {have}, room for "
            f"{room}; lower --workers, --gpus-per-worker or --threads, or join a larger cluster with --ray-address."
        )
    return gpus, workers
