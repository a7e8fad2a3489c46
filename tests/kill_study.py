"""A tiny study driven by the real command in a process of its own, and ways to stop that process where it hurts.

Drivers are forked from a server that has imported what is large and computed nothing, so that one more driver costs
milliseconds, not the seconds that torch and transformers take to import.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import URL, NullPool, create_engine, make_url
from sqlalchemy import text as sql

from searcher.study import Document

NAME = "killed"
FACTORS = f"{NAME}-factors.json"
IN_PROCESS = "--in-process"
# A whole search in a second: 18 individuals in 3 generations, raced, with a refinement of one leg before and after.
SMALL_SEARCH = """
    --target=4x --seed=5 --preset=paper --n-hats=0,4,16 --finalists=2
    --population=8 --parents=2 --mutants=3 --crosses=2 --generations=2 --racing --racing-caution=0
    --refine-legs=1 --refine-final-legs=1 --refine-steps=3
    --search-documents=2 --selection-documents=1 --test-documents=2 --windows=search=1,selection=1,test=1
"""
# Nothing of ours: the server finds modules by its own path, which may lead to another copy than is tested.
IMPORTS = [
    "alembic.command",
    "rich.progress",
    "sqlalchemy.orm",
    "psycopg",
    "transformers.models.llama.modeling_llama",
    "typer",
]


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


class Study:
    """One study in a fresh database, over as many drivers as it takes: a search, or the extension of a plan file.

    Parameters
    ----------
    url: of a database on a server; None for a file in the folder.
    """

    def __init__(
        self, folder: Path, model: Path, text: Path, *more: str, plan: Path | None = None, url: str | None = None
    ) -> None:
        folder.mkdir()
        self.folder = folder
        self.database = folder / "store.db"
        self.url = url or f"sqlite:///{self.database}"
        self.factors = folder / FACTORS
        self.environment = {
            "LONGROPE_CACHE": str(folder / "cache"),
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parent),  # for Ray's workers, which meet _arrive
        }
        if url is not None:
            self.environment["LONGROPE_STORAGE"] = url
        self._begin = ["launch"] if plan is None else ["extend", str(plan)]
        settings = SMALL_SEARCH.split() if plan is None else []
        self._launch = [f"--model={model}", f"--data={text}", *settings, *more]
        self._drivers = 0

    def next_command(self) -> list[str]:
        """What a user would type: ``resume`` where there is such a study, else ``launch`` or ``extend``."""
        storage = [] if "LONGROPE_STORAGE" in self.environment else [f"--storage={self.url}"]
        if self.status() is not None:
            return ["resume", NAME, *storage]
        return [*self._begin, f"--study={NAME}", *storage, f"--out={self.folder}", *self._launch]

    def start(self, moment: Moment | None = None, then: Moment | None = None) -> tuple[Any, Path]:
        """A driver, and the path of its log without its suffix. ``then`` is looked for after ``moment``."""
        self._drivers += 1
        stem = self.folder / f"driver{self._drivers}"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTS)
        process = context.Process(target=_drive, args=(self.next_command(), stem, (moment, then), self.environment))
        process.start()
        return process, stem

    def run(self, moment: Moment | None = None, kill_after: float | None = None) -> Ended:
        """A driver from its start to its end; ``kill_after`` seconds it gets SIGKILL, if it still runs then."""
        began = time.monotonic()
        process, stem = self.start(moment)
        process.join(kill_after)
        if kill_after is not None:
            process.kill()
        process.join(240)
        seconds = time.monotonic() - began
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{stem} did not end: {_read(stem, 'out')}")
        return Ended(process.exitcode, seconds, _read(stem, "log").splitlines(), _read(stem, "out"))

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        if self._is_file and not self.database.exists():
            return []
        with create_engine(_with_driver(self.url), poolclass=NullPool).connect() as connection:
            return [tuple(row) for row in connection.execute(sql(query))]

    @property
    def _is_file(self) -> bool:
        return self.url.startswith("sqlite")

    def _has_tables(self) -> bool:
        tables = "sqlite_master WHERE name" if self._is_file else "information_schema.tables WHERE table_name"
        return bool(self._rows(f"SELECT 1 FROM {tables} = 'longrope_studies'"))

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
                f"SELECT {place}, c.origin, c.lambdas, c.n_hat, c.attention_factor, c.seen FROM longrope_candidates c "
                f"ORDER BY {place}"
            ),
            "units": self._rows(
                f"SELECT {place}, u.position, u.document_name, u.document_sha256, u.document_length, u.key, u.failure "
                f"FROM longrope_units u JOIN longrope_candidates c ON c.id = u.candidate_id "
                f"ORDER BY {place}, u.position"
            ),
            "evaluations": self._rows(
                "SELECT key, nll, reason, tokens, gradient FROM longrope_evaluations "
                "WHERE key IN (SELECT key FROM longrope_units) ORDER BY key"
            ),
            "study": self._rows("SELECT name, kind, profile, status, result FROM longrope_studies"),
            "factors": self.factors.read_bytes() if self.factors.exists() else None,
            "stages": self._rows(
                "SELECT stage, kind, settings, profile, status, result FROM longrope_stages ORDER BY stage"
            ),
            "training": self._rows("SELECT stage, step, name, value FROM longrope_training_logs ORDER BY 1, 2, 3"),
            "weights": {
                str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(self.folder.glob(f"{NAME}/**/*.safetensors"))
            },
        }

    def orphans(self) -> list[tuple[Any, ...]]:
        """Rows that no other row explains, generations that lack rows, and what SQLite itself finds wrong.

        With Ray workers an evaluation may be there before its unit is: spare work, that nobody has asked for yet.
        """
        damage = [row for row in self._rows("PRAGMA integrity_check") if row != ("ok",)] if self._is_file else []
        if not self._has_tables():
            return damage
        pairs = [
            ("longrope_candidates", "study_id", "longrope_studies", "id"),
            ("longrope_units", "candidate_id", "longrope_candidates", "id"),
            ("longrope_candidates", "id", "longrope_units", "candidate_id"),
        ]
        if IN_PROCESS in self._launch:
            pairs.append(("longrope_evaluations", '"key"', "longrope_units", '"key"'))
        for table, column, other, named in pairs:
            query = f"SELECT '{table}', {column} FROM {table} WHERE {column} NOT IN (SELECT {named} FROM {other})"
            damage += self._rows(query)
        return damage + (self._rows("PRAGMA foreign_key_check") if self._is_file else [])

    def lease(self) -> tuple[Any, ...] | None:
        """The row of the lease; None where there is no study yet."""
        rows = self._rows("SELECT lease_token, lease_owner FROM longrope_studies") if self.status() else []
        return rows[0] if rows else None

    def processes(self) -> list[psutil.Process]:
        """Drivers that live, and all that they have started."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.cwd() == str(self.folder):
                    found.append(process)
        return found


def _with_driver(url: str) -> URL:
    parsed = make_url(url)
    return parsed.set(drivername="postgresql+psycopg") if parsed.drivername == "postgresql" else parsed


def _read(stem: Path, suffix: str) -> str:
    path = stem.with_suffix(f".{suffix}")
    return path.read_text() if path.exists() else ""


def _append(log: str, label: str) -> None:
    """One line at once, and none that is lost with its writer."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"{label}\n".encode())
    os.close(file)


@dataclass(frozen=True)
class _Announcing(Document):
    """Ray's workers compute in other processes; sent there, this document tells the log that it has arrived."""

    log: str = ""
    label: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        document = Document(self.name, self.sha256, self.length, self.spans, self.greedy)
        return _arrive, (self.log, f"scoring {self.label}", document)


def _arrive(log: str, label: str, document: Document) -> Document:
    _append(log, label)
    return document


class _Probe:
    """Writes every label that a driver passes to its log, and stops the driver at the moments asked for."""

    def __init__(self, log: Path, moments: Sequence[Moment | None]) -> None:
        self.log = str(log)
        self._moments = [moment for moment in moments if moment is not None]
        self._seen = 0

    def __call__(self, label: str) -> None:
        _append(self.log, label)
        if self._moments and fnmatch(label, self._moments[0].pattern):
            self._seen += 1
            if self._seen == self._moments[0].n:
                self._seen = 0
                os.kill(os.getpid(), self._moments.pop(0).signal)


def _drive(command: list[str], stem: Path, moments: Sequence[Moment | None], environment: dict[str, str]) -> None:
    """The command ``longrope`` in this process, which nobody else is in."""
    os.setsid()
    os.chdir(stem.parent)  # Study.processes knows them by it
    for name in [name for name in os.environ if name.startswith(("LONGROPE_", "RAY_"))]:
        del os.environ[name]
    os.environ.update(environment)
    # A test run in the background may ignore Ctrl-C; a driver in a terminal does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = os.open(stem.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, sys.stdout.fileno())
    os.dup2(out, sys.stderr.fileno())
    _install(_Probe(stem.with_suffix(".log"), moments))
    sys.argv = ["longrope", *command]
    import cli

    cli.main()


def _install(reached: _Probe) -> None:
    """Labels for SQL that writes, commits, files that appear, races, and evaluations before and after computing them.

    What is written of a generation ends in ``@`` and the generation.
    """
    from sqlalchemy import Engine, event

    import commands.extension_stages as extension_stages
    import commands.runs as runs
    import searcher.racing
    import searcher.search
    import workers.scorer

    last = place = ""

    @event.listens_for(Engine, "after_cursor_execute")
    def executed(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal last
        if not statement.startswith(("SELECT", "PRAGMA", "BEGIN", "SET")):
            last = f"{' '.join(statement.split())[:80]} @ {place}"
            reached(f"sql {last}")

    @event.listens_for(Engine, "commit")
    def committing(_connection: Any) -> None:
        reached(f"committing {last}")

    replace_file, rename = Path.replace, Path.rename

    def replacing(self: Path, target: Path) -> Path:
        reached(f"replacing {Path(target).name}")
        result = replace_file(self, target)
        reached(f"replaced {Path(target).name}")
        return result

    def renaming(self: Path, target: Path) -> Path:
        reached(f"renaming {Path(target).name}")
        result = rename(self, target)
        reached(f"renamed {Path(target).name}")
        return result

    score_generation, score_gradients = searcher.search.score_generation, searcher.search.score_gradients
    score_unit, open_scorer = workers.scorer.score_unit, runs.open_scorer

    def at_its_place(function: Any) -> Any:
        def scoring_generation(part: str, generation: int, *rest: Any) -> Any:
            nonlocal place
            place = f"{part} {generation}"
            return function(part, generation, *rest)

        return scoring_generation

    def announcing(kept: Any) -> Any:
        def racing(self: Any, losses: Any) -> Any:
            reached(f"racing {place}")
            result = kept(self, losses)
            reached(f"raced {place}: {sum(result)} of {len(result)} go on")
            return result

        return racing

    def scoring_unit(loaded: Any, tokens: Any, unit: Any) -> Any:
        reached(f"scoring {place} {unit.key}")
        outcome = score_unit(loaded, tokens, unit)
        reached(f"scored {place} {unit.key}")
        return outcome

    @contextmanager
    def opening_scorer(request: Any, tokens: Any, pool: Any, *more: Any) -> Iterator[Any]:
        reached("loading")
        with open_scorer(request, tokens, pool, *more) as scorer:
            if pool is not None:
                scorer.evaluate = partial(evaluating, scorer.evaluate)
            yield scorer

    def announced(unit: Any) -> Any:
        document = unit.document
        there = (document.name, document.sha256, document.length, document.spans, document.greedy)
        return replace(unit, document=_Announcing(*there, log=reached.log, label=f"{place} {unit.key}"))

    def evaluating(evaluate: Any, units: Any, spare: Any = ()) -> Iterator[Any]:
        for outcome in evaluate([announced(unit) for unit in units], [announced(unit) for unit in spare]):
            reached(f"scored {place} {outcome.key}")
            yield outcome

    patched: list[tuple[Any, str, Any]] = [
        (Path, "replace", replacing),
        (Path, "rename", renaming),
        (extension_stages, "score_generation", at_its_place(score_generation)),
        (searcher.search, "score_generation", at_its_place(score_generation)),
        (searcher.search, "score_gradients", at_its_place(score_gradients)),
        *((race, "kept", announcing(race.kept)) for race in (searcher.racing.Race, searcher.racing.Cut)),
        (workers.scorer, "score_unit", scoring_unit),
        (runs, "open_scorer", opening_scorer),
    ]
    for owner, name, function in patched:
        setattr(owner, name, function)
