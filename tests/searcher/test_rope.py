"""The rotation against a plain loop, the attention policies against their formulas, and what factors refuse to be."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from searcher.errors import LongRopeError
from searcher.rope import Factors, RopeSpec, angles, attention_factor

SPEC = RopeSpec(theta=10_000.0, rotary_dim=8, original_length=4096, layers=2)
INCREASING = (1.0, 1.5, 3.25, 8.0)


def loop(spec: RopeSpec, factors: Factors, positions: list[int]) -> list[list[float]]:
    """The formula of DESIGN, one angle at a time."""
    rows = []
    for position in positions:
        row = []
        for i in range(spec.rotary_dim // 2):
            frequency = 1 / spec.theta ** (2 * i / spec.rotary_dim)
            if position >= factors.n_hat:
                frequency /= factors.by_layer()[0][i]
            row.append(position * frequency)
        rows.append(row)
    return rows


@given(
    theta=st.floats(1.5, 1e7),
    lambdas=st.lists(st.floats(0.5, 600), min_size=2, max_size=40),
    n_hat=st.integers(0, 300),
    positions=st.lists(st.integers(0, 2_097_152), min_size=1, max_size=8),
)
@settings(deadline=None, max_examples=80)
def test_angles_are_those_of_a_plain_loop(theta: float, lambdas: list[float], n_hat: int, positions: list[int]) -> None:
    spec = RopeSpec(theta, 2 * len(lambdas), 4096, 1)
    factors = Factors(tuple(lambdas), n_hat)
    positions += [max(n_hat - 1, 0), n_hat, n_hat + 1]
    result = angles(spec, factors, positions)
    assert result.dtype == np.float64
    assert result.shape == (len(positions), spec.pairs)
    np.testing.assert_allclose(result, loop(spec, factors, positions), rtol=1e-13)


def test_positions_below_n_hat_keep_the_original_rotation_to_the_bit() -> None:
    untouched = angles(SPEC, Factors((1.0,) * 4), range(10))
    changed = angles(SPEC, Factors((2.0,) * 4, n_hat=4), range(10))
    np.testing.assert_array_equal(changed[:4], untouched[:4])
    np.testing.assert_array_equal(changed[4:], untouched[4:] / 2)


def test_factors_of_one_leave_every_angle_as_it_is() -> None:
    positions = [0, 1, 17, 4095, 2_097_151]
    expected = np.asarray(positions)[:, None] * SPEC.inverse_frequencies()
    np.testing.assert_array_equal(angles(SPEC, Factors((1.0,) * 4), positions), expected)


def test_factors_of_s_are_position_interpolation() -> None:
    """Interpolated position s * m turns as far as position m did."""
    scale = 8
    positions = np.arange(50)
    interpolated = angles(SPEC, Factors((float(scale),) * 4), positions * scale)
    np.testing.assert_allclose(interpolated, angles(SPEC, Factors((1.0,) * 4), positions), rtol=1e-15)


def test_angles_at_two_million_tokens_have_float64_precision() -> None:
    """In float32 the angle at this position would be a multiple of 0.0625."""
    position = 2_097_153
    ((first, *_),) = angles(SPEC, Factors((3.0,) * 4), [position])
    assert first == pytest.approx(position / 3, rel=1e-15)


def test_angles_refuse_factors_that_differ_by_layer() -> None:
    with pytest.raises(ValueError, match="unpack"):
        angles(SPEC, Factors((INCREASING, INCREASING)), [0])


def test_inverse_frequencies_fall_from_one() -> None:
    np.testing.assert_allclose(SPEC.inverse_frequencies(), [1, 1e-1, 1e-2, 1e-3], rtol=1e-14)


def test_scale_is_target_over_original_length() -> None:
    assert SPEC.scale(6144) == 1.5


@pytest.mark.parametrize(("scale", "original"), [(2.0, 4096), (8.0, 256), (512.0, 4096), (1.01, 8192)])
def test_su_is_the_formula_of_the_authors_code(scale: float, original: int) -> None:
    spec = RopeSpec(10_000.0, 8, original, 1)
    assert attention_factor("su", spec, scale) == pytest.approx(
        (1 + math.log(scale) / math.log(original)) ** 0.5, rel=1e-15
    )


def test_policies_at_known_values() -> None:
    assert attention_factor("su", RopeSpec(1e4, 8, 256, 1), 256.0) == pytest.approx(math.sqrt(2))
    assert attention_factor("yarn", SPEC, math.e**2) == pytest.approx(1.2)
    assert attention_factor("none", SPEC, 64.0) == 1.0
    assert attention_factor("1.25", SPEC, 64.0) == 1.25


@pytest.mark.parametrize("policy", ["su", "yarn", "none"])
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_within_the_window_no_policy_changes_attention(policy: str, scale: float) -> None:
    assert attention_factor(policy, SPEC, scale) == 1.0


@pytest.mark.parametrize("policy", ["", "SU", "nan", "inf", "0", "-1.2", "1,2"])
def test_anything_else_is_no_attention_policy(policy: str) -> None:
    with pytest.raises(LongRopeError, match="positive number"):
        attention_factor(policy, SPEC, 8.0)


# Few values in every place, so that hypothesis comes upon factors that differ only in how they are laid out.
VALUES = st.sampled_from([1.0, 2.0, 3.0, math.nextafter(1.0, 2.0)])
FACTORS = st.builds(
    Factors,
    st.one_of(
        st.lists(VALUES, min_size=1, max_size=6).map(tuple),
        st.integers(1, 3).flatmap(
            lambda pairs: st.lists(
                st.lists(VALUES, min_size=pairs, max_size=pairs).map(tuple), min_size=1, max_size=4
            ).map(tuple)
        ),
    ),
    st.integers(0, 3),
    VALUES,
)


def meaning(factors: Factors) -> tuple[object, ...]:
    return (factors.by_layer(), factors.n_hat, factors.attention_factor)


@given(FACTORS, FACTORS)
@example(Factors(((1.0, 2.0), (3.0, 4.0))), Factors((1.0, 2.0, 3.0, 4.0)))
@example(Factors(((1.0,), (2.0,))), Factors(((1.0, 2.0),)))
@example(Factors((1.0, 1.0), 1, 2.0), Factors((1.0, 1.0), 2, 1.0))
@example(Factors((1.0,) * 3, 3, 1.0), Factors((1.0,) * 4, 3, 1.0))
@example(Factors((1.0, 2.0)), Factors(((1.0, 2.0),)))
@settings(deadline=None, max_examples=300)
def test_bytes_are_equal_exactly_where_the_rotation_is(first: Factors, second: Factors) -> None:
    assert (first.to_bytes() == second.to_bytes()) == (meaning(first) == meaning(second))


def test_bytes_are_little_endian_float64() -> None:
    factors = Factors(((1.0, 2.5), (1.5, 4.0)), 16, 1.25)
    assert np.frombuffer(factors.to_bytes(), dtype="<f8").tolist() == [2, 2, 16, 1.25, 1, 2.5, 1.5, 4]


def test_factors_say_whether_layers_share_them() -> None:
    assert Factors(INCREASING).shared
    assert Factors(INCREASING).by_layer() == (INCREASING,)
    assert not Factors((INCREASING, INCREASING)).shared
    assert Factors((INCREASING, INCREASING)).by_layer() == (INCREASING, INCREASING)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Factors((1.0, 0.0)), "above 0"),
        (lambda: Factors((1.0, -2.0)), "above 0"),
        (lambda: Factors((1.0, math.nan)), "finite"),
        (lambda: Factors((1.0, math.inf)), "finite"),
        (lambda: Factors(((1.0, 2.0), (1.0, math.nan))), "finite"),
        (lambda: Factors(()), "empty"),
        (lambda: Factors(((),)), "empty"),
        (lambda: Factors(((1.0, 2.0), (1.0,))), "same length"),
        (lambda: Factors((1.0,), n_hat=-1), "n_hat"),
        (lambda: Factors((1.0,), attention_factor=0.0), "attention factor"),
        (lambda: Factors((1.0,), attention_factor=math.nan), "attention factor"),
        (lambda: Factors((1.0,), attention_factor=math.inf), "attention factor"),
        (lambda: RopeSpec(1e4, 7, 4096, 1), "even"),
        (lambda: RopeSpec(1e4, 2, 4096, 1), "at least 4"),
        (lambda: RopeSpec(1.0, 8, 4096, 1), "base"),
        (lambda: RopeSpec(math.nan, 8, 4096, 1), "base"),
        (lambda: RopeSpec(math.inf, 8, 4096, 1), "base"),
        (lambda: RopeSpec(1e4, 8, 1, 1), "original length"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(make: Callable[[], object], message: str) -> None:
    with pytest.raises(LongRopeError, match=message):
        make()
