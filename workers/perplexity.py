"""Exact token-weighted negative log-likelihood of a window under a model, without a full logits matrix.

The decoder layers run as ``workers.engine`` says. Final norm, head and loss then go over the hidden states in pieces,
through the model's own forward: multipliers, caps and biases on the logits are its own code, not a copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from searcher.errors import LongRopeError
from searcher.rope import Factors
from workers import engine
from workers.model import LoadedModel

SCORER_VERSION = 3  # raise it with any change that can alter a score
# Logits that live at one time: 32 MiB of float32, 256 MiB on an accelerator, which needs many rows to be busy.
LOGITS_AT_ONCE = 2**23
LOGITS_AT_ONCE_ELSEWHERE = 2**26


class _Passthrough(nn.Module):
    """In the decoder's place: its output is its input."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


@contextmanager
def only_head(model: Any) -> Iterator[None]:
    """A block in which the causal model takes what its decoder returns, normed, as ``inputs_embeds``."""
    prefix = model.base_model_prefix
    decoder = getattr(model, prefix)
    setattr(model, prefix, _Passthrough())
    try:
        yield
    finally:
        setattr(model, prefix, decoder)


def token_losses(
    loaded: LoadedModel,
    tokens: npt.NDArray[np.uint32],
    factors: Factors | None,
    spans: Sequence[tuple[int, int]] = (),
) -> Tensor:
    """Negative log-likelihood of every scored token, in order, float64, in nats, on the CPU.

    Peak memory is the engine's, or hidden states and a few times LOGITS_AT_ONCE numbers, whichever is more.

    Parameters
    ----------
    tokens: one window, shape (L,), BOS included.
    factors: the rotation; None for the model as it is.
    spans: half-open ranges of positions to be scored, each position once; empty for all. Position 0 never is.

    Returns
    -------
    shape (L - 1,) without spans.
    """

    def losses(logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.float(), targets, reduction="none")

    return _at_scored(loaded, tokens, factors, spans, losses).double().cpu()


def wrong_tokens(
    loaded: LoadedModel,
    tokens: npt.NDArray[np.uint32],
    factors: Factors | None,
    spans: Sequence[tuple[int, int]],
) -> tuple[int, int]:
    """How many tokens of the spans are not the most likely ones after all before them, and how many there are.

    None is wrong exactly where greedy decoding from before a span gives the span: it sees the same tokens as long as it
    is right. Arguments as for ``token_losses``.
    """

    def wrong(logits: Tensor, targets: Tensor) -> Tensor:
        return logits.argmax(dim=-1) != targets

    found = _at_scored(loaded, tokens, factors, spans, wrong)
    return int(found.sum()), len(found)


@torch.inference_mode()
def _at_scored(
    loaded: LoadedModel,
    tokens: npt.NDArray[np.uint32],
    factors: Factors | None,
    spans: Sequence[tuple[int, int]],
    measure: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """What ``measure`` makes of the logits, (n, vocabulary), and targets, (n,), of the scored positions, in order."""
    ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64), device=loaded.device)[None]
    hidden = engine.hidden_states(loaded, ids, factors)
    step = logits_step(loaded)
    found = []
    for first, last in scored_ranges(ids.shape[1], spans):
        for start in range(first, last, step):
            end = min(start + step, last)
            logits = engine.logits(loaded, hidden[:, start - 1 : end - 1])
            found.append(measure(logits, ids[0, start:end]))
    return torch.cat(found) if found else torch.zeros(0)


def negative_log_likelihood(
    loaded: LoadedModel,
    tokens: npt.NDArray[np.uint32],
    factors: Factors | None,
    spans: Sequence[tuple[int, int]] = (),
) -> tuple[float, int]:
    """Total nats of a window and the number of tokens scored. Arguments as for ``token_losses``."""
    losses = token_losses(loaded, tokens, factors, spans)
    return float(losses.sum()), len(losses)


def logits_step(loaded: LoadedModel) -> int:
    """Positions that go through the head at one time."""
    return max(16, logits_at_once(loaded.device) // int(loaded.model.config.get_text_config().vocab_size))


def logits_at_once(device: torch.device) -> int:
    """Logits that live at one time."""
    return LOGITS_AT_ONCE if device.type == "cpu" else LOGITS_AT_ONCE_ELSEWHERE


def scored_ranges(length: int, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The positions that spans name, each once, as disjoint ranges in ascending order; all but 0 where there are none.

    Raises
    ------
    LongRopeError
        A span is empty or does not lie within the window.
    """
    ranges: list[tuple[int, int]] = []
    for start, end in sorted(spans) or [(0, length)]:
        if not 0 <= start < end <= length:
            raise LongRopeError(f"A span to score is a range within 0 .. {length}, not {start} .. {end}.")
        if ranges and start <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        else:
            ranges.append((start, end))
    return [(max(start, 1), end) for start, end in ranges if end > 1]
