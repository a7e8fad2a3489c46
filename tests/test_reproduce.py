"""The command that a report states makes the same study: the same settings, whatever they were."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands.reproduce import AGAIN, again
from storage.repository import Repository
from tests.conftest import Longrope

COUNTS = "--search-documents=2 --selection-documents=1 --test-documents=2 --windows=search=1,selection=2,test=2"
OPTIONS = [
    "--target=4x",
    "--target=4x --preset=paper --seed=3 --population=9 --mutation=range --mutation-probability=0.5 --finalists=2",
    "--target=3x --sampler=cmaes --mutants=3 --crosses=2 --generations=1 --refine-final-legs=1",
    "--target=4x --no-racing --refine-legs=0 --refine-final-legs=0 --n-hats=0,4 --attention-factor=1.1 --upper-ratio=2",
    "--target=4x --preset=quick --racing --racing-caution=1.5 --critical-pair=3 --parents=4",
    "--target=4x --learn-attention --refine-rate=0.01 --refine-starts=2 --refine-steps=2 --attention-factor=yarn",
    "--target=4x --preset=quick --refine-legs=1 --data-seed=4 --dtype=float32 --chunk=16 --threads=2 --finalists=1",
    "--target=4x --preset=paper-xl --sampler=random-log --hidden-on-host --attention=longrope --original-length=60",
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_command_settles_the_same_settings(
    options: str,
    tiny_llama_folder: Path,
    text_folder: Path,
    longrope_in: Longrope,
    tmp_path: Path,
    stop_after: Callable[[pytest.MonkeyPatch, int], None],
) -> None:
    """Both are stopped at their first evaluation: what is fixed by then is all that decides the rest."""
    places = [tmp_path / "first", tmp_path / "with a blank"]
    words = [f"--model={tiny_llama_folder}", f"--data={text_folder}", "--in-process", "--study=s", f"--storage={AGAIN}"]
    words += [*options.split(), *COUNTS.split()]
    records = []
    for place in places:
        place.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 0)
            ended = longrope_in(place, "launch", *words)
        assert ended.status == 130, ended.err
        repository = Repository(f"sqlite:///{place / 'again.db'}")
        records.append(repository.study("s"))
        found = again(records[-1])
        assert len(found.remarks) == 1, found.remarks
        (line,) = found.commands
        words = shlex.split(line)[2:]
        repository.close()
    first, second = (record.settings | {"out": ""} for record in records)
    assert first == second


def test_what_no_option_says_is_remarked(
    small_study: list[str],
    longrope: Longrope,
    tmp_path: Path,
    stop_after: Callable[[pytest.MonkeyPatch, int], None],
) -> None:
    assert longrope("launch", *small_study, "--study=s").status == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 0)
        seeded = [*small_study, "--seed-factors=s-factors.json", "--study=t", "--seed=1"]
        assert longrope("launch", *seeded).status == 130
    record = Repository(f"sqlite:///{tmp_path / 'longrope.db'}").study("t")
    assert any("--seed-factors" in remark and "s-factors_256" in remark for remark in again(record).remarks)
    changed: dict[str, Any] = json.loads(json.dumps(record.settings))
    changed["search"]["racing"]["after"] = [1]
    changed["search"]["seed_factors"] = {}
    changed["pool"] = {"workers": 2, "gpus_per_worker": None, "ray_address": "head:6379"}
    found = again(type(record)("t", "search", changed, None, "stopped", None, record.created_at, record.updated_at))
    assert "--workers 2" in found.commands[0]
    assert "head:6379" not in found.commands[0]
    assert any("racing" in remark for remark in found.remarks)
    assert any("--ray-address" in remark for remark in found.remarks)
