"""Text from wherever it lies: files, folders, globs, rows of JSONL and parquet, datasets of a hub."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from searcher.errors import LongRopeError, needs

# What a walk through a folder picks up. A file named outright is read whatever its suffix.
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
PARQUET_SUFFIX = ".parquet"
PROSE_SUFFIXES = (".txt", ".md", ".rst", ".tex")
CODE_SUFFIXES = (".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs")
SUFFIXES = (*PROSE_SUFFIXES, *CODE_SUFFIXES, *JSONL_SUFFIXES, PARQUET_SUFFIX)

HUB_NAME = re.compile(
    r"(?P<name>\w[\w.-]*/\w[\w.-]*)"  # org/name
    r"(:(?P<config>[\w.-]+)(?=:))?"  # only where a split follows it
    r"(:(?P<split>\w+(\[[\d:%-]*\])?))?"  # as datasets spells it: test, train[:100], train[10%:20%]
)
DEFAULT_SPLIT = "train"
MAX_ROW = 2**26  # characters of a row of JSONL
ROWS_AT_ONCE = 64  # of parquet: rows are documents, so they may be megabytes each


@dataclass(frozen=True)
class Text:
    """One document.

    Attributes
    ----------
    name: where it comes from, for people; without the folders that only this machine has.
    content: its text, newlines as ``\\n``.
    """

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Of the text as UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_texts(sources: Sequence[str | Path], text_column: str = "text") -> Iterator[Text]:
    """The documents of all sources, one at a time, each content once, in an order that no file system decides.

    A source is, tried in this order:

    - a file: one document of UTF-8 text whatever its suffix, but ``.jsonl``, ``.jsonl.gz`` and ``.parquet`` hold one
      a row;
    - a folder: walked in the order of its names for files with one of ``SUFFIXES``; what starts with a dot is passed
      over, and folders behind symbolic links are not followed;
    - a glob, ``**`` included: its matches in order, folders walked;
    - a dataset of a hub: ``org/name``, ``org/name:split`` or ``org/name:config:split``; the split is ``train`` unless
      named.

    Empty files and rows are passed over, and so is a content that came before.

    Parameters
    ----------
    sources: in the order they are to be read.
    text_column: of JSONL, parquet and datasets: which column holds the text.

    Raises
    ------
    LongRopeError
        On the first ``next``: a source that is not there. Later: what cannot be read or is not UTF-8, a row without the
        column, a package or a hub that is missing; at the end: no text in any source.
    """
    readers: list[Iterator[Text]] = []
    for source in sources:
        if not str(source).strip():
            raise LongRopeError("--data should name text, but one of the names is empty; name a file or a folder.")
        files = _files(str(source))
        if files is None:
            readers.append(_hub_texts(str(source), text_column))
        else:
            readers += [_file_texts(path, name, text_column) for path, name in files]
    seen: set[str] = set()
    for reader in readers:
        for text in reader:
            if not text.content or text.content.isspace():
                continue
            try:
                digest = text.sha256
            except UnicodeEncodeError as error:
                raise LongRopeError(
                    f"{text.name} should be Unicode text but holds half a character ({error.reason}); leave it out of "
                    "what --data names."
                ) from error
            if digest not in seen:
                seen.add(digest)
                yield text
    if not seen:
        named = ", ".join(map(str, sources)) or "nothing"
        raise LongRopeError(f"--data should name text, but there is none in {named}; name files that are not empty.")


def _files(source: str) -> list[tuple[Path, str]] | None:
    """Files and their names as documents; None where the source can only be the name of a dataset."""
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            files = [(file, file.relative_to(path).as_posix()) for file in _walk(path)]
            if not files:
                raise LongRopeError(
                    f"The folder {source} should hold text, but no file in it ends in one of {' '.join(SUFFIXES)}; "
                    "name its files outright with --data."
                )
            return files
        if path.exists():
            return [(path, path.name)]
        if glob.has_magic(source) and not HUB_NAME.fullmatch(source):
            return _glob_files(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of nobody that this machine knows
        reason = error.strerror if isinstance(error, OSError) else error
        raise LongRopeError(
            f"{source} cannot be looked at ({reason}); name text that can be read with --data."
        ) from error
    if HUB_NAME.fullmatch(source) and not source.lower().endswith(SUFFIXES):
        return None
    raise LongRopeError(f"There is no file or folder {source}; name text that exists with --data.")


def _glob_files(pattern: Path) -> list[tuple[Path, str]]:
    root = Path(*takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    files: dict[Path, str] = {}
    for match in sorted(map(Path, glob.glob(str(pattern), recursive=True))):  # noqa: PTH207 - Path.glob takes no absolute ones
        for file in _walk(match) if match.is_dir() else [match]:
            files[file] = file.relative_to(root).as_posix()
    if not files:
        raise LongRopeError(f"No file matches {pattern}; name text that exists with --data.")
    return list(files.items())


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.is_symlink():  # it could lead back to where we are
                yield from _walk(path)
        elif path.name.lower().endswith(SUFFIXES):
            yield path


def _file_texts(path: Path, name: str, column: str) -> Iterator[Text]:
    suffix = path.name.lower()
    try:
        if path.exists() and not path.is_file():
            raise LongRopeError(f"{path} is a device or a pipe; name files that can be read again with --data.")
        if suffix.endswith(PARQUET_SUFFIX):
            yield from _parquet_texts(path, name, column)
        elif suffix.endswith(JSONL_SUFFIXES):
            yield from _jsonl_texts(path, name, column)
        else:
            yield Text(name, path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise LongRopeError(
            f"{path} should be UTF-8 text but is not ({error.reason}); convert it or leave it out of what --data names."
        ) from error
    except (OSError, EOFError, zlib.error) as error:  # the last two: gzip that was cut off or damaged
        raise LongRopeError(
            f"{path} cannot be read ({error}); mend it, or leave it out of what --data names."
        ) from error


def _jsonl_texts(path: Path, name: str, column: str) -> Iterator[Text]:
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_ROW + 1), ""), 1):
            if len(line) > MAX_ROW:  # as of a few kilobytes of gzip that stand for gigabytes
                raise LongRopeError(
                    f"{path}:{number} is longer than {MAX_ROW >> 20} Mi characters, which no row of documents should "
                    "be; cut it into several."
                )
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise LongRopeError(f"{path}:{number} should be a JSON object but does not parse ({error}).") from error
            if not isinstance(row, dict):
                raise LongRopeError(f"{path}:{number} should be a JSON object but is a {type(row).__name__}.")
            if column not in row:
                raise _no_column(f"{path}:{number}", column, list(row))
            yield _row_text(f"{name}:{number}", row[column], column)


def _parquet_texts(path: Path, name: str, column: str) -> Iterator[Text]:
    with needs(str(path), "pyarrow", "parquet"):
        from pyarrow import ArrowException, types
        from pyarrow.parquet import ParquetFile
    try:
        with ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise _no_column(str(path), column, file.schema_arrow.names)
            kind = file.schema_arrow.field(file.schema_arrow.names.index(column)).type
            kind = kind.value_type if types.is_dictionary(kind) else kind
            if not any(holds(kind) for holds in (types.is_string, types.is_large_string, types.is_null)):
                raise _no_text(str(path), column, str(kind))
            number = 0
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _row_text(f"{name}:{number}", value, column)
    except ArrowException as error:
        raise LongRopeError(
            f"{path} should be a parquet file but cannot be read as one ({_first_line(error)})."
        ) from error


def _hub_texts(source: str, column: str) -> Iterator[Text]:
    parts = HUB_NAME.fullmatch(source)
    if parts is None:
        raise ValueError(f"{source!r} is not the name of a dataset")
    with needs(f"{source} is no file or folder here; as a dataset it", "datasets", "datasets"):
        from datasets import load_dataset
    split = parts["split"] or DEFAULT_SPLIT
    try:
        rows = load_dataset(parts["name"], parts["config"], split=split)
    except Exception as error:  # whatever its transports and readers raise
        raise LongRopeError(
            f"{source} is no file or folder here, and its split {split} could not be loaded as a dataset "
            f"({type(error).__name__}: {_first_line(error)}); check the name, spelt NAME, NAME:SPLIT or "
            "NAME:CONFIG:SPLIT, and whether the hub can be reached, or name local text with --data."
        ) from error
    if column not in rows.column_names:
        raise _no_column(source, column, rows.column_names)
    for number, row in enumerate(rows.select_columns([column]), 1):
        yield _row_text(f"{parts['name']}:{split}:{number}", row[column], column)


def _row_text(name: str, value: Any, column: str) -> Text:
    if value is not None and not isinstance(value, str):
        raise _no_text(name, column, type(value).__name__)
    return Text(name, value or "")


def _no_text(where: str, column: str, kind: str) -> LongRopeError:
    return LongRopeError(
        f"{where} should hold text in its column {column} but holds a {kind}; name the column that has the text with "
        "--text-column."
    )


def _no_column(where: str, column: str, columns: Sequence[str]) -> LongRopeError:
    return LongRopeError(
        f"{where} should have a column {column} but has {', '.join(columns) or 'none'}; name the column that has the "
        "text with --text-column."
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no reason given")
