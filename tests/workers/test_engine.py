"""Layer by layer and in pieces, the forward is the ordinary one; what it holds does not grow with length squared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoModelForCausalLM

from searcher.baselines import none
from searcher.errors import LongRopeError
from searcher.rope import Factors
from tests.tiny_models import FAMILIES, VOCABULARY, WINDOW, window, write_model
from workers import attention, engine, memo
from workers.apply import RescaledRotary, rescaled
from workers.memo import Memo
from workers.model import LoadedModel, ModelRequest, decoder_layers, load_model
from workers.perplexity import token_losses

TARGET = 4 * WINDOW
CHUNK = 16
BORDERS = (2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 3 * CHUNK - 1, 5 * CHUNK + 3)


def theirs(folder: Path) -> Any:
    """The model as transformers loads it, with the attention function it chooses itself."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.config._attn_implementation in ("sdpa", "eager")
    return model


def ordinary(model: Any, length: int, rotations: list[RescaledRotary] | None = None) -> Tensor:
    """Loss of every token but the first by one call of the model."""
    ids = torch.as_tensor(window(length).astype(np.int64))[None]
    with torch.no_grad(), rescaled(model, list(decoder_layers(model)), rotations) if rotations else nothing():
        logits = model(input_ids=ids, use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits[:-1].double(), ids[0, 1:], reduction="none")


@contextmanager
def nothing() -> Iterator[None]:
    yield


def turned(loaded: LoadedModel, factors: Factors) -> list[RescaledRotary]:
    n_hat, attention_factor = factors.n_hat, factors.attention_factor
    return [
        RescaledRotary(loaded.spec.theta, row, n_hat, attention_factor, loaded.layout, loaded.cast)
        for row in factors.by_layer()
    ]


def uneven(loaded: LoadedModel, n_hat: int = 5) -> Factors:
    return Factors(tuple(1 + 0.4 * i for i in range(loaded.spec.pairs)), n_hat, 1.15)


def losses(loaded: LoadedModel, length: int, factors: Factors | None, chunk: int | None = CHUNK, **how: Any) -> Tensor:
    return token_losses(replace(loaded, chunk=chunk, memo=Memo(), **how), window(length), factors)


def agree(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert float(ours.sum()) == pytest.approx(float(expected.sum()), rel=1e-5)


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Any]:
    """A family as we load it, and as transformers does."""
    folder = write_model(tmp_path_factory.mktemp("families") / request.param, request.param)
    return load_model(ModelRequest(str(folder), TARGET, chunk=CHUNK)), theirs(folder)


@pytest.mark.parametrize("n_hat", [0, 5, CHUNK + 1])
def test_every_family_in_chunks_is_the_ordinary_forward(family: tuple[LoadedModel, Any], n_hat: int) -> None:
    loaded, model = family
    factors = uneven(loaded, n_hat)
    for length in BORDERS:
        agree(losses(loaded, length, factors), ordinary(model, length, turned(loaded, factors)))
    agree(losses(loaded, 50, None), ordinary(model, 50))
    assert float((losses(loaded, 83, factors) - losses(loaded, 83, None)).abs().max()) > 1e-3


def test_factors_that_differ_by_layer_keep_their_place_in_every_chunk(family: tuple[LoadedModel, Any]) -> None:
    loaded, model = family
    first, second = uneven(loaded).by_layer()[0], (2.5,) * loaded.spec.pairs
    factors = Factors((first, second), n_hat=CHUNK + 3, attention_factor=1.1)
    agree(losses(loaded, 70, factors), ordinary(model, 70, turned(loaded, factors)))


@settings(max_examples=25, deadline=None)
@given(length=st.integers(2, 120), chunk=st.integers(1, 130), n_hat=st.integers(0, 130))
def test_any_length_in_any_chunk_is_the_ordinary_forward(
    length: int, chunk: int, n_hat: int, llama: LoadedModel, llama_folder: Path
) -> None:
    factors = uneven(llama, n_hat)
    expected = ordinary(theirs(llama_folder), length, turned(llama, factors))
    agree(losses(llama, length, factors, chunk), expected)


WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {},
    "phi3": {"pad_token_id": 0},
    "gemma2": {},  # its first layer alone
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},  # its second layer alone
}


@pytest.mark.parametrize("name", list(WINDOWED))
def test_windowed_attention_reaches_over_chunks(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, name, sliding_window=20, **WINDOWED[name])
    loaded, model = load_model(ModelRequest(str(folder), TARGET, sliding_window="keep")), theirs(folder)
    expected = ordinary(model, 90)
    for chunk in (7, 20, 64, None):
        agree(losses(loaded, 90, None, chunk), expected)
    off = load_model(ModelRequest(str(folder), TARGET, sliding_window="off"))
    assert float((losses(off, 90, None) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_scaling_that_depends_on_the_length_sees_the_whole_length(kind: str, tmp_path: Path) -> None:
    scaling: dict[str, Any] = {"factor": 4.0}
    if kind == "longrope":
        lists = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i / 2 for i in range(8)]}
        scaling = {**lists, "original_max_position_embeddings": WINDOW}
    parameters = {"rope_type": kind, "rope_theta": 777.0, **scaling}
    longest = TARGET if kind == "longrope" else WINDOW
    folder = write_model(tmp_path, "llama", rope_parameters=parameters, max_position_embeddings=longest)
    loaded = load_model(ModelRequest(str(folder), TARGET))
    for length in (WINDOW + 9, 3 * WINDOW, WINDOW - 1, 2 * WINDOW):  # up and down: the module keeps a state
        agree(losses(loaded, length, None), ordinary(theirs(folder), length))


def test_chunks_never_take_the_function_that_cuts_the_keys(
    llama: LoadedModel, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ordinary(theirs(llama_folder), 50)
    calls: list[tuple[int, int]] = []

    def watched(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((query.shape[2], key.shape[2]))
        return attention.attention(module, query, key, *args, **kwargs)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("transformers' own attention was called")

    with monkeypatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "sdpa", refuse)
        patch.setitem(AttentionInterface._global_mapping, "longrope", watched)
        agree(losses(llama, 50, None), expected)
    assert calls == 2 * [(16, 16), (16, 32), (16, 48), (2, 50)]
    # What would have come of it: this is what the comparisons above can see.
    monkeypatch.setattr(llama.model.config, "_attn_implementation_internal", "sdpa")
    assert float((losses(llama, 50, None) - expected).abs().max()) > 0.01


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_other_attention_functions_run_whole(name: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(ModelRequest(str(llama_folder), TARGET, attention=name))
    assert (loaded.chunk, loaded.settings["chunk"]) == (None, None)
    shapes: list[int] = []
    for layer in decoder_layers(loaded.model):
        layer.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[1]))
    monkeypatch.setattr("workers.perplexity.LOGITS_AT_ONCE", 1)  # pieces of 16 for the head
    agree(token_losses(loaded, window(90), uneven(loaded)), losses(loaded, 90, uneven(loaded), None))
    assert set(shapes) == {90}
    agree(token_losses(loaded, window(90), None), ordinary(theirs(llama_folder), 90))


@pytest.mark.parametrize(
    "how", [{"hidden_on_host": True}, {"stream_weights": True}, {"hidden_on_host": True, "stream_weights": True}]
)
def test_where_states_and_weights_live_changes_no_bit(family: tuple[LoadedModel, Any], how: dict[str, bool]) -> None:
    loaded, _ = family
    factors = Factors((uneven(loaded).by_layer()[0], (2.0,) * loaded.spec.pairs), 5, 1.1)
    for length in (CHUNK, 3 * CHUNK + 1):
        assert torch.equal(losses(loaded, length, factors, **how), losses(loaded, length, factors))


def test_streamed_weights_are_copies_of_two_layers(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(ModelRequest(str(llama_folder), TARGET, chunk=CHUNK, stream_weights=True))
    expected = losses(loaded, 50, None, stream_weights=False)
    layers = list(decoder_layers(loaded.model))
    own = {parameter.data_ptr() for layer in layers for parameter in layer.parameters()}
    seen: list[set[int]] = []
    called = torch.func.functional_call

    def watched(layer: nn.Module, weights: dict[str, Tensor], *rest: Any) -> Any:
        assert weights.keys() == dict(layer.named_parameters()).keys()
        seen.append({tensor.data_ptr() for tensor in weights.values()})
        return called(layer, weights, *rest)

    monkeypatch.setattr(torch.func, "functional_call", watched)
    assert torch.equal(token_losses(loaded, window(50), None), expected)
    assert len(seen) == 2 * 4
    assert len(set.union(*seen)) == 2 * len(seen[0])
    assert not set.union(*seen) & own


def linear_calls(loaded: LoadedModel) -> tuple[list[str], Callable[[], None]]:
    """Names of the first layer's linear maps as they run on tokens, and how to stop."""
    called: list[str] = []
    undo = []
    first = next(iter(decoder_layers(loaded.model)))

    def note(name: str, module: nn.Linear) -> None:
        forward = type(module).forward

        def run(hidden: Tensor) -> Tensor:
            called.append(name)
            return forward(module, hidden)

        module.forward = run  # type: ignore[method-assign]
        undo.append(lambda: module.__dict__.pop("forward"))

    for name, module in first.named_modules():
        if isinstance(module, nn.Linear):
            note(name.split(".")[-1], module)
    return called, lambda: [each() for each in undo] and None


def test_candidates_on_one_document_share_the_first_projections_bit_for_bit(family: tuple[LoadedModel, Any]) -> None:
    loaded = replace(family[0], memo=Memo())
    for length in (CHUNK - 1, 3 * CHUNK + 1):
        alone = [losses(loaded, length, factors) for factors in (uneven(loaded), none(loaded.spec, 1), None)]
        shared = [token_losses(loaded, window(length), f) for f in (uneven(loaded), none(loaded.spec, 1), None)]
        assert all(map(torch.equal, shared, alone))
        assert torch.equal(token_losses(loaded, window(length), uneven(loaded)), alone[0])
    assert loaded.memo._documents
    assert not any("forward" in module.__dict__ for module in loaded.model.modules())


def test_only_what_comes_before_the_rotation_is_shared(tmp_path: Path) -> None:
    before = {"llama": {"q_proj", "k_proj", "v_proj"}, "phi3": {"qkv_proj"}, "phi": {"q_proj", "k_proj", "v_proj"}}
    for name, projections in before.items():
        loaded = load_model(ModelRequest(str(write_model(tmp_path / name, name)), TARGET, chunk=CHUNK))
        called, stop = linear_calls(loaded)
        try:
            token_losses(loaded, window(40), uneven(loaded))
            everything = set(called)
            called.clear()
            token_losses(loaded, window(40), None)
        finally:
            stop()
        assert everything - set(called) == projections
        assert called


def test_what_is_shared_is_of_the_same_tokens_chunk_and_weights_and_within_its_limit(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(ModelRequest(str(llama_folder), TARGET, chunk=CHUNK))
    factors = uneven(loaded)
    token_losses(loaded, window(40), factors)
    other = window(40, seed=1)
    assert torch.equal(token_losses(loaded, other, factors), token_losses(replace(loaded, memo=Memo()), other, factors))
    agree(token_losses(replace(loaded, chunk=7), window(40), factors), token_losses(loaded, window(40), factors))
    with torch.no_grad():
        next(iter(decoder_layers(loaded.model))).self_attn.q_proj.weight.mul_(1.5)
    changed = token_losses(loaded, window(40), factors)
    assert torch.equal(changed, token_losses(replace(loaded, memo=Memo()), window(40), factors))

    each = 48 * (64 + 32 + 32) * 4  # bytes of q, k and v
    for limit, kept in ((2 * each, 2), (each, 1), (each - 1, 0)):
        monkeypatch.setattr(memo, "BYTES", limit)
        fresh = replace(loaded, memo=Memo())
        for seed in range(3):
            token_losses(fresh, window(48, seed=seed), factors)
        assert len(fresh.memo._documents) == kept
        assert sum(document.size for document in fresh.memo._documents.values()) <= limit


class Largest(TorchDispatchMode):
    """Notes the most bytes that any tensor made under it has."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("run", ["losses", "trial"])
def test_nothing_larger_than_the_hidden_states_is_ever_made(
    run: str, llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.perplexity.LOGITS_AT_ONCE", 64 * VOCABULARY)
    length = 4096
    hidden = length * 64 * 4
    with Largest() as seen:
        if run == "trial":
            engine.trial(replace(llama, chunk=64), length, 64)
        else:
            losses(llama, length, none(llama.spec, 1), 64)
    assert seen.bytes == hidden
    assert length * length * 4 > 10 * hidden  # what a mask or scores would be


def test_a_trial_runs_for_every_family_and_leaves_no_trace(family: tuple[LoadedModel, Any]) -> None:
    loaded, _ = family
    before = losses(loaded, 50, None)
    for length in (CHUNK, CHUNK + 1, 100):
        engine.trial(loaded, length, 16)
        engine.trial(replace(loaded, hidden_on_host=True, stream_weights=True), length, 16)
    assert torch.equal(losses(loaded, 50, None), before)


def test_a_failed_run_leaves_the_model_as_it_was(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before, layers, rotary = losses(llama, 50, None), decoder_layers(llama.model), llama.model.model.rotary_emb

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for owner, place in ((engine.LayerCache, "update"), (engine, "_prelude"), (engine._Given, "forward")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, place, interrupt)
            with pytest.raises(KeyboardInterrupt):
                losses(llama, 50, None)
        assert decoder_layers(llama.model) is layers is llama.model.model.layers
        assert llama.model.model.rotary_emb is rotary
        assert torch.equal(losses(llama, 50, None), before)


def test_layers_that_keep_no_keys_are_refused(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = engine._Recorder.forward

    def without(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("past_key_values")
        return forward(self, hidden, *args, **kwargs)

    monkeypatch.setattr(engine._Recorder, "forward", without)
    with pytest.raises(LongRopeError, match="take no past_key_values"):
        losses(llama, 50, None)
