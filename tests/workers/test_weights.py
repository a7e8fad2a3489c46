"""Weights in shared memory: the model built from them is the one that was read, to the last bit, without a copy."""

from __future__ import annotations

import mmap
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from searcher.rope import Factors
from tests.tiny_models import FAMILIES, WINDOW, window, write_model
from workers.model import LoadedModel, ModelRequest, load_model
from workers.perplexity import negative_log_likelihood
from workers.weights import SharedWeights, build, share, state_dict

TARGET = 4 * WINDOW
SHA = "5" * 64


def read_only(shared: SharedWeights, path: Path) -> SharedWeights:
    """The same weights in memory that the kernel protects, as Ray's object store maps it: a write ends the process."""
    with path.open("wb") as file:
        places = {}
        for name, (_, array) in shared.arrays.items():
            file.write(b"\0" * (-file.tell() % 64))
            places[name] = file.tell()
            file.write(array.tobytes())
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = {
        name: (dtype, np.frombuffer(memory, array.dtype, array.size, places[name]).reshape(array.shape))
        for name, (dtype, array) in shared.arrays.items()
    }
    return replace(shared, arrays=arrays)


def rebuilt(loaded: LoadedModel, shared: SharedWeights) -> LoadedModel:
    config = loaded.model.config
    model, info = build(shared, config, attn_implementation=config._attn_implementation)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return replace(loaded, model=model.eval().requires_grad_(False))


def shared_of(model: Any) -> SharedWeights:
    shared = share(model, SHA)
    assert shared is not None
    return shared


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_model_over_memory_that_cannot_be_written(family: str, tied: bool, dtype: str, tmp_path: Path) -> None:
    """Parameters, buffers, dtypes and scores are equal bit for bit; what is stored is not copied."""
    folder = write_model(tmp_path / "model", family, tie_word_embeddings=tied, dtype=dtype)
    loaded = load_model(ModelRequest(str(folder), TARGET))
    shared = read_only(shared_of(loaded.model), tmp_path / "weights")
    other = rebuilt(loaded, shared)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(one.model, kind)()) for one in (loaded, other))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].dtype == theirs[name].dtype for name in ours)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    held = {array.ctypes.data for _, array in shared.arrays.values()}
    copied = {name for name, tensor in other.model.named_parameters() if tensor.data_ptr() not in held}
    assert copied <= {"lm_head.bias"}  # transformers pads it where the head is tied
    factors = Factors(tuple(1 + pair / 4 for pair in range(loaded.spec.pairs)), 3, 1.1)
    for candidate in (None, factors):
        score, again = (negative_log_likelihood(one, window(TARGET), candidate) for one in (loaded, other))
        assert score == again


def test_tied_weights_travel_once_and_are_tied_again(tmp_path: Path) -> None:
    loaded = load_model(ModelRequest(str(write_model(tmp_path / "model", "llama", tie_word_embeddings=True)), TARGET))
    shared = shared_of(loaded.model)
    assert "lm_head.weight" not in shared.arrays
    assert shared.nbytes == sum(parameter.nbytes for parameter in loaded.model.parameters())
    model = rebuilt(loaded, shared).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_they_travel_by_buffers_without_a_copy(llama: LoadedModel) -> None:
    """As Ray sends them: the pickle itself holds no weights."""
    buffers: list[pickle.PickleBuffer] = []
    shared = shared_of(llama.model)
    pickled = pickle.dumps(shared, protocol=5, buffer_callback=buffers.append)
    assert len(pickled) < 10_000
    assert sum(len(buffer.raw()) for buffer in buffers) == shared.nbytes
    again = pickle.loads(pickled, buffers=buffers)
    assert (again.sha256, again.architecture, again.dtype) == (SHA, "LlamaForCausalLM", "float32")
    assert all(torch.equal(tensor, llama.model.state_dict()[name]) for name, tensor in state_dict(again).items())


def test_no_warning_of_memory_that_cannot_be_written(llama: LoadedModel, tmp_path: Path) -> None:
    shared = read_only(shared_of(llama.model), tmp_path / "weights")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state_dict(shared)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_every_dtype_comes_back(dtype: torch.dtype) -> None:
    """Also a number by itself, which has no dimension."""

    class Model(torch.nn.Module):
        all_tied_weights_keys: ClassVar[dict[str, str]] = {}
        dtype = torch.float32

    Model.__module__ = "transformers.somewhere"
    model = Model()
    model.register_buffer("row", torch.tensor([0.0, 1.0, -2.5, 448.0]).to(dtype))
    model.register_buffer("number", torch.tensor(1.0).to(dtype))
    tensors = state_dict(shared_of(model))
    for name, tensor in model.state_dict().items():
        assert tensors[name].dtype == dtype
        assert tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name].float(), tensor.float())


def test_a_class_of_the_model_s_own_code_is_not_shared(llama: LoadedModel) -> None:
    class Own(type(llama.model)):  # type: ignore[misc]
        pass

    assert share(Own(llama.model.config), SHA) is None
