"""Plan files: a progressive extension as TOML, and the plans that come with the program.

    name = "mine"

    [search]                     # for every search stage; likewise [finetune], [recover], [evaluate]
    preset = "refined"

    [[stages]]
    kind = "search"              # search, finetune, recover, evaluate, or compare
    length = "8x"                # tokens, 128k, 1M, or times the trained window

A recovery takes what a search takes but for the attention factor and the critical pair; its ``upper_ratio`` bounds the
factors by that share of the largest tuned one.

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

from searcher.baselines import BASELINES
from searcher.critical import AUTO
from searcher.descent import Refinement
from searcher.errors import LongRopeError
from searcher.evolution import Evolution
from searcher.extension import (
    BASE,
    EVALUATE,
    FINETUNE,
    KINDS,
    MAIN,
    RECOVER,
    SEARCH,
    STAGE_NAME,
    Evaluation,
    ExtensionPlan,
    Stage,
    check_order,
)
from searcher.plan import DEFAULT_PRESET, SearchSettings, overridden, parse_length, preset, settled
from searcher.rope import RopeSpec, attention_factor
from searcher.space import N_HATS
from searcher.study import PARTS, REFINE
from searcher.tuning import Tuning

BUILT_IN = Path(__file__).parent / "plans"
COMPARE = "compare"
TOKENS = "tokens"  # of a chunk
STAGE_KEYS = ("kind", "name", "length", "model", "factors", "documents", "windows", "outside")
EVALUATE_KEYS = ("kind", "name")
TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
SEARCH_KEYS = (
    *("preset", "seed", "attention_factor", "n_hats", "upper_ratio", "finalists", "sampler", "racing", "critical"),
    *("evolution", "refinement"),
)
# Its attention factor is the tuned one's, or learnt; its space has no critical pair.
RECOVER_KEYS = tuple(key for key in SEARCH_KEYS if key not in ("attention_factor", "critical"))
MAX_BYTES = 64 * 2**10
MAX_LINE = 1000
MAX_NAME = 80
MAX_SEED = 2**63 - 1
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
    path = BUILT_IN / f"{where}.toml" if where in built_in() and not Path(where).is_file() else Path(where)
    try:
        with path.open("rb") as handle:
            data = handle.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise LongRopeError(
            f"There is no plan {where}: give a TOML file, or one of {', '.join(built_in())} ({reason})."
        ) from error
    # A dotted key costs the parser the square of its parts.
    if len(data) > MAX_BYTES or max(map(len, data.splitlines()), default=0) > MAX_LINE:
        raise LongRopeError(
            f"The plan {where} should have at most {MAX_BYTES >> 10} KiB, and {MAX_LINE} bytes a line; break what is "
            "longer into several lines."
        )
    try:
        tables = tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # beside its own: numbers without end, tables nested without end
        raise LongRopeError(f"The plan {where} is not TOML: {str(error).rstrip('.')}.") from error
    return parse_plan(tables, path.stem, original_length, seed)


def parse_plan(data: Mapping[str, Any], name: str, original_length: int, seed: int | None = None) -> ExtensionPlan:
    """A plan from its TOML tables. Arguments and errors as for ``read_plan``."""
    _known(data, TOP_KEYS, "The plan")
    tables = data.get("stages")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise LongRopeError("A plan needs its stages, one [[stages]] table each.")
    stages: list[Stage] = []
    for number, given in enumerate(tables):
        kind, own = given.get("kind"), given.get("name")
        where = f"stage {own if isinstance(own, str) and STAGE_NAME.fullmatch(own) else number + 1}"
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
            stages.append(_stage(kind, merged, stages, original_length))
        except LongRopeError as error:
            raise LongRopeError(f"In the plan, {where}: {error}") from error
    title = data.get("name", name)
    if not isinstance(title, str) or not title or not title.isprintable() or len(title) > MAX_NAME:
        raise LongRopeError(f"The name of a plan is a text of up to {MAX_NAME} characters, not {title!r}.")
    plan = ExtensionPlan(title, tuple(stages))
    check_order(plan)
    return plan


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


def _stage(kind: str, table: dict[str, Any], before: list[Stage], original_length: int) -> Stage:
    taken = EVALUATE_KEYS if kind == EVALUATE else STAGE_KEYS
    own = {key: table.pop(key) for key in taken if key in table}
    for key in ("name", "model", "factors"):
        if key in own and not isinstance(own[key], str):
            raise LongRopeError(f"its {key} is a text, not {own[key]!r}.")
    if not isinstance(own.get("outside", False), bool):
        raise LongRopeError(f"outside is true or false, not {own['outside']!r}.")
    tuned = [stage for stage in before if stage.kind == FINETUNE and stage.line == MAIN]
    searched = [stage for stage in before if stage.kind == SEARCH]
    model = own.get("model", tuned[-1].name if tuned else BASE)
    factors = own.get("factors")
    if kind == EVALUATE:
        evaluation = _evaluation(table, original_length)
        return Stage(str(own.get("name", EVALUATE)), kind, evaluation.lengths[-1], evaluation, model)
    if kind != FINETUNE and "outside" in own:
        raise LongRopeError("only a fine-tuning can be outside.")
    if "length" not in own:
        raise LongRopeError("a length is missing, such as length = 4096 or length = '8x'.")
    length = parse_length(str(own["length"]), original_length)
    name = str(own.get("name", f"{kind}-{length}"))
    if kind == FINETUNE:
        _known(table, (TOKENS, *(f.name for f in fields(Tuning) if f.name != "length")), "it")
        if factors is None and searched:
            factors = searched[-1].name
        # As a rule in chunks of the length that the factors are for; the paper tuned Mistral in shorter ones.
        chunk = parse_length(str(table.pop(TOKENS)), original_length) if TOKENS in table else length
        if chunk > length:
            raise LongRopeError(
                f"its chunks have at most as many tokens as its factors are for, {length}, not {chunk}; lower {TOKENS}."
            )
        settings: SearchSettings | Tuning = Tuning.from_json({"length": chunk, **table})
    else:
        if factors is None and model != BASE:
            source = next((stage.factors for stage in before if stage.name == model), None)
            factors = source if any(stage.name == source for stage in searched) else None
        settings = _search(kind, table, length)
        short = kind == RECOVER and length <= original_length
        if short and settings.sampler is not None and settings.sampler.two_objectives:
            raise LongRopeError(
                f"{settings.sampler.name} weighs a long context against the trained window, which a recovery within it "
                "does not have; take another sampler."
            )
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


def _search(kind: str, table: dict[str, Any], length: int) -> SearchSettings:
    _known(table, RECOVER_KEYS if kind == RECOVER else SEARCH_KEYS, "it")
    racing = table.get("racing")
    if racing is not None and not isinstance(racing, bool):
        raise LongRopeError(f"racing is true or false, not {racing!r}.")
    seed, finalists = table.get("seed", 0), table.get("finalists")
    _whole(seed, "seed", 0, MAX_SEED)
    if finalists is not None:
        _whole(finalists, "finalists", 1, MAX_SEED)
    ratio = table.get("upper_ratio")
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float)):
        raise LongRopeError(f"upper_ratio is a number, not {ratio!r}.")
    if kind == RECOVER and ratio is not None and not 0 < ratio <= 1:
        raise LongRopeError(
            f"upper_ratio of a recovery is a share of the largest tuned factor, in 0 .. 1, not {ratio}."
        )
    n_hats = table.get("n_hats", list(N_HATS))
    if not isinstance(n_hats, list) or not n_hats:
        raise LongRopeError(f"n_hats is a list of whole numbers, such as [0, 4, 16], not {n_hats!r}.")
    for n_hat in n_hats:
        _whole(n_hat, "each of n_hats", 0, MAX_SEED)
    name, critical = str(table.get("preset", DEFAULT_PRESET)), table.get("critical")
    if critical is not None and critical != AUTO:
        _whole(critical, f"critical is {AUTO!r}, or", 0, MAX_SEED)
    sampler = table.get("sampler")
    refinement = _overrides(table.get("refinement", {}), Refinement(), "refinement")
    # A short length is served best under an attention factor of its own; the paper's algorithm has no gradient.
    usual = preset(name).refinement if kind == RECOVER and sampler is None else None
    if usual is not None and overridden(usual, refinement).gradients:
        refinement = {"attention": True, **refinement}
    choices = sorted({*n_hats})
    return settled(
        name,
        sampler,
        _overrides(table.get("evolution", {}), Evolution(), "evolution"),
        refinement,
        racing,
        None,
        finalists,
        target_length=length,
        seed=seed,
        attention=_attention(table.get("attention_factor", "su")),
        upper_ratio=ratio,
        n_hats=tuple(n for n in choices if n < length) or tuple(choices[:1]),
        critical=None if critical is None else str(critical),
    )


def _attention(value: object) -> str:
    """A policy or a number as text, checked."""
    text = "" if isinstance(value, bool) or not isinstance(value, str | int | float) else str(value)
    attention_factor(text, RopeSpec(theta=2.0, rotary_dim=4, original_length=2, layers=1), 1.0)
    return text


def _whole(value: object, name: str, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise LongRopeError(f"{name} is a whole number from {least}, not {value!r}.")


def _overrides(table: object, settings: object, name: str) -> dict[str, Any]:
    """Values for fields of ``settings``, each of the type that is there; a whole number may stand for a fraction."""
    if not isinstance(table, dict):
        raise LongRopeError(f"{name} is a table, such as {name} = {{ }}, not {table!r}.")
    _known(table, tuple(vars(settings)), name)
    for key, value in table.items():
        kind = type(vars(settings)[key])
        fits = type(value) in ((int, float) if kind is float else (kind,))
        if not fits:
            raise LongRopeError(f"{key} of {name} is {TYPES[kind]}, not {value!r}.")
    return dict(table)


def _evaluation(table: dict[str, Any], original_length: int) -> Evaluation:
    _known(table, tuple(f.name for f in fields(Evaluation)), "it")
    lengths = table.pop("lengths", None)
    if not isinstance(lengths, list) or not lengths:
        raise LongRopeError("lengths are missing, such as lengths = ['1x', '8x', '32x'].")
    parsed = tuple(sorted({parse_length(str(length), original_length) for length in lengths}))
    if "attention_factor" in table:
        table["attention_factor"] = _attention(table["attention_factor"])
    baselines = table.get("baselines", [])
    if not isinstance(baselines, list) or not all(isinstance(name, str) for name in baselines):
        raise LongRopeError(f"baselines is a list of names, such as ['pi', 'yarn'], not {baselines!r}.")
    others: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
    return Evaluation(parsed, **others)


def _compared(table: Mapping[str, Any], before: list[Stage], where: str) -> list[Stage]:
    """The main line's fine-tunings again, each time under one baseline's factors: same steps, same data."""
    _known(table, ("kind", "methods"), f"In the plan, {where}")
    methods = table.get("methods")
    tunings = [stage for stage in before if stage.kind == FINETUNE and stage.line == MAIN]
    if not isinstance(methods, list) or not methods or not tunings:
        raise LongRopeError(
            f"In the plan, {where} compares the fine-tunings before it with others, such as methods = ['pi', 'yarn']; "
            "it needs both."
        )
    if unknown := [method for method in methods if not isinstance(method, str) or method not in BASELINES]:
        raise LongRopeError(
            f"In the plan, {where} compares with some of {', '.join(BASELINES)}, not with {unknown[0]!r}."
        )
    stages = []
    for method in methods:
        model = BASE
        for stage in tunings:
            again = replace(stage, name=f"{stage.name}-{method}", model=model, factors=str(method), line=str(method))
            stages.append(again)
            model = again.name
    return stages
