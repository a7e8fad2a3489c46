"""Whatever a user gets wrong: one clear line, status 1 or 2, and nothing left behind."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from storage.repository import Repository
from tests.bad_input.bad import LAUNCH, Bad
from tests.bad_input.models import CONFIGS, LENGTHS, MODELS, TEXT
from tests.bad_input.place import STORE, Place, in_process_of_its_own, kept
from tests.bad_input.plans import EXTENSIONS, PLANS
from tests.bad_input.searches import MEMORY, REFINEMENT, SEARCHES, SETTINGS
from tests.bad_input.stores import EXPORTS, FACTORS, STORES, STUDIES

CASES = {
    **{**MODELS, **CONFIGS, **LENGTHS, **TEXT, **SETTINGS, **REFINEMENT, **SEARCHES, **MEMORY},
    **{**PLANS, **EXTENSIONS, **FACTORS, **STORES, **STUDIES, **EXPORTS},
}


@pytest.mark.parametrize("bad", CASES.values(), ids=CASES.keys())
def test_bad_input(place: Place, bad: Bad) -> None:
    place.refuses(bad)


def test_an_upper_bound_beyond_all_numbers(place: Place) -> None:
    place.refuses(Bad(f"{LAUNCH} --upper-ratio 1e300", "upper"))


def test_a_study_that_is_held(place: Place) -> None:
    """By this very process, which lives."""
    repository = Repository(f"sqlite:///{place.folder / STORE}")
    with repository.open_study("halted"):
        for command in ("resume halted", "studies delete halted --yes"):
            place.refuses(Bad(command, f"'halted' is held by process {os.getpid()} on host"))
    repository.close()


def test_a_store_that_is_locked(place: Place) -> None:
    with closing(sqlite3.connect(place.folder / STORE, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        ended = place.longrope(*place.arguments(f"{LAUNCH} --storage 'sqlite:///{STORE}?timeout=0.2'"))
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith(f"Error: The store sqlite:///{STORE} cannot be opened: database is locked.")
    assert len(ended.err.splitlines()) == 1


def test_a_library_without_the_reference_documents(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.reference.stdlib_dir", lambda: tmp_path / "stripped")
    place.refuses(Bad("launch --in-process", "name documents of your own with --data"))


@pytest.mark.ray
def test_a_gpu_where_none_is(small_study: list[str], process_environment: dict[str, str], tmp_path: Path) -> None:
    """In a process of its own, with everything that libraries print by themselves."""
    arguments = [argument for argument in small_study if argument != "--in-process"]
    environment = {**process_environment, "CUDA_VISIBLE_DEVICES": ""}
    launch = ["launch", *arguments, "--gpus-per-worker=1", "--workers=1"]
    ended = in_process_of_its_own(environment, tmp_path, launch)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith(
        "Error: 1 workers of 1 GPUs, 1 CPUs each were asked for, but the Ray cluster has 0 GPUs"
    )
    assert "lower --workers, --gpus-per-worker or --threads" in ended.stderr
    assert kept(tmp_path)["longrope_studies"] == []
