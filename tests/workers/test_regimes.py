"""A whole factor file on a model: the regime follows each row's length, in one forward and across caches.

The oracle is a plain one: every row alone, without a cache, under the one regime that its length calls for.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, DynamicCache, StaticCache

from searcher.rope import Factors
from storage.factor_file import FactorFile, ModelIdentity, Regime, write
from tests.tiny_models import FAMILIES, LAYERS, VOCABULARY, WINDOW, random_model, tiny_config
from workers import apply
from workers.apply import INTERLEAVED_FAMILIES, FactorsError, RescaledRotary, apply_factors, find_rotary, rescaled
from workers.model import decoder_layers

# First and last length, n_hat, attention factor. Below them the model is untouched.
BORDERS = ((9, 16, 3, 1.1), (17, 24, 6, 0.9), (25, 40, 0, 1.25), (41, 48, 2, 1.4))
LAST = BORDERS[-1][1]
EDGES = sorted({length + off for first, last, *_ in BORDERS for length in (first, last) for off in (-1, 0, 1)} - {49})
SAME = {"rtol": 0, "atol": 1e-5}
NEAR = {"rtol": 0, "atol": 1e-4}

Oracle = Callable[..., Tensor]  # logits of one row of token ids


def rows_of(model: Any, regime: int, per_layer: bool = False) -> tuple[tuple[float, ...], ...]:
    """Lambdas of a regime: no two the same, in no two regimes, nor in two layers."""
    pairs = rotary_of(model).inv_freq.numel()
    layers = LAYERS if per_layer else 1
    return tuple(
        tuple(1 + (2 + 3 * regime) * (i + 1) / pairs + 0.7 * layer for i in range(pairs)) for layer in range(layers)
    )


def rotary_of(model: Any) -> Any:
    ((_, _, module),) = find_rotary(model)
    return module


def factor_file(model: Any, per_layer: bool = False, borders: tuple[Any, ...] = BORDERS) -> FactorFile:
    config, kind = model.config, model.config.model_type
    identity = ModelIdentity(
        name="tiny",
        weights_sha256="0" * 64,
        family=kind,
        theta=config.rope_parameters["rope_theta"],
        rotary_dim=2 * rotary_of(model).inv_freq.numel(),
        original_length=WINDOW,
        layers=LAYERS,
        pairing="interleaved" if kind in INTERLEAVED_FAMILIES else "half-split",
    )
    regimes = []
    for index, (first, last, n_hat, attention) in enumerate(borders):
        rows = rows_of(model, index, per_layer)
        regimes.append(Regime(first, last, Factors(rows if per_layer else rows[0], n_hat, attention), "su"))
    provenance = {"study": None, "seed": None, "data": {}, "software": {"longrope-search": "0"}}
    return FactorFile(identity, tuple(regimes), provenance)


def document(model: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    path = folder / "tiny-factors.json"
    write(path, factor_file(model, **changes))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module", params=["llama", "qwen3", "phi3"])
def model(request: pytest.FixtureRequest) -> Any:
    return random_model(tiny_config(request.param))


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_model(tiny_config("llama"))


@pytest.fixture
def applied(model: Any, tmp_path: Path) -> Iterator[tuple[Any, Oracle]]:
    """A model under a file on disk, and the oracle: logits of one row of token ids."""
    with under(model, tmp_path) as oracle:
        yield model, oracle


@contextmanager
def under(model: Any, folder: Path, **changes: Any) -> Iterator[Oracle]:
    """The model under a file on disk; given is the oracle, on a copy of the model as it was."""
    oracle = oracle_of(copy.deepcopy(model), **changes)
    path = folder / "factors.json"
    write(path, factor_file(model, **changes))
    with apply_factors(model, path):
        yield oracle


def oracle_of(model: Any, per_layer: bool = False, borders: tuple[Any, ...] = BORDERS) -> Oracle:
    """Logits (tokens, vocabulary) of a row alone under the regime of its length, or of another length if said."""
    layers, theta = list(decoder_layers(model)), model.config.rope_parameters["rope_theta"]

    def logits(ids: Tensor, length: int | None = None) -> Tensor:
        context: Any = nullcontext()
        for index, (first, last, n_hat, attention) in enumerate(borders):
            if first <= (length or len(ids)) <= last:
                rows = rows_of(model, index, per_layer)
                context = rescaled(model, layers, [RescaledRotary(theta, row, n_hat, attention) for row in rows])
        with torch.no_grad(), context:
            found: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
        return found

    return logits


def tokens(length: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (length,), generator=draw)


def greedy(oracle: Oracle, prompt: Tensor, until: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens by the oracle alone, up to a length, and the logits that chose each."""
    ids, chosen = prompt, []
    while len(ids) < until:
        chosen.append(oracle(ids)[-1])
        ids = torch.cat([ids, chosen[-1].argmax()[None]])
    return ids, torch.stack(chosen)


def batch_of(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Padded token ids and their mask."""
    width = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), 1), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def forward(model: Any, ids: Tensor, **inputs: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=ids, **inputs)


def generated(model: Any, ids: Tensor, until: int, **options: Any) -> Any:
    return model.generate(
        ids,
        max_length=until,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=1,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def test_every_border_is_where_the_file_has_it(applied: tuple[Any, Oracle]) -> None:
    model, oracle = applied
    edges = {end for first, last, *_ in BORDERS for end in (first - 1, last)}
    for length in EDGES:
        ids = tokens(length)
        got = forward(model, ids[None]).logits[0]
        torch.testing.assert_close(got, oracle(ids), **SAME)
        for other in (length - 1, length + 1):  # what an off by one would have given
            if min(length, other) in edges and other <= LAST:
                assert float((got - oracle(ids, other)).abs().max()) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["given", "left out"])
def test_a_batch_of_mixed_lengths_is_each_row_alone(applied: tuple[Any, Oracle], side: str, positions: str) -> None:
    model, oracle = applied
    rows = [tokens(length, seed) for seed, length in enumerate([17, 8, 40, 24, 9, 48, 16, 25, 1])]
    ids, mask = batch_of(rows, side)
    more = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if positions == "given" else {}
    for use_cache in (False, True):
        got = forward(model, ids, attention_mask=mask, use_cache=use_cache, **more).logits
        for index, row in enumerate(rows):
            torch.testing.assert_close(got[index][mask[index].bool()], oracle(row), **SAME)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, LAST), min_size=1, max_size=4),
    left=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    split=st.integers(1, LAST),
)
def test_any_padding_and_any_split_into_two_calls_is_each_row_alone(
    llama_applied: tuple[Any, Oracle], lengths: list[int], left: list[int], split: int
) -> None:
    model, oracle = llama_applied
    rows = [tokens(length, seed) for seed, length in enumerate(lengths)]
    width = max(length + pad for length, pad in zip(lengths, left, strict=False))
    ids, mask = torch.full((len(rows), width), 1), torch.zeros(len(rows), width, dtype=torch.long)
    for index, (row, pad) in enumerate(zip(rows, left, strict=False)):
        ids[index, pad : pad + len(row)], mask[index, pad : pad + len(row)] = row, 1
    cache, got = DynamicCache(), []
    for part in (slice(0, split), slice(split, width)):
        if ids[:, part].shape[1]:
            seen = min(part.stop, width)
            result = forward(model, ids[:, part], attention_mask=mask[:, :seen], past_key_values=cache)
            got.append((part, result.logits))
    for part, logits in got:  # every call is under the lengths that it ends with
        for index in range(len(rows)):
            before, now = int(mask[index, : part.start].sum()), mask[index, part].bool()
            row = rows[index][: before + int(now.sum())]
            if bool(now.any()):
                torch.testing.assert_close(logits[index][now], oracle(row)[before:], **SAME)


@pytest.fixture(scope="module")
def llama_applied(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Oracle]]:
    own = copy.deepcopy(llama)
    with under(own, tmp_path_factory.mktemp("factors")) as oracle:
        yield own, oracle


@pytest.mark.parametrize("per_layer", [False, True])
def test_generation_across_every_border_is_the_same_with_and_without_a_cache(
    model: Any, tmp_path: Path, per_layer: bool
) -> None:
    with under(model, tmp_path, per_layer=per_layer) as oracle:
        for seed in range(2):
            prompt = tokens(5, seed)
            wanted, chosen = greedy(oracle, prompt, LAST + 1)
            for use_cache in (True, False):
                got = generated(model, prompt[None], LAST + 1, use_cache=use_cache)
                assert torch.equal(got.sequences[0], wanted)
                torch.testing.assert_close(torch.cat(got.logits), chosen, **NEAR)


def test_a_crossing_fills_the_whole_cache_again(applied: tuple[Any, Oracle]) -> None:
    model, _ = applied
    ids = tokens(17)
    cache = forward(model, ids[None, :16]).past_key_values
    before = [layer.keys for layer in cache.layers]
    forward(model, ids[None, 16:], past_key_values=cache)
    whole = forward(model, ids[None]).past_key_values
    for layer, fresh, stale in zip(cache.layers, whole.layers, before, strict=True):
        torch.testing.assert_close(layer.keys, fresh.keys, **NEAR)
        torch.testing.assert_close(layer.values, fresh.values, **NEAR)
        assert float((layer.keys[..., :16, :] - stale).abs().max()) > 1e-2


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_of_a_padded_batch_cross_at_steps_of_their_own(applied: tuple[Any, Oracle], use_cache: bool) -> None:
    model, oracle = applied
    rows = [tokens(length, seed) for seed, length in enumerate([14, 7, 20, 1])]
    ids, mask = batch_of(rows, "left")
    got = generated(model, ids, 20 + 25, attention_mask=mask, use_cache=use_cache)
    for index, row in enumerate(rows):
        wanted, chosen = greedy(oracle, row, len(row) + 25)
        assert torch.equal(got.sequences[index, 20 - len(row) :], wanted)
        torch.testing.assert_close(torch.stack([step[index] for step in got.logits]), chosen, **NEAR)


@pytest.mark.parametrize("chunk", [1, 3, 7, 16])
def test_any_chunks_through_a_cache_end_as_the_whole_sequence(applied: tuple[Any, Oracle], chunk: int) -> None:
    model, oracle = applied
    ids, cache = tokens(LAST), DynamicCache()
    for start in range(0, LAST, chunk):
        got = forward(model, ids[None, start : start + chunk], past_key_values=cache).logits[0]
        wanted = oracle(ids[: start + chunk])[start:]
        torch.testing.assert_close(got, wanted, **NEAR)


def test_a_prompt_may_be_filled_in_chunks(applied: tuple[Any, Oracle]) -> None:
    model, oracle = applied
    prompt = tokens(20)
    got = generated(model, prompt[None], 30, prefill_chunk_size=6)
    assert torch.equal(got.sequences[0], greedy(oracle, prompt, 30)[0])


def test_generations_in_turns_do_not_confuse_each_other(applied: tuple[Any, Oracle]) -> None:
    model, oracle = applied
    lines = [tokens(LAST, seed) for seed in range(3)]
    caches = [DynamicCache() for _ in lines]
    places = [0, 0, 0]
    for turn in range(60):
        line = turn * 7 % 3
        step = 1 + turn % 4
        start, end = places[line], min(places[line] + step, LAST)
        if start < end:
            got = forward(model, lines[line][None, start:end], past_key_values=caches[line]).logits[0]
            torch.testing.assert_close(got, oracle(lines[line][:end])[start:], **NEAR)
            places[line] = end
    assert min(places) > 25
    assert torch.equal(generated(model, lines[0][None, :12], 30).sequences[0], greedy(oracle, lines[0][:12], 30)[0])


def test_a_generation_goes_on_from_the_cache_of_another(applied: tuple[Any, Oracle]) -> None:
    model, oracle = applied
    first = generated(model, tokens(6)[None], 22)
    assert first.past_key_values.get_seq_length() == 21
    for until in (26, 45):  # the same cache twice: each goes on from a copy
        cache = copy.deepcopy(first.past_key_values)
        second = generated(model, first.sequences, until, past_key_values=cache)
        assert torch.equal(second.sequences[0], greedy(oracle, tokens(6), until)[0])


def test_beam_search_is_the_same_with_and_without_a_cache(applied: tuple[Any, Oracle]) -> None:
    model, _ = applied
    ids, mask = batch_of([tokens(12), tokens(6, 1)], "left")
    found = [
        generated(model, ids, 30, attention_mask=mask, num_beams=3, use_cache=use_cache, output_scores=True)
        for use_cache in (True, False)
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(found[0].sequences_scores, found[1].sequences_scores, **NEAR)
    moved = found[0].beam_indices[:, :18]
    assert len({tuple(row.tolist()) for row in moved[:, 1:] - moved[:, :1]}) > 1  # beams did change places


def test_speculative_decoding_within_a_regime_is_greedy_decoding(llama: Any, tmp_path: Path) -> None:
    with under(llama, tmp_path, borders=((1, 60, 3, 1.1),)) as oracle:
        got = generated(llama, tokens(10)[None], 40, prompt_lookup_num_tokens=4)
        assert torch.equal(got.sequences[0], greedy(oracle, tokens(10), 40)[0])


def test_a_model_rounded_to_bfloat16_is_served_with_exact_angles(llama: Any, tmp_path: Path) -> None:
    half = copy.deepcopy(llama).to(torch.bfloat16)  # its own frequencies are rounded too
    with under(half, tmp_path) as oracle:
        for length in (8, 9, 20, 41):
            assert torch.equal(forward(half, tokens(length)[None]).logits[0], oracle(tokens(length)))


def test_what_moves_or_crops_a_cache_moves_its_history(applied: tuple[Any, Oracle]) -> None:
    model, oracle = applied
    rows = torch.stack([tokens(15, 0), tokens(15, 1)])
    order = [1, 0, 0, 1]
    for move in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop"):
        cache = forward(model, rows).past_key_values
        kept = rows
        if move == "crop":
            cache.crop(-4)
            kept = rows[:, :11]
        elif move == "batch_repeat_interleave":
            cache.batch_repeat_interleave(2)
            kept = rows.repeat_interleave(2, dim=0)
        else:
            getattr(cache, move)(torch.tensor(order))
            kept = rows[order]
        more = torch.stack([tokens(9, 10 + row) for row in range(len(kept))])
        got = forward(model, more, past_key_values=cache).logits
        for row in range(len(kept)):
            whole = torch.cat([kept[row], more[row]])
            torch.testing.assert_close(got[row], oracle(whole)[-9:], **NEAR)


def test_a_crop_back_over_a_border_is_a_crossing_too(applied: tuple[Any, Oracle]) -> None:
    model, oracle = applied
    ids = tokens(30)
    cache = forward(model, ids[None]).past_key_values
    cache.crop(-15)
    got = forward(model, ids[None, 15:16], past_key_values=cache).logits[0]
    torch.testing.assert_close(got, oracle(ids[:16])[15:], **NEAR)
    cache.reset()
    torch.testing.assert_close(forward(model, ids[None], past_key_values=cache).logits[0], oracle(ids), **SAME)


def test_a_recomputed_forward_gives_out_the_new_positions_alone(tmp_path: Path) -> None:
    eager = random_model(tiny_config("llama", attn_implementation="eager"))
    ids = tokens(20)
    with under(eager, tmp_path):
        whole = forward(eager, ids[None], output_hidden_states=True, output_attentions=True, use_cache=False)
        cache = forward(eager, ids[None, :16]).past_key_values
        asked = {"use_cache": False, "output_hidden_states": True, "output_attentions": True, "labels": ids[None, 16:]}
        kept = copy.deepcopy(cache)
        got = forward(eager, ids[None, 16:], past_key_values=cache, **asked)
        torch.testing.assert_close(got.logits, whole.logits[:, 16:], **NEAR)
        assert bool(torch.isfinite(got.loss))
        for part, other in zip(got.hidden_states, whole.hidden_states, strict=True):
            torch.testing.assert_close(part, other[:, 16:], **NEAR)
        for part, other in zip(got.attentions, whole.attentions, strict=True):
            torch.testing.assert_close(part, other[:, :, 16:], **NEAR)
        for keep in (1, 3, torch.tensor([0, 2])):
            one = forward(eager, ids[None, 16:], past_key_values=copy.deepcopy(kept), logits_to_keep=keep).logits
            chosen = [16 + int(i) for i in keep] if isinstance(keep, Tensor) else list(range(20 - keep, 20))
            torch.testing.assert_close(one, whole.logits[:, chosen], **NEAR)
        listed = forward(eager, ids[None, 16:], past_key_values=copy.deepcopy(kept), return_dict=False)
        assert isinstance(listed, tuple)
        torch.testing.assert_close(listed[0], whole.logits[:, 16:], **NEAR)
        base = forward(eager.model, ids[None, 16:], past_key_values=kept, return_dict=False)
        torch.testing.assert_close(base[0], whole.hidden_states[-1][:, 16:], **NEAR)


def test_positional_arguments_and_embeddings_serve_a_forward(llama_applied: tuple[Any, Oracle]) -> None:
    model, oracle = llama_applied
    rows = [tokens(20), tokens(9, 1)]
    ids, mask = batch_of(rows, "left")
    embeddings = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        by_place = model.lm_head(model.model(ids, mask)[0])
        embedded = model(inputs_embeds=embeddings, attention_mask=mask).logits
    for index, row in enumerate(rows):
        for got in (by_place, embedded):
            torch.testing.assert_close(got[index][mask[index].bool()], oracle(row), **SAME)


def test_embeddings_are_refused_only_where_their_cache_must_be_recomputed(
    llama_applied: tuple[Any, Oracle],
) -> None:
    model, oracle = llama_applied
    embeddings = model.get_input_embeddings()(tokens(10)[None]).detach()
    got = model.generate(inputs_embeds=embeddings, max_new_tokens=7, do_sample=False, eos_token_id=None)
    assert torch.equal(got[0], greedy(oracle, tokens(10), 17)[0][10:])
    with pytest.raises(FactorsError, match="filled from inputs_embeds"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=8, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_generates_across_a_border(family: str, tmp_path: Path) -> None:
    changes = {"sliding_window": 7} if family in ("mistral", "gemma2") else {}
    own = random_model(tiny_config(family, **changes))
    rotary = rotary_of(own)
    rows = [tokens(14), tokens(8, 1)]
    ids, mask = batch_of(rows, "left")
    with under(own, tmp_path):
        cached, uncached = (
            generated(own, ids, 28, attention_mask=mask, use_cache=use_cache) for use_cache in (True, False)
        )
        assert torch.equal(cached.sequences, uncached.sequences)
        torch.testing.assert_close(torch.cat(cached.logits), torch.cat(uncached.logits), **NEAR)
    assert rotary_of(own) is rotary


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_below_the_first_regime_a_longrope_model_switches_as_its_config_says(family: str, tmp_path: Path) -> None:
    own_border = 12
    pairs = 8
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [2.0 + 0.5 * i for i in range(pairs)],
        "original_max_position_embeddings": own_border,
        "factor": 4.0,
    }
    more = {"original_max_position_embeddings": own_border} if family == "phi3" else {}
    own = random_model(tiny_config(family, rope_parameters=scaling, **more))
    borders = ((19, 26, 3, 1.1), (27, 40, 0, 1.3))
    before = forward(own, tokens(12)[None]).logits
    with under(own, tmp_path, borders=borders) as oracle:
        rows = [tokens(length, seed) for seed, length in enumerate([12, 13, 18, 19, 27, 5])]
        for side in ("left", "right"):
            ids, mask = batch_of(rows, side)
            got = forward(own, ids, attention_mask=mask).logits
            for index, row in enumerate(rows):
                torch.testing.assert_close(got[index][mask[index].bool()], oracle(row), **SAME)
        for use_cache in (True, False):
            found = generated(own, tokens(6)[None], 40, use_cache=use_cache)
            wanted, chosen = greedy(oracle, tokens(6), 40)
            assert torch.equal(found.sequences[0], wanted)
            torch.testing.assert_close(torch.cat(found.logits), chosen, **NEAR)
    assert torch.equal(forward(own, tokens(12)[None]).logits, before)


def test_a_gap_belongs_to_the_regime_above_it_and_beyond_the_last_is_an_error(llama: Any, tmp_path: Path) -> None:
    gaps = ((5, 8, 2, 1.1), (15, 20, 3, 1.2))
    with under(llama, tmp_path, borders=gaps) as oracle:
        for length in range(1, 21):
            ids = tokens(length)
            wanted = oracle(ids, 15 if 8 < length < 15 else None)
            torch.testing.assert_close(forward(llama, ids[None]).logits[0], wanted, **SAME)
        with pytest.raises(FactorsError, match="has 21 tokens and the factor file ends at 20"):
            forward(llama, tokens(21)[None])
        cache = forward(llama, tokens(20)[None]).past_key_values
        with pytest.raises(FactorsError, match="has 21 tokens"):
            forward(llama, tokens(1)[None], past_key_values=cache)
        assert cache.get_seq_length() == 20


def test_undone_the_model_is_what_it_was_bit_for_bit(model: Any, tmp_path: Path) -> None:
    rotary, state = rotary_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    before = forward(model, tokens(30)[None]).logits
    for per_layer in (False, True):
        applied = apply_factors(model, document(model, tmp_path, per_layer=per_layer))
        assert {*model.state_dict()} == {*state}
        during = forward(model, tokens(30)[None]).logits
        applied.remove()
        applied.remove()
        assert not torch.equal(during, before)
        assert torch.equal(forward(model, tokens(30)[None]).logits, before)
    with pytest.raises(KeyboardInterrupt), apply_factors(model, document(model, tmp_path)):
        raise KeyboardInterrupt
    assert rotary_of(model) is rotary
    assert torch.equal(forward(model, tokens(30)[None]).logits, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def test_a_second_application_is_refused_and_changes_nothing(
    llama_applied: tuple[Any, Oracle], tmp_path: Path, llama: Any
) -> None:
    model, oracle = llama_applied
    with pytest.raises(FactorsError, match="under a factor file already"):
        apply_factors(model, document(llama, tmp_path))
    with pytest.raises(FactorsError, match="under a factor file already"), rescaled(model, [], []):
        pass
    torch.testing.assert_close(forward(model, tokens(20)[None]).logits[0], oracle(tokens(20)), **SAME)


def test_a_cache_of_one_application_is_recomputed_by_the_next(llama: Any, tmp_path: Path) -> None:
    ids = tokens(12)
    with apply_factors(llama, document(llama, tmp_path)):
        cache = forward(llama, ids[None, :11]).past_key_values
    other = ((9, 16, 0, 1.6),)
    with under(llama, tmp_path, borders=other) as oracle:
        got = forward(llama, ids[None, 11:], past_key_values=cache).logits[0]
        torch.testing.assert_close(got, oracle(ids)[11:], **NEAR)


def test_a_cache_half_filled_by_a_forward_that_failed_is_refused(llama_applied: tuple[Any, Oracle]) -> None:
    model, oracle = llama_applied
    ids = tokens(20)
    for before in (16, 18):  # with a crossing, and without one
        for failing in (0, 1):
            cache = forward(model, ids[None, :before]).past_key_values
            handle = decoder_layers(model)[failing].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                forward(model, ids[None, before:], past_key_values=cache)
            handle.remove()
            if (before, failing) == (18, 0):  # the cache was not touched yet
                got = forward(model, ids[None, before:], past_key_values=cache).logits[0]
                torch.testing.assert_close(got, oracle(ids)[before:], **NEAR)
                continue
            with pytest.raises(FactorsError, match="did not all come through this model"):
                forward(model, ids[None, before:], past_key_values=cache)
    torch.testing.assert_close(forward(model, ids[None]).logits[0], oracle(ids), **SAME)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_goes_through_the_regime_of_the_length(llama: Any, tmp_path: Path, checkpointing: bool) -> None:
    own = copy.deepcopy(llama).double().train()
    reference = copy.deepcopy(own)
    if checkpointing:
        own.activation_checkpointing_enable()
    rows = [tokens(20), tokens(12, 1)]
    ids, mask = batch_of(rows, "right")
    with apply_factors(own, document(own, tmp_path, per_layer=True)):
        own(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()].square().sum().backward()
    for row, regime in zip(rows, (1, 0), strict=True):
        _, _, n_hat, attention = BORDERS[regime]
        lambdas = rows_of(reference, regime, per_layer=True)
        rotations = [RescaledRotary(500.0, layer, n_hat, attention) for layer in lambdas]
        with rescaled(reference, list(decoder_layers(reference)), rotations):
            reference(input_ids=row[None], use_cache=False).logits.square().sum().backward()
    for (name, ours), (_, theirs) in zip(own.named_parameters(), reference.named_parameters(), strict=True):
        assert ours.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": torch.ones(1, 1, 12, 12)}, r"shape \(1, 12\) .* found \(1, 1, 12, 12\)"),
        ({"attention_mask": torch.ones(1, 13)}, r"shape \(1, 12\) .* found \(1, 13\)"),
        ({"attention_mask": {"full_attention": None}}, "found dict"),
        ({"position_ids": torch.tensor([[*range(7), *range(5)]])}, "packed into one row"),
        ({"position_ids": torch.arange(1, 13)[None]}, "count the tokens of each row from 0"),
        ({"position_ids": torch.arange(12).expand(3, 1, 12)}, "count the tokens of each row from 0"),
        (
            {"position_ids": torch.arange(12)[None], "attention_mask": torch.tensor([[0, 0] + [1] * 10])},
            "padding left out",
        ),
    ],
)
def test_inputs_that_cannot_be_right_are_refused(
    llama_applied: tuple[Any, Oracle], inputs: dict[str, Any], message: str
) -> None:
    model, _ = llama_applied
    with pytest.raises(FactorsError, match=message):
        forward(model, tokens(12)[None], **inputs)


def test_caches_that_cannot_be_followed_are_refused(llama: Any, tmp_path: Path) -> None:
    filled = forward(llama, tokens(5)[None]).past_key_values
    with apply_factors(llama, document(llama, tmp_path)):
        with pytest.raises(FactorsError, match="holds 5 tokens that did not all come through"):
            forward(llama, tokens(2)[None], past_key_values=filled)
        with pytest.raises(FactorsError, match="A StaticCache cannot be recomputed"):
            forward(llama, tokens(2)[None], past_key_values=StaticCache(llama.config, max_cache_len=30))
        with pytest.raises(FactorsError, match="use a DynamicCache"):
            generated(llama, tokens(5)[None], 12, cache_implementation="static")
        cache = forward(llama, tokens(5)[None]).past_key_values
        with pytest.raises(FactorsError, match="holds 1 rows and the input has 2"):
            forward(llama, torch.stack([tokens(2)] * 2), past_key_values=cache)
        with pytest.raises(FactorsError, match="in a forward of its model alone"):
            llama.model.rotary_emb(torch.zeros(1), torch.arange(3)[None])


def changed(found: dict[str, Any], *where: Any, to: Any) -> dict[str, Any]:
    found = copy.deepcopy(found)
    block: Any = found
    for name in where[:-1]:
        block = block[name]
    block[where[-1]] = to
    return found


@pytest.mark.parametrize(
    ("where", "to", "message"),
    [
        (("format",), "other", '"format": "longrope-factors"'),
        (("version",), 2, "version 2, and this reads up to 1"),
        (("version",), "1", "version: expected a whole number"),
        (("model",), None, "an object under model"),
        (("model", "theta"), 10_000.0, "theta 10000.0; this one has 500.0"),
        (("model", "rotary_dim"), 32, "rotary_dim 32; this one has 16"),
        (("model", "layers"), 3, "layers 3; this one has 2"),
        (("model", "pairing"), "interleaved", "pairing 'interleaved'; this one has 'half-split'"),
        (("regimes",), [], "at least one under regimes"),
        (("regimes", 1), 3, r"regimes\[1\]: expected an object"),
        (("regimes", 1, "min_length"), 16, r"regimes\[1\]: min_length: expected a whole number of at least 17"),
        (("regimes", 1, "max_length"), 16, r"max_length: expected a whole number of at least 17"),
        (("regimes", 0, "min_length"), True, "min_length"),
        (("regimes", 0, "n_hat"), -1, "n_hat"),
        (("regimes", 0, "n_hat"), None, "n_hat"),
        (("regimes", 0, "attention_factor"), float("nan"), "attention_factor: expected a finite number above 0"),
        (("regimes", 0, "attention_factor"), 10**400, "attention_factor"),
        (("regimes", 0, "lambdas"), [1.0] * 7, "lambdas: expected 8 numbers"),
        (("regimes", 0, "lambdas"), [[1.0] * 8] * 3, "or 2 such lists"),
        (("regimes", 0, "lambdas"), "11111111", "lambdas"),
        (("regimes", 0, "lambdas", 3), 0, "lambdas: expected a finite number above 0, found 0"),
    ],
)
def test_a_file_that_is_not_valid_or_of_another_model_is_refused(
    llama: Any, tmp_path: Path, where: tuple[Any, ...], to: Any, message: str
) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps(changed(document(llama, tmp_path), *where, to=to)))
    with pytest.raises(FactorsError, match=message) as caught:
        apply_factors(llama, path)
    assert str(path) in str(caught.value)
    assert not any(module._forward_pre_hooks for module in llama.modules())


def test_what_is_no_json_file_is_refused(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    reasons = {"broken.json": "cannot be read as JSON", "missing.json": "read: No such", ".": "read: Is a directory"}
    for name, why in reasons.items():
        with pytest.raises(FactorsError, match=why):
            apply_factors(llama, str(tmp_path / name))


def test_a_model_whose_rotation_is_not_known_is_refused(llama: Any, tmp_path: Path) -> None:
    found = document(llama, tmp_path)
    spoilt = copy.deepcopy(llama)
    spoilt.model.rotary_emb.inv_freq.mul_(1.01)
    with pytest.raises(FactorsError, match="does not follow theta"):
        apply_factors(spoilt, found)
    with pytest.raises(FactorsError, match="has 0 rotary embeddings"):
        apply_factors(torch.nn.Linear(2, 2), found)
    dynamic = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}
    own = random_model(tiny_config("llama", rope_parameters=dynamic))
    with pytest.raises(FactorsError, match="begin the first regime at 1"):
        apply_factors(own, found)
    with apply_factors(own, changed(found, "regimes", 0, "min_length", to=1)):
        assert torch.isfinite(forward(own, tokens(5)[None]).logits).all()
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    with pytest.raises(FactorsError, match="rotates by layer type"):
        apply_factors(random_model(config), found)


def test_the_module_stands_alone_with_torch(tmp_path: Path) -> None:
    shutil.copy(apply.__file__, tmp_path / "vendored.py")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import vendored\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "assert callable(vendored.apply_factors) and 'torch' in loaded\n"
        "assert not loaded & {'transformers', 'searcher', 'workers', 'storage', 'commands', 'cli'}, loaded\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path, timeout=120)
