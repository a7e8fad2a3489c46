"""The search space: a grid of hundredths, bounds, monotonicity, the choices of n_hat (LongRoPE, Table 4)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from searcher.errors import LongRopeError
from searcher.rope import Factors

GRID = 100  # steps in 1.0: factors are searched in hundredths
N_HATS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Individual:
    """One point of the space. Integers, so that equality, hashing and storage are exact.

    Attributes
    ----------
    steps: rescale factors in hundredths, highest frequency first.
    n_hat: start tokens left untouched.
    """

    steps: tuple[int, ...]
    n_hat: int

    @property
    def key(self) -> str:
        """32 hexadecimal digits, the same on every machine; ties between scores break by it."""
        text = f"{self.n_hat}:{','.join(map(str, self.steps))}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def factors(self, attention_factor: float) -> Factors:
        """The factors it stands for, as float64."""
        return Factors(tuple(step / GRID for step in self.steps), self.n_hat, attention_factor)


@dataclass(frozen=True)
class SearchSpace:
    """Where individuals live.

    Attributes
    ----------
    pairs: rescale factors of an individual.
    lower, upper: inclusive bounds of a factor in hundredths.
    n_hats: the choices of n_hat, ascending.
    """

    pairs: int
    lower: int
    upper: int
    n_hats: tuple[int, ...] = N_HATS

    def __post_init__(self) -> None:
        if not 0 < self.lower <= self.upper:
            raise LongRopeError(
                f"The bounds of the rescale factors must satisfy 0 < lower <= upper, not {self.lower / GRID} and "
                f"{self.upper / GRID}."
            )
        if not self.n_hats or min(self.n_hats) < 0 or sorted(set(self.n_hats)) != list(self.n_hats):
            raise LongRopeError(f"n_hat choices must be distinct, ascending and not negative, not {self.n_hats}.")

    @classmethod
    def for_scale(
        cls,
        pairs: int,
        scale: float,
        upper_ratio: float = 1.25,
        n_hats: Sequence[int] = N_HATS,
        lower: float = 1.0,
    ) -> SearchSpace:
        """The paper's space at scale s: [1, 1.25 s]. The upper bound is rounded up to the grid."""
        if not 0 < upper_ratio * scale * GRID <= 2**53:  # beyond it float64 cannot tell the grid's points apart
            raise LongRopeError(f"The upper bound is a positive number of times the scale, not {upper_ratio}.")
        return cls(pairs, round(lower * GRID), math.ceil(round(upper_ratio * scale * GRID, 6)), tuple(n_hats))

    def __contains__(self, individual: Individual) -> bool:
        steps = individual.steps
        return (
            len(steps) == self.pairs
            and individual.n_hat in self.n_hats
            and all(self.lower <= step <= self.upper for step in steps)
            and all(a <= b for a, b in pairwise(steps))
        )

    def repair(self, steps: Sequence[float] | npt.NDArray[np.floating], n_hat: int) -> Individual:
        """The nearest individual: clipped, projected to non-decreasing order, snapped to the grid.

        ``steps`` are hundredths and may be fractional. n_hat moves to the nearest choice, the lower at a tie.
        """
        values = np.asarray(steps, dtype=np.float64)
        if values.shape != (self.pairs,):
            raise LongRopeError(f"Expected {self.pairs} rescale factors, got {values.size}.")
        # Rounding keeps the order, so the projection's result stays monotone on the grid.
        snapped = np.rint(isotonic(np.clip(values, self.lower, self.upper))).astype(int)
        return Individual(tuple(int(step) for step in snapped), min(self.n_hats, key=lambda c: (abs(c - n_hat), c)))

    def snap(self, factors: Factors) -> Individual:
        """The individual nearest to given factors that all layers share."""
        if not factors.shared:
            raise LongRopeError("A search holds one list of rescale factors for all layers; these differ by layer.")
        return self.repair(np.asarray(factors.by_layer()[0]) * GRID, factors.n_hat)

    @property
    def size(self) -> int:
        """How many individuals there are: multisets of grid points, times the choices of n_hat."""
        return math.comb(self.upper - self.lower + self.pairs, self.pairs) * len(self.n_hats)


def isotonic(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The non-decreasing sequence nearest in least squares: pool adjacent violators, in exact arithmetic."""
    blocks: list[tuple[Fraction, int]] = []
    for value in values:
        total, count = Fraction(float(value)), 1
        while blocks and blocks[-1][0] * count >= total * blocks[-1][1]:
            previous, width = blocks.pop()
            total, count = previous + total, count + width
        blocks.append((total, count))
    return np.concatenate([np.full(count, float(total / count)) for total, count in blocks])
