"""A scorer in this process: what its fingerprint stands for, and what becomes of units that fail."""

from __future__ import annotations

import gc
import hashlib
import math
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from searcher.baselines import none, pi
from searcher.errors import LongRopeError
from searcher.rope import Factors
from searcher.study import Document, Unit, evaluation_key
from tests.tiny_models import VOCABULARY, WINDOW, own_loss, window, write_model
from workers import engine
from workers.model import LoadedModel, ModelRequest, load_model
from workers.perplexity import negative_log_likelihood
from workers.refine import loss_and_gradient
from workers.scorer import LocalScorer, check_vocabulary, describe, fit_chunk, open_scorer, out_of_memory, score_unit
from workers.settings import CHUNK, MIN_CHUNK

TARGET = 4 * WINDOW


def document(tokens: npt.NDArray[np.uint32]) -> tuple[Document, dict[str, npt.NDArray[np.uint32]]]:
    digest = hashlib.sha256(tokens.astype("<u4").tobytes()).hexdigest()
    return Document(f"document {digest[:4]}", digest, len(tokens)), {digest: tokens}


def scorer(folder: Path, tokens: Mapping[str, npt.NDArray[np.uint32]] | None = None, **settings: Any) -> LocalScorer:
    return LocalScorer(ModelRequest(str(folder), TARGET, **settings), tokens or {})


def unit(ours: LocalScorer, factors: Factors, text: Document) -> Unit:
    return Unit(evaluation_key(ours.fingerprint, factors, text), factors, text)


def with_tensor(folder: Path, copy: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    weights[name] = change(weights[name])
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_the_fingerprint_stands_for_all_that_decides_a_score(llama_folder: Path, tmp_path: Path) -> None:
    def flip(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.int32)[5] ^= 1  # the last bit of one value
        return tensor

    mistral = write_model(tmp_path / "mistral", "mistral", sliding_window=32)
    theta = {"rope_type": "default", "rope_theta": 501.0}
    different = [
        scorer(llama_folder),
        scorer(llama_folder, dtype="bfloat16"),
        *(scorer(llama_folder, attention=name) for name in ("sdpa", "eager")),
        scorer(llama_folder, threads=2),
        *(scorer(llama_folder, chunk=chunk) for chunk in (64, 65)),
        scorer(with_tensor(llama_folder, tmp_path / "flipped", "model.norm.weight", flip)),
        scorer(write_model(tmp_path / "seed", "llama", seed=1)),
        scorer(write_model(tmp_path / "theta", "llama", rope_parameters=theta)),
        *(scorer(mistral, sliding_window=wish) for wish in ("keep", "off", "48")),
    ]
    assert len({each.fingerprint for each in different}) == len(different)
    assert all(len(each.fingerprint) == 64 for each in different)


def test_the_fingerprint_is_stable(llama_folder: Path, tmp_path: Path) -> None:
    expected = scorer(llama_folder).fingerprint
    text, tokens = document(window(TARGET))
    busy = scorer(llama_folder, tokens)
    list(busy.evaluate([unit(busy, pi(busy.info.spec, 4), text)]))
    elsewhere = shutil.copytree(llama_folder, tmp_path / "elsewhere")
    same = [
        busy,
        scorer(llama_folder, dtype="float32", attention="longrope", device="cpu", sliding_window="off"),
        scorer(llama_folder, chunk=CHUNK["cpu"]),
        scorer(llama_folder, hidden_on_host=True, stream_weights=True),  # the same to the last bit
        scorer(elsewhere),
        scorer(write_model(tmp_path / "again", "llama")),
    ]
    assert {each.fingerprint for each in same} == {expected}


def test_units_are_scored_in_order_and_exactly(llama_folder: Path, llama: LoadedModel) -> None:
    texts, tokens = [], {}
    for seed, length in ((0, TARGET), (1, 40)):
        text, own = document(window(length, seed))
        texts.append(text)
        tokens |= own
    with open_scorer(ModelRequest(str(llama_folder), TARGET), tokens, None) as ours:
        assert isinstance(ours, LocalScorer)
        candidates = [none(llama.spec, 1), pi(llama.spec, 4), Factors((2.0,) * 8, 4, 1.1)]
        units = [unit(ours, factors, text) for factors in candidates for text in texts]
        outcomes = list(ours.evaluate(units))
        again = list(ours.evaluate(units[::-1]))[::-1]
    assert [outcome.key for outcome in outcomes] == [each.key for each in units]
    for each, outcome, repeated in zip(units, outcomes, again, strict=True):
        expected = negative_log_likelihood(llama, tokens[each.document.sha256], each.factors)
        assert (outcome.nll, outcome.tokens) == expected == (repeated.nll, repeated.tokens)
        assert (outcome.worker, outcome.failure, outcome.tokens) == ("local", None, each.document.length - 1)
        assert outcome.seconds > 0
    for position, text in enumerate(texts):
        loss = own_loss(llama.model, tokens[text.sha256])
        assert outcomes[position].nll == pytest.approx(loss * (text.length - 1), rel=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does")
def test_too_little_memory_is_an_outcome(
    llama_folder: Path, little_memory: Callable[[], AbstractContextManager[None]]
) -> None:
    small, tokens = document(window(50))
    large, more = document(window(5000))  # 400 MB of attention weights a layer
    ours = scorer(llama_folder, tokens | more, attention="eager")
    factors = Factors(((2.0,) * 8, (3.0,) * 8))
    units = [unit(ours, factors, text) for text in (small, large, small)]
    with little_memory():
        first, failed, last = ours.evaluate(units)
    assert (failed.key, failed.nll, failed.tokens, failed.worker) == (units[1].key, None, 0, "local")
    assert failed.failure is not None
    assert "RuntimeError" in failed.failure
    assert "allocate" in failed.failure
    assert "\n" not in failed.failure
    assert first.nll == last.nll
    assert first.failure is last.failure is None


def test_a_unit_may_score_spans_and_ask_for_a_gradient(llama_folder: Path) -> None:
    text, tokens = document(window(60))
    ours = scorer(llama_folder, tokens)
    factors = Factors((2.0,) * 8, 4, 1.1)
    part = replace(text, spans=((20, 30), (40, 45)))
    for each in (text, part):
        plain = unit(ours, factors, each)
        asked = replace(plain, key="gradient", gradient=True)
        score, steep = list(ours.evaluate([plain, asked]))
        nll, count, gradient = loss_and_gradient(ours.loaded, tokens[text.sha256], factors, each.spans)
        assert (steep.key, steep.nll, steep.tokens, steep.gradient) == ("gradient", nll, count, gradient)
        assert len(gradient) == 9
        assert score.gradient is None
        assert score.tokens == count == (59 if each is text else 15)
        assert score.nll == pytest.approx(nll, rel=1e-5)


def test_a_gradient_that_is_not_finite_is_an_outcome(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, tokens = document(window(60))
    ours = scorer(llama_folder, tokens)
    monkeypatch.setattr("workers.refine.loss_and_gradient", lambda *_: (12.5, 59, (0.0, math.nan)))
    asked = replace(unit(ours, none(ours.info.spec, 1), text), gradient=True)
    outcome = score_unit(ours.loaded, tokens, asked)
    assert (outcome.nll, outcome.gradient) == (12.5, None)
    assert outcome.failure is not None
    assert "gradient" in outcome.failure


@contextmanager
def room(mebibytes: int) -> Iterator[None]:
    """A block in which this process gets so much more memory than it has, and no more."""
    gc.collect()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + mebibytes * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.slow  # gigabytes of work, and what other tests leave to the garbage collector would be room to it
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does")
def test_a_chunk_that_has_no_memory_is_halved_until_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A feed-forward block so wide that 1,024 tokens of it take 128 MiB a tensor.
    folder = write_model(tmp_path, "llama", intermediate_size=32768, num_hidden_layers=1)
    request = ModelRequest(str(folder), 2048)
    loaded = load_model(request)
    tried: list[int | None] = []
    trial = engine.trial

    def watched(model: LoadedModel, *rest: Any) -> None:
        tried.append(model.chunk)
        trial(model, *rest)

    monkeypatch.setattr(engine, "trial", watched)
    default = CHUNK["cpu"]
    with room(4096):
        assert fit_chunk(loaded, request).chunk == default
    assert tried == [default]
    tried.clear()
    with room(300):
        fitted = fit_chunk(loaded, request)
    assert tried == [default // 2**i for i in range(len(tried))]
    assert MIN_CHUNK <= tried[-1] < default
    assert fitted.chunk == fitted.settings["chunk"] == describe(fitted, request).profile["chunk"] == tried[-1]
    # What the trial found room for has room, and what it had none for has none.
    with room(300):
        assert math.isfinite(negative_log_likelihood(fitted, window(2048), None)[0])
        with pytest.raises(RuntimeError, match="allocate"):
            negative_log_likelihood(loaded, window(2048), None)
    # Hidden states of 256 MiB: more than what this process has freed and not given back.
    long = replace(request, target_length=2**20)
    with room(20), pytest.raises(LongRopeError, match=f"1048576 tokens do not fit .* even in chunks of {MIN_CHUNK}"):
        fit_chunk(loaded, long)


def test_without_a_limit_on_a_cpu_nothing_is_tried(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        raise AssertionError("the trial ran")

    monkeypatch.setattr("workers.engine.trial", run)
    request = ModelRequest("", TARGET)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert fit_chunk(llama, request) is llama
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**40, resource.RLIM_INFINITY))
    with pytest.raises(AssertionError, match="the trial ran"):
        fit_chunk(llama, request)
    assert fit_chunk(llama, replace(request, chunk=1024)) is llama


def test_errors_of_memory_are_told_from_others(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))

    def run(*_: Any) -> None:
        raise RuntimeError("of another kind")

    monkeypatch.setattr("workers.engine.trial", run)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**40, resource.RLIM_INFINITY))
    with pytest.raises(RuntimeError, match="of another kind"):
        fit_chunk(llama, ModelRequest("", TARGET))


def test_a_loss_that_is_not_finite_is_an_outcome(llama_folder: Path, tmp_path: Path) -> None:
    text, tokens = document(window(50))
    # Finite weights, but logits beyond float32.
    folder = with_tensor(llama_folder, tmp_path / "hot", "lm_head.weight", lambda weight: weight.sign() * 3e38)
    ours = scorer(folder, tokens)
    (outcome,) = ours.evaluate([unit(ours, none(ours.info.spec, 1), text)])
    assert outcome.nll is not None
    assert not math.isfinite(outcome.nll)
    assert outcome.tokens == 49
    assert outcome.failure is not None
    assert text.name in outcome.failure


def test_tokens_of_another_vocabulary_are_refused(llama_folder: Path, llama: LoadedModel) -> None:
    tokens = window(50)
    tokens[7] = VOCABULARY - 1
    check_vocabulary(llama, document(tokens)[1])
    check_vocabulary(llama, {})
    tokens[7] = VOCABULARY
    with pytest.raises(LongRopeError, match=f"token {VOCABULARY}, but the model embeds only {VOCABULARY};"):
        scorer(llama_folder, document(tokens)[1])
