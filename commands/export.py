"""``longrope export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from commands.options import DEFAULT_STORAGE, AsJson, Storage, open_console, print_json, write_text
from searcher.errors import LongRopeError


def export(
    source: Annotated[str, typer.Argument(help="A finished study's name, or a factor file.")],
    to: Annotated[
        str, typer.Option(help="json, transformers-config (a patch) or transformers (a model folder).")
    ] = "json",
    out: Annotated[
        Path | None, typer.Option(help="File or folder to write; made up in this folder if not given.")
    ] = None,
    method: Annotated[str, typer.Option(help="searched, or a baseline of the study: yarn, ntk, pi, ...")] = "searched",
    model: Annotated[str | None, typer.Option(help="Model folder, where it is not the study's any more.")] = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> None:
    """Write the factors of a study: the factor file, or what plain transformers loads.

    Example: longrope export my-study --to transformers --out ./my-model-128k
    """
    from commands.runs import study_factor_file
    from storage.exports import exportable, transformers_folder, transformers_patch
    from storage.factor_file import from_json, read, write
    from workers.model import NO_WINDOW, model_digest, read_config_json, resolve_folder

    given = Path(source)
    if given.suffix == ".json" and given.is_file():
        if method != "searched":
            raise LongRopeError("--method takes a study's name before it; a factor file holds one method's factors.")
        name, file = given.stem.removesuffix("-factors"), read(given)
    else:
        from storage.repository import Repository

        name = source
        record = Repository(storage, create=False).study(name)
        if record.result is None:
            raise LongRopeError(f"The study {name} is not finished; go on with `longrope resume {name}`, then export.")
        if record.kind == "extension":
            if method != "searched":
                raise LongRopeError("An extension has one factor file; --method is for a search.")
            file = from_json(record.result["factors"])
            model = model or str(Path(record.settings["out"]) / record.result["model"])
        else:
            file = study_factor_file(name, record.settings, record.result, method)
            model = model or record.settings["model"]["path"]
    stem = name if method == "searched" else f"{name}-{method}"
    regime = file.regimes[-1]
    if to == "json":
        target = out or Path(f"{stem}-factors.json")
        write(target, file)
        notes: list[str] = []
    elif to in ("transformers", "transformers-config"):
        if model is None:
            raise LongRopeError("A factor file does not hold the model; name its folder with --model.")
        folder = resolve_folder(model)
        if file.model.weights_sha256 not in (model_digest(folder), model_digest(folder, trust_remote_code=True)):
            raise LongRopeError(f"{model} is not the model these factors were searched on ({file.model.name}).")
        config = read_config_json(folder)
        numerics: Any = file.provenance.get("numerics") or {}
        window, dtype = numerics.get("sliding_window"), numerics.get("dtype")
        if window is None and config.get("sliding_window") is not None:
            window = NO_WINDOW  # it was off, or never reached
        if to == "transformers":
            target = out or Path(f"{stem}-transformers")
            notes = transformers_folder(file, regime, folder, target, window, dtype).lines()
        else:
            target = out or Path(f"{stem}-config-patch.json")
            taken = exportable(regime)
            patch = transformers_patch(file.model, taken.factors, regime.max_length, config, window, dtype)
            write_text(target, json.dumps(patch, indent=2) + "\n")
            notes = taken.lines()
        if len(file.regimes) > 1:
            notes.append(
                f"One regime is taken, up to {regime.max_length} tokens; {len(file.regimes) - 1} are left out."
            )
    else:
        raise LongRopeError(f"--to is json, transformers-config or transformers, not {to!r}.")
    if as_json:
        print_json({"written": str(target), "form": to, "notes": notes})
        return
    console = open_console()
    for note in notes:
        console.print(note, highlight=False)
    console.print(f"written: {target}", highlight=False, soft_wrap=True)
