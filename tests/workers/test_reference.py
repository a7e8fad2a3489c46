"""The reference model is a real one: small, trained to its window, lost beyond it, and mended by rescale factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from searcher.baselines import BASELINES, none
from searcher.errors import LongRopeError
from searcher.rope import Factors, RopeSpec
from workers import reference
from workers.corpus import CorpusRequest, load_corpus
from workers.dataset import Window
from workers.model import LoadedModel, ModelRequest, load_model, load_tokenizer
from workers.perplexity import negative_log_likelihood
from workers.reference import HELD_OUT, MODEL_DIR, held_out_documents, stdlib_dir

TARGET = 2048


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(ModelRequest(str(MODEL_DIR), TARGET))


def selection(length: int, windows: int) -> Sequence[Window]:
    request = CorpusRequest(windows={"selection": windows})
    return load_corpus(request, load_tokenizer(MODEL_DIR), length).windows["selection"]


def perplexity(model: LoadedModel, windows: Sequence[Window], factors: Factors) -> float:
    pairs = [negative_log_likelihood(model, window.tokens, factors) for window in windows]
    return math.exp(sum(nll for nll, _ in pairs) / sum(count for _, count in pairs))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGROPE_CACHE", str(tmp_path_factory.getbasetemp() / "reference-cache"))


def test_it_is_small_and_runs_in_float32(model: LoadedModel) -> None:
    (weights,) = MODEL_DIR.glob("*.safetensors")
    assert weights.stat().st_size <= 8 * 10**6
    with safe_open(weights, "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118 - no mapping
    assert model.settings["dtype"] == "float32"
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float32}
    assert model.spec == RopeSpec(10_000.0, 64, 256, 4, "llama")
    assert model.shipped is None


def test_it_reads_within_its_window(model: LoadedModel) -> None:
    windows = selection(256, 4)
    assert len(windows) == 24
    assert perplexity(model, windows, none(model.spec, 1)) < 11


def test_it_is_lost_beyond_its_window_and_rescaling_mends_it(model: LoadedModel) -> None:
    windows = selection(TARGET, 1)[:2]
    got = {name: perplexity(model, windows, BASELINES[name](model.spec, 8)) for name in ("none", "pi", "ntk", "yarn")}
    assert got["pi"] > got["ntk"] > got["yarn"]
    assert got["none"] > 1.5 * got["yarn"]


def test_its_documents_are_disjoint_modules_of_the_library() -> None:
    documents = held_out_documents()
    listed = [path for paths in documents.values() for path in paths]
    assert len(set(listed)) == len(listed) == 26
    assert all(path.is_file() and path.is_relative_to(stdlib_dir()) for path in listed)
    assert {part: len(names) for part, names in HELD_OUT.items()} == {"search": 8, "selection": 6, "test": 12}


def test_a_stripped_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reference, "stdlib_dir", lambda: tmp_path)
    with pytest.raises(LongRopeError, match=r"_pydecimal\.py \(26 in all\) is not in Python .*--data"):
        held_out_documents()
