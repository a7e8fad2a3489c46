"""The factors other methods choose without a search, each ``RopeSpec, scale -> Factors``, attention factor its own.

Rescale factors relate to a changed base theta' by lambda_i = (theta' / theta)^(2i/d).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from searcher.rope import Factors, RopeSpec, attention_factor

# beta_fast, beta_slow: Mistral's release uses its own (YaRN repository); all others the paper's Llama values.
YARN_BETAS = {"mistral": (128.0, 2.0), "mixtral": (128.0, 2.0)}
DEFAULT_YARN_BETAS = (32.0, 1.0)


def _changed_base(spec: RopeSpec, ratio: float) -> Factors:
    """Factors of RoPE with base ``ratio * theta``."""
    exponents = np.arange(spec.pairs) * 2 / spec.rotary_dim
    return Factors(tuple(float(value) for value in ratio**exponents))


def none(spec: RopeSpec, scale: float) -> Factors:  # noqa: ARG001 - the shape all baselines share
    """The untouched model, extrapolating."""
    return Factors((1.0,) * spec.pairs)


def pi(spec: RopeSpec, scale: float) -> Factors:
    """Position interpolation (arXiv 2306.15595): lambda_i = s."""
    return Factors((float(scale),) * spec.pairs)


def ntk(spec: RopeSpec, scale: float) -> Factors:
    """NTK-aware, lambda_i = s^(2i/(d-2)): the highest frequency untouched, the lowest interpolated by s."""
    return _changed_base(spec, scale ** (spec.rotary_dim / (spec.rotary_dim - 2)))


def ntk_base(spec: RopeSpec, scale: float) -> Factors:
    """NTK-aware in its simpler form, base s * theta: lambda_i = s^(2i/d)."""
    return _changed_base(spec, scale)


def dynamic_ntk(spec: RopeSpec, scale: float) -> Factors:
    """Dynamic NTK as transformers computes it, factor s, at length L: base scaled by (s^2 - s + 1)^(d/(d-2))."""
    return _changed_base(spec, (scale * scale - scale + 1) ** (spec.rotary_dim / (spec.rotary_dim - 2)))


def abf(spec: RopeSpec, scale: float, ratio: float = 50.0) -> Factors:  # noqa: ARG001 - likewise
    """Adjusted base frequency (arXiv 2309.16039): base ``ratio * theta``, 50 times by default (10 000 to 500 000)."""
    return _changed_base(spec, ratio)


def yarn(spec: RopeSpec, scale: float, betas: tuple[float, float] | None = None) -> Factors:
    """YaRN (arXiv 2309.00071), blended in frequency as in transformers: 1/lambda_i = (1 - r_i) / s + r_i.

    r_i falls linearly over the pair index from 1 (pairs that turn more than beta_fast times in L0) to 0 (fewer than
    beta_slow times); the index bounds are floored and ceiled.
    """
    fast, slow = betas or YARN_BETAS.get(spec.family, DEFAULT_YARN_BETAS)

    def pair_that_turns(rotations: float) -> float:
        ratio = spec.original_length / (rotations * 2 * math.pi)
        return spec.rotary_dim * math.log(ratio) / (2 * math.log(spec.theta))

    low = max(math.floor(pair_that_turns(fast)), 0)
    high: float = min(math.ceil(pair_that_turns(slow)), spec.rotary_dim - 1)
    if low == high:
        high += 0.001  # a ramp without width: a step
    kept = 1 - np.clip((np.arange(spec.pairs) - low) / (high - low), 0, 1)
    frequency_scale = (1 - kept) / scale + kept
    return Factors(
        tuple(float(1 / value) for value in frequency_scale), attention_factor=attention_factor("yarn", spec, scale)
    )


# Coarse to fine, by factors of two and of the root of two: where the ramp begins, and where it ends.
RAMP_FAST, RAMP_SLOW = (32.0, 16.0, 8.0, 4.0, 2.0), (1.0, 0.7, 0.5, 0.35)


def ramps(spec: RopeSpec, scale: float) -> dict[str, Factors]:
    """YaRN's ramp with other betas, by name: every family of curves a search starts from has its best one elsewhere.

    Models differ in which pairs they use for what lies near, and in how well the slow ones were trained. Two numbers
    describe that well enough for a start; see benchmarks/NOTES.md.
    """
    return {f"ramp:{fast:g},{slow:g}": yarn(spec, scale, (fast, slow)) for fast in RAMP_FAST for slow in RAMP_SLOW}


BASELINES: dict[str, Callable[[RopeSpec, float], Factors]] = {
    "none": none,
    "pi": pi,
    "ntk": ntk,
    "ntk_base": ntk_base,
    "dynamic_ntk": dynamic_ntk,
    "abf": abf,
    "yarn": yarn,
}
