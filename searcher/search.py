"""One search stage, from its seeds to its winner.

    seeds  ->  refinement of the best  ->  generations of children, raced  ->  refinement of the best
           ->  finalists on the selection documents  ->  the winner, and the rows of the report

Every part is optional but the first and the last two. Whatever the stage holds in memory it can rebuild from the
store, so it goes on after any interruption on the path it would have taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from searcher.descent import Descent, Refinement, descend
from searcher.errors import LongRopeError
from searcher.evolution import N_HAT_TRIAL, Evolution, State, ask, generator, learn, tell
from searcher.pareto import pareto, tradeoffs
from searcher.racing import Cut, Race, Racing
from searcher.rope import Factors
from searcher.samplers import Sampler, propose
from searcher.space import GRID, Individual, SearchSpace
from searcher.study import (
    AT_STUDY_ATTENTION,
    REFINE,
    REFINED,
    SEARCH_SHORT,
    SHORT,
    WITHOUT_N_HAT,
    Candidate,
    Document,
    Observer,
    Outcome,
    Score,
    Scorer,
    Silent,
    Store,
    Unit,
    evaluation_key,
    score_generation,
    score_gradients,
)

RAMPS_KEPT, TRIALS_KEPT = 5, 3
ORDER = 2**32 - 1  # the child whose randomness orders the documents of a refinement
# What a leg's end does to the step size of the next one.
AFTER_SUCCESS, AFTER_FAILURE = 0.5, 0.25


@dataclass(frozen=True)
class SearchPlan:
    """One search stage as data.

    Attributes
    ----------
    evolution, space: the algorithm's settings and where it looks.
    attention_factor: the study's, of every individual, unless a refinement learns another.
    seeds: name to factors; snapped to the space's grid under the study's attention factor.
    baselines: name to factors, off the grid, under their own attention factor: the rows to beat.
    seed: of all randomness.
    finalists: individuals re-scored on the selection set; as many of the best with n_hat = 0 go with them.
    all_seeds_final: whether every seed and baseline is a finalist too, or the best seed alone.
    stage: number of the stage in its study.
    frequencies: of the unscaled RoPE, in radians a token, one a pair; what a refinement sizes its steps by.
    sampler: proposes in evolution's place.
    refinement, racing: None leaves them out.
    ramps: name to factors that a refinement may start from beside the seeds: all are scored on one document, the best
        RAMPS_KEPT on the others too.
    """

    evolution: Evolution
    space: SearchSpace
    attention_factor: float
    seeds: Mapping[str, Factors]
    baselines: Mapping[str, Factors]
    seed: int = 0
    finalists: int = 8
    all_seeds_final: bool = True
    stage: int = 0
    frequencies: Sequence[float] = ()
    sampler: Sampler | None = None
    refinement: Refinement | None = None
    racing: Racing | None = None
    ramps: Mapping[str, Factors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refined = self.refinement is not None and self.refinement.gradients
        if refined and len(self.frequencies) != self.space.pairs:
            raise LongRopeError(
                f"A refinement needs the frequencies of all {self.space.pairs} pairs, not {len(self.frequencies)}."
            )

    def most_evaluations(self, documents: int) -> int:
        """About how many units the search is made of on so many search documents, the selection set aside."""
        whole = self.sampler.individuals if self.sampler is not None else self.evolution.individuals
        if self.sampler is None:
            whole += max(0, len(self.seeds) - self.evolution.population)
        units = whole * documents
        if self.ramps:
            units += len(self.ramps) + RAMPS_KEPT * (documents - 1)
        if self.sampler is None and self.evolution.n_hat_trials and len(self.space.n_hats) > 1:
            trials = len(self.space.n_hats) - 1
            units += trials + TRIALS_KEPT * (documents - 1)
            units -= (self.evolution.mutants + self.evolution.crosses) * documents  # the generation they stand for
        if self.refinement is not None:
            legs = self.refinement.starts * self.refinement.legs + self.refinement.final_legs
            units += self.refinement.gradients + legs * documents
        return units

    def evaluations_after(self, documents: Mapping[str, int]) -> int:
        """About how many units of the target length follow the search on so many documents of each part."""
        rows = 2 * len(self.baselines) + 2
        finalists = 2 * self.finalists + (len(self.seeds) if self.all_seeds_final else 1)
        return (
            documents["selection"] * (finalists + rows) + documents["test"] * rows + documents.get(SHORT, 0) * rows // 2
        )


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes
    ----------
    winner: the finalist with the lowest loss on the selection set.
    without_n_hat: likewise among those with n_hat = 0; None where the space has no n_hat = 0.
    scores: part -> method -> score. Methods are the baselines' names, bare under their own attention factor and with
        ``@study`` under the study's; ``searched`` and ``searched_n_hat_0``.
    forwards: document forwards that the study is made of, whether computed or found in the store.
    history: best search loss after every generation.
    gradients: gradient steps, each on one document.
    dropped: children that racing left.
    pareto: individuals that no other beats on both long and short documents, with both losses; only where the sampler
        has two objectives.
    """

    winner: Candidate
    without_n_hat: Candidate | None
    scores: Mapping[str, Mapping[str, Score]]
    forwards: int
    history: Sequence[float] = field(default_factory=tuple)
    gradients: int = 0
    dropped: int = 0
    pareto: Sequence[tuple[Candidate, float, float]] = ()


def individual_of(candidate: Candidate) -> Individual:
    """The grid point a stored candidate stands for: hundredths come back from float64 exactly."""
    (lambdas,) = candidate.factors.by_layer()
    return Individual(tuple(round(value * GRID) for value in lambdas), candidate.factors.n_hat)


def run_search(
    plan: SearchPlan,
    documents: Mapping[str, Sequence[Document]],
    scorer: Scorer,
    store: Store,
    observer: Observer | None = None,
) -> SearchResult:
    """Run, or go on with, one search stage to its end.

    Parameters
    ----------
    documents: ``search``, ``selection`` and ``test``, disjoint; ``refine`` where a refinement is to descend on other
        windows than those of ``search``; ``search_short`` for a second objective; ``short`` besides, where its rows
        are wanted.
    """
    return _Stage(plan, documents, scorer, store, observer or Silent()).run()


class _Stage:
    """A search stage on its way."""

    def __init__(
        self,
        plan: SearchPlan,
        documents: Mapping[str, Sequence[Document]],
        scorer: Scorer,
        store: Store,
        observer: Observer,
    ) -> None:
        self.plan, self.documents = plan, documents
        self.scorer, self.store, self.observer = scorer, store, observer
        self.state = State()
        self.scored: dict[Individual, tuple[Candidate, Score]] = {}
        self.opening: Mapping[Individual, float] = {}  # losses of generation 0
        self.seeds = {name: plan.space.snap(factors) for name, factors in plan.seeds.items()}
        self.attention = plan.attention_factor
        self.history: list[float] = []
        self.forwards = self.gradients = self.dropped = self.steps = self.outsiders = 0

    def run(self) -> SearchResult:
        refinement = self.plan.refinement
        self.next_generation()
        self.opening = self.state.scores
        self.scan(self.plan.ramps)
        if refinement is not None:
            self.refine(self.best(refinement.starts), refinement.legs, refinement, share=1.0)
        while self.next_generation():
            pass
        if refinement is not None:
            self.refine(self.best(1), refinement.final_legs, refinement, share=AFTER_SUCCESS)
        winner, without_n_hat = self.select()
        return SearchResult(
            winner=winner,
            without_n_hat=without_n_hat,
            scores=self.report(winner, without_n_hat),
            forwards=self.forwards,
            history=tuple(self.history),
            gradients=self.gradients,
            dropped=self.dropped,
            pareto=tuple(self.pareto()),
        )

    def best(self, count: int) -> list[Candidate]:
        """The best so far on the search documents, best first; none that failed."""
        ranked = [individual for individual, loss in self.state.ranked() if math.isfinite(loss)]
        return [self.scored[individual][0] for individual in ranked[:count]]

    def score(
        self,
        part: str,
        generation: int,
        candidates: Sequence[Candidate],
        documents: str,
        race: Race | Cut | None = None,
        spare: Sequence[Unit] = (),
    ) -> list[Score]:
        found = self.documents[documents]
        scores = score_generation(
            part,
            generation,
            candidates,
            found,
            self.scorer,
            self.store,
            self.observer,
            self.plan.stage,
            race,
            spare,
        )
        self.forwards += sum(score.documents for score in scores)
        self.dropped += sum(score.raced_out for score in scores)
        return scores

    def keep(self, candidates: Sequence[Candidate], scores: Sequence[Score]) -> dict[Individual, float]:
        """Keep what was scored on the search documents; losses by individual, in ask order."""
        losses: dict[Individual, float] = {}
        for candidate, score in zip(candidates, scores, strict=True):
            individual = individual_of(candidate)
            if individual not in self.scored or score.loss < self.scored[individual][1].loss:
                self.scored[individual] = (candidate, score)
            # A refinement that comes back to a known one under another attention factor may have made it worse.
            losses[individual] = self.scored[individual][1].loss
        return losses

    def next_generation(self) -> bool:
        """Score the next generation of children; False where there is none."""
        plan, generation = self.plan, self.state.generation
        candidates = self.store.candidates(plan.stage, "search", generation)
        if candidates is None:
            place = (plan.space, self.state, self.seeds, plan.seed, plan.stage)
            children = ask(plan.evolution, *place) if plan.sampler is None else propose(plan.sampler, *place)
            candidates = [Candidate(c.individual.factors(self.attention), c.origin) for c in children]
        if not candidates:
            return False
        short: dict[Individual, float] = {}
        if plan.sampler is not None and plan.sampler.two_objectives:
            if SEARCH_SHORT not in self.documents:
                raise LongRopeError(
                    f"The sampler {plan.sampler.name} needs {SEARCH_SHORT} documents beside the others."
                )
            scores = self.score(SEARCH_SHORT, generation, candidates, SEARCH_SHORT)
            short = {individual_of(c): score.loss for c, score in zip(candidates, scores, strict=True)}
        scores = self.score("search", generation, candidates, "search", self.race(candidates), self.spare())
        self.state = tell(self.state, self.keep(candidates, scores), short)
        self.history.append(self.state.ranked()[0][1])
        return True

    def race(self, candidates: Sequence[Candidate]) -> Race | Cut | None:
        """The race for a place among the parents, of n_hat trials for the first place; generation 0 is scored whole."""
        if self.plan.racing is None or self.state.generation == 0:
            return None
        if all(candidate.origin == N_HAT_TRIAL for candidate in candidates):
            return Cut(TRIALS_KEPT)
        whole = [self.scored[i][1].by_document for i, loss in self.state.ranked() if math.isfinite(loss)]
        return Race(self.plan.racing, whole, self.plan.evolution.parents)

    def spare(self) -> list[Unit]:
        """The elite on the selection documents: what idle workers may do before it is asked for."""
        units = []
        for candidate in self.best(self.plan.finalists):
            for document in self.documents["selection"]:
                key = evaluation_key(self.scorer.fingerprint, candidate.factors, document)
                units.append(Unit(key, candidate.factors, document))
        known = self.store.known([unit.key for unit in units])
        return [unit for unit in units if unit.key not in known]

    def scan(self, ramps: Mapping[str, Factors]) -> None:
        """Score ramps that are not scored yet, most of them on one document."""
        snapped: dict[Individual, str] = {}
        for name, factors in ramps.items():
            individual = self.plan.space.snap(replace(factors, n_hat=0))
            if individual not in self.scored:
                snapped.setdefault(individual, name)
        candidates = [Candidate(individual.factors(self.attention), name) for individual, name in snapped.items()]
        if candidates:
            self.outside(candidates, Cut(RAMPS_KEPT))

    def outside(self, candidates: Sequence[Candidate], race: Cut | None = None) -> list[Score]:
        """Score what no generation asked for; it joins the scored individuals."""
        scores = self.score(REFINED, self.outsiders, candidates, "search", race)
        self.outsiders += 1
        self.state = learn(self.state, self.keep(candidates, scores))
        self.history.append(self.state.ranked()[0][1])
        return scores

    def refine(self, starts: Sequence[Candidate], legs: int, settings: Refinement, share: float) -> None:
        """Descend from each of the starts, side by side, leg after leg; what is found joins the scored individuals.

        ``share`` of the settings' step sizes is what the first leg begins with.
        """
        given = self.documents.get(REFINE) or self.documents["search"]
        # Another order for another seed: what differs between seeds tells what the order was worth.
        order = generator(self.plan.seed, self.plan.stage, 0, ORDER).permutation(len(given))
        documents = [given[i] for i in order]
        best = [(start, self.scored[individual_of(start)][1].loss) for start in starts]
        shares = [share] * len(best)
        for _ in range(legs):
            descents = [Descent.start(candidate.factors) for candidate, _ in best]
            for _ in range(settings.steps):
                origins = [f"refine:{start.origin}" for start in starts]
                here = [Candidate(d.factors, origin) for d, origin in zip(descents, origins, strict=True)]
                document = documents[self.steps % len(documents)]
                outcomes = self.gradient(here, document)
                descents = [
                    descend(descent, _slope(outcome), settings, share, self.plan.space, self.plan.frequencies)
                    for descent, outcome, share in zip(descents, outcomes, shares, strict=True)
                ]
            ends = [self.snapped(descent, start) for descent, start in zip(descents, starts, strict=True)]
            scores = self.outside(ends)
            for i, (end, score) in enumerate(zip(ends, scores, strict=True)):
                if score.loss < best[i][1]:
                    best[i] = (end, score.loss)
                    shares[i] *= AFTER_SUCCESS
                else:
                    shares[i] *= AFTER_FAILURE
        self.attention = self.best(1)[0].factors.attention_factor

    def gradient(self, candidates: Sequence[Candidate], document: Document) -> list[Outcome]:
        """One step's gradients, on one document."""
        place = (REFINE, self.steps)
        rows = score_gradients(*place, candidates, [document], self.scorer, self.store, self.observer, self.plan.stage)
        self.steps += 1
        self.gradients += len(rows)
        return [outcome for (outcome,) in rows]

    def snapped(self, descent: Descent, start: Candidate) -> Candidate:
        """Where a descent ended, on the grid."""
        individual = self.plan.space.snap(descent.factors)
        return Candidate(individual.factors(descent.factors.attention_factor), f"refined:{start.origin}")

    def select(self) -> tuple[Candidate, Candidate | None]:
        """The finalist with the lowest loss on the selection documents, and the one among those with n_hat = 0."""
        finalists = self.finalists()
        selection = self.score("selection", 0, finalists, "selection")
        order = sorted(range(len(finalists)), key=lambda i: (selection[i].loss, individual_of(finalists[i]).key))
        usable = (finalists[i] for i in order if math.isfinite(selection[i].loss))
        return finalists[order[0]], next((f for f in usable if f.factors.n_hat == 0), None)

    def finalists(self) -> list[Candidate]:
        """The best, the best with n_hat = 0, the best ones' factors with n_hat = 0, and seeds and baselines, each once.

        The last are there so that the winner on the selection set is never worse than any of them on the grid; where
        not all of them are wanted, the best seed on the search documents is.
        """
        plan = self.plan
        ranked = [individual for individual, loss in self.state.ranked() if math.isfinite(loss)]
        best = ranked[: plan.finalists]
        chosen: dict[Factors, Candidate] = {}

        def choose(individual: Individual, origin: str, attention: float) -> None:
            factors = individual.factors(attention)
            chosen.setdefault(factors, Candidate(factors, origin))

        for individual in best:
            choose(individual, "finalist", self.attention_of(individual))
        for individual in [i for i in ranked if i.n_hat == 0][: plan.finalists]:
            choose(individual, "finalist n_hat=0", self.attention_of(individual))
        if 0 in plan.space.n_hats:
            for individual in best:
                choose(Individual(individual.steps, 0), "finalist, n_hat set to 0", self.attention_of(individual))
        seeds = {**self.seeds, **{name: plan.space.snap(factors) for name, factors in plan.baselines.items()}}
        if not plan.all_seeds_final:
            scored = [name for name, individual in seeds.items() if individual in self.opening]
            scored.sort(key=lambda name: (self.opening[seeds[name]], seeds[name].key))
            seeds = {name: seeds[name] for name in scored[:1]}
        for name, individual in seeds.items():  # under the attention factor they were scored with as seeds
            choose(individual, f"seed:{name}", plan.attention_factor)
        return list(chosen.values())

    def attention_of(self, individual: Individual) -> float:
        """The attention factor an individual did best under."""
        return self.scored[individual][0].factors.attention_factor

    def report(self, winner: Candidate, without_n_hat: Candidate | None) -> dict[str, dict[str, Score]]:
        """Every method's row by part; no cost of the search."""
        rows: dict[str, Candidate] = {}
        for name, factors in self.plan.baselines.items():
            rows[name] = Candidate(factors, f"baseline:{name}")
            at_study = replace(factors, attention_factor=self.plan.attention_factor)
            rows[name + AT_STUDY_ATTENTION] = Candidate(at_study, f"baseline:{name}{AT_STUDY_ATTENTION}")
        rows["searched"] = Candidate(winner.factors, "searched")
        if without_n_hat is not None:
            rows[WITHOUT_N_HAT] = Candidate(without_n_hat.factors, WITHOUT_N_HAT)
        cost = self.forwards
        table: dict[str, dict[str, Score]] = {}
        for part in ("selection", "test", SHORT):
            if part in self.documents:
                shown = {name: row for name, row in rows.items() if part != SHORT or AT_STUDY_ATTENTION not in name}
                table[part] = dict(zip(shown, self.score(part, 1, list(shown.values()), part), strict=True))
        self.forwards = cost
        return table

    def pareto(self) -> list[tuple[Candidate, float, float]]:
        """The front of long and short losses, best on long documents first."""
        return [(self.scored[row.individual][0], row.long, row.short) for row in pareto(tradeoffs(self.state))]


def _slope(outcome: Outcome) -> tuple[float, ...] | None:
    """The gradient of the mean loss a token."""
    if outcome.gradient is None or not outcome.tokens:
        return None
    return tuple(value / outcome.tokens for value in outcome.gradient)
