"""A pool of Ray workers: one call in flight per worker, work of the lost done again, retries with a limit.

The unit of scheduling is (candidate, document), so no worker idles while a unit is left. What a worker held when it
died goes to the front of the queue; a unit that has failed ATTEMPTS times is given up with the reason. A lost worker
is replaced; a place whose replacements die REPLACEMENTS times in a row without a result is given up.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from searcher.errors import LongRopeError
from searcher.study import Outcome, Unit
from workers import reaper
from workers.actor import create_worker
from workers.model import ModelInfo, ModelRequest
from workers.scorer import PoolRequest, Tokens

ATTEMPTS = 3
REPLACEMENTS = 3
START_TIMEOUT = 1800.0  # seconds; reading the weights of a large model from a slow disk


@dataclass
class _Place:
    """One worker's place in the pool: who is there, its one call, how often it was lost without a result."""

    number: int
    actor: Any = None
    call: Any = None
    unit: Unit | None = None
    losses: int = 0


class RayScorer:
    """A ``searcher.study.Scorer`` over Ray workers.

    Raises
    ------
    LongRopeError
        The cluster lacks what was asked for, a model cannot be loaded, workers differ in numerics, or all are lost.
    """

    def __init__(self, request: ModelRequest, tokens: Tokens, pool: PoolRequest) -> None:
        self._reaper: subprocess.Popen[bytes] | None = None
        self._places: list[_Place] = []
        self._attempts: dict[str, int] = {}
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            if pool.ray_address is None:
                self._reaper = _start_reaper(_start_cluster((pool.workers or 1) * request.threads))
            else:
                _join_cluster(pool.ray_address)
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
        """Outcomes as they finish."""
        queue = deque(units)
        while True:
            for place in self._places:
                if queue and place.actor is not None and place.call is None:
                    self._dispatch(place, queue.popleft())
            in_flight = {place.call: place for place in self._places if place.call is not None}
            if not in_flight:
                break
            (ready,), _ = ray.wait(list(in_flight), num_returns=1)
            place = in_flight[ready]
            unit, place.unit, place.call = place.unit, None, None
            result = self._collect(ready, place, unit)
            if isinstance(result, Outcome):
                yield result
            elif result is not None:
                queue.appendleft(result)
        if queue:
            raise LongRopeError(
                f"All {len(self._places)} workers were lost, each {REPLACEMENTS} times in a row; look for the reason "
                "(memory above all), then go on with longrope resume."
            )

    def _dispatch(self, place: _Place, unit: Unit) -> None:
        place.unit = unit
        place.call = place.actor.score.remote(unit.key, unit.factors, unit.document)

    def _collect(self, call: Any, place: _Place, unit: Unit | None) -> Outcome | Unit | None:
        """What a finished call gave: an outcome, the unit to be done again, or nothing (a replacement reported in)."""
        try:
            value = ray.get(call)
        except RayTaskError as error:
            if unit is None:
                raise _unwrapped(error) from error
            place.losses = 0
            return self._failed(unit, " ".join(str(error.cause).split())[:300])
        except RayError:  # the worker or its node is gone
            self._replace(place)
            return None if unit is None else self._failed(unit, "the worker died")
        if unit is None:
            self._check_profile(value)
            return None
        place.losses = 0
        outcome: Outcome = replace(value, worker=f"ray-{place.number}")
        return outcome

    def _failed(self, unit: Unit, reason: str) -> Outcome | Unit:
        """Count a failed attempt: the unit again, or the outcome to store where it was the last."""
        self._attempts[unit.key] = self._attempts.get(unit.key, 0) + 1
        if self._attempts[unit.key] < ATTEMPTS:
            return unit
        return Outcome(unit.key, None, 0, failure=f"{reason} ({ATTEMPTS} attempts)")

    def _replace(self, place: _Place) -> None:
        """A new worker in a lost one's place; its start is in flight like a unit."""
        place.losses += 1
        place.actor = None
        if place.losses < REPLACEMENTS:
            place.actor = create_worker(self._request.threads, self._gpus)
            place.call = place.actor.start.remote(self._request, self._shared)

    def _start_all(self) -> ModelInfo:
        for place in self._places:
            place.actor = create_worker(self._request.threads, self._gpus)
        calls = [place.actor.start.remote(self._request, self._shared) for place in self._places]
        try:
            described = ray.get(calls, timeout=START_TIMEOUT)
        except RayTaskError as error:
            raise _unwrapped(error) from error
        except GetTimeoutError as error:
            raise LongRopeError(
                f"The {len(self._places)} workers did not start within {START_TIMEOUT:.0f} s; look at the cluster "
                "with `ray status`."
            ) from error
        except RayActorError as error:
            raise LongRopeError(f"A worker died while it loaded {self._request.path}: {error}") from error
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


def _unwrapped(error: RayTaskError) -> Exception:
    """The user's error where it is one; Ray wraps it with a traceback."""
    cause = error.cause
    return cause if isinstance(cause, LongRopeError) else error


def _join_cluster(address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LongRopeError(f"No Ray cluster could be joined at {address}: {reason}") from error


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
        reason = " ".join(str(error).split())[:200]
        raise LongRopeError(f"Ray could not be started here: {reason} Try again, or use --in-process.") from error
    return str(context.address_info["session_dir"])


def _start_reaper(session: str) -> subprocess.Popen[bytes]:
    """See workers/reaper.py. In a session of its own: what is sent to the driver's, such as Ctrl-C, does not end it."""
    command = [sys.executable, "-SE", reaper.__file__, session]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _settle(pool: PoolRequest, threads: int) -> tuple[float, int]:
    """GPUs a worker, and the number of workers: what was asked for, or what the cluster has room for.

    Ray waits silently for resources that a cluster does not have; this says so at once.
    """
    total = ray.cluster_resources()
    gpus = pool.gpus_per_worker if pool.gpus_per_worker is not None else float(total.get("GPU", 0) >= 1)
    needs = {"GPU": gpus, "CPU": float(threads)}
    room = min(int(total.get(kind, 0) / need) for kind, need in needs.items() if need)
    workers = pool.workers or room
    if workers < 1 or workers > room:
        have = ", ".join(f"{total.get(kind, 0):g} {kind}s" for kind, need in needs.items() if need)
        want = ", ".join(f"{need:g} {kind}s" for kind, need in needs.items() if need)
        raise LongRopeError(
            f"{max(workers, 1)} workers of {want} each were asked for, but the Ray cluster has {have}; lower "
            "--workers, --gpus-per-worker or --threads, or join a larger cluster with --ray-address."
        )
    return gpus, workers
