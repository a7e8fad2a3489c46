"""A plan as text reads back as the same plan."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from typing import Any

import pytest

from searcher.extension import ExtensionPlan
from searcher.plan_file import built_in, parse_plan, read_plan
from searcher.plan_text import plan_text

WINDOW = 256


def again(plan: ExtensionPlan) -> ExtensionPlan:
    text = plan_text(plan, WINDOW)
    assert text is not None
    return parse_plan(tomllib.loads(text), "from its file's name", WINDOW)


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("name", built_in())
def test_the_plans_that_come_with_the_program_read_back(name: str, seed: int | None) -> None:
    window = 4096 if name.startswith("longrope") else WINDOW
    plan = read_plan(name, window, seed)
    text = plan_text(plan, window)
    assert text is not None
    assert parse_plan(tomllib.loads(text), "other", window) == plan


def test_what_a_file_can_say_is_said() -> None:
    data: dict[str, Any] = {
        "name": 'a "name"\\ with quotes, ümläute and \N{SNOWMAN}',
        "stages": [
            {"kind": "search", "length": "8x", "preset": "paper", "seed": 3, "upper_ratio": 1.5, "n_hats": [0, 4]},
            {"kind": "finetune", "length": "8x", "tokens": 512, "steps": 3, "warmup": 1, "outside": True},
            {"kind": "search", "length": "16x", "name": "far", "preset": "quick", "sampler": "cmaes", "racing": True},
            {"kind": "finetune", "length": "16x", "steps": 3, "warmup": 0, "lora_rank": 4, "fsdp": {"a": [1, 2.5]}},
            {"kind": "compare", "methods": ["pi", "yarn"]},
            {"kind": "recover", "length": "1x", "documents": {"search": 2}, "windows": {"test": 3}},
            {"kind": "recover", "length": "2x", "upper_ratio": 0.5, "refinement": {"legs": 0, "final_legs": 0}},
            {"kind": "recover", "length": "4x", "sampler": "cmaes"},
            {"kind": "evaluate", "lengths": [128, 2048], "baselines": ["none"]},
        ],
    }
    plan = parse_plan(data, "x", WINDOW)
    assert again(plan) == plan
    assert [stage.line for stage in again(plan).stages].count("pi") == 2


def test_what_no_file_can_say_has_no_text() -> None:
    plan = read_plan("smoke", WINDOW)
    stage = plan.stages[0]
    seeded = replace(stage, settings=replace(stage.search, seed_factors={"mine": ((1.0, 2.0), 0)}))
    assert plan_text(replace(plan, stages=(seeded, *plan.stages[1:])), WINDOW) is None
