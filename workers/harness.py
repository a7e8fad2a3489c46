"""Tasks of lm-evaluation-harness through its own library, on a model under rescale factors.

Prompts, metrics and data sets are the library's; it comes with the extra ``evaluation``, and fetches what its tasks
need. What is ours: the model it calls is rotated, one sequence at a time, since padding would move positions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from searcher.errors import LongRopeError, needs
from searcher.rope import Factors
from workers.model import LoadedModel


def harness_results(
    loaded: LoadedModel,
    tokenizer: Any,
    tasks: Sequence[str | dict[str, Any]],
    length: int,
    factors: Factors | None,
    few_shot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """What ``lm_eval.simple_evaluate`` found: task -> metric -> figure, with the numbers of samples and of examples.

    Parameters
    ----------
    tasks: names that the library knows, or task configurations as it takes them.
    length: tokens of prompt and answer together; what is longer the library cuts at its beginning.
    factors: the rotation, one for all lengths; None for the model as it is, or as a block around this call makes it.
    few_shot: examples before each question; None for each task's own number.
    limit: samples of each task, at most; None for all.

    Returns
    -------
    results, n-samples, n-shot and versions, each by task, and the library's version as ``lm_eval``.

    Raises
    ------
    LongRopeError
        lm-eval is not installed, or the model's layers are streamed, so that it cannot be called as a whole.
    """
    if loaded.stream_weights:
        raise LongRopeError(
            "lm-evaluation-harness calls the whole model, but its layers are streamed from the host; load it without "
            "stream_weights."
        )
    with needs("A task of lm-evaluation-harness", "lm-eval", "evaluation"):
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    with loaded.under(factors):
        model = HFLM(
            pretrained=loaded.model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # the library gives it a padding token
            max_length=length,
            batch_size=1,
            add_bos_token=tokenizer.bos_token_id is not None,
        )
        found = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), num_fewshot=few_shot, limit=limit, log_samples=False
        )
    kept = {name: found[name] for name in ("results", "n-samples", "n-shot", "versions")}
    return {**kept, "lm_eval": lm_eval.__version__}
