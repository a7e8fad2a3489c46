"""What the tests of the command share: a tiny model, text for it, and the command itself."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

Longrope = Callable[..., "Ended"]

DOCUMENTS = 9
DOCUMENT_TOKENS = 700  # two windows of four times the tiny model's own


@dataclass(frozen=True)
class Ended:
    """What a command left: its exit status and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a window of 64 tokens and 8 rotary pairs, its tokenizer a token a byte."""
    from tiny_models import write_model

    return write_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text for a whole study at four times the window: a file a document."""
    folder = tmp_path_factory.mktemp("text") / "books"
    folder.mkdir()
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(60)]
    for number in range(DOCUMENTS):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words, k=DOCUMENT_TOKENS))[:DOCUMENT_TOKENS])
    return folder


@pytest.fixture(scope="session")
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the command keeps tokens: not in the home folder of whoever runs the tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def longrope(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], token_cache: Path, tmp_path: Path
) -> Iterator[Longrope]:
    """The command ``longrope`` in this process and in a folder of its own; whatever it does not catch is raised."""
    import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGROPE_CACHE", str(token_cache))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.delenv("LONGROPE_STORAGE", raising=False)

    def run(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["longrope", *map(str, arguments)])
        capsys.readouterr()
        for handler in logging.getLogger("transformers").handlers:
            # It was made for the stderr of another test; what the library says must not be lost on it.
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        status = ended.value.code
        assert isinstance(status, int)
        captured = capsys.readouterr()
        return Ended(status, captured.out, captured.err)

    handler = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="session")
def command_environment(token_cache: Path) -> dict[str, str]:
    """For the command in a process of its own: one thread, this checkout, nothing of the user's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LONGROPE_", "RAY_"))}
    root = str(Path(__file__).parent.parent)
    return {**kept, "LONGROPE_CACHE": str(token_cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
