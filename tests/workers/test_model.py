"""Loading: the geometry of every family, shipped RoPE scaling, windowed attention, and what is refused and how."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from searcher.baselines import dynamic_ntk, none, pi, yarn
from searcher.errors import LongRopeError
from searcher.rope import Factors, RopeSpec
from tests.tiny_models import (
    FAMILIES,
    LAYERS,
    VOCABULARY,
    WINDOW,
    configured,
    own_loss,
    random_model,
    window,
    write_model,
)
from workers.model import (
    LoadedModel,
    ModelRequest,
    load_model,
    load_tokenizer,
    model_digest,
    original_length,
    read_original_length,
)
from workers.perplexity import negative_log_likelihood
from workers.settings import CHUNK, EAGER_MAX_LENGTH, MASK_MAX_LENGTH

TARGET = 4 * WINDOW
ROTARY_DIMS = {"mistral": 32, "qwen3": 32, "gemma2": 32, "stablelm": 8}  # all others 16
Changed = Callable[..., Path]


def load(folder: Path | str, target: int = TARGET, **settings: Any) -> LoadedModel:
    return load_model(ModelRequest(str(folder), target, **settings))


def refusal(folder: Path | str, target: int = TARGET, **settings: Any) -> str:
    """The one sentence that a model is refused with."""
    with pytest.raises(LongRopeError) as caught:
        load(folder, target, **settings)
    return one_sentence(caught.value)


def one_sentence(error: LongRopeError) -> str:
    message = str(error)
    assert message.endswith(".")
    assert "\n" not in message
    assert not re.search(r"[.!?] +[A-Z]", message)
    return message


def loss(loaded: LoadedModel, factors: Factors | None, length: int = TARGET) -> float:
    nll, count = negative_log_likelihood(loaded, window(length), factors)
    return nll / count


@pytest.fixture
def changed(llama_folder: Path, tmp_path: Path) -> Changed:
    """A copy of the tiny Llama with changes to its config and its tensors; None takes a tensor away."""

    def copy(config: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor | None] | None = None) -> Path:
        folder = shutil.copytree(llama_folder, tmp_path / "changed")
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
        weights = load_file(folder / "model.safetensors")
        for name, value in (tensors or {}).items():
            del weights[name]
            if value is not None:
                weights[name] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return copy


def test_the_geometry_is_read_from_the_model(loaded: LoadedModel) -> None:
    family = loaded.spec.family
    theta = FAMILIES[family]["rope_parameters"]["rope_theta"]
    assert loaded.spec == RopeSpec(theta, ROTARY_DIMS.get(family, 16), WINDOW, LAYERS, family)
    assert loaded.shipped is None
    assert loaded.pairing == ("interleaved" if family == "cohere" else "half-split")
    assert loaded.settings["dtype"] == "float32"
    assert loaded.settings["attention"] == "longrope"
    assert loaded.settings["sliding_window"] is None  # gemma2's 4096 is never reached
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("family", ["olmo2", "llama"])
def test_bfloat16_keeps_the_familys_dtype_of_cos_and_sin(family: str, tmp_path: Path) -> None:
    loaded = load(write_model(tmp_path, family), dtype="bfloat16")
    assert loaded.settings["dtype"] == "bfloat16"
    assert loaded.cast == (family != "olmo2")
    assert loss(loaded, none(loaded.spec, 1)) == pytest.approx(own_loss(loaded.model, window(TARGET)), rel=1e-2)


def test_the_original_length_can_be_stated(llama_folder: Path) -> None:
    assert load(llama_folder, original_length=48).spec.original_length == 48
    assert read_original_length(str(llama_folder)) == WINDOW


def test_the_tokenizer_comes_with_the_model(llama_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(llama_folder)
    assert (tokenizer.bos_token_id, len(tokenizer)) == (0, VOCABULARY)
    assert tokenizer.decode(tokenizer("ünd so", add_special_tokens=False)["input_ids"]) == "ünd so"
    with pytest.raises(LongRopeError, match="No tokenizer could be loaded"):
        load_tokenizer(tmp_path)


SHIPPED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # family, rope_parameters, config besides
    "llama3": (
        "llama",
        {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": WINDOW},
        {"max_position_embeddings": TARGET},
    ),
    "yarn": ("llama", {"factor": 4.0, "original_max_position_embeddings": WINDOW}, {"max_position_embeddings": TARGET}),
    "yarn of qwen3, attention factor stated": (
        "qwen3",
        {"factor": 4.0, "original_max_position_embeddings": WINDOW, "attention_factor": 1.3, "beta_fast": 16.0},
        {"max_position_embeddings": TARGET},
    ),
    "linear": ("llama", {"factor": 4.0}, {}),
    "dynamic": ("llama", {"factor": 4.0}, {}),
    "dynamic of stablelm": ("stablelm", {"factor": 2.0, "partial_rotary_factor": 0.25}, {}),
    "longrope": (
        "llama",
        {
            "short_factor": [1.0 + i / 10 for i in range(8)],
            "long_factor": [1.0 + i / 2 for i in range(8)],
            "original_max_position_embeddings": WINDOW,
        },
        {"max_position_embeddings": TARGET},
    ),
    "longrope of phi3": (
        "phi3",
        {"short_factor": [1.0] * 8, "long_factor": [1.0 + i / 2 for i in range(8)]},
        {"max_position_embeddings": TARGET, "original_max_position_embeddings": WINDOW},
    ),
}


@pytest.mark.parametrize("name", list(SHIPPED))
def test_shipped_scaling_is_reproduced_and_undone(name: str, tmp_path: Path) -> None:
    family, scaling, config = SHIPPED[name]
    kind = name.split()[0]
    parameters = {"rope_type": kind, "rope_theta": 777.0, **scaling}
    loaded = load(write_model(tmp_path, family, rope_parameters=parameters, **config))
    assert (loaded.spec.theta, loaded.spec.original_length) == (777.0, WINDOW)
    assert loaded.shipped is not None
    assert loaded.shipped[0] == kind
    expected = own_loss(loaded.model, window(TARGET))
    assert loss(loaded, loaded.shipped[1]) == pytest.approx(expected, rel=1e-5)
    assert loss(loaded, None) == pytest.approx(expected, rel=1e-5)
    default = {"rope_type": "default", "rope_theta": 777.0, **{k: v for k, v in scaling.items() if "partial" in k}}
    unscaled = own_loss(configured(loaded.model, rope_parameters=default), window(TARGET))
    assert loss(loaded, none(loaded.spec, 1)) == pytest.approx(unscaled, rel=1e-5)
    assert abs(unscaled / expected - 1) > 1e-4


def test_shipped_factors_are_the_baselines_they_are_named_after(tmp_path: Path) -> None:
    expected = {"linear": pi, "dynamic": dynamic_ntk, "yarn": yarn}
    for kind, baseline in expected.items():
        parameters = {"rope_type": kind, "rope_theta": 777.0, "factor": 4.0}
        loaded = load(write_model(tmp_path / kind, "llama", rope_parameters=parameters))
        assert loaded.shipped is not None
        wanted = baseline(loaded.spec, 4.0)
        np.testing.assert_allclose(loaded.shipped[1].lambdas, wanted.lambdas, rtol=1e-6)
        assert loaded.shipped[1].attention_factor == pytest.approx(wanted.attention_factor)


def test_the_original_length_of_an_unscaled_config_is_its_longest(tmp_path: Path) -> None:
    # Phi3's class states an original length of 4096 of its own accord.
    config = AutoConfig.from_pretrained(write_model(tmp_path, "phi3"))
    assert config.original_max_position_embeddings == 4096
    assert original_length(config) == WINDOW
    with pytest.raises(LongRopeError, match="--original-length"):
        original_length(AutoConfig.for_model("bloom"))


WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {},
    "phi3": {"pad_token_id": 0},
    "gemma2": {},  # its first layer alone
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},  # its second layer alone
}


@pytest.mark.parametrize("family", list(WINDOWED))
def test_windowed_attention_is_kept_switched_off_or_changed(family: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, family, sliding_window=32, **WINDOWED[family])
    message = refusal(folder)
    assert "window of 32 tokens" in message
    assert "--sliding-window keep" in message
    assert load(folder, target=32).settings["sliding_window"] is None  # it holds the whole target

    kept = load(folder, sliding_window="keep")
    losses = {}
    for wish, tokens in {"keep": 32, "off": None, "90": 90}.items():
        ours = load(folder, sliding_window=wish)
        assert ours.settings["sliding_window"] == tokens
        changes: dict[str, Any] = {"sliding_window": tokens}
        if tokens is None:
            if family == "gemma2":
                changes["sliding_window"] = TARGET
            if getattr(kept.model.config, "layer_types", None):
                changes["layer_types"] = ["full_attention"] * LAYERS
        theirs = configured(kept.model, **changes)
        losses[wish] = loss(ours, none(ours.spec, 1))
        assert losses[wish] == pytest.approx(own_loss(theirs, window(TARGET)), rel=1e-5)
    assert min(abs(losses[a] - losses[b]) for a, b in (("keep", "off"), ("keep", "90"), ("off", "90"))) > 1e-4


@pytest.mark.parametrize("family", ["mistral", "qwen2", "phi3"])
def test_a_window_switched_off_costs_no_mask(family: str, tmp_path: Path) -> None:
    loaded = load(write_model(tmp_path, family, sliding_window=32, **WINDOWED[family]), sliding_window="off")
    masks: list[Any] = []
    for layer in loaded.model.model.layers:
        layer.register_forward_pre_hook(lambda _, __, kw: masks.append(kw["attention_mask"]), with_kwargs=True)
    loss(loaded, none(loaded.spec, 1))
    assert masks == [None] * LAYERS


def test_wishes_for_a_window_that_make_no_sense_are_refused(tmp_path: Path, llama_folder: Path) -> None:
    folder = write_model(tmp_path / "mistral", "mistral", sliding_window=32)
    for wish in ("0", "-5", "none", "12.5", "", "32k"):
        assert "--sliding-window takes keep, off or a number" in refusal(folder, sliding_window=wish)
    # Not read where use_sliding_window is false; qwen2's default.
    unused = write_model(tmp_path / "qwen2", "qwen2", sliding_window=32)
    for full in (llama_folder, unused):
        assert "has no window to set to 48" in refusal(full, sliding_window="48")
        for wish in (None, "keep", "off"):
            assert load(full, sliding_window=wish).settings["sliding_window"] is None


def test_windowed_attention_with_a_mask_has_a_longest_length(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "mistral", sliding_window=32)
    for name in ("sdpa", "eager"):
        message = refusal(folder, MASK_MAX_LENGTH + 1, sliding_window="keep", attention=name)
        assert ("L x L mask" if name == "sdpa" else "L x L weights") in message
        assert "--attention longrope" in message
    kept = {"sliding_window": "keep", "attention": "sdpa"}
    assert load(folder, MASK_MAX_LENGTH, **kept).settings["sliding_window"] == 32
    assert load(folder, MASK_MAX_LENGTH + 1, sliding_window="off", attention="sdpa").settings["sliding_window"] is None
    assert load(folder, 10 * MASK_MAX_LENGTH, sliding_window="keep").settings["sliding_window"] == 32


def test_eager_attention_has_a_longest_length_and_our_own_has_none(llama_folder: Path, tmp_path: Path) -> None:
    gemma = write_model(tmp_path, "gemma2", sliding_window=100 * EAGER_MAX_LENGTH)
    assert load(gemma, EAGER_MAX_LENGTH, attention="eager").settings["attention"] == "eager"
    for folder in (gemma, llama_folder):
        message = refusal(folder, EAGER_MAX_LENGTH + 1, attention="eager")
        assert f"up to {EAGER_MAX_LENGTH} tokens, not {EAGER_MAX_LENGTH + 1}" in message
        assert load(folder, 10 * EAGER_MAX_LENGTH).settings["attention"] == "longrope"


def test_all_attention_functions_agree(llama_folder: Path, llama: LoadedModel) -> None:
    factors = yarn(llama.spec, 4)
    assert (llama.settings["attention"], llama.model.config._attn_implementation) == ("longrope", "longrope")
    for name in ("sdpa", "eager"):
        other = load(llama_folder, attention=name)
        assert (other.settings["attention"], other.model.config._attn_implementation) == (name, name)
        assert loss(other, factors) == pytest.approx(loss(llama, factors), rel=1e-5)


def test_the_chunk_is_the_default_or_as_asked_for(llama_folder: Path) -> None:
    for asked, chunk in ((None, CHUNK["cpu"]), (1, 1), (700, 700)):
        loaded = load(llama_folder, chunk=asked)
        assert (loaded.chunk, loaded.settings["chunk"]) == (chunk, chunk)
    for chunk in (0, -5):
        assert "at least 1, not" in refusal(llama_folder, chunk=chunk)
    for option in ({"chunk": 64}, {"hidden_on_host": True}, {"stream_weights": True}):
        assert f"{next(iter(option))} does not apply" in refusal(llama_folder, attention="sdpa", **option)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float64"}, "dtype is auto, float32, bfloat16, float16, not 'float64'"),
        ({"attention": "flashy"}, "attention kernel is one of auto, longrope, sdpa"),
        ({"device": "toaster"}, "'toaster' is no device"),
        ({"device": "meta"}, "'meta' is no device"),
        ({"device": "cuda:x"}, "'cuda:x' is no device"),
    ],
)
def test_settings_that_do_not_exist_are_refused(llama_folder: Path, settings: dict[str, Any], message: str) -> None:
    assert message in refusal(llama_folder, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_is_refused_where_there_is_none(llama_folder: Path, device: str) -> None:
    assert f"{device} was asked for, but torch" in refusal(llama_folder, device=device)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has such a device")
def test_a_device_that_torch_was_not_built_for_is_refused(llama_folder: Path) -> None:
    with pytest.raises(LongRopeError, match="cannot be put on mps"):
        load(llama_folder, device="mps")


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 258}
OTHER_FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 258}, "no rotary position embedding"),
    "gptj": (
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 258, "rotary_dim": 8},
        "no rotary position embedding that its config describes",
    ),
    "falcon": ({**SMALL, "alibi": True}, "no rotary position embedding"),
    "gemma3_text": (
        {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64},
        "for each layer type (full_attention, sliding_attention)",
    ),
}


@pytest.mark.parametrize("family", list(OTHER_FAMILIES))
def test_families_without_one_rotary_embedding_are_refused(family: str, tmp_path: Path) -> None:
    settings, message = OTHER_FAMILIES[family]
    random_model(AutoConfig.for_model(family, **settings)).save_pretrained(tmp_path)
    for attention in ("auto", "eager"):
        assert message in refusal(tmp_path, attention=attention)


def test_sdpa_is_refused_where_logits_are_capped(tmp_path: Path) -> None:
    write_model(tmp_path, "gemma2")
    assert "caps its attention logits, which sdpa cannot do" in refusal(tmp_path, attention="sdpa")


def test_folders_that_are_no_model_are_refused(changed: Changed, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    assert f"no model folder {missing}" in refusal(missing)
    assert "no model folder a/b/c" in refusal("a/b/c")
    (tmp_path / "file").touch()
    assert "no model folder" in refusal(tmp_path / "file")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no config.json" in refusal(empty)
    folder = changed()
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert "holds no .safetensors file" in refusal(folder)


def test_a_hub_name_that_cannot_be_fetched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "neither a folder here nor could it be fetched" in refusal("longrope-tests/no-such-model")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no_such_family"}', '{"hidden_size": 64}'])
def test_a_config_that_cannot_be_read_is_refused(text: str, changed: Changed) -> None:
    folder = changed()
    (folder / "config.json").write_text(text)
    with pytest.raises(LongRopeError, match=r"config"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, changed: Changed) -> None:
    broken = torch.ones(64)
    broken[3] = value
    message = refusal(changed(tensors={"model.norm.weight": broken}))
    assert "model.norm.weight" in message
    assert "not finite" in message


def test_an_incomplete_checkpoint_is_refused(changed: Changed) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    message = refusal(changed(tensors={name: None, "model.norm.weight": None}))
    assert "lacks 2 tensors" in message
    assert name in message


def test_a_checkpoint_of_another_shape_is_refused(changed: Changed) -> None:
    message = refusal(changed(tensors={"model.norm.weight": torch.ones(32)}))
    assert "model.norm.weight" in message
    assert "(32,)" in message
    assert "(64,)" in message


def test_a_damaged_file_is_refused(changed: Changed) -> None:
    folder = changed()
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(LongRopeError, match="cannot be loaded"):
        load(folder)


def test_the_digest_is_of_weights_and_config_alone(changed: Changed, llama_folder: Path) -> None:
    digest = model_digest(llama_folder)
    folder = changed({"_name_or_path": "elsewhere", "transformers_version": "5.0.0"})
    assert model_digest(folder) == digest
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"rms_norm_eps": 1e-3}))
    assert model_digest(folder) != digest
    config.write_text(text)
    (folder / "modeling_own.py").write_text("pass")  # counts only where it may run
    assert model_digest(folder) == digest != model_digest(folder, trust_remote_code=True)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert model_digest(folder) != digest
