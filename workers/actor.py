"""A thin Ray actor, one worker that holds one model and scores units; and the cluster that such workers run on."""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError

import searcher
import workers
from searcher.errors import LongRopeError
from searcher.study import Outcome, Unit
from workers.model import ModelInfo, ModelRequest, one_line
from workers.scorer import LocalScorer, PoolRequest, Tokens, score_unit
from workers.weights import SharedWeights, share

SILENCE = 20.0  # seconds; after 60 without its head Ray ends the driver without a word


class Worker:
    """Loads on ``start``, so that a failure to load reaches the driver as a value of a call, not as a dead actor."""

    def __init__(self) -> None:
        self._scorer: LocalScorer | None = None
        self._tokens: Tokens = {}

    def node(self) -> str:
        """The node it runs on. The first call comes back when the process is up and what is large is imported."""
        import transformers.modeling_utils  # noqa: F401 - seconds, here in parallel with the other workers

        node: str = ray.get_runtime_context().get_node_id()
        return node

    def start(self, request: ModelRequest, tokens: Tokens, weights: Mapping[str, Any]) -> ModelInfo:
        """Load the model and describe it; again where it has one and there are weights to share by now.

        Parameters
        ----------
        weights: by node, a reference to what ``share`` of a worker there gave.
        """
        shared = self._fetch(weights)
        if self._scorer is None or shared is not None:
            self._scorer = None
            gc.collect()  # never two models at once
            self._tokens = tokens
            self._scorer = LocalScorer(request, tokens, shared)
        return self._scorer.info

    def _fetch(self, weights: Mapping[str, Any]) -> SharedWeights | None:
        reference = weights.get(ray.get_runtime_context().get_node_id())
        try:
            shared: SharedWeights | None = None if reference is None else ray.get(reference)
        except RayError:  # lost, or they did not fit: there is still the disk
            return None
        return shared

    def share(self, room: float) -> SharedWeights | None:
        """The weights for the other workers of this node; None where they are larger than ``room`` bytes."""
        assert self._scorer is not None
        shared = share(self._scorer.loaded.model, self._scorer.info.weights_sha256)
        return shared if shared is not None and shared.nbytes <= room else None

    def score(self, unit: Unit) -> Outcome:
        """One unit."""
        if self._scorer is None:
            raise RuntimeError("start the worker first")
        return score_unit(self._scorer.loaded, self._tokens, unit)

    def pid(self) -> int:
        """Process id, for tests that kill it and for monitoring."""
        return os.getpid()


def create_worker(cpus: int, gpus: float) -> Any:
    """A handle to a new worker; no restarts and no retries of Ray's own, since the pool keeps the books."""
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(Worker)
    return remote.remote()


def join_cluster(address: str) -> None:
    """Join a cluster that others started, or say within seconds that there is none.

    Raises
    ------
    LongRopeError
        Nobody, or no cluster, is at that address.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    # Left alone, Ray tries twenty times, for forty seconds each, before it says that nobody is there.
    tries = os.environ.get("RAY_gcs_server_port_wait_time_s")  # noqa: SIM112 - Ray spells it so
    try:
        if port.isdigit():
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        os.environ["RAY_gcs_server_port_wait_time_s"] = tries or "1"  # noqa: SIM112
        ray.init(address=address, runtime_env=_code(), log_to_driver=False, configure_logging=False)
    except (OSError, OverflowError, ValueError, RuntimeError, RayError) as error:
        raise LongRopeError(
            f"No Ray cluster could be joined at {address}: {one_line(error)}; where one runs there, give this side its "
            "version of Ray, its RAY_AUTH_MODE and its token."
        ) from error
    finally:
        if tries is None:
            os.environ.pop("RAY_gcs_server_port_wait_time_s", None)


def _code() -> dict[str, Any]:
    """What workers elsewhere run: the two rooms they need, as this driver has them, and no models."""
    rooms = [str(Path(str(room.__file__)).parent) for room in (searcher, workers)]
    return {"py_modules": rooms, "excludes": ["**/__pycache__/", "*.safetensors", "tokenizer.json"]}


def cause_of_death(error: RayError) -> str:
    """Why a worker is gone, as far as Ray knows."""
    text = str(error)
    if isinstance(error, OutOfMemoryError) or "OUT_OF_MEMORY" in text or "low on memory" in text:
        return "its node ran out of memory and Ray ended it"
    if isinstance(error, NodeDiedError) or "node has died" in text or "node died" in text.lower():
        return "its node was lost"
    return "the worker died"


class Head:
    """Whether the head of the cluster answers; a look takes a millisecond."""

    def __init__(self) -> None:
        host, _, port = str(ray.get_runtime_context().gcs_address).rpartition(":")
        self._address = host.strip("[]"), int(port)
        self._heard = time.monotonic()

    def look(self) -> bool:
        """Whether it answers now.

        Raises
        ------
        LongRopeError
            It has not answered for SILENCE seconds.
        """
        try:
            socket.create_connection(self._address, timeout=5).close()
        except OSError as error:
            if time.monotonic() - self._heard < SILENCE:
                return False
            raise LongRopeError(
                f"The head of the Ray cluster at {':'.join(map(str, self._address))} has not answered for "
                f"{SILENCE:.0f} s ({one_line(error)}). What was computed is kept: start the cluster again, then go on "
                "with longrope resume, and --ray-address where that has changed."
            ) from error
        self._heard = time.monotonic()
        return True


def start_cluster(cpus: int) -> str:
    """A cluster on this machine for this process alone; returns the folder of its session.

    Raises
    ------
    LongRopeError
        Ray could not be started.
    """
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


def settle(pool: PoolRequest, threads: int) -> tuple[float, int]:
    """GPUs a worker, and the number of workers: what was asked for, or what the cluster has room for.

    Ray waits silently for resources that a cluster does not have; this says so at once.

    Raises
    ------
    LongRopeError
        The cluster has no room for them.
    """
    total = ray.cluster_resources()
    gpus = pool.gpus_per_worker if pool.gpus_per_worker is not None else float(total.get("GPU", 0) >= 1)
    needs = {"GPU": gpus, "CPU": float(threads)}
    if gpus > 1:
        raise LongRopeError(f"A worker holds its model on one GPU, so --gpus-per-worker is at most 1, not {gpus:g}.")
    room = room_for(gpus, threads)
    workers = pool.workers or room
    if workers < 1 or workers > room:
        have = ", ".join(f"{total.get(kind, 0):g} {kind}s" for kind, need in needs.items() if need)
        want = ", ".join(f"{need:g} {kind}s" for kind, need in needs.items() if need)
        raise LongRopeError(
            f"{max(workers, 1)} workers of {want} each were asked for, but the Ray cluster has {have}, room for "
            f"{room}; lower --workers, --gpus-per-worker or --threads, or join a larger cluster with --ray-address."
        )
    return gpus, workers


def room_for(gpus: float, threads: int) -> int:
    """Workers of so many GPUs and CPUs that the nodes alive can hold in all."""
    needs = {"GPU": gpus, "CPU": float(threads)}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(kind, 0) / need) for kind, need in needs.items() if need) for node in nodes)


def nodes_alive() -> dict[str, str]:
    """Addresses of the nodes alive, by their id."""
    return {node["NodeID"]: str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]}
