"""Where a document is scored: by a sliding window, each token once; and how the loss goes with the place in the window.

Sliding as Press et al. (arXiv 2108.12409, appendix B) and Position Interpolation (arXiv 2306.15595, section 3.2) do it:
the first window scores all its tokens, each later one is ``stride`` tokens further on and scores its last ``stride``
alone. So every token but those of the first window is read after at least window - stride tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from searcher.errors import LongRopeError
from workers.dataset import TokenisedDocument, Window, window_at
from workers.perplexity import scored_ranges

STRIDE, STRIDE_FROM = 256, 2048  # the papers' stride, for windows of so many tokens and more
SHORT_STRIDES = 8  # of a shorter window
FIRST_EDGE = 16  # positions below it are one bucket: few tokens, and all of them hard


def default_stride(window: int) -> int:
    """256 for windows of 2,048 tokens and more, an eighth of the window below that."""
    return STRIDE if window >= STRIDE_FROM else max(1, window // SHORT_STRIDES)


def sliding_windows(
    document: TokenisedDocument, window: int, stride: int, bos: int | None, most: int | None = None
) -> list[Window]:
    """The windows that score a document once; none where it is shorter than one of them.

    Every window holds ``window`` tokens, BOS first where there is one. The last ends with the document and scores what
    is left, at most ``stride`` tokens. What a window scores is its ``document.spans``; those of the first are empty,
    for all: all text tokens after BOS, or all but the first without one.

    Parameters
    ----------
    window, stride: in tokens; 1 <= stride < window, since a window's first token is never scored.
    most: windows, at most: the document is then scored up to where the last of them ends.

    Raises
    ------
    LongRopeError
        The stride does not lie in its range, or no window is asked for.
    """
    body = window - (bos is not None)
    if not 1 <= stride < window:
        raise LongRopeError(
            f"The stride of a window of {window} tokens is 1 to {window - 1}, or tokens are left out; not {stride}."
        )
    if most is not None and most < 1:
        raise LongRopeError(f"A document needs at least 1 window, not {most}.")
    n = len(document.tokens)
    if n < body:
        return []
    ends = [body, *range(body + stride, n, stride), n]
    if n == body:
        ends = [body]
    found = []
    for index, end in enumerate(ends[:most]):
        whole = window_at(document, end - body, window, bos)
        if index:
            fresh = end - ends[index - 1]
            whole = replace(whole, document=replace(whole.document, spans=((window - fresh, window),)))
        found.append(whole)
    return found


@dataclass(frozen=True)
class Bucket:
    """The loss at positions ``start`` .. ``end`` - 1 of the window: nats in total, and tokens scored there."""

    start: int
    end: int
    nll: float
    tokens: int


def log_spaced(length: int) -> tuple[int, ...]:
    """Edges of buckets that double: 1, 16, 32, 64, ..., up to the length, which is the last."""
    edges = [1]
    edge = FIRST_EDGE
    while edge < length:
        edges.append(edge)
        edge *= 2
    return (*edges, length)


def equally_spaced(length: int, count: int) -> tuple[int, ...]:
    """Edges of up to ``count`` buckets that hold equally many positions, to one position; fewer where there are fewer.

    Raises
    ------
    LongRopeError
        No bucket is asked for.
    """
    if count < 1:
        raise LongRopeError(f"Losses by position need at least 1 bucket, not {count}.")
    count = min(count, length - 1)
    return tuple(1 + i * (length - 1) // count for i in range(count + 1))


def scored_positions(length: int, spans: Sequence[tuple[int, int]] = ()) -> npt.NDArray[np.int64]:
    """The positions in a window that ``token_losses`` scores, in its order."""
    ranges = scored_ranges(length, spans)
    return np.concatenate([np.arange(first, last) for first, last in ranges] or [np.zeros(0, np.int64)])


def by_position(scored: Iterable[tuple[npt.NDArray[np.int64], Tensor]], edges: Sequence[int]) -> tuple[Bucket, ...]:
    """Losses summed into buckets over all windows, so that every token weighs the same.

    Parameters
    ----------
    scored: a window's scored positions and the loss of each, in nats.
    edges: ascending; bucket i is edges[i] .. edges[i + 1] - 1. Positions outside all buckets are left out.
    """
    if list(edges) != sorted(set(edges)) or len(edges) < 2:
        raise LongRopeError(f"Edges of position buckets are at least 2 ascending numbers, not {list(edges)}.")
    count = len(edges) - 1
    nll, tokens = np.zeros(count), np.zeros(count, np.int64)
    for positions, losses in scored:
        bucket = np.searchsorted(np.asarray(edges), positions, side="right") - 1
        inside = (bucket >= 0) & (bucket < count)
        weights = losses.to(torch.float64).numpy()[inside]
        nll += np.bincount(bucket[inside], weights=weights, minlength=count)
        tokens += np.bincount(bucket[inside], minlength=count)
    return tuple(
        Bucket(start, end, float(nats), int(number))
        for (start, end), nats, number in zip(pairwise(edges), nll, tokens, strict=True)
    )
