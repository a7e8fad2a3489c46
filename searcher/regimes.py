"""Which factors serve which length: the regimes of an extended model, and the rows of its evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from searcher.baselines import BASELINES
from searcher.extension import BASE, FINETUNE, RECOVER, SEARCH, Evaluation, ExtensionPlan
from searcher.plan import SHIPPED, ShippedAt
from searcher.rope import Factors, RopeSpec, attention_factor
from searcher.second import stage_plan, tuning_factors


@dataclass(frozen=True)
class Place:
    """Up to which length which factors serve.

    Attributes
    ----------
    longest: in tokens, included.
    source: a stage's name, a baseline's, or ``shipped``.
    """

    longest: int
    source: str
    factors: Factors


def unscaled(_length: int) -> None:
    """A config without scaling."""


def _own(spec: RopeSpec, shipped_at: ShippedAt, length: int) -> Place:
    """The rotation of the model's own config: the untouched one, or its shipped scaling."""
    shipped = shipped_at(length)
    return Place(length, "none", Factors((1.0,) * spec.pairs)) if shipped is None else Place(length, SHIPPED, shipped)


def regimes(
    plan: ExtensionPlan,
    spec: RopeSpec,
    found: Mapping[str, Factors],
    kept: Sequence[str],
    shipped_at: ShippedAt = unscaled,
) -> list[Place]:
    """The regimes of the extended model, ascending: recovered lengths, the tuned length, the searches beyond it.

    A model tuned with short text under its config's own rotation (``mixed_window``) is served so up to L0, as
    LongRoPE2 does, unless that length was recovered.

    Parameters
    ----------
    found: stage -> factors.
    kept: the recoveries that won on their selection documents.
    """
    model = plan.final_model()
    places: dict[int, Place] = {}
    if model != BASE:
        last = plan.stage(model)
        tuned = Place(last.length, str(last.factors), tuning_factors(last, spec, found))
        if last.tuning.mixed_window:
            places[spec.original_length] = _own(spec, shipped_at, spec.original_length)
        places[last.length] = tuned
        # Where a recovery lost, what it lost to goes on serving, though a longer one may have won.
        for stage in plan.of_kind(RECOVER):
            if stage.model == model and stage.name in found:
                won = Place(stage.length, stage.name, found[stage.name])
                places[stage.length] = won if stage.name in kept else replace(tuned, longest=stage.length)
    for stage in plan.of_kind(SEARCH):
        if stage.model == model and stage.name in found:
            places[stage.length] = Place(stage.length, stage.name, found[stage.name])
    ascending = [places[length] for length in sorted(places)]
    return [place for place, after in zip_longest(ascending, ascending[1:]) if not _same(place, after)]


def _same(place: Place, after: Place | None) -> bool:
    """Whether the next regime is the same again, for longer."""
    return after is not None and (place.source, place.factors) == (after.source, after.factors)


@dataclass(frozen=True)
class Row:
    """A row of the evaluation: a model, and the factors it is under at each length.

    Attributes
    ----------
    name: of the row.
    model: ``base`` or a fine-tuning stage.
    factors: length -> factors; None where the row has none for it.
    """

    name: str
    model: str
    factors: Mapping[int, Factors | None]


def rows(
    plan: ExtensionPlan,
    evaluation: Evaluation,
    spec: RopeSpec,
    found: Mapping[str, Factors],
    kept: Sequence[str],
    shipped_at: ShippedAt = unscaled,
) -> list[Row]:
    """The papers' table: baselines and LongRoPE untuned; every tuned line; the extension without and with recovery.

    An untuned baseline is scaled to each length, under its own attention factor and, where that is another one, under
    the evaluation's; a model's shipped scaling is one more. A tuned line keeps what it was tuned at up to its length,
    and beyond it is scaled to the length, as the extension is by its last search; up to L0 it is served as ``regimes``
    serves the extension.
    """
    lengths = evaluation.lengths
    table = []
    for name in evaluation.baselines:
        make = BASELINES[name]
        made = {n: make(spec, max(1.0, spec.scale(n))) for n in lengths}
        policy = evaluation.attention_factor
        shared = {
            n: replace(factors, attention_factor=attention_factor(policy, spec, spec.scale(n)))
            for n, factors in made.items()
        }
        table.append(Row(name, BASE, made))
        if shared != made:
            table.append(Row(f"{name}, attention {policy}", BASE, shared))
    own = {n: _own(spec, shipped_at, n) for n in lengths}  # each reads the model's config
    if any(place.source == SHIPPED for place in own.values()):
        table.append(Row(SHIPPED, BASE, {n: place.factors for n, place in own.items()}))
    untuned = [
        Place(stage.length, stage.name, found[stage.name])
        for stage in sorted(plan.of_kind(SEARCH), key=lambda stage: stage.length)
        if stage.model == BASE and stage.name in found
    ]
    within = {n: place.factors for n, place in own.items() if n <= spec.original_length}
    if untuned:
        by_length = {n: within[n] if n in within else serving(untuned, n) for n in lengths}
        table.append(Row("longrope, not tuned", BASE, by_length))
    for line in plan.lines()[1:]:
        last = plan.stage(plan.final_model(line))
        fixed, make = tuning_factors(last, spec, found), BASELINES[line]
        by_length = {n: fixed if n <= last.length else make(spec, spec.scale(n)) for n in lengths}
        short = within if last.tuning.mixed_window else {}
        table.append(Row(f"{line}, tuned", last.name, {**by_length, **short}))
    model = plan.final_model()
    if model != BASE:
        searched = {name: factors for name, factors in found.items() if plan.stage(name).kind != RECOVER}
        without = regimes(plan, spec, searched, (), shipped_at)
        table.append(Row("longrope, without recovery", model, {n: serving(without, n) for n in lengths}))
        served = regimes(plan, spec, found, kept, shipped_at)
        table.append(Row("longrope", model, {n: serving(served, n) for n in lengths}))
    return table


def serving(places: Sequence[Place], length: int) -> Factors | None:
    """The factors of the first regime that reaches the length; None where none does."""
    return next((place.factors for place in places if length <= place.longest), None)


@dataclass(frozen=True)
class StageCost:
    """About what a stage costs.

    Attributes
    ----------
    forwards: of one document of ``length`` tokens, a gradient step counted as three.
    length: in tokens.
    """

    name: str
    kind: str
    forwards: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return self.forwards * self.length


def costs(plan: ExtensionPlan, spec: RopeSpec, test_windows: int = 16) -> list[StageCost]:
    """About what every stage costs, before it has run; a token costs more the longer its window is."""
    placeholder = {stage.name: Factors((2.0,) * spec.pairs) for stage in plan.stages if stage.kind in (SEARCH, RECOVER)}
    found = []
    for number, stage in enumerate(plan.stages):
        if stage.kind in (SEARCH, RECOVER):
            search = stage_plan(plan, number, spec, None, placeholder)
            documents = stage.documents.get("search", 5) * stage.windows.get("search", 1)
            forwards = search.most_evaluations(documents)
            forwards += 2 * (0 if search.refinement is None else search.refinement.gradients)
            found.append(StageCost(stage.name, stage.kind, forwards, stage.length))
        elif stage.kind == FINETUNE:
            # Forward again for checkpointing, and backward as two forwards.
            chunks = stage.tuning.steps * stage.tuning.batch
            found.append(StageCost(stage.name, stage.kind, 4 * chunks, stage.tuning.length))
        else:
            asked = stage.evaluation
            trials = asked.passkey_depths * asked.passkey_trials + 3 * asked.key_value_trials
            count = len(rows(plan, asked, spec, placeholder, ())) * (test_windows + trials)
            # In windows of the longest length: every shorter one costs its share of the tokens.
            found.append(
                StageCost(stage.name, stage.kind, round(count * sum(asked.lengths) / stage.length), stage.length)
            )
    return found
