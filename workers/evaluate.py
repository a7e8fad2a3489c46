"""Perplexity at several lengths, baselines beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from searcher.baselines import BASELINES
from searcher.errors import LongRopeError
from searcher.plan import SHIPPED
from searcher.rope import Factors
from searcher.study import Document, Outcome, Score, Scorer, Unit, evaluation_key, total
from workers.model import ModelInfo


class DescribedScorer(Scorer, Protocol):
    """A scorer that knows its model."""

    info: ModelInfo


def perplexity_by_length(
    scorer: DescribedScorer,
    documents: Mapping[int, Sequence[Document]],
    regimes: Sequence[tuple[int, int, Factors]],
    shipped_at: Callable[[int], Factors | None],
) -> dict[str, dict[int, float]]:
    """Method -> length -> perplexity, each method under its own attention factor.

    Up to the original length every baseline is the untouched model, so only ``none`` has a figure there. ``searched``
    is the regime that serves the length, first to last token included; the untouched model where none does.

    Parameters
    ----------
    documents: length -> windows of that length.
    regimes: (min_length, max_length, factors) of a factor file.
    shipped_at: what the model's own config scales by at a length; asked only where it scales at all.
    """
    spec, shipped = scorer.info.spec, scorer.info.shipped
    untouched = Factors((1.0,) * spec.pairs)
    rows: dict[str, dict[int, Factors]] = {}
    for length in documents:
        scale = spec.scale(length)
        for name, make in BASELINES.items():
            if scale > 1 or name == "none":
                rows.setdefault(name, {})[length] = make(spec, scale)
        if shipped is not None:
            rows.setdefault(f"{SHIPPED}_{shipped[0]}", {})[length] = shipped_at(length) or untouched
        if regimes:
            serving = next((f for low, high, f in regimes if low <= length <= high), None)
            if serving is not None or length <= spec.original_length:
                rows.setdefault("searched", {})[length] = serving or untouched
    units: dict[str, Unit] = {}
    for by_length in rows.values():
        for length, factors in by_length.items():
            for document in documents[length]:
                key = evaluation_key(scorer.fingerprint, factors, document)
                units[key] = Unit(key, factors, document)
    outcomes: dict[str, Outcome] = {outcome.key: outcome for outcome in scorer.evaluate(list(units.values()))}

    def perplexity(factors: Factors, length: int) -> float:
        keys = [evaluation_key(scorer.fingerprint, factors, document) for document in documents[length]]
        score: Score = total([outcomes[key] for key in keys])
        if score.failure is not None and any(outcomes[key].nll is None for key in keys):
            raise LongRopeError(f"Length {length} could not be scored: {score.failure}")
        return score.perplexity

    return {name: {n: perplexity(f, n) for n, f in by_length.items()} for name, by_length in rows.items()}
