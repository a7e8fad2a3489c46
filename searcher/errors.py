"""The one exception that a user is meant to see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class LongRopeError(Exception):
    """A mistake or a limit that the user can act on: one sentence on what was expected, what came and what to do.

    The command line prints it as one line and exits with status 1; anything else that escapes is a bug.
    """


@contextmanager
def needs(what: str, package: str, extra: str) -> Iterator[None]:
    """A block that imports a package of an extra.

    Parameters
    ----------
    what: cannot be done without; the beginning of a sentence.

    Raises
    ------
    LongRopeError
        The package is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise LongRopeError(
            f"{what} needs the package {package}; install it with: pip install 'longrope-search[{extra}]'"
        ) from error
