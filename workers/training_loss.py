"""The loss of a causal model as its own forward, in pieces: what fine-tuning differentiates.

Never more than a piece of the logits lives at one time, and layers and pieces of their feed-forward blocks are
checkpoints. It is the model's own forward that gives the loss, so whatever wraps the model sees one ordinary call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from searcher.rope import Factors
from workers import attention as own_attention
from workers.memo import replaced_forward
from workers.model import LoadedModel, decoder_layers
from workers.perplexity import logits_at_once, only_head
from workers.refine import FEED_FORWARD, TOKENS_AT_ONCE

TRAINING_ATTENTION = "longrope-training"


@contextmanager
def trained_under(loaded: LoadedModel, factors: Factors | None, again: bool) -> Iterator[None]:
    """A block in which the causal model's forward gives the loss; layers are checkpoints where ``again`` says so."""
    with ExitStack() as stack:
        for layer in decoder_layers(loaded.model) if again else ():
            for name in FEED_FORWARD:
                if isinstance(block := getattr(layer, name, None), nn.Module):
                    stack.enter_context(replaced_forward(block, _in_pieces(block.forward)))
            stack.enter_context(replaced_forward(layer, _checkpoint_of(layer.forward)))
        stack.enter_context(replaced_forward(loaded.model, loss_forward(loaded, factors)))
        yield


def loss_forward(loaded: LoadedModel, factors: Factors | None) -> Callable[..., dict[str, Tensor]]:
    """A forward for the causal model that gives its mean loss, and never more than a piece of its logits.

    It takes ``input_ids``, (n, L), and ``short``: whether they are rotated by the model's own RoPE instead of the
    factors. Every position but the first is scored, each the same. A piece is computed again on the way back, through
    the model's own head, unless there is only one.
    """
    causal = loaded.model
    forward = causal.forward
    vocabulary = int(causal.config.get_text_config().vocab_size)

    def nats(hidden: Tensor, target: Tensor) -> Tensor:
        with only_head(causal):
            logits = forward(inputs_embeds=hidden, use_cache=False).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="sum")

    def run(input_ids: Tensor, short: bool = False, **_: Any) -> dict[str, Tensor]:
        with loaded.under(None if short else factors):
            decoder = getattr(causal, causal.base_model_prefix)
            hidden = decoder(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        target = input_ids[:, 1:]
        step = max(16, logits_at_once(hidden.device) // (vocabulary * len(input_ids)))
        pieces = list(zip(torch.split(hidden, step, dim=1), torch.split(target, step, dim=1), strict=True))
        scored = nats if len(pieces) == 1 else _checkpoint_of(nats)
        return {"loss": torch.stack([scored(*piece) for piece in pieces]).sum() / target.numel()}

    return run


def _checkpoint_of(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def _in_pieces(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A feed-forward block, whose activations are the widest, piece by piece where a sequence is long."""

    def run(hidden: Tensor) -> Tensor:
        if hidden.shape[1] <= TOKENS_AT_ONCE:
            return forward(hidden)
        parts = [part.contiguous() for part in torch.split(hidden, TOKENS_AT_ONCE, dim=1)]  # mixtral's router views it
        return torch.cat([_checkpoint_of(forward)(part) for part in parts], dim=1)

    return run


def training_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Our attention under autocast: the rotation gives float32, for which CUDA has no flash kernel."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return own_attention.attention(module, query, key, value, *args, **kwargs)
