"""What a user asks of a search comes back from its JSON, and amounts to the plan that the field states."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace

import pytest

from searcher.baselines import BASELINES, ntk, pi, yarn
from searcher.critical import critical_pair
from searcher.descent import Refinement
from searcher.errors import LongRopeError
from searcher.evolution import Evolution
from searcher.plan import (
    DEFAULT_PRESET,
    PRESETS,
    SearchSettings,
    checked_scale,
    cut_seeds,
    overridden,
    parse_choices,
    parse_length,
    preset,
    search_plan,
)
from searcher.racing import Racing
from searcher.rope import Factors, RopeSpec
from searcher.samplers import Sampler
from searcher.space import N_HATS

SPEC = RopeSpec(10_000.0, 16, 256, 2)
PAPER = SearchSettings(2048)
EVERYTHING = SearchSettings(
    4096,
    "refined",
    Evolution(population=5, mutation="lognormal", n_hat_trials=True),
    seed=3,
    attention="1.25",
    upper_ratio=1.5,
    n_hats=(0, 4),
    finalists=2,
    seed_factors={"mine": (tuple(1.0 + i / 3 for i in range(8)), 4)},
    refinement=Refinement(steps=7, legs=0, final_legs=2, attention=True, rate=0.1 + 0.2),
    racing=Racing((1, 3), 1 / 3),
    sampler=Sampler("nsga2", batch=9),
    all_seeds_final=False,
    critical="auto",
)


class TestSettings:
    @pytest.mark.parametrize("settings", [PAPER, EVERYTHING])
    def test_come_back_from_json_to_the_last_bit(self, settings: SearchSettings) -> None:
        data = json.loads(json.dumps(settings.to_json()))
        assert SearchSettings.from_json(data) == settings
        assert isinstance(SearchSettings.from_json(data).n_hats, tuple)
        assert data.keys() == {field.name for field in fields(SearchSettings)}

    def test_what_an_earlier_version_stored_is_still_read(self) -> None:
        """Without what there was no choice of then: no refinement, no racing, no sampler, all seeds final."""
        new = ("refinement", "racing", "sampler", "all_seeds_final", "critical")
        data = json.loads(json.dumps({key: value for key, value in PAPER.to_json().items() if key not in new}))
        del data["evolution"]["n_hat_trials"]
        assert SearchSettings.from_json(data) == PAPER
        assert (PAPER.refinement, PAPER.racing, PAPER.sampler, PAPER.all_seeds_final) == (None, None, None, True)

    def test_a_sampler_beside_a_refinement_of_the_seeds_is_refused(self) -> None:
        with pytest.raises(LongRopeError, match="--refine-legs 0"):
            replace(EVERYTHING, refinement=Refinement(legs=1))
        assert replace(EVERYTHING, refinement=None).sampler is not None

    def test_overrides_leave_what_is_none_as_it_is(self) -> None:
        changed = overridden(Evolution(), {"population": 3, "mutants": None, "generations": 0})
        assert changed == Evolution(population=3, generations=0)


class TestPresets:
    def test_the_papers_are_its_table_4(self) -> None:
        for name, halved in (("paper", 1), ("paper-xl", 2)):
            assert asdict(preset(name).evolution) == {
                "population": 64 // halved,
                "parents": 32 // halved,
                "mutants": 16 // halved,
                "crosses": 16 // halved,
                "generations": 40,
                "probability": 0.3,
                "mutation": "neighbours",
                "n_hat_trials": False,
            }
            assert (preset(name).refinement, preset(name).racing, preset(name).all_seeds_final) == (None, None, True)

    def test_the_default_refines_tries_n_hat_and_races(self) -> None:
        default = PRESETS[DEFAULT_PRESET]
        assert default.refinement is not None
        assert default.refinement.gradients > 0
        assert default.racing is not None
        assert default.evolution.n_hat_trials

    def test_an_unknown_one_is_named_beside_those_there_are(self) -> None:
        with pytest.raises(LongRopeError, match="refined, paper, paper-xl, quick, not 'fast'"):
            preset("fast")


class TestPlans:
    def test_the_paper_starts_from_its_three_seeds_and_is_held_against_all_baselines(self) -> None:
        plan = search_plan(PAPER, SPEC, None)
        assert plan.seeds == {"pi": pi(SPEC, 8.0), "ntk": ntk(SPEC, 8.0), "yarn": yarn(SPEC, 8.0)}
        assert plan.baselines == {name: make(SPEC, 8.0) for name, make in BASELINES.items()}
        assert (plan.space.lower, plan.space.upper, plan.space.n_hats) == (100, 1000, N_HATS)
        assert plan.space.critical == 0
        assert plan.attention_factor == pytest.approx(math.sqrt(1 + math.log(8) / math.log(256)))

    def test_other_presets_start_from_every_baseline_and_the_users_factors(self) -> None:
        plan = search_plan(replace(EVERYTHING, critical=None), SPEC, None, stage=2)
        mine, n_hat = EVERYTHING.seed_factors["mine"]
        assert plan.seeds == {**plan.baselines, "mine": Factors(mine, n_hat)}
        assert "mine" not in plan.baselines
        assert (plan.space.upper, plan.space.n_hats, plan.attention_factor) == (2400, (0, 4), 1.25)
        assert (plan.seed, plan.stage, plan.finalists, plan.all_seeds_final) == (3, 2, 2, False)
        assert (plan.refinement, plan.racing, plan.sampler) == (
            EVERYTHING.refinement,
            EVERYTHING.racing,
            EVERYTHING.sampler,
        )
        assert list(plan.frequencies) == SPEC.inverse_frequencies().tolist()

    @pytest.mark.parametrize("settings", [PAPER, EVERYTHING])
    def test_a_scaling_that_the_model_ships_with_is_a_seed_and_a_row(self, settings: SearchSettings) -> None:
        shipped = Factors((1.0,) * 4 + (9.0,) * 4, 0, 1.1)
        plan = search_plan(settings, SPEC, ("llama3", shipped))
        assert plan.seeds["shipped_llama3"] == plan.baselines["shipped_llama3"] == shipped

    def test_a_critical_pair_searches_longrope2s_space(self) -> None:
        auto = search_plan(replace(PAPER, critical="auto"), SPEC, None).space
        assert auto.critical == critical_pair(SPEC)
        stated = search_plan(replace(PAPER, critical="3", upper_ratio=4.0), SPEC, None).space
        assert (auto.lower, auto.upper) == (800, 1600)
        assert (stated.critical, stated.lower, stated.upper) == (3, 800, 3200)
        with pytest.raises(LongRopeError, match="whole number from 0 to 7"):
            search_plan(replace(PAPER, critical="8"), SPEC, None)

    def test_seeds_beyond_the_bound_are_named(self) -> None:
        far = {"near": ((1.0,) * 7 + (10.0,), 0), "far": ((1.0,) * 7 + (10.02,), 0)}
        assert cut_seeds(search_plan(replace(PAPER, seed_factors=far), SPEC, None)) == ["far"]

    def test_factors_of_another_model_are_refused(self) -> None:
        with pytest.raises(LongRopeError, match="'mine' have 8 values; the model rotates 4 pairs"):
            search_plan(replace(EVERYTHING, critical=None), RopeSpec(1e4, 8, 256, 2), None)

    @pytest.mark.parametrize("length", [256, 100])
    def test_a_target_within_the_window_is_refused(self, length: int) -> None:
        with pytest.raises(LongRopeError, match=f"{length} tokens is not above the trained window of 256"):
            search_plan(replace(PAPER, target_length=length), SPEC, None)
        assert checked_scale(SPEC, 257) == 257 / 256


@pytest.mark.parametrize(
    ("text", "length"),
    [("2048", 2048), ("128k", 131072), ("1M", 1048576), ("1.5K", 1536), ("8x", 2048), ("0.5m", 524288), ("1e3", 1000)],
)
def test_a_length_is_read(text: str, length: int) -> None:
    assert parse_length(text, 256) == length


@pytest.mark.parametrize("text", ["", "k", "1.5", "-8x", "1", "inf", "nan", "1infk", "0x", "twelve", "1e400"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(LongRopeError, match="whole number of tokens"):
        parse_length(text, 256)


def test_choices_of_n_hat_are_read() -> None:
    assert parse_choices("16, 0,4,4") == (0, 4, 16)
    for text in ("", "0,,4", "0;4", "1.5"):
        with pytest.raises(LongRopeError, match="whole numbers with commas"):
            parse_choices(text)
