"""Gradient refinement: projected Adam on ln lambda, one document a step.

A model's loss is smooth in ln lambda, so its gradient finds in tens of steps what evolution finds in thousands of
evaluations. After each step the point goes back to the space: bounds, and non-decreasing order. The nearest point is
meant in the step's own metric: the projection weighs each pair by the root of its mean squared gradient over its step
size. So where neighbours are pooled, the pairs that the loss depends on decide, not the many it hardly depends on.

How far a pair may go in one step depends on how fast it turns: a change of ln lambda by x turns the pair's angle over a
distance of m tokens by m * theta_i * x radians, and where that is much, the slope at the start says nothing of the end.
So the first step of pair i is ``rate``, or ``phase / theta_i`` where that is less.

A refinement runs in legs, whose rate falls linearly to zero. Where a leg ends, its point is snapped to the grid and
scored like any individual. A leg that found nothing better is taken back, and the next one starts from the best point
at a quarter of the rate; after one that did, at half of it, and so does the refinement at the end. So the step adapts
to the model, and a refinement never ends worse than it began.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from searcher.errors import LongRopeError
from searcher.rope import Factors, FloatArray
from searcher.space import GRID, SearchSpace, isotonic

FIRST_MOMENT, SECOND_MOMENT = 0.9, 0.99  # Adam's betas
TINY = 1e-12


@dataclass(frozen=True)
class Refinement:
    """Settings.

    Attributes
    ----------
    steps: gradient steps of a leg, each on one document.
    legs: of the seeds' refinement, before evolution.
    final_legs: of the best individual's, after evolution.
    starts: how many of the best seeds are refined, side by side.
    rate: size of the first step at most, in units of ln lambda.
    phase: likewise, in radians a token of distance.
    attention: whether the attention factor is learnt too.
    """

    steps: int = 30
    legs: int = 1
    final_legs: int = 0
    starts: int = 1
    rate: float = 0.05
    phase: float = 0.02
    attention: bool = False

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("legs", 0), ("final_legs", 0), ("starts", 1)):
            if getattr(self, name) < least:
                raise LongRopeError(f"A refinement needs at least {least} in {name}, not {getattr(self, name)}.")
        for name in ("rate", "phase"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise LongRopeError(f"The {name} of a refinement is a positive number, not {getattr(self, name)}.")

    @property
    def gradients(self) -> int:
        """Gradient steps in all."""
        return self.steps * (self.starts * self.legs + self.final_legs)


@dataclass(frozen=True)
class Descent:
    """A leg on its way: a point of the space and Adam's moments, a pure function of the gradients so far.

    Attributes
    ----------
    logs: ln lambda, shape (pairs,).
    log_attention: ln attention factor.
    first, second: moments of the gradient, shape (pairs + 1,), the attention factor's last.
    step: steps taken.
    gradients: how many of them had a gradient.
    """

    logs: FloatArray
    n_hat: int
    log_attention: float
    first: FloatArray = field(repr=False)
    second: FloatArray = field(repr=False)
    step: int = 0
    gradients: int = 0

    @classmethod
    def start(cls, factors: Factors) -> Descent:
        """At rest at given factors that all layers share."""
        (lambdas,) = factors.by_layer()
        none = np.zeros(len(lambdas) + 1)
        return cls(np.log(np.asarray(lambdas)), factors.n_hat, math.log(factors.attention_factor), none, none)

    @property
    def factors(self) -> Factors:
        """The point, off the grid."""
        lambdas = tuple(float(value) for value in np.exp(self.logs))
        return Factors(lambdas, self.n_hat, math.exp(self.log_attention))


def descend(
    descent: Descent,
    gradient: tuple[float, ...] | None,
    settings: Refinement,
    share: float,
    space: SearchSpace,
    frequencies: Sequence[float],
) -> Descent:
    """One step of a leg.

    Parameters
    ----------
    gradient: of the mean loss a token by ln lambda of each pair and by ln attention factor, shape (pairs + 1,); a step
        whose gradient could not be had (None, or not finite) is left out.
    share: of the settings' rate and phase, that the leg's first step goes; this one goes less by the steps taken.
    frequencies: theta_i of each pair, in radians a token, of the unscaled RoPE.
    """
    if gradient is None or not all(math.isfinite(value) for value in gradient):
        return replace(descent, step=descent.step + 1)
    slope = np.asarray(gradient)
    slope[:-1] = space.free_gradient(slope[:-1])
    first = FIRST_MOMENT * descent.first + (1 - FIRST_MOMENT) * slope
    second = SECOND_MOMENT * descent.second + (1 - SECOND_MOMENT) * slope * slope
    taken = descent.gradients + 1
    scale = np.sqrt(second / (1 - SECOND_MOMENT**taken)) + TINY
    # The attention factor multiplies all logits alike, as slow pairs do.
    sizes = np.minimum(settings.rate, settings.phase / np.asarray([*frequencies, settings.phase / settings.rate]))
    moved = share * (1 - descent.step / settings.steps) * sizes * first / (1 - FIRST_MOMENT**taken) / scale
    logs = _projected(descent.logs - moved[:-1], (scale / sizes)[:-1], space)
    log_attention = descent.log_attention - float(moved[-1]) * settings.attention
    return Descent(logs, descent.n_hat, log_attention, first, second, descent.step + 1, taken)


def _projected(logs: FloatArray, weights: FloatArray, space: SearchSpace) -> FloatArray:
    """The nearest ln lambda within the space, nearest meaning the weighted sum of squares."""
    free = slice(space.critical, None)
    searched = isotonic(logs[free], weights[free])
    clipped = np.clip(searched, math.log(space.lower / GRID), math.log(space.upper / GRID))
    below = np.arange(space.critical) / max(space.critical, 1) * clipped[0]
    return np.concatenate([below, clipped])
