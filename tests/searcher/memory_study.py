"""A store in memory, an analytic scorer with gradients, and a process that can be made to die at any step."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from searcher.baselines import BASELINES
from searcher.evolution import Evolution
from searcher.rope import Factors, RopeSpec
from searcher.search import SearchPlan, SearchResult, run_search
from searcher.space import SearchSpace
from searcher.study import SHORT, Candidate, Document, Outcome, Score, Scorer, Store, Unit, total

SPEC = RopeSpec(10_000.0, 8, 256, 2)
SCALE = 8.0
STUDY_ATTENTION = 1.25
BEST_ATTENTION = 1.2
SPACE = SearchSpace.for_scale(SPEC.pairs, SCALE, n_hats=(0, 4, 16))
BASELINE_FACTORS = {name: BASELINES[name](SPEC, SCALE) for name in ("none", "pi", "ntk", "yarn")}
SEEDS = {name: BASELINE_FACTORS[name] for name in ("pi", "ntk", "yarn")}
EVOLUTION = Evolution(population=6, parents=3, mutants=2, crosses=1, generations=3)
FREQUENCIES = tuple(SPEC.inverse_frequencies().tolist())
PLAN = SearchPlan(
    EVOLUTION, SPACE, STUDY_ATTENTION, SEEDS, BASELINE_FACTORS, seed=7, finalists=3, frequencies=FREQUENCIES
)

Documents = Mapping[str, Sequence[Document]]


def document(part: str, number: int, length: int) -> Document:
    name = f"{part}{number}"
    return Document(name, hashlib.sha256(name.encode()).hexdigest(), length)


# Lengths differ, so that a mean of means would not be the token-weighted one.
DOCUMENTS: Documents = {
    "search": [document("search", 0, 2048), document("search", 1, 1024)],
    "selection": [document("selection", 0, 2048), document("selection", 1, 700)],
    "test": [document("test", 0, 2048), document("test", 1, 1500)],
    SHORT: [document("short", 0, 256)],
}


class Interrupted(Exception):
    """The process dies here."""


@dataclass
class Life:
    """How many more steps the process lives: a step is one write to the store or one outcome of the scorer."""

    left: float = math.inf
    lived: int = 0

    def step(self) -> None:
        if self.lived >= self.left:
            raise Interrupted
        self.lived += 1


@dataclass
class Generation:
    candidates: list[Candidate]
    documents: list[Document]
    keys: list[list[str]]


Place = tuple[int, str, int]


@dataclass
class MemoryStore:
    """The store's contract over dictionaries. ``evaluations`` may be shared between studies; failures are not."""

    evaluations: dict[str, Outcome] = field(default_factory=dict)
    failures: dict[str, Outcome] = field(default_factory=dict)
    generations: dict[Place, Generation] = field(default_factory=dict)
    life: Life = field(default_factory=Life)
    settled: dict[Place, list[int]] = field(default_factory=dict)

    def candidates(self, stage: int, part: str, generation: int) -> list[Candidate] | None:
        found = self.generations.get((stage, part, generation))
        return list(found.candidates) if found else None

    def add_generation(
        self,
        stage: int,
        part: str,
        generation: int,
        candidates: Sequence[Candidate],
        documents: Sequence[Document],
        keys: Sequence[Sequence[str]],
    ) -> None:
        if (stage, part, generation) in self.generations:
            raise AssertionError("a generation is written once")
        self.life.step()
        written = Generation(list(candidates), list(documents), [list(row) for row in keys])
        self.generations[stage, part, generation] = written

    def outcome(self, key: str) -> Outcome | None:
        return self.failures.get(key) or self.evaluations.get(key)

    def known(self, keys: Sequence[str]) -> set[str]:
        return {key for key in keys if self.outcome(key)}

    def outcomes(self, stage: int, part: str, generation: int) -> list[list[Outcome | None]]:
        return [[self.outcome(key) for key in row] for row in self.generations[stage, part, generation].keys]

    def rekey(self, stage: int, part: str, generation: int, keys: Sequence[Sequence[str]]) -> None:
        stored = self.generations[stage, part, generation].keys
        changed = [
            (i, j)
            for i, row in enumerate(keys)
            for j, key in enumerate(row)
            if stored[i][j] != key and self.outcome(stored[i][j]) is None
        ]
        if changed:
            self.life.step()
        for i, j in changed:
            stored[i][j] = keys[i][j]

    def record(self, outcome: Outcome) -> None:
        """A value may be of a unit that nobody wrote: a spare one. A failure may not."""
        if outcome.nll is None and outcome.key not in self.units():
            raise AssertionError("a unit is written before it fails for good")
        self.life.step()
        kept = self.failures if outcome.nll is None else self.evaluations
        kept.setdefault(outcome.key, outcome)

    def correct(self, outcome: Outcome) -> None:
        self.life.step()
        self.evaluations[outcome.key] = outcome

    def settle(self, stage: int, part: str, generation: int, seen_by: Sequence[int]) -> None:
        place = (stage, part, generation)
        if self.settled.get(place, list(seen_by)) != list(seen_by):
            raise AssertionError("what a generation was scored on is decided once")
        if any(None in row[:seen] for row, seen in zip(self.outcomes(*place), seen_by, strict=True)):
            raise AssertionError("a generation is settled when it is complete")
        if place not in self.settled:
            self.life.step()
        self.settled[place] = list(seen_by)

    def units(self) -> list[str]:
        """Keys of all units of all generations, in order."""
        return [key for written in self.generations.values() for row in written.keys for key in row]


Failing = Callable[[Factors, Document], float | bool | None]


def never(_factors: Factors, _document: Document) -> bool:
    """No unit fails. A failing unit's predicate returns the value it has instead: None, infinity or NaN."""
    return False


def drawn(factors: Factors) -> int:
    """A number from 0 to 255 that a candidate's factors always give."""
    return hashlib.sha256(b"fails" + factors.to_bytes()).digest()[0]


def sometimes(factors: Factors, on: Document) -> float | bool | None:
    """A third of the candidates fail, on one document of each set, in three ways."""
    if on.name.endswith("1") and drawn(factors) < 85:
        return (None, math.inf, math.nan)[drawn(factors) % 3]
    return False


def part_of(on: Document) -> str:
    return on.name.rstrip("0123456789")


def hidden(part: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """ln lambda that documents of a part like best; not quite the same in each, as in life."""
    shift = {"selection": 0.08, "test": 0.04, "search_short": -0.3}.get(part, 0.0)
    return np.log([1.0, 1.4, 3.7, 7.9]) + shift


@dataclass
class AnalyticScorer:
    """A loss with one valley and, for every document and candidate, a little noise of its own that never changes.

    Attributes
    ----------
    order: of a shuffle of what it is asked for; None keeps the order.
    eager: spare units that it computes at every call, half of which it hands out with the next call.
    asked: units that it was asked for, and steps with a gradient.
    computed: how often it computed each key.
    final: keys that were known and are built upon.
    """

    life: Life = field(default_factory=Life)
    fingerprint: str = "a"
    order: int | None = None
    failing: Failing = never
    computed: Counter[str] = field(default_factory=Counter)
    best_n_hat: int = 4
    noise: float = 0.05
    eager: int = 0
    spared: Counter[str] = field(default_factory=Counter)
    late: dict[str, Outcome] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    final: set[str] = field(default_factory=set)

    def loss(self, factors: Factors, on: Document) -> float:
        """Nats a token."""
        distance = float(np.mean((np.log(factors.by_layer()[0]) - hidden(part_of(on))) ** 2))
        digest = hashlib.sha256(factors.to_bytes() + on.sha256.encode()).digest()
        noise = int.from_bytes(digest[:8], "little") / 2**64
        n_hat = 0.002 * abs(factors.n_hat - self.best_n_hat)
        attention = math.log(factors.attention_factor / BEST_ATTENTION)
        return 2 + distance + n_hat + attention**2 + self.noise * noise

    def gradient(self, factors: Factors, on: Document) -> tuple[float, ...]:
        """Of the total, by ln lambda and ln attention factor."""
        distances = np.log(factors.by_layer()[0]) - hidden(part_of(on))
        slopes = [*(2 * distances / len(distances)), 2 * math.log(factors.attention_factor / BEST_ATTENTION)]
        return tuple(float(slope) * (on.length - 1) for slope in slopes)

    def outcome(self, factors: Factors, on: Document, key: str = "", gradient: bool = False) -> Outcome:
        failed = self.failing(factors, on)
        if failed is not False:
            return Outcome(key, failed, 0, failure=f"{on.name} was too much")
        slopes = self.gradient(factors, on) if gradient else None
        return Outcome(key, self.loss(factors, on) * (on.length - 1), on.length - 1, 0.1, "worker", None, slopes)

    def score(self, factors: Factors, part: str, documents: Documents = DOCUMENTS) -> Score:
        return total([self.outcome(factors, on) for on in documents[part]])

    def evaluate(self, units: Sequence[Unit], spare: Sequence[Unit] = ()) -> Iterator[Outcome]:
        keys = [unit.key for unit in (*units, *spare)]
        if not units or len(set(keys)) != len(keys):
            raise AssertionError("units come each once, and never none")
        for unit in units:
            self.asked[f"gradient {part_of(unit.document)}" if unit.gradient else part_of(unit.document)] += 1
        chance = random.Random(f"{self.order} {units[0].key}")
        wanted = {unit.key for unit in units}
        pending: list[Callable[[], Outcome]] = []
        for key in list(self.late):
            outcome = self.late.pop(key)
            pending.append(lambda outcome=outcome: outcome)  # type: ignore[misc]
            wanted.discard(key)
        pending += [lambda unit=unit: self.compute(unit) for unit in units if unit.key in wanted]  # type: ignore[misc]
        extra = [unit for unit in spare if unit.key not in self.spared][: self.eager]
        self.spared.update(unit.key for unit in extra)
        pending += [lambda unit=unit: self.compute(unit) for unit in extra[::2]]  # type: ignore[misc]
        if self.order is not None:
            chance.shuffle(pending)
        for work in pending:
            self.life.step()
            yield work()
        for unit in extra[1::2]:
            self.late[unit.key] = self.compute(unit)

    def built_upon(self, keys: Collection[str]) -> None:
        self.final |= set(keys)

    def compute(self, unit: Unit) -> Outcome:
        self.computed[unit.key] += 1
        return self.outcome(unit.factors, unit.document, unit.key, unit.gradient)


def run(
    store: MemoryStore,
    scorer: AnalyticScorer,
    plan: SearchPlan = PLAN,
    life: Life | None = None,
    documents: Documents = DOCUMENTS,
) -> SearchResult:
    store.life = scorer.life = life or Life()
    as_store: Store = store
    as_scorer: Scorer = scorer
    return run_search(plan, documents, as_scorer, as_store)


def trace(store: MemoryStore) -> dict[Place, list[tuple[Candidate, list[str]]]]:
    """All that a study asked for, and what became of it; as text, so that NaN equals NaN."""

    def told(key: str) -> str:
        outcome = store.outcome(key)
        return repr((outcome.nll, outcome.tokens, outcome.failure, outcome.gradient)) if outcome else "unknown"

    return {
        place: [
            (candidate, [told(key) for key in row])
            for candidate, row in zip(written.candidates, written.keys, strict=True)
        ]
        for place, written in store.generations.items()
    }


def unbroken(
    failing: Failing = never, plan: SearchPlan = PLAN, documents: Documents = DOCUMENTS, **how: Any
) -> tuple[MemoryStore, AnalyticScorer, SearchResult]:
    store, scorer = MemoryStore(), AnalyticScorer(failing=failing, **how)
    return store, scorer, run(store, scorer, plan, documents=documents)


def snapped(candidate: Factors) -> Factors:
    return SPACE.snap(candidate).factors(STUDY_ATTENTION)


def finalists(store: MemoryStore) -> list[Candidate]:
    return store.generations[0, "selection", 0].candidates


def everyone(store: MemoryStore) -> list[tuple[int, Candidate]]:
    """All candidates of the search generations."""
    return [
        (generation, candidate)
        for (_, part, generation), written in store.generations.items()
        if part == "search"
        for candidate in written.candidates
    ]


@dataclass
class Watcher:
    """An observer that counts."""

    started: list[tuple[str, int, int, int]] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    dropped: list[tuple[str, int, int]] = field(default_factory=list)
    scored: list[tuple[str, int, list[Candidate], list[Score]]] = field(default_factory=list)
    finished: list[tuple[str, int, Candidate, Score]] = field(default_factory=list)

    def generation_started(self, part: str, generation: int, units: int, pending: int) -> None:
        self.started.append((part, generation, units, pending))

    def evaluated(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def candidates_dropped(self, part: str, generation: int, count: int) -> None:
        self.dropped.append((part, generation, count))

    def generation_scored(
        self, part: str, generation: int, candidates: Sequence[Candidate], scores: Sequence[Score]
    ) -> None:
        self.scored.append((part, generation, list(candidates), list(scores)))

    def generation_finished(self, part: str, generation: int, best: Candidate, score: Score) -> None:
        self.finished.append((part, generation, best, score))
