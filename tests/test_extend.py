"""``longrope extend`` from its plan to its factor file, on a tiny model; and what it refuses."""

from __future__ import annotations

import json
import random
import re
import shutil
import sqlite3
import sys
import tomllib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from report_reader import Page
from safetensors.torch import load_file, save_file
from test_kill_extension import PLAN, training_text
from tiny_models import byte_tokenizer, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from commands.extension_text import deal_for_plan
from searcher.plan_file import parse_plan
from searcher.second import TUNED
from searcher.tuning import Tuning
from storage.factor_file import read
from tests.conftest import Ended, Longrope
from workers.apply import apply_factors
from workers.corpus import CorpusRequest
from workers.model import NO_WINDOW, ModelRequest, load_model, model_digest
from workers.perplexity import negative_log_likelihood

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = PLAN.replace('kind = "finetune"\n', 'kind = "finetune"\noutside = true\nmixed_window = 0.5\nlora_rank = 4\n')
COMPARED = PLAN.replace(
    '[[stages]]\nkind = "evaluate"', '[[stages]]\nkind = "compare"\nmethods = ["pi"]\n\n[[stages]]\nkind = "evaluate"'
)


@dataclass(frozen=True)
class Extension:
    """One that is finished."""

    folder: Path
    answer: dict[str, Any]
    progress: str

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.folder / "store.db")) as connection:
            return connection.execute(query).fetchall()


def command(folder: Path, plan: str, model: Path, text: Path) -> list[str]:
    """``extend`` with everything it needs, in a folder of its own."""
    (folder / "plan.toml").write_text(plan)
    train = training_text(folder)
    return [
        *("extend", str(folder / "plan.toml"), f"--model={model}", f"--data={text}", f"--train-data={train}"),
        *("--in-process", "--tuning-threads=1", "--study=far", "--storage=sqlite:///store.db", f"--out={folder}"),
    ]


@pytest.fixture(scope="module")
def extension(
    tiny_llama_folder: Path, text_folder: Path, longrope_in: Longrope, tmp_path_factory: pytest.TempPathFactory
) -> Extension:
    folder = tmp_path_factory.mktemp("extension")
    ended = longrope_in(folder, *command(folder, COMPARED, tiny_llama_folder, text_folder), "--json")
    assert ended.status == 0, ended.err
    return Extension(folder, json.loads(ended.out), ended.err)


def test_its_report_shows_stages_tunings_regimes_and_what_it_came_to(
    extension: Extension, longrope_in: Longrope
) -> None:
    ended = longrope_in(extension.folder, "report", "far", "--storage=sqlite:///store.db", "--json")
    assert ended.status == 0, ended.err
    page = Page.read(extension.folder / json.loads(ended.out)["written"])
    stages = read_stages(extension)
    assert page.column("stages", "stage") == [name for name, _, _ in stages]
    assert set(page.column("stages", "status")) == {"finished"}
    assert page.tables["length-0"][0] == ["method", "64", "256"]
    searched = [str(place) for place, (_, kind, _) in enumerate(stages) if kind in ("search", "recover")]
    assert {figure for figure in page.figures if figure.startswith("convergence")} == {
        f"convergence-{n}" for n in searched
    }
    assert {"training-held-out-perplexity", "training-loss", "regimes", "key-value-0", "time"} <= {*page.figures}
    rows = extension.answer["result"]["rows"]
    assert page.plots["key-value-0"] == sum(
        any("key_value" in cell for cell in cells.values()) for cells in rows.values()
    )
    file = read(extension.folder / "far-factors.json")
    assert page.column("regimes", "tokens") == [f"{r.min_length} to {r.max_length}" for r in file.regimes]
    steps = [float(value) for value in page.column("training-held-out-perplexity", "perplexity")]
    kept = extension.rows("select value from longrope_training_logs where name = 'held_out_perplexity'")
    assert sorted(steps) == pytest.approx(sorted(value for (value,) in kept), abs=1e-4)


def read_stages(extension: Extension) -> list[tuple[str, str, str]]:
    rows = extension.rows("select settings, kind, status from longrope_stages order by stage")
    return [(json.loads(settings)["name"], kind, status) for settings, kind, status in rows]


def test_the_table_has_every_row_at_every_length_it_serves(extension: Extension) -> None:
    result = extension.answer["result"]
    assert result["lengths"] == [64, 256]
    served = {name: sorted(map(int, cells)) for name, cells in result["rows"].items()}
    assert served == {
        **{name: [64, 256] for name in ("none", "pi", "ntk", "yarn", "pi, tuned")},
        **{f"{name}, attention su": [64, 256] for name in ("none", "pi", "ntk", "yarn")},
        "longrope, not tuned": [64],
        "longrope, without recovery": [64, 256],
        "longrope": [64, 256],
    }
    cell = result["rows"]["longrope"]["256"]
    assert cell["test"]["tokens"] % 255 == 0
    assert cell["test"]["tokens"] > 0
    assert sum(row["trials"] for row in cell["key_value"]["by_depth"] if row["depth"] is not None) == 3


def test_the_factor_file_is_of_the_tuned_model_and_holds_what_the_stages_found(extension: Extension) -> None:
    file = read(extension.folder / "far-factors.json")
    tuned = extension.folder / "far" / "finetune-128" / "model"
    request = ModelRequest(str(tuned), 256)
    loaded = load_model(request)
    assert file.model.name.endswith("-finetune-128")
    assert file.model.spec == loaded.spec
    longest = [regime.max_length for regime in file.regimes]
    assert longest[-2:] == [128, 256]
    assert [regime.min_length for regime in file.regimes] == [1, *(length + 1 for length in longest[:-1])]
    results = {
        stage: json.loads(result) for stage, result in extension.rows("SELECT stage, result FROM longrope_stages")
    }
    for regime, stage in ((file.regimes[-2], 0), (file.regimes[-1], 2)):
        assert list(regime.factors.by_layer()[0]) == results[stage]["factors"]["searched"]["lambdas"]
    losses = {
        name: cell["nll"] / cell["tokens"]
        for name, cell in results[3]["scores"]["selection"].items()
        if name in ("none", TUNED, "searched")
    }
    best = min(losses, key=losses.__getitem__)
    assert results[3]["served"] == best
    assert list(file.regimes[0].factors.by_layer()[0]) == results[3]["factors"][best]["lambdas"]
    assert file.provenance["numerics"] == results[0]["computed_by"]["numerics"]


def test_it_names_the_model_that_its_factors_are_for(extension: Extension) -> None:
    assert extension.answer["model"] == str(extension.folder / "far" / "finetune-128" / "model")
    assert read(extension.folder / "far-factors.json").model.weights_sha256 == model_digest(
        Path(extension.answer["model"])
    )


def test_the_loader_serves_the_table_on_the_tuned_model(extension: Extension) -> None:
    """What plain transformers computes under ``apply_factors`` is what the stages scored, at every regime."""
    path = extension.folder / "far-factors.json"
    tuned = str(extension.folder / "far" / "finetune-128" / "model")
    model = AutoModelForCausalLM.from_pretrained(tuned)
    loaded = load_model(ModelRequest(tuned, 256))
    regimes = read(path).regimes
    applied = apply_factors(model, path)
    for length in (40, 64, 65, 128, 129, 256):
        ids = torch.randint(2, 250, (1, length), generator=torch.Generator().manual_seed(length))
        factors = next(regime.factors for regime in regimes if length <= regime.max_length)
        nll, count = negative_log_likelihood(loaded, ids[0].numpy().astype("uint32"), factors)
        with torch.inference_mode():
            loss = float(model(ids, labels=ids).loss)
        assert loss == pytest.approx(nll / count, rel=1e-5)
    applied.remove()


def test_the_readme_serves_a_factor_file_as_it_says(extension: Extension, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    folder = extension.folder / "far" / "finetune-128" / "model"
    names = {
        "model": AutoModelForCausalLM.from_pretrained(folder),
        "tokenizer": AutoTokenizer.from_pretrained(folder),
        "text": "abc " * 10,
    }
    monkeypatch.chdir(extension.folder)
    exec(block, names)


def test_the_plan_of_the_readme_is_one() -> None:
    import tomllib

    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    plan = parse_plan(tomllib.loads(block), "readme", 4096)
    assert [stage.kind for stage in plan.stages] == ["search", "finetune", "search", "recover", "evaluate"]


def test_no_document_is_in_two_sets_at_any_stage(extension: Extension) -> None:
    query = (
        "SELECT DISTINCT c.part, u.document_name FROM longrope_units u "
        "JOIN longrope_candidates c ON c.id = u.candidate_id"
    )
    sets = {"search": set(), "refined": set(), "refine": set(), "selection": set(), "test": set()}
    for part, name in extension.rows(query):
        if part in sets:
            sets[part].add(re.match(r"[^/\[:#+]+", name).group(0))  # type: ignore[union-attr]
    assert all(sets[part] for part in ("search", "selection", "test"))
    searched = sets["search"] | sets["refined"] | sets["refine"]
    assert searched.isdisjoint(sets["selection"])
    assert searched.isdisjoint(sets["test"])
    assert sets["selection"].isdisjoint(sets["test"])


def test_tuning_is_logged_and_only_its_result_is_left(extension: Extension) -> None:
    logged = extension.rows("SELECT stage, name, count(*) FROM longrope_training_logs GROUP BY 1, 2 ORDER BY 1, 2")
    names = ("grad_norm", "held_out_perplexity", "learning_rate", "loss")
    assert logged == [(stage, name, 3 if name.startswith("held") else 4) for stage in (1, 4) for name in names]
    for stage in ("finetune-128", "finetune-128-pi"):
        assert [path.name for path in (extension.folder / "far" / stage).iterdir()] == ["model"]


def test_people_see_stages_and_tables(extension: Extension, longrope_in: Longrope) -> None:
    storage = "--storage=sqlite:///store.db"
    listed = longrope_in(extension.folder, "studies", storage).out
    assert "6 of 6" in " ".join(listed.split())
    shown = longrope_in(extension.folder, "studies", "show", "far", storage).out
    for text in ("finetune-128-pi", "Perplexity on the test documents", "Key-value retrieval", "longrope, not tuned"):
        assert text in shown
    found = json.loads(longrope_in(extension.folder, "studies", "show", "far", storage, "--json").out)
    assert [stage["status"] for stage in found["stages"]] == ["finished"] * 6
    held_out = found["training"]["1"]["held_out_perplexity"]
    assert list(held_out) == ["0", "2", "4"]
    assert f"{held_out['0']:.3f} to {held_out['4']:.3f}" in " ".join(shown.split())
    again = longrope_in(extension.folder, "resume", "far", storage)
    assert again.status == 1
    assert "nothing to resume" in again.err


def test_it_is_exported_like_any_study(extension: Extension, longrope_in: Longrope) -> None:
    storage = "--storage=sqlite:///store.db"
    ended = longrope_in(extension.folder, "export", "far", storage, "--out=again.json")
    assert ended.status == 0, ended.err
    assert (extension.folder / "again.json").read_bytes() == (extension.folder / "far-factors.json").read_bytes()
    assert len(read(extension.folder / "far-factors.json").regimes) > 1
    export = ("export", "far", storage, "--to=transformers", "--out=served")
    ended = longrope_in(extension.folder, *export)
    assert ended.status == 1
    assert "Error: transformers cannot hold" in ended.err
    assert "--accept-loss regimes" in ended.err
    accepted = [f"--accept-loss={name}" for name in ("regimes", "n_hat", "short_attention_factor")]
    ended = longrope_in(extension.folder, *export, *accepted)
    assert ended.status == 0, ended.err
    assert "left out" in ended.out
    tuned = load_file(extension.folder / "far" / "finetune-128" / "model" / "model.safetensors")
    served = load_file(extension.folder / "served" / "model.safetensors")
    assert all(torch.equal(served[name], value) for name, value in tuned.items())


@pytest.fixture
def waiting(tiny_llama_folder: Path, text_folder: Path, longrope: Longrope, tmp_path: Path) -> tuple[Ended, Path]:
    """An extension that has come to its outside stage."""
    return longrope(*command(tmp_path, OUTSIDE, tiny_llama_folder, text_folder)), tmp_path


def test_another_trainer_gets_what_it_needs_and_the_extension_goes_on_with_what_it_made(
    waiting: tuple[Ended, Path], longrope: Longrope, tiny_llama_folder: Path
) -> None:
    ended, folder = waiting
    assert ended.status == 0, ended.err
    said = " ".join(ended.out.split())
    assert "finetune-128 waits for another trainer" in said
    assert "longrope resume far --checkpoint FOLDER" in said
    for setting in ("learning_rate 0.001", "warmup 1", "mixed_window 0.5", "lora_rank 4", "dtype float32"):
        assert f", {setting}" in said
    for usual in ("schedule", "weight_decay", "seed"):
        assert f", {usual} " not in said
    asked = Tuning.from_json(json.loads((folder / "far" / "finetune-128" / "tuning.json").read_text()))
    assert (asked.length, asked.steps, asked.mixed_window, asked.lora_rank) == (128, 4, 0.5, 4)
    given = read(folder / "far" / "finetune-128" / "factors.json")
    assert [(regime.min_length, regime.max_length) for regime in given.regimes] == [(1, 128)]
    storage = "--storage=sqlite:///store.db"
    again = longrope("resume", "far", storage)
    assert (again.status, "waits for another trainer" in again.out) == (0, True)
    refused = longrope("resume", "far", storage, f"--checkpoint={folder / 'nothing'}")
    assert (refused.status, refused.err.count("\n")) == (1, 1)
    made = folder / "made"
    shutil.copytree(tiny_llama_folder, made)
    weights = load_file(made / "model.safetensors")
    save_file({name: value * 1.01 for name, value in weights.items()}, made / "model.safetensors", {"format": "pt"})
    finished = longrope("resume", "far", storage, f"--checkpoint={made}")
    assert finished.status == 0, finished.err
    assert read(folder / "far-factors.json").model.name.endswith("-finetune-128")
    assert f"model they are for: {made}" in finished.out


def test_another_trainer_is_told_of_the_attention_window_in_force(
    text_folder: Path, longrope: Longrope, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "mistral", "mistral", sliding_window=32)
    ended = longrope(*command(tmp_path, OUTSIDE, base, text_folder), "--sliding-window=off")
    assert ended.status == 0, ended.err
    assert "waits for another trainer" in " ".join(ended.out.split())
    patch = json.loads((tmp_path / "far" / "finetune-128" / "config-patch.json").read_text())
    assert patch["sliding_window"] == NO_WINDOW
    assert read(tmp_path / "far" / "finetune-128" / "factors.json").provenance["numerics"]["sliding_window"] is None


def test_what_cannot_be_extended_is_refused_in_one_line(
    tiny_llama_folder: Path, text_folder: Path, longrope: Longrope, tmp_path: Path
) -> None:
    whole = command(tmp_path, PLAN, tiny_llama_folder, text_folder)
    without_training = [part for part in whole if not part.startswith("--train-data")]
    overlapping = [*without_training, f"--train-data={text_folder}"]
    no_folder = [*whole, f"--out={tmp_path / 'missing'}"]
    other_plan = [whole[0], "no-such-plan", *whole[2:]]
    for arguments, message in (
        (without_training, "--train-data"),
        (overlapping, "is in the training text and among the documents"),
        (no_folder, "must be a folder that exists"),
        (other_plan, "longrope-llama2"),
    ):
        ended = longrope(*arguments)
        assert (ended.status, ended.err.count("\n")) == (1, 1), ended.err
        assert message in ended.err
        assert "far" not in longrope("studies", "--storage=sqlite:///store.db").out


TUNE = """
[[stages]]
kind = "finetune"
length = "2x"
factors = "pi"
steps = 3
warmup = 0
documents = { selection = 1 }
"""


@pytest.mark.parametrize(
    ("settings", "missing", "gpus", "message"),
    [
        ("lora_rank = 4", "peft", 0, "needs the package peft; install it with: pip install 'longrope-search[lora]'"),
        ("fsdp = {}", None, 0, "leave fsdp out"),
        ("batch = 3\nfsdp = {}", None, 2, "the 3 micro-batches of a step; leave fsdp out"),
        ("mixed_window = 0.5", None, 0, "set short_text to windows"),
        ("tokens = 100", "ray.train.torch", 2, "needs the package ray[train]; install it with: pip install"),
        ("tokens = 100", "text", 0, "less than one chunk of 100"),
    ],
)
def test_what_a_tuning_lacks_is_said_before_anything_begins(
    settings: str,
    missing: str | None,
    gpus: int,
    message: str,
    tiny_llama_folder: Path,
    text_folder: Path,
    longrope: Longrope,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = command(tmp_path, f"{TUNE}{settings}\n", tiny_llama_folder, text_folder)
    if missing == "text":
        (tmp_path / "little.txt").write_text("klmn")
        arguments = [a if "--train-data" not in a else f"--train-data={tmp_path / 'little.txt'}" for a in arguments]
    elif missing is not None:
        monkeypatch.setitem(sys.modules, missing, None)  # as where it is not installed
    if gpus:
        monkeypatch.setattr("workers.train_cluster.gpu_count", lambda: gpus)
        arguments = [argument for argument in arguments if argument != "--in-process"]
    ended = longrope(*arguments)
    assert (ended.status, ended.err.count("\n")) == (1, 1), ended.err
    assert message in ended.err
    assert "stage finetune-128: " in ended.err
    assert "far" not in longrope("studies", "--storage=sqlite:///store.db").out


def test_a_plan_asks_for_long_documents_where_a_stage_needs_them(
    tiny_llama_folder: Path, longrope: Longrope, tmp_path: Path
) -> None:
    """The search at 256 tokens asks for five documents, and the one at 128 for six, of which one is shorter."""
    few = "documents = {{ search = {}, selection = 1, test = 1 }}\nwindows = {{ selection = 1, test = 1 }}\n"
    search = """preset = "quick"
evolution = { population = 1, mutants = 1, crosses = 0, generations = 0 }
n_hats = [0]
finalists = 1
"""
    stage = '[[stages]]\nkind = "search"\nlength = "{}"\n' + search
    plan = stage.replace("{}", "2x") + few.format(4) + stage.replace("{}", "4x") + few.format(3)
    folder = tmp_path / "some"
    folder.mkdir()
    for number in range(6):
        letters = random.Random(number).choices("abcdefgh ", k=300 if number < 5 else 140)
        (folder / f"{number}.txt").write_text("".join(letters))
    ended = longrope(*command(tmp_path, plan, tiny_llama_folder, folder))
    assert ended.status == 0, ended.err
    (folder / "4.txt").unlink()
    refused = longrope(*command(tmp_path, plan, tiny_llama_folder, folder), "--study=again")
    assert (refused.status, refused.err.count("\n")) == (1, 1)
    assert "stage search-256: 5 documents of at least 256 tokens are needed" in refused.err
    assert "lower its length or its documents, or name more or longer text with --data." in refused.err
    assert "--target" not in refused.err


def test_named_sets_are_as_long_as_the_stages_that_use_them(
    tiny_llama_folder: Path, longrope: Longrope, tmp_path: Path
) -> None:
    for part, size in (("search", 140), ("selection", 140), ("test", 300)):
        text = "".join(random.Random(part).choices("abcdefgh ", k=size))
        (tmp_path / f"{part}.txt").write_text(text)
    plan = """
[[stages]]
kind = "search"
length = "2x"
preset = "quick"
evolution = { population = 1, mutants = 1, crosses = 0, generations = 0 }
n_hats = [0]
finalists = 1

[[stages]]
kind = "evaluate"
lengths = ["2x", "4x"]
passkey_depths = 0
key_value_trials = 0
baselines = ["none"]
"""
    sets = [f"--selection-data={tmp_path / 'selection.txt'}", f"--test-data={tmp_path / 'test.txt'}"]
    arguments = command(tmp_path, plan, tiny_llama_folder, tmp_path / "search.txt")
    ended = longrope(*arguments, *sets, "--json")
    assert ended.status == 0, ended.err
    assert json.loads(ended.out)["result"]["rows"]["none"]["256"]["test"]["tokens"] == 255


def test_a_search_may_weigh_long_context_against_short(
    tiny_llama_folder: Path, text_folder: Path, longrope: Longrope, tmp_path: Path
) -> None:
    plan = """
[[stages]]
kind = "search"
length = "2x"
sampler = "nsga2"
evolution = { population = 4, mutants = 2, crosses = 2, generations = 1 }
n_hats = [0]
finalists = 1
documents = { search = 2, selection = 1, test = 1 }
windows = { search = 1, selection = 1, test = 1 }
"""
    ended = longrope(*command(tmp_path, plan, tiny_llama_folder, text_folder))
    assert ended.status == 0, ended.err
    with closing(sqlite3.connect(tmp_path / "store.db")) as connection:
        parts = dict(connection.execute("SELECT part, count(*) FROM longrope_candidates GROUP BY 1").fetchall())
    assert parts["search_short"] == parts["search"] > 0


@pytest.mark.timeout(900)
def test_the_smoke_plan_extends_the_reference_model(longrope: Longrope, tmp_path: Path) -> None:
    """Every kind of stage on real text; what it should show even so small."""
    options = ("--in-process", "--threads=2", "--tuning-threads=2", "--study=s", f"--out={tmp_path}", "--json")
    ended = longrope("extend", "smoke", "--storage=sqlite:///s.db", *options)
    assert ended.status == 0, ended.err
    rows = json.loads(ended.out)["result"]["rows"]
    nats = {name: cells["1024"]["test"]["nll"] for name, cells in rows.items() if "1024" in cells}
    assert min(nats, key=lambda name: nats[name]).startswith("longrope")
    for length in ("128", "256"):
        (whole,) = [row for row in rows["none"][length]["passkey"]["by_depth"] if row["depth"] is None]
        assert whole["accuracy"] == 1
    tuned = apply_factors(
        AutoModelForCausalLM.from_pretrained(tmp_path / "s" / "finetune-512" / "model"), tmp_path / "s-factors.json"
    )
    tuned.remove()


def test_a_plan_is_shown_with_its_costs_and_nothing_begins(longrope: Longrope, tmp_path: Path) -> None:
    ended = longrope("extend", "--show")
    assert ended.status == 0, ended.err
    assert "finetune-4096-yarn" in ended.out
    shown = json.loads(longrope("extend", "--show", "--json").out)
    assert shown["name"] == "reference"
    assert [cost["name"] for cost in shown["costs"]] == [stage["name"] for stage in shown["stages"]]
    assert all(f"{cost['forwards']:,}" in ended.out for cost in shown["costs"])
    assert not list(tmp_path.glob("*.db"))


def test_an_evaluation_has_more_test_documents_than_a_search_that_reports_on_one(text_folder: Path) -> None:
    search = '[[stages]]\nkind = "search"\nlength = "2x"\ndocuments = { search = 2, selection = 1, test = 1 }\n'
    for end, dealt in (("", 1), ('[[stages]]\nkind = "evaluate"\nlengths = ["2x"]\n', 4)):
        plan = parse_plan(tomllib.loads(search + end), "p", 64)
        corpus = deal_for_plan(CorpusRequest((str(text_folder),)), plan, byte_tokenizer())
        assert {part: len(texts) for part, texts in corpus.dealt.items()} == {
            "search": 2,
            "selection": 1,
            "test": dealt,
        }
