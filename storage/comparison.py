"""Studies side by side: settings that differ, perplexities, cost and time, and how far their factors are apart."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from searcher.errors import LongRopeError
from searcher.rope import Factors
from storage.factor_file import from_json
from storage.report import METHOD_NAMES
from storage.repository import Repository, StudyRecord
from storage.results import factors_of, perplexities

Comparison = dict[str, Any]
SEARCHED = "searched"


def compare(repository: Repository, names: Sequence[str]) -> Comparison:
    """Studies side by side, as plain values; by study, in the order of the names.

    Returns
    -------
    ``studies``: kind and status. ``settings``: those that differ, by dotted name, None where a study has none.
    ``scores``: part -> method -> perplexity; an extension's methods have the length in their name. ``notes``: what
    keeps figures from comparing. ``cost``: forwards, gradient steps, both in forwards, seconds of work and seconds from
    launch to the last change, pauses included. ``factors``: by name, rescale factors, n_hat and attention factor of
    each; ``differences``: of each from the first study's of that name.

    Raises
    ------
    LongRopeError
        A study is not there, or fewer than two are named.
    """
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise LongRopeError("Name two studies or more to compare, each once; `longrope studies` lists them.")
    records = [repository.study(name) for name in names]
    settings = {record.name: _settings(record) for record in records}
    factors = {record.name: _factors(record) for record in records}
    first = factors[names[0]]
    return {
        "studies": {record.name: {"kind": record.kind, "status": record.status} for record in records},
        "settings": _differing(settings),
        "scores": _by_part({record.name: _scores(record) for record in records}),
        "notes": _notes(settings, records),
        "cost": {record.name: _cost(repository, record) for record in records},
        "factors": {name: {what: _plain(found) for what, found in held.items()} for name, held in factors.items()},
        "differences": {
            name: {what: _difference(first[what], found) for what, found in held.items() if what in first}
            for name, held in list(factors.items())[1:]
        },
    }


def _settings(record: StudyRecord) -> dict[str, Any]:
    """All that a study was started with, by dotted name; of documents how many, and a digest of which."""
    settings = dict(record.settings)
    documents = settings.pop("documents", {})
    flat = _flat("", {**settings, "numerics": record.profile or {}})
    for part, hashes in documents.items():
        digest = hashlib.sha256("".join(hashes).encode()).hexdigest()[:8]
        flat[f"documents.{part}"] = f"{len(hashes)} windows, {digest}"
    return flat


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    return {
        key: inner
        for part, below in value.items()
        for key, inner in _flat(f"{name}.{part}" if name else str(part), below).items()
    }


def _differing(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    keys = dict.fromkeys(key for flat in settings.values() for key in flat)
    rows = {key: {name: flat.get(key) for name, flat in settings.items()} for key in keys}
    return {key: row for key, row in rows.items() if len({json.dumps(value) for value in row.values()}) > 1}


def _scores(record: StudyRecord) -> dict[str, dict[str, float]]:
    """Part -> method -> perplexity, each under its own attention factor."""
    result = record.result
    if result is None:
        return {}
    if record.kind != "extension":
        return {part: perplexities(result, part) for part in result["scores"]}
    table: dict[str, float] = {}
    for row, cells in ((result.get("evaluation") or {}).get("rows") or {}).items():
        for length, cell in cells.items():
            if cell.get("test", {}).get("nll") is not None:
                table[f"{row} at {int(length):,}"] = _perplexity(cell["test"])
    return {"test": table}


def _perplexity(cell: Mapping[str, Any]) -> float:
    loss = cell["nll"] / cell["tokens"]
    return math.exp(loss) if loss < 700 else math.inf


def _by_part(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Part -> method -> study -> perplexity: the test documents first."""
    parts = sorted({part for found in scores.values() for part in found}, key=lambda part: (part != "test", part))
    table: dict[str, dict[str, dict[str, float]]] = {}
    for part in parts:
        methods = dict.fromkeys(method for found in scores.values() for method in found.get(part, {}))
        table[part] = {
            method: {name: found[part][method] for name, found in scores.items() if method in found.get(part, {})}
            for method in methods
        }
    return table


def _notes(settings: Mapping[str, Mapping[str, Any]], records: Sequence[StudyRecord]) -> list[str]:
    """What keeps the figures from comparing."""
    said = {
        "identity.weights_sha256": "The models differ, so their perplexities do not compare.",
        "model.target_length": "The target lengths differ, so their perplexities do not compare.",
        "documents.test": "The test documents differ, so perplexities on them do not compare.",
        "documents.selection": "The selection documents differ, so perplexities on them do not compare.",
    }
    known = {key: {flat[key] for flat in settings.values() if flat.get(key) is not None} for key in said}
    return [text for key, text in said.items() if len(known[key]) > 1] + [
        f"{r.name} is not finished: {r.status}." for r in records if r.result is None
    ]


def _cost(repository: Repository, record: StudyRecord) -> dict[str, float | None]:
    cost = repository.cost(record.name)
    return {
        "forwards": cost.forwards,
        "gradients": cost.gradients,
        "in_forwards": cost.total,
        "report": cost.report,
        "work_seconds": math.fsum(row.seconds for row in repository.generations(record.name)),
        "seconds": (record.updated_at - record.created_at).total_seconds(),
    }


def _factors(record: StudyRecord) -> dict[str, Factors]:
    """What a study serves: ``searched``, or the regimes of an extension by their longest length."""
    if record.result is None:
        return {}
    if record.kind != "extension":
        return {SEARCHED: factors_of(record.result, SEARCHED)}
    return {f"to {regime.max_length:,}": regime.factors for regime in from_json(record.result["factors"]).regimes}


def _plain(factors: Factors) -> dict[str, Any]:
    return {"lambdas": factors.lambdas, "n_hat": factors.n_hat, "attention_factor": factors.attention_factor}


def _difference(first: Factors, other: Factors) -> dict[str, Any] | None:
    """Ratios to the first one's rescale factors, pair by pair; None where the models have other pairs or layers."""
    if not (first.shared and other.shared and len(first.lambdas) == len(other.lambdas)):
        return None
    pairs = zip(first.by_layer()[0], other.by_layer()[0], strict=True)
    ratios = [there / here for here, there in pairs]
    logs = [abs(math.log(ratio)) for ratio in ratios]
    return {
        "ratios": ratios,
        "largest_ratio": math.exp(max(logs)),
        "at_pair": logs.index(max(logs)),
        "mean_ratio": math.exp(math.fsum(logs) / len(logs)),
    }


def comparison_tables(found: Comparison) -> list[Table | str]:
    """A comparison for people."""
    names = list(found["studies"])
    settings = _table("Settings that differ", "setting", names)
    for key, row in found["settings"].items():
        settings.add_row(key, *(_shown(row[name]) for name in names))
    shown: list[Table | str] = [settings] if found["settings"] else ["No setting differs."]
    for part, methods in found["scores"].items():
        table = _table(f"Perplexity on the {part} documents", "method", names)
        for method, row in methods.items():
            cells = [f"{row[name]:.4f}" if name in row else "-" for name in names]
            table.add_row(METHOD_NAMES.get(method, method), *cells, style="bold" if method == SEARCHED else None)
        shown.append(table)
    shown += found["notes"]
    cost = _table("Cost and time", "", names)
    labels = {
        "forwards": "document forwards of the search",
        "gradients": "gradient steps",
        "in_forwards": "both, in forwards",
        "report": "forwards of the reported rows",
        "work_seconds": "seconds that workers spent",
        "seconds": "seconds from launch to the last change",
    }
    for key, label in labels.items():
        values = [found["cost"][name][key] for name in names]
        cost.add_row(label, *("-" if value is None else f"{value:,.0f}" for value in values))
    shown.append(cost)
    for what in dict.fromkeys(what for held in found["factors"].values() for what in held):
        shown += _factor_table(found, what)
    return shown


def _factor_table(found: Comparison, what: str) -> list[Table | str]:
    """Rescale factors pair by pair, with ratios to the first study's."""
    held = {name: factors[what] for name, factors in found["factors"].items() if what in factors}
    apart = {name: differences.get(what) for name, differences in found["differences"].items()}
    flat = {name: one["lambdas"] for name, one in held.items() if not isinstance(one["lambdas"][0], (list, tuple))}
    table = Table(title=f"Rescale factors, {what}", title_justify="left")
    table.add_column("pair", justify="right")
    for name in flat:
        table.add_column(name, justify="right", overflow="fold")
        if apart.get(name):
            table.add_column("ratio", justify="right")
    for i in range(max((len(lambdas) for lambdas in flat.values()), default=0)):
        cells = []
        for name, lambdas in flat.items():
            cells.append(f"{lambdas[i]:.2f}" if i < len(lambdas) else "-")
            difference = apart.get(name)
            if difference:
                cells.append(f"{difference['ratios'][i]:.3f}")
        table.add_row(str(i), *cells)
    lines: list[Table | str] = [table] if flat else []
    for name, one in held.items():
        text = f"{name}: n_hat {one['n_hat']}, attention factor {one['attention_factor']:.4f}"
        difference = apart.get(name)
        if difference:
            text += (
                f"; from {next(iter(found['studies']))} at most {difference['largest_ratio']:.3f} times apart, at pair "
                f"{difference['at_pair']}, {difference['mean_ratio']:.3f} times in the mean"
            )
        lines.append(text)
    return lines


def _table(title: str, first: str, names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)
