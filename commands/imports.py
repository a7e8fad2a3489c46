"""``longrope import``."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from commands.options import AsJson, Overwrite, open_console, plain, print_json, refuse_to_replace
from searcher.errors import LongRopeError


def import_factors(
    source: Annotated[Path, typer.Argument(help="CSV, GGUF, config.json or a patch of one, or a model folder.")],
    out: Annotated[Path | None, typer.Option(help="Factor file to write; made up in this folder if not given.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or hub name that the factors are for.")] = None,
    target: Annotated[str | None, typer.Option(help="Longest length they serve: tokens, 128k, 8x.")] = None,
    original_length: Annotated[int | None, typer.Option(min=2, help="The trained window.")] = None,
    theta: Annotated[float | None, typer.Option(help="Base of the model's unscaled RoPE.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers of the model.")] = None,
    family: Annotated[str | None, typer.Option(help="Its model_type in transformers; llama if nothing says.")] = None,
    attention_factor: Annotated[
        str | None, typer.Option(help="su, yarn, none or a number, where the file states none; su if not given.")
    ] = None,
    n_hat: Annotated[int, typer.Option(min=0, help="Start tokens left untouched; no form states it.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make a factor file of factors in another program's form.

    Example: longrope import 128k_la2.csv --model ./llama2 --target 128k
    """
    from searcher.plan import parse_length
    from storage.factor_file import rendered, warnings, write
    from storage.imports import imported_file

    form, stated = _read(source)
    given = {} if model is None else _given_by(model, stated.original_length)
    own = {"original_length": original_length, "theta": theta, "layers": layers, "family": family}
    given = given | {key: value for key, value in own.items() if value is not None}
    window = given.get("original_length") or stated.original_length
    if target is not None:
        if target.endswith("x") and window is None:
            raise LongRopeError("--target 8x needs the trained window; give --original-length, or --model.")
        given["target_length"] = parse_length(target, window or 1)
    given.setdefault("name", plain(source.stem))
    file = imported_file(stated, given, attention_factor, n_hat, form)
    path = out or Path(f"{plain(source.stem)}-factors.json")
    refuse_to_replace(path, overwrite, rendered(file))
    write(path, file)
    notes = warnings(file)
    if stated.attention is None:
        taken = file.regimes[-1]
        value = f"{taken.factors.attention_factor:.6g} ({taken.attention_policy})"
        notes.append(f"The file states no attention factor; {value} is taken.")
    if model is None:
        notes.append("No --model was given, so the file says nothing of its weights, and nothing checks them.")
    if as_json:
        print_json({"written": str(path), "form": form, "regimes": len(file.regimes), "notes": notes})
        return
    console = open_console()
    for note in notes:
        console.print(note, highlight=False)
    console.print(f"written: {path}", highlight=False, soft_wrap=True)


def _read(source: Path) -> tuple[str, Any]:
    """The form's name, and what the file states."""
    from storage.checks import read_json
    from storage.factor_csv import read_csv
    from storage.imports import Stated, read_config_form

    path = source / "config.json" if source.is_dir() else source
    begin = _beginning(path)
    if path.suffix == ".csv" or (path.suffix != ".json" and re.match(rb"[-+.\d]", begin)):
        return "csv", Stated(read_csv(path))
    if path.suffix == ".gguf" or begin == b"GGUF":
        from storage.gguf_file import read_gguf

        return "gguf", read_gguf(path)
    document = read_json(path)
    if isinstance(document, dict) and document.get("format") == "longrope-factors":
        raise LongRopeError(f"{source} is a factor file already.")
    return "config", read_config_form(document, str(path))


def _beginning(path: Path) -> bytes:
    """The first bytes of a file, by which its form is known whatever its name; none where it cannot be read."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(4)
    return b""


def _given_by(model: str, stated_length: int | None) -> dict[str, Any]:
    """What a model folder says of itself, without loading its weights."""
    from storage.model_config import FAMILIES, INNER, LAYER_TYPE, head_dim, language_model, rotary_fraction, stated
    from workers.apply import HALF_SPLIT, INTERLEAVED, INTERLEAVED_FAMILIES
    from workers.model import model_digest, read_config_json, read_original_length, resolve_folder

    folder = resolve_folder(model)
    whole = read_config_json(folder)
    family = str(whole.get("model_type"))
    config = language_model(whole, family) if family in INNER else whole
    theta = stated(config, "rope_theta", LAYER_TYPE.get(family))
    return {
        "name": folder.name,
        "weights_sha256": model_digest(folder),
        "family": family,
        "theta": None if theta is None else float(theta),
        "rotary_dim": int(head_dim(config, family) * rotary_fraction(config, family)) if family in FAMILIES else None,
        "original_length": stated_length or read_original_length(model),
        "layers": config.get("num_hidden_layers"),
        "pairing": INTERLEAVED if family in INTERLEAVED_FAMILIES else HALF_SPLIT,
    }
