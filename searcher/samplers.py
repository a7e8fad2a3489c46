"""Other proposal engines behind the same ask and tell: Optuna's CMA-ES, TPE and NSGA-II, and plain random search.

``random``      sorted draws, uniform over [lower, upper]: the plainest floor. With many factors every draw lies near
                the straight ramp from the lower bound to the upper one, so it seldom does better than the seeds.
``random-log``  sorted draws, uniform in ln lambda: near the geometric ramp, which is what NTK is. The floor to quote:
                it starts from what the field knows, and no score ever moves it.
``cmaes``       CMA-ES with a diagonal covariance, one update a generation, from the best of generation 0; n_hat is a
                continuous index into its choices, rounded.
``tpe``         multivariate TPE; n_hat is categorical.
``nsga2``       NSGA-II with simplex crossover for two losses, on long and on short documents; n_hat is categorical.

The last three draw every ln lambda without regard to order, and sorting makes an individual of a draw. An isotonic
projection instead pools the draw's differences, more so with more factors; it found worse individuals with each.

Generation 0 is the evolution's: all seeds, then log-normal mutants of them (random search: then random draws).

What an engine knows is an Optuna study in memory, rebuilt from the state: a trial for every scored individual, in ask
order, at the grid point that was scored and not at the draw that led there. The draws of a child come from an engine
seeded by (study seed, stage, generation, child). So a proposal depends on its arguments alone, and a run that was
killed takes the path it would have taken, given the same versions of optuna and cmaes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from searcher.errors import LongRopeError
from searcher.evolution import ATTEMPTS, MOST, Child, Evolution, State, ask, generator
from searcher.operators import mutate, random_individual
from searcher.space import Individual, SearchSpace

SAMPLERS = ("random", "random-log", "cmaes", "tpe", "nsga2")
DRAWS = 8  # of an engine for one child, before a mutant of the best takes its place

_LATEST: dict[tuple[Sampler, SearchSpace], _Replay] = {}  # at most one: what a search goes on from, to save time

Losses = tuple[float, ...]  # of one individual: long, and short where there are two objectives
Generation = list[tuple[Individual, Losses]]


@dataclass(frozen=True)
class Sampler:
    """The settings of one search by a sampler.

    Attributes
    ----------
    name: the engine, one of SAMPLERS.
    population: individuals of generation 0, seeds included.
    batch: children of each later generation; for CMA-ES also its population, for NSGA-II also its parents.
    generations: generations after the first.
    """

    name: str = "cmaes"
    population: int = 16
    batch: int = 16
    generations: int = 40

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            raise LongRopeError(f"The sampler is one of {', '.join(SAMPLERS)}, not {self.name!r}.")
        least = {"cmaes": 2, "nsga2": 3}.get(self.name, 1)
        if self.population < 1:
            raise LongRopeError(f"The search needs at least 1 in population, not {self.population}.")
        if self.batch < least:
            raise LongRopeError(f"The sampler {self.name} needs at least {least} in batch, not {self.batch}.")
        if self.generations < 0:
            raise LongRopeError(f"The number of generations cannot be negative, not {self.generations}.")
        if self.individuals > MOST:
            raise LongRopeError(
                f"A search of more than {MOST} individuals is not what anybody can score; ask for fewer."
            )

    @property
    def individuals(self) -> int:
        """Individuals scored in all, where the space has enough of them."""
        return self.population + self.generations * self.batch

    @property
    def two_objectives(self) -> bool:
        """Whether ``State.short`` is needed beside the scores."""
        return self.name == "nsga2"


def propose(
    settings: Sampler,
    space: SearchSpace,
    state: State,
    seeds: Mapping[str, Individual],
    seed: int,
    stage: int = 0,
) -> list[Child]:
    """The children of ``state.generation``: none of them scored before, none twice; empty when the search is over.

    Generation 0 holds all seeds. Fewer children than asked for come back only where the space has run out of new
    individuals, or so nearly that a bounded number of draws finds none. Individuals that another engine proposed are
    learnt from like any other. Not to be called from two threads at once.

    Parameters
    ----------
    state: with ``batches``, and with ``short`` for two objectives.
    seeds: name to individual, in the order they are to be scored; seeds that snap to one individual share a child.
    seed, stage: what the randomness is keyed by, with generation and child.

    Raises
    ------
    LongRopeError
        Two objectives are searched, and nothing was scored on short documents.
    """
    if state.generation > settings.generations:
        return []
    if settings.name in ("random", "random-log"):
        return _random_children(settings, space, state, seeds, seed, stage)
    if state.generation == 0:
        return ask(Evolution(settings.population, mutation="lognormal"), space, state, seeds, seed, stage)
    generations = _history(settings, state)
    if not generations[0]:
        return []
    replay = _LATEST.pop((settings, space), None)
    if replay is None or not replay.continues_in(generations):
        replay = _Replay(settings, space, generations[0])
    replay.catch_up(generations)
    taken = set(state.scores)
    best = [individual for individual, score in state.ranked()[: settings.batch] if math.isfinite(score)]
    children: list[Child] = []
    while len(children) < settings.batch:
        child = replay.ask(generator(seed, stage, state.generation, len(children)), taken, best)
        if child is None:
            return children  # and the replay, which holds a trial without an individual, is dropped
        children.append(child)
        taken.add(child.individual)
    _LATEST.clear()
    _LATEST[settings, space] = replay
    return children


def _random_children(
    settings: Sampler, space: SearchSpace, state: State, seeds: Mapping[str, Individual], seed: int, stage: int
) -> list[Child]:
    children: list[Child] = []
    if state.generation == 0 and seeds:
        children = ask(Evolution(population=1), space, state, seeds, seed, stage)
    taken = {*state.scores, *(child.individual for child in children)}
    draw = random_individual if settings.name == "random" else _log_uniform
    while len(children) < (settings.batch if state.generation else settings.population):
        rng = generator(seed, stage, state.generation, len(children))
        individual = _first_new(partial(draw, rng, space), taken, space)
        if individual is None:
            break
        children.append(Child(individual, settings.name))
        taken.add(individual)
    return children


def _log_uniform(rng: np.random.Generator, space: SearchSpace) -> Individual:
    """Sorted draws, uniform in ln lambda; n_hat is any of its choices."""
    logs = np.sort(rng.uniform(math.log(space.lower), math.log(space.upper), space.free))
    return _individual(np.exp(logs), int(rng.choice(space.n_hats)), space)


def _individual(searched: npt.NDArray[np.float64], n_hat: int, space: SearchSpace) -> Individual:
    """The grid point nearest to factors of the searched pairs, in hundredths; the space derives the others."""
    return space.repair(np.concatenate([np.full(space.critical, float(space.lower)), searched]), n_hat)


def _first_new(draw: Callable[[], Individual], taken: set[Individual], space: SearchSpace) -> Individual | None:
    """The first of ATTEMPTS draws that is not taken; None where none is, or where nothing is left to draw."""
    if len(taken) >= space.size:
        return None
    return next((individual for _ in range(ATTEMPTS) if (individual := draw()) not in taken), None)


def _history(settings: Sampler, state: State) -> list[Generation]:
    """What was scored, a list a generation, in ask order. What no generation asked for is counted to the first."""
    if settings.two_objectives and state.scores and not state.short:
        raise LongRopeError(
            f"The sampler {settings.name} weighs long against short context, but nothing was scored on short "
            "documents; give the study some, or take another sampler."
        )
    rows = iter([(individual, _losses(settings, state, individual)) for individual in state.scores])
    learnt = len(state.scores) - sum(state.batches)
    if learnt < 0:
        raise RuntimeError("the state's batches hold more than its scores")
    first, *others = state.batches or (0,)
    return [list(islice(rows, size)) for size in (learnt + first, *others)]


def _losses(settings: Sampler, state: State, individual: Individual) -> Losses:
    """An individual's losses; all infinite where one of them is missing, so that it is on no front."""
    losses = [state.scores[individual]]
    if settings.two_objectives:
        losses.append(state.short.get(individual, math.inf))
    return tuple(losses) if all(map(math.isfinite, losses)) else (math.inf,) * len(losses)


class _Replay:
    """A history as an Optuna study in memory, and the draws that follow from it.

    Nothing random is kept between draws, so one that is built anew from the same history answers the same. Optuna is
    imported by those who call it alone; its objects are Any here.
    """

    def __init__(self, settings: Sampler, space: SearchSpace, first: Generation) -> None:
        start = min(first, key=lambda row: (row[1], row[0].key))[0] if settings.name == "cmaes" else None
        self.settings = settings
        self.chart = _Chart(space, start)
        self.box = self.chart.box
        self.parents = max(3, min(settings.batch, len(first)))
        self.study = _empty_study(self.box, 2 if settings.two_objectives else 1)
        self.told: list[Generation] = []
        self.pending: list[tuple[Individual, Any]] = []  # asked for, with their trials, and not told

    def continues_in(self, generations: list[Generation]) -> bool:
        """Whether a history is what was told so far, and then what is pending."""
        known = len(self.told)
        following = [individual for individual, _ in generations[known]] if known < len(generations) else []
        return self.told == generations[:known] and [individual for individual, _ in self.pending] == following

    def catch_up(self, generations: list[Generation]) -> None:
        """Tell the study what it does not know. As in the search, a whole generation is asked before any is told."""
        for generation in generations[len(self.told) :]:
            if not self.pending:
                # CMA-ES and NSGA-II mark a trial, as they draw for it, with the generation of theirs it belongs to.
                marks = self.settings.name == "nsga2" or (self.settings.name == "cmaes" and bool(self.told))
                engine = self._engine(0) if marks else None
                self.pending = [(individual, self._recorded(individual, engine)) for individual, _ in generation]
            for (_, trial), (_, losses) in zip(self.pending, generation, strict=True):
                self.study.tell(trial, list(losses))
            self.pending = []
            self.told.append(generation)

    def _recorded(self, individual: Individual, engine: Any) -> Any:
        def source(study: Any, trial: Any) -> dict[str, float]:
            if engine is not None:
                engine.sample_relative(study, trial, self.box)
            return self.chart.coordinates(individual)

        self.study.sampler.source = source
        return self.study.ask(self.box)

    def ask(self, rng: np.random.Generator, taken: set[Individual], best: Sequence[Individual]) -> Child | None:
        """A child that is not taken; None, after which the replay is of no more use, where none was found."""
        child: Child | None = None

        def source(study: Any, trial: Any) -> dict[str, float]:
            nonlocal child
            child = self._new_child(study, trial, rng, taken, best)
            return self.chart.coordinates(child.individual if child else self.told[0][0][0])

        self.study.sampler.source = source
        trial = self.study.ask(self.box)
        if child is not None:
            self.pending.append((child.individual, trial))
        return child

    def _new_child(
        self, study: Any, trial: Any, rng: np.random.Generator, taken: set[Individual], best: Sequence[Individual]
    ) -> Child | None:
        """The engine's draw, else a mutant of one of the best, else a random individual."""
        space = self.chart.space
        engine = self._engine(int(rng.integers(2**32)))
        for _ in range(DRAWS if engine is not None and len(taken) < space.size else 0):
            drawn = dict(engine.sample_relative(study, trial, self.box))
            for name, distribution in self.box.items():
                if name not in drawn:  # NSGA-II leaves out what is to mutate
                    drawn[name] = engine.sample_independent(study, trial, name, distribution)
            individual = self.chart.individual(drawn)
            if individual not in taken:
                return Child(individual, self.settings.name)
        if best:
            chance = 1 / math.sqrt(space.pairs)
            mutant = _first_new(
                lambda: mutate(rng, best[int(rng.integers(len(best)))], space, chance, "lognormal"), taken, space
            )
            if mutant is not None:
                return Child(mutant, "mutant")
        anyone = _first_new(lambda: random_individual(rng, space), taken, space)
        return Child(anyone, "random") if anyone is not None else None

    def _engine(self, seed: int) -> Any:
        """Optuna's sampler; None where the space leaves it nothing to do."""
        import optuna

        samplers, name = optuna.samplers, self.settings.name
        if len(self.box) < (2 if name == "cmaes" else 1):
            return None
        with _quiet():
            if name == "cmaes":
                return samplers.CmaEsSampler(seed=seed, popsize=self.settings.batch, use_separable_cma=True)
            if name == "tpe":
                return samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True, constant_liar=True)
            # Of Optuna's crossovers the one that moves along what the population varies in; the others fell far behind.
            crossover = samplers.nsgaii.SPXCrossover()
            return samplers.NSGAIISampler(seed=seed, population_size=self.parents, crossover=crossover)


class _Chart:
    """Individuals as a sampler sees them: coordinates by name, from -1/2 to 1/2.

    A factor's is ln lambda relative to an origin, in units of ln(upper / lower). The origin is the range's middle, so
    that the box is the space; for CMA-ES it is the individual to start from, since CMA-ES starts in the middle of the
    box, with steps of a sixth of it (Optuna's own arguments for the start, x0 and sigma0, go in its version 6). There
    n_hat is a number too, relative to the start's; elsewhere it is a category, the index among its choices.
    """

    def __init__(self, space: SearchSpace, start: Individual | None) -> None:
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        low, high = math.log(space.lower), math.log(space.upper)
        self.space = space
        self.relative = start is not None
        self.width = high - low
        self.origin = np.full(space.free, (low + high) / 2) if start is None else self._logs(start)
        self.first = 0 if start is None else space.n_hats.index(start.n_hat)
        self.names = [f"ln_lambda_{i}" for i in range(space.critical, space.pairs)]
        number = FloatDistribution(-0.5, 0.5)
        self.box: dict[str, Any] = dict.fromkeys(self.names, number) if self.width else {}
        if len(space.n_hats) > 1:
            self.box["n_hat"] = CategoricalDistribution(range(len(space.n_hats))) if start is None else number

    def _logs(self, individual: Individual) -> npt.NDArray[np.float64]:
        logs: npt.NDArray[np.float64] = np.log(individual.steps[self.space.critical :])
        return logs

    def coordinates(self, individual: Individual) -> dict[str, float]:
        """Where a grid point lies; the nearest point of the box for one outside of it."""
        offsets = np.clip((self._logs(individual) - self.origin) / (self.width or 1.0), -0.5, 0.5)
        named = dict(zip(self.names, offsets.tolist(), strict=True))
        index = self.space.n_hats.index(individual.n_hat)
        named["n_hat"] = (index - self.first) / (2 * len(self.space.n_hats)) if self.relative else index
        return {name: named[name] for name in self.box}

    def individual(self, named: Mapping[str, float]) -> Individual:
        """The grid point of a draw."""
        logs = self.origin + self.width * np.array([named.get(name, 0.0) for name in self.names])
        index = named.get("n_hat", 0.0)
        if self.relative:
            index = self.first + 2 * len(self.space.n_hats) * index
        n_hat = self.space.n_hats[min(max(round(index), 0), len(self.space.n_hats) - 1)]
        return _individual(np.exp(np.sort(logs)), n_hat, self.space)


def _empty_study(box: dict[str, Any], objectives: int) -> Any:
    """A study in memory whose trials get their parameters from ``study.sampler.source``."""
    import optuna

    class Source(optuna.samplers.BaseSampler):
        source: Callable[[Any, Any], dict[str, Any]]

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:  # noqa: ARG002
            return box

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:  # noqa: ARG002
            return self.source(study, trial)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            raise NotImplementedError

    with _quiet():
        return optuna.create_study(sampler=Source(), directions=["minimize"] * objectives)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's line for every study, and its warnings that an argument of a sampler may change."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
