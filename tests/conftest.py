"""What the tests of the command share: a tiny model, text for it, and the command itself."""

from __future__ import annotations

import io
import logging
import os
import random
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from postgres_server import Server

# Ray reads them once a process, wherever it is imported first.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
# A shell ignores Ctrl-C for what it runs in the background, and what this starts would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A busy machine is no fault of the code's.
settings.register_profile("any-speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-speed")

Longrope = Callable[..., "Ended"]

DOCUMENTS = 9
DOCUMENT_TOKENS = 700  # two windows of four times the tiny model's own

# A whole search of the tiny model in a second, at four times its window: refined before and after evolution, raced.
SMALL_SEARCH = """
    --in-process --target=4x --preset=refined --population=12 --parents=2 --mutants=5 --crosses=2 --generations=2
    --refine-steps=3 --refine-final-legs=1 --racing --racing-caution=0 --finalists=2 --n-hats=0,2,8,16
    --search-documents=2 --selection-documents=1 --test-documents=2 --windows=search=1,selection=2,test=2
"""


@dataclass(frozen=True)
class Ended:
    """What a command left: its exit status and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a window of 64 tokens and 8 rotary pairs; its tokenizer makes a token of a byte."""
    import torch
    from tiny_models import write_model

    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text for a whole study at four times the window: a file a document."""
    folder = tmp_path_factory.mktemp("text") / "books"
    folder.mkdir()
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(60)]
    for number in range(DOCUMENTS):
        text = " ".join(draw.choices(words, k=DOCUMENT_TOKENS))
        (folder / f"{number}.txt").write_text(text[:DOCUMENT_TOKENS])
    return folder


@pytest.fixture(scope="session")
def small_study(tiny_llama_folder: Path, text_folder: Path) -> list[str]:
    """What follows ``launch`` for a whole study in a second."""
    return [f"--model={tiny_llama_folder}", f"--data={text_folder}", *SMALL_SEARCH.split()]


@pytest.fixture(scope="session")
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the command keeps tokens: not in the home folder of whoever runs the tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def longrope_in(token_cache: Path) -> Longrope:
    """``longrope_in(folder, *arguments)``: the command ``longrope`` in this process and in that folder.

    Keywords are environment variables. Whatever the command does not catch is raised.
    """
    import cli

    def run(folder: Path, *arguments: str | Path, **environment: str) -> Ended:
        out, err = io.StringIO(), io.StringIO()
        previous = signal.getsignal(signal.SIGTERM)
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(folder)
            patch.delenv("LONGROPE_STORAGE", raising=False)
            for name, value in {"LONGROPE_CACHE": str(token_cache), "COLUMNS": "200", **environment}.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["longrope", *map(str, arguments)])
            for handler in logging.getLogger("transformers").handlers:
                # It was made for the stderr of another moment; what the library says must not be lost on that.
                if type(handler) is logging.StreamHandler:  # not pytest's, which are of classes of their own
                    patch.setattr(handler, "stream", err)
            try:
                with pytest.raises(SystemExit) as ended:
                    cli.main()
            finally:
                signal.signal(signal.SIGTERM, previous)
        status = ended.value.code
        assert isinstance(status, int)
        return Ended(status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def longrope(longrope_in: Longrope, tmp_path: Path) -> Longrope:
    """``longrope(*arguments)``: the command in this test's folder."""
    return partial(longrope_in, tmp_path)


@pytest.fixture(scope="session")
def process_environment(token_cache: Path) -> dict[str, str]:
    """For the command in a process of its own: one thread, this checkout, nothing of the user's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LONGROPE_", "RAY_"))}
    root = str(Path(__file__).parent.parent)
    return {**kept, "LONGROPE_CACHE": str(token_cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": root}


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A real PostgreSQL for this session."""
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def stop_after() -> Callable[[pytest.MonkeyPatch, int], None]:
    """``stop_after(patch, evaluations)``: until the patch is undone, a study gets SIGTERM after so many."""

    def arrange(patch: pytest.MonkeyPatch, evaluations: int) -> None:
        import workers.scorer

        score, left = workers.scorer.score_unit, iter(range(evaluations))

        def score_unit(*arguments: Any) -> Any:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGTERM)
            return score(*arguments)

        patch.setattr(workers.scorer, "score_unit", score_unit)

    return arrange
