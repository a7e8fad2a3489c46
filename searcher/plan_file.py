"""Plan files: a progressive extension as TOML, and the plans that come with the program.

    name = "mine"

    [search]                     # for every search stage; likewise [finetune], [recover], [evaluate]
    preset = "refined"

    [[stages]]
    kind = "search"              # search, finetune, recover, evaluate, or compare
    length = "8x"                # tokens, 128k, 1M, or times the trained window

A stage without ``model`` works on the last fine-tuning before it, a fine-tuning without ``factors`` holds those of the
last search, and a search or recovery starts from what its model was tuned at. ``compare`` stands for the same
fine-tunings again under other factors.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from searcher.errors import LongRopeError
from searcher.extension import BASE, EVALUATE, FINETUNE, KINDS, MAIN, RECOVER, SEARCH, Evaluation, ExtensionPlan, Stage
from searcher.plan import DEFAULT_PRESET, SearchSettings, parse_length, preset, settled
from searcher.space import N_HATS
from searcher.study import PARTS, REFINE
from searcher.tuning import Tuning

BUILT_IN = Path(__file__).parent / "plans"
COMPARE = "compare"
TOKENS = "tokens"  # of a chunk
STAGE_KEYS = ("kind", "name", "length", "model", "factors", "documents", "windows", "outside")
EVALUATE_KEYS = ("kind", "name")
SEARCH_KEYS = (
    *("preset", "seed", "attention_factor", "n_hats", "upper_ratio", "finalists", "sampler", "racing", "critical"),
    *("evolution", "refinement"),
)
TOP_KEYS = ("name", "stages", *KINDS)


def built_in() -> list[str]:
    """Names of the plans that come with the program."""
    return sorted(path.stem for path in BUILT_IN.glob("*.toml"))


def read_plan(where: str, original_length: int, seed: int | None = None) -> ExtensionPlan:
    """A plan by its file's path, or by the name of one that comes with the program.

    Parameters
    ----------
    original_length: L0, which relative lengths are multiples of.
    seed: of all stages, in place of the file's.

    Raises
    ------
    LongRopeError
        No such plan, not TOML, or a stage that is not valid: the message names it.
    """
    path = Path(where)
    if not path.suffix and not path.is_file():
        path = BUILT_IN / f"{where}.toml"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LongRopeError(
            f"There is no plan {where}: give a TOML file, or one of {', '.join(built_in())} ({error.strerror})."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LongRopeError(f"The plan {where} is not TOML: {error}.") from error
    return parse_plan(data, path.stem, original_length, seed)


def parse_plan(data: Mapping[str, Any], name: str, original_length: int, seed: int | None = None) -> ExtensionPlan:
    """A plan from its TOML tables. Arguments and errors as for ``read_plan``."""
    _known(data, TOP_KEYS, "The plan")
    tables = data.get("stages")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise LongRopeError("A plan needs its stages, one [[stages]] table each.")
    stages: list[Stage] = []
    for number, given in enumerate(tables):
        kind = given.get("kind")
        where = f"stage {given.get('name', number + 1)}"
        if kind == COMPARE:
            stages += _compared(given, stages, where)
            continue
        if kind not in KINDS:
            raise LongRopeError(f"The kind of {where} is one of {', '.join((*KINDS, COMPARE))}, not {kind!r}.")
        defaults = data.get(kind, {})
        if not isinstance(defaults, dict):
            raise LongRopeError(f"[{kind}] holds what is common to stages of its kind, so it is a table.")
        merged = _merged(defaults, given)
        if seed is not None and kind != EVALUATE:
            merged["seed"] = seed
        try:
            stages.append(_stage(kind, merged, stages, original_length, where))
        except LongRopeError as error:
            raise LongRopeError(f"In the plan, {where}: {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise LongRopeError(f"In the plan, {where} has a value that cannot be used: {error}.") from error
    title = data.get("name", name)
    if not isinstance(title, str) or not title:
        raise LongRopeError(f"The name of a plan is text, not {title!r}.")
    return ExtensionPlan(title, tuple(stages))


def _merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The stage's own values over those common to its kind, table by table."""
    merged = dict(defaults)
    for key, value in given.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def _known(table: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    unknown = [key for key in table if key not in keys]
    if unknown:
        raise LongRopeError(f"{where} does not know {unknown[0]!r}; it takes {', '.join(keys)}.")


def _stage(kind: str, table: dict[str, Any], before: list[Stage], original_length: int, where: str) -> Stage:
    taken = EVALUATE_KEYS if kind == EVALUATE else STAGE_KEYS
    own = {key: table.pop(key) for key in taken if key in table}
    tuned = [stage for stage in before if stage.kind == FINETUNE and stage.line == MAIN]
    searched = [stage for stage in before if stage.kind == SEARCH]
    model = own.get("model", tuned[-1].name if tuned else BASE)
    factors = own.get("factors")
    if kind == EVALUATE:
        evaluation = _evaluation(table, original_length, where)
        return Stage(str(own.get("name", EVALUATE)), kind, evaluation.lengths[-1], evaluation, model)
    if kind != FINETUNE and "outside" in own:
        raise LongRopeError("only a fine-tuning can be outside.")
    if "length" not in own:
        raise LongRopeError("a length is missing, such as length = 4096 or length = '8x'.")
    length = parse_length(str(own["length"]), original_length)
    name = str(own.get("name", f"{kind}-{length}"))
    if kind == FINETUNE:
        _known(table, (TOKENS, *(f.name for f in fields(Tuning) if f.name != "length")), where)
        if factors is None and searched:
            factors = searched[-1].name
        # As a rule in chunks of the length that the factors are for; the paper tuned Mistral in shorter ones.
        chunk = parse_length(str(table.pop(TOKENS)), original_length) if TOKENS in table else length
        settings: SearchSettings | Tuning = Tuning(length=chunk, **table)
    else:
        if factors is None and model != BASE:
            source = next((stage.factors for stage in before if stage.name == model), None)
            factors = source if any(stage.name == source for stage in searched) else None
        settings = _search(kind, table, length, where)
    counts = {key: _counts(own.get(key, {}), key) for key in ("documents", "windows")}
    return Stage(
        name,
        kind,
        length,
        settings,
        str(model),
        None if factors is None else str(factors),
        documents=counts["documents"],
        windows=counts["windows"],
        outside=bool(own.get("outside", False)),
    )


def _counts(table: Any, key: str) -> dict[str, int]:
    parts = (*PARTS, REFINE) if key == "windows" else PARTS
    if not isinstance(table, dict) or any(
        part not in parts or not isinstance(n, int) or isinstance(n, bool) or n < 1 for part, n in table.items()
    ):
        raise LongRopeError(
            f"{key} holds a number from 1 by part ({', '.join(parts)}), such as {key} = {{ search = 5, test = 8 }}."
        )
    return dict(table)


def _search(kind: str, table: dict[str, Any], length: int, where: str) -> SearchSettings:
    _known(table, SEARCH_KEYS, where)
    racing = table.get("racing")
    if racing is not None and not isinstance(racing, bool):
        raise LongRopeError(f"racing is true or false, not {racing!r}.")
    n_hats = tuple(sorted({int(n) for n in table.get("n_hats", N_HATS)}))
    for key in ("upper_ratio", "finalists", "seed"):
        value = table.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise LongRopeError(f"{key} is a number, not {value!r}.")
    name = str(table.get("preset", DEFAULT_PRESET))
    # A short length is served best under an attention factor of its own; the paper's algorithm has no gradient.
    learns = True if kind == RECOVER and preset(name).refinement is not None else None
    return settled(
        name,
        table.get("sampler"),
        table.get("evolution", {}),
        {"attention": learns, **table.get("refinement", {})},
        racing,
        None,
        table.get("finalists"),
        target_length=length,
        seed=int(table.get("seed", 0)),
        attention=str(table.get("attention_factor", "su")),
        upper_ratio=table.get("upper_ratio"),
        n_hats=tuple(n for n in n_hats if n < length) or n_hats[:1],
        critical=table.get("critical"),
    )


def _evaluation(table: dict[str, Any], original_length: int, where: str) -> Evaluation:
    _known(table, tuple(f.name for f in fields(Evaluation)), where)
    lengths = table.pop("lengths", None)
    if not isinstance(lengths, list) or not lengths:
        raise LongRopeError("lengths are missing, such as lengths = ['1x', '8x', '32x'].")
    parsed = tuple(sorted({parse_length(str(length), original_length) for length in lengths}))
    if "attention_factor" in table:
        table["attention_factor"] = str(table["attention_factor"])
    others: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
    return Evaluation(parsed, **others)


def _compared(table: Mapping[str, Any], before: list[Stage], where: str) -> list[Stage]:
    """The main line's fine-tunings again, each time under one baseline's factors: same steps, same data."""
    _known(table, ("kind", "methods"), where)
    methods = table.get("methods")
    tunings = [stage for stage in before if stage.kind == FINETUNE and stage.line == MAIN]
    if not isinstance(methods, list) or not methods or not tunings:
        raise LongRopeError(
            f"In the plan, {where} compares the fine-tunings before it with others, such as methods = ['pi', 'yarn']; "
            "it needs both."
        )
    stages = []
    for method in methods:
        model = BASE
        for stage in tunings:
            again = replace(stage, name=f"{stage.name}-{method}", model=model, factors=str(method), line=str(method))
            stages.append(again)
            model = again.name
    return stages
