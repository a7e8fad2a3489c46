"""Reading JSON that others may have written: bounded, strict, and with errors that name the field.

Each check takes a value and where it stands (``regimes[0].lambdas[3]``), and returns the value with its type, or
raises a ``Fault`` that says what was expected there and what was found.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

from searcher.errors import LongRopeError

MAX_BYTES = 8 * 2**20  # the factors of a hundred layers in ten regimes are 3 MB
MAX_WHOLE = 2**53
MAX_DEPTH = 32
MAX_DIGITS = 38  # of a whole number in a file; longer ones are read as float64


class Fault(Exception):
    """A value that is not valid: where, what was expected, what was found."""


def expected(where: str, what: str, found: object) -> Fault:
    """The fault of finding ``found`` where ``what`` should be; ``found`` is shown shortened."""
    if isinstance(found, dict):
        shown = "an object"
    elif isinstance(found, list):
        shown = f"a list of {len(found)}"
    elif found is None or isinstance(found, bool | str):
        shown = json.dumps(found)
    else:
        shown = repr(found)
    return Fault(f"{where}: expected {what}, found {_short(shown)}")


def inside(where: str, key: str) -> str:
    """The place of a field; a key that would not print is quoted, a long one shortened."""
    shown = _short(key if key.isprintable() else json.dumps(key))
    return f"{where}.{shown}" if where else shown


def _short(shown: str) -> str:
    return shown if len(shown) <= 60 else shown[:57] + "..."


def mapping(value: object, where: str) -> dict[str, object]:
    """An object with any keys."""
    if not isinstance(value, dict):
        raise expected(where, "an object", value)
    return value


def record(value: object, where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, object]:
    """An object with all of ``required`` and nothing beyond ``optional``, so that no misspelt field is ignored."""
    found = mapping(value, where)
    for key in required:
        if key not in found:
            raise Fault(f"{inside(where, key)}: this field is missing")
    for key in found:
        if key not in required and key not in optional:
            raise Fault(f"{inside(where, key)}: there is no such field, only {', '.join(required + optional)}")
    return found


def items(value: object, where: str) -> list[object]:
    """A list that is not empty."""
    if not isinstance(value, list) or not value:
        raise expected(where, "a list that is not empty", value)
    return value


def text(value: object, where: str) -> str:
    """A text that is not empty and can be encoded."""
    if not isinstance(value, str) or not value:
        raise expected(where, "a text that is not empty", value)
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise expected(where, "Unicode text", value)
    return value


def whole(value: object, where: str, least: int) -> int:
    """A whole number from ``least`` to MAX_WHOLE; 1.0 and true are none."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_WHOLE:
        raise expected(where, f"a whole number from {least} to {MAX_WHOLE}", value)
    return value


def number(value: object, where: str, above: int = 0) -> float:
    """A finite number above ``above``, as float64."""
    what = f"a finite number above {above}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise expected(where, what, value)
    try:
        result = float(value)
    except OverflowError:
        raise expected(where, what, value) from None
    if not (math.isfinite(result) and result > above):
        raise expected(where, what, value)
    return result


def plain(value: object, where: str, depth: int = 0) -> object:
    """Any JSON value that comes back from a file as it went in."""
    if depth > MAX_DEPTH:
        raise Fault(f"{where}: nested more than {MAX_DEPTH} levels deep")
    if value is None or value == "" or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text(value, where)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise expected(where, "a finite number", value)
        return value
    if isinstance(value, int):
        if abs(value) >= 10 ** (MAX_DIGITS - 1):
            raise Fault(f"{where}: expected a whole number of fewer than {MAX_DIGITS} digits, found a longer one")
        return value
    if isinstance(value, list):
        return [plain(inner, f"{where}[{place}]", depth + 1) for place, inner in enumerate(value)]
    if isinstance(value, dict):
        return {text(k, f"{where} key"): plain(inner, inside(where, k), depth + 1) for k, inner in value.items()}
    raise expected(where, "a JSON value", value)


def read_bytes(path: Path, kind: str) -> bytes:
    """A file of at most MAX_BYTES.

    Parameters
    ----------
    kind: what no such file that is larger holds, for the message.

    Raises
    ------
    LongRopeError
        It cannot be read, or is too large.
    """
    try:
        with path.open("rb") as handle:
            data = handle.read(MAX_BYTES + 1)
    except OSError as error:
        raise LongRopeError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(data) > MAX_BYTES:
        raise LongRopeError(f"{path} is larger than {MAX_BYTES >> 20} MiB; no file of {kind} is.")
    return data


def read_json(path: Path) -> object:
    """The JSON value in a file of at most MAX_BYTES; a key that comes twice in one object is an error.

    NaN and infinities come back as floats, for the checks of the fields to name.

    Raises
    ------
    LongRopeError
        The file cannot be read, is too large, or is not JSON in UTF-8.
    """
    data = read_bytes(path, "factors or settings")
    try:
        return json.loads(data.decode("utf-8-sig"), parse_int=_int, object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise LongRopeError(f"{path} must be JSON in UTF-8, but byte {error.start} is not UTF-8.") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise LongRopeError(f"{path} is not valid JSON: {error.msg} at {where}.") from error
    except RecursionError as error:
        raise LongRopeError(f"{path} is nested too deeply to be a file of factors or settings.") from error
    except Fault as fault:
        raise LongRopeError(f"{path} is not valid JSON: {fault}.") from fault


def _int(digits: str) -> int | float:
    """Python refuses more than 4,300 digits; as a float the number reaches the check of its field."""
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise Fault(f"the key {inside('', twice)} comes twice in one object")
    return result
