"""The import rule: cli -> {workers, storage} -> searcher, and who may import what from outside."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("searcher", "workers", "storage", "commands")
TOP = ("cli", "commands")  # what sits above the rooms
RAY_FILES = ("workers/actor.py", "workers/crew.py", "workers/pool.py")
LAZY_RAY_FILES = ("workers/train_cluster.py",)  # within functions alone
FORBIDDEN = {
    "workers": {"storage", *TOP},
    "storage": {"workers", "torch", "transformers", *TOP},
}


class Import(NamedTuple):
    """One imported package: its first name, where, and whether only a call of a function reaches it."""

    package: str
    line: int
    in_function: bool
    relative: bool


def imports(tree: ast.AST, in_function: bool = False) -> Iterator[Import]:
    """Every import of a module, those inside functions and under TYPE_CHECKING included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name.split(".")[0], node.lineno, in_function, False)
        elif isinstance(node, ast.ImportFrom):
            yield Import((node.module or "").split(".")[0], node.lineno, in_function, node.level > 0)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "__import__",
            "import_module",
            "importlib.import_module",
        ):
            name = node.args[0] if node.args else None
            text = name.value if isinstance(name, ast.Constant) else None
            package = text.split(".")[0] if isinstance(text, str) else "?"
            yield Import(package, node.lineno, in_function, False)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, in_function or function)


def allowed(path: str, found: Import) -> bool:
    """Whether the file at ``path``, relative to the root, may import that."""
    room = path.split("/")[0]
    if found.relative:
        return False
    lazily = path in LAZY_RAY_FILES and found.in_function
    if found.package == "ray" and path not in RAY_FILES and not lazily:
        return False
    if found.package in sys.stdlib_module_names:
        return True
    if path == "workers/apply.py":
        return found.package == "torch"
    if path == "searcher/samplers.py" and found.package == "optuna":
        return found.in_function
    if room == "searcher":
        return found.package in ("numpy", "searcher")
    return found.package not in FORBIDDEN.get(room, set())


def violations(path: str, source: str) -> list[str]:
    """What a file breaks, a line each."""
    broken = [
        f"{path}:{found.line} imports {'relatively' if found.relative else found.package}"
        for found in imports(ast.parse(source))
        if not allowed(path, found)
    ]
    if Path(path).name == "utils.py":
        broken.append(f"{path} has a name that says nothing")
    return broken


def sources() -> list[str]:
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    files += [path for name in TOP if (path := ROOT / f"{name}.py").exists()]
    return sorted(path.relative_to(ROOT).as_posix() for path in files)


@pytest.mark.parametrize("path", sources())
def test_every_file_keeps_the_rule(path: str) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_the_rule_looks_at_every_room() -> None:
    """A moved folder would make the test above pass over nothing."""
    looked_at = {path.split("/")[0] for path in sources()}
    assert looked_at >= {*ROOMS, "cli.py"}
    assert {"workers/apply.py", *RAY_FILES} <= {*sources()}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("searcher/space.py", "import torch"),
        ("searcher/space.py", "import torch.nn.functional as F"),
        ("searcher/space.py", "from transformers import AutoConfig"),
        ("searcher/space.py", "import ray"),
        ("searcher/space.py", "import sqlalchemy"),
        ("searcher/space.py", "import typer"),
        ("searcher/space.py", "import scipy"),
        ("searcher/space.py", "import numpy, torch"),
        ("searcher/space.py", "import workers.model"),
        ("searcher/space.py", "from storage.models import Study"),
        ("searcher/space.py", "from cli import app"),
        ("searcher/space.py", "from commands.runs import run"),
        ("searcher/space.py", "def f():\n    import torch"),
        ("searcher/space.py", "class A:\n    def f(self):\n        if self:\n            import torch"),
        ("searcher/space.py", "try:\n    import torch\nexcept ImportError:\n    torch = None"),
        ("searcher/space.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("searcher/space.py", "import importlib\ntorch = importlib.import_module('torch.nn')"),
        ("searcher/space.py", "x = 'torch'\ny = __import__(x)"),
        ("searcher/space.py", "def f():\n    import optuna"),
        ("searcher/samplers.py", "import optuna"),
        ("searcher/samplers.py", "class A:\n    import optuna"),
        ("workers/model.py", "from storage import models"),
        ("workers/deeper/model.py", "import storage.models"),
        ("workers/model.py", "import cli"),
        ("workers/model.py", "def f():\n    import ray"),
        ("workers/reference_model/train.py", "import ray"),
        ("storage/report.py", "from workers.model import load_model"),
        ("storage/report.py", "import cli"),
        ("storage/report.py", "def f():\n    from torch import Tensor"),
        ("storage/migrations/env.py", "import ray"),
        ("cli.py", "import ray"),
        ("commands/runs.py", "from ray.util import ActorPool"),
        ("workers/apply.py", "import numpy"),
        ("workers/apply.py", "from searcher.rope import Factors"),
        ("workers/apply.py", "from workers.model import ModelInfo"),
        ("workers/apply.py", "import transformers"),
        ("workers/actor.py", "from . import model"),
        ("workers/actor.py", "from .math import sqrt"),
        ("storage/models.py", "from ..searcher import rope"),
        ("storage/utils.py", ""),
        ("searcher/deep/utils.py", "import math"),
    ],
)
def test_the_rule_sees_what_breaks_it(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("searcher/space.py", "from __future__ import annotations\nimport math, json\nimport numpy.typing as npt"),
        ("searcher/space.py", "from searcher.rope import Factors  # torch"),
        ("searcher/samplers.py", "def f():\n    import optuna\n    from optuna.samplers import TPESampler"),
        ("workers/model.py", "import torch\nimport transformers\nfrom searcher.rope import Factors"),
        ("workers/actor.py", "import ray\nfrom workers.model import ModelInfo"),
        ("workers/pool.py", "from ray.exceptions import RayError"),
        ("workers/apply.py", "import math\nimport torch\nfrom torch import nn"),
        ("storage/models.py", "import sqlalchemy\nfrom searcher.study import Outcome\nfrom storage.lease import Owner"),
        ("cli.py", "import typer\nfrom workers.model import load_model\nfrom storage.report import table"),
        ("workers/outils.py", ""),
    ],
)
def test_the_rule_lets_pass_what_keeps_it(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_the_searcher_runs_without_what_it_must_not_import() -> None:
    """Not by reading but by running: none of the heavy packages is loaded with it."""
    modules = [path[:-3].replace("/", ".") for path in sources() if path.startswith("searcher/")]
    heavy = ("torch", "transformers", "ray", "sqlalchemy", "typer", "optuna", "workers", "storage", "cli", "commands")
    script = (
        f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
