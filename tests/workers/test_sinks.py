"""Attention sinks are those of a stream read token by token, whose cache is kept by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from searcher.baselines import ntk
from searcher.errors import LongRopeError
from searcher.rope import Factors, angles
from tests.tiny_models import WINDOW, window, write_model
from workers import attention as plain
from workers import engine
from workers.model import LoadedModel, ModelRequest, load_model
from workers.perplexity import token_losses
from workers.sinks import Sinks, attention_sinks, hidden_states_with_sinks, refusal, token_losses_with_sinks

LENGTH = 100


def as_ids(length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.as_tensor(window(length, seed).astype(np.int64))[None]


def turned(x: Tensor, radians: Tensor) -> Tensor:
    """Pairs (i, i + d/2) of the first 2 x pairs dimensions, turned; (..., n, head_dim) by (n, pairs) or (pairs,)."""
    pairs = radians.shape[-1]
    plane = torch.complex(x[..., :pairs].double(), x[..., pairs : 2 * pairs].double())
    plane = plane * torch.polar(torch.ones_like(radians), radians)
    return torch.cat([plane.real, plane.imag, x[..., 2 * pairs :].double()], dim=-1).float()


def radians(loaded: LoadedModel, factors: Factors, positions: list[int], layer: int = 0) -> Tensor:
    rows = factors.by_layer()
    of_layer = replace(factors, lambdas=rows[layer if len(rows) > 1 else 0])
    return torch.as_tensor(angles(loaded.spec, of_layer, positions))


@torch.no_grad()
def llama_stream(loaded: LoadedModel, ids: Tensor, sinks: Sinks, factors: Factors) -> Tensor:
    """A llama by hand, one token after the other: unrotated keys in the cache, positions those in the cache."""
    model = loaded.model.model
    heads, shared, width = (loaded.model.config.num_attention_heads, loaded.model.config.num_key_value_heads, 16)
    caches: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in model.layers]
    out = []
    for token in ids[0]:
        hidden = model.embed_tokens(token[None])
        for index, (layer, (keys, values)) in enumerate(zip(model.layers, caches, strict=True)):
            normed = layer.input_layernorm(hidden)
            own = layer.self_attn
            keys.append(own.k_proj(normed).view(shared, width))
            values.append(own.v_proj(normed).view(shared, width))
            if len(keys) > sinks.window:  # the oldest that is no sink leaves
                del keys[sinks.sinks], values[sinks.sinks]
            n = len(keys)
            place = radians(loaded, factors, list(range(n)), index)
            rotated = turned(torch.stack(keys, dim=1), place) * factors.attention_factor  # (shared, n, width)
            query = turned(own.q_proj(normed).view(heads, 1, width), place[-1:]) * factors.attention_factor
            rotated, worth = (each.repeat_interleave(heads // shared, 0) for each in (rotated, torch.stack(values, 1)))
            weights = (query @ rotated.transpose(1, 2) / width**0.5).softmax(-1)
            hidden = hidden + own.o_proj((weights @ worth).view(1, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        out.append(hidden)
    return torch.cat(out)[None]


class ByHand(DynamicCache):
    """Rotated keys of any family, moved to their new positions when an older one leaves."""

    def __init__(self, loaded: LoadedModel, sinks: Sinks, factors: Factors) -> None:
        super().__init__()
        self.kept: dict[int, tuple[list[Tensor], list[int], list[Tensor]]] = {}
        self.how = loaded, sinks, factors

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        loaded, sinks, factors = self.how
        keys, places, values = self.kept.setdefault(layer_idx, ([], [], []))
        if len(keys) == sinks.window:
            del keys[sinks.sinks], places[sinks.sinks], values[sinks.sinks]
        keys.append(key_states)
        values.append(value_states)
        places.append(len(keys) - 1)
        for new, old in enumerate(places):
            if new != old:
                moved = radians(loaded, factors, [old], layer_idx) - radians(loaded, factors, [new], layer_idx)
                keys[new], places[new] = turned(keys[new], -moved), new
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return len(self.kept[0][0]) if self.kept else 0


@torch.no_grad()
def own_stream(loaded: LoadedModel, ids: Tensor, sinks: Sinks, factors: Factors) -> Tensor:
    """The family's own forward, one token after the other, against a cache kept by hand; logits, (L, vocabulary)."""
    cache = ByHand(loaded, sinks, factors)
    rows = []
    with loaded.under(factors):
        for i in range(ids.shape[1]):
            place = torch.tensor([[min(i, sinks.window - 1)]])
            step = loaded.model(input_ids=ids[:, i : i + 1], position_ids=place, past_key_values=cache, use_cache=True)
            rows.append(step.logits[0])
    return torch.cat(rows)


def close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest value."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def untouched(loaded: LoadedModel) -> Factors:
    return Factors((1.0,) * loaded.spec.pairs)


@pytest.mark.parametrize("sinks", [Sinks(24, 4), Sinks(40, 1), Sinks(17, 16), Sinks(30, 0), Sinks(LENGTH - 1, 4)])
def test_a_llama_sees_what_a_stream_with_a_cache_by_hand_sees(llama: LoadedModel, sinks: Sinks) -> None:
    for factors in (untouched(llama), replace(ntk(llama.spec, 3), attention_factor=1.2)):
        expected = llama_stream(llama, as_ids(), sinks, factors)
        found = hidden_states_with_sinks(llama, as_ids(), sinks.window, sinks.sinks, factors)
        close(found, expected)
        full = engine.hidden_states(llama, as_ids(), factors)
        close(found[:, : sinks.window], full[:, : sinks.window])
        assert float((found - full)[:, -1].abs().max()) > 1e-3  # what has left is missed


def test_factors_by_layer_turn_each_layer_by_its_own(llama: LoadedModel) -> None:
    rows = ((1.0,) * 8, tuple(1.0 + i / 3 for i in range(8)))
    for lambdas in (rows, rows[::-1]):
        expected = llama_stream(llama, as_ids(), Sinks(24), Factors(lambdas))
        found = hidden_states_with_sinks(llama, as_ids(), 24, 4, Factors(lambdas))
        close(found, expected)


def test_every_family_is_a_stream_or_is_refused(loaded: LoadedModel) -> None:
    family = loaded.model.config.model_type
    ids, sinks = as_ids(80), Sinks(24, 4)
    if family in ("cohere", "gemma2"):
        with pytest.raises(LongRopeError, match=r"cannot run with attention sinks: it (pairs|caps)"):
            hidden_states_with_sinks(loaded, ids, 24)
        return
    for factors in (None, ntk(loaded.spec, 2)):
        expected = own_stream(loaded, ids, sinks, factors or untouched(loaded))
        with attention_sinks(loaded, sinks, factors), torch.no_grad():
            found = loaded.model(input_ids=ids, use_cache=False).logits[0]
        close(found, expected)
        losses = token_losses_with_sinks(loaded, window(80), sinks, factors)
        picked = -expected.double().log_softmax(-1)[torch.arange(79), ids[0, 1:]]
        torch.testing.assert_close(losses, picked, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 24, 64, 99])
def test_pieces_of_any_size_see_the_same(llama: LoadedModel, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hidden_states_with_sinks(replace(llama, chunk=LENGTH), as_ids(), 24)
    pieces = hidden_states_with_sinks(replace(llama, chunk=chunk), as_ids(), 24)
    close(pieces, whole)
    monkeypatch.setitem(plain.SCORES_AT_ONCE, "cpu", 1)  # one query at a time
    close(hidden_states_with_sinks(llama, as_ids(), 24), whole)


def test_no_scores_of_all_queries_and_keys_are_held(llama: LoadedModel) -> None:
    """The widest result of any operation grows with the window, not with the length."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.numbers = max(self.numbers, out.numel())
            return out

    ids = as_ids(2048)
    with Largest() as largest:
        hidden_states_with_sinks(replace(llama, chunk=512), ids, 64)
    heads, hidden, block = 4, 96, 64
    assert largest.numbers <= max(2048 * hidden, heads * block * 2 * (64 + block))


def test_everything_within_the_window_is_the_untouched_model_to_the_last_bit(llama: LoadedModel) -> None:
    tokens = window(LENGTH)
    assert torch.equal(
        token_losses_with_sinks(llama, tokens, Sinks(LENGTH)), token_losses(llama, tokens, untouched(llama))
    )


def test_spans_alone_are_scored(llama: LoadedModel) -> None:
    tokens = window(LENGTH)
    whole = token_losses_with_sinks(llama, tokens, Sinks(24))
    part = token_losses_with_sinks(llama, tokens, Sinks(24), None, ((50, 60), (90, 100)))
    torch.testing.assert_close(part, torch.cat([whole[49:59], whole[89:99]]), rtol=1e-6, atol=1e-6)


def test_generation_with_a_cache_goes_on_in_the_stream(llama: LoadedModel) -> None:
    """Greedy, each token from the whole so far, against transformers' own loop with its cache."""
    ids, sinks = as_ids(40), Sinks(24)
    with attention_sinks(llama, sinks), torch.no_grad():
        generated = llama.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=1,
        )
    so_far = ids
    for _ in range(20):
        hidden = hidden_states_with_sinks(llama, so_far, 24)
        so_far = torch.cat([so_far, engine.logits(llama, hidden[:, -1:]).argmax(-1)[None]], dim=1)
    assert torch.equal(generated, so_far)


def test_the_model_is_as_it_was_afterwards(llama: LoadedModel) -> None:
    tokens = window(LENGTH)
    before, rotary = token_losses(llama, tokens, None), llama.model.model.rotary_emb
    with pytest.raises(IndexError):
        hidden_states_with_sinks(llama, as_ids() + 10**6, 24)
    token_losses_with_sinks(llama, tokens, Sinks(24))
    assert llama.model.config._attn_implementation == plain.NAME
    assert llama.model.model.rotary_emb is rotary
    assert torch.equal(token_losses(llama, tokens, None), before)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_loaded_with_another_attention_function_has_sinks_too(llama_folder: Path, attention: str) -> None:
    loaded = load_model(ModelRequest(str(llama_folder), 4 * WINDOW, attention=attention))
    expected = llama_stream(loaded, as_ids(), Sinks(24), untouched(loaded))
    close(hidden_states_with_sinks(loaded, as_ids(), 24), expected)
    assert loaded.model.config._attn_implementation == attention


def test_half_precision_is_as_close_as_it_can_be(llama_folder: Path, llama: LoadedModel) -> None:
    half = load_model(ModelRequest(str(llama_folder), 4 * WINDOW, dtype="bfloat16"))
    wide = float(token_losses_with_sinks(llama, window(LENGTH), Sinks(24)).mean())
    assert float(token_losses_with_sinks(half, window(LENGTH), Sinks(24)).mean()) == pytest.approx(wide, rel=0.02)


def test_a_window_of_the_models_own_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "mistral", sliding_window=32)
    kept = load_model(ModelRequest(str(folder), 4 * WINDOW, sliding_window="keep"))
    assert "load it with --sliding-window off" in (refusal(kept) or "")
    off = load_model(ModelRequest(str(folder), 4 * WINDOW, sliding_window="off"))
    assert refusal(off) is None


def test_start_tokens_that_keep_their_rotation_are_refused(llama: LoadedModel) -> None:
    with pytest.raises(LongRopeError, match="n_hat must be 0, not 4"):
        hidden_states_with_sinks(llama, as_ids(), 24, 4, Factors((2.0,) * 8, n_hat=4))


@pytest.mark.parametrize(("size", "sinks"), [(4, 4), (3, 4), (8, -1)])
def test_a_cache_of_sinks_alone_is_refused(size: int, sinks: int) -> None:
    with pytest.raises(LongRopeError, match=f"not {size} with {sinks}"):
        Sinks(size, sinks)


def test_padding_is_refused(llama: LoadedModel) -> None:
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    with attention_sinks(llama, Sinks(24)), pytest.raises(LongRopeError, match="without padding"):
        llama.model(input_ids=as_ids(), attention_mask=mask)


def test_the_sinks_matter_and_so_does_their_number(llama: LoadedModel) -> None:
    found = [hidden_states_with_sinks(llama, as_ids(), 24, number)[:, -1] for number in (0, 1, 4, 8)]
    for one, other in itertools.combinations(found, 2):
        assert float((one - other).abs().max()) > 1e-4
