"""The forms that are keys of a model's config: transformers and what reads its config.json, or overrides of it.

Each form is a row of FORMS: which families the program applies LongRoPE to, how much it holds, and where it looks. All
of it was read off the programs' own sources, in the versions named, and is checked by benchmarks/consumers.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from searcher.errors import LongRopeError
from storage.losses import DERIVED, EACH, ONE, Room, Taken
from storage.model_config import (
    EXPLICIT_HEAD_DIM,
    FAMILIES,
    INNER,
    LAYER_TYPE,
    TOP_LEVEL_ORIGINAL_LENGTH,
    Config,
    check_same_model,
    head_dim,
    language_model,
    rotary_fraction,
    stated,
)

PARAMETERS, SCALING = "rope_parameters", "rope_scaling"


@dataclass(frozen=True)
class ConfigForm:
    """How a program reads LongRoPE from a config.

    Attributes
    ----------
    reads: program and version that this was read off.
    room: what it holds.
    families: whose models it applies LongRoPE in; it drops the factors of others without a word, or fails.
    place: PARAMETERS, with rope_theta inside, or SCALING, with rope_theta beside.
    types: keys that say ``longrope``.
    attention: keys that hold the attention factor; the second one that of short text.
    folder: whether the program loads a whole model folder; else the config is an override on its command line.
    static: whether it takes short or long once, by the longest length it is started for; else by the batch at hand.
    remarks: what to know, a sentence each.
    """

    reads: str
    room: Room
    families: tuple[str, ...]
    place: str = PARAMETERS
    types: tuple[str, ...] = ("rope_type",)
    attention: tuple[str, ...] = ()
    folder: bool = True
    static: bool = True
    remarks: tuple[str, ...] = ()


STALE = (
    "Short and long lists differ, and cached keys stay as they are where generation crosses the original length; "
    "--short long avoids that."
)

# Passed over by programs that derive their own, which these then are; for who reads the file.
DERIVED_ARE_WRITTEN = ("long_mscale", "short_mscale")

FORMS: dict[str, ConfigForm] = {
    "transformers": ConfigForm(
        "transformers 5.23",
        Room("transformers", short=True, attention=ONE),
        tuple(FAMILIES),
        attention=("attention_factor",),
        static=False,
    ),
    "transformers4": ConfigForm(
        "transformers 4.57",
        Room("transformers 4", short=True, attention=ONE),
        tuple(family for family in FAMILIES if family not in LAYER_TYPE),
        place=SCALING,
        attention=("attention_factor",),
        static=False,
    ),
    "vllm": ConfigForm(
        "vLLM 0.33",
        Room("vLLM", short=True, attention=EACH),
        ("gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "stablelm"),
        attention=("long_mscale", "short_mscale"),
        folder=False,
        remarks=("vLLM takes the long list at every length, unless --max-model-len is at most the original length.",),
    ),
    "sglang": ConfigForm(
        "SGLang 0.5.23",
        Room("SGLang", short=True, attention=EACH),
        ("granite", "llama", "mistral", "phi3", "qwen2", "qwen3"),
        attention=("long_mscale", "short_mscale"),
        folder=False,
        static=False,
    ),
    "mlx": ConfigForm(
        "mlx-lm 0.32",
        Room("mlx-lm", short=False, attention=DERIVED),
        ("granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"),
        place=SCALING,
        types=("type", "rope_type"),
        attention=DERIVED_ARE_WRITTEN,
    ),
    "exllamav2": ConfigForm(
        "exllamav2 0.3.2",
        Room("exllamav2", short=True, attention=DERIVED, short_derived=1.0),
        ("gemma2", "granite", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3"),
        place=SCALING,
        attention=DERIVED_ARE_WRITTEN,
    ),
    "exllamav3": ConfigForm(
        "exllamav3 1.6.5",
        Room("exllamav3", short=True, attention=DERIVED),
        ("gemma2", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3"),
        place=SCALING,
        attention=DERIVED_ARE_WRITTEN,
        remarks=("exllamav3 takes short or long once, by its max_position_embeddings.",),
    ),
    "onnx-genai": ConfigForm(
        "onnxruntime-genai 0.18",
        Room("ONNX Runtime GenAI", short=True, attention=EACH),
        ("phi3",),
        types=("rope_type", "type"),
        attention=("long_mscale", "short_mscale"),
        static=False,
        remarks=("Its model builder reads this config and writes both sets into the ONNX model.",),
    ),
}


def form_room(name: str, family: str) -> Room:
    """What a form holds for a family.

    Raises
    ------
    LongRopeError
        The program does not apply LongRoPE in that family.
    """
    form = FORMS[name]
    if family not in form.families:
        raise LongRopeError(
            f"{form.reads} is not known to apply LongRoPE in {family} models, only in "
            f"{', '.join(sorted(form.families))}; use the factor file."
        )
    if (name, family) == ("transformers4", "phi3"):  # its class refuses any field but type and the two lists
        return Room("transformers 4 (phi3)", short=True, attention=DERIVED)
    return form.room


def config_patch(
    name: str, taken: Taken, config: Config, sliding_window: int | None = None, dtype: str | None = None
) -> dict[str, object]:
    """The keys of config.json that make a program rotate by the factors.

    Each key replaces that of the model's config whole; None removes it.

    Parameters
    ----------
    name: of the form, a key of FORMS.
    config: the model's own config.json.
    sliding_window: tokens, where the factors were scored with another attention window than the config's.
    dtype: that the factors were scored in, which becomes the one to load in.

    Raises
    ------
    LongRopeError
        The program cannot hold the factors for this family, or the config is not of the model.
    """
    form, model = FORMS[name], taken.model
    form_room(name, model.family)
    if taken.target_length < model.original_length:
        raise LongRopeError(
            f"{form.room.name} scales RoPE up from the original length; the target of {taken.target_length} tokens is "
            f"below {model.original_length}."
        )
    named, config = config.get("model_type"), language_model(config, model.family)
    dimension, fraction = head_dim(config, model.family), rotary_fraction(config, model.family)
    check_same_model(config, model, int(dimension * fraction), named)
    for factors in (taken.long, taken.short):
        if len(factors.by_layer()[0]) != model.rotary_dim // 2:
            found = len(factors.by_layer()[0])
            raise LongRopeError(f"{model.name} has {model.rotary_dim // 2} rotary pairs, the factors are {found}.")
    block = _block(name, taken)
    # Stated also for a family that rotates whole heads if its config has it: the unscaled RoPE of such a family
    # does not read the fraction, LongRoPE does.
    has_fraction = FAMILIES[model.family] is not None or stated(config, "partial_rotary_factor") is not None
    patch: dict[str, object] = {"max_position_embeddings": taken.target_length}
    if form.place == PARAMETERS:
        block["rope_theta"] = model.theta
        if has_fraction:
            block["partial_rotary_factor"] = fraction
        patch[PARAMETERS] = _by_layer_type(block, config, model.family)
    else:
        patch[SCALING] = block
        patch["rope_theta"] = model.theta
        patch["original_max_position_embeddings"] = model.original_length
        if has_fraction:
            patch["partial_rotary_factor"] = fraction
    for other in ({PARAMETERS, SCALING} - {form.place}) & config.keys():
        patch[other] = None  # of two spellings the older one wins
    if model.family in TOP_LEVEL_ORIGINAL_LENGTH or "original_max_position_embeddings" in config:
        patch["original_max_position_embeddings"] = _switch_at(name, taken)  # at this level it wins
    if model.family in EXPLICIT_HEAD_DIM:
        patch["head_dim"] = dimension
    if sliding_window is not None:
        patch["sliding_window"] = sliding_window
    if dtype is not None and form.folder:
        patch["dtype" if form.place == PARAMETERS else "torch_dtype"] = dtype
        other = "torch_dtype" if form.place == PARAMETERS else "dtype"
        if other in config:
            patch[other] = None
    if not form.folder:  # an override cannot remove a key
        patch = {key: value for key, value in patch.items() if value is not None}
    return {INNER[model.family]: merged(config, patch)} if model.family in INNER else patch


def merged(config: Config, patch: Mapping[str, object]) -> dict[str, object]:
    """A config with a patch's keys in place."""
    return {key: value for key, value in {**config, **patch}.items() if value is not None or key not in patch}


def form_notes(name: str, taken: Taken) -> list[str]:
    """What to know of an export, a sentence each."""
    form, notes = FORMS[name], list(taken.notes)
    if taken.switches and not form.static:
        notes.append(STALE)
    if name == "sglang" and taken.switches:
        notes.append(
            f"SGLang 0.5.23 rotates position {taken.model.original_length} as position 0 in a batch that ends there."
        )
    if name == "exllamav2" and taken.scale > 1:
        model, factor = taken.model, taken.long.attention_factor
        notes.append(
            "exllamav2 takes short or long once, by max_seq_len, and works the attention factor out from that, too: "
            f"{factor:.6g} only with max_seq_len = {taken.target_length}, which is the default here; less at "
            f"every length between, and 1 up to {model.original_length}."
        )
    return notes + list(form.remarks)


def command_line(name: str, model: str, patch_file: str, taken: Taken) -> str:
    """How a server is started with an override file.

    Parameters
    ----------
    model, patch_file: as the user would type them.
    """
    model, patch_file = shlex.quote(model), shlex.quote(patch_file)
    if name == "vllm":
        return f'vllm serve {model} --hf-overrides "$(cat {patch_file})" --max-model-len {taken.target_length}'
    return (
        f"python -m sglang.launch_server --model-path {model} --context-length {taken.target_length} "
        f'--json-model-override-args "$(cat {patch_file})"'
    )


def _block(name: str, taken: Taken) -> dict[str, object]:
    form = FORMS[name]
    if (name, taken.model.family) == ("transformers4", "phi3"):
        return {"type": "longrope", **_lists(taken)}
    block: dict[str, object] = dict.fromkeys(form.types, "longrope")
    block |= _lists(taken)
    block["original_max_position_embeddings"] = _switch_at(name, taken)
    values = (taken.long.attention_factor, taken.short.attention_factor)
    block |= dict(zip(form.attention, values, strict=False))
    if form.room.attention == ONE:
        block["factor"] = taken.scale
    return block


def _lists(taken: Taken) -> dict[str, object]:
    (short,), (long,) = taken.short.by_layer(), taken.long.by_layer()
    return {"short_factor": list(short), "long_factor": list(long)}


def _switch_at(name: str, taken: Taken) -> int:
    """The length beyond which the long list serves.

    SGLang turns the token at exactly this position as if it were the first one (checked in its own code), so a set that
    serves every length is given as one that never switches.
    """
    return taken.target_length if name == "sglang" and not taken.switches else taken.model.original_length


def _by_layer_type(block: dict[str, object], config: Config, family: str) -> dict[str, object]:
    """The block where the far-reaching layers have it, beside what the others have."""
    if family not in LAYER_TYPE:
        return block
    theta = stated(config, "rope_theta", "sliding_attention")
    nested = isinstance(config.get(PARAMETERS), Mapping) and "sliding_attention" in config[PARAMETERS]
    near = theta if nested else config.get("rope_local_base_freq", 10000.0)
    return {LAYER_TYPE[family]: block, "sliding_attention": {"rope_type": "default", "rope_theta": near}}
