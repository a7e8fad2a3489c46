"""What came of retrieval trials: shares with confidence intervals, and the effective context size."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

from workers.retrieval import Task

PAPER_THRESHOLD = 0.2  # Position Interpolation: the success rate that k_max asks for


@dataclass(frozen=True)
class Answer:
    """One trial's outcome, to be stored as it is: numbers and text only."""

    task: Task
    right: bool
    distance: int
    chance: float


@dataclass(frozen=True)
class Accuracy:
    """A row of a table.

    Attributes
    ----------
    depth: None for all depths together.
    accuracy: right / trials.
    low, high: ends of the 95% Wilson interval.
    chance: mean over the trials.
    """

    kind: str
    frame: str
    length: int
    depth: float | None
    trials: int
    right: int
    accuracy: float
    low: float
    high: float
    chance: float


def accuracy_table(answers: Iterable[Answer]) -> list[Accuracy]:
    """By kind, frame and length: a row a depth, then one of all depths; in ascending order."""
    groups: dict[tuple[str, str, int], dict[float, list[Answer]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        task = answer.task
        groups[task.kind, task.frame, task.length][task.depth].append(answer)
    rows = []
    for (kind, frame, length), by_depth in sorted(groups.items()):
        sets: list[tuple[float | None, list[Answer]]] = [*sorted(by_depth.items())]
        sets.append((None, [answer for _, members in sets for answer in members]))
        for depth, members in sets:
            right, trials = sum(answer.right for answer in members), len(members)
            chance = sum(answer.chance for answer in members) / trials
            interval = wilson_interval(right, trials)
            rows.append(Accuracy(kind, frame, length, depth, trials, right, right / trials, *interval, chance))
    return rows


def wilson_interval(right: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a binomial proportion (1927), which holds at 0 and 1 and for few trials."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = right / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return (0.0 if right == 0 else middle - half), (1.0 if right == trials else middle + half)


def effective_context(answers: Iterable[Answer], threshold: float = PAPER_THRESHOLD) -> int:
    """k_max: the largest distance, in tokens, up to which the success rate is nowhere below the threshold.

    Position Interpolation, section 3.3: "the maximum k such that, for all k' <= k, the model has a success rate of at
    least 20% on k'". Distances are those of the trials, one a depth (the nearest trial's); 0 where already the first
    falls short.

    Parameters
    ----------
    answers: of one kind, at one length, as the paper measures it.
    """
    by_place: dict[tuple[int, float], list[Answer]] = defaultdict(list)
    for answer in answers:
        by_place[answer.task.length, answer.task.depth].append(answer)
    reached = 0
    for distance, members in sorted(
        ((min(answer.distance for answer in members), members) for members in by_place.values()),
        key=lambda each: each[0],
    ):
        if sum(answer.right for answer in members) < threshold * len(members):
            break
        reached = distance
    return reached
