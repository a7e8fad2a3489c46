"""Load a Hugging Face causal language model, read its rotary geometry, and run it under rescale factors."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from searcher.errors import LongRopeError
from searcher.rope import Factors, RopeSpec
from workers import attention as own_attention
from workers.apply import INTERLEAVED, INTERLEAVED_FAMILIES, RescaledRotary, cos_layout, find_rotary, rescaled
from workers.headers import check_sizes, stored_shapes
from workers.headers import read_config_json as read_config_json
from workers.memo import Memo
from workers.settings import NO_WINDOW as NO_WINDOW
from workers.settings import device_name, settle_attention, settle_chunk, settle_device, settle_window
from workers.streaming import hold_on_host
from workers.weights import SharedWeights, build

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What AutoModelForCausalLM needs from a hub; weights in any other form are not fetched.
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
CODE = "*.py"  # fetched, and part of the model's identity, only where its code may run


@dataclass(frozen=True)
class ModelRequest:
    """Which model, and how to run it. Everything here decides scores, but for the path.

    Attributes
    ----------
    path: local folder, or a name on the Hugging Face hub.
    target_length: L, the longest sequence that will be scored.
    dtype: ``auto`` (the config's), float32, bfloat16 or float16.
    attention: one of ``workers.settings.ATTENTIONS``; ``auto`` is ``longrope``, our own, which alone runs in pieces and
        at any length. The others are transformers', run whole, each with its limits.
    device: ``auto`` (cuda where there is one), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
    sliding_window: None, ``keep``, ``off`` or a number of tokens.
    original_length: L0 where the config does not tell the truth about it.
    threads: CPU threads of the worker; one gives the same bits for any number of workers.
    trust_remote_code: run code that comes with the model; off unless asked for.
    chunk: tokens that go through a decoder layer at one time; None for one that fits, see
        ``workers.scorer.fit_chunk``. It decides the last bits of a score.
    hidden_on_host: keep hidden states in host memory, pinned for CUDA. Scores are the same to the last bit.
    stream_weights: keep decoder layers in host memory and copy each to the device ahead of its use. Likewise.
    """

    path: str
    target_length: int
    dtype: str = "auto"
    attention: str = "auto"
    device: str = "auto"
    sliding_window: str | None = None
    original_length: int | None = None
    threads: int = 1
    trust_remote_code: bool = False
    chunk: int | None = None
    hidden_on_host: bool = False
    stream_weights: bool = False


@dataclass(frozen=True)
class ModelInfo:
    """What a driver knows of the model its workers hold.

    Attributes
    ----------
    weights_sha256: of weights and config.
    profile: the numerics profile: with the weights, everything that decides the last bit of a score.
    spec, shipped, pairing: see LoadedModel.
    probe: nats of a short text that follows from the model alone, under factors that turn every pair: workers of one
        profile that give another number do not compute what they should. None where it was not computed.
    """

    weights_sha256: str
    profile: dict[str, str | int | None]
    spec: RopeSpec
    shipped: tuple[str, Factors] | None
    pairing: str
    probe: float | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of weights and profile; see ``searcher.study.evaluation_key``."""
        text = json.dumps({"model": self.weights_sha256, "profile": self.profile}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be scored.

    Attributes
    ----------
    spec: its unscaled rotary geometry.
    shipped: name of the RoPE scaling its own config applies, with the factors it amounts to at the target length.
    pairing: which dimensions of a head turn together.
    settings: what was resolved from ``auto``: device, dtype, attention, sliding window, chunk.
    chunk: tokens that go through a layer at one time; None runs every sequence whole.
    hidden_on_host, stream_weights: see ModelRequest. With the second the model cannot be called as a whole.
    memo: what candidates on one document share.
    """

    model: Any
    spec: RopeSpec
    shipped: tuple[str, Factors] | None
    pairing: str
    layout: str
    cast: bool
    settings: dict[str, str | int | None]
    chunk: int | None = None
    hidden_on_host: bool = False
    stream_weights: bool = False
    memo: Memo = field(default_factory=Memo, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @contextmanager
    def under(self, factors: Factors | None) -> Iterator[None]:
        """The model rotated by ``factors``, which differ from its own; None leaves it as it is."""
        if factors is None:
            yield
            return
        rows = factors.by_layer()
        if any(len(row) != self.spec.pairs for row in rows) or len(rows) not in (1, self.spec.layers):
            raise LongRopeError(
                f"The model rotates {self.spec.pairs} pairs in {self.spec.layers} layers; the factors are "
                f"{len(rows)} x {len(rows[0])}."
            )
        rotations = [
            RescaledRotary(self.spec.theta, row, factors.n_hat, factors.attention_factor, self.layout, self.cast)
            for row in rows
        ]
        with rescaled(self.model, list(decoder_layers(self.model)), rotations):
            yield


def resolve_folder(path: str, trust_remote_code: bool = False) -> Path:
    """The local folder of a model: the path itself, or the hub's files in the local cache.

    Raises
    ------
    LongRopeError
        No such folder, no safetensors in it, or a hub name that cannot be reached.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        looks_local = folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1
        if looks_local:
            raise LongRopeError(f"There is no model folder {path}; give a folder with config.json, or a hub name.")
        folder = _from_hub(path, [*HUB_FILES, CODE] if trust_remote_code else HUB_FILES)
    if not (folder / "config.json").is_file():
        raise LongRopeError(f"{path} holds no config.json, so it is not a Hugging Face model folder.")
    if not any(folder.glob("*.safetensors")):
        raise LongRopeError(
            f"{path} holds no .safetensors file, and weights are only read from safetensors; convert it with "
            "model.save_pretrained(...) in transformers."
        )
    return folder


def _from_hub(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's errors share no base class
        raise LongRopeError(
            f"{name} is neither a folder here nor could it be fetched from the Hugging Face hub "
            f"({type(error).__name__}); check the name, the network, or HF_TOKEN."
        ) from error


def model_digest(folder: Path, trust_remote_code: bool = False) -> str:
    """SHA-256 of the weights, of the config (its remarks on names and versions aside), and of code that may run."""
    digest = hashlib.sha256()
    config = read_config_json(folder)
    for remark in ("_name_or_path", "transformers_version"):
        config.pop(remark, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    code = sorted(folder.glob(CODE)) if trust_remote_code else []
    for path in [*sorted(folder.glob("*.safetensors")), *code]:
        with path.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def read_original_length(path: str, trust_remote_code: bool = False) -> int:
    """L0 as the model's config states it, without loading the weights."""
    return original_length(_read_config(resolve_folder(path, trust_remote_code), path, trust_remote_code))


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model's own tokenizer."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise plain Exception
        raise LongRopeError(f"No tokenizer could be loaded from {folder}: {one_line(error)}") from error


def load_model(request: ModelRequest, shared: SharedWeights | None = None) -> LoadedModel:
    """Load the weights and read the rotary geometry.

    Parameters
    ----------
    shared: the weights, where another worker of this machine has read and checked them; None reads them from disk.

    Raises
    ------
    LongRopeError
        The model cannot be served, in one sentence that says why.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = resolve_folder(request.path, request.trust_remote_code)
    config = _read_config(folder, request.path, request.trust_remote_code)
    _refuse_other_positions(config, request.path)
    window = settle_window(config, request)
    attention = settle_attention(config, request, window)
    device = settle_device(request.device)
    chunk = settle_chunk(request, attention, device)
    own_attention.register()
    if request.dtype not in ("auto", *DTYPES):
        raise LongRopeError(f"The dtype is auto, {', '.join(DTYPES)}, not {request.dtype!r}.")
    torch.set_num_threads(request.threads)
    if shared is None:
        check_sizes(config, stored_shapes(folder), request.path, request.trust_remote_code)
    try:
        options = {"attn_implementation": attention, "ignore_mismatched_sizes": True}  # refused below, by name
        if shared is not None:
            model, info = build(shared, config, **options)
        else:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=DTYPES.get(request.dtype, "auto"),
                use_safetensors=True,
                trust_remote_code=request.trust_remote_code,
                output_loading_info=True,
                **options,
            )
    except Exception as error:
        raise LongRopeError(f"{request.path} cannot be loaded as a causal language model: {one_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise LongRopeError(
            f"{request.path} lacks {len(missing)} tensors of its architecture ({missing[0]}, ...); "
            "the checkpoint is incomplete or of another model."
        )
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise LongRopeError(
            f"{name} of {request.path} has shape {tuple(found)}, but its config.json makes it {tuple(wanted)}; weights "
            "and config are of different models."
        )
    for name, parameter in model.named_parameters() if shared is None else ():
        if not bool(torch.isfinite(parameter).all()):
            raise LongRopeError(f"{name} of {request.path} holds values that are not finite; the weights are broken.")
    if attention == own_attention.NAME and any(name.endswith("sinks") for name, _ in model.named_parameters()):
        raise LongRopeError(
            f"{request.path} has attention sinks, which {attention} attention does not compute; use --attention eager."
        )
    try:
        model = _put_on(model.eval().requires_grad_(False), device, request.stream_weights)
    except (RuntimeError, AssertionError) as error:  # too little memory there, or no such device in this torch
        raise LongRopeError(f"{request.path} cannot be put on {device}: {one_line(error)}") from error
    spec, layout, cast = _rotary_geometry(model, config, request)
    pairing = INTERLEAVED if layout == INTERLEAVED or config.model_type in INTERLEAVED_FAMILIES else "half-split"
    settings: dict[str, str | int | None] = {
        "device": device_name(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": attention,
        "sliding_window": window,
        "chunk": chunk,
    }
    shipped = _shipped_factors(config, spec, request.target_length)
    keeping = request.hidden_on_host, request.stream_weights
    return LoadedModel(model, spec, shipped, pairing, layout, cast, settings, chunk, *keeping)


def _put_on(model: Any, device: torch.device, stream_weights: bool) -> Any:
    """The model on the device; all but its decoder layers where those are to be streamed."""
    if not stream_weights:
        return model.to(device)
    layers = decoder_layers(model)
    held = list(layers)
    for index in range(len(held)):
        layers[index] = nn.Identity()
    model.to(device)
    for index, layer in enumerate(held):
        layers[index] = layer
    hold_on_host(held, device)
    return model


def _read_config(folder: Path, path: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    read_config_json(folder)  # whose errors are clearer
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # anything a config class raises on values it does not expect
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise LongRopeError(
                f"{path} is of a family that comes with its own code; look at that code, then allow it with "
                "--trust-remote-code."
            ) from error
        raise LongRopeError(f"The config of {path} cannot be used: {one_line(error)}") from error


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal model: its outermost module list of as many modules as the config has layers."""
    layers = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return module
    raise LongRopeError(f"{type(model).__name__} has no list of its {layers} decoder layers, which is not known.")


def _rotary_geometry(model: Any, config: Any, request: ModelRequest) -> tuple[RopeSpec, str, bool]:
    name = type(model).__name__
    places = find_rotary(model)
    if not places:
        raise LongRopeError(
            f"{name} ({request.path}) has no rotary position embedding; LongRoPE rescales one, so it cannot serve it."
        )
    rotary: Any = places[0][2]
    buffers = {key for key, _ in rotary.named_buffers(recurse=False)}
    parameters = getattr(config, "rope_parameters", None)
    if "inv_freq" not in buffers or not isinstance(parameters, dict) or "rope_theta" not in parameters:
        raise LongRopeError(
            f"{name} ({request.path}) rotates by layer type, or in a way this version does not know; "
            "one rotary embedding with one base for all layers is needed."
        )
    with torch.inference_mode():
        probe = torch.arange(1, 4, device=model.device)[None]
        try:
            cos, _ = rotary(torch.zeros(1, 3, 1, dtype=model.dtype, device=model.device), probe)
        except Exception as error:
            raise LongRopeError(
                f"The rotary embedding of {name} ({request.path}) cannot be run as its config describes it: "
                f"{one_line(error)}"
            ) from error
        wide, _ = rotary(torch.zeros(1, 3, 1, device=model.device), probe)
    layout = cos_layout(wide)
    pairs = int(rotary.inv_freq.numel())
    if cos.ndim != 3 or cos.shape[-1] != (pairs if layout == "single" else 2 * pairs):
        raise LongRopeError(
            f"The rotary embedding of {name} gives cos of shape {tuple(cos.shape)}, which is not known."
        )
    spec = RopeSpec(
        theta=float(parameters["rope_theta"]),
        rotary_dim=2 * pairs,
        original_length=request.original_length or original_length(config),
        layers=int(config.num_hidden_layers),
        family=str(config.model_type),
    )
    if parameters.get("rope_type", "default") == "default":
        ours = torch.as_tensor(spec.inverse_frequencies(), dtype=torch.float64)
        if not torch.allclose(rotary.inv_freq.double().cpu(), ours, rtol=1e-5):
            raise LongRopeError(
                f"The rotary embedding of {name} does not follow theta^(-2i/d) with theta = {spec.theta}; "
                "its factors would mean something else."
            )
    return spec, layout, cos.dtype == model.dtype


def original_length(config: Any) -> int:
    """L0: original_max_position_embeddings where the config scales RoPE, else max_position_embeddings."""
    parameters = getattr(config, "rope_parameters", None)
    parameters = parameters if isinstance(parameters, dict) else {}
    stated = [getattr(config, "max_position_embeddings", None)]
    # Phi3's class has a default of 4096 for the original length, which means nothing where RoPE is not scaled.
    if parameters.get("rope_type", "default") != "default":
        stated.insert(0, parameters.get("original_max_position_embeddings"))
        stated.insert(0, getattr(config, "original_max_position_embeddings", None))
    for value in stated:
        if value and isinstance(value, int | float) and value >= 2 and value == int(value):
            return int(value)
        if value:
            raise LongRopeError(
                f"The config's trained length should be a number of tokens, not {value!r}; give it with "
                "--original-length."
            )
    raise LongRopeError("The config states no max_position_embeddings; give the trained length with --original-length.")


def shipped_factors(path: str, spec: RopeSpec, length: int, trust_remote_code: bool = False) -> Factors | None:
    """What the config of a model scales RoPE by at one length, absolute; None where it does not."""
    config = _read_config(resolve_folder(path, trust_remote_code), path, trust_remote_code)
    shipped = _shipped_factors(config, spec, length)
    return None if shipped is None else shipped[1]


def _shipped_factors(config: Any, spec: RopeSpec, target: int) -> tuple[str, Factors] | None:
    """Name and factors of the config's own scaling at the target length, absolute against the unscaled RoPE."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return None
    try:
        frequencies, attention = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=target)
        lambdas = torch.as_tensor(spec.inverse_frequencies()) / frequencies.double()
        return str(kind), Factors(tuple(lambdas.tolist()), attention_factor=float(attention))
    except Exception as error:  # anything transformers raises on values it does not expect
        raise LongRopeError(f"The model's own RoPE scaling, {kind}, cannot be used: {one_line(error)}") from error


def _refuse_other_positions(config: Any, path: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = getattr(config, "rope_parameters", None)
    # Falcon's config states rope_parameters also where the model uses ALiBi instead.
    if not isinstance(parameters, dict) or getattr(config, "alibi", False):
        raise LongRopeError(
            f"{path} ({config.model_type}) has no rotary position embedding that its config describes in "
            "rope_parameters; LongRoPE rescales one, so it cannot serve it."
        )
    if any(isinstance(value, dict) for value in parameters.values()):
        raise LongRopeError(
            f"{path} ({config.model_type}) has a rotary embedding for each layer type ({', '.join(parameters)}); "
            "one for all layers is needed, so this family is not supported yet."
        )
    kind, theta = parameters.get("rope_type", "default"), parameters.get("rope_theta", 10000.0)
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(("default", *ROPE_INIT_FUNCTIONS))
        raise LongRopeError(f"The config of {path} scales RoPE by {kind!r}; transformers knows {known}.")
    if not isinstance(theta, int | float) or not 1 < theta <= sys.float_info.max:
        raise LongRopeError(f"The config of {path} has rope_theta {theta!r}; a base is a number above 1.")


def one_line(error: BaseException) -> str:
    """An error's message for a sentence of ours: without line breaks, at most 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
