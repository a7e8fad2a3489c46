"""What racing would have saved, and what it would have changed, in studies that scored every child on every document.

    python benchmarks/racing_replay.py WORK/reference-8x-paper-seed0.db WORK/reference-8x-paper-seed1.db

Replays each study's generations in ask order through ``searcher.racing``. A survivor is changed where a child that the
race leaves would have been among the k parents after its generation. Later generations are taken as they were, so every
decision is judged against what the whole scores say at that moment. Writes racing_replay.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import create_engine, text

from searcher.racing import Race, Racing

SETTINGS = [
    Racing(after, caution)
    for after in ((1,), (2,), (1, 2), (1, 2, 3), (1, 2, 3, 4))
    for caution in (0.0, 1.0, 2.0, 3.0, 4.0)
]
Losses = tuple[float, ...]


LOSSES = """
SELECT c.generation, c.child, e.nll
FROM longrope_candidates c JOIN longrope_units u ON u.candidate_id = c.id JOIN longrope_evaluations e ON e.key = u.key
WHERE c.part = 'search' ORDER BY c.generation, c.child, u.position
"""


def generations(store: Path) -> list[list[Losses]]:
    """Nats by document of every child, a list a generation; a generation that is not whole is left out."""
    found: dict[int, dict[int, list[float]]] = {}
    with create_engine(f"sqlite:///{store}").connect() as connection:
        for generation, child, nll in connection.execute(text(LOSSES)):
            found.setdefault(generation, {}).setdefault(child, []).append(nll)
    documents = max(len(losses) for losses in found[0].values())
    whole = [list(children.values()) for children in found.values()]
    return [[tuple(c) for c in children] for children in whole if all(len(c) == documents for c in children)]


def replay(history: list[list[Losses]], parents: int, settings: Racing) -> tuple[int, int, int, int]:
    """Children raced, changed survivors, and document forwards with and without the race."""
    scored: list[Losses] = list(history[0])
    raced = changed = spent = whole = 0
    for children in history[1:]:
        documents = len(children[0])
        ranked = sorted(scored, key=sum)
        race = Race(settings, ranked, parents)
        alive = list(range(len(children)))
        seen_by = [documents] * len(children)
        for seen in race.points(documents):
            kept = race.kept([children[i][:seen] for i in alive])
            for i in [i for i, keep in zip(alive, kept, strict=True) if not keep]:
                alive.remove(i)
                seen_by[i] = seen
        scored.extend(children)
        survivors = set(sorted(scored, key=sum)[:parents])
        raced += len(children)
        changed += sum(children[i] in survivors for i in range(len(children)) if i not in alive)
        spent += sum(seen_by)
        whole += documents * len(children)
    return raced, changed, spent, whole


def rows(stores: list[Path], parents: int) -> Iterator[str]:
    histories = [generations(path) for path in stores]
    for settings in SETTINGS:
        raced, changed, spent, whole = (
            sum(column) for column in zip(*(replay(history, parents, settings) for history in histories), strict=True)
        )
        after = ", ".join(map(str, settings.after))
        yield f"| {after} | {settings.caution:g} | {raced} | {changed} | {1 - spent / whole:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+", help="SQLite files, a study each")
    parser.add_argument("--parents", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    table = (
        "| decided after documents | caution | children | changed survivors | forwards saved |\n|---|---|---|---|---|\n"
    )
    table += "\n".join(rows(args.stores, args.parents)) + "\n"
    (args.out / "racing_replay.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
