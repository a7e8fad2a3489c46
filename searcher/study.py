"""The driver loop: ask, record, dispatch, record; and again after any interruption.

The loop is written against two Protocols. A ``Scorer`` computes; a ``Store`` is the only truth. Whatever the loop
holds in memory it can rebuild from the store, so a study that is killed at any instant goes on where it was, and
takes the path it would have taken.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from searcher.errors import LongRopeError
from searcher.evolution import Evolution, State, ask, tell
from searcher.rope import Factors
from searcher.space import GRID, Individual, SearchSpace

PARTS = ("search", "selection", "test")
SHORT = "short"  # text within the original length: what factors cost there; reported where it is given
AT_STUDY_ATTENTION = "@study"  # suffix of a baseline's name where it is shown under the study's attention factor
WITHOUT_N_HAT = "searched_n_hat_0"
UNCOMPUTED_IN_A_ROW = 16  # evaluations that fail one after the other: it is the machine, not the candidates


@dataclass(frozen=True)
class Document:
    """One window of text: what a candidate is scored on.

    Attributes
    ----------
    name: where it comes from, for people.
    sha256: of its tokens as little-endian uint32, BOS included; names it to the scorer.
    length: L, tokens with BOS; L - 1 of them are scored.
    """

    name: str
    sha256: str
    length: int


@dataclass(frozen=True)
class Candidate:
    """Factors to be scored, and where they come from."""

    factors: Factors
    origin: str


@dataclass(frozen=True)
class Unit:
    """The unit of work: one candidate on one document."""

    key: str
    factors: Factors
    document: Document


@dataclass(frozen=True)
class Outcome:
    """What became of a unit.

    Attributes
    ----------
    nll: total negative log-likelihood in nats, not finite where the model overflowed; None where it could not be
        computed at all.
    tokens: tokens scored.
    seconds: time the worker spent on it.
    worker: who computed it.
    failure: why ``nll`` is None or not finite.
    """

    key: str
    nll: float | None
    tokens: int
    seconds: float = 0.0
    worker: str = ""
    failure: str | None = None


@dataclass(frozen=True)
class Score:
    """One candidate on a set of documents: total negative log-likelihood over total tokens."""

    nll: float
    tokens: int
    failure: str | None = None

    @property
    def loss(self) -> float:
        """Nats a token; infinity where the candidate failed."""
        return self.nll / self.tokens if self.failure is None and self.tokens else math.inf

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity where the candidate failed or the loss is beyond float64."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class Scorer(Protocol):
    """Computes units, in any order, on one worker or many."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all but factors and document that decides a value: weights, config, scorer, numerics profile."""
        ...

    def evaluate(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        """Every unit's outcome once, as they finish."""
        ...


class Store(Protocol):
    """What one study keeps. Every method is one transaction."""

    def candidates(self, stage: int, part: str, generation: int) -> list[Candidate] | None:
        """A generation in ask order; None where it was never written."""
        ...

    def add_generation(
        self,
        stage: int,
        part: str,
        generation: int,
        candidates: Sequence[Candidate],
        documents: Sequence[Document],
        keys: Sequence[Sequence[str]],
    ) -> None:
        """Write a generation and its units: ``keys[i][j]`` is candidate i on document j."""
        ...

    def outcomes(self, stage: int, part: str, generation: int) -> list[list[Outcome | None]]:
        """By candidate and document: what is known, from this study or from any other that computed the same key."""
        ...

    def rekey(self, stage: int, part: str, generation: int, keys: Sequence[Sequence[str]]) -> None:
        """Give units without an outcome new keys, after a change of the numerics profile that the user accepted."""
        ...

    def record(self, outcome: Outcome) -> None:
        """Keep what a worker returned."""
        ...


class Observer(Protocol):
    """Told what happens, for whoever watches; changes nothing."""

    def generation_started(self, part: str, generation: int, units: int, pending: int) -> None: ...

    def evaluated(self, outcome: Outcome) -> None: ...

    def generation_finished(self, part: str, generation: int, best: Candidate, score: Score) -> None: ...


class Silent:
    """An observer that says nothing."""

    def generation_started(self, part: str, generation: int, units: int, pending: int) -> None: ...

    def evaluated(self, outcome: Outcome) -> None: ...

    def generation_finished(self, part: str, generation: int, best: Candidate, score: Score) -> None: ...


@dataclass(frozen=True)
class SearchPlan:
    """One search stage as data.

    Attributes
    ----------
    evolution, space: the algorithm's settings and where it looks.
    attention_factor: the study's, of every individual.
    seeds: name to factors; snapped to the space's grid under the study's attention factor.
    baselines: name to factors, off the grid, under their own attention factor: the rows to beat.
    seed: of all randomness.
    finalists: individuals re-scored on the selection set; as many of the best with n_hat = 0 go with them.
    stage: number of the stage in its study.
    """

    evolution: Evolution
    space: SearchSpace
    attention_factor: float
    seeds: Mapping[str, Factors]
    baselines: Mapping[str, Factors]
    seed: int = 0
    finalists: int = 8
    stage: int = 0


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
    """

    winner: Candidate
    without_n_hat: Candidate | None
    scores: Mapping[str, Mapping[str, Score]]
    forwards: int
    history: Sequence[float] = field(default_factory=tuple)


def evaluation_key(fingerprint: str, factors: Factors, document: Document) -> str:
    """SHA-256 of everything that decides an evaluation's value."""
    digest = hashlib.sha256()
    for part in (fingerprint.encode(), document.sha256.encode(), factors.to_bytes()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def score_generation(
    part: str,
    generation: int,
    candidates: Sequence[Candidate],
    documents: Sequence[Document],
    scorer: Scorer,
    store: Store,
    observer: Observer,
    stage: int = 0,
) -> list[Score]:
    """Every candidate's score on a set of documents, in ask order; computes only what the store does not know.

    Raises
    ------
    LongRopeError
        Every candidate failed, other than in a later search generation: the first reason is in the message.
    """
    keys = [[evaluation_key(scorer.fingerprint, c.factors, d) for d in documents] for c in candidates]
    if store.candidates(stage, part, generation) is None:
        store.add_generation(stage, part, generation, candidates, documents, keys)
    store.rekey(stage, part, generation, keys)  # first: another study may have computed the new keys
    known = store.outcomes(stage, part, generation)
    units: dict[str, Unit] = {}
    places: dict[str, list[tuple[int, int]]] = {}
    for i, candidate in enumerate(candidates):
        for j, document in enumerate(documents):
            if known[i][j] is None:
                units.setdefault(keys[i][j], Unit(keys[i][j], candidate.factors, document))
                places.setdefault(keys[i][j], []).append((i, j))
    observer.generation_started(part, generation, len(candidates) * len(documents), len(units))
    uncomputed: list[Outcome] = []
    in_a_row = 0
    for outcome in scorer.evaluate(list(units.values())) if units else ():
        observer.evaluated(outcome)
        for i, j in places[outcome.key]:
            known[i][j] = outcome
        if outcome.nll is not None:
            store.record(outcome)
            in_a_row = 0
            continue
        uncomputed.append(outcome)
        in_a_row += 1
        if in_a_row == max(UNCOMPUTED_IN_A_ROW, 2 * len(documents)):
            raise _nothing_computed(in_a_row, outcome)
    if uncomputed and not any(outcome and outcome.nll is not None for row in known for outcome in row):
        raise _nothing_computed(len(uncomputed), uncomputed[-1])
    # Only now: a failure that is recorded is final in this study, since later generations build on it.
    for outcome in uncomputed:
        store.record(outcome)
    scores = [total(row) for row in known]
    # Later search generations may fail as a whole: the earlier ones' scores stand, and the selection set would tell.
    needed = generation == 0 or part != "search"
    if needed and not any(math.isfinite(score.loss) for score in scores):
        raise LongRopeError(
            f"No candidate of {part} generation {generation} could be scored; the first failed with: "
            f"{scores[0].failure}"
        )
    best = min(range(len(scores)), key=lambda i: (scores[i].loss, i))
    observer.generation_finished(part, generation, candidates[best], scores[best])
    return scores


def _nothing_computed(count: int, last: Outcome) -> LongRopeError:
    return LongRopeError(
        f"{count} evaluations in a row could not be computed, the last because: {last.failure}; mend that, then go on "
        "with longrope resume, which tries them again."
    )


def total(outcomes: Sequence[Outcome | None]) -> Score:
    """A candidate's score, summed in document order: it does not depend on which worker was faster."""
    nll, tokens = 0.0, 0
    for outcome in outcomes:
        if outcome is None:
            raise RuntimeError("the scorer returned without an outcome for every unit")
        if outcome.nll is None or not math.isfinite(outcome.nll):
            return Score(math.inf, 0, outcome.failure or "the loss is not finite")
        nll += outcome.nll
        tokens += outcome.tokens
    return Score(nll, tokens)


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
    documents: ``search``, ``selection`` and ``test``, disjoint; ``short`` besides, where its rows are wanted.
    """
    watcher = observer or Silent()
    forwards = 0

    def scored(part: str, generation: int, candidates: Sequence[Candidate]) -> list[Score]:
        nonlocal forwards
        forwards += len(candidates) * len(documents[part])
        return score_generation(part, generation, candidates, documents[part], scorer, store, watcher, plan.stage)

    seeds = {name: plan.space.snap(factors) for name, factors in plan.seeds.items()}
    state = State()
    history: list[float] = []
    while True:
        candidates = store.candidates(plan.stage, "search", state.generation)
        if candidates is None:
            children = ask(plan.evolution, plan.space, state, seeds, plan.seed, plan.stage)
            candidates = [Candidate(c.individual.factors(plan.attention_factor), c.origin) for c in children]
        if not candidates:
            break
        scores = scored("search", state.generation, candidates)
        state = tell(state, {individual_of(c): score.loss for c, score in zip(candidates, scores, strict=True)})
        history.append(state.ranked()[0][1])

    snapped = {name: plan.space.snap(factors) for name, factors in plan.baselines.items()}
    finalists = _finalists(plan, state, {**seeds, **snapped})
    selection = scored("selection", 0, finalists)
    order = sorted(range(len(finalists)), key=lambda i: (selection[i].loss, individual_of(finalists[i]).key))
    winner = finalists[order[0]]
    usable = (finalists[i] for i in order if math.isfinite(selection[i].loss))
    without_n_hat = next((finalist for finalist in usable if finalist.factors.n_hat == 0), None)

    rows = _report_rows(plan, winner, without_n_hat)
    table: dict[str, dict[str, Score]] = {}
    for part in ("selection", "test", SHORT):
        if part in documents:
            shown = {name: row for name, row in rows.items() if part != SHORT or AT_STUDY_ATTENTION not in name}
            table[part] = dict(zip(shown, scored(part, 1, list(shown.values())), strict=True))
    return SearchResult(winner, without_n_hat, table, forwards, tuple(history))


def _finalists(plan: SearchPlan, state: State, seeds: Mapping[str, Individual]) -> list[Candidate]:
    """The best, the best with n_hat = 0, the best ones' factors with n_hat = 0, and all seeds and baselines, each once.

    The last are there so that the winner on the selection set is never worse than any of them on the grid.
    """
    ranked = [individual for individual, loss in state.ranked() if math.isfinite(loss)]
    best = ranked[: plan.finalists]
    chosen = dict.fromkeys(best, "finalist")
    for individual in [i for i in ranked if i.n_hat == 0][: plan.finalists]:
        chosen.setdefault(individual, "finalist n_hat=0")
    if 0 in plan.space.n_hats:
        for individual in best:
            chosen.setdefault(Individual(individual.steps, 0), "finalist, n_hat set to 0")
    for name, individual in seeds.items():
        chosen.setdefault(individual, f"seed:{name}")
    return [Candidate(i.factors(plan.attention_factor), origin) for i, origin in chosen.items()]


def _report_rows(plan: SearchPlan, winner: Candidate, without_n_hat: Candidate | None) -> dict[str, Candidate]:
    rows: dict[str, Candidate] = {}
    for name, factors in plan.baselines.items():
        rows[name] = Candidate(factors, f"baseline:{name}")
        at_study = Factors(factors.lambdas, factors.n_hat, plan.attention_factor)
        rows[name + AT_STUDY_ATTENTION] = Candidate(at_study, f"baseline:{name}{AT_STUDY_ATTENTION}")
    rows["searched"] = Candidate(winner.factors, "searched")
    if without_n_hat is not None:
        rows[WITHOUT_N_HAT] = Candidate(without_n_hat.factors, WITHOUT_N_HAT)
    return rows
