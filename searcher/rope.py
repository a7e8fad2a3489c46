"""Rotary geometry and rescale factors: which angle a pair turns by, at which position. Float64 throughout.

    angle_i(m) = m * theta^(-2i/d)             for m <  n_hat
    angle_i(m) = m * theta^(-2i/d) / lambda_i  for m >= n_hat        (LongRoPE, arXiv 2402.13753, equation 3)

``d`` is the rotary dimension and i = 0 the highest frequency. Factors are absolute: they divide the inverse
frequencies of the model's unscaled RoPE, whatever the model's own config scales by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from searcher.errors import LongRopeError

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RopeSpec:
    """The rotary geometry of a model.

    Attributes
    ----------
    theta: base of the unscaled RoPE.
    rotary_dim: dimensions of a head that are rotated (head_dim * partial_rotary_factor); even.
    original_length: L0, the length the model was trained for, in tokens.
    layers: decoder layers.
    family: transformers' ``model_type``; decides YaRN's betas.
    """

    theta: float
    rotary_dim: int
    original_length: int
    layers: int
    family: str = "llama"

    def __post_init__(self) -> None:
        if self.rotary_dim < 4 or self.rotary_dim % 2:
            raise LongRopeError(f"The rotary dimension must be even and at least 4, not {self.rotary_dim}.")
        if not self.theta > 1 or not math.isfinite(self.theta):
            raise LongRopeError(f"The RoPE base must be a finite number above 1, not {self.theta}.")
        if self.original_length < 2:
            raise LongRopeError(f"The original length must be at least 2 tokens, not {self.original_length}.")

    @property
    def pairs(self) -> int:
        """Rotary pairs, so rescale factors: d / 2."""
        return self.rotary_dim // 2

    def scale(self, target_length: int) -> float:
        """s = L / L0."""
        return target_length / self.original_length

    def inverse_frequencies(self) -> FloatArray:
        """theta^(-2i/d), shape (pairs,), in radians a token."""
        exponents: FloatArray = np.arange(0, self.rotary_dim, 2, dtype=np.float64) / self.rotary_dim
        result: FloatArray = self.theta**-exponents
        return result


@dataclass(frozen=True)
class Factors:
    """Rescale factors with what belongs to them.

    Attributes
    ----------
    lambdas: one list of ``pairs`` factors for all layers, or one list a layer; positive and finite.
    n_hat: positions below it keep the original rotation, and attention factor 1.
    attention_factor: multiplies cos and sin, so attention logits scale by its square.
    """

    lambdas: tuple[float, ...] | tuple[tuple[float, ...], ...]
    n_hat: int = 0
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        rows = self.by_layer()
        if not rows[0] or len({len(row) for row in rows}) > 1:
            raise LongRopeError("Rescale factors must be lists of the same length for all layers, and not empty.")
        for layer in rows:
            if not all(math.isfinite(value) and value > 0 for value in layer):
                raise LongRopeError("Rescale factors must be finite and above 0.")
        if self.n_hat < 0:
            raise LongRopeError(f"n_hat counts tokens and cannot be negative, not {self.n_hat}.")
        if not (math.isfinite(self.attention_factor) and self.attention_factor > 0):
            raise LongRopeError(f"The attention factor must be finite and above 0, not {self.attention_factor}.")

    def by_layer(self) -> tuple[tuple[float, ...], ...]:
        """The lists as rows: one row where all layers share their factors."""
        if self.lambdas and isinstance(self.lambdas[0], tuple):
            return self.lambdas
        return (self.lambdas,)  # type: ignore[return-value]

    @property
    def shared(self) -> bool:
        """Whether all layers share one list."""
        return not (self.lambdas and isinstance(self.lambdas[0], tuple))

    def to_bytes(self) -> bytes:
        """What decides the rotation, as little-endian float64: rows, pairs, n_hat, attention factor, lambdas."""
        rows = self.by_layer()
        head = [float(len(rows)), float(len(rows[0])), float(self.n_hat), self.attention_factor]
        flat = [value for row in rows for value in row]
        return np.asarray(head + flat, dtype="<f8").tobytes()


def angles(spec: RopeSpec, factors: Factors, positions: Sequence[int] | npt.NDArray[np.integer]) -> FloatArray:
    """Rotation angles in radians, shape (positions, pairs), for factors that all layers share.

    The plain statement of the formula above; workers/apply.py computes the same on a device.
    """
    (lambdas,) = factors.by_layer()
    place = np.asarray(positions, dtype=np.float64)[:, None]
    frequency = spec.inverse_frequencies()
    rescaled = frequency / np.asarray(lambdas, dtype=np.float64)
    result: FloatArray = place * np.where(place < factors.n_hat, frequency, rescaled)
    return result


ATTENTION_POLICIES = ("su", "yarn", "none")


def attention_factor(policy: str, spec: RopeSpec, scale: float) -> float:
    """The attention factor that a policy, or a number written as text, stands for at scale s.

    ``su``: sqrt(1 + ln s / ln L0), as in the LongRoPE authors' code; ``yarn``: 0.1 ln s + 1 (arXiv 2309.00071,
    equation 22, as the square root of 1/t); ``none``: 1. At s <= 1 every policy gives 1.

    Raises
    ------
    LongRopeError
        Neither a policy nor a positive finite number.
    """
    if policy == "none":
        return 1.0
    if policy == "su":
        return 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(spec.original_length))
    if policy == "yarn":
        return 1.0 if scale <= 1 else 0.1 * math.log(scale) + 1
    try:
        value = float(policy)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise LongRopeError(
            f"The attention factor is one of {', '.join(ATTENTION_POLICIES)} or a positive number, not {policy!r}."
        )
    return value
