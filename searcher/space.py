"""The search space: a grid of hundredths, bounds, monotonicity, the choices of n_hat (LongRoPE, Table 4).

LongRoPE2's space is the same on fewer pairs: those below its critical pair follow from that one (searcher/critical.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from searcher.critical import ntk_below
from searcher.errors import LongRopeError
from searcher.rope import Factors, FloatArray

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
    lower, upper: inclusive bounds of a searched factor in hundredths.
    n_hats: the choices of n_hat, ascending.
    critical: the first pair that is searched; those below follow NTK up to its factor. At 0 every pair is searched.
    """

    pairs: int
    lower: int
    upper: int
    n_hats: tuple[int, ...] = N_HATS
    critical: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.lower <= self.upper:
            raise LongRopeError(
                f"The bounds of the rescale factors must satisfy 0 < lower <= upper, not {self.lower / GRID} and "
                f"{self.upper / GRID}."
            )
        if not self.n_hats or min(self.n_hats) < 0 or sorted(set(self.n_hats)) != list(self.n_hats):
            raise LongRopeError(f"n_hat choices must be distinct, ascending and not negative, not {self.n_hats}.")
        if self.critical and not 0 < self.critical < self.pairs:
            raise LongRopeError(f"The critical pair lies between 0 and {self.pairs - 1}, not at {self.critical}.")
        if self.critical and self.lower < GRID:  # NTK would decrease from 1.0
            raise LongRopeError(
                f"With a critical pair, rescale factors are searched from 1.0 or above, not from {self.lower / GRID}."
            )

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
        return cls(pairs, round(lower * GRID), _upper(scale, upper_ratio), tuple(n_hats))

    @classmethod
    def for_critical(
        cls,
        pairs: int,
        scale: float,
        critical: int,
        n_hats: Sequence[int] = N_HATS,
        upper_ratio: float = 2.0,
    ) -> SearchSpace:
        """LongRoPE2's space at scale s: [s, 2 s] from the critical pair on, NTK below. Bounds are rounded up."""
        return cls(pairs, _upper(scale, 1.0), _upper(scale, upper_ratio), tuple(n_hats), critical)

    @property
    def free(self) -> int:
        """How many pairs are searched: the last ones."""
        return self.pairs - self.critical

    def completed(self, searched: Sequence[int]) -> tuple[int, ...]:
        """All steps of an individual, from those of the searched pairs."""
        below = ntk_below(searched[0] / GRID, self.critical)
        return (*(round(value * GRID) for value in below), *searched)

    def __contains__(self, individual: Individual) -> bool:
        searched = individual.steps[self.critical :]
        return (
            len(individual.steps) == self.pairs
            and individual.n_hat in self.n_hats
            and all(self.lower <= step <= self.upper for step in searched)
            and all(a <= b for a, b in pairwise(searched))
            and individual.steps == self.completed(searched)
        )

    def project(self, values: Sequence[float] | npt.NDArray[np.floating]) -> FloatArray:
        """The rescale factors that ``values`` stand for in this space, off the grid; both in hundredths, (pairs,).

        The searched pairs are clipped, then projected to non-decreasing order: the nearest such sequence to the clipped
        values in least squares. What ``values`` says of the pairs below the critical one is not looked at: they follow
        NTK up to the projected factor of that one.
        """
        values = np.asarray(values, dtype=np.float64)
        if values.shape != (self.pairs,):
            raise LongRopeError(f"Expected {self.pairs} rescale factors, got {values.size}.")
        searched = isotonic(np.clip(values[self.critical :], self.lower, self.upper))
        below = ntk_below(float(searched[0]) / GRID, self.critical)
        return np.concatenate([np.asarray(below, dtype=np.float64) * GRID, searched])

    def free_gradient(self, gradient: FloatArray) -> FloatArray:
        """The gradient by ln lambda of the searched pairs, from that by ln lambda of each pair alone; both (pairs,).

        Below the critical pair r, ln lambda_i = (i / r) ln lambda_r, so pair r moves them all and gets their shares;
        theirs are 0. With r = 0 it is what was given.
        """
        shares = np.arange(self.critical) / max(self.critical, 1)
        result = gradient.astype(np.float64)
        result[self.critical] += shares @ result[: self.critical]
        result[: self.critical] = 0.0
        return result

    def repair(self, steps: Sequence[float] | npt.NDArray[np.floating], n_hat: int) -> Individual:
        """The individual nearest to what ``project`` makes of the steps, hundredths that may be fractional.

        n_hat moves to the nearest choice, the lower at a tie.
        """
        # Rounding keeps the order, so the projection's result stays monotone on the grid.
        searched = np.rint(self.project(steps)[self.critical :]).astype(int).tolist()
        return Individual(self.completed(searched), min(self.n_hats, key=lambda c: (abs(c - n_hat), c)))

    def snap(self, factors: Factors) -> Individual:
        """The individual nearest to given factors that all layers share."""
        if not factors.shared:
            raise LongRopeError("A search holds one list of rescale factors for all layers; these differ by layer.")
        return self.repair(np.asarray(factors.by_layer()[0]) * GRID, factors.n_hat)

    @property
    def size(self) -> int:
        """How many individuals there are: multisets of grid points, times the choices of n_hat."""
        return math.comb(self.upper - self.lower + self.free, self.free) * len(self.n_hats)


def _upper(scale: float, ratio: float) -> int:
    """``ratio`` times the scale in hundredths, up to the grid."""
    if not 0 < ratio * scale * GRID <= 2**53:  # beyond it float64 cannot tell the grid's points apart
        raise LongRopeError(f"The upper bound is a positive number of times the scale, not {ratio}.")
    return math.ceil(round(ratio * scale * GRID, 6))


def isotonic(
    values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64] | None = None
) -> npt.NDArray[np.float64]:
    """The non-decreasing sequence nearest in (weighted) least squares: pool adjacent violators, in exact arithmetic.

    Parameters
    ----------
    weights: positive, one a value; all alike if not given.
    """
    blocks: list[tuple[Fraction, Fraction, int]] = []  # weighted sum, weight, values
    for value, weight in zip(values, np.ones(len(values)) if weights is None else weights, strict=True):
        mass, count = Fraction(float(weight)), 1
        total = Fraction(float(value)) * mass
        while blocks and blocks[-1][0] * mass >= total * blocks[-1][1]:
            previous, before, width = blocks.pop()
            total, mass, count = previous + total, before + mass, count + width
        blocks.append((total, mass, count))
    return np.concatenate([np.full(count, float(total / mass)) for total, mass, count in blocks])
