"""Whether what a worker returned can be believed. No Ray in here.

Some garbage shows by itself. A loss that is not finite is the candidate's doing, or the worker's: another worker is
asked. Of values that differ, those that two workers gave are right. Idle workers compute one in AUDIT_EVERY evaluations
of each other worker once more, so that one that goes wrong while it runs is found.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field

from searcher.study import Outcome, Unit
from workers.perplexity import scored_ranges

AUDIT_EVERY = 64
MOST_OPINIONS = 5
ROUNDING = 1e-3  # nats a token that a sum of losses may lie below zero


def fault(value: object, unit: Unit) -> str | None:
    """What is wrong with what a worker returned for a unit, as far as it shows; None where nothing does."""
    if not isinstance(value, Outcome):
        return f"an object of type {type(value).__name__}"
    if value.key != unit.key:
        return "the outcome of another evaluation"
    if type(value.nll) is not float and not (unit.document.greedy and type(value.nll) is int):
        return f"a loss of type {type(value.nll).__name__}"
    if value.failure is not None and not isinstance(value.failure, str):
        return f"a reason of type {type(value.failure).__name__}"
    if type(value.seconds) not in (float, int) or not 0 <= value.seconds < math.inf:
        return f"a time of {value.seconds!r:.40} s"
    tokens = sum(end - start for start, end in scored_ranges(unit.document.length, unit.document.spans))
    if type(value.tokens) is not int or value.tokens != tokens:
        return f"a loss over {value.tokens!r:.40} tokens where {tokens} are scored"
    if value.nll < -ROUNDING * tokens:
        return f"a loss of {value.nll:g} nats"
    return _gradient_fault(value, unit) if math.isfinite(value.nll) else None


def _gradient_fault(outcome: Outcome, unit: Unit) -> str | None:
    gradient = outcome.gradient
    if not unit.gradient:
        return None if gradient is None else "a gradient that nobody asked for"
    if gradient is None:
        return None if outcome.failure else "no gradient"
    asked = len(unit.factors.by_layer()[0]) + 1
    if not isinstance(gradient, tuple):
        return f"a gradient of type {type(gradient).__name__}"
    if len(gradient) != asked or not all(isinstance(value, float) for value in gradient):
        return f"a gradient of {len(gradient)} values where there are {asked}"
    return None


def doubtful(outcome: Outcome) -> bool:
    """Whether a value needs a second opinion before it is kept."""
    return outcome.failure is not None or outcome.nll is None or not math.isfinite(outcome.nll)


def agree(one: Outcome, other: Outcome) -> bool:
    """Whether two outcomes of one unit are the same to the last bit; one NaN is as good as another."""
    return _bits(one) == _bits(other)


def _bits(outcome: Outcome) -> tuple[object, ...]:
    numbers = (outcome.nll, *(outcome.gradient or ()))
    packed = [None if n is None or math.isnan(n) else struct.pack("<d", n) for n in numbers]
    return outcome.nll is None, outcome.gradient is None, outcome.tokens, *packed


@dataclass
class Opinions:
    """What several workers say of one unit.

    Attributes
    ----------
    given: by the number of the worker's process, in the order they came.
    handed_over: what the study has already.
    audit: whether it is asked only to see whether the first agrees.
    """

    unit: Unit
    given: list[tuple[int, Outcome]] = field(default_factory=list)
    handed_over: Outcome | None = None
    audit: bool = False

    def majority(self) -> Outcome | None:
        """What two of them say."""
        for number, (_, one) in enumerate(self.given):
            if any(agree(one, other) for _, other in self.given[number + 1 :]):
                return one
        return None

    def verdict(self) -> Outcome | None:
        """What two of them say; what the study has, or a failure, once all of MOST_OPINIONS differ; None before."""
        found = self.majority()
        if found is not None or len(self.given) < MOST_OPINIONS:
            return found
        reason = f"{MOST_OPINIONS} workers gave as many different values"
        return self.handed_over or Outcome(self.unit.key, None, 0, failure=reason)

    def against(self, verdict: Outcome) -> list[int]:
        """The workers that said something else."""
        return [worker for worker, outcome in self.given if not agree(outcome, verdict)]


class Audits:
    """Which evaluations an idle worker computes once more, and which ones are in doubt with a worker.

    Parameters
    ----------
    every: of each worker, one in so many.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._since: dict[int, list[tuple[Unit, Outcome]]] = {}  # by worker, since its last audit that agreed
        self._due: dict[int, None] = {}  # in order

    def note(self, worker: int, unit: Unit, outcome: Outcome) -> None:
        """A worker's evaluation has been handed over."""
        done = self._since.setdefault(worker, [])
        done.append((unit, outcome))
        if len(done) >= self._every:
            self._due[worker] = None

    def due(self, auditor: int) -> Opinions | None:
        """The last evaluation of another worker whose turn it is."""
        for worker in self._due:
            if worker != auditor:
                unit, outcome = self._since[worker][-1]
                return Opinions(unit, [(worker, outcome)], outcome, audit=True)
        return None

    def passed(self, worker: int) -> None:
        """What it has computed so far is believed."""
        self._since.pop(worker, None)
        self._due.pop(worker, None)

    def failed(self, worker: int) -> list[tuple[Unit, Outcome]]:
        """All that it has computed since it was last believed; it computes no more."""
        self._due.pop(worker, None)
        return self._since.pop(worker, [])
