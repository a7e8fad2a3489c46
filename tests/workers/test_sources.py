"""Reading text: what is picked up, in which order, under which name, and what is said when it cannot be."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import ModuleType

import pyarrow
import pyarrow.parquet
import pytest

from searcher.errors import LongRopeError
from workers.sources import ROWS_AT_ONCE, Text, read_texts


def read(*sources: str | Path, text_column: str = "text") -> dict[str, str]:
    texts = list(read_texts(sources, text_column))
    found = {text.name: text.content for text in texts}
    assert len(found) == len(texts)
    return found


def write_parquet(path: Path, **columns: list[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_file_named_outright_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    path = tmp_path / "notes.log"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read(path) == {"notes.log": "one\ntwo\n"}
    assert read(str(path)) == read(path)


def test_a_folder_is_walked_in_the_order_of_its_names(tmp_path: Path) -> None:
    names = ["b/z.txt", "b/a.md", "c.py", "a.rst", "b.txt", "B.TXT", "b/c/d/e.txt"]
    for name in reversed(names):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    for name in ("image.png", ".hidden.txt", ".git/config.txt", "c/__pycache__/c.pyc"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\xff\xfe not text")
    (tmp_path / "b" / "back").symlink_to(tmp_path, target_is_directory=True)
    found = read(tmp_path)
    assert list(found) == ["B.TXT", "a.rst", "b/a.md", "b/c/d/e.txt", "b/z.txt", "b.txt", "c.py"]
    assert all(name == content for name, content in found.items())


def test_globs_reach_into_folders_and_take_each_file_once(tmp_path: Path) -> None:
    for name in ("x/one.txt", "x/y/two.txt", "x/y/three.md", "z/four.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert list(read(f"{tmp_path}/**/*.txt")) == ["x/one.txt", "x/y/two.txt", "z/four.txt"]
    assert list(read(f"{tmp_path}/x/**")) == ["one.txt", "y/three.md", "y/two.txt"]
    assert list(read(f"{tmp_path}/[xz]")) == ["x/one.txt", "x/y/three.md", "x/y/two.txt", "z/four.txt"]
    with pytest.raises(LongRopeError, match=r"No file matches .*/\*\.rst"):
        read(f"{tmp_path}/*.rst")


def test_matches_of_a_glob_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    names = [f"{i:02}.txt" for i in range(16)]
    for name in names[::-2] + names[::2]:
        (tmp_path / name).write_text(name)
    assert list(read(f"{tmp_path}/*.txt")) == names


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("brackets")
    (tmp_path / "a1.txt").write_text("digit")
    assert read(tmp_path / "a[1].txt") == {"a[1].txt": "brackets"}


def test_rows_of_jsonl_are_documents_named_by_line(tmp_path: Path) -> None:
    rows = [{"text": "first"}, None, {"text": ""}, {"text": None}, {"text": "  \n"}, {"text": "line\u2028separator"}]
    lines = "\n".join("" if row is None else json.dumps(row, ensure_ascii=False) for row in rows)
    expected = {"rows.jsonl:1": "first", "rows.jsonl:6": "line\u2028separator"}
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    assert read(tmp_path) == expected
    (tmp_path / "rows.jsonl").unlink()
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    assert list(read(tmp_path).values()) == list(expected.values())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "unclosed', r"rows\.jsonl:2 should be a JSON object but does not parse"),
        ('"a string"', r"rows\.jsonl:2 should be a JSON object but is a str"),
        ('{"body": "b", "id": 1}', r"rows\.jsonl:2 should have a column text but has body, id; .*--text-column"),
        ('{"text": 3}', r"rows\.jsonl:2 should hold text in its column text but holds a int"),
        ('{"text": "\\ud800"}', r"rows\.jsonl:2 should be Unicode text but holds half a character"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(LongRopeError, match=message):
        read(path)


def test_rows_of_parquet_are_documents_named_by_row(tmp_path: Path) -> None:
    count = 2 * ROWS_AT_ONCE + 3
    path = write_parquet(
        tmp_path / "books.parquet", body=[f"book {i}" if i else None for i in range(count)], id=list(range(count))
    )
    found = read(path, text_column="body")
    assert found == {f"books.parquet:{i + 1}": f"book {i}" for i in range(1, count)}
    assert read(tmp_path, text_column="body") == found
    with pytest.raises(LongRopeError, match=r"should have a column text but has body, id; .*--text-column"):
        read(path)
    with pytest.raises(LongRopeError, match="column id but holds a int"):
        read(path, text_column="id")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    parquet = write_parquet(tmp_path / "cut.parquet", text=["a", "b"])
    parquet.write_bytes(parquet.read_bytes()[:-9])
    with pytest.raises(LongRopeError, match=r"cut\.parquet should be a parquet file"):
        read(parquet)
    packed = tmp_path / "cut.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:-12])
    with pytest.raises(LongRopeError, match=r"cut\.jsonl\.gz cannot be read"):
        read(packed)
    packed.write_bytes(b'{"text": "not packed"}')
    with pytest.raises(LongRopeError, match=r"cut\.jsonl\.gz cannot be read"):
        read(packed)


@pytest.mark.parametrize("name", ["latin.txt", "latin.jsonl"])
def test_text_that_is_not_utf8_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "fine.txt").write_text("fine")
    (tmp_path / name).write_bytes('{"text": "caf\xe9"}'.encode("latin-1"))
    with pytest.raises(LongRopeError, match=rf"{name} should be UTF-8 text but is not"):
        read(tmp_path)


def test_a_content_is_read_once_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.txt").write_text("same")
    (tmp_path / "c.jsonl").write_text('{"text": "same"}\n{"text": "other"}\n')
    assert read(tmp_path, tmp_path / "a.txt") == {"a.txt": "same", "c.jsonl:2": "other"}
    assert list(read(tmp_path / "b.txt", tmp_path)) == ["b.txt", "c.jsonl:2"]


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "image.png").write_bytes(b"")
    for sources in ([tmp_path / "empty.txt", tmp_path / "blank.txt"], []):
        with pytest.raises(LongRopeError, match="there is none in"):
            read(*sources)
    with pytest.raises(LongRopeError, match=r"folder .*folder should hold text.*\.txt"):
        read(tmp_path / "folder")


def test_a_source_that_is_not_there_is_named_before_any_is_read(tmp_path: Path) -> None:
    (tmp_path / "fine.txt").write_text("fine")
    for missing in (tmp_path / "missing.txt", "texts/missing.txt", "missing", "~no-such-user-here/a.txt"):
        texts = read_texts([tmp_path / "fine.txt", missing])
        with pytest.raises(LongRopeError, match=str(missing).rsplit("/", 1)[-1]):
            next(texts)


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    source, extra = {
        "pyarrow": (str(write_parquet(tmp_path / "rows.parquet", text=["a"])), "parquet"),
        "datasets": ("org/name:test", "datasets"),
    }[package]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LongRopeError, match=rf"{source} .*needs the package {package}.*\[{extra}\]"):
        read(source)


class Rows(list[dict[str, str]]):
    """What the package gives, as far as it is used."""

    column_names = ("id", "text")

    def select_columns(self, columns: list[str]) -> list[dict[str, str]]:
        return [{column: row[column] for column in columns} for row in self]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str]]:
    """A stand-in for the one package that cannot be run without a network; records what it was asked for."""
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> Rows:
        asked.append((name, config, split))
        if name == "org/gone":
            raise ConnectionError("Couldn't reach 'org/gone' on the Hub\nsecond line")
        return Rows([{"id": "1", "text": "a"}, {"id": "2", "text": ""}, {"id": "3", "text": "c"}])

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name:test", ("org/name", None, "test")),
        ("org/name:en.v2:test", ("org/name", "en.v2", "test")),
        ("org/name:train[:100]", ("org/name", None, "train[:100]")),
        ("org/name:en:train[10%:20%]", ("org/name", "en", "train[10%:20%]")),
    ],
)
def test_the_name_of_a_dataset_says_configuration_and_split(
    hub: list[tuple[str, str | None, str]], source: str, expected: tuple[str, str | None, str]
) -> None:
    split = expected[2]
    assert read(source) == {f"org/name:{split}:1": "a", f"org/name:{split}:3": "c"}
    assert hub == [expected]


def test_a_dataset_that_cannot_be_loaded_is_named(hub: list[tuple[str, str | None, str]]) -> None:
    with pytest.raises(LongRopeError, match=r"org/gone is no file or folder here.*Couldn't reach.*--data") as caught:
        read("org/gone")
    assert "\n" not in str(caught.value)
    with pytest.raises(LongRopeError, match="should have a column body but has id, text"):
        read("org/name", text_column="body")
    with pytest.raises(LongRopeError, match="no file or folder"):
        read("org/name/more")
    assert [name for name, *_ in hub] == ["org/gone", "org/name"]


def test_a_path_goes_before_a_dataset_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: list[tuple[str, str | None, str]]
) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("local")
    monkeypatch.chdir(tmp_path)
    assert read("org/name") == {"name": "local"}
    assert hub == []


def test_the_hash_is_of_the_text_as_utf8() -> None:
    # printf 'caf\xc3\xa9' | sha256sum
    assert Text("n", "café").sha256 == "850f7dc43910ff890f8879c0ed26fe697c93a067ad93a7d50f466a7028a9bf4e"
