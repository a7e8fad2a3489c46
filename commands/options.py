"""What several commands ask for alike, and how they print."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from searcher.errors import LongRopeError

if TYPE_CHECKING:
    from storage.repository import Repository
    from workers.model import ModelRequest
    from workers.scorer import PoolRequest


DEFAULT_STORAGE = "sqlite:///longrope.db"
SQLITE = b"SQLite format 3\0"  # as its files begin
DEFAULT_STORAGE_TIMEOUT = 600.0
# A study's name is part of a file's name and is typed after `longrope resume`.
STUDY_NAME = re.compile(r"\w[\w.+=@-]{0,59}")

Model = Annotated[str | None, typer.Option(help="Model folder or hub name; the reference model if not given.")]
Data = Annotated[
    list[str] | None,
    typer.Option(help="Text: file, folder, glob, .jsonl, .parquet or a datasets name; may be given often."),
]
SelectionData = Annotated[list[str] | None, typer.Option(help="Text of the selection set, where you name the sets.")]
TestData = Annotated[list[str] | None, typer.Option(help="Text of the test set, where you name the sets.")]
TextColumn = Annotated[str, typer.Option(help="Column of JSONL and parquet that holds the text.")]
Storage = Annotated[
    str,
    typer.Option(
        envvar="LONGROPE_STORAGE",
        help="SQLAlchemy URL of the store; its password may be left to PGPASSWORD or ~/.pgpass.",
    ),
]
StorageTimeout = Annotated[
    float,
    typer.Option(
        min=0, envvar="LONGROPE_STORAGE_TIMEOUT", help="Seconds to wait, each time that the store's server goes away."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there; a folder never is.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Ray workers, each with the whole model; one a core or GPU if not given.")
]
GpusPerWorker = Annotated[
    float | None, typer.Option(min=0, help="GPUs of one worker; 0 runs on CPU; 1 if not given and there are any.")
]
RayAddress = Annotated[
    str | None, typer.Option(help="Join this Ray cluster instead of starting one here (resume: local goes back).")
]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        min=1, help="Seconds before which no evaluation counts as hanging; 120, and 10 times what others took, if less."
    ),
]
InProcess = Annotated[bool, typer.Option("--in-process", help="Score in this process, without Ray: for debugging.")]
Out = Annotated[Path, typer.Option(help="Folder the factor file is written to.")]
Dtype = Annotated[str, typer.Option(help="auto (the model's), float32, bfloat16 or float16.")]
Attention = Annotated[
    str, typer.Option(help="Attention kernel: auto (longrope, our own), sdpa, eager, flash_attention_2 or _3.")
]
SlidingWindow = Annotated[str | None, typer.Option(help="For windowed attention: keep, off or a number of tokens.")]
OriginalLength = Annotated[
    int | None, typer.Option(min=2, help="The trained window, where the config does not say it.")
]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of a worker.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Chunk = Annotated[
    int | None, typer.Option(min=1, help="Tokens that go through a layer at one time; what fits if not given.")
]
HiddenOnHost = Annotated[bool, typer.Option("--hidden-on-host", help="Keep hidden states in host memory.")]
StreamWeights = Annotated[
    bool, typer.Option("--stream-weights", help="Keep the layers in host memory: for models larger than the card.")
]


def check_study_name(study: str | None) -> None:
    if study is not None and not STUDY_NAME.fullmatch(study):
        raise LongRopeError(
            "A study's name is part of its files' names: up to 60 letters, digits and any of . _ - + = @, the first of "
            f"them a letter or digit, not {study!r}."
        )


def plain(name: str) -> str:
    """What of a model's or plan's name can be part of a study's."""
    return re.sub(r"[^\w.+=@-]+", "-", name).strip("-.+=@")[:30] or "model"


def stem(study: str) -> str:
    """What of a study's name is part of its files': all, but for names in stores of other hands, which may be any."""
    return study if STUDY_NAME.fullmatch(study) else plain(study)


def new_name(repository: Repository, study: str | None, base: str) -> str:
    """The name asked for, where it is free, or one made from ``base``."""
    taken = {summary.name: summary.status for summary in repository.studies()}
    if study is not None:
        if study in taken:
            on = "it is finished;" if taken[study] == "finished" else f"`longrope resume {study}`, or"
            raise LongRopeError(f"There is a study {study!r} already: {on} choose another name.")
        return study
    names = [base, *(f"{base}-{n}" for n in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


@contextmanager
def stoppable(repository: Repository, study: str, storage: str, console: Console) -> Iterator[None]:
    """A block that Ctrl-C, and what a scheduler sends before it kills, stop cleanly, with the way to go on."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except KeyboardInterrupt:
        known = True
        with suppress(LongRopeError):  # where the store does not answer, the study is there for all we know
            known = study in {summary.name for summary in repository.studies()}
        again = f"what was computed is kept. Go on with: longrope resume {study}{_storage_option(storage)}"
        advice = again if known else "nothing had begun."
        console.print(f"\nStopped; {advice}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


def _storage_option(storage: str) -> str:
    """What leads a later command to the same store. No password is shown; the environment of the user has it."""
    from storage.database import without_password

    shown = without_password(storage)
    known = shown in (DEFAULT_STORAGE, os.environ.get("LONGROPE_STORAGE"))
    return "" if known else f" --storage {shlex.quote(shown)}"


def driver_store(storage: str, timeout: float, create: bool = True) -> Repository:
    """The store for a command that drives a study: it waits for a server that goes away, and says so.

    What the command starts from here on, Ray's processes among it, finds no password in its environment.
    """
    from storage.database import WHOLE_ADDRESS, without_password
    from storage.patience import Patience
    from storage.repository import Repository

    repository = Repository(storage, create, Patience(timeout, lambda text: print(text, file=sys.stderr, flush=True)))
    for secret in ("PGPASSWORD", WHOLE_ADDRESS):  # the repository has it
        os.environ.pop(secret, None)
    if "LONGROPE_STORAGE" in os.environ:
        os.environ["LONGROPE_STORAGE"] = without_password(storage)
    return repository


def open_console(stderr: bool = False) -> Console:
    """A console that prints what it is given, brackets and colons too: much of it is names, paths and errors of others.

    It does not fold tables to 80 columns where nobody's terminal asks for it.
    """
    opened = partial(Console, stderr=stderr, markup=False, emoji=False)
    console = opened()
    return console if console.is_terminal else opened(width=120)


def _stop(signum: int, frame: object) -> None:  # noqa: ARG001 - the shape of a signal handler
    raise KeyboardInterrupt


def print_json(value: object) -> None:
    """JSON has no infinity: a perplexity that overflowed is null."""

    def finite(inner: Any) -> Any:
        if isinstance(inner, dict):
            return {key: finite(item) for key, item in inner.items()}
        if isinstance(inner, list):
            return [finite(item) for item in inner]
        return None if isinstance(inner, float) and not math.isfinite(inner) else inner

    print(json.dumps(finite(value), indent=2))


def with_text_keys(value: Any) -> Any:
    """JSON's objects have keys of text alone; lengths are numbers here."""
    if isinstance(value, dict):
        return {str(key): with_text_keys(inner) for key, inner in value.items()}
    return [with_text_keys(inner) for inner in value] if isinstance(value, list) else value


def refuse_to_replace(path: Path, overwrite: bool, text: str | None = None) -> None:
    """What is there may be all that is left of days of search.

    Parameters
    ----------
    overwrite: its owner said that it may be replaced.
    text: what is to be written, where that is text; a file that holds it already is no obstacle.

    Raises
    ------
    LongRopeError
        Another file is there, or a database, which nothing replaces.
    """
    if not path.is_file():
        return
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(SQLITE)) == SQLITE:
            raise LongRopeError(f"{path} is a database; name another file with --out.")
    if overwrite:
        return
    with suppress(OSError, ValueError):
        if text is not None and path.read_text(encoding="utf-8") == text:
            return
    raise LongRopeError(f"{path} is there already: give --overwrite to replace it, or another --out.")


def write_text(path: Path, text: str) -> None:
    """In one step: the file is there whole, or as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise LongRopeError(f"{path} cannot be written: {error.strerror}.") from error


def model_path(model: str | None) -> str:
    """The model's folder, whole, so that a resume finds it from any other one; or its name on the hub."""
    from workers.model import resolve_folder
    from workers.reference import MODEL_DIR

    path = str(MODEL_DIR) if model is None else model
    resolve_folder(path)
    return str(Path(path).expanduser().resolve()) if Path(path).expanduser().is_dir() else path


def model_request(options: Mapping[str, Any], path: str, target_length: int) -> ModelRequest:
    """How a command's options want the model."""
    from workers.model import ModelRequest

    given = {field.name: options[field.name] for field in fields(ModelRequest) if field.name in options}
    return ModelRequest(**{**given, "path": path, "target_length": target_length})


def pool_request(options: Mapping[str, Any]) -> PoolRequest | None:
    """The workers a command's options ask for; None for this process."""
    from workers.scorer import PoolRequest

    asked = PoolRequest(options["workers"], options["gpus_per_worker"], options["ray_address"])
    if options.get("time_limit") is not None:
        asked = replace(asked, time_limit=options["time_limit"])
    return None if options["in_process"] else asked
