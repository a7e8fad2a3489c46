"""A thin Ray actor: one worker that holds one model and scores units."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import ray

from searcher.rope import Factors
from searcher.study import Document, Outcome
from workers.model import ModelInfo, ModelRequest
from workers.scorer import LocalScorer, score_unit


class Worker:
    """Loads on ``start``, so that a failure to load reaches the driver as a value of a call, not as a dead actor."""

    def __init__(self) -> None:
        self._scorer: LocalScorer | None = None
        self._tokens: Mapping[str, Any] = {}

    def start(self, request: ModelRequest, tokens: Mapping[str, Any]) -> ModelInfo:
        """Load the model and describe it."""
        self._tokens = tokens
        self._scorer = LocalScorer(request, tokens)
        return self._scorer.info

    def score(self, key: str, factors: Factors, document: Document) -> Outcome:
        """One unit."""
        if self._scorer is None:
            raise RuntimeError("start the worker first")
        return score_unit(self._scorer.loaded, self._tokens, key, factors, document)

    def pid(self) -> int:
        """Process id, for tests that kill it and for monitoring."""
        return os.getpid()


def create_worker(cpus: int, gpus: float) -> Any:
    """A handle to a new worker; no restarts and no retries of Ray's own, since the pool keeps the books."""
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(Worker)
    return remote.remote()
