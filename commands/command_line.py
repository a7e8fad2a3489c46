"""What the process list shows of a command: every user of a machine may read it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress


def hide_password() -> None:
    """Where the command line holds a database's password, become the same command without it.

    The password goes on in PGPASSWORD. It was to be seen for as long as Python takes to start; who wants less than that
    leaves it out of the address. Ray, too, keeps the command line of a driver.
    """
    arguments = sys.argv[1:]
    if os.name != "posix" or sys.orig_argv[-len(arguments) :] != arguments:
        return  # called by another program, whose command line is its own
    hidden, secret = _without_password(arguments)
    if secret is not None and hidden != arguments:
        os.environ["PGPASSWORD"] = secret
        os.execv(sys.executable, [*sys.orig_argv[: -len(arguments)], *hidden])


def _without_password(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments with the passwords of all ``--storage`` left out, and the last of them, which counts."""
    hidden, secret = list(arguments), None
    for place, argument in enumerate(arguments):
        option, equals, address = argument.partition("=")
        if place and arguments[place - 1] == "--storage":
            start, address = "", argument
        elif option == "--storage" and equals:
            start = "--storage="
        else:
            continue
        if "@" in address or "password" in address:  # else nothing heavy is imported
            from sqlalchemy.exc import ArgumentError

            from storage.database import password, without_password

            with suppress(ValueError, ArgumentError):  # what is no address is refused later, in words
                secret = password(address)
                hidden[place] = start + without_password(address) if secret else argument
    return hidden, secret
