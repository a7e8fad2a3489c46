"""The command on a tiny random model and made-up text: what it prints, what it writes, what it keeps."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import typer

import cli
from searcher.study import WITHOUT_N_HAT
from storage.factor_file import read
from storage.repository import Repository, ScoredCandidate

if TYPE_CHECKING:
    from conftest import Ended, Longrope

ROOT = Path(cli.__file__).parent
STORE = "longrope.db"
BASELINES = {"none", "pi", "ntk", "ntk_base", "dynamic_ntk", "abf", "yarn"}
SEARCHED = {"searched", WITHOUT_N_HAT}


def computed(printed: str) -> int:
    """How many evaluations a launch or a resume says it computed."""
    (number,) = re.findall(r"^(\d+) evaluations computed in \d+ s, \d+ found in the store\b", printed, re.MULTILINE)
    return int(number)


def candidates(folder: Path, study: str) -> list[ScoredCandidate]:
    """Every candidate of a study in the folder's store."""
    repository = Repository(f"sqlite:///{folder / STORE}")
    try:
        return repository.generations(study)
    finally:
        repository.close()


def is_searched(row: ScoredCandidate) -> bool:
    """Whether a candidate is part of the search, and not a row of the report."""
    return row.part in ("search", "refine", "refined") or (row.part, row.generation) == ("selection", 0)


class Shared:
    """One study that was launched with ``--json``, for all the tests that only look at it."""

    def __init__(self, folder: Path, out: str, err: str) -> None:
        self.folder = folder
        self.out = out
        self.err = err
        self.store = f"--storage=sqlite:///{folder / STORE}"

    @property
    def answer(self) -> dict[str, Any]:
        """What launch printed: the whole of it is one JSON object."""
        answer: dict[str, Any] = json.loads(self.out)
        return answer

    def settings(self, longrope: Longrope) -> dict[str, Any]:
        """What the store keeps of how it was launched."""
        settings: dict[str, Any] = json.loads(longrope("studies", "show", "shared", self.store, "--json").out)[
            "settings"
        ]
        return settings

    @property
    def factors(self) -> Path:
        return self.folder / "shared-factors.json"


@pytest.fixture(scope="module")
def shared(longrope_in: Longrope, small_study: list[str], tmp_path_factory: pytest.TempPathFactory) -> Shared:
    folder = tmp_path_factory.mktemp("shared")
    ended = longrope_in(folder, "launch", "--study=shared", "--json", *small_study)
    assert ended.status == 0, ended.err
    return Shared(folder, ended.out, ended.err)


class TestLaunch:
    def test_json_is_one_object_with_the_names_that_scripts_rely_on(self, shared: Shared) -> None:
        answer = shared.answer
        assert answer["study"] == "shared"
        assert answer["target"] == 256
        assert answer["scale"] == 4.0
        assert answer["attention_factor"] == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)), rel=1e-15)
        assert answer["seconds"] > 0
        for part in ("selection", "test"):
            for table in (answer[part], answer[f"{part}_at_study_attention"]):
                assert table.keys() == BASELINES | SEARCHED
                assert all(math.isfinite(value) and value > 1 for value in table.values())
        assert answer["short"].keys() == BASELINES | SEARCHED
        assert answer.keys() == {
            *("study", "factors", "target", "scale", "attention_factor", "cost", "gradients", "seconds", "short"),
            *("selection", "test", "selection_at_study_attention", "test_at_study_attention"),
        }

    def test_cost_counts_what_the_search_is_made_of_and_no_report_row(self, shared: Shared) -> None:
        windows = {"search": 2, "refined": 2, "selection": 2}
        searched = [row for row in candidates(shared.folder, "shared") if is_searched(row) and row.part != "refine"]
        dropped = [row for row in searched if row.dropped]
        # Each was left after the first of two documents.
        assert shared.answer["cost"] == sum(windows[row.part] for row in searched) - len(dropped)

    def test_gradients_counts_every_step_of_every_refinement(self, shared: Shared) -> None:
        rows = candidates(shared.folder, "shared")
        steps = [row for row in rows if row.part == "refine"]
        assert shared.answer["gradients"] == len(steps) == sum(row.gradients for row in steps) > 3
        assert {row.generation for row in steps} == set(range(len(steps)))
        legs = [row for row in rows if row.origin.startswith("refined:") and row.part == "refined"]
        assert len(steps) == 3 * len(legs)

    def test_perplexities_are_those_of_the_store(self, shared: Shared) -> None:
        stored = {
            (row.part, row.origin.removeprefix("baseline:")): math.exp((row.nll or math.nan) / row.tokens)
            for row in candidates(shared.folder, "shared")
            if not is_searched(row)
        }
        for part in ("selection", "test", "short"):
            for method, value in shared.answer[part].items():
                assert value == stored[part, method]
        for part in ("selection", "test"):
            table = shared.answer[f"{part}_at_study_attention"]
            assert {method: table[method] for method in BASELINES} == {
                method: stored[part, f"{method}@study"] for method in BASELINES
            }

    def test_the_winner_is_the_best_finalist_on_the_selection_documents(self, shared: Shared) -> None:
        rows = candidates(shared.folder, "shared")
        finalists = [row for row in rows if (row.part, row.generation) == ("selection", 0)]
        best = min(math.exp((row.nll or math.nan) / row.tokens) for row in finalists)
        assert shared.answer["selection"]["searched"] == best
        seeds = [row for row in rows if row.part == "search" and row.origin.startswith("seed:")]
        best_seed = min(seeds, key=lambda row: row.nll or math.inf)
        assert best_seed.factors in [row.factors for row in finalists]

    def test_factors_are_written_where_the_answer_says(self, shared: Shared) -> None:
        assert shared.answer["factors"] == "shared-factors.json"
        (regime,) = read(shared.factors).regimes
        assert (regime.min_length, regime.max_length) == (65, 256)
        assert regime.scores["test"].perplexity == shared.answer["test"]["searched"]
        assert regime.scores["test"].tokens == 4 * 255

    def test_progress_is_not_in_the_answer(self, shared: Shared) -> None:
        assert "generation 2/2" in shared.err
        assert "refinement step 0: " in shared.err
        assert "test: 4 windows of 2 documents, 1020 tokens scored" in shared.err

    def test_a_seed_gives_equal_bytes(
        self, longrope_in: Longrope, shared: Shared, small_study: list[str], tmp_path: Path
    ) -> None:
        assert longrope_in(tmp_path, "launch", "--study=shared", *small_study).status == 0
        assert (tmp_path / "shared-factors.json").read_bytes() == shared.factors.read_bytes()

    def test_other_seeds_search_elsewhere_on_the_same_documents(
        self, longrope: Longrope, shared: Shared, small_study: list[str], tmp_path: Path
    ) -> None:
        assert longrope("launch", "--study=other", *small_study, "--seed=1").status == 0
        mutants = [
            {row.factors.lambdas for row in candidates(folder, study) if row.origin == "mutant"}
            for folder, study in ((shared.folder, "shared"), (tmp_path, "other"))
        ]
        assert all(mutants)
        assert len(mutants[0] & mutants[1]) < len(mutants[0]) / 2  # fine steps from one parent may meet on the grid
        dealt = json.loads(longrope("studies", "show", "other", "--json").out)["settings"]["documents"]
        assert dealt == shared.settings(longrope)["documents"]

    def test_another_data_seed_deals_other_documents(
        self, longrope: Longrope, shared: Shared, small_study: list[str], tmp_path: Path
    ) -> None:
        assert longrope("launch", "--study=other", *small_study, "--data-seed=1").status == 0
        dealt = json.loads(longrope("studies", "show", "other", "--json").out)["settings"]["documents"]
        documents = shared.settings(longrope)["documents"]
        assert set(dealt["test"]) != set(documents["test"])
        # What is asked for first does not depend on the documents.
        first = [
            [row.factors for row in candidates(folder, study) if (row.part, row.generation) == ("search", 0)]
            for folder, study in ((shared.folder, "shared"), (tmp_path, "other"))
        ]
        assert first[0] == first[1]

    def test_nothing_is_computed_twice_in_one_store(
        self, longrope: Longrope, shared: Shared, small_study: list[str], tmp_path: Path
    ) -> None:
        again = longrope("launch", "--study=again", "--json", *small_study, shared.store)
        assert again.status == 0
        assert computed(again.err) == 0
        answer = json.loads(again.out)
        same = shared.answer.keys() - {"study", "factors", "seconds"}
        assert {key: answer[key] for key in same} == {key: shared.answer[key] for key in same}
        assert read(tmp_path / "again-factors.json").regimes == read(shared.factors).regimes

    def test_tables_for_people(
        self, longrope: Longrope, shared: Shared, small_study: list[str], tmp_path: Path
    ) -> None:
        (tmp_path / "results").mkdir()
        ended = longrope("launch", *small_study, "--out=results", shared.store)
        assert (ended.status, ended.err) == (0, "")
        assert "study tiny-llama-256-seed0: tiny-llama (llama, window 64), target 256 tokens, scale 4" in ended.out
        assert f"{shared.answer['cost']} document forwards" in ended.out
        assert f"YaRN                │     0 │ {shared.answer['test']['yarn']:.4f}  (at 1.1386)" in ended.out
        assert "factors: results/tiny-llama-256-seed0-factors.json" in ended.out
        assert (tmp_path / "results" / "tiny-llama-256-seed0-factors.json").is_file()

    def test_a_name_is_made_up_that_is_free(
        self, longrope: Longrope, tiny_llama_folder: Path, small_study: list[str], tmp_path: Path
    ) -> None:
        (tmp_path / "my model").symlink_to(tiny_llama_folder)
        for name in ("tiny-llama-256-seed0", "tiny-llama-256-seed0-2"):
            ended = longrope("launch", *small_study, "--model=my model", "--generations=0")
            assert ended.status == 0
            assert (tmp_path / f"{name}-factors.json").is_file()

    def test_without_n_hat(self, longrope: Longrope, shared: Shared, small_study: list[str], tmp_path: Path) -> None:
        ended = longrope("launch", "--study=plain", *small_study, "--n-hats=0", f"--storage=sqlite:///{STORE}")
        assert ended.status == 0
        assert {row.factors.n_hat for row in candidates(tmp_path, "plain")} == {0}
        (regime,) = read(tmp_path / "plain-factors.json").regimes
        assert regime.factors.n_hat == 0
        assert regime.without_n_hat is None
        # Had n_hat never been in play, this would show nothing.
        assert {row.factors.n_hat for row in candidates(shared.folder, "shared")} > {0}

    def test_factors_of_a_file_are_seeds(
        self, longrope: Longrope, shared: Shared, small_study: list[str], tmp_path: Path
    ) -> None:
        lambdas = [1.0, 1.07, 1.31, 1.9, 2.22, 3.5, 4.11, 4.8]
        for folder, first in (("one", 1.0), ("two", 1.02)):
            document = json.loads(shared.factors.read_text())
            document["regimes"][0] |= {"lambdas": [first, *lambdas[1:]], "n_hat": 16}
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "mine.json").write_text(json.dumps(document))
        seeds = ["--seed-factors=one/mine.json", "--seed-factors=two/mine.json"]
        assert longrope("launch", "--study=seeded", *seeds, *small_study).status == 0
        scored = {row.origin: row.factors for row in candidates(tmp_path, "seeded") if row.part == "search"}
        assert scored["seed:mine_256"].lambdas == tuple(lambdas)
        assert scored["seed:mine_256_2"].lambdas == (1.02, *lambdas[1:])
        assert scored["seed:mine_256"].n_hat == 16

    def test_sets_that_the_user_names(self, longrope: Longrope, text_folder: Path, small_study: list[str]) -> None:
        files = {part: text_folder / f"{number}.txt" for number, part in enumerate(("search", "selection", "test"))}
        arguments = [argument for argument in small_study if "documents=" not in argument and "data=" not in argument]
        named = [f"--data={files['search']}", f"--selection-data={files['selection']}", f"--test-data={files['test']}"]
        ended = longrope("launch", "--study=named", *arguments, *named, "--json")
        assert ended.status == 0
        assert "selection: 2 windows of 1 documents" in ended.err
        settings = json.loads(longrope("studies", "show", "named", "--json").out)["settings"]
        for part, path in files.items():
            body = [2 + alphabet().index(character) for character in path.read_text()]
            window = np.array([0, *body[:255]], dtype="<u4")
            assert settings["documents"][part][0] == hashlib.sha256(window.tobytes()).hexdigest()

    def test_jsonl_is_text_as_files_are(
        self, longrope: Longrope, shared: Shared, text_folder: Path, small_study: list[str], tmp_path: Path
    ) -> None:
        rows = [{"body": path.read_text(), "id": path.name} for path in sorted(text_folder.iterdir(), reverse=True)]
        (tmp_path / "books.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = [argument for argument in small_study if not argument.startswith("--data")]
        jsonl = ["--data=books.jsonl", "--text-column=body", shared.store]
        ended = longrope("launch", "--study=jsonl", *arguments, *jsonl, "--json")
        assert ended.status == 0
        assert computed(ended.err) == 0
        assert json.loads(ended.out)["test"] == shared.answer["test"]

    def test_code_that_comes_with_a_model_runs_where_it_is_allowed(
        self,
        longrope: Longrope,
        tiny_llama_folder: Path,
        small_study: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        modules = tmp_path / "modules"
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
        monkeypatch.syspath_prepend(str(modules))
        folder = tmp_path / "own-code"
        with_own_code(tiny_llama_folder, folder)
        ended = longrope("launch", *small_study, f"--model={folder}", "--generations=0", "--trust-remote-code")
        assert (ended.status, ended.err) == (0, "")
        assert "own-code (mine, window 64)" in ended.out


def alphabet() -> list[str]:
    """The characters of the tiny model's tokenizer, in the order of their tokens; BOS and EOS come before."""
    from tokenizers import pre_tokenizers

    return [" " if character == "Ġ" else character for character in sorted(pre_tokenizers.ByteLevel.alphabet())]


def with_own_code(model: Path, folder: Path) -> None:
    """A copy of a Llama as a family of its own, whose two classes come with it."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    places = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": places}))
    (folder / "configuration_mine.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
    )
    (folder / "modeling_mine.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_mine import MineConfig\n\n\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )


class TestResume:
    def stop(self, longrope_in: Longrope, folder: Path, stop_after: Any, evaluations: int, *launch: str) -> Ended:
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, evaluations)
            return longrope_in(folder, "launch", "--study=shared", *launch)

    @pytest.mark.parametrize("evaluations", [0, 5, 40])
    def test_goes_on_to_the_same_bytes(
        self,
        longrope_in: Longrope,
        longrope: Longrope,
        shared: Shared,
        small_study: list[str],
        stop_after: Any,
        tmp_path: Path,
        evaluations: int,
    ) -> None:
        stopped = self.stop(longrope_in, tmp_path, stop_after, evaluations, *small_study)
        assert (stopped.status, stopped.err) == (130, "")
        assert "what was computed is kept. Go on with: longrope resume shared" in stopped.out
        assert not (tmp_path / "shared-factors.json").exists()
        resumed = longrope("resume", "shared", "--json")
        assert resumed.status == 0
        assert computed(resumed.err) == computed(shared.err) - evaluations > 0
        assert (tmp_path / "shared-factors.json").read_bytes() == shared.factors.read_bytes()
        assert json.loads(resumed.out)["test"] == shared.answer["test"]

    def test_from_another_folder_and_with_relative_paths(
        self,
        longrope_in: Longrope,
        tiny_llama_folder: Path,
        text_folder: Path,
        small_study: list[str],
        stop_after: Any,
        tmp_path: Path,
    ) -> None:
        here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
        here.mkdir()
        elsewhere.mkdir()
        (here / "model").symlink_to(tiny_llama_folder)
        (here / "text").symlink_to(text_folder)
        relative = ["--model=./model", "--data=text"]
        assert self.stop(longrope_in, here, stop_after, 3, *small_study, *relative).status == 130
        assert longrope_in(elsewhere, "resume", "shared", f"--storage=sqlite:///{here / STORE}").status == 0
        assert (here / "shared-factors.json").is_file()
        assert not (elsewhere / "shared-factors.json").exists()

    def test_before_anything_began(
        self, longrope: Longrope, small_study: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("commands.runs.load_tokenizer", interrupted)
        ended = longrope("launch", "--study=early", *small_study)
        assert ended.status == 130
        assert "Stopped; nothing had begun." in ended.out
        assert json.loads(longrope("studies", "--json").out) == []

    def test_other_numerics_are_refused_unless_accepted(
        self,
        longrope_in: Longrope,
        longrope: Longrope,
        small_study: list[str],
        stop_after: Any,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        assert self.stop(longrope_in, tmp_path, stop_after, 5, *small_study).status == 130
        before = candidates(tmp_path, "shared")
        monkeypatch.setattr("transformers.__version__", "99.0")
        refused = longrope("resume", "shared")
        assert (refused.status, refused.out) == (1, "")
        assert "-> 99.0" in refused.err
        assert "--accept-numerics" in refused.err
        assert candidates(tmp_path, "shared") == before
        accepted = longrope("resume", "shared", "--accept-numerics")
        assert (accepted.status, accepted.err) == (0, "")
        assert (tmp_path / "shared-factors.json").is_file()

    def test_a_machine_that_computes_something_else_is_refused(
        self, longrope_in: Longrope, longrope: Longrope, small_study: list[str], stop_after: Any, tmp_path: Path
    ) -> None:
        """The same software, the same processor by name: a known text shows that it is not the same."""
        import workers.scorer

        assert self.stop(longrope_in, tmp_path, stop_after, 5, *small_study).status == 130
        with pytest.MonkeyPatch.context() as patch:
            probe = workers.scorer.probe
            patch.setattr(workers.scorer, "probe", lambda loaded: (probe(loaded) or 0.0) + 1e-9)
            refused = longrope("resume", "shared")
        assert (refused.status, refused.out) == (1, "")
        assert "This machine gives a loss of" in refused.err
        assert longrope("resume", "shared").status == 0


class TestStudies:
    def test_list(self, longrope: Longrope, shared: Shared) -> None:
        (study,) = (s for s in json.loads(longrope("studies", shared.store, "--json").out) if s["name"] == "shared")
        rows = candidates(shared.folder, "shared")
        assert study["status"] == "finished"
        assert study["candidates"] == len(rows)
        dropped = sum(row.dropped for row in rows)
        assert study["done"] == sum(row.scored for row in rows)
        assert study["units"] == study["done"] + dropped  # each left one of two documents out
        assert (study["dropped"], study["skipped"]) == (dropped, dropped)
        (line,) = (line for line in longrope("studies", shared.store).out.splitlines() if "│ shared " in line)
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        done = f"{study['done']}/{study['done']}"
        assert cells[:8] == ["shared", "search", "finished", "", str(len(rows)), done, "0", str(dropped)]

    def test_none(self, longrope: Longrope, tmp_path: Path) -> None:
        for command in ("studies", "studies show x", "studies delete x --yes", "resume x", "export x"):
            ended = longrope(*command.split())
            there_is_none = f"Error: There is no store at sqlite:///{STORE}; `longrope launch` makes one.\n"
            assert (ended.status, ended.out, ended.err) == (1, "", there_is_none)
        assert list(tmp_path.iterdir()) == []

    def test_one_that_nobody_goes_on_with_is_stopped(
        self, longrope: Longrope, small_study: list[str], stop_after: Any
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 5)
            assert longrope("launch", "--study=halted", *small_study).status == 130
        (study,) = json.loads(longrope("studies", "--json").out)
        assert (study["status"], study["done"]) == ("stopped", 5)
        assert longrope("studies", "show", "halted").out.startswith("halted: stopped, ")

    def test_show(self, longrope: Longrope, shared: Shared) -> None:
        shown = json.loads(longrope("studies", "show", "shared", shared.store, "--json").out)
        assert shown["name"] == "shared"
        assert shown["status"] == "finished"
        assert shown["settings"]["search"]["target_length"] == 256
        assert shown["profile"]["dtype"] == "float32"
        assert shown["result"]["forwards"] == shared.answer["cost"]
        assert shown["candidates"] == len(candidates(shared.folder, "shared"))
        assert shown["failures"] == []
        assert (shown["cost"]["forwards"], shown["cost"]["gradients"]) == (
            shared.answer["cost"],
            shared.answer["gradients"],
        )
        assert shown["cost"]["report"] == sum(row.scored for row in candidates(shared.folder, "shared")) - (
            shared.answer["cost"] + shared.answer["gradients"]
        )
        table = longrope("studies", "show", "shared", shared.store).out
        for part in ("selection", "test", "short"):
            assert f"Perplexity on the {part} documents" in table
            assert f"{shared.answer[part]['searched']:.4f}" in table
        assert f"{shared.answer['gradients']} gradient steps" in " ".join(table.split())

    def test_show_claims_nothing_that_was_not_scored(self, longrope: Longrope, shared: Shared) -> None:
        """On short text, baselines are scored under their own attention factor alone."""
        table = longrope("studies", "show", "shared", shared.store).out.partition("on the short documents")[2]
        (yarn,) = (line for line in table.splitlines() if "YaRN" in line)
        assert [cell.strip() for cell in yarn.split("│")[3:5]] == [
            f"{shared.answer['short']['yarn']:.4f}  (at 1.1386)",
            "-",
        ]

    def test_delete(self, longrope: Longrope, small_study: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("first", "second"):
            assert longrope("launch", f"--study={name}", *small_study, "--generations=0").status == 0
        monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
        assert longrope("studies", "delete", "first").status == 1
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
        assert longrope("studies", "delete", "first").status == 0
        assert [study["name"] for study in json.loads(longrope("studies", "--json").out)] == ["second"]
        # What both had computed is still there; once the second is gone too, nothing is.
        assert computed(longrope("launch", "--study=third", *small_study, "--generations=0").out) == 0
        for name in ("second", "third"):
            assert longrope("studies", "delete", name, "--yes").status == 0
        assert computed(longrope("launch", "--study=fourth", *small_study, "--generations=0").out) > 0

    def test_the_store_of_the_environment(self, longrope: Longrope, shared: Shared) -> None:
        url = shared.store.removeprefix("--storage=")
        assert "shared" in longrope("studies", LONGROPE_STORAGE=url).out


class TestEvaluate:
    def arguments(self, model: Path, text: Path) -> list[str]:
        return ["evaluate", "--in-process", f"--model={model}", f"--data={text}", "--json"]

    def test_every_method_at_every_length(
        self, longrope: Longrope, shared: Shared, tiny_llama_folder: Path, text_folder: Path
    ) -> None:
        arguments = self.arguments(tiny_llama_folder, text_folder)
        ended = longrope(*arguments, f"--factors={shared.factors}", "--lengths=32,1x,128,4x,8x")
        assert (ended.status, ended.err) == (0, "")
        answer = json.loads(ended.out)
        rows = answer["perplexity"]
        assert rows.keys() == BASELINES | {"searched"}
        assert list(rows["none"]) == ["32", "64", "128", "256", "512"]
        # Within the window all methods are the untouched model, and beyond the file's target it has nothing to say.
        assert list(rows["searched"]) == ["32", "64", "128", "256"]
        assert all(list(rows[name]) == ["128", "256", "512"] for name in BASELINES - {"none"})
        for length in ("32", "64"):
            assert rows["searched"][length] == rows["none"][length]
        assert answer["documents"]["256"] == {"windows": 18, "tokens_scored": 18 * 255}
        assert answer["documents"]["512"] == {"windows": 9, "tokens_scored": 9 * 511}

    def test_against_plain_transformers(self, longrope: Longrope, tiny_llama_folder: Path, text_folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        file = text_folder / "3.txt"
        ended = longrope(*self.arguments(tiny_llama_folder, file), "--lengths=64,256", "--windows=1")
        found = json.loads(ended.out)["perplexity"]["none"]
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
        body = [2 + alphabet().index(character) for character in file.read_text()]
        for length in (64, 256):
            ids = torch.tensor([[0, *body[: length - 1]]])
            with torch.inference_mode():
                loss = model(input_ids=ids, labels=ids).loss
            assert found[str(length)] == pytest.approx(math.exp(loss), rel=1e-5)

    def test_a_file_of_another_model_is_remarked_on(
        self, longrope: Longrope, shared: Shared, text_folder: Path, tmp_path: Path
    ) -> None:
        from tiny_models import write_model

        other = write_model(tmp_path / "other", "llama", seed=1)
        ended = longrope(*self.arguments(other, text_folder), f"--factors={shared.factors}", "--lengths=128")
        assert ended.status == 0
        assert "was searched on other weights (tiny-llama)" in ended.err
        assert "searched" in json.loads(ended.out)["perplexity"]

    def test_tables_for_people(self, longrope: Longrope, tiny_llama_folder: Path, text_folder: Path) -> None:
        arguments = self.arguments(tiny_llama_folder, text_folder)
        figures = json.loads(longrope(*arguments, "--lengths=64,128").out)["perplexity"]
        arguments.remove("--json")
        out = longrope(*arguments, "--lengths=128,64,2x").out
        (pi,) = (line for line in out.splitlines() if line.startswith("│ PI "))
        assert [cell.strip() for cell in pi.split("│")[2:4]] == ["-", f"{figures['pi']['128']:.4f}"]
        assert "128: 18 windows, 2286 tokens scored" in out


class TestExport:
    def test_the_factor_file_again(self, longrope: Longrope, shared: Shared, tmp_path: Path) -> None:
        ended = longrope("export", "shared", shared.store, "--json")
        assert json.loads(ended.out) == {"written": "shared-factors.json", "form": "json", "notes": []}
        assert (tmp_path / "shared-factors.json").read_bytes() == shared.factors.read_bytes()

    def test_a_baseline(self, longrope: Longrope, shared: Shared, tmp_path: Path) -> None:
        assert longrope("export", "shared", shared.store, "--method=pi", "--out=pi.json").status == 0
        (regime,) = read(tmp_path / "pi.json").regimes
        assert regime.factors.lambdas == (4.0,) * 8
        assert regime.factors.attention_factor == 1.0
        assert regime.scores["test"].perplexity == shared.answer["test"]["pi"]

    def test_a_patch_for_the_config(self, longrope: Longrope, shared: Shared, tmp_path: Path) -> None:
        ended = longrope("export", "shared", shared.store, "--method=pi", "--to=transformers-config")
        assert "written: shared-pi-config-patch.json" in ended.out
        patch = json.loads((tmp_path / "shared-pi-config-patch.json").read_text())
        assert patch["max_position_embeddings"] == 256
        assert patch["rope_parameters"]["long_factor"] == [4.0] * 8


class TestHelp:
    @staticmethod
    def commands() -> dict[str, Any]:
        """Every command that does something, by what one types after ``longrope``."""
        top = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
        nested = {
            f"{name} {inner}": command
            for name, group in top.items()
            for inner, command in getattr(group, "commands", {}).items()
        }
        return {**top, **nested}

    def test_all_commands_are_there(self) -> None:
        assert self.commands().keys() >= {
            *("launch", "extend", "resume", "evaluate", "export", "import"),
            *("studies", "studies show", "studies delete"),
        }

    def test_every_command_has_an_example(self) -> None:
        assert [name for name, command in self.commands().items() if "Example: longrope" not in command.help] == []

    def test_every_option_and_argument_has_help(self) -> None:
        assert [
            f"{name} {parameter.name}"
            for name, command in self.commands().items()
            for parameter in command.params
            if not getattr(parameter, "help", None)
        ] == []

    def test_every_example_names_options_that_exist(self) -> None:
        commands = self.commands()
        for name, command in commands.items():
            example = command.help.partition("Example: longrope ")[2].split()
            typed = next(n for n in sorted(commands, key=len, reverse=True) if example[: len(n.split())] == n.split())
            assert typed.split()[0] == name.split()[0]
            known = {option for parameter in commands[typed].params for option in parameter.opts}
            assert {word for word in example if word.startswith("--")} <= known

    def test_the_readme_names_every_command(self) -> None:
        readme = (ROOT / "README.md").read_text()
        assert [name for name in self.commands() if f"longrope {name}" not in readme] == []

    @pytest.mark.parametrize("arguments", [["--help"], ["launch", "--help"], ["studies", "--help"]])
    def test_help_imports_nothing_heavy(self, process_environment: dict[str, str], arguments: list[str]) -> None:
        code = (
            "import sys, cli\n"
            "try:\n    cli.main()\nexcept SystemExit as end:\n    status = end.code\n"
            "heavy = {'torch', 'transformers', 'ray', 'sqlalchemy', 'alembic', 'numpy', 'optuna'} & set(sys.modules)\n"
            "print(status, sorted(heavy), file=sys.stderr)\n"
        )
        run = [sys.executable, "-c", code, *arguments]
        ended = subprocess.run(run, env=process_environment, capture_output=True, text=True, check=True)
        assert ended.stderr == "0 []\n"
        assert "Usage: " in ended.stdout


class TestPipe:
    def test_no_escape_codes_and_equal_bytes(
        self, shared: Shared, small_study: list[str], process_environment: dict[str, str], tmp_path: Path
    ) -> None:
        """The command as its users run it: in a process of its own, here with its output on a pipe."""
        run = [sys.executable, "-m", "cli", "launch", "--study=shared", *small_study]
        ended = subprocess.run(run, env=process_environment, cwd=tmp_path, capture_output=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, b"")
        assert b"\x1b" not in ended.stdout
        assert b"\r" not in ended.stdout
        assert b"generation 2/2" in ended.stdout
        assert (tmp_path / "shared-factors.json").read_bytes() == shared.factors.read_bytes()
