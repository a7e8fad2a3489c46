"""A thin Ray actor, one worker that holds one model and scores units; and the cluster that such workers run on."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from searcher.errors import LongRopeError
from searcher.study import Outcome, Unit
from workers.model import ModelInfo, ModelRequest, one_line
from workers.scorer import LocalScorer, PoolRequest, Tokens, score_unit
from workers.weights import SharedWeights, share


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
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (OSError, OverflowError, ValueError, RuntimeError, RayError) as error:
        raise LongRopeError(f"No Ray cluster could be joined at {address}: {one_line(error)}") from error
    finally:
        if tries is None:
            os.environ.pop("RAY_gcs_server_port_wait_time_s", None)


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
