"""An extension is data: it comes back from JSON, refuses what cannot run, and says who serves which length."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searcher.baselines import BASELINES, pi, yarn
from searcher.errors import LongRopeError
from searcher.extension import BASE, FINETUNE, SEARCH, Evaluation, ExtensionPlan, Stage, check_lengths
from searcher.plan import PRESETS, SearchSettings
from searcher.plan_file import built_in, parse_plan, read_plan
from searcher.regimes import Place, costs, regimes, rows, serving
from searcher.rope import Factors, RopeSpec, attention_factor
from searcher.second import (
    TUNED,
    attention_policy,
    recovered,
    recovery_plan,
    rescaled_seeds,
    stage_plan,
    tuning_factors,
)
from searcher.space import GRID
from searcher.tuning import Tuning

SPEC = RopeSpec(10_000.0, 16, 256, 2)
PLAN = parse_plan(
    {
        "search": {"evolution": {"generations": 1}},
        "finetune": {"warmup": 0, "steps": 2, "batch": 2},
        "stages": [
            {"kind": "search", "length": "4x"},
            {"kind": "finetune", "length": "4x"},
            {"kind": "search", "length": "8x"},
            {"kind": "finetune", "length": "8x"},
            {"kind": "search", "length": "32x"},
            {"kind": "recover", "length": 256},
            {"kind": "recover", "length": 512},
            {"kind": "compare", "methods": ["none", "yarn"]},
            {"kind": "search", "name": "untuned-8x", "length": "8x", "model": "base"},
            {"kind": "evaluate", "lengths": ["0.5x", "1x", "2x", "4x", "8x", "16x", "32x", "64x"]},
        ],
    },
    "mine",
    SPEC.original_length,
)


def factors_of(top: float) -> Factors:
    """Some factors that nothing else has, the largest as given."""
    return Factors(tuple(1 + (top - 1) * pair / (SPEC.pairs - 1) for pair in range(SPEC.pairs)), 2, 1.125)


FOUND = {
    stage.name: factors_of(2.0 + number)
    for number, stage in enumerate(PLAN.stages)
    if stage.kind not in (FINETUNE, "evaluate")
}


@pytest.mark.parametrize("name", built_in())
def test_every_plan_that_ships_comes_back_from_json(name: str) -> None:
    plan = read_plan(name, 4096)
    assert ExtensionPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    check_lengths(plan, replace(SPEC, original_length=4096))


def test_the_papers_plan_has_the_papers_settings() -> None:
    plan = read_plan("longrope-llama2", 4096)
    shape = [(stage.kind, stage.length) for stage in plan.stages]
    k = 1024
    assert shape == [
        ("search", 128 * k),
        ("finetune", 128 * k),
        ("search", 256 * k),
        ("finetune", 256 * k),
        ("search", 2048 * k),
        ("recover", 4 * k),
        ("recover", 8 * k),
        ("evaluate", 2048 * k),
    ]
    first, second = plan.of_kind(FINETUNE)
    assert (first.tuning.steps, second.tuning.steps) == (400, 600)
    for stage in (first, second):
        tuning = stage.tuning
        assert (tuning.learning_rate, tuning.schedule, tuning.warmup, tuning.batch) == (2e-5, "linear", 20, 32)
    sizes = [(s.search.evolution.population, s.search.evolution.mutants) for s in plan.of_kind(SEARCH)]
    assert sizes == [(64, 16), (64, 16), (32, 8)]
    assert [s.documents["search"] for s in plan.of_kind(SEARCH)] == [5, 5, 3]
    assert all(stage.search.refinement is None for stage in plan.stages if stage.kind in (SEARCH, "recover"))
    assert second.model == first.name
    assert plan.of_kind(SEARCH)[2].model == second.name


def test_mistral_is_tuned_in_chunks_of_16k_under_the_factors_of_its_targets() -> None:
    plan = read_plan("longrope-mistral", 4096)
    for stage, length in zip(plan.of_kind(FINETUNE), (131072, 262144), strict=True):
        assert (stage.length, stage.tuning.length) == (length, 16384)
        assert (stage.tuning.steps, stage.tuning.learning_rate, stage.tuning.schedule) == (400, 1e-6, "constant")
        assert stage.tuning.batch == 64


def test_stages_work_on_the_last_tuned_model_and_what_it_was_tuned_at() -> None:
    by_name = {stage.name: stage for stage in PLAN.stages}
    assert by_name["search-1024"].model == BASE
    assert by_name["finetune-1024"].factors == "search-1024"
    assert (by_name["search-2048"].model, by_name["search-2048"].factors) == ("finetune-1024", "search-1024")
    assert (by_name["search-8192"].model, by_name["search-8192"].factors) == ("finetune-2048", "search-2048")
    assert (by_name["recover-256"].model, by_name["recover-256"].factors) == ("finetune-2048", "search-2048")
    assert (by_name["untuned-8x"].model, by_name["untuned-8x"].factors) == (BASE, None)


def test_a_comparison_is_the_same_tunings_in_a_row_under_other_factors() -> None:
    for method in ("none", "yarn"):
        first, second = PLAN.of_kind(FINETUNE, method)
        assert [first.settings, second.settings] == [stage.settings for stage in PLAN.of_kind(FINETUNE)]
        assert (first.model, second.model) == (BASE, first.name)
        for stage in (first, second):
            expected = BASELINES[method](SPEC, SPEC.scale(stage.length))
            assert tuning_factors(stage, SPEC, FOUND) == expected


def test_the_regimes_are_recovered_lengths_that_won_then_the_tuned_length_then_the_searches_beyond() -> None:
    assert regimes(PLAN, SPEC, FOUND, ()) == [
        Place(2048, "search-2048", FOUND["search-2048"]),
        Place(8192, "search-8192", FOUND["search-8192"]),
    ]
    sources = [(place.longest, place.source) for place in regimes(PLAN, SPEC, FOUND, ["recover-256", "recover-512"])]
    assert sources == [(256, "recover-256"), (512, "recover-512"), (2048, "search-2048"), (8192, "search-8192")]
    # The shorter one lost to the tuned factors, which go on serving there.
    sources = [(place.longest, place.source) for place in regimes(PLAN, SPEC, FOUND, ["recover-512"])]
    assert sources == [(256, "search-2048"), (512, "recover-512"), (2048, "search-2048"), (8192, "search-8192")]
    sources = [(place.longest, place.source) for place in regimes(PLAN, SPEC, FOUND, ["recover-256"])]
    assert sources == [(256, "recover-256"), (2048, "search-2048"), (8192, "search-8192")]


def test_a_model_tuned_under_a_baseline_is_served_by_it() -> None:
    stages = [{"kind": "finetune", "length": "8x", "factors": "yarn", "steps": 30}]
    plan = parse_plan({"stages": [*stages, {"kind": "search", "length": "16x"}]}, "p", 256)
    places = regimes(plan, SPEC, {"search-4096": FOUND["search-8192"]}, ())
    assert [(place.longest, place.source) for place in places] == [(2048, "yarn"), (4096, "search-4096")]
    assert places[0].factors == yarn(SPEC, 8)
    assert len(costs(plan, SPEC)) == 2


def test_a_plan_without_tuning_serves_what_was_searched_on_the_base() -> None:
    plan = ExtensionPlan("p", (PLAN.stages[0], PLAN.stage("untuned-8x")))
    assert [place.source for place in regimes(plan, SPEC, FOUND, ())] == ["search-1024", "untuned-8x"]


@given(st.lists(st.integers(1, 500), min_size=1, unique=True), st.integers(1, 600))
def test_the_regime_that_serves_is_the_shortest_that_reaches(lengths: list[int], length: int) -> None:
    places = [Place(n, str(n), factors_of(n + 1.0)) for n in sorted(lengths)]
    reaching = [n for n in sorted(lengths) if n >= length]
    found = serving(places, length)
    assert found == (factors_of(reaching[0] + 1.0) if reaching else None)


def test_the_rows_are_the_papers() -> None:
    evaluation = PLAN.stages[-1].evaluation
    table = {row.name: row for row in rows(PLAN, evaluation, SPEC, FOUND, ["recover-256"])}
    assert list(table) == [
        *("none", "none, attention su", "pi", "pi, attention su", "ntk", "ntk, attention su"),
        *("yarn", "yarn, attention su", "longrope, not tuned", "none, tuned", "yarn, tuned"),
        *("longrope, without recovery", "longrope"),
    ]
    shared = table["pi, attention su"].factors
    assert shared[128] == Factors((1.0,) * SPEC.pairs)
    assert shared[4096] == replace(pi(SPEC, 16), attention_factor=math.sqrt(1 + math.log(16) / math.log(256)))
    assert table["pi"].factors[4096] == pi(SPEC, 16)
    assert table["pi"].factors[128] == Factors((1.0,) * SPEC.pairs)
    untuned = table["longrope, not tuned"].factors
    assert untuned[256] == Factors((1.0,) * SPEC.pairs)
    assert untuned[512] == FOUND["search-1024"]
    assert untuned[2048] == FOUND["untuned-8x"]
    assert untuned[4096] is None
    tuned = table["yarn, tuned"]
    assert tuned.model == "finetune-2048-yarn"
    assert tuned.factors[128] == tuned.factors[2048] == yarn(SPEC, 8)
    assert tuned.factors[4096] == yarn(SPEC, 16)
    without, with_it = table["longrope, without recovery"].factors, table["longrope"].factors
    assert without[128] == without[256] == FOUND["search-2048"]
    assert with_it[128] == with_it[256] == FOUND["recover-256"]
    assert with_it[512] == FOUND["search-2048"]
    assert with_it[8192] == without[8192] == FOUND["search-8192"]
    assert with_it[16384] is None


def mixed(plan: ExtensionPlan) -> ExtensionPlan:
    """The plan with a share of short text in its fine-tunings."""
    stages = [
        replace(stage, settings=replace(stage.tuning, mixed_window=0.5)) if stage.kind == FINETUNE else stage
        for stage in plan.stages
    ]
    return replace(plan, stages=tuple(stages))


@pytest.mark.parametrize("shipped", [None, Factors((1.5,) * SPEC.pairs, 0, 1.25)])
def test_short_text_is_served_under_the_rotation_that_it_was_tuned_under(shipped: Factors | None) -> None:
    """LongRoPE2's mixed windows: the config's own rotation up to L0, for whatever line was tuned so."""
    plan, own = mixed(PLAN), shipped or Factors((1.0,) * SPEC.pairs)
    source = "shipped" if shipped else "none"
    searched = {name: factors for name, factors in FOUND.items() if not name.startswith("recover")}
    places = regimes(plan, SPEC, searched, (), lambda _length: shipped)
    assert [(place.longest, place.source) for place in places] == [
        *((256, source), (2048, "search-2048"), (8192, "search-8192"))
    ]
    assert places[0].factors == own
    # A recovery decides; where it lost, it lost to the tuned factors.
    places = regimes(plan, SPEC, FOUND, ["recover-256"], lambda _length: shipped)
    assert (places[0].longest, places[0].source) == (256, "recover-256")
    places = regimes(plan, SPEC, FOUND, ["recover-512"], lambda _length: shipped)
    assert [place.source for place in places] == ["search-2048", "recover-512", "search-2048", "search-8192"]
    table = {
        row.name: row.factors
        for row in rows(plan, plan.stages[-1].evaluation, SPEC, FOUND, ["recover-256"], lambda _length: shipped)
    }
    for name in ("none, tuned", "yarn, tuned", "longrope, without recovery"):
        assert table[name][128] == table[name][256] == own
    assert table["yarn, tuned"][512] == yarn(SPEC, 8)
    assert table["longrope"][256] == FOUND["recover-256"]


def test_a_models_own_scaling_is_a_row_and_serves_what_was_not_searched() -> None:
    def shipped_at(length: int) -> Factors | None:
        return Factors((1 + length / 256,) * SPEC.pairs)

    asked = PLAN.stages[-1].evaluation
    table = {row.name: row.factors for row in rows(PLAN, asked, SPEC, FOUND, ["recover-256"], shipped_at)}
    assert list(table)[8:10] == ["shipped", "longrope, not tuned"]
    assert table["shipped"] == {length: shipped_at(length) for length in asked.lengths}
    assert table["longrope, not tuned"][128] == shipped_at(128)
    assert table["longrope, not tuned"][512] == FOUND["search-1024"]
    assert table["yarn, tuned"][256] == yarn(SPEC, 8)  # no short text in this plan's tunings


def test_a_recovered_length_is_served_by_what_wins_on_the_selection_documents() -> None:
    losses = {"none": 2.1, "tuned": 2.0, "searched": 1.9, "none@study": 1.0, "searched_n_hat_0": 1.5}
    assert recovered(losses) == "searched"
    assert recovered({**losses, "none": 1.8}) == "none"
    assert recovered({**losses, "searched": 2.0}) == TUNED
    assert recovered({**losses, "searched": math.inf}) == TUNED
    assert recovered({**losses, "shipped_yarn": 1.7, "shipped_yarn@study": 1.0}) == "shipped_yarn"


def test_seeds_of_a_second_search_are_the_tuned_factors_as_they_are_and_rescaled() -> None:
    tuned = Factors((1.0, 1.5, 4.0, 8.0), 4)
    seeds = rescaled_seeds(tuned, 2048, 8192)
    assert {n_hat for _, n_hat in seeds.values()} == {4}
    assert seeds[TUNED][0] == tuned.lambdas
    assert seeds["tuned_times"][0] == (4.0, 6.0, 16.0, 32.0)
    power, _ = seeds["tuned_power"]
    assert power[0] == 1
    assert power[-1] == pytest.approx(32.0)
    assert power[2] == pytest.approx(4 ** (math.log(32) / math.log(8)))


def test_a_second_search_is_not_clamped_to_its_scale_but_bounded_by_its_space() -> None:
    number = next(i for i, stage in enumerate(PLAN.stages) if stage.name == "search-8192")
    found = {**FOUND, "search-2048": factors_of(8.0)}
    plan = stage_plan(PLAN, number, SPEC, None, found)
    assert plan.space.upper == 1.25 * 32 * GRID
    assert plan.seeds["tuned_times"].lambdas[-1] == 32
    assert plan.stage == number
    assert set(plan.seeds) >= {TUNED, "tuned_times", "tuned_power", "yarn"}


def test_a_recovery_searches_between_one_and_the_largest_tuned_factor() -> None:
    tuned = factors_of(7.123)
    plan = recovery_plan(SearchSettings(128, n_hats=(0, 4, 256)), SPEC, tuned, 5)
    assert (plan.space.lower, plan.space.upper) == (GRID, 713)
    assert plan.space.n_hats == (0, 4)
    assert plan.attention_factor == tuned.attention_factor
    assert plan.seeds[TUNED] == tuned
    assert plan.seeds["none"].lambdas == (1.0,) * SPEC.pairs
    assert plan.baselines == {"none": Factors((1.0,) * SPEC.pairs), TUNED: tuned}
    own = Factors((1.5,) * SPEC.pairs, 0, 1.25)
    scaled = recovery_plan(SearchSettings(128, n_hats=(0, 4, 256)), SPEC, tuned, 5, ("llama3", own))
    assert scaled.baselines == {**plan.baselines, "shipped_llama3": own}
    assert scaled.seeds == {**plan.seeds, "shipped_llama3": own}
    copies = [factors for name, factors in plan.seeds.items() if name.startswith("tuned^")]
    for larger, smaller in pairwise([tuned, *copies]):
        assert all(1 <= b <= a for a, b in zip(larger.lambdas, smaller.lambdas, strict=True))
        assert all(a <= b for a, b in pairwise(smaller.lambdas))


def test_costs_count_gradients_threefold_and_tuning_fourfold() -> None:
    table = {cost.name: cost for cost in costs(PLAN, SPEC)}
    assert [cost.name for cost in costs(PLAN, SPEC)] == [stage.name for stage in PLAN.stages]
    assert table["finetune-1024"].forwards == 4 * 2 * 2
    assert table["finetune-1024"].tokens == 4 * 2 * 2 * 1024
    search = stage_plan(PLAN, 0, SPEC, None, {})
    assert search.refinement is not None
    assert table["search-1024"].forwards == search.most_evaluations(5) + 2 * search.refinement.gradients


def test_an_attention_factor_that_was_learnt_is_named_by_its_number() -> None:
    stage = PLAN.stages[0]
    su = replace(factors_of(2.0), attention_factor=attention_factor("su", SPEC, 4))
    assert attention_policy(stage, su, SPEC) == "su"
    assert attention_policy(stage, factors_of(2.0), SPEC) == "1.125"
    assert attention_policy(PLAN.stage("recover-256"), factors_of(2.0), SPEC) == "1.125"


def test_a_smaller_bound_of_a_recovery_is_a_share_of_the_largest_tuned_factor() -> None:
    tuned = factors_of(7.123)
    half = recovery_plan(SearchSettings(128, upper_ratio=0.5), SPEC, tuned, 5)
    assert (half.space.lower, half.space.upper) == (GRID, 357)
    assert half.baselines[TUNED] == tuned
    assert recovery_plan(SearchSettings(128, upper_ratio=1.0), SPEC, tuned, 5).space.upper == 713
    assert recovery_plan(SearchSettings(128, upper_ratio=0.01), SPEC, tuned, 5).space.upper == GRID


def recovery(**values: object) -> SearchSettings:
    """The settings of a small plan's recovery."""
    return parse_plan(changed(2, **values), "mine", 256).stages[2].search


def test_a_recovery_learns_its_attention_factor_where_it_is_refined() -> None:
    assert recovery().refinement == replace(PRESETS["refined"].refinement, attention=True)  # type: ignore[type-var]
    chosen = recovery(refinement={"attention": False, "steps": 3}).refinement
    assert chosen == replace(PRESETS["refined"].refinement, attention=False, steps=3)  # type: ignore[type-var]
    assert recovery(preset="paper").refinement is None


def test_a_recovery_may_have_a_sampler_or_no_refinement() -> None:
    assert recovery(sampler="cmaes").refinement is None
    assert recovery(sampler="nsga2", length="2x").sampler is not None
    unrefined = recovery(refinement={"legs": 0, "final_legs": 0})
    assert unrefined.refinement is not None
    assert (unrefined.refinement.gradients, unrefined.refinement.attention) == (0, False)


def changed(number: int, **values: object) -> dict[str, object]:
    """A small plan with one stage changed."""
    stages: list[dict[str, object]] = [
        {"kind": "search", "length": "4x"},
        {"kind": "finetune", "length": "4x", "steps": 30},
        {"kind": "recover", "length": "1x"},
        {"kind": "evaluate", "lengths": ["1x"]},
    ]
    stages[number] = {key: value for key, value in {**stages[number], **values}.items() if value is not None}
    return {"stages": stages}


SEARCHED, SEARCHED_8X = ({"kind": "search", "length": length} for length in ("4x", "8x"))
TUNED_4X, TUNED_8X = ({"kind": "finetune", "length": length, "steps": 30} for length in ("4x", "8x"))
RECOVERED: dict[str, object] = {"kind": "recover", "length": "2x"}
COMPARED: dict[str, object] = {"kind": "compare", "methods": ["pi"]}


def in_order(*stages: Mapping[str, object]) -> dict[str, object]:
    """A plan of these stages."""
    return {"stages": list(stages)}


@pytest.mark.parametrize(
    "stages",
    [
        (SEARCHED, TUNED_4X, SEARCHED_8X, TUNED_8X, RECOVERED, COMPARED),
        (SEARCHED, TUNED_4X, COMPARED, SEARCHED_8X, RECOVERED),
    ],
)
def test_stages_in_an_order_that_serves_are_taken(stages: tuple[Mapping[str, object], ...]) -> None:
    assert parse_plan(in_order(*stages), "mine", 256).final_model() != BASE


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "needs its stages"),
        ({"stages": "search"}, "needs its stages"),
        ({"stages": [{"kind": "search", "length": "8x"}], "model": "x"}, "does not know 'model'"),
        ({"stages": [{"kind": "search", "length": "8x"}], "search": 3}, "is a table"),
        (changed(0, kind="explore"), "one of search, finetune, recover, evaluate, compare"),
        (changed(0, length=None), "a length is missing"),
        (changed(0, length="4y"), "whole number of tokens"),
        (changed(0, presets="quick"), "does not know 'presets'"),
        (changed(0, preset="best"), "one of refined, paper"),
        (changed(0, racing="yes"), "true or false"),
        (changed(2, attention_factor="none"), "does not know 'attention_factor'"),
        (changed(2, critical="auto"), "does not know 'critical'"),
        (changed(2, upper_ratio=1.25), "a share of the largest tuned factor"),
        (changed(2, upper_ratio=0), "a share of the largest tuned factor"),
        (changed(2, sampler="nsga2"), "take another sampler"),
        (changed(1, tokens="64x"), "at most as many tokens as its factors are for, 1024, not 16384"),
        (in_order(SEARCHED, TUNED_4X, RECOVERED, SEARCHED_8X, TUNED_8X), "after the last fine-tuning"),
        (in_order(SEARCHED, {**RECOVERED, "factors": "search-1024"}), "and none is tuned"),
        (in_order(SEARCHED, TUNED_4X, {**RECOVERED, "model": "base", "factors": "search-1024"}), "works on base"),
        (in_order(SEARCHED, TUNED_4X, SEARCHED_8X, {**RECOVERED, "length": "8x"}), "a length below the 1024"),
        (in_order(SEARCHED, TUNED_4X, {**RECOVERED, "length": "4x"}), "a length below the 1024"),
        (in_order(SEARCHED, SEARCHED_8X, TUNED_8X, {**RECOVERED, "factors": "search-1024"}), "leave factors out"),
        (in_order(SEARCHED, TUNED_4X, COMPARED, SEARCHED_8X, TUNED_8X), "but finetune-2048 comes after it"),
        (changed(0, documents={"search": "5"}), "a number from 1 by part"),
        (changed(0, documents={"tset": 5}), "a number from 1 by part"),
        (changed(0, windows={"test": 0}), "a number from 1 by part"),
        (changed(0, upper_ratio="x"), "upper_ratio is a number"),
        (changed(0, outside=True), "only a fine-tuning can be outside"),
        (changed(0, name="../elsewhere"), "A stage's name is a folder's"),
        (changed(0, name=""), "A stage's name is a folder's"),
        (changed(3, windows=0), "windows of an evaluation is a whole number"),
        (changed(3, passkey_trials="4"), "passkey_trials of an evaluation"),
        (changed(3, documents={"test": 3}), "does not know 'documents'"),
        (changed(0, evolution={"size": 3}), "size"),
        (changed(0, name="base"), "give it a name"),
        (changed(0, model="search-1024"), "a fine-tuning stage before it"),
        (changed(1, name="search-1024"), "Two stages"),
        (changed(1, steps=None), "steps"),
        (changed(1, rate=1e-4), "does not know 'rate'"),
        (changed(1, learning_rate=-1.0), "learning_rate"),
        (changed(1, factors="best"), "a search stage before it or one of"),
        (changed(2, factors="finetune-1024"), "a search stage before it"),
        (changed(3, lengths=None), "lengths are missing"),
        (changed(3, lengths=["0.001x"]), "whole number of tokens"),
        (changed(3, baselines=["xpos"]), "one of none, pi"),
        (changed(3, depths=3), "does not know 'depths'"),
        ({"stages": [{"kind": "evaluate", "lengths": ["1x"], "name": name} for name in "ab"]}, "more than once"),
        ({"stages": [{"kind": "compare", "methods": ["pi"]}]}, "needs both"),
        ({"stages": [*changed(0)["stages"][:2], {"kind": "compare"}]}, "needs both"),  # type: ignore[index]
        ({"stages": [{"kind": "search", "length": "8x"}], "name": ""}, "name of a plan"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(LongRopeError, match=message):
        parse_plan(data, "mine", 256)


def test_a_plan_that_is_not_there_or_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LongRopeError, match="longrope-llama2"):
        read_plan("no-such-plan", 256)
    broken = tmp_path / "broken.toml"
    broken.write_text("stages = [")
    with pytest.raises(LongRopeError, match="is not TOML"):
        read_plan(str(broken), 256)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(LongRopeError, match="is not TOML"):
        read_plan(str(broken), 256)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"kind": "search", "length": "1x"}], "within the trained window"),
        (
            [
                {"kind": "finetune", "length": "8x", "factors": "pi", "steps": 30},
                {"kind": "finetune", "length": "4x", "factors": "yarn", "steps": 30},
            ],
            "from shorter to longer",
        ),
        (
            [{"kind": "search", "length": "4x"}, {"kind": "finetune", "length": "8x", "steps": 30}],
            "search at its length first",
        ),
    ],
)
def test_lengths_that_make_no_sense_for_a_model_are_refused(stages: list[dict[str, object]], message: str) -> None:
    with pytest.raises(LongRopeError, match=message):
        check_lengths(parse_plan({"stages": stages}, "mine", 256), SPEC)


def test_a_seed_for_all_stages_leaves_the_rest_as_it_was() -> None:
    plan = read_plan("reference", 256, seed=7)
    before = read_plan("reference", 256)
    for stage, old in zip(plan.stages, before.stages, strict=True):
        if isinstance(stage.settings, SearchSettings | Tuning):
            assert stage.settings.seed == 7
            assert replace(stage.settings, seed=0) == old.settings
        else:
            assert stage == old


def test_evaluations_refuse_lengths_out_of_order() -> None:
    with pytest.raises(LongRopeError, match="ascending"):
        Evaluation((512, 256))


def test_a_stage_knows_its_settings() -> None:
    stage = PLAN.stages[0]
    assert stage.search is stage.settings
    with pytest.raises(AssertionError):
        _ = stage.tuning
    assert isinstance(PLAN.stages[1], Stage)
