"""Long against short context: which individuals no other one beats on both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from searcher.evolution import State
from searcher.space import Individual


@dataclass(frozen=True)
class Tradeoff:
    """An individual and its two losses, in mean nats a token.

    Attributes
    ----------
    long, short: on documents of the target length, and on documents within the original length; infinity where it
        failed.
    """

    individual: Individual
    long: float
    short: float

    @property
    def perplexities(self) -> tuple[float, float]:
        """exp of both losses, long first; infinity where a loss is beyond float64."""
        long, short = (math.exp(loss) if loss < 700 else math.inf for loss in (self.long, self.short))
        return long, short


def pareto(rows: Sequence[Tradeoff]) -> list[Tradeoff]:
    """The rows that no other row dominates: none is as good on both losses and better on one.

    Best on long documents first, so short losses fall along the list; rows with the same two losses all stay, by key.
    A row with a loss that is not finite is never among them.
    """
    finite = [row for row in rows if math.isfinite(row.long) and math.isfinite(row.short)]
    front: list[Tradeoff] = []
    for row in sorted(finite, key=lambda row: (row.long, row.short, row.individual.key)):
        if not front or row.short < front[-1].short or (row.long, row.short) == (front[-1].long, front[-1].short):
            front.append(row)
    return front


def tradeoffs(state: State) -> list[Tradeoff]:
    """Every individual that has both losses, in ask order."""
    return [Tradeoff(i, long, state.short[i]) for i, long in state.scores.items() if i in state.short]
