"""What following a study costs the driver: evaluations a second with and without ``longrope dashboard`` beside it.

A driver that only records: every evaluation is CPU work of some milliseconds and one transaction in the store, which
is more often than any model allows. Rounds without and with a dashboard that follows, and a page that asks for the
trials every two seconds, alternate. Prints a Markdown table.

    python benchmarks/dashboard.py --rounds 5 --seconds 20
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import psutil

from searcher.rope import Factors
from searcher.study import Candidate, Document, Outcome
from storage.repository import Repository

DOCUMENTS = [Document(f"{j}", f"{j}" * 64, 2048) for j in range(5)]
CHILDREN, PAIRS = 32, 64


def drive(repository: Repository, name: str, seconds: float, work: float) -> tuple[float, float]:
    """Evaluations a second, and milliseconds that recording one took in the mean."""
    repository.create_study(name, "search", {})
    count, recording, generation = 0, 0.0, 0
    begun = time.monotonic()
    with repository.open_study(name) as store:
        while time.monotonic() < begun + seconds:
            found = [
                Candidate(Factors(tuple(1 + 0.01 * (i + generation + p) for p in range(PAIRS))), "mutant")
                for i in range(CHILDREN)
            ]
            keys = [[f"{name} {generation} {i} {j}" for j in range(len(DOCUMENTS))] for i in range(CHILDREN)]
            store.add_generation(0, "search", generation, found, DOCUMENTS, keys)
            for row in keys:
                for key in row:
                    end = time.process_time() + work
                    while time.process_time() < end:
                        pass
                    before = time.monotonic()
                    store.record(Outcome(key, 3.0, 2047, work, "w"))
                    recording += time.monotonic() - before
                    count += 1
            generation += 1
    return count / (time.monotonic() - begun), 1000 * recording / count


def followed(folder: Path, name: str, seconds: float, work: float) -> tuple[float, float, float]:
    """As ``drive``, with a dashboard beside; and the share of a core that the dashboard took."""
    repository = Repository(f"sqlite:///{folder / 'store.db'}")
    ended = threading.Event()
    result: list[tuple[float, float]] = []
    driver = threading.Thread(target=lambda: result.append(drive(repository, name, seconds, work)))
    driver.start()
    time.sleep(0.5)
    command = [sys.executable, "-m", "cli", "dashboard", name, "--port=0", "--json"]
    command.append(f"--storage=sqlite:///{folder / 'store.db'}")
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        url = json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")["url"]
        at_start = sum(psutil.Process(process.pid).cpu_times()[:2])
        started = time.monotonic()

        def look() -> None:
            while not ended.wait(2.0):
                urllib.request.urlopen(url.replace("/dashboard", "/api/studies/0"), timeout=60).read()

        page = threading.Thread(target=look)
        page.start()
        driver.join()
        ended.set()
        page.join()
        used = sum(psutil.Process(process.pid).cpu_times()[:2]) - at_start
        share = used / (time.monotonic() - started)
        process.kill()
    repository.close()
    return (*result[0], share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--work", type=float, default=0.05, help="CPU seconds of an evaluation")
    asked = parser.parse_args()
    alone: list[tuple[float, float]] = []
    beside: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        repository = Repository(f"sqlite:///{Path(folder) / 'store.db'}")
        for number in range(asked.rounds):
            alone.append(drive(repository, f"alone-{number}", asked.seconds, asked.work))
            beside.append(followed(Path(folder), f"beside-{number}", asked.seconds, asked.work))
            print(alone[-1], beside[-1], file=sys.stderr, flush=True)
        repository.close()
    print(f"{asked.rounds} rounds of {asked.seconds:g} s each, {asked.work * 1000:g} ms of CPU an evaluation, ", end="")
    print(f"{psutil.cpu_count()} cores, {platform.machine()}; load average at the end {psutil.getloadavg()[0]:.1f}\n")
    print("| | evaluations/s, median (range) | ms to record one, median (range) | dashboard's share of a core |")
    print("|---|---|---|---|")
    for name, rows in (("alone", alone), ("with the dashboard", beside)):
        cells = []
        for column in (0, 1):
            values = [row[column] for row in rows]
            cells.append(f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        share = f"{statistics.median(row[2] for row in beside):.1%}" if name != "alone" else "-"
        print(f"| {name} | {cells[0]} | {cells[1]} | {share} |")


if __name__ == "__main__":
    main()
