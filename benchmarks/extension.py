"""The progressive extension of the reference model and of the books model: the papers' kind of table.

    python benchmarks/extension.py --work WORK --books BOOKS [--seeds 0 1 2] [--only reference]

Runs ``longrope extend`` with the plan ``reference`` for each model and seed, or goes on with what WORK holds; what is
finished is only read. BOOKS has folders search and test, and train.tar.xz, which is unpacked into WORK. The books model
answers neither retrieval task inside its own window (``longrope evaluate --model benchmarks/books_model --measure
passkey,key_value --lengths 1x``), so its plan leaves them out; and as one novel is all its selection set, more windows
of it are taken. Writes extension.md and extension.json: by model, method and length, perplexity on the test documents
and what passkey and key-value retrieval got right, mean and range over the seeds, and the seconds of every stage.
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
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from searcher.plan_file import BUILT_IN
from storage.repository import Repository

# What a model's plan has instead of the reference plan's.
PLANS: dict[str, dict[str, str]] = {
    "reference": {},
    "books": {
        'kind = "evaluate"\n': 'kind = "evaluate"\npasskey_depths = 0\nkey_value_trials = 0\n',
        "selection = 8": "selection = 24",
        "selection = 2": "selection = 8",
        "selection = 1": "selection = 4",
    },
}
BOOKS_MODEL = Path(__file__).resolve().parent / "books_model"
PARTS = {"test": "perplexity on the test documents", "passkey": "passkey, right", "key_value": "key-value, right"}


def options(model: str, books: Path | None, work: Path) -> list[str]:
    """What ``longrope extend`` is told of a model and its text."""
    if model == "reference":
        return []
    assert books is not None
    novels = sorted((books / "search").glob("*.txt"))
    train = work / "train"
    if not train.is_dir():
        with tarfile.open(books / "train.tar.xz") as archive:
            archive.extractall(work / "unpacked", filter="data")
        (work / "unpacked").rename(train)
    named = [option for novel in novels[:5] for option in ("--data", str(novel))]
    return [
        *("--model", str(BOOKS_MODEL), *named, "--selection-data", str(novels[5])),
        *("--test-data", str(books / "test"), "--train-data", str(train)),
    ]


def plan_file(model: str, work: Path) -> Path:
    """The plan ``reference`` as this model needs it."""
    text = (BUILT_IN / "reference.toml").read_text(encoding="utf-8")
    for ours, theirs in PLANS[model].items():
        text = text.replace(ours, theirs)
    path = work / f"{model}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def run(name: str, plan: Path, seed: int, arguments: Sequence[str], work: Path) -> Path:
    """The store of a finished extension."""
    store = work / f"{name}.db"
    url = f"sqlite:///{store}"
    repository = Repository(url)
    status = {summary.name: summary.status for summary in repository.studies()}.get(name)
    if status != "finished":
        start = ["resume", name] if status else ["extend", str(plan), "--study", name, "--seed", str(seed), *arguments]
        command = [str(Path(sys.executable).with_name("longrope")), *start, "--storage", url, "--out", str(work)]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"{' '.join(command)} failed; call this again to go on")
    return store


def figures(store: Path) -> dict[str, Any]:
    """Cells by method and length, and the seconds of every stage that a run took."""
    repository = Repository(f"sqlite:///{store}")
    study = repository.study(store.stem)
    assert study.result is not None
    seconds = {
        str(stage.settings["name"]): round((stage.finished_at - stage.started_at).total_seconds())
        for stage in repository.stages(store.stem)
        if stage.started_at is not None and stage.finished_at is not None
    }
    return {"evaluation": study.result["evaluation"], "seconds": seconds, "cost": vars(repository.cost(store.stem))}


def value(part: str, cell: dict[str, Any]) -> float:
    """A cell as one number: perplexity, or the share that was right."""
    if part == "test":
        return math.exp(cell["nll"] / cell["tokens"]) if cell["nll"] is not None else math.inf
    whole = next((row for row in cell["by_depth"] if row["depth"] is None), None)
    return math.nan if whole is None else float(whole["accuracy"])


def table(part: str, found: Sequence[dict[str, Any]]) -> str:
    """Rows by method, columns by length; mean, and the range where there are several seeds."""
    lengths = found[0]["evaluation"]["lengths"]
    lines = [f"| {PARTS[part]} | {' | '.join(f'{n:,}' for n in lengths)} |", f"|---|{'---|' * len(lengths)}"]
    for method in found[0]["evaluation"]["rows"]:
        cells = []
        for length in map(str, lengths):
            rows = [each["evaluation"]["rows"].get(method, {}).get(length, {}) for each in found]
            values = [value(part, row[part]) for row in rows if part in row]
            values = [number for number in values if not math.isnan(number)]
            form = "{:.3f}" if part == "test" else "{:.0%}"
            text = form.format(statistics.mean(values)) if values else "-"
            if len(values) > 1 and min(values) < max(values):
                text += f" ({form.format(min(values))} to {form.format(max(values))})"
            cells.append(text)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for row in found["evaluation"]["rows"].values() for cell in row.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the studies and their models")
    parser.add_argument("--books", type=Path, help="folder with search, test and train.tar.xz")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", choices=("reference", "books"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    models = [model for model in ("reference", "books") if args.only in (None, model)]
    if args.books is None:
        models = [model for model in models if model != "books"]
    results: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "seeds": args.seeds,
    }
    text = f"{results['machine']}; seeds {', '.join(map(str, args.seeds))}.\n"
    for model in models:
        arguments = options(model, args.books, args.work)
        stores = [
            run(f"{model}-seed{seed}", plan_file(model, args.work), seed, arguments, args.work) for seed in args.seeds
        ]
        results[model] = [figures(store) for store in stores]
        measured = [part for part in PARTS if any(part in cell for cell in _cells(results[model][0]))]
        text += f"\n## {model} model\n\n" + "\n".join(table(part, results[model]) for part in measured)
        seconds = results[model][0]["seconds"]
        text += "\nSeconds of the stages, first seed: " + ", ".join(f"{k} {v}" for k, v in seconds.items()) + ".\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "extension.json").write_text(json.dumps(results, indent=1, default=str) + "\n")
    (args.out / "extension.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
