"""A folder with a copy of a store, where command lines are tried."""

from __future__ import annotations

import json
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.bad_input.bad import REMOVED, SECRET, Bad
from tests.conftest import Longrope

STORE = "longrope.db"


def files(folder: Path) -> set[str]:
    """All but what SQLite keeps beside a database."""
    return {str(path) for path in folder.rglob("*") if not path.name.startswith(STORE)}


def kept(folder: Path) -> dict[str, list[Any]]:
    """What the store holds, but for who holds it."""
    with closing(sqlite3.connect(folder / STORE)) as connection:
        tables = {
            "longrope_studies": "name, kind, settings, profile, status, result",
            "longrope_candidates": "*",
            "longrope_units": "*",
            "longrope_evaluations": "*",
        }
        return {table: connection.execute(f"SELECT {rows} FROM {table}").fetchall() for table, rows in tables.items()}


def changed(text: str, changes: Mapping[str, object] | str) -> str:
    """JSON with values put in, or taken out, at dotted places; or another text outright."""
    if isinstance(changes, str):
        return changes
    document = json.loads(text)
    for place, value in changes.items():
        *path, last = (int(part) if part.isdecimal() else part for part in place.split("."))
        inner = document
        for part in path:
            inner = inner[part]
        if value is REMOVED:
            del inner[last]
        else:
            inner[last] = value
    return json.dumps(document)


class Place:
    """A folder with a copy of the store, where command lines are tried."""

    def __init__(self, folder: Path, world: Path, longrope: Longrope, names: dict[str, str]) -> None:
        self.folder = folder
        self.longrope = longrope
        self._names = names
        shutil.copy(world / STORE, folder / STORE)

    def arguments(self, command: str) -> list[str]:
        """As a shell would split it, with the names of what there is put in."""
        return shlex.split(command.format(**self._names))

    def prepare(self, bad: Bad) -> None:
        """Write the files that the command line meets."""
        if bad.plan is not None:
            (self.folder / "plan.toml").write_text(bad.plan)
        if bad.factors:
            sound = Path(self._names["world"]) / "fine.json"
            (self.folder / "factors.json").write_text(changed(sound.read_text(), bad.factors))
        if bad.config:
            path = Path(shutil.copytree(self._names["model"], self.folder / "odd")) / "config.json"
            path.write_text(changed(path.read_text(), bad.config))

    def refuses(self, bad: Bad) -> None:
        """One line that says it, and nothing left behind."""
        self.prepare(bad)
        before = (files(self.folder), kept(self.folder))
        ended = self.longrope(*self.arguments(bad.command))
        says = bad.says.format(**self._names)
        assert ended.status == bad.status, ended
        assert says in ended.err, ended
        assert "Traceback" not in ended.out + ended.err
        assert SECRET not in ended.out + ended.err
        assert (files(self.folder), kept(self.folder)) == before
        if bad.status == 1 and says != "Aborted":
            assert ended.out == "", ended
            assert ended.err.startswith("Error: ")
            assert len(ended.err.splitlines()) == 1, ended
            assert ended.err.endswith("\n")


def in_process_of_its_own(
    environment: dict[str, str], folder: Path, arguments: list[str]
) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "cli", *arguments]
    return subprocess.run(run, env=environment, cwd=folder, capture_output=True, text=True, check=False)
