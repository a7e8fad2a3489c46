"""What a user asks of a search, as data that is stored with the study, and the plan it amounts to for a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from searcher.baselines import BASELINES
from searcher.errors import LongRopeError
from searcher.evolution import PRESETS, Evolution
from searcher.rope import Factors, RopeSpec, attention_factor
from searcher.space import GRID, N_HATS, SearchSpace
from searcher.study import SearchPlan

# What the paper seeds with (section 3.2); the other presets start from every baseline there is.
PAPER_SEEDS = ("pi", "ntk", "yarn")
SHIPPED = "shipped"


@dataclass(frozen=True)
class SearchSettings:
    """One search as its user described it.

    Attributes
    ----------
    target_length: L in tokens.
    preset: name in ``evolution.PRESETS`` that the other settings started from.
    evolution: the algorithm's settings after all overrides.
    seed: of all randomness.
    attention: policy or number; see ``rope.attention_factor``.
    upper_ratio: upper bound of a rescale factor, in units of s.
    n_hats: choices of n_hat.
    finalists: how many of the best are re-scored on the selection set.
    seed_factors: name to rescale factors that join the seeds, from a file of the user's; n_hat beside them.
    """

    target_length: int
    preset: str = "paper"
    evolution: Evolution = field(default_factory=Evolution)
    seed: int = 0
    attention: str = "su"
    upper_ratio: float = 1.25
    n_hats: tuple[int, ...] = N_HATS
    finalists: int = 8
    seed_factors: Mapping[str, tuple[tuple[float, ...], int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``from_json`` gives an equal object back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SearchSettings:
        """The inverse of ``to_json``, also after lists came back for tuples."""
        values = {f.name: data[f.name] for f in fields(cls)}
        values["evolution"] = Evolution(**data["evolution"])
        values["n_hats"] = tuple(data["n_hats"])
        values["seed_factors"] = {
            name: (tuple(lambdas), int(n_hat)) for name, (lambdas, n_hat) in data["seed_factors"].items()
        }
        return cls(**values)


def preset(name: str, overrides: Mapping[str, object | None]) -> Evolution:
    """A preset with some of its fields replaced; None leaves a field as it is."""
    if name not in PRESETS:
        raise LongRopeError(f"The preset is one of {', '.join(PRESETS)}, not {name!r}.")
    given: dict[str, Any] = {key: value for key, value in overrides.items() if value is not None}
    return replace(PRESETS[name], **given)


def default_preset(target_length: int) -> str:
    """The paper's settings by length: population, mutants and crosses halve above 512k tokens."""
    return "paper-xl" if target_length > 512 * 1024 else "paper"


def cut_seeds(plan: SearchPlan) -> list[str]:
    """Names of the seeds that reach beyond the space's upper bound, and were cut to it."""
    return [name for name, factors in plan.seeds.items() if max(factors.by_layer()[0]) * GRID > plan.space.upper + 0.5]


def search_plan(
    settings: SearchSettings, spec: RopeSpec, shipped: tuple[str, Factors] | None, stage: int = 0
) -> SearchPlan:
    """The plan for a model.

    Parameters
    ----------
    shipped: name of the RoPE scaling the model's own config applies, and its factors at the target length; a seed
        and a row.

    Raises
    ------
    LongRopeError
        The target does not exceed the trained window, or seed factors are of another length.
    """
    scale = checked_scale(spec, settings.target_length)
    space = SearchSpace.for_scale(spec.pairs, scale, settings.upper_ratio, settings.n_hats)
    baselines = {name: make(spec, scale) for name, make in BASELINES.items()}
    if shipped is not None:
        baselines[f"{SHIPPED}_{shipped[0]}"] = shipped[1]
    seeds = {
        name: factors
        for name, factors in baselines.items()
        if name in PAPER_SEEDS or name.startswith(SHIPPED) or not settings.preset.startswith("paper")
    }
    for name, (lambdas, n_hat) in settings.seed_factors.items():
        if len(lambdas) != spec.pairs:
            raise LongRopeError(
                f"Seed factors {name!r} have {len(lambdas)} values; the model rotates {spec.pairs} pairs."
            )
        seeds[name] = Factors(tuple(lambdas), n_hat)
    return SearchPlan(
        evolution=settings.evolution,
        space=space,
        attention_factor=attention_factor(settings.attention, spec, scale),
        seeds=seeds,
        baselines=baselines,
        seed=settings.seed,
        finalists=settings.finalists,
        stage=stage,
    )


def checked_scale(spec: RopeSpec, target_length: int) -> float:
    """s, where the target is beyond the trained window."""
    if target_length <= spec.original_length:
        raise LongRopeError(
            f"The target of {target_length} tokens is not above the trained window of {spec.original_length}; "
            "give a longer --target, or the true window with --original-length."
        )
    return spec.scale(target_length)


def parse_length(text: str, original_length: int) -> int:
    """A length in tokens from ``2048``, ``128k`` (times 1024), ``1M`` (times 1024^2) or ``8x`` (times L0)."""
    units = {"k": 1024, "m": 1024 * 1024, "x": original_length}
    number, unit = (text[:-1], units[text[-1].lower()]) if text and text[-1].lower() in units else (text, 1)
    try:
        length = float(number) * unit
    except ValueError:
        length = float("nan")
    if not (math.isfinite(length) and length >= 2 and length == int(length)):
        raise LongRopeError(f"A length is a whole number of tokens such as 2048, 128k, 1M or 8x, not {text!r}.")
    return int(length)


def parse_choices(text: str) -> tuple[int, ...]:
    """Choices of n_hat from ``0,4,16``: ascending, distinct."""
    try:
        values: Sequence[int] = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise LongRopeError(
            f"n_hat choices are whole numbers with commas between, such as 0,4,16, not {text!r}."
        ) from error
    return tuple(values)
