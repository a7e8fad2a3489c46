"""How busy a search keeps its workers: simulated ones, everything else real.

    .venv/bin/python benchmarks/idle_time.py --out benchmarks/results

The pool, the search loop and the store (SQLite on this machine's disk) are the real ones. A worker is a slot of an
async Ray actor, and an evaluation sleeps: in proportion to the document's length, which is log-normal over documents,
times log-normal noise that depends on the evaluation's key alone. Losses are the distance of ln lambda to an optimum.

For every number of workers, with spare work off and on: the sum over generations of max(total / workers, longest
evaluation), over the wall time of scoring. Then what an evaluation costs the driver, from evaluations that take no
time. Last, without Ray: what a lagged mode could gain and lose, where the next generation's parents lack the slowest
tenth of the results. Writes idle_time.json and a table beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import heapq
import json
import math
import os
import platform
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # a process a slot is what this is to avoid

import ray
from sqlalchemy import create_engine, text

from searcher.baselines import BASELINES
from searcher.evolution import Evolution, State, ask, tell
from searcher.rope import RopeSpec
from searcher.search import SearchPlan, run_search
from searcher.space import Individual, SearchSpace
from searcher.study import Document, Outcome, Scorer, Silent, Unit
from storage.repository import Repository
from workers.model import ModelInfo, ModelRequest
from workers.pool import RayScorer
from workers.scorer import PoolRequest

SLOTS = 64  # of an actor
LENGTHS_SIGMA = 0.5  # of ln length over documents
NOISE_SIGMA = 0.25  # of ln seconds over evaluations on one document
SPEC = RopeSpec(10_000.0, 32, 4096, 2)
SCALE = 8.0
BASELINE_FACTORS = {name: BASELINES[name](SPEC, SCALE) for name in ("none", "pi", "ntk", "yarn")}
SEEDS = {name: BASELINE_FACTORS[name] for name in ("pi", "ntk", "yarn")}
SPACE = SearchSpace.for_scale(SPEC.pairs, SCALE, n_hats=(0,))
OPTIMUM = [1 + (SCALE - 1) * (pair / (SPEC.pairs - 1)) ** 2 for pair in range(SPEC.pairs)]
LAG = 0.1

GENERATIONS = """
SELECT DISTINCT c.part, c.generation, e.key, e.seconds FROM longrope_candidates c
JOIN longrope_units u ON u.candidate_id = c.id JOIN longrope_evaluations e ON e.key = u.key
ORDER BY c.part = 'test', c.part = 'selection', c.generation
"""


@dataclass(frozen=True)
class Load:
    """One case: so many workers, a search of so many documents, and seconds a mean evaluation."""

    workers: int
    documents: int
    seconds: float
    generations: int


LOADS = [Load(8, 5, 1.0, 2), Load(64, 20, 2.0, 2), Load(256, 80, 4.0, 2), Load(256, 5, 4.0, 4)]


def loss(lambdas: Sequence[float]) -> float:
    """Nats a token."""
    return 2 + statistics.fmean((math.log(a) - math.log(b)) ** 2 for a, b in zip(lambdas, OPTIMUM, strict=True))


def noise(key: str) -> float:
    """Log-normal with mean 1, by the key alone."""
    return random.Random(key).lognormvariate(-(NOISE_SIGMA**2) / 2, NOISE_SIGMA)


class Simulated:
    """An actor of many slots, each a worker that sleeps."""

    def __init__(self, seconds_a_token: float) -> None:
        self._seconds_a_token = seconds_a_token

    async def node(self) -> str:
        node: str = ray.get_runtime_context().get_node_id()
        return node

    async def start(self, request: ModelRequest, tokens: object, weights: object) -> ModelInfo:  # noqa: ARG002
        return ModelInfo("0" * 64, {"device": "simulated"}, SPEC, None, "half-split")

    async def share(self, room: float) -> None: ...

    async def score(self, unit: Unit) -> Outcome:
        seconds = self._seconds_a_token * unit.document.length * noise(unit.key)
        if seconds:
            await asyncio.sleep(seconds)
        (lambdas,) = unit.factors.by_layer()
        count = unit.document.length - 1
        return Outcome(unit.key, count * loss(lambdas), count, seconds)


@dataclass(frozen=True)
class WithoutSpare:
    """The same workers, idle where they have no unit."""

    scorer: Scorer

    @property
    def fingerprint(self) -> str:
        return self.scorer.fingerprint

    def evaluate(self, units: Sequence[Unit], spare: Sequence[Unit] = ()) -> Iterator[Outcome]:  # noqa: ARG002
        return self.scorer.evaluate(units)

    def built_upon(self, keys: Collection[str]) -> None:
        self.scorer.built_upon(keys)


class Stopwatch(Silent):
    """Wall time from a generation's first unit to its last."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.computed = 0
        self._started = 0.0

    def generation_started(self, part: str, generation: int, units: int, pending: int) -> None:  # noqa: ARG002
        self._started = time.perf_counter()

    def evaluated(self, outcome: Outcome) -> None:  # noqa: ARG002
        self.computed += 1

    def generation_finished(self, part: str, generation: int, best: object, score: object) -> None:  # noqa: ARG002
        self.seconds += time.perf_counter() - self._started


def documents_of(count: int) -> dict[str, list[Document]]:
    """Three sets, of half as many selection and test documents; the mean length is near 8192."""
    draw = random.Random(count)
    sets = {}
    for part, size in (("search", count), ("selection", max(2, count // 2)), ("test", max(2, count // 2))):
        lengths = [round(8192 * draw.lognormvariate(-(LENGTHS_SIGMA**2) / 2, LENGTHS_SIGMA)) for _ in range(size)]
        names = [f"{part}{number}" for number in range(size)]
        sets[part] = [
            Document(name, hashlib.sha256(name.encode()).hexdigest(), length)
            for name, length in zip(names, lengths, strict=True)
        ]
    return sets


def search(load: Load, scorer: Scorer, documents: Mapping[str, Sequence[Document]], folder: Path) -> dict[str, Any]:
    """One study from its start to its end, in a store of its own."""
    url = f"sqlite:///{folder / 'store.db'}"
    repository = Repository(url)
    repository.create_study("idle", "search", {})
    plan = SearchPlan(
        Evolution(generations=load.generations), SPACE, 1.0, SEEDS, BASELINE_FACTORS, all_seeds_final=False
    )
    watch = Stopwatch()
    cpu, wall = time.process_time(), time.perf_counter()
    with repository.open_study("idle") as store:
        result = run_search(plan, documents, scorer, store, watch)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    repository.close()
    with create_engine(url).connect() as connection:
        rows = connection.execute(text(GENERATIONS)).all()
    allowed = work = 0.0
    seen: set[str] = set()
    by_generation: dict[tuple[str, int], list[float]] = {}
    for part, generation, key, seconds in rows:
        if key not in seen:
            by_generation.setdefault((part, generation), []).append(seconds)
            seen.add(key)
    for seconds in by_generation.values():
        allowed += max(sum(seconds) / load.workers, max(seconds))
        work += sum(seconds)
    return {
        "evaluations": len(seen),
        "scoring_seconds": round(watch.seconds, 2),
        "allowed_seconds": round(allowed, 2),
        "of_what_the_work_allows": round(allowed / watch.seconds, 4),
        "of_all_worker_time": round(work / load.workers / watch.seconds, 4),
        "units_asked_and_computed": watch.computed,
        "driver_cpu_ms_an_evaluation": round(1000 * cpu / len(seen), 2),
        "outside_scoring_seconds": round(wall - watch.seconds, 2),
        "winner": hashlib.sha256(result.winner.factors.to_bytes()).hexdigest()[:12],
    }


def with_workers(load: Load, spare: bool) -> dict[str, Any]:
    """A search on a pool of simulated workers."""
    documents = documents_of(load.documents)
    lengths = [document.length for part in documents.values() for document in part]
    seconds_a_token = load.seconds / statistics.fmean(lengths)
    actors: list[Any] = []

    def create(number: int) -> Any:
        if number % SLOTS == 0:
            slots = ray.remote(num_cpus=0, max_concurrency=SLOTS)(Simulated)
            actors.append(slots.remote(seconds_a_token))
        return actors[-1]

    pool = PoolRequest(load.workers, 0)
    scorer = RayScorer(ModelRequest("simulated", max(lengths)), {}, pool, create)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return search(load, scorer if spare else WithoutSpare(scorer), documents, Path(folder))
    finally:
        scorer.close()


def lagged(load: Load, lag: float, seed: int) -> tuple[float, float]:
    """Seconds and best loss of 40 generations whose parents lack the slowest individuals, a share ``lag`` of each.

    Children are made as soon as all but that share are done; who is late is told with the next generation. Units go to
    the worker that is free first, the longest expected first, those of the earlier generation before all others.
    """
    lengths = [document.length for document in documents_of(load.documents)["search"]]
    mean = load.seconds / statistics.fmean(lengths)
    evolution = Evolution(generations=40)
    seeds = {name: SPACE.snap(factors) for name, factors in SEEDS.items()}
    state, released, free = State(), 0.0, [0.0] * load.workers
    late: dict[Individual, float] = {}
    while children := ask(evolution, SPACE, state, seeds, seed):
        done = [0.0] * len(children)
        for document in sorted(range(len(lengths)), key=lambda j: -lengths[j]):
            for child in range(len(children)):
                seconds = mean * lengths[document] * noise(f"{seed} {state.generation} {child} {document}")
                finished = max(heapq.heappop(free), released) + seconds
                heapq.heappush(free, finished)
                done[child] = max(done[child], finished)
        released = sorted(done)[math.ceil((1 - lag) * len(done)) - 1]
        scores = {child.individual: loss(child.individual.factors(1.0).lambdas) for child in children}
        told = {**late, **scores}
        late = {c.individual: told[c.individual] for c, end in zip(children, done, strict=True) if end > released}
        state = tell(state, {individual: value for individual, value in told.items() if individual not in late})
        # Who is out must not be asked for twice.
        state = replace(state, scores={**state.scores, **dict.fromkeys(late, math.inf)})
    return max(free), min({**state.scores, **late}.values())


def lag_table(seeds: int) -> list[dict[str, Any]]:
    """For every load: time of a lagged mode against that without, and the losses above the optimum's."""
    rows = []
    for load in LOADS:
        whole = [lagged(load, 0.0, seed) for seed in range(seeds)]
        ahead = [lagged(load, LAG, seed) for seed in range(seeds)]
        rows.append(
            {
                "workers": load.workers,
                "documents": load.documents,
                "time": round(statistics.fmean(a[0] / w[0] for a, w in zip(ahead, whole, strict=True)), 4),
                "excess_loss": round(statistics.fmean(w[1] - 2 for w in whole), 5),
                "excess_loss_lagged": round(statistics.fmean(a[1] - 2 for a in ahead), 5),
            }
        )
    return rows


def tables(results: Mapping[str, Any]) -> str:
    lines = [
        "| workers | search documents | evaluations | mean seconds | spare work | of what the work allows | "
        "of all worker time | scoring, s | driver CPU, ms an evaluation |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["loads"]:
        for spare in ("off", "on"):
            found = row[spare]
            lines.append(
                f"| {row['workers']} | {row['documents']} | {found['evaluations']} | {row['seconds']:g} | {spare} | "
                f"{found['of_what_the_work_allows']:.1%} | {found['of_all_worker_time']:.1%} | "
                f"{found['scoring_seconds']:.1f} | {found['driver_cpu_ms_an_evaluation']:.2f} |"
            )
    lines += ["", "| workers | evaluations that take no time | wall, ms an evaluation |", "|---|---|---|"]
    lines += [f"| {row['workers']} | {row['evaluations']} | {row['ms']:.2f} |" for row in results["overhead"]]
    lines += [
        "",
        "| workers | search documents | time of a lagged mode | excess loss | excess loss, lagged |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['workers']} | {row['documents']} | {row['time']:.1%} | {row['excess_loss']:.5f} | "
        f"{row['excess_loss_lagged']:.5f} |"
        for row in results["lagged"]
    ]
    saved = [1 - row["time"] for row in results["lagged"]]
    worse = [row["excess_loss_lagged"] / row["excess_loss"] - 1 for row in results["lagged"]]
    lines += [
        "",
        f"A lagged mode takes {min(saved):.1%} to {max(saved):.1%} less time for the same number of evaluations, and "
        f"ends with {min(worse):.0%} to {max(worse):.0%} more excess loss. It saves most where workers outnumber a "
        "generation's units, and there more documents or a larger population use them better. So there is none.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--lag-seeds", type=int, default=6)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "ray": ray.__version__,
        "load_average": os.getloadavg()[0],
        "loads": [],
        "overhead": [],
        "lagged": lag_table(args.lag_seeds),
    }
    for row in results["lagged"]:
        print(json.dumps(row), flush=True)
    for load in (load for load in LOADS if load.workers in args.workers):
        row = {**vars(load), "off": with_workers(load, False), "on": with_workers(load, True)}
        assert row["off"]["winner"] == row["on"]["winner"], "spare work changed what the search found"
        results["loads"].append(row)
        print(json.dumps(row), flush=True)
    for workers in args.workers:
        found = with_workers(Load(workers, 20, 0.0, 2), True)
        ms = 1000 * found["scoring_seconds"] / found["evaluations"]
        results["overhead"].append({"workers": workers, "evaluations": found["evaluations"], "ms": round(ms, 3)})
        print(json.dumps(results["overhead"][-1]), flush=True)
    (args.out / "idle_time.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.out / "idle_time.md").write_text(tables(results))
    print(tables(results))


if __name__ == "__main__":
    sys.exit(main())
