"""Whatever instant an extension is killed at, what it ends with is what it would have ended with."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from kill_study import IN_PROCESS, NAME, Ended, Moment, Study

NewStudy = Callable[[Path], Study]

PLAN = """
[search]
preset = "quick"
evolution = { population = 4, parents = 2, mutants = 2, crosses = 1, generations = 1 }
refinement = { legs = 1, steps = 2 }
n_hats = [0, 4]
finalists = 1
documents = { search = 2, selection = 1, test = 1 }
windows = { search = 1, selection = 1, test = 1 }

[recover]
preset = "quick"
evolution = { population = 3, parents = 2, mutants = 1, crosses = 1, generations = 1 }
n_hats = [0]
finalists = 1
documents = { search = 2, selection = 1, test = 1 }
windows = { search = 1, selection = 1, test = 1 }

[finetune]
steps = 4
warmup = 1
learning_rate = 1e-3
batch = 2
dtype = "float32"
save_every = 1
evaluate_every = 2
documents = { search = 2, selection = 1, test = 1 }
windows = { search = 1, selection = 1, test = 1 }

[[stages]]
kind = "search"
length = "2x"

[[stages]]
kind = "finetune"
length = "2x"

[[stages]]
kind = "search"
length = "4x"

[[stages]]
kind = "recover"
length = "1x"

[[stages]]
kind = "evaluate"
lengths = ["1x", "4x"]
passkey_depths = 0
key_value_trials = 1
"""
KILLS = 30
# In the order of one extension's life, stage by stage.
MOMENTS = [
    Moment("sql INSERT INTO longrope_stages*"),
    Moment("committing UPDATE longrope_stages SET *"),
    Moment("scored search 0 *", 3),
    Moment("sql UPDATE longrope_stages SET *result*"),
    # Fine-tuning: before a checkpoint has its name, before it is recorded, in that transaction, and after it.
    Moment("renaming checkpoint-1"),
    Moment("renamed checkpoint-2"),
    Moment("sql INSERT INTO longrope_checkpoints*"),
    Moment("committing INSERT INTO longrope_checkpoints*", 2),
    Moment("sql INSERT INTO longrope_training_logs*", 2),
    Moment("renaming model"),
    Moment("renamed model"),
    Moment("committing UPDATE longrope_stages SET *result*"),
    # The second search, the recovery, the evaluation, the end.
    Moment("scoring search 0 *", 2),
    Moment("scored selection 0 *"),
    Moment("scoring test 0 *"),
    Moment("scored key_value 1 *"),
    Moment("replacing *-factors.json"),
    Moment("replaced *-factors.json"),
    Moment("sql UPDATE longrope_studies SET status*"),
    Moment("committing UPDATE longrope_studies SET status*"),
    Moment("sql UPDATE longrope_studies SET lease_token*", 2),
]


def training_text(folder: Path) -> Path:
    """Text that no set has."""
    path = folder / "train.txt"
    path.write_text("".join(random.Random(11).choices("klmnopqrst ", k=4000)))
    return path


@pytest.fixture(scope="module")
def new_study(
    tiny_llama_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], Study]:
    """``new_study(folder)``: the same extension, not begun, in a fresh database."""
    shared = tmp_path_factory.mktemp("plan")
    plan, train = shared / "tiny.toml", training_text(shared)
    plan.write_text(PLAN)
    more = (IN_PROCESS, f"--train-data={train}", "--tuning-threads=1")
    return lambda folder: Study(folder, tiny_llama_folder, text_folder, *more, plan=plan)


@pytest.fixture(scope="module")
def undisturbed(new_study: NewStudy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, float]:
    """The extension that nothing happened to, and the seconds it takes where its server is warm."""
    folder = tmp_path_factory.mktemp("undisturbed")
    study = new_study(folder / "first")
    driver = study.run()
    assert driver.status == 0, driver.output
    second = new_study(folder / "second")
    again = second.run()
    assert second.trajectory() == study.trajectory()
    return study, again.seconds


def test_the_extension_is_one(undisturbed: tuple[Study, float]) -> None:
    """The yardstick itself: stages that did something, weights that were tuned, a table of regimes."""
    found = undisturbed[0].trajectory()
    assert [(kind, status) for _, kind, _, _, status, _ in found["stages"]] == [
        (kind, "finished") for kind in ("search", "finetune", "search", "recover", "evaluate")
    ]
    assert list(found["weights"]) == [f"{NAME}/finetune-128/model/model.safetensors"]
    losses = [value for _, _, name, value in found["training"] if name == "loss"]
    assert len(losses) == len(set(losses)) == 4
    assert len({(stage, part) for stage, part, *_ in found["candidates"]}) > 10
    assert undisturbed[0].orphans() == []


def life(study: Study, moment: Moment | None = None, after: float | None = None) -> Ended:
    """One driver, killed at a moment or after some seconds; nothing that was stored is computed again."""
    before = study.stored()
    driver = study.run(moment, after)
    assert driver.status in (0, -signal.SIGKILL), driver.output
    assert before <= study.stored()
    assert before.isdisjoint(driver.started)
    assert study.orphans() == []
    return driver


def test_killed_at_every_kind_of_moment(new_study: NewStudy, undisturbed: tuple[Study, float], tmp_path: Path) -> None:
    study = new_study(tmp_path / "study")
    for moment in MOMENTS:
        assert study.status() != "finished", f"{moment} was never reached"
        driver = life(study, moment)
        assert driver.status == -signal.SIGKILL, f"{moment} was never reached:\n{driver.output}"
    assert study.status() == "finished"
    assert study.trajectory() == undisturbed[0].trajectory()


@pytest.mark.slow
def test_killed_at_random_instants(new_study: NewStudy, undisturbed: tuple[Study, float], tmp_path: Path) -> None:
    draw, kills, studies = random.Random(4), 0, 0
    while kills < KILLS:
        study, seconds = new_study(tmp_path / str(studies)), undisturbed[1]
        lives = 0
        while study.status() != "finished":
            lives += 1
            driver = life(study, after=draw.uniform(0.15, 0.5) * seconds * 1.05**lives)
            kills += driver.status != 0
        assert study.trajectory() == undisturbed[0].trajectory()
        studies += 1
    print(f"\n{kills} kills in {studies} extensions of {undisturbed[1]:.1f} s")


def test_a_truncated_checkpoint_is_refused_in_one_line(new_study: NewStudy, tmp_path: Path) -> None:
    study = new_study(tmp_path / "study")
    life(study, Moment("committing INSERT INTO longrope_checkpoints*", 2))
    # The second was killed within its transaction, so the first is what was recorded.
    (weights,) = study.folder.glob(f"{NAME}/finetune-128/checkpoint-1/*.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)
    refused = study.run()
    assert refused.status == 1
    assert "is not what was recorded" in refused.output
    assert "Traceback" not in refused.output
