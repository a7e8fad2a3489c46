"""What a model came to at several lengths, from an extension's evaluation or from ``longrope evaluate --json``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from searcher.errors import LongRopeError
from storage.checks import Fault, expected, inside, items, mapping, number, read_json, text, whole
from storage.report import RETRIEVAL

T = TypeVar("T")
ByLength = dict[str, dict[int, T]]  # method -> length -> what was found there
MOST = 1e300  # perplexity, so that the ends of its axis are numbers, too


@dataclass(frozen=True)
class Trials:
    """Retrieval at one depth: right of all trials, and what guessing gives."""

    depth: float
    right: int
    trials: int
    chance: float = 0.0


@dataclass(frozen=True)
class Bucket:
    """Perplexity of the tokens at positions from ``start`` to before ``end``."""

    start: int
    end: int
    perplexity: float


@dataclass(frozen=True)
class Measured:
    """One evaluation.

    Attributes
    ----------
    source: what it came from, for people; empty for the study's own.
    perplexity, sliding: by disjoint windows, and by sliding ones; what is not finite is left out.
    positions: by position in disjoint windows.
    retrieval: by task, as in ``storage.report.RETRIEVAL``.
    """

    source: str = ""
    perplexity: ByLength[float] = field(default_factory=dict)
    sliding: ByLength[float] = field(default_factory=dict)
    positions: ByLength[list[Bucket]] = field(default_factory=dict)
    retrieval: dict[str, ByLength[list[Trials]]] = field(default_factory=dict)


def of_extension(result: Mapping[str, Any]) -> Measured:
    """An extension's own evaluation."""
    found = Measured()
    for row, cells in result["rows"].items():
        for length, cell in cells.items():
            for part, value in cell.items():
                if part == "test":
                    known = _perplexity(value["nll"], value["tokens"])
                    if known is not None:
                        found.perplexity.setdefault(row, {})[int(length)] = known
                elif part in RETRIEVAL and (depths := _depths(value["by_depth"])):
                    found.retrieval.setdefault(part, {}).setdefault(row, {})[int(length)] = depths
    return found


def read_evaluation(path: Path) -> Measured:
    """What ``longrope evaluate --json`` printed into a file. What a report has no figure for is passed over.

    Raises
    ------
    LongRopeError
        It cannot be read, is not JSON, or a field is not as the command prints it: the message names file and field.
    """
    document = read_json(path)
    try:
        return _parse(document, path.name)
    except Fault as fault:
        raise LongRopeError(
            f"{path} is not what `longrope evaluate --json` prints: {fault}. Write it with "
            f"`longrope evaluate --json > {path.name}`."
        ) from fault


def _parse(document: object, source: str) -> Measured:
    top = mapping(document, "the file")
    for key in ("model", "lengths"):
        if key not in top:
            raise Fault(f"{key}: this field is missing")
    found = Measured(source)
    for method, length, value, where in _cells(top.get("perplexity", {}), "perplexity"):
        if value is not None:
            found.perplexity.setdefault(method, {})[length] = _drawable(value, where)
    rows = top.get("sliding", [])
    for place, given in enumerate(rows if isinstance(rows, list) else [rows]):
        _window_row(mapping(given, f"sliding[{place}]"), f"sliding[{place}]", found)
    for kind in RETRIEVAL:
        for method, length, value, where in _cells(top.get(kind, {}), kind):
            by_depth = mapping(value, where).get("by_depth")
            if not isinstance(by_depth, list):
                raise expected(inside(where, "by_depth"), "a list", by_depth)
            if depths := _depths(by_depth, inside(where, "by_depth")):
                found.retrieval.setdefault(kind, {}).setdefault(method, {})[length] = depths
    return found


def _cells(value: object, where: str) -> Iterator[tuple[str, int, object, str]]:
    """Method, length, what is there, and its place."""
    for method, by_length in mapping(value, where).items():
        here = inside(where, method)
        for length, cell in mapping(by_length, here).items():
            yield text(method, here), _length(length, here), cell, inside(here, length)


def _length(key: str, where: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) <= 15):
        raise expected(where, "lengths in tokens as keys", key)
    return whole(int(key), where, 1)


def _window_row(row: Mapping[str, object], where: str, found: Measured) -> None:
    """A row of sliding windows; only those under each method's own attention factor are shown."""
    method = text(row.get("method"), inside(where, "method"))
    length = whole(row.get("length"), inside(where, "length"), 1)
    if row.get("attention") != "own" or row.get("failure") is not None:
        return
    tables: tuple[tuple[str, Callable[[], ByLength[float]]], ...] = (
        ("single", lambda: found.perplexity),
        ("sliding", lambda: found.sliding),
    )
    for name, table in tables:
        tally = row.get(name)
        value = None if tally is None else mapping(tally, inside(where, name)).get("perplexity")
        if value is not None:
            table().setdefault(method, {}).setdefault(length, _drawable(value, inside(where, name)))
    given = row.get("positions", [])
    if not isinstance(given, list):
        raise expected(inside(where, "positions"), "a list", given)
    buckets = [
        _bucket(mapping(each, f"{where}.positions[{n}]"), f"{where}.positions[{n}]") for n, each in enumerate(given)
    ]
    kept = [bucket for bucket in buckets if bucket is not None]
    if kept:
        found.positions.setdefault(method, {})[length] = kept


def _bucket(given: Mapping[str, object], where: str) -> Bucket | None:
    start, end = whole(given.get("start"), where, 0), whole(given.get("end"), where, 1)
    nll, tokens = given.get("nll"), whole(given.get("tokens"), where, 0)
    if nll is None or not tokens:
        return None
    value = _perplexity(number(nll, where, -1), tokens)
    return None if value is None else Bucket(start, end, value)


def _depths(rows: object, where: str = "by_depth") -> list[Trials]:
    """The rows of single depths, ascending."""
    found = []
    for place, given in enumerate(items(rows, where) if rows else []):
        row, here = mapping(given, f"{where}[{place}]"), f"{where}[{place}]"
        if row.get("depth") is None:  # all depths together
            continue
        depth, trials = number(row["depth"], here, -1), whole(row.get("trials"), here, 1)
        right, chance = whole(row.get("right"), here, 0), number(row.get("chance", 0.0), here, -1)
        if right > trials:
            raise expected(here, f"at most {trials} right of {trials}", right)
        found.append(Trials(depth, right, trials, chance))
    return sorted(found, key=lambda trials: trials.depth)


def _drawable(value: object, where: str) -> float:
    """A perplexity that an axis can reach around."""
    found = number(value, where)
    if found > MOST:
        raise expected(where, f"a perplexity of at most {MOST:g}", value)
    return found


def _perplexity(nll: float | None, tokens: int) -> float | None:
    if nll is None or not tokens or nll / tokens > math.log(MOST):
        return None
    return math.exp(nll / tokens)
