"""Perplexity by method and length: which factors serve which length, and figures that are those of plain loops."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from searcher.baselines import BASELINES, none
from searcher.errors import LongRopeError
from searcher.rope import Factors, attention_factor
from searcher.study import Document
from tests.tiny_models import WINDOW, configured, own_loss, window, write_model
from workers.dataset import TokenisedDocument
from workers.evaluate import (
    OWN,
    Evaluation,
    Method,
    Row,
    Tally,
    evaluate_method,
    evaluate_methods,
    methods_at,
    perplexity_by_length,
    texts_at,
)
from workers.model import LoadedModel, ModelRequest, load_model, shipped_factors
from workers.perplexity import negative_log_likelihood, token_losses
from workers.scorer import LocalScorer
from workers.sinks import Sinks, token_losses_with_sinks

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


BOS = 0


def books(*lengths: int) -> list[TokenisedDocument]:
    """Texts of random tokens, without BOS."""
    return [TokenisedDocument(f"book {i}", f"book {i}", window(n + 1, 7 + i)[1:]) for i, n in enumerate(lengths)]


def by_name(methods: Sequence[Method], attention: str = OWN) -> dict[str, Method]:
    return {method.name: method for method in methods if method.attention == attention}


def test_every_method_is_shown_under_its_own_attention_factor_and_under_one_for_all(llama: LoadedModel) -> None:
    spec = llama.spec
    methods = methods_at(spec, 2 * WINDOW, [(WINDOW + 1, TARGET, SHORT_REGIME)], ("linear", SHORT_REGIME), "su")
    own, shared = by_name(methods), by_name(methods, "su")
    assert list(own) == list(shared) == [*BASELINES, "shipped_linear", "searched", "attention_sinks"]
    assert len(methods) == len(own) + len(shared)
    for name, make in BASELINES.items():
        assert own[name].factors == make(spec, 2.0)
    assert own["searched"].factors == own["shipped_linear"].factors == SHORT_REGIME
    assert own["attention_sinks"] == Method("attention_sinks", OWN, none(spec, 1), Sinks(WINDOW, 4))
    for name, method in shared.items():
        assert method.factors.attention_factor == attention_factor("su", spec, 2.0) > 1
        assert replace(method, attention=OWN, factors=own[name].factors) == own[name]
        assert method.factors.lambdas == own[name].factors.lambdas
        assert method.factors.n_hat == own[name].factors.n_hat
    assert by_name(methods_at(spec, 2 * WINDOW, policy=None), "su") == {}
    assert methods_at(spec, 2 * WINDOW, sinks=Sinks(32, 2), policy=None)[-1].sinks == Sinks(32, 2)


def test_the_regime_follows_the_length_to_the_token(llama: LoadedModel) -> None:
    regimes = [(WINDOW + 1, 2 * WINDOW, SHORT_REGIME), (2 * WINDOW + 1, TARGET, LONG_REGIME)]
    served = {n: by_name(methods_at(llama.spec, n, regimes)) for n in (*LENGTHS, TARGET + 1)}
    assert {n: methods["searched"].factors for n, methods in served.items() if "searched" in methods} == {
        **dict.fromkeys(LENGTHS[:2], none(llama.spec, 1)),
        **dict.fromkeys(LENGTHS[2:4], SHORT_REGIME),
        **dict.fromkeys(LENGTHS[4:], LONG_REGIME),
    }
    # Up to the window there is nothing to be extended, and no attention factor that would differ.
    for n in LENGTHS[:2]:
        assert [(m.name, m.attention) for m in methods_at(llama.spec, n, regimes)] == [("none", OWN), ("searched", OWN)]
    recovered = [(1, WINDOW, LONG_REGIME)]
    assert by_name(methods_at(llama.spec, WINDOW, recovered))["searched"].factors == LONG_REGIME


@pytest.mark.parametrize("length", [WINDOW // 2, WINDOW, 3 * WINDOW])
def test_a_row_is_what_transformers_itself_computes_window_by_window(llama: LoadedModel, length: int) -> None:
    """PI in transformers' own implementation, plain forwards, sums by hand; short lengths are asked for alike."""
    texts = texts_at(books(500, 4 * length, 20), length, BOS, windows=2, slides=3, stride=length // 4)
    scale = max(length / WINDOW, 1.0)
    parameters = {"rope_type": "linear", "rope_theta": 500.0, "factor": scale}
    model = configured(llama.model, rope_parameters=parameters)
    row = evaluate_method(llama, texts, Method("pi", OWN, Factors((scale,) * 8)))
    assert (row.method, row.length, row.stride, row.failure) == ("pi", length, length // 4, None)
    assert {len(w.tokens) for w in (*texts.single, *texts.sliding)} == {length}
    assert (len(texts.single), len(texts.sliding)) == (4, 6)  # two documents hold a window, one does not

    nats = sum(own_loss(model, w.tokens) * (length - 1) for w in texts.single)
    assert row.single is not None
    assert (row.single.tokens, row.single.windows) == (4 * (length - 1), 4)
    assert row.single.nll == pytest.approx(nats, rel=1e-5)
    assert row.single.perplexity == pytest.approx(math.exp(nats / (4 * (length - 1))), rel=1e-5)

    nats, count = 0.0, 0
    for i, w in enumerate(texts.sliding):
        ids = torch.as_tensor(w.tokens.astype(np.int64))
        with torch.no_grad():
            losses = -model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)[range(length - 1), ids[1:]]
        losses = losses if i % 3 == 0 else losses[-(length // 4) :]
        nats, count = nats + float(losses.sum()), count + len(losses)
    assert row.sliding is not None
    assert (row.sliding.tokens, row.sliding.windows) == (count, 6)
    assert count == 2 * (length - 1 + 2 * (length // 4))
    assert row.sliding.nll == pytest.approx(nats, rel=1e-5)


def test_a_window_that_is_single_and_sliding_scores_for_each_what_it_should(llama: LoadedModel) -> None:
    length, body = WINDOW + 1, WINDOW
    texts = texts_at(books(2 * body), length, BOS, windows=2, slides=None, stride=16)
    shared = {w.document.sha256 for w in texts.single} & {w.document.sha256 for w in texts.sliding}
    assert len(shared) == len(texts.single) == 2
    row = evaluate_method(llama, texts, Method("none", OWN, none(llama.spec, 1)))
    assert row.single is not None
    assert row.sliding is not None
    assert row.single.tokens == row.sliding.tokens == 2 * body
    assert row.single.nll != row.sliding.nll


def test_losses_by_position_are_the_single_windows_told_apart(llama: LoadedModel) -> None:
    texts = texts_at(books(500, 700), TARGET, BOS, windows=2, slides=0, edges=(1, 50, WINDOW, TARGET))
    factors = BASELINES["yarn"](llama.spec, 4.0)
    row = evaluate_method(llama, texts, Method("yarn", OWN, factors))
    assert row.sliding is None
    assert row.single is not None
    losses = [token_losses(llama, w.tokens, factors) for w in texts.single]
    for bucket, (start, end) in zip(row.positions, ((1, 50), (50, WINDOW), (WINDOW, TARGET)), strict=True):
        assert (bucket.start, bucket.end, bucket.tokens) == (start, end, 3 * (end - start))
        assert bucket.nll == pytest.approx(sum(float(each[start - 1 : end - 1].sum()) for each in losses), rel=1e-12)
    assert sum(bucket.nll for bucket in row.positions) == pytest.approx(row.single.nll, rel=1e-12)
    assert sum(bucket.tokens for bucket in row.positions) == row.single.tokens


def test_attention_sinks_are_scored_on_the_same_tokens(llama: LoadedModel) -> None:
    texts = texts_at(books(600), 2 * WINDOW, BOS, windows=1, slides=2)
    rows = list(evaluate_methods(llama, texts, methods_at(llama.spec, 2 * WINDOW, sinks=Sinks(WINDOW, 2))))
    plain = next(row for row in rows if row.method == "none")
    for row, factor in zip([r for r in rows if r.method == "attention_sinks"], (1.0, None), strict=True):
        assert (row.sinks, row.cache) == (2, WINDOW)
        assert row.single is not None
        assert plain.single is not None
        assert (row.single.tokens, row.single.windows) == (plain.single.tokens, plain.single.windows)
        assert row.single.nll != plain.single.nll
        used = Factors((1.0,) * 8, 0, factor or row.attention_factor)
        expected = token_losses_with_sinks(llama, texts.single[0].tokens, Sinks(WINDOW, 2), used)
        assert row.single.nll == pytest.approx(float(expected.sum()), rel=1e-12)
    # The same within the cache, whatever lies beyond it.
    sinks_row = next(row for row in rows if row.method == "attention_sinks")
    for ours, theirs in zip(sinks_row.positions, plain.positions, strict=True):
        assert (ours.nll == pytest.approx(theirs.nll, rel=1e-6)) == (ours.end <= WINDOW)


def test_methods_that_rotate_alike_are_computed_once(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers import evaluate

    seen: list[str] = []

    def counted(loaded: LoadedModel, text: object, method: Method) -> torch.Tensor:
        seen.append(method.name)
        return original(loaded, text, method)  # type: ignore[arg-type]

    original = evaluate.window_losses
    monkeypatch.setattr(evaluate, "window_losses", counted)
    texts = texts_at(books(600), 2 * WINDOW, BOS, windows=1, slides=1)  # the same window twice
    methods = methods_at(llama.spec, 2 * WINDOW, policy="none")
    rows = list(evaluate_methods(llama, texts, methods))
    assert [(row.method, row.attention) for row in rows] == [(m.name, m.attention) for m in methods]
    assert seen == [*BASELINES, "attention_sinks", "yarn"]  # YaRN alone has another factor than 1
    assert all(row.single == row.sliding for row in rows)


def test_a_family_that_cannot_have_sinks_is_a_row_with_a_reason(tmp_path: Path) -> None:
    loaded = load_model(ModelRequest(str(write_model(tmp_path, "gemma2")), TARGET))
    texts = texts_at(books(600), 2 * WINDOW, BOS, windows=1, slides=0)
    *others, row = evaluate_methods(loaded, texts, methods_at(loaded.spec, 2 * WINDOW, policy=None))
    assert row.method == "attention_sinks"
    assert row.single is None
    assert "caps its attention logits" in (row.failure or "")
    assert all(other.failure is None and other.single for other in others)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does")
def test_memory_that_runs_out_is_a_row_with_a_reason(
    llama_folder: Path, little_memory: Callable[[], AbstractContextManager[None]]
) -> None:
    loaded = load_model(ModelRequest(str(llama_folder), TARGET, attention="eager"))
    texts = texts_at(books(6000), 5000, BOS, windows=1, slides=0)
    with little_memory():
        row = evaluate_method(loaded, texts, Method("none", OWN, none(loaded.spec, 1)))
    assert row.failure == "5000 tokens do not fit into the memory of cpu."
    assert (row.single, row.positions) == (None, ())


def test_an_evaluation_goes_through_json_and_back(llama: LoadedModel) -> None:
    texts = texts_at(books(600), 2 * WINDOW, BOS, windows=1)
    rows = list(evaluate_methods(llama, texts, methods_at(llama.spec, 2 * WINDOW)))
    whole = Evaluation(WINDOW, (*rows, replace(rows[0], single=None, positions=(), failure="no memory")))
    stored = json.dumps(whole.to_json(), allow_nan=False)
    assert Evaluation.from_json(json.loads(stored)) == whole
    first = json.loads(stored)["rows"][0]
    assert rows[0].single is not None
    assert first["single"]["perplexity"] == rows[0].single.perplexity
    assert (first["length"], first["stride"], first["attention"]) == (2 * WINDOW, WINDOW // 4, OWN)


def test_a_loss_that_is_not_finite_is_none_in_json() -> None:
    row = Row("none", 10, 2, OWN, 1.0, 0, single=Tally(math.nan, 9, 1))
    assert row.single is not None
    assert row.single.perplexity == math.inf
    data = json.loads(json.dumps(row.to_json(), allow_nan=False))
    assert data["single"] == {"nll": None, "tokens": 9, "windows": 1, "perplexity": None}
    again = Row.from_json(data)
    assert again.single is not None
    assert math.isnan(again.single.nll)


def test_text_that_holds_no_window_is_refused() -> None:
    with pytest.raises(LongRopeError, match=r"nothing to score at 700 tokens: the longest of 2 documents has 601"):
        texts_at(books(600, 80), 700, BOS)
    with pytest.raises(LongRopeError, match="at least one window"):
        texts_at(books(600), 100, BOS, windows=0, slides=0)
    assert len(texts_at(books(600), 101, BOS, windows=0, slides=None, stride=100).sliding) == 6


def test_sliding_windows_are_scored_by_any_scorer(llama_folder: Path, llama: LoadedModel) -> None:
    """Also by workers of a pool, which are given documents: what a window scores is in its spans."""
    texts = texts_at(books(700), 2 * WINDOW, BOS, windows=0, slides=4)
    scorer = LocalScorer(ModelRequest(str(llama_folder), TARGET), {w.document.sha256: w.tokens for w in texts.sliding})
    found = perplexity_by_length(scorer, {2 * WINDOW: [w.document for w in texts.sliding]}, [], no_scaling)
    for row in evaluate_methods(llama, texts, methods_at(llama.spec, 2 * WINDOW, policy=None)):
        if row.method != "attention_sinks":
            assert row.sliding is not None
            assert found[row.method][2 * WINDOW] == pytest.approx(row.sliding.perplexity, rel=1e-6)
