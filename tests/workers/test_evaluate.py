"""Perplexity by method and length: which factors serve which length, and figures that are the scorer's."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from searcher.baselines import BASELINES, none
from searcher.errors import LongRopeError
from searcher.rope import Factors
from searcher.study import Document
from tests.tiny_models import WINDOW, window, write_model
from workers.evaluate import perplexity_by_length
from workers.model import ModelRequest, shipped_factors
from workers.perplexity import negative_log_likelihood
from workers.scorer import LocalScorer

TARGET = 4 * WINDOW


def no_scaling(length: int) -> None:
    """What ``shipped_at`` is for a model whose config does not scale RoPE: never asked."""
    raise AssertionError(f"asked at {length}")


LENGTHS = (WINDOW // 2, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 1, TARGET)
SHORT_REGIME = Factors((2.0,) * 8, 4, 1.1)
LONG_REGIME = Factors((4.0,) * 8, 0, 1.2)
Tokens = dict[str, npt.NDArray[np.uint32]]


def documents(lengths: Sequence[int], each: int = 2) -> tuple[dict[int, list[Document]], Tokens]:
    by_length: dict[int, list[Document]] = {}
    tokens: Tokens = {}
    for length in lengths:
        for seed in range(each):
            drawn = window(length, 100 * length + seed)
            digest = hashlib.sha256(drawn.astype("<u4").tobytes()).hexdigest()
            by_length.setdefault(length, []).append(Document(f"{length}-{seed}", digest, length))
            tokens[digest] = drawn
    return by_length, tokens


def expected(
    scorer: LocalScorer, texts: Sequence[Document], tokens: Mapping[str, npt.NDArray[np.uint32]], f: Factors
) -> float:
    pairs = [negative_log_likelihood(scorer.loaded, tokens[text.sha256], f) for text in texts]
    return math.exp(sum(nll for nll, _ in pairs) / sum(count for _, count in pairs))


def test_every_method_is_scored_where_it_differs(llama_folder: Path) -> None:
    texts, tokens = documents(LENGTHS)
    scorer = LocalScorer(ModelRequest(str(llama_folder), TARGET), tokens)
    spec = scorer.info.spec
    # From one token beyond the window to twice the window, both included; and from twice on a longer one.
    regimes = [(WINDOW + 1, 2 * WINDOW, SHORT_REGIME), (2 * WINDOW + 1, TARGET, LONG_REGIME)]
    rows = perplexity_by_length(scorer, texts, regimes, no_scaling)
    assert set(rows) == {*BASELINES, "searched"}
    assert set(rows["none"]) == set(rows["searched"]) == set(LENGTHS)
    for name in set(BASELINES) - {"none"}:
        assert set(rows[name]) == {n for n in LENGTHS if n > WINDOW}
    for name, make in BASELINES.items():
        for n, figure in rows[name].items():
            assert figure == pytest.approx(expected(scorer, texts[n], tokens, make(spec, n / WINDOW)), rel=1e-12)
    serving = {**dict.fromkeys(LENGTHS[:2], none(spec, 1)), **dict.fromkeys(LENGTHS[2:4], SHORT_REGIME)}
    for n in LENGTHS:
        factors = serving.get(n, LONG_REGIME)
        assert rows["searched"][n] == pytest.approx(expected(scorer, texts[n], tokens, factors), rel=1e-12)
    assert rows["searched"][WINDOW] == rows["none"][WINDOW]
    assert len({round(rows[name][TARGET], 6) for name in rows}) == len(rows)


def test_a_length_that_no_regime_serves_has_no_searched_figure(llama_folder: Path) -> None:
    texts, tokens = documents((WINDOW, 2 * WINDOW, TARGET), 1)
    scorer = LocalScorer(ModelRequest(str(llama_folder), TARGET), tokens)
    rows = perplexity_by_length(scorer, texts, [(WINDOW // 2, 2 * WINDOW, SHORT_REGIME)], no_scaling)
    assert set(rows["searched"]) == {WINDOW, 2 * WINDOW}
    # A regime that states the short lengths itself serves them.
    assert rows["searched"][WINDOW] != rows["none"][WINDOW]
    assert "searched" not in perplexity_by_length(scorer, texts, [], no_scaling)


def test_the_scaling_of_the_config_is_a_row(tmp_path: Path) -> None:
    parameters = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    folder = write_model(tmp_path, "llama", rope_parameters=parameters)
    texts, tokens = documents((TARGET,))
    scorer = LocalScorer(ModelRequest(str(folder), TARGET), tokens)
    rows = perplexity_by_length(scorer, texts, [], lambda n: shipped_factors(str(folder), scorer.info.spec, n))
    assert rows["shipped_linear"][TARGET] == pytest.approx(rows["pi"][TARGET], rel=1e-5)
    # ``none`` is the unscaled model, not the one that the config makes.
    assert abs(rows["none"][TARGET] / rows["pi"][TARGET] - 1) > 1e-3


def test_a_loss_that_is_not_finite_is_an_infinite_perplexity(tmp_path: Path) -> None:
    texts, tokens = documents((TARGET,), 1)
    folder = write_model(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = torch.sign(weights["lm_head.weight"]) * 3e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rows = perplexity_by_length(LocalScorer(ModelRequest(str(folder), TARGET), tokens), texts, [], no_scaling)
    assert {figure for by_length in rows.values() for figure in by_length.values()} == {math.inf}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does")
@pytest.mark.parametrize("order", [1, -1])
def test_what_could_not_be_computed_is_an_error(
    order: int, llama_folder: Path, little_memory: Callable[[], AbstractContextManager[None]]
) -> None:
    by_length, tokens = documents((WINDOW, 5000), 1)
    scorer = LocalScorer(ModelRequest(str(llama_folder), TARGET, attention="eager"), tokens)
    texts = {WINDOW: [text for each in by_length.values() for text in each][::order]}
    with little_memory(), pytest.raises(LongRopeError, match=f"Length {WINDOW} could not be scored: RuntimeError"):
        perplexity_by_length(scorer, texts, [], no_scaling)


def test_a_scaling_that_goes_by_length_is_shown_at_each(tmp_path: Path) -> None:
    """Dynamic NTK and LongRoPE differ by length: at each, what the model itself would rotate by."""
    for scaling in (
        {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0},
        {
            "rope_type": "longrope",
            "rope_theta": 500.0,
            "short_factor": [1.0] * 8,
            "long_factor": [3.0] * 8,
            "original_max_position_embeddings": WINDOW,
        },
    ):
        kind = str(scaling["rope_type"])
        folder = write_model(tmp_path / kind, "llama", rope_parameters=scaling)
        texts, tokens = documents((WINDOW, 2 * WINDOW, TARGET), 1)
        scorer = LocalScorer(ModelRequest(str(folder), TARGET), tokens)
        rows = perplexity_by_length(
            scorer, texts, [], lambda n, at=folder, spec=scorer.info.spec: shipped_factors(str(at), spec, n)
        )
        for n, (text,) in texts.items():
            model = AutoModelForCausalLM.from_pretrained(folder)
            ids = torch.as_tensor(tokens[text.sha256].astype("int64"))[None]
            with torch.no_grad():
                own = float(model(input_ids=ids, labels=ids).loss.exp())
            assert rows[f"shipped_{kind}"][n] == pytest.approx(own, rel=1e-4), (kind, n)
