"""The reference model and the text it is searched on: shipped weights, and modules of the running Python's library.

The model was trained by ``examples/train_reference.py`` on the source of the standard library, less the modules named
here. Those modules are the documents of the default study: real text, on every machine that can run this, and unseen.
"""

from __future__ import annotations

import platform
import sysconfig
from pathlib import Path

from searcher.errors import LongRopeError

MODEL_DIR = Path(__file__).parent / "reference_model"

# Long modules that exist from Python 3.11 to 3.14 and that Linux distributions do not split off. None was trained on.
HELD_OUT: dict[str, tuple[str, ...]] = {
    "search": (
        "_pydecimal.py",
        "typing.py",
        "urllib/request.py",
        "tarfile.py",
        "unittest/mock.py",
        "difflib.py",
        "subprocess.py",
        "http/cookiejar.py",
    ),
    "selection": (
        "inspect.py",
        "email/_header_value_parser.py",
        "pickletools.py",
        "ipaddress.py",
        "xml/dom/minidom.py",
        "logging/handlers.py",
    ),
    "test": (
        "argparse.py",
        "pydoc.py",
        "doctest.py",
        "enum.py",
        "mailbox.py",
        "asyncio/base_events.py",
        "xml/etree/ElementTree.py",
        "pickle.py",
        "http/client.py",
        "configparser.py",
        "shutil.py",
        "threading.py",
    ),
}


# Tables and archives that look like code but teach nothing about it.
SKIPPED_FOLDERS = ("site-packages", "encodings", "__pycache__")


def stdlib_dir() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def held_out_documents() -> dict[str, list[Path]]:
    """The files of the search, selection and test sets on this machine.

    Raises
    ------
    LongRopeError
        A module of the list is missing: a stripped Python, or one outside 3.11 to 3.14.
    """
    root = stdlib_dir()
    documents = {part: [root / name for name in names] for part, names in HELD_OUT.items()}
    missing = [str(path) for paths in documents.values() for path in paths if not path.is_file()]
    if missing:
        raise LongRopeError(
            f"The reference documents are modules of the Python standard library, but {missing[0]} "
            f"({len(missing)} in all) is not in Python {platform.python_version()} here; "
            "name documents of your own with --data."
        )
    return documents


def training_files() -> list[Path]:
    """Every module of the standard library that is not held out, its tests included, in a stable order."""
    root = stdlib_dir()
    held_out = {name for names in HELD_OUT.values() for name in names}
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if path.relative_to(root).as_posix() not in held_out
        and not set(path.relative_to(root).parts) & set(SKIPPED_FOLDERS)
    ]


def library_files() -> list[Path]:
    """The training files that are not tests: what is tuned on. Some tests are in odd encodings, or not shipped."""
    root = stdlib_dir()
    return [path for path in training_files() if not {"test", "tests", "idle_test"} & {*path.relative_to(root).parts}]
