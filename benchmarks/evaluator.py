"""The evaluator against transformers' own ``model(ids, labels=ids)``: time and peak memory, 2k to 64k tokens, on a CPU.

    .venv/bin/python benchmarks/evaluator.py --runs 3

Every measurement is a process of its own, the two take turns, and of each the fastest run and the smallest peak count.
Model: the reference model, or any other folder; tokens are random, BOS first. Ours scores under factors, all of them 1,
and the loss must agree. Seconds are processor time of the process, which does not count other jobs on the machine;
memory is the peak resident set during the first run less the resident set before it, after a short warm-up. Writes
evaluator.json and evaluator.md. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

METHODS = ("transformers", "longrope")
WARM_UP = 512  # tokens
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
SHORT = 16384  # up to here one process runs several times


def measure(method: str, model: str, length: int, threads: int, chunk: int | None) -> dict[str, Any]:
    """One measurement, in this process."""
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    run = _transformers(model) if method == "transformers" else _longrope(model, length, threads, chunk)
    vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    tokens = np.random.default_rng(0).integers(2, vocabulary, length).astype(np.uint32)
    tokens[0] = 0
    run(tokens[:WARM_UP])
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    times: list[tuple[float, float]] = []
    peak = loss = 0.0
    for repeat in range(3 if length <= SHORT else 1):
        started, spent = time.perf_counter(), time.process_time()
        loss = run(tokens)
        times.append((time.process_time() - spent, time.perf_counter() - started))
        if repeat == 0:
            peak = _status("VmHWM") - before
    cpu, wall = min(times)
    return {"method": method, "length": length, "seconds": cpu, "wall": wall, "peak_mib": peak, "loss": loss}


def _transformers(model: str) -> Callable[[Any], float]:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model).eval()

    def run(tokens: Any) -> float:
        ids = torch.as_tensor(tokens.astype("int64"))[None]
        with torch.inference_mode():
            return float(loaded(ids, labels=ids).loss)

    return run


def _longrope(model: str, length: int, threads: int, chunk: int | None) -> Callable[[Any], float]:
    from searcher.baselines import none
    from workers.model import ModelRequest, load_model
    from workers.perplexity import negative_log_likelihood

    loaded = load_model(ModelRequest(model, length, threads=threads, device="cpu", chunk=chunk))
    factors = none(loaded.spec, 1)

    def run(tokens: Any) -> float:
        nll, count = negative_log_likelihood(loaded, tokens, factors)
        return nll / count

    return run


def _status(field: str) -> float:
    """MiB of one line of this process' status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) / 1024


def table(results: list[dict[str, Any]]) -> str:
    """By length: seconds, peak MiB and loss of both, and ours over theirs."""
    lines = [
        "| tokens | seconds, transformers | seconds, ours | ratio | peak MiB, transformers | peak MiB, ours | ratio "
        "| loss differs by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for length in sorted({result["length"] for result in results}):
        theirs, ours = ([r for r in results if r["length"] == length and r["method"] == name] for name in METHODS)
        if not theirs or not ours:
            continue
        seconds, peak = ([min(r[key] for r in part) for part in (theirs, ours)] for key in ("seconds", "peak_mib"))
        lines.append(
            f"| {length:,} | {seconds[0]:.2f} | {seconds[1]:.2f} | {seconds[1] / seconds[0]:.3f} "
            f"| {peak[0]:.0f} | {peak[1]:.0f} | {peak[1] / peak[0]:.3f} "
            f"| {abs(ours[0]['loss'] / theirs[0]['loss'] - 1):.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    from workers.reference import MODEL_DIR

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL_DIR))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chunk", type=int, help="of the evaluator; its default where it is left out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.model, args.lengths[0], args.threads, args.chunk)))
        return
    results = []
    for length in args.lengths:
        for run in range(args.runs):
            for method in METHODS[:: 1 if run % 2 == 0 else -1]:
                command = [sys.executable, __file__, "--measure", method, "--lengths", str(length)]
                command += ["--model", args.model, "--threads", str(args.threads)]
                command += ["--chunk", str(args.chunk)] if args.chunk else []
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
                results.append(json.loads(done.stdout.splitlines()[-1]))
                print({key: value if isinstance(value, str) else round(value, 2) for key, value in results[-1].items()})
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {"machine": _machine(), "threads": args.threads, "chunk": args.chunk, "model": Path(args.model).name}
    (args.out / "evaluator.json").write_text(json.dumps({**facts, "runs": results}, indent=2) + "\n")
    text = f"{facts['machine']}; {args.threads} thread(s); {args.runs} run(s) of each.\n\n{table(results)}"
    (args.out / "evaluator.md").write_text(text)
    print(text)


def _machine() -> str:
    import torch
    import transformers

    from workers.settings import device_name

    processor = device_name(torch.device("cpu"))
    return (
        f"{processor}, Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}"
    )


if __name__ == "__main__":
    main()
