"""Our attention function is plain attention, whatever the chunk of queries, and never holds a matrix of scores."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from searcher.errors import LongRopeError
from tests.tiny_models import random_model, tiny_config
from workers import attention as ours
from workers.attention import attention, register


def plain(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Softmax of every score, one query after the other; (batch, queries, heads, head_dim)."""
    past, groups = key.shape[2] - query.shape[2], query.shape[1] // key.shape[1]
    rows = []
    for head in range(query.shape[1]):
        keys, values = key[:, head // groups], value[:, head // groups]
        for i in range(query.shape[2]):
            last = past + i + 1
            first = 0 if window is None else max(0, last - window)
            scores = (query[:, head, i, None] * keys[:, first:last]).sum(-1) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            rows.append((scores.softmax(-1)[..., None] * values[:, first:last]).sum(1))
    stacked = torch.stack(rows, dim=1).unflatten(1, (query.shape[1], query.shape[2]))
    return stacked.transpose(1, 2)


def states(
    queries: int, keys: int, heads: int = 4, shared: int = 2, width: int = 8, seed: int = 0, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as layers make them: transposed views."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((queries, heads), (keys, shared), (keys, shared))
    query, key, value = (
        torch.randn(batch, length, count, width, generator=generator).transpose(1, 2) for length, count in sizes
    )
    return query, key, value


def close(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(
    queries=st.integers(1, 40),
    past=st.integers(0, 60),
    shared=st.sampled_from([1, 2, 3]),
    groups=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([8, 13, 16]),
    window=st.none() | st.integers(1, 110),
    softcap=st.none() | st.floats(0.5, 30),
    scaling=st.none() | st.floats(0.05, 2),
    seed=st.integers(0, 5),
)
def test_it_is_plain_attention_of_the_last_queries(
    queries: int,
    past: int,
    shared: int,
    groups: int,
    width: int,
    window: int | None,
    softcap: float | None,
    scaling: float | None,
    seed: int,
) -> None:
    query, key, value = states(queries, past + queries, shared * groups, shared, width, seed)
    with torch.inference_mode():
        result, weights = attention(
            None, query, key, value, None, scaling=scaling, sliding_window=window, softcap=softcap
        )
    assert weights is None
    assert result.shape == (1, queries, shared * groups, width)
    close(result, plain(query, key, value, scaling or 1 / math.sqrt(width), window, softcap))


@pytest.mark.parametrize(("window", "softcap"), [(None, 5.0), (None, None), (100, 5.0), (300, None)])
def test_blocks_of_queries_add_up(window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ours.SCORES_AT_ONCE, "cpu", 4 * 600 * 7)  # seven queries of 600 keys
    query, key, value = states(350, 600)
    with torch.inference_mode():
        result, _ = attention(None, query, key, value, None, sliding_window=window, softcap=softcap)
    close(result, plain(query, key, value, 8**-0.5, window, softcap))


def test_a_batch_and_values_of_another_width_are_served() -> None:
    query, key, value = states(5, 9, batch=3)
    close(attention(None, query, key, value, None)[0], plain(query, key, value, 8**-0.5))
    narrow = value[..., :6]
    close(attention(None, query, key, narrow, None)[0], plain(query, key, narrow, 8**-0.5))


@pytest.mark.parametrize("past", [0, 7])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 3.0), (9, 3.0)])
def test_gradients_are_those_of_plain_attention(past: int, window: int | None, softcap: float | None) -> None:
    inputs = [each.requires_grad_() for each in states(30, 30 + past)]
    result, _ = attention(None, *inputs, None, sliding_window=window, softcap=softcap)
    ours_ = torch.autograd.grad(result.square().sum(), inputs)
    theirs = torch.autograd.grad(plain(*inputs, 8**-0.5, window, softcap).square().sum(), inputs)
    for got, wanted in zip(ours_, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_it_can_be(dtype: torch.dtype) -> None:
    query, key, value = (each.to(dtype) for each in states(40, 100))
    with torch.inference_mode():
        result, _ = attention(None, query, key, value, None)
    assert result.dtype == dtype
    expected = plain(query.float(), key.float(), value.float(), 8**-0.5)
    torch.testing.assert_close(result.float(), expected, rtol=2e-2, atol=2e-2)


class Layer:
    is_causal = True
    num_key_value_groups = 2


def test_the_function_that_transformers_has_is_wrong_for_chunks() -> None:
    query, key, value = states(10, 30)
    expected = plain(query, key, value, 8**-0.5)
    theirs, _ = sdpa_attention_forward(Layer(), query, key, value, None, scaling=8**-0.5)
    assert float((theirs - expected).abs().max()) > 0.1
    close(attention(Layer(), query, key, value, None, scaling=8**-0.5)[0], expected)


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor made under it has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return result


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (64, None), (None, 5.0)])
@pytest.mark.parametrize("queries", [64, 1024])
def test_neither_scores_nor_copies_of_keys_are_held(
    queries: int, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ours.SCORES_AT_ONCE, "cpu", 2**17)
    query, key, value = states(queries, 4096, heads=8, shared=1)
    with torch.inference_mode(), Largest() as seen:
        attention(None, query, key, value, None, sliding_window=window, softcap=softcap)
    assert seen.elements <= 2**17  # keys once for each head would be 2^18, scores 2^21 and more


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_no_mask_is_made(family: str) -> None:
    register()
    model = random_model(tiny_config(family, sliding_window=8))
    model.set_attn_implementation("longrope")
    embeds = torch.zeros(1, 20, 64)
    for make in (create_causal_mask, create_sliding_window_causal_mask):
        masks = {"config": model.config, "inputs_embeds": embeds, "past_key_values": None}
        assert make(attention_mask=None, **masks) is None
        assert make(attention_mask=torch.ones(1, 20), **masks) is None
        with pytest.raises(LongRopeError, match="without padding"):
            make(attention_mask=torch.arange(20)[None], **masks)
    with pytest.raises(LongRopeError, match="takes no mask"):
        attention(None, *states(4, 4), torch.zeros(1, 1, 4, 4))
    assert AttentionInterface()["longrope"] is attention
