"""Algorithm 1 of LongRoPE (arXiv 2402.13753) as ask and tell over a frozen state.

Every random draw comes from a generator seeded by (study seed, stage, generation, child): nothing is carried from
draw to draw, so a resumed run asks for what the unbroken run would have asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from searcher.errors import LongRopeError
from searcher.operators import check_mutation, crossover, mutate, random_individual
from searcher.space import Individual, SearchSpace

MOST = 10_000_000  # individuals; more is a slip of the keyboard
N_HAT_TRIAL = "n_hat trial"
ATTEMPTS = 64  # draws of one child before a random individual, and before giving up on a full space


@dataclass(frozen=True)
class Evolution:
    """The settings of one evolutionary search.

    Attributes
    ----------
    population: individuals of generation 0, seeds included.
    parents: top-k of all scored so far, from which children are made.
    mutants, crosses: children of each later generation.
    generations: generations after the first.
    probability: chance that a factor mutates.
    mutation: how children stay monotone; see searcher/operators.py.
    n_hat_trials: whether generation 1 is the best individual under every other n_hat, in place of children.
    """

    population: int = 64
    parents: int = 32
    mutants: int = 16
    crosses: int = 16
    generations: int = 40
    probability: float = 0.3
    mutation: str = "neighbours"
    n_hat_trials: bool = False

    def __post_init__(self) -> None:
        check_mutation(self.mutation)
        for name in ("population", "parents"):
            if getattr(self, name) < 1:
                raise LongRopeError(f"The search needs at least 1 in {name}, not {getattr(self, name)}.")
        for name in ("mutants", "crosses", "generations"):
            if getattr(self, name) < 0:
                raise LongRopeError(f"The number of {name} cannot be negative, not {getattr(self, name)}.")
        if self.population > MOST or self.parents > MOST or self.generations * (self.mutants + self.crosses) > MOST:
            raise LongRopeError(
                f"A search of more than {MOST} individuals is not what anybody can score; ask for fewer."
            )
        if not 0 < self.probability <= 1:
            raise LongRopeError(f"The mutation probability lies in (0, 1], not at {self.probability}.")

    @property
    def individuals(self) -> int:
        """Individuals scored in all, where the space has enough of them."""
        return self.population + self.generations * (self.mutants + self.crosses)


@dataclass(frozen=True)
class Child:
    """An individual that is asked for, and where it came from (``seed:yarn``, ``mutant``, ``cross``, ``random``)."""

    individual: Individual
    origin: str


@dataclass(frozen=True)
class State:
    """All that the next generation depends on: what was scored, in ask order.

    Attributes
    ----------
    scores: mean negative log-likelihoods a token; infinity stands for an individual that failed or was raced out.
    batches: how many individuals each past generation added to ``scores``.
    short: the same losses on short documents, where a sampler has them for a second objective.
    """

    generation: int = 0
    scores: Mapping[Individual, float] = field(default_factory=dict)
    batches: tuple[int, ...] = ()
    short: Mapping[Individual, float] = field(default_factory=dict)

    def ranked(self) -> list[tuple[Individual, float]]:
        """Best first; equal scores by key."""
        return sorted(self.scores.items(), key=lambda item: (item[1], item[0].key))


def generator(seed: int, stage: int, generation: int, child: int) -> np.random.Generator:
    """The only source of randomness of a child."""
    return np.random.default_rng(np.random.SeedSequence([seed, stage, generation, child]))


def ask(
    settings: Evolution,
    space: SearchSpace,
    state: State,
    seeds: Mapping[str, Individual],
    seed: int,
    stage: int = 0,
) -> list[Child]:
    """The children of ``state.generation``: none of them scored before, none twice; empty when the search is over.

    Generation 0 holds all seeds and mutants of them. Fewer children than asked for come back only where the space
    has run out of new individuals, or so nearly that a bounded number of draws finds none.

    Parameters
    ----------
    seeds: name to individual, in the order they are to be scored; seeds that snap to one individual share a child.
    seed, stage: what the randomness is keyed by, with generation and child.
    """
    if state.generation > settings.generations:
        return []
    children: list[Child] = []
    taken = set(state.scores)
    if settings.n_hat_trials and state.generation == 1:
        best = state.ranked()[0][0]
        tried = [Individual(best.steps, n_hat) for n_hat in space.n_hats]
        children = [Child(individual, N_HAT_TRIAL) for individual in tried if individual not in taken]
        if children:
            return children
    if state.generation == 0:
        named: dict[Individual, list[str]] = {}
        for name, individual in seeds.items():
            named.setdefault(individual, []).append(name)
        children = [Child(individual, "seed:" + "+".join(names)) for individual, names in named.items()]
        taken.update(named)
        kinds = ["mutant"] * max(0, settings.population - len(children))
        parents = list(named)
    else:
        kinds = ["mutant"] * settings.mutants + ["cross"] * settings.crosses
        parents = [individual for individual, score in state.ranked()[: settings.parents] if math.isfinite(score)]
    for kind in kinds:
        rng = generator(seed, stage, state.generation, len(children))
        child = _new_child(rng, kind, parents, taken, settings, space)
        if child is None:
            break
        children.append(child)
        taken.add(child.individual)
    return children


def _new_child(
    rng: np.random.Generator,
    kind: str,
    parents: list[Individual],
    taken: set[Individual],
    settings: Evolution,
    space: SearchSpace,
) -> Child | None:
    if len(taken) >= space.size:
        return None
    if len(parents) < 2:
        kind = "mutant"  # nobody to cross with
    for _ in range(ATTEMPTS):
        if not parents:
            break
        if kind == "cross":
            first, second = rng.choice(len(parents), size=2, replace=False)
            individual = crossover(rng, parents[first], parents[second], space, settings.mutation)
        else:
            parent = parents[rng.integers(len(parents))]
            individual = mutate(rng, parent, space, settings.probability, settings.mutation)
        if individual not in taken:
            return Child(individual, kind)
    for _ in range(ATTEMPTS):
        individual = random_individual(rng, space)
        if individual not in taken:
            return Child(individual, "random")
    return None


def tell(state: State, scores: Mapping[Individual, float], short: Mapping[Individual, float] | None = None) -> State:
    """The state after a generation: ``scores`` in ask order. A score that is not finite counts as failed."""
    return replace(
        learn(state, scores),
        generation=state.generation + 1,
        batches=(*state.batches, len(scores)),
        short={**state.short, **_cleaned(short or {})},
    )


def learn(state: State, scores: Mapping[Individual, float]) -> State:
    """The state with individuals that no generation asked for, such as refined ones."""
    return replace(state, scores={**state.scores, **_cleaned(scores)})


def _cleaned(scores: Mapping[Individual, float]) -> dict[Individual, float]:
    return {individual: score if math.isfinite(score) else math.inf for individual, score in scores.items()}
