"""What to type to make a study again, from what the store keeps of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from searcher.errors import LongRopeError
from searcher.extension import FINETUNE, SEARCH, ExtensionPlan
from searcher.plan import DEFAULT_PRESET, SearchSettings, settled
from searcher.plan_file import built_in, read_plan
from searcher.plan_text import plan_text
from searcher.space import N_HATS
from storage.repository import StudyRecord

AGAIN = "sqlite:///again.db"  # a store of its own: the study's own one has all its values, and its name
PLAN = "plan.toml"
EVOLUTION = {
    "population": "--population",
    "parents": "--parents",
    "mutants": "--mutants",
    "crosses": "--crosses",
    "generations": "--generations",
    "probability": "--mutation-probability",
    "mutation": "--mutation",
}
REFINEMENT = {
    "legs": "--refine-legs",
    "final_legs": "--refine-final-legs",
    "steps": "--refine-steps",
    "starts": "--refine-starts",
    "rate": "--refine-rate",
}
MODEL = ("dtype", "attention", "sliding_window", "original_length", "chunk", "threads")
FLAGS = ("hidden_on_host", "stream_weights", "trust_remote_code")
USUAL = {"dtype": "auto", "attention": "auto", "threads": 1}


@dataclass(frozen=True)
class Again:
    """How to make a study again.

    Attributes
    ----------
    commands: lines for a shell.
    remarks: what these do not hold, a sentence each.
    plan_file: text of PLAN, where a command names it.
    """

    commands: tuple[str, ...]
    remarks: tuple[str, ...]
    plan_file: str | None = None


def again(record: StudyRecord) -> Again:
    """The command that makes a study again, and what it cannot say."""
    settings = record.settings
    arguments, remarks, plan_file = (_extend if record.kind == "extension" else _launch)(settings)
    arguments += _model(settings["model"], bool(settings["corpus"]["sources"]))
    arguments += _corpus(settings["corpus"])
    arguments += _pool(settings["pool"], remarks)
    arguments += ["--study", record.name, "--storage", AGAIN]
    shown = ["longrope", "extend" if record.kind == "extension" else "launch", *arguments]
    remarks.append(
        f"It computes everything anew, into {AGAIN}. On the same hardware and software the factor file has the same "
        "bytes, for any number of workers."
    )
    return Again((shlex.join(shown),), tuple(remarks), plan_file)


def _launch(settings: Mapping[str, Any]) -> tuple[list[str], list[str], str | None]:
    search = SearchSettings.from_json(settings["search"])
    arguments = ["--target", str(search.target_length)]
    if search.preset != DEFAULT_PRESET:
        arguments += ["--preset", search.preset]
    if search.seed:
        arguments += ["--seed", str(search.seed)]
    sampler = None if search.sampler is None else search.sampler.name
    usual = settled(search.preset, sampler, {}, {}, None, None, None, target_length=search.target_length)
    evolution = _unlike(search.evolution, usual.evolution, EVOLUTION)
    refinement, racing, caution = _refinement(search, usual), None, None
    if search.racing != usual.racing:
        racing = search.racing is not None
        caution = search.racing.caution if search.racing is not None else None
    given: dict[str, Any] = {
        "seed": search.seed,
        "attention": search.attention,
        "upper_ratio": search.upper_ratio,
        "n_hats": search.n_hats,
        "critical": search.critical,
        "seed_factors": search.seed_factors,
        "target_length": search.target_length,
    }
    finalists = search.finalists if search.finalists != usual.finalists else None
    others = _options({"--sampler": sampler, "--finalists": finalists, "--critical-pair": search.critical})
    others += _options({EVOLUTION[name]: value for name, value in evolution.items()})
    others += _options({REFINEMENT[name]: value for name, value in refinement.items() if name in REFINEMENT})
    others += ["--learn-attention"] if refinement.get("attention") else []
    others += [] if racing is None else ["--racing" if racing else "--no-racing"]
    others += _options({"--racing-caution": caution, "--upper-ratio": search.upper_ratio})
    others += ["--n-hats", ",".join(map(str, search.n_hats))] if search.n_hats != N_HATS else []
    others += ["--attention-factor", search.attention] if search.attention != "su" else []
    remarks = []
    if search.seed_factors:
        names = ", ".join(search.seed_factors)
        remarks.append(f"Factors of files were among the seeds ({names}): name those files with --seed-factors.")
    try:
        rebuilt = settled(search.preset, sampler, evolution, refinement, racing, caution, finalists, **given)
    except LongRopeError:
        rebuilt = usual
    if rebuilt != search:
        unlike = [f.name for f in fields(SearchSettings) if getattr(rebuilt, f.name) != getattr(search, f.name)]
        remarks.append(f"No option of this version says what the study had as {', '.join(unlike)}.")
    return arguments + others, remarks, None


def _refinement(search: SearchSettings, usual: SearchSettings) -> dict[str, Any]:
    """What a search refines otherwise than usual, by field."""
    if search.refinement is None:
        return {} if usual.refinement is None else {"legs": 0, "final_legs": 0}
    if usual.refinement is None:  # all that a refinement has, since there is nothing it differs from
        return {name: getattr(search.refinement, name) for name in REFINEMENT} | (
            {"attention": True} if search.refinement.attention else {}
        )
    return _unlike(search.refinement, usual.refinement, (*REFINEMENT, "attention"))


def _unlike(found: Any, usual: Any, names: Any) -> dict[str, Any]:
    return {name: getattr(found, name) for name in names if getattr(found, name) != getattr(usual, name)}


def _options(values: Mapping[str, object | None]) -> list[str]:
    return [part for name, value in values.items() if value is not None for part in (name, str(value))]


def _extend(settings: Mapping[str, Any]) -> tuple[list[str], list[str], str | None]:
    plan = ExtensionPlan.from_json(settings["plan"])
    original = int(settings["identity"]["original_length"])
    where, remarks, text = _built_in(plan, original), [], None
    if where is None:
        where, text = [PLAN], plan_text(plan, original)
        if text is None:
            where = []
            remarks.append("The plan holds what no plan file of this version says; its settings are below.")
    arguments = [*where, *(part for source in settings["train"] for part in ("--train-data", source))]
    if any(stage.kind == FINETUNE for stage in plan.stages):
        arguments += ["--tuning-threads", str(settings["threads"])]
    return arguments, remarks, text


def _built_in(plan: ExtensionPlan, original_length: int) -> list[str] | None:
    """How to name a plan that comes with the program; None where it is none of them."""
    seeds = [stage.search.seed for stage in plan.stages if stage.kind == SEARCH]
    for name in built_in():
        for seed in (None, *seeds[:1]):
            try:
                found = read_plan(name, original_length, seed)
            except LongRopeError:
                continue
            if found == plan:
                return [name, *_options({"--seed": seed})]
    return None


def _model(model: Mapping[str, Any], has_text: bool) -> list[str]:
    # Only the reference model is searched without naming text, and it lies elsewhere in another installation.
    arguments = ["--model", model["path"]] if has_text else []
    values = {f"--{name.replace('_', '-')}": model.get(name) for name in MODEL if model.get(name) != USUAL.get(name)}
    arguments += _options(values)
    return arguments + [f"--{name.replace('_', '-')}" for name in FLAGS if model.get(name)]


def _corpus(corpus: Mapping[str, Any]) -> list[str]:
    arguments: list[str] = []
    for option, name in (("--data", "sources"), ("--selection-data", "selection"), ("--test-data", "test")):
        arguments += [part for source in corpus[name] for part in (option, source)]
    if corpus["text_column"] != "text":
        arguments += ["--text-column", corpus["text_column"]]
    if corpus["seed"]:
        arguments += ["--data-seed", str(corpus["seed"])]
    arguments += _options({f"--{part}-documents": count for part, count in corpus["documents"].items()})
    if corpus["windows"]:
        arguments += ["--windows", ",".join(f"{part}={count}" for part, count in corpus["windows"].items())]
    if corpus.get("needles"):
        arguments += ["--needles", str(corpus["needles"])]
    return arguments


def _pool(pool: Mapping[str, Any] | None, remarks: list[str]) -> list[str]:
    if pool is None:
        return ["--in-process"]
    if pool.get("ray_address"):
        remarks.append("It ran on a Ray cluster: name yours with --ray-address.")
    return _options({"--workers": pool.get("workers"), "--gpus-per-worker": pool.get("gpus_per_worker")})
