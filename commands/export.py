"""``longrope export``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from commands.options import (
    DEFAULT_STORAGE,
    AsJson,
    Overwrite,
    Storage,
    open_console,
    print_json,
    refuse_to_replace,
    stem,
    write_text,
)
from searcher.errors import LongRopeError

if TYPE_CHECKING:
    from storage.factor_file import FactorFile

FORMS = (
    "json, csv, gguf, transformers, transformers4, mlx, exllamav2, exllamav3, onnx-genai (a model folder each; with "
    "-config its patch), vllm or sglang (an override and the command that uses it)."
)


def export(
    source: Annotated[str, typer.Argument(help="A finished study's name, or a factor file.")],
    to: Annotated[str, typer.Option(help=FORMS)] = "json",
    out: Annotated[
        Path | None, typer.Option(help="File or folder to write; made up in this folder if not given.")
    ] = None,
    method: Annotated[str, typer.Option(help="searched, or a baseline of the study: yarn, ntk, pi, ...")] = "searched",
    model: Annotated[str | None, typer.Option(help="Model folder, where it is not the study's any more.")] = None,
    accept_loss: Annotated[
        list[str] | None,
        typer.Option(help="n_hat, layers, regimes, attention_factor or short_attention_factor; may be given often."),
    ] = None,
    length: Annotated[
        str | None, typer.Option(help="Longest length to serve, of a file with several regimes: tokens, 128k, 8x.")
    ] = None,
    short: Annotated[
        str, typer.Option(help="What serves up to the original length: file (its own regime), long or untouched.")
    ] = "file",
    by_layer: Annotated[bool, typer.Option("--by-layer", help="csv: a line for every layer.")] = False,
    gguf: Annotated[Path | None, typer.Option(help="gguf: the file to copy with the factors, not --model's.")] = None,
    overwrite: Overwrite = False,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> None:
    """Write factors in a form that other software loads; what a form cannot hold is refused until it is accepted.

    Example: longrope export my-study --to transformers --out ./my-model-128k
    """
    from searcher.plan import parse_length
    from storage.config_forms import FORMS as CONFIGS
    from storage.factor_csv import CSV, to_csv
    from storage.factor_file import rendered, write
    from storage.losses import LOSSES, SHORT_CHOICES, take

    form, is_config = to.removesuffix("-config"), to.endswith("-config")
    folders = [name for name, row in CONFIGS.items() if row.folder]
    if to not in ("json", "csv", "gguf", *CONFIGS) and not (is_config and form in folders):
        raise LongRopeError(f"--to is {FORMS.removesuffix('.')}; not {to!r}.")
    for name in accept_loss or ():
        if name not in LOSSES:
            raise LongRopeError(f"--accept-loss is {', '.join(LOSSES[:-1])} or {LOSSES[-1]}, not {name!r}.")
    if short not in SHORT_CHOICES:
        raise LongRopeError(f"--short is {', '.join(SHORT_CHOICES[:-1])} or {SHORT_CHOICES[-1]}, not {short!r}.")
    name, file, found = _factors(source, method, storage)
    model = model or found
    longest = None if length is None else parse_length(length, file.model.original_length)
    losses, command = frozenset(accept_loss or ()), None
    notes: list[str] = []
    if to != "json" and out is not None and out.is_file() and Path(source).is_file() and out.samefile(source):
        raise LongRopeError(f"{out} is the factor file that is exported; name another file with --out.")
    if to == "json":
        target = out or Path(f"{name}-factors.json")
        refuse_to_replace(target, overwrite, rendered(file))
        write(target, file)
    elif to == "csv":
        target = out or Path(f"{name}-factors.csv")
        taken = take(file, CSV, losses, longest, short)
        text = to_csv(taken.long, file.model.layers if by_layer else None)
        refuse_to_replace(target, overwrite, text)
        write_text(target, text)
        notes = [*taken.notes, "The CSV holds no base, lengths or attention factor."]
    elif to == "gguf":
        from commands.gguf import export_gguf

        target = out or Path(f"{name}.gguf")
        taken = export_gguf(file, model, gguf, target, overwrite, losses, longest, short)
        notes = list(taken.notes)
    else:
        target = out or Path(f"{name}-{to}" if form in folders and not is_config else f"{name}-{to}.json")
        if to == "transformers-config" and out is None:
            target = Path(f"{name}-config-patch.json")
        notes, command = _config_form(form, is_config, file, model, target, (losses, longest, short), overwrite)
    if as_json:
        print_json({"written": str(target), "form": to, "notes": notes} | ({"command": command} if command else {}))
        return
    console = open_console()
    for note in notes:
        console.print(note, highlight=False)
    if command:
        console.print(f"start it with: {command}", highlight=False, soft_wrap=True)
    console.print(f"written: {target}", highlight=False, soft_wrap=True)


def _factors(source: str, method: str, storage: str) -> tuple[str, FactorFile, str | None]:
    """Stem of the files to write, factor file, and the model it belongs to where that is known."""
    from commands.runs import study_factor_file
    from storage.factor_file import from_json, read

    given = Path(source)
    if given.suffix == ".json" and given.is_file():
        if method != "searched":
            raise LongRopeError("--method takes a study's name before it; a factor file holds one method's factors.")
        return given.stem.removesuffix("-factors"), read(given), None
    from storage.repository import Repository

    try:
        record = Repository(storage, create=False).study(source)
    except LongRopeError as error:
        if not given.is_file() and given.suffix != ".json":
            raise
        what = "is no factor file, which end in .json" if given.is_file() else "is not there"
        raise LongRopeError(f"{source} {what}. Taken for a study: {error}") from None
    if record.result is None:
        raise LongRopeError(f"The study {source} is not finished; go on with `longrope resume {source}`, then export.")
    if record.kind == "extension":
        if method != "searched":
            raise LongRopeError("An extension has one factor file; --method is for a search.")
        model = str(Path(record.settings["out"]) / record.result["model"])
        return stem(source), from_json(record.result["factors"]), model
    file = study_factor_file(source, record.settings, record.result, method)
    return stem(source) if method == "searched" else f"{stem(source)}-{method}", file, record.settings["model"]["path"]


def model_of(file: FactorFile, model: str | None) -> tuple[Path, Mapping[str, Any]]:
    """Folder and config of the model that a factor file belongs to."""
    from storage.imports import UNKNOWN_WEIGHTS
    from workers.model import model_digest, read_config_json, resolve_folder

    if model is None:
        raise LongRopeError("A factor file does not hold the model; name its folder with --model.")
    folder = resolve_folder(model)
    digests = (model_digest(folder), model_digest(folder, trust_remote_code=True), UNKNOWN_WEIGHTS)
    if file.model.weights_sha256 not in digests:
        raise LongRopeError(f"{model} is not the model these factors were searched on ({file.model.name}).")
    return folder, read_config_json(folder)


def window_in_force(file: FactorFile, config: Mapping[str, Any]) -> int | None:
    """The attention window that a file's scores were computed under; None where the config states it already."""
    from workers.model import NO_WINDOW

    numerics: Any = file.provenance.get("numerics") or {}
    window: int | None = numerics.get("sliding_window")
    if window is None and config.get("sliding_window") is not None and numerics:
        return NO_WINDOW  # it was off, or never reached
    return window


def _config_form(
    form: str,
    is_config: bool,
    file: FactorFile,
    model: str | None,
    target: Path,
    how: tuple[frozenset[str], int | None, str],
    overwrite: bool,
) -> tuple[list[str], str | None]:
    """Write a config form; notes, and the command line that uses it."""
    from storage.config_forms import FORMS as CONFIGS
    from storage.config_forms import command_line, config_patch, form_notes, form_room
    from storage.losses import take
    from storage.model_folder import write_model_folder

    folder, config = model_of(file, model)
    numerics: Any = file.provenance.get("numerics") or {}
    taken = take(file, form_room(form, file.model.family), *how)
    patch = config_patch(form, taken, config, window_in_force(file, config), numerics.get("dtype"))
    command = None
    if CONFIGS[form].folder and not is_config:
        write_model_folder(folder, target, patch, taken.target_length)
    else:
        text = json.dumps(patch, indent=2) + "\n"
        refuse_to_replace(target, overwrite, text)
        write_text(target, text)
        command = None if is_config else command_line(form, str(model), str(target), taken)
    return form_notes(form, taken), command
