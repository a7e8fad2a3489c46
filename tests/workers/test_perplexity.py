"""The loss is the model's own, whatever the family, the length and the size of the chunks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from searcher.baselines import none, pi
from searcher.errors import LongRopeError
from searcher.rope import Factors
from tests.tiny_models import VOCABULARY, WINDOW, own_loss, window
from workers import perplexity
from workers.model import LoadedModel
from workers.perplexity import negative_log_likelihood, scored_ranges, token_losses, wrong_tokens

LENGTHS = (WINDOW - 23, WINDOW, 3 * WINDOW + 5)


@pytest.mark.parametrize("length", LENGTHS)
def test_unscaled_factors_give_the_loss_of_the_untouched_model(loaded: LoadedModel, length: int) -> None:
    tokens = window(length)
    unscaled = none(loaded.spec, 1)
    assert (set(unscaled.lambdas), unscaled.n_hat, unscaled.attention_factor) == ({1.0}, 0, 1.0)
    expected = own_loss(loaded.model, tokens)
    for factors in (None, unscaled):
        nll, count = negative_log_likelihood(loaded, tokens, factors)
        assert count == length - 1
        assert nll / count == pytest.approx(expected, rel=1e-5)
    # The rotation is seen at all: other factors move the loss by far more than the tolerance.
    nll, count = negative_log_likelihood(loaded, tokens, pi(loaded.spec, 4))
    assert abs(nll / count / expected - 1) > 1e-4


def test_every_token_but_the_first_is_scored_once_and_in_place(loaded: LoadedModel) -> None:
    tokens = window(100)
    ids = torch.as_tensor(tokens.astype(np.int64))[None]
    with torch.no_grad():
        logits = loaded.model(input_ids=ids).logits[0].double()
    expected = -torch.log_softmax(logits, dim=-1)[torch.arange(99), ids[0, 1:]]
    losses = token_losses(loaded, tokens, None)
    assert losses.shape == (99,)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert negative_log_likelihood(loaded, tokens, None) == (float(losses.sum()), 99)


def test_a_token_is_scored_from_what_precedes_it_alone(loaded: LoadedModel) -> None:
    tokens = window(60)
    changed = tokens.copy()
    changed[40:] = (changed[40:] - 2 + 100) % (VOCABULARY - 2) + 2
    factors = Factors((2.0,) * loaded.spec.pairs, n_hat=4, attention_factor=1.1)
    before, after = (token_losses(loaded, each, factors) for each in (tokens, changed))
    torch.testing.assert_close(before[:39], after[:39], rtol=1e-5, atol=1e-5)
    assert float((before[39:] - after[39:]).abs().max()) > 0.1


@pytest.mark.parametrize("length", [2, 16, 17, 18, 32, 33, 34, 50])  # 16 logits at once: chunks end at 16, 32, 48
def test_chunks_of_logits_add_up_to_the_whole(
    loaded: LoadedModel, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = window(length)
    whole = token_losses(loaded, tokens, None)
    rows: list[int] = []

    def watch(_: torch.nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        rows.append(inputs[0].shape[-2])

    handle = loaded.model.get_output_embeddings().register_forward_hook(watch)
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 1)
    try:
        chunked = token_losses(loaded, tokens, None)
    finally:
        handle.remove()
    assert max(rows) <= 16
    assert sum(rows) == length - 1
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)
    assert float(chunked.mean()) == pytest.approx(own_loss(loaded.model, tokens), rel=1e-5)


def test_no_run_holds_more_logits_than_stated(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    handle = llama.model.get_output_embeddings().register_forward_hook(lambda *_: rows.append(_[1][0].shape[-2]))
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 40 * VOCABULARY + VOCABULARY - 1)
    try:
        token_losses(llama, window(100), None)
    finally:
        handle.remove()
    assert rows == [40, 40, 19]


def test_a_failed_run_leaves_decoder_and_rotation_as_they_were(llama: LoadedModel) -> None:
    tokens = window(80)
    factors = pi(llama.spec, 4)
    before = token_losses(llama, tokens, factors)
    decoder, rotary = llama.model.model, llama.model.model.rotary_emb
    beyond = tokens.copy()
    beyond[50] = VOCABULARY
    with pytest.raises(IndexError):
        token_losses(llama, beyond, factors)
    assert llama.model.model is decoder
    assert llama.model.model.rotary_emb is rotary
    assert torch.equal(token_losses(llama, tokens, factors), before)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10)), min_size=1, max_size=6))
def test_spans_name_each_position_once(drawn: list[tuple[int, int]]) -> None:
    spans = [(start, start + length) for start, length in drawn]
    ranges = scored_ranges(50, spans)
    positions = [position for start, end in ranges for position in range(start, end)]
    assert positions == sorted({position for start, end in spans for position in range(max(start, 1), end)})
    assert all(before[1] < after[0] for before, after in pairwise(ranges))


@pytest.mark.parametrize("spans", [((20, 30),), ((40, 41), (3, 9), (5, 12), (99, 100)), ((0, 100),), ((0, 1), (1, 2))])
def test_spans_alone_are_scored(
    loaded: LoadedModel, spans: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, factors = window(100), pi(loaded.spec, 4)
    whole = token_losses(loaded, tokens, factors)
    positions = sorted({position for start, end in spans for position in range(start, end)} - {0})
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 1)
    losses = token_losses(loaded, tokens, factors, spans)
    torch.testing.assert_close(losses, whole[[position - 1 for position in positions]], rtol=1e-6, atol=1e-6)
    nll, count = negative_log_likelihood(loaded, tokens, factors, spans)
    assert (nll, count) == (float(losses.sum()), len(positions))


def test_a_span_of_the_first_token_alone_scores_nothing(llama: LoadedModel) -> None:
    assert negative_log_likelihood(llama, window(20), None, [(0, 1)]) == (0.0, 0)


@pytest.mark.parametrize("span", [(5, 5), (7, 3), (-1, 4), (90, 101)])
def test_spans_outside_the_window_are_refused(llama: LoadedModel, span: tuple[int, int]) -> None:
    with pytest.raises(LongRopeError, match=r"within 0 \.\. 100"):
        token_losses(llama, window(100), None, [(1, 2), span])


def test_no_token_is_wrong_exactly_where_greedy_decoding_gives_the_span(llama: LoadedModel) -> None:
    prompt, answer = window(40), []
    ids = torch.as_tensor(prompt.astype(np.int64))[None]
    with torch.no_grad():
        for _ in range(6):  # a plain greedy loop
            best = llama.model(input_ids=ids).logits[0, -1].argmax()
            answer.append(int(best))
            ids = torch.cat([ids, best[None, None]], dim=1)
    right = np.concatenate([prompt, np.asarray(answer, dtype=np.uint32)])
    assert wrong_tokens(llama, right, None, ((40, 46),)) == (0, 6)
    for place in range(40, 46):
        other = right.copy()
        other[place] = (other[place] + 1) % VOCABULARY
        wrong, count = wrong_tokens(llama, other, None, ((40, 46),))
        assert wrong >= 1
        assert count == 6
        assert wrong_tokens(llama, other, None, ((40, place + 1),)) == (1, place + 1 - 40)
