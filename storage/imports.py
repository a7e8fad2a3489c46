"""A factor file from the forms of other programs: what they state, and what has to be added to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from searcher.errors import LongRopeError
from searcher.rope import ATTENTION_POLICIES, Factors, attention_factor
from storage.checks import Fault, items, mapping, number, whole
from storage.config_forms import PARAMETERS, SCALING
from storage.factor_file import FactorFile, ModelIdentity, Regime
from storage.losses import same_number
from storage.model_config import INNER, LAYER_TYPE

UNKNOWN_WEIGHTS = "0" * 64  # of a model that was not given: no digest is that


@dataclass(frozen=True)
class Stated:
    """What a form states of factors; None is what it does not.

    Attributes
    ----------
    long, short: lists of factors; attention factors are those of ``attention`` and ``short_attention``.
    theta, original_length, target_length: of the model and the extension, in tokens.
    family, layers, rotary_dim: of the model.
    attention, short_attention: attention factors; None where the program derives them.
    theta_is_float32: whether the form rounds theta to that, so that it is any number which rounds to the same.
    """

    long: Factors
    short: Factors | None = None
    theta: float | None = None
    original_length: int | None = None
    target_length: int | None = None
    family: str | None = None
    layers: int | None = None
    attention: float | None = None
    short_attention: float | None = None
    theta_is_float32: bool = False


def same_float32(one: float, other: float) -> bool:
    """Whether two numbers are one in float32."""
    with np.errstate(over="ignore"):
        return bool(np.float32(one) == np.float32(other))


def read_config_form(document: object, where: str) -> Stated:
    """What a config.json, a patch of one, or an override states, in any form that is exported.

    Parameters
    ----------
    document: JSON value.
    where: the file's name, for messages.

    Raises
    ------
    LongRopeError
        It holds no LongRoPE scaling, or a field is not valid.
    """
    try:
        config = mapping(document, "the file")
        inner = next((config[key] for key in {*INNER.values()} if key in config), config)
        return _stated({**config, **mapping(inner, "text_config")})
    except Fault as fault:
        raise LongRopeError(f"{where} does not hold LongRoPE factors: {fault}.") from fault


def complete(stated: Stated, given: Mapping[str, Any]) -> tuple[ModelIdentity, Stated]:
    """A model's identity and the statement, from both together, which must not contradict each other.

    Parameters
    ----------
    given: any of ``name``, ``weights_sha256``, ``family``, ``theta``, ``original_length``, ``layers``,
        ``rotary_dim``, ``pairing``, ``shipped_scaling``, ``target_length``; None counts as not given.

    Raises
    ------
    LongRopeError
        Something is in neither, or differs.
    """
    pairs = len(stated.long.by_layer()[0])
    rows = None if stated.long.shared else len(stated.long.by_layer())
    told = {
        "theta": stated.theta,
        "family": stated.family,
        "layers": stated.layers or rows,
        "original_length": stated.original_length,
        "target_length": stated.target_length,
        "rotary_dim": 2 * pairs,
    }
    known = {key: value for key, value in given.items() if value is not None}
    if stated.theta_is_float32 and stated.theta and "theta" in known and same_float32(known["theta"], stated.theta):
        told["theta"] = None  # what is given says it better
    for key, value in told.items():
        if value is not None and known.setdefault(key, value) != value and key != "target_length":
            raise LongRopeError(f"The file has {key} {value}, but {known[key]} is given or is the model's.")
    if rows is not None and known.get("layers") != rows:
        raise LongRopeError(f"The file has {rows} lists, one a layer, and the model has {known['layers']} layers.")
    missing = [key for key in ("theta", "original_length", "target_length", "layers") if key not in known]
    if missing:
        flags = ", ".join("--target" if key == "target_length" else f"--{key.replace('_', '-')}" for key in missing)
        raise LongRopeError(f"The file does not say {_listed(missing)}; give {flags}, or the model with --model.")
    model = ModelIdentity(
        name=known.get("name", "unknown"),
        weights_sha256=known.get("weights_sha256", UNKNOWN_WEIGHTS),
        family=known.get("family", "llama"),
        theta=float(known["theta"]),
        rotary_dim=2 * pairs,
        original_length=known["original_length"],
        layers=known["layers"],
        pairing=known.get("pairing", "half-split"),
        shipped_scaling=known.get("shipped_scaling"),
    )
    return model, replace(stated, target_length=known["target_length"])


def imported_file(
    stated: Stated, given: Mapping[str, Any], policy: str | None = None, n_hat: int = 0, source: str = ""
) -> FactorFile:
    """A factor file of what a form states and what is given.

    A form with two lists that differ becomes two regimes, up to the original length and beyond it; any other becomes
    one, from the first token on.

    Parameters
    ----------
    given: as in ``complete``.
    policy: attention factor where the form states none: su, yarn, none or a number; su if None.
    n_hat: of the long regime; no form states it.
    source: the form's name, for the provenance.

    Raises
    ------
    LongRopeError
        As ``complete``.
    """
    model, stated = complete(stated, given)
    target = stated.target_length or 0
    if n_hat > target:
        raise LongRopeError(f"n_hat counts start tokens of the target's {target}, so it cannot be {n_hat}.")
    scale = model.spec.scale(target)
    long = stated.attention if stated.attention is not None else attention_factor(policy or "su", model.spec, scale)
    short = long if stated.short_attention is None else stated.short_attention
    if stated.attention is None and stated.short_attention is None and stated.short is not None:
        short = long if policy is None else attention_factor(policy, model.spec, scale)
    top = replace(stated.long, n_hat=n_hat, attention_factor=long)
    low = None if stated.short is None else replace(stated.short, attention_factor=short)
    ends = [(target, top)]
    if low is not None and low != top and target > model.original_length:
        ends.insert(0, (model.original_length, low))
    regimes, first = [], 1
    for last, factors in ends:
        regimes.append(Regime(first, last, factors, _policy(model, factors.attention_factor, last)))
        first = last + 1
    provenance: dict[str, object] = {"study": None, "seed": None, "data": {}, "software": {}, "imported_from": source}
    return FactorFile(model, tuple(regimes), provenance)


def _policy(model: ModelIdentity, value: float, target_length: int) -> str:
    """The policy that an attention factor follows, or the number."""
    for policy in ATTENTION_POLICIES:
        if same_number(attention_factor(policy, model.spec, model.spec.scale(target_length)), value):
            return policy
    return repr(value)


def _stated(config: dict[str, Any]) -> Stated:
    place = SCALING if config.get(SCALING) else PARAMETERS
    block = mapping(config.get(place), f"{PARAMETERS} or {SCALING}")
    for layer_type in {*LAYER_TYPE.values()}:
        if isinstance(block.get(layer_type), dict):
            place, block = f"{place}.{layer_type}", mapping(block[layer_type], layer_type)
    kind = block.get("rope_type", block.get("type"))
    if kind not in ("longrope", "su"):
        raise Fault(f"{place}.rope_type: expected longrope, found {kind!r}")
    long, short = _row(block, "long_factor", place), _row(block, "short_factor", place)
    if len(long) != len(short):
        raise Fault(f"{place}: long_factor has {len(long)} factors and short_factor {len(short)}")
    top_level = config.get("original_max_position_embeddings")
    original = _length(top_level if top_level is not None else block.get("original_max_position_embeddings"))
    target = _length(config.get("max_position_embeddings"))
    theta = block.get("rope_theta", config.get("rope_theta"))
    long_attention = _optional(block, ("attention_factor", "long_mscale"), place)
    short_attention = _optional(block, ("attention_factor", "short_mscale"), place)
    if long_attention is None and original and block.get("factor") is not None:
        factor = number(block["factor"], f"{place}.factor")  # what transformers derives it from
        if factor > 1 and original > 1:
            long_attention = math.sqrt(1 + math.log(factor) / math.log(original))
    layers = config.get("num_hidden_layers")
    family = config.get("model_type")
    return Stated(
        Factors(long),
        Factors(short),
        theta=None if theta is None else number(theta, "rope_theta", above=1),
        # An override that never switches gives the target here (SGLang's); it says nothing of the trained window.
        original_length=None if original == target else original,
        target_length=target,
        family=family if isinstance(family, str) and family else None,
        layers=None if layers is None else whole(layers, "num_hidden_layers", 1),
        attention=long_attention,
        short_attention=short_attention if short_attention is not None else long_attention,
    )


def _row(block: dict[str, Any], key: str, where: str) -> tuple[float, ...]:
    place = f"{where}.{key}"
    return tuple(number(value, f"{place}[{pair}]") for pair, value in enumerate(items(block.get(key), place)))


def _optional(block: dict[str, Any], keys: tuple[str, ...], where: str) -> float | None:
    for key in keys:
        if block.get(key) is not None:
            return number(block[key], f"{where}.{key}")
    return None


def _length(value: object) -> int | None:
    return None if value is None else whole(value, "original_max_position_embeddings or max_position_embeddings", 2)


def _listed(names: list[str]) -> str:
    words = [name.replace("_", " ") for name in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
