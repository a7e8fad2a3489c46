"""Mutation and crossover: pure functions of (rng, parents, space). No loop here is without a bound.

Three ways to keep individuals monotone, by name:

``neighbours``  the paper's: a mutated factor is drawn between its neighbours' present values (the space's bounds at
                both ends, so boundary dimensions move), a cross that is not monotone is drawn again.
``range``       a mutated factor is drawn from the whole range, and the whole is repaired by isotonic projection, so
                that plateaus of equal factors move.
``lognormal``   a mutated factor is multiplied by a log-normal step whose size is drawn anew for every child, from
                fine to the whole range, and the whole is repaired likewise.

In a space with a critical pair they work on the searched pairs; the space derives the others.
"""

from __future__ import annotations

import math

import numpy as np

from searcher.errors import LongRopeError
from searcher.space import Individual, SearchSpace

MUTATIONS = ("neighbours", "range", "lognormal")
CROSS_ATTEMPTS = 32  # draws of a monotone cross before the repair takes over
FINEST_STEP = 0.01  # smallest log-normal step size, in units of ln(upper / lower)


def check_mutation(kind: str) -> None:
    if kind not in MUTATIONS:
        raise LongRopeError(f"The mutation is one of {', '.join(MUTATIONS)}, not {kind!r}.")


def mutate(
    rng: np.random.Generator, parent: Individual, space: SearchSpace, probability: float, kind: str
) -> Individual:
    """A child of one parent: each factor, and n_hat, changes with ``probability``; at least one of them is redrawn."""
    searched = parent.steps[space.critical :]
    chosen = rng.random(space.free + 1) < probability
    if not chosen.any():
        chosen[rng.integers(space.free + 1)] = True
    n_hat = parent.n_hat
    if chosen[-1]:
        n_hat = int(rng.choice(space.n_hats))
    if kind == "neighbours":
        return Individual(space.completed(_between_neighbours(rng, searched, space, chosen[:-1])), n_hat)
    steps = np.asarray(searched, dtype=np.float64)
    if kind == "range":
        drawn = rng.integers(space.lower, space.upper + 1, size=space.free).astype(np.float64)
    else:
        widest = math.log(space.upper / space.lower)
        size = widest * FINEST_STEP ** rng.random()
        drawn = steps * np.exp(size * rng.standard_normal(space.free))
    return space.repair([*parent.steps[: space.critical], *np.where(chosen[:-1], drawn, steps)], n_hat)


def _between_neighbours(
    rng: np.random.Generator,
    searched: tuple[int, ...],
    space: SearchSpace,
    chosen: np.ndarray[tuple[int], np.dtype[np.bool_]],
) -> tuple[int, ...]:
    steps = list(searched)
    for i in np.flatnonzero(chosen):
        below = steps[i - 1] if i > 0 else space.lower
        above = steps[i + 1] if i + 1 < space.free else space.upper
        steps[i] = int(rng.integers(below, above + 1))
    return tuple(steps)


def crossover(
    rng: np.random.Generator, first: Individual, second: Individual, space: SearchSpace, kind: str
) -> Individual:
    """A child of two parents: each factor, and n_hat, comes from either with equal chance.

    ``neighbours`` draws again until the child is monotone, at most CROSS_ATTEMPTS times; the others repair at once.
    """
    one, other = (np.asarray(parent.steps[space.critical :]) for parent in (first, second))
    n_hat = first.n_hat if rng.random() < 0.5 else second.n_hat
    for _ in range(CROSS_ATTEMPTS if kind == "neighbours" else 1):
        steps = np.where(rng.random(space.free) < 0.5, one, other)
        if np.all(np.diff(steps) >= 0):
            break
    return space.repair([*first.steps[: space.critical], *steps.astype(np.float64)], n_hat)


def random_individual(rng: np.random.Generator, space: SearchSpace) -> Individual:
    """Sorted uniform draws: what fills a population when the operators find nothing new."""
    steps = np.sort(rng.integers(space.lower, space.upper + 1, size=space.free))
    return Individual(space.completed(steps.tolist()), int(rng.choice(space.n_hats)))
