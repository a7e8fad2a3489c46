"""Functions and classes taken out of a module's source, to run without what the module imports."""

import ast
from pathlib import Path


def take_out(path: Path, names: tuple[str, ...], known: dict[str, object]) -> dict[str, object]:
    """Definitions of a source file by name, executed with ``known`` as their globals."""
    tree = ast.parse(path.read_text())
    found = [node for node in tree.body if getattr(node, "name", None) in names]
    assert {node.name for node in found} == {*names}, path
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module(body=future + found, type_ignores=[]), str(path), "exec"), known)
    return known
