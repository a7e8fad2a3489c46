"""A row of the tables of bad input: what is typed, what it meets, and what its one line says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SECRET = "hunter2"
READ = "launch {small} --model {model}"
LAUNCH = f"{READ} --data {{text}}"
EXTEND = "extend plan.toml --in-process --model {model} --data {text} --train-data {text}/0.txt"
REMOVED = object()


@dataclass(frozen=True)
class Bad:
    """A command line that cannot work, and what its one line must say.

    Attributes
    ----------
    plan: what ``plan.toml`` holds.
    factors: dotted place -> value, changed in a sound factor file, ``factors.json``; or the whole file as text.
    config: key -> value, changed in the config.json of a copy of the model, ``odd``; or the whole file as text.
    """

    command: str
    says: str
    status: int = 1
    plan: str | None = None
    factors: Mapping[str, object] | str = field(default_factory=dict)
    config: Mapping[str, object] | str = field(default_factory=dict)


def usage(command: str, option: str) -> Bad:
    """A value that the parser itself refuses: more than a line, the option's name in it."""
    return Bad(command, f"Invalid value for '{option}'", 2)


def plan(text: str, says: str) -> Bad:
    """A plan file that cannot be run."""
    return Bad(EXTEND, says, plan=text)


def factors(changes: Mapping[str, object] | str, says: str) -> Bad:
    """A factor file that cannot be used as seeds."""
    return Bad(f"{LAUNCH} --seed-factors factors.json", says, factors=changes)


def config(changes: Mapping[str, object] | str, says: str) -> Bad:
    """A model whose config.json cannot be used."""
    return Bad("launch {small} --model odd --data {text}", says, config=changes)
