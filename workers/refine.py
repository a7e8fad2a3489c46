"""The gradient of a window's loss by the rescale factors, through the frozen model.

The loss is smooth in ln lambda, and one backward pass gives all its derivatives at once, for about the price of two
more forwards. Only cos and sin carry a gradient: the weights ask for none.

Where the activations would take more than KEPT_BYTES, or the window is longer than TOKENS_AT_ONCE, every decoder layer
and every piece of the head is a checkpoint, computed again on the way back, and so is every piece of a layer's
feed-forward block. Memory then holds the hidden states between layers, the attention of one layer, and one piece of the
widest activations; weights that are streamed visit the device for one layer's turn, on the way there and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from searcher.errors import LongRopeError
from searcher.rope import Factors
from workers.apply import RescaledRotary, rescaled
from workers.memo import replaced_forward
from workers.model import LoadedModel, decoder_layers
from workers.perplexity import logits_step, only_head, scored_ranges

TOKENS_AT_ONCE = 4096  # of a feed-forward block
# Activations up to so many bytes are kept for the way back: nothing is computed twice, which saves a quarter of a step.
KEPT_BYTES = 2**30
FEED_FORWARD = ("mlp", "block_sparse_moe", "feed_forward")  # what families call it


def loss_and_gradient(
    loaded: LoadedModel, tokens: npt.NDArray[np.uint32], factors: Factors, spans: Sequence[tuple[int, int]] = ()
) -> tuple[float, int, tuple[float, ...]]:
    """Total nats of a window, the number of tokens scored, and the gradient of the total.

    Parameters
    ----------
    tokens: one window, shape (L,), BOS included.
    factors: one list for all layers; n_hat has no gradient.
    spans: see ``searcher.study.Document``.

    Returns
    -------
    nats; tokens scored; by ln lambda_i, pair after pair, and last by ln attention factor: pairs + 1 values.

    Raises
    ------
    LongRopeError
        The factors differ by layer or are not of the model, or a span does not lie within the window.
    """
    if not factors.shared:
        raise LongRopeError("A refinement moves one list of rescale factors for all layers; these differ by layer.")
    model = loaded.model
    (lambdas,) = factors.by_layer()
    if len(lambdas) != loaded.spec.pairs:
        raise LongRopeError(f"The model rotates {loaded.spec.pairs} pairs; the factors are {len(lambdas)}.")
    pieces = _pieces(len(tokens), spans, logits_step(loaded))
    if not pieces:
        return 0.0, 0, (0.0,) * (len(lambdas) + 1)
    # Tokens made under inference mode could not be saved for the way back.
    with _strict(loaded.device), torch.inference_mode(False), torch.enable_grad():
        ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64), device=loaded.device)[None]
        logs = torch.tensor([math.log(value) for value in lambdas], dtype=torch.float64, requires_grad=True)
        log_attention = torch.tensor(math.log(factors.attention_factor), dtype=torch.float64, requires_grad=True)
        rotation = _Rotary(loaded, factors, logs, log_attention)
        total = torch.zeros((), dtype=torch.float64, device=loaded.device)
        kept = _all_kept(loaded, len(tokens))
        nats = _nats if kept else partial(_again, _nats)
        # Until the gradient is there: what is computed again runs through it too.
        with nullcontext() if kept else _checkpointed(loaded), rescaled(model, [], [rotation]):
            hidden = getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state
            with only_head(model):
                for start, end in pieces:
                    total = total + nats(model, hidden[:, start - 1 : end - 1], ids[0, start:end])
                by_lambda, by_attention = torch.autograd.grad(total, (logs, log_attention))
    count = sum(end - start for start, end in pieces)
    return total.item(), count, (*by_lambda.tolist(), by_attention.item())


@contextmanager
def _strict(device: torch.device) -> Iterator[None]:
    """Equal bits on the way back too: where torch only warns, its attention kernels on CUDA add up in any order."""
    if device.type != "cuda" or not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warned)


class _Rotary(RescaledRotary):
    """The rotation as a function of ln lambda and ln attention factor, shapes (pairs,) and ()."""

    def __init__(self, loaded: LoadedModel, factors: Factors, logs: Tensor, log_attention: Tensor) -> None:
        (lambdas,) = factors.by_layer()
        attention = factors.attention_factor
        super().__init__(loaded.spec.theta, lambdas, factors.n_hat, attention, loaded.layout, loaded.cast)
        self.rescaled = self.original * torch.exp(-logs)
        self.attention_factor = torch.exp(log_attention)

    forward = RescaledRotary.rotation


def _all_kept(loaded: LoadedModel, length: int) -> bool:
    """Whether nothing is computed again: about how many bytes the way back then needs of all layers and the head.

    Not where weights are streamed, nor where a feed-forward block goes in pieces, which may alter the last bit: so
    where weights live alters none.
    """
    if loaded.stream_weights or length > TOKENS_AT_ONCE:
        return False
    config = loaded.model.config.get_text_config()
    wide = 4 * int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    layer = (12 * int(config.hidden_size) + wide) * loaded.model.dtype.itemsize
    total: int = length * (int(config.num_hidden_layers) * layer + 3 * 4 * int(config.vocab_size))
    return total <= KEPT_BYTES


def _again(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    return result


def _pieces(length: int, spans: Sequence[tuple[int, int]], step: int) -> list[tuple[int, int]]:
    """The scored positions, in pieces of at most ``step``."""
    return [
        (start, min(start + step, last))
        for first, last in scored_ranges(length, spans)
        for start in range(first, last, step)
    ]


def _nats(model: Any, hidden: Tensor, target: Tensor) -> Tensor:
    logits = model(inputs_embeds=hidden, use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits.float(), target, reduction="none").double().sum()


@contextmanager
def _checkpointed(loaded: LoadedModel) -> Iterator[None]:
    """Every decoder layer a checkpoint, and every piece of its feed-forward block another."""
    with ExitStack() as stack:
        for layer in decoder_layers(loaded.model):
            for name in FEED_FORWARD:
                if isinstance(block := getattr(layer, name, None), nn.Module):
                    stack.enter_context(replaced_forward(block, _in_pieces(block)))
            forward = _visiting(layer, loaded.device) if loaded.stream_weights else layer.forward
            stack.enter_context(replaced_forward(layer, _checkpoint_of(forward)))
        yield


def _checkpoint_of(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return _again(forward, *args, **kwargs)

    return run


def _visiting(layer: nn.Module, device: torch.device) -> Callable[..., Any]:
    """The layer's forward with its weights copied to the device for as long as it runs.

    A copy takes a few hundredths of what a long window spends in the layer, so none is fetched ahead.
    """
    forward = layer.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        held = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        weights = {name: torch.empty_like(each, device=device) for name, each in held.items()}
        for name, each in held.items():
            weights[name].copy_(each, non_blocking=True)
        with replaced_forward(layer, forward):
            return torch.func.functional_call(layer, weights, args, kwargs)

    return run


def _in_pieces(block: nn.Module) -> Callable[..., Any]:
    """A feed-forward block that takes a long sequence piece by piece.

    A piece is computed again when its layer's visit may be over, so it takes the weights of that visit along: as
    arguments, which the layer's own checkpoint gives up and computes again like any others.
    """
    forward = block.forward

    def run(hidden: Tensor) -> Any:
        if hidden.shape[1] <= TOKENS_AT_ONCE:
            return forward(hidden)
        names, weights = zip(*block.named_parameters(), *block.named_buffers(), strict=True)

        def piece(part: Tensor, *values: Tensor) -> Tensor:
            result: Tensor = torch.func.functional_call(block, dict(zip(names, values, strict=True)), (part,))
            return result

        parts = torch.split(hidden, TOKENS_AT_ONCE, dim=1)
        return torch.cat([_again(piece, part, *weights) for part in parts], dim=1)

    return run
