"""A study of a store that other hands made may have any name; no file of it leaves its folder."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from commands.extensions import Extension
from commands.options import stem
from searcher.rope import Factors
from storage.factor_file import FactorFile, ModelIdentity, Regime, to_json
from storage.repository import Repository

if TYPE_CHECKING:
    from conftest import Longrope

StopAfter = Callable[[pytest.MonkeyPatch, int], None]
NAMES = ["../up", "/tmp/../up", "..", "a/b", ".hidden", "x" * 61]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with nothing beside it."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def made(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith("longrope.db")}


@pytest.mark.parametrize("name", NAMES)
def test_a_finished_extension_is_exported_here(longrope_in: Longrope, here: Path, name: str) -> None:
    model = ModelIdentity("m", "0" * 64, "llama", 1e4, 8, 256, 2, "half-split")
    regime = Regime(1, 2048, Factors((1.0, 2.0, 3.0, 4.0)), "none")
    file = FactorFile(model, (regime,), {"study": "x", "seed": 0, "data": {}, "software": {}})
    with closing(Repository(f"sqlite:///{here / 'longrope.db'}")) as repository:
        repository.create_study(name, "extension", {"out": "/nowhere"})
        with repository.open_study(name) as store:
            store.finish({"factors": to_json(file), "model": "m"})  # type: ignore[arg-type]
    for form in ("csv", "json"):
        ended = longrope_in(here, "export", name, f"--to={form}", "--accept-loss=attention_factor")
        assert ended.status == 0, ended.err
    assert made(here) == {f"{stem(name)}-factors.csv", f"{stem(name)}-factors.json"}
    assert [path.name for path in here.parent.iterdir()] == ["here"]


def test_a_search_is_resumed_and_exported_here(
    longrope_in: Longrope, here: Path, small_study: list[str], stop_after: StopAfter
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 5)
        assert longrope_in(here, "launch", "--study=s", *small_study).status == 130
    with closing(sqlite3.connect(here / "longrope.db")) as connection, connection:
        connection.execute("update longrope_studies set name = '../up'")
    resumed = longrope_in(here, "resume", "../up")
    assert resumed.status == 0, resumed.err
    exported = longrope_in(here, "export", "../up", "--to=csv", "--method=yarn", "--accept-loss=attention_factor")
    assert exported.status == 0, exported.err
    assert made(here) == {"up-factors.json", "up-yarn-factors.csv"}
    assert [path.name for path in here.parent.iterdir()] == ["here"]


def test_stages_keep_their_files_in_the_folder(here: Path) -> None:
    nothing: Any = None
    for name in NAMES:
        extension = Extension(name, nothing, nothing, nothing, (), 1, None, here)
        assert extension.folder("search-64").resolve().parent.parent == here.resolve()


@pytest.mark.parametrize("name", ["a", "Llama-2.7b_x+y=@1", "\u00e9tude"])
def test_names_of_ours_stay_as_they_are(name: str) -> None:
    assert stem(name) == name
