"""Rescale factors as CSV, as microsoft/LongRoPE keeps them: numbers alone, no header.

A line for each layer with the factors of all pairs; or one line, or one factor a line, for all layers.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from searcher.errors import LongRopeError
from searcher.rope import Factors
from storage.checks import Fault, number, read_bytes
from storage.losses import DERIVED, Room

CSV = Room("CSV", short=False, attention=DERIVED, layers=True)


def to_csv(factors: Factors, layers: int | None = None) -> str:
    """The lists as CSV, each number in its shortest exact form.

    Parameters
    ----------
    layers: lines to repeat one list for; None writes it as one line.
    """
    rows = factors.by_layer()
    rows = rows * (layers or 1) if len(rows) == 1 else rows
    return "".join(",".join(map(_number, row)) + "\n" for row in rows)


def from_csv(text: str, where: str) -> Factors:
    """Factors from CSV, with n_hat = 0 and attention factor 1, which it does not hold.

    Parameters
    ----------
    where: the file's name, for messages.

    Raises
    ------
    LongRopeError
        A cell is no positive finite number, or lines differ in length: the message names line and column.
    """
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise LongRopeError(f"{where} is not CSV: {error}.") from error
    if not rows:
        raise LongRopeError(f"{where} holds no factors; expected a line of numbers, or one a layer.")
    try:
        found = [[_cell(cell, line, column) for column, cell in enumerate(row, 1)] for line, row in enumerate(rows, 1)]
    except Fault as fault:
        raise LongRopeError(f"{where} is not a CSV of factors: {fault}.") from fault
    if len({len(row) for row in found}) > 1:
        line, row = next((line, row) for line, row in enumerate(found, 1) if len(row) != len(found[0]))
        raise LongRopeError(f"{where}: line 1 has {len(found[0])} factors and line {line} has {len(row)}.")
    if len(found[0]) == 1:
        return Factors(tuple(row[0] for row in found))
    return Factors(tuple(found[0])) if len(found) == 1 else Factors(tuple(map(tuple, found)))


def read_csv(path: Path) -> Factors:
    """As ``from_csv``, of a file.

    Raises
    ------
    LongRopeError
        It cannot be read, is too large, is no text, or as ``from_csv``.
    """
    data = read_bytes(path, "factors")
    try:
        return from_csv(data.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise LongRopeError(f"{path} must be CSV in UTF-8, but byte {error.start} is not UTF-8.") from error


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")


def _cell(cell: str, line: int, column: int) -> float:
    where, text = f"line {line}, column {column}", cell.strip()
    if len(text) > 64 or "_" in text:  # Python reads 1_000 as a number
        raise Fault(f"{where}: expected a number, found {text[:60]!r}")
    try:
        value = float(text)
    except ValueError:
        raise Fault(f"{where}: expected a number, found {text!r}") from None
    return number(value, where)
