"""A complete model folder under another config.json, for programs that load one."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from searcher.errors import LongRopeError
from storage.checks import read_json
from storage.config_forms import merged


def write_model_folder(model_folder: Path, out: Path, patch: Mapping[str, object], length: int) -> None:
    """A copy of a model folder with a patched config.json.

    Everything but config.json and hidden entries is copied as it is. The folder appears at ``out`` when it is
    complete; a failure leaves nothing behind.

    Parameters
    ----------
    model_folder: config.json and safetensors weights.
    out: does not exist, or is an empty folder.
    patch: keys of config.json, each replacing the model's own whole; None removes it.
    length: in tokens, that the tokenizer may not cut below.

    Raises
    ------
    LongRopeError
        ``out`` is taken, the folder is no model, or the copy failed (no space).
    """
    out = out.resolve()
    config = read_config(model_folder)
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
            text = json.dumps(merged(config, patch), indent=2)
            (staged / "config.json").write_text(text + "\n", encoding="utf-8")
            _lengthen_tokenizer(staged / "tokenizer_config.json", length)
            staged.replace(out)
    except OSError as error:
        what = f"{error.strerror} ({error.filename})" if error.strerror and error.filename else error.strerror or error
        raise LongRopeError(f"The model folder {out} cannot be written: {what}.") from error


def read_config(model_folder: Path) -> dict[str, object]:
    """The config.json of a model folder.

    Raises
    ------
    LongRopeError
        It cannot be read, or holds no object.
    """
    config = read_json(model_folder / "config.json")
    if not isinstance(config, dict):
        raise LongRopeError(f"{model_folder / 'config.json'} must hold a JSON object.")
    return config


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
