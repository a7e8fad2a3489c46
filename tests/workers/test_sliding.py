"""Every token of a document is scored once, with the context that the stride promises, as a plain loop does it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from searcher.errors import LongRopeError
from searcher.rope import Factors
from tests.tiny_models import VOCABULARY, WINDOW
from workers.dataset import TokenisedDocument
from workers.model import LoadedModel
from workers.perplexity import token_losses
from workers.sliding import (
    by_position,
    default_stride,
    equally_spaced,
    log_spaced,
    scored_positions,
    sliding_windows,
)

BOS = 0


def document(n: int, seed: int = 0) -> TokenisedDocument:
    """Text of n random tokens, no BOS among them."""
    tokens = np.random.default_rng(seed).integers(2, VOCABULARY, n).astype(np.uint32)
    return TokenisedDocument("text", f"{n}-{seed}", tokens)


@given(
    window=st.integers(4, 40),
    extra=st.integers(0, 150),
    share=st.floats(0, 1),
    bos=st.sampled_from([BOS, None]),
)
def test_every_token_is_scored_once_after_enough_context(
    window: int, extra: int, share: float, bos: int | None
) -> None:
    body = window - (bos is not None)
    stride = 1 + int(share * (window - 2))
    # A token's number in place of a token: what a window scores is read off its tokens.
    n = body + extra
    text = TokenisedDocument("text", "x", np.arange(1, n + 1, dtype=np.uint32))
    found = sliding_windows(text, window, stride, bos)
    scored: list[int] = []
    for index, each in enumerate(found):
        assert len(each.tokens) == each.document.length == window
        assert (each.tokens[0] == BOS) == (bos is not None)
        positions = scored_positions(window, each.document.spans)
        scored += each.tokens[positions].tolist()
        if index:
            assert positions[0] >= window - stride
            assert len(positions) == stride or index == len(found) - 1
    first_scored = 1 if bos is not None else 2  # without BOS nothing precedes the first token
    assert scored == list(range(first_scored, n + 1))
    assert len(found) == 1 + math.ceil((n - body) / stride)
    # Fewer windows are the first ones.
    some = sliding_windows(text, window, stride, bos, most=2)
    assert [each.document for each in some] == [each.document for each in found[:2]]


def test_a_document_shorter_than_the_window_has_none() -> None:
    assert sliding_windows(document(WINDOW - 2), WINDOW, 8, BOS) == []
    assert len(sliding_windows(document(WINDOW - 1), WINDOW, 8, BOS)) == 1


@pytest.mark.parametrize("stride", [0, -3, WINDOW])
def test_a_stride_that_would_leave_tokens_out_is_refused(stride: int) -> None:
    with pytest.raises(LongRopeError, match=f"is 1 to {WINDOW - 1}"):
        sliding_windows(document(200), WINDOW, stride, BOS)
    assert len(sliding_windows(document(2 * (WINDOW - 1)), WINDOW, WINDOW - 1, BOS)) == 2
    with pytest.raises(LongRopeError, match="at least 1 window, not 0"):
        sliding_windows(document(200), WINDOW, 8, BOS, most=0)


def test_the_default_stride_is_the_papers_from_2048_tokens_on() -> None:
    strides = [default_stride(window) for window in (4, 256, 1024, 2047, 2048, 131072)]
    assert strides == [1, 32, 128, 255, 256, 256]


@pytest.mark.parametrize("bos", [BOS, None])
def test_sliding_losses_are_those_of_a_plain_loop_over_the_untouched_model(llama: LoadedModel, bos: int | None) -> None:
    """The loop cuts, forwards and scores by itself; all it shares with the code is the model."""
    text, window, stride = document(333), 2 * WINDOW, 24
    body = window - (bos is not None)
    losses = [
        loss
        for each in sliding_windows(text, window, stride, bos)
        for loss in token_losses(llama, each.tokens, None, each.document.spans).tolist()
    ]
    ids = torch.as_tensor(text.tokens.astype(np.int64))
    expected: list[float] = []
    done = 0
    while done < len(ids):
        end = body if done == 0 else min(done + stride, len(ids))
        context = ids[end - body : end]
        if bos is not None:
            context = torch.cat([torch.tensor([bos]), context])
        with torch.no_grad():
            logits = llama.model(input_ids=context[None], use_cache=False).logits[0].double()
        before = logits[:-1].log_softmax(-1)
        each_loss = -before[torch.arange(len(context) - 1), context[1:]]
        expected += each_loss[len(each_loss) - (end - done) if done else 0 :].tolist()
        done = end
    assert len(losses) == len(ids) - (bos is None)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_a_smaller_stride_is_the_same_text_with_more_context(llama: LoadedModel) -> None:
    """Not the same figure: rotation beyond the window, and so context, matters to this model."""
    text, factors = document(300), Factors((4.0,) * llama.spec.pairs)
    totals = []
    for stride in (8, 60):
        parts = [
            token_losses(llama, each.tokens, factors, each.document.spans)
            for each in sliding_windows(text, WINDOW, stride, BOS)
        ]
        totals.append(float(torch.cat(parts).sum()))
        assert sum(map(len, parts)) == 300
    assert abs(totals[0] / totals[1] - 1) > 1e-4


@given(length=st.integers(2, 5000), count=st.integers(1, 40))
def test_buckets_cover_all_scored_positions(length: int, count: int) -> None:
    for edges in (log_spaced(length), equally_spaced(length, count)):
        assert edges[0] == 1
        assert edges[-1] == length
        assert list(edges) == sorted(set(edges))
    widths = np.diff(equally_spaced(length, count))
    assert len(widths) == min(count, length - 1)
    assert widths.max() - widths.min() <= 1


def test_log_spaced_buckets_double() -> None:
    assert log_spaced(256) == (1, 16, 32, 64, 128, 256)
    assert log_spaced(300) == (1, 16, 32, 64, 128, 256, 300)
    assert log_spaced(16) == (1, 16)
    assert log_spaced(5) == (1, 5)


def test_losses_are_summed_where_they_stand() -> None:
    positions: npt.NDArray[np.int64] = np.array([1, 2, 5, 9, 10])
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    buckets = by_position([(positions, losses), (positions[2:], losses[2:])], (2, 6, 10))
    assert [(b.start, b.end, b.nll, b.tokens) for b in buckets] == [(2, 6, 10.0, 3), (6, 10, 16.0, 2)]


def test_a_bucket_without_tokens_says_so() -> None:
    (low, high) = by_position([(np.array([7]), torch.tensor([3.0]))], (1, 4, 9))
    assert (low.nll, low.tokens) == (0.0, 0)
    assert (high.nll, high.tokens) == (3.0, 1)


@pytest.mark.parametrize("edges", [(1,), (4, 1), (1, 1, 5)])
def test_edges_that_are_none_are_refused(edges: tuple[int, ...]) -> None:
    with pytest.raises(LongRopeError, match="ascending"):
        by_position([], edges)
    with pytest.raises(LongRopeError, match="at least 1 bucket, not 0"):
        equally_spaced(100, 0)
