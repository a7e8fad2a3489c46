"""What a model folder says of itself in config.json and its weights' headers, before anything is allocated for it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from searcher.errors import LongRopeError

MAX_CONFIG = 8 * 2**20  # bytes of a config.json
MAX_INDEX = 64 * 2**20  # of an index; a tensor takes a hundred bytes of it
INDEX = "model.safetensors.index.json"


def read_config_json(folder: Path) -> dict[str, Any]:
    """The raw config.json of a model folder."""
    return _read_object(folder / "config.json", MAX_CONFIG)


def _read_object(path: Path, most: int) -> dict[str, Any]:
    """A JSON object; what is longer than ``most`` bytes comes out cut off, so as no JSON."""
    try:
        with path.open("rb") as handle:
            found = json.loads(handle.read(most))
    except (OSError, ValueError, RecursionError) as error:
        raise LongRopeError(f"{path} cannot be read as JSON: {error}; fetch it anew.") from error
    if not isinstance(found, dict):
        raise LongRopeError(f"{path} must hold a JSON object, not a {type(found).__name__}.")
    return found


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensor -> its shape, from the headers of all safetensors files; safetensors checks them against the files.

    Raises
    ------
    LongRopeError
        A file is not safetensors, or is cut off; or the index of several names another kind of file, which transformers
        would unpickle.
    """
    if (index := folder / INDEX).is_file():
        named = _read_object(index, MAX_INDEX).get("weight_map")
        files = list(named.values()) if isinstance(named, dict) else [named]
        for name in files:
            if not (isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name):
                raise LongRopeError(f"{index} should name .safetensors files beside it alone, not {name!r}.")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # SafetensorError is one of its own, and a folder is an OSError
            reason = " ".join(str(error).split())
            raise LongRopeError(f"{path} cannot be loaded as safetensors weights: {reason}; fetch it anew.") from error
    return shapes


def check_sizes(config: Any, shapes: Mapping[str, tuple[int, ...]], path: str, trust_remote_code: bool) -> None:
    """Refuse a config that makes another or a far larger model than the weights are of.

    transformers would first allocate, and fill with random numbers, whatever a config.json of a few bytes asks for.

    Raises
    ------
    LongRopeError
        A tensor of another shape, more layers than tensors, or more than twice the parameters (tied ones count twice).
    """
    from transformers import AutoModelForCausalLM

    if getattr(config, "quantization_config", None) is not None:  # its tensors are packed
        return
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and not 1 <= layers <= len(shapes):
        raise LongRopeError(
            f"The config.json of {path} makes {layers} layers, but the weights hold {len(shapes)} tensors; weights and "
            "config are of different models."
        )
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # anything a model class raises on values it does not expect: loading will raise, and say, it too
        return
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, shape in wanted.items():
        if shapes.get(name, shape) != shape:
            raise LongRopeError(
                f"{name} of {path} has shape {shapes[name]}, but its config.json makes it {shape}; weights and config "
                "are of different models."
            )
    asked, held = (sum(map(math.prod, found.values())) for found in (wanted, shapes))
    if asked > 2 * held:
        raise LongRopeError(
            f"The config.json of {path} makes a model of {asked} parameters, but the weights hold {held}; weights and "
            "config are of different models."
        )
