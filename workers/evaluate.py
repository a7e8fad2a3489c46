"""Perplexity by method and length: by single window, by sliding window, and by position in the window.

Methods: the untouched model, PI, NTK-aware (both forms), dynamic NTK, ABF, YaRN, what the config itself scales by, the
searched regimes of a factor file, and window attention with attention sinks; each under its own attention factor and
under one that all share.

xPos (arXiv 2212.10554) is not among them: it weighs every pair's logit by a decay over distance that the model must
have been trained with. Put into a model trained without it, it changes what is computed inside the original window too,
so its figure would measure that damage, not how far the model reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from searcher.baselines import BASELINES, none
from searcher.errors import LongRopeError
from searcher.plan import SHIPPED, ShippedAt
from searcher.rope import Factors, RopeSpec, attention_factor
from searcher.study import Document, Outcome, Score, Scorer, Unit, evaluation_key, total
from workers.dataset import TokenisedDocument, Window, cut
from workers.model import LoadedModel, ModelInfo
from workers.perplexity import token_losses
from workers.scorer import out_of_memory
from workers.sinks import Sinks, refusal, token_losses_with_sinks
from workers.sliding import Bucket, by_position, default_stride, log_spaced, scored_positions, sliding_windows

Regimes = Sequence[tuple[int, int, Factors]]  # (min_length, max_length, factors), both lengths included

OWN = "own"  # each method under its own attention factor
SINKS = "attention_sinks"
SEARCHED = "searched"


class DescribedScorer(Scorer, Protocol):
    """A scorer that knows its model."""

    info: ModelInfo


@dataclass(frozen=True)
class Method:
    """What a row of figures was computed under.

    Attributes
    ----------
    attention: ``own``, or the policy that all methods share: su, yarn, none, or a number as text.
    sinks: the cache, for window attention with attention sinks.
    """

    name: str
    attention: str
    factors: Factors
    sinks: Sinks | None = None


@dataclass(frozen=True)
class Tally:
    """Total nats over total tokens scored, and on how many windows."""

    nll: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        """exp(nats a token); infinity where the loss is not finite or beyond float64."""
        loss = self.nll / self.tokens if self.tokens else math.inf
        return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True)
class Row:
    """One method at one length.

    Attributes
    ----------
    length: tokens of every window, BOS included.
    stride: of the sliding windows.
    attention: see Method.
    sinks: places of the cache that hold the first tokens, and ``cache`` all its places; None for full attention.
    single: on disjoint windows, all of whose tokens but the first are scored. None where it was not asked for.
    sliding: on sliding windows. None likewise.
    positions: the single windows' losses, by position in the window.
    failure: why there are no figures.
    """

    method: str
    length: int
    stride: int
    attention: str
    attention_factor: float
    n_hat: int
    sinks: int | None = None
    cache: int | None = None
    single: Tally | None = None
    sliding: Tally | None = None
    positions: tuple[Bucket, ...] = ()
    failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, perplexities beside the totals; what is not finite is None. ``from_json`` reads it back."""
        data = asdict(self)
        for name in ("single", "sliding"):
            tally: Tally | None = getattr(self, name)
            if tally is not None:
                data[name] = {**data[name], "nll": _finite(tally.nll), "perplexity": _finite(tally.perplexity)}
        data["positions"] = [{**asdict(bucket), "nll": _finite(bucket.nll)} for bucket in self.positions]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """The inverse of ``to_json``; a loss that was not finite is NaN."""
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        for name in ("single", "sliding"):
            if (held := values.get(name)) is not None:
                values[name] = Tally(_number(held["nll"]), held["tokens"], held["windows"])
        values["positions"] = tuple(
            Bucket(held["start"], held["end"], _number(held["nll"]), held["tokens"])
            for held in values.get("positions", ())
        )
        return cls(**values)


@dataclass(frozen=True)
class Evaluation:
    """All rows, and what they share."""

    original_length: int
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file, a store or a report."""
        return {"original_length": self.original_length, "rows": [row.to_json() for row in self.rows]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evaluation:
        """The inverse of ``to_json``."""
        return cls(data["original_length"], tuple(Row.from_json(row) for row in data["rows"]))


@dataclass(frozen=True, eq=False)
class Texts:
    """What is scored at one length.

    Attributes
    ----------
    single: disjoint windows; empty for no figures by single window and by position.
    sliding: windows with the spans they score; empty for no figures by sliding window.
    edges: of the position buckets.
    """

    length: int
    stride: int
    single: tuple[Window, ...]
    sliding: tuple[Window, ...]
    edges: tuple[int, ...]


def texts_at(
    documents: Iterable[TokenisedDocument],
    length: int,
    bos: int | None,
    windows: int = 2,
    slides: int | None = 8,
    stride: int | None = None,
    edges: Sequence[int] | None = None,
) -> Texts:
    """The windows of one length from every document that holds one. Any length: the original one and shorter ones too.

    Parameters
    ----------
    windows: disjoint ones of a document, at most; 0 for none.
    slides: sliding ones of a document, at most, from its start; 0 for none, None for the whole document.
    stride: None for the default one, see ``sliding.default_stride``.
    edges: of position buckets; None for buckets that double, see ``sliding.log_spaced``.

    Raises
    ------
    LongRopeError
        No document is long enough, or nothing is asked for.
    """
    step = default_stride(length) if stride is None else stride
    held = list(documents)
    single = tuple(w for d in held for w in (cut(d, length, windows, bos) if windows else []))
    sliding = tuple(w for d in held for w in (sliding_windows(d, length, step, bos, slides) if slides != 0 else []))
    if not single and not sliding:
        longest = max((len(d.tokens) + (bos is not None) for d in held), default=0)
        raise LongRopeError(
            f"There is nothing to score at {length} tokens: the longest of {len(held)} documents has {longest}; take a "
            "shorter length or longer text, and at least one window."
        )
    return Texts(length, step, single, sliding, tuple(edges or log_spaced(length)))


def methods_at(
    spec: RopeSpec,
    length: int,
    regimes: Regimes = (),
    shipped: tuple[str, Factors] | None = None,
    policy: str | None = "su",
    sinks: Sinks | None = None,
) -> list[Method]:
    """All methods at one length, each under its own attention factor, then all under the one that they share.

    Up to the original length every baseline is the untouched model and has the factor 1: ``none`` alone is there.

    Parameters
    ----------
    regimes: of a factor file; the one that serves the length.
    shipped: name and factors, at this length, of the scaling that the model's config applies.
    policy: what gives the shared attention factor at scale length / L0, see ``searcher.rope.attention_factor``; None
        for no such rows.
    sinks: the cache; None for the original length with 4 sinks.
    """
    own = [Method(name, OWN, factors) for name, factors in _factors_at(spec, length, regimes, shipped).items()]
    if length > spec.original_length:
        cache = sinks or Sinks(spec.original_length)
        own.append(Method(SINKS, OWN, none(spec, 1), cache))
    if policy is None or length <= spec.original_length:
        return own
    shared = attention_factor(policy, spec, spec.scale(length))
    return own + [
        replace(method, attention=policy, factors=replace(method.factors, attention_factor=shared)) for method in own
    ]


def evaluate_methods(loaded: LoadedModel, texts: Texts, methods: Sequence[Method]) -> Iterator[Row]:
    """A row a method, in order, as each is computed; methods that rotate alike are computed once.

    Memory that runs out is a row with a reason; so is a family that cannot have attention sinks.
    """
    known: dict[tuple[bytes, Sinks | None], Row] = {}
    for method in methods:
        key = method.factors.to_bytes(), method.sinks
        if key not in known:
            known[key] = evaluate_method(loaded, texts, method)
        yield replace(known[key], method=method.name, attention=method.attention)


def evaluate_method(loaded: LoadedModel, texts: Texts, method: Method) -> Row:
    """One method at one length."""
    row = Row(
        method=method.name,
        length=texts.length,
        stride=texts.stride,
        attention=method.attention,
        attention_factor=method.factors.attention_factor,
        n_hat=method.factors.n_hat,
    )
    if method.sinks is not None:
        row = replace(row, sinks=method.sinks.sinks, cache=method.sinks.window, failure=refusal(loaded))
        if row.failure is not None:
            return row
    scored: dict[tuple[str, tuple[tuple[int, int], ...]], Tensor] = {}  # a document's first window is in both lists

    def losses(window: Window) -> Tensor:
        key = window.document.sha256, window.document.spans
        if key not in scored:
            scored[key] = window_losses(loaded, window, method)
        return scored[key]

    try:
        single, sliding = ([losses(window) for window in windows] for windows in (texts.single, texts.sliding))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return replace(row, failure=f"{texts.length} tokens do not fit into the memory of {loaded.device}.")
    placed = [(_positions(window), found) for window, found in zip(texts.single, single, strict=True)]
    return replace(
        row,
        single=_tally(single),
        sliding=_tally(sliding),
        positions=by_position(placed, texts.edges) if placed else (),
    )


def window_losses(loaded: LoadedModel, window: Window, method: Method) -> Tensor:
    """The loss of every token that the window scores, in nats; see ``perplexity.token_losses``."""
    spans = window.document.spans
    if method.sinks is not None:
        return token_losses_with_sinks(loaded, window.tokens, method.sinks, method.factors, spans)
    return token_losses(loaded, window.tokens, method.factors, spans)


def _positions(window: Window) -> npt.NDArray[np.int64]:
    return scored_positions(window.document.length, window.document.spans)


def _tally(losses: Sequence[Tensor]) -> Tally | None:
    if not losses:
        return None
    return Tally(float(torch.cat(list(losses)).sum()), sum(map(len, losses)), len(losses))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _factors_at(
    spec: RopeSpec, length: int, regimes: Regimes, shipped: tuple[str, Factors] | None
) -> dict[str, Factors]:
    """Method -> factors at one length, those that have something to say there."""
    scale = spec.scale(length)
    found = {name: make(spec, scale) for name, make in BASELINES.items() if scale > 1 or name == "none"}
    if shipped is not None:
        found[f"{SHIPPED}_{shipped[0]}"] = shipped[1]
    if regimes:
        serving = next((f for low, high, f in regimes if low <= length <= high), None)
        if serving is not None or length <= spec.original_length:
            found[SEARCHED] = serving or none(spec, 1)
    return found


def perplexity_by_length(
    scorer: DescribedScorer,
    documents: Mapping[int, Sequence[Document]],
    regimes: Regimes,
    shipped_at: ShippedAt,
) -> dict[str, dict[int, float]]:
    """Method -> length -> perplexity, each method under its own attention factor, on one worker or many.

    Up to the original length every baseline is the untouched model, so only ``none`` has a figure there. ``searched``
    is the regime that serves the length, first to last token included; the untouched model where none does.

    Parameters
    ----------
    documents: length -> windows of that length, single or sliding ones: what each scores is in its spans.
    regimes: (min_length, max_length, factors) of a factor file.
    shipped_at: what the model's own config scales by at a length; asked only where it scales at all.
    """
    spec, shipped = scorer.info.spec, scorer.info.shipped
    rows: dict[str, dict[int, Factors]] = {}
    for length in documents:
        own = None if shipped is None else (shipped[0], shipped_at(length) or none(spec, 1))
        for name, factors in _factors_at(spec, length, regimes, own).items():
            rows.setdefault(name, {})[length] = factors
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
