"""A tiny study driven by the real command in a process of its own, and ways to stop that process where it hurts.

Drivers are forked from a server that has imported everything and computed nothing, so that one more driver costs
milliseconds, not the seconds that torch and transformers take to import.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

NAME = "killed"
FACTORS = f"{NAME}-factors.json"
IMPORTS = ["cli", "runs", "workers.scorer", "storage.repository", "transformers.models.llama.modeling_llama"]


@dataclass(frozen=True)
class Moment:
    """The ``n``-th time that a driver passes a label of this pattern: there it sends itself a signal.

    Labels are what ``_Probe`` writes to the log, one a line.
    """

    pattern: str
    n: int = 1
    signal: int = signal.SIGKILL


@dataclass(frozen=True)
class Ended:
    """One driver's life. ``status``: its exit status, or minus the signal that ended it."""

    status: int | None
    seconds: float
    labels: list[str]
    output: str

    @property
    def started(self) -> list[str]:
        """Keys of the evaluations that it began to compute, in order."""
        return [label.split()[-1] for label in self.labels if label.startswith("scoring ")]


@dataclass(frozen=True)
class World:
    """What every run of the study has in common: the model, its text, and the command's arguments."""

    folder: Path
    arguments: tuple[str, ...]

    @classmethod
    def make(cls, folder: Path) -> World:
        """A random Llama with a window of 32 tokens, a tokenizer, and text for all sets."""
        documents = folder / "documents"
        documents.mkdir(parents=True)
        draw = random.Random(7)
        words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(60)]
        for number in range(7):
            text = " ".join(draw.choices(words, k=140))
            (documents / f"{number}.txt").write_text(text)
        _save_model(folder / "model", [path.read_text() for path in sorted(documents.iterdir())])
        sizes = {"population": 8, "parents": 4, "mutants": 2, "crosses": 2, "generations": 3, "finalists": 2}
        sets = {"search": 2, "selection": 1, "test": 2}
        arguments = [f"--model={folder / 'model'}", f"--data={documents}", "--target=128", "--preset=paper"]
        arguments += [f"--{name}={number}" for name, number in sizes.items()]
        arguments += [f"--{part}-documents={number}" for part, number in sets.items()]
        return cls(folder, (*arguments, "--windows=search=1,selection=1,test=1", "--seed=5", "--n-hats=0,4,16"))


def _save_model(folder: Path, texts: list[str]) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.3,  # far from uniform predictions: rescale factors matter
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(11)
    LlamaForCausalLM(config).save_pretrained(folder)


class Study:
    """One study in a fresh database, over as many drivers as it takes."""

    def __init__(self, world: World, folder: Path, launch: tuple[str, ...] = ("--in-process",)) -> None:
        folder.mkdir()
        self.world = world
        self.folder = folder
        self.database = folder / "store.db"
        self.factors = folder / FACTORS
        self.cache = folder / "cache"
        self._launch = launch
        self._drivers = 0

    @property
    def url(self) -> str:
        return f"sqlite:///{self.database}"

    def next_command(self) -> list[str]:
        """What a user would type: ``resume`` where there is such a study, else ``launch``."""
        if self.status() is not None:
            return ["resume", NAME, f"--storage={self.url}"]
        launch = ["launch", f"--study={NAME}", f"--storage={self.url}", f"--out={self.folder}", *self._launch]
        return [*launch, *self.world.arguments]

    def start(self, moment: Moment | None = None) -> tuple[Any, Path]:
        """A driver, and the path of its log without its suffix."""
        self._drivers += 1
        stem = self.folder / f"driver{self._drivers}"
        environment = {"LONGROPE_CACHE": str(self.cache), "OMP_NUM_THREADS": "1"}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTS)
        process = context.Process(target=_drive, args=(self.next_command(), stem, moment, environment))
        process.start()
        return process, stem

    def run(self, moment: Moment | None = None, kill_after: float | None = None) -> Ended:
        """A driver from its start to its end; ``kill_after`` seconds it gets SIGKILL, if it still runs then."""
        began = time.monotonic()
        process, stem = self.start(moment)
        process.join(kill_after)
        if kill_after is not None:
            process.kill()
        process.join(120)
        seconds = time.monotonic() - began
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{stem} did not end: {_read(stem, 'out')}")
        return Ended(process.exitcode, seconds, _read(stem, "log").splitlines(), _read(stem, "out"))

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        if not self.database.exists():
            return []
        with closing(sqlite3.connect(self.database)) as connection:
            return connection.execute(query).fetchall()

    def _has_tables(self) -> bool:
        return bool(self._rows("SELECT 1 FROM sqlite_master WHERE name = 'longrope_studies'"))

    def status(self) -> str | None:
        """``running``, ``finished``, or None where the study was not written yet."""
        if not self._has_tables():
            return None
        rows = self._rows(f"SELECT status FROM longrope_studies WHERE name = '{NAME}'")
        return rows[0][0] if rows else None

    def stored(self) -> set[str]:
        """Keys of the evaluations that are stored."""
        if self.status() is None:
            return set()
        return {key for (key,) in self._rows("SELECT key FROM longrope_evaluations")}

    def trajectory(self) -> dict[str, Any]:
        """All that must not depend on how often the driver was killed."""
        place = "c.stage, c.part, c.generation, c.child"
        return {
            "candidates": self._rows(
                f"SELECT {place}, c.origin, c.lambdas, c.n_hat, c.attention_factor FROM longrope_candidates c "
                f"ORDER BY {place}"
            ),
            "units": self._rows(
                f"SELECT {place}, u.position, u.document_name, u.document_sha256, u.document_length, u.key, u.failure "
                f"FROM longrope_units u JOIN longrope_candidates c ON c.id = u.candidate_id "
                f"ORDER BY {place}, u.position"
            ),
            "evaluations": self._rows("SELECT key, nll, reason, tokens FROM longrope_evaluations ORDER BY key"),
            "study": self._rows("SELECT name, kind, profile, status, result FROM longrope_studies"),
            "factors": self.factors.read_bytes() if self.factors.exists() else None,
        }

    def orphans(self) -> list[tuple[Any, ...]]:
        """Rows that no other row explains, generations that lack rows, and what SQLite itself finds wrong."""
        damage = [row for row in self._rows("PRAGMA integrity_check") if row != ("ok",)]
        if not self._has_tables():
            return damage
        pairs = [
            ("longrope_candidates", "study_id", "longrope_studies", "id"),
            ("longrope_units", "candidate_id", "longrope_candidates", "id"),
            ("longrope_candidates", "id", "longrope_units", "candidate_id"),
            ("longrope_evaluations", '"key"', "longrope_units", '"key"'),
        ]
        for table, column, other, named in pairs:
            query = f"SELECT '{table}', {column} FROM {table} WHERE {column} NOT IN (SELECT {named} FROM {other})"
            damage += self._rows(query)
        return damage + self._rows("PRAGMA foreign_key_check")

    def lease(self) -> tuple[Any, ...] | None:
        """The row of the lease; None where there is no study yet."""
        rows = self._rows("SELECT lease_token, lease_owner FROM longrope_studies") if self.status() else []
        return rows[0] if rows else None


def _read(stem: Path, suffix: str) -> str:
    path = stem.with_suffix(f".{suffix}")
    return path.read_text() if path.exists() else ""


class _Probe:
    """Writes every label that a driver passes to its log, and stops the driver at the moment asked for."""

    def __init__(self, log: Path, moment: Moment | None) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._moment = moment
        self._seen = 0

    def __call__(self, label: str) -> None:
        os.write(self._log, f"{label}\n".encode())
        if self._moment is not None and fnmatch(label, self._moment.pattern):
            self._seen += 1
            if self._seen == self._moment.n:
                os.kill(os.getpid(), self._moment.signal)


def _drive(command: list[str], stem: Path, moment: Moment | None, environment: dict[str, str]) -> None:
    """The command ``longrope`` in this process, which nobody else is in."""
    os.setsid()
    os.environ.update(environment)
    # A test run in the background may ignore Ctrl-C; a driver in a terminal does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = os.open(stem.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, sys.stdout.fileno())
    os.dup2(out, sys.stderr.fileno())
    _install(_Probe(stem.with_suffix(".log"), moment))
    sys.argv = ["longrope", *command]
    import cli

    cli.main()


def _install(reached: _Probe) -> None:
    """Labels for SQL that writes, commits, files that appear, and evaluations before and after they are computed."""
    from sqlalchemy import Engine, event

    import searcher.study
    import workers.scorer

    last = ""

    @event.listens_for(Engine, "after_cursor_execute")
    def executed(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal last
        if not statement.startswith(("SELECT", "PRAGMA", "BEGIN")):
            last = " ".join(statement.split())[:80]
            reached(f"sql {last}")

    @event.listens_for(Engine, "commit")
    def committing(_connection: Any) -> None:
        reached(f"committing {last}")

    replace = Path.replace

    def replacing(self: Path, target: Path) -> Path:
        reached(f"replacing {Path(target).name}")
        result = replace(self, target)
        reached(f"replaced {Path(target).name}")
        return result

    place = ""
    score_generation, score_unit = searcher.study.score_generation, workers.scorer.score_unit

    def scoring_generation(part: str, generation: int, *rest: Any) -> Any:
        nonlocal place
        place = f"{part} {generation}"
        return score_generation(part, generation, *rest)

    def scoring_unit(loaded: Any, tokens: Any, key: str, *rest: Any) -> Any:
        reached(f"scoring {place} {key}")
        outcome = score_unit(loaded, tokens, key, *rest)
        reached(f"scored {place} {key}")
        return outcome

    Path.replace = replacing  # type: ignore[method-assign, assignment]
    searcher.study.score_generation = scoring_generation
    workers.scorer.score_unit = scoring_unit
