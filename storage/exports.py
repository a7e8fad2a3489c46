"""The forms that other software loads: for transformers, a patch for config.json and a complete model folder.

What is written here was read off transformers 5 (modeling_rope_utils.py and the families' own files) and is tested
against it: LongRoPE there is one list of factors below the original length and one above, of all layers, with one
attention factor and no n_hat. The switch goes by the longest sequence of a batch and leaves cached keys as they are,
so both lists are the same here and nothing switches.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from searcher.errors import LongRopeError
from searcher.rope import Factors
from storage.checks import read_json
from storage.factor_file import FactorFile, ModelIdentity, Regime, RegimeScore

# Families whose rotary embedding in transformers reads longrope: fraction of a head that is rotated where the config
# does not say, None where the family rotates whole heads and reads no fraction.
FAMILIES: dict[str, float | None] = {
    "gemma2": None,
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
# Families with one RoPE for each type of layer; given one for all, transformers ignores it without a word.
PER_LAYER_TYPE = ("gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "olmo3")
DEFAULT_HEAD_DIM = {"gemma2": 256, "qwen3": 128}
# Families whose config class may leave head_dim at None, which LongRoPE then takes as it stands.
EXPLICIT_HEAD_DIM = ("mixtral",)
# Families whose config class has the field, with a default that would overrule the one in rope_parameters.
TOP_LEVEL_ORIGINAL_LENGTH = ("phi3",)


@dataclass(frozen=True)
class Export:
    """What a form without n_hat and with one list of factors carries of a regime, and what that costs.

    Attributes
    ----------
    factors: one list for all layers, n_hat = 0.
    n_hat: what was given up; 0 where nothing was.
    price: set of documents -> score with n_hat and without; empty where nothing was given up.
    short: score on text within the original length, where the same factors serve; None where none was taken.
    """

    factors: Factors
    n_hat: int
    price: Mapping[str, tuple[RegimeScore, RegimeScore]]
    short: RegimeScore | None

    def lines(self) -> list[str]:
        """For people, a sentence each."""
        lines = []
        if self.n_hat:
            lines.append(f"n_hat = {self.n_hat} cannot be held; the study's best factors with n_hat = 0 are taken.")
        for part, (searched, taken) in self.price.items():
            change = taken.perplexity / searched.perplexity - 1
            lines.append(
                f"On {part} that costs perplexity {searched.perplexity:.4f} -> {taken.perplexity:.4f} ({change:+.2%})."
            )
        if self.short is None:
            lines.append("The same factors serve short text; their perplexity there was not measured.")
        else:
            score = self.short
            lines.append(
                f"The same factors serve short text: perplexity {score.perplexity:.4f} at {score.length} tokens."
            )
        return lines


def exportable(regime: Regime) -> Export:
    """What of a regime goes into a form that holds one list of factors and no n_hat.

    Raises
    ------
    LongRopeError
        The factors differ by layer, or have n_hat and no alternative without it.
    """
    factors, scores = regime.factors, regime.scores
    price: dict[str, tuple[RegimeScore, RegimeScore]] = {}
    if factors.n_hat:
        if regime.without_n_hat is None:
            raise LongRopeError(
                f"These factors leave the first {factors.n_hat} positions untouched, which only the factor file can "
                "hold, and it has no factors without; search with n_hat = 0 among the choices."
            )
        factors, scores = regime.without_n_hat.factors, regime.without_n_hat.scores
        price = {part: (regime.scores[part], scores[part]) for part in sorted(regime.scores.keys() & scores.keys())}
    if not factors.shared:
        raise LongRopeError(
            f"These factors differ by layer ({len(factors.by_layer())} lists), and this form holds one list for all "
            "layers; export a study with shared factors."
        )
    return Export(factors, regime.factors.n_hat, price, scores.get("short"))


def transformers_patch(
    model: ModelIdentity,
    factors: Factors,
    target_length: int,
    config: Mapping[str, object],
    sliding_window: int | None = None,
    dtype: str | None = None,
) -> dict[str, object]:
    """The keys of config.json that make transformers rotate by the factors at every length.

    Each key replaces that of the model's config whole; None removes it.

    Parameters
    ----------
    factors: one list for all layers, n_hat = 0 (see ``exportable``).
    target_length: L, in tokens; at least the original length.
    config: the model's own config.json.
    sliding_window: tokens, where the factors were scored with another attention window than the config's.
    dtype: that the factors were scored in, which becomes the one to load in.

    Raises
    ------
    LongRopeError
        transformers cannot hold the factors for this family, or the config is not of the model.
    """
    family = model.family
    if family in PER_LAYER_TYPE:
        raise LongRopeError(
            f"{family} has one RoPE for each type of layer in transformers, which ignores one for all layers without "
            "a word; its factors cannot be exported."
        )
    if family not in FAMILIES:
        raise LongRopeError(
            f"{family} was not tested with LongRoPE in transformers, only {', '.join(sorted(FAMILIES))}; use the "
            "factor file."
        )
    if factors.n_hat or not factors.shared:
        raise LongRopeError("transformers holds one list of factors for all layers and no n_hat; these have more.")
    (lambdas,) = factors.by_layer()
    if target_length < model.original_length:
        raise LongRopeError(
            f"transformers scales RoPE up from the original length; the target of {target_length} tokens is below "
            f"{model.original_length}."
        )
    head_dim = _head_dim(config, family)
    fraction = _rotary_fraction(config, family)
    _same_model(config, model, int(head_dim * fraction))
    if len(lambdas) != model.rotary_dim // 2:
        raise LongRopeError(f"{model.name} has {model.rotary_dim // 2} rotary pairs, the factors are {len(lambdas)}.")
    rope: dict[str, object] = {
        "rope_type": "longrope",
        "rope_theta": model.theta,
        "short_factor": list(lambdas),
        "long_factor": list(lambdas),
        "original_max_position_embeddings": model.original_length,
        "attention_factor": factors.attention_factor,
        "factor": target_length / model.original_length,
    }
    # Stated also for a family that rotates whole heads if its config has it: the unscaled RoPE of such a family
    # does not read the fraction, LongRoPE does.
    if FAMILIES[family] is not None or _stated(config, "partial_rotary_factor") is not None:
        rope["partial_rotary_factor"] = fraction
    patch: dict[str, object] = {"rope_parameters": rope, "max_position_embeddings": target_length}
    if "rope_scaling" in config:
        patch["rope_scaling"] = None  # the deprecated spelling, which would win
    if family in TOP_LEVEL_ORIGINAL_LENGTH or "original_max_position_embeddings" in config:
        patch["original_max_position_embeddings"] = model.original_length  # at this level it wins
    if family in EXPLICIT_HEAD_DIM:
        patch["head_dim"] = head_dim
    if sliding_window is not None:
        patch["sliding_window"] = sliding_window
    if dtype is not None:
        patch["dtype"] = dtype
        if "torch_dtype" in config:
            patch["torch_dtype"] = None  # the older spelling
    return patch


def transformers_folder(
    file: FactorFile,
    regime: Regime,
    model_folder: Path,
    out: Path,
    sliding_window: int | None = None,
    dtype: str | None = None,
) -> Export:
    """A copy of a model folder that ``AutoModelForCausalLM.from_pretrained`` loads with the regime's factors.

    Everything but config.json and hidden entries is copied as it is. The folder appears at ``out`` when it is
    complete; a failure leaves nothing behind.

    Parameters
    ----------
    model_folder: config.json and safetensors weights of the model that the file names.
    out: does not exist, or is an empty folder.
    sliding_window, dtype: as in ``transformers_patch``.

    Raises
    ------
    LongRopeError
        As ``exportable`` and ``transformers_patch``; or ``out`` is taken, or the copy failed (no space).
    """
    export = exportable(regime)
    out = out.resolve()
    config = read_json(model_folder / "config.json")
    if not isinstance(config, dict):
        raise LongRopeError(f"{model_folder / 'config.json'} must hold a JSON object.")
    patch = transformers_patch(file.model, export.factors, regime.max_length, config, sliding_window, dtype)
    patched = {key: value for key, value in (config | patch).items() if value is not None or key not in patch}
    if not any(model_folder.glob("*.safetensors")):
        raise LongRopeError(f"{model_folder} holds no .safetensors file; a model folder with its weights is needed.")
    if out.is_relative_to(model_folder.resolve()):
        raise LongRopeError(f"{out} lies in the model folder {model_folder} itself; choose a place outside it.")
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise LongRopeError(f"{out} is there already and is not an empty folder; choose another, or remove it.")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as workspace:
            staged = Path(workspace) / out.name
            staged.mkdir()
            _copy_all_but_config(model_folder, staged)
            (staged / "config.json").write_text(json.dumps(patched, indent=2) + "\n", encoding="utf-8")
            _lengthen_tokenizer(staged / "tokenizer_config.json", regime.max_length)
            staged.replace(out)
    except OSError as error:
        what = f"{error.strerror} ({error.filename})" if error.strerror and error.filename else error.strerror or error
        raise LongRopeError(f"The model folder {out} cannot be written: {what}.") from error
    return export


def _lengthen_tokenizer(path: Path, length: int) -> None:
    """A tokenizer that is told to truncate would do so at the old window."""
    config = read_json(path) if path.is_file() else None
    if isinstance(config, dict) and isinstance(limit := config.get("model_max_length"), int) and limit < length:
        text = json.dumps(config | {"model_max_length": length}, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _copy_all_but_config(model_folder: Path, out: Path) -> None:
    for source in sorted(model_folder.rglob("*")):
        place = source.relative_to(model_folder)
        if place == Path("config.json") or any(part.startswith(".") for part in place.parts):
            continue
        if source.is_dir():
            (out / place).mkdir(parents=True, exist_ok=True)
        else:
            shutil.copyfile(source, out / place)  # contents only: a hub's cache has links to read-only files


def _stated(config: Mapping[str, object], key: str) -> object:
    """A rotary setting where transformers looks for it, in its order."""
    for place in (config.get("rope_scaling"), config.get("rope_parameters")):
        if isinstance(place, Mapping) and place:
            if place.get(key) is not None:
                return place[key]
            break
    return config.get(key)


def _head_dim(config: Mapping[str, object], family: str) -> int:
    head_dim = config.get("head_dim") or DEFAULT_HEAD_DIM.get(family)
    if head_dim is None:
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        head_dim = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else None
    if not isinstance(head_dim, int):
        raise LongRopeError("The model's config.json must state hidden_size and num_attention_heads, or head_dim.")
    return head_dim


def _rotary_fraction(config: Mapping[str, object], family: str) -> float:
    default = FAMILIES[family]
    fraction = 1.0 if default is None else _stated(config, "partial_rotary_factor")
    if fraction is None:
        fraction = default
    if not isinstance(fraction, int | float):
        raise LongRopeError(f"partial_rotary_factor in the model's config.json must be a number, not {fraction!r}.")
    return float(fraction)


def _same_model(config: Mapping[str, object], model: ModelIdentity, rotary_dim: int) -> None:
    """What config.json states must be what the factors were searched on."""
    theta = _stated(config, "rope_theta")
    stated = {
        "model_type": (config.get("model_type"), model.family),
        "num_hidden_layers": (config.get("num_hidden_layers"), model.layers),
        "rotary dimension": (rotary_dim, model.rotary_dim),
        "rope_theta": (model.theta if theta is None else theta, model.theta),
    }
    for name, (found, wanted) in stated.items():
        if found != wanted:
            raise LongRopeError(
                f"The factors are of {model.name}, with {name} {wanted}, but config.json has {found}; give the folder "
                "of that model."
            )
