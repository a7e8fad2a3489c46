"""What ``longrope export --to transformers`` writes, loaded by plain transformers in a process without this project."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from searcher.study import WITHOUT_N_HAT
from storage.factor_file import Regime, read
from storage.repository import Repository
from workers.corpus import CorpusRequest, study_windows
from workers.model import load_tokenizer

if TYPE_CHECKING:
    from conftest import Ended, Longrope

WINDOW, TARGET = 64, 256
TOLERANCE = 1e-4  # relative, of a perplexity

# Perplexity of model folders, each on the windows of a .npy, by torch and transformers alone.
PLAIN = """
import json, math, sys
import numpy as np
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
found = []
for folder, tokens in zip(sys.argv[1::2], sys.argv[2::2]):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    losses = []
    with torch.inference_mode():
        for window in torch.from_numpy(np.load(tokens).astype(np.int64)):
            logits = model(input_ids=window[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    found.append(math.exp(torch.cat(losses).mean()))
ours = sorted({"cli", "commands", "searcher", "workers", "storage"} & {name.partition(".")[0] for name in sys.modules})
print(json.dumps({"perplexity": found, "ours": ours}))
"""


@dataclass(frozen=True)
class Searched:
    """A finished study: what ``launch --json`` printed, its regime, and its test windows as a .npy."""

    folder: Path
    name: str
    answer: dict[str, Any]
    regime: Regime
    tokens: Path


@dataclass(frozen=True)
class Plain:
    """Perplexities on test windows: ``ours`` as launch reported them, ``theirs`` of plain transformers."""

    ours: dict[str, float]
    theirs: dict[str, float]


def search(longrope_in: Longrope, folder: Path, name: str, arguments: list[str], model: Path, cache: Path) -> Searched:
    """Launch a study, and write down the tokens of its test windows."""
    ended = longrope_in(folder, "launch", f"--study={name}", "--json", *arguments)
    assert ended.status == 0, ended.err
    with closing(Repository(f"sqlite:///{folder / 'longrope.db'}")) as repository:
        settings = repository.study(name).settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGROPE_CACHE", str(cache))
        sets = study_windows(CorpusRequest.from_json(settings["corpus"]), load_tokenizer(model), TARGET, WINDOW)
    windows = sets.windows["test"]
    assert [window.document.sha256 for window in windows] == settings["documents"]["test"]
    np.save(folder / f"{name}.npy", np.stack([window.tokens for window in windows]))
    (regime,) = read(folder / f"{name}-factors.json").regimes
    return Searched(folder, name, json.loads(ended.out), regime, folder / f"{name}.npy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


Search = Callable[..., Searched]


@pytest.fixture(scope="module")
def searched(
    longrope_in: Longrope, folder: Path, small_study: list[str], tiny_llama_folder: Path, token_cache: Path
) -> Search:
    """``searched(name, *arguments)``: a study in the folder."""

    def launch(name: str, *arguments: str) -> Searched:
        return search(longrope_in, folder, name, [*small_study, *arguments], tiny_llama_folder, token_cache)

    return launch


@pytest.fixture(scope="module")
def without(searched: Search) -> Searched:
    """A study that had no choice but n_hat = 0, and whose seeds all rescale."""
    return searched("without", "--n-hats=0", "--preset=paper")


# What makes start tokens better left alone in a random model: all others lose by this attention factor.
LOSSY = "--attention-factor=0.6"


@pytest.fixture(scope="module")
def only(searched: Search) -> Searched:
    """A study that had no choice but n_hat = 8."""
    return searched("only", "--n-hats=8", LOSSY)


@pytest.fixture(scope="module")
def either(searched: Search, only: Searched) -> Searched:
    """A study that could have had n_hat = 0, and found n_hat = 8 to be better."""
    found = searched("either", "--n-hats=0,8", LOSSY, f"--seed-factors={only.folder / 'only-factors.json'}")
    assert found.regime.factors.n_hat == 8
    return found


@pytest.fixture(scope="module")
def notes(longrope_in: Longrope, folder: Path, either: Searched) -> Ended:
    """What the export of the study with n_hat = 8 printed."""
    return longrope_in(
        folder, "export", either.name, "--to=transformers", "--out=exported-either", "--accept-loss=n_hat"
    )


@pytest.fixture(scope="module")
def plain(
    longrope_in: Longrope,
    folder: Path,
    without: Searched,
    either: Searched,
    notes: Ended,
    tiny_llama_folder: Path,
    process_environment: dict[str, str],
) -> Plain:
    """Everything that can be exported, through one process that knows nothing of this project."""
    assert notes.status == 0, notes.err
    exports = {
        "searched": ["export", "without"],
        "yarn": ["export", "without", "--method=yarn"],
        "dynamic_ntk": ["export", "without", "--method=dynamic_ntk"],
        "file": ["export", "without-factors.json", f"--model={tiny_llama_folder}"],
    }
    runs = {"none": (tiny_llama_folder, without.tokens), "either": (folder / "exported-either", either.tokens)}
    for name, arguments in exports.items():
        out = folder / f"exported-{name}"
        ended = longrope_in(folder, *arguments, "--to=transformers", f"--out={out}")
        assert ended.status == 0, ended.err
        runs[name] = (out, without.tokens)
    paths = [str(path) for pair in runs.values() for path in pair]
    run = [sys.executable, "-I", "-c", PLAIN, *paths]
    ended = subprocess.run(run, env=process_environment, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    assert answer["ours"] == []
    test = without.answer["test"]
    ours = {
        **{name: test[name] for name in ("none", "searched", "yarn", "dynamic_ntk")},
        "file": test["searched"],
        "either": either.answer["test"][WITHOUT_N_HAT],
    }
    return Plain(ours, dict(zip(runs, answer["perplexity"], strict=True)))


@pytest.mark.parametrize("name", ["none", "searched", "yarn", "dynamic_ntk", "file", "either"])
def test_plain_transformers_has_the_same_perplexity(plain: Plain, name: str) -> None:
    assert plain.theirs[name] == pytest.approx(plain.ours[name], rel=TOLERANCE)


def test_the_factors_are_what_makes_the_perplexity(plain: Plain) -> None:
    """Else the test above would pass also where transformers ignores them."""
    perplexities = sorted(plain.theirs[name] for name in ("none", "searched", "yarn", "dynamic_ntk"))
    assert all(above / below - 1 > 10 * TOLERANCE for below, above in pairwise(perplexities))


def test_the_price_of_n_hat_is_printed(either: Searched, notes: Ended) -> None:
    lines = notes.out.splitlines()
    assert lines[0] == "n_hat = 8 cannot be held; the study's best factors with n_hat = 0 are taken."
    for place, part in ((1, "selection"), (3, "test")):
        before, after = (either.answer[part][method] for method in ("searched", WITHOUT_N_HAT))
        change = after / before - 1
        assert lines[place] == f"On {part} that costs perplexity {before:.4f} -> {after:.4f} ({change:+.2%})."
    assert either.answer["selection"][WITHOUT_N_HAT] >= either.answer["selection"]["searched"]
    short = either.answer["short"][WITHOUT_N_HAT]
    assert f"The same factors serve short text: perplexity {short:.4f} at 64 tokens." in lines
    assert lines[-1] == "written: exported-either"


def test_what_is_exported_has_no_n_hat(longrope_in: Longrope, folder: Path, either: Searched) -> None:
    alternative = either.regime.without_n_hat
    assert alternative is not None
    config = json.loads((folder / "exported-either" / "config.json").read_text())
    assert config["rope_parameters"]["long_factor"] == list(alternative.factors.lambdas)
    assert config["max_position_embeddings"] == TARGET
    out = "--out=either-patch.json"
    ended = longrope_in(folder, "export", either.name, "--to=transformers-config", out, "--json")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith(
        "Error: transformers cannot hold n_hat = 8. With --accept-loss n_hat: n_hat = 8 cannot be held; the study's "
        "best factors with n_hat = 0 are taken. On selection that costs perplexity"
    )
    accepted = ("--accept-loss=n_hat", out, "--json")
    ended = longrope_in(folder, "export", either.name, "--to=transformers-config", *accepted)
    patch = json.loads((folder / "either-patch.json").read_text())
    assert patch["rope_parameters"] == config["rope_parameters"]
    assert json.loads(ended.out)["notes"][0].startswith("n_hat = 8 cannot be held")


@pytest.mark.parametrize("form", ["transformers", "transformers-config"])
def test_n_hat_without_an_alternative_is_refused(
    longrope_in: Longrope, folder: Path, only: Searched, form: str
) -> None:
    assert only.regime.factors.n_hat == 8
    assert only.regime.without_n_hat is None
    ended = longrope_in(folder, "export", "only", f"--to={form}", "--out=exported-only")
    assert (ended.status, ended.out) == (1, "")
    assert len(ended.err.splitlines()) == 1
    assert ended.err == (
        "Error: transformers cannot hold n_hat = 8. With --accept-loss n_hat: n_hat = 8 is dropped and the factors "
        "stay, at a cost that was not measured.\n"
    )
    assert not (folder / "exported-only").exists()
