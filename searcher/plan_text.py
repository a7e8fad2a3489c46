"""A plan as TOML: what ``plan_file`` reads as the same plan, every setting spelt out."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from searcher.errors import LongRopeError
from searcher.extension import EVALUATE, FINETUNE, MAIN, RECOVER, ExtensionPlan, Stage
from searcher.plan_file import COMPARE, TOKENS, parse_plan


def plan_text(plan: ExtensionPlan, original_length: int) -> str | None:
    """The plan as the text of a plan file; None where no file says the same, such as seeds that a program gave it."""
    tables: list[dict[str, Any]] = [{"name": plan.name}]
    compared: list[str] = []
    for stage in plan.stages:
        if stage.line == MAIN:
            tables.append(_table(stage))
        elif stage.line not in compared:
            if tables[-1].get("kind") == COMPARE:
                tables[-1]["methods"].append(stage.line)
            else:
                tables.append({"kind": COMPARE, "methods": [stage.line]})
            compared.append(stage.line)
    text = _lines(tables[0]) + "".join(f"\n[[stages]]\n{_lines(table)}" for table in tables[1:])
    try:
        same = parse_plan(tomllib.loads(text), plan.name, original_length) == plan
    except (LongRopeError, tomllib.TOMLDecodeError):
        return None
    return text if same else None


def _table(stage: Stage) -> dict[str, Any]:
    """A stage of the main line."""
    table: dict[str, Any] = {"kind": stage.kind, "name": stage.name}
    if stage.kind == EVALUATE:
        return table | asdict(stage.evaluation)
    table |= {"length": stage.length, "model": stage.model, "factors": stage.factors}
    table |= {"documents": dict(stage.documents), "windows": dict(stage.windows)}
    if stage.kind == FINETUNE:
        settings = stage.tuning.to_json()
        return table | {"outside": stage.outside, TOKENS: settings.pop("length")} | settings
    search = stage.search
    table |= {"preset": search.preset, "seed": search.seed}
    if stage.kind != RECOVER:
        table |= {"attention_factor": search.attention, "critical": search.critical}
    table |= {"n_hats": list(search.n_hats), "upper_ratio": search.upper_ratio, "finalists": search.finalists}
    table |= {"racing": search.racing is not None}
    table |= {"sampler": None if search.sampler is None else search.sampler.name}
    table |= {"evolution": asdict(search.evolution)}
    refinement = None if search.refinement is None else asdict(search.refinement)
    if search.refinement is not None and not search.refinement.gradients:  # of which nothing else may be said
        refinement = {"legs": 0, "final_legs": 0}
    return table | {"refinement": refinement}


def _lines(table: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in table.items() if value is not None and value != {})


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)
