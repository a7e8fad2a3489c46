"""A fine-tuning stage on several devices of a Ray cluster: Ray Train starts the workers, each runs ``finetune.tune``.

Workers hold what ``Tuning.fsdp`` says: a whole copy of the model, or a shard of it. Their gradients are sums over
devices in no fixed order, so the result equals that of one device, or of the same run again, up to rounding.

The driver alone keeps the store. So the first worker sends what is to be recorded through a queue, and waits at every
checkpoint until the driver has recorded it. Ray is not asked to try again: what ends is resumed as any killed stage.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from searcher.errors import LongRopeError, needs
from searcher.tuning import Tuning
from workers.checkpoints import Checkpoint
from workers.finetune import MODEL, OnCheckpoint, OnLog, TuneRequest, tune
from workers.packing import ChunkSource, TokenArray
from workers.scorer import PoolRequest
from workers.settings import gpu_count, prepare_local_ray

POLL = 0.5  # seconds between looks at whether the workers are still there


def on_cluster(pool: PoolRequest | None) -> bool:
    """Whether a fine-tuning is for the workers of a pool, and not for this process."""
    return pool is not None and (pool.ray_address is not None or gpu_count() > 1)


def check_devices(tuning: Tuning, pool: PoolRequest | None) -> None:
    """Refuse, before anything is run, a fine-tuning that its devices could not do; what a far cluster has is not known.

    Raises
    ------
    LongRopeError
        Ray Train is missing, or there are no two GPUs to shard over.
    """
    most = 1
    if pool is not None and on_cluster(pool):
        _ray_train(pool)
        most = tuning.micro_steps if pool.workers is None else pool.workers
        if pool.ray_address is None:
            most = min(most, gpu_count())
        if pool.gpus_per_worker == 0:
            most = 1
    if tuning.fsdp is not None and all(tuning.micro_steps % workers for workers in range(2, most + 1)):
        raise LongRopeError(
            f"FSDP shards a model over several GPUs, but there are no two here that could share the "
            f"{tuning.micro_steps} micro-batches of a step; leave fsdp out."
        )


def _ray_train(pool: PoolRequest) -> None:
    """Import what is needed of Ray Train, or say how to have it."""
    if pool.ray_address is None:
        prepare_local_ray()
    with needs("A fine-tuning on several GPUs or on a cluster", "ray[train]", "gpus"):
        import ray.train.torch  # noqa: F401


def tune_on_cluster(
    request: TuneRequest,
    chunks: ChunkSource,
    short_chunks: ChunkSource | None,
    held_out: Sequence[TokenArray],
    on_log: OnLog,
    on_checkpoint: OnCheckpoint,
    pool: PoolRequest,
    resume: Checkpoint | None = None,
) -> Path:
    """As ``workers.finetune.tune``, whose arguments these are, on the workers of a pool.

    Parameters
    ----------
    request: its folders must be seen at the same paths by the driver and all workers; its device is the pool's.
    pool: at most how many workers, each on one GPU or on ``request.threads`` CPU cores, and on which cluster; without
        an address one is started here, or the one that this process has joined already is used. As many are taken as
        divide the batch. A share of a GPU is a whole one here.

    Raises
    ------
    LongRopeError
        As ``tune``; or the cluster has too little room, or a worker was lost.
    """
    if pool.ray_address is None:
        prepare_local_ray()
    import ray

    from workers.actor import join_cluster, settle, start_cluster

    joined = ray.is_initialized()
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        if not joined and pool.ray_address is None:
            start_cluster((pool.workers or 1) * request.threads)
        elif not joined:
            join_cluster(str(pool.ray_address))
    finally:
        signal.signal(signal.SIGTERM, terminated)  # Ray puts a handler of its own in its place
    try:
        share = pool.gpus_per_worker
        gpus, room = settle(PoolRequest(None, None if share is None else math.ceil(share)), 1)
        threads = 1 if gpus else request.threads
        if not gpus:
            _, room = settle(PoolRequest(None, 0), threads)
        workers = min(pool.workers or room, room)
        while request.tuning.micro_steps % workers:
            workers -= 1
        placed = replace(
            request,
            threads=threads,
            model=str(Path(request.model).resolve()) if Path(request.model).is_dir() else request.model,
            work=request.work.resolve(),
            device="cuda" if gpus else "cpu",
        )
        placed.work.mkdir(parents=True, exist_ok=True)
        work = ray.put((placed, chunks, short_chunks, list(held_out), resume))
        _run(work, placed, workers, on_log, on_checkpoint)
    finally:
        if not joined:
            ray.shutdown()
    return placed.work / MODEL


def _run(work: Any, request: TuneRequest, workers: int, on_log: OnLog, on_checkpoint: OnCheckpoint) -> None:
    """Start the workers, and record what they send until they have ended."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Empty, Queue

    on_gpus = request.device == "cuda"
    events, answers = (Queue(actor_options={"num_cpus": 0}) for _ in range(2))
    trainer = TorchTrainer(
        _worker,
        # The reference is in a list, so that Ray hands on the reference and not a copy of all documents.
        train_loop_config={"work": [work], "events": events, "answers": answers},
        torch_config=TorchConfig(backend="nccl" if on_gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=on_gpus, resources_per_worker={"CPU": request.threads, "GPU": int(on_gpus)}
        ),
        run_config=RunConfig(storage_path=str(request.work / "ray"), failure_config=FailureConfig(max_failures=0)),
    )
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(trainer.fit)
        try:
            while True:
                ended = running.done()  # before the look: what was sent until then is there to be seen
                try:
                    kind, *values = events.get(block=not ended, timeout=POLL)
                except Empty:
                    if ended:
                        break
                    continue
                if kind == "log":
                    on_log(*values)
                else:
                    on_checkpoint(*values)
                    answers.put(None)
        finally:
            for queue in (events, answers):  # a worker that still runs ends when it next has something to say
                queue.shutdown(force=True)
    if (lost := running.exception()) is not None:
        raise LongRopeError(_reason(lost)) from lost


def _worker(config: Mapping[str, Any]) -> None:
    """What each worker runs, in its own process, with its rank in the environment."""
    import ray

    request, chunks, short_chunks, held_out, resume = ray.get(config["work"][0])
    events, answers = config["events"], config["answers"]

    def recorded(checkpoint: Checkpoint) -> None:
        events.put(("checkpoint", checkpoint))
        answers.get()

    def logged(step: int, values: Mapping[str, float]) -> None:
        events.put(("log", step, dict(values)))

    tune(request, chunks, short_chunks, held_out, logged, recorded, resume)


def _reason(error: BaseException) -> str:
    """The sentence of ours that ended a worker, else that one was lost."""
    failures = getattr(error, "worker_failures", {}).values()
    for failure in failures:
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, LongRopeError):
                return str(cause)
            cause = cause.__cause__ or getattr(cause, "cause", None)
    reasons = [str(failure).strip().splitlines()[-1] for failure in failures if str(failure).strip()]
    reason = reasons[0] if reasons else type(error).__name__
    return f"The workers of the fine-tuning stage ended before it did ({reason}); resume it."
