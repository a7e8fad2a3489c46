"""Units scored in this process: what a worker is, and the way to run a study without Ray."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from searcher.errors import LongRopeError
from searcher.rope import Factors
from searcher.study import Document, Outcome, Unit
from workers.model import LoadedModel, ModelRequest, load_model, model_digest, resolve_folder
from workers.perplexity import LOGITS_AT_ONCE, SCORER_VERSION, negative_log_likelihood

Tokens = Mapping[str, npt.NDArray[np.uint32]]  # Document.sha256 -> tokens of the window
Profile = dict[str, str | int | None]


def describe(loaded: LoadedModel, request: ModelRequest) -> Profile:
    """The numerics profile: with the model and the window, everything that decides the last bit of a score."""
    import transformers

    return {
        **loaded.settings,
        "threads": request.threads,
        "logits_at_once": LOGITS_AT_ONCE,
        "scorer": SCORER_VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }


def fingerprint(weights_sha256: str, profile: Profile) -> str:
    """SHA-256 of model and numerics profile; see ``searcher.study.evaluation_key``."""
    text = json.dumps({"model": weights_sha256, "profile": profile}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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


class LocalScorer:
    """A ``searcher.study.Scorer`` in this process.

    Parameters
    ----------
    request: the model and how to run it.
    tokens: every window that will be asked for.
    """

    def __init__(self, request: ModelRequest, tokens: Tokens) -> None:
        if request.device == "cpu" or not torch.cuda.is_available():
            torch.use_deterministic_algorithms(True)
        self.loaded = load_model(request)
        self.weights_sha256 = model_digest(resolve_folder(request.path))
        self.profile = describe(self.loaded, request)
        self._tokens = tokens
        check_vocabulary(self.loaded, tokens)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.weights_sha256, self.profile)

    def evaluate(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        """One unit after the other, in the order given."""
        for unit in units:
            try:
                outcome = score_unit(self.loaded, self._tokens, unit.key, unit.factors, unit.document)
            except (RuntimeError, MemoryError) as error:  # out of memory above all
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                outcome = Outcome(unit.key, None, 0, failure=reason)
            yield replace(outcome, worker="local")

    def close(self) -> None:
        """Nothing to release: the model goes with the process."""
