"""Test perplexity against cost: the paper's evolution, random search, CMA-ES, TPE, refinement alone, and the default.

    python benchmarks/cost_to_quality.py --work WORK --books BOOKS

The books model is in benchmarks/books_model; examples/train_books.py trained it on BOOKS/train.tar.xz.

Every run is a study of its own in WORK, so a second call goes on where the first was stopped, and what is finished is
only read. Cost is counted in document forwards: every evaluation on search and selection documents, n_hat trials among
them, and every gradient step at the multiple that its study measured. Test windows are scored apart, cost nothing, and
decide nothing. Writes cost_to_quality.json, a table and a plot beside it. Needs the dev extra.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from commands.runs import Run
from searcher.rope import Factors
from searcher.study import Document, Unit, evaluation_key, total
from storage.repository import Repository
from workers.corpus import study_windows
from workers.model import load_tokenizer, read_original_length, resolve_folder
from workers.scorer import LocalScorer

mpl.use("svg")
import matplotlib.pyplot as plt

BOOKS_MODEL = Path(__file__).resolve().parent / "books_model"
# One worker in this process: runs are started side by side where there are cores.
COMMON = "--in-process --threads 1 --dtype bfloat16"
# A fifth of the paper's budget: 64 + 6 x 32 = 256 individuals for 1,344.
FIFTH = "--preset paper --generations 6"
METHODS: dict[str, str] = {
    "default": "",
    "refinement": "--generations 0",
    "paper": "--preset paper",
    "cmaes": f"{FIFTH} --sampler cmaes",
    "tpe": f"{FIFTH} --sampler tpe",
    "random": f"{FIFTH} --sampler random",
    "random-log": f"{FIFTH} --sampler random-log",
}
NAMES = {
    "default": "the default",
    "refinement": "refinement alone",
    "paper": "the paper's evolution",
    "cmaes": "CMA-ES",
    "tpe": "TPE",
    "random": "random search",
    "random-log": "random search in ln lambda",
}
POINTS_APART = 1.5  # test perplexity is read where the cost has grown by so much


@dataclass(frozen=True)
class Planned:
    """One run: its name, and what ``longrope launch`` is told."""

    model: str
    scale: int
    method: str
    seed: int
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.model}-{self.scale}x-{self.method}-seed{self.seed}"


def planned(books: Path | None) -> list[Planned]:
    """All runs, the cheap ones first."""
    data: dict[str, tuple[str, ...]] = {"reference": ("--search-documents", "5")}
    if books is not None:
        novels = sorted((books / "search").glob("*.txt"))
        data["books"] = (
            *("--model", str(BOOKS_MODEL)),
            *(item for novel in novels[:5] for item in ("--data", str(novel))),
            *("--selection-data", str(novels[5]), "--test-data", str(books / "test")),
            *("--windows", "search=1,selection=6,test=2"),
        )
    runs = []
    for method, options in METHODS.items():
        for model, where in data.items():
            for scale, seeds in ((8, (0, 1, 2)), (16, (0,))):
                if scale == 16 and method not in ("paper", "default"):
                    continue
                for seed in seeds if method in ("paper", "default", "refinement") else seeds[:1]:
                    arguments = (
                        *COMMON.split(),
                        *options.split(),
                        *where,
                        "--target",
                        f"{scale}x",
                        "--seed",
                        str(seed),
                    )
                    runs.append(Planned(model, scale, method, seed, arguments))
    return sorted(runs, key=lambda run: (run.method == "paper", run.scale, run.seed))


def longrope(*arguments: str) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("longrope")), *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def run_all(runs: Sequence[Planned], work: Path, at_once: int) -> None:
    """Launch or resume what is not finished, a few at a time."""
    active: list[subprocess.Popen[bytes]] = []
    for run in runs:
        if finished(run, work):
            continue
        url = store(run, work)
        known = (work / f"{run.name}.db").exists() and run.name in {s.name for s in Repository(url).studies()}
        start = ("resume", run.name) if known else ("launch", "--study", run.name, *run.options)
        active.append(longrope(*start, "--storage", url, "--out", str(work)))
        while len(active) >= at_once:
            active = [process for process in active if process.poll() is None or not _ended(process)]
            if len(active) >= at_once:
                active[0].wait()
    for process in active:
        process.wait()
        _ended(process)


def _ended(process: subprocess.Popen[bytes]) -> bool:
    if process.returncode:
        raise SystemExit(f"{process.args} ended with {process.returncode}")
    return True


def store(run: Planned, work: Path) -> str:
    return f"sqlite:///{work / run.name}.db"


def finished(run: Planned, work: Path) -> bool:
    if not (work / f"{run.name}.db").exists():
        return False
    found = {summary.name: summary.status for summary in Repository(store(run, work)).studies()}
    return found.get(run.name) == "finished"


class TestSet:
    """The test windows of one model and length, and a scorer for them; what was scored is kept in ``work``."""

    def __init__(self, run: Run, work: Path) -> None:
        folder = resolve_folder(run.model.path)
        sets = study_windows(
            run.corpus, load_tokenizer(folder), run.model.target_length, read_original_length(run.model.path)
        )
        windows = sets.windows["test"]
        self.documents: list[Document] = [window.document for window in windows]
        self.scorer = LocalScorer(run.model, {window.document.sha256: window.tokens for window in windows})
        self.file = work / "test_perplexities.json"
        self.known: dict[str, float] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def perplexity(self, factors: Factors) -> float:
        keys = [evaluation_key(self.scorer.fingerprint, factors, document) for document in self.documents]
        if keys[0] not in self.known:
            units = [Unit(key, factors, document) for key, document in zip(keys, self.documents, strict=True)]
            self.known[keys[0]] = total(list(self.scorer.evaluate(units))).perplexity
            self.file.write_text(json.dumps(self.known))
        return self.known[keys[0]]


def curve(run: Planned, work: Path, tests: TestSet) -> dict[str, Any]:
    """A finished study's points: cost so far, and the test perplexity of the best individual by then."""
    repository = Repository(store(run, work))
    cost, record = repository.cost(run.name), repository.study(run.name)
    multiple = cost.multiple or 0.0
    assert record.result is not None
    row = record.result["factors"]["searched"]
    winner = Factors(tuple(row["lambdas"]), row["n_hat"], row["attention_factor"])
    trajectory = repository.trajectory(run.name)
    points = []
    for point in _spread(trajectory, multiple):
        points.append(
            {
                "cost": round(point.forwards + multiple * point.gradients, 1),
                "search": round(math.exp(point.loss), 4),
                "test": round(tests.perplexity(point.factors), 4),
            }
        )
    selection = cost.forwards + multiple * cost.gradients
    points.append({"cost": round(selection, 1), "test": round(tests.perplexity(winner), 4), "selected": True})
    return {
        "run": run.name,
        "model": run.model,
        "scale": run.scale,
        "method": run.method,
        "seed": run.seed,
        "forwards": cost.forwards,
        "gradients": cost.gradients,
        "multiple": cost.multiple,
        "n_hat": winner.n_hat,
        "points": points,
    }


def _spread(trajectory: Sequence[Any], multiple: float) -> Iterator[Any]:
    """The best individual where the cost has grown enough since the last reading, and the last one."""
    read = 0.0
    for i, point in enumerate(trajectory):
        cost = point.forwards + multiple * point.gradients
        if not math.isfinite(point.loss):
            continue
        if cost >= read * POINTS_APART or i == len(trajectory) - 1:
            read = cost
            yield point


def summary(curves: Sequence[dict[str, Any]]) -> str:
    """By model and scale: every method's cost and end, and where the others reach the paper's end."""
    lines = ["| model | method | seeds | cost in forwards | test perplexity | reaches the paper's at | of its cost |"]
    lines.append("|---|---|---|---|---|---|---|")
    for model, scale in dict.fromkeys((c["model"], c["scale"]) for c in curves):
        here = [c for c in curves if (c["model"], c["scale"]) == (model, scale)]
        papers = [c for c in here if c["method"] == "paper"]
        goal = statistics.mean(c["points"][-1]["test"] for c in papers) if papers else math.nan
        whole = statistics.mean(c["points"][-1]["cost"] for c in papers) if papers else math.nan
        for method in [m for m in METHODS if any(c["method"] == m for c in here)]:
            mine = [c for c in here if c["method"] == method]
            ends = [c["points"][-1]["test"] for c in mine]
            cost = statistics.mean(c["points"][-1]["cost"] for c in mine)
            reached = [next((p["cost"] for p in c["points"] if p["test"] <= goal), math.inf) for c in mine]
            worst = max(reached)
            spread = f"{statistics.mean(ends):.4f}" + (
                f" ({min(ends):.4f} to {max(ends):.4f})" if len(ends) > 1 else ""
            )
            at = f"{worst:.0f}" if math.isfinite(worst) else "never"
            share = f"1/{whole / worst:.1f}" if math.isfinite(worst) and worst else ""
            lines.append(
                f"| {model} {scale}x | {NAMES[method]} | {len(mine)} | {cost:.0f} | {spread} | {at} | {share} |"
            )
    return "\n".join(lines) + "\n"


def plot(curves: Sequence[dict[str, Any]], out: Path) -> None:
    places = list(dict.fromkeys((c["model"], c["scale"]) for c in curves))
    fig, axes = plt.subplots(1, len(places), figsize=(5 * len(places), 4), constrained_layout=True, squeeze=False)
    colours = dict(zip(METHODS, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for axis, place in zip(axes[0], places, strict=True):
        for c in curves:
            if (c["model"], c["scale"]) == place:
                label = NAMES[c["method"]] if c["seed"] == 0 else None
                points = [p for p in c["points"] if not p.get("selected")]
                cost, test = [p["cost"] for p in points], [p["test"] for p in points]
                axis.step(cost, test, where="post", color=colours[c["method"]], label=label, linewidth=1)
                axis.plot(
                    c["points"][-1]["cost"], c["points"][-1]["test"], "o", color=colours[c["method"]], markersize=4
                )
        ends = [c["points"][-1]["test"] for c in curves if (c["model"], c["scale"]) == place]
        axis.set(xscale="log", xlabel="cost, document forwards", title=f"{place[0]} model, {place[1]}x")
        axis.set_ylim(min(ends) * 0.99, float(np.quantile(ends, 0.9)) * 1.12)
    axes[0][0].set_ylabel("test perplexity")
    axes[0][0].legend(frameon=False, fontsize=8)
    fig.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the studies")
    parser.add_argument("--books", type=Path, help="folder with search and test; without it, the reference model alone")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--only", default="", help="runs whose names contain this")
    parser.add_argument("--no-run", action="store_true", help="report on what is finished")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [run for run in planned(args.books) if args.only in run.name]
    if not args.no_run:
        run_all(runs, args.work, args.at_once)
    curves: list[dict[str, Any]] = []
    tests: dict[tuple[str, int], TestSet] = {}
    for run in runs:
        if not finished(run, args.work):
            print(f"{run.name} is not finished and left out", flush=True)
            continue
        place = (run.model, run.scale)
        if place not in tests:
            record = Repository(store(run, args.work)).study(run.name)
            tests[place] = TestSet(Run.from_json(run.name, record.settings), args.work)
        curves.append(curve(run, args.work, tests[place]))
        print(f"{run.name}: {curves[-1]['points'][-1]}", flush=True)
    about = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
    (args.out / "cost_to_quality.json").write_text(json.dumps({**about, "curves": curves}, indent=1) + "\n")
    (args.out / "cost_to_quality.md").write_text(summary(curves))
    plot(curves, args.out / "cost_to_quality.svg")
    print(summary(curves))


if __name__ == "__main__":
    main()
