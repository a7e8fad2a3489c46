"""Names, paths and errors that others wrote are printed as they are: brackets are no markup, colons no pictures."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import workers.scorer
from storage.repository import Repository

if TYPE_CHECKING:
    from conftest import Longrope

# A closing tag of nothing ends Rich with an error; an opening one, and a picture's name, vanish without a word.
SAID = (
    "Worker 3 was lost (RuntimeError: [/pytorch/gloo/pair.cc:598] Connection closed by peer), books[/1].txt again: "
    "[enforce fail at alloc_cpu.cpp:117] :warning: [x]."
)
MODEL, TEXT, OUT = "llama[bold]", "books[red]:x:", "out[dim]"


@pytest.fixture
def arguments(tmp_path: Path, small_study: list[str], tiny_llama_folder: Path, text_folder: Path) -> list[str]:
    """What follows ``launch`` for a small study whose every path holds brackets."""
    shutil.copytree(tiny_llama_folder, tmp_path / MODEL)
    shutil.copytree(text_folder, tmp_path / TEXT)
    (tmp_path / OUT).mkdir()
    (tmp_path / "models[").mkdir()
    options = [word for word in small_study if not word.startswith(("--model", "--data"))]
    return [f"--model={tmp_path / MODEL}", f"--data={tmp_path / TEXT}", f"--out={OUT}", "--study=s", *options]


def test_a_whole_study(
    longrope: Longrope, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = workers.scorer.open_scorer

    @contextmanager
    def talkative(request: Any, tokens: Any, pool: Any, say: Callable[[str], None]) -> Iterator[Any]:
        with opened(request, tokens, pool, say) as scorer:
            say(SAID)
            yield scorer

    monkeypatch.setattr("commands.runs.open_scorer", talkative)
    launched = longrope("launch", *arguments)
    assert launched.status == 0, launched.err
    assert SAID in " ".join(launched.out.split())  # folded lines are one again
    assert f"study s: {MODEL} (" in launched.out
    assert f"factors: {OUT}/s-factors.json" in launched.out.splitlines()
    for to in ("x[/final].csv", "models[/final].csv"):
        (tmp_path / to).parent.mkdir(exist_ok=True)
        ended = longrope("export", "s", "--to=csv", f"--out={to}", "--accept-loss=n_hat")
        assert f"written: {to}" in ended.out.splitlines(), ended.err
    imported = longrope("import", "models[/final].csv", f"--model={MODEL}", "--target=4x", "--out=:key:[/f].json")
    assert imported.status == 1  # the folder ":key:[" is none
    assert ":key:[/f].json" in imported.err
    imported = longrope("import", "models[/final].csv", f"--model={MODEL}", "--target=4x", "--out=:key:[b].json")
    assert "written: :key:[b].json" in imported.out.splitlines(), imported.err
    page = longrope("report", "s", "--out=[red].html")
    assert "written: [red].html" in page.out.splitlines()
    shown = longrope("studies", "show", "s")
    assert shown.out.startswith(f"s: finished, {tmp_path / MODEL}\n")


def test_tables_and_errors(longrope: Longrope, arguments: list[str], tmp_path: Path) -> None:
    """What is in their cells and titles, from a store of other hands."""
    assert longrope("launch", *arguments).status == 0
    name = "[/s] :x: [bold]"
    with closing(sqlite3.connect(tmp_path / "longrope.db")) as connection, connection:
        connection.execute("update longrope_studies set name = ?", (name,))
        connection.execute("update longrope_candidates set origin = '[/o] :x: [red]'")
    listed, shown = longrope("studies"), longrope("studies", "show", name)
    assert f"│ {name} " in listed.out
    assert "│ [/o] :x: [red] " in shown.out
    with closing(Repository(f"sqlite:///{tmp_path / 'longrope.db'}")) as repository:
        repository.create_study("[/t]", "extension", {"model": {"path": "m"}}, [("search", {"name": "[/eight]"})])
    compared = longrope("studies", "compare", name, "[/t]")
    assert f" {name} " in compared.out, compared.err
    assert " [/t] " in compared.out
    assert " [/eight] " in longrope("studies", "show", "[/t]").out
    refused = longrope("studies", "show", "[/t] [bold]")
    assert "There is no study '[/t] [bold]'" in refused.err
    wrong = longrope("studies", "show", name, "--st[/x]")
    assert wrong.status == 2
    assert "--st[/x]" in wrong.err


def test_a_plan(longrope: Longrope, tmp_path: Path) -> None:
    stages = """
        name = "[/p] :x:"
        stages = [{kind = "search", length = "2x"}, {kind = "evaluate", lengths = ["2x"]}]
    """
    (tmp_path / "p.toml").write_text(stages)
    ended = longrope("extend", "p.toml", "--show")
    assert ended.out.startswith("[/p] :x:: about what"), ended.err
