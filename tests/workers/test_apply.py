"""The rotation: float64 angles, n_hat by absolute position, every family's layout, and the model put back as it was."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from searcher.baselines import none, pi, yarn
from searcher.errors import LongRopeError
from searcher.rope import Factors, RopeSpec, angles
from tests.tiny_models import WINDOW, configured, own_loss, window
from workers import apply
from workers.apply import HALF_SPLIT, INTERLEAVED, SINGLE, RescaledRotary, cos_layout, find_rotary
from workers.model import LoadedModel, decoder_layers
from workers.perplexity import negative_log_likelihood, token_losses

SCALE = 4.0
LONG = 3 * WINDOW + 8
LAYOUTS = {  # column of cos -> pair
    HALF_SPLIT: lambda pairs: [*range(pairs), *range(pairs)],
    INTERLEAVED: lambda pairs: [i // 2 for i in range(2 * pairs)],
    SINGLE: lambda pairs: [*range(pairs)],
}


def loss(loaded: LoadedModel, factors: Factors | None, length: int = LONG) -> float:
    nll, count = negative_log_likelihood(loaded, window(length), factors)
    return nll / count


def uneven(spec: RopeSpec, n_hat: int = 0, attention_factor: float = 1.2) -> Factors:
    """Factors of which no two are the same."""
    return Factors(tuple(1 + SCALE * (i + 1) / spec.pairs for i in range(spec.pairs)), n_hat, attention_factor)


def plain(spec: RopeSpec, factors: Factors, positions: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position and pair, one by one."""
    turned = angles(spec, factors, positions)
    cos, sin = np.empty_like(turned), np.empty_like(turned)
    for row, position in enumerate(positions):
        factor = 1.0 if position < factors.n_hat else factors.attention_factor
        for pair in range(spec.pairs):
            cos[row, pair] = math.cos(turned[row, pair]) * factor
            sin[row, pair] = math.sin(turned[row, pair]) * factor
    return cos, sin


def rotation(spec: RopeSpec, factors: Factors, layout: str = HALF_SPLIT, cast: bool = True) -> RescaledRotary:
    (lambdas,) = factors.by_layer()
    return RescaledRotary(spec.theta, lambdas, factors.n_hat, factors.attention_factor, layout, cast)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=torch.as_tensor(window(LONG).astype(np.int64))[None]).logits
    return result


@settings(max_examples=60, deadline=None)
@given(
    lambdas=st.lists(st.floats(0.5, 600), min_size=2, max_size=12),
    positions=st.lists(st.integers(0, 2_100_000), min_size=1, max_size=6),
    n_hat=st.integers(0, 300),
    attention_factor=st.floats(0.5, 2),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_cos_and_sin_are_those_of_the_formula(
    lambdas: list[float], positions: list[int], n_hat: int, attention_factor: float, layout: str
) -> None:
    spec = RopeSpec(10_000.0, 2 * len(lambdas), 4096, 1)
    factors = Factors(tuple(lambdas), n_hat, attention_factor)
    positions = [*positions, max(n_hat - 1, 0), n_hat]  # both sides of the border
    module = rotation(spec, factors, layout)
    got = module(torch.zeros(1, dtype=torch.float64), torch.tensor([positions, positions[::-1]]))
    columns = LAYOUTS[layout](spec.pairs)
    for ours, theirs in zip(got, plain(spec, factors, positions), strict=True):
        assert ours.shape == (2, len(positions), len(columns))
        np.testing.assert_allclose(ours[0].numpy(), theirs[:, columns], rtol=0, atol=1e-8)
        np.testing.assert_array_equal(ours[1].numpy(), ours[0].numpy()[::-1])


def test_rows_below_n_hat_carry_the_original_rotation_to_the_last_bit() -> None:
    spec = RopeSpec(500.0, 16, WINDOW, 2)
    place = torch.arange(40)[None]
    x = torch.zeros(1)
    kept = rotation(spec, uneven(spec, n_hat=16))(x, place)
    original = rotation(spec, none(spec, 1))(x, place)
    rescaled = rotation(spec, uneven(spec))(x, place)
    for cos, first, last in zip(kept, original, rescaled, strict=True):
        assert torch.equal(cos[:, :16], first[:, :16])
        assert torch.equal(cos[:, 16:], last[:, 16:])


def test_angles_stay_float64_in_a_model_that_is_bfloat16(llama: LoadedModel) -> None:
    positions = [0, 7, 8, 4095, 131_071, 1_999_999, 2_000_000]
    spec, factors = llama.spec, Factors(tuple(1 + 0.37 * i for i in range(llama.spec.pairs)), 8, 1.3)
    cos, sin = plain(spec, factors, positions)
    columns = LAYOUTS[HALF_SPLIT](spec.pairs)
    model = configured(llama.model)
    model.rotary_emb = rotation(spec, factors)
    rotary = model.to(torch.bfloat16).rotary_emb
    place = torch.tensor([positions])
    for ours, theirs in zip(rotary(torch.zeros(1, dtype=torch.float64), place), (cos, sin), strict=True):
        assert np.abs(ours[0].numpy() - theirs[:, columns]).max() < 1e-8
    for ours, theirs in zip(rotary(torch.zeros(1), place), (cos, sin), strict=True):
        assert np.abs(ours[0].double().numpy() - theirs[:, columns]).max() < 1e-6
    for ours, theirs in zip(rotary(torch.zeros(1, dtype=torch.bfloat16), place), (cos, sin), strict=True):
        assert torch.equal(ours[0], torch.from_numpy(theirs[:, columns]).to(torch.bfloat16))
    # What float32 angles would have cost here:
    single = np.float32(2_000_000) * spec.inverse_frequencies().astype(np.float32)
    assert np.abs(np.cos(single.astype(np.float64)) - np.cos(2_000_000 * spec.inverse_frequencies())).max() > 1e-3


def test_an_uncast_rotation_stays_float32() -> None:
    spec = RopeSpec(500.0, 16, WINDOW, 2)
    half = torch.zeros(1, dtype=torch.bfloat16)
    place = torch.arange(4)[None]
    assert {part.dtype for part in rotation(spec, uneven(spec), cast=False)(half, place)} == {torch.float32}
    assert {part.dtype for part in rotation(spec, uneven(spec))(half, place)} == {torch.bfloat16}


def test_positions_taken_in_parts_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RopeSpec(500.0, 16, WINDOW, 2)
    module, place = rotation(spec, uneven(spec, n_hat=5)), torch.arange(20)[None]
    whole = module(torch.zeros(1), place)
    for at_once in (1, 3, 19, 20, 21):
        monkeypatch.setattr(apply, "_POSITIONS_AT_ONCE", at_once)
        assert all(map(torch.equal, whole, module(torch.zeros(1), place)))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_the_layout_is_read_off_cos(layout: str) -> None:
    cos, _ = rotation(RopeSpec(500.0, 8, WINDOW, 2), none(RopeSpec(500.0, 8, WINDOW, 2), 1), layout)(
        torch.zeros(1), torch.arange(1, 4)[None]
    )
    assert cos_layout(cos) == layout


def test_the_rotary_embedding_is_found_once_where_it_hangs(loaded: LoadedModel) -> None:
    ((parent, name, module),) = find_rotary(loaded.model)
    assert getattr(parent, name) is module
    assert hasattr(module, "inv_freq")
    assert find_rotary(nn.Sequential(nn.Linear(2, 2))) == []


def test_equal_factors_are_position_interpolation(loaded: LoadedModel) -> None:
    parameters = {**loaded.model.config.rope_parameters, "rope_type": "linear", "factor": SCALE}
    interpolated = configured(loaded.model, rope_parameters=parameters)
    for length in (WINDOW // 2, LONG):
        expected = own_loss(interpolated, window(length))
        assert loss(loaded, pi(loaded.spec, SCALE), length) == pytest.approx(expected, rel=1e-5)
        assert abs(loss(loaded, None, length) / expected - 1) > 1e-4


def test_yarn_is_that_of_transformers(loaded: LoadedModel) -> None:
    fast, slow = (128.0, 2.0) if loaded.spec.family in ("mistral", "mixtral") else (32.0, 1.0)
    scaling = {"rope_type": "yarn", "factor": SCALE, "original_max_position_embeddings": WINDOW}
    parameters = {**loaded.model.config.rope_parameters, **scaling, "beta_fast": fast, "beta_slow": slow}
    changes: dict[str, Any] = {"rope_parameters": parameters}
    if hasattr(loaded.model.config, "original_max_position_embeddings"):  # it overrides the nested one
        changes["original_max_position_embeddings"] = WINDOW
    shipped = configured(loaded.model, **changes)
    ours = yarn(loaded.spec, SCALE)
    assert ours.attention_factor == pytest.approx(0.1 * math.log(SCALE) + 1)
    for length in (WINDOW // 2, LONG):
        expected = own_loss(shipped, window(length))
        assert loss(loaded, ours, length) == pytest.approx(expected, rel=1e-5)
        for other in (None, Factors(ours.lambdas), pi(loaded.spec, SCALE)):
            assert abs(loss(loaded, other, length) / expected - 1) > 1e-4


def test_afterwards_the_model_is_what_it_was_bit_for_bit(loaded: LoadedModel) -> None:
    ((parent, name, original),) = find_rotary(loaded.model)
    before = logits(loaded.model)
    per_layer = Factors((uneven(loaded.spec).by_layer()[0],) * loaded.spec.layers, 4, 1.1)
    for factors in (uneven(loaded.spec), per_layer):
        with loaded.under(factors):
            assert isinstance(getattr(parent, name), RescaledRotary)
            during = logits(loaded.model)
        assert getattr(parent, name) is original
        assert not any(layer._forward_pre_hooks for layer in decoder_layers(loaded.model))
        assert not torch.equal(during, before)
        assert torch.equal(logits(loaded.model), before)
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(KeyboardInterrupt))
        stack.enter_context(loaded.under(per_layer))
        raise KeyboardInterrupt
    assert torch.equal(logits(loaded.model), before)


class Plain(nn.Module):
    """A rotary embedding that looks every row up in a table that was made one by one."""

    def __init__(self, spec: RopeSpec, factors: Factors, layout: str) -> None:
        super().__init__()
        columns = LAYOUTS[layout](spec.pairs)
        table = plain(spec, factors, list(range(LONG)))
        self.cos, self.sin = (torch.from_numpy(part[:, columns]).float() for part in table)

    def forward(self, _: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[position_ids], self.sin[position_ids]


@pytest.mark.parametrize("n_hat", [0, 1, 16, LONG - 1])
def test_a_model_under_factors_is_the_model_with_the_rotation_written_out(loaded: LoadedModel, n_hat: int) -> None:
    factors = uneven(loaded.spec, n_hat)
    written = configured(loaded.model)
    ((parent, name, _),) = find_rotary(written)
    setattr(parent, name, Plain(loaded.spec, factors, loaded.layout))
    assert loss(loaded, factors) == pytest.approx(own_loss(written, window(LONG)), rel=1e-5)


def test_a_window_within_n_hat_is_not_touched(loaded: LoadedModel) -> None:
    untouched = token_losses(loaded, window(LONG), none(loaded.spec, 1))
    assert torch.equal(token_losses(loaded, window(LONG), uneven(loaded.spec, n_hat=LONG)), untouched)
    partly = token_losses(loaded, window(LONG), uneven(loaded.spec, n_hat=50))
    torch.testing.assert_close(partly[:50], untouched[:50], rtol=1e-5, atol=1e-5)
    assert float((partly[50:] - untouched[50:]).abs().max()) > 1e-3


@pytest.mark.parametrize("n_hat", [0, 12])
def test_the_same_factors_for_every_layer_are_shared_factors_bit_for_bit(loaded: LoadedModel, n_hat: int) -> None:
    shared = uneven(loaded.spec, n_hat)
    rows = Factors(shared.by_layer() * loaded.spec.layers, n_hat, shared.attention_factor)
    assert not rows.shared
    ours, theirs = (token_losses(loaded, window(LONG), factors) for factors in (rows, shared))
    assert torch.equal(ours, theirs)


def test_every_layer_turns_by_its_own_factors(loaded: LoadedModel) -> None:
    first, second = uneven(loaded.spec).by_layer()[0], (2.0,) * loaded.spec.pairs
    factors = Factors((first, second), n_hat=8, attention_factor=1.1)
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append(kwargs["position_embeddings"]), with_kwargs=True
        )
        for layer in decoder_layers(loaded.model)
    ]
    try:
        ours = token_losses(loaded, window(LONG), factors)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 2
    columns = LAYOUTS[loaded.layout](loaded.spec.pairs)
    for row, given_to_layer in zip((first, second), seen, strict=True):
        expected = plain(loaded.spec, Factors(row, 8, 1.1), list(range(LONG)))
        for got, wanted in zip(given_to_layer, expected, strict=True):
            np.testing.assert_allclose(got[0].numpy(), wanted[:, columns], rtol=0, atol=1e-6)
    for other in ((first, first), (second, second), (second, first)):
        assert not torch.equal(token_losses(loaded, window(LONG), Factors(other, 8, 1.1)), ours)


def test_factors_of_another_shape_are_refused(loaded: LoadedModel) -> None:
    pairs, layers = loaded.spec.pairs, loaded.spec.layers
    for lambdas in ((1.0,) * (pairs - 1), (1.0,) * (pairs + 1), ((1.0,) * pairs,) * (layers + 1)):
        with (
            pytest.raises(LongRopeError, match=f"rotates {pairs} pairs in {layers} layers"),
            loaded.under(Factors(lambdas)),
        ):
            pass
