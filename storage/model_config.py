"""What a model's config.json says of its rotary embedding, and whether factors fit it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from searcher.errors import LongRopeError
from storage.factor_file import ModelIdentity

Config = Mapping[str, Any]

# Families whose rotary embedding in transformers reads longrope: fraction of a head that is rotated where the config
# does not say, None where the family rotates whole heads and reads no fraction.
FAMILIES: dict[str, float | None] = {
    "gemma2": None,
    "gemma3": None,
    "gemma3_text": None,
    "granite": None,
    "llama": None,
    "mistral": None,
    "mixtral": None,
    "olmo2": None,
    "phi": 0.5,
    "phi3": 1.0,
    "qwen2": None,
    "qwen3": None,
    "stablelm": 0.25,
}
# Families with one RoPE a type of layer: the type that reaches far, whose factors these are. Given one RoPE for all
# layers, transformers ignores it without a word.
LAYER_TYPE = {"gemma3": "full_attention", "gemma3_text": "full_attention"}
# The part of config.json that describes the language model, where there is more than one.
INNER = {"gemma3": "text_config"}
DEFAULT_HEAD_DIM = {"gemma2": 256, "gemma3": 256, "gemma3_text": 256, "qwen3": 128}
# Families whose config class may leave head_dim at None, which LongRoPE then takes as it stands.
EXPLICIT_HEAD_DIM = ("mixtral",)
# Families whose config class has the field, with a default that would overrule the one in rope_parameters.
TOP_LEVEL_ORIGINAL_LENGTH = ("phi3",)


def language_model(config: Config, family: str) -> Config:
    """The part of a config that describes the language model."""
    inner = config.get(INNER[family]) if family in INNER else config
    if not isinstance(inner, Mapping):
        raise LongRopeError(f"The config.json of {family} must hold an object {INNER[family]}.")
    return inner


def stated(config: Config, key: str, layer_type: str | None = None) -> Any:
    """A rotary setting where transformers looks for it, in its order; None where it is not stated."""
    for place in (config.get("rope_scaling"), config.get("rope_parameters")):
        if isinstance(place, Mapping) and place:
            block = place.get(layer_type) if layer_type is not None and layer_type in place else place
            if isinstance(block, Mapping) and block.get(key) is not None:
                return block[key]
            break
    return config.get(key)


def head_dim(config: Config, family: str) -> int:
    """Dimensions of an attention head."""
    found = config.get("head_dim") or DEFAULT_HEAD_DIM.get(family)
    if found is None:
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        found = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else None
    if not isinstance(found, int):
        raise LongRopeError("The model's config.json must state hidden_size and num_attention_heads, or head_dim.")
    return found


def rotary_fraction(config: Config, family: str) -> float:
    """The part of a head that is rotated."""
    default = FAMILIES[family]
    fraction = 1.0 if default is None else stated(config, "partial_rotary_factor")
    if fraction is None:
        fraction = default
    if not isinstance(fraction, int | float):
        raise LongRopeError(f"partial_rotary_factor in the model's config.json must be a number, not {fraction!r}.")
    return float(fraction)


def check_same_model(config: Config, model: ModelIdentity, rotary_dim: int, family: object) -> None:
    """What config.json states must be what the factors were searched on.

    Parameters
    ----------
    config: of the language model.
    family: the model_type at the top of config.json.

    Raises
    ------
    LongRopeError
        Family, layers, rotary dimension or base differ.
    """
    theta = stated(config, "rope_theta", LAYER_TYPE.get(model.family))
    found = {
        "model_type": (family, model.family),
        "num_hidden_layers": (config.get("num_hidden_layers"), model.layers),
        "rotary dimension": (rotary_dim, model.rotary_dim),
        "rope_theta": (model.theta if theta is None else theta, model.theta),
    }
    for name, (there, wanted) in found.items():
        if there != wanted:
            raise LongRopeError(
                f"The factors are of {model.name}, with {name} {wanted}, but config.json has {there}; give the folder "
                "of that model."
            )
