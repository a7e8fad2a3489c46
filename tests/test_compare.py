"""``longrope studies compare``, and what the other commands on studies say as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer

import cli
from searcher.rope import Factors
from searcher.study import Candidate, Document, Outcome
from storage.comparison import compare, comparison_tables
from storage.factor_file import read
from storage.repository import Repository

if TYPE_CHECKING:
    from conftest import Longrope


@pytest.fixture(scope="module")
def two(longrope_in: Longrope, small_study: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two studies of one store: their folder, and what launching each printed."""
    folder = tmp_path_factory.mktemp("two")
    answers = {}
    for name, options in {
        "a": [],
        "b": ["--seed=1", "--generations=1", "--windows=search=1,selection=2,test=1"],
    }.items():
        ended = longrope_in(folder, "launch", f"--study={name}", "--json", *small_study, *options)
        assert ended.status == 0, ended.err
        answers[name] = json.loads(ended.out)
    return folder, answers


def test_what_differs_and_nothing_else(two: Any, longrope_in: Longrope) -> None:
    folder, answers = two
    found = json.loads(longrope_in(folder, "studies", "compare", "a", "b", "--json").out)
    assert found["studies"] == {name: {"kind": "search", "status": "finished"} for name in ("a", "b")}
    settings = found["settings"]
    assert settings["search.seed"] == {"a": 0, "b": 1}
    assert settings["search.evolution.generations"] == {"a": 2, "b": 1}
    assert settings["corpus.windows.test"] == {"a": 2, "b": 1}
    # Fewer windows of the same documents: other windows, with which the short ones go.
    assert settings.keys() - {"documents.test", "documents.short"} == {
        "search.seed",
        "search.evolution.generations",
        "corpus.windows.test",
    }
    assert found["notes"] == ["The test documents differ, so perplexities on them do not compare."]
    for part in ("test", "selection", "short"):
        for name, answer in answers.items():
            assert {method: row[name] for method, row in found["scores"][part].items()} == answer[part]
    for name, answer in answers.items():
        cost = found["cost"][name]
        assert (cost["forwards"], cost["gradients"]) == (answer["cost"], answer["gradients"])
        assert 0 < cost["work_seconds"] < cost["seconds"] + 60
    one, other = (read(folder / f"{name}-factors.json").regimes[-1].factors for name in ("a", "b"))
    difference = found["differences"]["b"]["searched"]
    ratios = [y / x for x, y in zip(one.by_layer()[0], other.by_layer()[0], strict=True)]
    assert difference["ratios"] == ratios
    assert difference["largest_ratio"] == pytest.approx(max(max(r, 1 / r) for r in ratios), rel=1e-12)
    assert difference["mean_ratio"] == pytest.approx(math.prod(max(r, 1 / r) for r in ratios) ** (1 / 8), rel=1e-12)
    assert found["factors"]["a"]["searched"]["n_hat"] == one.n_hat


def test_the_tables_hold_the_figures(two: Any, longrope_in: Longrope) -> None:
    folder, answers = two
    out = longrope_in(folder, "studies", "compare", "b", "a").out
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    assert ["search.seed", "1", "0"] in rows
    assert ["YaRN", f"{answers['b']['test']['yarn']:.4f}", f"{answers['a']['test']['yarn']:.4f}"] in rows
    assert ["document forwards of the search", str(answers["b"]["cost"]), str(answers["a"]["cost"])] in rows
    assert "The test documents differ" in out
    assert "a: n_hat " in out


@pytest.mark.parametrize("names", [["a"], ["a", "a"], ["a", "b", "a"]])
def test_it_takes_two_studies_or_more(two: Any, longrope_in: Longrope, names: list[str]) -> None:
    ended = longrope_in(two[0], "studies", "compare", *names)
    assert ended.status == 1
    assert "Name two studies or more to compare, each once" in ended.err


def test_one_that_is_not_there_is_named(two: Any, longrope_in: Longrope) -> None:
    assert "There is no study 'c'" in longrope_in(two[0], "studies", "compare", "a", "c").err


def test_unfinished_studies_and_extensions_are_shown_as_far_as_they_are(tmp_path: Path) -> None:
    repository = Repository(f"sqlite:///{tmp_path / 'store.db'}")
    document = Document("a", "a" * 64, 64)
    repository.create_study("begun", "search", {"model": {"path": "m", "target_length": 64}, "documents": {"test": []}})
    with repository.open_study("begun") as store:
        store.add_generation(0, "search", 0, [Candidate(Factors((1.0,)), "mutant")], [document], [["key"]])
        store.record(Outcome("key", 1.0, 10, 2.5))
    repository.create_study("far", "extension", {"model": {"path": "m"}}, [("search", {"name": "eight"})])
    found = compare(repository, ["begun", "far"])
    assert found["notes"] == ["begun is not finished: stopped.", "far is not finished: stopped."]
    assert found["cost"]["begun"]["work_seconds"] == 2.5
    assert found["factors"] == {"begun": {}, "far": {}}
    assert found["scores"] == {}
    assert found["settings"]["model.target_length"] == {"begun": 64, "far": None}
    assert len(comparison_tables(found)) == 4  # settings, two notes, cost
    repository.close()


def commands(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below a group, with its words."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)
        else:
            yield (*names, name), command


def test_every_command_takes_json() -> None:
    found = dict(commands(typer.main.get_command(cli.app)))
    assert {("launch",), ("dashboard",), ("studies", "compare"), ("studies", "delete")} <= found.keys()
    without = [names for names, command in found.items() if not any("--json" in p.opts for p in command.params)]
    assert without == []


def test_a_deletion_says_as_json_what_went_and_what_stays(longrope: Longrope, tmp_path: Path) -> None:
    repository = Repository(f"sqlite:///{tmp_path / 'longrope.db'}")
    repository.create_study("plain", "search", {})
    repository.create_study("far", "extension", {"out": "/models"}, [("search", {"name": "eight"})])
    repository.close()
    assert json.loads(longrope("studies", "delete", "plain", "--yes", "--json").out) == {
        "deleted": "plain",
        "models": None,
    }
    assert json.loads(longrope("studies", "delete", "far", "--yes", "--json").out)["models"] == "/models/far"
    assert json.loads(longrope("studies", "--json").out) == []


def test_a_deletion_says_so(longrope: Longrope, tmp_path: Path) -> None:
    with closing(Repository(f"sqlite:///{tmp_path / 'longrope.db'}")) as repository:
        repository.create_study("plain", "search", {})
    assert longrope("studies", "delete", "plain", "--yes").out == "deleted: plain\n"
