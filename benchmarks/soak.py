"""A long study on PostgreSQL and several Ray nodes, through faults of all kinds at random; what each of them cost.

``python benchmarks/soak.py --faults 300`` writes soak.json and soak.md. Every fault waits until the study computes with
all of its workers again, which is what it cost in seconds; then the next comes. At the end the study is left in peace,
and its factor file, candidates and values must be those of a run in one process that nothing happened to.

In every second study workers also return wrong values that look right. What was built upon before they are found out
stays, so such a study must be the one that a run in one process makes of the values in its store.

What it has seen is kept under ``--work``: the same command again goes on counting, with a new study.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import secrets
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import create_engine, text

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),  # a driver imports this file anew
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_raylet_start_wait_time_s": "180",
    "OMP_NUM_THREADS": "1",
}

NAME = "soak"
SEARCH = """
    --target=4x --seed=5 --preset=paper --n-hats=0,4,16 --finalists=2 --threads=1
    --population=16 --parents=6 --mutants=8 --crosses=4 --racing --racing-caution=0
    --refine-legs=1 --refine-final-legs=1 --refine-steps=3
    --search-documents=2 --selection-documents=1 --test-documents=2 --windows=search=1,selection=1,test=1
"""
IMPORTS = ["alembic.command", "rich.progress", "sqlalchemy.orm", "transformers.models.llama.modeling_llama", "typer"]
PACE = 0.35  # seconds that an evaluation takes longer while there are faults to come
HANG_AFTER = 3.0  # --time-limit
PATIENCE = 120.0  # seconds for a study to compute again
NODES = 3  # at most, of one core each
AUDIT_EVERY = 1  # where workers lie: idle ones look at whatever they can
READ_ONLY = "ALTER DATABASE {} SET default_transaction_read_only = {}"


def faulty(folder: str) -> Any:
    """A worker that carries out what lies in a folder as files, one a score or start; and logs what it starts."""
    from workers.actor import Worker

    class Faulty(Worker):
        def _order(self, moment: str) -> str:
            for order in sorted(Path(folder, "orders").glob(f"{moment}-*")):
                taken = Path(folder, "taken", f"{order.name}-{os.getpid()}")
                with suppress(OSError):  # another worker was faster
                    order.rename(taken)
                    return order.name.split("-")[1]
            return ""

        def start(self, *arguments: Any) -> Any:
            from dataclasses import replace

            info = super().start(*arguments)
            return replace(info, probe=info.probe + 1e-9) if self._order("start") else info

        def score(self, unit: Any) -> Any:
            from dataclasses import replace

            with Path(folder, "scores").open("a") as log:
                log.write(f"{time.time():.3f} {os.getpid()} {unit.key}\n")
            order = self._order("score")
            if order == "memory":
                raise MemoryError
            if order == "hang":
                time.sleep(3600)
            if order == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if order == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            began = time.perf_counter()
            outcome = super().score(unit)
            time.sleep(float(Path(folder, "pace").read_text()))
            outcome = replace(outcome, seconds=time.perf_counter() - began)
            if order == "garbage":
                return None
            if order == "lie":
                self._lies = True
            if order == "wrong" or getattr(self, "_lies", False):
                with Path(folder, "lies").open("a") as log:
                    log.write(f"{unit.key}\n")
                return replace(outcome, nll=outcome.nll * (1 - 2**-20))
            if order == "tokens":
                return replace(outcome, tokens=1)
            if order == "nan":
                return replace(outcome, nll=float("nan"), failure="the loss is nan")
            return outcome

    return Faulty


def drive(command: list[str], folder: Path, log: Path, ray_workers: bool) -> None:
    """The command ``longrope`` in this process, which nobody else is in."""
    os.setsid()
    os.chdir(folder)
    os.environ |= {"LONGROPE_CACHE": str(folder / "cache"), "HOME": str(folder)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, sys.stdout.fileno())
    os.dup2(out, sys.stderr.fileno())
    sys.argv = ["longrope", *command]
    if ray_workers:
        import ray

        import workers.crew
        import workers.pool

        workers.pool.AUDIT_EVERY = AUDIT_EVERY
        worker = faulty(str(folder))
        workers.crew.create_worker = lambda cpus, gpus: ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0
        )(worker).remote()
    import cli

    cli.main()


def start_driver(command: list[str], folder: Path, log: Path, ray_workers: bool = True) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    process = context.Process(target=drive, args=(command, folder, log, ray_workers))
    process.start()
    return process


@dataclass
class Fault:
    """One fault and what it cost. ``seconds``: until all workers computed again; None where that took too long."""

    kind: str
    seconds: float | None
    repeated: int
    driver_again: bool


class TooLate(Exception):
    """The study was finished before the fault could happen."""


class Scores:
    """What the workers have started, as far as their log was read."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0
        self.lines: list[tuple[float, int, str]] = []
        self.seen: set[str] = set()
        self.repeated = 0

    def look(self) -> None:
        if not self._path.exists():
            return
        with self._path.open() as log:
            log.seek(self._read)
            data = log.read()
        whole = data[: data.rfind("\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            moment, pid, key = line.split()
            self.repeated += key in self.seen
            self.seen.add(key)
            self.lines.append((float(moment), int(pid), key))

    def workers_since(self, moment: float) -> set[int]:
        """Processes alive that have started an evaluation since."""
        found = set()
        for started, pid, _ in reversed(self.lines):
            if started < moment:
                break
            found.add(pid)
        return {pid for pid in found if psutil.pid_exists(pid)}


def trajectory(url: str) -> dict[str, list[Any]]:
    """All that must not depend on what happened."""
    queries = {
        "candidates": "SELECT stage, part, generation, child, origin, lambdas, n_hat, attention_factor, seen "
        "FROM longrope_candidates ORDER BY stage, part, generation, child",
        "evaluations": "SELECT key, nll, reason, tokens, gradient FROM longrope_evaluations "
        "WHERE key IN (SELECT key FROM longrope_units) ORDER BY key",
    }
    engine = create_engine(url)
    with engine.connect() as connection:
        found = {name: [tuple(row) for row in connection.execute(text(query))] for name, query in queries.items()}
    engine.dispose()
    for rows in found.values():
        rows[:] = [tuple(json.loads(v) if isinstance(v, str) and v[:1] in "[{" else v for v in row) for row in rows]
    return found


class Soak:
    """One study, its cluster and its database, and the faults that befall them."""

    def __init__(self, draw: random.Random) -> None:
        from postgres_server import Server
        from ray.cluster_utils import Cluster

        self._draw = draw
        self.server = Server()
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]
        self.driver: Any = None

    def begin(self, folder: Path, options: list[str], lies: bool) -> None:
        """A new study, in a new database; ``lies``: its workers may return wrong values that look right."""
        self.folder, self._options, self.lies = folder, options, lies
        for name in ("orders", "taken"):
            (folder / name).mkdir(parents=True)
        (folder / "pace").write_text(str(PACE))
        self.url = self.server.new_database()
        names = [str(name) for (name,) in self.server.execute("SELECT datname FROM pg_database ORDER BY oid")]
        self.database = names[-1]
        self.scores = Scores(folder / "scores")
        self.began_again = False
        self._known: str | None = None
        self._orders = 0
        self.driver = None
        self.go_on()

    def close(self) -> None:
        if self.driver is not None and self.driver.is_alive():
            self.driver.kill()
            self.driver.join()
        self.cluster.shutdown()
        self.server.close()

    def status(self) -> str | None:
        """``running``, ``finished``, or None where there is no such study yet."""
        with suppress(Exception):  # no tables yet, or no server
            rows = self.server.execute(f"SELECT status FROM longrope_studies WHERE name = '{NAME}'", self.database)
            self._known = str(rows[0][0]) if rows else None
        return self._known

    def go_on(self) -> None:
        """A driver, where none is alive and the study is not finished."""
        if self.driver is not None and self.driver.is_alive():
            return
        status = self.status()
        if status == "finished":
            return
        cluster = [f"--ray-address={self.cluster.address}", f"--storage={self.url}"]
        limit = f"--time-limit={HANG_AFTER}"
        command = ["resume", NAME, *cluster] if status else ["launch", f"--study={NAME}", *cluster, *self._options]
        self.driver = start_driver([*command, limit], self.folder, self.folder / "driver.log")
        self.began_again = True

    def order(self, what: str) -> None:
        """Have a worker do this, at its next score or start."""
        self._orders += 1
        moment = "start" if what == "probe" else "score"
        (self.folder / "orders" / f"{moment}-{what}-{self._orders:04}").touch()

    def taken(self) -> int:
        return len(list((self.folder / "taken").iterdir()))

    def wait(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Wait, and keep a driver alive."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            self.go_on()
            time.sleep(0.1)
        return True

    def computes(self, since: float) -> bool:
        """Whether every core of the cluster has begun an evaluation since, or the study is finished."""
        self.scores.look()
        if len(self.scores.workers_since(since)) >= len(self.nodes):
            return True
        return self.ended()

    def ended(self) -> bool:
        return not self.driver.is_alive() and self.driver.exitcode == 0

    def befall(self, kind: str) -> Fault:
        """One fault; returns when the study computes on all cores again.

        Raises
        ------
        TooLate
            The study was finished before.
        """
        self.scores.look()
        repeated, self.began_again, began = self.scores.repeated, False, time.time()
        getattr(self, f"_{kind}")()
        after = time.time()
        recovered = self.wait(lambda: self.computes(after))
        return Fault(
            kind,
            round(time.time() - began, 2) if recovered else None,
            self.scores.repeated - repeated,
            self.began_again,
        )

    def _by_order(self, what: str) -> None:
        before = self.taken()
        self.order(what)
        self.wait(lambda: self.taken() > before or self.ended())
        if self.taken() == before:
            raise TooLate

    def _driver_killed(self) -> None:
        self.driver.kill()
        self.driver.join()

    def _driver_terminated(self) -> None:
        self.driver.terminate()
        self.driver.join(60)

    def _driver_stopped(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.driver.pid, signal.SIGSTOP)
            time.sleep(HANG_AFTER + 2)
            os.kill(self.driver.pid, signal.SIGCONT)

    def _second_driver(self) -> None:
        command = ["resume", NAME, f"--storage={self.url}", "--in-process"]
        second = start_driver(command, self.folder, self.folder / "second.log", False)
        second.join(60)
        if second.exitcode != 1 and self.status() != "finished":
            raise RuntimeError(f"a second driver was not refused: {second.exitcode}")

    def _worker_killed(self) -> None:
        self._by_order("die")

    def _worker_out_of_memory(self) -> None:
        self._by_order("memory")

    def _worker_hangs(self) -> None:
        self._by_order("hang")
        time.sleep(HANG_AFTER)

    def _worker_stopped(self) -> None:
        self._by_order("stop")
        time.sleep(HANG_AFTER)

    def _garbage_nothing(self) -> None:
        self._by_order("garbage")

    def _garbage_tokens(self) -> None:
        self._by_order("tokens")

    def _garbage_nan(self) -> None:
        self._by_order("nan")

    def _wrong_once(self) -> None:
        self._by_order("wrong")

    def _wrong_from_now_on(self) -> None:
        """Until it is found out, or something else ends it."""
        self._by_order("lie")

    def _new_worker_wrong(self) -> None:
        """A worker dies, and the one in its place computes something else."""
        self.order("probe")
        self._by_order("die")

    def _node_killed(self) -> None:
        node = self.nodes.pop(self._draw.randrange(len(self.nodes)))
        self.cluster.remove_node(node, allow_graceful=False)

    def _node_joins(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1))

    def _database_killed(self) -> None:
        self.server.kill()
        time.sleep(self._draw.uniform(0, 2))
        self.server.start()

    def _connections_cut(self) -> None:
        self.server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            f"WHERE datname = '{self.database}' AND pid <> pg_backend_pid()"
        )

    def _table_locked(self) -> None:
        self.server.execute(
            "DO $$ BEGIN LOCK TABLE longrope_evaluations IN ACCESS EXCLUSIVE MODE; PERFORM pg_sleep(2); END $$",
            self.database,
        )

    def _disk_full(self) -> None:
        """What hosted databases do when their disk is full: they take no more writes."""
        self.server.execute(READ_ONLY.format(self.database, "on"))
        try:
            self._connections_cut()
            time.sleep(1.5)
        finally:
            self.server.execute(READ_ONLY.format(self.database, "off"))
            self._connections_cut()

    def next_kind(self) -> str:
        """A kind that can happen now."""
        kinds = [name[1:] for name in vars(Soak) if name in KINDS]
        if len(self.nodes) == 1:
            kinds.remove("node_killed")
        if len(self.nodes) == NODES:
            kinds.remove("node_joins")
        return self._draw.choice([kind for kind in kinds if self.lies or kind not in LIES])


KINDS = {
    "_driver_killed": "driver killed (SIGKILL)",
    "_driver_terminated": "driver asked to stop (SIGTERM)",
    "_driver_stopped": "driver suspended for 5 s, then goes on",
    "_second_driver": "a second driver on the same study: refused",
    "_worker_killed": "worker killed (SIGKILL)",
    "_worker_out_of_memory": "worker out of memory (MemoryError)",
    "_worker_hangs": "worker hangs in an evaluation",
    "_worker_stopped": "worker's process suspended for good",
    "_garbage_nothing": "worker returns an object of another type",
    "_garbage_tokens": "worker returns a wrong number of tokens",
    "_garbage_nan": "worker returns NaN where the loss is finite",
    "_wrong_once": "worker returns a wrong finite value once",
    "_wrong_from_now_on": "worker returns wrong finite values until it is found out",
    "_new_worker_wrong": "worker killed, its replacement computes wrong values",
    "_node_killed": "node killed",
    "_node_joins": "node joins",
    "_database_killed": "PostgreSQL killed (SIGKILL), back within 2 s",
    "_connections_cut": "all connections to PostgreSQL cut",
    "_table_locked": "table locked for 2 s",
    "_disk_full": "PostgreSQL refuses writes for 1.5 s, as on a full disk",
}


LIES = ("wrong_once", "wrong_from_now_on")


def replayed(folder: Path, url: str, options: list[str]) -> tuple[dict[str, list[Any]], bytes]:
    """The study that a run in one process makes of the values in a store."""
    from sqlalchemy import insert, select

    from storage.models import Evaluation
    from storage.repository import Repository

    folder.mkdir()
    copy = f"sqlite:///{folder / 'store.db'}"
    Repository(copy).close()
    source, target = create_engine(url), create_engine(copy)
    with source.connect() as theirs, target.begin() as ours:
        rows = [dict(row) for row in theirs.execute(select(Evaluation.__table__)).mappings()]
        ours.execute(insert(Evaluation.__table__), rows)
    source.dispose()
    target.dispose()
    return in_one_process(folder, copy, options)


def in_one_process(folder: Path, url: str, options: list[str]) -> tuple[dict[str, list[Any]], bytes]:
    """What the study comes to without Ray, in this store."""
    own = [option for option in options if not option.startswith("--out")]
    command = ["launch", f"--study={NAME}", f"--storage={url}", "--in-process", f"--out={folder}", *own]
    driver = start_driver(command, folder, folder / "driver.log", False)
    driver.join()
    if driver.exitcode != 0:
        raise RuntimeError((folder / "driver.log").read_text())
    return trajectory(url), (folder / f"{NAME}-factors.json").read_bytes()


def undisturbed(folder: Path, options: list[str]) -> tuple[dict[str, list[Any]], bytes, float]:
    """The same study in one process, in SQLite."""
    url = f"sqlite:///{folder / 'store.db'}"
    factors, made_with = folder / f"{NAME}-factors.json", folder / "options"
    if made_with.exists() and made_with.read_text() == str(options):
        return trajectory(url), factors.read_bytes(), 0.0
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    began = time.monotonic()
    found = in_one_process(folder, url, options)
    made_with.write_text(str(options))
    return *found, time.monotonic() - began


@contextmanager
def opened(soak: Soak) -> Iterator[Soak]:
    try:
        yield soak
    finally:
        soak.close()


def report(results: dict[str, Any]) -> str:
    """The table."""
    faults = [Fault(**fault) for fault in results["faults"]]
    lines = [
        f"{len(faults)} faults, {results['studies']} x a study of {results['evaluations']} evaluations on PostgreSQL, "
        f"{results['minutes']:.0f} minutes; Ray nodes: 1 to {NODES}, of a worker each.",
        "",
        f"Studies that ended with the factor file, the candidates and the values of an untroubled run: "
        f"{results['equal']} of {results['ended'] - results['with_lies']}.",
        "",
        f"Studies whose workers returned {results['lies']} wrong values that look right: {results['with_lies']}. Of "
        f"these, {results['consistent']} are what a run in one process makes of the values in their store, and "
        f"{results['healed']} ended as the untroubled run.",
        "",
        "| fault | times | seconds until all workers compute again: median | most | evaluations started again | "
        "driver started again |",
        "|---|---|---|---|---|---|",
    ]
    for attribute, words in KINDS.items():
        mine = [fault for fault in faults if f"_{fault.kind}" == attribute]
        seconds = [fault.seconds for fault in mine if fault.seconds is not None]
        if mine:
            late = "" if len(seconds) == len(mine) else f" ({len(mine) - len(seconds)} beyond {PATIENCE:.0f} s)"
            median, most = (f"{f(seconds):.1f}" if seconds else "-" for f in (statistics.median, max))
            lines.append(
                f"| {words} | {len(mine)} | {median} | {most}{late} | {sum(f.repeated for f in mine)} | "
                f"{sum(f.driver_again for f in mine)} |"
            )
    total = sum(fault.seconds or PATIENCE for fault in faults)
    lines += [
        f"| all | {len(faults)} | {total / max(1, len(faults)):.1f} (mean) | | {sum(f.repeated for f in faults)} | "
        f"{sum(f.driver_again for f in faults)} |",
        "",
        "A driver or worker process that starts imports torch and transformers; that is most of what its loss costs. "
        "Evaluations started again include those that are computed twice to check a worker.",
        "",
        f"`python benchmarks/soak.py {results['arguments']}` on {results['machine']} with a load average of "
        f"{results['load_average']:.0f} in the last quarter of an hour, Python {results['python']}, Ray "
        f"{results['ray']}, PostgreSQL {results['postgresql']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=1440.0, help="No further fault after this time.")
    parser.add_argument("--generations", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", help="Only these, one after the other.")
    parser.add_argument("--work", type=Path, default=Path("build/soak"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    work, began = args.work.resolve(), time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    import ray
    from tiny_models import write_model

    draw = random.Random(7)
    model, books = work / "model", work / "books"
    if not model.exists():
        write_model(model, "llama")
        books.mkdir(exist_ok=True)
        words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(60)]
        for number in range(9):
            (books / f"{number}.txt").write_text(" ".join(draw.choices(words, k=700))[:700])
    kept = work / "state.json"
    state = json.loads(kept.read_text()) if kept.exists() else {"faults": [], "studies": 0, "ended": 0, "equal": 0}
    state = {"minutes": 0.0, "with_lies": 0, "lies": 0, "consistent": 0, "healed": 0, **state}
    before = state["minutes"]
    options = [f"--model={model}", f"--data={books}", f"--generations={args.generations}", *SEARCH.split()]
    expected, factors, seconds = undisturbed(work / "undisturbed", options)
    print(f"undisturbed, in one process: {len(expected['evaluations'])} evaluations, {seconds:.0f} s", flush=True)
    draw = random.Random(args.seed + state["studies"])

    def more() -> bool:
        return len(state["faults"]) < args.faults and time.monotonic() - began < 60 * args.minutes

    with opened(Soak(draw)) as soak:
        while more():
            state["studies"] += 1
            folder = work / f"study{state['studies']}"
            shutil.rmtree(folder, ignore_errors=True)
            soak.begin(folder, [*options, f"--out={folder}"], state["studies"] % 2 == 0 or bool(args.kinds))
            (version,) = soak.server.execute("SHOW server_version")[0]
            start = time.time()
            soak.wait(lambda: soak.computes(start), 600)  # noqa: B023
            while more() and soak.status() != "finished":
                named = args.kinds and args.kinds[len(state["faults"]) % len(args.kinds)]
                kind = named or soak.next_kind()
                try:
                    fault = soak.befall(kind)
                except TooLate:
                    break
                state["faults"].append(asdict(fault))
                state["minutes"] = before + (time.monotonic() - began) / 60
                kept.write_text(json.dumps(state))
                print(f"{len(state['faults'])}: {asdict(fault)}", flush=True)
                time.sleep(draw.uniform(0.0, 0.5))
            (folder / "pace").write_text("0")
            if not soak.wait(lambda: soak.status() == "finished", 900):
                raise RuntimeError("the study did not come to its end")
            soak.driver.join(60)
            state["ended"] += 1
            url = soak.url.replace("postgresql:", "postgresql+psycopg:")
            became = trajectory(url), (folder / f"{NAME}-factors.json").read_bytes()
            lied = len((folder / "lies").read_text().split()) if (folder / "lies").exists() else 0
            same = became == (expected, factors)
            if lied:
                state["with_lies"] += 1
                state["lies"] += lied
                state["healed"] += same
                same = became == replayed(folder / "replay", url, options)
                state["consistent"] += same
            else:
                state["equal"] += same
            kept.write_text(json.dumps(state))
            print(f"study {state['studies']}: {'as it should be' if same else 'NOT AS IT SHOULD BE'}", flush=True)
    results = {
        **state,
        "arguments": f"--faults {args.faults} --minutes {args.minutes:g} --generations {args.generations}",
        "load_average": os.getloadavg()[2],
        "evaluations": len(expected["evaluations"]),
        "machine": f"{os.cpu_count()} shared cores, {platform.machine()}",
        "python": platform.python_version(),
        "ray": ray.__version__,
        "postgresql": str(version),
    }
    (args.out / "soak.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "soak.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
