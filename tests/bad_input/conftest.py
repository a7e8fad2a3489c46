"""A world of broken things with a store in it, and a place to try command lines on them."""

from __future__ import annotations

import io
import shlex
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.bad_input.place import STORE, Place
from tests.bad_input.world import break_models, break_texts, plain_factors
from tests.conftest import Longrope


@pytest.fixture(scope="session")
def world(
    tiny_llama_folder: Path,
    small_study: list[str],
    longrope_in: Longrope,
    stop_after: Any,
    text_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Everything that is broken, and a store with studies that were finished, stopped, or bereft since."""
    folder = tmp_path_factory.mktemp("world")
    break_models(tiny_llama_folder, folder)
    break_texts(folder)
    shutil.copytree(tiny_llama_folder, folder / "vanished")
    shutil.copytree(tiny_llama_folder, folder / "changing")
    shutil.copytree(text_folder, folder / "edited")
    stopped = {
        "halted": [],
        "other-model": [f"--model={folder / 'changing'}"],
        "other-text": [f"--data={folder / 'edited'}"],
        "no-model": [f"--model={folder / 'vanished'}"],
    }
    assert longrope_in(folder, "launch", "--study=done", *small_study).status == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 0)
        for name, arguments in stopped.items():
            # Another seed, or the store would know everything already and the study would not stop.
            started = longrope_in(folder, "launch", f"--study={name}", *small_study, *arguments, "--seed=1")
            assert started.status == 130
    shutil.rmtree(folder / "vanished")
    shutil.copy(folder / "reseeded" / "model.safetensors", folder / "changing")
    for path in (folder / "edited").iterdir():
        path.write_text(path.read_text()[::-1])
    plain_factors(folder / "done-factors.json", folder)
    with closing(sqlite3.connect(folder / STORE)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return folder


@pytest.fixture
def place(
    world: Path,
    longrope: Longrope,
    tiny_llama_folder: Path,
    text_folder: Path,
    small_study: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = {"model": tiny_llama_folder, "text": text_folder, "world": world}
    small = shlex.join(argument for argument in small_study if not argument.startswith(("--model", "--data")))
    return Place(tmp_path, world, longrope, {"small": small, **{name: str(path) for name, path in names.items()}})
