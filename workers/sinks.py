"""Window attention with attention sinks (StreamingLLM, arXiv 2309.17453), exact, a whole document in one forward.

Of a cache of W tokens the first S places are the sinks, the document's first S tokens; the others are the most recent
tokens, the one that is read among them. Positions are those inside the cache. So query i stands at min(i, W - 1), sees
sink s at distance min(i, W - 1) - s, and the recent keys i - (W - S) < j <= i at their true distances.

A model rotates queries and keys before it calls its attention function. The logits of recent keys are then right as
they are, since rotation is relative. Those of the sinks are had by turning the query back by i - min(i, W - 1)
positions. Scores are computed in blocks of queries, each block x (W + block): no matrix of L x L is ever built.

The function works wherever queries are the last ones of the keys so far: under ``workers.engine``, in transformers' own
forward, and in generation with its cache, which here keeps all keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from searcher.errors import LongRopeError
from searcher.rope import Factors
from workers import attention as plain
from workers import engine, perplexity
from workers.apply import INTERLEAVED
from workers.model import LoadedModel
from workers.settings import OWN_ATTENTION

NAME = "longrope_sinks"
# Families that rotate in some layers only and do not say in which.
UNROTATED_LAYERS = ("exaone4",)


@dataclass(frozen=True)
class Sinks:
    """The cache: ``window`` tokens, of which the first ``sinks`` are the document's first; 0 for plain windows."""

    window: int
    sinks: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.sinks < self.window:
            raise LongRopeError(
                f"A window with attention sinks holds more tokens than sinks, not {self.window} with {self.sinks}."
            )


@dataclass(frozen=True)
class _Running:
    """What the attention function goes by: the cache, and radians a token by layer, one row where all share it."""

    sinks: Sinks
    frequencies: tuple[Tensor, ...]


_running: ContextVar[_Running | None] = ContextVar("attention sinks", default=None)


def refusal(loaded: LoadedModel) -> str | None:
    """Why a model cannot run with attention sinks; None where it can."""
    config = loaded.model.config.get_text_config()
    name = f"{type(loaded.model).__name__} cannot run with attention sinks: "
    if loaded.pairing == INTERLEAVED:
        return name + "it pairs neighbouring dimensions, and queries are turned back in halves only."
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return name + "it caps its attention logits."
    if loaded.settings.get("sliding_window") is not None:
        return name + "it attends to a window of its own; load it with --sliding-window off."
    if any(parameter.endswith("sinks") for parameter, _ in loaded.model.named_parameters()):
        return name + "it has learnt sinks of its own."
    if config.model_type in (*OWN_ATTENTION, *UNROTATED_LAYERS) or hasattr(config, "qk_rope_head_dim"):
        return name + "its attention does not rotate the first dimensions of every head, or lets no other function in."
    return None


@contextmanager
def attention_sinks(loaded: LoadedModel, sinks: Sinks, factors: Factors | None = None) -> Iterator[None]:
    """A block in which the model attends through a cache with sinks, and is rotated by ``factors``.

    What runs inside takes None for its own factors: ``token_losses(loaded, tokens, None)``, or the model itself.

    Parameters
    ----------
    factors: the rotation, n_hat 0; None for the unscaled RoPE, whatever the config says.

    Raises
    ------
    LongRopeError
        The family cannot be served, see ``refusal``; or the factors have n_hat > 0, which is not relative.
    """
    reason = refusal(loaded)
    if reason is not None:
        raise LongRopeError(reason)
    chosen = factors or Factors((1.0,) * loaded.spec.pairs)
    if chosen.n_hat:
        raise LongRopeError(
            f"Attention sinks give tokens new positions, so start tokens cannot keep theirs: n_hat must be 0, not "
            f"{chosen.n_hat}."
        )
    unscaled = torch.as_tensor(loaded.spec.inverse_frequencies())
    rows = tuple(unscaled / torch.tensor(row, dtype=torch.float64) for row in chosen.by_layer())
    model = loaded.model
    before = model.config._attn_implementation
    _register()
    model.set_attn_implementation(NAME)
    token = _running.set(_Running(sinks, rows))
    try:
        if model.config._attn_implementation != NAME:  # transformers only warns
            raise LongRopeError(f"{type(model).__name__} lets no attention function in, so it cannot have sinks.")
        with loaded.under(chosen):
            yield
    finally:
        _running.reset(token)
        model.set_attn_implementation(before)


def hidden_states_with_sinks(
    loaded: LoadedModel, ids: Tensor, window: int, sinks: int = 4, factors: Factors | None = None
) -> Tensor:
    """As ``engine.hidden_states``, (1, L, hidden size), of a model that attends through a cache with sinks."""
    with attention_sinks(loaded, Sinks(window, sinks), factors):
        return engine.hidden_states(loaded, ids, None)


def token_losses_with_sinks(
    loaded: LoadedModel,
    tokens: npt.NDArray[np.uint32],
    sinks: Sinks,
    factors: Factors | None = None,
    spans: tuple[tuple[int, int], ...] = (),
) -> Tensor:
    """As ``perplexity.token_losses``, of a model that attends through a cache with sinks."""
    with attention_sinks(loaded, sinks, factors):
        return perplexity.token_losses(loaded, tokens, None, spans)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, plain.no_mask)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, in a block of ``attention_sinks``; shapes as in ``workers.attention``."""
    running = _running.get()
    if running is None:
        raise LongRopeError("The attention function longrope_sinks runs only in a block of attention_sinks.")
    windowed = sliding_window is not None and sliding_window < key.shape[2]
    if windowed or softcap is not None or s_aux is not None or dropout or key.shape[-1] != value.shape[-1]:
        raise LongRopeError(
            "Attention sinks are computed for plain softmax attention alone, without a window, cap, sinks or dropout "
            "of the model's own."
        )
    sinks = running.sinks
    if key.shape[2] <= sinks.window:  # nothing has left the cache
        return plain.attention(module, query, key, value, attention_mask, scaling=scaling, **more)
    if attention_mask is not None:
        raise LongRopeError("Attention sinks take sequences without padding, and no mask; score them one by one.")
    layer = module.layer_idx if len(running.frequencies) > 1 else 0
    # A layer without rotation has nothing to be turned back.
    frequency = running.frequencies[layer] if getattr(module, "use_rope", True) else None
    past = key.shape[2] - query.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    recent = sinks.window - sinks.sinks
    results = []
    for start, end in _blocks(query, sinks.window):
        part, place = query[:, :, start:end], torch.arange(past + start, past + end, device=query.device)
        turned = part if frequency is None else _turned_back(part, (place - sinks.window + 1).clamp(min=0), frequency)
        first = max(0, past + start - recent + 1)
        last = past + end
        near = torch.arange(first, last, device=query.device)
        still = torch.arange(sinks.sinks, device=query.device)
        seen = torch.cat([still <= place[:, None] - recent, _within(near, place[:, None], recent)], dim=1)
        scores = torch.cat([_scores(turned, key[:, :, : sinks.sinks]), _scores(part, key[:, :, first:last])], dim=-1)
        weights = (scores * scale).float().masked_fill(~seen, -torch.inf).softmax(-1).to(part.dtype)
        values = torch.cat([value[:, :, : sinks.sinks], value[:, :, first:last]], dim=2)
        results.append((weights.flatten(2, 3) @ values).view(part.shape))
    return torch.cat(results, dim=2).transpose(1, 2).contiguous(), None


def _blocks(query: Tensor, window: int) -> list[tuple[int, int]]:
    """Ranges of queries whose scores are held at one time."""
    batch, heads, queries, _ = query.shape
    widest = min(max(window // 4, 64), 1024)
    at_once = plain.SCORES_AT_ONCE.get(query.device.type, plain.SCORES_AT_ONCE_ELSEWHERE)
    step = min(widest, max(1, at_once // (batch * heads * (window + widest))))
    return [(start, min(start + step, queries)) for start in range(0, queries, step)]


def _within(keys: Tensor, place: Tensor, recent: int) -> Tensor:
    return (keys <= place) & (keys > place - recent)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Products of queries and keys, (batch, key-value heads, heads of each, queries, keys); keys are not copied."""
    batch, heads, count, width = query.shape
    shared = key.shape[1]
    grouped = query.reshape(batch, shared, heads // shared * count, width)
    return (grouped @ key.transpose(2, 3)).view(batch, shared, heads // shared, count, -1)


def _turned_back(query: Tensor, by: Tensor, frequency: Tensor) -> Tensor:
    """Rotated queries, (batch, heads, n, head_dim), as they were ``by`` positions, (n,), earlier; pairs in halves.

    Angles in float64, as everywhere; dimensions beyond the rotary ones are left as they are.
    """
    pairs = len(frequency)
    device = torch.device("cpu") if query.device.type == "mps" else query.device  # which has no float64
    angles = by.to(device, torch.float64)[:, None] * frequency.to(device)
    cos, sin = angles.cos().to(query.device, torch.float32), angles.sin().to(query.device, torch.float32)
    one, other, rest = query[..., :pairs], query[..., pairs : 2 * pairs], query[..., 2 * pairs :]
    turned = torch.cat([one.float() * cos + other.float() * sin, other.float() * cos - one.float() * sin], dim=-1)
    return torch.cat([turned.to(query.dtype), rest], dim=-1)
