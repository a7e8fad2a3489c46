"""Units scored in this process: what a worker is, and the way to run a study without Ray."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from searcher.errors import LongRopeError
from searcher.rope import Factors
from searcher.study import Outcome, Unit
from workers import engine
from workers.model import LoadedModel, ModelInfo, ModelRequest, load_model, model_digest, resolve_folder
from workers.perplexity import SCORER_VERSION, logits_at_once, logits_step, negative_log_likelihood, wrong_tokens
from workers.settings import MIN_CHUNK, prepare_local_ray
from workers.weights import SharedWeights

if TYPE_CHECKING:
    from workers.pool import RayScorer

PROBE_TOKENS = 128
TIME_LIMIT = 120.0  # seconds that every evaluation gets

Tokens = Mapping[str, npt.NDArray[np.uint32]]  # Document.sha256 -> tokens of the window


@dataclass(frozen=True)
class PoolRequest:
    """How many Ray workers, and where.

    Attributes
    ----------
    workers: each holds the whole model; None takes what the cluster has room for.
    gpus_per_worker: 0 on CPU, fractions share a card; None takes 1 where the cluster has GPUs.
    ray_address: None starts a cluster on this machine and stops it at the end; an address joins one.
    time_limit: seconds before which no evaluation counts as hanging, however short the others were.
    """

    workers: int | None = None
    gpus_per_worker: float | None = None
    ray_address: str | None = None
    time_limit: float = TIME_LIMIT


def describe(loaded: LoadedModel, request: ModelRequest, shared: SharedWeights | None = None) -> ModelInfo:
    """The model's identity, geometry and numerics profile; the digest of shared weights is taken as it is."""
    import transformers

    profile = {
        **loaded.settings,
        "threads": request.threads,
        "logits_at_once": logits_at_once(loaded.device),
        "scorer": SCORER_VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
    if shared is not None:
        weights = shared.sha256
    else:
        weights = model_digest(resolve_folder(request.path, request.trust_remote_code), request.trust_remote_code)
    return ModelInfo(weights, profile, loaded.spec, loaded.shipped, loaded.pairing)


def probe(loaded: LoadedModel) -> float | None:
    """Nats of a short text that is made of the vocabulary's size alone; None where they are not finite."""
    size = int(loaded.model.get_input_embeddings().num_embeddings)
    length = min(PROBE_TOKENS, loaded.spec.original_length)
    tokens = (np.arange(length, dtype=np.uint64) * 7919 % size).astype(np.uint32)
    factors = Factors(tuple(1 + pair / loaded.spec.pairs for pair in range(loaded.spec.pairs)), 4, 1.05)
    nats, _ = negative_log_likelihood(loaded, tokens, factors)
    return nats if math.isfinite(nats) else None


def score_unit(loaded: LoadedModel, tokens: Tokens, unit: Unit) -> Outcome:
    """One candidate on one document. A loss or gradient that is not finite is an outcome with a reason, no error."""
    start = time.perf_counter()
    window, document = tokens[unit.document.sha256], unit.document
    gradient: tuple[float, ...] | None = None
    if unit.gradient:
        from workers.refine import loss_and_gradient

        nll, count, gradient = loss_and_gradient(loaded, window, unit.factors, document.spans)
    elif document.greedy:
        nll, count = wrong_tokens(loaded, window, unit.factors, document.spans)
    else:
        nll, count = negative_log_likelihood(loaded, window, unit.factors, document.spans)
    failure = None if math.isfinite(nll) else f"the loss on {document.name} is {nll}"
    if failure is None and gradient is not None and not all(math.isfinite(value) for value in gradient):
        failure, gradient = f"the gradient on {document.name} is not finite", None
    return Outcome(unit.key, nll, count, time.perf_counter() - start, failure=failure, gradient=gradient)


def fit_chunk(loaded: LoadedModel, request: ModelRequest) -> LoadedModel:
    """The model with the largest chunk that its longest window has memory for, halved from the default to MIN_CHUNK.

    A stated chunk is taken as it is. So is the default where memory is promised without being there: on a CPU without a
    limit on address space, too little memory ends the process and cannot be tried out. Elsewhere the window is tried
    once: all that it holds at its peak, but only two pieces through two layers. Nothing is halved after this, since the
    chunk is part of the numerics profile; what still runs out of memory is a failed outcome.

    Raises
    ------
    LongRopeError
        Even the smallest chunk does not fit.
    """
    if loaded.chunk is None or request.chunk is not None or not _refuses_memory(loaded.device):
        return loaded
    chunk = loaded.chunk
    while chunk >= MIN_CHUNK:
        fitted = replace(loaded, chunk=chunk, settings={**loaded.settings, "chunk": chunk})
        if _fits(fitted, request.target_length):
            return fitted
        chunk //= 2
    raise LongRopeError(
        f"{request.target_length} tokens do not fit into the memory of {loaded.device}, even in chunks of {MIN_CHUNK}; "
        "take a shorter target, bfloat16, or leave hidden states or weights on the host (hidden_on_host, "
        "stream_weights)."
    )


def _fits(loaded: LoadedModel, length: int) -> bool:
    try:
        engine.trial(loaded, length, logits_step(loaded))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        fits = False
    else:
        fits = True
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on a CPU torch says so in a plain RuntimeError."""
    named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return named or "can't allocate memory" in str(error) or "out of memory" in str(error)


def _refuses_memory(device: torch.device) -> bool:
    """Whether asking for too much memory is an error that can be caught."""
    if device.type != "cpu":
        return True
    if sys.platform == "win32":
        return False
    import resource

    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def check_vocabulary(loaded: LoadedModel, tokens: Tokens) -> None:
    """Refuse tokens the model has no embedding for: the tokenizer is of another model."""
    size = int(loaded.model.get_input_embeddings().num_embeddings)
    highest = max((int(window.max()) for window in tokens.values()), default=0)
    if highest >= size:
        raise LongRopeError(
            f"The documents hold token {highest}, but the model embeds only {size}; tokenizer and model do not match."
        )


@contextmanager
def open_scorer(
    request: ModelRequest, tokens: Tokens, pool: PoolRequest | None, say: Callable[[str], None] | None = None
) -> Iterator[LocalScorer | RayScorer]:
    """A scorer over Ray workers, or in this process where ``pool`` is None; closed on exit.

    Parameters
    ----------
    say: told, a sentence at a time, of workers and nodes that were lost, joined or set aside.
    """
    if pool is None:
        yield LocalScorer(request, tokens)
        return
    if pool.ray_address is None:
        prepare_local_ray()
    from workers.pool import RayScorer

    scorer = RayScorer(request, tokens, pool, say=say)
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
    shared: see ``load_model``.
    """

    def __init__(self, request: ModelRequest, tokens: Tokens, shared: SharedWeights | None = None) -> None:
        # Equal bits on equal hardware: cuBLAS reads the variable when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.loaded = fit_chunk(load_model(request, shared), request)
        self.info = replace(describe(self.loaded, request, shared), probe=probe(self.loaded))
        self._tokens = tokens
        check_vocabulary(self.loaded, tokens)

    @property
    def fingerprint(self) -> str:
        return self.info.fingerprint

    def evaluate(self, units: Sequence[Unit], spare: Sequence[Unit] = ()) -> Iterator[Outcome]:  # noqa: ARG002
        """One unit after the other, in the order given; one worker is never idle, so spare units are left alone."""
        for unit in units:
            try:
                outcome = score_unit(self.loaded, self._tokens, unit)
            except (RuntimeError, MemoryError) as error:  # out of memory above all
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                outcome = Outcome(unit.key, None, 0, failure=reason)
            yield replace(outcome, worker="local")

    def built_upon(self, keys: Collection[str]) -> None:
        """Nothing: it corrects nothing."""
