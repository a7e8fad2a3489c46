"""Units scored in this process: what a worker is, and the way to run a study without Ray."""

from __future__ import annotations

import math
import os
import platform
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from searcher.errors import LongRopeError
from searcher.rope import Factors
from searcher.study import Document, Outcome, Unit
from workers.model import LoadedModel, ModelInfo, ModelRequest, load_model, model_digest, resolve_folder
from workers.perplexity import LOGITS_AT_ONCE, SCORER_VERSION, negative_log_likelihood

if TYPE_CHECKING:
    from workers.pool import RayScorer

Tokens = Mapping[str, npt.NDArray[np.uint32]]  # Document.sha256 -> tokens of the window


@dataclass(frozen=True)
class PoolRequest:
    """How many Ray workers, and where.

    Attributes
    ----------
    workers: each holds the whole model; None takes what the cluster has room for.
    gpus_per_worker: 0 on CPU, fractions share a card; None takes 1 where the cluster has GPUs.
    ray_address: None starts a cluster on this machine and stops it at the end; an address joins one.
    """

    workers: int | None = None
    gpus_per_worker: float | None = None
    ray_address: str | None = None


def describe(loaded: LoadedModel, request: ModelRequest) -> ModelInfo:
    """The model's identity, geometry and numerics profile."""
    import transformers

    profile = {
        **loaded.settings,
        "threads": request.threads,
        "logits_at_once": LOGITS_AT_ONCE,
        "scorer": SCORER_VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
    folder = resolve_folder(request.path, request.trust_remote_code)
    weights = model_digest(folder, request.trust_remote_code)
    return ModelInfo(weights, profile, loaded.spec, loaded.shipped, loaded.pairing)


def score_unit(loaded: LoadedModel, tokens: Tokens, key: str, factors: Factors | None, document: Document) -> Outcome:
    """One candidate on one document. A loss that is not finite is an outcome with a reason, not an error."""
    start = time.perf_counter()
    nll, count = negative_log_likelihood(loaded, tokens[document.sha256], factors)
    failure = None if math.isfinite(nll) else f"the loss on {document.name} is {nll}"
    return Outcome(key, nll, count, time.perf_counter() - start, failure=failure)


def check_vocabulary(loaded: LoadedModel, tokens: Tokens) -> None:
    """Refuse tokens the model has no embedding for: the tokenizer is of another model."""
    size = int(loaded.model.get_input_embeddings().num_embeddings)
    highest = max((int(window.max()) for window in tokens.values()), default=0)
    if highest >= size:
        raise LongRopeError(
            f"The documents hold token {highest}, but the model embeds only {size}; tokenizer and model do not match."
        )


@contextmanager
def open_scorer(request: ModelRequest, tokens: Tokens, pool: PoolRequest | None) -> Iterator[LocalScorer | RayScorer]:
    """A scorer over Ray workers, or in this process where ``pool`` is None; closed on exit."""
    if pool is None:
        yield LocalScorer(request, tokens)
        return
    # Read when ray is imported and its processes start. A cluster of our own speaks on the loopback interface only,
    # needs a token that no other user of the machine has, and does not yield to everything else that runs: Ray's
    # default niceness of 15 makes workers ten times slower beside two busy processes on two cores.
    if pool.ray_address is None:
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    from workers.pool import RayScorer

    scorer = RayScorer(request, tokens, pool)
    try:
        yield scorer
    finally:
        scorer.close()


class LocalScorer:
    """A ``searcher.study.Scorer`` in this process.

    Parameters
    ----------
    request: the model and how to run it.
    tokens: every window that will be asked for.
    """

    def __init__(self, request: ModelRequest, tokens: Tokens) -> None:
        # Equal bits on equal hardware: cuBLAS reads the variable when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.loaded = load_model(request)
        self.info = describe(self.loaded, request)
        self._tokens = tokens
        check_vocabulary(self.loaded, tokens)

    @property
    def fingerprint(self) -> str:
        return self.info.fingerprint

    def evaluate(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        """One unit after the other, in the order given."""
        for unit in units:
            try:
                outcome = score_unit(self.loaded, self._tokens, unit.key, unit.factors, unit.document)
            except (RuntimeError, MemoryError) as error:  # out of memory above all
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                outcome = Outcome(unit.key, None, 0, failure=reason)
            yield replace(outcome, worker="local")
