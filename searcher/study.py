"""The driver loop: ask, record, dispatch, record; and again after any interruption.

The loop is written against two Protocols. A ``Scorer`` computes; a ``Store`` is the only truth. Whatever the loop
holds in memory it can rebuild from the store, so a study that is killed at any instant goes on where it was, and
takes the path it would have taken.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from searcher.errors import LongRopeError
from searcher.racing import Cut, Race
from searcher.rope import Factors

PARTS = ("search", "selection", "test")
REFINED = "refined"  # the part of a study with what a refinement starts from and ends at, on the search documents
REFINE = "refine"  # windows that a gradient refinement descends on: further ones of the search documents
SEARCH_SHORT = "search_short"  # windows of the original length, the second objective of some samplers
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
    spans: where only part of the window is scored, half-open ranges of positions; empty scores every token but the
        first. The token at position 0 is never scored.
    greedy: scored by how many of those tokens greedy decoding gets wrong, in place of nats: a retrieval task, whose
        answer is right where the count is 0.
    """

    name: str
    sha256: str
    length: int
    spans: tuple[tuple[int, int], ...] = ()
    greedy: bool = False


@dataclass(frozen=True)
class Candidate:
    """Factors to be scored, and where they come from."""

    factors: Factors
    origin: str


@dataclass(frozen=True)
class Unit:
    """The unit of work: one candidate on one document.

    Attributes
    ----------
    gradient: whether the gradient of the loss is asked for beside its value.
    """

    key: str
    factors: Factors
    document: Document
    gradient: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a unit.

    Attributes
    ----------
    nll: total negative log-likelihood in nats, not finite where the model overflowed, or wrong tokens where the
        document is ``greedy``; None where it could not be computed at all.
    tokens: tokens scored.
    seconds: time the worker spent on it.
    worker: who computed it.
    failure: why ``nll`` is None or not finite.
    gradient: of ``nll``, where it was asked for: by ln lambda_i, pair after pair, and last by ln attention factor.
    corrects: whether it takes the place of an outcome that came before: of a worker that turned out to be wrong.
    """

    key: str
    nll: float | None
    tokens: int
    seconds: float = 0.0
    worker: str = ""
    failure: str | None = None
    gradient: tuple[float, ...] | None = None
    corrects: bool = False


@dataclass(frozen=True)
class Score:
    """One candidate on a set of documents: total negative log-likelihood over total tokens.

    Attributes
    ----------
    failure: why there is no total: the candidate failed, or was raced out.
    by_document: nats of each document, in document order, up to the first that failed.
    documents: how many it was scored on.
    raced_out: whether racing left it there.
    """

    nll: float
    tokens: int
    failure: str | None = None
    by_document: tuple[float, ...] = ()
    documents: int = 0
    raced_out: bool = False

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

    def evaluate(self, units: Sequence[Unit], spare: Sequence[Unit] = ()) -> Iterator[Outcome]:
        """Every unit's outcome once, as they finish; and once more, with ``corrects``, where the first was wrong.

        ``spare`` units are for workers that would be idle otherwise: some of their outcomes come, in this call or in a
        later one, and none is waited for.
        """
        ...

    def built_upon(self, keys: Collection[str]) -> None:
        """The study decides by values of these keys that it had before it asked: from now on none is corrected."""
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

    def correct(self, outcome: Outcome) -> None:
        """Keep a value in place of the one that was recorded."""
        ...

    def settle(self, stage: int, part: str, generation: int, seen_by: Sequence[int]) -> None:
        """How many documents each candidate was scored on: written when its generation is complete.

        The same again is fine. A generation that is never settled was scored on all of them.
        """
        ...

    def known(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys that have a value already."""
        ...


class Observer(Protocol):
    """Told what happens, for whoever watches; changes nothing."""

    def generation_started(self, part: str, generation: int, units: int, pending: int) -> None: ...

    def evaluated(self, outcome: Outcome) -> None: ...

    def candidates_dropped(self, part: str, generation: int, count: int) -> None: ...

    def generation_scored(
        self, part: str, generation: int, candidates: Sequence[Candidate], scores: Sequence[Score]
    ) -> None: ...

    def generation_finished(self, part: str, generation: int, best: Candidate, score: Score) -> None: ...


class Silent:
    """An observer that says nothing."""

    def generation_started(self, part: str, generation: int, units: int, pending: int) -> None: ...

    def evaluated(self, outcome: Outcome) -> None: ...

    def candidates_dropped(self, part: str, generation: int, count: int) -> None: ...

    def generation_scored(
        self, part: str, generation: int, candidates: Sequence[Candidate], scores: Sequence[Score]
    ) -> None: ...

    def generation_finished(self, part: str, generation: int, best: Candidate, score: Score) -> None: ...


def evaluation_key(fingerprint: str, factors: Factors, document: Document, gradient: bool = False) -> str:
    """SHA-256 of everything that decides an evaluation's value."""
    digest = hashlib.sha256()
    parts = [fingerprint.encode(), document.sha256.encode(), factors.to_bytes()]
    if document.spans:
        parts.append(repr(document.spans).encode())
    if document.greedy:
        parts.append(b"greedy")
    if gradient:
        parts.append(b"gradient")
    for part in parts:
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
    race: Race | Cut | None = None,
    spare: Sequence[Unit] = (),
) -> list[Score]:
    """Every candidate's score on a set of documents, in ask order; computes only what the store does not know.

    Parameters
    ----------
    race: drops candidates after some of the documents; None scores all of them on all.
    spare: units for workers that would be idle, whose values a later generation may ask for.

    Raises
    ------
    LongRopeError
        Every candidate failed, other than in a later search generation: the first reason is in the message.
    """
    work = _Generation(part, generation, candidates, documents, scorer, store, observer, stage)
    racing = list(range(len(candidates)))
    seen_by = [len(documents)] * len(candidates)
    if race is not None:
        for seen in race.points(len(documents)):
            work.compute(racing, seen, spare)
            kept = race.kept([work.losses(i, seen) for i in racing])
            for i in [i for i, keep in zip(racing, kept, strict=True) if not keep]:
                racing.remove(i)
                seen_by[i] = seen
    work.compute(racing, len(documents), spare)
    scores = work.finish(seen_by)
    if any(score.raced_out for score in scores):
        observer.candidates_dropped(part, generation, sum(score.raced_out for score in scores))
    # Later generations of the search may fail as a whole: the earlier ones' scores stand, and the selection set tells.
    needed = part != REFINED and (generation == 0 or part not in ("search", SEARCH_SHORT))
    if needed and not any(math.isfinite(score.loss) for score in scores):
        raise LongRopeError(
            f"No candidate of {part} generation {generation} could be scored; the first failed with: "
            f"{scores[0].failure}"
        )
    observer.generation_scored(part, generation, candidates, scores)
    best = min(range(len(scores)), key=lambda i: (scores[i].loss, i))
    observer.generation_finished(part, generation, candidates[best], scores[best])
    return scores


def score_gradients(
    part: str,
    generation: int,
    candidates: Sequence[Candidate],
    documents: Sequence[Document],
    scorer: Scorer,
    store: Store,
    observer: Observer,
    stage: int = 0,
) -> list[list[Outcome]]:
    """By candidate and document, outcomes with gradients, under the same rules as ``score_generation``."""
    work = _Generation(part, generation, candidates, documents, scorer, store, observer, stage, gradient=True)
    work.compute(range(len(candidates)), len(documents))
    scores = work.finish([len(documents)] * len(candidates))
    observer.generation_finished(part, generation, candidates[0], scores[0])
    return [[outcome for outcome in row if outcome is not None] for row in work.known]


class _Generation:
    """One generation on its way: what is known of it, and which of its units are still to be computed."""

    def __init__(
        self,
        part: str,
        generation: int,
        candidates: Sequence[Candidate],
        documents: Sequence[Document],
        scorer: Scorer,
        store: Store,
        observer: Observer,
        stage: int,
        gradient: bool = False,
    ) -> None:
        self.place = (stage, part, generation)
        self.candidates, self.documents, self.gradient = candidates, documents, gradient
        self.scorer, self.store, self.observer = scorer, store, observer
        fingerprint = scorer.fingerprint
        self.keys = [[evaluation_key(fingerprint, c.factors, d, gradient) for d in documents] for c in candidates]
        if store.candidates(*self.place) is None:
            store.add_generation(*self.place, candidates, documents, self.keys)
        store.rekey(*self.place, self.keys)  # first: another study may have computed the new keys
        self.known = store.outcomes(*self.place)
        self.cells: dict[str, list[tuple[int, int]]] = {}
        for i, row in enumerate(self.keys):
            for j, key in enumerate(row):
                self.cells.setdefault(key, []).append((i, j))
        self.uncomputed: list[Outcome] = []
        self.in_a_row = 0
        self.spared: set[str] = set()
        pending = sum(outcome is None for row in self.known for outcome in row)
        observer.generation_started(part, generation, len(candidates) * len(documents), pending)

    def compute(self, chosen: Iterable[int], seen: int, spare: Sequence[Unit] = ()) -> None:
        """Score the chosen candidates on the first ``seen`` documents; what is decided next is decided by them."""
        units: dict[str, Unit] = {}
        found: set[str] = set()
        for i in chosen:
            for j in range(seen):
                key = self.keys[i][j]
                if self.known[i][j] is None:
                    units.setdefault(key, Unit(key, self.candidates[i].factors, self.documents[j], self.gradient))
                else:
                    found.add(key)
        if units:
            self.ask(units, [unit for unit in spare if unit.key not in self.spared])
        self.scorer.built_upon(found)

    def ask(self, units: Mapping[str, Unit], spare: Sequence[Unit]) -> None:
        """Have units computed, and keep what comes: of them, of spare ones, and in place of what was known."""
        for outcome in self.scorer.evaluate(list(units.values()), spare):
            if outcome.corrects:
                self.store.correct(outcome)
                self.keep(outcome)
                continue
            if outcome.key not in units:  # a spare one's, of this call or of an earlier one
                self.spared.add(outcome.key)
                if outcome.nll is not None:
                    self.store.record(outcome)
                continue
            self.observer.evaluated(outcome)
            self.keep(outcome)
            if outcome.nll is not None:
                self.store.record(outcome)
                self.in_a_row = 0
                continue
            self.uncomputed.append(outcome)
            self.in_a_row += 1
            if self.in_a_row == max(UNCOMPUTED_IN_A_ROW, 2 * len(self.documents)):
                raise _nothing_computed(self.in_a_row, outcome, self.gradient)

    def keep(self, outcome: Outcome) -> None:
        """Wherever the generation has its key."""
        for i, j in self.cells.get(outcome.key, ()):
            self.known[i][j] = outcome

    def losses(self, i: int, seen: int) -> tuple[float, ...]:
        """Nats of candidate i on the first ``seen`` documents; infinity where it failed."""
        values = (
            math.inf if outcome is None or outcome.nll is None else outcome.nll for outcome in self.known[i][:seen]
        )
        return tuple(value if math.isfinite(value) else math.inf for value in values)

    def finish(self, seen_by: Sequence[int]) -> list[Score]:
        """Everyone's score on its first ``seen_by`` documents."""
        if self.uncomputed and not any(o is not None and o.nll is not None for row in self.known for o in row):
            raise _nothing_computed(len(self.uncomputed), self.uncomputed[-1], self.gradient)
        # Only now: a failure that is recorded is final in this study, since later generations build on it.
        for outcome in self.uncomputed:
            self.store.record(outcome)
        # Beyond the point where a candidate was left, the store may know a document by chance: it does not count.
        scores = [total(row[:seen], len(row)) for row, seen in zip(self.known, seen_by, strict=True)]
        if any(seen < len(self.documents) for seen in seen_by):  # also where it was left since it failed
            self.store.settle(*self.place, seen_by)
        return scores


def _nothing_computed(count: int, last: Outcome, gradient: bool) -> LongRopeError:
    other = (
        " Where gradients do not fit, launch it anew with --refine-legs 0 --refine-final-legs 0; what was scored is "
        "found in the store."
    )
    what = f"{count} evaluations in a row" if count > 1 else "An evaluation"
    return LongRopeError(
        f"{what} could not be computed, the last because: {last.failure}; mend that, then go on with longrope resume, "
        f"which tries them again.{other if gradient else ''}"
    )


def total(outcomes: Sequence[Outcome | None], documents: int | None = None) -> Score:
    """A candidate's score, summed in document order: it does not depend on which worker was faster.

    Parameters
    ----------
    documents: how many there are, where fewer outcomes than that come from a candidate that was raced out.
    """
    by_document: list[float] = []
    tokens = 0
    for outcome in outcomes:
        if outcome is None:
            raise RuntimeError("the scorer returned without an outcome for every unit")
        if outcome.nll is None or not math.isfinite(outcome.nll):
            reason = outcome.failure or "the loss is not finite"
            return Score(math.inf, 0, reason, tuple(by_document), len(outcomes))
        by_document.append(outcome.nll)
        tokens += outcome.tokens
    seen = tuple(by_document)
    if documents is not None and len(seen) < documents:
        return Score(math.inf, 0, f"raced out after {len(seen)} of {documents} documents", seen, len(seen), True)
    return Score(math.fsum(seen), tokens, by_document=seen, documents=len(seen))
