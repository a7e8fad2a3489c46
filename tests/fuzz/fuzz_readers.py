"""Fuzz a reader guided by coverage, with atheris (``pip install '.[fuzz]'``).

    python tests/fuzz/fuzz_readers.py factors --seconds 600

Ends with status 0 after that time, else with the input that crashed, hung or took too much memory, kept in the folder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))

# What is looked into; the libraries below it are taken as they are, or coverage would chase their branches.
OURS = ["searcher", "storage", "workers", "json", "tomllib"]

with atheris.instrument_imports(include=OURS):
    from tests.fuzz.readers import readers

MEGABYTES = 4096  # of the whole process, torch in it
SLOWEST = 20  # seconds of one input


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--folder", type=Path, help="Corpus and findings; a fresh one, which is removed, if not given.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as fresh:
        folder = arguments.folder or Path(fresh)
        corpus = folder / "corpus"
        corpus.mkdir(exist_ok=True)
        reader = readers(folder)[arguments.reader]
        for number, data in enumerate(reader.sound):
            (corpus / f"sound-{number}").write_bytes(data)
        path = folder / reader.name

        def meet(data: bytes) -> None:
            path.write_bytes(data)
            reader.read(path)

        limits = [f"-max_total_time={arguments.seconds}", f"-rss_limit_mb={MEGABYTES}", f"-timeout={SLOWEST}"]
        options = ["-max_len=65536", "-print_final_stats=1", f"-artifact_prefix={folder}/"]
        atheris.Setup([sys.argv[0], *limits, *options, str(corpus)], meet)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
