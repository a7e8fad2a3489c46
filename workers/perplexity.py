"""Exact token-weighted negative log-likelihood of a window under a model, without a full logits matrix.

The decoder runs once over all tokens; its hidden states then go through the model's own head in chunks. The head is
called with the decoder replaced by a pass-through, so multipliers, caps and biases on the logits are the model's own
code, not a copy of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from searcher.rope import Factors
from workers.model import LoadedModel

SCORER_VERSION = 2  # raise it with any change that can alter a score
LOGITS_AT_ONCE = 2**24  # 64 MiB of float32 logits


class _Passthrough(nn.Module):
    """In the decoder's place: its output is its input."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


@contextmanager
def _only_head(model: Any) -> Iterator[None]:
    prefix = model.base_model_prefix
    decoder = getattr(model, prefix)
    setattr(model, prefix, _Passthrough())
    try:
        yield
    finally:
        setattr(model, prefix, decoder)


@torch.inference_mode()
def token_losses(loaded: LoadedModel, tokens: npt.NDArray[np.uint32], factors: Factors | None) -> Tensor:
    """Negative log-likelihood of every token but the first, shape (L - 1,), float64, in nats, on the CPU.

    Parameters
    ----------
    tokens: one window, shape (L,), BOS included.
    factors: the rotation; None for the model as it is.
    """
    model = loaded.model
    ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64), device=loaded.device)[None]
    with loaded.under(factors):
        hidden = getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state
    step = max(16, LOGITS_AT_ONCE // int(model.config.get_text_config().vocab_size))
    losses = []
    with _only_head(model):
        for start in range(0, ids.shape[1] - 1, step):
            end = min(start + step, ids.shape[1] - 1)
            logits = model(inputs_embeds=hidden[:, start:end], use_cache=False).logits[0]
            target = ids[0, start + 1 : end + 1]
            losses.append(nn.functional.cross_entropy(logits.float(), target, reduction="none").double().cpu())
    return torch.cat(losses)


def negative_log_likelihood(
    loaded: LoadedModel, tokens: npt.NDArray[np.uint32], factors: Factors | None
) -> tuple[float, int]:
    """Total nats of a window and the number of tokens scored, L - 1. Arguments as for ``token_losses``."""
    losses = token_losses(loaded, tokens, factors)
    return float(losses.sum()), len(losses)
