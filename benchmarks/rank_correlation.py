"""How well fewer documents rank candidates, against all of them, in studies that scored every candidate on all.

    python benchmarks/rank_correlation.py WORK/reference-8x-paper-seed0.db WORK/books-8x-paper-seed0.db

Spearman's rank correlation of the loss on the first documents with the loss on all, among the first generation (seeds
and their mutants, far apart) and within later ones (close together); and whether the best of the first generation is
among the best 5 and 3 by fewer documents, which is what a scan of ramps and trials of n_hat keep. Writes
rank_correlation.md. Needs the dev extra.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from racing_replay import Losses, generations
from scipy.stats import spearmanr


def correlation(children: Sequence[Losses], documents: int) -> float:
    """Of the sums over the first documents with those over all."""
    found: float = spearmanr([sum(c[:documents]) for c in children], [sum(c) for c in children]).statistic
    return found


def place_of_the_best(children: Sequence[Losses], documents: int) -> int:
    """Place, from 1, that the best candidate has by the first documents alone."""
    best = min(range(len(children)), key=lambda i: sum(children[i]))
    return 1 + sum(sum(c[:documents]) < sum(children[best][:documents]) for c in children)


def rows(stores: Sequence[Path]) -> Iterator[str]:
    for store in stores:
        history = generations(store)
        for documents in range(1, len(history[0][0])):
            later = [correlation(children, documents) for children in history[1:]]
            places = [place_of_the_best(children, documents) for children in history]
            within = " / ".join(f"{sum(place <= kept for place in places) / len(places):.0%}" for kept in (3, 5))
            yield (
                f"| {store.stem} | {documents} | {correlation(history[0], documents):.3f} "
                f"| {statistics.mean(later):.3f} ({min(later):.3f}) | {places[0]} | {within} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+", help="SQLite files, a study each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    table = (
        "| study | first documents | first generation | later ones, mean (least) | place of the first one's best "
        "| best among 3 / 5, all generations |\n|---|---|---|---|---|---|\n"
    )
    table += "\n".join(rows(args.stores)) + "\n"
    (args.out / "rank_correlation.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
