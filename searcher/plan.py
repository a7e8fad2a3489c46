"""What a user asks of a search, as data that is stored with the study, and the plan it amounts to for a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from searcher.baselines import BASELINES, ramps
from searcher.critical import practical_pair
from searcher.descent import Refinement
from searcher.errors import LongRopeError
from searcher.evolution import Evolution
from searcher.racing import Racing
from searcher.rope import Factors, RopeSpec, attention_factor
from searcher.samplers import Sampler
from searcher.search import SearchPlan
from searcher.space import GRID, N_HATS, SearchSpace

# What the paper seeds with (section 3.2); the other presets start from every baseline there is.
PAPER_SEEDS = ("pi", "ntk", "yarn")
SHIPPED = "shipped"
# What the scaling that a model's own config states amounts to at a length, in tokens; None where it states none.
ShippedAt = Callable[[int], Factors | None]


@dataclass(frozen=True)
class Preset:
    """A search that somebody settled: the paper's, or ours. Fields as in ``SearchPlan``."""

    evolution: Evolution
    refinement: Refinement | None = None
    racing: Racing | None = None
    finalists: int = 8
    all_seeds_final: bool = True


MAX_LENGTH = 2**31
DEFAULT_PRESET = "refined"
PRESETS: dict[str, Preset] = {
    # Found by experiment (benchmarks/NOTES.md): the gradient does the work, evolution tries n_hat and what it missed.
    "refined": Preset(
        Evolution(
            population=1, parents=4, mutants=6, crosses=2, generations=2, mutation="lognormal", n_hat_trials=True
        ),
        Refinement(steps=30, legs=1, final_legs=1),
        Racing(),
        finalists=3,
        all_seeds_final=False,
    ),
    # Table 4 and appendix A: up to 256k, and above 512k with everything halved.
    "paper": Preset(Evolution()),
    "paper-xl": Preset(Evolution(population=32, parents=16, mutants=8, crosses=8)),
    # Evolution alone for small budgets: fewer parents, log-normal steps of every size.
    "quick": Preset(
        Evolution(population=32, parents=8, mutants=12, crosses=4, generations=11, mutation="lognormal"),
    ),
}


@dataclass(frozen=True)
class SearchSettings:
    """One search as its user described it.

    Attributes
    ----------
    target_length: L in tokens.
    preset: name in ``PRESETS`` that the other settings started from.
    evolution, refinement, racing, sampler: after all overrides; see ``SearchPlan``.
    seed: of all randomness.
    attention: policy or number; see ``rope.attention_factor``.
    upper_ratio: upper bound of a rescale factor, in units of s; None takes the space's own, 1.25 or LongRoPE2's 2.
    n_hats: choices of n_hat.
    finalists, all_seeds_final: who is re-scored on the selection set.
    seed_factors: name to rescale factors that join the seeds, from a file of the user's; n_hat beside them.
    critical: None for LongRoPE's space; ``auto`` or the index of the critical pair for LongRoPE2's.
    """

    target_length: int
    preset: str = "paper"
    evolution: Evolution = field(default_factory=Evolution)
    seed: int = 0
    attention: str = "su"
    upper_ratio: float | None = None
    n_hats: tuple[int, ...] = N_HATS
    finalists: int = 8
    seed_factors: Mapping[str, tuple[tuple[float, ...], int]] = field(default_factory=dict)
    refinement: Refinement | None = None
    racing: Racing | None = None
    sampler: Sampler | None = None
    all_seeds_final: bool = True
    critical: str | None = None

    def __post_init__(self) -> None:
        if self.sampler is not None and self.refinement is not None and self.refinement.legs:
            raise LongRopeError(
                "A sampler proposes from what it asked for itself, so with one a refinement comes at the end only; "
                "set its legs to 0 (--refine-legs 0), and final_legs (--refine-final-legs) for the end."
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``from_json`` gives an equal object back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SearchSettings:
        """The inverse of ``to_json``, also after lists came back for tuples, and of what earlier versions stored."""
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        values["evolution"] = Evolution(**data["evolution"])
        values["n_hats"] = tuple(data["n_hats"])
        values["seed_factors"] = {
            name: (tuple(lambdas), int(n_hat)) for name, (lambdas, n_hat) in data["seed_factors"].items()
        }
        if data.get("refinement") is not None:
            values["refinement"] = Refinement(**data["refinement"])
        if data.get("racing") is not None:
            values["racing"] = Racing(tuple(data["racing"]["after"]), data["racing"]["caution"])
        if data.get("sampler") is not None:
            values["sampler"] = Sampler(**data["sampler"])
        return cls(**values)


def preset(name: str) -> Preset:
    """A preset by name."""
    if name not in PRESETS:
        raise LongRopeError(f"The preset is one of {', '.join(PRESETS)}, not {name!r}.")
    return PRESETS[name]


def overridden(settings: Any, overrides: Mapping[str, object | None]) -> Any:
    """Settings of any kind with some fields replaced; None leaves a field as it is."""
    return replace(settings, **{key: value for key, value in overrides.items() if value is not None})


def settled(
    name: str,
    sampler: str | None,
    evolution: Mapping[str, Any],
    refinement: Mapping[str, Any],
    racing: bool | None,
    caution: float | None,
    finalists: int | None,
    **others: Any,
) -> SearchSettings:
    """A preset with what its user says otherwise; None leaves a field as the preset has it.

    Parameters
    ----------
    name: of the preset.
    sampler: name of one that proposes in evolution's place.
    evolution, refinement: overrides by field.
    racing: whether to race; ``caution`` as in ``Racing``.
    others: fields of ``SearchSettings`` that presets leave open.

    Raises
    ------
    LongRopeError
        Settings that exclude each other, or have nothing to settle.
    """
    # A sampler takes the counts of evolution in its place, and the default preset has little of that.
    chosen = preset("quick" if sampler is not None and name == DEFAULT_PRESET else name)
    evolved = overridden(chosen.evolution, evolution)
    refined, raced, proposer = chosen.refinement, chosen.racing, None
    if sampler is not None:
        batch = evolved.mutants + evolved.crosses
        proposer = Sampler(sampler, evolved.population, batch, evolved.generations)
        refined, raced = None, None
    asked = {key for key, value in refinement.items() if value is not None}
    if asked:
        refined = overridden(refined or Refinement(legs=int(sampler is None and "final_legs" not in asked)), refinement)
        if not refined.gradients and asked - {"legs", "final_legs"}:
            raise LongRopeError(
                f"{', '.join(sorted(asked - {'legs', 'final_legs'}))} are of a refinement, and this search has none; "
                "give it legs (--refine-legs), or with a sampler final_legs (--refine-final-legs)."
            )
    if racing is False and caution is not None:
        raise LongRopeError("--racing-caution is of racing, which --no-racing leaves out; give one of them.")
    if racing is not None or caution is not None:
        raced = None if racing is False else overridden(raced or Racing(), {"caution": caution})
    return SearchSettings(
        preset=name,
        evolution=evolved,
        refinement=refined,
        racing=raced,
        sampler=proposer,
        finalists=finalists or chosen.finalists,
        all_seeds_final=chosen.all_seeds_final,
        **others,
    )


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
    space = _space(settings, spec, scale)
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
        all_seeds_final=settings.all_seeds_final,
        stage=stage,
        frequencies=tuple(spec.inverse_frequencies().tolist()),
        sampler=settings.sampler,
        refinement=settings.refinement,
        racing=settings.racing,
        ramps=ramps(spec, scale) if settings.refinement is not None and settings.refinement.legs else {},
    )


def _space(settings: SearchSettings, spec: RopeSpec, scale: float) -> SearchSpace:
    if settings.critical is None:
        return SearchSpace.for_scale(
            spec.pairs, scale, 1.25 if settings.upper_ratio is None else settings.upper_ratio, settings.n_hats
        )
    critical = practical_pair(settings.critical, spec)
    return SearchSpace.for_critical(
        spec.pairs, scale, critical, settings.n_hats, 2.0 if settings.upper_ratio is None else settings.upper_ratio
    )


def checked_scale(spec: RopeSpec, target_length: int) -> float:
    """s, where the target is beyond the trained window."""
    check_target(target_length, spec.original_length)
    return spec.scale(target_length)


def check_target(target_length: int, original_length: int) -> None:
    """Refuse a target that is not beyond the trained window; both in tokens.

    Raises
    ------
    LongRopeError
        It is not.
    """
    if target_length <= original_length:
        raise LongRopeError(
            f"The target of {target_length} tokens is not above the trained window of {original_length}; "
            "give a longer --target, or the true window with --original-length."
        )


def parse_length(text: str, original_length: int) -> int:
    """A length in tokens from ``2048``, ``128k`` (times 1024), ``1M`` (times 1024^2) or ``8x`` (times L0)."""
    units = {"k": 1024, "m": 1024 * 1024, "x": original_length}
    number, unit = (text[:-1], units[text[-1].lower()]) if text and text[-1].lower() in units else (text, 1)
    try:
        length = float(number) * unit
    except ValueError:
        length = float("nan")
    if not (2 <= length <= MAX_LENGTH and length == int(length)):
        raise LongRopeError(
            f"A length is a whole number of tokens such as 2048, 128k, 1M or 8x, at most {MAX_LENGTH >> 20}M, not "
            f"{text!r}."
        )
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
