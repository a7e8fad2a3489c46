"""Searches on an extended model: seeds from what it was tuned at, and the recovery of short lengths (LongRoPE, 3.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from searcher.baselines import BASELINES
from searcher.errors import LongRopeError
from searcher.extension import RECOVER, SEARCH, ExtensionPlan, Stage
from searcher.plan import SHIPPED, SearchSettings, search_plan
from searcher.rope import Factors, RopeSpec, attention_factor
from searcher.search import SearchPlan
from searcher.space import GRID, SearchSpace

TUNED = "tuned"  # the name of the tuned factors among seeds and rows
# What a smaller bound is searched from beside the tuned factors themselves: lambda^c keeps 1 and the order.
SCALED_DOWN = (0.75, 0.5, 0.25)


def rescaled_seeds(factors: Factors, length: int, target: int) -> dict[str, tuple[tuple[float, ...], int]]:
    """Factors found at one length as seeds for a longer one: as they are, times the ratio, and to a power.

    The power is ln(target) / ln(length) in units of the largest factor, so that a pair at the old scale goes to the new
    one and a pair at 1 stays. Nothing is clamped to s here: the bound is the space's own.
    """
    (lambdas,) = factors.by_layer()
    ratio, top = target / length, max(lambdas)
    seeds = {TUNED: lambdas, f"{TUNED}_times": tuple(max(1.0, value * ratio) for value in lambdas)}
    if top > 1:
        power = math.log(top * ratio) / math.log(top)
        seeds[f"{TUNED}_power"] = tuple(max(value, 1.0) ** power for value in lambdas)
    return {name: (row, factors.n_hat) for name, row in seeds.items()}


def recovery_plan(
    settings: SearchSettings, spec: RopeSpec, tuned: Factors, stage: int, shipped: tuple[str, Factors] | None = None
) -> SearchPlan:
    """The search for a short length on an extended model: factors in [1, upper_ratio times the largest tuned one].

    The ratio is 1 where the settings have none. Seeds are the tuned factors, scaled-down copies of them, and ones; the
    rows to beat are the untouched rotation, the scaling of the model's own config, and the tuned factors. The attention
    factor is the tuned one's, which a refinement may learn anew.

    Parameters
    ----------
    tuned: what the model was tuned at; one list for all layers.
    shipped: see ``searcher.plan.search_plan``; at the recovered length.
    """
    (lambdas,) = tuned.by_layer()
    ratio = 1.0 if settings.upper_ratio is None else settings.upper_ratio
    upper = max(GRID, math.ceil(round(ratio * max(lambdas) * GRID, 6)))
    space = SearchSpace(spec.pairs, GRID, upper, _within(settings))
    rows = {"none": Factors((1.0,) * spec.pairs), TUNED: tuned}
    seeds = {TUNED: tuned, "none": rows["none"]}
    if shipped is not None:
        name, own = shipped
        seeds[f"{SHIPPED}_{name}"] = rows[f"{SHIPPED}_{name}"] = own
    for power in SCALED_DOWN:
        row = tuple(max(value, 1.0) ** power for value in lambdas)
        seeds[f"{TUNED}^{power:g}"] = Factors(row, tuned.n_hat)
    return SearchPlan(
        evolution=settings.evolution,
        space=space,
        attention_factor=tuned.attention_factor,
        seeds=seeds,
        baselines=rows,
        seed=settings.seed,
        finalists=settings.finalists,
        all_seeds_final=settings.all_seeds_final,
        stage=stage,
        frequencies=tuple(spec.inverse_frequencies().tolist()),
        sampler=settings.sampler,
        refinement=settings.refinement,
        racing=settings.racing,
    )


def recovered(losses: Mapping[str, float]) -> str:
    """The row that a recovered length is served by, from losses on the selection documents.

    Only the tuned factors, what was searched, and the rotations that the model knew before; under the attention factors
    that are their own. The tuned factors stay where nothing beats them.
    """
    others = [name for name in losses if name in ("searched", "none") or (name.startswith(SHIPPED) and "@" not in name)]
    return min((TUNED, *others), key=losses.__getitem__)


def _within(settings: SearchSettings) -> tuple[int, ...]:
    """The choices of n_hat that leave a token to rescale."""
    return tuple(n for n in settings.n_hats if n < settings.target_length) or settings.n_hats[:1]


def stage_plan(
    plan: ExtensionPlan,
    number: int,
    spec: RopeSpec,
    shipped: tuple[str, Factors] | None,
    found: Mapping[str, Factors],
) -> SearchPlan:
    """The search plan of one search or recovery stage.

    Parameters
    ----------
    shipped: see ``searcher.plan.search_plan``.
    found: stage -> factors, of the search stages that are finished.
    """
    stage = plan.stages[number]
    if stage.kind == RECOVER:
        return recovery_plan(stage.search, spec, found[str(stage.factors)], number, shipped)
    settings = stage.search
    if stage.factors is not None:
        seeds = rescaled_seeds(found[stage.factors], plan.stage(stage.factors).length, stage.length)
        settings = replace(settings, seed_factors={**settings.seed_factors, **seeds})
    return search_plan(settings, spec, shipped, number)


def check_searches(plan: ExtensionPlan, spec: RopeSpec) -> None:
    """Refuse, before the first stage is run, what ``stage_plan`` would refuse of a later one's settings.

    Raises
    ------
    LongRopeError
        Bounds, an attention factor or a critical pair that the model cannot be searched with: the message names the
        stage.
    """
    for stage in plan.of_kind(SEARCH):
        try:
            search_plan(stage.search, spec, None)
        except LongRopeError as error:
            raise LongRopeError(f"In the plan, stage {stage.name}: {error}") from error


def tuning_factors(stage: Stage, spec: RopeSpec, found: Mapping[str, Factors]) -> Factors:
    """The factors that a fine-tuning stage holds fixed: a stage's, or a baseline's at the stage's own scale."""
    source = str(stage.factors)
    return found[source] if source in found else BASELINES[source](spec, spec.scale(stage.length))


def attention_policy(stage: Stage, factors: Factors, spec: RopeSpec) -> str:
    """The policy that a stage's attention factor came by, or the number where it is no policy's."""
    if stage.kind == SEARCH:
        policy = stage.search.attention
        if attention_factor(policy, spec, spec.scale(stage.length)) == factors.attention_factor:
            return policy
    return repr(factors.attention_factor)
