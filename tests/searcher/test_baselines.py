"""Every baseline against the implementation that people compare with: transformers' own, or the closed formula."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from searcher import baselines
from searcher.baselines import BASELINES
from searcher.rope import Factors, RopeSpec

# Original lengths of 128 and 6 put YaRN's ramp on its edges: a bound clamped to 0, and no ramp at all.
GEOMETRIES = [
    RopeSpec(theta, dim, length, 1)
    for theta, dim, length in product([10_000.0, 500_000.0, 5e6], [16, 128], [6, 128, 4096, 131_072])
]
SCALES = [1.5, 8.0, 512.0]
FLOAT32 = 5e-6  # transformers computes in float32, through a power: some ulps

geometries = pytest.mark.parametrize(
    "spec", GEOMETRIES, ids=lambda s: f"{s.theta:.0f}-{s.rotary_dim}-{s.original_length}"
)
scales = pytest.mark.parametrize("scale", SCALES)


def oracle(
    spec: RopeSpec, kind: str, scale: float, partial: float = 1.0, **more: Any
) -> tuple[npt.NDArray[np.float64], float]:
    """transformers' inverse frequencies and attention factor at the target length."""
    head_dim = round(spec.rotary_dim / partial)
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=spec.original_length,
        rope_parameters={
            "rope_type": kind,
            "rope_theta": spec.theta,
            "factor": scale,
            "partial_rotary_factor": partial,
            **more,
        },
    )
    frequencies, attention = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=round(spec.original_length * scale))
    return frequencies.double().numpy(), attention


def frequencies(spec: RopeSpec, factors: Factors) -> npt.NDArray[np.float64]:
    """theta^(-2i/d) / lambda_i, from the definition."""
    (lambdas,) = factors.by_layer()
    exponents = -2 * np.arange(spec.rotary_dim // 2) / spec.rotary_dim
    return np.asarray(spec.theta**exponents / np.asarray(lambdas), dtype=np.float64)


def base_changed(spec: RopeSpec, theta: float) -> npt.NDArray[np.float64]:
    return RopeSpec(theta, spec.rotary_dim, spec.original_length, 1).inverse_frequencies()


@geometries
@scales
def test_pi_is_linear_scaling_in_transformers(spec: RopeSpec, scale: float) -> None:
    expected, attention = oracle(spec, "linear", scale)
    factors = baselines.pi(spec, scale)
    np.testing.assert_allclose(frequencies(spec, factors), expected, rtol=FLOAT32)
    assert factors.attention_factor == attention == 1
    assert factors.lambdas == (scale,) * spec.pairs


@geometries
@scales
def test_dynamic_ntk_is_that_of_transformers_at_the_target(spec: RopeSpec, scale: float) -> None:
    expected, attention = oracle(spec, "dynamic", scale)
    factors = baselines.dynamic_ntk(spec, scale)
    np.testing.assert_allclose(frequencies(spec, factors), expected, rtol=FLOAT32)
    assert factors.attention_factor == attention == 1


@geometries
@scales
def test_dynamic_ntk_interpolates_the_lowest_frequency_by_s_squared_less_s_plus_1(spec: RopeSpec, scale: float) -> None:
    factors = baselines.dynamic_ntk(spec, scale)
    assert factors.lambdas[0] == 1
    assert factors.lambdas[-1] == pytest.approx(scale**2 - scale + 1, rel=1e-12)


@geometries
@scales
def test_yarn_is_that_of_transformers(spec: RopeSpec, scale: float) -> None:
    expected, attention = oracle(spec, "yarn", scale, original_max_position_embeddings=spec.original_length)
    factors = baselines.yarn(spec, scale)
    np.testing.assert_allclose(frequencies(spec, factors), expected, rtol=FLOAT32)
    assert factors.attention_factor == pytest.approx(attention, rel=1e-15)


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
@pytest.mark.parametrize("theta", [10_000.0, 1e6])
@scales
def test_the_mistral_families_have_betas_of_their_own(family: str, theta: float, scale: float) -> None:
    spec = RopeSpec(theta, 128, 8192, 1, family)
    expected, _ = oracle(spec, "yarn", scale, original_max_position_embeddings=8192, beta_fast=128.0, beta_slow=2.0)
    factors = baselines.yarn(spec, scale)
    np.testing.assert_allclose(frequencies(spec, factors), expected, rtol=FLOAT32)
    assert factors.lambdas != baselines.yarn(RopeSpec(theta, 128, 8192, 1, "llama"), scale).lambdas


def test_betas_can_be_given() -> None:
    spec = RopeSpec(10_000.0, 64, 4096, 1)
    expected, _ = oracle(spec, "yarn", 8.0, original_max_position_embeddings=4096, beta_fast=20.0, beta_slow=3.0)
    np.testing.assert_allclose(frequencies(spec, baselines.yarn(spec, 8.0, (20.0, 3.0))), expected, rtol=FLOAT32)


@pytest.mark.parametrize(("name", "kind"), [("pi", "linear"), ("dynamic_ntk", "dynamic"), ("yarn", "yarn")])
def test_a_partly_rotated_head_counts_its_rotated_dimensions(name: str, kind: str) -> None:
    spec = RopeSpec(10_000.0, 32, 4096, 1)
    more = {"original_max_position_embeddings": 4096} if kind == "yarn" else {}
    expected, _ = oracle(spec, kind, 4.0, partial=0.4, **more)
    np.testing.assert_allclose(frequencies(spec, BASELINES[name](spec, 4.0)), expected, rtol=FLOAT32)


@geometries
@scales
def test_ntk_is_its_closed_formula(spec: RopeSpec, scale: float) -> None:
    d = spec.rotary_dim
    factors = baselines.ntk(spec, scale)
    np.testing.assert_allclose(factors.lambdas, [scale ** (2 * i / (d - 2)) for i in range(d // 2)], rtol=1e-12)
    assert factors.lambdas[0] == 1
    assert factors.lambdas[-1] == pytest.approx(scale, rel=1e-12)


@geometries
@scales
def test_ntk_by_base_is_rope_with_base_s_theta(spec: RopeSpec, scale: float) -> None:
    d = spec.rotary_dim
    factors = baselines.ntk_base(spec, scale)
    np.testing.assert_allclose(factors.lambdas, [scale ** (2 * i / d) for i in range(d // 2)], rtol=1e-12)
    np.testing.assert_allclose(frequencies(spec, factors), base_changed(spec, scale * spec.theta), rtol=1e-12)


@geometries
@pytest.mark.parametrize("ratio", [None, 100.0])
def test_abf_is_rope_with_the_stated_base(spec: RopeSpec, ratio: float | None) -> None:
    factors = baselines.abf(spec, 8.0) if ratio is None else baselines.abf(spec, 8.0, ratio)
    expected = base_changed(spec, (ratio or 50) * spec.theta)
    np.testing.assert_allclose(frequencies(spec, factors), expected, rtol=1e-12)


@geometries
def test_none_is_the_untouched_model(spec: RopeSpec) -> None:
    assert baselines.none(spec, 8.0) == Factors((1.0,) * spec.pairs, 0, 1.0)


@pytest.mark.parametrize("name", BASELINES)
def test_factors_of_every_baseline_never_decrease_and_touch_no_start_token(name: str) -> None:
    for spec in GEOMETRIES:
        factors = BASELINES[name](spec, 8.0)
        assert len(factors.lambdas) == spec.pairs
        assert np.all(np.diff(np.asarray(factors.lambdas)) >= 0)
        assert factors.n_hat == 0


def test_only_yarn_has_an_attention_factor_of_its_own() -> None:
    spec = RopeSpec(10_000.0, 64, 4096, 1)
    changed = [name for name, make in BASELINES.items() if make(spec, 8.0).attention_factor != 1]
    assert changed == ["yarn"]
