"""Racing: a child that can hardly become a parent any more is not scored on the remaining documents.

Individuals do well or badly on all documents together, so differences by document are compared in pairs: a child's
loss on a document less that of the k-th best individual so far, k the number of parents. Decisions fall at fixed
points, after document j of every child, from losses in ask order; they depend on nothing that runs at the same time.

The rule. For individuals scored on all documents, let h be the sum of their differences over the first j documents and
r the sum over the rest. Among the 2k best, and at least the LEAST_SCORED best, r is regressed on h through the origin:
r = slope * h, slope no less than -1, with residual deviation sigma. A child is left where
h + slope * h - caution * sigma > 0: even if it does better on the rest than expected by ``caution`` deviations, it does
not reach the k-th best. A child that leads on the documents seen is never left: the best in all that did well there
did worse on the rest, so their slope can fall below -1, but says nothing of newcomers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from searcher.errors import LongRopeError

LEAST_SCORED = 8  # individuals a regression needs before it is trusted


@dataclass(frozen=True)
class Racing:
    """Settings.

    Attributes
    ----------
    after: the fixed points: numbers of documents, ascending.
    caution: residual deviations a child is allowed to do better than expected.
    """

    after: tuple[int, ...] = (1, 2, 3)
    caution: float = 2.0

    def __post_init__(self) -> None:
        if any(point < 1 for point in self.after) or sorted(set(self.after)) != list(self.after):
            raise LongRopeError(f"Racing decides after ascending numbers of documents, not {self.after}.")
        if not (math.isfinite(self.caution) and self.caution >= 0):
            raise LongRopeError(f"The caution of racing is a number of deviations, at least 0, not {self.caution}.")


@dataclass(frozen=True)
class Race:
    """One generation's race.

    Attributes
    ----------
    scored: nats by document of the individuals scored on all documents, best first.
    survivors: k.
    """

    settings: Racing
    scored: Sequence[Sequence[float]]
    survivors: int

    def points(self, documents: int) -> list[int]:
        """After how many of the documents children may be left."""
        return [point for point in self.settings.after if point < documents]

    def kept(self, losses: Sequence[Sequence[float]]) -> list[bool]:
        """Whether each child goes on, from its nats on the first documents; a child that failed does not."""
        alive = [all(math.isfinite(value) for value in child) for child in losses]
        if len(self.scored) < max(self.survivors, LEAST_SCORED) or not any(alive):
            return alive
        seen = len(losses[0])
        best = self.scored[: max(2 * self.survivors, LEAST_SCORED)]
        differences = np.asarray(best) - np.asarray(self.scored[self.survivors - 1])
        heads, rests = differences[:, :seen].sum(axis=1), differences[:, seen:].sum(axis=1)
        square = float(heads @ heads)
        slope = max(float(heads @ rests) / square, -1.0) if square > 0 else 0.0
        residuals = rests - slope * heads
        deviation = math.sqrt(float(residuals @ residuals) / max(len(residuals) - 2, 1))
        reference = self.scored[self.survivors - 1][:seen]
        kept = []
        for child, is_alive in zip(losses, alive, strict=True):
            head = math.fsum(child) - math.fsum(reference) if is_alive else math.inf
            kept.append(is_alive and head + slope * head - self.settings.caution * deviation <= 0)
        return kept


@dataclass(frozen=True)
class Cut:
    """The plainest race, where nothing is known to race against: after one document the best of it go on.

    Attributes
    ----------
    survivors: how many go on.
    """

    survivors: int

    def points(self, documents: int) -> list[int]:
        """After how many of the documents candidates may be left."""
        return [1] if documents > 1 else []

    def kept(self, losses: Sequence[Sequence[float]]) -> list[bool]:
        """Whether each candidate goes on; of equals, those asked for first."""
        order = sorted(range(len(losses)), key=lambda i: (losses[i][0], i))
        best = {i for i in order[: self.survivors] if math.isfinite(losses[i][0])}
        return [i in best for i in range(len(losses))]
