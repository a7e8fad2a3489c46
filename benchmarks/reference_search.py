"""The default search over several seeds: what it finds, how long it takes, where the time goes, what memory it needs.

    .venv/bin/python benchmarks/reference_search.py --seeds 0 1 2 --out benchmarks/results

Every seed runs as ``longrope launch`` with a fresh store. Writes reference_search.json, a table beside it, and the plot
of the README. Needs the dev extra.
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
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import psutil
from sqlalchemy import create_engine, text

from searcher.baselines import BASELINES
from searcher.rope import RopeSpec
from storage.report import METHOD_NAMES
from storage.repository import Repository

mpl.use("svg")
import matplotlib.pyplot as plt

STAGE_TIMES = """
SELECT c.part, MIN(e.created_at) AS first, MAX(e.created_at) AS last, SUM(e.seconds) AS busy, COUNT(*) AS evaluations
FROM longrope_evaluations e JOIN longrope_units u ON u.key = e.key JOIN longrope_candidates c ON c.id = u.candidate_id
GROUP BY c.part ORDER BY first
"""


def launch(seed: int, folder: Path, options: list[str]) -> dict[str, Any]:
    """One seed: its JSON, wall time, and the largest resident set of driver and of a worker, in MiB."""
    store = f"sqlite:///{folder / 'store.db'}"
    command = [str(Path(sys.executable).with_name("longrope")), "launch", "--json", "--seed", str(seed)]
    command += ["--study", f"seed{seed}", "--storage", store, "--out", str(folder), *options]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = {"driver": 0.0, "worker": 0.0}
    while process.poll() is None:
        for kind, size in _resident(process.pid):
            peak[kind] = max(peak[kind], size)
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    wall = time.monotonic() - started
    with create_engine(store).connect() as connection:
        stages = [dict(row._mapping) for row in connection.execute(text(STAGE_TIMES))]
        busy = float(connection.execute(text("SELECT SUM(seconds) FROM longrope_evaluations")).scalar_one())
        computed = int(connection.execute(text("SELECT COUNT(*) FROM longrope_evaluations")).scalar_one())
    assert process.stdout is not None
    return {
        **json.loads(process.stdout.read()),
        "wall": wall,
        "stages": [
            {key: str(value) if key in ("first", "last") else value for key, value in s.items()} for s in stages
        ],
        "busy": busy,
        "computed": computed,
        "peak_mib": peak,
        "store": store,
    }


def _resident(driver: int) -> list[tuple[str, float]]:
    found = []
    try:
        parent = psutil.Process(driver)
        found.append(("driver", parent.memory_info().rss / 2**20))
        for child in parent.children(recursive=True):
            if child.cmdline()[:1] and "Worker" in child.cmdline()[0]:
                found.append(("worker", child.memory_info().rss / 2**20))
    except psutil.Error:
        pass
    return found


def table(runs: list[dict[str, Any]]) -> str:
    """Test perplexity by method: mean over seeds, and its range."""
    lines = ["| method | own attention factor | study's attention factor |", "|---|---|---|"]
    for method in runs[0]["test"]:
        cells = []
        for part in ("test", "test_at_study_attention"):
            values = [run[part][method] for run in runs]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if max(values) > min(values) else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {METHOD_NAMES.get(method, method)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(run: dict[str, Any], out: Path) -> None:
    """Left: best search perplexity by cost, YaRN as a line. Right: rescale factors by dimension."""
    repository = Repository(run["store"])
    name = run["study"]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    record, multiple = repository.study(name), repository.cost(name).multiple or 0.0
    points = repository.trajectory(name)
    cost = [point.forwards + multiple * point.gradients for point in points]
    best = [math.exp(point.loss) for point in points]
    yarn = next(
        math.exp(row.nll / row.tokens) for row in repository.generations(name) if "yarn" in row.origin and row.nll
    )
    left.step(cost, best, where="post", color="#d55e00", label="best so far")
    left.axhline(yarn, color="#0072b2", linestyle="--", label="YaRN")
    left.set(
        xlabel="cost, document forwards",
        ylabel="perplexity on the search documents",
        ylim=(min(best) - 0.1, yarn * 1.1),
    )
    left.legend(frameon=False)
    identity = record.settings["identity"]
    spec = RopeSpec(identity["theta"], identity["rotary_dim"], identity["original_length"], identity["layers"])
    for method, style in (("pi", ":"), ("ntk", "-."), ("yarn", "--")):
        (lambdas,) = BASELINES[method](spec, run["scale"]).by_layer()
        right.plot(lambdas, style, label=METHOD_NAMES[method])
    assert record.result is not None
    right.plot(record.result["factors"]["searched"]["lambdas"], color="#d55e00", label="searched")
    right.set(xlabel="rotary pair (0 turns fastest)", ylabel="rescale factor")
    right.legend(frameon=False)
    fig.suptitle(f"The reference model at {run['scale']:g} times its window")
    fig.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("options", nargs="*", help="further options of longrope launch, after --")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        runs = []
        for seed in args.seeds:
            folder = Path(scratch) / str(seed)
            folder.mkdir()
            runs.append(launch(seed, folder, args.options))
            print(f"seed {seed}: {runs[-1]['wall']:.0f} s, test {runs[-1]['test']['searched']:.4f}", flush=True)
        plot(runs[0], args.out / "reference_search.svg")
    cpus = os.cpu_count() or 1
    summary = {
        "python": platform.python_version(),
        "machine": f"{cpus} cores, {platform.machine()}",
        "wall_seconds": [round(run["wall"], 1) for run in runs],
        "share_of_wall_in_forwards": [round(run["busy"] / run["wall"] / cpus, 3) for run in runs],
        "peak_mib": [{key: round(value) for key, value in run["peak_mib"].items()} for run in runs],
    }
    kept = [{key: value for key, value in run.items() if key not in ("store", "factors")} for run in runs]
    (args.out / "reference_search.json").write_text(json.dumps({**summary, "runs": kept}, indent=2) + "\n")
    (args.out / "reference_search.md").write_text(table(runs))
    print(table(runs))
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
