"""What of a factor file goes into a form that another program loads, and what is lost on the way.

A factor file holds any number of regimes, n_hat, one list of factors a layer, and an attention factor a regime. Other
programs hold less. What would be lost refuses the export, unless it is accepted by name.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from searcher.errors import LongRopeError
from searcher.rope import Factors, RopeSpec, attention_factor
from storage.factor_file import FactorFile, ModelIdentity, Regime, RegimeScore

N_HAT, LAYERS, REGIMES = "n_hat", "layers", "regimes"
ATTENTION, SHORT_ATTENTION = "attention_factor", "short_attention_factor"
LOSSES = (N_HAT, LAYERS, REGIMES, ATTENTION, SHORT_ATTENTION)

# How a form holds attention factors: one for every length, one each for short and long, or derived and not held.
ONE, EACH, DERIVED = "one", "each", "derived"

# What serves the lengths up to the original one, in forms with a list for them.
FILE, LONG, UNTOUCHED = "file", "long", "untouched"
SHORT_CHOICES = (FILE, LONG, UNTOUCHED)


@dataclass(frozen=True)
class Room:
    """What a form holds, beside one list of factors for all layers.

    Attributes
    ----------
    name: of the program, for messages.
    short: whether there is a second list, for lengths up to the original one.
    layers: whether each layer may have its list.
    attention: ONE, EACH, or DERIVED: sqrt(1 + ln s / ln L0), whatever the factors were searched under.
    short_derived: with DERIVED, what the program takes up to the original length: 1, or None for the long one's.
    """

    name: str
    short: bool
    attention: str
    layers: bool = False
    short_derived: float | None = None


@dataclass(frozen=True)
class Taken:
    """What goes into a form: no n_hat, and one list for all layers unless the form holds more.

    Attributes
    ----------
    long: serves lengths up to ``target_length``.
    short: serves lengths up to the original one; equal to ``long`` where nothing switches.
    notes: for people, a sentence each: what was given up, and what serves short text.
    """

    model: ModelIdentity
    long: Factors
    short: Factors
    target_length: int
    notes: tuple[str, ...]

    @property
    def switches(self) -> bool:
        """Whether short and long differ."""
        return self.short != self.long

    @property
    def scale(self) -> float:
        """s = L / L0."""
        return self.model.spec.scale(self.target_length)


@dataclass(frozen=True)
class Loss:
    """Something a form cannot hold.

    Attributes
    ----------
    name: one of LOSSES.
    what: that cannot be held, as the object of a sentence.
    instead: sentences on what is written in its place.
    """

    name: str
    what: str
    instead: tuple[str, ...]


class LossError(LongRopeError):
    """A form cannot hold all of the factors, and the loss was not accepted.

    Attributes
    ----------
    losses: those not accepted.
    what: a sentence without its full stop.
    """

    def __init__(self, room: Room, losses: tuple[Loss, ...]) -> None:
        self.losses = losses
        self.what = f"{room.name} cannot hold {'; nor '.join(loss.what for loss in losses)}"
        flags = " ".join(dict.fromkeys(f"--accept-loss {loss.name}" for loss in losses))
        instead = " ".join(sentence for loss in losses for sentence in loss.instead)
        super().__init__(f"{self.what}. With {flags}: {instead}")


def su_attention(spec: RopeSpec, target_length: int) -> float:
    """sqrt(1 + ln s / ln L0), which programs derive that are not told an attention factor; 1 where s <= 1."""
    return attention_factor("su", spec, spec.scale(target_length))


def same_number(one: float, other: float) -> bool:
    """Whether two attention factors differ by rounding alone."""
    return math.isclose(one, other, rel_tol=1e-12)


def take(
    file: FactorFile, room: Room, accepted: Collection[str] = (), length: int | None = None, short: str = FILE
) -> Taken:
    """What of a factor file goes into a form.

    Parameters
    ----------
    accepted: names of losses that are.
    length: in tokens; the regime that serves it is the long one, and longer ones are left out. The last if None.
    short: FILE takes the file's regime that ends at the original length, and the long one where it has none.

    Raises
    ------
    LossError
        Something would be lost that is not accepted.
    LongRopeError
        No regime serves ``length``, or ``short`` asks for a list that the form does not have.
    """
    model, found = file.model, []
    if short == UNTOUCHED and not room.short:
        raise LongRopeError(f"{room.name} has one list of factors for every length; leave out --short untouched.")
    regime = _serving(file, length)
    ends = [other for other in file.regimes if other.max_length == model.original_length and other is not regime]
    own_short = ends[0] if ends and room.short and short == FILE else None
    reached = [other for other in file.regimes if other.max_length < regime.max_length]
    dropped = [other for other in reached if other is not own_short]
    if dropped:
        found.append(_regimes_lost(dropped, own_short))
    long, at_long = _held(regime, room)
    found += at_long
    if own_short is not None:
        low, at_short = _held(own_short, room)
        found += at_short
    else:
        low = Factors((1.0,) * model.spec.pairs) if short == UNTOUCHED else long
    long, low, at_attention = _attention(room, model, regime.max_length, long, low)
    found += at_attention
    refused = tuple(loss for loss in found if loss.name not in accepted)
    if refused:
        raise LossError(room, refused)
    notes = [sentence for loss in found for sentence in loss.instead]
    if low == long:
        taken = regime.without_n_hat if regime.factors.n_hat else regime
        notes.append(_on_short_text(None if taken is None else taken.scores.get("short")))
    return Taken(model, long, low, regime.max_length, tuple(dict.fromkeys(notes)))


def _serving(file: FactorFile, length: int | None) -> Regime:
    if length is None:
        return file.regimes[-1]
    for regime in file.regimes:
        if length <= regime.max_length:
            return regime
    raise LongRopeError(f"No regime serves {length} tokens; the last one ends at {file.regimes[-1].max_length}.")


def _regimes_lost(dropped: list[Regime], own_short: Regime | None) -> Loss:
    ends = " and ".join(str(regime.max_length) for regime in dropped)
    kept = "One regime is taken" if own_short is None else "The shortest and the longest regime are taken"
    left = "is left out" if len(dropped) == 1 else "are left out"
    what = f"more than {1 if own_short is None else 2} of the regimes here (those up to {ends} tokens are too many)"
    return Loss(REGIMES, what, (f"{kept}; that up to {ends} tokens {left}.",))


def _held(regime: Regime, room: Room) -> tuple[Factors, list[Loss]]:
    """A regime's factors without n_hat, and with one list where the form has one."""
    factors, lost = regime.factors, []
    if factors.n_hat:
        what, alternative = f"n_hat = {factors.n_hat}", regime.without_n_hat
        if alternative is None:
            instead = [f"{what} is dropped and the factors stay, at a cost that was not measured."]
            factors = replace(factors, n_hat=0)
        else:
            instead = [f"{what} cannot be held; the study's best factors with n_hat = 0 are taken."]
            factors = alternative.factors
            for part in sorted(regime.scores.keys() & alternative.scores.keys()):
                searched, taken = regime.scores[part].perplexity, alternative.scores[part].perplexity
                change = f"{searched:.4f} -> {taken:.4f} ({taken / searched - 1:+.2%})"
                instead.append(f"On {part} that costs perplexity {change}.")
        lost.append(Loss(N_HAT, what, tuple(instead)))
    if not (factors.shared or room.layers):
        rows = factors.by_layer()
        if len({*rows}) > 1:
            sentence = (
                f"The geometric mean of the {len(rows)} lists serves all layers, at a cost that was not measured."
            )
            lost.append(Loss(LAYERS, f"factors that differ by layer ({len(rows)} lists)", (sentence,)))
        factors = replace(factors, lambdas=_mean(rows))
    return factors, lost


def _mean(rows: tuple[tuple[float, ...], ...]) -> tuple[float, ...]:
    """The geometric mean by pair; equal rows come back to the last bit."""
    if len({*rows}) == 1:
        return rows[0]
    return tuple(math.exp(math.fsum(map(math.log, column)) / len(rows)) for column in zip(*rows, strict=True))


def _attention(
    room: Room, model: ModelIdentity, target_length: int, long: Factors, short: Factors
) -> tuple[Factors, Factors, list[Loss]]:
    """Both sets under the attention factors that the form gives them."""
    switches, lost = short != long, []
    wanted = long.attention_factor
    if room.attention == DERIVED:
        derived = su_attention(model.spec, target_length)
        if not same_number(derived, wanted):
            what = f"the attention factor {wanted:.6g}"
            instead = f"The attention factor is {derived:.6g}, which {room.name} works out from the lengths."
            lost.append(Loss(ATTENTION, what, (instead,)))
            long = replace(long, attention_factor=derived)
    if not switches:
        return long, long, lost
    if room.attention != EACH:
        given = long.attention_factor if room.short_derived is None else room.short_derived
        if not same_number(given, short.attention_factor):
            what = f"the attention factor {short.attention_factor:.6g} of short text"
            instead = f"The attention factor of short text is {given:.6g}, where it should be "
            lost.append(Loss(SHORT_ATTENTION, what, (f"{instead}{short.attention_factor:.6g}.",)))
            short = replace(short, attention_factor=given)
    return long, short, lost


def _on_short_text(score: RegimeScore | None) -> str:
    if score is None:
        return "The same factors serve short text; their perplexity there was not measured."
    return f"The same factors serve short text: perplexity {score.perplexity:.4f} at {score.length} tokens."
