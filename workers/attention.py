"""Exact causal attention for query chunks, registered with transformers under the name ``longrope``.

Queries are the last ones of the keys so far: query i of n sees keys 0 .. k - n + i (lower-right causal). No mask of
queries x keys is ever built. transformers' own ``sdpa`` function cannot serve here: without a mask and with fewer
queries than keys it cuts the keys to the number of queries, and says nothing.

With as many queries as keys, ``scaled_dot_product_attention`` does it. Else, on CUDA, the flash kernel that is
lower-right causal; on CPU, the keys before the chunk and those of the chunk itself, each in the flash kernel, merged by
their log-sum-exp. Windowed attention goes in blocks of queries, keys cut to what the block sees. Capped logits, and
whatever no fused kernel takes, are written out, in blocks of queries of a stated size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from searcher.errors import LongRopeError

NAME = "longrope"
# Scores that live at one time where attention is written out: 32 MiB of float32, 512 MiB on an accelerator.
SCORES_AT_ONCE = {"cpu": 2**23}
SCORES_AT_ONCE_ELSEWHERE = 2**27


def register() -> None:
    """Make ``attn_implementation="longrope"`` known to transformers; again does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, no_mask)


def no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """In the place of transformers' mask makers: causality and window are the attention function's own business."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise LongRopeError("The attention function longrope takes sequences without padding; score them one by one.")


def attention(
    _module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Differentiable throughout; at full speed where there are as many queries as keys.

    Parameters
    ----------
    query: (batch, heads, queries, head_dim), the last queries of the keys.
    key, value: (batch, key-value heads, keys, head_dim); heads are a multiple of key-value heads, which are not copied.
    attention_mask: None.
    scaling: of the logits; None for head_dim^-0.5.
    sliding_window: keys a query sees, itself among them.
    softcap: logits become softcap * tanh(logits / softcap).
    s_aux: None; attention sinks are not computed.

    Returns
    -------
    (batch, queries, heads, head_dim), and no weights.
    """
    if attention_mask is not None:
        raise LongRopeError("The attention function longrope is causal and takes no mask.")
    if s_aux is not None:
        raise LongRopeError("The attention function longrope computes no attention sinks; use --attention eager.")
    queries, keys = query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    windowed = sliding_window is not None and sliding_window < keys
    window = sliding_window if windowed else None
    wanting = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    if softcap is not None or key.shape[-1] != value.shape[-1]:
        result = _written_out(query, key, value, scale, window, softcap, dropout)
    elif window is not None:
        result = _windowed(query, key, value, scale, window, dropout)
    elif not _fused(query, key, value, dropout):
        result = _written_out(query, key, value, scale, None, None, dropout)
    elif queries == keys:
        result = scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=True
        )
    elif query.device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right

        bias: Any = causal_lower_right(queries, keys)
        result = scaled_dot_product_attention(query, key, value, bias, dropout, scale=scale, enable_gqa=True)
    elif query.device.type == "cpu" and not wanting and dropout == 0:
        result = _merged(query, key, value, scale)
    else:
        result = _written_out(query, key, value, scale, None, None, dropout)
    return result.transpose(1, 2).contiguous(), None


def _fused(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether a kernel exists that holds no scores. On CUDA that is a matter of dtype and head size."""
    if query.device.type != "cuda":
        return True
    from torch.backends.cuda import SDPAParams, can_use_flash_attention

    # Asked as if not causal: with fewer queries than keys the check refuses that, yet the kernel is lower-right causal.
    return can_use_flash_attention(SDPAParams(query, key, value, None, dropout, False, True))


def _merged(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Past and diagonal apart, weighed by how much of the softmax's denominator each holds."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    past = key.shape[2] - query.shape[2]
    own, own_sum = kernel(query, key[:, :, past:], value[:, :, past:], is_causal=True, scale=scale)
    before, before_sum = kernel(query, key[:, :, :past], value[:, :, :past], is_causal=False, scale=scale)
    share = torch.sigmoid(before_sum - own_sum)[..., None]
    return torch.lerp(own.float(), before.float(), share).to(own.dtype)


def _windowed(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, dropout: float) -> Tensor:
    """Blocks of queries, each against the keys its window reaches, under a mask of that size."""
    queries, past = query.shape[2], key.shape[2] - query.shape[2]
    block = min(max(window // 4, 64), 1024)  # a quarter more keys than the window holds; a mask of a few MiB

    def rows(part: Tensor, near: Tensor, worth: Tensor, place: int, first: int) -> Tensor:
        if part.device.type == "cuda":  # its kernels that take a mask want as many key-value heads as heads
            groups = part.shape[1] // near.shape[1]
            near, worth = near.repeat_interleave(groups, 1), worth.repeat_interleave(groups, 1)
        seen = _seen(place, place + part.shape[2], first, window, part.device)
        return scaled_dot_product_attention(part, near, worth, seen[None, None], dropout, scale=scale, enable_gqa=True)

    results = []
    for start in range(0, queries, block):
        end = min(start + block, queries)
        first = max(0, past + start - window + 1)
        near, worth = key[:, :, first : past + end], value[:, :, first : past + end]
        results.append(_again(rows, query[:, :, start:end], near, worth, past + start, first))
    return torch.cat(results, dim=2)


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Blocks of queries of SCORES_AT_ONCE scores; softmax in float32."""
    queries, past = query.shape[2], key.shape[2] - query.shape[2]
    at_once = SCORES_AT_ONCE.get(query.device.type, SCORES_AT_ONCE_ELSEWHERE)
    reach = key.shape[2] if window is None else min(2 * window, key.shape[2])
    block = max(1, at_once // (query.shape[0] * query.shape[1] * reach))
    if window is not None:
        block = min(block, window)

    def rows(part: Tensor, near: Tensor, worth: Tensor, place: int, first: int) -> Tensor:
        batch, heads, count, width = part.shape
        groups = heads // near.shape[1]
        grouped = part.reshape(batch, near.shape[1], groups * count, width)
        scores = (grouped @ near.transpose(2, 3) * scale).float()
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        seen = _seen(place, place + count, first, window, part.device)
        scores = scores.view(batch, near.shape[1], groups, count, -1).masked_fill(~seen, -torch.inf)
        weights = torch.nn.functional.dropout(scores.softmax(dim=-1).to(part.dtype), dropout, training=dropout > 0)
        return (weights.flatten(2, 3) @ worth).reshape(batch, heads, count, -1)

    results = []
    for start in range(0, queries, block):
        end = min(start + block, queries)
        first = 0 if window is None else max(0, past + start - window + 1)
        near, worth = key[:, :, first : past + end], value[:, :, first : past + end]
        # Under a gradient each block is computed again on the way back, so that its scores need not be kept.
        results.append(_again(rows, query[:, :, start:end], near, worth, past + start, first))
    return torch.cat(results, dim=2)


def _again(function: Callable[..., Tensor], *args: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return function(*args)
    result: Tensor = checkpoint(function, *args, use_reentrant=False)
    return result


def _seen(start: int, end: int, first: int, window: int | None, device: torch.device) -> Tensor:
    """Which of the keys ``first`` .. ``end`` - 1 the queries at ``start`` .. ``end`` - 1 see: (queries, keys), bool."""
    place = torch.arange(start, end, device=device)[:, None]
    keys = torch.arange(first, end, device=device)
    seen = keys <= place
    return seen if window is None else seen & (keys > place - window)
