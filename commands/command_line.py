"""What the process list shows of a command: every user of a machine may read it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress


def hide_password() -> None:
    """Where the command line holds a database's password, become the same command without it.

    The whole address goes on in the environment, where ``storage.database.parse`` finds it. It was to be seen for as
    long as Python takes to start; who wants less than that leaves the password out. Ray, too, keeps the command line of
    a driver.

    Raises
    ------
    LongRopeError
        It cannot be told what of an address is its password.
    """
    arguments = sys.argv[1:]
    if os.name != "posix" or sys.orig_argv[-len(arguments) :] != arguments:
        return  # called by another program, whose command line is its own
    hidden, whole = _without_password(arguments)
    if hidden != arguments:
        from storage.database import WHOLE_ADDRESS

        os.environ.pop(WHOLE_ADDRESS, None)
        if whole is not None:
            os.environ[WHOLE_ADDRESS] = whole
        os.execv(sys.executable, [*sys.orig_argv[: -len(arguments)], *hidden])


def _without_password(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without the passwords of all ``--storage``; the last one, which counts, whole if it has any."""
    hidden, whole = list(arguments), None
    for place, argument in enumerate(arguments):
        option, equals, address = argument.partition("=")
        if place and arguments[place - 1] == "--storage":
            start, address = "", argument
        elif option == "--storage" and equals:
            start = "--storage="
        else:
            continue
        whole = None
        if "@" in address or "?" in address:  # else nothing heavy is imported
            from sqlalchemy.exc import ArgumentError

            from storage.database import without_password

            with suppress(ValueError, ArgumentError):  # what is no address is refused later, in words
                left = without_password(address)
                hidden[place], whole = start + left, address if left != address else None
    return hidden, whole
