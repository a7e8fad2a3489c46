"""The gradient of a window's loss is the one that finite differences show, and taking it leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from searcher.errors import LongRopeError
from searcher.rope import Factors
from tests.tiny_models import VOCABULARY, WINDOW, window, write_model
from workers import perplexity, refine
from workers.model import LoadedModel, ModelRequest, decoder_layers, load_model
from workers.perplexity import negative_log_likelihood
from workers.refine import loss_and_gradient

TARGET = 4 * WINDOW
LENGTH = 83
STEP = 1e-3  # of ln lambda: the last angle moves by a twelfth; norms and logits are float32 inside


def uneven(loaded: LoadedModel, n_hat: int = 0, attention: float = 1.15) -> Factors:
    return Factors(tuple(1 + 0.4 * i for i in range(loaded.spec.pairs)), n_hat, attention)


def moved(factors: Factors, index: int, by: float) -> Factors:
    """The factors with one ln lambda, or behind the last of them ln attention factor, a little further."""
    (lambdas,) = factors.by_layer()
    if index == len(lambdas):
        return replace(factors, attention_factor=factors.attention_factor * math.exp(by))
    return replace(factors, lambdas=tuple(v * math.exp(by) if i == index else v for i, v in enumerate(lambdas)))


def differences(
    loaded: LoadedModel, tokens: npt.NDArray[np.uint32], factors: Factors, spans: tuple[tuple[int, int], ...] = ()
) -> npt.NDArray[np.float64]:
    """Central differences of the total nats, of two steps, such that the error is of fourth order."""

    def nats(index: int, by: float) -> float:
        return negative_log_likelihood(loaded, tokens, moved(factors, index, by), spans)[0]

    def slope(index: int, step: float) -> float:
        return (nats(index, step) - nats(index, -step)) / (2 * step)

    return np.array([(4 * slope(i, STEP) - slope(i, 2 * STEP)) / 3 for i in range(loaded.spec.pairs + 1)])


@contextmanager
def in_double(loaded: LoadedModel) -> Iterator[LoadedModel]:
    """The model in float64, as far as its own code allows it: kernels for experts stop at float32."""
    if loaded.model.config.model_type == "mixtral":
        yield loaded
        return
    loaded.model.double()
    try:
        yield loaded
    finally:
        loaded.model.float()


@pytest.mark.parametrize(
    ("n_hat", "spans"), [(0, ()), (21, ()), (5, ((40, 41), (3, 9), (5, 12), (70, 83)))], ids=["all", "n_hat", "spans"]
)
def test_the_gradient_is_what_finite_differences_show(
    loaded: LoadedModel, n_hat: int, spans: tuple[tuple[int, int], ...]
) -> None:
    tokens = window(LENGTH)
    with in_double(loaded) as double:
        factors = uneven(double, n_hat)
        _, _, gradient = loss_and_gradient(double, tokens, factors, spans)
        expected = differences(double, tokens, factors, spans)
    assert len(gradient) == loaded.spec.pairs + 1
    np.testing.assert_allclose(gradient, expected, atol=1e-2 * float(np.abs(expected).max()))
    assert np.count_nonzero(np.abs(expected) > 4e-2 * np.abs(expected).max()) > 2, "the tolerance would hide it"


@pytest.mark.parametrize("n_hat", [0, 21, LENGTH])
def test_the_loss_is_the_scorers(loaded: LoadedModel, n_hat: int) -> None:
    tokens, factors = window(LENGTH), uneven(loaded, n_hat)
    for spans in ((), ((1, 2), (50, 60), (55, 70)), ((0, LENGTH),)):
        nll, count, gradient = loss_and_gradient(loaded, tokens, factors, spans)
        expected, scored = negative_log_likelihood(loaded, tokens, factors, spans)
        assert count == scored
        assert nll == pytest.approx(expected, rel=1e-5)
        assert all(math.isfinite(value) for value in gradient)


def test_nothing_depends_on_factors_where_no_position_is_rescaled(llama: LoadedModel) -> None:
    _, _, gradient = loss_and_gradient(llama, window(50), uneven(llama, n_hat=50))
    assert set(gradient) == {0.0}


def test_a_window_without_a_scored_token_has_no_loss_and_no_gradient(llama: LoadedModel) -> None:
    nothing = loss_and_gradient(llama, window(20), uneven(llama), [(0, 1)])
    assert nothing == (0.0, 0, (0.0,) * (llama.spec.pairs + 1))


@pytest.mark.parametrize("span", [(5, 5), (-1, 4), (90, 101)])
def test_spans_outside_the_window_are_refused_as_by_the_scorer(llama: LoadedModel, span: tuple[int, int]) -> None:
    with pytest.raises(LongRopeError, match=r"within 0 \.\. 100"):
        loss_and_gradient(llama, window(100), uneven(llama), [(1, 2), span])


def test_factors_by_layer_or_of_another_model_are_refused(llama: LoadedModel) -> None:
    row = uneven(llama).by_layer()[0]
    with pytest.raises(LongRopeError, match="differ by layer"):
        loss_and_gradient(llama, window(20), Factors((row, row)))
    with pytest.raises(LongRopeError, match=r"8 pairs; the factors are 3"):
        loss_and_gradient(llama, window(20), Factors((1.0, 2.0, 3.0)))


def pieces_of(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feed-forward blocks in pieces of so many tokens, and the head in pieces of 16."""
    monkeypatch.setattr(refine, "TOKENS_AT_ONCE", size)
    monkeypatch.setattr(refine, "KEPT_BYTES", 0)
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 1)


def agree(ours: tuple[float, int, tuple[float, ...]], expected: tuple[float, int, tuple[float, ...]]) -> None:
    assert ours[1] == expected[1]
    assert ours[0] == pytest.approx(expected[0], rel=1e-6)
    np.testing.assert_allclose(ours[2], expected[2], atol=1e-4 * float(np.abs(expected[2]).max()))


def test_pieces_change_nothing(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, factors = window(LENGTH), uneven(loaded, 5)
    expected = loss_and_gradient(loaded, tokens, factors)
    pieces_of(32, monkeypatch)
    agree(loss_and_gradient(loaded, tokens, factors), expected)


def test_what_is_kept_and_what_is_computed_again_alters_no_bit(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, factors = window(LENGTH), uneven(loaded, 5)
    calls: list[object] = []
    again = refine._again
    monkeypatch.setattr(refine, "_again", lambda *args, **kwargs: calls.append(0) or again(*args, **kwargs))
    kept = loss_and_gradient(loaded, tokens, factors)
    assert not calls
    monkeypatch.setattr(refine, "KEPT_BYTES", 0)
    assert loss_and_gradient(loaded, tokens, factors) == kept
    assert len(calls) == loaded.spec.layers + 1


def test_the_same_call_gives_the_same_bits(llama: LoadedModel) -> None:
    tokens, factors = window(LENGTH), uneven(llama, 5)
    assert loss_and_gradient(llama, tokens, factors) == loss_and_gradient(llama, tokens, factors)


def test_a_caller_without_gradients_gets_one(llama: LoadedModel) -> None:
    tokens, factors = window(40), uneven(llama)
    expected = loss_and_gradient(llama, tokens, factors)
    with torch.no_grad():
        assert loss_and_gradient(llama, tokens, factors) == expected
    with torch.inference_mode():
        assert loss_and_gradient(llama, tokens, factors) == expected


def patched(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module) or module._forward_pre_hooks]


def output(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(torch.as_tensor(window(50).astype(np.int64))[None], use_cache=False).logits
    return result


def test_the_model_is_left_as_it_was(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded.model
    before, modules = output(model), list(model.modules())
    pieces_of(32, monkeypatch)
    loss_and_gradient(loaded, window(LENGTH), uneven(loaded))
    assert torch.equal(output(model), before)
    assert list(model.modules()) == modules
    assert not patched(model)
    assert not any(each.requires_grad or each.grad is not None for each in model.parameters())


@pytest.mark.parametrize("place", ["_nats", "scored_ranges"])
def test_the_model_is_left_as_it_was_after_an_error(
    place: str, llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, modules = output(llama.model), list(llama.model.modules())

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(refine, place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        loss_and_gradient(llama, window(50), uneven(llama))
    assert torch.equal(output(llama.model), before)
    assert list(llama.model.modules()) == modules
    assert not patched(llama.model)


def test_a_forward_that_was_replaced_before_is_put_back(llama: LoadedModel) -> None:
    layer = decoder_layers(llama.model)[0]
    own = layer.forward

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    layer.forward = theirs  # type: ignore[method-assign]
    try:
        loss_and_gradient(llama, window(20), uneven(llama))
        assert vars(layer)["forward"] is theirs
    finally:
        del layer.forward


class Held(TorchDispatchMode):
    """The most bytes of tensors made under it that were alive at one time, by the storages that still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[Any, int]] = {}
        self.sum = self.most = 0  # the sum may hold some that are gone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = (storage._weak_ref(), storage.nbytes())
                    self.sum += storage.nbytes()
        if self.sum > self.most:
            self.forget()
            self.most = max(self.most, self.sum)
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for weak, _ in self.alive.values():
            torch.UntypedStorage._free_weak_ref(weak)

    def forget(self) -> None:
        for cdata, (weak, size) in list(self.alive.items()):
            if torch.UntypedStorage._expired(weak):
                torch.UntypedStorage._free_weak_ref(weak)
                del self.alive[cdata]
                self.sum -= size


def most_held(work: Callable[[], object]) -> int:
    with Held() as held:
        work()
    return held.most


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Eight layers, with a feed-forward block four times as wide as the hidden states."""
    folder = write_model(tmp_path_factory.mktemp("deep"), "llama", num_hidden_layers=8, intermediate_size=256)
    return load_model(ModelRequest(str(folder), 2048))


def test_layers_are_checkpoints(deep: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held is the hidden states between layers and a stated number of them for the layer at work."""
    length, hidden = 1024, 1024 * 64 * 4
    pieces_of(128, monkeypatch)
    held = most_held(lambda: loss_and_gradient(deep, window(length), uneven(deep)))
    assert held < (8 + 24) * hidden
    with monkeypatch.context() as patch:
        patch.setattr(refine, "_again", lambda function, *args, **kwargs: function(*args, **kwargs))
        without = most_held(lambda: loss_and_gradient(deep, window(length), uneven(deep)))
    assert held < without / 4


def test_feed_forward_and_head_are_held_by_the_piece(deep: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = 1024 * 256 * 4  # a feed-forward block's activations of the whole window; its logits are as wide
    shapes: list[int] = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                shapes.append(result.untyped_storage().nbytes())
            return result

    pieces_of(128, monkeypatch)
    with Largest():
        loss_and_gradient(deep, window(1024), uneven(deep))
    assert max(shapes) < wide
    assert wide <= 1024 * VOCABULARY * 4


def test_memory_grows_with_length_and_not_with_its_square(deep: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces_of(64, monkeypatch)
    short, long = (most_held(lambda n=n: loss_and_gradient(deep, window(n), uneven(deep))) for n in (256, 1024))
    assert long < 4.2 * short


@pytest.mark.parametrize("size", [32, 4096])
def test_streamed_weights_give_the_same_bits(size: int, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, factors = window(LENGTH), uneven(loaded, 5)
    pieces_of(size, monkeypatch)
    expected = loss_and_gradient(loaded, tokens, factors)
    assert loss_and_gradient(replace(loaded, stream_weights=True), tokens, factors) == expected
    assert not patched(loaded.model)


@pytest.mark.parametrize("size", [32, 4096])
def test_layers_compute_with_copies_that_go_when_they_are_done(
    size: int, deep: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed again has copies, too, and those of at most two layers live at one time."""
    tokens, factors = window(64), uneven(deep)
    pieces_of(size, monkeypatch)
    expected = loss_and_gradient(deep, tokens, factors)
    layers = list(decoder_layers(deep.model))
    a_layer = sum(each.nbytes for each in layers[0].parameters())
    streamed = replace(deep, stream_weights=True)
    own = {each.data_ptr() for layer in layers for each in layer.parameters()}
    with Held() as held, Touching(own) as touching:
        assert loss_and_gradient(streamed, tokens, factors) == expected
    plain = most_held(lambda: loss_and_gradient(deep, tokens, factors))
    assert held.most < plain + 2.5 * a_layer
    assert touching.operations - {"aten.empty_like.default"} == {"aten.copy_.default"}


class Touching(TorchDispatchMode):
    """Which operations read given memory, other than to look at it."""

    def __init__(self, memory: set[int]) -> None:
        super().__init__()
        self.memory = memory
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = {each.data_ptr() for each in args if isinstance(each, Tensor)}
        if read & self.memory and not (isinstance(result, Tensor) and result.data_ptr() in self.memory):
            self.operations.add(str(func))
        return result


@pytest.mark.gpu
def test_on_cuda_with_streamed_weights_it_is_the_same_gradient(llama_folder: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    tokens = window(LENGTH)
    host = load_model(ModelRequest(str(llama_folder), TARGET, device="cpu"))
    expected = loss_and_gradient(host, tokens, uneven(host))
    for streamed in (False, True):
        card = load_model(ModelRequest(str(llama_folder), TARGET, device="cuda", stream_weights=streamed))
        ours = loss_and_gradient(card, tokens, uneven(card))
        assert ours[0] == pytest.approx(expected[0], rel=1e-5)
        np.testing.assert_allclose(ours[2], expected[2], atol=1e-3 * float(np.abs(expected[2]).max()))
