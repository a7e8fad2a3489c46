"""Which unit next: the longest first, candidates of one document in a row, spare work where it fits. No Ray in here.

Nothing here can alter a score: it decides when a unit is computed and where, never what becomes of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TypeAlias

from searcher.study import Unit

GRADIENT_COST = 3.0  # a gradient in forwards: one forward, and a backward pass of twice its multiplications
ALIKE = 0.9  # units whose expected times differ by less are as good as equal
HUNG = 10.0  # times what is expected
UNMEASURED = 3600.0, 0.02  # seconds, and seconds a token, before anything is known: a large model on a slow machine

Kind: TypeAlias = "tuple[str, bool]"  # document and gradient: what decides how long a unit takes


def kind_of(unit: Unit) -> Kind:
    """What the units have in common that should take equally long, and that share work on one worker."""
    return unit.document.sha256, unit.gradient


class Durations:
    """How long units are expected to take, learnt from those that are done.

    A document's own mean where it was measured, else that of the nearest length in proportion. Before anything is
    known, the length in tokens stands for the time: it orders as well.
    """

    def __init__(self) -> None:
        self._by_kind: dict[Kind, tuple[float, int]] = {}
        self._by_length: dict[tuple[int, bool], tuple[float, int]] = {}

    @property
    def known(self) -> bool:
        """Whether ``expected`` gives seconds."""
        return bool(self._by_length)

    def observe(self, unit: Unit, seconds: float) -> None:
        """Note what a unit took."""
        total, count = self._by_kind.get(kind_of(unit), (0.0, 0))
        self._by_kind[kind_of(unit)] = total + seconds, count + 1
        length = unit.document.length, unit.gradient
        total, count = self._by_length.get(length, (0.0, 0))
        self._by_length[length] = total + seconds, count + 1

    def expected(self, unit: Unit) -> float:
        """Seconds; tokens, a gradient's times GRADIENT_COST, while nothing is known."""
        mine = self._by_kind.get(kind_of(unit))
        if mine is not None:
            return mine[0] / mine[1]
        length = unit.document.length
        if not self._by_length:
            return length * (GRADIENT_COST if unit.gradient else 1.0)
        # Of the same sort before the other, then of the nearest length.
        near = min(
            self._by_length, key=lambda seen: (seen[1] != unit.gradient, max(seen[0] / length, length / seen[0]))
        )
        total, count = self._by_length[near]
        cost = GRADIENT_COST ** (unit.gradient - near[1])
        return cost * total / count * length / near[0]

    def limit(self, unit: Unit, least: float) -> float:
        """Seconds after which a unit has hung: HUNG times what is expected, never below ``least``.

        Where only shorter windows were measured, attention may take the square of the length.
        """
        seconds, by_token = UNMEASURED
        if not self.known:
            return max(least, seconds + by_token * unit.document.length)
        length = unit.document.length
        longest = max(seen for seen, _ in self._by_length)
        return max(least, HUNG * self.expected(unit) * max(1.0, length / longest))


class Queue:
    """Units that wait, in the order in which ``take`` hands them out."""

    def __init__(self, units: Iterable[Unit], durations: Durations) -> None:
        self._durations = durations
        self._again: deque[Unit] = deque()
        self._waiting: dict[Kind, deque[Unit]] = {}
        for unit in units:
            self._waiting.setdefault(kind_of(unit), deque()).append(unit)

    def __bool__(self) -> bool:
        return bool(self._again or self._waiting)

    def put_first(self, unit: Unit) -> None:
        """A unit whose worker was lost: it has waited once."""
        self._again.append(unit)

    def put_last(self, unit: Unit) -> None:
        """A unit that failed, behind the others on its document."""
        self._waiting.setdefault(kind_of(unit), deque()).append(unit)

    def take(self, last: Kind | None) -> Unit:
        """The next unit for a worker whose last one was of kind ``last``.

        Of the kinds that take longest, or as good as that, the worker's own goes on; else the one with most units
        left, so that several workers take several documents.
        """
        if self._again:
            return self._again.popleft()
        expected = {kind: self._durations.expected(units[0]) for kind, units in self._waiting.items()}
        longest = max(expected.values())
        alike = [kind for kind, seconds in expected.items() if seconds >= ALIKE * longest]
        kind = last if last in alike else max(alike, key=lambda kind: len(self._waiting[kind]))
        assert kind is not None
        unit = self._waiting[kind].popleft()
        if not self._waiting[kind]:
            del self._waiting[kind]
        return unit


def take_spare(spare: list[Unit], durations: Durations, remaining: float) -> Unit | None:
    """The first spare unit that is expected to be done, or as good as done, in ``remaining`` seconds; off the list."""
    if not durations.known:
        return None
    for position, unit in enumerate(spare):
        if ALIKE * durations.expected(unit) <= remaining:
            return spare.pop(position)
    return None
