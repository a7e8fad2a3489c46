"""GGUF: factors into a file that is there, or a model converted with them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from commands.export import model_of
from commands.options import refuse_to_replace
from searcher.errors import LongRopeError
from storage.factor_file import FactorFile
from storage.gguf_convert import convert_llama
from storage.gguf_file import LLAMA_CPP, patch_gguf
from storage.losses import Taken, take


def export_gguf(
    file: FactorFile,
    model: str | None,
    source: Path | None,
    out: Path,
    overwrite: bool,
    accepted: Collection[str],
    length: int | None,
    short: str,
) -> Taken:
    """Write a GGUF file with the factors.

    Parameters
    ----------
    source: a GGUF file of the model; None converts the model's folder.
    overwrite: ``out`` may be replaced, though never by a copy of itself.
    accepted, length, short: as in ``take``.
    """
    taken = take(file, LLAMA_CPP, accepted, length, short)
    if taken.target_length < file.model.original_length:
        raise LongRopeError(f"llama.cpp scales RoPE up from the original length; {taken.target_length} is below it.")
    if source is not None and out.exists() and out.samefile(source):
        raise LongRopeError(f"{out} is the file that is copied; name another one with --out.")
    refuse_to_replace(out, overwrite)
    if source is not None:
        patch_gguf(source, out, taken)
    else:
        convert_llama(model_of(file, model)[0], out, taken)
    return taken
